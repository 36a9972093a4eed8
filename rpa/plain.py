"""Rung 7: all of ragged paged attention in one plain kernel. The work is a list, made beforehand.

Rung 6 steps through the sequences and gives each the same few rows of queries: it decodes, and no
more. Here a step of the grid is a *query block*: up to `block_q` new tokens of one sequence, side
by side. A decode is one query block, a prompt of 500 tokens is 500 / block_q of them, an idle slot
is none. Which query blocks there are, and what each of them reads, is known before the kernel
starts. So the kernel does not work it out: `work_list` does, in plain JAX, and returns arrays that
can be printed and tested. Here are one decode, one idle slot and a prompt of which 20 tokens are in
the cache and 10 are new:

>>> from rpa.ragged import RaggedBatch
>>> batch, _ = RaggedBatch.from_lengths([1, 0, 10], [29, 7, 30], [[0, 1], [2], [3, 4]])
>>> print(table(work_list(batch, 11, Options(block_q=4))))
        seq      q_row      q_len   position num_cached   kv_start     kv_end
          0          0          1         28         28          0         29
          2          1          4         20         20          0         24
          2          5          4         24         20          0         28
          2          9          2         28         20          0         30

Read a row as a sentence. The third row: "queries 5 to 8 belong to sequence 2 and stand at its
positions 24 to 27; together they see keys 0 to 27, of which 0 to 19 are in the cache".

    a query block    reads keys `kv_start` to `kv_end` in *KV blocks* of `block_kv` tokens: under a
                     causal mask it sees nothing later, through a sliding window nothing earlier
    a new token      is copied from `new_kv` by every query block that sees it. Exactly one of them,
                     the one that holds the token's query, also stores it in its page, straight
                     from the buffer. No query block reads it back from the cache, so no read can
                     overtake the write: rung 6's rule "order"
    a page           is read as far as it holds cached tokens, once for each query block that sees
                     it: a larger `block_q` reads the cached part of a prompt less often
    an idle slot     has no query block, so nothing is read, computed or stored for it

Copies overlap as in rung 6: while one KV block is computed, the next is in flight, whether it
belongs to the same query block or to the next one. The queries of a query block come with its first
KV block, and its output leaves after the last one. Both copies move exactly as many rows as there
are queries: rows of other sequences stay untouched, and a decode moves one row, not `block_q`.

What is left to rung 8 is speed, and very long page tables: this kernel masks every block, reads K
and V by value, and keeps the page table in SMEM (1 MiB, so 262,144 pages for all sequences).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import chips, compat, fused, interpreter, streamed, tiled
from rpa.paging import LANES, cdiv, kv_token_bytes, lanes_are_shared, pack_kv
from rpa.ragged import check_call, quantize
from rpa.validation import as_window

# --- The kernel ---------------------------------------------------------------------------------


class Refs(NamedTuple):
    """All memory of the kernel, in the order in which `pallas_call` passes it.

    `rows`, `packing` and `lanes` are those of the cache, see `rpa.paging`; a tile is one KV head's
    part of a query block, and its row t * group + g is query head g of token t. Fields that rungs 5
    and 6 have too bear the same name, so that their functions take these Refs.
    """

    work: "WorkList"  # SMEM
    page_indices: object  # SMEM i32[max_num_seqs * pages_per_seq]
    constants: object  # SMEM f32[3]: factor on the scores, soft cap, factor on the output
    sinks: object  # SMEM f32[num_q_heads]
    queries: object  # HBM [num_tokens, num_q_heads, lanes]
    new_kv: object  # HBM [num_tokens, rows, packing, lanes]
    cache_before: object  # the same memory as kv_cache, and never touched under this name
    output: object  # HBM [num_tokens, num_q_heads, lanes, and LANES more for the lse]
    kv_cache: object  # HBM [num_pages, page_size, rows, packing, lanes]
    q_buffer: object  # VMEM [block_q, num_q_heads, lanes], the queries as they lie in HBM
    q_tiles: object  # VMEM [num_kv_heads, block_q * group, lanes], and as the MXU takes them
    o_buffer: object  # VMEM [block_q, num_q_heads, lanes of output]
    state: tiled.SoftmaxState  # VMEM f32[num_kv_heads, block_q * group, 1, 1 and lanes]
    buffers: object  # VMEM [2, block_kv, rows, packing, lanes]
    sems: object  # DMA semaphores [2]: copies into a buffer
    store_sems: object  # DMA semaphores [2]: stores out of a buffer
    q_sem: object  # DMA semaphore
    o_sem: object  # DMA semaphore
    slot: object  # SMEM i32[1], the buffer that is computed on
    stored: object  # SMEM i32[2], new tokens on their way from a buffer to the cache


class Options(NamedTuple):
    """What is compiled into the kernel, and decides what is in its work list."""

    block_q: int  # the most queries of a query block
    block_kv: int = 512  # keys of a KV block
    causal: bool = True
    sliding_window: int | None = None  # tokens
    update_kv_cache: bool = True
    has_soft_cap: bool = False
    return_lse: bool = False
    group: int = 1  # query heads of a KV head
    pages_per_seq: int = 1
    shares_lanes: bool = False  # whether K and V of a head share a row of the cache


def _kernel(*refs, options):
    refs, b = Refs(*refs), pl.program_id(0)

    @pl.when(b == 0)
    def _():
        refs.slot[0] = refs.stored[0] = refs.stored[1] = 0
        start_copies(refs, options, 0, 0, 0)

    # Two versions are compiled, for one token and for block_q, because shapes are static: a decode
    # must not pay for block_q rows of padding.
    q_len = refs.work.q_len[b]
    pl.when(q_len == 1)(partial(attend_query_block, refs, options, b, 1))
    pl.when(q_len > 1)(partial(attend_query_block, refs, options, b, options.block_q))


def attend_query_block(refs, options, b, max_q_len):
    """All of one query block, computed with room for max_q_len queries (static)."""
    q_copy(refs, b).wait()
    start_tiles(refs, options, max_q_len)

    # A `pl.loop` whose body is compiled once, see `rpa.compat`.
    @compat.loop_once(0, cdiv(refs.work.kv_end[b] - refs.work.kv_start[b], options.block_kv))
    def _(kv_block):
        slot = refs.slot[0]
        fused.wait_store(refs, 1 - slot)  # rung 6's rule "reuse"
        start_copies(refs, options, *successor(refs, options, b, kv_block), 1 - slot)
        wait_kv(refs, options, b, kv_block, slot)
        start_stores(refs, options, b, kv_block, slot)
        refs.slot[0] = 1 - slot
        attend_kv_block(refs, options, b, kv_block, slot, max_q_len)

    # Rule "reuse" again: o_buffer is overwritten only once its last output has left.
    pl.when(b > 0)(lambda: o_copy(refs, b - 1).wait())
    finish_tiles(refs, options, max_q_len)
    o_copy(refs, b).start()

    @pl.when(refs.work.q_len[b + 1] == 0)  # it was the last: rung 6's rule "the end"
    def _():
        fused.wait_store(refs, 1 - refs.slot[0])
        o_copy(refs, b).wait()


def key_range(refs, options, b, kv_block):
    """The keys of a KV block: the first position, and one past the last."""
    start = refs.work.kv_start[b] + kv_block * options.block_kv
    return start, jnp.minimum(start + options.block_kv, refs.work.kv_end[b])


def successor(refs, options, b, kv_block):
    """What is computed after a KV block: the next one, or the first one of the next query block."""
    is_last = key_range(refs, options, b, kv_block)[1] == refs.work.kv_end[b]
    return jnp.where(is_last, b + 1, b), jnp.where(is_last, 0, kv_block + 1)


# --- Its copies: a function that returns one has not started it yet -------------------------------


def start_copies(refs, options, b, kv_block, slot):
    """Start all copies of a KV block, and of the queries with the first; none after the last."""
    work = refs.work

    @pl.when(work.q_len[b] > 0)
    def _():
        start, end = key_range(refs, options, b, kv_block)
        cached_end = jnp.clip(work.num_cached[b], start, end)
        for_each_page(streamed.page_copy, refs, options, b, kv_block, slot, start, cached_end)

        @pl.when(cached_end < end)  # the other tokens are new, and side by side in new_kv
        def _():
            row = work.q_row[b] + cached_end - work.position[b]
            fused.new_copy(refs, row, slot, cached_end - start, end - cached_end).start()

        pl.when(kv_block == 0)(lambda: q_copy(refs, b).start())


def wait_kv(refs, options, b, kv_block, slot):
    """Wait for all copies of a KV block at once: together they are as long as the block."""
    start, end = key_range(refs, options, b, kv_block)
    arrived = refs.buffers.at[slot, pl.ds(0, end - start)]
    pltpu.make_async_copy(arrived, arrived, refs.sems.at[slot]).wait()


def start_stores(refs, options, b, kv_block, slot):
    """Store the new tokens of this query block that are in this KV block, out of its buffer."""
    start, end = key_range(refs, options, b, kv_block)
    # With update_kv_cache=False all tokens count as cached, and nothing is left to store.
    start = jnp.maximum(start, jnp.maximum(refs.work.position[b], refs.work.num_cached[b]))
    end = jnp.minimum(end, refs.work.position[b] + refs.work.q_len[b])
    for_each_page(fused.store_copy, refs, options, b, kv_block, slot, start, end)
    refs.stored[slot] = jnp.maximum(end - start, 0)


def for_each_page(copy, refs, options, b, kv_block, slot, start, end):
    """Start a copy between buffer and cache for each page that holds tokens of [start, end)."""
    block_start, page_size = key_range(refs, options, b, kv_block)[0], refs.kv_cache.shape[1]
    # An empty range, too, may begin in the middle of a page: nothing of that page is copied.
    end_page = jnp.where(start < end, cdiv(end, page_size), 0)

    @compat.loop_once(start // page_size, end_page)
    def _(p):
        first = jnp.maximum(start, p * page_size)  # position of the page's first token of these
        num_tokens = jnp.minimum(end, (p + 1) * page_size) - first
        page = refs.page_indices[refs.work.seq[b] * options.pages_per_seq + p]
        copy(refs, page, first - p * page_size, slot, first - block_start, num_tokens).start()


def q_copy(refs, b):
    """The queries of a query block into their buffer."""
    hbm, vmem = rows_of(refs, b)
    return pltpu.make_async_copy(refs.queries.at[hbm], refs.q_buffer.at[vmem], refs.q_sem)


def o_copy(refs, b):
    """The output of a query block out of its buffer."""
    hbm, vmem = rows_of(refs, b)
    return pltpu.make_async_copy(refs.o_buffer.at[vmem], refs.output.at[hbm], refs.o_sem)


def rows_of(refs, b):
    """The rows of a query block in HBM, and in its buffer."""
    return pl.ds(refs.work.q_row[b], refs.work.q_len[b]), pl.ds(0, refs.work.q_len[b])


# --- Its computation ------------------------------------------------------------------------------


def start_tiles(refs, options, max_q_len):
    """Lay the queries out for the MXU, and set the softmax to "no key seen".

    From here on q_buffer is free: the queries of the next query block may come.
    """
    tile_rows, group, lanes = max_q_len * options.group, options.group, refs.q_tiles.shape[2]
    row = jax.lax.broadcasted_iota(jnp.int32, (tile_rows, 1), 0)
    for h in range(refs.q_tiles.shape[0]):
        queries = refs.q_buffer[:max_q_len, pl.ds(h * group, group)]
        refs.q_tiles[h, :tile_rows] = queries.reshape(tile_rows, lanes).astype(refs.q_tiles.dtype)
        # A sink is a key without a value: row_max starts at its score, row_sum at exp(0) = 1.
        # Without sinks the score is MASK_VALUE, and the first real key rescales that 1 to 0.
        sinks = [refs.sinks[h * group + g] for g in range(group)]
        sink = sum(jnp.where(row % group == g, sink, 0.0) for g, sink in enumerate(sinks))
        state = tiled.SoftmaxState(sink, jnp.ones_like(sink), jnp.zeros((tile_rows, lanes)))
        tiled.write_state(state_of(refs, h, tile_rows), state)


def attend_kv_block(refs, options, b, kv_block, slot, max_q_len):
    """Fold a KV block into the online softmax of every head."""
    start, end = key_range(refs, options, b, kv_block)
    tile_rows, heads = max_q_len * options.group, range(refs.q_tiles.shape[0])
    mask = visible(refs, options, b, start, tile_rows)
    # Loop over heads inside each step: heads are independent, so the compiler can overlap one
    # head's latency with another's work.
    kv = [read_head(refs, options, slot, h) for h in heads]
    scores = [masked_scores(refs, options, h, kv[h][0], mask) for h in heads]
    values = [tiled.zero_tail(kv[h][1], end - start) for h in heads]
    states = [tiled.read_state(state_of(refs, h, tile_rows)) for h in heads]
    states = [tiled.softmax_step(states[h], scores[h], values[h]) for h in heads]
    for h in heads:
        tiled.write_state(state_of(refs, h, tile_rows), states[h])


def visible(refs, options, b, start, tile_rows):
    """Which keys from position `start` on each row of a tile sees, bool[tile_rows, block_kv]."""
    row = jax.lax.broadcasted_iota(jnp.int32, (tile_rows, 1), 0)
    query = refs.work.position[b] + row // options.group
    key = start + jax.lax.broadcasted_iota(jnp.int32, (tile_rows, options.block_kv), 1)
    mask = key <= query if options.causal else key < refs.work.kv_end[b]
    if options.sliding_window is not None:
        mask &= query - key < options.sliding_window
    return mask


def masked_scores(refs, options, h, k, mask):
    """The scores of one head, f32[tile_rows, block_kv]; MASK_VALUE where the mask is False."""
    scores = tiled.dot(refs.q_tiles[h, : len(mask)], k, contract=(1, 1)) * refs.constants[0]
    if options.has_soft_cap:
        scores = refs.constants[1] * jnp.tanh(scores / refs.constants[1])
    # A row that has seen only masked keys sums weights of exp(0); its first visible key rescales
    # them to 0. Every real query sees itself.
    return jnp.where(mask, scores, tiled.MASK_VALUE)


def read_head(refs, options, slot, h):
    """K and V of one head, [block_kv, lanes] each, from neighbouring places of the cache.

    Where they share their lanes both are the same rows, [k, v]: the queries are zero past head_dim,
    so they meet k alone, and of the output only the second half is kept.
    """
    _, block_kv, _, packing, lanes = refs.buffers.shape
    places = 1 if options.shares_lanes else 2
    row, part = divmod(places * h, packing)
    # Whole rows, put side by side and cut: half the work of cutting K and V out of packed words.
    found = refs.buffers[slot, :, row : row + cdiv(places, packing)].astype(jnp.float32)
    found = found.reshape(block_kv, -1)  # [block_kv, places of these rows * lanes]
    k, v = (found[:, p * lanes : (p + 1) * lanes] for p in (part, part + places - 1))
    return k.astype(refs.q_tiles.dtype), v.astype(refs.q_tiles.dtype)


def finish_tiles(refs, options, max_q_len):
    """Divide by the sums of the softmax, and lay the output out as it goes to HBM."""
    for h in range(refs.q_tiles.shape[0]):
        state = tiled.read_state(state_of(refs, h, max_q_len * options.group))
        out = tiled.finish(state, jnp.float32) * refs.constants[2]
        if options.return_lse:  # in lanes of its own: so the copy of the output moves it, too
            lse = jnp.broadcast_to(state.row_max + jnp.log(state.row_sum), (len(out), LANES))
            out = jnp.concatenate([out, lse], axis=1)
        out = out.reshape(max_q_len, options.group, -1).astype(refs.o_buffer.dtype)
        refs.o_buffer[:max_q_len, pl.ds(h * options.group, options.group)] = out


def state_of(refs, h, tile_rows):
    """References to the first rows of one head's softmax state."""
    return tiled.SoftmaxState(*(ref.at[h, pl.ds(0, tile_rows)] for ref in refs.state))


# --- The work, as data ----------------------------------------------------------------------------


class WorkList(NamedTuple):
    """The query blocks of a batch in the order of execution, i32[max_blocks + 1] each.

    Entries past the last query block have q_len 0; there is at least one.
    """

    seq: jax.Array  # its sequence
    q_row: jax.Array  # row of its first query among those of all sequences
    q_len: jax.Array  # how many queries it has, 1 to block_q
    position: jax.Array  # position of its first query in the sequence
    num_cached: jax.Array  # tokens of the sequence that are read from the cache; the rest is new
    kv_start: jax.Array  # the first key that any of its queries sees
    kv_end: jax.Array  # one past the last key that any of its queries sees


def work_list(batch, num_tokens, options) -> WorkList:
    """The query blocks of a batch, and what each of them reads: sequence after sequence.

    Args:
        batch: a `rpa.ragged.RaggedBatch`; its arrays may be traced.
        num_tokens: rows of the queries.
        options: `Options`, of which block_q, causal, sliding_window and update_kv_cache count.

    With a window of 8 tokens a query block begins at the first key that its first query sees:

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1, 6], [29, 30], [[0, 1], [2, 3]])
    >>> work = work_list(batch, 8, Options(block_q=4, sliding_window=8))
    >>> [(int(start), int(end)) for start, end in zip(work.kv_start, work.kv_end) if end]
    [(21, 29), (17, 28), (21, 30)]
    """
    starts, q_lens, kv_lens = streamed.live_lengths(batch)
    # q_len > kv_len is invalid, but under jit nothing has checked it: such a sequence is idle.
    q_lens = jnp.where(kv_lens >= q_lens, q_lens, 0)
    num_blocks = cdiv(q_lens, options.block_q)  # of each sequence
    end_blocks = jnp.cumsum(num_blocks, dtype=jnp.int32)  # one past the last of each sequence
    # At most one partial block per sequence. The grid has this static size; surplus steps do
    # nothing.
    max_blocks = min(num_tokens, cdiv(num_tokens, options.block_q) + batch.max_num_seqs)
    b = jnp.arange(max_blocks + 1, dtype=jnp.int32)
    exists = b < end_blocks[-1]
    # Query block b belongs to the first sequence that does not end before it.
    s = jnp.where(exists, (end_blocks <= b[:, None]).sum(axis=1, dtype=jnp.int32), 0)
    first = (b - (end_blocks - num_blocks)[s]) * options.block_q  # index in its sequence's queries
    position = kv_lens[s] - q_lens[s] + first
    q_len = jnp.minimum(q_lens[s] - first, options.block_q)
    window = options.sliding_window
    fields = WorkList(
        seq=s,
        q_row=starts[s] + first,
        q_len=q_len,
        position=position,
        num_cached=kv_lens[s] - q_lens[s] if options.update_kv_cache else kv_lens[s],
        kv_start=jnp.zeros_like(b) if window is None else jnp.maximum(position - window + 1, 0),
        kv_end=position + q_len if options.causal else kv_lens[s],
    )
    return WorkList(*(jnp.where(exists, field, 0) for field in fields))


def table(work: WorkList) -> str:
    """A work list as a table to print, one line for each query block: see the top of this file."""
    lines = [WorkList._fields, *zip(*map(np.asarray, work), strict=True)]
    used = 1 + np.count_nonzero(work.q_len)
    return "\n".join("".join(f"{value:>11}" for value in line) for line in lines[:used])


# --- The call -------------------------------------------------------------------------------------


def attention(
    queries, keys, values, kv_cache, batch, *, sm_scale=1.0, use_causal_mask=True,
    update_kv_cache=True, sliding_window=None, soft_cap=None, out_dtype=None, q_scale=None,
    k_scale=None, v_scale=None, attention_sink=None, return_lse=False, validate=None, block_q=None,
    block_kv=None, interpret=None,
):  # fmt: skip
    """Ragged paged attention of any batch, in one kernel: rung 7.

    It computes what `rpa.ragged.ref_ragged_paged_attention` computes, cache and output; arguments
    without a word here are explained there. Nothing is donated.

    Args:
        queries: [num_tokens, num_q_heads, head_dim], float32 or bfloat16.
        keys, values: [num_tokens, num_kv_heads, head_dim], in the dtype of the cache.
        kv_cache: float32, bfloat16 or float8, see `rpa.paging`.
        batch: a `rpa.ragged.RaggedBatch`.
        block_q: queries of a query block, None for up to 128, or 512 rows of a tile.
        block_kv: keys of a KV block, None for up to 512, or 2 MiB, or all that a sequence can
            have. Neither block has to divide anything; both decide whether the kernel fits in VMEM.
        interpret: see `rpa.tiled.flash_attention`.

    Returns:
        output [num_tokens, num_q_heads, head_dim] in out_dtype, zero in rows that no sequence owns,
        and the new cache; with return_lse also lse f32[num_tokens, num_q_heads], there -inf. Asked
        for it, the kernel writes its output in float32 with LANES more per row and head.

    Raises:
        ValueError: if the arguments do not fit together (see `rpa.ragged.check_call`), queries have
            another dtype, or a block has no token; before anything is written.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1, 2], [5, 2], [[1], [0]])
    >>> new, cache = jnp.ones((3, 1, 64)), jnp.zeros((2, 8, 2, 1, 128))
    >>> output, cache = attention(new, new, new, cache, batch)
    >>> cache[:, :, 0, 0, 0]
    Array([[1., 1., 0., 0., 0., 0., 0., 0.],
           [0., 0., 0., 0., 1., 0., 0., 0.]], dtype=float32)
    """
    scales = dict(
        sm_scale=sm_scale, soft_cap=soft_cap, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale
    )
    check_call(
        queries, keys, values, kv_cache, batch, validate=validate, update_kv_cache=update_kv_cache,
        use_causal_mask=use_causal_mask, sliding_window=sliding_window, out_dtype=out_dtype,
        attention_sink=attention_sink, return_lse=return_lse, **scales,
    )  # fmt: skip
    tiled.check_query_dtype(queries.dtype)
    group = queries.shape[1] // keys.shape[1]
    token_bytes = kv_token_bytes(kv_cache.shape, kv_cache.dtype)
    if block_q is None:
        block_q = min(128, max(16, 512 // group // 16 * 16))
    if block_kv is None:
        most = min(512, 2**21 // token_bytes, batch.pages_per_seq * kv_cache.shape[1])
        block_kv = max(8, most // 8 * 8)
    tiled.check_block("block_q", block_q)
    tiled.check_block("block_kv", block_kv)
    options = Options(
        block_q=block_q, block_kv=block_kv, group=group, pages_per_seq=batch.pages_per_seq,
        causal=use_causal_mask, sliding_window=as_window(sliding_window), return_lse=return_lse,
        update_kv_cache=update_kv_cache, has_soft_cap=soft_cap is not None,
        shares_lanes=lanes_are_shared(kv_cache.shape, *keys.shape[1:]),
    )  # fmt: skip
    out_dtype = jnp.dtype(queries.dtype if out_dtype is None else out_dtype)
    arrays = tuple(map(jnp.asarray, (queries, keys, values, kv_cache)))
    if queries.shape[0] == 0:  # nothing to store, and no query block at all
        lse = [jnp.zeros(queries.shape[:2])] if return_lse else []
        return arrays[0].astype(out_dtype), arrays[3], *lse
    interpret = interpreter.choose_interpret(interpret)
    return _attention(*arrays, batch, scales, attention_sink, options, out_dtype, interpret)


@partial(jax.jit, static_argnames=["options", "out_dtype", "interpret"])
def _attention(
    queries, keys, values, kv_cache, batch, scales, sinks, options, out_dtype, interpret
):
    num_tokens, num_q_heads, head_dim = queries.shape
    (*_, lanes), num_kv_heads = kv_cache.shape, keys.shape[1]
    f32, bf16, dma = jnp.float32, jnp.bfloat16, pltpu.SemaphoreType.DMA
    # Float32 if anything is, else bfloat16: float8 is widened, and loses nothing.
    compute_dtype = f32 if f32 in (queries.dtype, kv_cache.dtype) else bf16
    number = {name: jnp.float32(1 if x is None else x) for name, x in scales.items()}
    if scales["q_scale"] is not None:
        queries = quantize(queries, number["q_scale"], kv_cache.dtype).astype(queries.dtype)
    score_factor = number["sm_scale"] * number["q_scale"] * number["k_scale"]
    # Zeros: these lanes are multiplied with those of the cache, which are zero too.
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, lanes - head_dim)))
    prefetched = (
        work_list(batch, num_tokens, options),
        jnp.asarray(batch.page_indices),
        jnp.stack([score_factor, number["soft_cap"], number["v_scale"]]),
        jnp.asarray(jnp.full(num_q_heads, tiled.MASK_VALUE) if sinks is None else sinks, f32),
    )
    arrays = (queries, pack_kv(keys, values, share_lanes=options.shares_lanes), kv_cache)
    block = (options.block_q, num_q_heads)
    o_lanes = lanes + (LANES if options.return_lse else 0)
    o_dtype = bf16 if out_dtype == bf16 and not options.return_lse else f32
    tile = (num_kv_heads, options.block_q * options.group)
    hbm = pl.BlockSpec(memory_space=compat.hbm_memory_space(interpret))
    output, kv_cache = pl.pallas_call(
        partial(_kernel, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(len(prefetched[0].seq) - 1,),
            in_specs=[hbm] * 3,
            out_specs=[hbm] * 2,
            scratch_shapes=[
                pltpu.VMEM((*block, lanes), queries.dtype),
                pltpu.VMEM((*tile, lanes), compute_dtype),
                pltpu.VMEM((*block, o_lanes), o_dtype),
                tiled.SoftmaxState(*(pltpu.VMEM((*tile, n), f32) for n in (1, 1, lanes))),
                pltpu.VMEM((2, options.block_kv, *kv_cache.shape[2:]), kv_cache.dtype),
                *(dma((2,)), dma((2,)), dma, dma),
                *(pltpu.SMEM((n,), jnp.int32) for n in (1, 2)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, num_q_heads, o_lanes), o_dtype),
            jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype),
        ],
        # The last input and the last output are one array; every array of scalars counts.
        input_output_aliases={len(jax.tree.leaves(prefetched)) + 2: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            # By default a kernel may use only part of VMEM: ask for all of the smallest chip's.
            vmem_limit_bytes=min(chip.vmem_bytes for chip in chips.CHIPS.values()),
        ),
        name="plain_attention",
        interpret=interpret,
    )(*prefetched, *(compat.keep_in_hbm(array, interpret) for array in arrays))
    first_lane = head_dim if options.shares_lanes else 0
    _, _, owned = batch.token_positions(num_tokens)  # the other rows are never written
    lse = [jnp.where(owned[:, None], output[..., lanes], -jnp.inf)] if options.return_lse else []
    output = jnp.where(owned[:, None, None], output[..., first_lane : first_lane + head_dim], 0)
    return output.astype(out_dtype), kv_cache, *lse
