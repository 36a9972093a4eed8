# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 10: Blocks, pipelines, predictions, exercises
#
# You choose blocks under a VMEM budget, and predict the MBU of a batch. Read the lesson first:
# `notebooks/10_tuning.ipynb`.
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
# ## Exercise 10.1: Choose the blocks
#
# A chunk of `q_len` new tokens, `kv_len` in all, goes through the mixed kernel in query blocks of
# `bq` tokens and KV blocks of `bkv`. Larger blocks mean fewer steps and less to read, and more
# VMEM. This is what a pair (bq, bkv) costs, for Llama 3 8B in bfloat16, in round numbers of a v5e:
#
# | VMEM | bytes |
# |---|---|
# | KV block, twice | 4,096 per token of `bkv` |
# | queries, and output, each twice | 8,192 per token of `bq` |
# | state of the softmax | 49,152 per token of `bq` |
# | scores and weights of a tile | 24 a pair of tokens, `bq * bkv` |
#
# | cycles | |
# |---|---|
# | HBM | bytes / 500; every step reads a whole KV block; queries and output once |
# | products | `bq * bkv / 8` a step |
# | ends of a step | 300, in which nothing overlaps |
#
# HBM and products overlap, the ends come on top. A **step** is one KV block of one query block, and
# a query block visits the KV blocks up to its own last token: it ends at
# `kv_len - q_len + min(end, q_len)`, `end` being `bq`, `2 * bq`, ...
#
# Write `choose_blocks(candidates, q_len, kv_len, vmem_budget_bytes)`: of the pairs `(bq, bkv)` in
# `candidates` that fit, the one that takes the fewest cycles, as `(bq, bkv)`; of two alike the one
# that comes first. One of them always fits.
#
# By hand: `q_len` 128 of 1,024, the pairs (128, 512) and (16, 128), 8 MiB. The first needs 15.5
# MiB, the second 2.3 MiB: `(16, 128)`.
#
# **Teaches:** a budget decides what is possible, a model of time what is good. The largest block is
# rarely the answer.

# %% [markdown] tags=["hint"]
# Three small sums: the VMEM of a pair, the steps of a pair, and from the steps its cycles. Then
# filter by the first and take the minimum of the last.

# %% [markdown] tags=["hint"]
# `min(pairs, key=function)` takes the first of the best. `cdiv(a, b)` divides and rounds up.
# `range(bq, q_len + bq, bq)` goes over the ends of the query blocks.

# %% [markdown] tags=["hint"]
# ```python
# def fits(bq, bkv):
#     return 2 * (4096 * bkv + 2 * 8192 * bq) + ... <= vmem_budget_bytes
#
# def cycles(bq, bkv):
#     ends = [kv_len - q_len + min(end, q_len) for end in range(bq, q_len + bq, bq)]
#     steps = sum(cdiv(end, bkv) for end in ends)
#     hbm_bytes = steps * bkv * 4096 + 2 * q_len * 8192
#     return max(<HBM>, <products>) + <ends>
#
# return min((pair for pair in candidates if fits(*pair)), key=lambda pair: cycles(*pair))
# ```


# %% tags=["exercise"]
def choose_blocks(candidates, q_len, kv_len, vmem_budget_bytes):
    """The pair (bq, bkv) that fits in VMEM and takes the fewest cycles."""
    ### BEGIN SOLUTION

    def fits(bq, bkv):
        buffers = 2 * (4096 * bkv + 2 * 8192 * bq)
        return buffers + 49_152 * bq + 24 * bq * bkv <= vmem_budget_bytes

    def cycles(bq, bkv):
        ends = [kv_len - q_len + min(end, q_len) for end in range(bq, q_len + bq, bq)]
        steps = sum(cdiv(end, bkv) for end in ends)
        hbm_bytes = steps * bkv * 4096 + 2 * q_len * 8192
        return max(hbm_bytes / 500, steps * bq * bkv / 8) + 300 * steps

    return min((pair for pair in candidates if fits(*pair)), key=lambda pair: cycles(*pair))
    ### END SOLUTION


# %% tags=["check"]
rpa.check("10.1", choose_blocks)

# %% [markdown]
# Turn the budget up and see what changes, for a chunk of 512 of 4,096 tokens:

# %%
pairs = [(bq, bkv) for bq in (16, 32, 64, 128, 256) for bkv in (128, 256, 512, 1024, 2048)]
for mib in (3, 6, 12, 16, 24, 48, 96):
    print(f"{mib:3} MiB: (bq, bkv) = {choose_blocks(pairs, 512, 4096, mib * 2**20)}")

# %% [markdown] tags=["explanation"]
# Below about 10 MiB the chunk waits for HBM: with few query rows per block, K and V are read so
# often that the bytes decide, and every MiB goes into `bq`. From 128 rows on the products take
# longer than the bytes, and more VMEM buys only fewer ends of steps. It buys little, and a large
# `bkv` loses again what it saves, because on the diagonal and at the end of the sequence whole
# blocks are read and multiplied for a few tokens. Rung 8 comes to the same answer from the other
# side: `blocks.default_block_sizes` starts with what is good, and `shrink_to_fit` halves until it
# fits.


# %% tags=["wrong"] refused="VMEM is not asked"
def choose_blocks(candidates, q_len, kv_len, vmem_budget_bytes):
    def cycles(bq, bkv):
        ends = [kv_len - q_len + min(end, q_len) for end in range(bq, q_len + bq, bq)]
        steps = sum(cdiv(end, bkv) for end in ends)
        hbm_bytes = steps * bkv * 4096 + 2 * q_len * 8192
        return max(hbm_bytes / 500, steps * bq * bkv / 8) + 300 * steps

    return min(candidates, key=lambda pair: cycles(*pair))


# %% tags=["wrong"] refused="every buffer is there once"
def choose_blocks(candidates, q_len, kv_len, vmem_budget_bytes):
    def fits(bq, bkv):
        buffers = 4096 * bkv + 2 * 8192 * bq
        return buffers + 49_152 * bq + 24 * bq * bkv <= vmem_budget_bytes

    def cycles(bq, bkv):
        ends = [kv_len - q_len + min(end, q_len) for end in range(bq, q_len + bq, bq)]
        steps = sum(cdiv(end, bkv) for end in ends)
        hbm_bytes = steps * bkv * 4096 + 2 * q_len * 8192
        return max(hbm_bytes / 500, steps * bq * bkv / 8) + 300 * steps

    return min((pair for pair in candidates if fits(*pair)), key=lambda pair: cycles(*pair))


# %% tags=["wrong"] refused="the pair that fills VMEM most is taken"
def choose_blocks(candidates, q_len, kv_len, vmem_budget_bytes):
    def vmem_bytes(bq, bkv):
        return 2 * (4096 * bkv + 2 * 8192 * bq) + 49_152 * bq + 24 * bq * bkv

    fitting = [pair for pair in candidates if vmem_bytes(*pair) <= vmem_budget_bytes]
    return max(fitting, key=lambda pair: vmem_bytes(*pair))


# %% tags=["wrong"] refused="every query block reads up to kv_len"
def choose_blocks(candidates, q_len, kv_len, vmem_budget_bytes):
    def fits(bq, bkv):
        buffers = 2 * (4096 * bkv + 2 * 8192 * bq)
        return buffers + 49_152 * bq + 24 * bq * bkv <= vmem_budget_bytes

    def cycles(bq, bkv):
        steps = cdiv(q_len, bq) * cdiv(kv_len, bkv)
        hbm_bytes = steps * bkv * 4096 + 2 * q_len * 8192
        return max(hbm_bytes / 500, steps * bq * bkv / 8) + 300 * steps

    return min((pair for pair in candidates if fits(*pair)), key=lambda pair: cycles(*pair))


# %% tags=["wrong"] refused="K and V are read once, for all query blocks together"
def choose_blocks(candidates, q_len, kv_len, vmem_budget_bytes):
    def fits(bq, bkv):
        buffers = 2 * (4096 * bkv + 2 * 8192 * bq)
        return buffers + 49_152 * bq + 24 * bq * bkv <= vmem_budget_bytes

    def cycles(bq, bkv):
        ends = [kv_len - q_len + min(end, q_len) for end in range(bq, q_len + bq, bq)]
        steps = sum(cdiv(end, bkv) for end in ends)
        hbm_bytes = kv_len * 4096 + 2 * q_len * 8192
        return max(hbm_bytes / 500, steps * bq * bkv / 8) + 300 * steps

    return min((pair for pair in candidates if fits(*pair)), key=lambda pair: cycles(*pair))


# %% [markdown]
# ## Exercise 10.2: Predict MBU
#
# A decode kernel fetches KV blocks into two buffers and computes them, one after the other, across
# the ends of sequences. Copying takes `copy_cycles` a token, computing takes `compute_cycles` a
# block, however many tokens are in it.
#
# - Copies follow each other. A copy can start when the one before has ended **and** its buffer is
#   free: the block before the last has been computed.
# - A block is computed when it has arrived and the one before it has been computed.
# - Blocks hold `block_tokens` tokens, the last one of a sequence what is left.
#
# Write `predict_mbu(kv_lens, block_tokens, copy_cycles, compute_cycles)`: the memory bandwidth
# utilisation, that is the part of the time, from the first copy to the end of the last computation,
# in which HBM would have delivered all tokens at its peak.
#
# By hand: one sequence of 20 tokens, blocks of 10, 1 cycle per token, 5 per block. Copies end at 10
# and 20, computations at 15 and 25. 20 cycles of copying in 25: 0.8.
#
# **Teaches:** where the last 20 % of the bandwidth go: the first copy, the last computation, and
# blocks too short to compute behind.

# %%
from rpa.figures import optimise as pictures

pictures.two_lanes([(0, 10), (10, 20)], [(10, 15), (20, 25)])  # the case by hand

# %% [markdown] tags=["hint"]
# Make a list of the tokens of all blocks first. Then walk through it with two clocks: when each
# copy ends, and when each computation ends.

# %% [markdown] tags=["hint"]
# `range(0, kv_len, block_tokens)` gives the first tokens of the blocks, `min(block_tokens, kv_len -
# first)` how many each has. With `copied` and `computed` as lists, `computed[n - 2]` is when the
# buffer of block n is free again, from n = 2 on.

# %% [markdown] tags=["hint"]
# ```python
# tokens = [min(...) for kv_len in kv_lens.tolist() for first in range(0, kv_len, block_tokens)]
# copied, computed = [0, 0], [0, 0]
# for size in tokens:
#     start = max(copied[-1], computed[-2])
#     copied.append(...)
#     computed.append(max(copied[-1], computed[-1]) + ...)
# return sum(tokens) * copy_cycles / computed[-1]
# ```


# %% tags=["exercise"]
def predict_mbu(kv_lens, block_tokens, copy_cycles, compute_cycles):
    """The part of the time in which HBM is at its peak, between 0 and 1."""
    ### BEGIN SOLUTION
    tokens = [
        min(block_tokens, kv_len - first)
        for kv_len in kv_lens.tolist()
        for first in range(0, kv_len, block_tokens)
    ]
    copied, computed = [0, 0], [0, 0]
    for size in tokens:
        start = max(copied[-1], computed[-2])
        copied.append(start + size * copy_cycles)
        computed.append(max(copied[-1], computed[-1]) + compute_cycles)
    return sum(tokens) * copy_cycles / computed[-1]
    ### END SOLUTION


# %% tags=["check"]
rpa.check("10.2", predict_mbu)

# %% [markdown]
# Now put in numbers of real chips. HBM needs 7.49 cycles per token of Llama 3 8B on a v5e and 2.44
# on a TPU7x; a block of 1,024 tokens takes some 1,700 cycles on either (end of the lesson).

# %%
for name, kv_lens in {"128 of 4,096": [4096] * 128, "256 of 512": [512] * 256}.items():
    mbu = {
        chip: predict_mbu(np.array(kv_lens), 1024, copy_cycles, 1700)
        for chip, copy_cycles in {"v5e": 7.49, "tpu7x": 2.44}.items()
    }
    print(f"{name}: v5e {mbu['v5e']:.0%}, TPU7x {mbu['tpu7x']:.0%} (predicted)")

# %% [markdown] tags=["explanation"]
# Two clocks and two waits are the whole double buffer. As long as a block is copied more slowly
# than it is computed, only the first copy and the last computation are lost, and a long batch comes
# near 1. On a TPU7x a block of 512 tokens arrives in 1,250 cycles and is computed in 1,700: then
# HBM waits for the core, and MBU is their ratio. The real kernel is better there, because it takes
# two sequences a turn and only the products that a block needs: when that came, half of HBM's
# bandwidth became nearly all of it (`docs/ablations.md`). The lab's `predict_batch` does what you
# did, with the executed schedule in place of a constant and every single copy on the queue.


# %% tags=["wrong"] refused="copies and computations take turns"
def predict_mbu(kv_lens, block_tokens, copy_cycles, compute_cycles):
    blocks = sum(cdiv(kv_len, block_tokens) for kv_len in kv_lens.tolist())
    copies = int(kv_lens.sum()) * copy_cycles
    return copies / (copies + blocks * compute_cycles)


# %% tags=["wrong"] refused="the longer of all copies and all computations is taken"
def predict_mbu(kv_lens, block_tokens, copy_cycles, compute_cycles):
    blocks = sum(cdiv(kv_len, block_tokens) for kv_len in kv_lens.tolist())
    copies = int(kv_lens.sum()) * copy_cycles
    return copies / max(copies, blocks * compute_cycles)


# %% tags=["wrong"] refused="the copies never wait"
def predict_mbu(kv_lens, block_tokens, copy_cycles, compute_cycles):
    copied = computed = 0
    for kv_len in kv_lens.tolist():
        for first in range(0, kv_len, block_tokens):
            copied += min(block_tokens, kv_len - first) * copy_cycles
            computed = max(copied, computed) + compute_cycles
    return int(kv_lens.sum()) * copy_cycles / computed


# %% tags=["wrong"] refused="the last block of a sequence is copied whole"
def predict_mbu(kv_lens, block_tokens, copy_cycles, compute_cycles):
    copied, computed = [0, 0], [0, 0]
    for kv_len in kv_lens.tolist():
        for _ in range(0, kv_len, block_tokens):
            copied.append(max(copied[-1], computed[-2]) + block_tokens * copy_cycles)
            computed.append(max(copied[-1], computed[-1]) + compute_cycles)
    return int(kv_lens.sum()) * copy_cycles / computed[-1]


# %% tags=["wrong"] refused="the pipeline runs empty between sequences"
def predict_mbu(kv_lens, block_tokens, copy_cycles, compute_cycles):
    time = 0
    for kv_len in kv_lens.tolist():
        copied, computed = [0, 0], [0, 0]
        for first in range(0, kv_len, block_tokens):
            size = min(block_tokens, kv_len - first)
            copied.append(max(copied[-1], computed[-2]) + size * copy_cycles)
            computed.append(max(copied[-1], computed[-1]) + compute_cycles)
        time += computed[-1]
    return int(kv_lens.sum()) * copy_cycles / time
