"""Decode: two or four KV blocks at a time, because one leaves the chip waiting for itself.

A query token gives one series of dependent work per head group: product, maximum, exponential,
product. With few rows it takes some 700 cycles however few the keys are, and most units idle in it.
So an iteration takes two work items, mostly of two sequences, and they overlap; four, where two do
not fill the time because a window makes the blocks short, or all heads fit in one group.

They may as well be blocks of one sequence. So every product starts from nothing ("QK-softmax"), and
only its result is merged with what the sequence has summed up before ("PV-merge"):

    m' = max(m, m_block);  l' = 2^(m - m') l + 2^(m_block - m') l_block;  the same for acc

A product takes bkv_c keys, and several are unrolled. Where all blocks have enough keys for all of
them, they need no mask. The end of the longest block takes only the products that it needs, so that
a short sequence costs less than a long one. Its partner decides what is computed together, never
what is merged: results do not depend on which sequences share an iteration.
"""

from functools import partial, reduce
from itertools import product

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rpa.kernel import layout, mxu, softmax
from rpa.paging import LANES


class Decode:
    """What a decode kernel computes."""

    def __init__(self, plan, refs, buffers, copies):
        self.refs, self.buffers, self.copies = refs, buffers, copies
        self.tiles, self.bkv_c, self.tricks = plan.tiles, plan.blocks.bkv_c, plan.tricks
        self.softmax = softmax.Softmax(plan, refs)

    def __call__(self, items):
        """Attention of one query token each to the KV blocks of the items of an iteration."""
        for item in items:
            pl.when(item.exists & (item.is_first != 0))(partial(self.copies.wait_queries, item))
            pl.when(item.exists)(partial(self.copies.wait_kv, item))
        self._attend(items)
        ends = [item.exists & (item.is_last != 0) for item in items]

        @pl.when(reduce(jnp.logical_or, ends))
        def _():
            self._finish(items, ends)

    def _attend(self, items):
        """Cut the blocks into sub-blocks, and compute each for all items together."""
        counts = [item.num_tokens for item in items]
        most, least = reduce(jnp.maximum, counts), reduce(jnp.minimum, counts)
        columns, unrolled = self.bkv_c, self.tricks.products_unrolled
        whole = columns * unrolled

        def attend_sub_block(token):
            left = most - token
            if not self.tricks.masks_always:
                is_whole = least - token >= whole
                left = jnp.where(is_whole, 0, left)

                @pl.when(is_whole)
                def _():
                    self._attend_sub_block(items, token, unrolled, is_masked=False)

            count = 1
            while count <= unrolled:  # 1, 2, 4: as much as is left, or all
                fits = (left <= count * columns) | (count == unrolled)

                @pl.when((left > count // 2 * columns) & fits)
                def _(count=count):
                    self._attend_sub_block(items, token, count, is_masked=True)

                count *= 2

            return token + whole

        lax.while_loop(lambda token: token < most, attend_sub_block, jnp.int32(0))

    def _attend_sub_block(self, items, first, num_products, is_masked):
        """All heads of several consecutive products, each P V issued after a few later Q K^T."""
        tokens = [first + i * self.bkv_c for i in range(num_products)]
        products = product(tokens, range(self.tiles.num_groups), items)
        softmaxes = ((*one, *self._qk_softmax(*one, is_masked)) for one in products)
        for one in mxu.delayed(softmaxes, self.tricks.qk_ahead):
            self._pv_merge(*one)

    def _qk_softmax(self, token, group, item, is_masked):
        """Scores and weights of one product, without what the sequence has summed up before.

        Returns:
            m, l: f32[rows, 128], maximum and partial sums; p: f32[rows, bkv_c], weights;
            v: [bkv_c, group_lanes] in the compute dtype.
        """
        t, mask_limits, num_valid = self.tiles, None, None
        if is_masked:
            num_valid = jnp.clip(item.num_tokens - token, 0, self.bkv_c)
            column = lax.broadcasted_iota(jnp.int32, (t.rows, self.bkv_c), 1)
            mask_limits = jnp.where(column < num_valid, jnp.inf, -jnp.inf)
        k, v = layout.load_kv(t, self.buffers.kv, item.kv_slot, token, group, num_valid)
        q = self.softmax.queries(layout.load_q_tile(t, self.buffers.q, item.q_slot, 0, group))
        s = self.softmax.scores(q, k, mask_limits)
        m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), softmax.LOWEST_MAX)
        m = jnp.broadcast_to(m, (t.rows, LANES))
        p = jnp.exp2(s - softmax.widen(m, self.bkv_c))
        return m, softmax.lane_sums(p), p, v

    def _pv_merge(self, token, group, item, m, total, p, v):
        """Multiply by the values, and merge with what the sequence has summed up before."""
        state = (self.refs.row_max, self.refs.row_sum, self.refs.acc)
        m_ref, l_ref, acc_ref = (ref.at[item.q_slot, group] for ref in state)
        is_first = (item.is_first != 0) & (token == 0)
        m_start, l_start = self.softmax.nothing_seen(group)
        m_before = jnp.where(is_first, m_start, m_ref[...])
        l_before = jnp.where(is_first, l_start, l_ref[...])
        acc_before = jnp.where(is_first, 0.0, acc_ref[...])
        m_ref[...] = jnp.maximum(m_before, m)
        # Without a key nothing must change, not even in the last bit: 2^0 is not 1 everywhere.
        has_keys = item.num_tokens > token
        decay = jnp.where(has_keys, jnp.exp2(m_before - m_ref[...]), 1.0)
        factor = jnp.exp2(m - m_ref[...])
        l_ref[...] = decay * l_before + factor * total
        pv = self.softmax.weighted_values(p, v)
        lanes = pv.shape[1]
        acc_ref[...] = softmax.widen(decay, lanes) * acc_before + softmax.widen(factor, lanes) * pv

    def _finish(self, items, ends):
        """Output of the sequences that end here; of the others it is computed and not sent."""
        for item in items:
            self.copies.wait_output(item.q_slot)
        for group in range(self.tiles.num_groups):
            for item in items:
                index = (item.q_slot, group)
                acc, row_sum, row_max = self.refs.acc, self.refs.row_sum, self.refs.row_max
                output = self.softmax.normalise(acc[index], row_sum[index], row_max.at[index])
                layout.store_o_tile(self.tiles, self.buffers.o, item.q_slot, 0, group, output)
        for item, is_end in zip(items, ends, strict=True):

            @pl.when(is_end)
            def _(item=item):
                self.copies.wait_store_of_token(item)
                self.copies.start_output(item.q_slot, item.q_row, item.q_len)
