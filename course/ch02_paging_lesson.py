# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 2: Paged attention
#
# **Time:** 45 minutes to read and run, about two hours for the exercises.
#
# **You need:** chapter 1, NumPy indexing, and the words HBM, SMEM and DMA of chapter 0. No TPU.
#
# **You will be able to:** measure where the memory of a KV cache goes; translate a token's
# position into a page and a slot; let sequences share pages until one of them writes; say why the
# cache has five dimensions, and what its padding costs; compute attention through a page table;
# and choose a page size with numbers.
#
# Chapter 1 ended with a KV cache that either grows, and compiles a program per step, or is reserved
# for the longest answer there can be, and mostly stays empty. **Rung 2** cuts the cache into
# **pages**. Attention computes the same numbers as before; only where K and V lie is new.

# %%
import os
import time
from collections import deque, namedtuple
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

# %%
from rpa import chips, dense, paging, traces
from rpa.figures import paging as pictures
from rpa.figures import show_source
from rpa.page_pool import OutOfPages, PagePool, cdiv
from rpa.shapes import LLAMA3_8B

# %% [markdown]
# ## 1. How long will it get?
#
# A request comes with a prompt, and how long the answer will be is not known: the model stops when
# it stops. Here are lengths as a public chat service saw them (a sampler fitted to the [Azure LLM
# inference trace 2023](https://github.com/Azure/AzurePublicDataset), CC-BY; Patel et al., ISCA
# 2024). The model of this chapter is Llama 3 8B, which can handle 8,192 tokens, so longer requests
# are left out.

# %%
CONTEXT = 8192  # the most tokens that a sequence of Llama 3 8B can have
prompts, answers = traces.sample_requests(4000, seed=0)
fits = prompts + answers <= CONTEXT
prompts, answers = prompts[fits], answers[fits]

series = {"prompt": prompts, "answer": answers, "both": prompts + answers}
pictures.lengths(series, markers=[("the model's context", CONTEXT)])

# %% [markdown]
# What does a token cost? K and V of every KV head in every layer: 128 KiB. A v6e has 32 GiB; with
# 15 GiB of weights and a little to work with, say that 16 GiB are left for the cache.

# %%
token_bytes = LLAMA3_8B.kv_bytes_per_token()
weight_bytes = 2 * LLAMA3_8B.num_parameters  # bfloat16
NUM_SLOTS = 16 * 2**30 // token_bytes  # a slot has room for one token, in all layers

reserved_bytes, needed_bytes = CONTEXT * token_bytes, np.mean(prompts + answers) * token_bytes
print(f"weights {weight_bytes / 2**30:.1f} GiB, cache {token_bytes // 1024} KiB per token: "
      f"{NUM_SLOTS:,} slots in 16 GiB")  # fmt: skip
print(f"reserved for each sequence: {reserved_bytes / 2**30:.2f} GiB")
print(f"needed at the end, on average: {needed_bytes / 2**30:.2f} GiB")
assert NUM_SLOTS == 131_072 and needed_bytes < 0.25 * reserved_bytes

# %% [markdown]
# **Takeaway.** Lengths are unknown in advance and spread over three orders of magnitude. Room for
# the longest is several times the room that most sequences need.

# %% [markdown]
# ## 2. What gets lost when memory is reserved?
#
# Suppose that we reserve less: the prompt, and a limit for the answer that the user gives. Now
# reservations differ in size, and memory becomes a strip of pieces and **holes**. The simplest
# allocator is *first fit*: walk over the holes and cut the piece out of the first that has room.


# %%
def take(holes, size, align=1):
    """The start of `size` free slots, cut out of the first hole that has them; None if none has."""
    for i, (begin, end) in enumerate(holes):
        start = cdiv(begin, align) * align
        if start + size <= end:
            pieces = [(begin, start), (start + size, end)]
            holes[i : i + 1] = [piece for piece in pieces if piece[0] < piece[1]]
            return start
    return None


# %% [markdown]
# And when a sequence is done, its piece becomes a hole, and grows together with holes next to it:


# %%
def give_back(holes, start, size):
    """Return `size` slots from `start` on; neighbouring holes become one."""
    merged = []
    for begin, end in sorted([*holes, (start, start + size)]):
        if merged and merged[-1][1] == begin:
            begin, _ = merged.pop()
        merged.append((begin, end))
    holes[:] = merged


# %% [markdown]
# By hand, with 24 slots. Sequences a, b and c reserve 8 each. Then a and c are done, while b,
# which has 3 tokens so far, will stop at 5. Can a sequence that needs 12 slots come in?

# %%
holes = [(0, 24)]
a, b, c = (take(holes, 8) for _ in range(3))
give_back(holes, a, 8)
give_back(holes, c, 8)

assert sum(end - begin for begin, end in holes) == 16  # 16 slots are free,
assert take(holes, 12) is None  # and 12 cannot be had

pieces = [(8, 11, "live", "b"), (11, 13, "later", "b"), (13, 16, "never", "b")]
pictures.memory_strip(pieces, 24, "16 slots are free, and 12 in a row are not")

# %% [markdown]
# Three kinds of loss stand in this strip. Slots that b **will use later**: no other sequence can
# use them now. Slots that b will **never use**, because the limit was a guess: *internal
# fragmentation*. And free slots that lie in pieces too small for the next request: *external
# fragmentation*.
#
# **Takeaway.** A sequence that must lie in one piece loses memory three times: to its own future,
# to a limit that is never reached, and to the holes between pieces.

# %% [markdown]
# ## 3. How much is it, on real lengths?
#
# Let us serve. Requests wait in order of arrival; a request that finds room starts; every running
# sequence grows by a token a step; after `answer` steps it leaves. `reserve(prompt, answer)` says
# how many slots a request asks for.

# %%
Running = namedtuple("Running", "prompt answer start size since")


def serve(requests, reserve, align, num_steps=1000):
    holes, running, waiting = [(0, NUM_SLOTS)], [], deque(requests)
    for step in range(num_steps):
        for done in [r for r in running if step - r.since == r.answer]:
            running.remove(done)
            give_back(holes, done.start, done.size)
        size = reserve(*waiting[0])
        while (start := take(holes, size, align(size))) is not None:
            running.append(Running(*waiting.popleft(), start, size, step))
            size = reserve(*waiting[0])
        yield reserved_use(running, step)


# %% [markdown]
# What the memory holds in one step, and the average over the second half of all steps, when the
# start is forgotten:


# %%
def reserved_use(running, step):
    """How many sequences run, and what their slots are for."""
    live = sum(r.prompt + step - r.since for r in running)
    at_the_end = sum(r.prompt + r.answer for r in running)
    reserved = sum(r.size for r in running)
    never, later = reserved - at_the_end, at_the_end - live
    return {"running": len(running), "live": live, "later": later, "never": never}


def average(steps):
    log = list(steps)
    return {name: np.mean([use[name] for use in log[len(log) // 2 :]]) for name in log[0]}


# %% [markdown]
# Four ways to reserve: room for the longest; the prompt and 1,024 tokens, which is more than the
# longest answer; the same rounded up to a power of two, where a piece starts at a multiple of its
# size (a *buddy allocator*: few kinds of holes, quick to merge); and, as a dream, what the answer
# really will be.


# %%
def power_of_two(prompt, answer):
    return 1 << (prompt + 1024 - 1).bit_length()


anywhere, at_multiples = (lambda size: 1), (lambda size: size)
ways = {
    "the longest: 8,192": (lambda prompt, answer: CONTEXT, anywhere),
    "prompt + 1,024, buddy": (power_of_two, at_multiples),
    "prompt + 1,024": (lambda prompt, answer: prompt + 1024, anywhere),
    "an oracle knows": (lambda prompt, answer: prompt + answer, anywhere),
}
requests = list(zip(prompts.tolist(), answers.tolist(), strict=True))
measured = {name: average(serve(requests, *way)) for name, way in ways.items()}

# %%
for name, use in measured.items():
    print(f"{name:22} {use['running']:4.0f} running, {use['live'] / NUM_SLOTS:.0%} live tokens")
assert measured["the longest: 8,192"]["live"] < 0.2 * NUM_SLOTS
assert measured["an oracle knows"]["live"] < 0.85 * NUM_SLOTS

# %% [markdown]
# The oracle is the surprise: even who knows every answer's length in advance loses nearly a third,
# to slots that wait for their token and to holes. The picture follows in a moment, with one bar
# more.
#
# **Takeaway.** Reserving for the longest uses a seventh of the memory. No clever guess mends it,
# for the trouble is the *one piece*.

# %% [markdown]
# ## 4. What if a sequence need not lie in one piece?
#
# Operating systems cut a program's memory into **pages** of one size, put each wherever there is
# room, and write down where. Do the same with tokens
# ([PagedAttention](https://arxiv.org/abs/2309.06180), Kwon et al. 2023). All pages are alike, so
# no hole is ever too small; a sequence takes a page when it needs one and not before.
#
# By hand: pages of 4 slots. Sequence a has 6 tokens, b has 9. Then a gets 4 tokens more.

# %%
pool = PagePool(num_pages=8, page_size=4)
pool.allocate("a", 6)
pool.allocate("b", 9)
pool.append("a", 4)

pictures.page_owners(pool, ["a", "b"], "Each row of the page table lists the pages of a sequence")

# %% [markdown]
# The numbers in the slots are positions. Positions 6 and 7 of a went into the room that page 1
# still had, positions 8 and 9 into a fresh page. It does not lie next to the others, and does not
# have to.
#
# Where is position 9 of a? It is in page `9 // 4 = 2` *of the sequence*; the table says that this
# is page 5 *of the cache*; and there in slot `9 % 4 = 1`. That is the whole trick.

# %%
table = pool.page_table(["a", "b"], pages_per_seq=4)  # i32[2 sequences, 4]; unused entries hold 0
page, slot = table[0, 9 // 4], 9 % 4

assert (page, slot) == (5, 1)
print(table)

# %% [markdown]
# A sequence of `kv_len` tokens owns `ceil(kv_len / page_size)` pages. What it loses is the rest of
# its last page, half a page on average. Nothing is reserved, so nothing is lost to the future; and
# a free page fits every sequence.
#
# **Takeaway.** Two steps, `position // page_size` through the table and `position % page_size` as
# it is, let a sequence lie anywhere. Exercise 2.1 is this cell, for a whole batch.

# %% [markdown]
# ## 5. What does the memory hold now?
#
# Without a reservation there may be no free page when a running sequence needs one. Then one of
# them must give way: here the youngest, who loses its cache and waits in front to begin again.
# (Real servers do the same, or move its pages to the host.)


# %%
def grow(pool, name, running, waiting, gave_way):
    """A token for one sequence; as long as pages lack, the youngest gives way."""
    while name in running:  # it may be the youngest itself
        try:
            pool.append(name, 1)
            return
        except OutOfPages:
            youngest, (request, _) = running.popitem()
            pool.free(youngest)
            waiting.appendleft((youngest, request))
            gave_way.append(youngest)


# %% [markdown]
# A request that has all of its answer leaves, and its pages are free at once:


# %%
def leave(pool, running, step):
    done = [name for name, ((_, answer), since) in running.items() if step - since == answer]
    for name in done:
        pool.free(name)
        del running[name]


# %% [markdown]
# A newcomer is let in if its prompt leaves some pages free, for the others to grow. How many have
# to be spared? Try none, and a hundredth.


# %%
def let_in(pool, running, waiting, spare_pages, step):
    while True:
        name, (prompt, answer) = waiting[0]
        if pool.num_free - cdiv(prompt, pool.page_size) <= spare_pages:
            return
        waiting.popleft()
        pool.allocate(name, prompt)
        running[name] = (prompt, answer), step


# %% [markdown]
# A step is these three, one after the other. `gave_way` is a list in which the caller finds the
# names of those that were sent back.


# %%
def serve_pages(requests, pool, spare_pages, gave_way, num_steps=1000):
    running, waiting = {}, deque(enumerate(requests))
    for step in range(num_steps):
        for name in list(running):
            grow(pool, name, running, waiting, gave_way)
        leave(pool, running, step)
        let_in(pool, running, waiting, spare_pages, step)
        yield paged_use(pool, running)


# %%
def paged_use(pool, running):
    live = sum(pool.kv_len(name) for name in running)
    owned = (pool.num_pages - pool.num_free) * pool.page_size
    return {"running": len(running), "live": live, "later": 0, "never": owned - live}


# %%
for spare_pages in (0, NUM_SLOTS // 16 // 100):
    pool, gave_way = PagePool(NUM_SLOTS // 16, page_size=16), []
    measured["pages of 16"] = average(serve_pages(requests, pool, spare_pages, gave_way))
    print(f"{spare_pages:2} pages spared: {len(gave_way):2} times a sequence had to give way")
    pool.check()  # the invariants of the pool held through a thousand steps

# %%
pages, longest = measured["pages of 16"], measured["the longest: 8,192"]
assert pages["live"] > 0.95 * NUM_SLOTS and pages["running"] > 5 * longest["running"]

pictures.memory_use(measured, NUM_SLOTS)

# %% [markdown]
# The same memory and the same requests. Chapter 1 said that decode reads the weights once for the
# whole batch: so more sequences at once is more tokens per second, nearly for free.
#
# **Takeaway.** Pages of 16 fill the memory with live tokens almost to the last slot, and serve
# several times as many sequences as room for the longest does. The price: nothing is promised. A
# few spare pages keep the peace.

# %% [markdown]
# ## 6. Can two sequences own the same page?
#
# Two users ask two questions about one document; or one user wants two answers. The prefix is the
# same, so K and V of the prefix are the same. The pool *forks*: the child lists the parent's
# pages, and every page counts how many list it.

# %%
pool = PagePool(num_pages=8, page_size=4)
pool.allocate("a", 10)
pool.fork("a", "b")

assert pool.num_free == 8 - 3  # the fork took no page
pictures.page_owners(pool, ["a", "b"], "b is a fork of a: every page has two owners")

# %% [markdown]
# Reading shared pages is harmless. But now b appends a token: position 10 goes into page 2, slot
# 2, and a's own position 10 will go into the same slot. So before b writes, it gets a copy of that
# page for itself: **copy on write**. Full pages are never written again and stay shared for good.

# %%
copies = pool.append("b", 1)
print(copies)

assert copies == [(2, 3)] and pool.append("a", 1) == []  # a is alone on page 2 now: no copy
pictures.page_owners(pool, ["a", "b"], "b has written: only the last page became two")

# %% [markdown]
# The pool is a book on the host. It does not touch the cache: it *returns* the copies, and the
# caller who owns the cache carries them out (`paging.copy_pages`) before the new token is stored.
# Here is `append`, with the question that decides everything, `splits`:

# %%
show_source(PagePool.append)

# %% [markdown]
# **Takeaway.** A count for each page, and one copy at the first write into a shared page that is
# not full. Exercise 2.4 has you write it, and plays what happens without.

# %% [markdown]
# ## 7. How does a token lie in its page?
#
# A page holds K and V of its tokens. In which order should the dimensions be? A TPU moves memory
# with **DMAs**, and a DMA moves one regular block. Ask for 5 tokens of a page, all heads, K and V.
# If heads come first, the tokens of every head lie somewhere else:

# %%
heads_first = np.zeros((2, 8, 16, 128))  # [K or V, head, token of the page, lane]
tokens_first = np.zeros((16, 8, 2, 128))  # [token of the page, head, K or V, lane]

assert not heads_first[:, :, 0:5].flags.c_contiguous  # 16 pieces of memory
assert tokens_first[0:5].flags.c_contiguous  # one piece

# %% [markdown]
# So: tokens first, and K and V of all heads of a token together. But there is more to it. A TPU
# cuts the **last two** dimensions of an array into **tiles**, of which the hardware moves whole
# ones; the dimensions before them can be cut anywhere. With the token in front of the last two, 1
# token or 5 are as easy as 16. The last two are made to be exactly one row of 32-bit words: 128
# **lanes**, and as many values as share 32 bits, the **packing**: 1 in float32, 2 in bfloat16, 4
# in float8.
#
# The registers of chapter 0 are 8 x 128 words, that is eight such rows, and most arrays have tiles
# of eight rows too. Here a tile is a single row, so any number of them can be moved; a kernel loads
# eight, of one token or of several, to fill a register.

# %%
shape = paging.get_kv_cache_shape(1000, 16, 3, 64, jnp.bfloat16)  # SmolLM2: 3 KV heads of 64
print("[num_pages, page_size, rows, packing, lanes] =", shape)

pictures.token_layout(num_kv_heads=3, head_dim=64, packing=2, lanes=128)

# %% [markdown]
# K and V alternate from head to head: combined head `2h` is K of head `h`, `2h + 1` is V. In
# bfloat16 that makes K and V of a head the two halves of the same 32-bit words. Look at one: K is
# 1 everywhere (0x3f80 in bfloat16), V is 2 (0x4000).

# %%
keys, values = jnp.full((1, 1, 128), 1.0, jnp.bfloat16), jnp.full((1, 1, 128), 2.0, jnp.bfloat16)
packed = paging.pack_kv(keys, values)  # [1 token, 1 row, packing 2, 128 lanes]
words = jax.lax.bitcast_convert_type(packed.swapaxes(2, 3), jnp.uint32)  # [1, 1, 128]

print(hex(int(words[0, 0, 0])))
assert int(words[0, 0, 0]) == 0x4000 << 16 | 0x3F80  # V in the upper half, K in the lower

# %% [markdown]
# A kernel loads such a word once, and a shift gives it V and a mask gives it K, or a bitcast gives
# it both. That is why the cache has *one* array and not one for K and one for V.
#
# The layout is that of the production kernel ([Ragged Paged
# Attention](https://arxiv.org/abs/2604.15464), section 3), so caches can be exchanged with it.
#
# **Takeaway.** `[num_pages, page_size, rows, packing, lanes]`: a token is a slice of a dimension
# that is not tiled, so one DMA moves all heads, K and V, of any number of tokens.

# %% [markdown]
# ## 8. What does the padding cost?
#
# The grey in the picture is memory that holds nothing. `head_dim` is rounded up to a multiple of
# 128 lanes, and `2 * num_kv_heads` to a multiple of the packing. How much of the cache is K and V?

# %%
head_counts, head_dims = [1, 2, 3, 8], [64, 80, 128, 240, 256]


def used_percent(heads, head_dim, dtype):
    shape = paging.get_kv_cache_shape(1, 1, heads, head_dim, dtype)
    needed_bytes = 2 * heads * head_dim * jnp.dtype(dtype).itemsize
    return 100 * needed_bytes / paging.kv_token_bytes(shape, dtype)


# %%
dtypes = ["float32", "bfloat16", "float8_e4m3fn"]
tables = {
    dtype: np.array([[used_percent(h, d, dtype) for d in head_dims] for h in head_counts])
    for dtype in dtypes
}
assert tables["bfloat16"][3, 2] == 100 and tables["bfloat16"][2, 0] == 50  # Llama 3 8B, SmolLM2

pictures.layout_waste(tables, head_counts, head_dims)

# %% [markdown]
# Llama 3 8B wastes nothing. SmolLM2 with its head_dim of 64 pays twice for every byte, and reading
# them costs decode twice the time. An odd number of heads hurts only in float8: three heads are
# six combined heads, in rows of four.
#
# **Takeaway.** Padding is a price of the layout, paid in bytes that decode must read. It is zero
# for `head_dim` 128 and 256 with enough heads, and half for `head_dim` 64.

# %% [markdown]
# ## 9. Attention through the table
#
# Attention now has one more input, a row of the page table, and K and V are read page by page. To
# see that nothing else is read, let all the memory be NaN but the tokens of one sequence: 37
# tokens in the pages 6, 1 and 4, in this order.

# %%
rng = np.random.default_rng(0)
shape = (37, 2, 64)  # [kv_len, num_kv_heads, head_dim]
k, v = (jnp.float32(rng.standard_normal(shape)) for _ in range(2))
pages, positions = jnp.array([6, 1, 4]), jnp.arange(37)

cache = jnp.full(paging.get_kv_cache_shape(8, 16, 2, 64, jnp.float32), jnp.nan)
cache = paging.store_kv(cache, k, v, pages[positions // 16], positions % 16)
print(f"{jnp.isnan(cache).mean():.0%} of the cache is NaN")

# %% [markdown]
# `store_kv` is the address of section 4, for all tokens at once. Then three new tokens ask; they
# are the last three of the 37. The table has room for more pages than the sequence owns, and the
# entry after the live ones is nonsense, as it will be in a server.

# %%
q = jnp.float32(rng.standard_normal((3, 8, 64)))  # [q_len, num_q_heads, head_dim]
table_row = jnp.array([6, 1, 4, 999])
output = paging.paged_attention(q, cache, table_row, kv_len=37, q_start=34, num_kv_heads=2)

error = dense.relative_error(output, dense.oracle(q, k, v))
print(f"relative error against float64: {error:.1e}")
assert error < 2e-6

# %% [markdown]
# Not one NaN got in, although page 4 is NaN from slot 5 on. Here is how. The lines that matter are
# `score_page` and `mix_page`, which look a page up and work on it, and the two loops over live
# pages that call them. `soft_cap`, `sinks`, `sliding_window` and `score_scale` are what some models
# need; they come in chapter 11, and are off unless asked for. And read the comment about the tail:
# a masked key has weight 0, and 0 times NaN is NaN.

# %%
show_source(paging.paged_attention)

# %% [markdown]
# **Takeaway.** Same formula, same numbers; K and V come through one more index. And memory that is
# not yours must be *replaced*, not multiplied by zero. Exercise 2.5 shows what happens otherwise.

# %% [markdown]
# ## 10. How large should a page be?
#
# Small pages waste little: half a page per sequence. But each page is a copy of its own, and an
# entry of the table. Predict the waste: `(page_size - 1) / 2` slots per sequence. Then measure,
# with sequences caught in the middle of their answers:

# %%
rng = np.random.default_rng(0)
kv_lens = prompts + rng.integers(0, answers)  # tokens of each sequence at a random moment
page_sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
empty = [cdiv(kv_lens, size) * size - kv_lens for size in page_sizes]  # slots, for each sequence

for size, slots in zip(page_sizes, empty, strict=True):
    percent = 100 * slots.sum() / (slots + kv_lens).sum()
    print(f"page_size {size:3}: {slots.mean():6.2f} empty slots per sequence ({percent:5.2f} %), "
          f"predicted {(size - 1) / 2:6.2f}")  # fmt: skip
assert np.isclose(empty[4].mean(), 7.5, rtol=0.05)

# %% [markdown]
# Now the other side. One layer of Llama 3 8B moves 4 KiB per token, so a page of 16 is a copy of 64
# KiB. And a batch of 256 sequences of up to 131,072 tokens has a table of so many KiB, which a
# kernel would like to keep in SMEM, the scalar memory of the chip:

# %%
layer_token_bytes = token_bytes // LLAMA3_8B.num_layers
waste_percent = [100 * slots.sum() / (slots + kv_lens).sum() for slots in empty]
page_kib = [size * layer_token_bytes / 1024 for size in page_sizes]
table_kib = [256 * cdiv(131_072, size) * 4 / 1024 for size in page_sizes]
smem_kib = chips.chip("v6e").smem_bytes / 1024

pictures.page_size_trade(page_sizes, waste_percent, page_kib, table_kib, smem_kib)

# %% [markdown]
# Why not pages of one token, then, which waste nothing? The HBM of a v6e delivers so many bytes in
# a cycle. In how many cycles is a page there? Predicted:

# %%
v6e = chips.chip("v6e")
for size in (1, 4, 16, 64, 256):
    cycles = v6e.cycles(size * layer_token_bytes / v6e.hbm_bytes_per_s)
    print(f"page_size {size:3}: a page arrives in {cycles:6.1f} cycles")

# %% [markdown]
# To start a copy, the scalar core has to look into the table, compute two addresses and issue the
# DMA. That takes its cycles too, however small the page is (chapter 10 reads from the compiler's
# schedule how many). Where it takes longer than the page needs to arrive, the memory waits for the
# scalar core.
#
# Something like it can be felt here: rung 2 loops over pages, and every turn of the loop costs
# something whatever the size of the page. The time does not fall in proportion to the number of
# pages, for a turn also computes with its page: with large pages it levels off. (This is how a CPU
# runs a loop of XLA. It says nothing about the DMAs of a TPU.)


# %%
def best_ms(function, *arguments, repeats=30):
    """The shortest of some runs, in ms, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times_s = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times_s.append(time.perf_counter() - start_s)
    return 1e3 * min(times_s)


# %%
q = jnp.ones((1, 8, 64))  # one decode step of one sequence with 4,096 tokens
decode = jax.jit(partial(paging.paged_attention, num_kv_heads=2))
machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
for size in (1, 4, 16):
    cache = jnp.ones(paging.get_kv_cache_shape(4096 // size, size, 2, 64, jnp.float32))
    ms = best_ms(decode, q, cache, jnp.arange(4096 // size), 4096, 4095)
    print(f"page_size {size:3}: {4096 // size:4} pages, {ms:6.2f} ms, measured on {machine}")

# %% [markdown]
# **Takeaway.** Waste grows with the page size, the number of copies and the table shrink with it.
# Over these lengths pages of 16 waste about half a percent and pages of 128 about five: both are
# common. A good kernel makes small pages cheap, and that is what chapters 5 and 10 are about.

# %% [markdown]
# ## 11. What does sharing save?
#
# A chat service puts the same instructions in front of every conversation. Let them be 1,000
# tokens, and let 64 of the real prompts follow. Every sequence is a fork of the instructions.

# %%
pool = PagePool(num_pages=NUM_SLOTS // 16, page_size=16)
pool.allocate("instructions", 1000)
copies = []
for i, prompt in enumerate(prompts[:64].tolist()):
    pool.fork("instructions", i)
    copies += pool.append(i, prompt)
pool.check()

# %%
page_bytes = 16 * token_bytes
shared_pages = pool.num_pages - pool.num_free
alone_pages = sum(cdiv(1000 + prompt, 16) for prompt in prompts[:64].tolist())

print(f"{len(copies)} page copies: 1000 tokens end in the middle of a page")
print(f"own copies {alone_pages * page_bytes / 2**30:.1f} GiB, "
      f"shared {shared_pages * page_bytes / 2**30:.1f} GiB")  # fmt: skip
assert len(copies) == 64 and shared_pages < 0.6 * alone_pages
assert alone_pages > pool.num_pages  # with copies of their own they would not even fit

# %%
prefix_pages = cdiv(1000, 16)
alone = 64 * prefix_pages * page_bytes, (alone_pages - 64 * prefix_pages) * page_bytes
shared = prefix_pages * page_bytes, (shared_pages - prefix_pages) * page_bytes

pictures.prefix_bytes(alone, shared)

# %% [markdown]
# And the instructions are computed once: a newcomer's prefill starts after them, with 1,000
# tokens in the cache already. That is the chunk after a cached prefix of chapter 1. Here the caller
# told the pool whom to fork; how a server finds a common prefix by itself is exercise 2.6.
#
# **Takeaway.** Pages turn a common prefix into one set of pages, and into work that is not done
# again. The table is all that has to know.

# %% [markdown]
# ## What is still slow
#
# Memory is solved. Now look at the *queries*. A server's step mixes sequences that decode, one
# query each, with the prompt of one of them: here 15 sequences decode and one prefills a chunk of
# 64 tokens. Rung 2 takes one sequence; to run a batch at once, all sequences need the same shape,
# so queries are padded to the longest.

# %%
q_lens = np.array([1] * 15 + [64])
pictures.query_padding(q_lens)

# %%
cache = jnp.ones(paging.get_kv_cache_shape(256, 16, 2, 64, jnp.float32))
tables = jnp.arange(256).reshape(16, 16)  # 16 sequences of 16 pages, 256 tokens each
batch = jax.jit(
    jax.vmap(partial(paging.paged_attention, num_kv_heads=2), in_axes=(0, None, 0, None, 0))
)


def step_ms(q_len, seqs):
    q = jnp.ones((len(tables[seqs]), q_len, 8, 64))  # [num_seqs, q_len, num_q_heads, head_dim]
    return best_ms(batch, q, cache, tables[seqs], 256, 256 - jnp.array(q_lens[seqs]))


# %%
padded_ms = step_ms(64, slice(0, 16))
decode_ms, prefill_ms = step_ms(1, slice(0, 15)), step_ms(64, slice(15, 16))

rows = len(q_lens) * q_lens.max()
print(f"measured on {machine}")
print(f"all padded to 64 queries: {padded_ms:6.1f} ms for {rows:,} rows, {q_lens.sum()} needed")
print(f"decode and prefill apart: {decode_ms + prefill_ms:6.1f} ms")
assert q_lens.sum() < 0.1 * rows

# %% [markdown]
# Nine of ten rows are padding, and they are computed like all others. Running decode and prefill
# apart helps here, where all prefills have one length and all decoding sequences another. In a
# server every chunk has its own length, a different one each step: padding again, or a program for
# every combination.
#
# What if queries were not padded at all, but laid end to end, whatever their lengths? Then one
# must say whose is whose. Chapter 3 does, with four small arrays of integers.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/02_paging.ipynb).
#
# **Read more:**
#
# - [PagedAttention](https://arxiv.org/abs/2309.06180), Kwon et al. 2023: the memory of a server,
#   measured.
# - [nano-vllm](https://github.com/GeeeekExplorer/nano-vllm), `engine/block_manager.py`: a pool in
#   120 lines that finds common prefixes by their content.
