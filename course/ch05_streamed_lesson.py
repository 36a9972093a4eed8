# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 5: Streamed decode
#
# **Time:** 50 minutes to read and run, about 90 minutes for the exercises.
#
# **You need:** chapter 2 (pages, page tables) and chapter 4 (references, online softmax). No TPU.
#
# **You will be able to:** start a DMA and wait for it; say what a semaphore counts; keep two
# buffers busy; copy through a page table with sizes known at run time only; prefetch over the
# boundary of two sequences; and find races and deadlocks on a laptop, before they find you on a
# TPU.
#
# This is **rung 5** of the ladder: decode straight out of the pages. A decode has nothing to do but
# to read K and V once, so the whole chapter is about one thing: the HBM must never be idle. The
# price is that from here on no wait is made for you.

# %%
import io
import os
import time
from contextlib import redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# %%
from rpa import interpreter, ragged, streamed
from rpa.check import sandbox
from rpa.check.chapters.launchers import interpreted, run_chunks, run_copy
from rpa.figures import show_source
from rpa.figures.timeline import gantt
from rpa.lab.copies.timeline import page_labels, predict_cycles, record_dmas

sandbox.start()  # the process in which kernels run that may hang; section 3 needs it

# %% [markdown]
# ## 1. What is a copy?
#
# A kernel without `BlockSpec`s gets references to arrays that lie in HBM. Nothing can be computed
# there. `make_async_copy(source, target, semaphore)` describes a **DMA**: a copy by an engine of
# its own, while the core goes on. `start()` gives it to the engine; `wait()` stops the core until
# it is done. This kernel adds 1 to an array, in HBM in and out:


# %%
def add_one(x_ref, out_ref, buffer_ref, sem):  # HBM, HBM, VMEM f32[8, 128], a DMA semaphore
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.start()
    copy_in.wait()
    buffer_ref[...] += 1
    copy_out = pltpu.make_async_copy(buffer_ref, out_ref, sem)
    copy_out.start()
    copy_out.wait()


# %%
x = jnp.ones((8, 128))
with interpreted(), record_dmas() as timeline:
    output = run_copy(add_one, x)
assert (output == 2).all()
print(timeline.table())

# %% [markdown]
# `run_copy` holds the `pallas_call` (look it up in `rpa/check/chapters/launchers.py`),
# `interpreted` runs it in the TPU interpreter, and `record_dmas` wrote down what the kernel did, in
# its order: the number of the event, what happened, how many bytes, on which semaphore. (A line
# `compute` stands for all loads and stores between two DMA events: here the load 2 and the store
# 3.)
#
# **Takeaway.** Start, wait, use. Between its start and its wait a copy's memory is not yours.

# %% [markdown]
# ## 2. What if the wait is forgotten?


# %%
def forgetful(x_ref, out_ref, buffer_ref, sem):
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.start()
    buffer_ref[...] += 1  # has it arrived?
    copy_in.wait()
    copy_out = pltpu.make_async_copy(buffer_ref, out_ref, sem)
    copy_out.start()
    copy_out.wait()


# %% [markdown]
# On a chip: mostly it has, sometimes it has not. The interpreter can play both. `eager` lets a copy
# arrive at its start, the best of all worlds. `on_wait` lets it arrive at its wait, the worst; and
# memory that nothing has arrived in is NaN.

# %%
for mode in ("eager", "on_wait"):
    with interpreted(dma_execution_mode=mode):
        print(f"{mode:8} out[0, 0] =", run_copy(forgetful, x)[0, 0])

# %% [markdown]
# `eager` gives 2 and says nothing: right by luck. (`on_wait` gives 1: the 1 was added to NaN, and
# then the copy arrived on top of it. Wrong and not even NaN.) There is a third tool: a **race
# detector** on top of the eager run, which keeps a clock for each engine and asks what *could* have
# happened.

# %%
report = io.StringIO()  # what the interpreter prints about the race, with files and clocks
with interpreted(dma_execution_mode="eager", detect_races=True), redirect_stdout(report):
    run_copy(forgetful, x).block_until_ready()
print("a race:", interpreter.races_found())
assert interpreter.races_found() and "RACE DETECTED" in report.getvalue()
interpreter.reset()

# %% [markdown]
# No tool finds everything. A copy into a buffer that is still in use can be right in `on_wait` and
# is a race; a buffer that is reused too early for a write can be wrong in `on_wait` and no race. So
# the checks of this course run your kernels in **both** modes, and read the record besides. In
# words that is:

# %%
sandbox.try_kernel(run_copy, forgetful, x)

# %% [markdown]
# **Takeaway.** A right answer proves nothing about a kernel with DMAs. Late copies, a race
# detector, semaphores at zero: all three, or it is not tested.

# %% [markdown]
# ## 3. What does a semaphore count?
#
# Bytes. The engine adds to it what has arrived, `wait()` asks for as many bytes as its descriptor
# has and subtracts them. A wait moves nothing, and it does not know *which* copy it waits for. So
# four starts and one wait for all four are fine:


# %%
def four_pieces(x_ref, out_ref, buffer_ref, sem):
    for piece in (pl.ds(0, 8), pl.ds(8, 8), pl.ds(16, 8), pl.ds(24, 8)):
        pltpu.make_async_copy(x_ref.at[piece], buffer_ref.at[piece], sem).start()
    pltpu.make_async_copy(x_ref, buffer_ref, sem).wait()  # all 32 rows
    copy_out = pltpu.make_async_copy(buffer_ref, out_ref, sem)
    copy_out.start()
    copy_out.wait()


# %%
x = jnp.arange(32.0)[:, None] * jnp.ones((1, 128))
with interpreted(), record_dmas() as timeline:
    assert (run_copy(four_pieces, x) == x).all()
print(timeline.table(kinds=("start", "wait")))

# %% [markdown]
# And a wait for bytes that are never sent? It waits. On a TPU that is a job that hangs until
# someone kills it; here the kernel runs in a process of its own, the **sandbox**, which can be
# stopped:


# %%
def one_wait_too_many(x_ref, out_ref, buffer_ref, sem):
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.start()
    copy_in.wait()
    copy_in.wait()


sandbox.try_kernel(run_copy, one_wait_too_many, x)

# %% [markdown]
# **Takeaway.** Bytes started and bytes waited for must be equal, on every semaphore, at the end of
# every kernel. Too few waits are a copy that ends unseen; one too many is a deadlock.

# %% [markdown]
# ## 4. By turns
#
# Now a stream: an array in chunks, and of each number the largest over all chunks. One buffer:
# start, wait, compute, next.


# %%
def one_buffer(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    rows = out_ref.shape[0]
    out_ref[...] = jnp.full_like(out_ref, -jnp.inf)

    @pl.loop(0, num_chunks)
    def _(n):
        source = x_ref.at[pl.ds(n * rows, rows)]
        copy = pltpu.make_async_copy(source, buffers_ref.at[0], sems.at[0])
        copy.start()
        copy.wait()
        out_ref[...] = jnp.maximum(out_ref[...], buffers_ref[0])


# %%
x = jnp.float32(np.random.default_rng(0).standard_normal((96, 128)))
with interpreted(), record_dmas() as by_turns:
    assert jnp.array_equal(run_chunks(one_buffer, x, 16), x.reshape(6, 16, 128).max(axis=0))

# %% [markdown]
# The interpreter knows no times. But the record has the order, and the chip's table has the
# bandwidth: lay one on the other, and say that computing on a chunk takes as long as copying it.
# *Predicted*, for a v5e:

# %%
gantt(by_turns, chip="v5e", title="One buffer: the HBM and the core wait for each other")

# %%
predicted = predict_cycles(by_turns, "v5e")
ideal_cycles = x.nbytes / (819e9 / 1.5e9)
print(f"{predicted.total_cycles:.0f} cycles; the bytes alone take {ideal_cycles:.0f}")

# %% [markdown]
# **Takeaway.** By turns, the time is the sum: copies plus computation.

# %% [markdown]
# ## 5. Two buffers
#
# While chunk n is computed in one buffer, chunk n + 1 flies into the other. Three rules:
#
# - **start first, wait second**: in step n, start n + 1, then wait for n;
# - a buffer is used again only after its chunk was computed: two steps later, it was;
# - **a semaphore for each buffer**. Copies need not arrive in order. With one semaphore, the wait
#   for chunk n might be let through by the bytes of chunk n + 1.


# %%
def two_buffers(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    def copy(n):
        source = x_ref.at[pl.ds(n * out_ref.shape[0], out_ref.shape[0])]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2])

    out_ref[...] = jnp.full_like(out_ref, -jnp.inf)
    copy(0).start()

    @pl.loop(0, num_chunks)
    def _(n):
        pl.when(n + 1 < num_chunks)(lambda: copy(n + 1).start())
        copy(n).wait()
        out_ref[...] = jnp.maximum(out_ref[...], buffers_ref[n % 2])


# %%
with interpreted(), record_dmas() as overlapped:
    output = run_chunks(two_buffers, x, 16)
assert jnp.array_equal(output, x.reshape(6, 16, 128).max(axis=0))
gantt({"one buffer": by_turns, "two buffers": overlapped}, chip="v5e", title="Before and after")

# %%
for name, timeline in {"one buffer": by_turns, "two buffers": overlapped}.items():
    predicted = predict_cycles(timeline, "v5e")
    print(f"{name:12} {predicted.total_cycles:5.0f} cycles, {predicted.stall_cycles:5.0f} of them "
          f"waiting (v5e, predicted)")  # fmt: skip
assert predicted.total_cycles < 0.7 * predict_cycles(by_turns, "v5e").total_cycles

# %% [markdown]
# The first copy cannot be hidden: there is nothing to compute yet. From then on both are busy.
#
# **Takeaway.** With two buffers the time is the larger of the two, plus the first copy. For a
# decode the larger one is the copies, so all that is computed comes for free.

# %% [markdown]
# ## 6. Where does a copy find its page?
#
# In a paged cache block n of a sequence is some pages, anywhere. A copy's address is computed by
# the **scalar core**, and what it computes with must be in **SMEM**. So lengths and page table are
# *scalar prefetch* arguments: they are in SMEM before the kernel begins. Rung 5 starts a block like
# this:

# %%
show_source(streamed.start_block)

# %%
show_source(streamed.page_copy)

# %% [markdown]
# Two things to see. `rows` is a number of the run, not of the compiler: `pl.ds(0, rows)` with a
# traced size is legal in a DMA, so the tail of the last page, which belongs to no sequence, is not
# moved. And all pages of a block signal the same semaphore, that of the buffer. How is it waited
# for?

# %%
show_source(streamed.wait_block)

# %% [markdown]
# Once, for the bytes of all of them. By hand, pages of 4 tokens and blocks of 8: a sequence of 13
# tokens has a block of 8 (two copies of 4) and one of 5 (a copy of 4 and a copy of 1). Here is what
# the recorder saw when the rung ran on just that:


# %%
def record_decode(kv_lens):
    """Rung 5 on sequences with pages of 4 tokens, in blocks of 8: what it started and awaited."""
    num_seqs = len(kv_lens)
    queries, kv_cache = jnp.ones((num_seqs, 4, 128)), jnp.ones((4 * num_seqs, 4, 4, 1, 128))
    table = np.arange(4 * num_seqs, dtype=np.int32)  # four pages per sequence, in order
    with interpreted(), record_dmas() as timeline:
        streamed.paged_decode(
            queries, kv_cache, np.int32(kv_lens), table, num_kv_heads=2, block_tokens=8
        )
    return timeline


print(record_decode([13]).table(kinds=("start", "wait")))

# %% [markdown]
# **Takeaway.** Addresses and sizes of DMAs are numbers that the kernel reads from SMEM. Shapes stay
# fixed, and not a byte too many is moved.

# %% [markdown]
# ## 7. Whose block is next?
#
# A sequence of 400 tokens is one block of 512. With a double buffer *inside* a sequence there is
# nothing to overlap: first copy, wait, compute; next sequence, copy, wait, compute. By turns again!
# So the prefetch has to go over the boundary: the block after the last one of a sequence is the
# first one of the next.

# %%
show_source(streamed.successor)

# %% [markdown]
# And "the next" is the next *live* one. A slot without tokens (an idle sequence) has no block. If
# its copy is started, it is never waited for; if it is waited for, it was never started.
# `find_next_live` answers for every sequence, before the kernel begins. Three sequences, the middle
# one idle:

# %%
print("next live from 0, 1, 2, 3:", streamed.find_next_live(jnp.array([9, 0, 3])))
timeline = record_decode([9, 0, 3])  # sequence 0 has pages 0 to 3, sequence 2 has pages 8 to 11
print(timeline.table(kinds=("start", "wait")))
assert len(timeline.copies) == 4  # three pages of sequence 0, one of sequence 2

# %% [markdown]
# Read it once aloud. Before sequence 0 computes its last block, block 0 of sequence 2 is on its
# way; sequence 1 does not occur. How much is it worth? 64 conversations of 400 tokens, one block
# each, if computing took half as long as copying:

# %%
copy_us = 400 * 2 * 8 * 128 * 2 / 819e9 * 1e6  # K and V, 8 heads of 128, bfloat16, on a v5e
by_turns_us, overlapped_us = 64 * 1.5 * copy_us, 64 * copy_us + 0.5 * copy_us
print(f"by turns {by_turns_us:.0f} us, over the boundary {overlapped_us:.0f} us (predicted)")
assert overlapped_us < 0.7 * by_turns_us

# %% [markdown]
# **Takeaway.** The unit of the pipeline is the block, not the sequence. Between two sequences of a
# batch is the place where decode kernels lose their time, and where they hang.

# %% [markdown]
# ## 8. Rung 5
#
# Here is the kernel. The grid walks over the sequences; the loop inside over the blocks of one. The
# softmax is that of chapter 4, unchanged.

# %%
show_source(streamed._decode_kernel)

# %% [markdown]
# Find in it: the first start (no other line does it), start before wait, the buffer that is
# computed on (`slot_ref`, in SMEM, because it has to outlive a grid step), and what happens if a
# sequence has no block. Seven sequences, one idle, one page that is full to its last slot:

# %%
rng = np.random.default_rng(0)
kv_lens = np.int32([33, 7, 0, 16, 50, 1, 24])
table = np.int32(rng.permutation(64)[: 7 * 8]).reshape(7, 8)  # pages of 8 tokens
queries = jnp.float32(rng.standard_normal((7, 4, 128)))
kv_cache = jnp.float32(rng.standard_normal((64, 8, 4, 1, 128)))

# %%
arguments = (queries, kv_cache, kv_lens, table.reshape(-1))
with interpreted(), record_dmas({"scratch[0]": "buffers"}) as timeline:
    output = streamed.paged_decode(*arguments, num_kv_heads=2, block_tokens=16)
expected = streamed.reference(*arguments, num_kv_heads=2)

print(f"largest difference to rung 2: {jnp.abs(output - expected).max():.1e}")
assert jnp.allclose(output, expected, atol=1e-5) and not output[2].any()

# %%
label = page_labels(table.reshape(-1), 8, page_size=8, block_tokens=16)
title = "Rung 5, seven sequences, one of them idle"
gantt(timeline, chip="v5e", compute_ratio=0.5, label=label, title=title)

# %% [markdown]
# The blue bars follow each other over all boundaries, whatever buffer they are in. The HBM pauses
# only after the shortest blocks (7 tokens, 1 token): those arrive before the block in front of them
# is computed, and there is no third buffer to go on with. The core waits a lot, and that is right:
# in a decode the HBM is what there is too little of.
#
# **Takeaway.** Rung 5 is chapter 4's softmax, chapter 2's page table and a double buffer. What is
# hard about it is not in any line; it is in the order of the lines.

# %% [markdown]
# ## 9. What did it save?
#
# Rung 4 gathered: three trips over the HBM for each token, padding included. Count what rung 5
# moved, from the record:

# %%
token_bytes = 4 * 128 * 4  # K and V of 2 heads of 128, float32
moved = sum(copy.num_bytes for copy in timeline.copies)
print(f"needed {kv_lens.sum() * token_bytes:,} bytes, rung 5 moved {moved:,}, "
      f"a gather of the table would move {3 * table.size * 8 * token_bytes:,}")  # fmt: skip
assert moved == kv_lens.sum() * token_bytes

# %% [markdown]
# Not a byte too many: each token of K and V crosses the HBM once.
#
# **Takeaway.** A decode is made of bytes, and rung 5 moves exactly those that it needs.

# %% [markdown]
# ## What is still slow
#
# First: it only decodes. One query per sequence is in the shape of the kernel:

# %%
from rpa.ladder import LADDER
from rpa.ragged import RaggedBatch

batch, _ = RaggedBatch.from_lengths([1, 3], [9, 7], [[0, 1], [2, 3]])
print(f"rung 5 {LADDER[4].refuses(batch)}")

# %% [markdown]
# Second: the new token. Its K and V have to be in the cache before the kernel starts, so a program
# of its own stores them first (`store_new_tokens`, chapter 3). For a decode that is a few
# kilobytes. What does it take to write them? Measured on the machine that runs this notebook, 8
# sequences, a cache of 512 pages:


# %%
def best_ms(function, cache):
    """The best of five times of a store; what it returns is the cache of the next call."""
    times_ms = []
    for _ in range(6):  # the first one compiles
        start = time.perf_counter()
        cache = jax.block_until_ready(function(cache))
        times_ms.append(1e3 * (time.perf_counter() - start))
    return min(times_ms[1:])


# %%
batch, _ = RaggedBatch.from_lengths([1] * 8, [100] * 8, np.arange(56).reshape(8, 7))
new = jnp.ones((8, 8, 128))  # K or V of 8 new tokens
cache = jnp.zeros((512, 16, 16, 1, 128))

store = jax.jit(lambda cache: ragged.store_new_tokens(cache, new, new, batch))
in_place = jax.jit(store, donate_argnums=0)

# %%
print(f"{2 * new.nbytes / 1e3:.0f} kB of new K and V, a cache of {cache.nbytes / 1e6:.0f} MB")
machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, plain JAX"
print(f"stored in a copy of the cache:  {best_ms(store, cache):7.2f} ms on {machine}")
print(f"stored in the cache, donated:   {best_ms(in_place, jnp.zeros_like(cache)):7.2f} ms")
temporary_bytes = in_place.lower(cache).compile().memory_analysis().temp_size_in_bytes
print(f"temporary memory of the latter: {temporary_bytes / 1e6:7.2f} MB")

# %% [markdown]
# Forget one `donate_argnums`, and the whole cache is copied for eight tokens. And even donated,
# what a compiler makes of a scatter into a large array is the compiler's business: look at its
# temporary memory. Then comes a second program, which reads through the page table what the first
# one has just written. For a prefill chunk of 512 tokens that is not a few kilobytes any more.
#
# **Chapter 6** takes the new K and V into the kernel: they enter the block from where the model put
# them, and are written to their pages while the block computes. One program, one trip less. And one
# more copy that can race with all the others.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/05_streamed.ipynb).
#
# **Read more:**
#
# - [TPU pipelining](https://docs.jax.dev/en/latest/pallas/tpu/pipelining.html): what the
#   automatic pipeline does with the same copies.
# - [Scalar prefetch and block-sparse
#   computation](https://docs.jax.dev/en/latest/pallas/tpu/sparse.html): indices that are known
#   before the kernel.
