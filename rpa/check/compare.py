"""Is this output the expected one? If not, in words: what differs, and where first."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

SHOWN_ELEMENTS = 64
"""Arrays up to this many elements are shown in full in a message."""


class Wrong(NamedTuple):
    """One difference: a sentence about it, and what a message shows along with it."""

    sentence: str
    index: tuple[int, ...] | None = None
    """Index of the first wrong number; None where shape, dtype or the whole value is wrong."""
    output: str = "your output"
    expected: Any = None
    actual: Any = None
    position: int | None = None
    """Which of several outputs is wrong."""


def first_wrong(expected, actual, tolerance: float, outputs: Sequence[str] = ()) -> Wrong | None:
    """Compare an output with the expected one; None means equal within the tolerance.

    A tuple is several outputs, named by `outputs`. Arrays (JAX or NumPy) and numbers are compared
    as numbers; anything else (lists, dicts, strings) with ==.

    >>> first_wrong(np.float32([1, 2]), np.float32([1, 2]), 1e-6) is None
    True
    >>> first_wrong(np.float32([1, 2]), None, 1e-6).sentence
    'your function returns None. Is the `return` missing?'
    """
    if actual is None:
        return Wrong("your function returns None. Is the `return` missing?")
    if not isinstance(expected, tuple):
        return _compare_one(expected, actual, tolerance, "your output")
    if not isinstance(actual, tuple | list) or len(actual) != len(expected):
        given = f"{len(actual)} values" if isinstance(actual, tuple | list) else "one value"
        names = f" ({', '.join(outputs)})" if outputs else ""
        return Wrong(f"your function returns {given}, expected {len(expected)}{names}")
    for number, (one_expected, one_actual) in enumerate(zip(expected, actual, strict=True)):
        name = f"`{outputs[number]}`" if outputs else f"output {number}"
        if wrong := _compare_one(one_expected, one_actual, tolerance, name):
            return wrong._replace(position=number)
    return None


def equal(expected, actual, tolerance: float) -> bool:
    """Whether two outputs agree within the tolerance, NaN equal to NaN."""
    try:
        return first_wrong(expected, actual, tolerance) is None
    except Exception:  # an exotic output of a wrong answer is no reason for the check to fall over
        return False


def show(value) -> str | None:
    """A value as text where it is small enough to read, else None."""
    if not _is_numeric(value):
        return repr(value) if len(repr(value)) <= 400 else None
    array = np.asarray(value)
    if array.size > SHOWN_ELEMENTS:
        return None
    if array.dtype.kind not in "biuf":  # bfloat16 and float8 print through float32
        try:
            array = array.astype(np.float32)
        except OverflowError:  # an integer of hundreds of digits
            return None
    if array.dtype == bool:
        array = array.astype(int)  # ones and zeros line up, True and False do not
    return np.array2string(array, precision=4, suppress_small=True, floatmode="maxprec")


def _compare_one(expected, actual, tolerance: float, name: str) -> Wrong | None:
    if not _is_numeric(expected):
        if type(expected) is type(actual) and expected == actual:
            return None
        return Wrong(f"{name} is not what was expected", None, name, expected, actual)
    if not _is_numeric(actual):
        return Wrong(f"{name} is a {type(actual).__name__}, expected an array or a number")
    array, truth = np.asarray(actual), np.asarray(expected)
    if array.dtype == object:  # an integer of hundreds of digits, or a list of all sorts of things
        return Wrong(f"{name} is no number of at most 64 bits, nor an array of such numbers")
    if array.shape != truth.shape:
        return Wrong(f"{name} has shape {array.shape}, expected {truth.shape}")
    if not isinstance(expected, int | float) and not _dtype_fits(truth.dtype, array.dtype):
        return Wrong(f"{name} has dtype {array.dtype}, expected {truth.dtype}")
    return _compare_numbers(truth, array, tolerance, name)


def _compare_numbers(truth, array, tolerance: float, name: str) -> Wrong | None:
    wide_truth, wide = (a.astype(np.float64) for a in (truth, array))
    finite = np.abs(wide_truth[np.isfinite(wide_truth)])
    allowed = tolerance * max(1.0, finite.max(initial=0.0))
    same_special = (wide_truth == wide) | (np.isnan(wide_truth) & np.isnan(wide))
    with np.errstate(invalid="ignore"):
        error = np.where(same_special, 0.0, np.abs(wide - wide_truth))
    wrong = ~(error <= allowed)  # written so that a NaN error counts as wrong
    if not wrong.any():
        return None
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    sentence = f"expected {_word(truth[index])}, {name} has {_word(array[index])}"
    if not np.isfinite(wide[index]) and np.isfinite(wide_truth[index]):
        sentence += " (not a finite number)"
    if wrong.size > 1:
        sentence += f"; {int(wrong.sum())} of {wrong.size} numbers differ"
    return Wrong(sentence, index, name, truth, array)


def _word(number) -> str:
    """One number of an array: True, 16793600, 0.0900306."""
    return str(number) if number.dtype.kind in "biu" else f"{float(number):.6g}"


def _is_numeric(value: Any) -> bool:
    if isinstance(value, bool | int | float | np.generic):
        return True
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _dtype_fits(expected: np.dtype, actual: np.dtype) -> bool:
    """The kind must be right; NumPy's float64 and int64 stand in for JAX's 32-bit defaults."""
    stand_ins = {"float32": ("float64",), "int32": ("int64", "uint32", "int16", "uint8", "int8")}
    return actual == expected or actual.name in stand_ins.get(expected.name, ())
