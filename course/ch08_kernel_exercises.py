# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 8: The optimized kernel, exercises
#
# You write two more decisions of the kernel: which tiles need a mask, which sequences each kernel
# computes. In the last exercise you run the whole kernel on a batch as a server would. Read the
# lesson first: `notebooks/08_kernel.ipynb`.
#
# Every exercise is a function to fill in and a check to run. A check starts with a case that you
# can do by hand, stops at the first difference, and says what it recognises.
#
# **Time:** about 55 minutes; 8.3 takes longest. Its check runs the kernel in the interpreter, which
# takes some seconds.

# %%
import numpy as np

import rpa

# %% [markdown]
# ## Exercise 8.1: Which tiles need a mask?
#
# A mask costs a comparison and a choice for every score, and most tiles do not need one. A **tile**
# is `bq_c` queries from position `q_position` on, and `bkv_c` keys from `kv_position` on. Write
# `tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window)`. It returns
#
# - `"skip"`: no query of the tile sees any key of it;
# - `"interior"`: every query sees every key, no mask is needed;
# - `"masked"`: everything else.
#
# A query sees a key that is not later than itself, and less than `sliding_window` positions back
# (`None`: any number).
#
# By hand, four queries from 8 on: with keys 0 to 3 interior, with keys 8 to 11 masked (the
# diagonal), with keys 16 to 19 skip.
#
# **Teaches:** the corners of a rectangle decide; single pairs need no look.
# %%
from rpa.figures import kernel as pictures

tiles = [(0, 0, 0, "interior"), (0, 0, 1, "interior"), (0, 0, 2, "masked")]  # keys 0, 4, 8 to ...
pictures.batch_walk(tiles, [5], ["queries 8 to 11"], title="KV blocks of four keys")

# %% [markdown] tags=["hint"]
# Which pair of the tile is the first to become visible, and which is the last? For the causal
# condition these are two corners: the last query with the first key, the first query with the last
# key. For the window it is the other way round.

# %% [markdown] tags=["hint"]
# Look at distances, `query - key`. In a tile they run without gaps from the smallest (first query,
# last key) to the largest (last query, first key). A pair is visible if its distance is at least 0
# and less than the window. `float("inf")` stands in for no window.

# %% [markdown] tags=["hint"]
# ```python
# window = float("inf") if sliding_window is None else sliding_window
# smallest = q_position - (kv_position + bkv_c - 1)
# largest = ...
# if largest < 0 or ...:
#     return "skip"
# return "interior" if smallest >= ... and largest < ... else "masked"
# ```


# %% tags=["exercise"]
def tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window):
    """What the mask does to a tile of scores: "skip", "interior" or "masked"."""
    ### BEGIN SOLUTION
    window = float("inf") if sliding_window is None else sliding_window
    smallest = q_position - (kv_position + bkv_c - 1)  # distances, query minus key
    largest = q_position + bq_c - 1 - kv_position
    if largest < 0 or smallest >= window:
        return "skip"
    return "interior" if smallest >= 0 and largest < window else "masked"
    ### END SOLUTION


# %% tags=["check"]
rpa.check("8.1", tile_kind)

# %% [markdown]
# How many tiles of a prompt of 4,096 tokens need a mask, in tiles of 128 by 512?

# %%
starts = [(q, k) for q in range(0, 4096, 128) for k in range(0, 4096, 512)]
kinds = [tile_kind(q, 128, k, 512, None) for q, k in starts]
print({kind: kinds.count(kind) for kind in ("skip", "interior", "masked")})

# %% [markdown] tags=["explanation"]
# A pair is visible if its distance is at least 0 and below the window. The distances of a rectangle
# run from `smallest` to `largest` without gaps, so two comparisons with each bound decide for all
# pairs: no overlap with [0, window) is a skip, lying inside of it is interior. And the stale rows
# after the last token of a sequence? They are later than every query, so the causal condition hides
# them, and a tile with such a row is never interior. (Hidden is not harmless: its V must still be
# zeros, since 0 times NaN is NaN.) Without causality the kernel has to ask for them; `_Area` in
# `rpa/kernel/loop.py` does.


# %% tags=["wrong"] refused="a token does not see itself"
def tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window):
    q = np.arange(q_position, q_position + bq_c)[:, None]
    k = np.arange(kv_position, kv_position + bkv_c)[None, :]
    seen = k < q
    if sliding_window is not None:
        seen &= q - k < sliding_window
    return "interior" if seen.all() else "masked" if seen.any() else "skip"


# %% tags=["wrong"] refused="the first query decides what is skipped"
def tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window):
    window = float("inf") if sliding_window is None else sliding_window
    q_last, kv_last = q_position + bq_c - 1, kv_position + bkv_c - 1
    if kv_position > q_position or q_position - kv_last >= window:
        return "skip"
    return "interior" if kv_last <= q_position and q_last - kv_position < window else "masked"


# %% tags=["wrong"] refused="the last query decides what needs no mask"
def tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window):
    window = float("inf") if sliding_window is None else sliding_window
    q_last, kv_last = q_position + bq_c - 1, kv_position + bkv_c - 1
    if kv_position > q_last or q_position - kv_last >= window:
        return "skip"
    return "interior" if kv_last <= q_last and q_last - kv_position < window else "masked"


# %% tags=["wrong"] refused="the window is not thought of"
def tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window):
    if kv_position > q_position + bq_c - 1:
        return "skip"
    return "interior" if kv_position + bkv_c - 1 <= q_position else "masked"


# %% tags=["wrong"] refused="every tile that is computed is masked"
def tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window):
    window = float("inf") if sliding_window is None else sliding_window
    kv_last = kv_position + bkv_c - 1
    seen = kv_position <= q_position + bq_c - 1 and q_position - kv_last < window
    return "masked" if seen else "skip"


# %% [markdown]
# ## Exercise 8.2: Which sequences does each kernel compute?
#
# `distribution` = (i, j, k) says which kernel computes what: sequences [0, i) the decode kernel
# (`q_len` at most 1), [i, j) the one for chunks (`q_len` at most `chunk_prefill_size`, for which it
# was compiled), [j, k) the mixed one (anything). In chapter 3 you sorted a batch. Now the order is
# given: the tokens lie in memory as they are, and they stay there.
#
# Write `find_distribution(q_lens, chunk_prefill_size)`: the i32[3] array that gives the decode
# kernel as many sequences as it may have, and then the chunk kernel as many as it may have. With
# `chunk_prefill_size=None` there is no kernel for chunks.
#
# By hand: `q_lens = [1, 4, 4, 7, 1]` and chunks of 4. One decode is in front, so i = 1; then two
# chunks, j = 3; then a long prompt, and what comes after it, the decode too, is mixed: k = 5.
#
# **Teaches:** the ranges are a promise about neighbours; each kernel trusts it without looking.

# %% [markdown] tags=["hint"]
# Each range goes on as long as its condition holds without a gap. The first sequence that breaks it
# ends the range, whatever comes after.

# %% [markdown] tags=["hint"]
# A `while` loop that counts up; or `np.logical_and.accumulate(condition).sum()`, the number of
# leading True. An idle slot (`q_len` 0) is legal everywhere.

# %% [markdown] tags=["hint"]
# ```python
# i = 0
# while i < len(q_lens) and q_lens[i] <= ...:
#     i += 1
# j = i
# while chunk_prefill_size is not None and ...:
#     j += 1
# return np.array([i, j, ...], np.int32)
# ```


# %% tags=["exercise"]
def find_distribution(q_lens, chunk_prefill_size):
    """The ends (i, j, k) of the decode, chunk and mixed ranges of a batch as it is, i32[3]."""
    ### BEGIN SOLUTION
    i = 0
    while i < len(q_lens) and q_lens[i] <= 1:
        i += 1
    j = i
    while chunk_prefill_size is not None and j < len(q_lens) and q_lens[j] <= chunk_prefill_size:
        j += 1
    return np.array([i, j, len(q_lens)], np.int32)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("8.2", find_distribution)

# %% [markdown] tags=["explanation"]
# Two runs of neighbours from the front. The decode kernel has room for one query a sequence and no
# loop over query blocks; given a longer sequence it would compute a part of it. So a decode that
# stands after a prompt costs the price of the mixed kernel, and a scheduler that cares sorts. The
# chunk range is bounded by "at most": a kernel for chunks of 4 can do 2, or 1; it computes the same
# rows, some of them for nothing. Always correct, and slow, is (0, 0, k): everything is mixed.


# %% tags=["wrong"] refused="the three numbers count"
def find_distribution(q_lens, chunk_prefill_size):
    chunk = chunk_prefill_size or 1
    i = int(np.logical_and.accumulate(q_lens <= 1).sum())
    j = int(np.logical_and.accumulate(q_lens <= chunk).sum())
    return np.array([i, j - i, len(q_lens) - j], np.int32)


# %% tags=["wrong"] refused="all decodes are counted, wherever they stand"
def find_distribution(q_lens, chunk_prefill_size):
    i = (q_lens <= 1).sum()
    j = (q_lens <= (chunk_prefill_size or 1)).sum()
    return np.array([i, j, len(q_lens)], np.int32)


# %% tags=["wrong"] refused="an idle slot ends the decode range"
def find_distribution(q_lens, chunk_prefill_size):
    i = int(np.logical_and.accumulate(q_lens == 1).sum())
    j = i + int(np.logical_and.accumulate(q_lens[i:] <= (chunk_prefill_size or 0)).sum())
    return np.array([i, j, len(q_lens)], np.int32)


# %% tags=["wrong"] refused="only full chunks are in the second range"
def find_distribution(q_lens, chunk_prefill_size):
    i = int(np.logical_and.accumulate(q_lens <= 1).sum())
    j = i
    while j < len(q_lens) and q_lens[j] == chunk_prefill_size:
        j += 1
    return np.array([i, j, len(q_lens)], np.int32)


# %% tags=["wrong"] refused="raises IndexError"
def find_distribution(q_lens, chunk_prefill_size):
    i = 0
    while q_lens[i] <= 1:
        i += 1
    j = i
    while chunk_prefill_size is not None and j < len(q_lens) and q_lens[j] <= chunk_prefill_size:
        j += 1
    return np.array([i, j, len(q_lens)], np.int32)


# %% tags=["wrong"] refused="dtype float32, expected int32"
def find_distribution(q_lens, chunk_prefill_size):
    i = np.logical_and.accumulate(q_lens <= 1).sum()
    j = np.logical_and.accumulate(q_lens <= (chunk_prefill_size or 1)).sum()
    return np.array([i, j, len(q_lens)], np.float32)


# %% [markdown]
# ## Exercise 8.3: Run the whole kernel
#
# A server's step. Sequences stand in the order in which they **arrived**: `q_lens`, `kv_lens`
# i32[num_seqs] and `page_table` i32[num_seqs, pages_per_seq]; `queries`, `keys`, `values` hold
# their new tokens side by side in the same order. Write `serve_step(queries, keys, values,
# kv_cache, q_lens, kv_lens, page_table)`: run `rpa.ragged_paged_attention` on it, and return the
# output **in the order of arrival** and the new cache.
#
# - The kernel wants the decodes in front; `rpa.RaggedBatch.from_lengths` puts the sequences in
#   order and says in which. The tokens have to follow, and the output has to come back.
# - Scores are scaled by `head_dim ** -0.5`; the kernel's default is 1, for models that scale
#   before.
# - The caller keeps its cache: `donate=False`.
#
# `kv_lens` includes the new tokens, as always. All arrays but the cache are NumPy; the two cases of
# the check have the same shapes, so that the kernel is compiled once.
#
# **Teaches:** everything around the kernel, which is where servers go wrong.

# %% [markdown] tags=["hint"]
# Make a list of rows: which row of the arrival stands in row r of the ordered batch? With it, one
# indexing brings the tokens into order. Coming back is its inverse.

# %% [markdown] tags=["hint"]
# `RaggedBatch.from_lengths(q_lens, kv_lens, page_table)` returns `(batch, order)`: sequence s of
# the batch is arrival `order[s]`. The rows of arrival a are `ends[a] - q_lens[a]` up to `ends[a]`,
# with `ends = np.cumsum(q_lens)`. `np.argsort(rows)` is the inverse of the permutation `rows`.

# %% [markdown] tags=["hint"]
# ```python
# batch, order = rpa.RaggedBatch.from_lengths(...)
# ends = np.cumsum(q_lens)
# rows = np.concatenate([np.arange(ends[a] - q_lens[a], ends[a]) for a in order])
# output, kv_cache = rpa.ragged_paged_attention(
#     queries[rows], ..., ..., kv_cache,
#     batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution,
#     sm_scale=..., donate=False,
# )
# return output[...], kv_cache
# ```


# %% tags=["exercise"]
def serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    """One step by rung 8: output [num_tokens, num_q_heads, head_dim] by arrival, and the cache."""
    ### BEGIN SOLUTION
    batch, order = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, page_table)
    ends = np.cumsum(q_lens)
    rows = np.concatenate([np.arange(ends[a] - q_lens[a], ends[a]) for a in order])
    output, kv_cache = rpa.ragged_paged_attention(
        queries[rows],
        keys[rows],
        values[rows],
        kv_cache,
        batch.kv_lens,
        batch.page_indices,
        batch.cu_q_lens,
        batch.distribution,
        sm_scale=queries.shape[-1] ** -0.5,
        donate=False,
    )
    return output[np.argsort(rows)], kv_cache
    ### END SOLUTION


# %% tags=["check"]
rpa.check("8.3", serve_step)

# %% [markdown] tags=["explanation"]
# One permutation, there and back. `queries[rows]` puts the tokens in the order of the batch, and
# `np.argsort(rows)` is the row at which each arrival's token stands there. Another right answer
# skips the order: build the four arrays by hand with `distribution = (0, 0, num_seqs)`, and the
# mixed kernel takes everything as it comes, at its own price. Note what is not here: no padding, no
# mask, no loop over sequences, no store. All of that has moved into the kernel, and you have
# written each piece of it.


# %% tags=["wrong"] refused="sm_scale is left at its default"
def serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    batch, order = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, page_table)
    ends = np.cumsum(q_lens)
    rows = np.concatenate([np.arange(ends[a] - q_lens[a], ends[a]) for a in order])
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    tokens = (queries[rows], keys[rows], values[rows])
    output, kv_cache = rpa.ragged_paged_attention(*tokens, kv_cache, *metadata, donate=False)
    return output[np.argsort(rows)], kv_cache


# %% tags=["wrong"] refused="neither the tokens were put in order nor the output put back"
def serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    batch, _ = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, page_table)
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    return rpa.ragged_paged_attention(
        queries, keys, values, kv_cache, *metadata, sm_scale=64**-0.5, donate=False
    )


# %% tags=["wrong"] refused="the output is in the order of the batch"
def serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    batch, order = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, page_table)
    ends = np.cumsum(q_lens)
    rows = np.concatenate([np.arange(ends[a] - q_lens[a], ends[a]) for a in order])
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    tokens = (queries[rows], keys[rows], values[rows])
    return rpa.ragged_paged_attention(*tokens, kv_cache, *metadata, sm_scale=64**-0.5, donate=False)


# %% tags=["wrong"] refused="output[rows] orders once more"
def serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    batch, order = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, page_table)
    ends = np.cumsum(q_lens)
    rows = np.concatenate([np.arange(ends[a] - q_lens[a], ends[a]) for a in order])
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    tokens = (queries[rows], keys[rows], values[rows])
    output, kv_cache = rpa.ragged_paged_attention(
        *tokens, kv_cache, *metadata, sm_scale=64**-0.5, donate=False
    )
    return output[rows], kv_cache


# %% tags=["wrong"] refused="keys and values are swapped"
def serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    batch, order = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, page_table)
    ends = np.cumsum(q_lens)
    rows = np.concatenate([np.arange(ends[a] - q_lens[a], ends[a]) for a in order])
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    tokens = (queries[rows], values[rows], keys[rows])
    output, kv_cache = rpa.ragged_paged_attention(
        *tokens, kv_cache, *metadata, sm_scale=64**-0.5, donate=False
    )
    return output[np.argsort(rows)], kv_cache


# %% tags=["wrong"] refused="gives the caller's cache away"
def serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    batch, order = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, page_table)
    ends = np.cumsum(q_lens)
    rows = np.concatenate([np.arange(ends[a] - q_lens[a], ends[a]) for a in order])
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    tokens = (queries[rows], keys[rows], values[rows])
    output, kv_cache = rpa.ragged_paged_attention(*tokens, kv_cache, *metadata, sm_scale=64**-0.5)
    return output[np.argsort(rows)], kv_cache


# %% tags=["wrong"] refused="the page table is passed as it arrived"
def serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    batch, order = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, page_table)
    ends = np.cumsum(q_lens)
    rows = np.concatenate([np.arange(ends[a] - q_lens[a], ends[a]) for a in order])
    metadata = (batch.kv_lens, page_table.reshape(-1), batch.cu_q_lens, batch.distribution)
    tokens = (queries[rows], keys[rows], values[rows])
    output, kv_cache = rpa.ragged_paged_attention(
        *tokens, kv_cache, *metadata, sm_scale=64**-0.5, donate=False
    )
    return output[np.argsort(rows)], kv_cache
