"""Run a learner's function through the cases of an exercise and say in words what is wrong."""

import inspect
import textwrap
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from rpa.check.compare import Wrong, first_wrong
from rpa.check.errors import (
    CannotShip,
    CheckFailed,
    KernelFault,
    NotStarted,
    SandboxFailed,
    WrongResult,
    is_stub,
    text_of,
)
from rpa.check.exercise import Case, Exercise
from rpa.check.matching import why
from rpa.check.messages import (
    explain_changed_argument,
    explain_difference,
    explain_exception,
    headline,
    praise,
)
from rpa.check.progress import note
from rpa.check.registry import find_exercise
from rpa.check.runner import TookTooLong
from rpa.check.yours import LINE, collect, functions_used


def check(number: str, function: Callable) -> None:
    """Check a learner's answer to an exercise, from cheap cases to hard ones.

    Prints one line if every case agrees with the reference.

    Args:
        number: "chapter.position", e.g. "1.2".
        function: the learner's function.

    Raises:
        CheckFailed: at the first case that is wrong; names the known mistake if there is a match.
        NotStarted: the function still is the stub of the exercise.
        SandboxFailed: the process for kernels is not to be had; no attempt is counted.
        ValueError: there is no such exercise, or `function` cannot be called.
    """
    exercise = find_exercise(number)
    if not callable(function):
        raise ValueError(
            f"rpa.check({number!r}, function): function is {function!r}, expected the function "
            "itself: write its name without brackets after it"
        )
    try:
        check_pieces(exercise, function)
        run_cases(exercise, function)
        said = praise(exercise, function)
        if exercise.epilogue:
            said += f"\n{_epilogue(exercise, function)}"
    except CheckFailed as failed:
        note(number, solved=False)
        blame_an_earlier_answer(number, function, failed)
        raise
    print(said)
    note(number, solved=True)
    if number in LINE and (path := collect(number, function)):
        print(f"Written to {path.name}.")


def check_pieces(exercise: Exercise, function: Callable) -> None:
    """Check the functions that a whole kernel is made of, as its notebook has them."""
    namespace = getattr(inspect.unwrap(function), "__globals__", {})
    for piece in exercise.pieces:
        if callable(own := namespace.get(piece.name)):
            run_cases(piece, own)


def blame_an_earlier_answer(number: str, function: Callable, failed: CheckFailed) -> None:
    """Raise another CheckFailed if an earlier function of the learner's own file is what is wrong.

    Args:
        number: of the exercise that was refused.
        function: the answer, which uses the earlier functions.
        failed: why it was refused.
    """
    own = functions_used(function)
    for earlier in [n for n in LINE if n in list(LINE)[: _position(number)]]:
        exercise = find_exercise(earlier)
        for part in (*exercise.pieces, exercise):
            name = part.name or LINE[earlier]
            if name not in own:
                continue
            try:
                run_cases(part, own[name])
            except CheckFailed as wrong:
                raise CheckFailed(
                    f"✗ Exercise {number} uses your {name} of {earlier}, in my_rpa.py, and that is "
                    f"not right: mend it first.\n\n{wrong}"
                ) from failed


def _position(number):
    return list(LINE).index(number) if number in LINE else sum(_key(n) < _key(number) for n in LINE)


def _key(number):
    return [int(part) for part in number.split(".")]


def _epilogue(exercise: Exercise, function: Callable) -> str:
    try:
        return textwrap.fill(exercise.epilogue(function), 100)
    except KernelFault as refused:
        name = getattr(function, "__name__", "your function")
        raise CheckFailed(
            f"✗ Exercise {exercise.number}: {name} is not right yet.\n\n"
            f"{textwrap.fill(str(refused), 100)}"
        ) from None


def check_exercise(exercise: Exercise, function: Callable) -> None:
    """Run the cases in order; print praise, or raise CheckFailed at the first that is wrong."""
    run_cases(exercise, function)
    print(praise(exercise, function))


def run_cases(exercise: Exercise, function: Callable) -> None:
    """Run the cases in order; raise CheckFailed at the first that is wrong."""
    for position, case in enumerate(exercise.cases):
        try:
            actual = _run_case(exercise, case, function)
            expected = exercise.expected[position]
            wrong = first_wrong(expected, actual, exercise.tolerance, exercise.outputs)
        except WrongResult as refused:
            actual, wrong = refused, Wrong(str(refused))
        if wrong:
            later = partial(_outputs_after, exercise, position, function)
            cause = why(exercise, position, wrong, actual, later)
            text = explain_difference(exercise, position, wrong, cause)
            raise _refusal(exercise, case, function, text)


def _run_case(exercise: Exercise, case: Case, function: Callable):
    """Call the learner's function; whatever goes wrong in there becomes a message for them."""
    arguments = exercise.fresh_arguments(case)
    try:
        actual = exercise.runner(exercise.drive, function, arguments, exercise.limit_s)
    except TookTooLong as late:
        text = f"Your function was {late}. Is there a loop that never ends?"
        raise _refusal(exercise, case, function, text) from None
    except (KernelFault, CannotShip) as fault:  # the sandbox speaks, in whole sentences
        raise _refusal(exercise, case, function, str(fault)) from None
    except WrongResult:  # `drive` speaks, not the learner's function
        raise
    except (SandboxFailed, KeyboardInterrupt):  # not the learner's mistake: no attempt is counted
        raise
    except BaseException as error:  # `sys.exit()` too
        if is_stub(error):
            raise NotStarted(f"not started yet: {text_of(error)}") from None
        text = explain_exception(error, function)
        raise _refusal(exercise, case, function, text) from error
    originals = exercise.fresh_arguments(case)
    for name, given, original in zip(case.arguments, arguments, originals, strict=True):
        if not _untouched(given, original):
            raise _refusal(exercise, case, function, explain_changed_argument(name))
    return actual


def _refusal(exercise: Exercise, case: Case, function: Callable, text: str) -> CheckFailed:
    return CheckFailed(f"{headline(exercise, function, case)}\n\n{text}")


def _untouched(given, original) -> bool:
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(original), strict=False):
        if isinstance(one, jax.Array):
            if one.is_deleted():
                return False
        elif isinstance(one, np.ndarray) and one.tobytes() != other.tobytes():
            return False
    return len(jax.tree.leaves(given)) == len(jax.tree.leaves(original))


def _outputs_after(exercise: Exercise, position: int, function: Callable) -> list:
    return [_attempt(exercise, case, function) for case in exercise.cases[position + 1 :]]


def _attempt(exercise: Exercise, case: Case, function: Callable):
    try:
        arguments = exercise.fresh_arguments(case)
        return exercise.runner(exercise.drive, function, arguments, exercise.limit_s)
    except (SandboxFailed, KeyboardInterrupt):
        raise
    except BaseException as error:
        return error
