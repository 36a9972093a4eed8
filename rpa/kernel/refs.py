"""The kernel's arrays: name, memory and shape of each, declared once.

`launch` reads the memory spaces off the annotations; the kernel gets three `Refs`, of its inputs,
outputs and scratch memory, and merges them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from rpa.kernel.traversal import STORED_FIELDS
from rpa.paging import LANES

HBM, VMEM, SMEM, DMA = pltpu.HBM, pltpu.VMEM, pltpu.SMEM, pltpu.SemaphoreType.DMA
FLOAT32 = np.dtype(np.float32)


class Refs(NamedTuple):
    """Every array by name; None where a plan has no use for it. A NamedTuple is a pytree for JAX.

    Sizes are those of `Plan`, `Tiles` and `Problem`; (words, packing, lanes) is one token of that
    array, see `Problem.q_shape`, `o_shape` and `kv_shape`. `states` is num_slots in decode, else
    num_q_subs. Where the idle half of the MXU is used (`mxu`), the row
    sums are the last 128 columns of acc, there is no row_sum, and the queries are two parts side by
    side.
    """

    # Inputs
    kv_lens: SMEM = None  # i32[max_num_seqs]
    cu_q_lens: SMEM = None  # i32[max_num_seqs + 1]
    distribution: SMEM = None  # i32[3]
    scalars: SMEM = None  # f32[4], see `softmax`
    queries: HBM = None  # [num_tokens, words, packing, head_lanes]
    kv_cache: HBM = None  # [num_pages * page_size, words, packing, head_lanes]
    new_kv: HBM = None  # [num_tokens, words, packing, head_lanes]
    page_table: HBM = None  # i32[table_words]
    sinks: VMEM = None  # f32[num_groups, rows / q_sub_rows, 128]
    output_before: HBM = None  # the output of the kernel before, the same memory as output

    # Outputs
    output: HBM = None  # [num_tokens, words, packing, o_lanes]
    kv_cache_out: HBM = None  # the same memory as kv_cache

    # Blocks in VMEM, one per slot
    kv_buffer: VMEM = None  # [num_slots, bkv, words | 1, packing, head_lanes]
    q_buffer: VMEM = None  # [num_slots, buffer_tokens, words, packing, head_lanes]
    o_buffer: VMEM = None  # [num_slots, buffer_tokens, words, packing, o_lanes]

    # Softmax state, queries and mask
    row_max: VMEM = None  # f32[states, num_groups, rows, 128], running maximum
    acc: VMEM = None  # f32[states, num_groups, rows, group_lanes (+ 128)]
    q_tiles: VMEM = None  # [states, num_groups, rows, group_lanes (x 2)] in the compute dtype
    mask_limits: VMEM = None  # f32[mask_rows, bkv_c], the mask as inf and -inf
    row_sum: VMEM = None  # f32[states, num_groups, rows, 128], running sum in 128 parts

    # The pipeline
    table_chunks: SMEM = None  # i32[ring_items * chunk_words], page-table entries of each item
    ring: SMEM = None  # i32[ring_items * STORED_FIELDS], the items in flight
    stored: SMEM = None  # i32[num_slots], tokens that each KV buffer is still storing in the cache
    sent: SMEM = None  # i32[num_slots], rows that each o buffer is still sending to the output
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
    output = jax.ShapeDtypeStruct((p.num_tokens, *p.o_shape), p.o_dtype)
    kv_cache = jax.ShapeDtypeStruct((p.num_pages * p.page_size, *p.kv_shape), p.kv_dtype)
    return Refs(output=output, kv_cache_out=kv_cache if p.update_kv_cache else None)


def scratch(plan) -> Refs:
    """Scratch memory; `blocks.vmem_bytes` adds up the VMEM of it."""
    vmem = {name: VMEM(*buffer) for name, buffer in vmem_buffers(plan).items()}
    slots, items = (plan.num_slots,), plan.ring_items
    return Refs(
        **vmem,
        table_chunks=SMEM((items * plan.table.chunk_words,), jnp.int32),
        ring=SMEM((items * len(STORED_FIELDS),), jnp.int32),
        stored=SMEM(slots, jnp.int32),
        sent=SMEM(slots, jnp.int32),
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
    uses_idle_mxu = plan.tricks.uses_idle_mxu
    words, *word_row = p.kv_shape
    # An odd distance from token to token, often one row more than needed: reading one head of many
    # tokens takes every n-th row, and at an even distance those lie in few of VMEM's banks.
    buffers = {
        "kv_buffer": ((slots, plan.blocks.bkv, words | 1, *word_row), p.kv_dtype),
        "q_buffer": ((slots, t.buffer_tokens, *p.q_shape), p.q_dtype),
        "o_buffer": ((slots, t.buffer_tokens, *p.o_shape), p.o_dtype),
        "row_max": ((*state, LANES), FLOAT32),
        "acc": ((*state, t.group_lanes + (LANES if uses_idle_mxu else 0)), FLOAT32),
    }
    # A decode lays its queries out again for each block, and has its masks in registers.
    if not plan.is_decode:
        q_lanes = t.group_lanes * (2 if uses_idle_mxu else 1)
        buffers["q_tiles"] = ((*state, q_lanes), p.compute_dtype)
        buffers["mask_limits"] = ((t.mask_rows, plan.blocks.bkv_c), FLOAT32)
    if not uses_idle_mxu:
        buffers["row_sum"] = ((*state, LANES), FLOAT32)
    return buffers
