"""From arrays to a `pallas_call` and back: operands, scratch memory, aliases, compiler options."""

import inspect
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import compat
from rpa.kernel import blocks, layout, loop, page_table, softmax
from rpa.paging import pack_kv, packing_of


class Options(NamedTuple):
    """How the kernels are run; hashable, a static argument of `call_plans`."""

    interpret_params: pltpu.InterpretParams | None
    vmem_limit_bytes: int
    disable_bounds_checks: bool
    disable_semaphore_checks: bool


def call_plans(queries, keys, values, kv_cache, batch, scales, sinks, *, plans, options):
    """Run the kernels of one call, one after the other, on the same output and cache.

    Args:
        plans: the `Plan`s, first to last.
        queries, keys, values, kv_cache, batch: as in the public function.
        scales: the arguments of `softmax.make_scalars`, numbers or None.
        sinks: f32[num_q_heads] or None.
        options: `Options`.

    Returns:
        output [num_tokens, num_q_heads, head_dim] and kv_cache.
    """
    problem = plans[0].problem
    arrays = {
        "kv_lens": batch.kv_lens,
        "cu_q_lens": batch.cu_q_lens,
        "distribution": batch.distribution,
        "scalars": softmax.make_scalars(*scales),
        "queries": layout.view_heads(problem, queries),
        # Token by token: pages that are neighbours are one copy.
        "kv_cache": kv_cache.reshape(-1, *kv_cache.shape[2:]),
    }
    if problem.update_kv_cache:
        arrays["new_kv"] = pack_kv(keys, values, share_lanes=problem.shares_lanes)
    for plan in plans:
        arrays["page_table"] = page_table.prepare(plan, batch.page_indices, batch.kv_lens)
        if sinks is not None:
            arrays["sinks"] = layout.sink_tiles(plan, sinks)
        results = _call(plan, arrays, options)
        arrays["output_before"] = results["output"]
        arrays["kv_cache"] = results.get("kv_cache_out", arrays["kv_cache"])
    output = layout.unview_heads(problem, arrays["output_before"])
    return output, arrays["kv_cache"].reshape(kv_cache.shape)


_IN_SMEM = ("kv_lens", "cu_q_lens", "distribution", "scalars")
_IN_VMEM = ("sinks",)
_ALIASES = {"output_before": "output", "kv_cache": "kv_cache_out"}


def _call(plan, arrays, options):
    """One `pallas_call`; arrays and results are dictionaries by the names of `loop._Refs`."""
    hbm = compat.hbm_memory_space(plan.interpret)
    spaces = dict.fromkeys(_IN_SMEM, pltpu.SMEM) | dict.fromkeys(_IN_VMEM, pltpu.VMEM)
    results = _results(plan, arrays)
    scratch = _scratch(plan)
    inputs, outputs = list(arrays), list(results)
    names = (*inputs, *outputs, *scratch)
    body = partial(loop.kernel, plan, names)
    # What JAX calls the refs in errors and timelines; it would say args[0], args[1], ...
    body.__signature__ = inspect.Signature(
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names
    )
    values = pl.pallas_call(
        body,
        in_specs=[pl.BlockSpec(memory_space=spaces.get(name, hbm)) for name in inputs],
        out_specs=[pl.BlockSpec(memory_space=hbm) for _ in outputs],
        out_shape=list(results.values()),
        scratch_shapes=list(scratch.values()),
        input_output_aliases={
            inputs.index(before): outputs.index(after)
            for before, after in _ALIASES.items()
            if before in inputs and after in outputs
        },
        interpret=options.interpret_params if plan.interpret else False,
        compiler_params=compat.compiler_params(
            vmem_limit_bytes=options.vmem_limit_bytes,
            disable_bounds_checks=options.disable_bounds_checks,
            disable_semaphore_checks=options.disable_semaphore_checks,
        ),
        name=f"rpa_{plan.case.label}",
    )(
        *(
            array if name in spaces else compat.keep_in_hbm(array, plan.interpret)
            for name, array in arrays.items()
        )
    )
    return dict(zip(outputs, values, strict=True))


def _results(plan, arrays):
    p = plan.problem
    words = (p.num_tokens, p.head_words(p.out_dtype), packing_of(p.out_dtype), p.lanes)
    results = {"output": jax.ShapeDtypeStruct(words, p.out_dtype)}
    if p.update_kv_cache:
        cache = arrays["kv_cache"]
        results["kv_cache_out"] = jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    return results


def _scratch(plan):
    """Scratch memory by the names of `loop._Refs`; `blocks.vmem_bytes` adds up the VMEM of it."""
    dma = pltpu.SemaphoreType.DMA
    return {
        name: pltpu.VMEM(shape, dtype) for name, (shape, dtype) in blocks.vmem_buffers(plan).items()
    } | {
        "table_chunks": pltpu.SMEM((plan.ring_items * plan.table_chunk_words,), jnp.int32),
        "ring": pltpu.SMEM((plan.ring_words,), jnp.int32),
        "in_flight": pltpu.SMEM((2 * plan.num_slots,), jnp.int32),
        "table_sems": dma((plan.ring_items,)),
        "kv_sems": dma((plan.num_slots,)),
        "q_sems": dma((plan.num_slots,)),
        "o_sems": dma((plan.num_slots,)),
        "store_sems": dma((plan.num_slots,)),
    }
