# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 3: Ragged batching, exercises
#
# You write the bookkeeping of a ragged batch, and then ragged paged attention itself: whose token
# is this, where does it go in the cache, what may it see, in which order do the sequences stand,
# which batch must be refused, and which bug of a page table can hide. Read the lesson first:
# `notebooks/03_ragged.ipynb`.
#
# Every exercise is a function to fill in and a check to run. A check starts with a case that you
# can do by hand, stops at the first difference, and says what it recognises.
#
# **Time:** about 90 minutes for all seven; 3.1 to 3.4 are short, 3.5 is the chapter in one
# function.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import rpa
from rpa.figures import exercises as pictures
from rpa.paging import cdiv, paged_attention, store_kv

paged_attention = jax.jit(paged_attention, static_argnames="num_kv_heads")  # one compile a shape

# %% [markdown]
# ## Exercise 3.1: Whose token is this?
#
# Write `token_owner(q_lens, num_tokens)`. It returns two arrays:
#
# - `cu_q_lens`, i32[num_seqs + 1]: where the rows of each sequence start, and the total at the end;
# - `owner`, i32[num_tokens]: the sequence of each row, and -1 for a padding row, one that comes
#   after the last owned row.
#
# By hand: `q_lens = [1, 3]` and `num_tokens = 6` give `cu_q_lens = [0, 1, 4]` and
# `owner = [0, 1, 1, 1, -1, -1]`. A `q_len` may be 0 (an idle slot); it owns no row.
#
# **Teaches:** a running sum turns "whose is row t?" into a search, and ties decide everything.

# %%
pictures.strips(
    [("row t", "0 1 2 3 4 5"), ("owner", "+0 | #1 #1 #1 | - -")],
    "Six rows: row 0 is owned by sequence 0, rows 1 to 3 by sequence 1, rows 4 and 5 by none. "
    "cu_q_lens is 0, 1, 4: where the owners change.",
    legend={"+": "sequence 0", "#": "sequence 1", "-": "padding: -1"},
)

# %% [markdown] tags=["hint"]
# `cu_q_lens` is a sorted list of starts. The owner of row t is the last sequence that starts at or
# before t: so count the starts that are `<= t`, and subtract one.

# %% [markdown] tags=["hint"]
# `jnp.searchsorted(sorted, x, side="right")` is the number of entries `<= x`; with `side="left"` it
# is the number of entries `< x`. `jnp.cumsum` gives the running sum without the leading 0, and
# `jnp.pad(sums, (1, 0))` puts it in front.

# %% [markdown] tags=["hint"]
# ```python
# cu_q_lens = jnp.pad(jnp.cumsum(q_lens), (1, 0))
# tokens = jnp.arange(num_tokens)
# owner = jnp.searchsorted(...) - 1
# return cu_q_lens, jnp.where(<is the row owned?>, owner, -1)
# ```


# %% tags=["exercise"]
def token_owner(q_lens, num_tokens):
    """q_lens i32[num_seqs] to cu_q_lens i32[num_seqs + 1] and owner i32[num_tokens]."""
    ### BEGIN SOLUTION
    cu_q_lens = jnp.pad(jnp.cumsum(q_lens), (1, 0))
    tokens = jnp.arange(num_tokens)
    owner = jnp.searchsorted(cu_q_lens, tokens, side="right") - 1
    return cu_q_lens, jnp.where(tokens < cu_q_lens[-1], owner, -1)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("3.1", token_owner)

# %% [markdown] tags=["explanation"]
# `side="right"` puts a tie on the side of the sequence that *starts* there: row 1 of `[0, 1, 4]` is
# the first row of sequence 1, not a second row of sequence 0. The same choice skips idle slots for
# free. In `[0, 1, 1, 3]` both sequence 1 (idle) and sequence 2 start at row 1, and "the last start
# that is `<= t`" is sequence 2. Rows from `cu_q_lens[-1]` on have no owner; a search alone would
# answer `num_seqs` there, an index that no array has, and JAX would clamp it without a word.


# %% tags=["wrong"] refused="searchsorted keeps its default side='left'"
def token_owner(q_lens, num_tokens):
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(q_lens)])
    owner = jnp.searchsorted(cu_q_lens, jnp.arange(num_tokens)) - 1
    return cu_q_lens, jnp.where(jnp.arange(num_tokens) < q_lens.sum(), owner, -1)


# %% tags=["wrong"] refused="given to the last sequence"
def token_owner(q_lens, num_tokens):
    cu_q_lens = jnp.pad(jnp.cumsum(q_lens), (1, 0))
    owner = jnp.repeat(jnp.arange(len(q_lens)), q_lens, total_repeat_length=num_tokens)
    return cu_q_lens, owner  # jnp.repeat fills up with its last value


# %% tags=["wrong"] refused="lacks its leading 0"
def token_owner(q_lens, num_tokens):
    cu_q_lens = jnp.cumsum(q_lens)
    owner = jnp.searchsorted(cu_q_lens, jnp.arange(num_tokens), side="right")
    return cu_q_lens, jnp.where(owner < len(q_lens), owner, -1)


# %% [markdown]
# ## Exercise 3.2: The place of every new token
#
# Before attention reads the cache, the K and V of the new tokens have to be stored in it. Write
# `token_places(kv_lens, cu_q_lens, page_table, page_size, owner)`; for every row it returns
#
# - `positions`: where the token stands in its own sequence. `kv_len` counts all tokens of the
#   sequence, and the new ones are the last of them;
# - `pages`: the page of the cache that holds that position;
# - `slots`: the row inside that page.
#
# By hand: `kv_len = 7`, `q_len = 3` (four tokens are cached), `page_size = 4`, pages `[9, 3]`. The
# new tokens have positions 4, 5, 6: all on page 3, in slots 0, 1, 2.
#
# `page_table` is i32[num_seqs, pages_per_seq]; `owner` is what 3.1 returns, here without padding
# rows.
#
# **Teaches:** a new token's place follows from where its sequence ends; this is the one formula of
# ragged batching.

# %%
pictures.strips(
    [("rows of new tokens", "_ _ _ _ +0 +1 +2"), ("page 9, then page 3", "0 1 2 3 | +4 +5 +6 -")],
    "Four tokens are cached on page 9. The three new ones have positions 4, 5 and 6, on page 3 in "
    "slots 0 to 2.",
    arrows=[((0, 4), (1, 4)), ((0, 5), (1, 5)), ((0, 6), (1, 6))],
    legend={"": "cached", "+": "new", "-": "room"},
)

# %% [markdown] tags=["hint"]
# Work backwards from the end. The last new token of a sequence has position `kv_len - 1` and stands
# in row `cu_q_lens[s + 1] - 1`. The row before it has the position before it.

# %% [markdown] tags=["hint"]
# Indexing with an array gives one answer for each row: `kv_lens[owner]`, `cu_q_lens[owner + 1]`,
# `page_table[owner, column]`. A position splits into page and slot with `//` and `%`.

# %% [markdown] tags=["hint"]
# ```python
# tokens = jnp.arange(len(owner))
# positions = kv_lens[owner] - ... + tokens
# pages = page_table[owner, ...]
# return positions, pages, ...
# ```


# %% tags=["exercise"]
def token_places(kv_lens, cu_q_lens, page_table, page_size, owner):
    """Position in the sequence, page of the cache and slot in the page, i32[num_tokens] each."""
    ### BEGIN SOLUTION
    tokens = jnp.arange(len(owner))
    positions = kv_lens[owner] - cu_q_lens[owner + 1] + tokens
    pages = page_table[owner, positions // page_size]
    return positions, pages, positions % page_size
    ### END SOLUTION


# %% tags=["check"]
rpa.check("3.2", token_places)

# %% [markdown] tags=["explanation"]
# `kv_len - q_len + (t - start)` with `q_len = end - start` is `kv_len - end + t`: the start
# cancels. The formula is right for every kind of sequence: for a fresh prompt `kv_len == q_len` and
# the positions start at 0; for a decode there is one row, `t = end - 1`, and the position is
# `kv_len - 1`. The page table turns a page *of the sequence* into a page *of the cache*; its row is
# the sequence's, never the token's. Note what protects you here: nothing. A position that is too
# large clamps to the last column and overwrites another token in silence.


# %% tags=["wrong"] refused="kv_len is taken for the cached tokens only"
def token_places(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions = kv_lens[owner] + jnp.arange(len(owner)) - cu_q_lens[owner]
    return positions, page_table[owner, positions // page_size], positions % page_size


# %% tags=["wrong"] refused="the page table, which knows the page of the cache, is not asked"
def token_places(kv_lens, cu_q_lens, page_table, page_size, owner):
    q_lens = jnp.diff(cu_q_lens)
    positions = (kv_lens - q_lens)[owner] + jnp.arange(len(owner)) - cu_q_lens[owner]
    return positions, *jnp.divmod(positions, page_size)


# %% tags=["wrong"] refused="the column of the page table is position % page_size, the slot"
def token_places(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions = kv_lens[owner] - cu_q_lens[owner + 1] + jnp.arange(len(owner))
    return positions, page_table[owner, positions % page_size], positions % page_size


# %% tags=["wrong"] refused="positions are counted from 1"
def token_places(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions = kv_lens[owner] - cu_q_lens[owner + 1] + jnp.arange(1, len(owner) + 1)
    return positions, page_table[owner, positions // page_size], positions % page_size


# %% tags=["wrong"] refused="the cached prefix is forgotten"
def token_places(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions = jnp.arange(len(owner)) - cu_q_lens[owner]
    return positions, page_table[owner, positions // page_size], positions % page_size


# %% [markdown]
# ## Exercise 3.3: The causal mask of a whole batch
#
# Put the keys of all sequences side by side: key j belongs to sequence `kv_owner[j]` and has
# position `kv_positions[j]` in it. Write `ragged_mask(kv_lens, cu_q_lens, kv_owner, kv_positions)`,
# a bool array [num_tokens, num_keys]: True where the new token may see the key. A token sees its
# own sequence only: all of the cached prefix, and the new tokens up to itself.
#
# By hand: one sequence with `kv_len = 4` and `q_len = 2`. Two tokens are cached, and the mask is
#
# ```
# 1 1 1 0
# 1 1 1 1
# ```
#
# A staircase that ends in the lower *right* corner. No token is a padding row here.
#
# **Teaches:** causality is about positions, not about rows; the cached prefix shifts the staircase.

# %% [markdown] tags=["hint"]
# A pair is visible under two conditions: same owner, and the key is not later than the query. So
# you need the owner and the position of every new token; both are in the exercises before.

# %% [markdown] tags=["hint"]
# `jnp.repeat(jnp.arange(num_seqs), q_lens)` is the owner of every row. `a[:, None] == b[None, :]`
# compares every row with every key; `&` joins two masks.

# %% [markdown] tags=["hint"]
# ```python
# q_lens = jnp.diff(cu_q_lens)
# q_owner = jnp.repeat(jnp.arange(len(q_lens)), q_lens)
# q_positions = ... + jnp.arange(len(q_owner))
# same = ...
# return same & (... <= ...)
# ```


# %% tags=["exercise"]
def ragged_mask(kv_lens, cu_q_lens, kv_owner, kv_positions):
    """bool[num_tokens, num_keys]: which key each new token of a ragged batch may see."""
    ### BEGIN SOLUTION
    q_lens = jnp.diff(cu_q_lens)
    q_owner = jnp.repeat(jnp.arange(len(q_lens)), q_lens)
    q_positions = (kv_lens - cu_q_lens[1:])[q_owner] + jnp.arange(len(q_owner))
    same = q_owner[:, None] == kv_owner[None, :]
    return same & (kv_positions[None, :] <= q_positions[:, None])
    ### END SOLUTION


# %% tags=["check"]
rpa.check("3.3", ragged_mask)

# %% [markdown] tags=["explanation"]
# Two conditions, one for each thing that a ragged batch mixes. *Same owner* keeps sequences apart
# although their tokens are neighbours in memory. *Not later* compares positions, and the position
# of a new token begins at `kv_len - q_len`: that is how the cached prefix is visible to all of a
# chunk. No kernel ever builds this array, it would be mostly False. A kernel visits a sequence's
# keys only (the first condition is in its loop bounds) and compares positions inside a tile (the
# second is its mask).


# %% tags=["wrong"] refused="the causal mask ignores the cached prefix"
def ragged_mask(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_owner = jnp.repeat(jnp.arange(len(kv_lens)), jnp.diff(cu_q_lens))
    row = jnp.arange(len(q_owner)) - cu_q_lens[q_owner]
    return (q_owner[:, None] == kv_owner) & (kv_positions <= row[:, None])


# %% tags=["wrong"] refused="also sees the keys of other sequences"
def ragged_mask(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_owner = jnp.repeat(jnp.arange(len(kv_lens)), jnp.diff(cu_q_lens))
    q_positions = (kv_lens - cu_q_lens[1:])[q_owner] + jnp.arange(len(q_owner))
    return kv_positions <= q_positions[:, None]


# %% tags=["wrong"] refused="a token does not see itself"
def ragged_mask(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_owner = jnp.repeat(jnp.arange(len(kv_lens)), jnp.diff(cu_q_lens))
    q_positions = (kv_lens - cu_q_lens[1:])[q_owner] + jnp.arange(len(q_owner))
    return (q_owner[:, None] == kv_owner) & (kv_positions < q_positions[:, None])


# %% tags=["wrong"] refused="the comparison is one too far"
def ragged_mask(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_owner = jnp.repeat(jnp.arange(len(kv_lens)), jnp.diff(cu_q_lens))
    q_positions = (kv_lens - cu_q_lens[1:])[q_owner] + jnp.arange(len(q_owner))
    return (q_owner[:, None] == kv_owner) & (kv_positions <= q_positions[:, None] + 1)


# %% [markdown]
# ## Exercise 3.4: Decode first
#
# Sequences arrive in any order; the kernel wants the three kinds together. Write
# `order_batch(q_lens, kv_lens, page_table, chunk_prefill_size)` with NumPy (it runs on the host).
# The kinds, in the order in which they shall stand:
#
# 1. decode: `q_len` at most 1, so an idle slot (`q_len` 0) counts;
# 2. chunked prefill: `q_len` is exactly `chunk_prefill_size`, a full chunk;
# 3. mixed: everything else, a shorter rest of a prompt as well as a longer one. The chunk size is
#    what a kernel was compiled for, not a limit: a sequence may bring more tokens.
#
# Within a kind the sequences stay in the order in which they came. It returns five arrays:
# `order` (place s is taken by arrival `order[s]`), then `kv_lens`, `page_table` and `cu_q_lens` of
# the ordered batch, and `distribution`, the three *ends* (i, j, k) of the kinds.
#
# By hand: `q_lens = [4, 1]` with chunks of 3. 4 tokens are more than a chunk, so that sequence is
# mixed. The decode moves to the front: `order = [1, 0]`, `cu_q_lens = [0, 1, 5]`, and
# `distribution = [1, 1, 2]`: one decode, no chunk, one mixed.
#
# **Teaches:** the order of a batch is a promise to the kernel, and everything has to follow it.

# %%
pictures.strips(
    [("as they came", "#0 #0 #0 #0 | +1"), ("decode first", "+1 | #0 #0 #0 #0")],
    "Sequence 0 with four new tokens came before sequence 1 with one; in the ordered batch the "
    "decode stands first.",
    arrows=[((0, 4), (1, 0)), ((0, 0), (1, 1))],
    legend={"+": "decode", "#": "mixed: more than a chunk of 3"},
)

# %% [markdown] tags=["hint"]
# Give each sequence the number of its kind, 0, 1 or 2, and sort by that number. Then let every
# array follow the same order. The ends are running counts: how many of kind 0, of kind 0 or 1, all.

# %% [markdown] tags=["hint"]
# `np.where(condition, a, b)` can be nested. `np.argsort(kind, kind="stable")` keeps the order among
# equals (the keyword names the sorting method, by bad luck also "kind"). `array[order]` reorders
# rows.

# %% [markdown] tags=["hint"]
# ```python
# number = np.where(q_lens <= 1, 0, np.where(...))
# order = np.argsort(number, kind="stable")
# cu_q_lens = np.concatenate([[0], np.cumsum(...)])
# distribution = np.array([(number == 0).sum(), ...])
# return order, kv_lens[order], ..., cu_q_lens, distribution
# ```


# %% tags=["exercise"]
def order_batch(q_lens, kv_lens, page_table, chunk_prefill_size):
    """order, kv_lens, page_table, cu_q_lens, distribution of the batch with its decodes first."""
    ### BEGIN SOLUTION
    number = np.where(q_lens <= 1, 0, np.where(q_lens == chunk_prefill_size, 1, 2))
    order = np.argsort(number, kind="stable")
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens[order])])
    distribution = np.array([(number == 0).sum(), (number <= 1).sum(), len(number)])
    return order, kv_lens[order], page_table[order], cu_q_lens, distribution
    ### END SOLUTION


# %% tags=["check"]
rpa.check("3.4", order_batch)

# %% [markdown] tags=["explanation"]
# One permutation, applied to all: lengths, the rows of the page table, the running sum, and (by the
# caller) the tokens themselves. If one of them stays behind, nothing crashes; a sequence then reads
# another one's pages. The sort is by *kind*, not by length: a prompt's rest of 2 tokens is shorter
# than a full chunk and still comes after it, because a kernel may be compiled for chunks of one
# fixed size. The sort has to be *stable* as well: without `kind="stable"` a short batch may look
# right, and in a longer one equals change places. And the distribution holds ends, not counts, so
# that the three loops are `range(0, i)`, `range(i, j)` and `range(j, k)`.


# %% tags=["wrong"] refused="counts the sequences of each kind"
def order_batch(q_lens, kv_lens, page_table, chunk_prefill_size):
    number = np.where(q_lens <= 1, 0, np.where(q_lens == chunk_prefill_size, 1, 2))
    order = np.argsort(number, kind="stable")
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens[order])])
    distribution = np.bincount(number, minlength=3)
    return order, kv_lens[order], page_table[order], cu_q_lens, distribution


# %% tags=["wrong"] refused="the page table still has its rows as the sequences arrived"
def order_batch(q_lens, kv_lens, page_table, chunk_prefill_size):
    number = np.where(q_lens <= 1, 0, np.where(q_lens == chunk_prefill_size, 1, 2))
    order = np.argsort(number, kind="stable")
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens[order])])
    distribution = np.array([(number == 0).sum(), (number <= 1).sum(), len(number)])
    return order, kv_lens[order], page_table, cu_q_lens, distribution


# %% tags=["wrong"] refused="the sort is not stable"
def order_batch(q_lens, kv_lens, page_table, chunk_prefill_size):
    number = np.where(q_lens <= 1, 0, np.where(q_lens == chunk_prefill_size, 1, 2))
    order = np.argsort(number)
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens[order])])
    distribution = np.array([(number == 0).sum(), (number <= 1).sum(), len(number)])
    return order, kv_lens[order], page_table[order], cu_q_lens, distribution


# %% tags=["wrong"] refused="more tokens than a chunk count as a full chunk"
def order_batch(q_lens, kv_lens, page_table, chunk_prefill_size):
    number = np.where(q_lens <= 1, 0, np.where(q_lens >= chunk_prefill_size, 1, 2))
    order = np.argsort(number, kind="stable")
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens[order])])
    distribution = np.array([(number == 0).sum(), (number <= 1).sum(), len(number)])
    return order, kv_lens[order], page_table[order], cu_q_lens, distribution


# %% tags=["wrong"] refused="sorted by q_len and not by kind"
def order_batch(q_lens, kv_lens, page_table, chunk_prefill_size):
    order = np.argsort(q_lens, kind="stable")
    i = (q_lens <= 1).sum()
    j = i + (q_lens == chunk_prefill_size).sum()
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens[order])])
    return order, kv_lens[order], page_table[order], cu_q_lens, np.array([i, j, len(q_lens)])


# %% [markdown]
# ## Exercise 3.5: Ragged paged attention
#
# The whole of rung 3 in one function. Write `ragged_attention(queries, keys, values, kv_cache,
# batch)`: store the K and V of the new tokens in the cache, then let every sequence attend through
# its row of the page table. It returns the output, [num_tokens, num_q_heads, head_dim], and the new
# cache. Rows that no sequence owns are zero. The scale is the default, `head_dim ** -0.5`.
#
# What you are given:
#
# - `seqs, positions, owned = batch.token_positions(num_tokens)`: 3.1 and 3.2 for every row; `owned`
#   is False for padding rows;
# - `store_kv(kv_cache, keys, values, pages, slots)`: writes token t to page `pages[t]`, slot
#   `slots[t]`, and returns the new cache. A page that does not exist (`num_pages`, for example)
#   means "do not store this one";
# - `paged_attention(q, kv_cache, pages, kv_len, q_start, num_kv_heads=...)`: rung 2, for one
#   sequence; `pages` is its row of the page table, `q_start` the position of its first query.
#
# A Python loop over `range(int(batch.num_seqs))` is fine: this is about being right. Skip a
# sequence without new tokens. The first check takes a few seconds: JAX compiles `paged_attention`
# once for every number of queries that it meets.
#
# **Teaches:** rung 3 is rung 2 plus bookkeeping, and the store comes before the read.

# %% [markdown] tags=["hint"]
# Two parts. First for all tokens at once: position, page, slot, store; a padding row goes to a page
# that does not exist. Then sequence by sequence: cut out its rows, attend, put the result into the
# same rows of an output that started as zeros.

# %% [markdown] tags=["hint"]
# `batch.page_indices.reshape(-1, batch.pages_per_seq)` is the page table.
# `table[seqs, positions // page_size]` is the page of every row. `output.at[start:end].set(x)`
# returns a new array with rows replaced. The first query of a sequence has position
# `kv_len - q_len`.

# %% [markdown] tags=["hint"]
# ```python
# num_pages, page_size = kv_cache.shape[:2]
# table = batch.page_indices.reshape(-1, batch.pages_per_seq)
# seqs, positions, owned = batch.token_positions(len(queries))
# pages = jnp.where(owned, ..., num_pages)
# kv_cache = store_kv(...)
# output = jnp.zeros_like(queries)
# for s in range(int(batch.num_seqs)):
#     start, end = int(batch.cu_q_lens[s]), int(batch.cu_q_lens[s + 1])
#     if start < end:
#         q_start = ...
#         attended = paged_attention(queries[start:end], kv_cache, table[s], ...)
#         output = output.at[start:end].set(attended)
# return output, kv_cache
# ```


# %% tags=["exercise"]
def ragged_attention(queries, keys, values, kv_cache, batch):
    """Output f32[num_tokens, num_q_heads, head_dim], and the cache with the new tokens in it."""
    ### BEGIN SOLUTION
    num_pages, page_size = kv_cache.shape[:2]
    table = batch.page_indices.reshape(-1, batch.pages_per_seq)
    seqs, positions, owned = batch.token_positions(len(queries))
    pages = jnp.where(owned, table[seqs, positions // page_size], num_pages)
    kv_cache = store_kv(kv_cache, keys, values, pages, positions % page_size)
    output = jnp.zeros_like(queries)
    for s in range(int(batch.num_seqs)):
        start, end = int(batch.cu_q_lens[s]), int(batch.cu_q_lens[s + 1])
        if start < end:
            kv_len, q_start = batch.kv_lens[s], batch.kv_lens[s] - (end - start)
            q, heads = queries[start:end], keys.shape[1]
            attended = paged_attention(q, kv_cache, table[s], kv_len, q_start, num_kv_heads=heads)
            output = output.at[start:end].set(attended)
    return output, kv_cache
    ### END SOLUTION


# %% tags=["check"]
rpa.check("3.5", ragged_attention)

# %% [markdown]
# Does it speak? SmolLM2, a real model of 135 million parameters, with *your* attention in all of
# its 30 layers. Two prompts are served side by side from one paged cache, ten tokens each.

# %%
from rpa.models.speak import speak


def yours(queries, keys, values, kv_cache, batch, *, sm_scale):
    return ragged_attention(queries, keys, values, kv_cache, batch)  # its scale is the same


speak(yours)

# %% [markdown] tags=["explanation"]
# The store comes first because a new token attends to itself and to the new tokens before it: their
# K and V must be in the cache when it is read. Everything else is addressing. The loop ends at
# `num_seqs`, since the slots after it hold whatever the last step left there; padding rows go to a
# page that does not exist, because row 0 of every array has an owner. What this version lacks
# is a fixed shape: each `q_len` compiles `paged_attention` once more. `rpa.ragged` cuts the queries
# into blocks of fixed size instead, and loops inside jit.


# %% tags=["wrong"] refused="attention reads the cache before the new tokens are stored"
def ragged_attention(queries, keys, values, kv_cache, batch):
    num_pages, page_size = kv_cache.shape[:2]
    table = batch.page_indices.reshape(-1, batch.pages_per_seq)
    output = jnp.zeros_like(queries)
    for s in range(int(batch.num_seqs)):
        start, end = int(batch.cu_q_lens[s]), int(batch.cu_q_lens[s + 1])
        kv_len = batch.kv_lens[s]
        out = paged_attention(
            queries[start:end],
            kv_cache,
            table[s],
            kv_len,
            kv_len - (end - start),
            num_kv_heads=keys.shape[1],
        )
        output = output.at[start:end].set(out)
    seqs, positions, owned = batch.token_positions(len(queries))
    pages = jnp.where(owned, table[seqs, positions // page_size], num_pages)
    return output, store_kv(kv_cache, keys, values, pages, positions % page_size)


# %% tags=["wrong"] refused="keys and values are swapped"
def ragged_attention(queries, keys, values, kv_cache, batch):
    num_pages, page_size = kv_cache.shape[:2]
    table = batch.page_indices.reshape(-1, batch.pages_per_seq)
    seqs, positions, owned = batch.token_positions(len(queries))
    pages = jnp.where(owned, table[seqs, positions // page_size], num_pages)
    kv_cache = store_kv(kv_cache, values, keys, pages, positions % page_size)
    output = jnp.zeros_like(queries)
    for s in range(int(batch.num_seqs)):
        start, end = int(batch.cu_q_lens[s]), int(batch.cu_q_lens[s + 1])
        n = batch.kv_lens[s]
        out = paged_attention(
            queries[start:end],
            kv_cache,
            table[s],
            n,
            n - (end - start),
            num_kv_heads=keys.shape[1],
        )
        output = output.at[start:end].set(out)
    return output, kv_cache


# %% tags=["wrong"] refused="q_start is kv_len"
def ragged_attention(queries, keys, values, kv_cache, batch):
    num_pages, page_size = kv_cache.shape[:2]
    table = batch.page_indices.reshape(-1, batch.pages_per_seq)
    seqs, positions, owned = batch.token_positions(len(queries))
    pages = jnp.where(owned, table[seqs, positions // page_size], num_pages)
    kv_cache = store_kv(kv_cache, keys, values, pages, positions % page_size)
    output = jnp.zeros_like(queries)
    for s in range(int(batch.num_seqs)):
        start, end = int(batch.cu_q_lens[s]), int(batch.cu_q_lens[s + 1])
        n = batch.kv_lens[s]
        out = paged_attention(
            queries[start:end], kv_cache, table[s], n, n, num_kv_heads=keys.shape[1]
        )
        output = output.at[start:end].set(out)
    return output, kv_cache


# %% tags=["wrong"] refused="padding rows are stored as well"
def ragged_attention(queries, keys, values, kv_cache, batch):
    table = batch.page_indices.reshape(-1, batch.pages_per_seq)
    seqs, positions, owned = batch.token_positions(len(queries))
    page, slot = jnp.divmod(positions, kv_cache.shape[1])
    kv_cache = store_kv(kv_cache, keys, values, table[seqs, page], slot)
    output = jnp.zeros_like(queries)
    for s in range(int(batch.num_seqs)):
        start, end = int(batch.cu_q_lens[s]), int(batch.cu_q_lens[s + 1])
        n = batch.kv_lens[s]
        out = paged_attention(
            queries[start:end],
            kv_cache,
            table[s],
            n,
            n - (end - start),
            num_kv_heads=keys.shape[1],
        )
        output = output.at[start:end].set(out)
    return output, kv_cache


# %% [markdown]
# ## Exercise 3.6: A batch that must be refused
#
# Sequences may share pages: a common prefix is stored once. But a page that *receives* new tokens
# must stand in one place of the page table only, or one sequence writes over what the other reads.
# This is the validator's rule that the host alone can check. Write
# `shared_writes(kv_lens, cu_q_lens, page_table, page_size)` with NumPy: a bool array of the page
# table's shape, True where a page receives new tokens and is live in another place as well.
#
# Only live entries count: the first `ceil(kv_len / page_size)` of each row. The entries after them
# are padding and may hold any number, -9 or 999 too. A sequence without new tokens writes nothing.
#
# By hand: two sequences of `kv_len = 6`, each with one new token, pages `[3, 5]` both. Position 5
# is on the second page: both write page 5, and it is shared. Page 3 is shared too, but only read.
#
# **Teaches:** reading shared pages is the point of paging; writing them is the bug that no kernel
# can see.

# %%
pictures.strips(
    [("sequence 0", "0 1 2 3 | 4 +5 - -"), ("its pages", "3 3 3 3 | *5 *5 *5 *5"),
     ("sequence 1", "0 1 2 3 | 4 +5 - -"), ("its pages", "3 3 3 3 | *5 *5 *5 *5")],
    "Two sequences of six tokens with pages 3 and 5 both. Page 3 is shared and only read; both "
    "write their new token to page 5.",
    legend={"": "cached, only read", "+": "new", "*": "written by both"},
)  # fmt: skip

# %% [markdown] tags=["hint"]
# Three masks over the table: *live* (the entry means something), *written* (a live page from the
# page of the first new token on), *shared* (its page number is live more than once).

# %% [markdown] tags=["hint"]
# `column = np.arange(pages_per_seq)` compared with a `[:, None]` column of limits gives a mask of
# the table's shape. `cdiv(a, b)` divides and rounds up. `np.bincount(page_table[live])` counts the
# owners of each page; index it with `np.where(live, page_table, 0)`, so that garbage stays out.

# %% [markdown] tags=["hint"]
# ```python
# q_lens = np.diff(cu_q_lens)
# column = np.arange(page_table.shape[1])
# live = column < cdiv(kv_lens, page_size)[:, None]
# first_written = ...
# written = live & (column >= ...) & (...)
# owners = np.bincount(page_table[live], minlength=1)
# return written & (owners[...] > 1)
# ```


# %% tags=["exercise"]
def shared_writes(kv_lens, cu_q_lens, page_table, page_size):
    """bool[num_seqs, pages_per_seq]: a page that new tokens are written to, and that is shared."""
    ### BEGIN SOLUTION
    q_lens = np.diff(cu_q_lens)
    column = np.arange(page_table.shape[1])
    live = column < cdiv(kv_lens, page_size)[:, None]
    first_written = (kv_lens - q_lens) // page_size
    written = live & (column >= first_written[:, None]) & (q_lens > 0)[:, None]
    owners = np.bincount(page_table[live], minlength=1)
    return written & (owners[np.where(live, page_table, 0)] > 1)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("3.6", shared_writes)

# %% [markdown] tags=["explanation"]
# The first new token has position `kv_len - q_len`, so the first page written is that divided by
# the page size and rounded *down*: a page that is half full of cached tokens is written to, and if
# it is shared, it had to be copied first. That is the copy-on-write of `PagePool.append`; this rule
# finds the server that forgot it. It is vectorised, with no loop over pages, since a server runs it
# at every step. `rpa.validation` has the same rule and then says, in words, which two places
# collide.


# %% tags=["wrong"] refused="a shared page is reported though it is only read"
def shared_writes(kv_lens, cu_q_lens, page_table, page_size):
    live = np.arange(page_table.shape[1]) < cdiv(kv_lens, page_size)[:, None]
    owners = np.bincount(page_table[live])
    return live & (owners[np.where(live, page_table, 0)] > 1)


# %% tags=["wrong"] refused="rounded down, not up"
def shared_writes(kv_lens, cu_q_lens, page_table, page_size):
    q_lens = np.diff(cu_q_lens)
    column = np.arange(page_table.shape[1])
    live = column < cdiv(kv_lens, page_size)[:, None]
    owners = np.bincount(page_table[live])
    fresh = live & (column >= cdiv(kv_lens - q_lens, page_size)[:, None])
    return fresh & (owners[np.where(live, page_table, 0)] > 1)


# %% tags=["wrong"] refused="only the pages that are written are counted"
def shared_writes(kv_lens, cu_q_lens, page_table, page_size):
    q_lens = np.diff(cu_q_lens)
    column = np.arange(page_table.shape[1])
    live = column < cdiv(kv_lens, page_size)[:, None]
    written = live & (column >= ((kv_lens - q_lens) // page_size)[:, None])
    written &= (q_lens > 0)[:, None]
    writers = np.bincount(page_table[written])
    return written & (writers[np.where(written, page_table, page_table[written][0])] > 1)


# %% tags=["wrong"] refused="a page that stands twice in its own row is left out"
def shared_writes(kv_lens, cu_q_lens, page_table, page_size):
    result = np.zeros(page_table.shape, bool)
    owners = [set(row[: cdiv(n, page_size)]) for row, n in zip(page_table, kv_lens, strict=True)]
    for s, q_len in enumerate(np.diff(cu_q_lens)):
        first, end = (kv_lens[s] - q_len) // page_size, cdiv(kv_lens[s], page_size)
        for p in range(first, end if q_len else first):
            result[s, p] = sum(page_table[s, p] in pages for pages in owners) > 1
    return result


# %% tags=["wrong"] refused="the padding of the page table counts"
def shared_writes(kv_lens, cu_q_lens, page_table, page_size):
    q_lens = np.diff(cu_q_lens)
    column = np.arange(page_table.shape[1])
    written = column >= ((kv_lens - q_lens) // page_size)[:, None]
    owners = np.bincount(page_table.reshape(-1))  # garbage may be negative
    return written & (q_lens > 0)[:, None] & (owners[page_table] > 1)


# %% [markdown]
# ## Exercise 3.7: Two pages are swapped
#
# A bug in a server exchanges two entries of a sequence's row of the page table, after the cached
# tokens were stored and before the step. Then the step runs as always: it stores the new tokens
# through the table, and attends through the table. Is its output wrong? Not always.
#
# Write `harmless_swaps(kv_len, q_len, page_size)`: a bool array [num_pages, num_pages] over the
# `ceil(kv_len / page_size)` live pages, True at [i, j] where exchanging entries i and j leaves the
# output as it is, except for rounding. A page exchanged with itself is harmless.
#
# Two things to know. K is rotated by the token's position *before* it is stored, so a key carries
# its position with it, wherever it lies. And every new token sees all cached tokens.
#
# By hand: `kv_len = 11`, `q_len = 2`, pages of 4. Positions 0 to 8 are cached, 9 and 10 are new.
# Exchange entries 0 and 1: the same keys with the same values in another order, and a softmax does
# not know an order. Exchange 1 and 2: tokens 9 and 10 are stored over tokens 5 and 6, and the step
# takes the page with token 8 for a full one.
#
# **Teaches:** attention over cached tokens is a sum over a set; what has an order is the place of
# the next token, and the end.

# %%
pictures.strips(
    [("page 0, 1, 2", "0 1 2 3 | 4 5 6 7 | 8 +9 +10 -")],
    "A sequence of eleven tokens on three pages of four, the last two tokens new. Pages 0 and 1 "
    "hold cached tokens only, page 2 holds a cached one, two new ones, and room for one.",
    legend={"": "cached", "+": "new in this step", "-": "room"},
)

# %% [markdown] tags=["hint"]
# Three kinds of pages: all cached, nothing cached, and the one in which the new tokens begin behind
# cached ones. Which kinds may be exchanged with which?

# %% [markdown] tags=["hint"]
# Page i holds positions `i * page_size` up to `(i + 1) * page_size - 1`. `np.outer(a, b)` of two
# bool arrays is True where both are; `np.eye(n, dtype=bool)` is the diagonal.

# %% [markdown] tags=["hint"]
# ```python
# num_cached = ...
# first = np.arange(cdiv(kv_len, page_size)) * page_size
# all_cached = first + page_size <= ...
# all_new = ... >= num_cached
# return np.outer(all_cached, all_cached) | ... | np.eye(len(first), dtype=bool)
# ```


# %% tags=["exercise"]
def harmless_swaps(kv_len, q_len, page_size):
    """bool[num_pages, num_pages]: which two entries may be exchanged before the step."""
    ### BEGIN SOLUTION
    num_cached = kv_len - q_len
    first = np.arange(cdiv(kv_len, page_size)) * page_size
    all_cached = first + page_size <= num_cached
    all_new = first >= num_cached
    both = np.outer(all_cached, all_cached) | np.outer(all_new, all_new)
    return both | np.eye(len(first), dtype=bool)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("3.7", harmless_swaps)

# %% [markdown]
# Read it. SmolLM2 with rung 3 in all layers; only the page table is changed, once, when the prompts
# are stored. First two full pages of each sequence are exchanged, then the last two, of which one
# is half full, then one page between the two sequences.

# %%
from rpa.models.speak import speak


def swap_full(table):
    table[:, [0, 1]] = table[:, [1, 0]]
    return table


speak(None, after_prompt=swap_full)


# %%
def swap_last(table):
    table[0, [4, 5]], table[1, [3, 4]] = table[0, [5, 4]], table[1, [4, 3]]
    return table


speak(None, after_prompt=swap_last)


# %%
def swap_between(table):
    table[[0, 1], 3] = table[[1, 0], 3]
    return table


speak(None, after_prompt=swap_between)

# %% [markdown] tags=["explanation"]
# Two pages of cached tokens: the sum over keys has the same terms in another order. Two pages that
# hold new tokens only: the step stores through the wrong table and reads through the same wrong
# table, so it is merely another allocation. Everything else breaks, because the mask knows
# positions and not tokens: behind a page that is not full the kernel takes stale rows for keys, and
# the store writes over cached tokens. That is why such a bug can hide for hours: most swaps hit
# full pages, and the text stays fluent. A page of *another* sequence is never harmless, and the
# model makes it visible: one prompt begins to answer the other.


# %% tags=["wrong"] refused="the order of the cached pages is taken to matter"
def harmless_swaps(kv_len, q_len, page_size):
    return np.eye(cdiv(kv_len, page_size), dtype=bool)


# %% tags=["wrong"] refused="pages that the new tokens fill count as cached ones"
def harmless_swaps(kv_len, q_len, page_size):
    first = np.arange(cdiv(kv_len, page_size)) * page_size
    full = first + page_size <= kv_len
    return np.outer(full, full) | np.eye(len(first), dtype=bool)


# %% tags=["wrong"] refused="two pages without a cached token are left out"
def harmless_swaps(kv_len, q_len, page_size):
    first = np.arange(cdiv(kv_len, page_size)) * page_size
    cached = first + page_size <= kv_len - q_len
    return np.outer(cached, cached) | np.eye(len(first), dtype=bool)


# %% tags=["wrong"] refused="a page that is cached in part counts as cached"
def harmless_swaps(kv_len, q_len, page_size):
    first = np.arange(cdiv(kv_len, page_size)) * page_size
    cached = first < kv_len - q_len
    return np.outer(cached, cached) | np.outer(~cached, ~cached)


# %% tags=["wrong"] refused="the diagonal is False"
def harmless_swaps(kv_len, q_len, page_size):
    first = np.arange(cdiv(kv_len, page_size)) * page_size
    cached, new = first + page_size <= kv_len - q_len, first >= kv_len - q_len
    both = np.outer(cached, cached) | np.outer(new, new)
    return both & ~np.eye(len(first), dtype=bool)
