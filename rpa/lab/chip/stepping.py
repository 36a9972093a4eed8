"""Step through a compiled kernel: every instruction in the order of execution, and what it gave.

`step_through` compiles a function for a chip; `step_listing` takes a few instructions as text and
needs no compiler.
"""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from rpa.lab.chip.door import prepare
from rpa.lab.chip.kernel import Kernel
from rpa.lab.chip.machine import MODELS
from rpa.lab.chip.registers import LANES, SUBLANES

STRIDED_LOAD = Path(__file__).parents[2] / "data" / "strided_load_v5e.txt"
"""What libtpu makes of a kernel that loads every third row; a test compiles it anew."""


class Step(NamedTuple):
    """One instruction that was executed.

    Attributes:
        text: as the compiler wrote it.
        value: what it gave: a register (see `rpa.lab.chip.registers`), a number, None of a store.
    """

    text: str
    value: object

    @property
    def is_register(self) -> bool:
        """Whether the value is a whole register."""
        return np.ndim(self.value) == 2

    def __str__(self):
        text = re.sub(r"(= -?\d+) : i\d+", r"\1", self.text).partition(" : ")[0]  # without types
        text = textwrap.shorten(text, 98, placeholder=" ...")
        if self.value is None:
            return text
        shown = self.value[:, 0].tolist() if self.is_register else self.value
        return f"{text}\n    {shown}"


def step_through(function, *args, chip="v5e") -> list[Step]:
    """Every instruction that the kernels of a function execute on a chip, in order.

    Args and errors are those of `rpa.lab.chip.run`; constants are no instructions.

    >>> from jax.experimental import pallas as pl
    >>> def double(x_ref, out_ref):
    ...     out_ref[...] = 2 * x_ref[...]
    >>> x = np.arange(1024, dtype=np.float32).reshape(8, 128)
    >>> double_all = pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))
    >>> [step.is_register for step in step_through(double_all, x)]  # doctest: +SKIP
    [True, True, False]
    """
    steps = []
    prepare(function, *args, chip=chip, watch=_recorder(steps))(*args)
    return steps


def step_listing(lines, rows, num_out=SUBLANES, chip="v5e") -> tuple[np.ndarray, list[Step]]:
    """Execute instructions of the compiled text on an array in VMEM.

    Args:
        lines: instructions; %x is the address of `rows`, %out that of the output.
        rows: f32[n, 128].
        num_out: rows of the output.
        chip: whose machine executes them.

    Returns:
        f32[num_out, 128], NaN where nothing was stored, and the steps.

    Raises:
        ValueError: if rows are no such array.
        UnknownOperation: if an instruction, or a spelling of it, is not known.
        KernelFault: if it leaves an array.

    >>> out, steps = step_listing(
    ...     [
    ...         "%a = llo.vector_load %x : i32 -> vector<8x128xf32>",
    ...         "%b = llo.vadd.f32 %a, %a : vector<8x128xf32>",
    ...         "llo.vector_store %b into %out : vector<8x128xf32> into i32",
    ...     ],
    ...     np.arange(8, dtype=np.float32).repeat(128).reshape(8, 128),
    ... )
    >>> print(steps[1])
    %b = llo.vadd.f32 %a, %a
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]
    >>> out[:, 0].tolist()
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]
    """
    rows, steps = np.asarray(rows, np.float32), []
    if rows.ndim != 2 or rows.shape[1] != LANES or not len(rows):
        raise ValueError(
            f"rows has shape {rows.shape}, but must be [n, {LANES}]: numbers.repeat({LANES})"
            f".reshape(-1, {LANES}) puts each number into all lanes of a row."
        )
    arguments = ", ".join(
        f"%{name}: i32 {{llo.type = memref<{n}x{LANES}xf32, #xir.tiled<(8,128),[1,1]>, "
        "#xir.memory_space<vmem, tc>>}"
        for name, n in (("x", len(rows)), ("out", num_out))
    )
    head = f"func.func @listing({arguments}) attributes {{scalar_prefetch = 0 : i64, xir.main}} {{"
    text = "\n".join([head, *lines, "return", "}"])
    result = jax.ShapeDtypeStruct((num_out, LANES), np.float32)
    kernel = Kernel(text, MODELS[chip], 1, (result,), {}, _recorder(steps))
    (out,) = kernel.run([rows], late=True)
    return out, steps


def strided_load() -> list[str]:
    """The instructions of STRIDED_LOAD: `out[...] = x[pl.ds(1, 10, stride=3)]`, x f32[40, 128].

    >>> next(line for line in strided_load() if "stride" in line)[:54]
    '%get3A_2 = llo.vector_load_slane_stride %get3A_1 {subl'
    """
    text = STRIDED_LOAD.read_text(encoding="utf-8")
    _, _, body = text.partition("xir.main} {\n")
    lines = [line.strip() for line in body.partition("return")[0].splitlines() if line.strip()]
    return [line.replace("%arg0", "%x").replace("%arg1", "%out") for line in lines]


def _recorder(steps):
    return lambda operation, value: steps.append(Step(operation.text, value))
