"""The engine of the checks: what it says to every kind of wrong answer, and what it refuses."""

import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rpa.check
from rpa.check import CheckFailed, Exercise, NotStarted, errors, messages
from rpa.check.compare import equal, first_wrong
from rpa.check.engine import check_exercise
from rpa.check.errors import UnfinishedCheck, WrongResult
from rpa.check.index_words import ragged
from rpa.check.registry import collect
from rpa.check.runner import TookTooLong, time_limit
from rpa.check.source_text import literal
from rpa.ragged import RaggedBatch

pytestmark = pytest.mark.core


def doubling(**options) -> Exercise:
    """An exercise: double every number of x."""
    exercise = Exercise("9.1", lambda x: 2 * np.asarray(x), axes=("row", "column"), **options)
    exercise.case("four numbers", x=np.float32([[1, 2], [3, 4]]))
    exercise.case("zero and one", x=np.float32([[0, 1]]))
    exercise.mistake("x is squared")(lambda x: x * x)
    exercise.mistake("one is added")(lambda x: x + 1)
    return exercise


def refusal(function, exercise=None) -> str:
    """The message with which the check refuses this function."""
    with pytest.raises(CheckFailed) as refused:
        check_exercise(exercise or doubling(), function)
    return str(refused.value)


def test_right_answer_prints_what_was_verified(capsys):
    check_exercise(doubling(), lambda x: x + x)
    said = capsys.readouterr().out
    assert said.startswith("✓ Exercise 9.1") and "zero and one" in said


def test_numpy_answer_is_accepted(capsys):
    check_exercise(doubling(), lambda x: 2.0 * np.asarray(x, np.float64))
    assert "✓" in capsys.readouterr().out


def test_first_wrong_number_is_named_by_its_axes():
    said = refusal(lambda x: (2 * x).at[1, 0].set(7.0))
    assert "First wrong: row 1, column 0." in said
    assert "Expected 6, your output has 7; 1 of 4 numbers differ." in said


def test_known_mistake_is_named():
    assert "This is what you get if x is squared." in refusal(lambda x: x**2)


def test_mistake_that_agrees_in_more_cases_is_the_one_that_is_named():
    exercise = doubling()
    # Equal to "x is squared" in the first case only.
    exercise.mistake("only small numbers are right")(lambda x: jnp.where(x < 0.5, 9.0, x * x))
    said = refusal(lambda x: x * x, exercise)
    assert "x is squared" in said and "small" not in said


def test_unknown_mistake_is_not_given_a_name():
    assert "This is what you get" not in refusal(lambda x: x - 100)


def test_cases_before_the_failing_one_are_told():
    said = refusal(lambda x: jnp.where(x == 0, 5.0, 2 * x))
    assert "Right so far: four numbers." in said


@pytest.mark.parametrize(
    ("answer", "fragment"),
    [
        (lambda x: None, "returns None. Is the `return` missing?"),
        (lambda x: (2 * x)[0], "shape (2,), expected (2, 2)"),
        (lambda x: (2 * x).astype(jnp.bfloat16), "dtype bfloat16, expected float32"),
        (lambda x: (2 * x).astype(jnp.int32), "dtype int32, expected float32"),
        (lambda x: (2 * x).tolist(), "is a list, expected an array or a number"),
        (lambda x: (2 * x, x), "is a tuple, expected an array"),
        (lambda x: 2 * x * jnp.nan, "has nan (not a finite number)"),
        (lambda x: x @ jnp.ones(3), "Your function raises TypeError"),
        (lambda: 1, "takes 0 positional arguments but 1 was given"),
    ],
)
def test_each_kind_of_wrong_answer_gets_its_message(answer, fragment):
    assert fragment in refusal(answer)


def test_exception_shows_the_learners_own_line():
    def raises(x):
        y = 2 * x
        return y.reshape(17)

    said = refusal(raises)
    assert "in raises:  return y.reshape(17)" in said


def test_stub_passes_through_as_not_started():
    def stub(x):
        raise NotImplementedError("Exercise 9.1: write stub (about 1 line)")

    with pytest.raises(NotStarted, match="not started yet: Exercise 9.1"):
        check_exercise(doubling(), stub)


def test_what_jax_has_not_implemented_is_not_mistaken_for_the_stub():
    def answer(x):
        raise NotImplementedError("Evaluation rule for 'x' not implemented")

    assert "raises NotImplementedError: Evaluation rule" in refusal(answer)


def test_changing_an_argument_is_refused():
    def in_place(x):
        x *= 2
        return x

    said = refusal(in_place, doubling(convert=np.array))
    assert "changes its argument `x`" in said


def test_donating_an_argument_is_refused():
    donates = jax.jit(lambda x: 2 * x, donate_argnums=0)
    assert "changes its argument `x`" in refusal(lambda x: donates(x))


def test_endless_loop_is_stopped():
    def endless(x):
        while True:
            pass

    assert "never ends" in refusal(endless, doubling(limit_s=0.2))


def test_time_limit_leaves_no_alarm_behind():
    with pytest.raises(TookTooLong), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # an alarm left behind would end the test here


def test_time_limit_off_the_main_thread_runs_without_a_limit():
    finished = []

    def body():
        with time_limit(0.001):
            time.sleep(0.02)
        finished.append(True)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert finished == [True]


def test_several_outputs_are_named():
    exercise = Exercise("9.1", lambda n: (2 * n, n + 1), outputs=("flops", "bytes"))
    exercise.case("three", n=3)
    exercise.mistake("bytes forget the one")(lambda n: (2 * n, n))
    exercise.mistake("flops are not doubled")(lambda n: (n, n + 1))
    said = refusal(lambda n: (2 * n, n), exercise)
    assert "Expected 4, `bytes` has 3." in said and "bytes forget the one" in said
    assert "returns one value, expected 2 (flops, bytes)" in refusal(lambda n: 6, exercise)


def test_two_mistakes_at_once_are_named_one_after_the_other():
    exercise = Exercise("9.1", lambda n: (2 * n, n + 1), outputs=("flops", "bytes"))
    exercise.case("three", n=3)
    exercise.mistake("bytes forget the one")(lambda n: (2 * n, n))
    exercise.mistake("flops are not doubled")(lambda n: (n, n + 1))
    assert "if flops are not doubled." in refusal(lambda n: (n, n), exercise)


def test_mistake_that_fails_an_earlier_case_is_not_named():
    exercise = doubling()
    exercise.case("a negative number", x=np.float32([[-1]]))
    exercise.mistake("the sign is lost")(lambda x: jnp.abs(2 * x))
    exercise.mistake("everything becomes two")(lambda x: jnp.full_like(x, 2.0))
    said = refusal(lambda x: jnp.abs(2 * x), exercise)
    assert "This is what you get if the sign is lost." in " ".join(said.split())


def test_mistake_whose_other_output_the_answer_has_right_is_not_named():
    exercise = Exercise("9.1", lambda n: (n, n + 1), outputs=("positions", "pages"))
    exercise.case("three", n=3)
    exercise.mistake("positions start at 0")(lambda n: (0, 0))
    exercise.mistake("pages are doubled")(lambda n: (n, 2 * n))
    assert "This is what you get" not in refusal(lambda n: (n, 0), exercise)
    assert "if positions start at 0." in refusal(lambda n: (0, 0), exercise)


def test_numpy_mistake_in_float64_is_recognised():
    exercise = doubling()
    exercise.mistake("it is tripled")(lambda x: 3 * np.asarray(x, np.float64))
    assert "if it is tripled." in refusal(lambda x: 3 * x, exercise)


def test_outputs_in_another_order_are_recognised():
    outputs = ("starts", "owner", "count")
    exercise = Exercise("9.1", lambda x: (x, x + 1, np.int32(7)), outputs=outputs)
    exercise.case("two", x=np.int32([3, 5]))
    said = " ".join(refusal(lambda x: (np.int32(7), x, x + 1), exercise).split())
    assert "right but in another order: you return (count, starts, owner), expected (st" in said
    assert "another order" not in refusal(lambda x: (np.int32(7), x, x), exercise)


def test_another_order_explains_more_than_a_mistake_in_one_output():
    exercise = Exercise("9.1", lambda n: (2 * n, n + 1), outputs=("flops", "bytes"))
    exercise.case("three", n=3)
    exercise.mistake("one is added to n")(lambda n: (n + 1, n + 1))
    assert "another order" in refusal(lambda n: (n + 1, 2 * n), exercise)
    exercise = Exercise("9.1", lambda n: (2 * n, n + 1), outputs=("keys", "values"))
    exercise.case("three", n=3)
    exercise.mistake("keys and values are swapped")(lambda n: (n + 1, 2 * n))
    assert "keys and values are swapped" in refusal(lambda n: (n + 1, 2 * n), exercise)


def test_transposed_output_is_recognised():
    said = refusal(lambda x: 2 * x.T)
    assert "Your output is right but transposed: its `.transpose(1, 0)` is what was exp" in said
    assert "transposed" not in refusal(lambda x: 5 * x.T)


def test_call_is_written_so_that_it_can_be_repeated():
    assert "<lambda>(x=jnp.float32([[1, 2], [3, 4]]))" in refusal(lambda x: x)
    assert "x=np.float32(" in refusal(lambda x: 5 * x, doubling(convert=np.array))
    batch = RaggedBatch(*(np.arange(n, dtype=np.int32) for n in (2, 6, 3, 3)))
    values = [
        np.float32([[0.1, -np.inf], [np.nan, 1e-7]]),
        np.arange(64, dtype=np.int32).reshape(8, 8),
        np.bool_([True, False]),
        jnp.bfloat16([1, 2.5]),
        [("be kind: yo, be kind: yo, be kind: yo, be kind: yo", [7, 2, 5])],
        batch,
    ]
    for value in values:
        again = eval(literal(value), {"jnp": jnp, "RaggedBatch": RaggedBatch})
        assert type(again) is list or jax.tree.all(jax.tree.map(equal_bits, again, value))
        assert type(again) is not list or again == value


def equal_bits(one, other) -> bool:
    return one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def refuses_text(function, count):
    """A `drive` that cannot go on with a text."""
    result = function(count)
    if isinstance(result, str):
        raise WrongResult(f"expected a list, got {result!r}")
    return result


def test_result_that_drive_refuses_is_a_wrong_result_not_an_exception():
    exercise = Exercise("9.1", lambda n: list(range(n)), drive=refuses_text)
    exercise.case("none", n=0)
    exercise.case("two", n=2)
    exercise.mistake("a text of digits is made")(lambda n: "01"[:n] or [])
    exercise.mistake("one is left out")(lambda n: list(range(1, n)))
    said = refusal(lambda n: ["", "", "xy"][n] or [], exercise)
    assert "Expected a list, got 'xy'." in said and "raises" not in said
    assert "Right so far: none." in said and "This is what you get" not in said
    assert "if a text of digits is made." in refusal(lambda n: "01" if n else [], exercise)


def test_numbers_are_shown_in_their_own_kind():
    assert "expected True, your output has False" in first_wrong(True, np.bool_(False), 0).sentence
    assert "expected 16793600, " in first_wrong(16793600, 1, 0).sentence


def test_plain_python_values_are_compared_with_equality():
    assert first_wrong([[0, 1], [2]], [[0, 1], [2]], 0.0) is None
    assert first_wrong({"a": 1}, {"a": 2}, 0.0).sentence == "your output is not what was expected"
    assert first_wrong(3, 3.0, 0.0) is None


def test_nan_equals_nan_and_infinity_itself():
    array = np.float32([np.nan, np.inf, -np.inf])
    assert equal(array, array.copy(), 1e-6)
    assert not equal(array, np.float32([np.nan, -np.inf, -np.inf]), 1e-6)


def test_a_driver_can_use_a_class():
    class Doubler:
        def __init__(self):
            self.seen = []

        def push(self, x):
            self.seen.append(2 * x)

    def use(cls, count):
        doubler = cls()
        for x in range(count):
            doubler.push(x)
        return doubler.seen

    exercise = Exercise("9.1", Doubler, drive=use)
    exercise.case("three", count=3)
    check_exercise(exercise, Doubler)
    wrong = type("Wrong", (Doubler,), {"push": lambda self, x: self.seen.append(x)})
    assert "expected: [0, 2, 4]" in refusal(wrong, exercise)


def test_a_runner_of_its_own_is_used():
    def runner(drive, function, arguments, limit_s):
        raise TookTooLong(f"stopped after {limit_s:g} s")

    assert "stopped after 30 s" in refusal(lambda x: 2 * x, doubling(runner=runner))


def test_matmuls_run_in_full_precision():
    seen = []
    check_exercise(
        doubling(), lambda x: seen.append(jax.config.jax_default_matmul_precision) or 2 * x
    )
    assert seen == ["highest", "highest"]


def test_ragged_place_knows_sequence_position_and_page():
    batch = SimpleNamespace(
        cu_q_lens=np.int32([0, 1, 4, 99]),
        kv_lens=np.int32([5, 9, 99]),
        page_indices=np.int32([7, 3, 8, 1, 4, 2, 99, 99, 99]),
        distribution=np.int32([1, 1, 2]),
    )
    arguments = {"batch": batch, "kv_cache": np.zeros((9, 4, 1, 1, 128))}
    assert ragged(arguments, (0, 2)) == (
        "sequence 0, new token 0 of 1 (position 4; page 1 of the sequence, page 3 of the cache), "
        "head 2"
    )
    assert ragged(arguments, (3, 0, 5)) == (
        "sequence 1, new token 2 of 3 (position 8; page 2 of the sequence, page 2 of the cache), "
        "head 0, lane 5"
    )
    assert "padding row" in ragged(arguments, (4, 0))


def test_notebook_shows_the_message_without_the_engine():
    error = CheckFailed("first\nsecond")
    assert error._render_traceback_() == ["first", "second"]
    assert NotStarted("x")._render_traceback_() == ["x"]


def test_rpa_check_is_callable_although_it_is_a_package():
    with pytest.raises(ValueError, match="there is no exercise 1.99; chapter 1 has: 1.1"):
        rpa.check("1.99", lambda: None)
    with pytest.raises(ValueError, match='expected "chapter.exercise"'):
        rpa.check("one", lambda: None)
    with pytest.raises(ValueError, match="there is no exercise 77.1"):
        rpa.check("77.1", lambda: None)
    with pytest.raises(ValueError, match=r'expected text: write it in quotes, rpa.check\("0.1", '):
        rpa.check(0.1, lambda: None)
    with pytest.raises(ValueError, match="without brackets"):
        rpa.check("1.1", 3.0)


def test_checks_that_cannot_fail_are_refused():
    with pytest.raises(UnfinishedCheck, match="has no case"):
        collect(9, [Exercise("9.1", abs)])
    unfinished = Exercise("9.1", abs)
    unfinished.case("one", x=1)
    with pytest.raises(UnfinishedCheck, match="knows 0 mistakes, expected at least 2"):
        collect(9, [unfinished])
    with pytest.raises(UnfinishedCheck, match="is taken"):
        collect(9, [doubling(), doubling()])
    with pytest.raises(UnfinishedCheck, match="is not of chapter 8"):
        collect(8, [doubling()])


def test_an_unsolved_exercise_that_a_later_cell_calls_is_one_line(capsys):
    class Shell:
        def showtraceback(self, error, tb_offset):
            print("the stack")

    stub = NotImplementedError("Exercise 4.2: write row_sums (about 15 lines)")
    errors._show(Shell(), type(stub), stub, None)
    said = capsys.readouterr()
    assert said.err == "not started yet: Exercise 4.2: write row_sums (about 15 lines)\n"
    other = NotImplementedError("JAX cannot do this")
    errors._show(Shell(), type(other), other, None)
    assert capsys.readouterr().out == "the stack\n"


@pytest.mark.parametrize(
    ("line", "error", "meaning"),
    [
        ("ref.at[page, :rows]", jax.errors.TracerBoolConversionError, "pl.ds(start, size)"),
        ("if n > 3:", jax.errors.TracerBoolConversionError, "pl.when(condition)"),
        ("for p in range(n):", jax.errors.TracerIntegerConversionError, "pl.loop(0, n)"),
    ],
)
def test_what_jax_says_of_a_traced_value_gets_words(line, error, meaning):
    def raises(x):
        raise error(x)

    with pytest.raises(error) as raised:
        jax.jit(raises)(1)
    assert meaning in messages.meaning_of(raised.value, line)


class Badly(Exception):
    def __str__(self):
        raise ValueError


def _raises_badly(x):
    raise Badly


ODD_ANSWERS = {
    "written in C": len,
    "a method of a str": "x".join,
    "of JAX": jnp.exp,
    "of NumPy": np.exp,
    "a class": dict,
    "an integer of 400 digits": lambda x: 10**400,
    "a complex number": lambda x: 1j,
    "an object": lambda x: object(),
    "nothing": lambda x: None,
    "text": lambda x: ["x"],
    "an empty array": lambda x: np.zeros(0),
    "a generator": lambda x: (y for y in x),
    "no arguments": lambda: 1,
    "an exception without words": _raises_badly,
}


@pytest.mark.parametrize("kind", ODD_ANSWERS)
def test_an_odd_answer_is_refused_in_words(kind):
    assert "Exercise 9.1" in refusal(ODD_ANSWERS[kind])


@pytest.mark.parametrize(
    "function",
    [len, jnp.exp, np.exp, "x".join, lambda *_: 10**400],
    ids=["len", "jnp.exp", "np.exp", "str.join", "lambda"],  # an address would differ per worker
)
def test_the_door_refuses_what_an_answer_rarely_is(function, monkeypatch):
    monkeypatch.setenv("RPA_PROGRESS", "off")
    with pytest.raises(CheckFailed, match="Exercise 0.1"):
        rpa.check("0.1", function)
