# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 6: The fused update
#
# **Time:** 40 minutes to read and run, about 100 minutes for the exercises.
#
# **You need:** chapters 2, 3 and 5: the layout of the cache, `kv_len` and `q_len`, DMAs,
# semaphores and the double buffer. No TPU.
#
# **You will be able to:** say what it costs to store new K and V in a program of their own; give
# the reason for every dimension of the cache's layout; put cached and new tokens in one block and
# write the new ones to their pages while the block computes; and name the three rules without which
# that goes wrong, and see each of them broken.
#
# Until now every step had two programs: one stores the K and V of the new tokens in the cache, the
# next one reads them back and attends. **Rung 6** does both in one kernel.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import rpa
from rpa import chips, dense, fused, interpreter, lab, ragged, streamed
from rpa.figures import fused as pictures
from rpa.figures import show_source
from rpa.figures.timeline import gantt
from rpa.lab.copies.timeline import record_dmas
from rpa.paging import get_kv_cache_shape, kv_token_bytes
from rpa.ragged import RaggedBatch

# %%
HOST = jax.devices("cpu")[0]  # where the TPU interpreter runs, also next to a TPU

# %% [markdown]
# ## 1. What does a store of its own cost?
#
# Follow one new token. The model has just computed its K and V, which lie somewhere in HBM. The
# store reads them (1), writes them to a page (2), and then attention reads them from there (3).
# Three trips over the HBM. A cached token makes one.
#
# By hand: a sequence of 6 tokens, 2 of them new. Separate: $4 + 3 \cdot 2 = 10$ trips. If attention
# took the new tokens from where the model put them, trip 3 would fall away:
# $4 + 2 \cdot 2 = 8$.


# %%
def trips(q_len, kv_len, token_bytes):
    """Bytes of K and V of one sequence, by way and by trip over the HBM."""
    cached, new = (kv_len - q_len) * token_bytes, q_len * token_bytes
    together = {"cached, read": cached, "new, read": new, "new, written": new}
    return {"separate": together | {"new, read back": new}, "fused": together}


assert [sum(way.values()) for way in trips(2, 6, token_bytes=1).values()] == [10, 8]

# %% [markdown]
# Is that what the kernels do? Do not believe a sum, count. `record_dmas` of chapter 5 sees every
# copy that a kernel starts in the interpreter. Three decodes, in rung 5 and in rung 6:


# %%
def make_step(q_lens, kv_lens, page_size=8, heads=(4, 2), head_dim=128):
    """Queries, keys, values, a cache full of numbers, and the batch."""
    rng, pool = np.random.default_rng(6), rpa.PagePool(32, page_size)
    for s, kv_len in enumerate(kv_lens):
        pool.allocate(s, kv_len)
    batch, _ = RaggedBatch.from_lengths(q_lens, kv_lens, pool.page_table(range(len(kv_lens)), 8))
    cache_shape = get_kv_cache_shape(32, page_size, heads[1], head_dim, jnp.float32)
    shapes = [(sum(q_lens), h, head_dim) for h in (heads[0], heads[1], heads[1])]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in (*shapes, cache_shape)]
    return *arrays, batch


# %%
def recorded(attention, step, **params):
    """Results of a kernel in the interpreter, and everything that it copied."""
    interpret = interpreter.params(**params)
    names = {"scratch[0]": "buffers"}
    with jax.default_device(HOST), record_dmas(names) as timeline:
        results = attention(*step, sm_scale=128**-0.5, block_tokens=32, interpret=interpret)
        return jax.block_until_ready(results), timeline


# %%
step = make_step(q_lens=[1, 1, 1], kv_lens=[50, 17, 64])
token_bytes = kv_token_bytes(step[3].shape, np.float32)  # K and V of one token
_, rung5 = recorded(streamed.attention, step)
fused_results, rung6 = recorded(fused.attention, step)

for name, timeline in {"rung 5": rung5, "rung 6": rung6}.items():
    routes = {}
    for copy in timeline.copies:
        route = f"{copy.source.buffer.name} to {copy.target.buffer.name}"
        routes[route] = routes.get(route, 0) + copy.num_bytes // token_bytes
    print(f"{name}, in tokens: {routes}")

# %% [markdown]
# Rung 5 reads 131 tokens, the new ones among them; the store before it, a program of plain JAX,
# read and wrote 3 more each. Rung 6 reads 128 cached and 3 new tokens and writes 3. That is the
# sum:

# %%
counted = sum(copy.num_bytes for copy in rung6.copies)
predicted = [trips(1, kv_len, token_bytes) for kv_len in (50, 17, 64)]

assert counted == sum(sum(ways["fused"].values()) for ways in predicted)
assert sum(copy.num_bytes for copy in rung5.copies) == 131 * token_bytes

# %% [markdown]
# Now three kinds of work of Llama 3 8B, one layer, 4 KiB per token:

# %%
work = {
    "decode, 4,096 tokens": trips(1, 4096, 4096),
    "chunk of 512 after 3,584 cached tokens": trips(512, 4096, 4096),
    "fresh prompt of 512": trips(512, 512, 4096),
}
pictures.bytes_moved(work)

# %% [markdown]
# A third of a fresh prompt's bytes, a tenth of a chunk's, and of a decode's nothing that one can
# see. So bytes are a reason to fuse for those who prefill. For decode there is another one.
# Separate, attention cannot begin before the last token is stored: it might be the one it reads.
# With 32 layers there are 32 such pauses in each step, and each is a program of its own that has to
# be launched. Fused, the store runs during the computation, and nothing waits for it.
#
# **Takeaway.** A new token crosses the HBM three times if it is stored first, twice if it is
# fused. That saves up to a third of a prefill's bytes; a decode gains order, not bytes: no pause
# between store and read.

# %% [markdown]
# ## 2. Why does the cache have the layout that it has?
#
# The kernel will store single tokens, at any position, with DMAs. Chapter 2 said that a token
# should be *one piece* of memory. How many pieces are 3 tokens of a page, in three layouts?


# %%
def pieces(shape, index):
    """Into how many runs of neighbours a part of an array falls."""
    places = np.arange(np.prod(shape)).reshape(shape)[index].ravel()
    return 1 + int((np.diff(places) != 1).sum())


heads_first = pieces((8, 2, 16, 128), np.s_[:, :, 5:8])  # [head, K or V, token, lane]
k_alone = pieces((16, 8, 128), np.s_[5:8])  # [token, head, lane], V elsewhere
token_major = pieces((16, 8, 2, 128), np.s_[5:8])  # [token, row, packing, lane]

print("heads first:", heads_first, " K and V apart:", 2 * k_alone, " ours:", token_major)
assert (heads_first, k_alone, token_major) == (16, 1, 1)

# %% [markdown]
# Sixteen pieces, two, or one. And with heads first it is worse than sixteen. The last two
# dimensions are cut into tiles, of which a DMA moves whole ones; there the token is one of them.
# Ask the TPU compiler, on this machine, without a TPU. Two kernels, each a single DMA:

# %%
from rpa.lab.compile import dma_layouts

show_source(dma_layouts.heads_first)
show_source(dma_layouts._store)

# %%
RECORDED = {"heads_first": False, "tokens_first": True}  # by libtpu 0.0.52


def compiles(kernel):
    token, page = dma_layouts.SHAPES[kernel.__name__]
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (token, page)]
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    result = lab.compile_for("v5e", kernel, row, *shapes, kwargs={"interpret": False})
    if result.error_kind in ("no libtpu", "unknown chip", "old libtpu"):
        print(f"recorded, not run: {result.error}")
        return RECORDED[kernel.__name__]
    print(result.error or f"{kernel.__name__} compiles for a v5e")
    return result.ok


# %%
assert not compiles(dma_layouts.heads_first)
assert compiles(dma_layouts.tokens_first)

# %% [markdown]
# Not slow: *refused*. To store one token there, a kernel would have to read eight rows, change one
# and write all eight back, and another sequence may be doing the same on its side. With the token
# in front of the tile, one token or seven are the same kind of copy.
#
# And a *register* read of some rows in VMEM? There a row is in a tile again, of 16 in bfloat16,
# and what is allowed differs from chip to chip. Eight rows, half a tile, from a row that is known
# at run time only, out of a scratch buffer:

# %%
from rpa.lab.compile import vmem_slices

show_source(vmem_slices._read)

# %%
RECORDED_CHIPS = {8: ["v5e", "v6e"], 16: ["v5e", "v6e", "tpu7x"]}  # by libtpu 0.0.52


def chips_that_take(kernel, rows):
    index, taken = jax.ShapeDtypeStruct((1,), jnp.int32), []
    for chip in ("v5e", "v6e", "tpu7x"):
        result = lab.compile_for(chip, kernel, index, kwargs={"interpret": False})
        if result.error_kind in ("no libtpu", "unknown chip", "old libtpu"):
            print(f"recorded, not run: {result.error}")
            return RECORDED_CHIPS[rows]
        taken += [chip] if result.ok else []
    return taken


# %%
for kernel, rows in ((vmem_slices.eight_rows, 8), (vmem_slices.sixteen_rows, 16)):
    print(f"{rows:2} rows from index * {rows} on: {', '.join(chips_that_take(kernel, rows))}")

# %% [markdown]
# v5e and v6e address half a tile, TPU7x does not: there the compiler asks for a proof that the
# first row is a multiple of 16. A kernel that was written and tried on a v6e may not compile on the
# next chip, and the interpreter knows nothing of it. So try all chips, which takes seconds, and cut
# along dimensions in front of the tile: our token is one.
#
# Why K next to V, then? Attention needs both of every token, so together they are one copy where
# apart they are two; and in bfloat16 the K and V of a head share 32-bit words, so that one load
# brings both into registers. Every dimension has its reason:
#
# - `num_pages`: found through the page table;
# - `page_size`: a token, which a DMA can cut anywhere;
# - `rows`: K and V of all heads, so that one copy has everything of a token;
# - `packing`: K and V of a head in the same 32-bit words, two in bfloat16;
# - `lanes`: a row of a register, 128 numbers.
#
# **Takeaway.** Token-major, because a token is what is appended, and a DMA cuts only untiled
# dimensions freely. K and V interleaved, because a kernel that reads one reads the other.

# %% [markdown]
# ## 3. What is in a block?
#
# A kernel computes on a block of tokens in VMEM. Until now all of them came from pages. Now a
# sequence ends with tokens that are not in the cache: 13 tokens, 4 of them new, pages of 4, blocks
# of
# 8. New ones come from `new_kv`, the packed K and V of the step, and go down to their pages:

# %%
pictures.blocks_and_pages(13, 4, [5, 2, 7, 3], page_size=4, block_tokens=8)

# %% [markdown]
# Two numbers cut a block: up to `num_cached` it is cached, up to `num_valid` it is new, and what
# comes after that is **stale**: whatever the buffer held before, perhaps NaN. Both are clipped to
# the block, and then the same two lines serve a block of cached tokens only, of new ones only, and
# all between:

# %%
show_source(fused.cached_tokens)

# %%
for block in range(2):
    num_cached = int(fused.cached_tokens(13, 4, block, 8))
    num_valid = int(streamed.valid_tokens(13, block, 8))
    num_new = num_valid - num_cached
    print(f"block {block}: {num_cached} cached, {num_new} new, {8 - num_valid} stale")
assert (num_cached, num_valid) == (1, 5)

# %% [markdown]
# Filling the block: a copy for each page that holds cached tokens, as in rung 5 (the last one only
# as far as it is cached), and **one** copy for all new tokens, because those are neighbours in
# `new_kv` whatever pages they will go to. All signal the same semaphore, so one wait is still
# enough.

# %%
show_source(fused.start_block)

# %% [markdown]
# The line that takes thinking is `row`. `new_kv` holds the new tokens of all sequences; ours begin
# at `starts[s]`, and of ours we want those from `first_new` on, a position of the sequence:
# subtract the prefix, add the start. Chapter 3 went from a row to a position; this goes back.
#
# **Takeaway.** Cached up to `num_cached`, new up to `num_valid`, stale after that. Attention sees a
# block of tokens and does not care where they came from. Exercise 6.3 builds one.

# %% [markdown]
# ## 4. How do new tokens get into the cache?
#
# From the buffer, by DMA, one copy for each page that a new token lies on: exactly the new rows, no
# cached one before them and nothing of the tail.

# %%
show_source(fused.start_store)

# %% [markdown]
# By hand, block 1 of the picture: rows 1 to 4 of the buffer are new. Page 7 of the cache gets rows
# 1 to 3, page 3 gets row 4. What the kernel really started, for one sequence like this:

# %%
one = make_step(q_lens=[4], kv_lens=[13], page_size=4)
one[-1].page_indices[:4] = [5, 2, 7, 3]
_, timeline = recorded(lambda *a, **k: fused.attention(*a, **k | {"block_tokens": 8}), one)

stores = [c for c in timeline.copies if c.target.buffer.name == "kv_cache"]
for copy in stores:
    print(f"{copy.source.label:20} -> {copy.target.label}")
assert [c.target.index[:2] for c in stores] == [(7, range(1, 4)), (3, range(0, 1))]

# %% [markdown]
# And *when*? As soon as the block has arrived, before it is computed: reading does not disturb a
# buffer, so the write-back and the computation may both read it at the same time. Rung 6 in one
# picture; orange bars compute, the bars into the HBM are the write-backs meanwhile:

# %%
gantt(timeline, title="One sequence of 13 tokens, 4 of them new: rung 6")

# %% [markdown]
# **Takeaway.** The write-back starts when the block is there and ends whenever it likes. It has the
# whole computation of the block to hide in.

# %% [markdown]
# ## 5. Who must wait for whom?
#
# A copy that "ends whenever it likes" is how races begin. Three things could go wrong, and each has
# a rule:
#
# - **order**: the kernel reads a page row whose write is not complete. In rung 6 it cannot: a row
#   is *either* read as cached (`position < kv_len - q_len`) *or* written as new. Not a wait, a fact
#   about two ranges. (And two sequences that share the page being written? Those the host has
#   refused, in exercise 3.6.)
# - **reuse**: the next block is copied into a buffer whose write-back has not left it yet. Then the
#   cache gets tokens of the *next* block. So: wait for the buffer's write-back before it is filled.
# - **the end**: the kernel ends while the last write-back is under way, and the caller reads the
#   old cache. So: wait once more at the end.

# %%
show_source(fused.wait_store)

# %% [markdown]
# One block, and how the rules stand in it. `successor` and `wait_block` are those of rung 5:

# %%
show_source(fused._fused_kernel)

# %% [markdown]
# Does it really need both waits? Take them away. Two sequences with 6 and 5 new tokens, and
# `wait_store` replaced by nothing, in the two modes of the interpreter that chapter 5 introduced:


# %%
import contextlib
import io
from unittest import mock


# %%
def faulty(step, right_cache, mode):
    """Run rung 6 without its waits for write-backs; count the rows of the cache that are wrong."""
    jax.clear_caches()  # the faulty kernel must be traced, not remembered
    with mock.patch.object(fused, "wait_store", lambda refs, slot: None):
        (output, cache), timeline = recorded(
            fused.attention, step, dma_execution_mode=mode, detect_races=mode == "eager"
        )
        raced = interpreter.races_found()
    jax.clear_caches()
    wrong = int((np.asarray(cache) != np.asarray(right_cache)).any((2, 3, 4)).sum())
    return output, wrong, len(timeline.never_awaited), raced


# %%
step = make_step(q_lens=[6, 5], kv_lens=[60, 37])
(output, cache), _ = recorded(fused.attention, step)

late_output, late_wrong, unawaited, _ = faulty(step, cache, "on_wait")
print(f"on_wait: {late_wrong} of 11 new tokens are not in the cache, {unawaited} copies unawaited")
print("the output is right all the same:", bool((late_output == output).all()))
assert late_wrong == 11 and (late_output == output).all()

# %% [markdown]
# Look at the second line. The *output* is right: attention took the new tokens from the buffer.
# What is wrong is the cache, which is not read before the next step. A test that compares outputs
# of one step passes, and a server answers nonsense one token later. **Compare the cache, bit by
# bit.** The other mode copies at once, so its numbers are right, and it finds the race instead:

# %%
report = io.StringIO()
with contextlib.redirect_stdout(report):
    _, eager_wrong, _, raced = faulty(step, cache, "eager")
print(f"eager: {eager_wrong} rows wrong, race found: {raced}")
print(report.getvalue().splitlines()[0])
assert raced and eager_wrong == 0

# %% [markdown]
# **Takeaway.** Three rules: a row is read or written, never both; a buffer waits for its write-back
# before it is filled again; the kernel waits for the last one. Each mode of the interpreter is
# blind to something the other sees, so run both, and look at the cache. Exercise 6.5 is this.

# %% [markdown]
# ## 6. Rung 6
#
# Hold it against rung 3, which stores first and attends afterwards. Both must return the same
# cache, **bit by bit**, and the same attention up to rounding:

# %%
queries, keys, values, kv_cache, batch = step
metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
reference, reference_cache = ragged.ref_ragged_paged_attention(
    queries, keys, values, kv_cache, *metadata, sm_scale=128**-0.5
)
truth = ragged.oracle_ragged(queries, reference_cache, batch, 2, sm_scale=128**-0.5)

assert (np.asarray(cache) == np.asarray(reference_cache)).all()
print(f"worst token and head: {dense.scaled_error(output, truth):.1e}")
assert dense.scaled_error(output, truth) < 4e-6

# %% [markdown]
# What was not written must be as it was: pages without an owner, tails, other sequences. The cache
# goes into the kernel and comes out of it as *one* array: `input_output_aliases` in `_call_kernel`
# says that the last input and the last output are the same memory, so a kernel that writes 11
# tokens writes 11 tokens.

# %%
changed = (np.asarray(cache) != kv_cache).any((2, 3, 4))  # bool[num_pages, page_size]
print(f"{changed.sum()} of {changed.size} rows of the cache have changed")
assert changed.sum() == 11

# %% [markdown]
# **Takeaway.** Same numbers as rung 3, one kernel, every byte of K and V as rarely as it can be
# moved.

# %% [markdown]
# ## What is still slow
#
# Rung 6 was made for decode, and for a few speculative tokens. Give it a server's step: 63 decodes
# and one chunk of a prompt.

# %%
q_lens, kv_lens = np.array([1] * 63 + [512]), np.array([1024] * 64)
table = np.arange(64 * 64).reshape(64, 64)
batch, _ = RaggedBatch.from_lengths(q_lens, kv_lens, table)
tokens = [np.zeros((q_lens.sum(), heads, 128), jnp.bfloat16) for heads in (32, 8, 8)]
kv_cache = np.zeros(get_kv_cache_shape(4096, 16, 8, 128, jnp.bfloat16), jnp.bfloat16)
try:
    fused.attention(*tokens, kv_cache, batch)
except ValueError as error:
    refusal = str(error)
print(refusal)
assert "at most 8 new token" in refusal

# %% [markdown]
# Raise the limit, then? `max_q_len` is the room for the queries of *each* sequence, and the kernel
# computes all of it. So give it room for 512, count rows, and let the roofline say what that does
# to a v5e (predicted):

# %%
llama = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
need = chips.attention_cost(q_lens, kv_lens, **llama)
padded_rows = 64 * 512
flops = 4 * 32 * 128 * padded_rows * 1024  # every row with every key
padded = chips.roofline_time("v5e", flops, need.hbm_bytes)
floor = chips.roofline_time("v5e", need.flops, need.hbm_bytes)

print(f"{padded_rows:,} rows: {1e6 * padded.time_s:,.0f} us, waits for {padded.bound}")
print(f"{q_lens.sum():6,} rows: {1e6 * floor.time_s:,.0f} us, waits for {floor.bound}")
assert padded.time_s > 8 * floor.time_s

# %% [markdown]
# With room for the chunk, 63 decodes pay for 512 rows each: the padding of chapter 2 is back. Three
# more things, in numbers:

# %%
print(f"a decode computes {fused.MAX_Q_LEN} query rows, of which 1 is needed")

table_kib = 64 * (131_072 // 16) * 4 / 1024
smem_kib = chips.chip("v5e").smem_bytes / 1024
print(f"page table of 64 sequences of up to 131,072 tokens: {table_kib:,.0f} KiB, "
      f"in an SMEM of {smem_kib:,.0f} KiB")  # fmt: skip

written = (63 + 512) * kv_token_bytes(kv_cache.shape, kv_cache.dtype)
print(f"a step stores {written / 1e6:.1f} MB, and XLA copies a cache of "
      f"{kv_cache.nbytes / 1e6:.0f} MB first, because the ladder does not donate it")  # fmt: skip
assert table_kib > smem_kib and kv_cache.nbytes > 100 * written

# %% [markdown]
# A decode pays for rows that it does not have, a prompt does not fit, a long context's page table
# does not fit either, and the cache is copied before a byte of it is written. **Chapter 7** puts a
# loop over query blocks around what you have now, which makes it one kernel for any batch.
# **Chapter 8** streams the page table, builds a kernel for each kind of work, and updates the cache
# in place.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/06_fused.ipynb).
#
# **Read more:**
#
# - [Ragged Paged Attention](https://arxiv.org/abs/2604.15464), section 3: the layout and the
#   fused update in production.
# - [Buffer donation](https://docs.jax.dev/en/latest/buffer_donation.html): how JAX gives an
#   array's memory away.
