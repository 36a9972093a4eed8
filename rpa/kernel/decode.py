"""Decode: two or four KV blocks at a time, because one leaves the chip pending for itself.

A query token gives one qk_softmax of dependent work a head_group: product, maximum, exponential,
product. With
few rows it takes some 700 cycles however few the keys are, and most units idle in it. So a
iteration
takes two items, mostly of two sequences, and their chains overlap; four, where two do not fill the
time because a window makes the blocks short, or all heads fit in one head_group
(`Plan.items_per_iteration`).

They may as well be blocks of one sequence. So every qk_softmax starts from nothing, and only its
result is merged with what the sequence has summed up before:

    m' = max(m, m_block);  l' = 2^(m - m') l + 2^(m_block - m') l_block;  the same for acc

A product takes bkv_c keys, and some products are computed in a row (Plan.products_unrolled). Where
all blocks have enough keys for all of them, they need no mask. The end of the longest block takes
only the products that it needs, so that a short sequence costs less than a long one. The partner
decides what is computed together, never what is merged: a sequence's result is the same in any
company.
"""

from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rpa.kernel import layout, softmax, tiles, transfers, traversal
from rpa.kernel.plan import DECODE_QK_AHEAD
from rpa.paging import LANES


class _Work(NamedTuple):
    """One of the items of an iteration."""

    item: traversal.WorkItem
    block: traversal.QueryBlock
    num_tokens: Any  # in the KV block; 0 if there is no such item
    is_last: Any  # whether the block is its sequence's last


def compute(plan, refs, items, end):
    """Attention of one query token each to the KV blocks of the items of an iteration."""
    works = [_work(plan, item, end) for item in items]
    for work in works:
        _wait(plan, refs, work)
    _attend(plan, refs, works)

    @pl.when(reduce(jnp.logical_or, [work.is_last for work in works]))
    def _():
        _finish(plan, refs, works)


def _work(plan, item, end):
    block = traversal.query_block(plan, item.seq, item.q_index)
    exists = item.seq.index < end
    num_tokens = traversal.kv_block_tokens(plan, block, item.kv_index)
    is_last = item.kv_index + 1 == traversal.num_kv_blocks(plan, block)
    return _Work(item, block, jnp.where(exists, num_tokens, 0), exists & is_last)


def _wait(plan, refs, work):
    item = work.item

    @pl.when((item.kv_index == 0) & (work.num_tokens > 0))
    def _():
        if plan.problem.debug_mode:
            pl.debug_print("rpa: sequence {}, queries from row {}", item.seq.index, work.block.row)
        transfers.wait_queries(refs, work.block, item.q_slot)

    @pl.when(work.num_tokens > 0)
    def _():
        transfers.wait_kv(plan, refs, item.kv_slot, work.num_tokens)


def _attend(plan, refs, works):
    """Cut the blocks into pieces, and compute each for all works together."""
    counts = [work.num_tokens for work in works]
    most, least = reduce(jnp.maximum, counts), reduce(jnp.minimum, counts)
    columns = plan.blocks.bkv_c
    whole = columns * plan.products_unrolled

    def sub_block(token):
        left = most - token
        if not plan.masks_always:
            is_whole = least - token >= whole
            left = jnp.where(is_whole, 0, left)

            @pl.when(is_whole)
            def _():
                _attend_sub_block(plan, refs, works, token, plan.products_unrolled, is_masked=False)

        count = 1
        while count <= plan.products_unrolled:  # 1, 2, 4: as much as is left, or all
            fits = (left <= count * columns) | (count == plan.products_unrolled)

            @pl.when((left > count // 2 * columns) & fits)
            def _(count=count):
                _attend_sub_block(plan, refs, works, token, count, is_masked=True)

            count *= 2

        return token + whole

    lax.while_loop(lambda token: token < most, sub_block, jnp.int32(0))


def _attend_sub_block(plan, refs, works, first, num_products, is_masked):
    """All heads of some products in a row; P V of a qk_softmax when some more have started.

    P V has to wait for its softmax, and the MXU, which takes its work in order, would wait with it.
    """
    pending = []
    for product in range(num_products):
        token = first + product * plan.blocks.bkv_c
        for head_group in range(plan.num_head_groups):
            for work in works:
                qk_softmax = _qk_softmax(plan, refs, work, token, head_group, is_masked)
                pending.append((work, token, head_group, *qk_softmax))
                if len(pending) > DECODE_QK_AHEAD:
                    _pv_merge(plan, refs, *pending.pop(0))
    for qk_softmax in pending:
        _pv_merge(plan, refs, *qk_softmax)


def _qk_softmax(plan, refs, work, token, head_group, is_masked):
    """Scores and weights of one sub_block and head_group; what the sequence has summed up is not
    looked at.

    Returns:
        m, l: f32[tile_rows, 128], maximum and partial sums; p: f32[tile_rows, bkv_c], weights;
        v: [bkv_c, tile_lanes] in the compute dtype.
    """
    columns, mask_limits, num_valid = plan.blocks.bkv_c, None, None
    if is_masked:
        num_valid = jnp.clip(work.num_tokens - token, 0, columns)
        column = lax.broadcasted_iota(jnp.int32, (plan.tile_rows, columns), 1)
        mask_limits = jnp.where(column < num_valid, jnp.inf, -jnp.inf)
    k, v = layout.load_kv(plan, refs.kv_rows, work.item.kv_slot, token, head_group, num_valid)
    tile = tiles.load_queries(plan, refs, work.item.q_slot, 0, head_group)
    q = softmax.queries(plan, refs.scalars, tile)
    s = softmax.scores(plan, refs.scalars, q, k, mask_limits)
    m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), softmax.LOWEST_MAX)
    m = jnp.broadcast_to(m, (plan.tile_rows, LANES))
    p = jnp.exp2(s - softmax.widen(m, columns))
    return m, softmax.lane_sums(p), p, v


def _pv_merge(plan, refs, work, token, head_group, m, total, p, v):
    """Multiply by the values, and merge with what the sequence has summed up before."""
    index = (work.item.q_slot, head_group)
    m_ref, l_ref, acc_ref = refs.m.at[index], refs.l.at[index], refs.acc.at[index]
    is_first = (work.item.kv_index == 0) & (token == 0)
    sinks = refs.sinks[head_group] if plan.problem.has_sinks else None
    m_start, l_start = softmax.nothing_seen(plan, sinks)
    m_before = jnp.where(is_first, m_start, m_ref[...])
    l_before = jnp.where(is_first, l_start, l_ref[...])
    acc_before = jnp.where(is_first, 0.0, acc_ref[...])
    m_ref[...] = jnp.maximum(m_before, m)
    # Without a key nothing must change, not even in the last bit: 2^0 is not 1 everywhere.
    has_keys = work.num_tokens > token
    decay = jnp.where(has_keys, jnp.exp2(m_before - m_ref[...]), 1.0)
    factor = jnp.exp2(m - m_ref[...])
    l_ref[...] = decay * l_before + factor * total
    pv = softmax.weighted_values(plan, p, v)
    lanes = pv.shape[1]
    acc_ref[...] = softmax.widen(decay, lanes) * acc_before + softmax.widen(factor, lanes) * pv


def _finish(plan, refs, works):
    """Output of the sequences that end here; of the others it is computed in vain, not sent."""
    for work in works:
        transfers.wait_output(plan, refs, work.item.q_slot)
    for head_group in range(plan.num_head_groups):
        for work in works:
            slot = work.item.q_slot
            acc, row_sums = refs.acc[slot, head_group], refs.l[slot, head_group]
            tiles.store_output(plan, refs, slot, 0, head_group, acc, row_sums)
    for work in works:

        @pl.when(work.is_last)
        def _(work=work):
            block = work.block
            transfers.wait_store_of_token(plan, refs, work.item.kv_slot)
            transfers.start_output(plan, refs, work.item.q_slot, block.row, block.num_rows)
