"""Rung 6: the cache is updated inside the kernel. New keys and values never wait for a round trip.

Until now the new tokens were stored first, by another program, and the attention kernel read them
back from the cache. Two kernels, and the bytes cross the HBM three times. Here the new K and V
come into the block by a copy of their own, right after the cached tokens, take part in the
computation from there, and are written to their pages while the block computes:

    block of a sequence   [cached tokens, from their pages][new tokens, from new_kv][stale]
                                                            '-> write-back to the cache

Three rules make that safe, and each has a test that breaks it:

    order      a page row is either read as cached (position < kv_len - q_len) or written as new,
               never both, so nothing reads the cache before its write is complete;
    reuse      a buffer is filled again only after its write-back was waited for: otherwise the
               write-back may send the next block's bytes;
    the end    the kernel returns only after the last write-back was waited for.

The cache is aliased: input and output are one array, and what is not written stays as it was. The
ladder does not donate it, so XLA copies the cache before the call; rung 8 shows how to avoid that.

Few queries per sequence: decode, or a few speculative tokens, up to `max_q_len`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import compat, interpreter
from rpa.paging import cdiv, pack_kv
from rpa.ragged import check_call
from rpa.streamed import (
    KeyBlock,
    Sizes,
    attend_block,
    check_lanes_are_not_shared,
    check_q_lens,
    choose_block_tokens,
    find_next_live,
    fold_heads,
    live_lengths,
    page_copy,
    successor,
    valid_tokens,
    wait_block,
)
from rpa.tiled import check_query_dtype, empty_state, finish

MAX_Q_LEN = 8
"""New tokens that a sequence may have if the caller does not say."""


class Refs(NamedTuple):
    """What the kernel's functions pass on to each other; the first five are in SMEM.

    Fields that rung 5 has too bear the same name, so that its functions take these Refs.
    """

    kv_lens: object  # i32[num_seqs]
    q_lens: object  # i32[num_seqs], new tokens of each sequence
    starts: object  # i32[num_seqs], row of each sequence's first new token
    page_indices: object  # i32[num_seqs * pages_per_seq]
    next_live: object  # i32[num_seqs + 1]
    new_kv: object  # HBM [num_tokens, rows, packing, lanes]
    kv_cache: object  # HBM [num_pages, page_size, rows, packing, lanes]
    buffers: object  # VMEM [2, block_tokens, rows, packing, lanes]
    sems: object  # DMA semaphores [2]: copies into a buffer
    store_sems: object  # DMA semaphores [2]: write-backs out of a buffer
    slot: object  # SMEM i32[1], the buffer that is computed on
    stored: object  # SMEM i32[2], tokens of a buffer on their way back to the cache


# --- The kernel -----------------------------------------------------------------------------------


def _fused_kernel(  # refs without a comment are those of `Refs`
    kv_lens_ref,
    q_lens_ref,
    starts_ref,
    page_indices_ref,
    next_live_ref,
    scale_ref,  # SMEM f32[1]: sm_scale
    q_ref,  # VMEM [num_kv_heads, max_q_len * group, lanes]
    new_kv_ref,
    _,  # the cache as input: the same memory as kv_cache_ref, and never touched under this name
    out_ref,  # VMEM [num_kv_heads, max_q_len * group, lanes]
    kv_cache_ref,
    *scratch,
    sizes,
    group,
):
    lens = (kv_lens_ref, q_lens_ref, starts_ref, page_indices_ref, next_live_ref)
    refs = Refs(*lens, new_kv_ref, kv_cache_ref, *scratch)
    s = pl.program_id(0)

    @pl.when(s == 0)
    def _():
        refs.slot[0] = 0
        refs.stored[0] = refs.stored[1] = 0
        start_block(refs, sizes, next_live_ref[0], 0, 0)

    def one_block(b, states):
        slot = refs.slot[0]
        wait_store(refs, 1 - slot)  # rule "reuse": what leaves the other buffer must have left it
        start_block(refs, sizes, *successor(refs, sizes, s, b), 1 - slot)
        wait_block(refs, sizes, s, b, slot)
        start_store(refs, sizes, s, b, slot)
        refs.slot[0] = 1 - slot
        num_valid = valid_tokens(kv_lens_ref[s], b, sizes.block_tokens)
        visible = causal_mask(refs, sizes, s, b, group=group, rows=q_ref.shape[1])
        keys = KeyBlock(refs.buffers, slot, num_valid, visible)
        return attend_block(states, q_ref, keys, scale_ref[0])

    states = [empty_state(*q_ref.shape[1:])] * sizes.num_kv_heads
    num_blocks = cdiv(kv_lens_ref[s], sizes.block_tokens)  # 0 for an idle sequence
    states = jax.lax.fori_loop(0, num_blocks, one_block, states)
    for h, state in enumerate(states):
        out_ref[h] = finish(state, out_ref.dtype)

    @pl.when(s == sizes.num_seqs - 1)
    def _():
        wait_store(refs, 1 - refs.slot[0])  # rule "the end": of the last block


def cached_tokens(kv_len, q_len, block, block_tokens):
    """Tokens of a block that are in the cache already; the valid ones after them are new.

    >>> [int(cached_tokens(21, 6, block, 8)) for block in range(3)]
    [8, 7, 0]
    """
    return jnp.clip(kv_len - q_len - block * block_tokens, 0, block_tokens)


def cached_and_valid(refs, sizes, s, block):
    """How many tokens of a block are cached, and how many exist: new is what is between."""
    kv_len = refs.kv_lens[s]
    num_cached = cached_tokens(kv_len, refs.q_lens[s], block, sizes.block_tokens)
    return num_cached, valid_tokens(kv_len, block, sizes.block_tokens)


def causal_mask(refs, sizes, s, block, *, group, rows):
    """Which keys of a block each row of q sees: bool[rows, block_tokens]; row t * group + g."""
    shape = (rows, sizes.block_tokens)
    row, col = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    q_position = refs.kv_lens[s] - refs.q_lens[s] + row // group
    kv_position = block * sizes.block_tokens + col
    # Also the rows past the last query are kept from what lies past kv_len: it is stale.
    return (kv_position <= q_position) & (kv_position < refs.kv_lens[s])


# --- Its copies -----------------------------------------------------------------------------------


def start_block(refs, sizes, s, block, slot):
    """Start all copies of a block into buffer `slot`: cached tokens by page, new ones in one."""

    @pl.when(s < sizes.num_seqs)
    def _():
        num_cached, num_valid = cached_and_valid(refs, sizes, s, block)
        first_entry = first_table_entry(sizes, s, block)

        def start_page(p, _):
            rows = jnp.minimum(num_cached - p * sizes.page_size, sizes.page_size)
            page = refs.page_indices[first_entry + p]
            page_copy(refs, page, 0, slot, p * sizes.page_size, rows).start()

        jax.lax.fori_loop(0, cdiv(num_cached, sizes.page_size), start_page, None)

        @pl.when(num_valid > num_cached)
        def _():
            first_new = block * sizes.block_tokens + num_cached  # its position in the sequence
            row = refs.starts[s] + first_new - (refs.kv_lens[s] - refs.q_lens[s])
            new_copy(refs, row, slot, num_cached, num_valid - num_cached).start()


def first_table_entry(sizes, s, block):
    """Where the pages of a block begin in the flat page table."""
    return s * sizes.pages_per_seq + block * (sizes.block_tokens // sizes.page_size)


def new_copy(refs, row, slot, buffer_row, rows):
    """The copy of new tokens into a buffer, on the same semaphore as the block's pages."""
    return pltpu.make_async_copy(
        refs.new_kv.at[pl.ds(row, rows)],
        refs.buffers.at[slot, pl.ds(buffer_row, rows)],
        refs.sems.at[slot],
    )


def start_store(refs, sizes, s, block, slot):
    """Start to write the new tokens of a block from the buffer to their pages."""
    num_cached, num_valid = cached_and_valid(refs, sizes, s, block)
    first_entry = first_table_entry(sizes, s, block)

    def store_page(p, _):
        # The part of the page that is new: from its first new row to its last valid one.
        begin = jnp.maximum(num_cached, p * sizes.page_size)
        end = jnp.minimum(num_valid, (p + 1) * sizes.page_size)
        page = refs.page_indices[first_entry + p]
        page_row = begin - p * sizes.page_size
        store_copy(refs, page, page_row, slot, begin, end - begin).start()

    # Nothing new in this block: the first page is put past the last, and the loop is empty.
    first_page = jnp.where(num_valid > num_cached, num_cached // sizes.page_size, num_valid)
    jax.lax.fori_loop(first_page, cdiv(num_valid, sizes.page_size), store_page, None)
    refs.stored[slot] = num_valid - num_cached


def store_copy(refs, page, page_row, slot, buffer_row, rows):
    """The copy of some rows of a buffer to some rows of a page; it is not started yet."""
    return pltpu.make_async_copy(
        refs.buffers.at[slot, pl.ds(buffer_row, rows)],
        refs.kv_cache.at[page, pl.ds(page_row, rows)],
        refs.store_sems.at[slot],
    )


def wait_store(refs, slot):
    """Wait until all that was written back from a buffer has arrived, if anything was."""
    num_tokens = refs.stored[slot]

    @pl.when(num_tokens > 0)
    def _():
        rows = refs.buffers.at[slot, pl.ds(0, num_tokens)]
        pltpu.make_async_copy(rows, rows, refs.store_sems.at[slot]).wait()
        refs.stored[slot] = 0


# --- The call -------------------------------------------------------------------------------------


def fused_attention(
    queries,
    keys,
    values,
    kv_cache,
    batch,
    *,
    sm_scale=None,
    max_q_len=MAX_Q_LEN,
    block_tokens=None,
    interpret=None,
):
    """Store the new tokens and attend, in one kernel: rung 6.

    It computes what `rpa.ragged.ref_ragged_paged_attention` computes, cache and output.

    Args:
        queries: [num_tokens, num_q_heads, head_dim], float32 or bfloat16.
        keys, values: [num_tokens, num_kv_heads, head_dim] in the dtype of the cache.
        kv_cache: [num_pages, page_size, ceil(2 * num_kv_heads / packing), packing,
            align(head_dim, 128)], float8 too; computed with in the dtype of queries.
        batch: a `rpa.ragged.RaggedBatch`; every q_len at most max_q_len.
        sm_scale: factor on the scores, a number or a traced scalar; None is `head_dim ** -0.5`.
        max_q_len: room for queries of one sequence; the kernel computes as many rows for each.
        block_tokens: tokens that are fetched and computed at a time, a multiple of page_size.
        interpret: see `rpa.tiled.flash_attention`.

    Returns:
        output [num_tokens, num_q_heads, head_dim] in the dtype of queries, and the new cache.
        Under jit, where lengths cannot be checked, queries past max_q_len come out as NaN.

    Raises:
        ValueError: if a sequence has more than max_q_len new tokens, block_tokens is no multiple
            of page_size, queries have another dtype, K and V share the lanes of the cache, or the
            arguments do not fit together, see `rpa.ragged.check_call`.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([2], [5], [[1]])
    >>> new, cache = jnp.ones((2, 1, 64)), jnp.zeros((2, 8, 2, 1, 128))
    >>> output, cache = fused_attention(new, new, new, cache, batch)
    >>> cache[1, :, 0, 0, 0]
    Array([0., 0., 0., 1., 1., 0., 0., 0.], dtype=float32)
    """
    check_call(queries, keys, values, kv_cache, batch)
    check_query_dtype(queries.dtype)
    check_q_lens(batch, max_q_len)
    check_lanes_are_not_shared(kv_cache.shape, *keys.shape[1:])
    page_size = kv_cache.shape[1]
    return _fused_attention(
        jnp.asarray(queries),
        jnp.asarray(keys),
        jnp.asarray(values),
        jnp.asarray(kv_cache),
        batch,
        jnp.asarray([queries.shape[-1] ** -0.5 if sm_scale is None else sm_scale], jnp.float32),
        max_q_len=max_q_len,
        block_tokens=choose_block_tokens(block_tokens, page_size, batch.pages_per_seq),
        interpret=interpreter.choose_interpret(interpret),
    )


@partial(jax.jit, static_argnames=["max_q_len", "block_tokens", "interpret"])
def _fused_attention(
    queries, keys, values, kv_cache, batch, sm_scale, *, max_q_len, block_tokens, interpret
):
    starts, q_lens, kv_lens = live_lengths(batch)
    sizes = Sizes(
        num_seqs=batch.max_num_seqs,
        pages_per_seq=batch.pages_per_seq,
        page_size=kv_cache.shape[1],
        block_tokens=block_tokens,
        num_kv_heads=keys.shape[1],
    )
    # Rows past the sequence's last query are somebody else's: computed, and never looked at.
    folded, unfold = fold_queries(queries, starts, max_q_len, sizes.num_kv_heads)
    out, kv_cache = _call_kernel(
        (kv_lens, q_lens, starts, batch.page_indices, find_next_live(kv_lens), sm_scale),
        folded,
        pack_kv(keys, values),
        kv_cache,
        sizes=sizes,
        group=queries.shape[1] // sizes.num_kv_heads,
        interpret=interpret,
    )
    seqs, _, owned = batch.token_positions(queries.shape[0])
    t = jnp.arange(queries.shape[0]) - starts[seqs]  # which query of its sequence a row is
    rows = unfold(out)[seqs, jnp.clip(t, 0, max_q_len - 1)]
    rows = jnp.where((t < max_q_len)[:, None, None], rows, jnp.nan)
    return jnp.where(owned[:, None, None], rows, 0).astype(queries.dtype), kv_cache


def fold_queries(queries, starts, max_q_len, num_kv_heads):
    """Gather the queries of each sequence: row t * group + g is query head g of its token t.

    Args:
        queries: [num_tokens, num_q_heads, head_dim].
        starts: i32[num_seqs], the row of each sequence's first query.
        max_q_len: rows of queries that each sequence gets.
        num_kv_heads: divides num_q_heads.

    Returns:
        [num_seqs, num_kv_heads, max_q_len * group, align(head_dim, 128)], and the function that
        makes [num_seqs, max_q_len, num_q_heads, head_dim] of it.

    >>> folded, unfold = fold_queries(jnp.ones((5, 4, 64)), jnp.array([0, 2]), 3, 2)
    >>> folded.shape, unfold(folded).shape
    ((2, 2, 6, 128), (2, 3, 4, 64))
    """
    num_seqs = starts.shape[0]
    gathered = queries[starts[:, None] + jnp.arange(max_q_len)]  # an index past the end clamps
    folded, unpad = fold_heads(gathered.reshape(-1, *queries.shape[1:]), num_kv_heads)
    _, _, group, lanes = folded.shape
    folded = folded.reshape(num_seqs, max_q_len, num_kv_heads, group, lanes)
    folded = folded.swapaxes(1, 2).reshape(num_seqs, num_kv_heads, max_q_len * group, lanes)

    def unfold(out):
        out = out.reshape(num_seqs, num_kv_heads, max_q_len, group, lanes).swapaxes(1, 2)
        return unpad(out.reshape(-1, num_kv_heads, group, lanes)).reshape(gathered.shape)

    return folded, unfold


def _call_kernel(scalars, queries, new_kv, kv_cache, *, sizes, group, interpret):
    q_spec = pl.BlockSpec((None, *queries.shape[1:]), lambda s, *_: (s, 0, 0, 0))
    hbm = pl.BlockSpec(memory_space=compat.hbm_memory_space(interpret))
    return pl.pallas_call(
        partial(_fused_kernel, sizes=sizes, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(sizes.num_seqs,),
            in_specs=[q_spec, hbm, hbm],
            out_specs=[q_spec, hbm],
            scratch_shapes=[
                pltpu.VMEM((2, sizes.block_tokens, *kv_cache.shape[2:]), kv_cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SMEM((2,), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype),
        ],
        # The last input and the last output are one array; the scalars count as inputs.
        input_output_aliases={len(scalars) + 2: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="fused_attention",
        interpret=interpret,
    )(*scalars, queries, *(compat.keep_in_hbm(array, interpret) for array in (new_kv, kv_cache)))


# --- As a rung ------------------------------------------------------------------------------------


def attention(queries, keys, values, kv_cache, batch, *, sm_scale=1.0, **options):
    """The ladder's signature: `fused_attention` has it already, but for the default scale.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1], [5], [[1]])
    >>> new, cache = jnp.ones((1, 1, 64)), jnp.zeros((2, 8, 2, 1, 128))
    >>> jax.eval_shape(attention, new, new, new, cache, batch)[0].shape
    (1, 1, 64)
    """
    return fused_attention(queries, keys, values, kv_cache, batch, sm_scale=sm_scale, **options)
