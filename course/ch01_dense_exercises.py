# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 1: Dense attention, exercises
#
# You write the pieces of attention for one sequence: the softmax, the causal mask after a cached
# prefix, grouped heads, the sliding window, and the sums that say which chip limit each phase
# meets. Read the lesson first: `notebooks/01_dense.ipynb`.
#
# Every exercise is a function to fill in and a check to run. A check starts with a case that you
# can do by hand, stops at the first difference, and says what it recognises.

# %%
import jax
import jax.numpy as jnp

import rpa
import rpa.chips

# %% [markdown]
# ## Exercise 1.1: A softmax that does not overflow
#
# Write `softmax(scores)` for `scores` of shape `[q_len, kv_len]`: each row becomes weights that are
# positive and sum to 1. Scores may be large, 100 or more, so subtract what can be subtracted.
#
# **Teaches:** why every attention kernel carries a running maximum.

# %% [markdown] tags=["hint"]
# $e^{s_j} / \sum_k e^{s_k}$ does not change if the same number is subtracted from every score of a
# row. Subtract one that leaves no positive exponent.

# %% [markdown] tags=["hint"]
# `scores.max(axis=-1, keepdims=True)` keeps the axis with length 1, so that the difference
# broadcasts along each row. `jnp.exp` and `.sum` with the same arguments do the rest.

# %% [markdown] tags=["hint"]
# ```python
# weights = jnp.exp(scores - <largest of each row>)
# return weights / <sum of each row>
# ```


# %% tags=["exercise"]
def softmax(scores):
    """Attention weights: f32[q_len, kv_len] to f32[q_len, kv_len], each row sums to 1."""
    ### BEGIN SOLUTION
    row_max = scores.max(axis=-1, keepdims=True)  # [q_len, 1]
    weights = jnp.exp(scores - row_max)
    return weights / weights.sum(axis=-1, keepdims=True)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("1.1", softmax)

# %% [markdown] tags=["explanation"]
# After the subtraction the largest exponent of a row is 0, so no weight exceeds 1 and at least one
# is 1: the sum lies between 1 and `kv_len` and neither overflows nor vanishes. The price is a pass
# over the row before the first `exp`. Chapter 4 removes that pass: it keeps a *running* maximum.


# %% tags=["wrong"] refused="the largest score is not subtracted before exp"
def softmax(scores):
    exponentials = jnp.exp(scores)
    return exponentials / exponentials.sum(axis=1)[:, None]


# %% tags=["wrong"] refused="smaller than the row's maximum is subtracted, here the minimum"
def softmax(scores):
    weights = jnp.exp(scores - scores.min(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# %% tags=["wrong"] refused="the sum runs over the queries (axis 0)"
def softmax(scores):
    weights = jnp.exp(scores - scores.max(axis=0))
    return weights / weights.sum(axis=0)


# %% tags=["wrong"] refused="shape (2,), expected (2, 3)"
def softmax(scores):
    return jnp.exp(scores).sum(axis=-1)


# %% [markdown]
# ## Exercise 1.2: Who may see whom, after a cached prefix
#
# Write `causal_mask(q_len, kv_len)`: bool`[q_len, kv_len]`, True where the query may see the key.
# The queries are the *last* `q_len` tokens of a sequence of `kv_len`; the others are cached.
#
# By hand, two new tokens after three cached ones:
#
# | | key 0 | 1 | 2 | 3 | 4 |
# |---|---|---|---|---|---|
# | query 0 | sees | sees | sees | sees | |
# | query 1 | sees | sees | sees | sees | sees |
#
# **Teaches:** a query's position decides what it sees, not its row.

# %% [markdown] tags=["hint"]
# A query sees its own key and every earlier one. Write down the positions of both, then compare.

# %% [markdown] tags=["hint"]
# `jnp.arange(n)` counts positions. `a[:, None]` is a column and `b[None, :]` is a row; comparing
# them gives a table.

# %% [markdown] tags=["hint"]
# ```python
# q_positions = <position of the first query> + jnp.arange(q_len)
# return jnp.arange(kv_len)[None, :] <= ...
# ```


# %% tags=["exercise"]
def causal_mask(q_len, kv_len):
    """Which key each query may see: bool[q_len, kv_len]."""
    ### BEGIN SOLUTION
    q_positions = kv_len - q_len + jnp.arange(q_len)
    return jnp.arange(kv_len)[None, :] <= q_positions[:, None]
    ### END SOLUTION


# %% tags=["check"]
rpa.check("1.2", causal_mask)

# %% [markdown] tags=["explanation"]
# The comparison is `<=` because a token sees itself. For a prefill the offset is 0 and this is the
# lower triangle; for decode the only query stands at the last position and sees all. The kernel of
# chapter 8 never builds this table: it compares the same two positions inside a block, and only in
# blocks that the diagonal crosses.


# %% tags=["wrong"] refused="the causal mask ignores the cached prefix"
def causal_mask(q_len, kv_len):
    return jnp.tril(jnp.ones((q_len, kv_len), bool))


# %% tags=["wrong"] refused="a token does not see itself"
def causal_mask(q_len, kv_len):
    rows, columns = jnp.indices((q_len, kv_len))
    return columns < rows + kv_len - q_len


# %% tags=["wrong"] refused="the comparison is turned round (>= for <=, triu for tril)"
def causal_mask(q_len, kv_len):
    q_positions = jnp.arange(kv_len - q_len, kv_len)
    return jnp.arange(kv_len)[None, :] >= q_positions[:, None]


# %% tags=["wrong"] refused="dtype float32, expected bool"
def causal_mask(q_len, kv_len):
    return jnp.tri(q_len, kv_len, kv_len - q_len)


# %% [markdown]
# ## Exercise 1.3: Heads that share their keys and values
#
# Write `grouped_attention(q, k, v, mask)`, the whole formula: scores divided by
# $\sqrt{\text{head\_dim}}$, hidden where the mask is False, softmax over the keys, mixture of
# values. There are more query heads than KV heads: query head `h` reads KV head `h // group` with
# `group = num_q_heads // num_kv_heads`.
#
# **Teaches:** GQA is an index into K and V; and a mask has to act before the softmax.

# %% [markdown] tags=["hint"]
# Either give each query head its own copy of the KV head it reads, which is simple; or split the
# query heads in two axes, `[num_kv_heads, group]`, which copies nothing. Both are right.

# %% [markdown] tags=["hint"]
# `jnp.repeat(k, group, axis=1)` copies each head `group` times: 0, 0, 1, 1. `jnp.einsum` with
# `"qhd,khd->hqk"` gives the scores of each head. `jnp.where(mask, scores, -jnp.inf)` hides, and
# `jax.nn.softmax(scores, axis=-1)` does what you wrote in exercise 1.1.

# %% [markdown] tags=["hint"]
# ```python
# k, v = (jnp.repeat(x, <group>, axis=1) for x in (k, v))
# scores = jnp.einsum("qhd,khd->hqk", q, k) / <root>
# weights = jax.nn.softmax(jnp.where(<...>), axis=-1)
# return jnp.einsum("hqk,khd->qhd", weights, v)
# ```


# %% tags=["exercise"]
def grouped_attention(q, k, v, mask):
    """Attention with shared KV heads.

    q: f32[q_len, num_q_heads, head_dim]; k, v: f32[kv_len, num_kv_heads, head_dim];
    mask: bool[q_len, kv_len]. Returns f32[q_len, num_q_heads, head_dim].
    """
    ### BEGIN SOLUTION
    q_len, num_q_heads, head_dim = q.shape
    grouped = q.reshape(q_len, k.shape[1], -1, head_dim)  # [q_len, num_kv_heads, group, head_dim]
    scores = jnp.einsum("qhgd,khd->hgqk", grouped, k) / head_dim**0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    output = jnp.einsum("hgqk,khd->qhgd", weights, v)
    return output.reshape(q_len, num_q_heads, head_dim)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("1.3", grouped_attention)

# %% [markdown] tags=["explanation"]
# The reshape is free and copies nothing: heads that share a KV head are neighbours, so splitting
# the head axis puts them in a group. A kernel goes one step further and stacks a group into the
# *rows* of one matrix product, because each K that it loads then serves `group` queries. Hiding
# happens before the softmax, so that hidden keys have no part in the sum either.


# %% tags=["wrong"] refused="neighbouring query heads read different KV heads"
def grouped_attention(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = jnp.tile(k, (1, group, 1)), jnp.tile(v, (1, group, 1))
    scores = jnp.einsum("qhd,khd->hqk", q, k) / jnp.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v)


# %% tags=["wrong"] refused="hidden scores are set to 0"
def grouped_attention(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    scores = jnp.einsum("qhd,khd->hqk", q, k) / jnp.sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores * mask, axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v)


# %% tags=["wrong"] refused="the mask is inverted"
def grouped_attention(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    scores = jnp.einsum("qhd,khd->hqk", q, k) / jnp.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, -jnp.inf, scores), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v)


# %% tags=["wrong"] refused="scores are not divided by the root of head_dim"
def grouped_attention(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    scores = jnp.where(mask, jnp.einsum("qhd,khd->hqk", q, k), -jnp.inf)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), v)


# %% tags=["wrong"] refused="Your function raises"
def grouped_attention(q, k, v, mask):
    scores = jnp.einsum("qhd,khd->hqk", q, k) / jnp.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v)


# %% [markdown]
# ## Exercise 1.4: What attention has to do and to move
#
# Write `attention_cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)`, which
# returns two integers, `(flops, hbm_bytes)`, for one causal sequence:
#
# - `flops` of the two matrix products, a multiplication and an addition counted as two, and only
#   for (query, key) pairs that the causal mask lets through;
# - `hbm_bytes` with each array moved once: queries read, K and V of all `kv_len` tokens read,
#   output written. `item_bytes` is the size of one number, 2 for bfloat16. (The lesson also counts
#   the new K and V, which a kernel writes into the cache. Leave that out here.)
#
# By hand: two queries, five keys, one head, `head_dim` 4, 2 bytes. The first query sees 4 keys and
# the second 5, so 9 pairs. Each takes two products of 4 multiplications and 4 additions: 16 FLOPs,
# 144 in all. K and V are 2 x 5 x 4 numbers, queries and output 2 x 2 x 4: 56 numbers, 112 bytes.
#
# **Teaches:** where the intensity of decode and prefill comes from.

# %% [markdown] tags=["hint"]
# Query t stands at position `kv_len - q_len + t` and sees that many keys and its own. Add up over
# the queries. FLOPs belong to query heads; bytes of K and V belong to KV heads.

# %% [markdown] tags=["hint"]
# Python integers are enough: `sum(... for t in range(q_len))`, or the formula for a sum of
# consecutive numbers.

# %% [markdown] tags=["hint"]
# ```python
# pairs = sum(kv_len - q_len + t + 1 for t in range(q_len))
# flops = <2 products> * <2 for multiply and add> * num_q_heads * head_dim * pairs
# numbers = <q and output> * q_len * num_q_heads * head_dim + <K and V> * ...
# ```


# %% tags=["exercise"]
def attention_cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    """FLOPs of both products over visible pairs, and HBM bytes with each array moved once."""
    ### BEGIN SOLUTION
    pairs = q_len * kv_len - q_len * (q_len - 1) // 2
    flops = 2 * 2 * num_q_heads * head_dim * pairs
    q_and_output = 2 * q_len * num_q_heads * head_dim
    k_and_v = 2 * kv_len * num_kv_heads * head_dim
    return flops, (q_and_output + k_and_v) * item_bytes
    ### END SOLUTION


# %% tags=["check"]
rpa.check("1.4", attention_cost)

# %% [markdown]
# Now ask what you have written. Which of these wait for memory on a v5e, whose ridge is at 240
# FLOPs a byte? Change the lengths and find the shortest chunk that does not.

# %%
for q_len, kv_len in [(1, 4096), (16, 4096), (256, 4096), (4096, 4096)]:
    flops, hbm_bytes = attention_cost(q_len, kv_len, 32, 8, 128, item_bytes=2)
    limit = rpa.chips.roofline_time("v5e", flops, hbm_bytes)
    print(f"q_len {q_len:4}  {flops / hbm_bytes:7.1f} FLOP/byte  waits for {limit.bound}")

# %% [markdown] tags=["explanation"]
# The last query sees `kv_len` keys, the one before it one less, and so on: `q_len * kv_len` minus a
# triangle. In decode both `q_len` terms vanish next to `kv_len`, and the ratio is
# `4 * num_q_heads / (2 * num_kv_heads * item_bytes)`, the group size in bfloat16. In prefill FLOPs
# grow with the square of the length and bytes only in proportion.


# %% tags=["wrong"] refused="a multiplication and an addition are counted as one"
def attention_cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    pairs = sum(kv_len - q_len + t + 1 for t in range(q_len))
    numbers = 2 * q_len * num_q_heads * head_dim + 2 * kv_len * num_kv_heads * head_dim
    return 2 * num_q_heads * head_dim * pairs, numbers * item_bytes


# %% tags=["wrong"] refused="a token does not see itself"
def attention_cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    pairs = sum(kv_len - q_len + t for t in range(q_len))
    numbers = 2 * q_len * num_q_heads * head_dim + 2 * kv_len * num_kv_heads * head_dim
    return 4 * num_q_heads * head_dim * pairs, numbers * item_bytes


# %% tags=["wrong"] refused="the new K and V are counted once more, as written"
def attention_cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    pairs = sum(kv_len - q_len + t + 1 for t in range(q_len))
    numbers = 2 * q_len * num_q_heads * head_dim + 2 * (kv_len + q_len) * num_kv_heads * head_dim
    return 4 * num_q_heads * head_dim * pairs, numbers * item_bytes


# %% tags=["wrong"] refused="pairs that the causal mask hides are counted"
def attention_cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    numbers = 2 * q_len * num_q_heads * head_dim + 2 * kv_len * num_kv_heads * head_dim
    return 4 * num_q_heads * head_dim * q_len * kv_len, numbers * item_bytes


# %% tags=["wrong"] refused="K and V are counted once a query head"
def attention_cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    pairs = sum(kv_len - q_len + t + 1 for t in range(q_len))
    numbers = 2 * (q_len + kv_len) * num_q_heads * head_dim
    return 4 * num_q_heads * head_dim * pairs, numbers * item_bytes


# %% [markdown]
# ## Exercise 1.5: What a sliding window leaves to read
#
# With a window of `window` tokens, the query at position i sees the keys at positions
# `i - window + 1` to `i`: itself and the `window - 1` before it. A kernel should not even read the
# other keys.
#
# Write `keys_to_read(q_len, kv_len, window)`, which returns two integers `(first, end)`: the keys
# `first <= j < end` are those that *at least one* of the last `q_len` tokens sees.
#
# By hand: `kv_len` 10, three queries at positions 7, 8 and 9, window 4. The query at 7 sees 4 to 7,
# the one at 8 sees 5 to 8, the one at 9 sees 6 to 9. Together that is 4 to 9, so `(4, 10)`.
#
# **Teaches:** a window bounds the bytes of decode, however long the conversation; and the bound
# comes from the first query of a chunk, not from the last.

# %% [markdown] tags=["hint"]
# Which of the queries looks back farthest? Which sees the newest key? And what if the sequence is
# shorter than the window?

# %% [markdown] tags=["hint"]
# The first query stands at position `kv_len - q_len`. `max(0, x)` keeps a position from falling off
# the beginning.

# %% [markdown] tags=["hint"]
# ```python
# first = max(0, <position of the first query> - window + 1)
# return first, ...
# ```


# %% tags=["exercise"]
def keys_to_read(q_len, kv_len, window):
    """First key that any of the last q_len tokens sees, and one past the last, as integers."""
    ### BEGIN SOLUTION
    first_query = kv_len - q_len
    return max(0, first_query - window + 1), kv_len
    ### END SOLUTION


# %% tags=["check"]
rpa.check("1.5", keys_to_read)

# %% [markdown] tags=["explanation"]
# The windows of neighbouring queries overlap, and together they reach from the start of the first
# to the end of the last. A chunk of `q_len` tokens therefore reads `q_len + window - 1` keys at
# most, and a decode step `window`. Keys that some query of the chunk does not see are still read,
# and masked: both are needed, the bound and the mask. Real kernels have lost tokens here: they
# skipped the blocks before the window and, with them, the writing of new keys that fell into these
# blocks.


# %% tags=["wrong"] refused="the window is counted back from the last query"
def keys_to_read(q_len, kv_len, window):
    return max(0, kv_len - window), kv_len


# %% tags=["wrong"] refused="a query sees window keys besides itself"
def keys_to_read(q_len, kv_len, window):
    return max(0, kv_len - q_len - window), kv_len


# %% tags=["wrong"] refused="end is first + window"
def keys_to_read(q_len, kv_len, window):
    first = max(0, kv_len - q_len - window + 1)
    return first, min(first + window, kv_len)


# %% tags=["wrong"] refused="negative"
def keys_to_read(q_len, kv_len, window):
    return kv_len - q_len - window + 1, kv_len
