# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 2: Paged attention, exercises
#
# You write the pieces of a paged KV cache: where a token lies, how K is read back through the page
# table, how K and V are laid out, how two sequences share a prefix until one of them writes,
# attention through the table, with memory that may hold NaN wherever you should not look, and how
# a server finds pages that it can use again. Read the lesson first: `notebooks/02_paging.ipynb`.
#
# Every exercise is a function to fill in and a check to run. A check starts with a case that you
# can do by hand, stops at the first difference, and says what it recognises.
#
# | name | what it is |
# |---|---|
# | `kv_cache` | `[num_pages, page_size, rows, packing, lanes]`: all pages of one layer |
# | `pages` | i32: the pages of one sequence, in the order of its tokens |
# | `kv_len` | tokens of the sequence that are in the cache |
# | combined head | `2h` is K of head `h`, `2h + 1` is V of head `h` |
# | `rows`, `packing` | combined head `c` lies in row `c // packing`, at place `c % packing` |

# %%
import jax
import jax.numpy as jnp

import rpa
from rpa.figures import exercises as pictures
from rpa.paging import cdiv, unpack_kv

# %% [markdown]
# ## Exercise 2.1: Where does a token lie?
#
# The page table of a whole batch is one flat array, as a kernel gets it: row `s` begins at entry
# `s * pages_per_seq`, and its entry `i` is the page that holds tokens `i * page_size` up to `(i +
# 1) * page_size - 1` of sequence `s`.
#
# Write `address(page_indices, pages_per_seq, seqs, positions, page_size)`: for each token, given
# its sequence and its position there, the page of the cache and the slot in that page.
#
# By hand: sequence 0 lives in pages 7, 2, 5 of 4 tokens. The token at position 9 is the second
# token of its third page: page 5, slot 1.
#
# **Teaches:** an address in two steps, which every paged kernel computes before it moves a byte.

# %%
pictures.strips(
    [("sequence 0", "0 1 2 3 | 4 5 6 7 | 8 *9 10 11"),
     ("its pages", "7 7 7 7 | 2 2 2 2 | 5 *5 5 5"),
     ("slot", "0 1 2 3 | 0 1 2 3 | 0 *1 2 3")],
    "Sequence 0 in three pages of four tokens, 7, 2 and 5. Position 9 is in page 5, slot 1.",
    legend={"*": "the token of the example"},
)  # fmt: skip

# %% [markdown] tags=["hint"]
# Two questions. Which page *of the sequence* is it, and how far into that page? Then one look into
# the table turns a page of the sequence into a page of the cache.

# %% [markdown] tags=["hint"]
# `positions // page_size` and `positions % page_size` work on whole arrays, and so does
# `page_indices[entries]` with an array of entries.

# %% [markdown] tags=["hint"]
# ```python
# entries = seqs * ... + positions // ...
# return page_indices[entries], positions % ...
# ```


# %% tags=["exercise"]
def address(page_indices, pages_per_seq, seqs, positions, page_size):
    """Page and slot of each token: i32[num_tokens], i32[num_tokens].

    page_indices: i32[max_num_seqs * pages_per_seq], the page table, flattened.
    seqs, positions: i32[num_tokens], sequence and position of each token.
    """
    ### BEGIN SOLUTION
    entries = seqs * pages_per_seq + positions // page_size
    return page_indices[entries], positions % page_size
    ### END SOLUTION


# %% tags=["check"]
rpa.check("2.1", address)

# %% [markdown] tags=["explanation"]
# It is the address translation of an operating system: the position is a virtual address, its
# quotient by the page size is looked up, its remainder is kept. The table is flat because a kernel
# reads it from SMEM, the scalar memory, where arrays of one dimension waste nothing. A page size
# that is a power of two makes the division a shift.


# %% tags=["wrong"] refused="the row of sequence s is thought to start at entry s"
def address(page_indices, pages_per_seq, seqs, positions, page_size):
    return page_indices[seqs + positions // page_size], positions % page_size


# %% tags=["wrong"] refused="the table is never asked"
def address(page_indices, pages_per_seq, seqs, positions, page_size):
    return positions // page_size, positions % page_size


# %% tags=["wrong"] refused="// and % are swapped"
def address(page_indices, pages_per_seq, seqs, positions, page_size):
    slot, page = jnp.divmod(positions, page_size)
    return page_indices[seqs * pages_per_seq + page], slot


# %% tags=["wrong"] refused="function returns one value, expected 2 (pages, slots)"
def address(page_indices, pages_per_seq, seqs, positions, page_size):
    page = page_indices[seqs * pages_per_seq + positions // page_size]
    return page * page_size + positions % page_size


# %% [markdown]
# ## Exercise 2.2: Read K back through the pages
#
# Write `gather_keys(kv_cache, pages, kv_len, num_kv_heads, head_dim)`: the keys of one sequence,
# `[kv_len, num_kv_heads, head_dim]`, as if they had never been scattered. Only live tokens: the
# last page may have empty slots, and the table may have entries after the live ones that mean
# nothing.
#
# In the first case every number of the cache says where it lies: `100 * page + 10 * slot +
# combined head + lane / 10`. Three tokens in pages 2 and 0, with pages of 2 slots: the keys begin
# with 200, 210 and 0.
#
# **Teaches:** the way from a page table to K, and the layout of the cache, read from its far end.

# %%
pictures.strips(
    [("cache", "200 210 | _ 100 110 | _ 000 010"), ("keys", "_ _ *200 *210 *000")],
    "Pages 2, 1 and 0 of two slots, with the first number of each slot. The keys of the sequence "
    "are 200 and 210 of page 2, then 0 of page 0; slot 1 of page 0 is not used.",
    arrows=[((0, 0), (1, 2)), ((0, 1), (1, 3)), ((0, 6), (1, 4))],
    legend={"": "page 2, page 1, page 0: first lane of K of head 0", "*": "keys, in order"},
)

# %% [markdown] tags=["hint"]
# Four steps: take the live pages; line their slots up to one row of tokens and cut it at `kv_len`;
# line rows and packing up to combined heads; take every second one.

# %% [markdown] tags=["hint"]
# Indexing with an array of pages, `kv_cache[pages]`, gathers `[pages, page_size, rows, packing,
# lanes]`. `reshape(-1, ...)` merges leading dimensions; `x[:, 0:n:2]` takes the even ones of `n`.
# `cdiv(kv_len, page_size)` is how many pages are live.

# %% [markdown] tags=["hint"]
# ```python
# tokens = kv_cache[<live pages>].reshape(-1, *kv_cache.shape[2:])[:kv_len]
# combined = tokens.reshape(kv_len, -1, kv_cache.shape[-1])  # [kv_len, combined heads, lanes]
# return combined[:, <even ones of the true heads>, <true lanes>]
# ```


# %% tags=["exercise"]
def gather_keys(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    """Keys of one sequence, [kv_len, num_kv_heads, head_dim], in the dtype of the cache.

    kv_cache: [num_pages, page_size, rows, packing, lanes].
    pages: i32[pages_per_seq], the sequence's row of the page table.
    kv_len: int, the sequence's tokens in the cache.
    """
    ### BEGIN SOLUTION
    live = pages[: cdiv(kv_len, kv_cache.shape[1])]
    tokens = kv_cache[live].reshape(-1, *kv_cache.shape[2:])[:kv_len]
    combined = tokens.reshape(kv_len, -1, kv_cache.shape[-1])  # [kv_len, combined heads, lanes]
    return combined[:, 0 : 2 * num_kv_heads : 2, :head_dim]
    ### END SOLUTION


# %% tags=["check"]
rpa.check("2.2", gather_keys)

# %% [markdown] tags=["explanation"]
# `kv_cache[live]` puts pages in the order of the sequence, so merging the first two dimensions
# gives tokens in order; the cut at `kv_len` drops the empty slots of the last page. Rows and
# packing are neighbours in the shape, so merging them gives the combined heads 0, 1, 2, ..., and
# the even ones up to `2 * num_kv_heads` are the keys. A padding head or lane is never returned.
# Had you gathered all entries of the table and cut afterwards, the numbers would be right too,
# since JAX clamps an index that is out of range; but a kernel would have moved pages that belong
# to another sequence.


# %% tags=["wrong"] refused="all keys are thought to come first"
def gather_keys(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    live = pages[: cdiv(kv_len, kv_cache.shape[1])]
    tokens = kv_cache[live].reshape(-1, *kv_cache.shape[2:])[:kv_len]
    combined = tokens.reshape(kv_len, -1, kv_cache.shape[-1])
    return combined[:, :num_kv_heads, :head_dim]


# %% tags=["wrong"] refused="the packing axis is taken for K and V"
def gather_keys(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    live = pages[: cdiv(kv_len, kv_cache.shape[1])]
    tokens = kv_cache[live].reshape(-1, *kv_cache.shape[2:])[:kv_len]
    return tokens[:, :num_kv_heads, 0, :head_dim]


# %% tags=["wrong"] refused="slots run before pages"
def gather_keys(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    live = pages[: cdiv(kv_len, kv_cache.shape[1])]
    slots = [kv_cache[live, slot] for slot in range(kv_cache.shape[1])]
    tokens = jnp.concatenate(slots)[:kv_len]
    combined = tokens.reshape(kv_len, -1, kv_cache.shape[-1])
    return combined[:, 0 : 2 * num_kv_heads : 2, :head_dim]


# %% tags=["wrong"] refused="the empty slots of the last page are kept"
def gather_keys(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    live = pages[: cdiv(kv_len, kv_cache.shape[1])]
    keys, _ = unpack_kv(kv_cache[live], num_kv_heads, head_dim)
    return keys.reshape(-1, num_kv_heads, head_dim)


# %% [markdown]
# ## Exercise 2.3: Pack K and V
#
# Now the other way. Write `pack(keys, values, packing, lanes)`: from `[num_tokens, num_kv_heads,
# head_dim]` to `[num_tokens, rows, packing, lanes]`, as the cache holds it. K and V of a head are
# neighbours, `packing` combined heads form a row, and everything after the true heads and the
# true lanes is zero.
#
# By hand, two heads of 2, packing 2, lanes 4: row 0 is K and V of head 0, row 1 those of head 1.
#
# **Teaches:** why a token of the cache is one solid block that one DMA can move.

# %%
pictures.strips(
    [("row 0, pack 0", "K0 K0 - -"), ("row 0, pack 1", "*V0 *V0 - -"),
     ("row 1, pack 0", "K1 K1 - -"), ("row 1, pack 1", "*V1 *V1 - -")],
    "One token with two heads of two lanes: row 0 holds K and V of head 0, row 1 those of head 1; "
    "two of four lanes are zero.",
    legend={"": "key", "*": "value", "-": "zero"},
)  # fmt: skip

# %% [markdown] tags=["hint"]
# Bring the heads into the order K0, V0, K1, V1, ...; pad at the end what is missing to whole rows
# and whole lanes; cut into rows.

# %% [markdown] tags=["hint"]
# `jnp.stack([keys, values], axis=2)` makes K and V of a head neighbours, and a `reshape` merges
# them with the heads. `jnp.pad(x, ((0, 0), (0, a), (0, b)))` pads at the end of the second and
# third dimension. `-n % packing` is what is missing from `n` to a multiple of `packing`.

# %% [markdown] tags=["hint"]
# ```python
# num_tokens, num_kv_heads, head_dim = keys.shape
# combined = jnp.stack([keys, values], axis=...).reshape(num_tokens, 2 * num_kv_heads, head_dim)
# missing_heads, missing_lanes = ...
# combined = jnp.pad(combined, ...)
# return combined.reshape(num_tokens, -1, ...)
# ```


# %% tags=["exercise"]
def pack(keys, values, packing, lanes):
    """Lay tokens out for the cache: [num_tokens, ceil(2 * num_kv_heads / packing), packing, lanes].

    keys, values: [num_tokens, num_kv_heads, head_dim], of one dtype.
    packing: how many values share 32 bits.
    lanes: given, at least head_dim; a multiple of 128 on a TPU, 4 in the small cases.
    """
    ### BEGIN SOLUTION
    num_tokens, num_kv_heads, head_dim = keys.shape
    combined = jnp.stack([keys, values], axis=2).reshape(num_tokens, 2 * num_kv_heads, head_dim)
    missing_heads, missing_lanes = -2 * num_kv_heads % packing, lanes - head_dim
    combined = jnp.pad(combined, ((0, 0), (0, missing_heads), (0, missing_lanes)))
    return combined.reshape(num_tokens, -1, packing, lanes)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("2.3", pack)

# %% [markdown] tags=["explanation"]
# `stack` on axis 2 gives `[num_tokens, num_kv_heads, 2, head_dim]`, and the reshape reads it row
# by row: K0, V0, K1, V1. All the padding goes after the last head and the last lane, so the
# combined head `2h` is K of head `h` whatever the packing. The token is the first dimension and is
# not cut into tiles, so a run of tokens is one block of memory. And in bfloat16 one 32-bit word
# holds a lane of K and the same lane of V, which a kernel splits with a shift.


# %% tags=["wrong"] refused="all keys come first and then all values"
def pack(keys, values, packing, lanes):
    combined = jnp.concatenate([keys, values], axis=1)
    missing = -combined.shape[1] % packing
    combined = jnp.pad(combined, ((0, 0), (0, missing), (0, lanes - keys.shape[2])))
    return combined.reshape(keys.shape[0], -1, packing, lanes)


# %% tags=["wrong"] refused="K and V alternate from lane to lane"
def pack(keys, values, packing, lanes):
    num_tokens, num_kv_heads, head_dim = keys.shape
    combined = jnp.stack([keys, values], axis=3).reshape(num_tokens, 2 * num_kv_heads, head_dim)
    missing = -2 * num_kv_heads % packing
    combined = jnp.pad(combined, ((0, 0), (0, missing), (0, lanes - head_dim)))
    return combined.reshape(num_tokens, -1, packing, lanes)


# %% tags=["wrong"] refused="Your function raises TypeError"
def pack(keys, values, packing, lanes):
    num_tokens, num_kv_heads, head_dim = keys.shape
    combined = jnp.stack([keys, values], axis=2)
    combined = jnp.pad(combined, ((0, 0), (0, 0), (0, 0), (0, lanes - head_dim)))
    return combined.reshape(num_tokens, 2 * num_kv_heads // packing, packing, lanes)


# %% [markdown]
# ## Exercise 2.4: Append, and copy on write
#
# Two sequences share the pages of a common prefix until one of them writes. Write
# `append_token(book, name)`: make room for one more token of the sequence `name`, and return the
# page copies, a list of `(source, target)`, that must be carried out before the token is stored.
# The book is a `PageBook`, a small `PagePool` (`rpa/check/chapters/toy_page_pool.py`, one screen):
#
# | | |
# |---|---|
# | `book.page_size` | tokens of a page |
# | `book.pages[name]` | the pages of the sequence: a list, yours to change |
# | `book.kv_len[name]` | its tokens so far: add one |
# | `book.references[page]` | how many sequences list the page |
# | `book.take()` | takes a free page, with one reference, and returns its number |
#
# The check plays little scripts in which sequences write letters, and reads back what each of them
# sees. In `"a: a kitt; a > b; b: y; a: en"`, `a` writes six letters, `b` is forked from it, and
# then each goes on by itself: `a` should read "a kitten" and `b` "a kitty".
#
# **Teaches:** reference counts, and the one moment at which a shared page must be copied.

# %%
pictures.strips(
    [
        ("a and b", "a . k i | t t - -"),
        ("b, on a copy", "_ _ _ _ t t *y -"),
        ("a, on the old page", "_ _ _ _ t t *e -"),
    ],
    "Sequences a and b share two pages of four letters, the second with room for two. The first to "
    "write, b, takes a copy of that page and writes there; a stays where it was and writes too.",
    arrows=[((0, 4), (1, 4)), ((0, 5), (1, 5))],
    legend={"": "shared, or copied", "*": "written", "-": "room"},
)

# %% [markdown] tags=["hint"]
# There are three situations. The last page is full (or there is none): take a page. It has room
# and is yours alone: nothing to do. It has room and another sequence lists it too: take a page in
# its place.

# %% [markdown] tags=["hint"]
# `book.kv_len[name] % book.page_size == 0` says that there is no room. `book.references[page] > 1`
# says that another sequence lists the page. If you leave a page, it has one reference less.

# %% [markdown] tags=["hint"]
# ```python
# pages, copies = book.pages[name], []
# if <no room>:
#     pages.append(book.take())
# elif <another sequence lists pages[-1]>:
#     shared, pages[-1] = pages[-1], book.take()
#     <shared has one reference less>
#     copies.append(...)
# book.kv_len[name] += 1
# return copies
# ```


# %% tags=["exercise"]
def append_token(book, name):
    """Make room for one token; returns the (source, target) page copies to carry out first."""
    ### BEGIN SOLUTION
    pages, copies = book.pages[name], []
    if book.kv_len[name] % book.page_size == 0:
        pages.append(book.take())
    elif book.references[pages[-1]] > 1:
        shared, pages[-1] = pages[-1], book.take()
        book.references[shared] -= 1
        copies.append((shared, pages[-1]))
    book.kv_len[name] += 1
    return copies
    ### END SOLUTION


# %% tags=["check"]
rpa.check("2.4", append_token)

# %% [markdown] tags=["explanation"]
# Only the last page is ever written, so only it has to be looked at, and only if it has room: a
# full shared page stays shared for good. The sequence that writes moves out; the one
# that stays behind alone owns the page again (its count fell to 1) and writes without a copy. Were
# the count not lowered, the page would be copied once more later, and never be freed.


# %% tags=["wrong"] refused="nothing is copied, so both sequences write into the page"
def append_token(book, name):
    if book.kv_len[name] % book.page_size == 0:
        book.pages[name].append(book.take())
    book.kv_len[name] += 1
    return []


# %% tags=["wrong"] refused="a shared page is copied although it is full"
def append_token(book, name):
    pages, copies = book.pages[name], []
    if pages and book.references[pages[-1]] > 1:
        shared = pages.pop()
        book.references[shared] -= 1
        pages.append(book.take())
        copies.append((shared, pages[-1]))
    if book.kv_len[name] == len(pages) * book.page_size:
        pages.append(book.take())
    book.kv_len[name] += 1
    return copies


# %% tags=["wrong"] refused="`book.kv_len['a']` is 9, but `book.pages['a']` lists 2 pages of 4"
def append_token(book, name):
    pages, copies = book.pages[name], []
    if pages and book.references[pages[-1]] > 1:
        shared, pages[-1] = pages[-1], book.take()
        book.references[shared] -= 1
        copies.append((shared, pages[-1]))
    elif book.kv_len[name] % book.page_size == 0:
        pages.append(book.take())
    book.kv_len[name] += 1
    return copies


# %% tags=["wrong"] refused="`book.kv_len['a']` is 1, but `book.pages['a']` lists 0 pages of 4"
def append_token(book, name):
    if book.kv_len[name] % book.page_size == 0:
        book.take()
    book.kv_len[name] += 1
    return []


# %% tags=["wrong"] refused="the old page still counts the sequence that has left it"
def append_token(book, name):
    pages, copies = book.pages[name], []
    if book.kv_len[name] % book.page_size == 0:
        pages.append(book.take())
    elif book.references[pages[-1]] > 1:
        copies.append((pages[-1], book.take()))
        pages[-1] = copies[0][1]
    book.kv_len[name] += 1
    return copies


# %% tags=["wrong"] refused="`book.kv_len['a']` was 0 and is 0 after the call"
def append_token(book, name):
    pages = book.pages[name]
    if book.kv_len[name] == len(pages) * book.page_size:
        pages.append(book.take())
    return []


# %% [markdown]
# ## Exercise 2.5: Attention through the page table
#
# One decode step of one sequence: write `paged_attention(q, kv_cache, pages, kv_len,
# num_kv_heads)` for the query of its newest token, `q` of shape `[num_q_heads, head_dim]`. The
# token itself is in the cache already, so it sees all `kv_len` tokens.
#
# As in a server, the check compiles your function (`jax.jit`) and `kv_len` is known only when it
# runs: a shape cannot depend on it, so `keys[:kv_len]` raises. Gather all entries of `pages` and
# mask. What lies after the last token, in its page or in the pages of meaningless table entries,
# may be an old token of another sequence, or NaN.
#
# **Teaches:** what a mask has to cover when memory may hold NaN.

# %% [markdown] tags=["hint"]
# Gather K and V of every slot that the table names. Which slots hold tokens of this sequence? The
# others get a score of minus infinity, and their values are replaced by zero. Query head `h` uses
# KV head `h // (num_q_heads // num_kv_heads)`.

# %% [markdown] tags=["hint"]
# `unpack_kv(kv_cache[pages], num_kv_heads, head_dim)` gives keys and values `[pages_per_seq,
# page_size, num_kv_heads, head_dim]`. `jnp.repeat(x, group, axis=1)` gives every query head its KV
# head. `jnp.where(mask, x, y)` chooses, and never computes with what it did not choose;
# `jax.nn.softmax` does the rest.

# %% [markdown] tags=["hint"]
# ```python
# keys, values = unpack_kv(kv_cache[pages], num_kv_heads, head_dim)
# keys, values = (
#     jnp.repeat(x.reshape(-1, num_kv_heads, head_dim), num_q_heads // num_kv_heads, axis=1)
#     for x in (keys, values)
# )
# seen = jnp.arange(len(keys)) < ...
# scores = jnp.einsum("hd,khd->hk", q, keys) * ...
# weights = jax.nn.softmax(jnp.where(seen, scores, ...))
# return jnp.einsum("hk,khd->hd", weights, jnp.where(seen[:, None, None], ...))
# ```


# %% tags=["exercise"]
def paged_attention(q, kv_cache, pages, kv_len, num_kv_heads):
    """Attention of one new token to all of its sequence: f32[num_q_heads, head_dim].

    q: f32[num_q_heads, head_dim]; scores are scaled by head_dim ** -0.5.
    kv_cache: [num_pages, page_size, rows, packing, lanes], float32 or bfloat16.
    pages: i32[pages_per_seq]; kv_len: i32[], not known when the function is compiled.
    """
    ### BEGIN SOLUTION
    num_q_heads, head_dim = q.shape
    keys, values = unpack_kv(kv_cache[pages], num_kv_heads, head_dim)
    keys, values = (
        jnp.repeat(x.reshape(-1, num_kv_heads, head_dim), num_q_heads // num_kv_heads, axis=1)
        for x in (keys, values)
    )  # [slots, num_q_heads, head_dim]
    seen = jnp.arange(len(keys)) < kv_len
    scores = jnp.einsum("hd,khd->hk", q, keys) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("hk,khd->hd", weights, jnp.where(seen[:, None, None], values, 0))
    ### END SOLUTION


# %% tags=["check"]
rpa.check("2.5", paged_attention)

# %% [markdown] tags=["explanation"]
# `jnp.where(seen, scores, -inf)` throws the score of a dead slot away before `exp` sees it, NaN or
# not, so its weight is exactly 0. But 0 * NaN is NaN, and the second product adds up over all
# slots: hence the values are replaced too. A mask that *multiplies*, or one that *adds* minus
# infinity to the scores, would keep the NaN. This solution reads every page that the table names,
# live or not, for shapes have to be known when it is compiled; rung 2
# (`rpa.paging.paged_attention`) loops over the live pages, and a
# kernel with its own DMAs (chapter 5) moves only live tokens.


# %% tags=["wrong"] refused="the scores are masked and the values are not"
def paged_attention(q, kv_cache, pages, kv_len, num_kv_heads):
    num_q_heads, head_dim = q.shape
    keys, values = unpack_kv(kv_cache[pages], num_kv_heads, head_dim)
    keys, values = (
        jnp.repeat(x.reshape(-1, num_kv_heads, head_dim), num_q_heads // num_kv_heads, axis=1)
        for x in (keys, values)
    )
    seen = jnp.arange(len(keys)) < kv_len
    scores = jnp.einsum("hd,khd->hk", q, keys) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("hk,khd->hd", weights, values)


# %% tags=["wrong"] refused="-infinity is added to a score that is NaN"
def paged_attention(q, kv_cache, pages, kv_len, num_kv_heads):
    num_q_heads, head_dim = q.shape
    keys, values = unpack_kv(kv_cache[pages], num_kv_heads, head_dim)
    keys, values = (
        jnp.repeat(x.reshape(-1, num_kv_heads, head_dim), num_q_heads // num_kv_heads, axis=1)
        for x in (keys, values)
    )
    seen = jnp.arange(len(keys)) < kv_len
    scores = jnp.einsum("hd,khd->hk", q, keys) * head_dim**-0.5
    weights = jax.nn.softmax(scores + jnp.where(seen, 0, -jnp.inf))
    return jnp.einsum("hk,khd->hd", weights, jnp.where(seen[:, None, None], values, 0))


# %% tags=["wrong"] refused="a masked score is set to 0, whose exp is 1"
def paged_attention(q, kv_cache, pages, kv_len, num_kv_heads):
    num_q_heads, head_dim = q.shape
    keys, values = unpack_kv(kv_cache[pages], num_kv_heads, head_dim)
    seen = (jnp.arange(keys.shape[0] * keys.shape[1]) < kv_len)[:, None, None]
    keys, values = (
        jnp.repeat(
            jnp.where(seen, x.reshape(-1, num_kv_heads, head_dim), 0),
            num_q_heads // num_kv_heads,
            axis=1,
        )
        for x in (keys, values)
    )
    weights = jax.nn.softmax(jnp.einsum("hd,khd->hk", q, keys) * head_dim**-0.5)
    return jnp.einsum("hk,khd->hd", weights, values)


# %% tags=["wrong"] refused="q head h reads KV head h % num_kv_heads"
def paged_attention(q, kv_cache, pages, kv_len, num_kv_heads):
    num_q_heads, head_dim = q.shape
    keys, values = unpack_kv(kv_cache[pages], num_kv_heads, head_dim)
    keys, values = (
        jnp.tile(x.reshape(-1, num_kv_heads, head_dim), (1, num_q_heads // num_kv_heads, 1))
        for x in (keys, values)
    )
    seen = jnp.arange(len(keys)) < kv_len
    scores = jnp.einsum("hd,khd->hk", q, keys) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("hk,khd->hd", weights, jnp.where(seen[:, None, None], values, 0))


# %% tags=["wrong"] refused="Your function raises IndexError"
def paged_attention(q, kv_cache, pages, kv_len, num_kv_heads):
    head_dim = q.shape[1]
    keys, values = unpack_kv(kv_cache[pages], num_kv_heads, head_dim)
    keys, values = (x.reshape(-1, num_kv_heads, head_dim)[:kv_len] for x in (keys, values))
    scores = jnp.einsum("hgd,khd->hgk", q.reshape(num_kv_heads, -1, head_dim), keys)
    weights = jax.nn.softmax(scores * head_dim**-0.5)
    return jnp.einsum("hgk,khd->hgd", weights, values).reshape(q.shape)


# %% [markdown]
# ## Exercise 2.6: Which pages are there already?
#
# In the lesson the pool was told which sequence to fork. A server finds out by itself: when a
# request arrives, it looks whether an older sequence began with the same tokens, and reuses those
# pages. Write `reusable_pages(tokens, cached, page_size)`: the longest list of pages that the new
# sequence can begin with. `cached` is a list of `(tokens, pages)`, one for each older sequence.
# For your eyes a token is a letter here.
#
# Two rules. Only pages of which *all* tokens agree are reused, so that no shared page is ever
# written. And at least one token must be left to compute: the model's answer is the output of the
# last token, and an output needs a query.
#
# By hand, pages of 4: "be kind: hi" and the older "be kind: yo" in pages 7, 2, 5 have 9 letters in
# common, and that is two full pages: `[7, 2]`.
#
# **Teaches:** prefix caching, and why a page is not known by its own tokens alone.

# %%
pictures.strips(
    [("older", "b e . k | i n d : | . y o"), ("in page", "7 7 7 7 | 2 2 2 2 | 5 5 5"),
     ("new", "*b *e *. *k | *i *n *d *: | . +h +i")],
    "The new prompt agrees with the older one in nine letters: two full pages, 7 and 2, are "
    "reused; the ninth letter is on a page that differs.",
    legend={"*": "reused: whole pages that agree", "+": "differs"},
)  # fmt: skip

# %% [markdown] tags=["hint"]
# For each older sequence: how many tokens agree from the beginning on? How many full pages is
# that? Keep the longest list.

# %% [markdown] tags=["hint"]
# A `while` loop can count the tokens that agree; let it stop one before the end of `tokens`. The
# full pages among `same` tokens are `same // page_size`, and `pages[:n]` are the first `n`.

# %% [markdown] tags=["hint"]
# ```python
# best = []
# for old_tokens, old_pages in cached:
#     same, most = 0, min(..., len(old_tokens))
#     while same < most and tokens[same] == old_tokens[same]:
#         same += 1
#     if same // page_size > len(best):
#         best = ...
# return best
# ```


# %% tags=["exercise"]
def reusable_pages(tokens, cached, page_size):
    """Pages that hold a beginning of `tokens` already: a list, the longest there is.

    tokens: the prompt that has arrived, at least one token.
    cached: list of (tokens, pages), an older sequence and the pages that hold it.
    """
    ### BEGIN SOLUTION
    best = []
    for old_tokens, old_pages in cached:
        same, most = 0, min(len(tokens) - 1, len(old_tokens))
        while same < most and tokens[same] == old_tokens[same]:
            same += 1
        if same // page_size > len(best):
            best = old_pages[: same // page_size]
    return best
    ### END SOLUTION


# %% tags=["check"]
rpa.check("2.6", reusable_pages)

# %% [markdown] tags=["explanation"]
# In the first layer K of a token depends on that token and its position. From the second layer on
# it depends on what attention gathered, so on every token before. A page may be reused only if
# *all* tokens from the beginning to its end agree. Servers do not compare with every older
# sequence: each full page gets a hash of its tokens *and of the hash of the page before it*, so
# one look into a dictionary per page does what this loop does.


# %% tags=["wrong"] refused="a page is recognised by its own tokens only"
def reusable_pages(tokens, cached, page_size):
    known = {}
    for old_tokens, old_pages in cached:
        for i in range(len(old_tokens) // page_size):
            known.setdefault(old_tokens[i * page_size : (i + 1) * page_size], old_pages[i])
    found = []
    for i in range((len(tokens) - 1) // page_size):
        page = known.get(tokens[i * page_size : (i + 1) * page_size])
        if page is None:
            break
        found.append(page)
    return found


# %% tags=["wrong"] refused="nothing is left to compute"
def reusable_pages(tokens, cached, page_size):
    best = []
    for old_tokens, old_pages in cached:
        full = 0
        while (full + 1) * page_size <= min(len(tokens), len(old_tokens)) and tokens[
            : (full + 1) * page_size
        ] == old_tokens[: (full + 1) * page_size]:
            full += 1
        best = max(best, old_pages[:full], key=len)
    return best


# %% tags=["wrong"] refused="a page that agrees only in part is reused"
def reusable_pages(tokens, cached, page_size):
    best = []
    for old_tokens, old_pages in cached:
        same = 0
        while same < min(len(tokens) - 1, len(old_tokens)) and tokens[same] == old_tokens[same]:
            same += 1
        best = max(best, old_pages[: cdiv(same, page_size)], key=len)
    return best
