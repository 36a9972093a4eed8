"""The loop nest: sequences, query blocks, KV blocks, compute blocks, heads.

Read `kernel` first and go up. While a KV block is computed, the copies of the next one run.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rpa import compat
from rpa.kernel import layout, softmax, transfers, walk
from rpa.paging import cdiv


def kernel(plan, names, *args):
    """The body of the `pallas_call`; `names` says what each positional ref is (see `launch`)."""
    refs = _Refs(names, args)
    first, end = plan.case.bounds(refs.distribution)
    transfers.start_first(plan, refs, first, end)

    @compat.loop_once(first, end)
    def _(index):
        seq = walk.sequence(plan, refs, index)

        @pl.when(walk.is_active(seq))
        def _():
            @compat.loop_once(0, walk.num_query_blocks(plan, seq))
            def _(q_index):
                _attend_query_block(plan, refs, walk.query_block(plan, seq, q_index), end)

    transfers.wait_all(plan, refs)
    if plan.is_last:
        _zero_padding_rows(plan, refs)


class _Refs:
    """The refs of the kernel by name; those that a plan has no use for do not exist."""

    def __init__(self, names, args):
        self.__dict__.update(zip(names, args, strict=True))


def _attend_query_block(plan, refs, block, end):
    """Attention of one query block to all KV blocks that it sees."""
    if plan.problem.debug_mode:
        pl.debug_print("rpa: sequence {}, queries from row {}", block.seq.index, block.row)
    q_slot = refs.state[walk.Q_USED] % 2
    refs.state[walk.Q_USED] += 1
    _for_each_tile(plan, block, lambda piece, dot: _start_tile(plan, refs, piece, dot))

    @compat.loop_once(0, walk.num_kv_blocks(plan, block))
    def _(kv_index):
        kv_slot = refs.state[walk.KV_USED] % 2
        refs.state[walk.KV_USED] += 1
        # Before the wait: the DMA engine must never be without work.
        transfers.fetch_next(plan, refs, end)

        @pl.when(kv_index == 0)
        def _():
            transfers.wait_queries(plan, refs, block, q_slot)
            _for_each_tile(
                plan, block, lambda piece, dot: _load_queries(plan, refs, q_slot, piece, dot)
            )

        num_tokens = walk.kv_block_tokens(plan, block, kv_index)
        transfers.wait_kv(plan, refs, kv_slot, num_tokens)
        position = walk.kv_block_start(plan, block, kv_index)
        _attend_kv_block(plan, refs, block, kv_slot, position, num_tokens)

    transfers.wait_output(refs, q_slot)
    _for_each_tile(plan, block, lambda piece, dot: _finish_tile(plan, refs, q_slot, piece, dot))
    transfers.start_output(refs, q_slot, block.row, block.num_rows)


def _for_each_tile(plan, block, body):
    """Call body(piece, dot) for all tiles of a query block that hold at least one of its tokens."""

    @compat.loop_once(0, cdiv(block.num_rows, plan.blocks.bq_c))
    def _(piece):
        for dot in range(plan.num_dots):
            body(piece, dot)


def _start_tile(plan, refs, piece, dot):
    sinks = refs.sinks[dot] if plan.problem.has_sinks else None
    softmax.start(
        plan, refs.m.at[piece, dot], refs.l.at[piece, dot], refs.acc.at[piece, dot], sinks
    )


def _load_queries(plan, refs, slot, piece, dot):
    """Lay the queries of a tile out for the MXU, once for all KV blocks."""
    p = plan.problem
    tile = layout.load_q_tile(plan, refs.q_buffer, slot, piece, dot)
    if p.has_q_scale:
        largest = float(jnp.finfo(p.kv_dtype).max)
        tile = jnp.clip(tile / refs.scalars[softmax.QUERY_SCALE], -largest, largest)
        tile = tile.astype(p.kv_dtype).astype(jnp.float32)
    refs.q_tiles[piece, dot] = layout.spread_heads(plan, tile).astype(p.compute_dtype)


def _finish_tile(plan, refs, slot, piece, dot):
    acc = layout.gather_heads(plan, refs.acc[piece, dot])
    output = softmax.normalise(refs.scalars, acc, refs.l.at[piece, dot])
    layout.store_o_tile(plan, refs.o_buffer, slot, piece, dot, output)


def _attend_kv_block(plan, refs, block, slot, position, num_tokens):
    """Attention of a query block to a KV block in VMEM, compute block by compute block."""
    bq_c, bkv_c = plan.blocks.bq_c, plan.blocks.bkv_c

    @compat.loop_once(0, cdiv(num_tokens, bkv_c))
    def _(kv_piece):
        token = kv_piece * bkv_c
        num_valid = jnp.minimum(bkv_c, num_tokens - token)

        @compat.loop_once(0, cdiv(block.num_rows, bq_c))
        def _(piece):
            area = _Area(plan, block.position + piece * bq_c, position + token, num_valid)

            @pl.when(area.is_needed & area.needs_no_mask)
            def _():
                _attend_tiles(plan, refs, slot, token, piece, None)

            @pl.when(area.is_needed & jnp.logical_not(area.needs_no_mask))
            def _():
                _attend_tiles(plan, refs, slot, token, piece, area)


class _Area:
    """A rectangle of scores, bq_c queries by bkv_c keys, and what the mask does to it."""

    def __init__(self, plan, q_position, kv_position, num_valid):
        self.plan, self.num_valid = plan, num_valid
        self.q_position, self.kv_position = q_position, kv_position
        p, blocks = plan.problem, plan.blocks
        q_last, kv_last = q_position + blocks.bq_c - 1, kv_position + num_valid - 1
        self.is_needed = num_valid > 0
        self.needs_no_mask = num_valid == blocks.bkv_c
        if p.causal:
            self.is_needed &= kv_position <= q_last
            self.needs_no_mask &= kv_last <= q_position
        if p.sliding_window is not None:
            self.is_needed &= kv_last > q_position - p.sliding_window
            self.needs_no_mask &= kv_position > q_last - p.sliding_window

    def mask(self):
        """Which query sees which key, bool[mask_rows, bkv_c]; see `softmax.scores`."""
        plan, p = self.plan, self.plan.problem
        # The one token of a decode stands in all rows of its tile; otherwise rows are tokens.
        one_token = plan.blocks.bq == 1
        shape = (plan.tile_rows if one_token else plan.piece_rows, plan.blocks.bkv_c)
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        distance = self.q_position - self.kv_position - column  # query minus key
        if not one_token:
            distance += lax.broadcasted_iota(jnp.int32, shape, 0)
        # No causal term without a later key: the block of one token ends with its own key.
        mask = distance >= 0 if p.causal and not one_token else column < self.num_valid
        if p.sliding_window is not None:
            mask = mask & (distance < p.sliding_window)
        return mask


def _attend_tiles(plan, refs, slot, token, piece, area):
    """All heads of one area. The products of a head overlap the softmax of the next.

    P V of a tile is issued after Q K^T of the next one: it has to wait for its softmax, and the
    MXU, which takes its work in order, would wait with it.
    """
    mask = None if area is None else area.mask()
    num_valid = None if area is None else area.num_valid
    waiting = None
    for dot in range(plan.num_dots):
        k, v = layout.load_kv(plan, refs.kv_buffer, slot, token, dot, num_valid)
        s = softmax.scores(plan, refs.scalars, refs.q_tiles[piece, dot], k, mask)
        if waiting is not None:
            softmax.accumulate(plan, *waiting)
        p, decay = softmax.update(s, refs.m.at[piece, dot], refs.l.at[piece, dot])
        waiting = (p, v, decay, refs.acc.at[piece, dot])
    softmax.accumulate(plan, *waiting)


def _zero_padding_rows(plan, refs):
    num_used = refs.cu_q_lens[refs.distribution[2]]

    @pl.when(num_used < plan.problem.num_tokens)
    def _():
        zeros = jnp.zeros((plan.tile_rows, plan.problem.lanes), jnp.float32)
        for piece in range(plan.num_q_pieces):
            for dot in range(plan.num_dots):
                layout.store_o_tile(plan, refs.o_buffer, 0, piece, dot, zeros)
        transfers.write_zero_rows(plan, refs, num_used)
