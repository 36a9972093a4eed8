"""The kernel's arrays: name, memory and shape of each, declared once.

`launch` reads the memory spaces off the annotations; the kernel gets three `Refs`, of its inputs,
outputs and scratch memory, and merges them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from rpa.kernel.traversal import ITEM_WORDS
from rpa.paging import LANES, packing_of

HBM, VMEM, SMEM, DMA = pltpu.HBM, pltpu.VMEM, pltpu.SMEM, pltpu.SemaphoreType.DMA
FLOAT32 = np.dtype(np.float32)


class Refs(NamedTuple):
    """Every array by name; None where a plan has no use for it. A NamedTuple is a pytree for JAX.

    Sizes are those of `Plan`, `Tiles` and `Problem`, packing is that of the array's dtype. `states`
    is num_slots in decode, else num_q_subs. Where the idle half of the MXU is used (`mxu`), the row
    sums are the last 128 columns of acc, there is no row_sum, and the queries are two parts side by
    side.
    """

    # Inputs
    kv_lens: SMEM = None  # i32[max_num_seqs]
    cu_q_lens: SMEM = None  # i32[max_num_seqs + 1]
    distribution: SMEM = None  # i32[3]
    scalars: SMEM = None  # f32[4], see `softmax`
    queries: HBM = None  # [num_tokens, head_words, packing, head_lanes]
    kv_cache: HBM = None  # [num_pages * page_size, kv_words, packing, head_lanes]
    new_kv: HBM = None  # [num_tokens, kv_words, packing, head_lanes]
    page_table: HBM = None  # i32[table_words]
    sinks: VMEM = None  # f32[num_groups, rows / q_sub_rows, 128]
    output_before: HBM = None  # the output of the kernel before, the same memory as output

    # Outputs
    output: HBM = None  # [num_tokens, head_words, packing, head_lanes]
    kv_cache_out: HBM = None  # the same memory as kv_cache

    # Blocks in VMEM, one per slot
    kv_buffer: VMEM = None  # [num_slots, bkv, kv_words | 1, packing, head_lanes]
    q_buffer: VMEM = None  # [num_slots, buffer_tokens, head_words, packing, head_lanes]
    o_buffer: VMEM = None  # [num_slots, buffer_tokens, head_words, packing, head_lanes]

    # Softmax state, queries and mask
    row_max: VMEM = None  # f32[states, num_groups, rows, 128], running maximum
    acc: VMEM = None  # f32[states, num_groups, rows, lanes (+ 128)]
    q_tiles: VMEM = None  # [states, num_groups, rows, lanes (x 2)] in the compute dtype
    mask_limits: VMEM = None  # f32[mask_rows, bkv_c], the mask as inf and -inf
    row_sum: VMEM = None  # f32[states, num_groups, rows, 128], running sum in 128 parts

    # The pipeline
    table_chunks: SMEM = None  # i32[ring_items * chunk_words], page-table entries of each item
    ring: SMEM = None  # i32[ring_items * ITEM_WORDS], the items in flight
    in_flight: SMEM = None  # i32[2 * num_slots], what leaves each slot, see `transfers`
    table_sems: DMA = None  # [ring_items]
    kv_sems: DMA = None  # [num_slots], as all below
    q_sems: DMA = None
    o_sems: DMA = None
    store_sems: DMA = None


ALIASES = {"output_before": "output", "kv_cache": "kv_cache_out"}
"""Inputs that an output shares its memory with."""


def merge(*parts) -> Refs:
    """One `Refs` of some of which each has other fields."""
    return Refs(
        *(next((x for x in field if x is not None), None) for field in zip(*parts, strict=True))
    )


def outputs(plan) -> Refs:
    """Shapes of the outputs."""
    p = plan.problem
    words = (p.num_tokens, p.head_words(p.out_dtype), packing_of(p.out_dtype), p.lanes)
    cache = (p.num_pages * p.page_size, p.kv_words, packing_of(p.kv_dtype), p.lanes)
    updated = jax.ShapeDtypeStruct(cache, p.kv_dtype) if p.update_kv_cache else None
    return Refs(output=jax.ShapeDtypeStruct(words, p.out_dtype), kv_cache_out=updated)


def scratch(plan) -> Refs:
    """Scratch memory; `blocks.vmem_bytes` adds up the VMEM of it."""
    vmem = {name: VMEM(*buffer) for name, buffer in vmem_buffers(plan).items()}
    slots, items = (plan.num_slots,), plan.ring_items
    return Refs(
        **vmem,
        table_chunks=SMEM((items * plan.table.chunk_words,), jnp.int32),
        ring=SMEM((items * ITEM_WORDS,), jnp.int32),
        in_flight=SMEM((2 * plan.num_slots,), jnp.int32),
        table_sems=DMA((items,)),
        kv_sems=DMA(slots),
        q_sems=DMA(slots),
        o_sems=DMA(slots),
        store_sems=DMA(slots),
    )


def vmem_buffers(plan):
    """The kernel's buffers in VMEM, {name: (shape, dtype)}."""
    p, t, slots = plan.problem, plan.tiles, plan.num_slots
    state = (slots if plan.is_decode else t.num_q_subs, t.num_groups, t.rows)
    idle = plan.tricks.uses_idle_mxu
    # An odd distance from token to token, often one row more than needed: reading one head of many
    # tokens takes every n-th row, and at an even distance those lie in few of VMEM's banks.
    kv = (slots, plan.blocks.bkv, p.kv_words | 1, packing_of(p.kv_dtype), p.lanes)
    buffers = {"kv_buffer": (kv, p.kv_dtype)}
    for name, dtype in [("q_buffer", p.q_dtype), ("o_buffer", p.out_dtype)]:
        words = (p.head_words(dtype), packing_of(dtype), p.lanes)
        buffers[name] = ((slots, t.buffer_tokens, *words), dtype)
    buffers["row_max"] = ((*state, LANES), FLOAT32)
    buffers["acc"] = ((*state, t.lanes + (LANES if idle else 0)), FLOAT32)
    # A decode lays its queries out for each block anew, and has its masks in registers.
    if not plan.is_decode:
        buffers["q_tiles"] = ((*state, t.lanes * (2 if idle else 1)), p.compute_dtype)
        buffers["mask_limits"] = ((t.mask_rows, t.kv_sub), FLOAT32)
    if not idle:
        buffers["row_sum"] = ((*state, LANES), FLOAT32)
    return buffers
