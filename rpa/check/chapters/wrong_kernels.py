"""Five wrong kernels for chapter 11: each has one bug that a production kernel had, in plain NumPy.

Every one of them gives right answers to an ordinary test. What an ordinary test does not vary is
what the exercises are about. Lesson, exercises and checks use the same functions, so that what is
shown is what is judged. Heads and pages are left out wherever the bug does not need them.
"""

import jax.numpy as jnp
import numpy as np

from rpa.paging import cdiv


def forgetful(queries, new_kv, kv_cache, *, window, bq, bkv):
    """Attention under a sliding window that writes new tokens back with the last query block.

    While blocks of keys pass by, the last query block of the sequence writes the new tokens among
    them to the cache: earlier would be a waste, since every query block sees the same ones.

    Args:
        queries: f32[q_len, head_dim], of the last q_len tokens.
        new_kv: f32[q_len, 2, head_dim], K and V of the same tokens.
        kv_cache: f32[kv_len, 2, head_dim], of one sequence, in the order of its tokens.
        window: keys that a query sees, itself included.
        bq, bkv: queries and keys of a block.

    Returns:
        f32[q_len, head_dim], and the cache.

    >>> kv = np.ones((4, 2, 8), np.float32)
    >>> output, cache = forgetful(kv[:, 0], kv, 0 * kv, window=2, bq=2, bkv=2)
    >>> output[:, 0], cache[:, 0, 0]
    (array([1., 1., 1., 1.], dtype=float32), array([1., 1., 1., 1.], dtype=float32))
    """
    q_len, kv_len = len(queries), len(kv_cache)
    first_new = kv_len - q_len
    merged = np.concatenate([kv_cache[:first_new], new_kv])
    output, cache = np.zeros_like(queries), kv_cache.copy()
    for start in range(0, q_len, bq):
        positions = np.arange(first_new + start, min(first_new + start + bq, kv_len))
        first_block = max(positions[0] - window + 1, 0) // bkv
        end_block = cdiv(positions[-1] + 1, bkv)
        if positions[-1] + 1 == kv_len:  # the last query block: write back what passes by
            written = slice(max(first_block * bkv, first_new), kv_len)
            cache[written] = merged[written]
        keys = np.arange(first_block * bkv, min(end_block * bkv, kv_len))
        distance = positions[:, None] - keys
        seen = (distance >= 0) & (distance < window)
        output[start : start + bq] = _attend(queries[start : start + bq], merged[keys], seen)
    return output, cache


def trusting(queries, kv_cache, kv_lens, page_table):
    """A decode step that gives hidden keys a weight of zero, and trusts that this hides them.

    Args:
        queries: f32[num_seqs, head_dim], one of each sequence.
        kv_cache: f32[num_pages, page_size, 2, head_dim], new tokens included.
        kv_lens: i32[num_seqs].
        page_table: i32[num_seqs, pages_per_seq].

    Returns:
        f32[num_seqs, head_dim].

    >>> cache = np.ones((2, 4, 2, 8), np.float32)
    >>> trusting(cache[0, :1, 0], cache, np.array([3]), np.array([[1]]))[0, :2]
    array([1., 1.], dtype=float32)
    """
    num_pages = len(kv_cache)
    output = np.zeros_like(queries)
    for s, kv_len in enumerate(kv_lens):
        pages = np.clip(page_table[s], 0, num_pages - 1)  # what JAX does to an index
        kv = kv_cache[pages].reshape(-1, *kv_cache.shape[2:])
        seen = np.arange(len(kv)) < kv_len
        output[s] = _attend(queries[s : s + 1], kv, seen[None, :])[0]
    return output


def narrow(q_position, kv_len, window=None):
    """Which keys a query sees, compared in 16 bits: twice as many numbers fit in a register.

    Args:
        q_position: position of the query in its sequence.
        kv_len: tokens of the sequence.
        window: keys that the query sees, itself included; None for all.

    Returns:
        bool[kv_len].

    >>> narrow(4, 6, window=2).astype(int)
    array([0, 0, 0, 1, 1, 0])
    """
    q = np.array(q_position).astype(np.int16)
    k = np.arange(kv_len).astype(np.int16)
    seen = k <= q
    if window is not None:
        seen &= k + np.int16(window) > q
    return seen


def rounded(scores, values, block_tokens, state_dtype=jnp.bfloat16):
    """`softmax(scores) @ values` block after block, its state held in `state_dtype`.

    Scores, weights and products are float32; only what is carried from one block to the next, the
    running maximum, the sum and the accumulator, is rounded. With float32 this is right.

    Args:
        scores: f32[kv_len].
        values: f32[kv_len, lanes].
        block_tokens: keys of a block.
        state_dtype: of the state.

    Returns:
        f32[lanes].

    >>> rounded(np.zeros(4, np.float32), np.float32([[1], [2], [3], [4]]), 2)
    array([2.5], dtype=float32)
    """

    def keep(state):
        return np.asarray(state, np.float32).astype(state_dtype).astype(np.float32)

    row_max, row_sum = np.float32(-np.inf), np.float32(0)
    acc = np.zeros(values.shape[1], np.float32)
    for start in range(0, len(scores), block_tokens):
        s, v = scores[start : start + block_tokens], values[start : start + block_tokens]
        before, row_max = row_max, keep(max(row_max, s.max()))
        p, decay = np.exp(s - row_max), np.exp(before - row_max)
        row_sum = keep(decay * row_sum + p.sum())
        acc = keep(decay * acc + p @ v)
    return acc / row_sum


def lopsided(x, num_kv_heads, group_rows):
    """One number for each query head, in the rows that a kernel has for them.

    A KV head serves `group` query heads, and the kernel gives each group `group_rows` rows, because
    registers come in powers of two. Rows without a head are zero.

    Args:
        x: f32[num_q_heads].
        num_kv_heads: groups.
        group_rows: rows of a group, at least num_q_heads / num_kv_heads.

    Returns:
        f32[num_kv_heads, group_rows].

    >>> lopsided(np.float32([1, 2, 3, 4]), 2, 2)
    array([[1., 2.],
           [3., 4.]], dtype=float32)
    """
    return np.pad(x, (0, num_kv_heads * group_rows - len(x))).reshape(num_kv_heads, group_rows)


def _attend(queries, kv, seen):
    """Attention of some queries with some tokens: [q, head_dim], [k, 2, head_dim], bool[q, k]."""
    scores = queries @ kv[:, 0].T * queries.shape[1] ** -0.5
    scores = np.where(seen, scores, -1e30)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights @ kv[:, 1] / weights.sum(axis=1, keepdims=True)
