"""The calls around the kernels of chapters 4 and 5: the learner writes what runs, not the call.

An exercise's notebook imports its launcher from here to play with a kernel, and its check uses the
same one, so both run the same call.
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import interpreter
from rpa.paging import cdiv


@contextlib.contextmanager
def interpreted(**modes):
    """Run kernels in the TPU interpreter and on the CPU, also where there is a TPU.

    Args:
        **modes: of `rpa.interpreter.params`: dma_execution_mode, detect_races.

    >>> with interpreted(dma_execution_mode="eager"):
    ...     float(run_copy(lambda x_ref, out_ref, buffer_ref, sem: None, jnp.ones((8, 128)))[0, 0])
    nan
    """
    params = interpreter.params(**modes)
    with pltpu.force_tpu_interpret_mode(params), jax.default_device(jax.devices("cpu")[0]):
        yield


def run_flash(kernel, q, k, v, *, block_q, block_kv):
    """Call a flash attention kernel of one head: a grid of query blocks times key blocks.

    Args:
        kernel: `kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, kv_len, block_kv)`.
        q: f32[q_len, head_dim]; k, v: f32[kv_len, head_dim].
        block_q, block_kv: tokens of a block; the last block of keys may reach past the end.

    Returns:
        f32[q_len, head_dim].

    >>> def kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, kv_len, block_kv):
    ...     out_ref[...] = 2 * q_ref[...]
    >>> q, kv = jnp.ones((8, 128)), jnp.ones((8, 128))
    >>> float(run_flash(kernel, q, kv, kv, block_q=8, block_kv=8)[0, 0])
    2.0
    """
    (q_len, head_dim), kv_len = q.shape, len(k)
    q_spec = pl.BlockSpec((block_q, head_dim), lambda i, j: (i, 0))
    kv_spec = pl.BlockSpec((block_kv, head_dim), lambda i, j: (j, 0))
    return pl.pallas_call(
        partial(kernel, kv_len=kv_len, block_kv=block_kv),
        grid=(cdiv(q_len, block_q), cdiv(kv_len, block_kv)),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        scratch_shapes=[  # of a SoftmaxState: row_max, row_sum, acc
            pltpu.VMEM((block_q, 1), jnp.float32),
            pltpu.VMEM((block_q, 1), jnp.float32),
            pltpu.VMEM((block_q, head_dim), jnp.float32),
        ],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret=interpreter.choose_interpret(None),
    )(q, k, v)


def run_copy(kernel, x):
    """Call a kernel that doubles an array: both x and the result stay in HBM, as a DMA needs them.

    Args:
        kernel: `kernel(x_ref, out_ref, buffer_ref, sem)`.
        x: f32[rows, 128].

    Returns:
        f32[rows, 128].
    """
    return _call(
        kernel,
        [x],
        out_shape=x.shape,
        out_space=pl.ANY,
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )


def run_chunks(kernel, x, chunk_rows):
    """Call a kernel that adds up the chunks of x: x stays in HBM, two buffers for chunks in VMEM.

    Args:
        kernel: `kernel(x_ref, out_ref, buffers_ref, sems, *, num_chunks)`.
        x: f32[num_chunks * chunk_rows, 128].

    Returns:
        f32[chunk_rows, 128].
    """
    return _call(
        partial(kernel, num_chunks=len(x) // chunk_rows),
        [x],
        out_shape=(chunk_rows, x.shape[1]),
        scratch_shapes=[
            pltpu.VMEM((2, chunk_rows, x.shape[1]), x.dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )


def run_pages(kernel, cache, page_indices):
    """Call a kernel that collects pages: their numbers are in SMEM before it starts.

    Args:
        kernel: `kernel(page_indices_ref, cache_ref, out_ref, sem)`.
        cache: f32[num_pages, page_size, 128], stays in HBM.
        page_indices: i32[pages of the sequence].

    Returns:
        f32[pages of the sequence * page_size, 128].
    """
    return _call(
        kernel,
        [cache],
        scalars=[page_indices],
        out_shape=(len(page_indices) * cache.shape[1], cache.shape[2]),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
    )


def run_tokens(kernel, cache, page_indices, kv_len):
    """Call a kernel that collects the kv_len tokens of a sequence from its pages.

    Args:
        kernel: `kernel(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem)`.
        cache: f32[num_pages, page_size, 128], stays in HBM.
        page_indices: i32[room for pages]; what lies behind the live ones is garbage.
        kv_len: how many tokens there are, at most the room; known at run time only.

    Returns:
        f32[room for pages * page_size, 128].
    """
    return _call(
        kernel,
        [cache],
        scalars=[page_indices, jnp.asarray([kv_len], jnp.int32)],
        out_shape=(len(page_indices) * cache.shape[1], cache.shape[2]),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
    )


def run_sequences(kernel, x, block_tokens):
    """Call a kernel that adds up the tokens of each sequence, streamed in blocks.

    Args:
        kernel: `kernel(x_ref, out_ref, buffers_ref, sems, *, blocks_per_seq)`.
        x: f32[num_seqs, num_tokens, 128], stays in HBM.

    Returns:
        f32[num_seqs, 128].
    """
    num_seqs, num_tokens, lanes = x.shape
    return _call(
        partial(kernel, blocks_per_seq=num_tokens // block_tokens),
        [x],
        out_shape=(num_seqs, lanes),
        scratch_shapes=[
            pltpu.VMEM((2, block_tokens, lanes), x.dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )


def run_weighted(kernel, k, v, block_tokens):
    """Call a kernel that adds up values with weights made of keys, both streamed in blocks.

    Args:
        kernel: `kernel(k_ref, v_ref, out_ref, k_buffers_ref, v_buffers_ref, sems, *, num_blocks)`.
        k, v: f32[num_tokens, 128], stay in HBM.

    Returns:
        f32[1, 128].
    """
    num_tokens, lanes = k.shape
    buffers = pltpu.VMEM((2, block_tokens, lanes), k.dtype)
    return _call(
        partial(kernel, num_blocks=num_tokens // block_tokens),
        [k, v],
        out_shape=(1, lanes),
        scratch_shapes=[buffers, buffers, pltpu.SemaphoreType.DMA((2, 2))],
    )


def _call(kernel, arrays, *, scalars=(), out_shape, out_space=pltpu.VMEM, scratch_shapes):
    """A kernel without a grid: arrays in HBM, scalars in SMEM, the result in VMEM if not said."""
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
            # Said aloud, because the interpreter of jax 0.7.2 copies into VMEM only where it is.
            out_specs=pl.BlockSpec(memory_space=out_space),
            scratch_shapes=scratch_shapes,
        ),
        out_shape=jax.ShapeDtypeStruct(out_shape, arrays[0].dtype),
        interpret=interpreter.choose_interpret(None),
    )(*scalars, *arrays)
