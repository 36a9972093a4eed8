"""Decode: two or four KV blocks at a time, because one leaves the chip waiting for itself.

A query token gives one chain of dependent work a dot: product, maximum, exponential, product. With
few rows it takes some 700 cycles however few the keys are, and most units idle in it. So a turn
takes two steps, mostly of two sequences, and their chains overlap; four, where two do not fill the
time because a window makes the blocks short, or all heads fit in one dot (`Plan.steps_per_turn`).

They may as well be blocks of one sequence. So every chain starts from nothing, and only its
result is merged with what the sequence has summed up before:

    m' = max(m, m_block);  l' = 2^(m - m') l + 2^(m_block - m') l_block;  the same for acc

A product takes bkv_c keys, and some products are computed in a row (Plan.products_in_a_row). Where
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
from rpa.kernel.plan import CHAINS_AHEAD
from rpa.paging import LANES


class _Work(NamedTuple):
    """One of the steps of a turn."""

    step: traversal.Step
    block: traversal.QueryBlock
    num_tokens: Any  # in the KV block; 0 if there is no such step
    is_last: Any  # whether the block is its sequence's last


def compute(plan, refs, steps, end):
    """Attention of one query token each to the KV blocks of the steps of a turn."""
    works = [_work(plan, step, end) for step in steps]
    for work in works:
        _wait(plan, refs, work)
    _attend(plan, refs, works)

    @pl.when(reduce(jnp.logical_or, [work.is_last for work in works]))
    def _():
        _finish(plan, refs, works)


def _work(plan, step, end):
    block = traversal.query_block(plan, step.seq, step.q_index)
    exists = step.seq.index < end
    num_tokens = traversal.kv_block_tokens(plan, block, step.kv_index)
    is_last = step.kv_index + 1 == traversal.num_kv_blocks(plan, block)
    return _Work(step, block, jnp.where(exists, num_tokens, 0), exists & is_last)


def _wait(plan, refs, work):
    step = work.step

    @pl.when((step.kv_index == 0) & (work.num_tokens > 0))
    def _():
        if plan.problem.debug_mode:
            pl.debug_print("rpa: sequence {}, queries from row {}", step.seq.index, work.block.row)
        transfers.wait_queries(refs, work.block, step.q_slot)

    @pl.when(work.num_tokens > 0)
    def _():
        transfers.wait_kv(plan, refs, step.kv_slot, work.num_tokens)


def _attend(plan, refs, works):
    """Cut the blocks into pieces, and compute each for all works together."""
    counts = [work.num_tokens for work in works]
    most, least = reduce(jnp.maximum, counts), reduce(jnp.minimum, counts)
    columns = plan.blocks.bkv_c
    whole = columns * plan.products_in_a_row

    def piece(token):
        left = most - token
        if not plan.masks_always:
            is_whole = least - token >= whole
            left = jnp.where(is_whole, 0, left)

            @pl.when(is_whole)
            def _():
                _attend_piece(plan, refs, works, token, plan.products_in_a_row, is_masked=False)

        count = 1
        while count <= plan.products_in_a_row:  # 1, 2, 4: as much as is left, or all
            fits = (left <= count * columns) | (count == plan.products_in_a_row)

            @pl.when((left > count // 2 * columns) & fits)
            def _(count=count):
                _attend_piece(plan, refs, works, token, count, is_masked=True)

            count *= 2

        return token + whole

    lax.while_loop(lambda token: token < most, piece, jnp.int32(0))


def _attend_piece(plan, refs, works, first, num_products, is_masked):
    """All heads of some products in a row; P V of a chain when some more have started.

    P V has to wait for its softmax, and the MXU, which takes its work in order, would wait with it.
    """
    waiting = []
    for product in range(num_products):
        token = first + product * plan.blocks.bkv_c
        for dot in range(plan.num_dots):
            for work in works:
                chain = _start_chain(plan, refs, work, token, dot, is_masked)
                waiting.append((work, token, dot, *chain))
                if len(waiting) > CHAINS_AHEAD:
                    _end_chain(plan, refs, *waiting.pop(0))
    for chain in waiting:
        _end_chain(plan, refs, *chain)


def _start_chain(plan, refs, work, token, dot, is_masked):
    """Scores and weights of one piece and dot; what the sequence has summed up is not looked at.

    Returns:
        m, l: f32[tile_rows, 128], maximum and partial sums; p: f32[tile_rows, bkv_c], weights;
        v: [bkv_c, tile_lanes] in the compute dtype.
    """
    columns, limits, num_valid = plan.blocks.bkv_c, None, None
    if is_masked:
        num_valid = jnp.clip(work.num_tokens - token, 0, columns)
        column = lax.broadcasted_iota(jnp.int32, (plan.tile_rows, columns), 1)
        limits = jnp.where(column < num_valid, jnp.inf, -jnp.inf)
    k, v = layout.load_kv(plan, refs.kv_rows, work.step.kv_slot, token, dot, num_valid)
    tile = tiles.load_queries(plan, refs, work.step.q_slot, 0, dot)
    q = softmax.queries(plan, refs.scalars, tile)
    s = softmax.scores(plan, refs.scalars, q, k, limits)
    m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), softmax.LOWEST_MAX)
    m = jnp.broadcast_to(m, (plan.tile_rows, LANES))
    p = jnp.exp2(s - softmax.widen(m, columns))
    return m, softmax.lane_sums(p), p, v


def _end_chain(plan, refs, work, token, dot, m, total, p, v):
    """Multiply by the values, and merge with what the sequence has summed up before."""
    place = (work.step.q_slot, dot)
    m_ref, l_ref, acc_ref = refs.m.at[place], refs.l.at[place], refs.acc.at[place]
    is_first = (work.step.kv_index == 0) & (token == 0)
    sinks = refs.sinks[dot] if plan.problem.has_sinks else None
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
        transfers.wait_output(plan, refs, work.step.q_slot)
    for dot in range(plan.num_dots):
        for work in works:
            slot = work.step.q_slot
            acc, row_sums = refs.acc[slot, dot], refs.l[slot, dot]
            tiles.store_output(plan, refs, slot, 0, dot, acc, row_sums)
    for work in works:

        @pl.when(work.is_last)
        def _(work=work):
            block = work.block
            transfers.wait_store_of_token(plan, refs, work.step.kv_slot)
            transfers.start_output(plan, refs, work.step.q_slot, block.row, block.num_rows)
