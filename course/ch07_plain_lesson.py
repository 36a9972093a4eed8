# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 7: One kernel for any batch
#
# **Time:** 40 minutes to read and run, about 35 minutes for the exercises.
#
# **You need:** chapters 3 to 6: ragged batches, the online softmax, DMAs and the double buffer, the
# fused update. No TPU.
#
# **You will be able to:** write the work of a ragged batch as an array, and check it before
# anything runs; say what happens to a page, a new token and a query block on their way through the
# kernel; read all of ragged paged attention in a quarter of an hour; and count, from the array
# alone, what it reads.
#
# Rung 6 decodes: each sequence gets the same few rows of queries. **Rung 7** takes any mix. It has
# one new idea, and it is not in the kernel: the work is a list, made beforehand.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from rpa import RaggedBatch, dense, interpreter, plain, ragged, tiled
from rpa.figures import kernel as pictures
from rpa.figures import show_source
from rpa.paging import cdiv, get_kv_cache_shape, kv_token_bytes

# %% [markdown]
# ## 1. Which keys does a query block read?
#
# A prompt brings thousands of queries, a decode brings one. So queries are cut into **query
# blocks**: up to `block_q` new tokens of one sequence, side by side. A decode is one query block, a
# prompt is many, an idle slot is none. Each query block goes over the keys on its own, and needs
# those that at least one of its queries sees.
#
# By hand: 12 new tokens after 28 cached ones, `block_q = 8`. Query block 0 holds positions 28 to
# 35, so it reads keys 0 to 35. Query block 1 holds 36 to 39 and reads all 40.
#
# A batch for the whole chapter: two decodes, an idle slot, a chunk, a fresh prompt.

# %%
names = ["A decode", "B decode", "(idle)", "C chunk", "D prompt"]
q_lens, kv_lens = np.array([1, 1, 0, 12, 20]), np.array([29, 12, 9, 40, 20])
page_table = np.arange(25, dtype=np.int32).reshape(5, 5)[:, ::-1]  # pages of 8, in any order
batch, _ = RaggedBatch.from_lengths(q_lens, kv_lens, page_table)
num_tokens, BLOCK_Q, BLOCK_KV = int(q_lens.sum()), 8, 16

# %%
for first, last in [(28, 35), (36, 39)]:
    seen = dense.visible(np.arange(first, last + 1), np.arange(40)).any(axis=0)
    print(f"queries {first} to {last} see keys 0 to {np.flatnonzero(seen)[-1]}")
assert seen.all()

# %% [markdown]
# The end of that range is the **effective KV length** of the query block. For a fresh prompt it
# cuts the triangle out of the square: half of the reading and half of the computing.
#
# **Takeaway.** A query block reads up to its own last token and not a token more. Exercise 7.1.

# %% [markdown]
# ## 2. What is the work of a batch?
#
# Which query blocks there are, and what each reads, is known before the kernel starts. So it is an
# array, made in plain JAX:

# %%
options = plain.Options(block_q=BLOCK_Q, block_kv=BLOCK_KV, group=2, pages_per_seq=5)
work = plain.work_list(batch, num_tokens, options)
print(plain.table(work))

# %% [markdown]
# Read a row as a sentence. The fourth: "queries 10 to 13 belong to sequence 3 and stand at its
# positions 36 to 39; together they see keys 0 to 39, of which 0 to 27 are in the cache". Sequence 2
# is idle: it has no row.
#
# Data can be checked. Two things must hold: each new token is in exactly one query block, and each
# query block reads what the mask of chapter 1 says:

# %%
num_blocks = int(np.count_nonzero(work.q_len))
blocks = [plain.WorkList(*(int(field[b]) for field in work)) for b in range(num_blocks)]

rows = np.concatenate([np.arange(w.q_row, w.q_row + w.q_len) for w in blocks])
assert (rows == np.arange(num_tokens)).all()
for w in blocks:
    queries_at = np.arange(w.position, w.position + w.q_len)
    seen = dense.visible(queries_at, np.arange(kv_lens[w.seq])).any(axis=0)
    assert (np.flatnonzero(seen) == np.arange(w.kv_start, w.kv_end)).all()

# %% [markdown]
# The keys of a query block come in **KV blocks** of `block_kv` tokens. D by hand: three query
# blocks see 8, 16 and 20 keys, so in blocks of 16 they need one, one and two. All of it, numbered
# in the order of the kernel:


# %%
def kind_of(w, kv_block):
    """Whether every query of a query block sees every key of a KV block."""
    keys = w.kv_start + kv_block * BLOCK_KV + np.arange(BLOCK_KV)
    seen = dense.visible(np.arange(w.position, w.position + w.q_len), keys)
    return "interior" if seen.all() else "masked"


steps = []
for w in blocks:
    q_block = (w.position - (kv_lens[w.seq] - q_lens[w.seq])) // BLOCK_Q
    for kv_block in range(cdiv(w.kv_end - w.kv_start, BLOCK_KV)):
        steps.append((w.seq, int(q_block), kv_block, kind_of(w, kv_block)))
pictures.batch_walk(steps, cdiv(kv_lens, BLOCK_KV).tolist(), names)

# %% [markdown]
# A sliding window cuts the other side: now `kv_start` counts. With a window of 8:

# %%
windowed = plain.work_list(batch, num_tokens, options._replace(sliding_window=8))
print(plain.table(windowed))
assert int(windowed.kv_start[0]) == 28 - 7

# %% [markdown]
# How is it made? One cumulative sum says where the query blocks of each sequence begin; a
# comparison with it says which sequence query block b belongs to. It is the search of chapter 3,
# for blocks instead of tokens:

# %%
show_source(plain.work_list)

# %% [markdown]
# **Takeaway.** The order of work is data: an array that is printed and checked before anything
# runs. Prompts, chunks and decodes differ in their rows, not in code.

# %% [markdown]
# ## 3. Is the list enough?
#
# Go through it once on the host, with the softmax of chapter 4 and nothing else. First the truth in
# float64; rung 3 stores the new tokens:

# %%
rng = np.random.default_rng(7)
shapes = [(num_tokens, heads, 128) for heads in (4, 2, 2)]
queries, keys, values = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
kv_cache = rng.standard_normal(get_kv_cache_shape(25, 8, 2, 128, np.float32)).astype(np.float32)
arrays = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
_, right_cache = ragged.ref_ragged_paged_attention(
    queries, keys, values, kv_cache, *arrays, sm_scale=128**-0.5
)
truth = ragged.oracle_ragged(queries, right_cache, batch, 2, sm_scale=128**-0.5)


# %%
def attend(w, head):
    """One query block and one KV head on the host, KV block after KV block."""
    tokens = np.asarray(right_cache)[page_table[w.seq]].reshape(40, 4, 128)
    q = queries[w.q_row : w.q_row + w.q_len, 2 * head : 2 * head + 2].reshape(-1, 128)
    state = tiled.empty_state(2 * w.q_len, 128)
    for start in range(w.kv_start, w.kv_end, BLOCK_KV):
        at = np.arange(start, min(start + BLOCK_KV, w.kv_end))  # positions of the keys
        seen = dense.visible(np.arange(w.position, w.position + w.q_len), at).repeat(2, axis=0)
        scores = q @ tokens[at, 2 * head].T * 128**-0.5
        scores = jnp.where(seen, scores, tiled.MASK_VALUE)
        state = tiled.softmax_step(state, scores, jnp.asarray(tokens[at, 2 * head + 1]))
    return tiled.finish(state, jnp.float32).reshape(w.q_len, 2, 128)


# %%
output = np.zeros_like(queries)
for w in blocks:
    for head in range(2):
        output[w.q_row : w.q_row + w.q_len, 2 * head : 2 * head + 2] = attend(w, head)
print(f"worst token and head: {dense.scaled_error(output, truth):.1e}")
assert dense.scaled_error(output, truth) < 8e-6

# %% [markdown]
# That is all of ragged paged attention, in three loops: query blocks, KV blocks, heads. What is
# left for the kernel is to have each block in VMEM before it is needed.
#
# **Takeaway.** A row of the list and the page table are all that a query block needs to know.

# %% [markdown]
# ## 4. What does the kernel do with a row?
#
# The grid has one step for each row of the list. Here is a step; you know its middle from rung 6.

# %%
show_source(plain.attend_query_block)

# %% [markdown]
# Line by line: the queries have come with the first KV block. Then, for each KV block, *start*
# first: wait until the other buffer has sent off its new tokens, and start the copies of the
# **next** KV block into it. Then *wait* for this one, store its new tokens, and compute on it.
# After the last KV block the output leaves, while the next query block computes.
#
# Which KV block is the next one? In rung 6 the kernel had to look for the next sequence that is not
# idle. Here it is the next row:

# %%
show_source(plain.successor)

# %% [markdown]
# The list ends with a row of zeros. `start_copies` starts nothing for it, and the last query block
# knows by it that it is the last.
#
# **Takeaway.** The grid goes over the list, the loop over KV blocks, and copies run one KV block
# ahead, across the ends of query blocks and of sequences.

# %% [markdown]
# ## 5. Where do the keys come from, and who stores the new ones?
#
# C again: 28 cached tokens, 12 new ones, KV blocks of 16. The KV block that begins at 16 has cached
# tokens up to 27 and new ones from 28 on. So it is filled from two places: its pages, and `new_kv`:

# %%
show_source(plain.start_copies)

# %% [markdown]
# That block is filled twice, once for each query block of C. Who stores its new tokens? One rule:
# **each query block stores its own tokens**, when they are in its KV buffer. By hand: query block 0
# has the queries 28 to 35, so it stores tokens 28 to 31 out of the KV block at 16 and 32 to 35 out
# of the one at 32. Query block 1 stores 36 to 39.

# %%
show_source(plain.start_stores)

# %% [markdown]
# No token can be missed: a query sees its own token, so its query block reads the KV block that the
# token is in, window or not. And nothing reads a new token from the cache in this call: every query
# block takes it from `new_kv`. Run the kernel in the interpreter and record its copies:

# %%
from rpa.figures.timeline import gantt
from rpa.lab.copies.timeline import page_labels, record_dmas

HOST = jax.devices("cpu")[0]  # where the TPU interpreter runs, also next to a TPU
sizes = {"sm_scale": 128**-0.5, "block_q": BLOCK_Q, "block_kv": BLOCK_KV}
step = (queries, keys, values, kv_cache, batch)
fields = {f"refs[{i}]": name for i, name in enumerate(plain.Refs._fields)}
fields |= {"refs[6]": "kv_cache"}  # cache_before: the same memory
with jax.default_device(HOST), record_dmas(fields) as timeline:
    results = plain.attention(*step, **sizes, interpret=interpreter.params())
    output, new_cache = jax.block_until_ready(results)

# %%
token_bytes = kv_token_bytes(kv_cache.shape, np.float32)
routes = {}
for copy in timeline.copies:
    route = f"{copy.source.buffer.name} to {copy.target.buffer.name}"
    routes.setdefault(route, []).append(copy.num_bytes)
for route, sizes_bytes in routes.items():
    print(f"{route:28} {len(sizes_bytes):3} copies, {sum(sizes_bytes):8,} bytes")

# %% [markdown]
# The list predicts the sums. A query block reads the cached tokens before `kv_end` from pages and
# the others from `new_kv`; and the new tokens are stored once:

# %%
cached = sum(min(w.kv_end, w.num_cached) - w.kv_start for w in blocks)
new = sum(max(w.kv_end - w.num_cached, 0) for w in blocks)
stored = sum(c.num_bytes for c in timeline.copies if c.target.buffer.name == "kv_cache")
into_vmem = [c for c in timeline.copies if c.target.buffer.name == "buffers"]
print(f"{cached} cached and {new} new tokens are read, {stored // token_bytes} are stored")
assert sum(c.num_bytes for c in into_vmem) == (cached + new) * token_bytes
assert stored == num_tokens * token_bytes and not timeline.never_awaited

# %% [markdown]
# **Takeaway.** A page is read as far as it holds cached tokens, once for each query block that sees
# it. A new token is read from `new_kv` by all and stored once, by its own query block.

# %% [markdown]
# ## 6. What runs ahead of what?
#
# The same record as a picture: the two KV buffers and the core. While a block is computed (orange)
# the next one arrives in the other buffer, also where a query block or a sequence ends. Copies into
# HBM are the stores.

# %%
kv_rows = sorted({c.row for c in into_vmem})
labels = page_labels(batch.page_indices, 5, page_size=8, block_tokens=BLOCK_KV, cache="kv_cache")
gantt(timeline, rows=kv_rows, label=labels, title="Rung 7: two decodes, a chunk, a prompt")

# %% [markdown]
# **Takeaway.** One double buffer for the whole batch. It is filled before the first query block,
# and empty only after the last.

# %% [markdown]
# ## 7. What is computed?
#
# The heart is short, because you have written all of it: scores, mask, the online softmax. Each of
# these is done for all heads before the next, so that no head waits for its own last result.

# %%
show_source(plain.attend_kv_block)
show_source(plain.visible)

# %% [markdown]
# One thing is new. `max_q_len` is a number that the compiler must know: for how many queries the
# tiles have rows. A decode in tiles for `block_q` queries would compute padding. So `_kernel` has
# the query block twice, with room for one query and for `block_q`, and the row of the list chooses:

# %%
show_source(plain._kernel)

# %% [markdown]
# What does that save? Llama 3 8B has 4 query heads per KV head, so with `block_q = 128` a decode
# would have 512 rows in each product. It has 4.
#
# **Takeaway.** Shapes are static, so a kernel for any batch has one body for each size that
# matters: two are enough to be correct and not wasteful.

# %% [markdown]
# ## 8. Is it right?
#
# The output against float64, the cache against rung 3, bit by bit:

# %%
print(f"worst token and head: {dense.scaled_error(output, truth):.1e}")
assert dense.scaled_error(output, truth) < 8e-6
assert (np.asarray(new_cache) == np.asarray(right_cache)).all()

# %% [markdown]
# The other mode of the interpreter copies at once and looks for data races. And an option that
# changes the list, a window, changes nothing else:

# %%
with jax.default_device(HOST):
    eager = interpreter.params(dma_execution_mode="eager", detect_races=True)
    output, _ = plain.attention(*step, **sizes, sliding_window=8, interpret=eager)
truth = ragged.oracle_ragged(
    queries, right_cache, batch, 2, sm_scale=128**-0.5, sliding_window=8
)  # fmt: skip
print(f"with a window: {dense.scaled_error(output, truth):.1e}, "
      f"data race: {interpreter.races_found()}")  # fmt: skip
assert dense.scaled_error(output, truth) < 8e-6 and not interpreter.races_found()

# %% [markdown]
# Now read the whole file, `rpa/plain.py`, from its first line. There is nothing in it that this
# chapter has not shown or that you have not written: a few functions for the options (a soft cap, a
# sink, scales) and the call.
#
# **Takeaway.** Any mix of sequences, every option, one kernel that is read in a quarter of an hour.

# %% [markdown]
# ## What is still slow
#
# Count first what it moves at a real size: Llama 3 8B, 15 decodes and a chunk of 512, all with
# 4,096 tokens. `dry_run` runs the kernel's own copies and leaves the arithmetic out
# (`rpa.lab.copies.traffic`); the list says the same:

# %%
from rpa.lab.batches import make_batch
from rpa.lab.bench.comparison import LAYER
from rpa.lab.copies import traffic

large = make_batch([(1, 4096)] * 15 + [(512, 4096)], page_size=128)
counted = traffic.count(plain.attention, large, LAYER).kinds["KV read"].num_bytes
work = plain.work_list(large, 15 + 512, plain.Options(block_q=128))
by_list = 4096 * int((np.minimum(work.kv_end, work.num_cached) - work.kv_start).sum())
least = 4096 * int(large.kv_lens.sum() - (15 + 512))  # a token has 4,096 bytes of K and V
for what, num_bytes in {"counted": counted, "by the list": by_list, "the least": least}.items():
    print(f"{what:12} {num_bytes / 1e6:6.1f} MB of cached K and V")
assert counted == by_list

# %% [markdown]
# The decodes read every token once. The chunk reads its cached tokens once for each of its four
# query blocks. That costs little: a prefill waits for the matrix units, not for HBM. So bytes are
# nearly as they should be. What is left is time:
#
# - **every KV block is masked**, although only the diagonal, a window or the end of a sequence
#   needs it;
# - **K and V are read by value**, which reads like a slice and is a transpose in the registers;
# - **one KV block ahead** is not far: a copy takes a microsecond or two to arrive, and a short
#   sequence is computed in less;
# - **one query per tile**: 4 rows in registers that have 8, and nothing else to do while they wait;
# - **the page table lies in SMEM**, which has 1 MiB: 64 sequences of 131,072 tokens in pages of 16
#   need twice as much.
#
# **Chapter 8** reads the kernel in which each of these is solved, against this one.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/07_plain.ipynb).
#
# **Read more:**
#
# - [Ragged Paged Attention](https://arxiv.org/abs/2604.15464): the production kernel that this
#   one agrees with.
# - [Splash
#   attention](https://github.com/jax-ml/jax/tree/main/jax/experimental/pallas/ops/tpu/splash_attention),
#   `splash_attention_mask_info.py`: another kernel whose order of work is data.
