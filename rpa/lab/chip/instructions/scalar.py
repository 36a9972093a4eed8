"""The scalar core: 32-bit integers, a few floats, conditions and addresses.

An i32 is a Python int between -2**31 and 2**31 - 1, an f32 a np.float32, a condition a bool.
"""

import ast

import numpy as np

from rpa.lab.chip.errors import KernelFault, UnknownOperation
from rpa.lab.chip.instructions.table import by_operation, instruction
from rpa.lab.chip.registers import DTYPES, LANES, dtype_of, rows_and_dtype


def wrap(x) -> int:
    """An int as 32 bits hold it.

    >>> wrap(2**31)
    -2147483648
    """
    return ((x + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def divide(x, y) -> int:
    """Towards zero, as the chip does."""
    if y == 0:
        raise KernelFault("an integer division by zero.")
    return wrap(abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1))


def _floor_divide(x, y):
    if y == 0:
        raise KernelFault("an integer division by zero.")
    return wrap(x // y)


def _unsigned(x):
    return x & 0xFFFFFFFF


for _name, _function in {
    "sadd.s32": lambda x, y: wrap(x + y),
    "ssub.s32": lambda x, y: wrap(x - y),
    "smul.u32": lambda x, y: wrap(x * y),
    "sdiv.s32": divide,
    "sfloordiv.s32": _floor_divide,
    "sfloorrem.s32": lambda x, y: wrap(x - _floor_divide(x, y) * y),
    "srem.s32": lambda x, y: wrap(x - divide(x, y) * y),
    "srem.u32": lambda x, y: wrap(_unsigned(x) % _unsigned(y)),
    "smin.s32": lambda x, y: min(x, y),
    "smax.s32": lambda x, y: max(x, y),
    "shll": lambda x, n: wrap(x << n),
    "shla": lambda x, n: x >> n,  # the name of an arithmetic shift to the right
    "sand": lambda x, y: x & y,
    "sor": lambda x, y: x | y,
    "sxor": lambda x, y: x ^ y,
    "sadd.f32": lambda x, y: x + y,
    "ssub.f32": lambda x, y: x - y,
    "smul.f32": lambda x, y: x * y,
    "smax.f32": lambda x, y: np.maximum(x, y),
    "scvt.s32.f32": lambda x: np.float32(x),
    "seq.s32": lambda x, y: x == y,
    "sne.s32": lambda x, y: x != y,
    "slt.s32": lambda x, y: x < y,
    "sle.s32": lambda x, y: x <= y,
    "sgt.s32": lambda x, y: x > y,
    "sge.s32": lambda x, y: x >= y,
    "pand": lambda p, q: p and q,
    "por": lambda p, q: p or q,
    "pneg": lambda p: not p,
    "sselect": lambda p, x, y: x if p else y,
    "saddr.vmem": lambda address, rows: address + 4 * LANES * rows,
    "saddr.smem": lambda address, words: address + 4 * words,
}.items():
    instruction(_name)(_function)


@by_operation("assume_multiple", form="%", attributes=["multiple"])
def assume_multiple(operation):
    multiple = int(operation.attributes["multiple"])

    def check(x):
        if x % multiple:
            raise KernelFault(f"pl.multiple_of says a multiple of {multiple}, but it is {x}.")
        return x

    return check


@by_operation("saddr_scaled", form="%, %", attributes=["multiplier_in_bytes"])
def scaled_address(operation):
    size = int(operation.attributes["multiplier_in_bytes"])
    return lambda address, count: address + size * count


@by_operation("error.if", form="%", attributes=["message"])
def error_if(operation):
    message = ast.literal_eval(operation.attributes["message"])

    def check(condition):
        if condition:
            raise KernelFault(f"the kernel's own check failed: {message}.")

    return check


@by_operation("constant", form="", attributes=["value"])
def constant(operation):
    """A scalar, or a register that is the same everywhere."""
    value = constant_value(operation)
    return lambda: value


def constant_value(operation):
    """The value of a constant."""
    text, kind = operation.attributes["value"], operation.types
    if not kind.startswith("vector"):
        number = _number(text, kind)
        return np.float32(number) if kind == "f32" else number if kind == "i1" else wrap(number)
    rows, dtype = rows_and_dtype(kind)
    if not text.startswith("dense<") or "[" in text:
        raise UnknownOperation(f"a constant {text[:80]!r} is not the same everywhere.")
    element = kind.rstrip(">").rpartition("x")[2]
    return np.full((rows, LANES), _number(text[len("dense<") : text.index(">")], element), dtype)


def _number(text, element):
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("0x") and element in DTYPES and dtype_of(element).kind != "i":
        dtype = dtype_of(element)
        return np.array(int(text, 16), f"u{dtype.itemsize}").view(dtype)[()]
    return float(text) if element.startswith(("f", "bf")) else int(text, 0)
