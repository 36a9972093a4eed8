"""The loops: steps (KV blocks, see `traversal`), compute blocks of keys and of queries, heads.

Read `kernel` first and go on downwards. While a work item is computed, the copies of the next one
run.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rpa import compat
from rpa.kernel import decode, layout, pipeline, softmax, tiles, transfers, traversal

MIXED_QK_AHEAD = 2
"""How far Q K^T runs ahead of P V: at the end the MXU has work while it waits for a softmax."""


def kernel(plan, names, *args):
    """The body of the `pallas_call`; `names` says what each positional ref is (see `launch`)."""
    refs = _Refs(plan, names, args)
    first, end = plan.case.bounds(refs.distribution)
    transfers.clear(plan, refs)
    pipeline.clear(plan, refs, end)

    def iterate(carry):
        iteration, item = carry
        # Before the wait for what is computed: the DMA engine must never be without work.
        pipeline.to_fetch(plan, refs, iteration, end, partial(transfers.fetch, plan, refs))
        looked_up = pipeline.put(
            plan, refs, iteration, traversal.items_of_iteration(plan, refs, item, end)
        )
        transfers.look_up(plan, refs, looked_up, end)
        to_compute = pipeline.to_compute(plan, refs, iteration)
        if plan.is_decode:
            decode.compute(plan, refs, to_compute, end)
        else:
            pl.when(to_compute[0].seq.index < end)(partial(_compute, plan, refs, *to_compute))
        return pipeline.next_iteration(plan, iteration), traversal.next_item(
            plan, refs, looked_up[-1], end
        )

    item = traversal.first_item(plan, refs, first, end)
    lax.while_loop(
        lambda carry: pipeline.is_running(plan, refs, carry[0], end),
        iterate,
        (pipeline.first_iteration(plan, item, end), item),
    )
    transfers.wait_all(plan, refs)
    if plan.is_last:
        _zero_padding_rows(plan, refs)


class _Refs:
    """The refs of the kernel by name; those that a plan has no use for do not exist.

    Sizes are those of `Plan` and `Problem`, packing is that of the array's dtype:

        SMEM   kv_lens, cu_q_lens      i32[max_num_seqs], i32[max_num_seqs + 1]
               distribution            i32[3]
               scalars                 f32[4], see `softmax`
        HBM    queries, output         [num_tokens, head_words, packing, lanes]
               output_before           the output of the kernel before, the same memory as output
               new_kv                  [num_tokens, kv_words, packing, lanes]
               kv_cache, kv_cache_out  [num_pages * page_size, kv_words, packing, lanes], one memory
               page_table              i32[table_words]
        VMEM   sinks                   f32[num_head_groups, tile_rows / q_sub_rows, 128]
               q_buffer, o_buffer      [num_slots, buffer_tokens, head_words, packing, lanes]
               kv_buffer               [num_slots, bkv, kv_buffer_words, packing, lanes]
               m, l                    f32[states, num_head_groups, tile_rows, 128], running
               maximum, sum
               acc                     f32[states, num_head_groups, tile_rows, tile_lanes (+ 128)]
               q_tiles                 [states, num_head_groups, tile_rows, tile_lanes (x 2)]
               mask_limits             f32[mask_rows, bkv_c], the mask as inf and -inf
        SMEM   table_chunks            i32[ring_items * table_chunk_words], one for each item
               ring                    i32[ring_words], see there
               in_flight               i32[2 * num_slots], see `traversal`
        DMA semaphores: table_sems [ring_items]; kv_sems, q_sems, o_sems, store_sems [num_slots]

    There are num_q_subs states, in decode num_slots. With a spare half of the MXU the row sums
    are the last 128 columns of acc, and there is no l; the queries are two parts side by side.
    q_rows, o_rows and kv_rows are the three buffers as `layout.WordRows`.
    """

    def __init__(self, plan, names, args):
        self.__dict__.update(zip(names, args, strict=True))
        self.q_rows = layout.WordRows(plan, self.q_buffer)
        self.o_rows = layout.WordRows(plan, self.o_buffer)
        self.kv_rows = layout.WordRows(plan, self.kv_buffer)


def _compute(plan, refs, item):
    """Attention of a query block to one of the KV blocks that it sees."""
    block = traversal.query_block(plan, item.seq, item.q_index)

    @pl.when(item.kv_index == 0)
    def _():
        if plan.problem.debug_mode:
            pl.debug_print("rpa: sequence {}, queries from row {}", item.seq.index, block.row)
        transfers.wait_queries(refs, block, item.q_slot)
        _for_each_tile(plan, block, partial(_start_tile, refs, item.q_slot))

    num_tokens = traversal.kv_block_tokens(plan, block, item.kv_index)
    transfers.wait_kv(plan, refs, item.kv_slot, num_tokens)
    transfers.start_stores(plan, refs, block, item)
    position = traversal.kv_block_start(plan, block, item.kv_index)
    attend = partial(_attend_kv_block, refs, block, item.kv_slot, position, num_tokens)
    _with_tiles_that_fit(plan, block, attend)

    @pl.when(item.kv_index + 1 == traversal.num_kv_blocks(plan, block))
    def _():
        transfers.wait_output(plan, refs, item.q_slot)
        _for_each_tile(plan, block, partial(_finish_tile, refs, item.q_slot))
        transfers.start_output(plan, refs, item.q_slot, block.row, block.num_rows)


def _with_tiles_that_fit(plan, block, body):
    """Call body(plan), with `Plan.in_small_tiles` for a query block of few tokens."""
    small = plan.in_small_tiles
    if small is None:
        body(plan)
        return
    is_small = 4 * block.num_rows <= plan.blocks.bq_c
    pl.when(is_small)(partial(body, small))
    pl.when(jnp.logical_not(is_small))(partial(body, plan))


def _for_each_tile(plan, block, body):
    """Call body(plan, q_sub, head_group) for all tiles that hold at least one token of a query
    block.

    Both in loops: the dots side by side would be as many copies of the code, to no one's gain.
    """

    def tiles_of(plan):
        @_for_each_q_sub(plan, block)
        def _(q_sub):
            _repeat(plan.num_head_groups)(partial(body, plan, q_sub))

    _with_tiles_that_fit(plan, block, tiles_of)


def _for_each_q_sub(plan, block):
    """A loop over the pieces of queries, and no loop where there can be only one."""
    return _repeat(
        1 if plan.num_q_subs == 1 else traversal.divide_up(block.num_rows, plan.blocks.bq_c)
    )


def _repeat(count):
    """A loop; the number of turns may be known only at run time, but is at least one."""
    if isinstance(count, int) and count == 1:
        return lambda body: body(0)
    return compat.loop_once(0, count)


def _start_tile(refs, slot, plan, q_sub, head_group):
    """Set a tile to "no key seen yet", and lay its queries out for the MXU."""
    sinks = refs.sinks[head_group] if plan.problem.has_sinks else None
    tile = softmax.Tile(plan, refs, q_sub, head_group)
    softmax.start(plan, tile, sinks)
    queries = tiles.load_queries(plan, refs, slot, q_sub, head_group)
    tile.q[...] = softmax.queries(plan, refs.scalars, queries)


def _finish_tile(refs, slot, plan, q_sub, head_group):
    tile = softmax.Tile(plan, refs, q_sub, head_group)
    acc = tile.acc[:, pl.ds(0, plan.tile_lanes)]  # without the row sums that may stand beside it
    tiles.store_output(plan, refs, slot, q_sub, head_group, acc, tile.l[...])


def _attend_kv_block(refs, block, slot, position, num_tokens, plan):
    """Attention of a query block to a KV block in VMEM, compute block by compute block."""
    bq_c, bkv_c = plan.blocks.bq_c, plan.blocks.bkv_c

    @_repeat(1 if plan.blocks.bkv == bkv_c else traversal.divide_up(num_tokens, bkv_c))
    def _(kv_sub):
        token = kv_sub * bkv_c
        num_valid = jnp.minimum(bkv_c, num_tokens - token)

        @_for_each_q_sub(plan, block)
        def _(q_sub):
            score_tile = ScoreTile(plan, block.position + q_sub * bq_c, position + token, num_valid)

            is_masked = score_tile.is_needed
            if not plan.masks_always:
                is_masked &= jnp.logical_not(score_tile.needs_no_mask)

                @pl.when(score_tile.is_needed & score_tile.needs_no_mask)
                def _():
                    _attend_tiles(plan, refs, slot, token, q_sub, None)

            @pl.when(is_masked)
            def _():
                _attend_tiles(plan, refs, slot, token, q_sub, score_tile)


class ScoreTile:
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
        """Which query sees which key, bool[mask_rows, bkv_c]."""
        plan, p = self.plan, self.plan.problem
        one_token = plan.blocks.bq == 1
        shape = (plan.mask_rows, plan.blocks.bkv_c)
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        distance = self.q_position - self.kv_position - column  # query minus key
        if not one_token:
            distance += lax.broadcasted_iota(jnp.int32, shape, 0)
        # No causal term without a later key: the block of one token ends with its own key.
        mask = distance >= 0 if p.causal and not one_token else column < self.num_valid
        if p.sliding_window is not None:
            mask = mask & (distance < p.sliding_window)
        return mask


def _attend_tiles(plan, refs, slot, token, q_sub, score_tile):
    """All heads of one score_tile. The products of a head overlap the softmax of the next.

    P V of a tile is issued after Q K^T of the MIXED_QK_AHEAD next ones: it has to wait for its
    softmax,
    and the MXU, which takes its work in order, would wait with it. After the last head there is
    nothing to do beside a softmax but its own other half.
    """
    mask_limits = num_valid = None
    if score_tile is not None:
        mask_limits, num_valid = refs.mask_limits.at[pl.ds(0, plan.mask_rows)], score_tile.num_valid
        mask_limits[...] = jnp.where(score_tile.mask(), jnp.inf, -jnp.inf)
    pending = []
    for head_group in range(plan.num_head_groups):
        k, v = layout.load_kv(plan, refs.kv_rows, slot, token, head_group, num_valid)
        for tile in _parts_of_tile(plan, refs, q_sub, head_group):
            s = softmax.scores(plan, refs.scalars, tile.q[...], k, mask_limits)
            if len(pending) == MIXED_QK_AHEAD:
                softmax.accumulate(plan, *pending.pop(0))
            p, decay = softmax.update(plan, s, tile)
            pending.append((p, v, decay, tile))
    for products in pending:
        softmax.accumulate(plan, *products)


def _parts_of_tile(plan, refs, q_sub, head_group):
    """What one product takes of a tile: all, but of the last head_group one half after the
    other."""
    half = plan.tile_rows // 2
    # The mask must begin anew in the second half; and a bfloat16 register holds 16 rows.
    if head_group < plan.num_head_groups - 1 or half % plan.mask_rows or half % 16:
        return [softmax.Tile(plan, refs, q_sub, head_group)]
    return [softmax.Tile(plan, refs, q_sub, head_group, first, half) for first in (0, half)]


def _zero_padding_rows(plan, refs):
    num_used = refs.cu_q_lens[refs.distribution[2]]

    @pl.when(num_used < plan.problem.num_tokens)
    def _():
        zeros = jnp.zeros((plan.tile_rows, plan.problem.lanes), jnp.float32)

        @_repeat(plan.num_q_subs)
        def _(q_sub):
            store = partial(layout.store_o_tile, plan, refs.o_rows, 0, q_sub, tile=zeros)
            _repeat(plan.num_head_groups)(store)

        transfers.write_zero_rows(plan, refs, num_used)
