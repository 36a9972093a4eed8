"""Why is an output wrong? It is what a known mistake gives, or it is right in another order."""

from collections.abc import Callable
from itertools import permutations

import numpy as np

from rpa.check.compare import Wrong, equal
from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise


def why(
    exercise: Exercise, position: int, wrong: Wrong, actual, later: Callable[[], list]
) -> str | None:
    """One sentence about the cause of a wrong output, or None where nothing known fits.

    Args:
        exercise: the exercise; its cases before `position` agree with the reference.
        position: number of the case that is wrong.
        wrong: the first difference in that case.
        actual: what the learner's function returned there, or the WrongResult of `drive`.
        later: gives the learner's outputs in the cases after this one. Called only if two mistakes
            have to be told apart, because each of these calls can take seconds.
    """
    expected = exercise.expected[position]
    reordered = _another_order(exercise, expected, actual)
    exact = any(_agree(exercise, outputs[position], actual) for outputs in exercise.mistaken)
    if reordered and not exact:  # one cause for all outputs, before one that explains a single one
        return reordered
    named = _known_mistakes(exercise, position, wrong, actual, later)
    if named:
        return f"This is what you get if {', or if '.join(named)}."
    return reordered or _transposed(
        _pick(expected, wrong.position), _pick(actual, wrong.position), exercise.tolerance, wrong
    )


def _known_mistakes(
    exercise: Exercise, position: int, wrong: Wrong, actual, later: Callable[[], list]
) -> list[str]:
    """Words of the mistakes that give this output and are right wherever the learner was right.

    Two mistakes may agree in a small case; the one that also agrees in most later cases is meant.
    """
    candidates = [
        (mistake.words, outputs)
        for mistake, outputs in zip(exercise.mistakes, exercise.mistaken, strict=True)
        if _passes_until(exercise, outputs, position)
        and _explains(exercise, position, wrong, outputs[position], actual)
    ]
    if len(candidates) < 2:
        return [words for words, _ in candidates]
    mine = [actual, *later()]
    agreements = [
        sum(_agree(exercise, *pair) for pair in zip(outputs[position:], mine, strict=True))
        for _, outputs in candidates
    ]
    most = max(agreements)
    return [words for (words, _), n in zip(candidates, agreements, strict=True) if n == most]


def _passes_until(exercise: Exercise, outputs: list, position: int) -> bool:
    """Whether a mistake is right in all cases before this one, as the learner's answer is."""
    before = zip(exercise.expected[:position], outputs[:position], strict=True)
    return all(_agree(exercise, *pair) for pair in before)


def _explains(exercise: Exercise, position: int, wrong: Wrong, theirs, mine) -> bool:
    """Whether everything that the mistake does wrong in this case is in the learner's output, too.

    Where the mistake is right the learner may have made a second one, so that two mistakes at once
    are named one after the other.
    """
    if wrong.position is None:
        return _agree(exercise, theirs, mine)
    expected = exercise.expected[position]
    if not isinstance(theirs, tuple | list) or len(theirs) != len(expected):
        return False
    same = [_agree(exercise, *pair) for pair in zip(theirs, mine, strict=True)]
    right = [_agree(exercise, *pair) for pair in zip(expected, theirs, strict=True)]
    return same[wrong.position] and all(s or r for s, r in zip(same, right, strict=True))


def _agree(exercise: Exercise, one, other) -> bool:
    """Equal within the tolerance, or refused by `drive` with the same words."""
    if isinstance(one, WrongResult) and isinstance(other, WrongResult):
        return str(one) == str(other)
    # Either may be NumPy's float64 that stands in for JAX's float32.
    return any(equal(*pair, exercise.tolerance) for pair in ((one, other), (other, one)))


def _another_order(exercise: Exercise, expected, actual) -> str | None:
    """A sentence if all outputs are there, each right, in another order."""
    several = isinstance(expected, tuple) and isinstance(actual, tuple | list)
    if not several or len(actual) != len(expected):
        return None
    for order in permutations(range(len(expected))):
        if equal(expected, tuple(actual[i] for i in order), exercise.tolerance):
            names = exercise.outputs or [f"output {i}" for i in range(len(expected))]
            yours = [names[order.index(i)] for i in range(len(order))]
            return (
                "Your outputs are right but in another order: you return "
                f"({', '.join(yours)}), expected ({', '.join(names)})."
            )
    return None


def _transposed(expected, actual, tolerance: float, wrong: Wrong) -> str | None:
    """A sentence if an array is right but for the order of its axes."""
    axes = getattr(actual, "ndim", 0)
    if axes < 2 or axes != getattr(expected, "ndim", 0):
        return None
    for order in permutations(range(axes)):
        if equal(expected, np.transpose(actual, order), tolerance):
            return (
                f"{wrong.output[0].upper()}{wrong.output[1:]} is right but transposed: "
                f"its `.transpose{order}` is what was expected."
            )
    return None


def _pick(outputs, position: int | None):
    """The output that is wrong, where there are several."""
    return outputs if position is None else outputs[position]
