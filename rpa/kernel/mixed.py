"""Prefill and mixed: one KV block of one query block, sub-block by sub-block, head by head.

The products of a head overlap the softmax of the next; masks are computed only where needed, once
for all heads. The softmax state of all tiles stays in VMEM from the first KV block to the last.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rpa import compat
from rpa.kernel import layout, mxu, softmax
from rpa.kernel.traversal import divide_up
from rpa.paging import LANES


class Mixed:
    """What a mixed kernel computes, with tiles of one size or of two."""

    def __init__(self, plan, refs, buffers, copies):
        self.copies, self.bq_c = copies, plan.blocks.bq_c
        self.large = Tiled(plan, refs, buffers)
        self.small = plan.in_small_tiles and Tiled(plan.in_small_tiles, refs, buffers)

    def __call__(self, items):
        """Compute the one work item of an iteration, if it exists."""
        (item,) = items
        pl.when(item.exists)(partial(self._compute, item))

    def _compute(self, item):
        @pl.when(item.is_first != 0)
        def _():
            self.copies.wait_queries(item)
            self._in_tiles_that_fit(item, Tiled.start)

        self.copies.wait_kv(item)
        self.copies.start_stores(item)
        self._in_tiles_that_fit(item, Tiled.attend)

        @pl.when(item.is_last != 0)
        def _():
            self.copies.wait_output(item.q_slot)
            self._in_tiles_that_fit(item, Tiled.finish)
            self.copies.start_output(item.q_slot, item.q_row, item.q_len)

    def _in_tiles_that_fit(self, item, method):
        """Call a method of the `Tiled`: the small one for a query block of few tokens."""
        if self.small is None:
            method(self.large, item)
            return
        is_small = 4 * item.q_len <= self.bq_c
        pl.when(is_small)(partial(method, self.small, item))
        pl.when(jnp.logical_not(is_small))(partial(method, self.large, item))


class Tiled:
    """Attention in tiles of one size."""

    def __init__(self, plan, refs, buffers):
        self.plan, self.tiles, self.tricks = plan, plan.tiles, plan.tricks
        self.refs, self.buffers = refs, buffers
        self.softmax = softmax.Softmax(plan, refs)

    def start(self, item):
        """Reset the tiles of a query block, and lay out their queries."""

        def start_tile(q_sub, group):
            state = self._state(q_sub, group)
            self.reset(state, group)
            queries = layout.load_q_tile(self.tiles, self.buffers.q, item.q_slot, q_sub, group)
            state.q[...] = self.softmax.queries(queries)

        for_each_tile(self.tiles, self._num_q_subs(item), start_tile)

    def reset(self, state, group):
        """Set a `TileState` to "no key seen yet"."""
        state.acc[...] = jnp.zeros(state.acc.shape, jnp.float32)
        state.row_max[...], state.row_sum[...] = self.softmax.nothing_seen(group)

    def finish(self, item):
        """Lay the output of a query block out in its o buffer."""

        def finish_tile(q_sub, group):
            state = self._state(q_sub, group)
            acc = state.acc[:, pl.ds(0, self.tiles.group_lanes)]  # without the row sums next to it
            output = self.softmax.normalise(acc, state.row_sum[...], state.row_max)
            layout.store_o_tile(self.tiles, self.buffers.o, item.q_slot, q_sub, group, output)

        for_each_tile(self.tiles, self._num_q_subs(item), finish_tile)

    def attend(self, item):
        """Attention of a query block to a KV block in VMEM, sub-block by sub-block."""
        _, bkv, bq_c, bkv_c = self.plan.blocks

        @repeat(1 if bkv == bkv_c else divide_up(item.num_tokens, bkv_c))
        def _(kv_sub):
            token = kv_sub * bkv_c
            num_valid = jnp.minimum(bkv_c, item.num_tokens - token)

            @repeat(self._num_q_subs(item))
            def _(q_sub):
                q_position, kv_position = item.position + q_sub * bq_c, item.kv_position + token
                scores = ScoreTile(self.plan, q_position, kv_position, num_valid)
                is_masked = scores.is_needed
                if not self.tricks.masks_always:
                    is_masked &= jnp.logical_not(scores.needs_no_mask)

                    @pl.when(scores.is_needed & scores.needs_no_mask)
                    def _():
                        self._attend_groups(item.kv_slot, token, q_sub, None)

                @pl.when(is_masked)
                def _():
                    self._attend_groups(item.kv_slot, token, q_sub, scores)

    def _attend_groups(self, kv_slot, token, q_sub, scores):
        """All heads of one rectangle of scores, P V of each issued after a few later Q K^T."""
        mask_limits = num_valid = None
        if scores is not None:
            mask_limits, num_valid = self.refs.mask_limits, scores.num_valid
            mask_limits = mask_limits.at[pl.ds(0, self.tiles.mask_rows)]
            mask_limits[...] = jnp.where(scores.mask(), jnp.inf, -jnp.inf)

        def softmaxes():
            for group in range(self.tiles.num_groups):
                k, v = layout.load_kv(self.tiles, self.buffers.kv, kv_slot, token, group, num_valid)
                for state in self._parts_of_tile(q_sub, group):
                    s = self.softmax.scores(state.q[...], k, mask_limits)
                    yield state, v, *self.update(s, state)

        for one in mxu.delayed(softmaxes(), self.tricks.qk_ahead):
            self.accumulate(*one)

    def update(self, s, state):
        """Take scores f32[rows, bkv_c] into the running maximum and sum of a `TileState`.

        Returns:
            p: f32[rows, bkv_c], the weights so far, not normalised.
            decay: f32[rows, 128], the factor for everything before.
        """
        m_before = state.row_max[...]
        m = jnp.maximum(m_before, jnp.max(s, axis=1, keepdims=True))
        p = jnp.exp2(s - softmax.widen(m, s.shape[1]))
        decay = jnp.exp2(m_before - m)
        state.row_max[...] = m
        if not self.tricks.uses_idle_mxu:
            state.row_sum[...] = decay * state.row_sum[...] + softmax.lane_sums(p)
        return p, decay

    def accumulate(self, state, v, p, decay):
        """Add the weighted values of a tile: p and decay as of `update`, v [bkv_c, group_lanes]."""
        pv = self.softmax.weighted_values(p, v)
        state.acc[...] = softmax.widen(decay, pv.shape[1]) * state.acc[...] + pv

    def _parts_of_tile(self, q_sub, group):
        """What one product takes of a tile: all, except of the last group two halves.

        There each half has the products of the other next to its softmax.
        """
        half = self.tiles.rows // 2
        # The mask must begin again in the second half; and a bfloat16 register holds 16 rows.
        if group < self.tiles.num_groups - 1 or half % self.tiles.mask_rows or half % 16:
            return [self._state(q_sub, group)]
        return [self._state(q_sub, group, first, half) for first in (0, half)]

    def _state(self, q_sub, group, first=0, num_rows=None):
        """The state of a tile, or of num_rows of its rows from `first` on."""
        num_rows = num_rows or self.tiles.rows
        if self.plan.has_small_tiles:  # sub-blocks of the first large tile
            first = pl.multiple_of(q_sub * self.tiles.rows + first, num_rows)
            q_sub = 0
        return TileState(self.refs, self.tiles.group_lanes, (q_sub, group, pl.ds(first, num_rows)))

    def _num_q_subs(self, item):
        """Sub-blocks that hold at least one token of a query block."""
        if self.tiles.num_q_subs == 1:
            return 1
        return divide_up(item.q_len, self.tiles.blocks.bq_c)


class TileState:
    """The refs of a tile's queries and softmax state, by its index in them.

    q [rows, group_lanes (x 2)]; row_max, row_sum f32[rows, 128]; acc f32[rows, group_lanes], of
    which row_sum is the next 128 columns where half of the MXU is idle.
    """

    def __init__(self, refs, group_lanes, index):
        self.q, self.row_max = refs.q_tiles.at[index], refs.row_max.at[index]
        self.acc = refs.acc.at[index]
        if refs.row_sum is None:
            self.row_sum = refs.acc.at[(*index, pl.ds(group_lanes, LANES))]
        else:
            self.row_sum = refs.row_sum.at[index]


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
        p, tiles = self.plan.problem, self.plan.tiles
        shape = (tiles.mask_rows, self.plan.blocks.bkv_c)
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        distance = self.q_position - self.kv_position - column  # query minus key
        if not tiles.is_one_token:
            distance += lax.broadcasted_iota(jnp.int32, shape, 0)
        # No causal term without a later key: the block of one token ends with its own key.
        mask = distance >= 0 if p.causal and not tiles.is_one_token else column < self.num_valid
        if p.sliding_window is not None:
            mask = mask & (distance < p.sliding_window)
        return mask


def for_each_tile(tiles, num_q_subs, body):
    """Call body(q_sub, group) for all tiles, in loops: unrolled code would be no faster."""

    @repeat(num_q_subs)
    def _(q_sub):
        repeat(tiles.num_groups)(partial(body, q_sub))


def repeat(count):
    """A loop; the number of iterations may be known only at run time, but is at least one."""
    if isinstance(count, int) and count == 1:
        return lambda body: body(0)
    return compat.loop_once(0, count)
