# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 5: Copies by hand, exercises
#
# You move the bytes yourself: a copy, a double buffer, copies through a page table, a size that is
# known at run time only; and then you find three bugs in somebody else's kernel. Read the lesson
# first: `notebooks/05_streamed.ipynb`.
#
# A DMA kernel that is wrong does not always give wrong numbers, and sometimes it never ends. So
# these checks run your kernel in a process of its own, twice: once with copies that arrive as late
# as they may, once with a race detector. A kernel that hangs is stopped.
#
# **Time:** about 90 minutes for all five. The first check takes a few seconds more: that process
# has to start. The next cell starts it.

# %%
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import rpa
from rpa.check import sandbox
from rpa.check.chapters.launchers import interpreted, run_chunks, run_copy

sandbox.start()

# %% [markdown]
# ## Exercise 5.1: A copy
#
# Write `double_kernel(x_ref, out_ref, buffer_ref, sem)`. `x_ref` and `out_ref` are in HBM, where
# nothing can be computed. So: copy x into `buffer_ref` (VMEM, same shape), double it there, copy
# the buffer to `out_ref`. `sem` is a DMA semaphore, at zero.
#
# By hand, in time: start the copy in, wait for it, compute, start the copy out, wait for it. After
# each wait the semaphore is at zero again, so both copies can use it.
#
# **Teaches:** a copy is started *and* waited for; between the two its memory is nobody's.

# %% [markdown] tags=["hint"]
# Five steps, in the order of the paragraph above. The wait for the copy out belongs to the kernel
# too: when a kernel returns, its copies must be done.

# %% [markdown] tags=["hint"]
# `copy = pltpu.make_async_copy(source_ref, target_ref, sem)` describes a copy and moves nothing;
# `copy.start()` and `copy.wait()` do what they say. `buffer_ref[...]` reads and writes VMEM.

# %% [markdown] tags=["hint"]
# ```python
# copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
# copy_in.start()
# ...
# buffer_ref[...] = 2 * buffer_ref[...]
# copy_out = pltpu.make_async_copy(...)
# ...
# ```


# %% tags=["exercise"]
def double_kernel(x_ref, out_ref, buffer_ref, sem):
    """out = 2 * x; x_ref, out_ref: HBM f32[rows, 128]; buffer_ref: VMEM of that shape."""
    ### BEGIN SOLUTION
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.start()
    copy_in.wait()
    buffer_ref[...] = 2 * buffer_ref[...]
    copy_out = pltpu.make_async_copy(buffer_ref, out_ref, sem)
    copy_out.start()
    copy_out.wait()
    ### END SOLUTION


# %% tags=["check"]
rpa.check("5.1", double_kernel)

# %% [markdown]
# Watch it: `record_dmas` writes down what the kernel starts, waits for and computes.

# %%
from rpa.lab.copies.timeline import record_dmas

with interpreted(), record_dmas() as timeline:
    run_copy(double_kernel, jnp.ones((8, 128)))
print(timeline.table())

# %% [markdown] tags=["explanation"]
# Nothing in the memory keeps you from reading a buffer whose copy is still under way: the chip
# hands you whatever is there. Only the order start, wait, read is safe, and the last wait is as
# needed as the first. Without it the kernel returns while its result is on the way, and its
# semaphore is left above zero: the next kernel that waits on it is let through too early.


# %% tags=["wrong"] refused="its copy has arrived: a wait() is missing"
def double_kernel(x_ref, out_ref, buffer_ref, sem):
    pltpu.make_async_copy(x_ref, buffer_ref, sem).start()
    buffer_ref[...] = 2 * buffer_ref[...]
    copy_out = pltpu.make_async_copy(buffer_ref, out_ref, sem)
    copy_out.start()
    copy_out.wait()


# %% tags=["wrong"] refused="starts a copy that nobody waits for"
def double_kernel(x_ref, out_ref, buffer_ref, sem):
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.start()
    copy_in.wait()
    buffer_ref[...] = 2 * buffer_ref[...]
    pltpu.make_async_copy(buffer_ref, out_ref, sem).start()


# %% tags=["wrong"] refused="waits for a semaphore that nobody signals"
def double_kernel(x_ref, out_ref, buffer_ref, sem):
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.wait()
    buffer_ref[...] = 2 * buffer_ref[...]
    copy_out = pltpu.make_async_copy(buffer_ref, out_ref, sem)
    copy_out.wait()


# %% tags=["wrong"] refused="the wait() comes too late"
def double_kernel(x_ref, out_ref, buffer_ref, sem):
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.start()
    buffer_ref[...] = 2 * buffer_ref[...]
    copy_in.wait()
    copy_out = pltpu.make_async_copy(buffer_ref, out_ref, sem)
    copy_out.start()
    copy_out.wait()


# %% tags=["wrong"] refused="writes to memory that a copy is still moving"
def double_kernel(x_ref, out_ref, buffer_ref, sem):
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.start()
    copy_in.wait()
    doubled = 2 * buffer_ref[...]
    copy_out = pltpu.make_async_copy(buffer_ref, out_ref, sem)
    copy_out.start()
    buffer_ref[...] = doubled
    copy_out.wait()


# %% tags=["wrong"] refused="nothing is copied back"
def double_kernel(x_ref, out_ref, buffer_ref, sem):
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.start()
    copy_in.wait()
    buffer_ref[...] = 2 * buffer_ref[...]


# %% [markdown]
# ## Exercise 5.2: A double buffer
#
# x is long, and VMEM is not. Write `sum_chunks(x_ref, out_ref, buffers_ref, sems, *, num_chunks)`:
# the sum of all chunks of x, each as large as `out_ref`, which is in VMEM. `buffers_ref` has room
# for two chunks and `sems` is a semaphore for each.
#
# While chunk n is added, chunk n + 1 has to be on its way. The check refuses a kernel that is right
# and copies and computes by turns.
#
# By hand, four chunks, buffers 0 and 1:
#
# | step | start | wait | add |
# |---|---|---|---|
# | before | chunk 0 into 0 | | |
# | 0 | chunk 1 into 1 | chunk 0 | buffer 0 |
# | 1 | chunk 2 into 0 | chunk 1 | buffer 1 |
# | 2 | chunk 3 into 1 | chunk 2 | buffer 0 |
# | 3 | none left | chunk 3 | buffer 1 |
#
# **Teaches:** start first, wait second; two buffers, two semaphores; and the ends of the loop.

# %% [markdown] tags=["hint"]
# One copy before the loop, and in step n start the copy of chunk n + 1 if there is one, then wait
# for chunk n, then add. Chunk n lives in buffer n % 2 and signals semaphore n % 2.

# %% [markdown] tags=["hint"]
# `x_ref.at[pl.ds(first, rows)]` is a piece of a reference, without reading it;
# `buffers_ref.at[n % 2]` and `sems.at[n % 2]` likewise. `@pl.loop(0, num_chunks)` above a function
# of n is a loop; `@pl.when(condition)` an if. A function that makes the descriptor of chunk n
# serves the start and the wait.

# %% [markdown] tags=["hint"]
# ```python
# rows = out_ref.shape[0]
#
# def copy(n):
#     source = x_ref.at[pl.ds(n * rows, rows)]
#     return pltpu.make_async_copy(source, buffers_ref.at[n % 2], ...)
#
# out_ref[...] = jnp.zeros_like(out_ref)
# copy(0).start()
#
# @pl.loop(0, num_chunks)
# def _(n):
#     @pl.when(...)
#     def _():
#         copy(...).start()
#
#     copy(n).wait()
#     out_ref[...] += ...
# ```


# %% tags=["exercise"]
def sum_chunks(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    """The sum of the chunks of x, streamed through two buffers.

    x_ref: HBM f32[num_chunks * rows, 128]; out_ref: VMEM f32[rows, 128]; buffers_ref: VMEM
    f32[2, rows, 128]; sems: two DMA semaphores.
    """
    ### BEGIN SOLUTION
    rows = out_ref.shape[0]

    def copy(n):
        source = x_ref.at[pl.ds(n * rows, rows)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, num_chunks)
    def _(n):
        @pl.when(n + 1 < num_chunks)
        def _():
            copy(n + 1).start()

        copy(n).wait()
        out_ref[...] += buffers_ref[n % 2]

    ### END SOLUTION


# %% tags=["check"]
rpa.check("5.2", sum_chunks)

# %% [markdown]
# Before and after, on a v5e's clock. Before: a kernel with one buffer, which copies and computes by
# turns. After: yours. (Predicted, with computing as long as a copy.)


# %%
def one_buffer(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    out_ref[...] = jnp.zeros_like(out_ref)

    @pl.loop(0, num_chunks)
    def _(n):
        source = x_ref.at[pl.ds(n * out_ref.shape[0], out_ref.shape[0])]
        copy = pltpu.make_async_copy(source, buffers_ref.at[0], sems.at[0])
        copy.start()
        copy.wait()
        out_ref[...] += buffers_ref[0]


# %%
from rpa.figures.timeline import gantt

records = {}
for name, kernel in {"one buffer": one_buffer, "yours": sum_chunks}.items():
    with interpreted(), record_dmas() as records[name]:
        run_chunks(kernel, jnp.ones((64, 128)), 16)

gantt(records, chip="v5e", title="Four chunks, before and after")

# %% [markdown] tags=["explanation"]
# Buffer n % 2 is free for chunk n + 2 when chunk n has been added, and step n + 1 starts that copy
# only after step n has added: that order is the whole proof. Each buffer needs a semaphore of its
# own. With one for both, the wait for chunk n may be satisfied by the bytes of chunk n + 1, because
# copies need not arrive in the order in which they were started.


# %% tags=["wrong"] refused="copies and computes by turns"
def sum_chunks(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    rows = out_ref.shape[0]
    out_ref[...] = jnp.zeros_like(out_ref)

    @pl.loop(0, num_chunks)
    def _(n):
        source = x_ref.at[pl.ds(n * rows, rows)]
        copy = pltpu.make_async_copy(source, buffers_ref.at[0], sems.at[0])
        copy.start()
        copy.wait()
        out_ref[...] += buffers_ref[0]


# %% tags=["wrong"] refused="any of them may be the one"
def sum_chunks(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    rows = out_ref.shape[0]

    def copy(n):
        source = x_ref.at[pl.ds(n * rows, rows)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[0])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, num_chunks)
    def _(n):
        @pl.when(n + 1 < num_chunks)
        def _():
            copy(n + 1).start()

        copy(n).wait()
        out_ref[...] += buffers_ref[n % 2]


# %% tags=["wrong"] refused="starts a copy that nobody waits for"
def sum_chunks(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    rows = out_ref.shape[0]

    def copy(n):
        source = x_ref.at[pl.ds(n % num_chunks * rows, rows)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, num_chunks)
    def _(n):
        copy(n + 1).start()
        copy(n).wait()
        out_ref[...] += buffers_ref[n % 2]


# %% tags=["wrong"] refused="waits for a semaphore that nobody signals"
def sum_chunks(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    rows = out_ref.shape[0]

    def copy(n, sem):
        source = x_ref.at[pl.ds(n * rows, rows)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sem)

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0, sems.at[0]).start()

    @pl.loop(0, num_chunks)
    def _(n):
        @pl.when(n + 1 < num_chunks)
        def _():
            copy(n + 1, sems.at[(n + 1) % 2]).start()

        copy(n, sems.at[1 - n % 2]).wait()
        out_ref[...] += buffers_ref[n % 2]


# %% tags=["wrong"] refused="starts a copy on memory that another copy is still moving"
def sum_chunks(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    rows = out_ref.shape[0]

    def copy(n):
        source = x_ref.at[pl.ds(n * rows, rows)]
        return pltpu.make_async_copy(source, buffers_ref.at[0], sems.at[n % 2])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, num_chunks)
    def _(n):
        @pl.when(n + 1 < num_chunks)
        def _():
            copy(n + 1).start()

        copy(n).wait()
        out_ref[...] += buffers_ref[0]


# %% tags=["wrong"] refused="reads a buffer before its copy has arrived: a wait() is missing"
def sum_chunks(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    rows = out_ref.shape[0]
    out_ref[...] = jnp.zeros_like(out_ref)

    @pl.loop(0, num_chunks)
    def _(n):
        source = x_ref.at[pl.ds(n * rows, rows)]
        pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2]).start()
        out_ref[...] += buffers_ref[n % 2]


# %% tags=["wrong"] refused="out_ref is not zero when the first chunk is added"
def sum_chunks(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    rows = out_ref.shape[0]

    def copy(n):
        source = x_ref.at[pl.ds(n * rows, rows)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2])

    copy(0).start()

    @pl.loop(0, num_chunks)
    def _(n):
        @pl.when(n + 1 < num_chunks)
        def _():
            copy(n + 1).start()

        copy(n).wait()
        out_ref[...] += buffers_ref[n % 2]


# %% [markdown]
# ## Exercise 5.3: Through the page table
#
# A sequence's pages lie anywhere in the cache. Write
# `collect_pages(page_indices_ref, cache_ref, out_ref, sem)`: page p of the sequence is page
# `page_indices_ref[p]` of the cache, [num_pages, page_size, 128] in HBM, and belongs into the rows
# from `p * page_size` on of `out_ref` in VMEM. The page numbers are in SMEM, where the scalar core
# reads them one by one.
#
# By hand: pages [2, 0] of 8 tokens. Two copies: `cache[2]` to rows 0 to 7, `cache[0]` to rows 8 to
# 15. Start both, then wait for both: the first byte of a copy takes a microsecond to come, and that
# is not to be paid once a page.
#
# **Teaches:** the address of a copy is a number that the kernel computes; and many copies share one
# semaphore, if you wait for all of them.

# %% [markdown] tags=["hint"]
# Two loops over the pages, the first starts, the second waits. Both make the same descriptor.

# %% [markdown] tags=["hint"]
# `cache_ref.at[page]` is a page; `out_ref.at[pl.ds(first, page_size)]` some rows of the output. The
# number of pages is `page_indices_ref.shape[0]`.

# %% [markdown] tags=["hint"]
# ```python
# page_size = cache_ref.shape[1]
#
# def copy(p):
#     rows = out_ref.at[pl.ds(...)]
#     return pltpu.make_async_copy(cache_ref.at[page_indices_ref[p]], rows, sem)
#
# @pl.loop(0, page_indices_ref.shape[0])
# def _(p):
#     copy(p).start()
#
# ...
# ```


# %% tags=["exercise"]
def collect_pages(page_indices_ref, cache_ref, out_ref, sem):
    """Copy the pages of a sequence side by side.

    page_indices_ref: SMEM i32[pages]; cache_ref: HBM f32[num_pages, page_size, 128];
    out_ref: VMEM f32[pages * page_size, 128].
    """
    ### BEGIN SOLUTION
    page_size = cache_ref.shape[1]

    def copy(p):
        rows = out_ref.at[pl.ds(p * page_size, page_size)]
        return pltpu.make_async_copy(cache_ref.at[page_indices_ref[p]], rows, sem)

    @pl.loop(0, page_indices_ref.shape[0])
    def _(p):
        copy(p).start()

    @pl.loop(0, page_indices_ref.shape[0])
    def _(p):
        copy(p).wait()

    ### END SOLUTION


# %% tags=["check"]
rpa.check("5.3", collect_pages)

# %% [markdown] tags=["explanation"]
# In 5.2 one semaphore for two buffers was a bug, and here one semaphore for all pages is fine:
# after the *last* wait all bytes are there, whatever their order, and nothing is read before. A
# semaphore counts bytes, so one wait with a descriptor of the whole `out_ref` would do for all
# pages: `pltpu.make_async_copy(out_ref, out_ref, sem).wait()`. Rung 5 does that. The page numbers
# come from SMEM because the scalar core computes addresses, and it cannot read VMEM.


# %% tags=["wrong"] refused="look into the table"
def collect_pages(page_indices_ref, cache_ref, out_ref, sem):
    page_size = cache_ref.shape[1]

    def copy(p):
        return pltpu.make_async_copy(
            cache_ref.at[p], out_ref.at[pl.ds(p * page_size, page_size)], sem
        )

    @pl.loop(0, page_indices_ref.shape[0])
    def _(p):
        copy(p).start()

    @pl.loop(0, page_indices_ref.shape[0])
    def _(p):
        copy(p).wait()


# %% tags=["wrong"] refused="waits for each copy before it starts the next one"
def collect_pages(page_indices_ref, cache_ref, out_ref, sem):
    page_size = cache_ref.shape[1]

    @pl.loop(0, page_indices_ref.shape[0])
    def _(p):
        rows = out_ref.at[pl.ds(p * page_size, page_size)]
        copy = pltpu.make_async_copy(cache_ref.at[page_indices_ref[p]], rows, sem)
        copy.start()
        copy.wait()


# %% tags=["wrong"] refused="starts a copy that nobody waits for"
def collect_pages(page_indices_ref, cache_ref, out_ref, sem):
    page_size = cache_ref.shape[1]

    def copy(p):
        rows = out_ref.at[pl.ds(p * page_size, page_size)]
        return pltpu.make_async_copy(cache_ref.at[page_indices_ref[p]], rows, sem)

    @pl.loop(0, page_indices_ref.shape[0])
    def _(p):
        copy(p).start()

    copy(0).wait()


# %% tags=["wrong"] refused="starts a copy on memory that another copy is still moving"
def collect_pages(page_indices_ref, cache_ref, out_ref, sem):
    page_size = cache_ref.shape[1]

    def copy(p):
        rows = out_ref.at[pl.ds(p, page_size)]
        return pltpu.make_async_copy(cache_ref.at[page_indices_ref[p]], rows, sem)

    for p in range(page_indices_ref.shape[0]):
        copy(p).start()
    for p in range(page_indices_ref.shape[0]):
        copy(p).wait()


# %% tags=["wrong"] refused="waits for a semaphore that nobody signals"
def collect_pages(page_indices_ref, cache_ref, out_ref, sem):
    page_size = cache_ref.shape[1]

    @pl.loop(0, page_indices_ref.shape[0])
    def _(p):
        rows = out_ref.at[pl.ds(p * page_size, page_size)]
        pltpu.make_async_copy(cache_ref.at[page_indices_ref[p]], rows, sem).start()
        pltpu.make_async_copy(out_ref, out_ref, sem).wait()


# %% [markdown]
# ## Exercise 5.4: As many as there are
#
# The last page of a sequence is rarely full, and how many tokens there are is known at run time
# only. Write `collect_tokens(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem)`: the first
# `kv_len_ref[0]` tokens of the sequence, and zeros in the rows of `out_ref` behind them.
#
# Not a byte more than these tokens is copied: the tail of the last page belongs to nobody, and
# entries of the table behind the live ones are garbage (9999, or -1). `kv_len` may be 0. As in 5.3,
# start all copies, then wait for all.
#
# By hand: 13 tokens, pages of 8. Two copies: 8 rows of the first page, 5 rows of the second.
#
# **Teaches:** a DMA takes a size from a register; shapes are fixed, bytes are not.

# %% [markdown] tags=["hint"]
# First zeros everywhere, then the copies. Page p has min(what is left, page_size) tokens; the
# number of pages is `kv_len / page_size` rounded up.

# %% [markdown] tags=["hint"]
# `pl.ds(start, size)` takes a traced size. `pl.cdiv(a, b)` rounds up, `jnp.minimum` takes the
# smaller one, and the bounds of `@pl.loop(0, n)` may be traced as well.

# %% [markdown] tags=["hint"]
# ```python
# page_size, kv_len = cache_ref.shape[1], kv_len_ref[0]
# out_ref[...] = jnp.zeros_like(out_ref)
#
# def copy(p):
#     size = jnp.minimum(..., page_size)
#     source = cache_ref.at[page_indices_ref[p], pl.ds(0, size)]
#     return pltpu.make_async_copy(source, out_ref.at[pl.ds(..., size)], sem)
#
# @pl.loop(0, pl.cdiv(kv_len, page_size))
# def _(p):
#     copy(p).start()
# ...
# ```


# %% tags=["exercise"]
def collect_tokens(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem):
    """Copy the first kv_len tokens of a sequence, zeros behind them.

    page_indices_ref: SMEM i32[room for pages]; kv_len_ref: SMEM i32[1]; cache_ref: HBM
    f32[num_pages, page_size, 128]; out_ref: VMEM f32[room * page_size, 128].
    """
    ### BEGIN SOLUTION
    page_size, kv_len = cache_ref.shape[1], kv_len_ref[0]
    out_ref[...] = jnp.zeros_like(out_ref)

    def copy(p):
        size = jnp.minimum(kv_len - p * page_size, page_size)
        source = cache_ref.at[page_indices_ref[p], pl.ds(0, size)]
        return pltpu.make_async_copy(source, out_ref.at[pl.ds(p * page_size, size)], sem)

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        copy(p).start()

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        copy(p).wait()

    ### END SOLUTION


# %% tags=["check"]
rpa.check("5.4", collect_tokens)

# %% [markdown] tags=["explanation"]
# Start and wait use the same descriptor, so they agree on the bytes; a start of 5 rows and a wait
# for 8 would hang. The zeros come *before* the copies: written afterwards they would hit rows that
# are still being moved. A kernel for attention does not need them at all, it replaces what lies
# behind the end when it reads (`zero_tail`, chapter 4). On the chip a copy of dynamic size costs a
# few more scalar instructions than one of a whole page; chapter 10 counts them.


# %% tags=["wrong"] refused="copies rows behind the last token"
def collect_tokens(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem):
    page_size, kv_len = cache_ref.shape[1], kv_len_ref[0]
    out_ref[...] = jnp.zeros_like(out_ref)

    def copy(p):
        rows = out_ref.at[pl.ds(p * page_size, page_size)]
        return pltpu.make_async_copy(cache_ref.at[page_indices_ref[p]], rows, sem)

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        copy(p).start()

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        copy(p).wait()


# %% tags=["wrong"] refused="the last page is left out where it is not full"
def collect_tokens(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem):
    page_size, kv_len = cache_ref.shape[1], kv_len_ref[0]
    out_ref[...] = jnp.zeros_like(out_ref)

    def copy(p):
        rows = out_ref.at[pl.ds(p * page_size, page_size)]
        return pltpu.make_async_copy(cache_ref.at[page_indices_ref[p]], rows, sem)

    @pl.loop(0, kv_len // page_size)
    def _(p):
        copy(p).start()

    @pl.loop(0, kv_len // page_size)
    def _(p):
        copy(p).wait()


# %% tags=["wrong"] refused="waits for each copy before it starts the next one"
def collect_tokens(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem):
    page_size, kv_len = cache_ref.shape[1], kv_len_ref[0]
    out_ref[...] = jnp.zeros_like(out_ref)

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        size = jnp.minimum(kv_len - p * page_size, page_size)
        source = cache_ref.at[page_indices_ref[p], pl.ds(0, size)]
        copy = pltpu.make_async_copy(source, out_ref.at[pl.ds(p * page_size, size)], sem)
        copy.start()
        copy.wait()


# %% tags=["wrong"] refused="out_ref is not set to zero first"
def collect_tokens(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem):
    page_size, kv_len = cache_ref.shape[1], kv_len_ref[0]

    def copy(p):
        size = jnp.minimum(kv_len - p * page_size, page_size)
        source = cache_ref.at[page_indices_ref[p], pl.ds(0, size)]
        return pltpu.make_async_copy(source, out_ref.at[pl.ds(p * page_size, size)], sem)

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        copy(p).start()

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        copy(p).wait()


# %% tags=["wrong"] refused="waits for a semaphore that nobody signals"
def collect_tokens(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem):
    page_size, kv_len = cache_ref.shape[1], kv_len_ref[0]
    out_ref[...] = jnp.zeros_like(out_ref)

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        size = jnp.minimum(kv_len - p * page_size, page_size)
        source = cache_ref.at[page_indices_ref[p], pl.ds(0, size)]
        pltpu.make_async_copy(source, out_ref.at[pl.ds(p * page_size, size)], sem).start()

    pltpu.make_async_copy(out_ref, out_ref, sem).wait()


# %% tags=["wrong"] refused="writes to memory that a copy is still moving"
def collect_tokens(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem):
    page_size, kv_len = cache_ref.shape[1], kv_len_ref[0]

    def copy(p):
        size = jnp.minimum(kv_len - p * page_size, page_size)
        source = cache_ref.at[page_indices_ref[p], pl.ds(0, size)]
        return pltpu.make_async_copy(source, out_ref.at[pl.ds(p * page_size, size)], sem)

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        copy(p).start()

    out_ref[...] = jnp.zeros_like(out_ref)

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        copy(p).wait()


# %% [markdown]
# ## Exercise 5.5: Three bugs
#
# Somebody wrote a kernel that adds up the tokens of each sequence, [num_seqs, num_tokens, 128] in
# HBM, block by block through two buffers. The prefetch goes over the boundary: while the last block
# of a sequence is added, the first block of the *next sequence* is on its way. The blocks of all
# sequences are counted through, `n = 0, 1, 2, ...`.
#
# In the author's tests it gave the right numbers. It has **three bugs**. Here it is:


# %%
def broken(x_ref, out_ref, buffers_ref, sems, *, blocks_per_seq):
    num_blocks, block_tokens = x_ref.shape[0] * blocks_per_seq, buffers_ref.shape[1]

    def copy(n):
        s, b = n // blocks_per_seq, n % blocks_per_seq
        source = x_ref.at[s, pl.ds(b * block_tokens, block_tokens)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[0])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, num_blocks)
    def _(n):
        copy(n + 1).start()
        s = n // blocks_per_seq
        out_ref[pl.ds(s, 1)] += buffers_ref[n % 2].sum(axis=0, keepdims=True)
        copy(n).wait()


# %% [markdown]
# Write `fixed`, the same kernel without them. Copy the code and mend one bug after the other; run
# the check in between and read what it says.
#
# **Teaches:** the checks of a kernel are worth more than its right answers.

# %% [markdown] tags=["hint"]
# Read each line with one question. What has arrived when this line reads? Who waits for this copy?
# Which copy does this wait wait for?

# %% [markdown] tags=["hint"]
# Bug 1: the order of two lines. Bug 2: the last step. `@pl.when(n + 1 < num_blocks)` makes a start
# conditional. Bug 3: two copies are on their way at a time, and a semaphore only counts bytes.

# %% [markdown] tags=["hint"]
# ```python
# ...
#     return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[...])
# ...
# @pl.loop(0, num_blocks)
# def _(n):
#     @pl.when(...)
#     def _():
#         copy(n + 1).start()
#
#     copy(n).wait()
#     ...
# ```


# %% tags=["exercise"]
def fixed(x_ref, out_ref, buffers_ref, sems, *, blocks_per_seq):
    """The sum over the tokens of each sequence, streamed in blocks.

    x_ref: HBM f32[num_seqs, num_tokens, 128]; out_ref: VMEM f32[num_seqs, 128]; buffers_ref: VMEM
    f32[2, block_tokens, 128]; sems: two DMA semaphores.
    """
    ### BEGIN SOLUTION
    num_blocks, block_tokens = x_ref.shape[0] * blocks_per_seq, buffers_ref.shape[1]

    def copy(n):
        s, b = n // blocks_per_seq, n % blocks_per_seq
        source = x_ref.at[s, pl.ds(b * block_tokens, block_tokens)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, num_blocks)
    def _(n):
        @pl.when(n + 1 < num_blocks)
        def _():
            copy(n + 1).start()

        copy(n).wait()
        s = n // blocks_per_seq
        out_ref[pl.ds(s, 1)] += buffers_ref[n % 2].sum(axis=0, keepdims=True)

    ### END SOLUTION


# %% tags=["check"]
rpa.check("5.5", fixed)

# %% [markdown] tags=["explanation"]
# The wait stood behind the read; the last step started a copy for a block that does not exist; and
# both buffers signalled one semaphore. Each of them can go well: a copy of a small block has mostly
# arrived by the time it is read, the copy past the end reads somebody else's memory into a buffer
# that nobody looks at, and copies mostly arrive in order. That is why a right answer proves so
# little here. Late copies (NaN until the wait), a race detector and semaphores that must end at
# zero: all three were needed to find all three.


# %% tags=["wrong"] refused="the wait() comes too late"
def fixed(x_ref, out_ref, buffers_ref, sems, *, blocks_per_seq):
    num_blocks, block_tokens = x_ref.shape[0] * blocks_per_seq, buffers_ref.shape[1]

    def copy(n):
        s, b = n // blocks_per_seq, n % blocks_per_seq
        source = x_ref.at[s, pl.ds(b * block_tokens, block_tokens)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, num_blocks)
    def _(n):
        @pl.when(n + 1 < num_blocks)
        def _():
            copy(n + 1).start()

        s = n // blocks_per_seq
        out_ref[pl.ds(s, 1)] += buffers_ref[n % 2].sum(axis=0, keepdims=True)
        copy(n).wait()


# %% tags=["wrong"] refused="starts a copy that nobody waits for"
def fixed(x_ref, out_ref, buffers_ref, sems, *, blocks_per_seq):
    num_blocks, block_tokens = x_ref.shape[0] * blocks_per_seq, buffers_ref.shape[1]

    def copy(n):
        s, b = n // blocks_per_seq, n % blocks_per_seq
        source = x_ref.at[s, pl.ds(b * block_tokens, block_tokens)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, num_blocks)
    def _(n):
        copy(n + 1).start()
        copy(n).wait()
        s = n // blocks_per_seq
        out_ref[pl.ds(s, 1)] += buffers_ref[n % 2].sum(axis=0, keepdims=True)


# %% tags=["wrong"] refused="any of them may be the one"
def fixed(x_ref, out_ref, buffers_ref, sems, *, blocks_per_seq):
    num_blocks, block_tokens = x_ref.shape[0] * blocks_per_seq, buffers_ref.shape[1]

    def copy(n):
        s, b = n // blocks_per_seq, n % blocks_per_seq
        source = x_ref.at[s, pl.ds(b * block_tokens, block_tokens)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[0])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, num_blocks)
    def _(n):
        @pl.when(n + 1 < num_blocks)
        def _():
            copy(n + 1).start()

        copy(n).wait()
        s = n // blocks_per_seq
        out_ref[pl.ds(s, 1)] += buffers_ref[n % 2].sum(axis=0, keepdims=True)


# %% tags=["wrong"] refused="copies and computes by turns"
def fixed(x_ref, out_ref, buffers_ref, sems, *, blocks_per_seq):
    num_blocks, block_tokens = x_ref.shape[0] * blocks_per_seq, buffers_ref.shape[1]
    out_ref[...] = jnp.zeros_like(out_ref)

    @pl.loop(0, num_blocks)
    def _(n):
        s, b = n // blocks_per_seq, n % blocks_per_seq
        source = x_ref.at[s, pl.ds(b * block_tokens, block_tokens)]
        copy = pltpu.make_async_copy(source, buffers_ref.at[0], sems.at[0])
        copy.start()
        copy.wait()
        out_ref[pl.ds(s, 1)] += buffers_ref[0].sum(axis=0, keepdims=True)


# %% tags=["wrong"] refused="waits for a semaphore that nobody signals"
def fixed(x_ref, out_ref, buffers_ref, sems, *, blocks_per_seq):
    num_blocks, block_tokens = x_ref.shape[0] * blocks_per_seq, buffers_ref.shape[1]

    def copy(n):
        s, b = n // blocks_per_seq, n % blocks_per_seq
        source = x_ref.at[s, pl.ds(b * block_tokens, block_tokens)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2])

    out_ref[...] = jnp.zeros_like(out_ref)

    @pl.loop(0, num_blocks)
    def _(n):
        @pl.when(n + 1 < num_blocks)
        def _():
            copy(n + 1).start()

        copy(n).wait()
        s = n // blocks_per_seq
        out_ref[pl.ds(s, 1)] += buffers_ref[n % 2].sum(axis=0, keepdims=True)


# %% tags=["wrong"] refused="starts a copy on memory that another copy is still moving"
def fixed(x_ref, out_ref, buffers_ref, sems, *, blocks_per_seq):
    num_blocks, block_tokens = x_ref.shape[0] * blocks_per_seq, buffers_ref.shape[1]

    def copy(n, slot):
        s, b = n // blocks_per_seq, n % blocks_per_seq
        source = x_ref.at[s, pl.ds(b * block_tokens, block_tokens)]
        return pltpu.make_async_copy(source, buffers_ref.at[slot], sems.at[n % 2])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0, 0).start()

    @pl.loop(0, num_blocks)
    def _(n):
        @pl.when(n + 1 < num_blocks)
        def _():
            copy(n + 1, n % 2).start()

        copy(n, n % 2).wait()
        s = n // blocks_per_seq
        out_ref[pl.ds(s, 1)] += buffers_ref[n % 2].sum(axis=0, keepdims=True)


# %% tags=["wrong"] refused="starts the copy x[1, 0:8] -> buffers[0]"
def fixed(x_ref, out_ref, buffers_ref, sems, *, blocks_per_seq):
    num_blocks, block_tokens = x_ref.shape[0] * blocks_per_seq, buffers_ref.shape[1]

    def copy(n):  # the buffer goes by the block of the sequence: 0, 1, 0 and then 0 again
        s, b = n // blocks_per_seq, n % blocks_per_seq
        source = x_ref.at[s, pl.ds(b * block_tokens, block_tokens)]
        return pltpu.make_async_copy(source, buffers_ref.at[b % 2], sems.at[b % 2])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, num_blocks)
    def _(n):
        @pl.when(n + 1 < num_blocks)
        def _():
            copy(n + 1).start()

        copy(n).wait()
        s, b = n // blocks_per_seq, n % blocks_per_seq
        out_ref[pl.ds(s, 1)] += buffers_ref[b % 2].sum(axis=0, keepdims=True)
