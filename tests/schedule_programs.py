"""Small programs whose schedule test_lab_schedule knows beforehand."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def matmul(x, y):
    """One product of bfloat16 matrices, accumulated in float32: 2 m k n FLOP, all in VMEM."""
    return pl.pallas_call(
        _matmul_kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)] * 2,
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=64 << 20),
        name="matmul",
    )(x, y)


def _matmul_kernel(x_ref, y_ref, out_ref):
    out_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)


def sum_tiles(lengths, table, tiles):
    """Add up the tiles that a table names, sequence by sequence, one DMA a tile.

    Args:
        lengths: i32[num_seqs]; half of each many entries of its row of the table are used.
        table: i32[num_seqs, tiles_per_seq].
        tiles: f32[num_tiles, 8, 128].
    """
    # What a kernel reads may be computed before it: the lab has to follow.
    halves, flat = lengths // 2, jnp.pad(table.reshape(-1), (0, 5))
    return pl.pallas_call(
        _sum_tiles_kernel,
        out_shape=jax.ShapeDtypeStruct((len(lengths), 8, 128), jnp.float32),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.HBM),
        ],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        name="sum_tiles",
    )(halves, flat, tiles)


def _sum_tiles_kernel(lengths_ref, table_ref, tiles_ref, out_ref, tile_ref, sem):
    per_seq = table_ref.shape[0] // lengths_ref.shape[0]

    @pl.loop(0, lengths_ref.shape[0])
    def _(seq):
        out_ref[seq] = jnp.zeros((8, 128), jnp.float32)

        @pl.loop(0, lengths_ref[seq])
        def _(i):
            source = tiles_ref.at[table_ref[seq * per_seq + i]]
            copy = pltpu.make_async_copy(source, tile_ref, sem)
            copy.start()
            copy.wait()
            out_ref[seq] += tile_ref[...]


def unnamed(x, times=1):
    """Double an array so many times, by kernels without a name."""
    for _ in range(times):
        x = pl.pallas_call(_double_kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
    return x


def _double_kernel(x_ref, out_ref):
    out_ref[...] = 2 * x_ref[...]


def matrices(n):
    """Shapes of two square bfloat16 matrices."""
    return (jax.ShapeDtypeStruct((n, n), jnp.bfloat16),) * 2
