"""Run a learner's function through the cases of an exercise and say in words what is wrong."""

import importlib
import importlib.util
import linecache
import textwrap
import traceback
from collections.abc import Callable

import jax
import numpy as np

from rpa.check.compare import Wrong, equal, first_wrong, show
from rpa.check.errors import CheckFailed, NotStarted
from rpa.check.exercise import Case, Exercise
from rpa.check.runner import TookTooLong

FEWEST_MISTAKES = 2
"""A check that knows fewer likely mistakes than this is refused as unfinished."""


def check(number: str, function: Callable) -> None:
    """Check a learner's answer to an exercise, from cheap cases to hard ones.

    Prints one line if every case agrees with the reference.

    Args:
        number: "chapter.position", e.g. "1.2".
        function: the learner's function.

    Raises:
        CheckFailed: at the first case that is wrong; names the known mistake if there is a match.
        NotStarted: the function still is the stub of the exercise.
        ValueError: there is no such exercise, or `function` cannot be called.
    """
    exercise = find_exercise(number)
    if not callable(function):
        raise ValueError(
            f"rpa.check({number!r}, function): function is {function!r}, expected the function "
            "itself: write its name without brackets after it"
        )
    for position, case in enumerate(exercise.cases):
        actual = _run_case(exercise, case, function)
        expected = exercise.expected[position]
        wrong = first_wrong(expected, actual, exercise.tolerance, exercise.outputs)
        if wrong:
            named = _matching_mistakes(exercise, position, function, actual)
            raise CheckFailed(_explain(exercise, position, function, wrong, named))
    print(_praise(exercise, function))


def find_exercise(number: str) -> Exercise:
    """The exercise with this number; ValueError names those that exist."""
    chapter, _, position = str(number).partition(".")
    if not (chapter.isdigit() and position.isdigit()):
        raise ValueError(f'number is {number!r}, expected "chapter.exercise", for example "1.2"')
    exercises = exercises_of_chapter(int(chapter))
    if number not in exercises:
        known = ", ".join(exercises) or "none"
        raise ValueError(f"there is no exercise {number}; chapter {chapter} has: {known}")
    return exercises[number]


def exercises_of_chapter(chapter: int) -> dict[str, Exercise]:
    """The exercises that `rpa/check/chapterNN.py` defines, by number, in order.

    Raises:
        ValueError: one of them could never refuse an answer, or has a number of another chapter.
    """
    name = f"rpa.check.chapter{chapter:02d}"
    if importlib.util.find_spec(name) is None:
        return {}
    module = importlib.import_module(name)
    return collect(chapter, [v for v in vars(module).values() if isinstance(v, Exercise)])


def collect(chapter: int, found: list[Exercise]) -> dict[str, Exercise]:
    """Order exercises by number and refuse those that are not finished."""
    exercises = {}
    for exercise in sorted(found, key=lambda e: [int(part) for part in e.number.split(".")]):
        number = exercise.number
        if number in exercises or int(number.split(".")[0]) != chapter:
            raise ValueError(f"exercise {number}: number is taken, or not of chapter {chapter}")
        if not exercise.cases:
            raise ValueError(f"exercise {number} has no case, so its check cannot fail; add one")
        if len(exercise.mistakes) < FEWEST_MISTAKES:
            raise ValueError(
                f"exercise {number} knows {len(exercise.mistakes)} mistakes, expected at least "
                f"{FEWEST_MISTAKES}: which wrong answers will learners give?"
            )
        exercises[number] = exercise
    return exercises


def _run_case(exercise: Exercise, case: Case, function: Callable):
    """Call the learner's function; whatever goes wrong in there becomes a message for them."""
    arguments = exercise.fresh_arguments(case)
    try:
        actual = exercise.runner(exercise.drive, function, arguments, exercise.limit_s)
    except NotImplementedError as stub:
        raise NotStarted(f"not started yet: {stub}") from None
    except TookTooLong as late:
        headline = _headline(exercise, function, case)
        text = f"{headline}\n\nYour function was {late}. Is there a loop that never ends?"
        raise CheckFailed(text) from None
    except Exception as error:
        headline = _headline(exercise, function, case)
        raise CheckFailed(f"{headline}\n\n{_explain_exception(error, function)}") from error
    originals = exercise.fresh_arguments(case)
    for name, given, original in zip(case.arguments, arguments, originals, strict=True):
        if not _untouched(given, original):
            headline = _headline(exercise, function, case)
            raise CheckFailed(
                f"{headline}\n\nYour function changes its argument `{name}`. The caller still "
                "needs it: make a new array instead, for example with `jnp.where` or `.at[].set`."
            )
    return actual


def _untouched(given, original) -> bool:
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(original), strict=False):
        if isinstance(one, jax.Array):
            if one.is_deleted():
                return False
        elif isinstance(one, np.ndarray) and one.tobytes() != other.tobytes():
            return False
    return len(jax.tree.leaves(given)) == len(jax.tree.leaves(original))


def _matching_mistakes(exercise: Exercise, position: int, function: Callable, actual) -> list[str]:
    """Words of the known mistakes that give the learner's output in this case.

    Two mistakes may agree in a small case; the one that also agrees in most other cases is meant.
    """
    candidates = [
        (mistake, outputs)
        for mistake, outputs in zip(exercise.mistakes, exercise.mistaken, strict=True)
        if equal(outputs[position], actual, exercise.tolerance)
    ]
    if len(candidates) < 2:
        return [mistake.words for mistake, _ in candidates]
    elsewhere = [_attempt(exercise, case, function) for case in exercise.cases]
    agreements = [
        sum(equal(a, b, exercise.tolerance) for a, b in zip(outputs, elsewhere, strict=True))
        for _, outputs in candidates
    ]
    most = max(agreements)
    return [m.words for (m, _), count in zip(candidates, agreements, strict=True) if count == most]


def _attempt(exercise: Exercise, case: Case, function: Callable):
    try:
        arguments = exercise.fresh_arguments(case)
        return exercise.runner(exercise.drive, function, arguments, exercise.limit_s)
    except Exception as error:
        return error


def _headline(exercise: Exercise, function: Callable, case: Case) -> str:
    parts = (_describe(name, value) for name, value in case.arguments.items())
    name = getattr(function, "__name__", "your_function")
    return (
        f"✗ Exercise {exercise.number}: {name} is not right yet.\n"
        f"Case: {case.title}\n"
        + textwrap.fill(f"{name}({', '.join(parts)})", 100, subsequent_indent="    ")
    )


def _describe(name: str, value) -> str:
    """An argument as a message shows it: numbers in full, arrays by dtype and shape."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        if value.size <= 8:
            return f"{name}={show(value)}".replace("\n", "")
        return f"{name}={value.dtype}{list(value.shape)}"
    text = repr(value)
    return f"{name}={text if len(text) <= 60 else type(value).__name__}"


def _explain(exercise: Exercise, position: int, function, wrong: Wrong, named: list[str]) -> str:
    case = exercise.cases[position]
    lines = [_headline(exercise, function, case), ""]
    if wrong.index:
        lines.append(f"First wrong: {_place(exercise, case, wrong)}.")
    lines.append(f"{wrong.sentence[0].upper()}{wrong.sentence[1:]}.".replace("?.", "?"))
    if wrong.expected is not None:
        for title, value in (("expected", wrong.expected), ("yours", wrong.actual)):
            shown = show(value) or "too long to show"
            lines.append(f"{title:>10}: " + shown.replace("\n", "\n" + " " * 12))
    if named:
        lines += ["", textwrap.fill(f"This is what you get if {', or if '.join(named)}.", 100)]
    if position:
        titles = "; ".join(passed.title for passed in exercise.cases[:position])
        lines += ["", textwrap.fill(f"Right so far: {titles}.", 100)]
    return "\n".join(lines)


def _place(exercise: Exercise, case: Case, wrong: Wrong) -> str:
    """The index in the words of the exercise: names of its axes, or sequence, token, page."""
    if exercise.place and (not exercise.outputs or wrong.output == f"`{exercise.outputs[0]}`"):
        return exercise.place(case.arguments, wrong.index)
    if len(exercise.axes) == len(wrong.index):
        return ", ".join(f"{a} {i}" for a, i in zip(exercise.axes, wrong.index, strict=True))
    return f"index {list(wrong.index)}"


def _explain_exception(error: Exception, function: Callable) -> str:
    """The exception, and the line of the learner's own code that it came from."""
    code = getattr(function, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code and frame.filename == code.co_filename]
    text = f"Your function raises {type(error).__name__}: {error}"
    if own:
        line = linecache.getline(own[-1].filename, own[-1].lineno).strip()
        text += f"\n  line {own[-1].lineno}, in {own[-1].name}" + (f":  {line}" if line else "")
    return text


def _praise(exercise: Exercise, function: Callable) -> str:
    name = getattr(function, "__name__", "your function")
    titles = "; ".join(case.title for case in exercise.cases)
    text = (
        f"✓ Exercise {exercise.number}: {name} is right. {len(exercise.cases)} cases agree with "
        f"the reference ({titles}), and none of the {len(exercise.mistakes)} known mistakes."
    )
    return textwrap.fill(text, 100)
