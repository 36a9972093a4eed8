"""Every copy of the kernel: what is started, where it lands, and what waits for it.

    page table   HBM -> SMEM   one chunk per work item, some iterations before its other copies
    KV pages     HBM -> VMEM   one copy per page, or one for a block of contiguous pages, see
                               `page_table`; the first and the last may be part of a page
    new K, V     HBM -> VMEM   straight from the packed array, behind the cached tokens
    new K, V     VMEM -> HBM   from there into their pages, once they have arrived; awaited when
                               the buffer is needed. Nothing in this kernel reads them there.
                               Decode copies from HBM, see `_store_token`
    queries      HBM -> VMEM   with the first KV block of their query block
    output       VMEM -> HBM   at the end of a query block; awaited when its buffer is needed

Each query block stores exactly its own tokens. They are inside the range of keys it reads, window
or not: so they pass through a KV buffer anyway, and their page-table entries are at hand.

A semaphore counts bytes. A wait names any copy of the same size, so that one wait is enough for all
pages of a block.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import compat
from rpa.kernel import page_table
from rpa.kernel.page_table import TABLE_TILE_WORDS
from rpa.kernel.traversal import divide, divide_up


def _start(source, target, semaphore):
    pltpu.make_async_copy(source, target, semaphore).start()


def _wait(same_size, semaphore):
    pltpu.make_async_copy(same_size, same_size, semaphore).wait()


def _wait_if(size, same_size, semaphore):
    """Wait for a copy of that size, if it is not 0: then there is none."""

    @pl.when(size > 0)
    def _():
        _wait(same_size, semaphore)


def _words(first, size):
    return pl.ds(pl.multiple_of(first, TABLE_TILE_WORDS), size)


class Copies:
    """The copies of one kernel, on its `Refs`."""

    def __init__(self, plan, refs):
        self.refs, self.plan, self.problem, self.table = refs, plan, plan.problem, plan.table
        self.page_size, self.stores = plan.problem.page_size, plan.problem.update_kv_cache

    def clear(self):
        """Say of all buffers that nothing leaves them."""

        @compat.loop_once(0, self.plan.num_slots)
        def _(slot):
            self.refs.stored[slot] = self.refs.sent[slot] = jnp.int32(0)

    # --- Looking up: the page-table entries of a work item -------------------------------------

    def look_up(self, item):
        """Start the copy of a work item's page-table entries, if it exists."""
        pl.when(item.exists)(self._table_copy(item).start)

    def _table_copy(self, item):
        size = self.table.chunk_words
        source = self.refs.page_table.at[_words(self._chunk_start(item.entry), size)]
        target = self.refs.table_chunks.at[_words(item.ring_index * size, size)]
        return pltpu.make_async_copy(source, target, self.refs.table_sems.at[item.ring_index])

    def _chunk_start(self, entry):
        """First word of the chunk that holds an entry: a multiple of a tile, inside the table."""
        start = divide(entry, TABLE_TILE_WORDS) * TABLE_TILE_WORDS
        return jnp.minimum(start, self.table.table_words - self.table.chunk_words)

    def _index_in_chunks(self, item):
        """Where the first entry of a work item is in SMEM, once its chunk has arrived."""
        return item.ring_index * self.table.chunk_words + item.entry - self._chunk_start(item.entry)

    def _unmark(self, index):
        """Take the mark off a block's first entry; return whether the block is contiguous."""
        if not self.plan.tricks.marks_contiguous:
            return False
        value = self.refs.table_chunks[index]
        self.refs.table_chunks[index] = page_table.page(value)
        return page_table.is_contiguous(value)

    # --- Fetching: some iterations ahead of the computation ------------------------------------

    def fetch(self, item):
        """Start all copies of a work item that was looked up."""
        self._table_copy(item).wait()
        index = self._index_in_chunks(item)
        is_contiguous = self._unmark(index)

        @pl.when(item.is_first != 0)
        def _():
            source = self.refs.queries.at[pl.ds(item.q_row, item.q_len)]
            _start(source, self._q_rows(item), self.refs.q_sems.at[item.q_slot])

        if self.stores and self.plan.is_decode:
            self._store_token(item)
        elif self.stores:
            self._wait_stores(item.kv_slot)
        num_cached = self._start_new_kv(item)
        # Whole pages come last: the loop over them is the end of what the compiler interleaves.
        num_head = 0
        if self.problem.sliding_window is not None:
            num_head = self._start_part_of_page(item, index, num_cached)
            index, num_cached = index + 1, num_cached - num_head
        self._start_pages(item.kv_slot, index, num_head, num_cached, is_contiguous)

    def _start_new_kv(self, item):
        """Copy the new tokens of a KV block behind its cached ones; return how many are cached."""
        if not self.stores:
            return item.num_tokens
        num_cached = jnp.clip(item.num_cached - item.kv_position, 0, item.num_tokens)
        num_new = item.num_tokens - num_cached

        @pl.when(num_new > 0)
        def _():
            row = item.q_row + item.kv_position + num_cached - item.position
            source = self.refs.new_kv.at[pl.ds(row, num_new)]
            target = self._kv_tokens(item.kv_slot, num_cached, num_new)
            _start(source, target, self.refs.kv_sems.at[item.kv_slot])

        return num_cached

    def _start_part_of_page(self, item, index, num_tokens):
        """Copy the rest of the page in which a KV block begins; return its number of tokens.

        A window begins anywhere. Reading the tokens of its page that lie before it would be wasted:
        with pages as long as the window, half as much again.
        """
        offset = lax.rem(item.kv_position, self.page_size)
        num_head = jnp.minimum(self.page_size - offset, num_tokens)
        copy = self._page_copy(item.kv_slot, index, 0, num_head, offset)
        pl.when(num_head > 0)(copy.start)
        return num_head

    def _start_pages(self, slot, index, row, num_tokens, is_contiguous):
        """Copy num_tokens of the pages from entry `index` on to a row of the KV buffer.

        Whole pages have a static size, which halves the work of issuing a copy. The last copy stops
        at the last cached token: what follows in its page is not the sequence's yet, and in the
        buffer a new token lands there. Of contiguous pages it is the only copy.
        """
        page_size, unrolled = self.page_size, self.table.pages_unrolled
        num_whole = jnp.where(is_contiguous, 0, divide(num_tokens, page_size))

        @pl.when(num_tokens > num_whole * page_size)
        def _():
            num_copied = num_whole * page_size
            rest = num_tokens - num_copied
            self._page_copy(slot, index + num_whole, row + num_copied, rest).start()

        @compat.loop_once(0, divide_up(num_whole, unrolled))
        def _(iteration):
            first = iteration * unrolled
            for i in range(unrolled):
                first_row = row + (first + i) * page_size
                copy = self._page_copy(slot, (index + first) + i, first_row, page_size)
                # The last iteration skips copies: that costs less than a loop for the rest.
                pl.when(i < num_whole - first)(copy.start)

    def _page_copy(self, slot, index, row, num_tokens, offset=0):
        """The copy of tokens of the page in an entry to a row of the KV buffer."""
        source = self.refs.kv_cache.at[self._cache_rows(index, offset, num_tokens)]
        target = self._kv_tokens(slot, row, num_tokens)
        return pltpu.make_async_copy(source, target, self.refs.kv_sems.at[slot])

    def _cache_rows(self, index, offset, num_tokens):
        """Where tokens are in the cache, from an offset in the page of an entry on."""
        return pl.ds(self.refs.table_chunks[index] * self.page_size + offset, num_tokens)

    def _kv_tokens(self, slot, first, num_tokens):
        """Tokens of a KV buffer, without the extra row that makes their distance odd."""
        words = self.problem.kv_shape[0]
        return self.refs.kv_buffer.at[slot, pl.ds(first, num_tokens), pl.ds(0, words)]

    def _q_rows(self, item):
        return self.refs.q_buffer.at[item.q_slot, pl.ds(0, item.q_len)]

    # --- Waiting, when a work item is computed -------------------------------------------------

    def wait_queries(self, item):
        """Wait for the queries of a query block, before its first KV block is computed."""
        if self.problem.debug_mode:
            pl.debug_print("rpa: queries from row {}, position {}", item.q_row, item.position)
        _wait(self._q_rows(item), self.refs.q_sems.at[item.q_slot])

    def wait_kv(self, item):
        """Wait for all copies of a KV block at once: together they are num_tokens."""
        target = self._kv_tokens(item.kv_slot, 0, item.num_tokens)
        _wait(target, self.refs.kv_sems.at[item.kv_slot])

    # --- Storing the new tokens ----------------------------------------------------------------

    def _store_token(self, item):
        """Copy the one new token of a decode into the cache, with the KV block that it ends.

        Out of `new_kv`, which so is read twice: a decode computes so briefly that a store out of
        the buffer would not be done when the next block is fetched into it.
        """

        @pl.when(item.is_last != 0)
        def _():
            source = self.refs.new_kv.at[pl.ds(item.q_row, 1)]
            self._start_store(item, source, item.position, 1)

    def wait_store_of_token(self, item):
        """Wait until the new token of a decode is in the cache."""
        if self.stores:
            _wait(self._kv_tokens(item.kv_slot, 0, 1), self.refs.store_sems.at[item.kv_slot])

    def start_stores(self, item):
        """Copy those new tokens of the query block into the cache that are in this KV block."""
        if not self.stores:
            return
        first = jnp.maximum(item.kv_position, item.position)
        last = jnp.minimum(item.kv_position + item.num_tokens, item.position + item.q_len)

        @pl.when(first < last)
        def _():
            self.refs.stored[item.kv_slot] = last - first
            page_size = self.page_size

            @pl.loop(divide(first, page_size), divide_up(last, page_size))
            def _(page):
                begin = jnp.maximum(first, page * page_size)
                num_tokens = jnp.minimum(last, (page + 1) * page_size) - begin
                source = self._kv_tokens(item.kv_slot, begin - item.kv_position, num_tokens)
                self._start_store(item, source, begin, num_tokens)

    def _start_store(self, item, source, position, num_tokens):
        """Copy new tokens into the cache, from a position of the sequence on, all in one page."""
        page = divide(position, self.page_size)
        index = self._index_in_chunks(item) + page - divide(item.kv_position, self.page_size)
        rows = self._cache_rows(index, position - page * self.page_size, num_tokens)
        _start(source, self.refs.kv_cache_out.at[rows], self.refs.store_sems.at[item.kv_slot])

    def _wait_stores(self, slot):
        """Wait until a KV buffer is free: the new tokens in it, if any, are in the cache."""
        num_tokens = self.refs.stored[slot]
        _wait_if(num_tokens, self._kv_tokens(slot, 0, num_tokens), self.refs.store_sems.at[slot])
        self.refs.stored[slot] = jnp.int32(0)

    # --- Output --------------------------------------------------------------------------------

    def start_output(self, slot, row, num_rows):
        """Send the first rows of an o buffer to the output."""
        self.refs.sent[slot] = num_rows
        target = self.refs.output.at[pl.ds(row, num_rows)]
        _start(self._o_rows(slot, num_rows), target, self.refs.o_sems.at[slot])

    def wait_output(self, slot):
        """Wait until an o buffer is free: what it last sent, if anything, has left."""
        num_rows = self.refs.sent[slot]
        _wait_if(num_rows, self._o_rows(slot, num_rows), self.refs.o_sems.at[slot])
        self.refs.sent[slot] = jnp.int32(0)

    def _o_rows(self, slot, num_rows):
        return self.refs.o_buffer.at[slot, pl.ds(0, num_rows)]

    def wait_all(self):
        """Wait for what is in flight after the last computation: outputs and stores."""

        @compat.loop_once(0, self.plan.num_slots)
        def _(slot):
            self.wait_output(slot)
            if self.stores and not self.plan.is_decode:
                self._wait_stores(slot)

    def write_zero_rows(self, num_used):
        """Fill the output behind the last token of the last sequence, which no other copy writes.

        The o buffer must be free and hold zeros in slot 0.
        """

        num_tokens, bq = self.problem.num_tokens, self.plan.blocks.bq

        @pl.loop(0, divide_up(num_tokens - num_used, bq))
        def _(i):
            row = num_used + i * bq
            self.start_output(0, row, jnp.minimum(bq, num_tokens - row))
            self.wait_output(0)
