# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 4: Tiled attention
#
# **Time:** 50 minutes to read and run, about 90 minutes for the exercises.
#
# **You need:** chapter 1 (softmax, causal mask, roofline) and the words HBM, VMEM and MXU of
# chapter
# 0. No TPU, and no Pallas yet.
#
# **You will be able to:** compute a softmax in one pass over its row; read and write a Pallas
# kernel with a grid and `BlockSpec`s; say what a block takes in VMEM, and why 8 x 128 matters;
# explain flash attention line by line; and skip what a causal mask hides.
#
# This is **rung 4** of the ladder, the first real kernel. It knows nothing of pages or ragged
# batches: one sequence, dense K and V. All that is new is *where the numbers are* while they are
# computed.

# %%
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from rpa import chips, dense, tiled
from rpa.figures import show_source
from rpa.figures import tiled as pictures
from rpa.interpreter import choose_interpret
from rpa.lab.schedule import NoSchedule
from rpa.paging import cdiv

# %% [markdown]
# ## 1. Does a softmax need its whole row?
#
# Chapter 3 ended with notes: the scores of a whole row are written down, because the softmax wants
# their maximum and their sum before it can weigh the first value. Does it have to? One query, four
# keys, and the keys come in two blocks:

# %%
scores = np.float32([1, 3, 2, 5])
values = np.float32([10, 20, 30, 40])

weights = np.exp(scores - scores.max())
print("all at once:", weights @ values / weights.sum())

# %% [markdown]
# Block 0 has the scores 1 and 3. Its maximum is 3, so take that for now: weights
# $e^{1-3} = 0.135$ and $e^{3-3} = 1$, sum 1.135, mixture $0.135 \cdot 10 + 1 \cdot 20 = 21.35$. Not
# divided yet.

# %%
m = 3.0
w = np.exp(scores[:2] - m)
total, mixture = w.sum(), w @ values[:2]
print(f"after block 0: max {m}, sum {total:.3f}, mixture {mixture:.2f}")

# %% [markdown]
# Block 1 brings 2 and 5. Now 5 is the largest, and what we kept was computed against 3. But
# $e^{s - 3} \cdot e^{3 - 5} = e^{s - 5}$: **one factor** turns all of it into what 5 would have
# given. Shrink what is kept by $e^{-2} = 0.135$, then add the new weights.

# %%
new_m = 5.0
rescale = np.exp(m - new_m)
w = np.exp(scores[2:] - new_m)
new_total, new_mixture = total * rescale + w.sum(), mixture * rescale + w @ values[2:]
print(f"after block 1: max {new_m}, sum {new_total:.3f}, mixture {new_mixture:.2f}, "
      f"output {new_mixture / new_total:.4f}")  # fmt: skip
assert np.isclose(new_mixture / new_total, weights @ values / weights.sum())

# %%
pictures.online_softmax(scores, [(2, m, total), (4, new_m, new_total)])

# %% [markdown]
# The same number, and the first block was gone when the second one came. This is the **online
# softmax** (Milakov and Gimelshein, 2018).
#
# **Takeaway.** A running maximum, a running sum, a running mixture, and one factor when the maximum
# grows: a softmax needs one pass, and keeps three things for each row whatever its length.

# %% [markdown]
# ## 2. The step, for a matrix of rows
#
# In a kernel, many queries are rows of one matrix, and the state is a column each for maximum and
# sum, and a row of `head_dim` numbers for the mixture (`acc`). Here is the step that every kernel
# of this ladder takes, up to rung 6 unchanged:

# %%
show_source(tiled.softmax_step)

# %% [markdown]
# Walk over 1,000 keys in blocks of 128 and compare with the softmax over all of them. In which
# order do the blocks have to come? Try: it makes no difference.

# %%
rng = np.random.default_rng(0)
q, k, v = (jnp.float32(rng.standard_normal((n, 64))) for n in (8, 1000, 1000))
row_scores = q @ k.T / 8  # [8, 1000]

state = tiled.empty_state(rows=8, head_dim=64)
for start in rng.permutation(np.arange(0, 1000, 128)):
    block = slice(start, start + 128)
    state = tiled.softmax_step(state, row_scores[:, block], v[block])
output = tiled.finish(state, jnp.float32)
assert jnp.allclose(output, jax.nn.softmax(row_scores) @ v, atol=1e-5)

# %% [markdown]
# **Takeaway.** Any order, any block size, one answer. So a block may be chosen by what is good for
# the machine.

# %% [markdown]
# ## 3. What is good for the machine? A block's journey
#
# No unit computes on HBM. A block of K is copied to VMEM by a **DMA** (an engine that moves bytes
# while the core does something else), loaded from there into vector registers, and pushed through
# the matrix unit. How long is each leg, for 512 tokens of one head in bfloat16? By hand, for a v5e:
# 512 x 128 x 2 bytes are 131 kB; at 819 GB/s that is 160 ns, and at 1.5 GHz 240 cycles.

# %%
v5e = chips.chip("v5e")
block_bytes = 512 * 128 * 2
print(f"{v5e.cycles(block_bytes / v5e.hbm_bytes_per_s):.0f} cycles from HBM (predicted)")
pictures.journey("v5e")

# %% [markdown]
# Getting it there takes longer than using it. Two ways out, and a kernel takes both: **use a block
# for more rows** while it is there (with 240 rows the product takes as long as the copy: the ridge
# of chapter 1, once more), and **copy the next block while this one is computed**.
#
# And look what is not in the picture: the scores. 128 rows x 512 keys in float32 are 256 KiB, twice
# the block of K. They are born in VMEM, weighed there, and never travel.
#
# **Takeaway.** A kernel is a plan for what is in VMEM when. Flash attention (Dao et al., 2022) is
# the plan in which scores never leave.

# %% [markdown]
# ## 4. Why 8 x 128?
#
# A vector register holds 8 rows (sublanes) of 128 lanes of 32 bits, and every load, store and
# vector instruction handles all of it. VMEM is cut the same way: the last two dimensions of an
# array lie in **tiles** of 8 x 128, and the last tiles are filled up.

# %%
shapes = {"8 heads of 64": (8, 64), "20 tokens of one head": (20, 128), "one row of 200": (1, 200)}
pictures.tiles(shapes)

# %% [markdown]
# Padding costs as much as numbers: VMEM, and cycles. Narrower types pack more rows into a register:
# 16 x 128 of bfloat16, 32 x 128 of float8. So one decode token, one head, one row of 128 bfloat16
# numbers, uses 1/16 of whatever it touches.

# %%
for dtype, tile_rows in {"float32": 8, "bfloat16": 16, "float8_e4m3fn": 32}.items():
    for rows in (1, 4, 32, 128):
        used = rows / (cdiv(rows, tile_rows) * tile_rows)
        print(f"{dtype:14} {rows:4} rows: {used:4.0%} of the registers' rows are used")

# %% [markdown]
# **Takeaway.** Make the last dimension a multiple of 128, and the one before it a multiple of 8, 16
# or 32. What is smaller runs, and pays for the whole tile.

# %% [markdown]
# ## 5. A first Pallas kernel
#
# In Pallas you write what happens to *one block*, and say which blocks there are. The kernel gets
# **references**: `ref[...]` reads, `ref[...] = x` writes. Here is one that doubles every number of
# a 16 x 256 array, in blocks of 8 x 128:


# %%
def double_kernel(x_ref, out_ref):  # VMEM f32[8, 128] each
    out_ref[...] = 2 * x_ref[...]


double = pl.pallas_call(
    double_kernel,
    grid=(2, 2),  # the kernel runs 2 x 2 times
    in_specs=[pl.BlockSpec((8, 128), lambda i, j: (i, j))],  # which block step (i, j) reads
    out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)),  # which one it writes
    out_shape=jax.ShapeDtypeStruct((16, 256), jnp.float32),
    interpret=choose_interpret(None),  # compiled on a TPU, else run in JAX's TPU interpreter
)

# %%
x = jnp.arange(16 * 256, dtype=jnp.float32).reshape(16, 256)
assert (double(x) == 2 * x).all()

# %% [markdown]
# There is no loop and no copy in it. `grid=(2, 2)` says that the steps are (0, 0), (0, 1), (1, 0),
# (1, 1), the last axis fastest. The **index map** `lambda i, j: (i, j)` says which block a step
# wants, counted in blocks. Pallas makes a pipeline of that: while step n computes, the block of
# step n + 1 is copied in, and the result of step n - 1 out.
#
# **Takeaway.** Grid: how often. Block shape: how much. Index map: which one. The copies are
# Pallas's business, in this chapter.

# %% [markdown]
# ## 6. When is nothing copied?
#
# If two steps in a row want the same block, Pallas leaves it where it is. That is not an
# optimisation on the side; it is how one writes a loop over keys that keeps its queries. Count what
# an index map fetches:


# %%
def fetches(index_map, grid):
    """How many blocks are copied in: one whenever the index differs from the step before."""
    steps = [index_map(*step) for step in np.ndindex(*grid)]
    return sum(after != before for before, after in zip([None, *steps[:-1]], steps, strict=True))


grid = (4, 10)  # 4 blocks of queries, 10 blocks of keys
print("queries, (i, 0):", fetches(lambda i, j: (i, 0), grid), "blocks of 40 steps")
print("keys,    (j, 0):", fetches(lambda i, j: (j, 0), grid), "blocks of 40 steps")
assert fetches(lambda i, j: (i, 0), grid) == 4

# %% [markdown]
# Each block of queries is fetched once and stays for ten steps; the keys go by, once for each block
# of queries. Turn the grid round, keys outside and queries inside, and it is the other way:

# %%
print("queries:", fetches(lambda j, i: (i, 0), (10, 4)), "keys:",
      fetches(lambda j, i: (j, 0), (10, 4)))  # fmt: skip

# %% [markdown]
# But then the state of the softmax would have to come and go as well. With the keys inside, it
# lives in **scratch**: VMEM that belongs to the kernel and keeps its contents from step to step.
#
# **Takeaway.** The order of the grid decides what stays. What stays is free; what a step
# accumulates into has to stay.

# %% [markdown]
# ## 7. Flash attention
#
# Now all is there. Grid: (KV heads, blocks of queries, blocks of keys). At the first block of keys
# the state is emptied; every block takes a softmax step; at the last one the output is written.

# %%
show_source(tiled._flash_kernel)

# %% [markdown]
# Read it with section 2 at hand: `write_state`, `dot`, hide, `softmax_step`, `finish`. The two
# lines that name a `group` come in the next section, `end_kv_block` in section 9, `zero_tail` in
# section 10. Does it compute attention?

# %%
q, k, v = (jnp.float32(rng.standard_normal((n, h, 128))) for n, h in ((40, 4), (100, 2), (100, 2)))
output = tiled.flash_attention(q, k, v, block_q=16, block_kv=32)

truth = dense.oracle(q, k, v)
print(f"worst token and head: {dense.scaled_error(output, truth):.1e}")
assert dense.scaled_error(output, truth) < 2e-6

# %% [markdown]
# Without a TPU that was the **TPU interpreter**: it runs a kernel block by block with NumPy on your
# machine, checks indices, and fills memory that was never written with NaN. It is slow and strict.
# Times taken in it mean nothing, and no cell of this course takes one.
#
# **Takeaway.** Flash attention is a grid, three specs and a softmax step. Its numbers are those of
# rung 1.

# %% [markdown]
# ## 8. What about heads? Rows
#
# In GQA a group of query heads wants the same K (chapter 1). The kernel could loop over them. It
# stacks them instead: `group` query heads of each token become rows of one matrix, and one product
# serves all. Row `t * group + g` is head g of token t:

# %%
q_len, group = 3, 2
rows = [(t, g) for t in range(q_len) for g in range(group)]
print("row        ", *range(q_len * group))
print("token      ", *(t for t, _ in rows))
print("row // group", *(row // group for row in range(q_len * group)))
assert [t for t, _ in rows] == [row // group for row in range(q_len * group)]

# %% [markdown]
# That is why the kernel's mask compares `q_block * block_q + row // group`, the token, and not the
# row. And it is why GQA suits the machine: one decode token of Llama 3 8B brings 4 rows to each KV
# head in place of 1. Of a matrix unit 128 wide that still is little:

# %%
for name, (num_q_heads, num_kv_heads) in {"MHA": (32, 32), "Llama 3 8B": (32, 8)}.items():
    for q_len in (1, 32):
        rows = q_len * num_q_heads // num_kv_heads
        print(f"{name:10} q_len {q_len:2}: {rows:4} rows for each block of K, "
              f"ridge of a v5e: {chips.ridge_flops_per_byte('v5e'):.0f}")  # fmt: skip

# %% [markdown]
# **Takeaway.** Sharing heads makes the matrix taller, and each byte of K serves more rows. A decode
# stays far below the ridge all the same: it waits for memory, whatever the kernel.

# %% [markdown]
# ## 9. What does the mask hide in whole blocks?
#
# A chunk of 512 queries after 768 cached tokens, blocks of 64 queries and 128 keys. Where the
# causal mask hides a whole block there is nothing to compute, and nothing to fetch:

# %%
kinds = tiled.block_map(512, 1280, block_q=64, block_kv=128)
pictures.block_grid(kinds, title="512 new tokens after 768 cached: what is computed")

# %% [markdown]
# The kernel asks one function where the walk of a block of queries ends. The same function clamps
# the index map, so that a skipped step asks for the block that it has already: no copy.

# %%
show_source(tiled.end_kv_block)


# %%
def key_block(i, j, clamp):
    end = tiled.end_kv_block(i, 512, 1280, block_q=64, block_kv=128, causal=True)
    return min(j, end - 1) if clamp else j


grid = kinds.shape
copied = {c: fetches(lambda i, j, c=c: key_block(i, j, c), grid) for c in (False, True)}
print(f"blocks of keys copied: {copied[False]} without the clamp, {copied[True]} with it")
print(f"computed: {(kinds != '.').sum()} of {kinds.size}, with a mask that matters "
      f"{(kinds == '+').sum()}")  # fmt: skip
assert copied[True] <= (kinds != ".").sum() < copied[False]

# %% [markdown]
# Here it is 12 blocks of 80, because most of the keys are cached. In a long fresh prompt it comes
# to almost half of all work: exercise 4.5 counts. Only the blocks along the diagonal need a mask at
# all; this kernel masks every block, which is simple and costs vector instructions. Rung 8 does
# not.
#
# **Takeaway.** Causality is skipped by blocks and masked by positions. A skipped step costs a grid
# step, and moves no byte.

# %% [markdown]
# ## 10. What lies behind the end?
#
# 100 keys in blocks of 32: the fourth block has 4 keys and 28 rows of whatever was in VMEM. Hidden
# scores get weight 0. Is that enough?

# %%
weights, stale = jnp.float32([[0.7, 0.3, 0.0]]), jnp.float32([[1.0], [2.0], [jnp.nan]])
print("0 * NaN:", (weights @ stale)[0, 0], "  with zeros behind the end:",
      (weights @ tiled.zero_tail(stale, 2))[0, 0])  # fmt: skip
assert jnp.isnan(weights @ stale).all()

# %% [markdown]
# One NaN in a row that is never looked at, and the whole output is gone. On the chip stale memory
# is mostly harmless numbers, so the bug sleeps until a page was freed by a sequence that had a NaN.
# In the interpreter it shows at once.
#
# **Takeaway.** Hide the score *and* replace the value. Test with NaN wherever the kernel must not
# look.

# %% [markdown]
# ## 11. How large may a block be?
#
# Large blocks of queries use every fetched key for more rows. Large blocks of keys have fewer
# steps. What stops them is VMEM: K, V, Q and the output twice each (one computes, one is on its
# way), the state, the scores and the weights. A prefill of 4,096 tokens, one KV head of Llama 3 8B:


# %%
def vmem_bytes(block_q, block_kv, group=4, head_dim=128):
    rows = block_q * group
    streamed = 2 * 2 * head_dim * (2 * block_kv + 2 * rows)  # two buffers, bfloat16
    state = 4 * rows * (head_dim + 2 * 128)  # one column still fills its 128 lanes
    return streamed + state + (4 + 2) * rows * block_kv  # scores float32, weights bfloat16


def hbm_bytes(block_q, kv_len=4096, group=4, head_dim=128):
    blocks = [cdiv((i + 1) * block_q, 512) * 512 for i in range(cdiv(kv_len, block_q))]
    return 2 * head_dim * (2 * kv_len * group + 2 * sum(blocks))  # q and output once, K and V often


# %%
for block_q in (16, 64, 128, 512):
    flops = chips.attention_cost(4096, 4096, num_q_heads=4, num_kv_heads=1, head_dim=128).flops
    floor = chips.roofline_time("v5e", flops, hbm_bytes(block_q))
    vmem_mib, hbm_mb = vmem_bytes(block_q, 512) / 2**20, hbm_bytes(block_q) / 1e6
    print(f"block_q {block_q:3}: {4 * block_q:4} rows, VMEM {vmem_mib:5.1f} MiB, "
          f"HBM {hbm_mb:6.1f} MB, v5e waits for {floor.bound} (predicted)")  # fmt: skip
    assert vmem_bytes(block_q, 512) < v5e.vmem_bytes

# %% [markdown]
# A fetched byte of K or V serves as many FLOPs as there are rows. With 64 rows the keys are fetched
# too often, and prefill waits for memory after all; 256 rows are just past the ridge of 240, but
# the blocks on the diagonal are fetched whole and used by half. From 512 rows on it waits for the
# matrix units, as it should. How busy these really are comes in section
# 13.
#
# **Takeaway.** `block_q * group` has to pass the ridge, and VMEM is large enough for that.

# %% [markdown]
# ## 12. What did tiling change?
#
# Chapter 3 ended with a prefill chunk of 512 queries over 4,096 keys: a v5e would wait for memory,
# because rung 3 writes scores and weights down. Rung 4 writes none. The three on one scale,
# predicted:

# %%
llama = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
cost = chips.attention_cost(512, 4096, **llama)
notes_bytes = 4 * 32 * 512 * 4096 * 4  # scores and weights, each written and read
more_bytes = {"floor": 0, "rung 3": notes_bytes, "rung 4": 3 * cost.kv_read_bytes}  # 4 q blocks
for name, extra_bytes in more_bytes.items():
    time_ = chips.roofline_time("v5e", cost.flops, cost.hbm_bytes + extra_bytes)
    hbm_mb = (cost.hbm_bytes + extra_bytes) / 1e6
    print(f"{name:7} {hbm_mb:5.0f} MB, {1e6 * time_.time_s:5.0f} us on a v5e, waits for "
          f"{time_.bound} (predicted)")  # fmt: skip
assert time_.bound == "compute"

# %% [markdown]
# With blocks of 128 queries, K and V are read four times in place of once, and it does not matter:
# the matrix units take longer. (The floor assumes that they never pause; no kernel is that good.)
#
# **Takeaway.** The same FLOPs, less than a tenth of the bytes. Tiling is not about computing less;
# it is about not writing things down.

# %% [markdown]
# ## 13. How busy are the units, really?
#
# Waiting for the matrix units is what a prefill should do. But are they busy? A TPU issues one
# **bundle** of instructions per cycle, and the compiler decides beforehand which unit gets what in
# each of them. So its listing is a timetable, and the real compiler runs on any Linux machine, for
# a chip that is not there. Take one block of this kernel, 512 rows x 512 keys. By hand: two
# products of $2 \cdot 512 \cdot 512 \cdot 128$ FLOPs each are 134 million, and a v5e does 131,072 a
# cycle: 1,024 cycles, if nothing else took time.

# %%
flops = 2 * 2 * 512 * 512 * 128
print(f"the products alone need {flops / v5e.mxu_flops_per_cycle:,.0f} cycles")
assert flops / v5e.mxu_flops_per_cycle == 1024

# %%
try:
    picture = pictures.block_occupancy("v5e")
except NoSchedule as reason:
    print(reason, "This is the picture as it was recorded, with libtpu 0.0.52:", sep="\n")
    picture = pictures.recorded_occupancy()
picture

# %% [markdown]
# A full row is a unit with work in every cycle. The matrix unit (top) is in use for little more
# than half of the time. At first it multiplies Q and K without a pause, and the exponentials (EUP)
# have not begun; from the middle on it pauses again and again, and waits for maxima, exponentials
# and masks (VALU, EUP, XLU), because the second product needs their results. And much of the loads
# and stores is *spills*: 512 rows of scores do not fit 64 registers. None of that is in a roofline.
# It is latency and order, and chapter 9 is about nothing else.
#
# **Takeaway.** A roofline says what must be waited for. The schedule says what is.

# %% [markdown]
# ## What is still slow
#
# Rung 4 reads dense K and V. Our cache is in pages. So its adapter for the ladder does what every
# kernel without a page table has to do: it **gathers** the pages of each sequence into an array
# first, padded to the longest. Seven decodes and a chunk, the batch of chapter 3:

# %%
from rpa.ladder import kv_lens_of, kv_tokens_needed
from rpa.page_pool import PagePool
from rpa.paging import get_kv_cache_shape
from rpa.ragged import RaggedBatch

q_lens = np.array([1, 1, 1, 1, 1, 1, 1, 128])
kv_lens = np.array([1418, 501, 110, 1335, 194, 1291, 487, 640])
pool = PagePool(num_pages=512, page_size=16)
for s, kv_len in enumerate(kv_lens):
    pool.allocate(s, int(kv_len))
table = pool.page_table(range(8), pages_per_seq=96)
batch, _ = RaggedBatch.from_lengths(q_lens, kv_lens, table, chunk_prefill_size=128)

# %%
needed, gathered = kv_tokens_needed(batch), table.size * 16
print(f"KV tokens needed: {needed:,}, gathered: {gathered:,}")
print("each is moved three times: read from its page, written to the array, read by the kernel")
print(f"tokens moved for each token needed: {3 * gathered / needed:.1f}")
assert kv_lens_of(batch).sum() == needed

# %% [markdown]
# And the cost of the gather alone, before any attention? Measured on the machine that runs this
# notebook, against a plain sum that reads the live tokens once:


# %%
def best_ms(function, *arguments):
    """The best of five times; the first call compiles."""
    times_ms = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times_ms.append(1e3 * (time.perf_counter() - start))
    return min(times_ms[1:])


# %%
cache = jnp.ones(get_kv_cache_shape(512, 16, 3, 64, jnp.float32))
read_once = jax.jit(lambda pages: pages.sum(axis=(0, 1)))
gather = jax.jit(lambda pages, table: pages[table])
live = cache[: cdiv(needed, 16)]
machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
print(f"read the live tokens once: {best_ms(read_once, live):5.2f} ms on {machine}, plain JAX")
print(f"gather for rung 4:         {best_ms(gather, cache, table):5.2f} ms")

# %% [markdown]
# For a prefill that is an annoyance. A **decode** has nothing else to do than to read its KV once,
# and here every byte is moved three times, padding included, before one query row has looked at it.
#
# The automatic pipeline cannot help: a `BlockSpec` fetches blocks at regular places, and pages lie
# wherever the pool put them. So in **chapter 5** you take the copies into your own hands: start
# them, wait for them, go through the page table, and keep two buffers busy. There is a price: what
# you start and do not wait for, is never waited for.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/04_tiled.ipynb).
#
# **Read more:**
#
# - [FlashAttention](https://arxiv.org/abs/2205.14135), Dao et al. 2022: tiles and the count of
#   bytes.
# - [Online normalizer calculation for softmax](https://arxiv.org/abs/1805.02867), Milakov and
#   Gimelshein 2018: the four pages behind `softmax_step`.
