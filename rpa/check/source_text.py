"""A value as the code that makes it, so that a learner can repeat a call from a message."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from rpa.check.compare import SHOWN_ELEMENTS

LONGEST_TEXT = 400
"""A value is written out up to this many characters: 64 integers fit, 64 random floats do not."""


def literal(value, module: str = "jnp") -> str:
    """A value as Python code; what is too long to read only by its dtype and shape, or its type.

    Args:
        value: a number, text, list, array, or a dataclass of them such as a `RaggedBatch`.
        module: "jnp" or "np", whichever makes the arrays.

    >>> literal(np.float32([[1, 2.5]]))
    'jnp.float32([[1, 2.5]])'
    >>> literal(np.zeros((0, 3), np.int32), "np")
    'np.zeros((0, 3), np.int32)'
    >>> literal(np.zeros((9, 9), np.float32))
    'float32[9, 9]'
    """
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _array(value, module)
    if dataclasses.is_dataclass(value):
        fields = (f.name for f in dataclasses.fields(value))
        parts = (f"{name}={literal(getattr(value, name), module)}" for name in fields)
        return f"{type(value).__name__}({', '.join(parts)})"
    text = repr(value)
    return text if len(text) <= LONGEST_TEXT else type(value).__name__


def module_of(convert) -> str:
    """Which module's arrays a function gets whose arguments go through `convert`."""
    return "jnp" if convert is jnp.asarray else "np"


def _array(value, module: str) -> str:
    short = f"{value.dtype}{list(value.shape)}"
    if value.size > SHOWN_ELEMENTS:
        return short
    array = np.asarray(value)
    numpy_has_it = array.dtype.isbuiltin == 1  # bfloat16 and float8 are JAX's
    dtype = f"{module if numpy_has_it else 'jnp'}.{'bool_' if array.dtype == bool else array.dtype}"
    if array.size == 0:  # `[]` has lost its shape
        return f"{module}.zeros({array.shape}, {dtype})"
    if not numpy_has_it:
        array = array.astype(np.float32)
    # Pad nothing and break nowhere: the message wraps its lines itself.
    numbers = np.array2string(
        array, separator=", ", max_line_width=10**6, formatter={"float_kind": _number, "int": str}
    )
    text = f"{dtype}({' '.join(numbers.split())})".replace("[ ", "[")
    return text if len(text) <= LONGEST_TEXT else short


def _number(number: np.floating) -> str:
    """All digits that float32 needs, and no more: 1, 0.1, -2.5."""
    if np.isfinite(number):
        return np.format_float_positional(number, trim="-")
    return f'float("{number}")'
