# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 7: The whole kernel, exercises
#
# You write the decisions of rung 7: which keys a query block reads, what is fetched next, which
# tiles need a mask, which sequences each kernel computes. In the last exercise you run the whole
# kernel on a batch as a server would. Read the lesson first: `notebooks/07_kernel.ipynb`.
#
# Every exercise is a function to fill in and a check to run. A check starts with a case that you
# can do by hand, stops at the first difference, and says what it recognises.
#
# **Time:** about two hours; 7.2, 7.5 and 7.6 take longest. The checks of 7.5 and 7.6 run a kernel
# in the interpreter, which takes some seconds.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

import rpa
from rpa.interpreter import choose_interpret
from rpa.paging import cdiv, pack_kv
from rpa.ragged import check_call
from rpa.yours import earlier

# %% [markdown]
# ## Exercise 7.1: Which keys does a query block read?
#
# The new tokens of a sequence are cut into blocks of `bq` queries. A block is computed together, so
# it reads all keys that at least one of its queries sees, and no others. Write
# `block_keys(kv_len, q_len, q_block, bq, sliding_window)`: the first position that block
# `q_block` fetches, and one past the last.
#
# - Attention is causal. The last block of a sequence may hold fewer than `bq` queries.
# - With a `sliding_window` a query sees that many keys, its own token among them; `None` means all.
#
# By hand: `kv_len = 10`, `q_len = 6`, `bq = 4`. The new tokens have positions 4 to 9, block 0 holds
# 4 to 7 and reads `(0, 8)`. With a window of 3, position 4 sees 2 to 4, so the block reads `(2,
# 8)`.
#
# **Teaches:** the effective KV length of a query block: this is where a kernel saves half of a
# prefill.

# %% [markdown] tags=["hint"]
# Two queries decide. The first one of the block sees the earliest keys, the last one the latest.

# %% [markdown] tags=["hint"]
# `min` shortens the last block, and `max(..., 0)` keeps the window inside the sequence.

# %% [markdown] tags=["hint"]
# ```python
# first = kv_len - q_len + ...  # position of the block's first query
# num_queries = min(bq, ...)
# kv_start = 0
# if sliding_window is not None:
#     kv_start = max(first - ..., 0)
# return kv_start, first + ...
# ```


# %% tags=["exercise"]
def block_keys(kv_len, q_len, q_block, bq, sliding_window):
    """First position that a query block fetches, and one past the last."""
    ### BEGIN SOLUTION
    first = kv_len - q_len + q_block * bq
    num_queries = min(bq, q_len - q_block * bq)
    kv_start = 0
    if sliding_window is not None:
        kv_start = max(first - sliding_window + 1, 0)
    return kv_start, first + num_queries
    ### END SOLUTION


# %% tags=["check"]
rpa.check("7.1", block_keys)

# %% [markdown]
# What does it save? The keys that are fetched for a fresh prompt of 4,096 tokens, against blocks
# that all read to the end:

# %%
num_blocks = 4096 // 128
read = sum(block_keys(4096, 4096, q, 128, None)[1] for q in range(num_blocks))
print(f"{read:,} keys are fetched, {num_blocks * 4096:,} without this function")

# %% [markdown] tags=["explanation"]
# Causal attention is a triangle, and this function cuts it out in steps of `bq`. It also bounds
# every loop that follows: the number of KV blocks, the copies, the page-table entries. A window
# cuts the other side. There the first query decides, because it sees the earliest key; the later
# queries of the block do not see all that is fetched, and the mask hides the rest.
# `walk.query_block` in `rpa/kernel/` is this function. And since the block's own tokens are inside
# the range, each query block can store them in the cache, window or not: a kernel that leaves the
# store to the *last* block of a sequence loses tokens that this block never reads.


# %% tags=["wrong"] refused="every block reads up to kv_len"
def block_keys(kv_len, q_len, q_block, bq, sliding_window):
    first = kv_len - q_len + q_block * bq
    if sliding_window is None:
        return 0, kv_len
    return max(first - sliding_window + 1, 0), kv_len


# %% tags=["wrong"] refused="the last block is taken for a full one"
def block_keys(kv_len, q_len, q_block, bq, sliding_window):
    first = kv_len - q_len + q_block * bq
    seen = 0 if sliding_window is None else max(first - sliding_window + 1, 0)
    return seen, first + bq


# %% tags=["wrong"] refused="the cached prefix is forgotten"
def block_keys(kv_len, q_len, q_block, bq, sliding_window):
    first = q_block * bq
    seen = 0 if sliding_window is None else max(first - sliding_window + 1, 0)
    return seen, min(first + bq, q_len)


# %% tags=["wrong"] refused="the window of the last query decides"
def block_keys(kv_len, q_len, q_block, bq, sliding_window):
    end = min(kv_len - q_len + (q_block + 1) * bq, kv_len)
    if sliding_window is None:
        return 0, end
    return max(end - sliding_window, 0), end


# %% tags=["wrong"] refused="the window is one key too long"
def block_keys(kv_len, q_len, q_block, bq, sliding_window):
    first = kv_len - q_len + q_block * bq
    seen = 0 if sliding_window is None else max(first - sliding_window, 0)
    return seen, min(first + bq, kv_len)


# %% [markdown]
# ## Exercise 7.2: What is fetched next?
#
# While one step is computed the copies of the next one run, across the ends of query blocks and of
# sequences. So the kernel needs a function that says what comes next. A **step** is one KV block of
# one query block of one sequence. Write `next_step(q_lens, kv_lens, bq, bkv, seq, q_block,
# kv_block)`: the step after `(seq, q_block, kv_block)`, as a tuple of the same three numbers.
#
# - KV blocks have `bkv` tokens, from position 0 on. A query block reads only the keys that it sees:
#   up to its own last token (exercise 7.1, without a window).
# - After the last KV block comes the next query block of the sequence; after the last query block
#   the next sequence. A sequence with `q_len` 0 is idle and is passed over, wherever it stands.
# - After the last step of the batch the answer is `(num_seqs, 0, 0)`.
#
# By hand: `q_lens = [6]`, `kv_lens = [10]`, `bq = 4`, `bkv = 8`. Query block 0 holds positions 4 to
# 7: one KV block. Query block 1 holds 8 and 9: two. The steps are (0, 0, 0), (0, 1, 0), (0, 1, 1).
#
# **Teaches:** a pipeline must never drain, and one idle slot can stop it for ever.

# %% [markdown] tags=["hint"]
# Like an odometer: count up the last wheel; where it is full, set it to 0 and count up the one
# before. Only the last wheel of all, the sequence, may have to move more than once.

# %% [markdown] tags=["hint"]
# `cdiv(a, b)` rounds up. The query block ends at position `kv_len - q_len + min((q_block + 1) * bq,
# q_len)`. A `while` loop passes over idle sequences; ask first whether `seq` is still below
# `len(q_lens)`.

# %% [markdown] tags=["hint"]
# ```python
# kv_end = kv_lens[seq] - q_lens[seq] + min(...)
# if kv_block + 1 < cdiv(kv_end, bkv):
#     return seq, q_block, kv_block + 1
# if q_block + 1 < cdiv(...):
#     return seq, ..., 0
# seq += 1
# while seq < len(q_lens) and ...:
#     seq += 1
# return seq, 0, 0
# ```


# %% tags=["exercise"]
def next_step(q_lens, kv_lens, bq, bkv, seq, q_block, kv_block):
    """The step after (seq, q_block, kv_block); (num_seqs, 0, 0) after the last one."""
    ### BEGIN SOLUTION
    kv_end = kv_lens[seq] - q_lens[seq] + min((q_block + 1) * bq, q_lens[seq])
    if kv_block + 1 < cdiv(kv_end, bkv):
        return seq, q_block, kv_block + 1
    if q_block + 1 < cdiv(q_lens[seq], bq):
        return seq, q_block + 1, 0
    seq += 1
    while seq < len(q_lens) and q_lens[seq] == 0:
        seq += 1
    return seq, 0, 0
    ### END SOLUTION


# %% tags=["check"]
rpa.check("7.2", next_step)

# %% [markdown]
# A whole batch with your function: a decode, two idle slots, a chunk, a decode.

# %%
q_lens, kv_lens = np.array([1, 0, 0, 6, 1]), np.array([20, 9, 0, 10, 5])
step = (0, 0, 0)
while step[0] < len(q_lens):
    print(step, end=" ")
    step = next_step(q_lens, kv_lens, 4, 8, *step)

# %% [markdown] tags=["explanation"]
# Three wheels of an odometer. `walk.next_step` is the same in the words of the chip: no early
# returns, because all of it runs on the scalar core with `jnp.where`, and a `while_loop` for idle
# sequences. Only they need a loop: a sequence that is not idle has at least one query block, and a
# query block at least one KV block, since a token sees itself. A kernel that forgets the loop stops
# at an idle slot: the next copy is never started, and the wait for it never ends. That is a real
# bug of a production kernel, and it hangs the chip, not the program.


# %% tags=["wrong"] refused="an idle slot (q_len 0) is visited"
def next_step(q_lens, kv_lens, bq, bkv, seq, q_block, kv_block):
    kv_end = kv_lens[seq] - q_lens[seq] + min((q_block + 1) * bq, q_lens[seq])
    if kv_block + 1 < cdiv(kv_end, bkv):
        return seq, q_block, kv_block + 1
    if q_block + 1 < cdiv(q_lens[seq], bq):
        return seq, q_block + 1, 0
    return seq + 1, 0, 0


# %% tags=["wrong"] refused="every query block goes on to kv_len"
def next_step(q_lens, kv_lens, bq, bkv, seq, q_block, kv_block):
    if kv_block + 1 < cdiv(kv_lens[seq], bkv):
        return seq, q_block, kv_block + 1
    if q_block + 1 < cdiv(q_lens[seq], bq):
        return seq, q_block + 1, 0
    seq += 1
    while seq < len(q_lens) and q_lens[seq] == 0:
        seq += 1
    return seq, 0, 0


# %% tags=["wrong"] refused="one KV block too many"
def next_step(q_lens, kv_lens, bq, bkv, seq, q_block, kv_block):
    kv_end = kv_lens[seq] - q_lens[seq] + min((q_block + 1) * bq, q_lens[seq])
    if kv_block + 1 <= kv_end // bkv:
        return seq, q_block, kv_block + 1
    if q_block + 1 < cdiv(q_lens[seq], bq):
        return seq, q_block + 1, 0
    seq += 1
    while seq < len(q_lens) and q_lens[seq] == 0:
        seq += 1
    return seq, 0, 0


# %% tags=["wrong"] refused="one query block too many"
def next_step(q_lens, kv_lens, bq, bkv, seq, q_block, kv_block):
    kv_end = kv_lens[seq] - q_lens[seq] + min((q_block + 1) * bq, q_lens[seq])
    if (kv_block + 1) * bkv < kv_end:
        return seq, q_block, kv_block + 1
    if (q_block + 1) * bq <= q_lens[seq]:
        return seq, q_block + 1, 0
    seq += 1
    while seq < len(q_lens) and q_lens[seq] == 0:
        seq += 1
    return seq, 0, 0


# %% tags=["wrong"] refused="a query block ends where it begins"
def next_step(q_lens, kv_lens, bq, bkv, seq, q_block, kv_block):
    kv_end = kv_lens[seq] - q_lens[seq] + min(q_block * bq, q_lens[seq])
    if kv_block + 1 < cdiv(kv_end, bkv):
        return seq, q_block, kv_block + 1
    if q_block + 1 < cdiv(q_lens[seq], bq):
        return seq, q_block + 1, 0
    seq += 1
    while seq < len(q_lens) and q_lens[seq] == 0:
        seq += 1
    return seq, 0, 0


# %% tags=["wrong"] refused="only one idle slot is passed over"
def next_step(q_lens, kv_lens, bq, bkv, seq, q_block, kv_block):
    kv_end = kv_lens[seq] - q_lens[seq] + min((q_block + 1) * bq, q_lens[seq])
    if kv_block + 1 < cdiv(kv_end, bkv):
        return seq, q_block, kv_block + 1
    if q_block + 1 < cdiv(q_lens[seq], bq):
        return seq, q_block + 1, 0
    seq += 1
    if seq < len(q_lens) and q_lens[seq] == 0:
        seq += 1
    return seq, 0, 0


# %% tags=["wrong"] refused="a query block that is not full is left out"
def next_step(q_lens, kv_lens, bq, bkv, seq, q_block, kv_block):
    kv_end = kv_lens[seq] - q_lens[seq] + min((q_block + 1) * bq, q_lens[seq])
    if kv_block + 1 < cdiv(kv_end, bkv):
        return seq, q_block, kv_block + 1
    if q_block + 1 < q_lens[seq] // bq:
        return seq, q_block + 1, 0
    seq += 1
    while seq < len(q_lens) and q_lens[seq] == 0:
        seq += 1
    return seq, 0, 0


# %% tags=["wrong"] refused="the end of the next query block is taken"
def next_step(q_lens, kv_lens, bq, bkv, seq, q_block, kv_block):
    kv_end = kv_lens[seq] - q_lens[seq] + min((q_block + 2) * bq, q_lens[seq])
    if kv_block + 1 < cdiv(kv_end, bkv):
        return seq, q_block, kv_block + 1
    if q_block + 1 < cdiv(q_lens[seq], bq):
        return seq, q_block + 1, 0
    seq += 1
    while seq < len(q_lens) and q_lens[seq] == 0:
        seq += 1
    return seq, 0, 0


# %% [markdown]
# ## Exercise 7.3: Which tiles need a mask?
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
# **Teaches:** the corners of a rectangle decide; nobody has to look at a pair.

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
rpa.check("7.3", tile_kind)

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
# ## Exercise 7.4: Which sequences does each kernel compute?
#
# `distribution` = (i, j, k) says which kernel computes what: sequences [0, i) the decode kernel
# (`q_len` at most 1), [i, j) the one for chunks (`q_len` at most `chunk_prefill_size`, for which it
# was compiled), [j, k) the mixed one (anything). In chapter 3 you sorted a batch. Now the order is
# given: the tokens lie in memory as they are, and nobody will move them.
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
rpa.check("7.4", find_distribution)

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
# ## Exercise 7.5: Run the whole kernel
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
    """One step by rung 7: output [num_tokens, num_q_heads, head_dim] by arrival, and the cache."""
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
rpa.check("7.5", serve_step)

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


# %% [markdown]
# ## Exercise 7.6: Your own kernel for any batch
#
# Decodes, chunks of prompts behind a cached prefix, whole prompts, idle slots, in any mix and any
# order: one kernel. And you have it already. `fused_kernel` of 6.6 does not ask what a column of
# its list of work is; it computes one block of queries after the other. A prompt of 500 tokens is
# 500 / block_q columns of that list, a decode is one with one query, an idle slot has none.
#
# So what is missing is data, computed by JAX before the kernel starts. Write `query_blocks(starts,
# q_lens, kv_lens, num_tokens, block_q)`: cut every sequence into blocks of `block_q` new tokens.
# Its length has to be known when it is traced, so it has room for the most blocks that there can
# be; those that do not exist have `kv_end` 0. Then `run_batch`, as in 6.6, and `ragged_attention`
# with the signature of the ladder, which chooses `block_q`: a whole number of tokens, at most 128
# rows with `group` heads a token, and 1 where all sequences decode.
#
# By hand: `q_lens = [1, 0, 6]`, `kv_lens = [29, 40, 34]`, blocks of 4 queries.
#
# | w | sequence | position | kv_end | row |
# |---|---|---|---|---|
# | 0 | 0 | 28 | 29 | 0 |
# | 1 | 2 | 28 | 32 | 1 |
# | 2 | 2 | 32 | 34 | 5 |
#
# Row 1 ends at key 32, not 34: the last query of the block stands at position 31.
#
# The distribution of the batch is not asked: it says which kernel is made for which sequences, and
# you have one for all. That is what rung 8 does better.
#
# **Teaches:** any batch is a list of blocks of queries; the list is data, and the kernel stays.

# %%
choose_block, list_work, live_lengths, run_work = earlier(
    "choose_block", "list_work", "live_lengths", "run_work"
)

# %% [markdown] tags=["hint"]
# Count the blocks of each sequence, and where they end if all are put in one line. Then every
# column w can find its sequence: it is the first one whose end lies behind w. What it is in its
# sequence is the distance from that sequence's first block.

# %% [markdown] tags=["hint"]
# `jnp.cumsum(num_blocks)` gives the ends; `jnp.searchsorted(ends, w, side="right")` the first end
# behind w, which also passes over sequences without blocks. An array of JAX is indexed by an array:
# `first_new[seqs]` looks up one entry for each column.

# %% [markdown] tags=["hint"]
# ```python
# # query_blocks
# num_blocks = pl.cdiv(q_lens, block_q)
# ends = jnp.cumsum(num_blocks)
# w = jnp.arange(pl.cdiv(num_tokens, block_q) + num_seqs)
# exists = w < ends[-1]
# seqs = jnp.minimum(jnp.searchsorted(ends, w, side="right"), num_seqs - 1)
# offset = (w - (ends - num_blocks)[seqs]) * block_q  # of the block's first token in the sequence
# first_new = ...[seqs]
# kv_end = jnp.where(exists, jnp.minimum(kv_lens[seqs], ...), 0)
# ...
#
# # run_batch
# blocks = query_blocks(*live_lengths(batch, len(queries)), len(queries), block_q)
# work = list_work(*blocks, batch.pages_per_seq, block_tokens)
# ...
#
# # ragged_attention
# block_q = max(1, min(len(queries) // batch.max_num_seqs, 128 // group))
# ```


# %% tags=["exercise"]
def query_blocks(starts, q_lens, kv_lens, num_tokens, block_q):
    """Cut the new tokens of each sequence into blocks of block_q: five i32[num_blocks].

    starts, q_lens, kv_lens: i32[num_seqs], see live_lengths. Returns kv_end, position, first_new,
    row and seqs, as list_work takes them. There is room for as many blocks as num_tokens tokens
    of num_seqs sequences can have; those that do not exist have kv_end 0 and row num_tokens.
    """
    ### BEGIN SOLUTION
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
    ### END SOLUTION


@partial(jax.jit, static_argnames=["block_q", "block_tokens", "interpret"])
def run_batch(
    queries, keys, values, kv_cache, batch, sm_scale, *, block_q, block_tokens, interpret
):
    """Any ragged batch in one call of the kernel; `interpret` only makes jit trace anew."""
    ### BEGIN SOLUTION
    blocks = query_blocks(*live_lengths(batch, len(queries)), len(queries), block_q)
    work = list_work(*blocks, batch.pages_per_seq, block_tokens)
    sizes = (keys.shape[1], block_q, block_tokens)
    new_kv, pages = pack_kv(keys, values), jnp.asarray(batch.page_indices)
    return run_work(queries, new_kv, kv_cache, work, pages, sm_scale, sizes)
    ### END SOLUTION


def ragged_attention(queries, keys, values, kv_cache, batch, *, sm_scale, block_tokens=None):
    """Ragged paged attention of any batch, under the ladder's signature: rung 7, and yours.

    queries: [num_tokens, num_q_heads, head_dim]; keys, values: [num_tokens, num_kv_heads,
    head_dim] in the dtype of the cache; batch: a RaggedBatch. Returns output [num_tokens,
    num_q_heads, head_dim], zeros in rows that no sequence owns, and the new cache.
    """
    check_call(queries, keys, values, kv_cache, batch, sm_scale=sm_scale)
    block_tokens = block_tokens or choose_block(kv_cache, batch.pages_per_seq)
    ### BEGIN SOLUTION
    group = queries.shape[1] // keys.shape[1]
    # As many tokens as a sequence has, so that decodes are not filled up; 128 rows at most.
    block_q = max(1, min(len(queries) // batch.max_num_seqs, 128 // group))
    sizes = {"block_q": block_q, "block_tokens": block_tokens}
    interpret = choose_interpret(None)
    return run_batch(queries, keys, values, kv_cache, batch, sm_scale, **sizes, interpret=interpret)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("7.6", ragged_attention)

# %% [markdown] tags=["explanation"]
# A kernel of some 250 lines, with all that went before it, that takes any ragged batch: yours. Each
# block of queries reads the keys that it sees, and stores its own tokens; new tokens of its
# sequence that an earlier block stores come from `new_ref` all the same, so the order of blocks is
# free.
#
# What it costs: a block of queries that is not full computes rows for nothing, so a batch of one
# long prompt and many decodes pays for each decode a whole block. K and V are read once for each
# block of queries. And every word of K is taken apart by shifts. Rung 8 is the same kernel with
# these three mended, and some more: read it against yours.
#
# Try it: `python -m rpa lab schedule --kernel my_rpa.py:ragged_attention --chip v5e --case decode
# --against rpa` shows its bundles next to those of the production kernel, and `lab traffic`, `lab
# compile` and `lab predict` take it the same way.

# %% tags=["wrong"] refused="a block of queries reads the keys of the whole sequence"
# instead of
#     kv_end = jnp.where(exists, jnp.minimum(kv_lens[seqs], first_new + offset + block_q), 0)
# write
#     kv_end = jnp.where(exists, kv_lens[seqs], 0)

# %% tags=["wrong"] refused="positions begin at 0: the cached prefix is forgotten"
# instead of
#     first_new = (kv_lens - q_lens)[seqs]
# write
#     first_new = (kv_lens * 0)[seqs]

# %% tags=["wrong"] refused="all blocks of a sequence are its first one"
# instead of
#     offset = (w - (ends - num_blocks)[seqs]) * block_q
# write
#     offset = (w - w) * block_q

# %% tags=["wrong"] refused="blocks that do not exist have keys"
# instead of
#     kv_end = jnp.where(exists, jnp.minimum(kv_lens[seqs], first_new + offset + block_q), 0)
# write
#     kv_end = jnp.minimum(kv_lens[seqs], first_new + offset + block_q)

# %% tags=["wrong"] refused="a sequence without new tokens is given a block"
# instead of
#     num_seqs, num_blocks = len(q_lens), pl.cdiv(q_lens, block_q)
# write
#     num_seqs, num_blocks = len(q_lens), jnp.maximum(1, pl.cdiv(q_lens, block_q))

# %% tags=["wrong"] refused="the last block of a sequence is left out where it is not full"
# instead of
#     num_seqs, num_blocks = len(q_lens), pl.cdiv(q_lens, block_q)
# write
#     num_seqs, num_blocks = len(q_lens), q_lens // block_q

# %% tags=["wrong"] refused="keys and values are swapped"
# instead of
#     new_kv, pages = pack_kv(keys, values), jnp.asarray(batch.page_indices)
# write
#     new_kv, pages = pack_kv(values, keys), jnp.asarray(batch.page_indices)
