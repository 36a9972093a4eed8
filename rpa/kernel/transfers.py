"""Every copy of the kernel: what is started, where it lands, and who waits for it.

    page table   HBM -> SMEM   one chunk a KV block, one block ahead of the block's own copies
    KV pages     HBM -> VMEM   one copy a page; the last may be part of a page
    new K, V     HBM -> VMEM   straight from the packed array, behind the cached tokens
    new K, V     HBM -> HBM    into their pages; nothing in this kernel ever reads them there
    queries      HBM -> VMEM   with the first KV block of their query block
    output       VMEM -> HBM   at the end of a query block; waited for two blocks later

Each query block stores exactly its own tokens. They are inside the range of keys it reads, so their
page-table entries are at hand, and no token can be missed, window or not.

A semaphore counts bytes. A wait names a copy of the same size, whichever, so that one wait is
enough for all pages of a block.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa.kernel import walk
from rpa.kernel.plan import TABLE_TILE_WORDS
from rpa.paging import cdiv

PAGES_PER_TURN = 8
"""Copies of whole pages that are issued in a row: a loop costs about as much as a copy."""

STORE_LIMIT_BYTES = 4 * 2**20
"""New K and V that may be on their way into the cache: a semaphore cannot count for ever."""


# --- Fetching: one KV block ahead of the computation -------------------------------------------


def start_first(plan, refs, first, end):
    """Put the cursor on the first KV block of the batch and start fetching it, if there is one."""
    for word in range(walk.NUM_STATE_WORDS):
        refs.state[word] = jnp.int32(0)
    refs.state[walk.NEXT_SEQ] = walk.first_active(plan, refs, first, end)

    @pl.when(refs.state[walk.NEXT_SEQ] < end)
    def _():
        _table_copy(plan, refs).start()
        fetch_next(plan, refs, end)


def fetch_next(plan, refs, end):
    """Start all copies of the KV block under the cursor and move the cursor on, if there is one."""

    @pl.when(refs.state[walk.NEXT_SEQ] < end)
    def _():
        block, kv_index = walk.cursor_block(plan, refs), refs.state[walk.NEXT_KV_BLOCK]
        # Its page-table entries were asked for one block ago.
        _table_copy(plan, refs).wait()

        @pl.when(kv_index == 0)
        def _():
            _start_queries(plan, refs, block)

        _start_kv(plan, refs, block, kv_index)
        if plan.problem.update_kv_cache:
            _start_store(plan, refs, block, kv_index)
        walk.advance(plan, refs, block, end)

        # Only now: the entries of the next block overwrite those that were just used.
        @pl.when(refs.state[walk.NEXT_SEQ] < end)
        def _():
            _table_copy(plan, refs).start()


def _first_entry(plan, block, kv_index):
    """Place of a KV block's first page in the page table."""
    page = walk.kv_block_start(plan, block, kv_index) // plan.problem.page_size
    return block.seq.index * plan.problem.pages_per_seq + page


def _chunk_start(plan, entry):
    """First word of the chunk that holds an entry: a multiple of a tile, and inside the table."""
    start = entry // TABLE_TILE_WORDS * TABLE_TILE_WORDS
    return jnp.minimum(start, plan.table_words - plan.table_chunk_words)


def _table_copy(plan, refs):
    """The copy of the page-table entries of the KV block under the cursor."""
    block = walk.cursor_block(plan, refs)
    start = _chunk_start(plan, _first_entry(plan, block, refs.state[walk.NEXT_KV_BLOCK]))
    words = pl.ds(pl.multiple_of(start, TABLE_TILE_WORDS), plan.table_chunk_words)
    return pltpu.make_async_copy(refs.page_table.at[words], refs.table_chunk, refs.table_sem.at[0])


def _start_queries(plan, refs, block):
    slot = refs.state[walk.Q_FETCHED] % 2
    refs.state[walk.Q_FETCHED] += 1
    rows = pl.ds(block.row, block.num_rows)
    target = refs.q_buffer.at[slot, pl.ds(0, block.num_rows)]
    pltpu.make_async_copy(refs.queries.at[rows], target, refs.q_sems.at[slot]).start()


def wait_queries(plan, refs, block, slot):
    """Wait for the queries of a block."""
    target = refs.q_buffer.at[slot, pl.ds(0, block.num_rows)]
    pltpu.make_async_copy(target, target, refs.q_sems.at[slot]).wait()


def _start_kv(plan, refs, block, kv_index):
    """Start the copies of a KV block: pages from the cache, then the new tokens behind them."""
    slot = refs.state[walk.KV_FETCHED] % 2
    refs.state[walk.KV_FETCHED] += 1
    start = walk.kv_block_start(plan, block, kv_index)
    num_tokens = walk.kv_block_tokens(plan, block, kv_index)
    seq, num_cached = block.seq, num_tokens
    if plan.problem.update_kv_cache:
        num_cached = jnp.clip(seq.first_new - start, 0, num_tokens)
    entry = _first_entry(plan, block, kv_index)
    _start_pages(plan, refs, slot, entry - _chunk_start(plan, entry), num_cached)

    if plan.problem.update_kv_cache:
        num_new = num_tokens - num_cached

        @pl.when(num_new > 0)
        def _():
            row = seq.q_start + start + num_cached - seq.first_new
            source = refs.new_kv.at[pl.ds(row, num_new)]
            target = _kv_tokens(plan, refs, slot, num_cached, num_new)
            pltpu.make_async_copy(source, target, refs.kv_sems.at[slot]).start()


def _start_pages(plan, refs, slot, entry, num_tokens):
    """Copy the first num_tokens of the pages from `entry` of the chunk on.

    Whole pages have a static size, which halves the work of issuing a copy. The last copy stops at
    the last token: what lies behind it in the page is not ours, and a new token will land there.
    """
    page_size = plan.problem.page_size
    num_whole = num_tokens // page_size
    num_turns = num_whole // PAGES_PER_TURN

    @pl.loop(0, num_turns)
    def _(turn):
        for i in range(PAGES_PER_TURN):
            _start_page(plan, refs, slot, entry, turn * PAGES_PER_TURN + i, page_size)

    @pl.loop(num_turns * PAGES_PER_TURN, num_whole)
    def _(page):
        _start_page(plan, refs, slot, entry, page, page_size)

    @pl.when(num_tokens > num_whole * page_size)
    def _():
        rest = num_tokens - num_whole * page_size
        _start_page(plan, refs, slot, entry, num_whole, rest)


def _start_page(plan, refs, slot, entry, page, num_tokens):
    source = refs.kv_cache.at[refs.table_chunk[entry + page], pl.ds(0, num_tokens)]
    target = _kv_tokens(plan, refs, slot, page * plan.problem.page_size, num_tokens)
    pltpu.make_async_copy(source, target, refs.kv_sems.at[slot]).start()


def _kv_tokens(plan, refs, slot, first, num_tokens):
    """Tokens of a KV buffer, without the extra row that makes their distance odd."""
    return refs.kv_buffer.at[slot, pl.ds(first, num_tokens), pl.ds(0, plan.problem.kv_words)]


def wait_kv(plan, refs, slot, num_tokens):
    """Wait for all copies of a KV block at once: together they are num_tokens."""
    target = _kv_tokens(plan, refs, slot, 0, num_tokens)
    pltpu.make_async_copy(target, target, refs.kv_sems.at[slot]).wait()


# --- Storing the new tokens --------------------------------------------------------------------


def _start_store(plan, refs, block, kv_index):
    """Copy those new tokens of the query block into the cache that lie in this KV block."""
    start = walk.kv_block_start(plan, block, kv_index)
    end = start + walk.kv_block_tokens(plan, block, kv_index)
    first = jnp.maximum(start, block.position)
    last = jnp.minimum(end, block.position + block.num_rows)
    entry = _first_entry(plan, block, kv_index)
    entry = entry - _chunk_start(plan, entry)

    @pl.when(first < last)
    def _():
        _limit_stores(plan, refs, last - first)
        first_page = (first - start) // plan.problem.page_size
        end_page = cdiv(last - start, plan.problem.page_size)

        @pl.loop(first_page, end_page)
        def _(page):
            page_start = start + page * plan.problem.page_size
            begin = jnp.maximum(first, page_start)
            size = jnp.minimum(last, page_start + plan.problem.page_size) - begin
            row = block.seq.q_start + begin - block.seq.first_new
            target = refs.kv_cache_out.at[
                refs.table_chunk[entry + page], pl.ds(begin - page_start, size)
            ]
            source = refs.new_kv.at[pl.ds(row, size)]
            pltpu.make_async_copy(source, target, refs.store_sem.at[0]).start()


def _limit_stores(plan, refs, num_tokens):
    """Count the new stores; wait for those before if too many bytes would be on their way."""
    p = plan.problem
    limit = max(1, STORE_LIMIT_BYTES // (p.kv_words * 4 * p.lanes))

    @pl.when(refs.state[walk.TOKENS_STORED] + num_tokens > limit)
    def _():
        wait_stores(plan, refs)

    refs.state[walk.TOKENS_STORED] += num_tokens


def wait_stores(plan, refs):
    """Wait until all tokens stored so far are in the cache."""
    num_tokens = refs.state[walk.TOKENS_STORED]

    @pl.when(num_tokens > 0)
    def _():
        same_size = refs.new_kv.at[pl.ds(0, num_tokens)]
        pltpu.make_async_copy(same_size, same_size, refs.store_sem.at[0]).wait()

    refs.state[walk.TOKENS_STORED] = jnp.int32(0)


# --- Output ------------------------------------------------------------------------------------


def start_output(refs, slot, row, num_rows):
    """Send the first rows of an o buffer to the output."""
    refs.state[walk.ROWS_LEAVING + slot] = num_rows
    source = refs.o_buffer.at[slot, pl.ds(0, num_rows)]
    target = refs.output.at[pl.ds(row, num_rows)]
    pltpu.make_async_copy(source, target, refs.o_sems.at[slot]).start()


def wait_output(refs, slot):
    """Wait until an o buffer is free: what it last sent, if anything, has left."""
    num_rows = refs.state[walk.ROWS_LEAVING + slot]

    @pl.when(num_rows > 0)
    def _():
        source = refs.o_buffer.at[slot, pl.ds(0, num_rows)]
        pltpu.make_async_copy(source, source, refs.o_sems.at[slot]).wait()

    refs.state[walk.ROWS_LEAVING + slot] = jnp.int32(0)


def wait_all(plan, refs):
    """What is still under way when the last block is computed: two outputs and the stores."""
    wait_output(refs, 0)
    wait_output(refs, 1)
    if plan.problem.update_kv_cache:
        wait_stores(plan, refs)


def write_zero_rows(plan, refs, num_used):
    """Fill the output behind the last token of the last sequence: nobody else writes there.

    The o buffer must be free and hold zeros in slot 0.
    """
    size = plan.blocks.bq

    @pl.loop(0, cdiv(plan.problem.num_tokens - num_used, size))
    def _(i):
        row = num_used + i * size
        num_rows = jnp.minimum(size, plan.problem.num_tokens - row)
        start_output(refs, 0, row, num_rows)
        wait_output(refs, 0)
