# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 7: One kernel for any batch
#
# **Time:** 15 minutes to read and run, about 35 minutes for the exercises.
#
# **You need:** chapters 3, 4 and 6: ragged batches, the online softmax, and the fused update. No
# TPU.
#
# **You will be able to:** say which keys a block of queries reads; write down the work of a ragged
# batch as a list; and compute the batch by going through the list once.
#
# Rung 6 had room for a few queries per sequence. A prompt brings thousands. This chapter cuts them
# into blocks, and makes the order of all blocks of all sequences one array.

# %%
import jax.numpy as jnp
import numpy as np

import rpa
from rpa import dense, ragged, tiled
from rpa.figures import kernel as pictures
from rpa.paging import cdiv, get_kv_cache_shape

# %% [markdown]
# ## 1. Which keys does a query block read?
#
# The new tokens of a sequence are cut into **query blocks** of `bq` tokens, and each block goes
# over the keys on its own. It needs the keys that at least one of its queries sees. A chunk of 12
# new tokens after 28 cached ones, `bq = 8`: block 0 holds positions 28 to 35, so it reads keys 0 to
# 35. Block 1 holds 36 to 39 and reads all 40.
#
# A batch for the whole chapter: two decodes, an idle slot, a chunk, a fresh prompt.

# %%
names = ["A decode", "B decode", "(idle)", "C chunk", "D prompt"]
q_lens, kv_lens = np.array([1, 1, 0, 12, 20]), np.array([29, 12, 9, 40, 20])
table = np.arange(25, dtype=np.int32).reshape(5, 5)[:, ::-1]  # pages of 8, in any order
batch, _ = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, table)
BQ, BKV = 8, 16


# %%
def positions_of(seq, q_block):
    """Positions of the query tokens of a block."""
    first, end = q_block * BQ, min((q_block + 1) * BQ, int(q_lens[seq]))
    return int(kv_lens[seq] - q_lens[seq]) + np.arange(first, end)


for q_block in range(2):
    positions = positions_of(3, q_block)
    seen = dense.visible(positions, np.arange(kv_lens[3])).any(axis=0)
    print(f"query block {q_block}: positions {positions[0]} to {positions[-1]}, "
          f"keys 0 to {np.flatnonzero(seen)[-1]}")  # fmt: skip
assert seen.all()

# %% [markdown]
# **Takeaway.** A query block reads up to its own last token and not a token more. Exercise 7.1.

# %% [markdown]
# ## 2. What is the work of a batch?
#
# A **step** is one KV block of one query block of one sequence. D by hand: 20 new tokens, nothing
# cached, `bq = 8`, `bkv = 16`. Three query blocks see 8, 16 and 20 keys, so they need one KV block,
# one, and two: four steps. An idle slot has none. All steps of the batch, in order:


# %%
def steps_of_block(seq, q_block):
    """The steps of a query block: (seq, q_block, kv_block), and what the mask does there."""
    positions, steps = positions_of(seq, q_block), []
    for kv_block in range(cdiv(int(positions[-1]) + 1, BKV)):
        keys = kv_block * BKV + np.arange(BKV)
        kind = "interior" if dense.visible(positions, keys).all() else "masked"
        steps.append((seq, q_block, kv_block, kind))
    return steps


# %%
blocks = [(seq, q) for seq in range(5) for q in range(cdiv(int(q_lens[seq]), BQ))]
steps = [step for block in blocks for step in steps_of_block(*block)]
work = np.array([step[:3] for step in steps])
print(work.T)
assert len(work) == 2 + 1 + 0 + (3 + 3) + (1 + 1 + 2)

# %%
pictures.batch_walk(steps, cdiv(kv_lens, BKV).tolist(), names)

# %% [markdown]
# **Takeaway.** The order of work is data: an array that can be printed and checked before anything
# runs. Exercise 7.2 computes it step by step.

# %% [markdown]
# ## 3. Is the list enough?
#
# Go through it once, on the host: one line per step, with the softmax of chapter 4, and nothing
# else. First the truth in float64; rung 3 stores the new tokens:

# %%
rng = np.random.default_rng(7)
num_tokens = int(q_lens.sum())
queries = rng.standard_normal((num_tokens, 2, 128)).astype(np.float32)
keys, values = rng.standard_normal((2, num_tokens, 1, 128)).astype(np.float32)
cache = rng.standard_normal(get_kv_cache_shape(25, 8, 1, 128, np.float32)).astype(np.float32)
arrays = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
_, cache = ragged.ref_ragged_paged_attention(
    queries, keys, values, cache, *arrays, sm_scale=128**-0.5
)
truth = ragged.oracle_ragged(queries, cache, batch, 1, sm_scale=128**-0.5)


# %%
def kv_of(seq):
    """K and V of a sequence, each [kv_len, head_dim], through its pages."""
    tokens = np.asarray(cache)[table[seq]].reshape(-1, *cache.shape[2:])[: kv_lens[seq]]
    return tokens[:, 0, 0], tokens[:, 1, 0]


def attend(state, seq, q_block, kv_block):
    """One step: the softmax state of a query block takes in a block of keys."""
    positions, span = positions_of(seq, q_block), slice(kv_block * BKV, (kv_block + 1) * BKV)
    rows = int(batch.cu_q_lens[seq]) + q_block * BQ + np.arange(len(positions))
    k, v = (x[span] for x in kv_of(seq))
    scores = queries[rows].reshape(-1, 128) @ k.T * 128**-0.5  # [tokens * heads, keys]
    seen = dense.visible(positions, span.start + np.arange(len(k))).repeat(2, axis=0)
    return tiled.softmax_step(state, jnp.where(seen, scores, tiled.MASK_VALUE), jnp.asarray(v))


# %%
output = np.zeros_like(queries)
for seq, q_block in blocks:
    rows = int(batch.cu_q_lens[seq]) + q_block * BQ + np.arange(len(positions_of(seq, q_block)))
    state = tiled.empty_state(2 * len(rows), 128)
    for step in work[(work[:, 0] == seq) & (work[:, 1] == q_block)].tolist():
        state = attend(state, *step)
    output[rows] = tiled.finish(state, jnp.float32).reshape(-1, 2, 128)
print(f"worst token and head: {dense.scaled_error(output, truth):.1e}")
assert dense.scaled_error(output, truth) < 8e-6

# %% [markdown]
# **Takeaway.** Decode, chunk and prompt are one computation: the steps of a list, each with its
# rows and its keys.

# %% [markdown]
# ## What is still slow
#
# Everything: this is a Python loop. But its work is counted already:

# %%
pairs = sum(len(positions_of(seq, q)) * BKV for seq, q, _ in work.tolist())
square = int((q_lens * kv_lens).sum())
print(f"{len(work)} steps compute {pairs:,} scores per head; every query with every key of its "
      f"sequence would be {square:,}")  # fmt: skip

# %% [markdown]
# **Chapter 8** reads the optimized kernel, in which each step is looked up, fetched and computed
# some iterations apart.
#
# **Before you go on:** the exercises of this chapter are in `exercises/07_plain.ipynb`.
