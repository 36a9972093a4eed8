# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 7: One kernel for any batch, exercises
#
# You write the two decisions that make one kernel enough for any batch, which keys a query block
# reads and what comes after a step; and then the kernel itself, from what is in `my_rpa.py`. Read
# the lesson first: `notebooks/07_plain.ipynb`.
#
# Every exercise is a function to fill in and a check to run. A check starts with a case that you
# can do by hand, stops at the first difference, and says what it recognises.
#
# **Time:** about 35 minutes for the first two, an hour for 7.3, your own kernel, whose check runs
# it in the interpreter and takes some seconds, and 15 minutes for a bug hunt.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

import rpa
from rpa.figures import exercises as pictures
from rpa.figures.kernel import batch_walk
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

# %%
pictures.mask_tiles(
    [*range(4, 10)], 10, 4, 10, window=3,
    words="Six queries at positions 4 to 9 in blocks of four, with a window of three keys. Block 0 "
    "sees keys 2 to 7, block 1 keys 6 to 9.",
    title="a window of 3: block 0 reads keys 2 to 7",
)  # fmt: skip

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
# `traversal.query_block` in `rpa/kernel/` is this function. And since the block's own tokens are
# inside the range, each query block can store them in the cache, window or not: a kernel that
# leaves the store to the *last* block of a sequence loses tokens that this block never reads.


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

# %%
steps = [(0, 0, 0, "masked"), (0, 1, 0, "interior"), (0, 1, 1, "masked")]
batch_walk(steps, [2], ["6 new of 10"], title="The three steps of the example")

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
# Three wheels of an odometer. `traversal.advance` is the same in the words of the chip: no early
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
# ## Exercise 7.3: Your own kernel for any batch
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
# rows with `group` heads per token, and 1 where all sequences decode.
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
pictures.strips(
    [("sequence 0", "27 | +28"), ("block w", "_ *0"),
     ("sequence 2", "27 | +28 +29 +30 +31 | +32 +33"), ("block w", "_ *1 *1 *1 *1 *2 *2")],
    "Sequence 0 has one new token at position 28, sequence 2 six from 28 on. Blocks of four "
    "queries: w = 0 is sequence 0, w = 1 the first four of sequence 2, w = 2 its last two.",
    legend={"": "cached", "+": "new", "*": "its w"},
)  # fmt: skip

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
    """Any ragged batch in one call of the kernel; `interpret` only makes jit trace again."""
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
rpa.check("7.3", ragged_attention)

# %% [markdown]
# SmolLM2 with *your* attention: this time your kernel reads the prompts, too. It attends in one
# layer of thirty, because the interpreter is slow; on a TPU it could be all of them.

# %%
from rpa.models.speak import speak

speak(jax.jit(ragged_attention, static_argnames="sm_scale"), own_layers=1, num_tokens=6)

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


# %% [markdown]
# ## Exercise 7.4: Right numbers, too many bytes
#
# Another list of work, for a kernel with a sliding window: a tuple `(seq, q_block, begin, end)` for
# each block of queries, which reads keys `begin` to `end - 1` of its sequence. Every answer of the
# kernel was right in its author's tests: prompts of 6 tokens, blocks of 4, a window as long as the
# prompt. Two of its **three bugs** never show in an output, because the mask hides what they read.
# The third one loses keys:


# %%
def broken(q_lens, kv_lens, block_q, window):
    work = []
    for seq, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        for q_block in range(q_len // block_q + 1):
            first = kv_len - q_len + q_block * block_q
            end = first + block_q
            begin = max(end - window, 0)
            work.append((seq, q_block, begin, end))
    return work


# %% [markdown]
# Write `fixed`: a block for each `block_q` new tokens that exist, the keys that at least one of its
# queries sees, and no others. A query sees `window` keys, its own among them.
#
# By hand: `q_lens = [4]`, `kv_lens = [9]`, blocks of 4, a window of 3. One block, queries at
# positions 5 to 8. The first query sees keys 3 to 5, the last one 6 to 8: `[(0, 0, 3, 9)]`. The
# list above says `(0, 0, 6, 9)` and `(0, 1, 10, 13)`.
#
# **Teaches:** an output says nothing about work that the mask hides. Count what is read.

# %%
pictures.mask_tiles(
    [*range(5, 9)], 9, 4, 9, window=3,
    words="Four queries at positions 5 to 8 with a window of three keys: keys 3 to 8 are seen.",
    title="one block of queries: it reads keys 3 to 8",
)  # fmt: skip

# %% [markdown] tags=["hint"]
# Take each line with one question. How many blocks has a sequence of 4 new tokens, of 6, of none?
# Where does the last block end? Which query of a block sees the earliest key?

# %% [markdown] tags=["hint"]
# `cdiv(a, b)` rounds up, and is 0 for 0. `min(..., kv_len)` ends the last block. The first query
# decides where the block begins, the last one where it ends.

# %% [markdown] tags=["hint"]
# ```python
# for q_block in range(cdiv(...)):
#     first = kv_len - q_len + q_block * block_q
#     end = min(...)
#     begin = max(first - ..., 0)
# ```


# %% tags=["exercise"]
def fixed(q_lens, kv_lens, block_q, window):
    """The work of a batch: list of (seq, q_block, begin, end), keys begin to end - 1."""
    ### BEGIN SOLUTION
    work = []
    for seq, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        for q_block in range(cdiv(q_len, block_q)):
            first = kv_len - q_len + q_block * block_q
            end = min(first + block_q, kv_len)
            begin = max(first - window + 1, 0)
            work.append((seq, q_block, begin, end))
    return work
    ### END SOLUTION


# %% tags=["check"]
rpa.check("7.4", fixed)

# %% [markdown]
# What did the bugs cost? Keys that both lists read, for a step of a server:

# %%
step = [1] * 30 + [512, 0], [2000] * 30 + [2048, 900]
for name, function in {"broken": broken, "fixed": fixed}.items():
    read = sum(max(end - begin, 0) for *_, begin, end in function(*step, 128, 1024))
    print(f"{name}: {read:,} keys")

# %% [markdown] tags=["explanation"]
# `q_len // block_q + 1` is right unless the blocks are full, and gives an idle slot a block; `end`
# reached past the last token; and the window was measured from the last query, so the first one
# lost `block_q - 1` keys. A window as long as the prompt hides the third bug, since `begin` is 0
# then. The first two are what an output cannot show, and what `rpa lab traffic` does: its bytes
# over the least are 1.00, or something is read that no query sees.


# %% tags=["wrong"] refused="a full last block is followed by an empty one"
# instead of
#     for q_block in range(cdiv(q_len, block_q)):
# write
#     for q_block in range(q_len // block_q + 1):

# %% tags=["wrong"] refused="the last block goes on behind the last token"
# instead of
#     end = min(first + block_q, kv_len)
# write
#     end = first + block_q

# %% tags=["wrong"] refused="the window is measured from the last query of the block"
# instead of
#     begin = max(first - window + 1, 0)
# write
#     begin = max(end - window, 0)

# %% tags=["wrong"] refused="a block of queries that is not full is left out"
# instead of
#     for q_block in range(cdiv(q_len, block_q)):
# write
#     for q_block in range(q_len // block_q):

# %% tags=["wrong"] refused="the window is one key too long"
# instead of
#     begin = max(first - window + 1, 0)
# write
#     begin = max(first - window, 0)
