"""The loops: steps (KV blocks, see `walk`), compute blocks of keys and of queries, heads.

Read `kernel` first and go on downwards. While a step is computed, the copies of the next one run.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rpa import compat
from rpa.kernel import decode, layout, pipeline, softmax, tiles, transfers, traversal

DOTS_AHEAD = 2
"""How far Q K^T runs ahead of P V: at the end the MXU has work while it waits for a softmax."""


def kernel(plan, names, *args):
    """The body of the `pallas_call`; `names` says what each positional ref is (see `launch`)."""
    refs = _Refs(plan, names, args)
    first, end = plan.case.bounds(refs.distribution)
    transfers.clear(plan, refs)
    pipeline.clear(plan, refs, end)

    def serve_stations(carry):
        turn, step = carry
        # Before the wait for what is computed: the DMA engine must never be without work.
        pipeline.to_fetch(plan, refs, turn, end, partial(transfers.fetch, plan, refs))
        looked_up = pipeline.put(plan, refs, turn, traversal.steps_of_turn(plan, refs, step, end))
        transfers.look_up(plan, refs, looked_up, end)
        to_compute = pipeline.to_compute(plan, refs, turn)
        if plan.is_decode:
            decode.compute(plan, refs, to_compute, end)
        else:
            pl.when(to_compute[0].seq.index < end)(partial(_compute, plan, refs, *to_compute))
        return pipeline.next_turn(plan, turn), traversal.next_step(plan, refs, looked_up[-1], end)

    step = traversal.first_step(plan, refs, first, end)
    lax.while_loop(
        lambda carry: pipeline.is_on(plan, refs, carry[0], end),
        serve_stations,
        (pipeline.first_turn(plan, step, end), step),
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
        VMEM   sinks                   f32[num_dots, tile_rows / piece_rows, 128]
               q_buffer, o_buffer      [num_slots, buffer_tokens, head_words, packing, lanes]
               kv_buffer               [num_slots, bkv, kv_buffer_words, packing, lanes]
               m, l                    f32[states, num_dots, tile_rows, 128], running maximum, sum
               acc                     f32[states, num_dots, tile_rows, tile_lanes (+ 128)]
               q_tiles                 [states, num_dots, tile_rows, tile_lanes (x 2)]
               limits                  f32[mask_rows, bkv_c], the mask as inf and -inf
        SMEM   table_chunks            i32[belt_places * table_chunk_words], one for each step
               belt                    i32[belt_words], see there
               state                   i32[2 * num_slots], see `walk`
        DMA semaphores: table_sems [belt_places]; kv_sems, q_sems, o_sems, store_sems [num_slots]

    There are num_q_pieces states, in decode num_slots. With a spare half of the MXU the row sums
    are the last 128 columns of acc, and there is no l; the queries are two parts side by side.
    q_rows, o_rows and kv_rows are the three buffers as `layout.WordRows`.
    """

    def __init__(self, plan, names, args):
        self.__dict__.update(zip(names, args, strict=True))
        self.q_rows = layout.WordRows(plan, self.q_buffer)
        self.o_rows = layout.WordRows(plan, self.o_buffer)
        self.kv_rows = layout.WordRows(plan, self.kv_buffer)


def _compute(plan, refs, step):
    """Attention of a query block to one of the KV blocks that it sees."""
    block = traversal.query_block(plan, step.seq, step.q_index)

    @pl.when(step.kv_index == 0)
    def _():
        if plan.problem.debug_mode:
            pl.debug_print("rpa: sequence {}, queries from row {}", step.seq.index, block.row)
        transfers.wait_queries(refs, block, step.q_slot)
        _for_each_tile(plan, block, partial(_start_tile, refs, step.q_slot))

    num_tokens = traversal.kv_block_tokens(plan, block, step.kv_index)
    transfers.wait_kv(plan, refs, step.kv_slot, num_tokens)
    transfers.start_stores(plan, refs, block, step)
    position = traversal.kv_block_start(plan, block, step.kv_index)
    attend = partial(_attend_kv_block, refs, block, step.kv_slot, position, num_tokens)
    _in_tiles_that_suit(plan, block, attend)

    @pl.when(step.kv_index + 1 == traversal.num_kv_blocks(plan, block))
    def _():
        transfers.wait_output(plan, refs, step.q_slot)
        _for_each_tile(plan, block, partial(_finish_tile, refs, step.q_slot))
        transfers.start_output(plan, refs, step.q_slot, block.row, block.num_rows)


def _in_tiles_that_suit(plan, block, body):
    """Call body(plan), with `Plan.in_small_tiles` for a query block of few tokens."""
    small = plan.in_small_tiles
    if small is None:
        body(plan)
        return
    is_small = 4 * block.num_rows <= plan.blocks.bq_c
    pl.when(is_small)(partial(body, small))
    pl.when(jnp.logical_not(is_small))(partial(body, plan))


def _for_each_tile(plan, block, body):
    """Call body(plan, piece, dot) for all tiles that hold at least one token of a query block.

    Both in loops: the dots side by side would be as many copies of the code, to no one's gain.
    """

    def tiles_of(plan):
        @_for_each_piece(plan, block)
        def _(piece):
            _repeat(plan.num_dots)(partial(body, plan, piece))

    _in_tiles_that_suit(plan, block, tiles_of)


def _for_each_piece(plan, block):
    """A loop over the pieces of queries, and no loop where there can be only one."""
    return _repeat(
        1 if plan.num_q_pieces == 1 else traversal.divide_up(block.num_rows, plan.blocks.bq_c)
    )


def _repeat(count):
    """A loop; the number of turns may be known only at run time, but is at least one."""
    if isinstance(count, int) and count == 1:
        return lambda body: body(0)
    return compat.loop_once(0, count)


def _start_tile(refs, slot, plan, piece, dot):
    """Set a tile to "no key seen yet", and lay its queries out for the MXU."""
    sinks = refs.sinks[dot] if plan.problem.has_sinks else None
    tile = softmax.Tile(plan, refs, piece, dot)
    softmax.start(plan, tile, sinks)
    queries = tiles.load_queries(plan, refs, slot, piece, dot)
    tile.q[...] = softmax.queries(plan, refs.scalars, queries)


def _finish_tile(refs, slot, plan, piece, dot):
    tile = softmax.Tile(plan, refs, piece, dot)
    acc = tile.acc[:, pl.ds(0, plan.tile_lanes)]  # without the row sums that may stand beside it
    tiles.store_output(plan, refs, slot, piece, dot, acc, tile.l[...])


def _attend_kv_block(refs, block, slot, position, num_tokens, plan):
    """Attention of a query block to a KV block in VMEM, compute block by compute block."""
    bq_c, bkv_c = plan.blocks.bq_c, plan.blocks.bkv_c

    @_repeat(1 if plan.blocks.bkv == bkv_c else traversal.divide_up(num_tokens, bkv_c))
    def _(kv_piece):
        token = kv_piece * bkv_c
        num_valid = jnp.minimum(bkv_c, num_tokens - token)

        @_for_each_piece(plan, block)
        def _(piece):
            area = _Area(plan, block.position + piece * bq_c, position + token, num_valid)

            is_masked = area.is_needed
            if not plan.masks_always:
                is_masked &= jnp.logical_not(area.needs_no_mask)

                @pl.when(area.is_needed & area.needs_no_mask)
                def _():
                    _attend_tiles(plan, refs, slot, token, piece, None)

            @pl.when(is_masked)
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


def _attend_tiles(plan, refs, slot, token, piece, area):
    """All heads of one area. The products of a head overlap the softmax of the next.

    P V of a tile is issued after Q K^T of the DOTS_AHEAD next ones: it has to wait for its softmax,
    and the MXU, which takes its work in order, would wait with it. After the last head there is
    nothing to do beside a softmax but its own other half.
    """
    limits = num_valid = None
    if area is not None:
        limits, num_valid = refs.limits.at[pl.ds(0, plan.mask_rows)], area.num_valid
        limits[...] = jnp.where(area.mask(), jnp.inf, -jnp.inf)
    waiting = []
    for dot in range(plan.num_dots):
        k, v = layout.load_kv(plan, refs.kv_rows, slot, token, dot, num_valid)
        for tile in _parts_of_tile(plan, refs, piece, dot):
            s = softmax.scores(plan, refs.scalars, tile.q[...], k, limits)
            if len(waiting) == DOTS_AHEAD:
                softmax.accumulate(plan, *waiting.pop(0))
            p, decay = softmax.update(plan, s, tile)
            waiting.append((p, v, decay, tile))
    for products in waiting:
        softmax.accumulate(plan, *products)


def _parts_of_tile(plan, refs, piece, dot):
    """What one product takes of a tile: all, but of the last dot one half after the other."""
    half = plan.tile_rows // 2
    # The mask must begin anew in the second half; and a bfloat16 register holds 16 rows.
    if dot < plan.num_dots - 1 or half % plan.mask_rows or half % 16:
        return [softmax.Tile(plan, refs, piece, dot)]
    return [softmax.Tile(plan, refs, piece, dot, first, half) for first in (0, half)]


def _zero_padding_rows(plan, refs):
    num_used = refs.cu_q_lens[refs.distribution[2]]

    @pl.when(num_used < plan.problem.num_tokens)
    def _():
        zeros = jnp.zeros((plan.tile_rows, plan.problem.lanes), jnp.float32)

        @_repeat(plan.num_q_pieces)
        def _(piece):
            store = partial(layout.store_o_tile, plan, refs.o_rows, 0, piece, tile=zeros)
            _repeat(plan.num_dots)(store)

        transfers.write_zero_rows(plan, refs, num_used)
