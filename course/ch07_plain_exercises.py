# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 7: One kernel for any batch, exercises
#
# You write the two decisions that make one kernel enough for any batch: which keys a query block
# reads, and what comes after a step. Read the lesson first: `notebooks/07_plain.ipynb`.
#
# Every exercise is a function to fill in and a check to run. A check starts with a case that you
# can do by hand, stops at the first difference, and says what it recognises.
#
# **Time:** about 35 minutes.

# %%
import numpy as np

import rpa
from rpa.paging import cdiv

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
