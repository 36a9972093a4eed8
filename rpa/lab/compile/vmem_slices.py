"""Some rows of a scratch buffer in VMEM, from a row known at run time: which chip allows it?

Arrays in VMEM lie in tiles. A bfloat16 tile has 16 rows of 128 lanes; some chips address half a
tile, and the compiler decides by chip. `lab.compile_for("tpu7x", eight_rows, ...)` is refused,
`sixteen_rows` is not; chapter 6 asks for both.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import interpreter

TOKENS, LANES = 256, 128


def eight_rows(index, *, interpret=None):
    """Rows 8 * index to 8 * index + 7 of a bfloat16 buffer, bfloat16[8, 128].

    Args:
        index: i32[1].
        interpret: see `rpa.tiled.flash_attention`; the lab's compiler wants False.

    >>> eight_rows(jnp.array([2]))[0, 0].item()
    16.0
    """
    return _read(8, index, interpret)


def sixteen_rows(index, *, interpret=None):
    """Rows 16 * index to 16 * index + 15 of a bfloat16 buffer, bfloat16[16, 128]."""
    return _read(16, index, interpret)


def _read(rows, index, interpret):
    def kernel(index_ref, out_ref, buffer_ref):
        row = jax.lax.broadcasted_iota(jnp.int32, buffer_ref.shape, 0)
        buffer_ref[...] = row.astype(buffer_ref.dtype)
        start = pl.multiple_of(index_ref[0] * rows, rows)
        out_ref[...] = buffer_ref[pl.ds(start, rows)]

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[],
            out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
            scratch_shapes=[pltpu.VMEM((TOKENS, LANES), jnp.bfloat16)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, LANES), jnp.bfloat16),
        interpret=interpreter.choose_interpret(interpret),
    )(index)
