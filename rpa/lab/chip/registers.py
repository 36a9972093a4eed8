"""How values lie in a register: 8 sublanes x 128 lanes of 32-bit words.

A register of float32 or int32 is an array [8, 128]. A word may also hold two bfloat16 or four
float8: then the register is the array of its rows, [16, 128] or [32, 128], and the word in sublane
s holds rows s * packing to s * packing + packing - 1, the first in its lowest bits. A mask is an
array of bool of the same shape.
"""

import re

import ml_dtypes
import numpy as np

from rpa.lab.chip.errors import UnknownOperation

SUBLANES, LANES = 8, 128
SHAPE = (SUBLANES, LANES)

DTYPES = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f8E4M3FN": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "i32": np.dtype(np.int32),
    "ui32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "i1": np.dtype(np.bool_),
}
"""NumPy's dtype of an element type in the text."""


def dtype_of(element) -> np.dtype:
    """The dtype of an element type, "bf16".

    Raises:
        UnknownOperation: if it is not known here.
    """
    if element not in DTYPES:
        raise UnknownOperation(f"values of type {element} are not known here.")
    return DTYPES[element]


def rows_and_dtype(vector_type) -> tuple[int, np.dtype]:
    """Rows and dtype of a register's type.

    >>> rows_and_dtype("vector<8x128x2xbf16>")
    (16, dtype(bfloat16))
    """
    match = re.fullmatch(r"vector<8x128(?:x(\d+))?x(\w+)>", vector_type)
    if match is None:
        raise UnknownOperation(f"a register of type {vector_type} is not known here.")
    return SUBLANES * int(match[1] or 1), dtype_of(match[2])


def to_words(rows) -> np.ndarray:
    """Rows of any dtype as words: u32[8, 128].

    >>> [hex(word) for word in to_words(np.array([[1], [2], [3], [4]], np.int16))[:, 0]]
    ['0x20001', '0x40003']
    """
    packing = 4 // rows.itemsize
    if packing == 1:
        return np.ascontiguousarray(rows).view(np.uint32)
    bits = rows.view(f"u{rows.itemsize}").reshape(-1, packing, rows.shape[-1])
    return np.ascontiguousarray(bits.swapaxes(1, 2)).view(np.uint32)[..., 0]


def from_words(words, dtype) -> np.ndarray:
    """Undo `to_words`: u32[8, 128] to rows of a dtype.

    >>> from_words(np.array([[0x20001], [0x40003]], np.uint32), np.dtype(np.int16))[:, 0].tolist()
    [1, 2, 3, 4]
    """
    packing = 4 // dtype.itemsize
    if packing == 1:
        return words.view(dtype)
    bits = np.ascontiguousarray(words)[..., None].view(f"u{dtype.itemsize}")
    return bits.swapaxes(1, 2).reshape(-1, words.shape[-1]).view(dtype)


def widen_float8(rows, bias_11=False) -> np.ndarray:
    """float8 as f32. With `bias_11` the bits are read as v5e and v6e read e4m3: without NaN.

    Their e4m3 has an exponent bias of 11, where e4m3fn has 7: a value is 16 times too small, and
    what is NaN in e4m3fn is 480 / 16. `vadjust` corrects both.
    """
    if not bias_11:
        return rows.astype(np.float32)
    code = rows.view(np.uint8).astype(np.int32)
    exponent, fraction = code >> 3 & 15, (code & 7).astype(np.float32)
    value = np.where(exponent == 0, fraction * 2.0**-13, (8 + fraction) * 2.0 ** (exponent - 14.0))
    return np.where(code & 128, -value, value).astype(np.float32)
