"""Rung 1: dense attention, as the formula says.

    Attention(Q, K, V) = softmax(sm_scale * Q K^T) V        (Vaswani et al. 2017, equation 1)

This file is the truth of the project, twice: `attention` in float32 JAX, which is also the first
rung of the ladder, and `oracle` in NumPy float64, which every other rung is compared with. They
are written apart from each other on purpose, so that they do not share a mistake.

Everything that the production kernel can do to a score is here too, because later rungs only
change *how* the same numbers are computed: grouped heads (GQA, MQA), a causal mask with a cached
prefix, a sliding window, a soft cap and attention sinks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def visible(q_positions, kv_positions, *, causal=True, sliding_window=None):
    """Which key each query may see, as a mask; the one place where the masking rule is written.

    A query at position i sees the key at position j if `j <= i` (causal) and `j > i - window`
    (sliding window of `sliding_window` tokens, itself included). The window also applies without
    the causal mask, to the past only.

    Args:
        q_positions: i32[q_len], the position of each query in its sequence.
        kv_positions: i32[kv_len], the position of each key.
        causal: whether a query is kept from keys after its own position.
        sliding_window: how many tokens back a query sees, or None for all.

    Returns:
        bool[q_len, kv_len]; NumPy in, NumPy out.

    A chunk of two new tokens after a cached prefix of three, with a window of three:

    >>> visible(np.array([3, 4]), np.arange(5), sliding_window=3).astype(int)
    array([[0, 1, 1, 1, 0],
           [0, 0, 1, 1, 1]])
    """
    distance = q_positions[:, None] - kv_positions[None, :]  # [q_len, kv_len]
    # Without a causal mask everything is seen: all True, in NumPy or JAX as the positions are.
    mask = distance >= 0 if causal else distance == distance
    if sliding_window is not None:
        mask = mask & (distance < sliding_window)
    return mask


def masked_softmax(scores, mask, sinks=None):
    """Softmax over the keys that a query may see, in float32; a row that sees no key is all zero.

    The largest visible score is subtracted first: exp() of a score above 88 is infinite in
    float32. Masked scores are replaced, never multiplied by zero, because stale memory can hold
    NaN and `0 * NaN` is NaN.

    Args:
        scores: f32[..., q_len, kv_len].
        mask: bool[q_len, kv_len], True where the query sees the key.
        sinks: f32[...], one number for the rows of each [q_len, kv_len] matrix, or None. A sink
            adds `exp(sink)` to the denominator: attention that goes to no key at all (gpt-oss;
            Xiao et al. 2023, arXiv 2309.17453).

    Returns:
        f32[..., q_len, kv_len].

    >>> masked_softmax(jnp.array([[1.0, 1.0, jnp.nan]]), jnp.array([[True, True, False]]))
    Array([[0.5, 0.5, 0. ]], dtype=float32)
    """
    scores = jnp.where(mask, scores, -jnp.inf)
    row_max = scores.max(axis=-1, keepdims=True)  # [..., q_len, 1]
    if sinks is not None:
        row_max = jnp.maximum(row_max, sinks[..., None, None])
    # (-inf) - (-inf) is NaN, and that is what a row without a visible key would compute.
    row_max = jnp.where(jnp.isfinite(row_max), row_max, 0.0)
    weights = jnp.exp(scores - row_max)
    row_sum = weights.sum(axis=-1, keepdims=True)  # [..., q_len, 1]
    if sinks is not None:
        row_sum = row_sum + jnp.exp(sinks[..., None, None] - row_max)
    # Not `row_sum > 0`: a NaN, of a score or a sink, has to stay visible.
    return weights / jnp.where(row_sum == 0, 1.0, row_sum)


def log_sum_exp(scores, mask, sinks=None):
    """Logarithm of the softmax's denominator, in float32; -inf in rows that see no key.

    The one number per row that an output over *some* of the keys needs, besides itself, to be
    merged with outputs over the others: see `rpa.parallel.merge`.

    Args:
        scores, mask, sinks: see `masked_softmax`; a sink counts only in rows that see a key.

    Returns:
        f32[..., q_len], natural logarithm.

    >>> log_sum_exp(jnp.zeros((2, 3)), jnp.array([[True, True, False], [False, False, False]]))
    Array([0.6931472,      -inf], dtype=float32)
    """
    total = jax.nn.logsumexp(jnp.where(mask, scores, -jnp.inf), axis=-1)  # [..., q_len]
    if sinks is None:
        return total
    return jnp.where(mask.any(axis=-1), jnp.logaddexp(total, sinks[..., None]), -jnp.inf)


def scores_of(q, k, sm_scale, soft_cap=None):
    """Scores of every query with every key, in float32, scaled and soft-capped but not masked.

    GQA is an index, not a copy: query head `h` reads KV head `h // group`, so the q heads are
    split into `[num_kv_heads, group]` and K is used as it is.

    Args:
        q: [q_len, num_q_heads, head_dim], any float dtype.
        k: [kv_len, num_kv_heads, head_dim]; num_kv_heads divides num_q_heads.
        sm_scale: the factor before the softmax, usually `head_dim ** -0.5`.
        soft_cap: if given, `soft_cap * tanh(score / soft_cap)` (Gemma 2, arXiv 2408.00118).

    Returns:
        f32[num_kv_heads, group, q_len, kv_len].

    >>> scores_of(jnp.ones((1, 2, 4)), jnp.ones((3, 1, 4)), sm_scale=0.5).shape
    (1, 2, 1, 3)
    """
    q_len, _, head_dim = q.shape
    num_kv_heads = k.shape[1]
    # [q_len, num_kv_heads, group, head_dim]
    grouped = q.astype(jnp.float32).reshape(q_len, num_kv_heads, -1, head_dim)
    # HIGHEST: a TPU otherwise rounds float32 inputs of a matmul to bfloat16.
    scores = jnp.einsum(
        "qhgd,khd->hgqk", grouped, k.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    scores = scores * sm_scale
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def weighted_values(weights, v):
    """Mix values by attention weights: the second half of the formula, in float32.

    Args:
        weights: f32[num_kv_heads, group, q_len, kv_len].
        v: [kv_len, num_kv_heads, head_dim], finite everywhere: `0 * NaN` is NaN, so a weight of
            zero does not hide what a stale row holds.

    Returns:
        f32[q_len, num_q_heads, head_dim].

    >>> weighted_values(jnp.ones((1, 2, 1, 3)), jnp.ones((3, 1, 4)))[0]
    Array([[3., 3., 3., 3.],
           [3., 3., 3., 3.]], dtype=float32)
    """
    out = jnp.einsum(  # [q_len, num_kv_heads, group, head_dim]
        "hgqk,khd->qhgd", weights, v.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return out.reshape(out.shape[0], -1, out.shape[-1])


def attend(q, k, v, mask, *, sm_scale, soft_cap=None, sinks=None):
    """Attention of one sequence under any mask: scores, softmax, values.

    Args:
        q: [q_len, num_q_heads, head_dim].
        k, v: [kv_len, num_kv_heads, head_dim].
        mask: bool[q_len, kv_len], True where the query sees the key.
        sm_scale, soft_cap: see `scores_of`.
        sinks: f32[num_q_heads] or None, see `masked_softmax`.

    Returns:
        f32[q_len, num_q_heads, head_dim].

    >>> attend(jnp.ones((1, 2, 4)), jnp.ones((3, 1, 4)), jnp.ones((3, 1, 4)),
    ...        jnp.ones((1, 3), bool), sm_scale=0.5).shape
    (1, 2, 4)
    """
    scores = scores_of(q, k, sm_scale, soft_cap)
    if sinks is not None:
        sinks = sinks.reshape(scores.shape[:2])  # [num_kv_heads, group]
    weights = masked_softmax(scores, mask, sinks)
    # A key that nobody sees may be stale memory: its weight is 0, and 0 * NaN would be NaN.
    v = jnp.where(mask.any(axis=0)[:, None, None], v, 0)
    return weighted_values(weights, v)


def attention(q, k, v, *, causal=True, sliding_window=None, soft_cap=None, sm_scale=None):
    """Attention of one sequence whose queries are its last `q_len` tokens: rung 1.

    With `q_len == kv_len` this is the prefill of a whole prompt; with `q_len == 1` it is one
    decode step; in between it is a chunk after a cached prefix. The queries are always the last
    tokens, so query t has position `kv_len - q_len + t`.

    Args:
        q: [q_len, num_q_heads, head_dim], any float dtype.
        k, v: [kv_len, num_kv_heads, head_dim]. `num_kv_heads == num_q_heads` is MHA, 1 is MQA,
            anything between that divides is GQA.
        causal, sliding_window: see `visible`.
        soft_cap: see `scores_of`.
        sm_scale: None stands for `head_dim ** -0.5`.

    Returns:
        [q_len, num_q_heads, head_dim] in the dtype of q; computed in float32.

    Raises:
        ValueError: if the shapes do not fit together.

    >>> q, kv = jnp.ones((1, 4, 8)), jnp.ones((3, 2, 8))
    >>> attention(q, kv, kv).shape
    (1, 4, 8)
    """
    check_dense_shapes(q.shape, k.shape, v.shape)
    q_len, kv_len = q.shape[0], k.shape[0]
    mask = visible(
        jnp.arange(kv_len - q_len, kv_len),
        jnp.arange(kv_len),
        causal=causal,
        sliding_window=sliding_window,
    )
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    return attend(q, k, v, mask, sm_scale=sm_scale, soft_cap=soft_cap).astype(q.dtype)


def padded_attention(q, k, v, q_lens, kv_lens, *, sm_scale=None):
    """Causal attention of a batch the simple way: every sequence padded to the longest one.

    This is what rung 3 does away with.

    Args:
        q: [num_seqs, max_q_len, num_q_heads, head_dim]; rows from q_lens on are padding.
        k, v: [num_seqs, max_kv_len, num_kv_heads, head_dim]; rows from kv_lens on are padding.
        q_lens, kv_lens: i32[num_seqs]; the queries are the last q_lens tokens of each sequence.
        sm_scale: None stands for `head_dim ** -0.5`.

    Returns:
        [num_seqs, max_q_len, num_q_heads, head_dim] in the dtype of q; padding rows are zero.

    Lengths are taken as they are: a q_len above its kv_len gives queries that see no key.

    >>> q, kv = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 5, 2, 8))
    >>> padded_attention(q, kv, kv, jnp.array([1, 1]), jnp.array([5, 2])).shape
    (2, 1, 4, 8)
    """
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    q_rows = jnp.arange(q.shape[1])
    kv_rows = jnp.arange(k.shape[1])

    def one_sequence(q, k, v, q_len, kv_len):  # q [max_q_len, ...], k and v [max_kv_len, ...]
        mask = visible(q_rows + kv_len - q_len, kv_rows)
        mask &= (q_rows < q_len)[:, None] & (kv_rows < kv_len)[None, :]
        return attend(q, k, v, mask, sm_scale=sm_scale)

    return jax.vmap(one_sequence)(q, k, v, q_lens, kv_lens).astype(q.dtype)


def check_dense_shapes(q_shape, k_shape, v_shape):
    """Raise a ValueError, in words, if q, k and v of one sequence do not fit together.

    Args:
        q_shape: (q_len, num_q_heads, head_dim).
        k_shape, v_shape: (kv_len, num_kv_heads, head_dim).

    >>> check_dense_shapes((1, 4, 8), (3, 2, 8), (3, 2, 8))
    """
    if len(q_shape) != 3 or len(k_shape) != 3:
        raise ValueError(
            f"q and k must have three dimensions [tokens, heads, head_dim], but q has shape "
            f"{q_shape} and k has shape {k_shape}. For a batch see padded_attention, or rung 3."
        )
    if k_shape != v_shape:
        raise ValueError(
            f"k and v must have the same shape, but are {k_shape} and {v_shape}: every token "
            "brings one key and one value for each KV head."
        )
    if q_shape[2] != k_shape[2]:
        raise ValueError(
            f"q has head_dim {q_shape[2]} and k has {k_shape[2]}: they must be equal, a score is "
            "the dot product of the two."
        )
    if k_shape[1] == 0 or q_shape[1] % k_shape[1]:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads, but they are {q_shape[1]} and "
            f"{k_shape[1]}: every KV head serves the same number of query heads."
        )
    if q_shape[0] > k_shape[0]:
        raise ValueError(
            f"q_len {q_shape[0]} is larger than kv_len {k_shape[0]}: kv_len counts the new tokens "
            "too, so pass the keys and values of the new tokens along with the cached ones."
        )


class Truth(NamedTuple):
    """What the float64 oracle knows: the output, and what its rounding errors are measured by.

    `output` is f64[q_len, num_q_heads, head_dim]; `scale` is f64[q_len, num_q_heads],
    `max(1, max|score|) * max|v|` over the keys that the query sees; `lse` is
    f64[q_len, num_q_heads], see `log_sum_exp`, or None where only an output is known.
    """

    output: np.ndarray
    scale: np.ndarray
    lse: np.ndarray | None = None


def oracle(
    q, k, v, *, causal=True, sliding_window=None, soft_cap=None, sm_scale=None, sinks=None
) -> Truth:
    """Attention of one sequence in NumPy float64, head by head: what everything is compared with.

    The inputs are taken as they are, so a bfloat16 input is judged by what it really holds, not by
    what it was rounded from.

    Args:
        q, k, v, causal, sliding_window, soft_cap, sm_scale: see `attention`; nothing is checked.
        sinks: f32[num_q_heads] or None, see `masked_softmax`.

    Returns:
        `Truth`; rows that see no key have an output of zero, a scale of 1 and an lse of -inf.

    >>> oracle(np.ones((1, 4, 8)), np.ones((3, 2, 8)), np.ones((3, 2, 8))).output.dtype
    dtype('float64')
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    q_len, num_q_heads, head_dim = q.shape
    kv_len, num_kv_heads, _ = k.shape
    sm_scale = head_dim**-0.5 if sm_scale is None else sm_scale
    output = np.zeros_like(q)
    scale, lse = np.ones((q_len, num_q_heads)), np.full((q_len, num_q_heads), -np.inf)
    for t in range(q_len):
        position = kv_len - q_len + t
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        last = position + 1 if causal else kv_len  # one past the last visible key
        if first >= last:
            continue
        for h in range(num_q_heads):
            kv_head = h // (num_q_heads // num_kv_heads)
            s = k[first:last, kv_head] @ q[t, h] * sm_scale  # [visible]
            if soft_cap is not None:
                s = soft_cap * np.tanh(s / soft_cap)
            seen = v[first:last, kv_head]  # [visible, head_dim]
            extra = [] if sinks is None else [float(sinks[h])]
            top = max([s.max(), *extra])
            p = np.exp(s - top)
            total = p.sum() + sum(np.exp(e - top) for e in extra)
            output[t, h], lse[t, h] = p @ seen / total, top + np.log(total)
            scale[t, h] = max(1.0, np.abs(s).max()) * np.abs(seen).max()
    return Truth(output, scale, lse)


def relative_error(output, truth: Truth) -> float:
    """The first measure of difference: `||output - truth|| / ||truth||` over the whole array.

    Args:
        output: [q_len, num_q_heads, head_dim], any float dtype.
        truth: what `oracle` returned.

    >>> relative_error(np.ones((1, 1, 2)), Truth(np.ones((1, 1, 2)), np.ones((1, 1))))
    0.0
    """
    output = np.asarray(output).astype(np.float64)
    return float(np.linalg.norm(output - truth.output) / max(np.linalg.norm(truth.output), 1e-300))


def scaled_error(output, truth: Truth) -> float:
    """The second measure: the worst (token, head), as a fraction of what rounding can do there.

    `max|output - truth| / (max(1, max|score|) * max|v|)`: an error of the score is multiplied by
    its size before it reaches the softmax. A relative error by element would mean nothing, since
    an output can be close to zero by cancellation.

    Args:
        output: [q_len, num_q_heads, head_dim], any float dtype.
        truth: what `oracle` returned.

    >>> scaled_error(np.ones((1, 1, 2)), Truth(np.ones((1, 1, 2)), np.ones((1, 1))))
    0.0
    """
    output = np.asarray(output).astype(np.float64)
    worst = np.abs(output - truth.output).max(axis=-1, initial=0.0)  # [q_len, num_q_heads]
    return float((worst / np.maximum(truth.scale, 1e-300)).max(initial=0.0))
