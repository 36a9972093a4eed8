"""The call around the kernel of exercise 6.5, which stores new tokens while it computes on them."""

from functools import partial

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import interpreter


def run_write_back(kernel, new_kv, cache, page_indices):
    """Call a kernel that brings new tokens to their pages, a page at a time, and adds them up.

    Args:
        kernel: `kernel(page_indices_ref, new_ref, _, sum_ref, cache_ref, buffers_ref, load_sems,
            store_sems, *, num_blocks)`; the cache goes in and comes out as one array.
        new_kv: f32[num_blocks * page_size, 128], stays in HBM.
        cache: f32[num_pages, page_size, 128], stays in HBM.
        page_indices: i32[num_blocks], the page of each block of new tokens.

    Returns:
        f32[page_size, 128], the sum of the blocks, and the cache with the new tokens in it.
    """
    page_size, lanes = cache.shape[1:]
    interpret = interpreter.choose_interpret(None)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(kernel, num_blocks=len(page_indices)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[in_hbm, in_hbm],
            out_specs=[pl.BlockSpec(), in_hbm],
            scratch_shapes=[
                pltpu.VMEM((2, page_size, lanes), cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((page_size, lanes), cache.dtype),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ],
        input_output_aliases={2: 1},  # the page numbers count as an input
        interpret=interpret,
    )(page_indices, new_kv, cache)
