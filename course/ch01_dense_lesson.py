# %% [markdown]
# # Chapter 1: Dense attention and its roofline
#
# **Time:** 40 minutes to read and run, about an hour for the exercises.
#
# **You need:** Python, NumPy, matrix products; chapter 0 for the words HBM and MXU. No TPU.
#
# **You will be able to:** compute attention by hand and in six lines of JAX; say which key a query
# may see when part of the sequence is cached; count the FLOPs and bytes of prefill and decode; and
# tell, for any shape and chip, whether memory or the matrix units set the pace.
#
# This is **rung 1** of the ladder: attention of one sequence, exactly as the formula says. Every
# later rung computes the same numbers and changes only *how*. So everything here is worth trusting,
# and this chapter ends by measuring what is wrong with it.

# %%
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from rpa import chips, dense
from rpa.figures import chips as chip_pictures
from rpa.figures import dense as pictures
from rpa.figures import show_source

# %% [markdown]
# ## 1. What does attention compute?
#
# A model has read three tokens. For each of them it asks: *which tokens so far matter to me, and
# what do they have to say?* Each token brings a **query** (what it looks for), a **key** (what it
# offers to be found by) and a **value** (what it has to say):
#
# $$\text{output} = \text{softmax}\!\left(\frac{Q K^\top}{\sqrt{\text{head\_dim}}}\right) V$$
#
# Three tokens and two numbers each fit on one screen. Token 2 has query $(2, 2)$ and looks for both
# features at once.

# %%
q = np.float32([[1, 0], [0, 2], [2, 2]])  # [q_len, head_dim]
k = np.float32([[1, 0], [0, 1], [1, 1]])  # [kv_len, head_dim]
v = np.float32([[10, 0], [0, 10], [5, 5]])  # [kv_len, head_dim]

scores = q @ k.T / np.sqrt(2)  # [q_len, kv_len]
print(scores.round(2))

# %% [markdown]
# Score 2.83 in the last row: query $(2, 2)$ times key $(1, 1)$ is 4, divided by $\sqrt 2$. A token
# must not look at tokens that come after it, so the scores right of the diagonal are hidden: they
# become $-\infty$, and $e^{-\infty} = 0$.

# %%
scores = np.where(np.tri(3, dtype=bool), scores, -np.inf)
weights = np.exp(scores)
weights = weights / weights.sum(axis=1, keepdims=True)  # each row sums to 1
output = weights @ v  # [q_len, head_dim]

pictures.by_hand(scores, weights, output)

# %% [markdown]
# Row 2: the three scores 1.41, 1.41 and 2.83 become the weights 0.16, 0.16 and 0.67, and the output
# is that mixture of the three values. Row 0 sees nothing but itself.
#
# `rpa.dense.oracle` is the judge of this whole course: attention in NumPy float64, one head at a
# time, written to be obviously right rather than quick. Arrays have a head axis there.

# %%
one_head = [x[:, None, :] for x in (q, k, v)]  # [tokens, 1 head, head_dim]
truth = dense.oracle(*one_head)

assert np.allclose(truth.output[:, 0], output)

# %% [markdown]
# **Takeaway.** Attention is two matrix products with a softmax between them. The first product asks
# every query about every key, the second mixes values.

# %% [markdown]
# ## 2. Why subtract the maximum?
#
# The softmax above was written as the formula says. How large may a score get before that breaks?
# $e^{88}$ still is a float32, and $e^{89}$ is not:

# %%
for score in (88.0, 89.0):
    print(f"exp({score}) = {jnp.exp(score):.3g}")

large = jnp.float32([89.0, 88.0])
naive = jnp.exp(large) / jnp.exp(large).sum()
print("naive softmax:", naive)

# %% [markdown]
# One score of 89 and the row is lost: infinity divided by infinity. But a softmax does not change
# if the same number is subtracted from every score of a row, because that factor cancels:
#
# $$\frac{e^{s_j - m}}{\sum_k e^{s_k - m}} = \frac{e^{s_j}}{\sum_k e^{s_k}}$$
#
# With $m$ the largest score of the row, no exponent is positive and nothing can overflow.

# %%
shifted = jnp.exp(large - large.max())
print("stable softmax:", shifted / shifted.sum())

show_source(dense.masked_softmax)

# %% [markdown]
# Three lines matter here: hide, subtract the maximum, divide by the sum. The `sinks` are for models
# that let a query attend to nothing; they come in chapter 11, and `None` turns them off.
#
# Read the two comments. Both say what breaks without the line; you will meet both again in the
# kernel. The guard for a row that sees no key is not a theory: a padding row is one.

# %%
nothing_visible = jnp.zeros((1, 3), bool)
weights = dense.masked_softmax(jnp.float32([[1.0, 2.0, jnp.nan]]), nothing_visible)

assert (weights == 0).all()

# %% [markdown]
# **Takeaway.** Every attention kernel carries a row maximum. It costs a pass over the scores before
# the first `exp`; chapter 4 shows how to drop that pass.

# %% [markdown]
# ## 3. Which key may a query see, if part of the sequence is cached?
#
# A server does not recompute keys and values of old tokens. It keeps them: that is the **KV
# cache**. The new tokens are the *last* `q_len` of `kv_len` tokens, so query $t$ does not stand at
# position $t$ but at `kv_len - q_len + t`. Three everyday cases, and a sliding window of three:


# %%
def mask_of(q_len, kv_len, window=None):
    positions = np.arange(kv_len)
    return dense.visible(positions[kv_len - q_len :], positions, sliding_window=window)


named = {"prefill": mask_of(6, 6), "chunk": mask_of(2, 6), "decode": mask_of(1, 6)}
named["window of 3"] = mask_of(4, 6, window=3)
pictures.masks(named, cached=(0, 4, 5, 2))

# %% [markdown]
# **Prefill** reads a whole prompt at once: a triangle. **Decode** adds one token, which sees
# everything: one row. A **chunk** of a prompt after a cached prefix is a rectangle with a
# triangle at its end. All three are the last rows of the same triangle, and one line says so:

# %%
show_source(dense.visible)

# %% [markdown]
# A mask that forgets the prefix, `np.tri(q_len, kv_len)`, is the most common mistake in attention
# code: it is right for a prefill and wrong for everything else. So test what must hold: a chunk
# after a cached prefix gives the same rows as the whole prompt at once.

# %%
rng = np.random.default_rng(0)
q, k, v = (jnp.float32(rng.standard_normal((6, 2, 8))) for _ in range(3))  # [6 tokens, 2 heads, 8]

whole = dense.attention(q, k, v)  # prefill of 6 tokens
chunk = dense.attention(q[4:], k, v)  # the last 2, with 4 in the cache

assert jnp.allclose(whole[4:], chunk, atol=1e-6)
assert not np.array_equal(mask_of(2, 6), np.tri(2, 6, dtype=bool))

# %% [markdown]
# **Takeaway.** Position decides what a query sees, never its row number. With a prefix of
# `kv_len - q_len` cached tokens, the mask is the last `q_len` rows of the triangle.

# %% [markdown]
# ## 4. Must every query head have its own keys and values?
#
# A model has many **heads**: 32 in Llama 3 8B, each with a query of its own. In multi-head
# attention (MHA) each also has its own keys and values. In grouped-query attention (GQA) a group of
# query heads shares them; in multi-query attention (MQA) all do.

# %%
pictures.heads({"MHA: 8 KV heads": 8, "GQA: 2 KV heads": 2, "MQA: 1 KV head": 1}, num_q_heads=8)

# %% [markdown]
# Query head `h` reads KV head `h // group`. Sharing is an index, not a copy: `dense.scores_of`
# splits the query heads into `[num_kv_heads, group]` and leaves K as it is.

# %%
show_source(dense.scores_of)

# %% [markdown]
# To see that it is the same attention, give every query head a copy of the KV head it shares:

# %%
q = jnp.float32(rng.standard_normal((1, 8, 16)))  # one decode token, 8 query heads
k, v = (jnp.float32(rng.standard_normal((5, 2, 16))) for _ in range(2))  # 2 KV heads

shared = dense.attention(q, k, v)
copied = dense.attention(q, jnp.repeat(k, 4, axis=1), jnp.repeat(v, 4, axis=1))

assert jnp.allclose(shared, copied, atol=1e-6)
print(f"stored: {k.size + v.size} numbers shared, {4 * (k.size + v.size)} copied")

# %% [markdown]
# What does that buy? The cache of one token holds K and V, for every KV head, in every layer:
#
# $$\text{bytes per token} = 2 \cdot \text{num\_kv\_heads} \cdot \text{head\_dim} \cdot
# \text{bytes per number} \cdot \text{layers}$$

# %%
models = {  # num_kv_heads, head_dim, layers
    "Llama 3 8B": (8, 128, 32),
    "Llama 3 8B, if it were MHA": (32, 128, 32),
    "SmolLM2-135M": (3, 64, 30),
}
for name, (num_kv_heads, head_dim, layers) in models.items():
    token_bytes = 2 * num_kv_heads * head_dim * 2 * layers  # bfloat16: 2 bytes a number
    print(f"{name:27} {token_bytes / 1024:6.1f} KiB per token, 8192 tokens: "
          f"{8192 * token_bytes / 2**30:5.2f} GiB")  # fmt: skip

# %% [markdown]
# **Takeaway.** GQA divides the cache by the group size. A conversation of 8,192 tokens with Llama 3
# 8B still owns a whole GiB, and a v5e has 16 GiB for weights and all conversations together.

# %% [markdown]
# ## 5. How wrong may right be?
#
# From here on you will write kernels in bfloat16 and float8 and ask: is this difference a bug, or
# rounding? This project uses two measures against the float64 oracle, and both say *relative to
# what*. The first looks at the whole array; the second at the worst (token, head), as a fraction of
# what rounding can do there.

# %%
q, k, v = (jnp.float32(rng.standard_normal((64, 4, 32))) for _ in range(3))
truth = dense.oracle(q, k, v)
for dtype in (jnp.float32, jnp.bfloat16):
    given = [x.astype(dtype).astype(jnp.float32) for x in (q, k, v)]
    out = dense.attention(*given)
    print(f"{jnp.dtype(dtype).name:9} relative {dense.relative_error(out, truth):.1e}"
          f"   worst token and head {dense.scaled_error(out, truth):.1e}")  # fmt: skip

# %% [markdown]
# bfloat16 keeps 8 bits of a number, so errors of a few thousandths are its nature and no bug. That
# is also why the oracle, from here on, gets the *rounded* inputs: rounding of inputs is not the
# kernel's fault.

# %%
rounded = [x.astype(jnp.bfloat16) for x in (q, k, v)]
out = dense.attention(*[x.astype(jnp.float32) for x in rounded])

assert dense.relative_error(out, dense.oracle(*rounded)) < 2e-6

# %% [markdown]
# **Takeaway.** Compare with float64 on the inputs the kernel really got, and divide by what
# rounding can do. Then a bug of one token stands out by orders of magnitude.

# %% [markdown]
# ## 6. What does it cost: prefill against decode
#
# Count for Llama 3 8B, one layer, 4,096 tokens in the cache. A **FLOP** is one multiplication or
# one addition, so a dot product of length 128 is 256 FLOPs. Each (query, key) pair needs one in the
# first product and as many in the second:
#
# $$\text{FLOPs} = 4 \cdot \text{num\_q\_heads} \cdot \text{head\_dim} \cdot
# \text{visible pairs}$$
#
# Decode has one query, so 4,096 pairs: $4 \cdot 32 \cdot 128 \cdot 4096 = 67$ million FLOPs. It
# must read K and V of 4,096 tokens once: $2 \cdot 8 \cdot 128 \cdot 2 \cdot 4096 = 16.8$ million
# bytes. That is **4 FLOPs per byte**: in bfloat16, exactly the number of query heads that share a
# KV head.
#
# The sums below are complete: besides the cache, a kernel reads the queries, writes the output, and
# *writes* K and V of the new tokens into the cache. In decode that is next to nothing, in a prefill
# most of the bytes.

# %%
llama = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
decode = chips.attention_cost(1, 4096, **llama)
prefill = chips.attention_cost(4096, 4096, **llama)

assert decode.flops == 4 * 32 * 128 * 4096
assert decode.kv_read_bytes == 2 * 8 * 128 * 2 * 4096
for name, cost in {"decode": decode, "prefill": prefill}.items():
    print(f"{name:8} {cost.flops / 1e6:10,.0f} MFLOP {cost.hbm_bytes / 1e6:7,.1f} MB "
          f"{cost.intensity_flops_per_byte:8,.1f} FLOP/byte")  # fmt: skip

# %% [markdown]
# Prefill does two thousand times the work of one decode step and moves only six times the bytes,
# because each key it reads serves thousands of queries. The ratio, FLOPs per byte of HBM traffic,
# is called **intensity**.
#
# Would it help decode to serve many sequences at once? For the model's weights yes: all sequences
# share them. For attention no: each sequence brings its own cache.

# %%
one = chips.attention_cost(1, 4096, **llama)
many = chips.attention_cost(np.full(64, 1), np.full(64, 4096), **llama)

assert many.flops == 64 * one.flops
assert np.isclose(many.intensity_flops_per_byte, one.intensity_flops_per_byte)

# %% [markdown]
# **Takeaway.** Decode attention does about `num_q_heads / num_kv_heads` FLOPs per byte in bfloat16,
# at any length and any batch size. Prefill does hundreds to thousands.

# %% [markdown]
# ## 7. Which limit does each meet? The roofline
#
# A chip can do so many FLOPs per second, and move so many bytes per second. A computation of
# intensity $I$ can at best reach
#
# $$\min(\text{peak FLOP/s},\; I \cdot \text{bytes/s}).$$
#
# Drawn over $I$, that is a slope that ends in a flat roof. The corner between them is the
# **ridge**: left of it memory sets the pace, right of it the matrix units do.

# %%
points = [("decode", decode.intensity_flops_per_byte)]
points += [("chunk of 64", chips.attention_cost(64, 4096, **llama).intensity_flops_per_byte)]
points += [("prefill", prefill.intensity_flops_per_byte)]

chip_pictures.roofline(points=points)

# %% [markdown]
# In numbers, with the larger of the two times as the floor. Everything here is *predicted*: no
# kernel is faster than this, and it is the work of this course to come near it.

# %%
for name in ("v5e", "v6e", "tpu7x"):
    times = [chips.roofline_time(name, c.flops, c.hbm_bytes) for c in (decode, prefill)]
    decode_us, prefill_us = (t.time_s * 1e6 for t in times)
    print(f"{name:6} ridge {chips.ridge_flops_per_byte(name):4.0f}   "
          f"decode {decode_us:5.1f} us ({times[0].bound})   "
          f"prefill {prefill_us:5.0f} us ({times[1].bound})")  # fmt: skip
    assert (times[0].bound, times[1].bound) == ("memory", "compute")

# %% [markdown]
# A second lesson hides in the flat roof: both matrix products of attention have one side of
# `head_dim`, and the matrix units of v6e and TPU7x are 256 wide. At `head_dim` 128 half of them is
# idle, whatever a kernel does.

# %%
for name in ("v5e", "v6e", "tpu7x"):
    fill = chips.mxu_fill(name, head_dim=128)
    floor_us = prefill.flops / (fill * chips.chip(name).peak()) * 1e6
    print(f"{name:6} uses {fill:.0%} of its matrix units: prefill takes {floor_us:4.0f} us or more")

# %% [markdown]
# **Takeaway.** Decode waits for memory on every chip, so a decode kernel is judged by the bytes it
# moves and by how few it wastes. Prefill waits for the matrix units, so a prefill kernel is judged
# by how busy it keeps them. One kernel has to do both.

# %% [markdown]
# ## What is still slow
#
# Decode in rung 1 needs K and V of a sequence as *one array*. The sequence grows by one token a
# step, so what should that array's size be? There are two ways, and both hurt. **Grow it**: a new
# array each step, of a new shape, and JAX compiles a program a shape.

# %%
programs = []  # a note for each program that JAX compiles, because a trace runs this Python


@jax.jit
def grow_and_attend(q, k, v, new_k, new_v):
    programs.append(k.shape)
    k, v = jnp.concatenate([k, new_k]), jnp.concatenate([v, new_v])  # [kv_len + 1, heads, head_dim]
    return dense.attention(q, k, v), k, v


# %% [markdown]
# **Reserve** the longest length there can be, and mask what is not there yet: one shape, one
# program. But each step reads everything that was reserved.


# %%
@jax.jit
def reserve_and_attend(q, k, v, new_k, new_v, kv_len):
    k = jax.lax.dynamic_update_slice(k, new_k, (kv_len, 0, 0))  # [reserved, heads, head_dim]
    v = jax.lax.dynamic_update_slice(v, new_v, (kv_len, 0, 0))
    lengths = jnp.int32([1]), jnp.array([kv_len + 1])
    return dense.padded_attention(q[None], k[None], v[None], *lengths)[0], k, v


# %% [markdown]
# Eight decode steps of one layer of SmolLM2, with 500 tokens in the cache and the model's context
# of 8,192 tokens reserved. Times are of the machine that the title of the figure names.


# %%
def timed(step, *arguments):
    start = time.perf_counter()
    results = jax.block_until_ready(step(*arguments))
    return 1e3 * (time.perf_counter() - start), *results


q = jnp.float32(rng.standard_normal((1, 9, 64)))  # 9 query heads, head_dim 64
new = jnp.float32(rng.standard_normal((1, 3, 64)))  # 3 KV heads
cached = jnp.float32(rng.standard_normal((500, 3, 64)))
kv_lens = range(500, 508)

# %%
k = v = cached
grow_ms = []
for _ in kv_lens:
    ms, grown, k, v = timed(grow_and_attend, q, k, v, new, new)
    grow_ms.append(ms)

# %%
k = v = jnp.zeros((8192, 3, 64)).at[:500].set(cached)
reserve_and_attend(q, k, v, new, new, 0)  # compile before the clock starts
reserve_ms = []
for kv_len in kv_lens:
    ms, reserved, k, v = timed(reserve_and_attend, q, k, v, new, new, kv_len)
    reserve_ms.append(ms)

assert jnp.allclose(grown, reserved, atol=1e-6)

# %%
machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
measured = {"grow: compiles every step": grow_ms, "reserve 8192: reads every slot": reserve_ms}
pictures.growing_cache(measured, [kv_len + 1 for kv_len in kv_lens], machine)

# %%
print(f"grow: {len(programs)} programs for {len(kv_lens)} steps")
print(f"reserve: {508 / 8192:.0%} of the reserved memory is used, the rest is read and masked")

assert len(programs) == len(kv_lens)

# %% [markdown]
# Growing costs a compilation a token, and this was one layer of a small model. Reserving costs
# memory for tokens that may never come, and decode reads all of it, although section 7 says that
# bytes are what decode is made of.
#
# Operating systems had this problem with the memory of programs, and solved it sixty years ago.
# **Chapter 2** does what they did: it cuts the cache into pages, so that shapes stay fixed and a
# sequence owns only as many as it needs.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/01_dense.ipynb).
#
# **Read more:**
#
# - [All about rooflines](https://jax-ml.github.io/scaling-book/roofline), chapter 1 of the
#   scaling book.
# - [GQA](https://arxiv.org/abs/2305.13245), Ainslie et al. 2023: why query heads share K and V.
