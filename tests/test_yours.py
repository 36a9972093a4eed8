"""The learner's own file: it grows by exercises, and ends in a kernel for any batch."""

import linecache
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

pytest.importorskip("jupytext", reason="the course is built where the extra [dev] is installed")

import rpa.check
import rpa.yours
from course.assemble import REFERENCE, assemble, reference_text
from course.proof import namespace_of, run_up_to_answer
from course.source import find_exercise, with_solution, wrong_answer
from rpa import compat
from rpa.check.errors import CheckFailed
from rpa.check.yours.earlier import LINE, your_functions
from rpa.check.yours.growing import defined_in, imports_of, read
from rpa.lab.compile.compiler import compile_for
from rpa.lab.compile.functions import load
from rpa.lab.copies.traffic import count
from rpa.lab.programs import Workload, own
from rpa.shapes import AttentionShape
from rpa.yours import reference
from tests.batches import Shape, make_case
from tests.kernel_harness import EAGER, MODES, ON_WAIT, check, run
from tests.test_kernel_batches import random_lengths

FORBIDDEN = {"rpa.tiled", "rpa.streamed", "rpa.fused", "rpa.plain", "rpa.kernel"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RPA_YOURS", str(tmp_path))
    return tmp_path


def play(number, code=None):
    """Answer an exercise in its notebook and run its check, as a learner does; the namespace."""
    source, exercise = find_exercise(number)
    namespace = namespace_of(source, exercise)
    run_up_to_answer(exercise, with_solution(exercise) if code is None else code, namespace)
    rpa.check(number, namespace[exercise.name])
    return namespace


# --- The file ------------------------------------------------------------------------------------


def test_the_reference_is_what_the_solutions_say():
    written = REFERENCE.read_text(encoding="utf-8")
    assert written == reference_text(), "run: python -m course.build"


def test_the_assembled_file_stands_on_the_lower_rungs_alone(tmp_path):
    path = assemble(tmp_path)
    assert list(read(path)) == list(LINE)
    for line in imports_of(path):
        module = line.split()[1]
        assert ".".join(module.split(".")[:2]) not in FORBIDDEN, line
    assert list(read(path).values())[-1][0] == "ragged_attention"
    assert path.read_text().rstrip().splitlines()[-1].startswith("    return")


def test_a_second_answer_takes_the_place_of_the_first(folder):
    play("4.3")
    before = (folder / "my_rpa.py").read_text()
    _, exercise = find_exercise("4.3")
    answer = with_solution(exercise).replace("weights @ values", "jnp.dot(weights, values)")
    play("4.3", answer)
    after = (folder / "my_rpa.py").read_text()
    assert "jnp.dot(weights, values)" in after and "jnp.dot" not in before
    assert after.count("def online_step") == 1


def test_what_the_answer_needs_of_other_cells_comes_along(folder):
    answer = """def online_step(row_max, row_sum, acc, scores, values):
    new_max = jnp.maximum(row_max, scores.max(axis=1, keepdims=True))
    shrink, weights = exp_of(row_max - new_max), exp_of(scores - new_max)
    new_sum = row_sum * shrink + FACTOR * weights.sum(axis=1, keepdims=True)
    return new_max, new_sum, acc * shrink + weights @ values"""
    source, exercise = find_exercise("4.3")
    namespace = namespace_of(source, exercise)
    run_up_to_answer(exercise, answer, namespace)
    helper = "def exp_of(x):\n    return jnp.exp(x)\n"
    name = "<another cell>"
    linecache.cache[name] = (len(helper), None, helper.splitlines(keepends=True), name)
    exec(compile(helper, name, "exec"), namespace)
    namespace["FACTOR"] = 1.0
    rpa.check("4.3", namespace["online_step"])
    text = (folder / "my_rpa.py").read_text()
    assert {"exp_of", "FACTOR", "online_step"} <= defined_in(text)
    assert "online_step" in your_functions()


def test_nothing_is_collected_where_that_is_switched_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RPA_YOURS", "off")
    monkeypatch.chdir(tmp_path)
    play("4.3")
    assert not list(tmp_path.iterdir()) and "Written" not in capsys.readouterr().out


def test_a_file_that_cannot_be_imported_is_said_and_left_alone(folder, capsys):
    play("4.3")
    path = folder / "my_rpa.py"
    path.write_text(path.read_text() + "\n1 / 0\n")
    assert rpa.yours.earlier("online_step") is reference.online_step
    printed = capsys.readouterr().out
    assert "my_rpa.py cannot be imported: ZeroDivisionError" in printed
    assert "online_step: rpa.yours.reference.online_step, because 4.3 is not solved" in printed


# --- The learner ---------------------------------------------------------------------------------


def test_a_learner_ends_with_a_kernel_of_their_own(folder, capsys):
    """Exercise by exercise; checks of kernels in the sandbox take long, so two of them are run."""
    play("4.3")
    assert play("4.7")["online_step"].__module__ == "my_rpa"
    printed = capsys.readouterr().out
    assert "online_step: yours, of 4.3" in printed and "Written to my_rpa.py" in printed
    assert "v5e" in printed and "rung 4 takes" in printed
    for number in ("5.6", "5.7", "6.6"):
        source, exercise = find_exercise(number)
        namespace = namespace_of(source, exercise)
        run_up_to_answer(exercise, with_solution(exercise), namespace)
        rpa.yours.collect(number, namespace[exercise.name])
    capsys.readouterr()
    namespace = play("7.3")
    printed = capsys.readouterr().out
    assert "list_work, live_lengths, run_work: yours, of 6.6" in printed
    assert namespace["run_work"].__module__ == "my_rpa"
    assert "rpa.yours.reference" not in (folder / "my_rpa.py").read_text()
    assert (folder / "my_rpa.py").read_text() == assemble(folder / "again").read_text()


def test_one_who_skipped_chapters_4_and_5_is_told_whose_functions_are_used(folder, capsys):
    source, exercise = find_exercise("6.6")
    namespace = namespace_of(source, exercise)
    run_up_to_answer(exercise, with_solution(exercise), namespace)
    rpa.yours.collect("6.6", namespace[exercise.name])
    printed = capsys.readouterr().out
    assert "block_order: rpa.yours.reference.block_order, because 5.7 is not solved" in printed
    text = (folder / "my_rpa.py").read_text()
    assert "from rpa.yours.reference import" in text and list(read(folder / "my_rpa.py")) == ["6.6"]
    case = make_case(Shape(2, 1, 64, page_size=8), [(1, 9), (0, 3), (3, 12)])
    with pltpu.force_tpu_interpret_mode(ON_WAIT.params):
        attend = jax.jit(load(f"{folder}/my_rpa.py:fused_attention"))
        check(case, *run(attend, *case.arrays, case.batch, sm_scale=0.125), sm_scale=0.125)


def test_an_earlier_answer_that_was_spoiled_is_named_as_what_is_wrong(folder):
    play("4.3")
    path = folder / "my_rpa.py"
    spoiled = path.read_text().replace("acc * rescale + weights", "acc + weights")
    assert spoiled != path.read_text()
    path.write_text(spoiled)
    with pytest.raises(CheckFailed, match=r"uses your online_step of 4\.3, in my_rpa\.py") as said:
        play("4.7")
    assert "Exercise 4.3: online_step is not right" in str(said.value)


def test_a_wrong_answer_is_refused_by_name_and_not_collected(folder):
    _, exercise = find_exercise("4.7")
    cell = exercise.tagged("wrong")[0]
    with pytest.raises(CheckFailed, match="the causal mask ignores the cached prefix"):
        play("4.7", wrong_answer(exercise, cell))
    assert not (folder / "my_rpa.py").exists()


# --- The kernel ----------------------------------------------------------------------------------

SHAPES = {
    "MQA 2/1, float32": Shape(2, 1, 64, page_size=8, pages_per_seq=6),
    "GQA 4/2, bfloat16": Shape(4, 2, 128, page_size=8, pages_per_seq=6, dtype="bfloat16"),
    "5/1 of 80, float32": Shape(5, 1, 80, page_size=3, pages_per_seq=9),
    "9/3 of 64, bfloat16": Shape(9, 3, 64, page_size=4, pages_per_seq=9, dtype="bfloat16"),
}


def check_batches(shape, mode, seeds, block_pages=2):
    for seed in seeds:
        lengths = random_lengths(np.random.default_rng(seed), shape)
        check_case(make_case(shape, lengths, seed=seed), mode, block_pages * shape.page_size)


def check_case(case, mode, block_tokens=None):
    options = {"sm_scale": 0.125, "block_tokens": block_tokens}
    with pltpu.force_tpu_interpret_mode(mode.params):
        results = run(reference.ragged_attention, *case.arrays, case.batch, **options)
    check(case, *results, sm_scale=0.125)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_some_batches(mode):
    check_batches(SHAPES["MQA 2/1, float32"], mode, range(6))


@pytest.mark.full
@pytest.mark.parametrize("block_pages", [1, 2, None])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_many_batches(name, mode, block_pages):
    shape = SHAPES[name]
    check_batches(shape, mode, range(100, 125), block_pages or shape.pages_per_seq)


SMALL = Shape(2, 1, 64, page_size=8, pages_per_seq=6)


@pytest.mark.parametrize(
    "lengths",
    [
        [(0, 9), (1, 9), (0, 0), (0, 4), (1, 1), (0, 0)],  # 4: idle slots anywhere
        [(3, 7), (3, 8), (3, 9), (3, 15), (3, 16), (3, 17)],  # 12: across pages
        [(0, 5), (30, 44), (0, 0), (1, 3)],  # 4 in the middle, and a decode behind a prompt
        [],
    ],
    ids=["idle slots", "page ends", "in the middle", "nothing"],
)
def test_traps(lengths):
    """7, 8 and 10 as well: NaN in all that is not owned, garbage in the table, padding rows."""
    check_case(make_case(SMALL, lengths), ON_WAIT, 16)


def test_shared_pages_are_read_by_both():
    check_case(make_case(SMALL, [(1, 13), (1, 14), (1, 20)], share=True), ON_WAIT, 16)


def test_a_traced_scale_and_a_batch_of_jax_arrays():
    case = make_case(SMALL, [(1, 9), (3, 12)])

    @jax.jit
    def scaled(batch, sm_scale):
        return reference.ragged_attention(*case.arrays, batch, sm_scale=sm_scale)

    with pltpu.force_tpu_interpret_mode(ON_WAIT.params):
        check(case, *run(scaled, jax.tree.map(jnp.asarray, case.batch), 0.3), sm_scale=0.3)


def test_a_query_that_has_more_tokens_than_its_sequence_is_refused():
    case = make_case(SMALL, [(1, 9)])
    case.batch.kv_lens[0] = 0
    with pytest.raises(ValueError, match="kv_len"):
        reference.ragged_attention(*case.arrays, case.batch, sm_scale=1.0)


def test_a_long_batch_has_no_race_with_blocks_as_they_are_chosen():
    shape = Shape(4, 2, 128, page_size=64, pages_per_seq=24, max_num_seqs=3, num_tokens=90)
    check_case(make_case(shape, [(1, 1500), (80, 1300), (1, 70)]), EAGER)


# --- In the lab ----------------------------------------------------------------------------------

OWN = "rpa.yours.reference:ragged_attention"


@pytest.mark.parametrize("model", ["llama-3-8b-on-4", "smollm2-135m"])
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_it_compiles(chip, model):
    if chip != "v5e" and model != "smollm2-135m":
        pytest.skip("one model for each of the other chips: a minute less")
    program = own(OWN, Workload(model, num_seqs=4, q_len=8, kv_len=1024))
    result = compile_for(
        chip, program.function, *program.args, kwargs=program.kwargs, donate_argnums=(3,)
    )
    if result.error_kind in ("no libtpu", "unknown chip", "old libtpu"):
        pytest.skip(result.error)
    assert result.ok, result.error
    assert not result.temp_bytes > 64 * 2**20  # the cache is not copied


def test_its_traffic_is_counted(folder):
    path = folder / "my_rpa.py"
    path.write_text(REFERENCE.read_text())
    case = make_case(Shape(8, 2, 128, page_size=16, dtype="bfloat16"), [(1, 40), (20, 60)])
    layer = AttentionShape(8, 2, 128, page_size=16)
    traffic = count(f"{path}:ragged_attention", case.batch, layer)
    assert traffic.rung == "yours"
    assert traffic.kinds["cache write"].num_bytes == 21 * layer.token_bytes


def lab(*arguments):
    command = [sys.executable, "-m", "rpa", "lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_line_knows_the_row_yours(folder):
    path = folder / "my_rpa.py"
    path.write_text(REFERENCE.read_text())
    if compat.JAX_VERSION < (0, 8):
        pytest.skip("schedules are read from jax 0.8 on")
    done = lab("schedule", "--kernel", f"{path}:ragged_attention", "--chip", "v5e", "--case",
               "decode", "--model", "llama-3-70b-on-8")  # fmt: skip
    if "libtpu" in done.stderr or "no dump" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.startswith("yours, ragged_attention on v5e"), done.stderr


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("nothing", "is no kernel: expected"),
        ("absent.py:f", "there is no file absent.py"),
        ("rpa.fused:absent", "has no function absent; it has: "),
    ],
)
def test_a_kernel_that_is_not_there_is_refused_in_words(kernel, words):
    done = lab("schedule", "--kernel", kernel, "--chip", "v5e", "--case", "decode")
    assert done.returncode and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
