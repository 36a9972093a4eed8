"""Small programs that test_lab_compile has compiled in the lab's subprocess."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def copy_rows(source, *, num_rows, vmem_limit_bytes=None):
    """Move `num_rows` tiles of 8 x 128 words to VMEM by one DMA, and double the first."""
    return pl.pallas_call(
        _copy_rows_kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
        scratch_shapes=[pltpu.VMEM((num_rows, 8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_limit_bytes),
    )(source)


def _copy_rows_kernel(source_ref, out_ref, rows_ref, sem):
    copy = pltpu.make_async_copy(source_ref.at[pl.ds(0, rows_ref.shape[0])], rows_ref, sem)
    copy.start()
    copy.wait()
    out_ref[...] = rows_ref[0] * 2


def add_one_row(cache, row):
    """Change one row of a big array; in place only if the array is donated."""
    return cache.at[row].add(1.0)


def broken(x):
    """A mistake in the caller's own Python."""
    return x.no_such_method()
