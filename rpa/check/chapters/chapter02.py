"""Checks of chapter 2: pages, their table, the layout of the cache, attention through pages."""

import jax
import jax.numpy as jnp
import numpy as np

from rpa.check.chapters.toy_page_pool import PageBook
from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise

RNG = np.random.default_rng(2)


def normal(*shape):
    """f32[shape] of standard normal numbers, the same at every run."""
    return RNG.standard_normal(shape).astype(np.float32)


def int32(*numbers):
    """i32[...] of the numbers, which is what a page table is made of."""
    return np.array(numbers, np.int32)


# 2.1 address -------------------------------------------------------------------------------------


def _look_up(page_indices, entries):
    """Entries of the table; past its end the last one, as JAX has it."""
    page_indices = np.asarray(page_indices)
    return page_indices[np.clip(entries, 0, len(page_indices) - 1)]


def _address(page_indices, pages_per_seq, seqs, positions, page_size):
    seqs, positions = np.asarray(seqs), np.asarray(positions)
    page = _look_up(page_indices, seqs * pages_per_seq + positions // page_size)
    return page, positions % page_size


address = Exercise("2.1", _address, axes=("token",), outputs=("pages", "slots"))
address.case(
    "one sequence in pages 7, 2, 5",
    page_indices=int32(7, 2, 5),
    pages_per_seq=3,
    seqs=int32(0, 0, 0, 0),
    positions=int32(0, 3, 4, 9),
    page_size=4,
)
address.case(
    "three sequences, two pages each",
    page_indices=int32(3, 0, 6, 1, 5, 4),
    pages_per_seq=2,
    seqs=int32(0, 1, 1, 2, 2),
    positions=int32(6, 2, 5, 0, 7),
    page_size=4,
)
address.case(
    "around the end of a page of 16",
    page_indices=int32(9, 8, 2, 0, 1, 7, 3, 5),
    pages_per_seq=4,
    seqs=int32(0, 0, 0, 1, 1, 1, 1),
    positions=int32(15, 16, 17, 31, 32, 33, 63),
    page_size=16,
)


@address.mistake(
    "the table is never asked: position // page_size says which page of the sequence it is, not "
    "where that page lies in the cache"
)
def _without_table(page_indices, pages_per_seq, seqs, positions, page_size):
    positions = np.asarray(positions)
    return positions // page_size, positions % page_size


@address.mistake("the sequence is left out: every token is looked up in the pages of sequence 0")
def _without_row(page_indices, pages_per_seq, seqs, positions, page_size):
    return _address(page_indices, 0, seqs, positions, page_size)


@address.mistake(
    "the row of sequence s is thought to start at entry s, and not at s * pages_per_seq"
)
def _row_not_scaled(page_indices, pages_per_seq, seqs, positions, page_size):
    return _address(page_indices, 1, seqs, positions, page_size)


@address.mistake("// and % are swapped")
def _swapped(page_indices, pages_per_seq, seqs, positions, page_size):
    seqs, positions = np.asarray(seqs), np.asarray(positions)
    page = _look_up(page_indices, seqs * pages_per_seq + positions % page_size)
    return page, positions // page_size


@address.mistake("the slot is counted from the sequence's first token, and not from its page's")
def _slot_in_sequence(page_indices, pages_per_seq, seqs, positions, page_size):
    page, _ = _address(page_indices, pages_per_seq, seqs, positions, page_size)
    return page, np.asarray(positions)


@address.mistake("positions are thought to begin at 1; the first token has position 0")
def _from_one(page_indices, pages_per_seq, seqs, positions, page_size):
    return _address(page_indices, pages_per_seq, seqs, np.asarray(positions) - 1, page_size)


@address.mistake("the page is rounded up: that counts pages, it does not find one")
def _rounded_up(page_indices, pages_per_seq, seqs, positions, page_size):
    seqs, positions = np.asarray(seqs), np.asarray(positions)
    page = _look_up(page_indices, seqs * pages_per_seq + -(-positions // page_size))
    return page, positions % page_size


# 2.2 gather_keys ---------------------------------------------------------------------------------


def _tokens(kv_cache, pages, kv_len):
    """The live tokens of a sequence, [kv_len, combined heads, lanes]."""
    kv_cache = np.asarray(kv_cache)
    live = np.asarray(pages)[: -(-kv_len // kv_cache.shape[1])]
    return kv_cache[live].reshape(-1, np.prod(kv_cache.shape[2:4]), kv_cache.shape[4])[:kv_len]


def _gather_keys(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    return _tokens(kv_cache, pages, kv_len)[:, 0 : 2 * num_kv_heads : 2, :head_dim]


def readable_cache(num_pages, page_size, rows, packing, lanes):
    """A cache whose numbers say where they lie: 100 page + 10 slot + combined head + lane / 10."""
    shape = (num_pages, page_size, rows, packing, lanes)
    page, slot, row, sub, lane = np.indices(shape)
    return (100 * page + 10 * slot + row * packing + sub + lane / 10).astype(np.float32)


def poisoned(kv_cache, pages, kv_len):
    """The cache with NaN wherever the sequence has no token."""
    page_size = kv_cache.shape[1]
    live = np.zeros(kv_cache.shape[:2], bool)
    positions = np.arange(kv_len)
    live[pages[positions // page_size], positions % page_size] = True
    return np.where(live[..., None, None, None], kv_cache, np.array(np.nan, kv_cache.dtype))


def cast(array, dtype):
    """The array rounded to a dtype of JAX that NumPy prints but does not compute in."""
    return array.astype(jnp.dtype(dtype))


gather_keys = Exercise("2.2", _gather_keys, axes=("token", "KV head", "lane"), tolerance=1e-6)
gather_keys.case(
    "three tokens in pages 2 and 0, one KV head",
    kv_cache=readable_cache(3, 2, 2, 1, 4),
    pages=int32(2, 0),
    kv_len=3,
    num_kv_heads=1,
    head_dim=3,
)
gather_keys.case(
    "two KV heads, every page full",
    kv_cache=readable_cache(4, 2, 4, 1, 4),
    pages=int32(1, 3, 0),
    kv_len=6,
    num_kv_heads=2,
    head_dim=2,
)
gather_keys.case(
    "NaN in all that is not the sequence's, and padding in the table",
    kv_cache=poisoned(readable_cache(4, 4, 4, 1, 4), int32(3, 1), 5),
    pages=int32(3, 1, 999, 0),
    kv_len=5,
    num_kv_heads=2,
    head_dim=4,
)
gather_keys.case(
    "bfloat16: two values in 32 bits",
    kv_cache=cast(normal(5, 4, 3, 2, 128), "bfloat16"),
    pages=int32(4, 0, 2),
    kv_len=9,
    num_kv_heads=3,
    head_dim=64,
)
gather_keys.case(
    "float8: four values in 32 bits, and a padding head",
    kv_cache=cast(normal(5, 4, 2, 4, 128), "float8_e4m3fn"),
    pages=int32(4, 0, 2),
    kv_len=12,
    num_kv_heads=3,
    head_dim=80,
)


@gather_keys.mistake("the odd combined heads are taken: those are the values")
def _values(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    return _tokens(kv_cache, pages, kv_len)[:, 1 : 2 * num_kv_heads : 2, :head_dim]


@gather_keys.mistake("all keys are thought to come first; here K and V of a head are neighbours")
def _keys_first(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    return _tokens(kv_cache, pages, kv_len)[:, :num_kv_heads, :head_dim]


@gather_keys.mistake(
    "the packing axis is taken for K and V, which is so in bfloat16 only (packing 2)"
)
def _packing_is_kv(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    kv_cache = np.asarray(kv_cache)
    rows, packing, lanes = kv_cache.shape[2:]
    tokens = _tokens(kv_cache, pages, kv_len).reshape(kv_len, rows, packing, lanes)
    return tokens[:, :num_kv_heads, 0, :head_dim]


@gather_keys.mistake("rows are taken for combined heads, which is so in float32 only (packing 1)")
def _row_is_head(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    kv_cache = np.asarray(kv_cache)
    rows, packing, lanes = kv_cache.shape[2:]
    tokens = _tokens(kv_cache, pages, kv_len).reshape(kv_len, rows, packing, lanes)
    return tokens[:, 0 : 2 * num_kv_heads : 2, 0, :head_dim]


@gather_keys.mistake("the table is not used: pages 0, 1, 2, ... are read")
def _first_pages(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    return _gather_keys(kv_cache, np.arange(len(pages)), kv_len, num_kv_heads, head_dim)


@gather_keys.mistake("the empty slots of the last page are kept")
def _tail_kept(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    page_size = kv_cache.shape[1]
    return _gather_keys(
        kv_cache, pages, -(-kv_len // page_size) * page_size, num_kv_heads, head_dim
    )


@gather_keys.mistake("the first tokens are cut off; the empty slots are after the last token")
def _front_cut(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    return _tail_kept(kv_cache, pages, kv_len, num_kv_heads, head_dim)[-kv_len:]


@gather_keys.mistake("slots run before pages: slot 0 of every page, then slot 1 of every page, ...")
def _slots_first(kv_cache, pages, kv_len, num_kv_heads, head_dim):
    kv_cache = np.asarray(kv_cache)
    live = np.asarray(pages)[: -(-kv_len // kv_cache.shape[1])]
    tokens = kv_cache[live].swapaxes(0, 1).reshape(-1, *kv_cache.shape[2:])[:kv_len]
    combined = tokens.reshape(kv_len, -1, kv_cache.shape[-1])
    return combined[:, 0 : 2 * num_kv_heads : 2, :head_dim]


# 2.3 pack ----------------------------------------------------------------------------------------


def _rows_of(combined, packing, lanes):
    """Pad [num_tokens, combined heads, head_dim] at its ends and cut it into rows of words."""
    num_tokens, heads, head_dim = combined.shape
    combined = np.pad(combined, ((0, 0), (0, -heads % packing), (0, lanes - head_dim)))
    return combined.reshape(num_tokens, -1, packing, lanes)


def _paired(keys, values):
    """K and V of a head next to each other, [num_tokens, 2 * num_kv_heads, head_dim]."""
    keys, values = np.asarray(keys), np.asarray(values)
    num_tokens, num_kv_heads, head_dim = keys.shape
    return np.stack([keys, values], axis=2).reshape(num_tokens, 2 * num_kv_heads, head_dim)


def _pack(keys, values, packing, lanes):
    return _rows_of(_paired(keys, values), packing, lanes)


pack = Exercise("2.3", _pack, axes=("token", "row", "packed", "lane"), tolerance=0.0)
pack.case(
    "one token, two KV heads, head_dim 2",
    keys=np.float32([[[1, 2], [3, 4]]]),
    values=np.float32([[[10, 20], [30, 40]]]),
    packing=2,
    lanes=4,
)
pack.case(
    "no packing (float32)",
    keys=normal(2, 2, 3),
    values=normal(2, 2, 3),
    packing=1,
    lanes=4,
)
pack.case(
    "one KV head and room for four values (MQA in float8)",
    keys=np.float32([[[1, 2]], [[3, 4]]]),
    values=np.float32([[[10, 20]], [[30, 40]]]),
    packing=4,
    lanes=4,
)
pack.case(
    "three KV heads of 64 in bfloat16",
    keys=cast(normal(5, 3, 64), "bfloat16"),
    values=cast(normal(5, 3, 64), "bfloat16"),
    packing=2,
    lanes=128,
)
pack.case(
    "three KV heads of 80 in float8",
    keys=cast(normal(5, 3, 80), "float8_e4m3fn"),
    values=cast(normal(5, 3, 80), "float8_e4m3fn"),
    packing=4,
    lanes=128,
)


@pack.mistake("all keys come first and then all values; K and V of one head must be neighbours")
def _concatenated(keys, values, packing, lanes):
    return _rows_of(np.concatenate([keys, values], axis=1), packing, lanes)


@pack.mistake("V comes before K")
def _values_before_keys(keys, values, packing, lanes):
    return _pack(values, keys, packing, lanes)


@pack.mistake("K and V alternate from lane to lane; they must alternate from head to head")
def _lane_by_lane(keys, values, packing, lanes):
    mixed = np.stack([keys, values], axis=-1).reshape(_paired(keys, values).shape)
    return _rows_of(mixed, packing, lanes)


@pack.mistake("the padding stands in front; the true lanes and heads come first")
def _padded_in_front(keys, values, packing, lanes):
    combined = _paired(keys, values)
    num_tokens, heads, head_dim = combined.shape
    combined = np.pad(combined, ((0, 0), (-heads % packing, 0), (lanes - head_dim, 0)))
    return combined.reshape(num_tokens, -1, packing, lanes)


@pack.mistake("heads that share a word are far apart; combined heads 0, 1, ... must be neighbours")
def _far_apart(keys, values, packing, lanes):
    rows = _pack(keys, values, packing, lanes)
    num_tokens, num_rows, packing, lanes = rows.shape
    return rows.reshape(num_tokens, packing, num_rows, lanes).swapaxes(1, 2)


@pack.mistake("every KV head gets a row of its own, so with packing 4 half of the cache is padding")
def _row_for_each_head(keys, values, packing, lanes):
    keys, values = np.asarray(keys), np.asarray(values)
    if packing == 1:
        return _pack(keys, values, packing, lanes)
    rows = [_pack(keys[:, [h]], values[:, [h]], packing, lanes) for h in range(keys.shape[1])]
    return np.concatenate(rows, axis=1)


# 2.4 append_token --------------------------------------------------------------------------------


def play(append_token, num_pages, page_size, script):
    """Let sequences write letters into pages as a script says, and read everything back.

    A script is a list of steps between semicolons: "a: cat" opens `a` if there is no such sequence
    and writes three tokens, "a > b" forks `b` from `a`, "a ." closes `a`.

    Returns:
        What each open sequence reads through its pages, how many pages are not free, and how many
        page copies were made.
    """
    book = PageBook(num_pages, page_size)
    memory = [["_"] * page_size for _ in range(num_pages)]
    num_copies = 0
    for step in script.split("; "):
        if " > " in step:
            book.fork(*step.split(" > "))
        elif step.endswith(" ."):
            book.close(step[:-2])
        else:
            name, text = step.split(": ")
            num_copies += _write(append_token, book, memory, name, text)
    texts = {name: _read(book, memory, name) for name in book.pages}
    return texts | {"pages in use": num_pages - len(book.free), "page copies": num_copies}


def _write(append_token, book, memory, name, text):
    """Write a text letter by letter; the number of page copies that it took."""
    if name not in book.pages:
        book.open(name)
    num_copies = 0
    for letter in text:
        before = book.kv_len[name]
        copies = append_token(book, name)
        _refuse_impossible(book, name, before, copies)
        for source, target in copies:
            memory[target] = list(memory[source])
        num_copies += len(copies)
        memory[book.pages[name][before // book.page_size]][before % book.page_size] = letter
    return num_copies


def _refuse_impossible(book, name, before, copies):
    """Say what is wrong with a book or with copies that a token cannot be stored after."""
    pairs = isinstance(copies, list) and all(
        isinstance(copy, tuple | list) and len(copy) == 2 for copy in copies
    )
    if not pairs:
        raise WrongResult(
            f"append_token returns {copies!r}, expected a list of (source, target) page copies"
        )
    if book.kv_len[name] != before + 1:
        raise WrongResult(
            f"`book.kv_len[{name!r}]` was {before} and is {book.kv_len[name]} after the call: it "
            "must grow by one"
        )
    listed = len(book.pages[name])
    if listed * book.page_size <= before:
        raise WrongResult(
            f"`book.kv_len[{name!r}]` is {before + 1}, but `book.pages[{name!r}]` lists {listed} "
            f"pages of {book.page_size} tokens: there is no slot for the new token"
        )


def _read(book, memory, name):
    letters = (letter for page in book.pages[name] for letter in memory[page])
    return "".join(letters)[: book.kv_len[name]]


def _append_token(book, name):
    pages, copies = book.pages[name], []
    if book.kv_len[name] % book.page_size == 0:
        pages.append(book.take())
    elif book.references[pages[-1]] > 1:
        shared, pages[-1] = pages[-1], book.take()
        book.references[shared] -= 1
        copies = [(shared, pages[-1])]
    book.kv_len[name] += 1
    return copies


append_token = Exercise("2.4", _append_token, drive=play)
append_token.case(
    "one sequence, two pages",
    num_pages=8,
    page_size=4,
    script="a: kitten",
)
append_token.case(
    "two sequences, and a full page each",
    num_pages=8,
    page_size=4,
    script="a: kite; b: cats; a: s",
)
append_token.case(
    "both write after a shared prefix",
    num_pages=8,
    page_size=4,
    script="a: a kitt; a > b; b: y; a: en",
)
append_token.case(
    "the shared prefix ends with its page",
    num_pages=8,
    page_size=4,
    script="a: a cat is; a > b; a: nt; b: it",
)
append_token.case(
    "the prefix fills its pages exactly",
    num_pages=8,
    page_size=4,
    script="a: kind cat; a > b; b: s; a: ty",
)
append_token.case(
    "three share, and all close but one",
    num_pages=12,
    page_size=4,
    script="a: a dog; a > b; a > c; c: s; b: gy; c .; a .; d: new; e: old",
)
append_token.case(
    "pages come back when everybody is gone",
    num_pages=6,
    page_size=2,
    script="a: abc; a > b; b: d; a .; b .",
)


@append_token.mistake("nothing is copied, so both sequences write into the page that they share")
def _never_copies(book, name):
    if book.kv_len[name] % book.page_size == 0:
        book.pages[name].append(book.take())
    book.kv_len[name] += 1
    return []


@append_token.mistake(
    "a shared page is copied although it is full: the new token does not go in there"
)
def _copies_full_page(book, name):
    pages, copies = book.pages[name], []
    if pages and book.references[pages[-1]] > 1:
        shared, pages[-1] = pages[-1], book.take()
        book.references[shared] -= 1
        copies = [(shared, pages[-1])]
    if book.kv_len[name] % book.page_size == 0:
        pages.append(book.take())
    book.kv_len[name] += 1
    return copies


@append_token.mistake(
    "a shared page is copied although it is full, and the new token gets no page: ask whether the "
    "page is full before you ask who else lists it"
)
def _asks_for_sharers_first(book, name):
    pages, copies = book.pages[name], []
    if pages and book.references[pages[-1]] > 1:
        shared, pages[-1] = pages[-1], book.take()
        book.references[shared] -= 1
        copies = [(shared, pages[-1])]
    elif book.kv_len[name] % book.page_size == 0:
        pages.append(book.take())
    book.kv_len[name] += 1
    return copies


@append_token.mistake("the page that book.take() returns is not put into book.pages[name]")
def _takes_and_forgets(book, name):
    if book.kv_len[name] % book.page_size == 0:
        book.take()
    book.kv_len[name] += 1
    return []


@append_token.mistake(
    "the old page still counts the sequence that has left it (references), so it is never freed"
)
def _keeps_counting(book, name):
    copies = _append_token(book, name)
    for source, _ in copies:
        book.references[source] += 1
    return copies


@append_token.mistake("source and target of the copy are swapped")
def _copies_backwards(book, name):
    return [(target, source) for source, target in _append_token(book, name)]


@append_token.mistake("the last page is copied at every token, though no other sequence lists it")
def _copies_own_page(book, name):
    pages, copies = book.pages[name], []
    if book.kv_len[name] % book.page_size == 0:
        pages.append(book.take())
    else:
        old, pages[-1] = pages[-1], book.take()
        book.references[old] -= 1
        if book.references[old] == 0:
            book.free.append(old)
        copies = [(old, pages[-1])]
    book.kv_len[name] += 1
    return copies


@append_token.mistake("all shared pages are copied; only the one that is written has to be")
def _copies_all_pages(book, name):
    pages, copies = book.pages[name], []
    if book.kv_len[name] % book.page_size == 0:
        pages.append(book.take())
    elif book.references[pages[-1]] > 1:
        for i, shared in enumerate(pages):
            pages[i] = book.take()
            book.references[shared] -= 1
            copies.append((shared, pages[i]))
    book.kv_len[name] += 1
    return copies


@append_token.mistake("the copy is put after the shared page; it has to take its place")
def _copy_after(book, name):
    pages, copies = book.pages[name], []
    if book.kv_len[name] % book.page_size == 0:
        pages.append(book.take())
    elif book.references[pages[-1]] > 1:
        shared = pages[-1]
        book.references[shared] -= 1
        pages.append(book.take())
        copies = [(shared, pages[-1])]
    book.kv_len[name] += 1
    return copies


@append_token.mistake("the shared page is put on the free list while another sequence reads it")
def _frees_shared_page(book, name):
    copies = _append_token(book, name)
    book.free[:0] = [source for source, _ in copies]
    return copies


# 2.5 paged_attention -----------------------------------------------------------------------------


def under_jit(function, q, kv_cache, pages, kv_len, num_kv_heads):
    """Call an answer as a server would: compiled, with the lengths unknown to the compiler."""
    if function.__module__ == __name__:  # the reference and the mistakes, which are NumPy
        return function(*(np.asarray(x) for x in (q, kv_cache, pages)), kv_len, num_kv_heads)
    return jax.jit(function, static_argnums=4)(q, kv_cache, pages, kv_len, num_kv_heads)


def _keys_values(q, kv_cache, pages, num_kv_heads):
    """K and V of every slot that the table names, f64[slots, num_kv_heads, head_dim]."""
    pages = np.clip(pages, 0, len(kv_cache) - 1)  # as JAX does with an index past the end
    combined = kv_cache[pages].astype(np.float64)
    combined = combined.reshape(-1, np.prod(kv_cache.shape[2:4]), kv_cache.shape[4])
    combined = combined[:, : 2 * num_kv_heads, : q.shape[1]]
    return combined[:, 0::2], combined[:, 1::2]


def _attend(q, keys, values, scale, group=None, masked=None):
    """Decode attention, f32[num_q_heads, head_dim]; `masked` slots get a score of zero."""
    num_kv_heads = keys.shape[1]
    heads = np.arange(len(q)) // (len(q) // num_kv_heads) if group is None else group
    scores = np.einsum("hd,khd->hk", q.astype(np.float64), keys[:, heads]) * scale
    if masked is not None:
        scores = np.where(masked, 0.0, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hk,khd->hd", weights, values[:, heads]).astype(np.float32)


def _paged_attention(q, kv_cache, pages, kv_len, num_kv_heads):
    keys, values = _keys_values(q, kv_cache, pages, num_kv_heads)
    return _attend(q, keys[:kv_len], values[:kv_len], q.shape[1] ** -0.5)


paged_attention = Exercise(
    "2.5", _paged_attention, axes=("q head", "lane"), tolerance=1e-5, drive=under_jit
)
# The second key scores ln 3 higher than the first, so the weights are 1/4 and 3/4: output (3, 1).
QUARTERS = np.zeros((2, 2, 2, 1, 4), np.float32)
QUARTERS[1, 0, :, 0, :2] = [[0, 0], [0, 4]]
QUARTERS[1, 1, :, 0, :2] = [[np.log(3) * 2**0.5, 0], [4, 0]]

paged_attention.case(
    "two tokens in page 1, one head of 2",
    q=np.float32([[1, 0]]),
    kv_cache=QUARTERS,
    pages=int32(1),
    kv_len=2,
    num_kv_heads=1,
)


def _case(title, kv_len, spoil, pages=(5, 2, 0, 7), dtype="float32", rows=4, packing=1):
    """Add a case; `spoil` says where the cache is NaN: "nowhere", in "keys", or "everywhere"."""
    kv_cache = normal(8, 4, rows, packing, 128)
    if spoil != "nowhere":
        spoiled = poisoned(kv_cache, int32(*pages), kv_len)
        if spoil == "keys":
            spoiled[:, :, 1::2] = kv_cache[:, :, 1::2]  # with packing 1 the odd rows are values
        kv_cache = spoiled
    paged_attention.case(
        title,
        q=normal(6, 64),
        kv_cache=cast(kv_cache, dtype),
        pages=int32(*pages),
        kv_len=kv_len,
        num_kv_heads=2,
    )


_case("four full pages, six q heads on two KV heads", 16, spoil="nowhere")
_case("an old token of another sequence after the last one", 9, spoil="nowhere")
_case("keys that are NaN after the last token", 7, spoil="keys")
_case("keys and values that are NaN after the last token", 7, spoil="everywhere")
_case("NaN after the last token, which fills its page", 8, spoil="everywhere")
_case("one token", 1, spoil="everywhere")
_case("garbage after the live pages of the table", 5, "everywhere", pages=(3, 6, 999, 999))
_case("bfloat16", 13, spoil="everywhere", dtype="bfloat16", rows=2, packing=2)


@paged_attention.mistake("the softmax runs over the heads: it has to run over the keys")
def _softmax_over_heads(q, kv_cache, pages, kv_len, num_kv_heads):
    keys, values = (x[:kv_len] for x in _keys_values(q, kv_cache, pages, num_kv_heads))
    heads = np.arange(len(q)) // (len(q) // num_kv_heads)
    scores = np.einsum("hd,khd->hk", q.astype(np.float64), keys[:, heads]) * q.shape[1] ** -0.5
    weights = np.exp(scores - scores.max(0))
    weights /= weights.sum(0)
    return np.einsum("hk,khd->hd", weights, values[:, heads]).astype(np.float32)


@paged_attention.mistake("slots after the last token are seen too: kv_len is not used")
def _no_mask(q, kv_cache, pages, kv_len, num_kv_heads):
    keys, values = _keys_values(q, kv_cache, pages, num_kv_heads)
    return _attend(q, keys, values, q.shape[1] ** -0.5)


@paged_attention.mistake("the mask lets one slot too many through: position kv_len is not a token")
def _one_too_many(q, kv_cache, pages, kv_len, num_kv_heads):
    return _paged_attention(q, kv_cache, pages, kv_len + 1, num_kv_heads)


@paged_attention.mistake("the last page is seen to its end")
def _whole_last_page(q, kv_cache, pages, kv_len, num_kv_heads):
    page_size = kv_cache.shape[1]
    whole = -(-kv_len // page_size) * page_size
    return _paged_attention(q, kv_cache, pages, whole, num_kv_heads)


@paged_attention.mistake("a masked score is set to 0, whose exp is 1; it has to be -infinity")
def _masked_to_zero(q, kv_cache, pages, kv_len, num_kv_heads):
    keys, values = _keys_values(q, kv_cache, pages, num_kv_heads)
    masked = np.arange(len(keys)) >= kv_len
    values = np.where(masked[:, None, None], 0, values)
    return _attend(q, np.nan_to_num(keys), values, q.shape[1] ** -0.5, masked=masked)


@paged_attention.mistake(
    "-infinity is added to a score that is NaN, which stays NaN; it has to replace the score"
)
def _mask_added(q, kv_cache, pages, kv_len, num_kv_heads):
    keys, _ = _keys_values(q, kv_cache, pages, num_kv_heads)
    right = _paged_attention(q, kv_cache, pages, kv_len, num_kv_heads)
    unseen = keys[kv_len:].sum(axis=(0, 2)) * 0.0  # [num_kv_heads], NaN if a score is
    return (right + np.repeat(unseen, len(q) // num_kv_heads)[:, None]).astype(np.float32)


@paged_attention.mistake(
    "the scores are masked and the values are not: a weight of 0 times a value that is NaN is NaN"
)
def _values_not_masked(q, kv_cache, pages, kv_len, num_kv_heads):
    keys, values = _keys_values(q, kv_cache, pages, num_kv_heads)
    right = _paged_attention(q, kv_cache, pages, kv_len, num_kv_heads)
    unseen = values[kv_len:].sum(axis=0) * 0.0  # [num_kv_heads, head_dim]
    return (right + np.repeat(unseen, len(q) // num_kv_heads, axis=0)).astype(np.float32)


@paged_attention.mistake("the scores are not scaled by head_dim ** -0.5")
def _not_scaled(q, kv_cache, pages, kv_len, num_kv_heads):
    keys, values = _keys_values(q, kv_cache, pages, num_kv_heads)
    return _attend(q, keys[:kv_len], values[:kv_len], 1.0)


@paged_attention.mistake("the scale is taken from the padded head_dim of the cache")
def _scaled_by_lanes(q, kv_cache, pages, kv_len, num_kv_heads):
    keys, values = _keys_values(q, kv_cache, pages, num_kv_heads)
    return _attend(q, keys[:kv_len], values[:kv_len], kv_cache.shape[-1] ** -0.5)


@paged_attention.mistake(
    "q head h reads KV head h % num_kv_heads; neighbours share one: h // (q heads per KV head)"
)
def _heads_dealt_out(q, kv_cache, pages, kv_len, num_kv_heads):
    keys, values = _keys_values(q, kv_cache, pages, num_kv_heads)
    group = np.arange(len(q)) % num_kv_heads
    return _attend(q, keys[:kv_len], values[:kv_len], q.shape[1] ** -0.5, group)


@paged_attention.mistake("the table is not used: pages 0, 1, 2, ... are read")
def _table_ignored(q, kv_cache, pages, kv_len, num_kv_heads):
    return _paged_attention(q, kv_cache, np.arange(len(pages)), kv_len, num_kv_heads)


@paged_attention.mistake("every page has a softmax of its own, and the pages are averaged")
def _softmax_per_page(q, kv_cache, pages, kv_len, num_kv_heads):
    keys, values = _keys_values(q, kv_cache, pages, num_kv_heads)
    starts = range(0, kv_len, kv_cache.shape[1])
    ends = [min(start + kv_cache.shape[1], kv_len) for start in starts]
    parts = [
        _attend(q, keys[start:end], values[start:end], q.shape[1] ** -0.5)
        for start, end in zip(starts, ends, strict=True)
    ]
    return np.mean(parts, axis=0)


# 2.6 reusable_pages ------------------------------------------------------------------------------


def _common(tokens, old_tokens):
    """How many tokens two sequences have in common from their beginnings on."""
    pairs = zip(tokens, old_tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(old_tokens)))


def _reusable_pages(tokens, cached, page_size):
    runs = [pages[: _common(tokens[:-1], old) // page_size] for old, pages in cached]
    return max(runs, key=len, default=[])


reusable_pages = Exercise("2.6", _reusable_pages)
reusable_pages.case(
    "one older sequence with the same beginning",
    tokens="be kind: hi",
    cached=[("be kind: yo", [7, 2, 5])],
    page_size=4,
)
reusable_pages.case(
    "nobody began like this",
    tokens="hello",
    cached=[("be kind: yo", [7, 2, 5])],
    page_size=4,
)
reusable_pages.case("an empty cache", tokens="hello", cached=[], page_size=4)
reusable_pages.case(
    "several began like this",
    tokens="aaaabbbbccccd",
    cached=[("aaaaxxxx", [0, 1]), ("aaaabbbbcccc", [0, 4, 6]), ("aaaabbbbx", [0, 4, 5])],
    page_size=4,
)
reusable_pages.case(
    "an older sequence that ends within a page",
    tokens="abcdefghij",
    cached=[("abcdef", [8, 9])],
    page_size=4,
)
reusable_pages.case(
    "the same page, after another beginning",
    tokens="abcdwxyzq",
    cached=[("abcdefgh", [0, 1]), ("mnopwxyz", [2, 3])],
    page_size=4,
)
reusable_pages.case(
    "different in the middle",
    tokens="abcdxxxxijkl!",
    cached=[("abcdefghijkl", [1, 2, 3])],
    page_size=4,
)
reusable_pages.case(
    "all of the prompt is cached",
    tokens="abcdefgh",
    cached=[("abcdefghij", [5, 6, 4])],
    page_size=4,
)


@reusable_pages.mistake(
    "a page that agrees only in part is reused: the new sequence would write into it"
)
def _reuses_partial_page(tokens, cached, page_size):
    runs = [pages[: -(-_common(tokens[:-1], old) // page_size)] for old, pages in cached]
    return max(runs, key=len, default=[])


@reusable_pages.mistake(
    "nothing is left to compute: the last token is needed as a query, its output is the answer"
)
def _leaves_nothing(tokens, cached, page_size):
    runs = [pages[: _common(tokens, old) // page_size] for old, pages in cached]
    return max(runs, key=len, default=[])


@reusable_pages.mistake(
    "a page is recognised by its own tokens only: its K and V depend on all tokens before it"
)
def _own_tokens_only(tokens, cached, page_size):
    by_tokens = {
        old[page_size * i : page_size * (i + 1)]: page
        for old, pages in reversed(cached)
        for i, page in enumerate(pages)
    }
    found = []
    for start in range(0, (len(tokens) - 1) // page_size * page_size, page_size):
        page = by_tokens.get(tokens[start : start + page_size])
        if page is None:
            break
        found.append(page)
    return found


@reusable_pages.mistake("pages after the first difference are reused, too")
def _beyond_a_difference(tokens, cached, page_size):
    runs = [
        [
            page
            for i, page in enumerate(pages)
            if tokens[page_size * i : page_size * (i + 1)] == old[page_size * i :][:page_size]
            and page_size * (i + 1) <= min(len(tokens) - 1, len(old))
        ]
        for old, pages in cached
    ]
    return max(runs, key=len, default=[])


@reusable_pages.mistake("the first older sequence that helps is taken, not the one that helps most")
def _first_that_helps(tokens, cached, page_size):
    runs = [pages[: _common(tokens[:-1], old) // page_size] for old, pages in cached]
    return next((run for run in runs if run), [])
