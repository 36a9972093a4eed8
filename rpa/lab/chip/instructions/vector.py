"""The vector units (VALU and EUP): the same for every element of a register."""

import operator

import numpy as np

from rpa.lab.chip.errors import KernelFault, UnknownOperation
from rpa.lab.chip.instructions.table import by_operation, instruction
from rpa.lab.chip.registers import LANES, SHAPE, SUBLANES, rows_and_dtype


@instruction("vadd.f32", "vadd.bf16", "vadd.s32")
def add(x, y):
    return x + y


@instruction("vsub.f32", "vsub.bf16", "vsub.s32")
def subtract(x, y):
    return x - y


@instruction("vmul.f32", "vmul.bf16", "vmul.u32")
def multiply(x, y):
    return x * y


@instruction("vmax.f32", "vmax.bf16", "vmax.s32")
def maximum(x, y):
    return np.maximum(x, y)


@instruction("vmin.f32", "vmin.bf16", "vmin.s32")
def minimum(x, y):
    return np.minimum(x, y)


@instruction("vdiv.s32")
def divide(x, y):
    """Towards zero."""
    if not y.all():
        raise KernelFault("an integer division by zero in a register.")
    x, y = x.astype(np.int64), y.astype(np.int64)
    return (np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))).astype(np.int32)


@instruction("vrem.s32")
def remainder(x, y):
    """With the sign of x."""
    return x - divide(x, y) * y


@instruction("vabs.f32")
def absolute(x):
    return np.abs(x)


@instruction("vand.u32", "vmand")
def bitwise_and(x, y):
    return x & y


@instruction("vor.u32", "vmor")
def bitwise_or(x, y):
    return x | y


@instruction("vxor.u32", "vmxor")
def bitwise_xor(x, y):
    return x ^ y


@instruction("vshll")
def shift_left(x, n):
    return x << n


@instruction("vshra")
def shift_right_arithmetic(x, n):
    return x >> n


@instruction("vshrl")
def shift_right_logical(x, n):
    return (x.view(np.uint32) >> n.view(np.uint32)).view(np.int32)


@instruction("vselect")
def select(mask, x, y):
    return np.where(mask, x, y)


for _compare in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
    _names = [f"vcmp.{_compare.__name__}.{kind}" for kind in ("f32", "bf16", "s32")]
    _names += ["vcmp.ne.s16"] * (_compare is operator.ne)
    instruction(*_names)(lambda x, y, compare=_compare: compare(x, y))


# --- EUP and rounding: NumPy's float32, which is not the chip's last bit


@instruction("vexp.f32")
def exp(x):
    return np.exp(x)


@instruction("vpow2.f32")
def exp2(x):
    return np.exp2(x)


@instruction("vln.f32")
def log(x):
    return np.log(x)


@instruction("vtanh.f32")
def tanh(x):
    return np.tanh(x)


@instruction("vrecip.f32", "vrecip.f32.approx")
def reciprocal(x):
    return np.float32(1) / x


@instruction("vsqrt.f32")
def square_root(x):
    return np.sqrt(x)


@instruction("vrsqrt.f32")
def reciprocal_square_root(x):
    return np.float32(1) / np.sqrt(x)


@instruction("vfloor.f32")
def floor(x):
    return np.floor(x)


@instruction("vceil.f32")
def ceil(x):
    return np.ceil(x)


@instruction("vround.nearest_even.f32")
def round_to_even(x):
    return np.round(x)


@instruction("vcvt.s32.f32")
def integer_to_float(x):
    return x.astype(np.float32)


@instruction("vcvt.f32.s32.to.zero.pseudo")
def float_to_integer(x):
    """Towards zero; what does not fit becomes the nearest that does, NaN becomes 0."""
    return np.clip(np.nan_to_num(x, nan=0).astype(np.float64), -(2**31), 2**31 - 1).astype(np.int32)


# --- Registers from nothing, and from a scalar


@by_operation("vslaneid", form="")
def sublane_numbers(operation):
    numbers = np.broadcast_to(np.arange(SUBLANES, dtype=np.int32)[:, None], SHAPE)
    return lambda: numbers


@by_operation("vxlaneid", form="")  # named so; it counts along the lanes
def lane_numbers(operation):
    numbers = np.broadcast_to(np.arange(LANES, dtype=np.int32), SHAPE)
    return lambda: numbers


@by_operation("vlaneseq", form="")
def element_numbers(operation):
    numbers = np.arange(SUBLANES * LANES, dtype=np.int32).reshape(SHAPE)
    return lambda: numbers


@by_operation("stov", form="%")
def splat(operation):
    _, dtype = rows_and_dtype(operation.result_type)
    return lambda x: np.full(SHAPE, x, dtype)


@instruction("vtos")
def first_element(x):
    return x[0, 0].item() if x.dtype == np.int32 else x[0, 0]


# --- Masks


@by_operation("vcmask", form=r"\[(\d+) : (\d+)\] \[(\d+) : (\d+)\]")
def box_mask(operation, *bounds):
    """True in a box of sublanes and lanes, ends included."""
    rows, _ = rows_and_dtype(operation.result_type)
    sublane_first, sublane_last, lane_first, lane_last = map(int, bounds)
    packing = rows // SUBLANES
    mask = np.zeros((rows, LANES), bool)
    sublanes = slice(packing * sublane_first, packing * (sublane_last + 1))
    mask[sublanes, lane_first : lane_last + 1] = True
    return lambda: mask


@by_operation("vsmask", form="%")
def row_mask(operation):
    """True in rows that share words: the first byte of a column of 32, and the last << 8."""
    rows, _ = rows_and_dtype(operation.result_type)
    row_bytes = 32 // rows

    def mask(bounds):
        first, last = (bounds & 0xFF) // row_bytes, (bounds >> 8 & 0xFF) // row_bytes
        row = np.arange(rows)[:, None]
        return np.broadcast_to((first <= row) & (row <= last), (rows, LANES))

    return mask


@by_operation("vmcast", form="%")
def mask_cast(operation):
    """The mask of a word for all rows that share it."""
    before, _ = rows_and_dtype(operation.operand_type)
    after, _ = rows_and_dtype(operation.result_type)
    if after % before:
        raise UnknownOperation(f"{operation.text[:200]!r} makes one row of several.")
    return lambda mask: np.repeat(mask, after // before, axis=0)
