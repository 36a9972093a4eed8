# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 8: The optimized kernel
#
# **Time:** 50 minutes to read and run, about an hour for the exercises.
#
# **You need:** chapter 7, and what it needs. No TPU.
#
# **You will be able to:** read the optimized kernel against the plain one, file by file; say for
# each difference what rung 7 does, what rung 8 does, and what it is worth; say what runs ahead of
# what, and where each number lies; run it on a batch of any mix, and see that it is right; and
# name, with numbers, what it still does for nothing.
#
# **Rung 8** computes what rung 7 computes, bit for bit the same cache. It is several times as long,
# and every line more than rung 7 has is there for speed. So the difference between the two is the
# table of contents of this chapter.

# %%
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

# %%
import rpa
from rpa import chips, dense, interpreter, plain, ragged
from rpa.figures import kernel as pictures
from rpa.figures import show_source
from rpa.kernel import blocks, cases, loop, mixed, traversal, tricks
from rpa.kernel.plan import BlockSizes, Plan
from rpa.kernel.problem import Problem
from rpa.paging import cdiv, get_kv_cache_shape, kv_token_bytes

# %% [markdown]
# ## 1. What is different?
#
# | | rung 7 | rung 8 | file |
# |---|---|---|---|
# | 2 order | an array, made beforehand | the same order, found while it runs | `traversal` |
# | 3 mask | in every KV block | only where it is needed | `mixed` |
# | 4 ahead | one KV block | two or three iterations | `loop`, `pipeline` |
# | 5 page table | in SMEM, all of it | in HBM, fetched piece by piece | `page_table` |
# | 5 pages | a copy each | one copy if they are contiguous | `transfers` |
# | 6 new tokens | stored out of the KV buffer | the same, except in a decode | `transfers` |
# | 7 sequences | one kernel, two sizes of tiles | up to three kernels | `cases`, `blocks` |
# | 8 the cache | given and returned | updated in place | `api` |
# | chapter 9 | K and V read by value | strided loads of 32-bit words | `layout` |
# | chapter 9 | all scores, then all softmaxes | products in a better order | `decode`, `mxu` |
#
# One picture for the whole chapter. Colours say *when*: while some keys are computed on (orange),
# the pages and queries of the next ones are on their way (blue), and for keys further on the
# entries of the page table (purple).

# %%
pictures.diagram()

# %% [markdown]
# Each file of `rpa/kernel/` answers a question, and its `__init__` is the order in which to read
# them. All optimisations stand in one list, with when they apply and what they are worth:

# %%
from IPython.display import Markdown

Markdown(tricks.__doc__)

# %% [markdown]
# **Takeaway.** The kernel is a loop that looks up, fetches and computes, each for other keys.
# Everything else is a decision about one block of keys.

# %% [markdown]
# ## 2. In which order is a batch visited?
#
# *Rung 7 has a list. Rung 8 has a function that says what comes next.*
#
# A list costs a program before the kernel, and 28 bytes of SMEM for each query block of the batch.
# The scalar core is idle most of the time; so here it finds the next **work item**, one KV block of
# one query block of one sequence, while the others compute. The order must be the same, and that
# can be checked: the kernel's own functions answer on the host, too, if they get the sizes. The
# batch of chapter 7:

# %%
names = ["A decode", "B decode", "(idle)", "C chunk", "D prompt"]
q_lens, kv_lens = np.array([1, 1, 0, 12, 20]), np.array([29, 12, 9, 40, 20])
table = np.arange(25, dtype=np.int32).reshape(5, 5)[:, ::-1]  # pages of 8, in any order
batch, _ = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, table)
print("kv_lens     ", batch.kv_lens)
print("cu_q_lens   ", batch.cu_q_lens)
print("distribution", batch.distribution)

# %%
f32 = np.dtype(np.float32)
problem = Problem(
    *(int(q_lens.sum()), 4, 2, 128),  # tokens, query heads, KV heads, head_dim
    *(25, 8, 5, 5),  # pages, page_size, room for sequences, pages of each
    *(f32, f32, f32),  # dtypes of queries, cache and output
)
decode_blocks, mixed_blocks = BlockSizes(1, 16, 1, 16), BlockSizes(8, 16, 8, 16)
ahead = {"iterations_ahead": tricks.ITERATIONS_AHEAD}
decode_plan = Plan(problem, cases.Case.DECODE, decode_blocks, max_q_len=1)
mixed_plan = Plan(problem, cases.Case.PREFILL_AND_MIXED, mixed_blocks, **ahead)

# %%
metadata = SimpleNamespace(
    kv_lens=jnp.array(batch.kv_lens), cu_q_lens=jnp.array(batch.cu_q_lens)
)  # fmt: skip


# %%
def steps_of(plan):
    """Every step that a kernel takes, in its order: (sequence, query block, KV block)."""
    first, end = (int(bound) for bound in plan.case.bounds(batch.distribution))
    at, steps = traversal.start(plan, metadata, first, end), []
    while int(at.seq.index) < end:
        steps.append(tuple(int(x) for x in (at.seq.index, at.q_index, at.kv_index)))
        at = traversal.advance(plan, metadata, at, traversal.work_item(plan, at, end), end)
    return steps


decode_steps, mixed_steps = steps_of(decode_plan), steps_of(mixed_plan)
print("decode:", decode_steps)
print("mixed: ", mixed_steps)
assert decode_steps == [(0, 0, 0), (0, 0, 1), (1, 0, 0)] and len(mixed_steps) == 3 + 3 + 4

# %% [markdown]
# Rung 7's list, written out in KV blocks, is the same:

# %%
work = plain.work_list(batch, int(q_lens.sum()), plain.Options(block_q=8, block_kv=16))
by_list = []
for seq, position, end in zip(
    *map(np.asarray, (work.seq, work.position, work.kv_end)), strict=True
):
    q_block = (position - (kv_lens[seq] - q_lens[seq])) // 8
    by_list += [(int(seq), int(q_block), kv_block) for kv_block in range(cdiv(int(end), 16))]
assert by_list == decode_steps + mixed_steps
print(len(by_list), "work items, in the same order")

# %% [markdown]
# One function says what comes after a work item, some iterations ahead, for the copies; the
# computation follows in the same order. Another one resolves where the traversal is into all that
# copies and computation have to know, once. It is a row of rung 7's list:

# %%
show_source(traversal.advance)
show_source(traversal.work_item)

# %% [markdown]
# An odometer with three wheels, and `first_active` for the idle slots, which a list does not have.
#
# **Takeaway.** The order is that of rung 7's list. A list is easier to read and to test; a function
# costs nothing beforehand. Exercise 7.2 is this function.

# %% [markdown]
# ## 3. Where is a mask?
#
# *Rung 7 masks every KV block. Rung 8 asks first.*
#
# A block of keys that ends before the first query of the block is visible to all of them. The
# diagonal is not, and neither is a last block that is not full:


# %%
def kind_of(plan, step):
    """What the mask does to a step: pair by pair, on the host."""
    seq = traversal.sequence(plan, metadata, step[0])
    block = traversal.query_block(plan, seq, step[1])
    queries = int(block.position) + np.arange(int(block.q_len))
    keys = step[2] * plan.blocks.bkv + np.arange(plan.blocks.bkv)
    return "interior" if dense.visible(queries, keys).all() else "masked"


steps = [(*step, kind_of(decode_plan, step)) for step in decode_steps]
steps += [(*step, kind_of(mixed_plan, step)) for step in mixed_steps]
pictures.batch_walk(steps, cdiv(kv_lens, 16).tolist(), names)

# %% [markdown]
# A row is a query block, the numbers are the order. In a toy most blocks lie on some edge; in a
# prompt of 4,096 tokens with tiles of 128 by 512, the diagonal goes through 32 of the 144 tiles
# that are computed (exercise 8.1 counts them). The kernel decides it for each tile from four
# numbers, and has its inner loop twice, with a mask and without:

# %%
show_source(mixed.Tiled.attend)
show_source(mixed.ScoreTile)

# %% [markdown]
# The price is that the code is there twice, and is compiled twice. It is worth 6 to 16 % of the
# bundles (`python -m rpa lab steps`).
#
# **Takeaway.** Tiles that no query sees are skipped, masks are only where the diagonal, a window or
# the end of a sequence goes through. Exercise 8.1.

# %% [markdown]
# ## 4. What runs ahead of what?
#
# *Rung 7 waits for a KV block that was started one KV block ago. Rung 8 waits for one that was
# started two or three iterations ago.*
#
# A copy takes a microsecond or two to arrive, however short it is. In that time a TPU7x computes a
# KV block of a short sequence and more: rung 7 waits. Here is the kernel. Read `iterate`, its one
# loop: it fetches, looks up, and computes; but never the same work items.

# %%
show_source(loop.kernel)

# %% [markdown]
# An **iteration** of this loop serves one work item in each stage of the pipeline; only a decode
# serves two or four, because one row of queries keeps the units busy too little (chapter 9). A copy
# of pages needs page numbers; page numbers are in HBM; so they are requested before that. And both
# copies take a microsecond or two to arrive. So a work item is looked up, fetched
# `TABLE_ITERATIONS` iterations later, and computed `iterations_ahead` iterations after that. In
# between it waits in a ring in SMEM:

# %%
from rpa.kernel import pipeline

print(pipeline.__doc__)
show_source(pipeline.Ring.for_each_to_fetch)
show_source(pipeline.Ring.is_running)

# %% [markdown]
# On paper, for a kernel that looks up two iterations ahead of the copies, and copies two iterations
# ahead of the products. Each column is an iteration, and the work items that it serves:

# %%
num_steps, delays = 5, {"looks up": 0, "fetches": tricks.TABLE_ITERATIONS}
delays["computes"] = tricks.TABLE_ITERATIONS + mixed_plan.iterations_ahead
for stage, delay in delays.items():
    items = [i - delay for i in range(num_steps + delays["computes"])]
    print(f"{stage:9}", *(f"{i:2}" if 0 <= i < num_steps else " ." for i in items))
assert delays["computes"] == mixed_plan.depth - 1

# %% [markdown]
# Nothing is computed in the first four iterations, and nothing is fetched in the last two: the
# pipeline fills, and it drains, once per batch. How deep must it be? Copies of three iterations
# together should take longer than one of them needs to arrive; chapter 10 has the numbers.

# %%
from rpa.kernel.transfers import Copies

show_source(Copies.fetch)

# %% [markdown]
# Wait for the page numbers and for what still leaves the buffer (section 6), then start everything
# that the step needs: queries, pages, new tokens. (`_unmark` looks whether the pages of the block
# lie side by side and are one copy: 12.3. In our batch they do not.) To see it, run the kernel on
# our batch in the interpreter, with the blocks of the pictures, and record it:

# %%
rng = np.random.default_rng(7)
num_tokens, heads = int(q_lens.sum()), (4, 2, 2)
tokens = [rng.standard_normal((num_tokens, h, 128)).astype(np.float32) for h in heads]
kv_cache = rng.standard_normal(get_kv_cache_shape(25, 8, 2, 128, f32)).astype(np.float32)
arrays = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)

# %%
from rpa.figures.timeline import gantt
from rpa.lab.copies.timeline import page_labels, record_dmas

on_host = jax.default_device(jax.devices("cpu")[0])  # where the interpreter runs
sizes = {"d_block_sizes": (1, 16, 1, 16), "m_block_sizes": (8, 16, 8, 16)}
with on_host, record_dmas() as timeline:
    cache = jnp.array(kv_cache)
    options = {**sizes, "sm_scale": 128**-0.5, "backend": interpreter.params()}
    output, new_cache = rpa.ragged_paged_attention(*tokens, cache, *arrays, **options)
    jax.block_until_ready(output)

# %% [markdown]
# The copies of pages, in order, must be those of the traversal. That the kernel and our list
# agree is not an opinion:

# %%
cached = np.asarray(batch.kv_lens) - q_lens


def pages_fetched(step, bkv=16, page_size=8):
    """Pages of the cache that a step copies: those with cached tokens, a part of a page first."""
    end = min(int(cached[step[0]]), (step[2] + 1) * bkv)
    pages = table[step[0], step[2] * bkv // page_size : cdiv(end, page_size)].tolist()
    return pages[-1:] + pages[:-1] if end % page_size else pages


by_traversal = [page for step in decode_steps + mixed_steps for page in pages_fetched(step)]
from_cache = [c for c in timeline.copies if c.source.buffer.name == "kv_cache"]
by_kernel = [copy.source.index[0].start // 8 for copy in from_cache]
print(by_kernel)
assert by_kernel == by_traversal

# %% [markdown]
# And as a picture, the mixed kernel: six steps of C and four of D, a KV block each. The copies into
# the buffers that are not computed on begin before the computation ends, also from C to D. Copies
# *to* HBM take the new tokens of a block to their pages (section 6). Above the buffers the pieces
# of the table: they overlap, and each tick asks for one, for pages of later iterations.

# %%
labels = page_labels(batch.page_indices, 5, page_size=8, block_tokens=16, cache="kv_cache")
rows = [*(f"kv_buffer[{slot}]" for slot in range(mixed_plan.num_slots)), "table_chunks"]
title = "The mixed kernel: six steps of sequence 3, then four of sequence 4"
gantt(timeline, kernel=1, rows=rows, label=labels, title=title)

# %% [markdown]
# **Takeaway.** First the table, then the pages, then the computation, some iterations apart; across
# the ends of query blocks and of sequences. Nothing drains before the batch ends.

# %% [markdown]
# ## 5. Where are the numbers?
#
# *Rung 7 has the page table in SMEM. Rung 8 streams it like everything else.*
#
# The scalar core reads lengths and page numbers from SMEM, and SMEM has one MiB. What needs how
# much?

# %%
smem_bytes = chips.chip("v5e").smem_bytes
for num_seqs, longest in [(64, 8_192), (64, 131_072), (256, 131_072)]:
    table_bytes = num_seqs * (longest // 16) * 4  # pages of 16, an i32 each
    lengths_bytes = (2 * num_seqs + 1) * 4  # kv_lens and cu_q_lens
    print(f"{num_seqs:3} sequences of up to {longest:7,}: lengths {lengths_bytes:5,} bytes, "
          f"table {table_bytes / smem_bytes:5.2f} x SMEM")  # fmt: skip

# %% [markdown]
# Lengths fit always, the table does not. So the lengths lie in SMEM for the whole call, and the
# table stays in HBM: each step brings the entries of its own KV block, by a copy from HBM to SMEM.
# Such a copy must begin and end at a multiple of 128 words, so the kernel takes the aligned piece
# around the entries that it wants, and counts from its start:

# %%
show_source(Copies._chunk_start)

# %%
table = mixed_plan.table
print(f"entries of a KV block: {table.whole_pages}, words copied for them: {table.chunk_words}")
print(f"the table of {5 * 5} entries is padded to {table.table_words} words")
assert table.chunk_words % 128 == 0

# %% [markdown]
# **Takeaway.** What is small and always needed lives in SMEM; what grows with the context is
# streamed like everything else. Then no context is too long for the table.

# %% [markdown]
# ## 6. Who stores the new tokens?
#
# *Rung 7 stores them out of the KV buffer. So does rung 8, except in a decode.*
#
# The rule is the same: **each query block stores its own tokens**, when they are in its KV buffer.
# Only a decode sends its one token from HBM to HBM: the second function says why.

# %%
show_source(Copies.start_stores)
show_source(Copies._store_token)

# %% [markdown]
# Two things follow. No token can be missed: its query block always runs, and always reads the KV
# block that the token lies in, window or not. And nothing ever waits to *read* a new token from the
# cache, since every query block takes all new tokens from `new_kv`, those of earlier query blocks
# too. A buffer has to be kept until its tokens have left, as in rung 6; they leave while the block
# is computed. Count:

# %%
token_bytes = kv_token_bytes(kv_cache.shape, f32)
stores = [copy for copy in timeline.copies if copy.target.buffer.name == "kv_cache"]
stored_tokens = sum(copy.num_bytes for copy in stores) // token_bytes
print(f"{stored_tokens} tokens are stored by {len(stores)} copies, out of "
      f"{sorted({copy.source.buffer.name for copy in stores})}")  # fmt: skip
assert stored_tokens == num_tokens == 34 and not timeline.never_awaited

# %% [markdown]
# **Takeaway.** A new token is stored exactly once, by its own query block, and read from `new_kv`
# by all. The order of copies cannot make that wrong.

# %% [markdown]
# ## 7. Why more than one kernel?
#
# *Rung 7 chooses between two sizes of tiles inside of one kernel. Rung 8 runs up to three kernels.*
#
# A decode has one query, known when the kernel is compiled. A chunk may have hundreds. One kernel
# for both would compute a tile of `bq` rows for every decode. So `distribution` splits the batch,
# and a call runs a kernel for each range, one after the other, on the same output and the same
# cache:

# %%
show_source(cases.cases_of)

for size in (None, 512):
    print(f"chunk_prefill_size {size}:", [case.name for case, _ in cases.cases_of(size)])

# %% [markdown]
# Their blocks differ, too. A decode wants long KV blocks, to keep the HBM busy with few queries; a
# prompt wants tall tiles, to keep the matrix units busy. The sizes for Llama 3 8B, 64 sequences
# with room for 8,192 tokens, pages of 16:

# %%
bf16 = np.dtype(jnp.bfloat16)
llama = Problem(*(575, 32, 8, 128), *(32768, 16, 64, 512), *(bf16, bf16, bf16))


def plan_for(case, max_q_len):
    sizes = blocks.default_block_sizes(llama, case, max_q_len)
    limit = chips.chip("tpu7x").vmem_bytes
    return blocks.plan_ahead(Plan(llama, case, sizes, max_q_len, vmem_limit_bytes=limit))


for case, max_q_len in cases.cases_of(512):
    plan = plan_for(case, max_q_len)
    needed_mib = sum(blocks.vmem_bytes(plan).values()) / 2**20
    ahead = plan.iterations_ahead
    print(f"{case.label:8} {plan.blocks}, {ahead} iterations ahead: {needed_mib:4.1f} MiB")

# %% [markdown]
# What is in a promise? The decode kernel looks at one query of each of its sequences and no more. A
# sequence with two in that range is refused on the host, before anything is written:

# %%
too_long, _ = rpa.RaggedBatch.from_lengths([2, 1], [9, 5], [[0, 1], [2]])
too_long.distribution[:] = [2, 2, 2]
try:
    too_long.validate(num_tokens=3, num_pages=25, page_size=8)
except ValueError as error:
    print(error)

# %% [markdown]
# **Takeaway.** Decode, chunk, mixed: the same traversal and the same copies, compiled for what
# is known about each. Who sorts a batch decides which kernel its sequences get. Exercise 8.2.

# %% [markdown]
# ## 8. Is it right?
#
# The batch has gone through the kernel in section 4. Hold the output against the float64 oracle and
# the cache against rung 3, bit by bit:

# %%
reference, reference_cache = ragged.ref_ragged_paged_attention(
    *tokens, kv_cache, *arrays, sm_scale=128**-0.5
)
truth = ragged.oracle_ragged(tokens[0], reference_cache, batch, 2, sm_scale=128**-0.5)
print(f"worst token and head: {dense.scaled_error(output, truth):.1e}")
assert dense.scaled_error(output, truth) < 8e-6
assert (np.asarray(new_cache) == np.asarray(reference_cache)).all()

# %% [markdown]
# One thing more. The cache is updated **in place**: the one that was passed is gone, and the one
# that came back is the same memory.

# %%
print("the old cache is deleted:", cache.is_deleted())
assert cache.is_deleted()

# %% [markdown]
# On a TPU, once more as a server calls it: compiled, with blocks chosen for the chip. Without a TPU
# you have just seen all there is.

# %%
if jax.default_backend() == "tpu":
    output, new_cache = rpa.ragged_paged_attention(
        *tokens, jnp.array(kv_cache), *arrays, sm_scale=128**-0.5
    )
    print(f"compiled, worst token and head: {dense.scaled_error(output, truth):.1e}")
    assert dense.scaled_error(output, truth) < 2e-5
    assert (np.asarray(new_cache) == np.asarray(reference_cache)).all()

# %% [markdown]
# `donate=False` keeps the old one, and pays for a copy of all of it. That copy was the last thing
# on the list of chapter 6.
#
# **Takeaway.** Any mix of sequences, one call, the numbers of rung 3, the cache updated where it
# lies. This is the function that a server calls, and exercise 8.3 calls it as a server does.

# %% [markdown]
# ## What is still slow
#
# The kernel is complete. Is it fast? Count first what it moves at a real size. `dry_run` runs the
# kernel's own control flow and its copies, and leaves the arithmetic out, so it can take a batch
# that the interpreter could not: Llama 3 8B, 15 decodes and a chunk of 512, all with 4,096 tokens,
# in a pool that was used for a while, where neighbouring pages are rare.

# %%
from rpa.lab.copies.dryrun import dry_run

q_lens = np.array([1] * 15 + [512])
pages = rng.permutation(4096).reshape(16, 256)
batch, _ = rpa.RaggedBatch.from_lengths(q_lens, [4096] * 16, pages)
arrays = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)


def step(*tokens_and_cache):
    options = {"backend": "tpu", "chip": "v5e", "donate": False, "validate": False}
    return rpa.ragged_paged_attention(*tokens_and_cache, *arrays, sm_scale=128**-0.5, **options)


# %%
shapes = [(q_lens.sum(), h, 128) for h in (32, 8, 8)]
cache_shape = get_kv_cache_shape(4096, 16, 8, 128, bf16)
run = dry_run(step, *(jax.ShapeDtypeStruct(s, bf16) for s in (*shapes, cache_shape)))

token_bytes = kv_token_bytes(cache_shape, bf16)
counted = {}
for copy in run.timeline.copies:
    is_kv = copy.source.buffer.shape[-3:] == cache_shape[-3:]
    if is_kv and copy.target.buffer.space == "VMEM":
        name = ("decode", "mixed")[copy.kernel]
        fetched, copies = counted.get(name, (0, 0))
        counted[name] = fetched + copy.num_bytes // token_bytes, copies + 1

# %%
for name, needed in {"decode": 15 * 4096, "mixed": 4096}.items():
    fetched, copies = counted[name]
    print(f"{name:6} kernel: {fetched:6,} tokens of K and V fetched by {copies:5,} copies, "
          f"{needed:6,} needed: {fetched / needed:.2f} times")  # fmt: skip
assert counted["decode"][0] == 15 * 4096 and counted["mixed"][0] > 3 * 4096

# %% [markdown]
# The decodes read every token once and not a byte more; no kernel can read less. The chunk reads
# its sequence again for each of its four query blocks, nearly four times too much. But a prefill
# waits for the matrix units, of which `head_dim` 128 fills half on v6e and TPU7x (chapter 1):

# %%
llama_heads = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
chunk = chips.attention_cost(512, 4096, **llama_heads)
extra_bytes = (counted["mixed"][0] - 4096) * token_bytes
for name in ("v5e", "v6e", "tpu7x"):
    flops = chunk.flops / chips.mxu_fill(name, 128)
    least, moved = (
        chips.roofline_time(name, flops, chunk.hbm_bytes + extra) for extra in (0, extra_bytes)
    )
    print(f"{name:6} floor {1e6 * least.time_s:5.1f} us; as fetched {1e6 * moved.time_s:5.1f} us, "
          f"{moved.bound} (predicted)")  # fmt: skip
    assert moved.time_s == least.time_s

# %% [markdown]
# So bytes are as they should be. What is left is what happens *between* the copies. Some of it can
# be counted from here:

# %%
decodes = [c for c in run.timeline.copies if c.kernel == 0]
page_copies = [c for c in decodes if c.source.buffer.name == "kv_cache"]
table_bytes = sum(c.num_bytes for c in decodes if c.target.buffer.space == "SMEM")
hbm_us = 1e6 * sum(c.num_bytes for c in page_copies) / chips.chip("v5e").hbm_bytes_per_s

print(f"decode: {len(page_copies):,} page copies to issue in {hbm_us:.0f} us (v5e, predicted), "
      f"{1e3 * hbm_us / len(page_copies):.0f} ns each")  # fmt: skip
print(f"table: {table_bytes:,} bytes moved for {15 * 256 * 4:,} that are looked at")
assert len(page_copies) == 15 * 256

# %% [markdown]
# Page after page must be issued by the scalar core; the softmax has to keep up with the matrix
# units; and whether the products of one head wait for those of another, no count of bytes can tell.
# For that one has to read what the compiler made of all this: the machine's own schedule, bundle by
# bundle. It can be read on a laptop, and **chapter 9** does, and makes it shorter.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/08_kernel.ipynb).
#
# **Read more:**
#
# - [tpu-inference](https://github.com/vllm-project/tpu-inference),
#   `kernels/ragged_paged_attention/v3`: the production kernel; docs/kernel.md lists where this
#   one differs.
# - [FlashAttention-2](https://arxiv.org/abs/2307.08691), Dao 2023: the division of work on a GPU.
