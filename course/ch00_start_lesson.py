# %% [markdown]
# # Chapter 0: Start here
#
# **Time:** 25 minutes to read and run, 5 minutes for the warm-up exercise.
#
# **You need:** Python and a little NumPy. No TPU, and no knowledge of one.
#
# **You will be able to:** run every chapter with or without a TPU and say what runs how; name the
# parts of a TPU and their sizes; compute what share of a served model's memory traffic is
# attention; and read what a check says about your answer.
#
# In this course you write the kernel that a language model server spends much of its time in,
# **ragged paged attention**, from the plain formula to the full kernel. What that is, in ten
# minutes and without any code: [What is ragged paged attention?](../docs/overview.md)
#
# Run the next cell first, as in every notebook here: it finds or installs `rpa`, and says in one
# line that all is well, or what is wrong and what to do about it.

# %%
import os
import time

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import rpa
from rpa import chips, figures
from rpa.shapes import LLAMA3_8B, decode_step

# %% [markdown]
# ## 1. What runs here, and how?
#
# The course climbs a **ladder**. Each rung is a file in `rpa/` that computes the same attention,
# and each changes one thing in *how*. After the last rung come four chapters in which it is made
# fast, put to work, and compared:
#
# | chapter | file | what it adds |
# |---|---|---|
# | 0 start | | where you are: what runs here, and what a TPU is made of |
# | 1 dense | `dense.py`, rung 1 | the formula, and a judge in float64 |
# | 2 paging | `paging.py`, rung 2 | the KV cache cut into pages |
# | 3 ragged | `ragged.py`, rung 3 | sequences of any length in one batch, nothing padded |
# | 4 tiled | `tiled.py`, rung 4 | blocks that fit on the chip, softmax while they pass |
# | 5 streamed | `streamed.py`, rung 5 | your own copies between memories, ahead of time |
# | 6 fused | `fused.py`, rung 6 | writing the cache while computing |
# | 7 plain | `plain.py`, rung 7 | one kernel for any batch: its work is a list |
# | 8 kernel | `kernel/`, rung 8 | the optimized kernel |
# | 9 inner loop | | the machine's schedule: what bounds it, and what shortens it |
# | 10 tuning | | blocks, pipelines, predictions: from bundles to a time |
# | 11 production | | what models and servers ask for beyond the formula, and the traps in it |
# | 12 comparison | | the whole ladder in numbers, and an open challenge |
#
# Rungs 1 to 3 are plain JAX, which runs anywhere. Rungs 4 to 8 are **Pallas**: you write what the
# chip does, block by block and copy by copy. On a TPU, Pallas compiles that. Everywhere else the
# **TPU interpreter** runs the same code step by step, copies and waits included.
#
# Here is a whole kernel. `x_ref` and `out_ref` are blocks that already lie in fast memory.

# %%
ON_TPU = jax.default_backend() == "tpu"


def double_kernel(x_ref, out_ref):  # f32[8, 128] each
    out_ref[...] = 2 * x_ref[...]


double = pl.pallas_call(
    double_kernel,
    out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    interpret=False if ON_TPU else pltpu.InterpretParams(),
)

# %%
x = jnp.arange(8 * 128, dtype=jnp.float32).reshape(8, 128)

assert (double(x) == 2 * x).all()
print("ran", "compiled, on the TPU" if ON_TPU else "in the TPU interpreter")

# %% [markdown]
# What does your machine have, and what does that mean for each part of the course? The **doctor**
# has the whole report:

# %%
rpa.doctor()

# %% [markdown]
# What the interpreter can tell you: whether numbers are right, whether a copy is used before it has
# arrived, whether there is a data race. What it cannot tell you: how fast anything is. For that,
# later chapters ask the real TPU compiler, which also runs on a laptop with Linux and needs no TPU.
#
# **Takeaway.** Every chapter runs unchanged on a TPU (compiled) and without one (interpreted). What
# is right in the interpreter may still be slow; that is a separate question, with its own tools.

# %% [markdown]
# ## 2. What is a TPU made of?
#
# One picture for the whole course. It shows a **TensorCore**, the part that computes, and the
# memory next to it, for the chip that Colab lends for free:

# %%
figures.tpu("v5e")

# %% [markdown]
# - **HBM** is large and far away. Weights and the KV cache live there.
# - **VMEM** is small and near. Nothing is computed that is not there first.
# - The **DMA** engine copies between the two, *while* the rest computes. A program has to start
#   each copy and to wait for it: on a TPU that is your kernel.
# - **VREGs** are registers of 8 x 128 numbers. The **VPU** works on them element by element: masks,
#   maxima, `exp`. The **MXU** multiplies matrices.
# - The **scalar core** runs the program: loops, addresses, starts and waits. Its memory is
#   **SMEM**; lengths and page tables go there.
#
# How far away is far? In tiny numbers: bring 1 MiB into VMEM, and read it from there.

# %%
v5e = chips.chip("v5e")
hbm_us = 1e6 * chips.MIB / v5e.hbm_bytes_per_s
vmem_us = 1e6 * chips.MIB / v5e.vmem_load_bytes_per_s

print(f"from HBM {hbm_us:.2f} us, from VMEM {vmem_us:.3f} us")
assert 20 < hbm_us / vmem_us < 25

# %% [markdown]
# While that MiB arrives, the matrix units could do $197 \cdot 10^{12} \cdot 1.28 \cdot 10^{-6}$, a
# quarter of a billion operations (a multiplication or an addition is one **FLOP**). Divide:

# %%
ridge = v5e.peak("bfloat16") / v5e.hbm_bytes_per_s
print(f"{ridge:.0f} FLOP for every byte from HBM")

assert round(ridge) == round(chips.ridge_flops_per_byte("v5e")) == 240

# %% [markdown]
# A computation that does fewer than 240 FLOP with each byte waits for memory on a v5e. Other chips
# have other numbers, and the same shape:

# %%
figures.compare(["v5e", "v6e", "tpu7x"])

# %% [markdown]
# All numbers are for **one TensorCore**, because that is what a kernel runs on. v5e and v6e have
# one per chip; TPU7x has two, so a whole TPU7x chip has twice what is drawn. Every number has a
# source:

# %%
for field in ("hbm_bytes_per_s", "num_mxus"):
    print(f"{field}: {chips.SOURCES[field]}\n")

# %% [markdown]
# **Takeaway.** A TPU computes in VMEM and registers, and copies by DMA from HBM. A byte from HBM
# costs as much time as hundreds of FLOP, so the first question to ask about a kernel is which bytes
# it moves.

# %% [markdown]
# ## 3. What does attention cost in a served model?
#
# Take Llama 3 8B. It has read a prompt and now writes its answer, one token at a time: this is
# **decode**. For each token it multiplies with all its weights, and in every layer attention looks
# back at the keys (K) and values (V) of all tokens so far. These are kept in the **KV cache**.
#
# By hand, the cache of *one token*: K and V, 32 layers, 8 KV heads of 128 numbers, 2 bytes each.

# %%
token_bytes = 2 * 32 * 8 * 128 * 2  # K and V, layers, KV heads, head_dim, bytes
assert token_bytes == LLAMA3_8B.kv_bytes_per_token("bfloat16") == 128 * chips.KIB

print(f"a conversation of 8,192 tokens: {8192 * token_bytes / chips.GIB:g} GiB of KV cache")
print(f"weights that a step multiplies: {2 * LLAMA3_8B.matmul_parameters / chips.GIB:.1f} GiB")

# %% [markdown]
# A server decodes many sequences in one step. They share the weights: one read serves all. But each
# has a cache of its own. So with one sequence nearly all bytes are weights, and with many of them
# nearly all bytes are attention:

# %%
for batch_size in (1, 16, 64):
    step = decode_step(LLAMA3_8B, batch_size, kv_len=8192)
    weights_gb, attention_gb = step.weight_bytes / 1e9, step.attention_bytes / 1e9
    print(f"{batch_size:3} sequences: weights {weights_gb:.1f} GB, attention {attention_gb:.1f} GB "
          f"or {step.attention_share:.0%}")  # fmt: skip

# %%
figures.decode_share(LLAMA3_8B)

# %% [markdown]
# What is that in time? A step cannot be faster than its bytes divided by the HBM bandwidth. The
# floor is *predicted*, from the numbers above and nothing else:

# %%
step = decode_step(LLAMA3_8B, batch_size=64, kv_len=2048)
for name in ("v6e", "tpu7x"):
    floor = chips.roofline_time(name, step.weight_flops + step.attention_flops, step.hbm_bytes)
    attention = chips.roofline_time(name, step.attention_flops, step.attention_bytes)
    step_ms, attention_ms = 1e3 * floor.time_s, 1e3 * attention.time_s
    print(f"{name:6} {step_ms:5.2f} ms per step or more, {attention_ms:5.2f} ms of it attention, "
          f"which waits for {attention.bound}")  # fmt: skip

# %% [markdown]
# Why not simply take an even larger batch? Because the cache has to fit. What is left of HBM when
# all weights are loaded holds so many tokens, over all conversations together:

# %%
for name in ("v5e", "v6e", "tpu7x"):
    free_bytes = chips.chip(name).hbm_bytes - 2 * LLAMA3_8B.num_parameters
    tokens = free_bytes // token_bytes
    print(f"{name:6} {tokens:8,} tokens: {tokens // 2048:4} conversations of 2,048")

# %% [markdown]
# A v5e holds the weights and next to nothing else, so such a model is spread over several chips.
# Everywhere the batch, and with it the price of a token, is set by how many tokens of cache fit,
# and no byte of it should be wasted. That is what paging is for, in chapter 2.
#
# **Takeaway.** In a busy server attention is most of the memory traffic, and the KV cache is most
# of the memory. A kernel that reads exactly the bytes it must, at full bandwidth, is what this
# course is about.

# %% [markdown]
# ## 4. How do exercises work?
#
# Next to each chapter's lesson lies a notebook of exercises with the same name, in `exercises/`.
# Each exercise is one function to write, with three folded hints: the idea, the API, nearly the
# code. Open them one at a time. `solutions/` has every answer with a paragraph on why it is right.
#
# `rpa.check("0.1", your_function)` tests your answer. It begins with a case that you can do by hand
# and stops at the first difference. And it knows what people get wrong. Exercise 0.1 asks for the
# bytes that one decode step reads; here is an answer with a mistake in it:


# %%
def decode_bytes(weight_bytes, token_bytes, batch_size, kv_len):
    return batch_size * (weight_bytes + kv_len * token_bytes)


try:
    rpa.check("0.1", decode_bytes)
except AssertionError as refused:
    message = str(refused)
    print(message)

# %% [markdown]
# Read it from the top: which case, the call that you can repeat yourself (of a large array you see
# only dtype and shape), what was expected and what came out. And then the sentence that says *why*.
# In an exercise the same text ends the cell in red; we caught it here so that the lesson goes on.

# %%
assert "This is what you get if the weights are read again" in message

# %% [markdown]
# Now open [the warm-up exercise](../exercises/00_start.ipynb), see the check refuse the empty
# answer, see it name this mistake, and write the answer that passes. It takes five minutes.
#
# What you have solved is kept in a small file next to the exercises, `.progress.json`. Nothing
# reads it but you: `rpa.check.progress()` prints it as a table with a row per chapter, with the
# attempts that each exercise took. `RPA_PROGRESS`, an environment variable, names another place for
# it, or `off`.
#
# **Takeaway.** A failed check is the fastest teacher here: it shows the smallest case that is wrong
# and says which idea is missing.

# %% [markdown]
# ## What is still slow
#
# So far nothing has been built, so the slow thing is the machine under this notebook. How many
# bytes per second can it read? Sum 256 MiB, five times, after one run that compiles:

# %%
numbers = jnp.ones(2**26)  # f32[67,108,864] = 256 MiB
total = jax.jit(jnp.sum)
total(numbers).block_until_ready()

start = time.perf_counter()
for _ in range(5):
    total(numbers).block_until_ready()
here_bytes_per_s = 5 * numbers.nbytes / (time.perf_counter() - start)

# %%
machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
weights_s = decode_step(LLAMA3_8B, 1, 1024).weight_bytes / here_bytes_per_s

print(f"measured on {machine}: {here_bytes_per_s / 1e9:.0f} GB/s")
print(f"v5e, from rpa.chips: {chips.chip('v5e').hbm_bytes_per_s / 1e9:.0f} GB/s")
print(f"Llama 3 8B here: {weights_s:.2f} s per token or more, for the weights alone")

# %% [markdown]
# On a TPU the two rates should be close: a sum is as simple as streaming gets. Attention has to
# stream the same way and compute on the fly, from a cache that lies in pieces, for sequences of all
# lengths, and that is why it takes eight rungs to get there.
#
# **Next:** [chapter 1](01_dense.ipynb) starts with the formula. You compute attention by hand,
# count its FLOP and bytes, and find out which of the two limits each kind of work runs into.
#
# **Read more:**
#
# - [How to think about TPUs](https://jax-ml.github.io/scaling-book/tpus), chapter 2 of the
#   scaling book: the same machine, further.
# - [Pallas quickstart](https://docs.jax.dev/en/latest/pallas/quickstart.html): the language of
#   rungs 4 to 8.
