# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 3: Ragged batching
#
# **Time:** 40 minutes to read and run, about 75 minutes for the exercises.
#
# **You need:** chapters 1 and 2: causal attention, KV cache, pages and page tables. No TPU.
#
# **You will be able to:** put sequences of any length side by side without padding; say whose a row
# is, where its token stands, where its K and V go and what it may see; order a batch for a kernel
# that treats decode and prefill differently; refuse a batch that would damage the cache; and say
# what still keeps rung 3 far from a fast kernel.
#
# This is **rung 3** of the ladder. The mathematics is done; this chapter is bookkeeping, and
# bookkeeping is where real kernels go wrong. One small batch of four sequences goes through the
# whole chapter, so that every number can be checked by hand.

# %%
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

# %%
from rpa import chips, dense, paging, ragged
from rpa.figures import ragged as pictures
from rpa.figures import show_source
from rpa.figures.paging import page_owners
from rpa.page_pool import PagePool, cdiv
from rpa.paging import get_kv_cache_shape, paged_attention
from rpa.ragged import RaggedBatch

# %% [markdown]
# ## 1. What does one step of a server look like?
#
# Paging took the padding out of the *cache*: each sequence reads its own pages and no more. The
# *queries* of rung 2 are still one array [num_seqs, q_len, ...], so all sequences of a step have to
# bring the same number of new tokens. They do not:
#
# | sequence | what it is doing | `q_len`, new tokens | `kv_len`, all tokens |
# |---|---|---|---|
# | A | in the middle of a long prompt, a chunk of it | 3 | 7 |
# | B | writing its answer (decode) | 1 | 6 |
# | C | just arrived, a short prompt | 4 | 4 |
# | D | writing its answer (decode) | 1 | 9 |
#
# `kv_len` counts **all** tokens of a sequence, the new ones included. Of A, 4 tokens are cached and
# 3 are new. Padded to the longest, the step computes 4 rows for each of 4 sequences:

# %%
q_lens = np.array([3, 1, 4, 1])  # A, B, C, D: new tokens
kv_lens = np.array([7, 6, 4, 9])  # all tokens, the new ones included

padded_rows = len(q_lens) * q_lens.max()
print(f"{q_lens.sum()} query rows are needed, {padded_rows} are computed")
assert padded_rows == 16 and q_lens.sum() == 9

# %% [markdown]
# Seven of sixteen rows are padding: computed, masked, thrown away. That is a toy. How bad is it
# where it matters?
#
# **Takeaway.** A step of a server mixes sequences that bring one token with sequences that bring
# hundreds. One array with a sequence axis cannot hold them without padding.

# %% [markdown]
# ## 2. How much is wasted on a real mix?
#
# Take lengths from a public trace (`rpa.traces`: the Azure LLM inference trace of 2023, from Patel
# et al., "Splitwise", ISCA 2024). A prompt is read in **chunks** of at most 512 tokens, one chunk a
# step, so that one long prompt does not hold up all others; then each step writes one token.
# While it reads, a sequence at step $n$ has read $n$ chunks and reads the next; the last chunk may
# be shorter.

# %%
CHUNK = 512


def lengths_at(step, context, chunks):
    """q_lens and kv_lens of sequences that are at this step of their life."""
    reading = step < chunks
    read = np.minimum((step + 1) * CHUNK, context)  # tokens read after this step
    kv_lens = np.where(reading, read, context + 1 + step - chunks)
    return np.where(reading, kv_lens - step * CHUNK, 1), kv_lens


print(*lengths_at(np.arange(4), context=1300, chunks=3), sep="\n")
assert lengths_at(np.arange(4), 1300, 3)[1].tolist() == [512, 1024, 1300, 1301]

# %% [markdown]
# A prompt of 1,300 tokens: two full chunks, a rest of 276, then the first decode step. Now
# photograph a server that runs 64 sequences at once. A request with many steps is met more often,
# so it is drawn with that weight.

# %%
from rpa.traces import sample_requests


def photograph(service, rng, num_seqs=64):
    """q_lens and kv_lens of a server's sequences at a random moment."""
    context, generated = sample_requests(10_000, int(rng.integers(2**31)), service)
    chunks = cdiv(context, CHUNK)  # the last one also gives the first new token
    steps = chunks + generated - 1
    who = rng.choice(len(steps), num_seqs, p=steps / steps.sum())
    return lengths_at(rng.integers(0, steps[who]), context[who], chunks[who])


# %% [markdown]
# One hundred photographs of each service, chat and code completion. What is computed if queries are
# padded, against what is needed?

# %%
for service in ("conversation", "code"):
    rng = np.random.default_rng(3)
    steps = [photograph(service, rng) for _ in range(100)]
    chunks = np.mean([(q > 1).sum() for q, _ in steps])
    needed = sum(q.sum() for q, _ in steps)
    padded = sum(len(q) * q.max() for q, _ in steps)
    print(f"{service:13} {chunks:4.1f} of 64 sequences read a prompt; "
          f"padded queries compute {padded / needed:4.1f} times the rows needed")  # fmt: skip
    assert padded > 5 * needed

# %% [markdown]
# Chat is the worse one, though it reads fewer prompts: a single chunk makes 63 decodes pay for 512
# rows each. Here is one photograph in three currencies. *Pairs* are (query, key) scores, which is
# what the matrix units compute; causal masking is left out of the count.

# %%
rng = np.random.default_rng(5)
q, kv = photograph("conversation", rng)
n, paged_kv = len(q), cdiv(kv, 16) * 16  # pages of 16 tokens
counts = {  # what is needed, padded, paged with padded queries, ragged
    "query rows computed": (q, n * q.max(), n * q.max(), q.sum()),
    "KV tokens read": (kv, n * kv.max(), paged_kv.sum(), paged_kv.sum()),
    "pairs computed": (q * kv, n * q.max() * kv.max(), q.max() * paged_kv.sum(), q @ paged_kv),
}

# %%
rows = []
for what, (needed, *touched) in counts.items():
    for scheme, number in zip(("padded", "paged", "ragged"), touched, strict=True):
        rows.append((what, scheme, int(needed.sum()), int(number)))

pictures.waste_figure(rows, title="One step of 64 conversations: what is touched, what is needed")

# %% [markdown]
# Paging mended the middle panel, the memory that is read. It could do nothing for the rows of the
# first one, and they return in the third: each padded row is compared with every key.
#
# **Takeaway.** Padding the queries multiplied the rows of these steps by seven to forty. Shorter
# chunks would make that smaller, not good: whatever is padded to the longest, one sequence sets the
# price for all.

# %% [markdown]
# ## 3. Side by side: one axis for all tokens
#
# So drop the sequence axis. Put the new tokens of all sequences into one row, one after the other,
# and remember where each sequence starts. For B, D, A, C (the order is explained in section 8):
#
# ```
# row          0   1   2   3   4   5   6   7   8
# token of     B   D   A   A   A   C   C   C   C
#              ^   ^   ^           ^               ^
# cu_q_lens    0   1   2           5               9
# ```
#
# `cu_q_lens` is the running sum of the q_lens with a 0 in front: one entry more than there are
# sequences. Sequence s owns the rows from `cu_q_lens[s]` up to, not including, `cu_q_lens[s + 1]`.

# %%
names = ["B", "D", "A", "C"]
q_lens, kv_lens = np.array([1, 1, 3, 4]), np.array([6, 9, 7, 4])  # the same four, reordered

cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)])
print(cu_q_lens)
assert cu_q_lens.tolist() == [0, 1, 2, 5, 9]

# %% [markdown]
# The pages come from a pool, as in chapter 2: four tokens per page. The page table has a row for
# each sequence and a column for each page of it: column 0 names the page of positions 0 to 3,
# column 1 that of positions 4 to 7, and so on. A sequence that needs fewer pages than the longest
# has padding in its last columns; it is never read.
#
# `RaggedBatch` holds the four small integer arrays that describe a step; a kernel gets nothing
# else. `from_lengths` builds it, and two things in its call have to wait for section 8:
# `chunk_prefill_size=3` says which sequences count as full chunks (the legend of the picture shows
# the kinds), and the second result, dropped here as `_`, is the order in which it put the
# sequences: ours, because they stand in it already.

# %%
pool = PagePool(num_pages=12, page_size=4)
for name, kv_len in zip(names, kv_lens, strict=True):
    pool.allocate(name, int(kv_len))
table = pool.page_table(names, pages_per_seq=3)  # i32[num_seqs, pages_per_seq]
print(table)

batch, _ = RaggedBatch.from_lengths(q_lens, kv_lens, table, chunk_prefill_size=3)
pictures.batch_figure(batch, names=names, title="Four sequences, nine new tokens, no padding")

# %% [markdown]
# **Takeaway.** The token axis is the only axis. `cu_q_lens` says whose is whose, in
# `num_seqs + 1` integers.

# %% [markdown]
# ## 4. Whose is row t?
#
# A sequence finds its rows by looking into `cu_q_lens`. The other direction is a search: the owner
# of row t is the *last* sequence that starts at or before t. Row 4 by hand: the starts up to 4 are
# 0, 1 and 2, three of them, so the owner is sequence 3 - 1 = 2, and that is A.

# %%
t = np.arange(9)
owner = np.searchsorted(cu_q_lens, t, side="right") - 1  # how many starts are <= t, minus one
print(" ".join(names[s] for s in owner))
assert owner.tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 3]

# %% [markdown]
# Everything hangs on `side`. A row *equal* to a start belongs to the sequence that starts there, so
# the tie has to count. With the default, `"left"`, the first token of each sequence goes to its
# neighbour, and all others still look right:

# %%
print(np.searchsorted(cu_q_lens, t, side="left") - 1)

# %% [markdown]
# **Takeaway.** Whose row t is: `searchsorted(cu_q_lens, t, side="right") - 1`. Only ties tell the
# two sides apart, so test the first row of each sequence.

# %% [markdown]
# ## 5. Where does a new token stand in its sequence?
#
# The new tokens are the last ones of their sequence. So the first of them has position
# `kv_len - q_len`, the length of the cached prefix, and each row counts one up:
#
# $$\text{position} = \text{kv\_len} - \text{q\_len} + (t - \text{start})$$
#
# Row 3 by hand: it is A's, which starts at row 2, with `kv_len` 7 and `q_len` 3. Position
# $7 - 3 + (3 - 2) = 5$.

# %%
start = cu_q_lens[owner]
positions = kv_lens[owner] - q_lens[owner] + (t - start)
for title, numbers in {"row": t, "start": start, "position": positions}.items():
    print(f"{title:9}", *(f"{number:2}" for number in numbers))
assert positions.tolist() == [5, 8, 4, 5, 6, 0, 1, 2, 3]

# %% [markdown]
# One formula serves all kinds. A decode (B, D): its one token is the last, position `kv_len - 1`. A
# fresh prompt (C): no prefix, positions from 0. A chunk (A): from the end of the prefix on.
#
# **Takeaway.** `kv_len` includes the new tokens, so the prefix is `kv_len - q_len`. Code that
# forgets the prefix is right for the first chunk of every prompt, and wrong for all that follow.

# %% [markdown]
# ## 6. Where do its K and V go?
#
# Each new token brings a key and a value. They have to be in the cache before attention reads it,
# because a token also sees itself and the new tokens before it. A position is a page of the
# sequence and a slot in it, and the page table turns that into a page of the cache. Row 3: position
# 5 is slot 1 of A's second page, so look into A's row of the table, column 1.

# %%
pages = table[owner, positions // 4]  # the row of the table is the owner's, not the token's
slots = positions % 4
print("pages", pages)
print("slots", slots)
assert len(set(zip(pages.tolist(), slots.tolist(), strict=True))) == 9  # no two in one place

# %% [markdown]
# The pool as a picture: a number in a slot is the position of its token. A's new tokens go to page
# 6, its second; D's token 8 opens a page of its own.

# %%
page_owners(pool, names, "Four sequences in a pool of twelve pages")

# %% [markdown]
# `RaggedBatch.token_positions` does sections 4 and 5 inside jit, and `store_new_tokens` writes all
# new tokens of a step with one scatter, whatever sequences they belong to.

# %%
show_source(ragged.store_new_tokens)

# %% [markdown]
# **Takeaway.** First store, then attend. The page table is the only thing between a token and
# another sequence's memory.

# %% [markdown]
# ## 7. What may a token see?
#
# All of the cached prefix of *its own* sequence, and its new tokens up to itself. Put all keys side
# by side, and the mask of the whole step is a row of blocks along a diagonal, one for each
# sequence:

# %%
pictures.mask_figure(batch, names=names)

# %% [markdown]
# Look at A. Its staircase ends in the lower *right* corner, because its last new token is the last
# token of the sequence; the four cached keys (pale) are visible to all three rows. A mask that
# ignores the prefix would start the staircase at key 0:

# %%
right = dense.visible(np.array([4, 5, 6]), np.arange(7)).astype(int)  # positions of A's tokens
wrong = dense.visible(np.array([0, 1, 2]), np.arange(7)).astype(int)  # its rows, t - start
print(right, wrong, sep="\n\n")
assert right.sum() == 5 + 6 + 7 and wrong.sum() == 1 + 2 + 3

# %% [markdown]
# No kernel builds the picture above: most of it is empty. It walks over the keys of one sequence at
# a time (that gives the blocks) and compares positions (that gives the staircase).
#
# **Takeaway.** Sequences are kept apart by the loop, causality is kept by positions. A decode needs
# no causal mask at all: its only token is the last, and sees everything.

# %% [markdown]
# ## 8. Why decode first?
#
# The three kinds want different kernels. Count what each does with a byte of KV (Llama 3 8B, one
# layer, 4,096 tokens in all):

# %%
llama = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
ridge = chips.ridge_flops_per_byte("v5e")
for kind, q_len in {"decode": 1, "full chunk": 512, "short rest": 40}.items():
    cost = chips.attention_cost(q_len, 4096, **llama)
    bound = "memory" if cost.intensity_flops_per_byte < ridge else "matrix units"
    print(f"{kind:10}  q_len {q_len:3}: {cost.intensity_flops_per_byte:6.1f} FLOP per byte, "
          f"v5e waits for {bound} (predicted)")  # fmt: skip

# %% [markdown]
# - **Decode**: one query row, known when the kernel is compiled. No loop over queries, no causal
#   mask. It waits for memory, so all that matters is to keep the copies of pages in flight.
# - **Chunked prefill**: chunks of one fixed size, again known to the compiler: no ragged end.
# - **Mixed**: anything else, and the price of being general.
#
# `chunk_prefill_size` is the size that a kernel is compiled for. It sorts, it does not limit: in
# section 2 the server cut its prompts into chunks of at most that size, but a sequence may bring
# more, as C does with 4 tokens where a chunk is 3. It is then mixed, like a rest that is shorter.
#
# So the sequences of a batch are sorted by kind, and `distribution` holds three *ends*, (i, j, k):
# sequences [0, i) decode, [i, j) are full chunks, [j, k) are mixed. A kernel runs three loops, each
# compiled for its kind. That is why B and D came first. Give the four in the order of arrival:

# %%
arrivals = ["A", "B", "C", "D"]
batch, order = RaggedBatch.from_lengths(
    [3, 1, 4, 1], [7, 6, 4, 9], pool.page_table(arrivals, 3), chunk_prefill_size=3
)
print("order:", order, "=", *(arrivals[s] for s in order))
print("distribution:", batch.distribution)
assert batch.distribution.tolist() == [2, 3, 4] and order.tolist() == [1, 3, 0, 2]

# %% [markdown]
# `order` is for the caller: lengths and page table are sorted already, and **the tokens have to
# follow**. A batch whose tokens stay as they arrived runs without an error, and B is answered with
# A's words.

# %%
tokens_of = {"A": ["A0", "A1", "A2"], "B": ["B0"], "C": ["C0", "C1", "C2", "C3"], "D": ["D0"]}
rows = [token for s in order for token in tokens_of[arrivals[s]]]
print(rows)
assert [row[0] for row in rows] == [names[s] for s in owner]

# %% [markdown]
# **Takeaway.** The order of a batch is a promise to the kernel: (i, j, k) are ends, not counts, and
# lengths, page table and tokens share one order.

# %% [markdown]
# ## 9. How do shapes stay fixed, when every step differs?
#
# JAX compiles once for each shape. Four sequences now, five in the next step: a server cannot
# compile at every step. So there is **room**: `max_num_seqs` slots and a fixed number of token
# rows. What is not used is ignored, and that needs three rules:
#
# - slots from `distribution[2]` on are unused; their numbers are garbage and never looked at;
# - a sequence with `q_len` 0 is an **idle slot**: legal, skipped, its pages stay as they are;
# - rows from `cu_q_lens[num_seqs]` on are **padding rows**: nothing is stored for them, and their
#   output is zero.

# %%
roomy, _ = RaggedBatch.from_lengths(
    [1, 0, 3, 4], [6, 9, 7, 4], table, max_num_seqs=6, chunk_prefill_size=3
)
roomy.kv_lens[4:], roomy.cu_q_lens[5:] = 77_777, -1  # garbage in the two unused slots

seqs, positions, owned = roomy.token_positions(num_tokens=11)
print("owner   ", np.where(owned, seqs, -1))
print("position", np.where(owned, positions, -1))

# %%
pictures.batch_figure(roomy, names=names, num_tokens=11, title="D is idle, three rows are padding")

# %% [markdown]
# Row 0 is B's and row 1 is A's: D asks nothing. The search of section 4 does that for free. D and A
# both start at row 1, and the *last* sequence that starts there is A.
#
# **Takeaway.** Shapes are room, `distribution` and `cu_q_lens` say how much of it is used. What is
# not used is not merely ignored in theory: our tests fill it with garbage and NaN.

# %% [markdown]
# ## 10. Which batch must be refused?
#
# JAX clamps an index that is too large, without a word. A wrong batch does not crash; it reads and
# *writes* other people's pages, and some answer turns strange an hour later. So the metadata is
# checked on the host, before anything is computed. Two mistakes that everyone makes once:


# %%
def refusal(batch):
    """What `RaggedBatch.validate` says to a batch for our pool of 12 pages of 4."""
    try:
        batch.validate(num_tokens=9, num_pages=12, page_size=4)
    except ValueError as error:
        return str(error)


cached_only, _ = RaggedBatch.from_lengths(q_lens, kv_lens - q_lens, table)
print(refusal(cached_only))

# %% [markdown]
# `kv_lens` was given as the cached tokens, without the new ones. For C, a fresh prompt, that is 0,
# and the check sees that it cannot be. (B's 5 instead of 6 it could not see: 5 is possible. A check
# on the host is a net, not a proof.) The next one no kernel could see: E continues B's text from
# a shared page, and both write their next token into it.

# %%
two_writers, _ = RaggedBatch.from_lengths([1, 1], [6, 6], [table[0], table[0]])
print(refusal(two_writers))
assert "a shared page may only be read" in refusal(two_writers)
assert refusal(batch) is None

# %% [markdown]
# **Takeaway.** A message for people says what was given, what was expected and what to do. It comes
# before anything is written, so the cache is as it was. You write the rule for shared pages in
# exercise 3.6.

# %% [markdown]
# ## 11. Rung 3
#
# All the pieces are there. Store the new tokens, then walk over the sequences: the decodes one
# query at a time, all others in blocks of 64 queries, each block through rung 2:

# %%
show_source(ragged.attend_sequences)

# %% [markdown]
# The two loops at the end are the specialisation of section 8 in its simplest form. Their trip
# counts are read from the batch, so the work is what the sequences need, and the shapes never
# change: one compilation serves every step of a server. A sequence's last block is filled up, so a
# rest of 16 tokens still computes 64 rows: padding to a block, not to the longest of all.
#
# `ref_ragged_paged_attention` wraps this with everything that the production function can do
# (sliding window, soft cap, scales of a quantised cache, sinks). It is the specification of the
# kernel at the end of the course. Eight sequences of SmolLM2's shape, one of them with a chunk:

# %%
num_q_heads, num_kv_heads, head_dim = 9, 3, 64
q_lens = np.array([1, 1, 1, 1, 1, 1, 1, 128])
kv_lens = np.array([1418, 501, 110, 1335, 194, 1291, 487, 640])
pool = PagePool(num_pages=512, page_size=16)
for s, kv_len in enumerate(kv_lens):
    pool.allocate(s, int(kv_len))
table = pool.page_table(range(8), pages_per_seq=96)
batch, _ = RaggedBatch.from_lengths(q_lens, kv_lens, table, chunk_prefill_size=128)
pictures.batch_figure(batch, title="Seven decodes and a chunk, SmolLM2's shape")

# %%
rng = np.random.default_rng(0)
num_tokens = int(q_lens.sum())
queries = jnp.float32(rng.standard_normal((num_tokens, num_q_heads, head_dim)))
keys, values = (
    jnp.float32(rng.standard_normal((num_tokens, num_kv_heads, head_dim))) for _ in range(2)
)
cache_shape = get_kv_cache_shape(512, 16, num_kv_heads, head_dim, jnp.float32)
kv_cache = jnp.float32(rng.standard_normal(cache_shape))

# %%
output, new_cache = ragged.ref_ragged_paged_attention(
    queries,
    keys,
    values,
    kv_cache,
    batch.kv_lens,
    batch.page_indices,
    batch.cu_q_lens,
    batch.distribution,
    sm_scale=head_dim**-0.5,
)

# %%
truth = ragged.oracle_ragged(queries, new_cache, batch, num_kv_heads)
print(f"worst token and head: {dense.scaled_error(output, truth):.1e}")
assert dense.scaled_error(output, truth) < 2e-6 and dense.relative_error(output, truth) < 2e-6

# %% [markdown]
# **Takeaway.** Rung 3 is rung 2 plus bookkeeping: it agrees with the float64 oracle, and it is what
# every kernel from here on is compared with.

# %% [markdown]
# ## 12. Do all rungs give the same numbers?
#
# `rpa.ladder` has an adapter for each rung, so that all of them answer the same call: (queries,
# keys, values, kv_cache, batch) to (output, kv_cache). Rung 1 pads queries, keys and values to the
# longest sequence. Rung 2 goes through the page table, with padded queries. Here is the step of
# section 11 on all three, with what each of them touches:


# %%
def best_ms(function, *arguments):
    """The function's result, and the best of three times; the first call compiles."""
    result, times_ms = jax.block_until_ready(function(*arguments)), []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times_ms.append(1e3 * (time.perf_counter() - start))
    return result, min(times_ms)


# %%
from functools import partial

from rpa.ladder import LADDER

machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
print(f"measured on {machine}, in plain JAX")
for rung in LADDER[:3]:
    attention = jax.jit(partial(rung.attention_for(batch), sm_scale=head_dim**-0.5))
    (output, _), ms = best_ms(attention, queries, keys, values, kv_cache, batch)
    error = dense.scaled_error(output, truth)
    print(f"rung {rung.number} {rung.name:6} {rung.query_rows(batch):5} query rows "
          f"{rung.kv_tokens_read(batch, 16):6} KV tokens {ms:7.1f} ms "
          f"{error:.0e} from the oracle")  # fmt: skip
    assert error < 2e-6

# %% [markdown]
# The same numbers, and the time goes where padding is computed: 128 query rows for each of seven
# decodes. Rung 3 computes the 135 rows that there are. (It reads the chunk's pages twice, once for
# each block of 64 queries. A kernel chooses its blocks larger; chapter 4 begins with that.)
#
# **Takeaway.** Three rungs, one answer. Ragged batching changes no number; it leaves out work whose
# result that is never read.

# %% [markdown]
# ## What is still slow
#
# Rung 3 computes no padding and reads no page that is not live. Is it done? Read
# `paging.paged_attention` again, and count what goes through memory:
#
# 1. Pass 1 walks over the pages and writes the **scores**: one float32 for each (query, key) pair
#    and head.
# 2. The softmax reads them and writes the weights, an array of the same size.
# 3. Pass 2 walks over the same pages **again** and reads the weights.
#
# The compiler can be asked how much memory that takes, without running it. A chunk of 512 queries,
# Llama 3 8B, one layer:


# %%
def memory_mb(kv_len, q_len=512, page_size=16):
    """Temporary memory of rung 2, and the KV that it reads, both in MB; compiled, not run."""
    cache = jax.ShapeDtypeStruct(
        get_kv_cache_shape(kv_len // page_size, page_size, 8, 128, jnp.bfloat16), jnp.bfloat16
    )
    q = jax.ShapeDtypeStruct((q_len, 32, 128), jnp.bfloat16)
    pages, number = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((kv_len // page_size,), ()))
    step = jax.jit(partial(paged_attention, num_kv_heads=8)).lower(q, cache, pages, number, number)
    kv_bytes = paging.kv_token_bytes(cache.shape, cache.dtype) * kv_len
    return step.compile().memory_analysis().temp_size_in_bytes / 1e6, kv_bytes / 1e6


# %%
for kv_len in (1024, 4096, 16384):
    temporary_mb, kv_mb = memory_mb(kv_len)
    scores_mb = 32 * 512 * kv_len * 4 / 1e6  # heads x queries x keys x 4 bytes
    print(f"kv_len {kv_len:6}: KV {kv_mb:5.1f} MB, scores {scores_mb:7.1f} MB, "
          f"temporary memory of the compiled program {temporary_mb:7.1f} MB")  # fmt: skip
    assert temporary_mb > scores_mb > 10 * kv_mb

# %% [markdown]
# By hand, for 4,096 keys: $32 \cdot 512 \cdot 4096 \cdot 4$ bytes are 268 MB of scores, for 16.8 MB
# of KV. The program holds them twice, scores and weights. And what does that cost in time? On a
# v5e, *predicted* by the roofline, if scores and weights are each written once and read once:

# %%
cost = chips.attention_cost(512, 4096, **llama)
scores_bytes = 32 * 512 * 4096 * 4
floor = chips.roofline_time("v5e", cost.flops, cost.hbm_bytes)
two_passes = chips.roofline_time("v5e", cost.flops, cost.hbm_bytes + 4 * scores_bytes)
for name, predicted in {"floor": floor, "rung 3": two_passes}.items():
    print(f"{name:7} {1e6 * predicted.time_s:6.0f} us on a v5e, waits for {predicted.bound}")
assert floor.bound == "compute" and two_passes.bound == "memory"

# %% [markdown]
# A prefill that should wait for the matrix units waits for memory instead, and the memory traffic
# is nothing but our own notes. A decode has few scores, but it pays for the second pass: it fetches
# every page twice, and bytes are all that a decode is made of. Measured, on one sequence:

# %%
for q_len in (1, 64):
    q = jnp.ones((q_len, num_q_heads, head_dim))
    pages = jnp.arange(512)  # the whole pool as one sequence of 8192 tokens
    attend = jax.jit(partial(paged_attention, num_kv_heads=num_kv_heads))
    _, ms = best_ms(attend, q, kv_cache, pages, 8192, 8192 - q_len)
    read_mb = 2 * kv_cache.nbytes / 1e6  # two passes
    print(f"q_len {q_len:2}: {ms:6.1f} ms for {read_mb:.0f} MB of pages, fetched in two passes "
          f"({machine}, plain JAX)")  # fmt: skip

# %% [markdown]
# The scores are needed one tile at a time, and then never again. Why write them down at all?
# Because the softmax wants the maximum and the sum of a *whole* row before it can weigh the first
# value. **Chapter 4** takes that reason away: with a running maximum and a running sum, one pass
# over the keys is enough, the scores never leave the chip's own memory, and the first kernel of the
# ladder is written.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/03_ragged.ipynb).
#
# **Read more:**
#
# - [Orca](https://www.usenix.org/conference/osdi22/presentation/yu), Yu et al. 2022: batches that
#   change at every step.
# - [Sarathi-Serve](https://arxiv.org/abs/2403.02310), Agrawal et al. 2024: why prompts come in
#   chunks.
