# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 11: Production, exercises
#
# Five kernels are under suspicion. Each has one bug that a production kernel had, and each passes
# an ordinary test: random numbers, a few sequences, a few hundred tokens. You find what it is that
# ordinary tests do not vary. Then you write two pieces that every server needs: the quantisation of
# a cache, and a validator. Read the lesson first: `notebooks/11_production.ipynb`.
#
# In 11.1, 11.3 and 11.4 you do not mend the suspect. You write its **witness**: the batch, the
# length or the numbers on which it gives itself away. The check runs the suspect on them and says
# "guilty", or why it was acquitted.
#
# **Time:** about 110 minutes; 11.3 and 11.5 are short, 11.7 takes longest.

# %%
import jax.numpy as jnp
import numpy as np

import rpa
from rpa.check.chapters import wrong_kernels
from rpa.figures import show_source
from rpa.paging import cdiv

# %% [markdown]
# ## Exercise 11.1: The lost tokens
#
# **Symptom.** Answers are right. A day later a user asks a second question about the same long
# document, the server finds its pages in the cache, reuses them, and talks nonsense.
#
# **Suspect.** Attention under a sliding window. Its new tokens are written back by the last query
# block:

# %%
show_source(wrong_kernels.forgetful)

# %% [markdown]
# Write `witness(bq, bkv, window)`: a sequence `(q_len, kv_len)` in which at least one new token
# never reaches the cache. It must work for every `bq`, `bkv` and `window` that the check tries, and
# be short: at most `window + bkv + bq` new tokens.
#
# By hand: `bq = 2`, `bkv = 4`, `window = 3`. A prompt of 7 tokens, nothing cached, `(7, 7)`: the
# last query block begins at position 6 and sees keys 4 to 6. It starts with key block 1, and tokens
# 0 to 3, which are new, are not written.
#
# **Teaches:** a right output says nothing about the cache; "by the way" is no place for a store.

# %% [markdown] tags=["hint"]
# Two things must be true. There are several query blocks, so that the last one is not the first.
# And the last one begins so late that its window has left a whole block of new keys behind.

# %% [markdown] tags=["hint"]
# Plain integers. With nothing cached (`kv_len == q_len`) the first new token has position 0, and
# block 0 is skipped if the first key that the last query block sees is at least `bkv`.

# %% [markdown] tags=["hint"]
# ```python
# # The last query block begins at q_len - bq or later; its first key is window - 1 before that.
# q_len = ... + bkv + ...
# return q_len, q_len
# ```


# %% tags=["exercise"]
def witness(bq, bkv, window):
    """(q_len, kv_len) of a sequence of which `suspects.forgetful` loses a new token."""
    ### BEGIN SOLUTION
    q_len = window + bkv + bq
    return q_len, q_len
    ### END SOLUTION


# %% tags=["check"]
rpa.check("11.1", witness)

# %% [markdown]
# How much of your sequence is lost, with the blocks of a real kernel?

# %%
q_len, kv_len = witness(bq=32, bkv=256, window=128)
kv = np.random.default_rng(1).standard_normal((kv_len, 2, 8)).astype(np.float32)
before = np.where(np.arange(kv_len)[:, None, None] < kv_len - q_len, kv, 0)
_, after = wrong_kernels.forgetful(
    kv[-q_len:, 0], kv[-q_len:], before, window=128, bq=32, bkv=256
)  # fmt: skip
print(f"{(after != kv).any((1, 2)).sum()} of {q_len} new tokens are not in the cache")

# %% [markdown] tags=["explanation"]
# The last query block begins at a multiple of `bq`, at `q_len - bq` or later, so at
# `window + bkv` or later, and its first key is at `bkv + 1` or later: block 0 is skipped with all
# its new tokens. The first author thought "every query block sees all earlier keys", which is true
# until a window is added. Rung 8 stores each token with its *own* query block, which always
# runs (`transfers._start_store`, chapter 8): no other block's plans can change that.


# %% tags=["wrong"] refused="the new tokens fit in one query block"
def witness(bq, bkv, window):
    return 1, window + bkv + bq


# %% tags=["wrong"] refused="the sequence is not longer than the window"
def witness(bq, bkv, window):
    q_len = bq + 1  # two query blocks
    return q_len, q_len


# %% tags=["wrong"] refused="a whole one has to be skipped"
def witness(bq, bkv, window):
    return window + bq, window + bq


# %% tags=["wrong"] refused="only new ones can be lost"
def witness(bq, bkv, window):
    return bq + 1, bq + 1 + 8 * bkv


# %% tags=["wrong"] refused="expected 1 <= q_len <= kv_len"
def witness(bq, bkv, window):
    return window + bkv + bq, window


# %% tags=["wrong"] refused="at most window + bkv + bq"
def witness(bq, bkv, window):
    return 4096, 4096


# %% [markdown]
# ## Exercise 11.2: Poison
#
# **Symptom.** Once in a few hours one answer is `NaN`, and from then on that sequence is `NaN` for
# ever. The same prompt again: fine.
#
# **Suspect.** A decode step that gives hidden keys a weight of exactly zero:

# %%
show_source(wrong_kernels.trusting)

# %% [markdown]
# A weight of zero times `NaN` is `NaN`. The pages of a server are used again and again, and what
# lies behind the last token is whatever was there before. A test finds that only if it puts the
# worst into every place that must not be read. So write `poison(kv_cache, q_lens, kv_lens,
# page_table)`, which returns two arrays:
#
# - the cache, f32[num_pages, page_size, 2], with `NaN` in every place that holds no *cached* token
#   of a sequence: pages without an owner, tails, and the places that the new tokens will get (the
#   kernel brings those itself);
# - the page table, i32[num_seqs, pages_per_seq], with `GARBAGE` in every entry behind a sequence's
#   live pages. Live are the first `ceil(kv_len / page_size)`, new tokens included.
#
# The arguments stay as they are. By hand: `q_len = 1`, `kv_len = 3`, pages of 4, row `[1, 0]`. Rows
# 0 and 1 of page 1 stay, all else is NaN; the row becomes `[1, GARBAGE]`.
#
# **Teaches:** a test harness is a part of the kernel: what it does not poison is not tested.

# %%
GARBAGE = 999_999  # no cache has so many pages

# %% [markdown] tags=["hint"]
# Ask the question the other way round: which places are *kept*? Mark them in a mask of pages and
# rows, then choose between the cache and NaN.

# %% [markdown] tags=["hint"]
# Token `p` of sequence s lies on page `page_table[s, p // page_size]`, row `p % page_size`. A mask
# can be set with two index arrays at once: `kept[pages, rows] = True`. `np.where(kept[:, :, None],
# kv_cache, np.nan)` makes a new array.

# %% [markdown] tags=["hint"]
# ```python
# num_pages, page_size = kv_cache.shape[:2]
# kept = np.zeros((num_pages, page_size), bool)
# for s, num_cached in enumerate(...):
#     positions = np.arange(num_cached)
#     kept[page_table[s, ...], ...] = True
# live = np.arange(page_table.shape[1]) < cdiv(..., page_size)[:, None]
# return np.where(kept[:, :, None], kv_cache, np.nan), np.where(live, page_table, GARBAGE)
# ```


# %% tags=["exercise"]
def poison(kv_cache, q_lens, kv_lens, page_table):
    """The same batch with NaN and GARBAGE wherever no kernel may look: (kv_cache, page_table)."""
    ### BEGIN SOLUTION
    num_pages, page_size = kv_cache.shape[:2]
    kept = np.zeros((num_pages, page_size), bool)
    for s, num_cached in enumerate(kv_lens - q_lens):
        positions = np.arange(num_cached)
        kept[page_table[s, positions // page_size], positions % page_size] = True
    live = np.arange(page_table.shape[1]) < cdiv(kv_lens, page_size)[:, None]
    return np.where(kept[:, :, None], kv_cache, np.nan), np.where(live, page_table, GARBAGE)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("11.2", poison)

# %% [markdown]
# Now the suspect, on a clean cache and on a poisoned one. (Its cache has K and V of one lane, and
# the new tokens have been stored: so `q_lens` is 0 for your function.)

# %%
clean = np.ones((6, 4, 2), np.float32)
table, lens = np.array([[2, 4], [1, 0]], np.int32), np.array([7, 3])
dirty, dirty_table = poison(clean, np.array([0, 0]), lens, table)
for name, cache, rows in [("clean", clean, table), ("poisoned", dirty, dirty_table)]:
    queries = np.ones((2, 1), np.float32)
    output = wrong_kernels.trusting(queries, cache.astype(np.float32)[..., None], lens, rows)
    print(f"{name:9}", output[:, 0])

# %% [markdown] tags=["explanation"]
# The mask of what is kept is short, the list of what is not would be long; and a mask takes shared
# pages as they come, since setting True twice does no harm. The suspect fails in both places that
# were poisoned: it multiplies the tail with zero, and it follows every entry of the table, which
# JAX clamps to the last page. The cure is to *replace*: `jnp.where(seen, v, 0)` before the product.
# All batches of this project's tests go through a function like yours, `tests/batches.py`.


# %% tags=["wrong"] refused="those tokens are not in the cache before the step"
def poison(kv_cache, q_lens, kv_lens, page_table):
    kept = np.zeros(kv_cache.shape[:2], bool)
    for pages, kv_len in zip(page_table, kv_lens, strict=True):
        for p in range(kv_len):
            kept[pages[p // kept.shape[1]], p % kept.shape[1]] = True
    live = np.arange(page_table.shape[1]) < cdiv(kv_lens, kept.shape[1])[:, None]
    return np.where(kept[..., None], kv_cache, np.nan), np.where(live, page_table, GARBAGE)


# %% tags=["wrong"] refused="only pages without an owner are poisoned"
def poison(kv_cache, q_lens, kv_lens, page_table):
    page_size = kv_cache.shape[1]
    column = np.arange(page_table.shape[1])
    live = column < cdiv(kv_lens, page_size)[:, None]
    owned = page_table[column < cdiv(kv_lens - q_lens, page_size)[:, None]]
    poisoned = np.full_like(kv_cache, np.nan)
    poisoned[owned] = kv_cache[owned]
    return poisoned, np.where(live, page_table, GARBAGE)


# %% tags=["wrong"] refused="the page table is left as it is"
def poison(kv_cache, q_lens, kv_lens, page_table):
    page_size = kv_cache.shape[1]
    poisoned = np.full_like(kv_cache, np.nan)
    for pages, num_cached in zip(page_table, kv_lens - q_lens, strict=True):
        for p in range(num_cached):
            place = pages[p // page_size], p % page_size
            poisoned[place] = kv_cache[place]
    return poisoned, page_table


# %% tags=["wrong"] refused="live pages are counted from the cached tokens"
def poison(kv_cache, q_lens, kv_lens, page_table):
    page_size = kv_cache.shape[1]
    cached = kv_lens - q_lens
    poisoned = np.full_like(kv_cache, np.nan)
    for pages, num_cached in zip(page_table, cached, strict=True):
        positions = np.arange(num_cached)
        places = pages[positions // page_size], positions % page_size
        poisoned[places] = kv_cache[places]
    live = np.arange(page_table.shape[1]) < cdiv(cached, page_size)[:, None]
    return poisoned, np.where(live, page_table, GARBAGE)


# %% tags=["wrong"] refused="Your function changes its argument `kv_cache`"
def poison(kv_cache, q_lens, kv_lens, page_table):
    page_size = kv_cache.shape[1]
    live = np.arange(page_table.shape[1]) < cdiv(kv_lens, page_size)[:, None]
    for page in set(range(len(kv_cache))) - set(page_table[live].tolist()):
        kv_cache[page] = np.nan
    return kv_cache, np.where(live, page_table, GARBAGE)


# %% [markdown]
# ## Exercise 11.3: Sixteen bits
#
# **Symptom.** A model with a context of 128K answers well, except to users with long documents. No
# error, no NaN.
#
# **Suspect.** The mask. Comparing in 16 bits takes half of the registers:

# %%
show_source(wrong_kernels.narrow)

# %% [markdown]
# Write `witness_len(window)`: the `kv_len` of the **shortest** sequence whose last token gets a
# wrong mask. `window` is a number or `None`.
#
# An `int16` goes from -32,768 to 32,767, and adding one to the largest gives the smallest. By hand,
# in 4 bits (-8 to 7) and without a window: positions 0 to 7 fit, so 8 tokens are fine, and the
# ninth has position 8, which becomes -8.
#
# **Teaches:** which number overflows first is rarely the one that you look at.

# %% [markdown] tags=["hint"]
# The query is the last token, at position `kv_len - 1`, and so is the last key. Which numbers does
# the code compute from them? Which is the largest?

# %% [markdown] tags=["hint"]
# The largest is `k + window` with `k = kv_len - 1`, or without a window `k` itself. Wrong means
# larger than `2**15 - 1`.

# %% [markdown] tags=["hint"]
# ```python
# # The shortest kv_len with (kv_len - 1) + window > 2**15 - 1:
# return 2**15 + ... - (window or 0)
# ```


# %% tags=["exercise"]
def witness_len(window):
    """The kv_len of the shortest sequence whose last token `suspects.narrow` masks wrongly."""
    ### BEGIN SOLUTION
    return 2**15 + 1 - (window or 0)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("11.3", witness_len)

# %% [markdown]
# What does the last token see there?

# %%
for window in (None, 128):
    for kv_len in (witness_len(window) - 1, witness_len(window)):
        seen = wrong_kernels.narrow(kv_len - 1, kv_len, window)
        print(f"window {window}, kv_len {kv_len:,}: sees {seen.sum():,} keys, "
              f"itself: {bool(seen[-1])}")  # fmt: skip

# %% [markdown] tags=["explanation"]
# `kv_len - 1 + window` must reach 32,768, so `kv_len = 32,769 - window`; without a window, 32,769.
# With a window it is the newest token that disappears first, and one key of 128 is hardly missed:
# the answers get worse slowly, as the sequence grows, and it is hard to say since when. Two honest
# ways out: compare in 32 bits, or subtract the block's position first and compare small numbers.
# Rung 8 does the first, once for all heads. The test has a sequence of 33,500 tokens with a window
# of 33,000.


# %% tags=["wrong"] refused="the last position is taken to be kv_len"
def witness_len(window):
    return 2**15 - (window or 0)


# %% tags=["wrong"] refused="overflows long before"
def witness_len(window):
    return 32_769


# %% tags=["wrong"] refused="an int16 ends at 2**15 - 1"
def witness_len(window):
    return 2**16 + 1 - (0 if window is None else window)


# %% tags=["wrong"] refused="expected a kv_len, 1 to 2**20"
def witness_len(window):
    return (2**16 + 2) / 2 - (window or 0)


# %% [markdown]
# ## Exercise 11.4: The sum that stops growing
#
# **Symptom.** Summaries of very long documents speak of their beginning only.
#
# **Suspect.** The online softmax of chapter 4, with one saving: running maximum, sum and
# accumulator are kept in bfloat16.

# %%
show_source(wrong_kernels.rounded)

# %% [markdown]
# It has passed a test with standard normal scores and values at 256K tokens (the lesson draws how).
# Write `witness_numbers(kv_len, block_tokens)`: two arrays f32[kv_len], the scores and the
# values of a single lane, on which it is wrong by more than a tenth of the largest value.
#
# A bfloat16 has 8 bits of precision: 256 + 1 is 256. By hand, with scores of 0: every token has
# weight 1, each block of `b` tokens adds `b` to the sum, and at `256 * b` it stops. The check gives
# you 512 blocks.
#
# **Teaches:** random numbers average out, errors too: a test needs numbers whose answer depends on
# what may be lost.

# %% [markdown] tags=["hint"]
# First make the sum stop: many tokens of equal weight. Then think of the accumulator. It stops too.
# For which values is the *quotient* of the two wrong then?

# %% [markdown] tags=["hint"]
# `np.zeros(n)` for equal scores. If all values are 1, sum and accumulator are the same number and
# stop together; values that grow along the sequence do not: `np.linspace(0, 1, n)`.

# %% [markdown] tags=["hint"]
# ```python
# scores = ...  # all alike
# values = np.linspace(...)  # from nothing to something
# return scores, values
# ```


# %% tags=["exercise"]
def witness_numbers(kv_len, block_tokens):
    """(scores, values), f32[kv_len] each, on which `suspects.rounded` is off by more than 10 %."""
    ### BEGIN SOLUTION
    scores = np.zeros(kv_len, np.float32)
    values = np.linspace(0, 1, kv_len, dtype=np.float32)
    return scores, values
    ### END SOLUTION


# %% tags=["check"]
rpa.check("11.4", witness_numbers)

# %% [markdown]
# The truth is the mean of your values, if your scores are equal. And the suspect's answer?

# %%
scores, values = witness_numbers(4096, 8)
for dtype in (jnp.bfloat16, np.float32):
    answer = wrong_kernels.rounded(scores, values[:, None], 8, dtype)[0]
    print(f"{jnp.dtype(dtype).name:8} {answer:.4f}, the mean of the values is {values.mean():.4f}")

# %% [markdown] tags=["explanation"]
# The sum stops at 256 blocks, half of the true one. The accumulator adds `b * value` a block, less
# than the sum at first, so it still grows when the sum has stopped: the quotient comes out twice
# too large. Values that are all 1 stop both at the same moment and hide it; values around zero have
# a right answer of nearly zero, and any wrong one is close to it. Random scores let the sum grow
# more slowly, so it takes a longer context. With a float32 state the same stop is at 2^24 blocks.


# %% tags=["wrong"] refused="the accumulator stops growing exactly where the sum does"
def witness_numbers(kv_len, block_tokens):
    return np.zeros(kv_len), np.ones(kv_len)


# %% tags=["wrong"] refused="values are random around zero"
def witness_numbers(kv_len, block_tokens):
    rng = np.random.default_rng(5)
    return np.zeros(kv_len), rng.standard_normal(kv_len)


# %% tags=["wrong"] refused="few tokens have most of the weight"
def witness_numbers(kv_len, block_tokens):
    scores = np.zeros(kv_len)
    scores[kv_len // 2] = 30
    return scores, np.linspace(0, 1, kv_len)


# %% tags=["wrong"] refused="scores are random"
def witness_numbers(kv_len, block_tokens):
    rng = np.random.default_rng(5)
    return rng.standard_normal(kv_len), np.linspace(0, 1, kv_len)


# %% tags=["wrong"] refused="expected two arrays"
def witness_numbers(kv_len, block_tokens):
    return np.zeros((kv_len, 1)), np.linspace(0, 1, kv_len)[:, None]


# %% tags=["wrong"] refused="one token, or a few, have a value"
def witness_numbers(kv_len, block_tokens):
    values = np.zeros(kv_len, np.float32)
    values[0] = 1
    return np.zeros(kv_len, np.float32), values


# %% [markdown]
# ## Exercise 11.5: Another head's sink
#
# **Symptom.** A model with attention sinks (one number for each query head) scores two points less
# than it should. Models without sinks are fine; and so is this one on eight chips, but not on one.
#
# **Suspect.** What brings numbers by head into the rows of the kernel:

# %%
show_source(wrong_kernels.lopsided)

# %% [markdown]
# Three query heads for each of two KV heads, four rows for each group. The kernel takes the sinks
# of KV head 1 from row 4 on, and finds:

# %%
wrong_kernels.lopsided(np.float32([10, 11, 12, 13, 14, 15]), num_kv_heads=2, group_rows=4)

# %% [markdown]
# Head 13 is in a row of the first group. Write `pad_groups(x, num_kv_heads, group_rows)`, without
# the bug: f32[num_kv_heads, group_rows], each group in its own row, padding zero.
#
# By hand: the same six numbers become `[[10, 11, 12, 0], [13, 14, 15, 0]]`.
#
# **Teaches:** padding goes where the boundary is; queries, sinks and output must agree on it.

# %% [markdown] tags=["hint"]
# Padding and reshaping, in which order?

# %% [markdown] tags=["hint"]
# `x.reshape(num_kv_heads, -1)` has a row for each group. `jnp.pad(y, ((0, 0), (0, n)))` puts n
# zeros behind each row.

# %% [markdown] tags=["hint"]
# ```python
# grouped = x.reshape(...)
# return jnp.pad(grouped, ((0, 0), (0, ... - grouped.shape[1])))
# ```


# %% tags=["exercise"]
def pad_groups(x, num_kv_heads, group_rows):
    """f32[num_kv_heads, group_rows]: each group's heads, then zeros."""
    ### BEGIN SOLUTION
    grouped = x.reshape(num_kv_heads, -1)
    return jnp.pad(grouped, ((0, 0), (0, group_rows - grouped.shape[1])))
    ### END SOLUTION


# %% tags=["check"]
rpa.check("11.5", pad_groups)

# %% [markdown] tags=["explanation"]
# Reshape first, pad then. The suspect is right wherever there is nothing to pad (group 1, 2, 4, 8)
# and wherever there is one group; with eight chips each had one KV head, and the bug was gone. A
# test that would have found it has groups of 3 or 5, more than one KV head, and a *different* sink
# for each head: with equal sinks no test sees which head got which. That is why the shapes in the
# traps' test are 5/1, 3/3, 9/3 and 12/2.


# %% tags=["wrong"] refused="that is the suspect's own bug"
def pad_groups(x, num_kv_heads, group_rows):
    padded = jnp.zeros(num_kv_heads * group_rows).at[: len(x)].set(x)
    return padded.reshape(num_kv_heads, group_rows)


# %% tags=["wrong"] refused="heads are dealt out in turns"
def pad_groups(x, num_kv_heads, group_rows):
    grouped = x.reshape(-1, num_kv_heads).T
    return jnp.pad(grouped, ((0, 0), (0, group_rows - grouped.shape[1])))


# %% tags=["wrong"] refused="padding stands in front of each group"
def pad_groups(x, num_kv_heads, group_rows):
    grouped = x.reshape(num_kv_heads, -1)
    return jnp.pad(grouped, ((0, 0), (group_rows - grouped.shape[1], 0)))


# %% tags=["wrong"] refused="rows without a head repeat another head"
def pad_groups(x, num_kv_heads, group_rows):
    group = len(x) // num_kv_heads
    row = jnp.minimum(jnp.arange(group_rows), group - 1)
    return x.reshape(num_kv_heads, group)[:, row]


# %% tags=["wrong"] refused="has shape (8,), expected (2, 4)"
def pad_groups(x, num_kv_heads, group_rows):
    grouped = x.reshape(num_kv_heads, -1)
    return jnp.pad(grouped, ((0, 0), (0, group_rows - grouped.shape[1]))).reshape(-1)


# %% [markdown]
# ## Exercise 11.6: A cache of eight bits
#
# A float8 cache holds twice the tokens. `float8_e4m3fn` reaches from -448 to 448, `float8_e5m2`
# from -57,344 to 57,344 with one bit of precision less. What is stored is `x / scale`, and the
# kernel multiplies by the scale again. There is **one scale for a layer**, chosen once from a
# **sample**: keys that the model made of some text before it was put to work.
#
# Write `quantize(sample, x, dtype)`: `(stored, scale)`.
#
# - `scale` is a number: the largest absolute value of `sample`, divided by the largest number of
#   `dtype`. If the sample is all zeros, 1.
# - `stored` is `x / scale` in `dtype`, where `x` may be larger than anything in the sample. Then it
#   becomes the largest number of `dtype`, with its sign, and never NaN.
# - `sample` and `x` are float32 or bfloat16; compute in float32.
#
# By hand: the sample reaches from -8.96 to 1, so the scale is 8.96 / 448 = 0.02. A key of 0.2 is
# stored as 10, one of -4.48 as -224, and one of 20 as 448, which comes back as 8.96.
#
# **Teaches:** a static scale is a promise about tokens to come, and clipping is what keeps it.

# %% [markdown] tags=["hint"]
# Three steps: the scale from the sample, the division, the rounding. Before the rounding comes the
# question what happens to a number that is too large: e4m3fn has no infinity, only NaN.

# %% [markdown] tags=["hint"]
# `float(jnp.finfo(dtype).max)` is the largest number of a dtype. `jnp.abs(x).max()`;
# `jnp.clip(x, low, high)`; `x.astype(dtype)`.

# %% [markdown] tags=["hint"]
# ```python
# largest = float(jnp.finfo(dtype).max)
# sample_max = float(jnp.abs(sample.astype(jnp.float32)).max())
# scale = ... if sample_max > 0 else 1.0
# wide = x.astype(jnp.float32) / scale
# return jnp.clip(...).astype(dtype), scale
# ```


# %% tags=["exercise"]
def quantize(sample, x, dtype):
    """x in 8 bits with a scale for the layer: (stored, scale), stored * scale is nearly x."""
    ### BEGIN SOLUTION
    largest = float(jnp.finfo(dtype).max)
    sample_max = float(jnp.abs(sample.astype(jnp.float32)).max())
    scale = sample_max / largest if sample_max > 0 else 1.0
    wide = x.astype(jnp.float32) / scale
    return jnp.clip(wide, -largest, largest).astype(dtype), scale
    ### END SOLUTION


# %% tags=["check"]
rpa.check("11.6", quantize)

# %% [markdown]
# Use it as a server does: K and V of 40 tokens are quantised and stored, and attention gets the
# scales. The same step next to it with a bfloat16 cache.

# %%
rng = np.random.default_rng(6)
queries, keys, values = (
    jnp.array(rng.standard_normal((40, heads, 128)), jnp.float32) for heads in (8, 4, 4)
)
batch, _ = rpa.RaggedBatch.from_lengths([40], [40], [[2, 0, 1]])
arrays = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)


def attention(keys, values, **scales):
    cache = jnp.zeros(rpa.get_kv_cache_shape(3, 16, 4, 128, keys.dtype), keys.dtype)
    options = {"sm_scale": 128**-0.5} | scales
    output, _ = rpa.ref_ragged_paged_attention(queries, keys, values, cache, *arrays, **options)
    return np.asarray(output), cache.nbytes


# %%
exact, _ = attention(keys, values)
keys8, k_scale = quantize(keys[:20], keys, "float8_e4m3fn")
values8, v_scale = quantize(values[:20], values, "float8_e4m3fn")
for name, (output, cache_bytes) in {
    "bfloat16": attention(keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16)),
    "float8_e4m3fn": attention(keys8, values8, k_scale=k_scale, v_scale=v_scale),
}.items():
    error = np.linalg.norm(output - exact) / np.linalg.norm(exact)
    print(f"{name:14} cache of {cache_bytes:,} bytes, relative error {error:.4f}")

# %% [markdown] tags=["explanation"]
# The scale maps the sample onto the whole range of the type, and the clip catches what the sample
# did not foresee. Without it, a single key that is too large is stored as NaN, and every later
# token of the sequence attends to it. The scale belongs to the layer and not to the token, because
# the kernel multiplies *all* scores of a step with one number; that makes it free, folded into
# `sm_scale`. What the cell shows is the price: a float8 has 3 bits behind the point where a
# bfloat16 has 7.


# %% tags=["wrong"] refused="nothing is clipped"
def quantize(sample, x, dtype):
    scale = float(jnp.abs(sample).max()) / float(jnp.finfo(dtype).max) or 1.0
    return (x.astype(jnp.float32) / scale).astype(dtype), scale


# %% tags=["wrong"] refused="the scale is taken from x"
def quantize(sample, x, dtype):
    largest = float(jnp.finfo(dtype).max)
    scale = float(jnp.abs(x.astype(jnp.float32)).max()) / largest or 1.0
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype), scale


# %% tags=["wrong"] refused="the largest *absolute* value decides"
def quantize(sample, x, dtype):
    largest = float(jnp.finfo(dtype).max)
    scale = max(float(sample.max()), 0) / largest or 1.0
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype), scale


# %% tags=["wrong"] refused="the scale is the wrong way round"
def quantize(sample, x, dtype):
    largest = float(jnp.finfo(dtype).max)
    scale = largest / float(jnp.abs(sample.astype(jnp.float32)).max())
    wide = x.astype(jnp.float32) * scale
    return jnp.clip(wide, -largest, largest).astype(dtype), scale


# %% tags=["wrong"] refused="the other type reaches further"
def quantize(sample, x, dtype):
    scale = float(jnp.abs(sample.astype(jnp.float32)).max()) / 448 or 1.0
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype), scale


# %% tags=["wrong"] refused="has dtype float32, expected float8_e4m3fn"
def quantize(sample, x, dtype):
    largest = float(jnp.finfo(dtype).max)
    scale = float(jnp.abs(sample.astype(jnp.float32)).max()) / largest or 1.0
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest), scale


# %% tags=["wrong"] refused="x is divided as it comes, in bfloat16"
def quantize(sample, x, dtype):
    largest = float(jnp.finfo(dtype).max)
    scale = float(jnp.abs(sample.astype(jnp.float32)).max()) / largest or 1.0
    return jnp.clip(x / scale, -largest, largest).astype(dtype), scale


# %% tags=["wrong"] refused="the scale is computed in bfloat16"
def quantize(sample, x, dtype):
    largest = float(jnp.finfo(dtype).max)
    scale = float(jnp.abs(sample).max() / largest) or 1.0
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype), scale


# %% [markdown]
# ## Exercise 11.7: A validator
#
# A wrong batch does not crash. It reads and writes other people's pages. Write the function that
# looks at every batch first, `find_problems(kv_lens, page_indices, cu_q_lens, distribution,
# num_tokens, num_pages, page_size)`: a list of `(sequence, rule)`, empty for a legal batch.
#
# Two rules about the whole batch come first. If one is broken, return only it, with sequence -1,
# since the rest could not be read:
#
# - `"distribution"`: `0 <= i <= j <= k <= max_num_seqs`;
# - `"cu_q_lens"`: begins with 0, never falls up to entry k, and entry k is at most `num_tokens`.
#
# Then for each sequence in use, `s < k`, in this order:
#
# - `"decode"`: a sequence in `[0, i)` has at most one new token;
# - `"kv_len"`: `kv_len` is at least `q_len`;
# - `"room"`: `kv_len` fits in its row of the page table;
# - `"page"`: every live entry of its row is a page, 0 to `num_pages - 1`. Live are the first
#   `ceil(kv_len / page_size)`, as far as there is a row.
#
# Everything else may hold anything: slots from k on, entries behind the live ones. A `q_len` of 0
# is legal. By hand: pages of 4, rows `[0, 9]` and `[7, 99]`, 10 pages, `kv_lens = [5, 3]`,
# `q_lens` 1 and 3: legal, since the second sequence has one live page. (Who writes to a shared page
# was exercise 3.6.)
#
# All arrays are NumPy; Python loops are fine.
#
# **Teaches:** a validator has to know what may be garbage as well as what must not be.

# %% [markdown] tags=["hint"]
# Begin with `max_num_seqs`, `i, j, k` and the two early returns. Then one loop over the sequences
# in use, and in it four `if`s that append.

# %% [markdown] tags=["hint"]
# `page_indices.reshape(len(kv_lens), -1)` is the table with a row for each slot. `np.diff(...)` of
# `cu_q_lens[: k + 1]` are the lengths of the sequences in use, and negative where it falls.
# Slicing `row[:live]` beyond the end of the row is harmless.

# %% [markdown] tags=["hint"]
# ```python
# i, j, k = distribution
# if not 0 <= i <= j <= k <= len(kv_lens):
#     return [(-1, "distribution")]
# q_lens = np.diff(cu_q_lens[: k + 1])
# if ...:
#     return [(-1, "cu_q_lens")]
# table = page_indices.reshape(len(kv_lens), -1)
# problems = []
# for s in range(k):
#     live = table[s, : cdiv(kv_lens[s], page_size)]
#     if s < i and ...:
#         problems.append((s, "decode"))
#     ...
# return problems
# ```


# %% tags=["exercise"]
def find_problems(
    kv_lens, page_indices, cu_q_lens, distribution, num_tokens, num_pages, page_size
):  # fmt: skip
    """Every broken rule of a batch, as (sequence, rule); -1 stands for the whole batch."""
    ### BEGIN SOLUTION
    i, j, k = distribution
    if not 0 <= i <= j <= k <= len(kv_lens):
        return [(-1, "distribution")]
    q_lens = np.diff(cu_q_lens[: k + 1])
    if cu_q_lens[0] != 0 or (q_lens < 0).any() or cu_q_lens[k] > num_tokens:
        return [(-1, "cu_q_lens")]
    table = page_indices.reshape(len(kv_lens), -1)
    problems = []
    for s in range(k):
        live = table[s, : cdiv(kv_lens[s], page_size)]
        if s < i and q_lens[s] > 1:
            problems.append((s, "decode"))
        if kv_lens[s] < q_lens[s]:
            problems.append((s, "kv_len"))
        if kv_lens[s] > table.shape[1] * page_size:
            problems.append((s, "room"))
        if ((live < 0) | (live >= num_pages)).any():
            problems.append((s, "page"))
    return problems
    ### END SOLUTION


# %% tags=["check"]
rpa.check("11.7", find_problems)

# %% [markdown]
# How long does it take for a server's step, 256 sequences with 256 pages each? Next to it, the
# package's own, which also looks for shared pages and answers in sentences:

# %%
import time

table = np.arange(256 * 256).reshape(256, 256)
big, _ = rpa.RaggedBatch.from_lengths([1] * 256, [4096] * 256, table)
arrays = (big.kv_lens, big.page_indices, big.cu_q_lens, big.distribution)


def best_ms(function):
    times_ms = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times_ms.append(1e3 * (time.perf_counter() - start))
    return min(times_ms)


# %%
yours = best_ms(lambda: find_problems(*arrays, 256, 256 * 256, 16))
package = best_ms(lambda: big.validate(num_tokens=256, num_pages=256 * 256, page_size=16))
print(f"yours {yours:.2f} ms, rpa's {package:.2f} ms, on this machine's processor")

# %% [markdown] tags=["explanation"]
# Half of the function is about what *not* to look at: unused slots, table entries behind the live
# ones, idle slots. A validator that refuses legal batches is switched off within a week, and then
# protects no batch. The early returns are needed because later rules index with what they check: a
# `k` beyond the arrays or a `cu_q_lens` that falls would raise an IndexError, or worse, not raise
# it. `rpa.validation` does the same without the loop over sequences, and adds the ownership rule of
# 3.6.


# %% tags=["wrong"] refused="slots from distribution[2] on are looked at"
def find_problems(
    kv_lens, page_indices, cu_q_lens, distribution, num_tokens, num_pages, page_size
):  # fmt: skip
    i, j, k = distribution
    if not 0 <= i <= j <= k <= len(kv_lens):
        return [(-1, "distribution")]
    if cu_q_lens[0] or (np.diff(cu_q_lens[: k + 1]) < 0).any() or cu_q_lens[k] > num_tokens:
        return [(-1, "cu_q_lens")]
    problems, q_lens = [], np.diff(cu_q_lens)
    table = page_indices.reshape(len(kv_lens), -1)
    for s, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        live = table[s, : max(0, cdiv(kv_len, page_size))]
        if s < i and q_len > 1:
            problems.append((s, "decode"))
        if kv_len < q_len:
            problems.append((s, "kv_len"))
        if kv_len > table.shape[1] * page_size:
            problems.append((s, "room"))
        if any(page not in range(num_pages) for page in live):
            problems.append((s, "page"))
    return problems


# %% tags=["wrong"] refused="those behind ceil(kv_len / page_size) are padding"
def find_problems(
    kv_lens, page_indices, cu_q_lens, distribution, num_tokens, num_pages, page_size
):  # fmt: skip
    i, j, k = distribution
    if not 0 <= i <= j <= k <= len(kv_lens):
        return [(-1, "distribution")]
    q_lens = np.diff(cu_q_lens[: k + 1])
    if cu_q_lens[0] != 0 or (q_lens < 0).any() or cu_q_lens[k] > num_tokens:
        return [(-1, "cu_q_lens")]
    table, problems = page_indices.reshape(len(kv_lens), -1), []
    for s in range(k):
        broken = {
            "decode": s < i and q_lens[s] > 1,
            "kv_len": kv_lens[s] < q_lens[s],
            "room": kv_lens[s] > table.shape[1] * page_size,
            "page": ((table[s] < 0) | (table[s] >= num_pages)).any(),
        }
        problems += [(s, rule) for rule, wrong in broken.items() if wrong]
    return problems


# %% tags=["wrong"] refused="a negative page number passes"
def find_problems(
    kv_lens, page_indices, cu_q_lens, distribution, num_tokens, num_pages, page_size
):  # fmt: skip
    i, j, k = distribution
    if not 0 <= i <= j <= k <= len(kv_lens):
        return [(-1, "distribution")]
    q_lens = np.diff(cu_q_lens[: k + 1])
    if cu_q_lens[0] != 0 or (q_lens < 0).any() or cu_q_lens[k] > num_tokens:
        return [(-1, "cu_q_lens")]
    table, problems = page_indices.reshape(len(kv_lens), -1), []
    for s in range(k):
        live = table[s, : cdiv(kv_lens[s], page_size)]
        broken = {
            "decode": s < i and q_lens[s] > 1,
            "kv_len": kv_lens[s] < q_lens[s],
            "room": kv_lens[s] > table.shape[1] * page_size,
            "page": live.max(initial=0) >= num_pages,
        }
        problems += [(s, rule) for rule, wrong in broken.items() if wrong]
    return problems


# %% tags=["wrong"] refused="only the first problem is reported"
def find_problems(
    kv_lens, page_indices, cu_q_lens, distribution, num_tokens, num_pages, page_size
):  # fmt: skip
    i, j, k = distribution
    if not 0 <= i <= j <= k <= len(kv_lens):
        return [(-1, "distribution")]
    q_lens = np.diff(cu_q_lens[: k + 1])
    if cu_q_lens[0] != 0 or (q_lens < 0).any() or cu_q_lens[k] > num_tokens:
        return [(-1, "cu_q_lens")]
    table = page_indices.reshape(len(kv_lens), -1)
    for s in range(k):
        live = table[s, : cdiv(kv_lens[s], page_size)]
        if s < i and q_lens[s] > 1:
            return [(s, "decode")]
        if kv_lens[s] < q_lens[s]:
            return [(s, "kv_len")]
        if kv_lens[s] > table.shape[1] * page_size:
            return [(s, "room")]
        if ((live < 0) | (live >= num_pages)).any():
            return [(s, "page")]
    return []


# %% tags=["wrong"] refused="is legal wherever it stands"
def find_problems(
    kv_lens, page_indices, cu_q_lens, distribution, num_tokens, num_pages, page_size
):  # fmt: skip
    i, j, k = distribution
    if not 0 <= i <= j <= k <= len(kv_lens):
        return [(-1, "distribution")]
    q_lens = np.diff(cu_q_lens[: k + 1])
    if cu_q_lens[0] != 0 or (q_lens < 0).any() or cu_q_lens[k] > num_tokens:
        return [(-1, "cu_q_lens")]
    table, problems = page_indices.reshape(len(kv_lens), -1), []
    for s in range(k):
        live = table[s, : cdiv(kv_lens[s], page_size)]
        broken = {
            "decode": s < i and q_lens[s] > 1,
            "kv_len": kv_lens[s] <= 0 or kv_lens[s] < q_lens[s],
            "room": kv_lens[s] > table.shape[1] * page_size,
            "page": ((live < 0) | (live >= num_pages)).any(),
        }
        problems += [(s, rule) for rule, wrong in broken.items() if wrong]
    return problems


# %% tags=["wrong"] refused="expected a list of tuples (sequence, rule)"
def find_problems(
    kv_lens, page_indices, cu_q_lens, distribution, num_tokens, num_pages, page_size
):  # fmt: skip
    if kv_lens.min() < 0:
        raise ValueError("kv_lens is negative")
    return True
