"""Several values in a word: packing, unpacking, and what float8 means on which chip."""

import numpy as np

from rpa.lab.chip.errors import UnknownOperation
from rpa.lab.chip.instructions.table import by_operation, instruction
from rpa.lab.chip.registers import dtype_of, from_words, rows_and_dtype, to_words, widen_float8


@by_operation("vbitcast", form="%")
def bitcast(operation):
    """The same bits under another type."""
    _, dtype = rows_and_dtype(operation.result_type)
    return lambda x: from_words(to_words(x), dtype)


_PACKED = ("b16", "bf16", "b8", "f8e4m3fn", "f8e5m2")


@by_operation("vpack", form="%, %", attributes=["format"])
def pack(operation):
    """Two registers in one of half the bits an element.

    Compressed: the second one becomes the low rows. Interleaved: the low bits of every word.
    """
    kind = operation.attributes["format"]
    _, dtype = rows_and_dtype(operation.result_type)
    if kind == "interleaved_b16":
        return lambda high, low: np.stack([low, high], axis=1).reshape(16, -1).astype(dtype)
    if kind.removeprefix("compressed_") not in _PACKED:
        raise UnknownOperation(f"{operation.text[:200]!r} packs to a format that is not known.")
    return lambda high, low: np.concatenate([low, high]).astype(dtype)


@instruction("vmpack.c.low")
def pack_masks(low, high):
    """Here the first one becomes the low rows."""
    return np.concatenate([low, high])


_E4M3FN, _E5M2 = 61788, 57749


@by_operation("vpack.f32.f8exmy", form="%, %", attributes=["descriptor"])
def pack_float8(operation):
    """Two registers of f32 as float8 codes, each in 16 bits; the second becomes the low rows."""
    _, dtype = rows_and_dtype(operation.result_type)
    descriptors = {_E4M3FN: dtype_of("f8E4M3FN"), _E5M2: dtype_of("f8E5M2")}
    if descriptors.get(int(operation.attributes["descriptor"])) != dtype:
        raise UnknownOperation(f"{operation.text[:200]!r} packs to a format that is not known.")

    def pack(high, low):
        codes = np.concatenate([low, high]).astype(dtype).view(np.uint8).astype(np.int16)
        return from_words(to_words(codes), dtype)

    return pack


_UNPACKED = (*_PACKED, "interleaved_b16", "f8e4m3b11", "f8e4m3fn_bf16", "f8e5m2_bf16")


@by_operation("vunpack", form="%", attributes=["format", "sublane_idx"])
def unpack(operation):
    """One part of the rows of a register, in a wider type."""
    kind = operation.attributes["format"].removeprefix("compressed_")
    if kind not in _UNPACKED:
        raise UnknownOperation(f"{operation.text[:200]!r} unpacks a format that is not known.")
    count, dtype = rows_and_dtype(operation.result_type)
    part = int(operation.attributes["sublane_idx"])
    if kind == "interleaved_b16":  # the low or the high bits of every word
        return lambda x: x[part::2].astype(dtype)
    first = count * part
    if kind == "f8e4m3b11":
        return lambda x: widen_float8(x[first : first + count], bias_11=True)
    return lambda x: x[first : first + count].astype(dtype)


@instruction("vadjust.f32.f8e4m3b11.f8e4m3fn")
def adjust_float8(x):
    """What v5e and v6e read as e4m3 with bias 11 becomes e4m3fn: times 16, and NaN for its code."""
    x = x * np.float32(16)
    return np.where(np.abs(x) == 480, np.float32(np.nan), x)


@instruction("f8negztoz")
def clear_negative_zero(x):
    """Code 0x80 becomes 0: to the MXU of v5e and v6e it would be NaN."""
    return np.where(x.view(np.uint8) == 0x80, np.uint8(0), x.view(np.uint8)).view(x.dtype)


@by_operation("vcvt_f32_to_narrow_float", form="%", attributes=["desttype"])
def float8_codes(operation):
    """The codes of float8, as i32."""
    dtype = dtype_of(operation.attributes["desttype"])
    return lambda x: x.astype(dtype).view(np.uint8).astype(np.int32)
