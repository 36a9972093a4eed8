"""Rung 5: decode through the page table. The kernel moves the pages itself.

A decode step has one query per sequence and must read all of its K and V: all that is left to do is
to keep the HBM busy. Rung 4 gathers the pages into a new array first and so moves every byte three
times. Here the kernel starts the copies itself (`pltpu.make_async_copy`), page by page, straight
out of the cache into one of two buffers, while it computes on the other:

    buffer 0   [copy seq 0 block 0][compute         ][copy seq 1 block 0][compute ...
    buffer 1                       [copy 0 block 1  ][compute            ][copy 1 block 1 ...

`rpa.lab.copies.timeline.record_dmas` records this picture of a run. What to look for in the code:

    dynamic sizes    the last page of a sequence is copied only as far as it is filled;
    one wait         the copies of a block all signal one semaphore, which counts bytes, so a
                     single wait for the size of the block waits for all of them;
    the boundary     while the last block of a sequence computes, the first block of the *next live*
                     sequence is on its way: short sequences would otherwise never overlap;
    idle sequences   kv_len 0 is legal anywhere: nothing is started for it, nothing waited for.

The page table and the lengths are *scalar prefetch* arguments: they lie in SMEM before the kernel
starts, because a copy's address must be known to the scalar core that issues it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import compat, interpreter
from rpa.paging import LANES, cdiv, get_kv_cache_shape, lanes_are_shared, paged_attention
from rpa.ragged import check_call, store_new_tokens
from rpa.tiled import (
    MASK_VALUE,
    check_query_dtype,
    dot,
    empty_state,
    finish,
    softmax_step,
    zero_tail,
)

BLOCK_TOKENS = 512
"""Tokens of a block if the caller does not say: 2 MiB of K and V at 8 heads of 128 in bfloat16."""


class Refs(NamedTuple):
    """What the kernel's functions pass on to each other; `kv_lens` to `next_live` are in SMEM.

    `rows` and `lanes` are the third and the last dimension of the cache, see `rpa.paging`.
    """

    kv_lens: object  # i32[num_seqs]
    page_indices: object  # i32[num_seqs * pages_per_seq]
    next_live: object  # i32[num_seqs + 1], the first sequence from s on that is not idle
    kv_cache: object  # HBM [num_pages, page_size, rows, packing, lanes]
    buffers: object  # VMEM [2, block_tokens, rows, packing, lanes]
    sems: object  # DMA semaphores [2], one per buffer
    slot: object  # SMEM i32[1], the buffer that is computed on


class Sizes(NamedTuple):
    """Numbers that are known when the kernel is traced."""

    num_seqs: int
    pages_per_seq: int
    page_size: int  # tokens
    block_tokens: int
    num_kv_heads: int


class KeyBlock(NamedTuple):
    """A block of keys and values in one of the buffers, and who may see it."""

    buffers_ref: object  # VMEM [2, block_tokens, rows, packing, lanes]
    slot: object  # which buffer
    num_valid: object  # tokens of the block that exist; the rest of the buffer is stale
    visible: object  # bool[q rows, block_tokens], True where the row of q sees the key


# --- The kernel -----------------------------------------------------------------------------------


def _decode_kernel(  # refs without a comment are those of `Refs`
    kv_lens_ref,
    page_indices_ref,
    next_live_ref,
    scale_ref,  # SMEM f32[1]: sm_scale
    q_ref,  # VMEM [num_kv_heads, group, lanes], by the automatic pipeline
    kv_cache_ref,
    out_ref,  # VMEM [num_kv_heads, group, lanes]
    buffers_ref,
    sems,
    slot_ref,
    *,
    sizes,
):
    refs = Refs(
        kv_lens_ref, page_indices_ref, next_live_ref, kv_cache_ref, buffers_ref, sems, slot_ref
    )
    s = pl.program_id(0)

    @pl.when(s == 0)
    def _():
        slot_ref[0] = 0
        start_block(refs, sizes, next_live_ref[0], 0, 0)

    def one_block(b, states):
        slot = slot_ref[0]
        # Start first, wait second: this block's copies are on their way since the last step, and
        # the HBM must never wait for the computation to end.
        start_block(refs, sizes, *successor(refs, sizes, s, b), 1 - slot)
        wait_block(refs, sizes, s, b, slot)
        num_valid = valid_tokens(kv_lens_ref[s], b, sizes.block_tokens)
        slot_ref[0] = 1 - slot
        col = jax.lax.broadcasted_iota(jnp.int32, (q_ref.shape[1], sizes.block_tokens), 1)
        keys = KeyBlock(buffers_ref, slot, num_valid, visible=col < num_valid)
        return attend_block(states, q_ref, keys, scale_ref[0])

    states = [empty_state(*q_ref.shape[1:])] * sizes.num_kv_heads
    num_blocks = cdiv(kv_lens_ref[s], sizes.block_tokens)  # 0 for an idle sequence
    states = jax.lax.fori_loop(0, num_blocks, one_block, states)
    for h, state in enumerate(states):
        out_ref[h] = finish(state, out_ref.dtype)


def valid_tokens(kv_len, block, block_tokens):
    """Tokens of a block that exist: all, but for the last one.

    >>> [int(valid_tokens(21, block, 8)) for block in range(3)]
    [8, 8, 5]
    """
    return jnp.minimum(kv_len - block * block_tokens, block_tokens)


def successor(refs, sizes, s, block):
    """The block after (s, block): the next of this sequence, or the first of the next live one.

    Of `refs` it reads only kv_lens and next_live, and arrays will do.

    >>> lens = jnp.array([9, 0, 3])
    >>> refs = Refs(lens, None, find_next_live(lens), *[None] * 4)
    >>> sizes = Sizes(3, 2, 4, block_tokens=8, num_kv_heads=1)
    >>> [tuple(int(x) for x in successor(refs, sizes, *at)) for at in [(0, 0), (0, 1), (2, 0)]]
    [(0, 1), (2, 0), (3, 0)]
    """
    last = (block + 1) * sizes.block_tokens >= refs.kv_lens[s]
    return jnp.where(last, refs.next_live[s + 1], s), jnp.where(last, 0, block + 1)


# --- Its copies -----------------------------------------------------------------------------------


def start_block(refs, sizes, s, block, slot):
    """Start the copies of all pages of a block into buffer `slot`; none if s is past the last."""

    @pl.when(s < sizes.num_seqs)
    def _():
        num_tokens = valid_tokens(refs.kv_lens[s], block, sizes.block_tokens)
        first_entry = s * sizes.pages_per_seq + block * (sizes.block_tokens // sizes.page_size)

        def start_page(p, _):
            page = refs.page_indices[first_entry + p]
            # The tail of the last page belongs to nobody: not a byte of it is moved.
            rows = jnp.minimum(num_tokens - p * sizes.page_size, sizes.page_size)
            page_copy(refs, page, 0, slot, p * sizes.page_size, rows).start()

        jax.lax.fori_loop(0, cdiv(num_tokens, sizes.page_size), start_page, None)


def wait_block(refs, sizes, s, block, slot):
    """Wait for all pages of a block at once: one wait for as many bytes as they have together."""
    num_tokens = valid_tokens(refs.kv_lens[s], block, sizes.block_tokens)
    rows = refs.buffers.at[slot, pl.ds(0, num_tokens)]
    # A wait moves nothing. Its descriptor only says how many bytes to wait for, and on what.
    pltpu.make_async_copy(rows, rows, refs.sems.at[slot]).wait()


def page_copy(refs, page, page_row, slot, buffer_row, rows):
    """The copy of some rows of a page to some rows of a buffer; it is not started yet."""
    return pltpu.make_async_copy(
        refs.kv_cache.at[page, pl.ds(page_row, rows)],
        refs.buffers.at[slot, pl.ds(buffer_row, rows)],
        refs.sems.at[slot],
    )


# --- Its computation ------------------------------------------------------------------------------


def attend_block(states, q_ref, keys: KeyBlock, sm_scale):
    """Take a block of keys and values into the online softmax of every KV head.

    Args:
        states: a list of SoftmaxState, one a KV head, of [q rows, lanes].
        q_ref: VMEM [num_kv_heads, q rows, lanes].
        keys: the block.
        sm_scale: factor on the scores, f32[].

    Returns:
        The states with the block taken in.
    """
    new_states = []
    for h, state in enumerate(states):
        k, v = (x.astype(q_ref.dtype) for x in read_kv_head(keys.buffers_ref, keys.slot, h))
        scores = dot(q_ref[h], k, contract=(1, 1)) * sm_scale  # [q rows, block_tokens]
        scores = jnp.where(keys.visible, scores, MASK_VALUE)
        new_states.append(softmax_step(state, scores, zero_tail(v, keys.num_valid)))
    return new_states


def read_kv_head(buffers_ref, slot, h):
    """K and V of one head out of a buffer: two arrays [block_tokens, lanes], by value.

    Combined head 2h is K and 2h + 1 is V; `packing` of them share a 32-bit word, so reading one
    makes the compiler shift and mask every word. Rung 8 reads both at once instead.
    """
    packing = buffers_ref.shape[3]
    (k_row, k_part), (v_row, v_part) = divmod(2 * h, packing), divmod(2 * h + 1, packing)
    return buffers_ref[slot, :, k_row, k_part], buffers_ref[slot, :, v_row, v_part]


# --- The call -------------------------------------------------------------------------------------


def paged_decode(
    queries,
    kv_cache,
    kv_lens,
    page_indices,
    *,
    num_kv_heads,
    sm_scale=None,
    block_tokens=None,
    interpret=None,
):
    """One decode step of every sequence, K and V streamed from their pages: rung 5.

    Args:
        queries: [num_seqs, num_q_heads, head_dim], one query per sequence, float32 or bfloat16.
        kv_cache: [num_pages, page_size, ceil(2 * num_kv_heads / packing), packing,
            align(head_dim, 128)], float8 too; the new token is in it already. It is computed with
            in the dtype of queries.
        kv_lens: i32[num_seqs], tokens of each sequence; 0 is an idle slot.
        page_indices: i32[num_seqs * pages_per_seq]; only live entries are looked at.
        num_kv_heads: the true number of KV heads; it divides num_q_heads.
        sm_scale: factor on the scores, a number or a traced scalar; None is `head_dim ** -0.5`.
        block_tokens: tokens that are fetched and computed at a time, a multiple of page_size.
        interpret: see `rpa.tiled.flash_attention`.

    Returns:
        [num_seqs, num_q_heads, head_dim] in the dtype of queries; zeros for idle slots.

    Raises:
        ValueError: if block_tokens is no multiple of page_size, if shapes or dtypes do not fit
            together, or if K and V share the lanes of the cache. Page numbers and lengths are not
            read: one that is out of range reads what is not there.

    >>> paged_decode(jnp.ones((2, 4, 64)), jnp.ones((3, 8, 4, 1, 128)), jnp.array([9, 0]),
    ...              jnp.array([2, 0, 7, 7]), num_kv_heads=2)[:, 0, 0]
    Array([1., 0.], dtype=float32)
    """
    check_query_dtype(queries.dtype)
    num_seqs, _, head_dim = queries.shape
    _check_shapes(queries, kv_cache, kv_lens, page_indices, num_kv_heads)
    page_size = kv_cache.shape[1]
    sizes = Sizes(
        num_seqs=num_seqs,
        pages_per_seq=page_indices.shape[0] // num_seqs,
        page_size=page_size,
        block_tokens=choose_block_tokens(
            block_tokens, page_size, page_indices.shape[0] // num_seqs
        ),
        num_kv_heads=num_kv_heads,
    )
    return _paged_decode(
        jnp.asarray(queries),
        jnp.asarray(kv_cache),
        jnp.asarray(kv_lens, jnp.int32),
        jnp.asarray(page_indices, jnp.int32),
        jnp.asarray([head_dim**-0.5 if sm_scale is None else sm_scale], jnp.float32),
        sizes=sizes,
        interpret=interpreter.choose_interpret(interpret),
    )


def _check_shapes(queries, kv_cache, kv_lens, page_indices, num_kv_heads):
    num_seqs, num_q_heads, head_dim = queries.shape
    if np.shape(kv_lens) != (num_seqs,) or num_seqs == 0:
        raise ValueError(
            f"kv_lens has shape {np.shape(kv_lens)}, but queries has {num_seqs} rows: pass one "
            "query and one length for each sequence, at least one."
        )
    if page_indices.ndim != 1 or page_indices.shape[0] % num_seqs:
        raise ValueError(
            f"page_indices has shape {page_indices.shape}, but must be one row of pages_per_seq "
            f"entries for each of the {num_seqs} sequences: flatten the page table."
        )
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"queries has {num_q_heads} heads, but must have a multiple of num_kv_heads="
            f"{num_kv_heads}: every KV head serves the same number of query heads."
        )
    check_lanes_are_not_shared(kv_cache.shape, num_kv_heads, head_dim)
    expected = get_kv_cache_shape(*kv_cache.shape[:2], num_kv_heads, head_dim, kv_cache.dtype)
    if kv_cache.shape != expected:
        raise ValueError(
            f"kv_cache has shape {kv_cache.shape}, but for {num_kv_heads} KV heads of {head_dim} "
            f"in {kv_cache.dtype} must have {expected}: make it with rpa.get_kv_cache_shape."
        )


def choose_block_tokens(block_tokens, page_size, pages_per_seq) -> int:
    """Tokens of a block: what was asked for, or whole pages up to BLOCK_TOKENS and the longest row.

    >>> choose_block_tokens(None, 16, 4), choose_block_tokens(None, 16, 999)
    (64, 512)
    >>> choose_block_tokens(24, 16, 4)
    Traceback (most recent call last):
        ...
    ValueError: block_tokens is 24, but must be a positive multiple of page_size 16: a block is \
fetched page by page. Leave it out for a default.
    """
    if block_tokens is None:
        return page_size * max(1, min(pages_per_seq, BLOCK_TOKENS // page_size))
    if block_tokens <= 0 or block_tokens % page_size:
        raise ValueError(
            f"block_tokens is {block_tokens}, but must be a positive multiple of page_size "
            f"{page_size}: a block is fetched page by page. Leave it out for a default."
        )
    return block_tokens


def check_lanes_are_not_shared(kv_cache_shape, num_kv_heads, head_dim):
    """Refuse a cache in which K and V share their lanes: what would be read as V is another K.

    >>> check_lanes_are_not_shared((4, 8, 4, 1, 128), 2, 64)
    """
    if lanes_are_shared(kv_cache_shape, num_kv_heads, head_dim):
        raise ValueError(
            f"kv_cache has shape {kv_cache_shape}, the one with share_lanes=True: rungs 5 and 6 "
            "know only the one without. Make it without, or take another rung."
        )


@partial(jax.jit, static_argnames=["sizes", "interpret"])
def _paged_decode(queries, kv_cache, kv_lens, page_indices, sm_scale, *, sizes, interpret):
    queries, unpad = fold_heads(queries, sizes.num_kv_heads)
    scalars = (kv_lens, page_indices, find_next_live(kv_lens), sm_scale)
    q_spec = pl.BlockSpec((None, *queries.shape[1:]), lambda s, *_: (s, 0, 0, 0))
    out = pl.pallas_call(
        partial(_decode_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(sizes.num_seqs,),
            in_specs=[q_spec, pl.BlockSpec(memory_space=compat.hbm_memory_space(interpret))],
            out_specs=q_spec,
            scratch_shapes=[
                pltpu.VMEM((2, sizes.block_tokens, *kv_cache.shape[2:]), kv_cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        # Buffers and semaphores live on from one sequence to the next, so the order matters.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="paged_decode",
        interpret=interpret,
    )(*scalars, queries, compat.keep_in_hbm(kv_cache, interpret))
    return unpad(out)


def fold_heads(queries, num_kv_heads):
    """Group the query heads by KV head and pad head_dim to whole lanes, as the cache is padded.

    Args:
        queries: [n, num_q_heads, head_dim].
        num_kv_heads: divides num_q_heads.

    Returns:
        [n, num_kv_heads, group, align(head_dim, 128)], and the function that undoes it.

    >>> folded, unpad = fold_heads(jnp.ones((3, 4, 64)), 2)
    >>> folded.shape, unpad(folded).shape
    ((3, 2, 2, 128), (3, 4, 64))
    """
    n, num_q_heads, head_dim = queries.shape
    folded = queries.reshape(n, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    # Zeros: the lanes past head_dim are multiplied with those of the cache, which are zero too.
    pad = cdiv(head_dim, LANES) * LANES - head_dim
    folded = jnp.pad(folded, ((0, 0), (0, 0), (0, 0), (0, pad)))
    return folded, lambda out: out[..., :head_dim].reshape(queries.shape)


def find_next_live(kv_lens):
    """For every s, the first sequence from s on with a token to read; num_seqs if there is none.

    Args:
        kv_lens: i32[num_seqs].

    Returns:
        i32[num_seqs + 1].

    >>> find_next_live(jnp.array([0, 5, 0, 7, 0]))
    Array([1, 1, 3, 3, 5, 5], dtype=int32)
    """
    num_seqs = kv_lens.shape[0]
    here = jnp.where(kv_lens > 0, jnp.arange(num_seqs, dtype=jnp.int32), num_seqs)
    here = jnp.append(here, jnp.int32(num_seqs))
    return jax.lax.cummin(here, reverse=True)


def reference(queries, kv_cache, kv_lens, page_indices, *, num_kv_heads, sm_scale=None):
    """What `paged_decode` must compute, one sequence after the other, in plain JAX (rung 2).

    Args: see `paged_decode`.

    Returns:
        [num_seqs, num_q_heads, head_dim] in the dtype of queries; zeros for idle slots.

    >>> reference(jnp.ones((2, 4, 64)), jnp.ones((3, 8, 4, 1, 128)), jnp.array([9, 0]),
    ...           jnp.array([2, 0, 7, 7]), num_kv_heads=2)[:, 0, 0]
    Array([1., 0.], dtype=float32)
    """
    table = jnp.asarray(page_indices).reshape(len(queries), -1)
    attend = partial(paged_attention, num_kv_heads=num_kv_heads, sm_scale=sm_scale)

    def one_sequence(sequence):
        query, kv_len, pages = sequence
        return attend(query[None], kv_cache, pages, kv_len, kv_len - 1)[0]

    rows = jax.lax.map(one_sequence, (queries, jnp.asarray(kv_lens), table))
    return rows.astype(queries.dtype)


# --- As a rung ------------------------------------------------------------------------------------


def attention(
    queries,
    keys,
    values,
    kv_cache,
    batch,
    *,
    sm_scale=1.0,
    block_tokens=None,
    interpret=None,
):
    """The ladder's signature around `paged_decode`: store the new tokens, then decode.

    It only decodes: a batch in which a sequence has more than one new token is refused, or, under
    jit where lengths are not known, comes out as NaN in the rows of that sequence.

    Args: see `rpa.ragged.ref_ragged_paged_attention`, and `paged_decode` for the blocks.

    Returns:
        output [num_tokens, num_q_heads, head_dim] and the cache with the new tokens in it.

    Raises:
        ValueError: if a sequence has more than one new token, or the arguments do not fit
            together, see `rpa.ragged.check_call`.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1, 2], [5, 2], [[1], [0]])
    >>> new, cache = jnp.ones((3, 1, 64)), jnp.zeros((2, 8, 2, 1, 128))
    >>> attention(new, new, new, cache, batch)
    Traceback (most recent call last):
        ...
    ValueError: sequence 1 has q_len 2, but this rung takes at most 1 new token per sequence: \
leave it to another rung.
    """
    check_call(queries, keys, values, kv_cache, batch, sm_scale=sm_scale)
    check_q_lens(batch, 1)
    return _attention(
        queries,
        keys,
        values,
        kv_cache,
        batch,
        sm_scale,
        block_tokens=block_tokens,
        interpret=interpreter.choose_interpret(interpret),
    )


@partial(jax.jit, static_argnames=["block_tokens", "interpret"])
def _attention(queries, keys, values, kv_cache, batch, sm_scale, *, block_tokens, interpret):
    kv_cache = store_new_tokens(kv_cache, keys, values, batch)
    starts, q_lens, kv_lens = live_lengths(batch)
    decoded = paged_decode(
        queries[starts],
        kv_cache,
        kv_lens,
        batch.page_indices,
        num_kv_heads=keys.shape[1],
        sm_scale=sm_scale,
        block_tokens=block_tokens,
        interpret=interpret,
    )
    seqs, _, owned = batch.token_positions(queries.shape[0])
    rows = jnp.where((q_lens[seqs] == 1)[:, None, None], decoded[seqs], jnp.nan)
    return jnp.where(owned[:, None, None], rows, 0).astype(queries.dtype), kv_cache


def live_lengths(batch):
    """First row, q_len and kv_len of every slot: i32[max_num_seqs] each, 0 where nothing is asked.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1, 0], [5, 7], [[1], [0]], max_num_seqs=3)
    >>> [x.tolist() for x in live_lengths(batch)]
    [[0, 0, 0], [1, 0, 0], [5, 0, 0]]
    """
    cu_q_lens, kv_lens = jnp.asarray(batch.cu_q_lens), jnp.asarray(batch.kv_lens)
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    # Slots from num_seqs on hold anything, and a sequence without a query has nothing to read.
    live = (jnp.arange(batch.max_num_seqs) < batch.num_seqs) & (q_lens > 0)
    return tuple(jnp.where(live, x, 0) for x in (cu_q_lens[:-1], q_lens, kv_lens))


def check_q_lens(batch, max_q_len):
    """Refuse a batch with a sequence of more than max_q_len new tokens, if its lengths are known.

    >>> from rpa.ragged import RaggedBatch
    >>> check_q_lens(RaggedBatch.from_lengths([2], [5], [[1]])[0], 2)
    """
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(batch)):
        return  # the caller's rows come out as NaN instead, see `attention`
    # NumPy, not jnp: inside somebody's jit a batch may be constants, and jnp would trace them.
    q_lens = np.diff(np.asarray(batch.cu_q_lens)[: int(np.asarray(batch.num_seqs)) + 1])
    for s in np.flatnonzero(q_lens > max_q_len)[:1]:
        raise ValueError(
            f"sequence {s} has q_len {q_lens[s]}, but this rung takes at most {max_q_len} new "
            f"token{'s' * (max_q_len != 1)} per sequence: leave it to another rung."
        )
