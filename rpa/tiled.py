"""Rung 4: flash attention. The scores never leave the chip.

Dense attention writes q_len x kv_len scores to HBM and reads them back twice. Flash attention
(Dao et al. 2022, arXiv 2205.14135) cuts queries and keys into blocks that fit VMEM and walks over
the key blocks with an *online softmax* (Milakov and Gimelshein 2018, arXiv 1805.02867): a running
maximum, a running sum and a running output per row, corrected whenever a larger score turns up.

This is the first Pallas kernel of the ladder, and it moves nothing itself. A `grid` says how often
the kernel runs, a `BlockSpec` which block of each array it wants each time, and Pallas fetches the
block of step n + 1 while step n computes: the automatic pipeline. Three things are worth seeing:

    rows       the `group` query heads that share a KV head become rows of one matrix, so GQA is a
               taller product and not a loop: block_q tokens x group heads = rows.
    skipping   key blocks past the last visible key are neither computed (`pl.when`) nor fetched:
               the index map names the block that is already there, and Pallas moves nothing.
    tails      no length has to be a multiple of a block. What lies past the end of an array is
               whatever the memory held, NaN too, so it is replaced and never multiplied by zero.

    key blocks ->    0 1 2 3        q_len 8, kv_len 13, blocks of 4 tokens, causal
    query block 0    # + + .        # all visible    + partly (the mask works)    . skipped
    query block 1    # # + +

The kernel knows nothing of pages: `attention` gathers them first, a copy that rung 5 saves.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import interpreter
from rpa.dense import check_dense_shapes
from rpa.paging import cdiv, unpack_kv
from rpa.ragged import check_call, store_new_tokens

MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)
"""The score of a masked key. Finite: (-inf) - (-inf) is NaN, and such a row is lost for good."""


class SoftmaxState(NamedTuple):
    """What the online softmax remembers of the keys seen so far, all float32 at any length.

    In bfloat16 the running sum would stop growing: at 256 it swallows every further 1.
    """

    row_max: jax.Array  # f32[rows, 1], largest score
    row_sum: jax.Array  # f32[rows, 1], sum of exp(score - row_max)
    acc: jax.Array  # f32[rows, head_dim], sum of exp(score - row_max) * value


# --- The kernel -----------------------------------------------------------------------------------


def _flash_kernel(
    lens_ref,  # SMEM i32[2]: q_len, kv_len
    scale_ref,  # SMEM f32[1]: sm_scale
    q_ref,  # VMEM [block_q * group, head_dim]
    k_ref,  # VMEM [block_kv, head_dim]
    v_ref,  # VMEM [block_kv, head_dim]
    out_ref,  # VMEM [block_q * group, head_dim]
    *state_refs,  # VMEM, a SoftmaxState of references that lives from one key block to the next
    group,
    **blocks,
):
    q_block, kv_block = pl.program_id(1), pl.program_id(2)
    q_len, kv_len = lens_ref[0], lens_ref[1]

    @pl.when(kv_block == 0)
    def _():
        write_state(state_refs, empty_state(*out_ref.shape))

    @pl.when(kv_block < end_kv_block(q_block, q_len, kv_len, **blocks))
    def _():
        scores = dot(q_ref[...], k_ref[...], contract=(1, 1)) * scale_ref[0]  # [rows, block_kv]
        row, col = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        kv_position = kv_block * blocks["block_kv"] + col
        q_position = kv_len - q_len + q_block * blocks["block_q"] + row // group
        visible = kv_position < kv_len
        if blocks["causal"]:
            visible &= kv_position <= q_position
        scores = jnp.where(visible, scores, MASK_VALUE)
        values = zero_tail(v_ref[...], kv_len - kv_block * blocks["block_kv"])
        write_state(state_refs, softmax_step(read_state(state_refs), scores, values))

    @pl.when(kv_block == pl.num_programs(2) - 1)
    def _():
        out = finish(read_state(state_refs), out_ref.dtype)
        row = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        real = q_block * blocks["block_q"] + row // group < q_len
        out_ref[...] = jnp.where(real, out, jnp.zeros_like(out))


def end_kv_block(q_block, q_len, kv_len, *, block_q, block_kv, causal):
    """One past the last key block that a query block sees: where its walk over the keys ends.

    Args:
        q_block: which block of queries, a number or a traced scalar, like the lengths.
        q_len, kv_len: tokens; the queries are the last q_len of kv_len.
        block_q, block_kv: tokens of a block.
        causal: whether the causal mask is on.

    Two blocks of queries, the last of a sequence of 13; see the picture at the top of the file:

    >>> [end_kv_block(i, 8, 13, block_q=4, block_kv=4, causal=True) for i in range(2)]
    [3, 4]
    """
    end = kv_len
    if causal:
        # The last query of the block has position kv_len - q_len + its index, and sees itself.
        end = _minimum(kv_len, kv_len - q_len + (q_block + 1) * block_q)
    return cdiv(end, block_kv)


def zero_tail(values, num_valid):
    """Replace rows from `num_valid` on by zeros, in values [keys, head_dim].

    Their weights are zero already, but stale memory may hold NaN, and `0 * NaN` is NaN.

    >>> zero_tail(jnp.array([[1.0], [jnp.nan]]), 1)
    Array([[1.],
           [0.]], dtype=float32)
    """
    row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where(row < num_valid, values, jnp.zeros_like(values))


def read_state(state_refs) -> SoftmaxState:
    """The state by value; `state_refs` are three references in the order of SoftmaxState."""
    return SoftmaxState(*(ref[...] for ref in state_refs))


def write_state(state_refs, state: SoftmaxState):
    """Keep the state in VMEM for the next grid step; `state_refs` as for `read_state`."""
    for ref, part in zip(state_refs, state, strict=True):
        ref[...] = part


def empty_state(rows, head_dim) -> SoftmaxState:
    """The state before the first key.

    >>> empty_state(2, 4).row_sum
    Array([[0.],
           [0.]], dtype=float32)
    """
    return SoftmaxState(
        row_max=jnp.full((rows, 1), MASK_VALUE, jnp.float32),
        row_sum=jnp.zeros((rows, 1), jnp.float32),
        acc=jnp.zeros((rows, head_dim), jnp.float32),
    )


def softmax_step(state: SoftmaxState, scores, values) -> SoftmaxState:
    """Take one block of keys into the online softmax.

    With m the old and m' the new maximum, `sum' = exp(m - m') * sum + rowsum(exp(scores - m'))`,
    and the output the same (Dao et al. 2022, section 3.1). Rungs 5 and 6 use this step unchanged.

    Args:
        state: of the blocks before.
        scores: f32[rows, keys], scaled; MASK_VALUE where the row does not see the key.
        values: [keys, head_dim], finite everywhere.

    Returns:
        The state with these keys taken in.

    >>> state = softmax_step(empty_state(1, 1), jnp.zeros((1, 2)), jnp.array([[1.0], [3.0]]))
    >>> state = softmax_step(state, jnp.full((1, 1), 50.0), jnp.array([[7.0]]))
    >>> float(finish(state, jnp.float32)[0, 0])  # exp(50) against two times exp(0)
    7.0
    """
    row_max = jnp.maximum(state.row_max, scores.max(axis=1, keepdims=True))  # [rows, 1]
    rescale = jnp.exp(state.row_max - row_max)
    weights = jnp.exp(scores - row_max)  # [rows, keys]
    return SoftmaxState(
        row_max=row_max,
        row_sum=state.row_sum * rescale + weights.sum(axis=1, keepdims=True),
        # The MXU wants both sides in one dtype: for bfloat16 values the weights are rounded.
        acc=state.acc * rescale + dot(weights.astype(values.dtype), values, contract=(1, 0)),
    )


def finish(state: SoftmaxState, dtype):
    """Output of a finished state, dtype[rows, head_dim]; zero in rows that have seen no key.

    >>> finish(empty_state(1, 2), jnp.float32)
    Array([[0., 0.]], dtype=float32)
    """
    return (state.acc / jnp.where(state.row_sum > 0, state.row_sum, 1.0)).astype(dtype)


def dot(a, b, contract):
    """Matrix product of two matrices over dimension `contract[0]` of a and `contract[1]` of b.

    Args:
        a, b: matrices of one dtype.
        contract: (1, 1) for a b^T, as in Q K^T; (1, 0) for a b, as in P V.

    Returns:
        f32[rows of a, the other dimension of b].

    >>> dot(jnp.ones((2, 3)), jnp.ones((4, 3)), contract=(1, 1)).shape
    (2, 4)
    """
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=jnp.float32,
        # Without it a TPU rounds float32 operands to bfloat16, of which 8 bits are left.
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    )


# --- The call -------------------------------------------------------------------------------------


def flash_attention(
    q,
    k,
    v,
    *,
    q_len=None,
    kv_len=None,
    sm_scale=None,
    causal=True,
    block_q=128,
    block_kv=512,
    interpret=None,
):
    """Attention of one sequence, block by block in VMEM: rung 4.

    It computes what `rpa.dense.attention` computes, without a q_len x kv_len array anywhere.

    Args:
        q: [max_q_len, num_q_heads, head_dim], float32 or bfloat16; the sequence's last tokens.
        k, v: [max_kv_len, num_kv_heads, head_dim] in the dtype of q.
        q_len, kv_len: how many rows of q, and of k and v, are real; numbers or traced scalars.
            None: all. Rows past them may hold anything, also NaN, and come out as zeros.
        sm_scale: factor on the scores, a number or a traced scalar; None is `head_dim ** -0.5`.
        causal: whether a query is kept from keys after its own position.
        block_q, block_kv: tokens of a block; they decide VMEM and speed, not the result.
        interpret: None compiles on a TPU and interprets elsewhere, False compiles, parameters of
            the TPU interpreter interpret (see `rpa.interpreter.params`).

    Returns:
        [max_q_len, num_q_heads, head_dim] in the dtype of q.

    Raises:
        ValueError: if shapes or dtypes do not fit together, or a block has no token.

    >>> q, kv = jnp.ones((3, 4, 128)), jnp.ones((5, 2, 128))
    >>> flash_attention(q, kv, kv, block_q=8, block_kv=8).shape
    (3, 4, 128)
    """
    check_query_dtype(q.dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q has dtype {q.dtype}, k {k.dtype} and v {v.dtype}: they must be equal, since the "
            "MXU wants both sides of a product in one dtype. Cast k and v to that of q."
        )
    check_block("block_q", block_q)
    check_block("block_kv", block_kv)
    # With lengths of their own, q may have more room than k: only the real rows are compared.
    padded = q_len is not None or kv_len is not None
    q_rows = min(q.shape[0], k.shape[0]) if padded else q.shape[0]
    check_dense_shapes((q_rows, *q.shape[1:]), k.shape, v.shape)
    if not (q.shape[0] and k.shape[0]):
        return jnp.zeros_like(q)
    lens = [q.shape[0] if q_len is None else q_len, k.shape[0] if kv_len is None else kv_len]
    return _flash_attention(
        jnp.stack([jnp.asarray(n, jnp.int32) for n in lens]),
        jnp.asarray([q.shape[-1] ** -0.5 if sm_scale is None else sm_scale], jnp.float32),
        q,
        k,
        v,
        causal=causal,
        block_q=min(block_q, q.shape[0]),
        block_kv=min(block_kv, k.shape[0]),
        interpret=interpreter.choose_interpret(interpret),
    )


def check_query_dtype(dtype):
    """Refuse queries in a dtype that rungs 4 to 6 do not compute with.

    The softmax's weights are rounded to the dtype of the queries before they meet the values: in
    float8, to 4 bits. A float8 *cache* costs nothing of the kind, it is widened when it is read.

    >>> check_query_dtype(jnp.float8_e5m2)
    Traceback (most recent call last):
        ...
    ValueError: the queries are float8_e5m2, but must be float32 or bfloat16: cast them. A float8 \
cache may stay as it is.
    """
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16"):
        raise ValueError(
            f"the queries are {name}, but must be float32 or bfloat16: cast them. A float8 cache "
            "may stay as it is."
        )


def check_block(name, tokens):
    if not isinstance(tokens, (int, np.integer)) or tokens < 1:
        raise ValueError(
            f"{name} is {tokens!r}, but must be a positive whole number of tokens, best a multiple "
            "of 8. Leave it out for a default."
        )


@partial(jax.jit, static_argnames=["causal", "block_q", "block_kv", "interpret"])
def _flash_attention(lens, sm_scale, q, k, v, *, causal, block_q, block_kv, interpret):
    max_q_len, num_q_heads, head_dim = q.shape
    max_kv_len, num_kv_heads, _ = k.shape
    group = num_q_heads // num_kv_heads
    # A DMA cuts along untiled dimensions, so the heads move to the front. Queries that share a KV
    # head are neighbours there: row t * group + g is query head g of token t.
    q = q.reshape(max_q_len, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    q = q.reshape(num_kv_heads, max_q_len * group, head_dim)
    k, v = k.transpose(1, 0, 2), v.transpose(1, 0, 2)  # [num_kv_heads, max_kv_len, head_dim]

    rows = block_q * group
    blocks = {"block_q": block_q, "block_kv": block_kv, "causal": causal}
    # None: a dimension that the kernel does not see, because it gets one KV head at a time.
    q_spec = pl.BlockSpec((None, rows, head_dim), lambda h, i, j, lens, scale: (h, i, 0))
    kv_spec = pl.BlockSpec((None, block_kv, head_dim), partial(_kv_block_index, **blocks))
    out = pl.pallas_call(
        partial(_flash_kernel, group=group, **blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,  # lens and sm_scale: in SMEM, and known to the index maps
            grid=(num_kv_heads, cdiv(max_q_len, block_q), cdiv(max_kv_len, block_kv)),
            in_specs=[q_spec, kv_spec, kv_spec],
            out_specs=q_spec,
            scratch_shapes=[
                pltpu.VMEM(part.shape, part.dtype)
                for part in jax.eval_shape(partial(empty_state, rows, head_dim))
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="flash_attention",
        compiler_params=pltpu.CompilerParams(
            # The key blocks of one query block share the scratch, so only they must be in order.
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(lens, sm_scale, q, k, v)
    out = out.reshape(num_kv_heads, max_q_len, group, head_dim).transpose(1, 0, 2, 3)
    return out.reshape(max_q_len, num_q_heads, head_dim)


def _kv_block_index(h, i, j, lens_ref, scale_ref, **blocks):
    """Which block of K and V grid step (h, i, j) wants, as (head, block of tokens, block of lanes).

    Past the end it is the one that is there already, and Pallas copies nothing.
    """
    end = end_kv_block(i, lens_ref[0], lens_ref[1], **blocks)
    return h, jnp.clip(j, 0, jnp.maximum(end - 1, 0)), 0


def block_map(q_len, kv_len, *, block_q, block_kv, causal=True):
    """The picture of the grid: what happens to each pair of blocks.

    Args:
        q_len, kv_len: tokens.
        block_q, block_kv: tokens of a block.
        causal: whether the causal mask is on.

    Returns:
        str[num_q_blocks, num_kv_blocks]: "#" all visible, "+" partly, "." skipped.

    >>> for row in block_map(8, 13, block_q=4, block_kv=4):
    ...     print(*row)
    # + + .
    # # + +
    """
    grid = np.full((cdiv(q_len, block_q), cdiv(kv_len, block_kv)), ".")
    for i, row in enumerate(grid):
        end = end_kv_block(i, q_len, kv_len, block_q=block_q, block_kv=block_kv, causal=causal)
        first_query = kv_len - q_len + i * block_q  # the position that sees least
        whole = (min(kv_len, first_query + 1) if causal else kv_len) // block_kv
        row[:end], row[:whole] = "+", "#"
    return grid


def _minimum(a, b):
    """min() for numbers, jnp.minimum for what is traced: a picture must not need a device."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def attention(
    queries, keys, values, kv_cache, batch, *, sm_scale=1.0, block_q=128, block_kv=512,
    interpret=None,
):  # fmt: skip
    """The ladder's signature around `flash_attention`: store, gather each sequence, attend.

    The kernel itself knows neither pages nor ragged batches, so every sequence is gathered to
    `pages_per_seq` pages and padded to `num_tokens` queries first. That costs the copies that the
    next rungs save; the numbers are rung 4's own.

    Args: see `rpa.ragged.ref_ragged_paged_attention`, and `flash_attention` for the blocks.

    Returns:
        output [num_tokens, num_q_heads, head_dim] and the cache with the new tokens in it.

    Raises:
        ValueError: if the arguments do not fit together, see `rpa.ragged.check_call`.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([2], [5], [[1]])
    >>> new, cache = jnp.ones((2, 1, 64)), jnp.zeros((2, 8, 2, 1, 128))
    >>> jax.eval_shape(attention, new, new, new, cache, batch)[0].shape
    (2, 1, 64)
    """
    check_call(queries, keys, values, kv_cache, batch, sm_scale=sm_scale)
    return _attention(
        queries,
        keys,
        values,
        kv_cache,
        batch,
        sm_scale,
        block_q=block_q,
        block_kv=block_kv,
        interpret=interpret,
    )


@partial(jax.jit, static_argnames=["block_q", "block_kv", "interpret"])
def _attention(queries, keys, values, kv_cache, batch, sm_scale, *, block_q, block_kv, interpret):
    num_tokens, _, head_dim = queries.shape
    kv_cache = store_new_tokens(kv_cache, keys, values, batch)
    table = jnp.asarray(batch.page_indices).reshape(batch.max_num_seqs, -1)
    kv_lens, cu_q_lens = jnp.asarray(batch.kv_lens), jnp.asarray(batch.cu_q_lens)

    def one_sequence(s):
        used = s < batch.num_seqs
        # Rows and pages that are not the sequence's own may be anything: the kernel's lengths hide
        # them, and JAX clamps an index that is out of range.
        q = queries[cu_q_lens[s] + jnp.arange(num_tokens)]
        k, v = unpack_kv(kv_cache[table[s]], keys.shape[1], head_dim)  # [pages, page_size, ...]
        return flash_attention(
            q,
            k.reshape(-1, *keys.shape[1:]).astype(q.dtype),
            v.reshape(-1, *keys.shape[1:]).astype(q.dtype),
            q_len=jnp.where(used, cu_q_lens[s + 1] - cu_q_lens[s], 0),
            kv_len=jnp.where(used, kv_lens[s], 0),
            sm_scale=sm_scale,
            block_q=block_q,
            block_kv=block_kv,
            interpret=interpret,
        )

    # [max_num_seqs, num_tokens, num_q_heads, head_dim]
    output = jax.lax.map(one_sequence, jnp.arange(batch.max_num_seqs))
    seqs, _, owned = batch.token_positions(num_tokens)
    mine = output[seqs, jnp.arange(num_tokens) - cu_q_lens[seqs]]
    return jnp.where(owned[:, None, None], mine, 0), kv_cache
