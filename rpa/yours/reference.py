"""The assembly line, solved: what an exercise takes whose forerunners are not solved.

`python -m course.build` writes this file from the solutions in `course/`: change them there. Each
section is one exercise; the last function is a whole ragged paged attention kernel.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa.compat import hbm_memory_space, keep_in_hbm
from rpa.interpreter import choose_interpret
from rpa.paging import pack_kv
from rpa.ragged import check_call

# --- 4.3: online_step ----------------------------------------------------------------------------


def online_step(row_max, row_sum, acc, scores, values):
    """Take a block of keys into the online softmax.

    row_max, row_sum: f32[rows, 1]; acc: f32[rows, head_dim]; scores: f32[rows, keys];
    values: f32[keys, head_dim]. Returns the new row_max, row_sum and acc.
    """
    new_max = jnp.maximum(row_max, scores.max(axis=1, keepdims=True))
    rescale = jnp.exp(row_max - new_max)
    weights = jnp.exp(scores - new_max)
    new_sum = row_sum * rescale + weights.sum(axis=1, keepdims=True)
    return new_max, new_sum, acc * rescale + weights @ values


# --- 4.7: flash_attention ------------------------------------------------------------------------


MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)


def new_state(rows, lanes):
    """The online softmax before the first key: row_max, row_sum [rows, 1], acc [rows, lanes]."""
    column = jnp.zeros((rows, 1), jnp.float32)
    return column + MASK_VALUE, column, jnp.zeros((rows, lanes), jnp.float32)


def output_of(state, dtype):
    """The output of a finished state, dtype[rows, lanes]; zeros in rows that have seen no key."""
    _, row_sum, acc = state
    return (acc / jnp.where(row_sum > 0, row_sum, 1.0)).astype(dtype)


def causal_mask(shape, group, q_position, kv_position, kv_len):
    """Which key each row sees, bool[rows, keys]: keys up to its own position, and below kv_len.

    Row t * group + g is query head g of token t; token 0 stands at position q_position, and key 0
    at position kv_position.
    """
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    key = kv_position + column
    return (key <= q_position + row // group) & (key < kv_len)


def attend(state, q, k, v, visible, num_keys, sm_scale):
    """Take a block of keys into the state; keys from num_keys on do not exist, and may be NaN.

    q: [rows, lanes]; k, v: [keys, lanes] in the dtype of q; visible: bool[rows, keys].
    """
    # A TPU rounds the factors of a float32 product to bfloat16, unless it is told not to.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        q_k_t = (((1,), (1,)), ((), ()))  # contract dimension 1 of both
        scores = jax.lax.dot_general(q, k, q_k_t, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, scores * sm_scale, MASK_VALUE)
        exists = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < num_keys
        return online_step(*state, scores, jnp.where(exists, v, 0))


def causal_kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, q_len, kv_len, group, sm_scale):
    """A block of queries of one KV head against one block of keys: grid step (head, i, j).

    q_ref, out_ref: VMEM [block_q * group, head_dim]; k_ref, v_ref: VMEM [block_kv, head_dim];
    state_refs: VMEM, the three parts of the state, kept from one step to the next.
    """
    i, j = pl.program_id(1), pl.program_id(2)
    block_q, block_kv = q_ref.shape[0] // group, k_ref.shape[0]
    q_position, kv_position = kv_len - q_len + i * block_q, j * block_kv

    @pl.when(j == 0)
    def _():
        for ref, part in zip(state_refs, new_state(*out_ref.shape), strict=True):
            ref[...] = part

    @pl.when(kv_position < jnp.minimum(kv_len, q_position + block_q))
    def _():
        state, num_keys = [ref[...] for ref in state_refs], kv_len - kv_position
        shape = (q_ref.shape[0], block_kv)
        visible = causal_mask(shape, group, q_position, kv_position, kv_len)
        state = attend(state, q_ref[...], k_ref[...], v_ref[...], visible, num_keys, sm_scale)
        for ref, part in zip(state_refs, state, strict=True):
            ref[...] = part

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = output_of([ref[...] for ref in state_refs], out_ref.dtype)


def flash_attention(q, k, v, *, sm_scale, block_q=128, block_kv=512):
    """Causal attention of one sequence: [q_len, num_q_heads, head_dim] in the dtype of q.

    q: [q_len, num_q_heads, head_dim], the last q_len of kv_len tokens;
    k, v: [kv_len, num_kv_heads, head_dim]. No length has to be a multiple of a block.
    """
    (q_len, num_q_heads, head_dim), (kv_len, num_kv_heads, _) = q.shape, k.shape
    group = num_q_heads // num_kv_heads
    block_q, block_kv = min(block_q, q_len), min(block_kv, kv_len)
    rows = q.reshape(q_len, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    rows = rows.reshape(num_kv_heads, q_len * group, head_dim)
    q_spec = pl.BlockSpec((None, block_q * group, head_dim), lambda h, i, j: (h, i, 0))
    kv_spec = pl.BlockSpec((None, block_kv, head_dim), lambda h, i, j: (h, j, 0))
    sizes = {"q_len": q_len, "kv_len": kv_len, "group": group, "sm_scale": sm_scale}
    out = pl.pallas_call(
        partial(causal_kernel, **sizes),
        grid=(num_kv_heads, pl.cdiv(q_len, block_q), pl.cdiv(kv_len, block_kv)),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
        scratch_shapes=[
            pltpu.VMEM((block_q * group, 1), jnp.float32),
            pltpu.VMEM((block_q * group, 1), jnp.float32),
            pltpu.VMEM((block_q * group, head_dim), jnp.float32),
        ],
        interpret=choose_interpret(None),
    )(rows, k.transpose(1, 0, 2), v.transpose(1, 0, 2))
    out = out.reshape(num_kv_heads, q_len, group, head_dim).transpose(1, 0, 2, 3)
    return out.reshape(q.shape)


# --- 5.6: paged_decode ---------------------------------------------------------------------------


def choose_block(kv_cache, pages_per_seq):
    """Tokens of a block of keys: whole pages, up to 512 tokens, 2 MiB, and the longest sequence."""
    page_size, page_bytes = kv_cache.shape[1], kv_cache[0].size * kv_cache.dtype.itemsize
    return page_size * max(1, min(pages_per_seq, 512 // page_size, 2**21 // page_bytes))


def fold_heads(queries, num_kv_heads):
    """Queries [n, num_q_heads, head_dim] as [n, num_kv_heads, group, lanes].

    lanes is head_dim, filled up with zeros to a multiple of 128: so the cache has it.
    """
    n, num_q_heads, head_dim = queries.shape
    folded = queries.reshape(n, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    return jnp.pad(folded, ((0, 0), (0, 0), (0, 0), (0, -head_dim % 128)))


def start_pages(cache_ref, page_indices_ref, entry, num_tokens, buffer_ref, sem):
    """Start the copies of the first num_tokens tokens of a block, one per page.

    Their pages stand in the table from `entry` on. cache_ref: HBM [num_pages, page_size, rows,
    packing, lanes]; page_indices_ref: SMEM i32[num_seqs * pages_per_seq]; buffer_ref: VMEM
    [block_tokens, rows, packing, lanes].
    """
    page_size = cache_ref.shape[1]

    @pl.loop(0, pl.cdiv(num_tokens, page_size))
    def _(p):
        size = jnp.minimum(num_tokens - p * page_size, page_size)
        source = cache_ref.at[page_indices_ref[entry + p], pl.ds(0, size)]
        target = buffer_ref.at[pl.ds(p * page_size, size)]
        pltpu.make_async_copy(source, target, sem).start()


def wait_tokens(num_tokens, buffer_ref, sem):
    """Wait for as many bytes as num_tokens tokens of a buffer have, in one wait."""
    tokens = buffer_ref.at[pl.ds(0, num_tokens)]
    pltpu.make_async_copy(tokens, tokens, sem).wait()


def read_head(buffer_ref, head, dtype):
    """K and V of KV head `head` of a block, dtype[block_tokens, lanes] each.

    Combined head 2 * head is K and the next one is V; `packing` of them share a row.
    """
    packing = buffer_ref.shape[2]
    combined = (2 * head, 2 * head + 1)
    return [buffer_ref[:, c // packing, c % packing].astype(dtype) for c in combined]


def attend_heads(states, q_ref, buffer_ref, visible, num_keys, sm_scale):
    """Take a block into the states of all KV heads; q_ref: VMEM [num_kv_heads, rows, lanes]."""
    new_states = []
    for head, state in enumerate(states):
        k, v = read_head(buffer_ref, head, q_ref.dtype)
        new_states.append(attend(state, q_ref[head], k, v, visible, num_keys, sm_scale))
    return new_states


def decode_kernel(
    kv_lens_ref, page_indices_ref, scale_ref, q_ref, cache_ref, out_ref, buffer_ref, sem
):
    """All blocks of keys of one sequence, one after the other: grid step (sequence).

    kv_lens_ref, page_indices_ref, scale_ref: SMEM, i32[num_seqs], i32[num_seqs * pages_per_seq],
    f32[1]; q_ref, out_ref: VMEM [num_kv_heads, group, lanes]; cache_ref: HBM, the whole cache;
    buffer_ref: VMEM [block_tokens, rows, packing, lanes]; sem: a DMA semaphore.
    """
    s, block_tokens = pl.program_id(0), buffer_ref.shape[0]
    num_kv_heads, group, lanes = q_ref.shape
    kv_len, pages_per_seq = kv_lens_ref[s], page_indices_ref.shape[0] // pl.num_programs(0)

    def one_block(b, states):
        num_keys = jnp.minimum(kv_len - b * block_tokens, block_tokens)
        entry = s * pages_per_seq + b * block_tokens // cache_ref.shape[1]
        start_pages(cache_ref, page_indices_ref, entry, num_keys, buffer_ref, sem)
        wait_tokens(num_keys, buffer_ref, sem)
        visible = jax.lax.broadcasted_iota(jnp.int32, (group, block_tokens), 1) < num_keys
        return attend_heads(states, q_ref, buffer_ref, visible, num_keys, scale_ref[0])

    states = [new_state(group, lanes)] * num_kv_heads
    states = jax.lax.fori_loop(0, pl.cdiv(kv_len, block_tokens), one_block, states)
    for head, state in enumerate(states):
        out_ref[head] = output_of(state, out_ref.dtype)


def paged_decode(
    queries, kv_cache, kv_lens, page_indices, *, num_kv_heads, sm_scale, block_tokens=None
):
    """One query of every sequence against its pages: [num_seqs, num_q_heads, head_dim].

    queries: [num_seqs, num_q_heads, head_dim]; kv_cache: [num_pages, page_size, rows, packing,
    lanes], the new tokens are in it; kv_lens: i32[num_seqs], 0 is an idle slot; page_indices:
    i32[num_seqs * pages_per_seq]; block_tokens: whole pages.
    """
    block_tokens = block_tokens or choose_block(kv_cache, len(page_indices) // len(kv_lens))
    folded, interpret = fold_heads(queries, num_kv_heads), choose_interpret(None)
    q_spec = pl.BlockSpec((None, *folded.shape[1:]), lambda s, *_: (s, 0, 0, 0))
    out = pl.pallas_call(
        decode_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(len(queries),),
            in_specs=[q_spec, pl.BlockSpec(memory_space=hbm_memory_space(interpret))],
            out_specs=q_spec,
            scratch_shapes=[
                pltpu.VMEM((block_tokens, *kv_cache.shape[2:]), kv_cache.dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(folded.shape, folded.dtype),
        interpret=interpret,
    )(kv_lens, page_indices, jnp.float32(sm_scale).reshape(1), folded, kv_cache)
    return out[..., : queries.shape[2]].reshape(queries.shape)


# --- 5.7: prefetched_decode ----------------------------------------------------------------------


def block_order(kv_lens, block_tokens):
    """The order of all blocks: two i32[n].

    `number`: how many blocks of keys all earlier sequences have, so that block b of sequence s is
    number[s] + b of all; `next_live`: the next sequence that has a token, n if there is none.
    """
    n, num_blocks = len(kv_lens), pl.cdiv(kv_lens, block_tokens)
    live = jnp.where(kv_lens > 0, jnp.arange(n), n)
    next_live = jax.lax.cummin(jnp.append(live[1:], n), reverse=True)
    return jnp.cumsum(num_blocks) - num_blocks, next_live.astype(jnp.int32)


def prefetching_kernel(
    kv_lens_ref,  # SMEM i32[num_seqs]
    number_ref,  # SMEM i32[num_seqs], see block_order
    next_live_ref,  # SMEM i32[num_seqs], see block_order
    page_indices_ref,  # SMEM i32[num_seqs * pages_per_seq]
    scale_ref,  # SMEM f32[1]
    q_ref,  # VMEM [num_kv_heads, group, lanes]
    cache_ref,  # HBM [num_pages, page_size, rows, packing, lanes]
    out_ref,  # VMEM [num_kv_heads, group, lanes]
    buffers_ref,  # VMEM [2, block_tokens, rows, packing, lanes]
    sems,  # two DMA semaphores, one a buffer
):
    """As decode_kernel; while a block is computed, the copies of the next one are on their way."""
    s, block_tokens = pl.program_id(0), buffers_ref.shape[1]
    num_kv_heads, group, lanes = q_ref.shape
    kv_len, pages_per_seq = kv_lens_ref[s], page_indices_ref.shape[0] // pl.num_programs(0)

    def start(s, b):
        @pl.when(s < pl.num_programs(0))
        def _():
            slot = (number_ref[s] + b) % 2
            num_keys = jnp.minimum(kv_lens_ref[s] - b * block_tokens, block_tokens)
            entry = s * pages_per_seq + b * block_tokens // cache_ref.shape[1]
            buffer_ref, sem = buffers_ref.at[slot], sems.at[slot]
            start_pages(cache_ref, page_indices_ref, entry, num_keys, buffer_ref, sem)

    def one_block(b, states):
        n, last = number_ref[s] + b, (b + 1) * block_tokens >= kv_len
        buffer_ref, sem = buffers_ref.at[n % 2], sems.at[n % 2]

        @pl.when(n == 0)
        def _():
            start(s, b)  # the first block of all has no iteration before it

        start(jnp.where(last, next_live_ref[s], s), jnp.where(last, 0, b + 1))
        num_keys = jnp.minimum(kv_len - b * block_tokens, block_tokens)
        wait_tokens(num_keys, buffer_ref, sem)
        visible = jax.lax.broadcasted_iota(jnp.int32, (group, block_tokens), 1) < num_keys
        return attend_heads(states, q_ref, buffer_ref, visible, num_keys, scale_ref[0])

    states = [new_state(group, lanes)] * num_kv_heads
    states = jax.lax.fori_loop(0, pl.cdiv(kv_len, block_tokens), one_block, states)
    for head, state in enumerate(states):
        out_ref[head] = output_of(state, out_ref.dtype)


def prefetched_decode(
    queries, kv_cache, kv_lens, page_indices, *, num_kv_heads, sm_scale, block_tokens=None
):
    """What paged_decode computes, with the copies of a block under the computation of another."""
    block_tokens = block_tokens or choose_block(kv_cache, len(page_indices) // len(kv_lens))
    folded, interpret = fold_heads(queries, num_kv_heads), choose_interpret(None)
    q_spec = pl.BlockSpec((None, *folded.shape[1:]), lambda s, *_: (s, 0, 0, 0))
    out = pl.pallas_call(
        prefetching_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(len(queries),),
            in_specs=[q_spec, pl.BlockSpec(memory_space=hbm_memory_space(interpret))],
            out_specs=q_spec,
            scratch_shapes=[
                pltpu.VMEM((2, block_tokens, *kv_cache.shape[2:]), kv_cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(folded.shape, folded.dtype),
        # Buffers and semaphores live on from one sequence to the next: the order matters.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
    )(
        *(kv_lens, *block_order(kv_lens, block_tokens), page_indices),
        *(jnp.float32(sm_scale).reshape(1), folded, kv_cache),
    )
    return out[..., : queries.shape[2]].reshape(queries.shape)


# --- 6.6: fused_attention ------------------------------------------------------------------------


KV_END, POSITION, FIRST_NEW, ROW, ENTRY, NUMBER, NEXT = range(7)


def live_lengths(batch, num_tokens):
    """First row, q_len and kv_len of each slot, i32[max_num_seqs]; num_tokens, 0, 0 if unused."""
    in_use = jnp.arange(batch.max_num_seqs) < batch.num_seqs
    ends, kv_lens = jnp.asarray(batch.cu_q_lens), jnp.asarray(batch.kv_lens)
    q_lens = jnp.where(in_use, ends[1:] - ends[:-1], 0)
    return jnp.where(in_use, ends[:-1], num_tokens), q_lens, jnp.where(q_lens > 0, kv_lens, 0)


def list_work(kv_end, position, first_new, row, seqs, pages_per_seq, block_tokens):
    """The work as one array, i32[7, n]: a column a block of queries, a row each of

    KV_END      one past the last key that it reads; 0 where there is nothing to do
    POSITION    of its first query in the sequence
    FIRST_NEW   position of the sequence's first new token: what lies before it is cached
    ROW         of its first query among the tokens of the batch
    ENTRY       where the pages of its sequence begin in the page table
    NUMBER      blocks of keys of all columns before it, and
    NEXT        the next column that has something to do: see block_order
    """
    order = block_order(kv_end, block_tokens)
    work = (kv_end, position, first_new, row, seqs * pages_per_seq, *order)
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in work])


def start_new(work_ref, w, begin, num_cached, num_keys, new_ref, buffer_ref, sem):
    """Start the copy of the new tokens of a block of keys, behind the cached ones; may be none.

    begin: position of the block's first key; num_cached of its num_keys keys are cached.
    new_ref: HBM [num_tokens, rows, packing, lanes].
    """

    @pl.when(num_keys > num_cached)
    def _():
        size = num_keys - num_cached
        row = work_ref[ROW, w] + begin + num_cached - work_ref[POSITION, w]
        target = buffer_ref.at[pl.ds(num_cached, size)]
        pltpu.make_async_copy(new_ref.at[pl.ds(row, size)], target, sem).start()


def start_store(buffer_ref, begin, end, cache_ref, page_indices_ref, entry, sem):
    """Start to write tokens [begin, end) of a block to their pages, a copy a page; may be none."""
    page_size = cache_ref.shape[1]

    @pl.loop(begin // page_size, jnp.where(begin < end, pl.cdiv(end, page_size), 0))
    def _(p):
        first = jnp.maximum(begin, p * page_size)
        size = jnp.minimum(end, (p + 1) * page_size) - first
        target = cache_ref.at[page_indices_ref[entry + p], pl.ds(first - p * page_size, size)]
        pltpu.make_async_copy(buffer_ref.at[pl.ds(first, size)], target, sem).start()


def fused_kernel(
    work_ref,  # SMEM i32[7, num_query_blocks], see list_work
    page_indices_ref,  # SMEM i32[num_seqs * pages_per_seq]
    scale_ref,  # SMEM f32[1]
    q_ref,  # VMEM [num_kv_heads, block_q * group, lanes]
    new_ref,  # HBM [num_tokens, rows, packing, lanes], the new K and V
    _,  # the cache as input: the same memory as cache_ref
    out_ref,  # VMEM [num_kv_heads, block_q * group, lanes]
    cache_ref,  # HBM [num_pages, page_size, rows, packing, lanes]
    buffers_ref,  # VMEM [2, block_tokens, rows, packing, lanes]
    sems,  # two DMA semaphores, one a buffer: what is copied into it
    store_sem,  # a DMA semaphore: what is written to the cache
    *,
    group,
):
    """All blocks of keys of one block of queries, whose own tokens are written to their pages."""
    w, block_tokens = pl.program_id(0), buffers_ref.shape[1]
    num_kv_heads, rows, lanes = q_ref.shape

    def extent(w, b):
        """Position of the first key of a block, how many keys it has, where its pages begin."""
        begin = b * block_tokens
        num_keys = jnp.minimum(work_ref[KV_END, w] - begin, block_tokens)
        return begin, num_keys, work_ref[ENTRY, w] + begin // cache_ref.shape[1]

    def start(w, b):
        @pl.when(w < pl.num_programs(0))
        def _():
            slot = (work_ref[NUMBER, w] + b) % 2
            buffer_ref, sem = buffers_ref.at[slot], sems.at[slot]
            begin, num_keys, entry = extent(w, b)
            num_cached = jnp.clip(work_ref[FIRST_NEW, w] - begin, 0, num_keys)
            start_pages(cache_ref, page_indices_ref, entry, num_cached, buffer_ref, sem)
            start_new(work_ref, w, begin, num_cached, num_keys, new_ref, buffer_ref, sem)

    def one_block(b, states):
        n, kv_end, position = work_ref[NUMBER, w] + b, work_ref[KV_END, w], work_ref[POSITION, w]
        begin, num_keys, entry = extent(w, b)
        buffer_ref, last = buffers_ref.at[n % 2], begin + block_tokens >= kv_end

        @pl.when(n == 0)
        def _():
            start(w, b)

        start(jnp.where(last, work_ref[NEXT, w], w), jnp.where(last, 0, b + 1))
        wait_tokens(num_keys, buffer_ref, sems.at[n % 2])
        own = jnp.clip(position - begin, 0, num_keys)  # from here on, the keys are its own tokens
        start_store(buffer_ref, own, num_keys, cache_ref, page_indices_ref, entry, store_sem)
        visible = causal_mask((rows, block_tokens), group, position, begin, kv_end)
        states = attend_heads(states, q_ref, buffer_ref, visible, num_keys, scale_ref[0])

        @pl.when(own < num_keys)
        def _():
            wait_tokens(num_keys - own, buffer_ref, store_sem)  # before it is filled again

        return states

    states = [new_state(rows, lanes)] * num_kv_heads
    num_blocks = pl.cdiv(work_ref[KV_END, w], block_tokens)
    states = jax.lax.fori_loop(0, num_blocks, one_block, states)
    for head, state in enumerate(states):
        out_ref[head] = output_of(state, out_ref.dtype)


def run_work(queries, new_kv, kv_cache, work, page_indices, sm_scale, sizes):
    """Call the kernel: output [num_tokens, num_q_heads, head_dim], and the new cache.

    new_kv: [num_tokens, rows, packing, lanes], as `pack_kv` makes it; work: see list_work;
    sizes: (num_kv_heads, block_q, block_tokens), tokens of a block of queries and of keys.
    """
    (num_tokens, num_q_heads, head_dim), n = queries.shape, work.shape[1]
    num_kv_heads, block_q, block_tokens = sizes
    group, interpret = num_q_heads // num_kv_heads, choose_interpret(None)
    # Rows past the last query of a block are another sequence's: computed, and never looked at.
    tiles = queries[work[ROW][:, None] + jnp.arange(block_q)]  # JAX clamps what is past the end
    tiles = fold_heads(tiles.reshape(-1, num_q_heads, head_dim), num_kv_heads)
    tiles = tiles.reshape(n, block_q, num_kv_heads, group, -1).swapaxes(1, 2)
    tiles = tiles.reshape(n, num_kv_heads, block_q * group, -1)
    q_spec = pl.BlockSpec((None, *tiles.shape[1:]), lambda w, *_: (w, 0, 0, 0))
    in_hbm = pl.BlockSpec(memory_space=hbm_memory_space(interpret))
    out, kv_cache = pl.pallas_call(
        partial(fused_kernel, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(n,),
            in_specs=[q_spec, in_hbm, in_hbm],
            out_specs=[q_spec, in_hbm],
            scratch_shapes=[
                pltpu.VMEM((2, block_tokens, *kv_cache.shape[2:]), kv_cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (tiles, kv_cache)],
        # The scalars count: work, pages, scale, tiles, new_kv, and number 5 is the cache.
        input_output_aliases={5: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
    )(
        *(work, page_indices, jnp.float32(sm_scale).reshape(1), tiles),
        *(keep_in_hbm(x, interpret) for x in (new_kv, kv_cache)),
    )
    out = out.reshape(n, num_kv_heads, block_q, group, -1).swapaxes(1, 2)
    out = out.reshape(n, block_q, num_q_heads, -1)[..., :head_dim]
    w = jnp.searchsorted(work[ROW], jnp.arange(num_tokens), side="right") - 1  # of each token
    t = jnp.arange(num_tokens) - work[ROW][w]
    owned = work[POSITION][w] + t < work[KV_END][w]
    return jnp.where(owned[:, None, None], out[w, t], 0), kv_cache


def fused_attention(
    queries, keys, values, kv_cache, batch, *, sm_scale, max_q_len=8, block_tokens=None
):
    """Store the new tokens and attend, in one kernel, for sequences of few new tokens.

    queries: [num_tokens, num_q_heads, head_dim]; keys, values: [num_tokens, num_kv_heads,
    head_dim]; batch: a RaggedBatch, every q_len at most max_q_len. A block of queries is a
    sequence. Returns output, zeros in rows that no sequence owns, and the new cache.
    """
    block_tokens = block_tokens or choose_block(kv_cache, batch.pages_per_seq)
    starts, q_lens, kv_lens = live_lengths(batch, len(queries))
    seqs = jnp.arange(batch.max_num_seqs)
    first_new = kv_lens - q_lens
    fields = (kv_lens, first_new, first_new, starts, seqs)
    work = list_work(*fields, batch.pages_per_seq, block_tokens)
    sizes = (keys.shape[1], max_q_len, block_tokens)
    new_kv, pages = pack_kv(keys, values), jnp.asarray(batch.page_indices)
    return run_work(queries, new_kv, kv_cache, work, pages, sm_scale, sizes)


# --- 7.3: ragged_attention -----------------------------------------------------------------------


def query_blocks(starts, q_lens, kv_lens, num_tokens, block_q):
    """Cut the new tokens of each sequence into blocks of block_q: five i32[num_blocks].

    starts, q_lens, kv_lens: i32[num_seqs], see live_lengths. Returns kv_end, position, first_new,
    row and seqs, as list_work takes them. There is room for as many blocks as num_tokens tokens
    of num_seqs sequences can have; those that do not exist have kv_end 0 and row num_tokens.
    """
    num_seqs, num_blocks = len(q_lens), pl.cdiv(q_lens, block_q)
    ends = jnp.cumsum(num_blocks)  # of each sequence's blocks
    w = jnp.arange(pl.cdiv(num_tokens, block_q) + num_seqs)
    exists = w < ends[-1]
    seqs = jnp.minimum(jnp.searchsorted(ends, w, side="right"), num_seqs - 1)
    offset = (w - (ends - num_blocks)[seqs]) * block_q
    first_new = (kv_lens - q_lens)[seqs]
    # The last query of the block sees itself, and nothing after it.
    kv_end = jnp.where(exists, jnp.minimum(kv_lens[seqs], first_new + offset + block_q), 0)
    row = jnp.where(exists, starts[seqs] + offset, num_tokens)
    return kv_end, first_new + offset, first_new, row, seqs


@partial(jax.jit, static_argnames=["block_q", "block_tokens", "interpret"])
def run_batch(
    queries, keys, values, kv_cache, batch, sm_scale, *, block_q, block_tokens, interpret
):
    """Any ragged batch in one call of the kernel; `interpret` only makes jit trace again."""
    blocks = query_blocks(*live_lengths(batch, len(queries)), len(queries), block_q)
    work = list_work(*blocks, batch.pages_per_seq, block_tokens)
    sizes = (keys.shape[1], block_q, block_tokens)
    new_kv, pages = pack_kv(keys, values), jnp.asarray(batch.page_indices)
    return run_work(queries, new_kv, kv_cache, work, pages, sm_scale, sizes)


def ragged_attention(queries, keys, values, kv_cache, batch, *, sm_scale, block_tokens=None):
    """Ragged paged attention of any batch, under the ladder's signature: rung 7, and yours.

    queries: [num_tokens, num_q_heads, head_dim]; keys, values: [num_tokens, num_kv_heads,
    head_dim] in the dtype of the cache; batch: a RaggedBatch. Returns output [num_tokens,
    num_q_heads, head_dim], zeros in rows that no sequence owns, and the new cache.
    """
    check_call(queries, keys, values, kv_cache, batch, sm_scale=sm_scale)
    block_tokens = block_tokens or choose_block(kv_cache, batch.pages_per_seq)
    group = queries.shape[1] // keys.shape[1]
    # As many tokens as a sequence has, so that decodes are not filled up; 128 rows at most.
    block_q = max(1, min(len(queries) // batch.max_num_seqs, 128 // group))
    sizes = {"block_q": block_q, "block_tokens": block_tokens}
    interpret = choose_interpret(None)
    return run_batch(queries, keys, values, kv_cache, batch, sm_scale, **sizes, interpret=interpret)
