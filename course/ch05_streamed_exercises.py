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
# known at run time only; and then you find bugs in other people's kernels. Read the lesson
# first: `notebooks/05_streamed.ipynb`.
#
# A DMA kernel that is wrong does not always give wrong numbers, and sometimes it never ends. So
# these checks run your kernel in a process of its own, twice: once with copies that arrive as late
# as they may, once with a race detector. A kernel that hangs is stopped.
#
# **Time:** about 90 minutes for the first five, as long for 5.6 and 5.7, two whole kernels, and
# 20 minutes for 5.8. The first check takes a few seconds more: that process has to start. The next
# cell starts it.

# %%
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import rpa
from rpa.check import sandbox
from rpa.check.chapters.launchers import interpreted, run_chunks, run_copy
from rpa.compat import hbm_memory_space
from rpa.figures import exercises as pictures
from rpa.interpreter import choose_interpret
from rpa.yours import earlier

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
# **Teaches:** a copy is started *and* waited for; between the two its memory is undefined.

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


# %% tags=["wrong"] refused="starts a copy that is never waited for"
def double_kernel(x_ref, out_ref, buffer_ref, sem):
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.start()
    copy_in.wait()
    buffer_ref[...] = 2 * buffer_ref[...]
    pltpu.make_async_copy(buffer_ref, out_ref, sem).start()


# %% tags=["wrong"] refused="waits for a semaphore that no copy signals"
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


# %% tags=["wrong"] refused="calls pltpu.sync_copy"
def double_kernel(x_ref, out_ref, buffer_ref, sem):
    pltpu.sync_copy(x_ref, buffer_ref)
    buffer_ref[...] = 2 * buffer_ref[...]
    pltpu.sync_copy(buffer_ref, out_ref)


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

# %%
pictures.lanes(
    {"copy into buffer 0": [(0, 2, "chunk 0"), (4, 2, "chunk 2")],
     "copy into buffer 1": [(2, 2, "chunk 1"), (6, 2, "chunk 3")],
     "add": [(2, 2, "buffer 0"), (4, 2, "buffer 1"), (6, 2, "buffer 0"), (8, 2, "buffer 1")]},
    "Four chunks through two buffers: while chunk n is added, chunk n + 1 is copied into the other "
    "buffer.",
)  # fmt: skip

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


# %% tags=["wrong"] refused="starts a copy that is never waited for"
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


# %% tags=["wrong"] refused="waits for a semaphore that no copy signals"
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
# is not to be paid once per page.
#
# **Teaches:** the address of a copy is a number that the kernel computes; and many copies share one
# semaphore, if you wait for all of them.

# %%
pictures.strips(
    [("cache in HBM", "0 0 0 | 1 1 1 | *2 *2 *2"), ("out in VMEM", "*2 *2 *2 | 0 0 0")],
    "The cache has pages 0, 1 and 2. The sequence's pages are 2 and 0: page 2 goes to the first "
    "rows of the output, page 0 to the rows behind them.",
    arrows=[((0, 7), (1, 1)), ((0, 1), (1, 4))],
    legend={"*": "page 2, rows 0 to 7", "": "other pages, 8 rows each"},
)

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


# %% tags=["wrong"] refused="starts a copy that is never waited for"
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


# %% tags=["wrong"] refused="waits for a semaphore that no copy signals"
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
# Not a byte more than these tokens is copied: the tail of the last page holds no token, and
# entries of the table behind the live ones are garbage (9999, or -1). `kv_len` may be 0. As in 5.3,
# start all copies, then wait for all.
#
# By hand: 13 tokens, pages of 8. Two copies: 8 rows of the first page, 5 rows of the second.
#
# **Teaches:** a DMA takes a size from a register; shapes are fixed, bytes are not.

# %%
pictures.strips(
    [("pages", "0 1 2 3 4 5 6 7 | 8 9 10 11 12 - - -"),
     ("out", "*0 *1 *2 *3 *4 *5 *6 *7 *8 *9 *10 *11 *12 0 0 0")],
    "13 tokens on two pages of eight: one copy of eight rows, one of five. Three rows of the "
    "output are zero.",
    arrows=[((0, 3), (1, 3)), ((0, 10), (1, 10))],
    legend={"*": "copied: 8 rows, 5 rows", "-": "no token: not read", "": "in HBM; zeros"},
)  # fmt: skip

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


# %% tags=["wrong"] refused="waits for a semaphore that no copy signals"
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


# %% tags=["wrong"] refused="In an index that is `pl.ds(start, size)`"
def collect_tokens(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem):
    page_size, kv_len = cache_ref.shape[1], kv_len_ref[0]
    out_ref[...] = jnp.zeros_like(out_ref)

    def copy(p):
        size = jnp.minimum(kv_len - p * page_size, page_size)
        source = cache_ref.at[page_indices_ref[p], :size]
        return pltpu.make_async_copy(source, out_ref.at[pl.ds(p * page_size, size)], sem)

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        copy(p).start()

    @pl.loop(0, pl.cdiv(kv_len, page_size))
    def _(p):
        copy(p).wait()


# %% tags=["wrong"] refused="A loop of that many turns is `@pl.loop(0, n)`"
def collect_tokens(page_indices_ref, kv_len_ref, cache_ref, out_ref, sem):
    page_size, kv_len = cache_ref.shape[1], kv_len_ref[0]
    out_ref[...] = jnp.zeros_like(out_ref)
    for p in range(kv_len // page_size):
        rows = out_ref.at[pl.ds(p * page_size, page_size)]
        copy = pltpu.make_async_copy(cache_ref.at[page_indices_ref[p]], rows, sem)
        copy.start()
        copy.wait()


# %% [markdown]
# ## Exercise 5.5: Three bugs
#
# Here is a kernel that adds up the tokens of each sequence, [num_seqs, num_tokens, 128] in
# HBM, block by block through two buffers. The prefetch goes over the boundary: while the last block
# of a sequence is added, the first block of the *next sequence* is on its way. The blocks of all
# sequences are counted through, `n = 0, 1, 2, ...`.
#
# In its author's tests it gave the right numbers. It has **three bugs**:


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
# arrived by the time it is read, the copy past the end reads foreign memory into a buffer
# that is never read, and copies mostly arrive in order. That is why a right answer proves so
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


# %% tags=["wrong"] refused="starts a copy that is never waited for"
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


# %% tags=["wrong"] refused="waits for a semaphore that no copy signals"
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


# %% [markdown]
# ## Exercise 5.6: Paged decode, whole
#
# Your kernel fetches its keys itself. One query of every sequence, K and V from their pages through
# the table: everything from 5.3 and 5.4, with attention in the place of a sum. No prefetch yet:
# start the copies of a block, wait for them, compute. That comes next.
#
# What is new is **the launch**. Read it once slowly; every kernel from here on has the same.
#
# - `pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=3, ...)`: the first three arguments of the
#   call are in SMEM before the kernel starts, so its scalar core can compute addresses from them;
# - `grid=(num_seqs,)`: the kernel runs once per sequence, `pl.program_id(0)` says which;
# - `in_specs`: queries come by a `BlockSpec` with a shape, one sequence a step, by the automatic
#   pipeline; the cache has none, only `memory_space=hbm_memory_space(interpret)`: it stays where it
#   is, and the kernel gets a reference to all of it;
# - `scratch_shapes`: a buffer in VMEM and a DMA semaphore, which live as long as the grid runs;
# - the kernel's parameters come in this order: scalars, inputs, outputs, scratch.
#
# And **a head out of the buffer**: the last three dimensions of the cache are [rows, packing,
# lanes]. Combined head 2h is K of head h, 2h + 1 its V, and combined head c is at `[c // packing, c
# % packing]` (chapter 2).
#
# Fill in the functions from top to bottom. By hand: 13 tokens, pages of 8, `block_tokens` 16: one
# block of two copies, of 8 and of 5 rows; one wait for 13. Keys 13 to 15 of the buffer are stale.
#
# **Teaches:** a whole kernel with DMAs of its own, and its launch.

# %%
pictures.strips(
    [("pages in HBM", "0 1 2 3 4 5 6 7 | 8 9 10 11 12 - - -"),
     ("block in VMEM", "*0 *1 *2 *3 *4 *5 *6 *7 *8 *9 *10 *11 *12 - - -"),
     ("the mask", "1 1 1 1 1 1 1 1 1 1 1 1 1 - - -")],
    "One block of 16 tokens: two copies, of eight and of five rows, and one wait for 13 tokens. "
    "Rows 13 to 15 are stale and the mask hides them.",
    arrows=[((0, 3), (1, 3)), ((0, 10), (1, 10))],
    legend={"*": "arrived: one wait for 13", "-": "stale, hidden by the mask"},
)  # fmt: skip

# %%
attend, new_state, output_of = earlier("attend", "new_state", "output_of")

# %% [markdown] tags=["hint"]
# Three loops, one inside the other: the grid over sequences; a `fori_loop` over the blocks of keys
# of one sequence, which carries the states of all KV heads; and inside `start_pages` a loop over
# the pages of a block. Nothing else has a loop that runs in the kernel: the heads are a Python
# loop.

# %% [markdown] tags=["hint"]
# `buffer_ref.at[pl.ds(start, size)]` is a reference to some tokens of a buffer, and the size may be
# known at run time only. `jax.lax.fori_loop(0, n, body, states)` carries a list of tuples as it is.
# `buffer_ref[:, row, part]` reads one combined head of all tokens. `-head_dim % 128` is what is
# missing to a multiple of 128.

# %% [markdown] tags=["hint"]
# ```python
# # start_pages: exercise 5.4 without its wait
# # wait_tokens
# tokens = buffer_ref.at[pl.ds(0, num_tokens)]
# pltpu.make_async_copy(tokens, tokens, sem).wait()  # a wait moves nothing: it counts bytes
#
# # decode_kernel
# def one_block(b, states):
#     num_keys = jnp.minimum(kv_len - b * block_tokens, block_tokens)
#     entry = s * pages_per_seq + ...
#     start_pages(cache_ref, page_indices_ref, entry, num_keys, buffer_ref, sem)
#     wait_tokens(...)
#     visible = jax.lax.broadcasted_iota(jnp.int32, (group, block_tokens), 1) < num_keys
#     return attend_heads(states, q_ref, buffer_ref, visible, num_keys, scale_ref[0])
#
# states = [new_state(group, lanes)] * num_kv_heads
# states = jax.lax.fori_loop(0, pl.cdiv(kv_len, block_tokens), one_block, states)
# for head, state in enumerate(states):
#     out_ref[head] = ...
#
# # paged_decode
# out = pl.pallas_call(
#     decode_kernel,
#     grid_spec=pltpu.PrefetchScalarGridSpec(
#         num_scalar_prefetch=3,
#         grid=(len(queries),),
#         in_specs=[q_spec, pl.BlockSpec(memory_space=hbm_memory_space(interpret))],
#         out_specs=q_spec,
#         scratch_shapes=[pltpu.VMEM((block_tokens, *kv_cache.shape[2:]), kv_cache.dtype), ...],
#     ),
#     out_shape=...,
#     interpret=interpret,
# )(kv_lens, page_indices, jnp.float32(sm_scale).reshape(1), folded, kv_cache)
# ```


# %% tags=["exercise"]
def choose_block(kv_cache, pages_per_seq):
    """Tokens of a block of keys: whole pages, up to 512 tokens, 2 MiB, and the longest sequence."""
    page_size, page_bytes = kv_cache.shape[1], kv_cache[0].size * kv_cache.dtype.itemsize
    return page_size * max(1, min(pages_per_seq, 512 // page_size, 2**21 // page_bytes))


def fold_heads(queries, num_kv_heads):
    """Queries [n, num_q_heads, head_dim] as [n, num_kv_heads, group, lanes].

    lanes is head_dim, filled up with zeros to a multiple of 128: so the cache has it.
    """
    ### BEGIN SOLUTION
    n, num_q_heads, head_dim = queries.shape
    folded = queries.reshape(n, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    return jnp.pad(folded, ((0, 0), (0, 0), (0, 0), (0, -head_dim % 128)))
    ### END SOLUTION


def start_pages(cache_ref, page_indices_ref, entry, num_tokens, buffer_ref, sem):
    """Start the copies of the first num_tokens tokens of a block, one per page.

    Their pages stand in the table from `entry` on. cache_ref: HBM [num_pages, page_size, rows,
    packing, lanes]; page_indices_ref: SMEM i32[num_seqs * pages_per_seq]; buffer_ref: VMEM
    [block_tokens, rows, packing, lanes].
    """
    ### BEGIN SOLUTION
    page_size = cache_ref.shape[1]

    @pl.loop(0, pl.cdiv(num_tokens, page_size))
    def _(p):
        size = jnp.minimum(num_tokens - p * page_size, page_size)
        source = cache_ref.at[page_indices_ref[entry + p], pl.ds(0, size)]
        target = buffer_ref.at[pl.ds(p * page_size, size)]
        pltpu.make_async_copy(source, target, sem).start()

    ### END SOLUTION


def wait_tokens(num_tokens, buffer_ref, sem):
    """Wait for as many bytes as num_tokens tokens of a buffer have, in one wait."""
    ### BEGIN SOLUTION
    tokens = buffer_ref.at[pl.ds(0, num_tokens)]
    pltpu.make_async_copy(tokens, tokens, sem).wait()
    ### END SOLUTION


def read_head(buffer_ref, head, dtype):
    """K and V of KV head `head` of a block, dtype[block_tokens, lanes] each.

    Combined head 2 * head is K and the next one is V; `packing` of them share a row.
    """
    ### BEGIN SOLUTION
    packing = buffer_ref.shape[2]
    combined = (2 * head, 2 * head + 1)
    return [buffer_ref[:, c // packing, c % packing].astype(dtype) for c in combined]
    ### END SOLUTION


def attend_heads(states, q_ref, buffer_ref, visible, num_keys, sm_scale):
    """Take a block into the states of all KV heads; q_ref: VMEM [num_kv_heads, rows, lanes]."""
    ### BEGIN SOLUTION
    new_states = []
    for head, state in enumerate(states):
        k, v = read_head(buffer_ref, head, q_ref.dtype)
        new_states.append(attend(state, q_ref[head], k, v, visible, num_keys, sm_scale))
    return new_states
    ### END SOLUTION


def decode_kernel(
    kv_lens_ref, page_indices_ref, scale_ref, q_ref, cache_ref, out_ref, buffer_ref, sem
):
    """All blocks of keys of one sequence, one after the other: grid step (sequence).

    kv_lens_ref, page_indices_ref, scale_ref: SMEM, i32[num_seqs], i32[num_seqs * pages_per_seq],
    f32[1]; q_ref, out_ref: VMEM [num_kv_heads, group, lanes]; cache_ref: HBM, the whole cache;
    buffer_ref: VMEM [block_tokens, rows, packing, lanes]; sem: a DMA semaphore.
    """
    s, block_tokens = pl.program_id(0), buffer_ref.shape[0]
    ### BEGIN SOLUTION
    num_kv_heads, group, lanes = q_ref.shape
    kv_len, pages_per_seq = kv_lens_ref[s], page_indices_ref.shape[0] // pl.num_programs(0)

    def one_block(b, states):
        num_keys = jnp.minimum(kv_len - b * block_tokens, block_tokens)
        entry = s * pages_per_seq + b * block_tokens // cache_ref.shape[1]
        start_pages(cache_ref, page_indices_ref, entry, num_keys, buffer_ref, sem)
        wait_tokens(num_keys, buffer_ref, sem)
        visible = jax.lax.broadcasted_iota(jnp.int32, (group, block_tokens), 1) < num_keys
        return attend_heads(states, q_ref, buffer_ref, visible, num_keys, scale_ref[0])

    states = [new_state(group, lanes)] * num_kv_heads
    states = jax.lax.fori_loop(0, pl.cdiv(kv_len, block_tokens), one_block, states)
    for head, state in enumerate(states):
        out_ref[head] = output_of(state, out_ref.dtype)
    ### END SOLUTION


def paged_decode(
    queries, kv_cache, kv_lens, page_indices, *, num_kv_heads, sm_scale, block_tokens=None
):
    """One query of every sequence against its pages: [num_seqs, num_q_heads, head_dim].

    queries: [num_seqs, num_q_heads, head_dim]; kv_cache: [num_pages, page_size, rows, packing,
    lanes], the new tokens are in it; kv_lens: i32[num_seqs], 0 is an idle slot; page_indices:
    i32[num_seqs * pages_per_seq]; block_tokens: whole pages.
    """
    block_tokens = block_tokens or choose_block(kv_cache, len(page_indices) // len(kv_lens))
    ### BEGIN SOLUTION
    folded, interpret = fold_heads(queries, num_kv_heads), choose_interpret(None)
    q_spec = pl.BlockSpec((None, *folded.shape[1:]), lambda s, *_: (s, 0, 0, 0))
    out = pl.pallas_call(
        decode_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(len(queries),),
            in_specs=[q_spec, pl.BlockSpec(memory_space=hbm_memory_space(interpret))],
            out_specs=q_spec,
            scratch_shapes=[
                pltpu.VMEM((block_tokens, *kv_cache.shape[2:]), kv_cache.dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(folded.shape, folded.dtype),
        interpret=interpret,
    )(kv_lens, page_indices, jnp.float32(sm_scale).reshape(1), folded, kv_cache)
    return out[..., : queries.shape[2]].reshape(queries.shape)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("5.6", paged_decode)

# %% [markdown]
# SmolLM2 with *your* attention in one layer of thirty, because the interpreter is slow. Your kernel
# decodes, so rung 3 reads the prompts; `behind_store` stores the new token before your function is
# called.

# %%
from rpa.models.speak import behind_store, speak

speak(behind_store(paged_decode), own_layers=1, own_prompt=False)

# %% [markdown] tags=["explanation"]
# Compare it with 4.7: `attend` is the same, letter by letter. What has changed is who brings the
# keys. The grid knows sequences only, because how many blocks a sequence has is a number in SMEM,
# and a grid is fixed before the kernel starts; so the blocks became a loop inside. A sequence of
# length 0 makes no turn, its state stays empty, and `output_of` gives zeros: an idle slot needs no
# case of its own.
#
# The index maps say `lambda s, *_`, since they are given the scalars too. And the cache is packed:
# `read_head` lets the compiler take K and V apart, which costs shifts and masks on every word
# (chapter 8 does better). It is right for one, two and four heads in a row, whatever the dtype.

# %% tags=["wrong"] refused="page p of the sequence is copied from page p of the cache"
# instead of
#         source = cache_ref.at[page_indices_ref[entry + p], pl.ds(0, size)]
# write
#         source = cache_ref.at[entry + p, pl.ds(0, size)]

# %% tags=["wrong"] refused="every sequence reads the pages of the first one"
# instead of
#         entry = s * pages_per_seq + b * block_tokens // cache_ref.shape[1]
# write
#         entry = b * block_tokens // cache_ref.shape[1]

# %% tags=["wrong"] refused="every block reads the pages of the first one"
# instead of
#         entry = s * pages_per_seq + b * block_tokens // cache_ref.shape[1]
# write
#         entry = s * pages_per_seq

# %% tags=["wrong"] refused="K and V are swapped"
# instead of
#     combined = (2 * head, 2 * head + 1)
# write
#     combined = (2 * head + 1, 2 * head)

# %% tags=["wrong"] refused="all K stand before all V"
# instead of
#     combined = (2 * head, 2 * head + 1)
# write
#     combined = (head, head + buffer_ref.shape[1] * packing // 2)

# %% tags=["wrong"] refused="the last block is left out where it is not full"
# instead of
#     states = jax.lax.fori_loop(0, pl.cdiv(kv_len, block_tokens), one_block, states)
# write
#     states = jax.lax.fori_loop(0, kv_len // block_tokens, one_block, states)

# %% tags=["wrong"] refused="reads a buffer before its copy has arrived"
# instead of
#         wait_tokens(num_keys, buffer_ref, sem)
# write

# %% tags=["wrong"] refused="waits for a semaphore that no copy signals"
# instead of
#         wait_tokens(num_keys, buffer_ref, sem)
# write
#         wait_tokens(block_tokens, buffer_ref, sem)

# %% tags=["wrong"] refused="waits for each copy before it starts the next one"
# instead of
#         pltpu.make_async_copy(source, target, sem).start()
# write
#         copy = pltpu.make_async_copy(source, target, sem)
#         copy.start()
#         copy.wait()
# instead of
#         wait_tokens(num_keys, buffer_ref, sem)
# write

# %% tags=["wrong"] refused="copies rows behind the last token"
# instead of
#         size = jnp.minimum(num_tokens - p * page_size, page_size)
# write
#         size = page_size
# instead of
#     tokens = buffer_ref.at[pl.ds(0, num_tokens)]
# write
#     page_size = 8
#     tokens = buffer_ref.at[pl.ds(0, pl.cdiv(num_tokens, page_size) * page_size)]

# %% tags=["wrong"] refused="stale keys of the last block count as visible"
# instead of
#         visible = jax.lax.broadcasted_iota(jnp.int32, (group, block_tokens), 1) < num_keys
# write
#         visible = jax.lax.broadcasted_iota(jnp.int32, (group, block_tokens), 1) < block_tokens


# %% [markdown]
# ## Exercise 5.7: The prefetch goes over the boundary
#
# In 5.6 the HBM rests while a block is computed, and the computation rests while a block is
# fetched. Use two buffers: start the copies of the next block, *then* wait for this one. And the
# next block after the last one of a sequence is the first one of the next sequence that has any: a
# decode of short sequences would otherwise never overlap (5.5, bug by bug).
#
# Two arrays tell the kernel what it must know, and JAX computes them before it starts. Write
# `block_order(kv_lens, block_tokens)`: count all blocks of all sequences through, n = 0, 1, 2, ...
# `number[s]` is the n of the first block of sequence s, so block n goes to buffer `n % 2` without
# anything to remember; and `next_live[s]` is the next sequence after s that is not idle.
#
# By hand: `kv_lens = [9, 0, 3]`, blocks of 8. Blocks: (0, 0), (0, 1), (2, 0). `number = [0, 2, 2]`,
# `next_live = [2, 2, 3]`; 3 means that there is none.
#
# Then the kernel, and its launch: 5.6 with a second buffer, a second semaphore, and two more
# scalars.
#
# **Teaches:** the HBM must never wait for the end of a computation; who starts the first copy, and
# who starts none.

# %%
pictures.lanes(
    {"copies": [(0, 2, "(0, 0) into 0"), (2, 2, "(0, 1) into 1"), (4, 2, "(2, 0) into 0")],
     "compute": [(2, 2, "(0, 0)"), (4, 2, "(0, 1)"), (6, 2, "(2, 0)")]},
    "Blocks (0, 0), (0, 1) and (2, 0): while the last block of sequence 0 is computed, the first "
    "block of sequence 2 is copied. Idle sequence 1 has none.",
    title="(sequence, block): the idle sequence 1 is passed over",
)  # fmt: skip

# %%
attend_heads, choose_block, fold_heads, start_pages, wait_tokens = earlier(
    "attend_heads", "choose_block", "fold_heads", "start_pages", "wait_tokens"
)
new_state, output_of = earlier("new_state", "output_of")

# %% [markdown] tags=["hint"]
# In iteration n the kernel starts block n + 1 and waits for block n. So every block is started one
# iteration early, except the very first, which has no iteration before it. And after the last block
# of all there is nothing to start.

# %% [markdown] tags=["hint"]
# `jnp.cumsum(x) - x` sums up what comes before each entry. `jax.lax.cummin(x, reverse=True)` takes,
# for each entry, the least from there on. `buffers_ref.at[slot]` and `sems.at[slot]` are the buffer
# and the semaphore of a slot, also where slot is known at run time only. `@pl.when(s <
# pl.num_programs(0))` guards a start for a sequence that does not exist.

# %% [markdown] tags=["hint"]
# ```python
# # block_order
# live = jnp.where(kv_lens > 0, jnp.arange(n), n)
# next_live = jax.lax.cummin(jnp.append(live[1:], n), reverse=True)
# return jnp.cumsum(num_blocks) - num_blocks, ...
#
# # prefetching_kernel
# def start(s, b):
#     @pl.when(s < pl.num_programs(0))
#     def _():
#         slot = (number_ref[s] + b) % 2
#         ...
#
# def one_block(b, states):
#     n, last = number_ref[s] + b, (b + 1) * block_tokens >= kv_len
#
#     @pl.when(n == 0)
#     def _():
#         start(s, b)
#
#     start(jnp.where(last, next_live_ref[s], s), ...)
#     num_keys = ...
#     wait_tokens(num_keys, buffers_ref.at[n % 2], ...)
#     ...
# ```


# %% tags=["exercise"]
def block_order(kv_lens, block_tokens):
    """The order of all blocks: two i32[n].

    `number`: how many blocks of keys all earlier sequences have, so that block b of sequence s is
    number[s] + b of all; `next_live`: the next sequence that has a token, n if there is none.
    """
    ### BEGIN SOLUTION
    n, num_blocks = len(kv_lens), pl.cdiv(kv_lens, block_tokens)
    live = jnp.where(kv_lens > 0, jnp.arange(n), n)
    next_live = jax.lax.cummin(jnp.append(live[1:], n), reverse=True)
    return jnp.cumsum(num_blocks) - num_blocks, next_live.astype(jnp.int32)
    ### END SOLUTION


def prefetching_kernel(
    kv_lens_ref,  # SMEM i32[num_seqs]
    number_ref,  # SMEM i32[num_seqs], see block_order
    next_live_ref,  # SMEM i32[num_seqs], see block_order
    page_indices_ref,  # SMEM i32[num_seqs * pages_per_seq]
    scale_ref,  # SMEM f32[1]
    q_ref,  # VMEM [num_kv_heads, group, lanes]
    cache_ref,  # HBM [num_pages, page_size, rows, packing, lanes]
    out_ref,  # VMEM [num_kv_heads, group, lanes]
    buffers_ref,  # VMEM [2, block_tokens, rows, packing, lanes]
    sems,  # two DMA semaphores, one a buffer
):
    """As decode_kernel; while a block is computed, the copies of the next one are on their way."""
    s, block_tokens = pl.program_id(0), buffers_ref.shape[1]
    ### BEGIN SOLUTION
    num_kv_heads, group, lanes = q_ref.shape
    kv_len, pages_per_seq = kv_lens_ref[s], page_indices_ref.shape[0] // pl.num_programs(0)

    def start(s, b):
        @pl.when(s < pl.num_programs(0))
        def _():
            slot = (number_ref[s] + b) % 2
            num_keys = jnp.minimum(kv_lens_ref[s] - b * block_tokens, block_tokens)
            entry = s * pages_per_seq + b * block_tokens // cache_ref.shape[1]
            buffer_ref, sem = buffers_ref.at[slot], sems.at[slot]
            start_pages(cache_ref, page_indices_ref, entry, num_keys, buffer_ref, sem)

    def one_block(b, states):
        n, last = number_ref[s] + b, (b + 1) * block_tokens >= kv_len
        buffer_ref, sem = buffers_ref.at[n % 2], sems.at[n % 2]

        @pl.when(n == 0)
        def _():
            start(s, b)  # the first block of all has no iteration before it

        start(jnp.where(last, next_live_ref[s], s), jnp.where(last, 0, b + 1))
        num_keys = jnp.minimum(kv_len - b * block_tokens, block_tokens)
        wait_tokens(num_keys, buffer_ref, sem)
        visible = jax.lax.broadcasted_iota(jnp.int32, (group, block_tokens), 1) < num_keys
        return attend_heads(states, q_ref, buffer_ref, visible, num_keys, scale_ref[0])

    states = [new_state(group, lanes)] * num_kv_heads
    states = jax.lax.fori_loop(0, pl.cdiv(kv_len, block_tokens), one_block, states)
    for head, state in enumerate(states):
        out_ref[head] = output_of(state, out_ref.dtype)
    ### END SOLUTION


def prefetched_decode(
    queries, kv_cache, kv_lens, page_indices, *, num_kv_heads, sm_scale, block_tokens=None
):
    """What paged_decode computes, with the copies of a block under the computation of another."""
    block_tokens = block_tokens or choose_block(kv_cache, len(page_indices) // len(kv_lens))
    ### BEGIN SOLUTION
    folded, interpret = fold_heads(queries, num_kv_heads), choose_interpret(None)
    q_spec = pl.BlockSpec((None, *folded.shape[1:]), lambda s, *_: (s, 0, 0, 0))
    out = pl.pallas_call(
        prefetching_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(len(queries),),
            in_specs=[q_spec, pl.BlockSpec(memory_space=hbm_memory_space(interpret))],
            out_specs=q_spec,
            scratch_shapes=[
                pltpu.VMEM((2, block_tokens, *kv_cache.shape[2:]), kv_cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(folded.shape, folded.dtype),
        # Buffers and semaphores live on from one sequence to the next: the order matters.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
    )(
        *(kv_lens, *block_order(kv_lens, block_tokens), page_indices),
        *(jnp.float32(sm_scale).reshape(1), folded, kv_cache),
    )
    return out[..., : queries.shape[2]].reshape(queries.shape)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("5.7", prefetched_decode)

# %% [markdown] tags=["explanation"]
# Start first, wait second. At the start of block n + 1 its buffer is free: block n - 1 was read in
# the iteration before. One semaphore for each buffer, or a wait could be ended by the wrong copy
# (5.5, bug 3). The kernel keeps no state of its own for the order: which buffer, which block comes
# next, and whether there is one, all follow from two arrays that were known before it began. Such a
# **list of work** can be printed, and tested on the host; chapter 7 makes a whole kernel for any
# batch from it, and changes nothing else.

# %% tags=["wrong"] refused="waits for a semaphore that no copy signals"
# instead of
#         @pl.when(n == 0)
# write
#         @pl.when(n < 0)

# %% tags=["wrong"] refused="an idle sequence is not passed over"
# instead of
#     live = jnp.where(kv_lens > 0, jnp.arange(n), n)
# write
#     live = jnp.arange(n)

# %% tags=["wrong"] refused="copies and computes by turns"
# instead of
#         start(jnp.where(last, next_live_ref[s], s), jnp.where(last, 0, b + 1))
# write
# instead of
#         @pl.when(n == 0)
# write
#         @pl.when(n >= 0)

# %% tags=["wrong"] refused="starts a copy on memory that another copy is still moving"
# instead of
#             slot = (number_ref[s] + b) % 2
# write
#             slot = (number_ref[s] + b) * 0
# instead of
#         buffer_ref, sem = buffers_ref.at[n % 2], sems.at[n % 2]
# write
#         buffer_ref, sem = buffers_ref.at[0], sems.at[0]

# %% tags=["wrong"] refused="lets no copy go over the end of a sequence"
# instead of
#         @pl.when(n == 0)
# write
#         @pl.when(b == 0)
# instead of
#         start(jnp.where(last, next_live_ref[s], s), jnp.where(last, 0, b + 1))
# write
#         start(jnp.where(last, pl.num_programs(0), s), jnp.where(last, 0, b + 1))

# %% tags=["wrong"] refused="the number of a sequence counts its own blocks, too"
# instead of
#     return jnp.cumsum(num_blocks) - num_blocks, next_live.astype(jnp.int32)
# write
#     return jnp.cumsum(num_blocks), next_live.astype(jnp.int32)


# %% [markdown]
# ## Exercise 5.8: One semaphore for all
#
# A kernel that people use in production gives one DMA semaphore to the K of a block, to its V, and
# to the K and V of the next block. It has served for months. Here is its skeleton: a row sum of K
# stands for the scores, and while block n is computed, block n + 1 is on its way.


# %%
def shipped(k_ref, v_ref, out_ref, k_buffers_ref, v_buffers_ref, sems, *, num_blocks):
    block_tokens = k_buffers_ref.shape[1]

    def copies(n):
        rows, b = pl.ds(n * block_tokens, block_tokens), n % 2
        k_copy = pltpu.make_async_copy(k_ref.at[rows], k_buffers_ref.at[b], sems.at[0, 0])
        v_copy = pltpu.make_async_copy(v_ref.at[rows], v_buffers_ref.at[b], sems.at[0, 0])
        return k_copy, v_copy

    def start(n):
        for copy in copies(n):
            copy.start()

    out_ref[...] = jnp.zeros_like(out_ref)
    start(0)

    @pl.loop(0, num_blocks)
    def _(n):
        @pl.when(n + 1 < num_blocks)
        def _():
            start(n + 1)

        k_copy, v_copy = copies(n)
        k_copy.wait()
        weights = k_buffers_ref[n % 2].sum(axis=1, keepdims=True)
        v_copy.wait()
        out_ref[...] += (weights * v_buffers_ref[n % 2]).sum(axis=0, keepdims=True)


# %% [markdown]
# Write `fixed`: the same kernel without its race. `sems` has room for four semaphores, `sems.at[0,
# 0]` to `sems.at[1, 1]`. The overlap has to stay: the scores are computed while V may still be on
# its way.
#
# By hand, in time: K0, V0, K1 and V1 are on their way, 4 KiB each, and the first wait asks for 4
# KiB. *Which* 4 KiB may have arrived?
#
# **Teaches:** a semaphore counts bytes and not copies; what may share one, and what may not.

# %%
pictures.lanes(
    {"K": [(0, 2, "K0"), (4, 2, "K1")], "V": [(0, 3, "V0"), (4, 3, "V1")],
     "compute": [(3, 1, "scores"), (4, 2, "out"), (7, 1, "scores"), (8, 2, "out")]},
    "Copies of K0 and V0 run together, then those of K1 and V1, while block 0 is computed. With "
    "one semaphore the wait for V0 may be satisfied by the bytes of K1.",
    title="Four copies, one counter: which of them has arrived?",
)  # fmt: skip

# %% [markdown] tags=["hint"]
# Write down the pairs of copies that can be under way at the same time. If a wait for one of them
# must not be let through by the other, the two need different semaphores.

# %% [markdown] tags=["hint"]
# K and V of one block could share one if *both* were waited for before anything is read; here the
# scores are computed between the two waits. Block n and block n + 1 are always under way together.

# %% [markdown] tags=["hint"]
# ```python
# k_copy = pltpu.make_async_copy(k_ref.at[rows], k_buffers_ref.at[b], sems.at[..., ...])
# v_copy = pltpu.make_async_copy(v_ref.at[rows], v_buffers_ref.at[b], sems.at[..., ...])
# ```


# %% tags=["exercise"]
def fixed(k_ref, v_ref, out_ref, k_buffers_ref, v_buffers_ref, sems, *, num_blocks):
    """The values added up, each with the sum of its key's lanes as its weight.

    k_ref, v_ref: HBM f32[num_tokens, 128]; out_ref: VMEM f32[1, 128]; k_buffers_ref,
    v_buffers_ref: VMEM f32[2, block_tokens, 128]; sems: DMA semaphores [2, 2].
    """
    ### BEGIN SOLUTION
    block_tokens = k_buffers_ref.shape[1]

    def copies(n):
        rows, b = pl.ds(n * block_tokens, block_tokens), n % 2
        k_copy = pltpu.make_async_copy(k_ref.at[rows], k_buffers_ref.at[b], sems.at[0, b])
        v_copy = pltpu.make_async_copy(v_ref.at[rows], v_buffers_ref.at[b], sems.at[1, b])
        return k_copy, v_copy

    def start(n):
        for copy in copies(n):
            copy.start()

    out_ref[...] = jnp.zeros_like(out_ref)
    start(0)

    @pl.loop(0, num_blocks)
    def _(n):
        @pl.when(n + 1 < num_blocks)
        def _():
            start(n + 1)

        k_copy, v_copy = copies(n)
        k_copy.wait()
        weights = k_buffers_ref[n % 2].sum(axis=1, keepdims=True)
        v_copy.wait()
        out_ref[...] += (weights * v_buffers_ref[n % 2]).sum(axis=0, keepdims=True)

    ### END SOLUTION


# %% tags=["check"]
rpa.check("5.8", fixed)

# %% [markdown] tags=["explanation"]
# One semaphore for each copy that can be under way: K or V, buffer 0 or 1. With one for all, the
# first wait is let through by any 4 KiB that have arrived, say those of V0, and the scores are made
# of what lay in the buffer before. Mostly K0 was started first and arrives first, so mostly the
# numbers are right: a test on the machine passes, a server gives a wrong token once a day, and it
# does so under load. A kernel with fewer semaphores is possible: one for each *buffer*, if both
# waits come before the first read. Then a wait for K may be let through by V, and the second wait
# cannot be, because it needs the bytes of both.


# %% tags=["wrong"] refused="any of them may be the one"
# instead of
#     k_copy = pltpu.make_async_copy(k_ref.at[rows], k_buffers_ref.at[b], sems.at[0, b])
# write
#     k_copy = pltpu.make_async_copy(k_ref.at[rows], k_buffers_ref.at[b], sems.at[0, 0])
# instead of
#     v_copy = pltpu.make_async_copy(v_ref.at[rows], v_buffers_ref.at[b], sems.at[1, b])
# write
#     v_copy = pltpu.make_async_copy(v_ref.at[rows], v_buffers_ref.at[b], sems.at[0, 0])

# %% tags=["wrong"] refused="starts the copy k[0:8] -> k_buffers[0] on sems[0, 0]"
# instead of
#     k_copy = pltpu.make_async_copy(k_ref.at[rows], k_buffers_ref.at[b], sems.at[0, b])
# write
#     k_copy = pltpu.make_async_copy(k_ref.at[rows], k_buffers_ref.at[b], sems.at[0, 0])

# %% tags=["wrong"] refused="a wait() is missing"
# instead of
#     v_copy.wait()
# write
#     pass

# %% tags=["wrong"] refused="the wait() comes too late"
# instead of
#     k_copy.wait()
# write
#     pass
# instead of
#     v_copy.wait()
# write
#     v_copy.wait(), k_copy.wait()

# %% tags=["wrong"] refused="starts a copy that is never waited for"
# instead of
#     @pl.when(n + 1 < num_blocks)
# write
#     @pl.when(n + 1 <= num_blocks)
# instead of
#     rows, b = pl.ds(n * block_tokens, block_tokens), n % 2
# write
#     rows, b = pl.ds(n % num_blocks * block_tokens, block_tokens), n % 2

# %% tags=["wrong"] refused="copies and computes by turns"
# instead of
#     start(0)
# write
#     pass
# instead of
#     @pl.when(n + 1 < num_blocks)
# write
#     @pl.when(n < num_blocks)
# instead of
#     start(n + 1)
# write
#     start(n)
# instead of
#     k_copy.wait()
# write
#     k_copy.wait(), v_copy.wait()
# instead of
#     v_copy.wait()
# write
#     pass
