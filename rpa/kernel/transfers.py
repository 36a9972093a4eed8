"""Every copy of the kernel: what is started, where it lands, and who waits for it.

    page table   HBM -> SMEM   one chunk a work item, some iterations ahead of the item's own copies
    KV pages     HBM -> VMEM   one copy a page, or of a block whose pages lie side by side, see
                               `page_table`; the first and the last may be part of a page
    new K, V     HBM -> VMEM   straight from the packed array, after the cached tokens
    new K, V     VMEM -> HBM   from there into their pages, when they have arrived; waited for when
                               the buffer is needed. Nothing in this kernel reads them there.
                               In decode from HBM, see `start_stores`
    queries      HBM -> VMEM   with the first KV block of their query block
    output       VMEM -> HBM   at the end of a query block; waited for when its buffer is needed

Each query block stores exactly its own tokens. They are inside the range of keys it reads, window
or not: so they pass through a KV buffer anyway, and their page-table entries are at hand.

A semaphore counts bytes. A wait names a copy of the same size, whichever, so that one wait is
enough for all pages of a block.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import compat
from rpa.kernel import page_table, traversal
from rpa.kernel.plan import TABLE_TILE_WORDS

# --- Fetching: some iterations ahead of the computation ----------------------------------------
# ----------------------------


def clear(plan, refs):
    """Note that nothing is on its way yet."""

    @compat.loop_once(0, 2 * plan.num_slots)
    def _(word):
        refs.in_flight[word] = jnp.int32(0)


def look_up(plan, refs, items, end):
    """Ask for the page-table entries of items, where they exist."""
    for item in items:
        pl.when(item.seq.index < end)(_table_copy(plan, refs, item).start)


def fetch(plan, refs, item):
    """Start all copies of a work item that was looked up."""
    block = traversal.query_block(plan, item.seq, item.q_index)
    _table_copy(plan, refs, item).wait()
    entry = _index_in_chunks(plan, item, block, _first_entry(plan, block, item.kv_index))
    is_contiguous = _unmark(plan, refs, entry)

    @pl.when(item.kv_index == 0)
    def _():
        _start_queries(refs, item, block)

    if plan.is_decode:
        start_stores(plan, refs, block, item)
    elif plan.problem.update_kv_cache:
        _wait_stores(plan, refs, item.kv_slot)
    # Whole pages come last: the loop over them is the end of what the compiler can interleave.
    _start_kv(plan, refs, item, block, entry, is_contiguous)


def _entry(plan, seq, page):
    """Place in the page table of a page of a sequence."""
    return seq.index * plan.problem.pages_per_seq + page


def _first_entry(plan, block, kv_index):
    """Place in the page table of a KV block's first page."""
    page = traversal.divide(traversal.kv_block_start(plan, block, kv_index), plan.problem.page_size)
    return _entry(plan, block.seq, page)


def _chunk_start(plan, entry):
    """First word of the chunk that holds an entry: a multiple of a tile, and inside the table."""
    start = traversal.divide(entry, TABLE_TILE_WORDS) * TABLE_TILE_WORDS
    return jnp.minimum(start, plan.table_words - plan.table_chunk_words)


def _table_copy(plan, refs, item):
    """The copy of the page-table entries of a work item."""
    block = traversal.query_block(plan, item.seq, item.q_index)
    start = _chunk_start(plan, _first_entry(plan, block, item.kv_index))
    source = refs.page_table.at[_table_words(plan, start)]
    target = refs.table_chunks.at[_table_words(plan, item.ring_index * plan.table_chunk_words)]
    return pltpu.make_async_copy(source, target, refs.table_sems.at[item.ring_index])


def _table_words(plan, first):
    return pl.ds(pl.multiple_of(first, TABLE_TILE_WORDS), plan.table_chunk_words)


def _index_in_chunks(plan, item, block, entry):
    """Where an entry of the page table is in SMEM, when the chunk of its item has arrived."""
    chunk = _chunk_start(plan, _first_entry(plan, block, item.kv_index))
    return item.ring_index * plan.table_chunk_words + entry - chunk


def _unmark(plan, refs, entry):
    """Take the mark of `page_table` off a block's first entry; return whether the block is a
    run."""
    if not page_table.marks(plan):
        return False
    value = refs.table_chunks[entry]
    refs.table_chunks[entry] = page_table.page(value)
    return page_table.is_contiguous(value)


def _start_queries(refs, item, block):
    rows = pl.ds(block.row, block.num_rows)
    target = refs.q_buffer.at[item.q_slot, pl.ds(0, block.num_rows)]
    pltpu.make_async_copy(refs.queries.at[rows], target, refs.q_sems.at[item.q_slot]).start()


def wait_queries(refs, block, slot):
    """Wait for the queries of a block."""
    target = refs.q_buffer.at[slot, pl.ds(0, block.num_rows)]
    pltpu.make_async_copy(target, target, refs.q_sems.at[slot]).wait()


def _start_kv(plan, refs, item, block, entry, is_contiguous):
    """Start the copies of a KV block: pages from the cache, then the new tokens after them.

    `entry` is where the first page of the block is in the chunks.
    """
    slot, kv_index = item.kv_slot, item.kv_index
    start = traversal.kv_block_start(plan, block, kv_index)
    num_tokens = traversal.kv_block_tokens(plan, block, kv_index)
    seq, num_cached = block.seq, num_tokens
    if plan.problem.update_kv_cache:
        num_cached = jnp.clip(seq.first_new - start, 0, num_tokens)
        num_new = num_tokens - num_cached

        @pl.when(num_new > 0)
        def _():
            row = seq.q_start + start + num_cached - seq.first_new
            source = refs.new_kv.at[pl.ds(row, num_new)]
            target = _kv_tokens(plan, refs, slot, num_cached, num_new)
            pltpu.make_async_copy(source, target, refs.kv_sems.at[slot]).start()

    if plan.problem.sliding_window is None:
        _start_pages(plan, refs, slot, entry, 0, num_cached, is_contiguous)
    else:
        num_head = _start_part_of_page(plan, refs, slot, entry, start, num_cached)
        _start_pages(plan, refs, slot, entry + 1, num_head, num_cached - num_head, is_contiguous)


def _start_part_of_page(plan, refs, slot, entry, position, num_tokens):
    """Copy what is left of the page that holds a position, from there on; return its tokens.

    A window begins anywhere. What lies before it in its page would be read in vain: with pages as
    long as the window, half as much again.
    """
    offset = lax.rem(position, plan.problem.page_size)
    num_head = jnp.minimum(plan.problem.page_size - offset, num_tokens)
    copy = _page_copy(plan, refs, slot, entry, 0, num_head, offset)
    pl.when(num_head > 0)(copy.start)
    return num_head


def _start_pages(plan, refs, slot, entry, row, num_tokens, is_contiguous):
    """Copy num_tokens of the pages from `entry` of the chunk on to a row of the KV buffer.

    Whole pages have a static size, which halves the work of issuing a copy. The last copy stops at
    the last token: what lies after it in the page is not ours, and a new token will land there.
    Of a run it is the only copy.
    """
    page_size, pages_unrolled = plan.problem.page_size, plan.pages_unrolled
    num_whole = jnp.where(is_contiguous, 0, traversal.divide(num_tokens, page_size))

    @pl.when(num_tokens > num_whole * page_size)
    def _():
        num_copied = num_whole * page_size
        rest = num_tokens - num_copied
        _page_copy(plan, refs, slot, entry + num_whole, row + num_copied, rest).start()

    @compat.loop_once(0, traversal.divide_up(num_whole, pages_unrolled))
    def _(iteration):
        first = iteration * pages_unrolled
        for i in range(pages_unrolled):
            first_row = row + (first + i) * page_size
            copy = _page_copy(plan, refs, slot, (entry + first) + i, first_row, page_size)
            # The last iteration passes over some copies: that costs less than a loop for what is
            # left.
            pl.when(i < num_whole - first)(copy.start)


def _page_copy(plan, refs, slot, entry, row, num_tokens, offset=0):
    """The copy of tokens of the page in an entry of the chunk to a row of the KV buffer."""
    source = refs.kv_cache.at[_cache_rows(plan, refs, entry, offset, num_tokens)]
    target = _kv_tokens(plan, refs, slot, row, num_tokens)
    return pltpu.make_async_copy(source, target, refs.kv_sems.at[slot])


def _cache_rows(plan, refs, entry, offset, num_tokens):
    """Where tokens are in the cache, from an offset in the page of an entry on."""
    return pl.ds(refs.table_chunks[entry] * plan.problem.page_size + offset, num_tokens)


def _kv_tokens(plan, refs, slot, first, num_tokens):
    """Tokens of a KV buffer, without the extra row that makes their distance odd."""
    return refs.kv_buffer.at[slot, pl.ds(first, num_tokens), pl.ds(0, plan.problem.kv_words)]


def wait_kv(plan, refs, slot, num_tokens):
    """Wait for all copies of a KV block at once: together they are num_tokens."""
    target = _kv_tokens(plan, refs, slot, 0, num_tokens)
    pltpu.make_async_copy(target, target, refs.kv_sems.at[slot]).wait()


# --- Storing the new tokens --------------------------------------------------------------------


def start_stores(plan, refs, block, item):
    """Copy those new tokens of the query block into the cache that are in this KV block.

    They are in its buffer; in a decode they are only on their way to it. It computes so short that
    a store out of the buffer would not be ready when the next block is fetched into it. So it reads
    its one token twice, and stores it while the iterations ahead are computed.
    """
    if not plan.problem.update_kv_cache:
        return
    start = traversal.kv_block_start(plan, block, item.kv_index)
    end = start + traversal.kv_block_tokens(plan, block, item.kv_index)
    first = jnp.maximum(start, block.position)
    last = jnp.minimum(end, block.position + block.num_rows)

    @pl.when(first < last)
    def _():
        if plan.is_decode:  # one token, one page
            _store_in_page(plan, refs, block, item, first, 1)
            return
        refs.in_flight[_in_flight_index(plan, traversal.TOKENS_IN_FLIGHT, item.kv_slot)] = (
            last - first
        )
        page_size = plan.problem.page_size

        @pl.loop(traversal.divide(first, page_size), traversal.divide_up(last, page_size))
        def _(page):
            begin = jnp.maximum(first, page * page_size)
            num_tokens = jnp.minimum(last, (page + 1) * page_size) - begin
            _store_in_page(plan, refs, block, item, begin, num_tokens)


def _store_in_page(plan, refs, block, item, position, num_tokens):
    """Copy new tokens into the cache, from a position of the sequence on, all in one page."""
    page_size = plan.problem.page_size
    page = traversal.divide(position, page_size)
    offset = position - page * page_size
    entry = _index_in_chunks(plan, item, block, _entry(plan, block.seq, page))
    target = refs.kv_cache_out.at[_cache_rows(plan, refs, entry, offset, num_tokens)]
    if plan.is_decode:
        row = block.seq.q_start + position - block.seq.first_new
        source = refs.new_kv.at[pl.ds(row, num_tokens)]
    else:
        row = position - traversal.kv_block_start(plan, block, item.kv_index)
        source = _kv_tokens(plan, refs, item.kv_slot, row, num_tokens)
    pltpu.make_async_copy(source, target, refs.store_sems.at[item.kv_slot]).start()


def wait_store_of_token(plan, refs, slot):
    """Wait until the new token of a decode, which its last KV block stores, is in the cache."""
    if plan.problem.update_kv_cache:
        same_size = _kv_tokens(plan, refs, slot, 0, 1)
        pltpu.make_async_copy(same_size, same_size, refs.store_sems.at[slot]).wait()


def _wait_stores(plan, refs, slot):
    """Wait until a KV buffer is free: the new tokens in it, if any, are in the cache."""
    tokens = partial(_kv_tokens, plan, refs, slot, 0)
    _wait_in_flight(plan, refs, traversal.TOKENS_IN_FLIGHT, slot, tokens, refs.store_sems)


def _wait_in_flight(plan, refs, row, slot, source_of, semaphores):
    """Wait until what leaves a slot has left; source_of(size) is so much of the slot's buffer."""
    place = _in_flight_index(plan, row, slot)
    size = refs.in_flight[place]

    @pl.when(size > 0)
    def _():
        source = source_of(size)
        pltpu.make_async_copy(source, source, semaphores.at[slot]).wait()

    refs.in_flight[place] = jnp.int32(0)


def _in_flight_index(plan, row, slot):
    """Where `in_flight` counts what leaves a slot."""
    return row * plan.num_slots + slot


# --- Output ------------------------------------------------------------------------------------


def start_output(plan, refs, slot, row, num_rows):
    """Send the first rows of an o buffer to the output."""
    refs.in_flight[_in_flight_index(plan, traversal.ROWS_IN_FLIGHT, slot)] = num_rows
    source = _o_rows(refs, slot, num_rows)
    target = refs.output.at[pl.ds(row, num_rows)]
    pltpu.make_async_copy(source, target, refs.o_sems.at[slot]).start()


def wait_output(plan, refs, slot):
    """Wait until an o buffer is free: what it last sent, if anything, has left."""
    rows = partial(_o_rows, refs, slot)
    _wait_in_flight(plan, refs, traversal.ROWS_IN_FLIGHT, slot, rows, refs.o_sems)


def _o_rows(refs, slot, num_rows):
    """The first rows of an o buffer."""
    return refs.o_buffer.at[slot, pl.ds(0, num_rows)]


def wait_all(plan, refs):
    """What is still under way when the last block is computed: outputs and stores."""

    @compat.loop_once(0, plan.num_slots)
    def _(slot):
        wait_output(plan, refs, slot)
        if plan.problem.update_kv_cache and not plan.is_decode:
            _wait_stores(plan, refs, slot)


def write_zero_rows(plan, refs, num_used):
    """Fill the output after the last token of the last sequence: nobody else writes there.

    The o buffer must be free and hold zeros in slot 0.
    """
    size = plan.blocks.bq

    @pl.loop(0, traversal.divide_up(plan.problem.num_tokens - num_used, size))
    def _(i):
        row = num_used + i * size
        num_rows = jnp.minimum(size, plan.problem.num_tokens - row)
        start_output(plan, refs, 0, row, num_rows)
        wait_output(plan, refs, 0)
