"""Checks of chapter 6: the fused cache update.

References and mistakes are NumPy: quick, and apart from what the chapter teaches with. The kernel
of 6.5 runs in the sandbox, which finds what breaks a rule of DMAs (`faults.py`).
"""

import numpy as np

from rpa.check.chapters import assembly
from rpa.check.chapters.chapter05 import judge_overlap
from rpa.check.chapters.write_back import run_write_back
from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise
from rpa.check.index_words import ragged
from rpa.check.sandbox import faults
from rpa.check.sandbox.dma import LIMIT_S, dma_exercise, in_flight

RNG = np.random.default_rng(6)


def ints(*values):
    """i32[len(values)]."""
    return np.array(values, np.int32)


# 6.1 what crosses the HBM -------------------------------------------------------------------------


def _moved_bytes(q_lens, kv_lens, token_bytes):
    separate = fused = 0
    for q_len, kv_len in zip(q_lens.tolist(), kv_lens.tolist(), strict=True):
        if q_len:
            separate += 2 * q_len + kv_len  # the store reads and writes, attention reads all
            fused += (kv_len - q_len) + q_len + q_len  # cached and new are read, new is written
    return separate * token_bytes, fused * token_bytes


moved = Exercise("6.1", _moved_bytes, outputs=("separate", "fused"), convert=np.array)
moved.case("a decode behind three cached tokens", q_lens=ints(1), kv_lens=ints(4), token_bytes=10)
moved.case("a fresh prompt", q_lens=ints(5), kv_lens=ints(5), token_bytes=10)
moved.case(
    "a decode, a chunk and an idle slot", q_lens=ints(1, 3, 0), kv_lens=ints(9, 7, 6), token_bytes=1
)
moved.case(
    "64 decodes of Llama 3 8B, one layer", q_lens=np.full(64, 1, np.int32),
    kv_lens=np.full(64, 4096, np.int32), token_bytes=4096,
)  # fmt: skip


def _sums(q_lens, kv_lens, token_bytes, separate, fused):
    """Bytes from two formulas in (q, kv), the sums over sequences that are not idle."""
    q, kv = (int(x[q_lens > 0].sum()) for x in (q_lens, kv_lens))
    return separate(q, kv) * token_bytes, fused(q, kv) * token_bytes


@moved.mistake("kv_len is taken for the cached tokens only; it counts the new ones, too")
def _kv_len_cached(q_lens, kv_lens, token_bytes):
    return _sums(q_lens, kv_lens, token_bytes, lambda q, kv: kv + 3 * q, lambda q, kv: kv + 2 * q)


@moved.mistake(
    "the separate way moves a new token only twice: the store reads it and writes it, and then "
    "attention reads it"
)
def _separate_moves_twice(q_lens, kv_lens, token_bytes):
    return _sums(q_lens, kv_lens, token_bytes, lambda q, kv: kv + q, lambda q, kv: kv + q)


@moved.mistake(
    "the fused kernel moves a new token only once: it reads it from where the model put it, and "
    "does not write less than the store does, for it has to be in the cache afterwards"
)
def _fused_moves_once(q_lens, kv_lens, token_bytes):
    return _sums(q_lens, kv_lens, token_bytes, lambda q, kv: kv + 2 * q, lambda q, kv: kv)


@moved.mistake(
    "the fused kernel reads the new tokens from the cache as well as from new_kv: it reads each "
    "once, whichever way it comes"
)
def _fused_reads_twice(q_lens, kv_lens, token_bytes):
    return _sums(q_lens, kv_lens, token_bytes, lambda q, kv: kv + 2 * q, lambda q, kv: kv + 2 * q)


@moved.mistake("an idle slot (q_len 0) is counted: it has no query, so nothing is read")
def _idle_counted(q_lens, kv_lens, token_bytes):
    q, kv = int(q_lens.sum()), int(kv_lens.sum())
    return (kv + 2 * q) * token_bytes, (kv + q) * token_bytes


# 6.2 two addresses of a new token -----------------------------------------------------------------


def _addresses(positions, pages, page_size, block_tokens, column=None):
    """Block, buffer row, page and page row of positions; columns past the end clamp, as in JAX."""
    positions = np.asarray(positions)
    column = positions // page_size if column is None else column
    page = np.asarray(pages)[np.clip(column, 0, len(pages) - 1)]
    results = positions // block_tokens, positions % block_tokens, page, positions % page_size
    return tuple(x.astype(np.int32) for x in results)


def _new_positions(kv_len, q_len):
    return kv_len - q_len + np.arange(q_len)


def _token_addresses(kv_len, q_len, pages, page_size, block_tokens):
    return _addresses(_new_positions(kv_len, q_len), pages, page_size, block_tokens)


addresses = Exercise(
    "6.2",
    _token_addresses,
    axes=("new token",),
    outputs=("blocks", "buffer_rows", "pages", "page_rows"),
)
addresses.case(
    "the second block of a decode", kv_len=10, q_len=1, pages=ints(5, 2, 7), page_size=4,
    block_tokens=8,
)  # fmt: skip
addresses.case(
    "three new tokens that cross a page and a block", kv_len=10, q_len=3, pages=ints(5, 2, 7),
    page_size=4, block_tokens=8,
)  # fmt: skip
addresses.case("a fresh prompt", kv_len=6, q_len=6, pages=ints(3, 0), page_size=4, block_tokens=4)
addresses.case(
    "pages of 16, blocks of 48", kv_len=101, q_len=7, pages=ints(9, 4, 1, 8, 0, 6, 2),
    page_size=16, block_tokens=48,
)  # fmt: skip


@addresses.mistake("the cached prefix is forgotten: new tokens stand behind it, not at position 0")
def _prefix_forgotten(kv_len, q_len, pages, page_size, block_tokens):
    return _addresses(np.arange(q_len), pages, page_size, block_tokens)


@addresses.mistake("kv_len is taken for the cached prefix; it counts the new tokens, too")
def _kv_len_is_prefix(kv_len, q_len, pages, page_size, block_tokens):
    return _addresses(kv_len + np.arange(q_len), pages, page_size, block_tokens)


@addresses.mistake("positions are one too large: the first new token stands at kv_len - q_len")
def _one_too_far(kv_len, q_len, pages, page_size, block_tokens):
    return _addresses(_new_positions(kv_len, q_len) + 1, pages, page_size, block_tokens)


@addresses.mistake(
    "the page is looked up by the row in the block: the entry is counted from the beginning of the "
    "sequence, so blocks before this one are missing"
)
def _column_in_block(kv_len, q_len, pages, page_size, block_tokens):
    positions = _new_positions(kv_len, q_len)
    column = positions % block_tokens // page_size
    return _addresses(positions, pages, page_size, block_tokens, column)


@addresses.mistake(
    "the page table is not asked: that is the page of the sequence, not of the cache"
)
def _page_of_sequence(kv_len, q_len, pages, page_size, block_tokens):
    positions = _new_positions(kv_len, q_len)
    blocks, rows, _, slots = _addresses(positions, pages, page_size, block_tokens)
    return blocks, rows, (positions // page_size).astype(np.int32), slots


@addresses.mistake(
    "buffer rows count from the first new token; the cached tokens of the block lie before it"
)
def _rows_of_new_only(kv_len, q_len, pages, page_size, block_tokens):
    blocks, _, page, slots = _token_addresses(kv_len, q_len, pages, page_size, block_tokens)
    return blocks, (np.arange(q_len) % block_tokens).astype(np.int32), page, slots


@addresses.mistake("the row in the page is the row in the block: a block has several pages")
def _page_row_of_block(kv_len, q_len, pages, page_size, block_tokens):
    blocks, rows, page, _ = _token_addresses(kv_len, q_len, pages, page_size, block_tokens)
    return blocks, rows, page, rows


@addresses.mistake(
    "the page is looked up by the number of the block: a block has several pages, and the entry is "
    "position // page_size"
)
def _page_of_block(kv_len, q_len, pages, page_size, block_tokens):
    positions = _new_positions(kv_len, q_len)
    return _addresses(positions, pages, page_size, block_tokens, positions // block_tokens)


@addresses.mistake("blocks are counted in pages: a block has block_tokens tokens")
def _blocks_are_pages(kv_len, q_len, pages, page_size, block_tokens):
    _, rows, page, slots = _token_addresses(kv_len, q_len, pages, page_size, block_tokens)
    columns = _new_positions(kv_len, q_len) // page_size
    return columns.astype(np.int32), rows, page, slots


# 6.3 cached and new tokens in one block -----------------------------------------------------------


def _merged(from_pages, new_kv, start, q_len, kv_len, block, *, tail=0.0, prefix=None, row=None):
    """The block token by token; `row(position, prefix)` is the row of new_kv that it comes from."""
    prefix = kv_len - q_len if prefix is None else prefix
    merged = np.array(from_pages)
    for r in range(len(merged)):
        position = block * len(merged) + r
        if position >= kv_len:
            if tail is not None:
                merged[r] = tail
        elif position >= prefix:
            number = start + position - prefix if row is None else row(position, prefix)
            merged[r] = new_kv[np.clip(number, 0, len(new_kv) - 1)]
    return merged


def _merge_block(from_pages, new_kv, start, q_len, kv_len, block):
    return _merged(from_pages, new_kv, start, q_len, kv_len, block)


def _merge_arguments(q_len, kv_len, block, *, block_tokens=4, start=0, num_tokens=None, words=2):
    """A block as the page copies left it: cached tokens, and NaN wherever nothing was copied."""
    from_pages = np.full((block_tokens, words), np.nan, np.float32)
    num_cached = int(np.clip(kv_len - q_len - block * block_tokens, 0, block_tokens))
    positions = block * block_tokens + np.arange(num_cached)
    from_pages[:num_cached] = positions[:, None] + np.arange(words) / 10
    num_tokens = start + q_len + 1 if num_tokens is None else num_tokens
    new_kv = 100.0 + np.arange(num_tokens)[:, None] + np.arange(words) / 10
    new_kv[start + q_len :] = np.nan  # padding, if it is nobody's; a product with 0 keeps NaN
    return {
        "from_pages": from_pages,
        "new_kv": new_kv.astype(np.float32),
        "start": start,
        "q_len": q_len,
        "kv_len": kv_len,
        "block": block,
    }


merge = Exercise("6.3", _merge_block, axes=("row of the block", "word"))
merge.case("one new token behind two cached", **_merge_arguments(1, 3, 0))
merge.case("new tokens that begin in this block", **_merge_arguments(3, 7, 1, start=2))
merge.case("a block of cached tokens only", **_merge_arguments(2, 10, 1))
merge.case(
    "new tokens that began in the block before, and end in this one",
    **_merge_arguments(5, 11, 2, start=1),
)
merge.case(
    "a full block in the middle of a prompt", **_merge_arguments(30, 33, 1, block_tokens=8, start=3)
)
merge.case(
    "the last sequence, whose block reaches past all rows",
    **_merge_arguments(2, 9, 0, block_tokens=16, start=5, num_tokens=7),
)


@merge.mistake(
    "rows are chosen by products with 0 and 1: what is not chosen may be NaN, and 0 times NaN is "
    "NaN. `jnp.where` chooses"
)
def _merge_by_product(from_pages, new_kv, start, q_len, kv_len, block):
    position = block * len(from_pages) + np.arange(len(from_pages))
    row = start + position - (kv_len - q_len)  # below 0 it counts from the end, as in JAX
    rows = new_kv[np.clip(np.where(row < 0, row + len(new_kv), row), 0, len(new_kv) - 1)]
    is_new = (position >= kv_len - q_len)[:, None]
    merged = rows * is_new + from_pages * ~is_new
    return np.where((position < kv_len)[:, None], merged, 0).astype(np.float32)


@merge.mistake("new tokens are taken from row 0 of new_kv on: those are another sequence's")
def _from_row_0(from_pages, new_kv, start, q_len, kv_len, block):
    return _merged(from_pages, new_kv, 0, q_len, kv_len, block)


@merge.mistake(
    "in every block the first row of the sequence is taken again: what earlier blocks hold has to "
    "be counted off"
)
def _first_row_again(from_pages, new_kv, start, q_len, kv_len, block):
    first = max(kv_len - q_len, block * len(from_pages))
    return _merged(
        from_pages, new_kv, start, q_len, kv_len, block,
        row=lambda position, prefix: start + position - first,
    )  # fmt: skip


@merge.mistake("the row of new_kv is the row of the block: nothing is subtracted for the prefix")
def _row_of_the_block(from_pages, new_kv, start, q_len, kv_len, block):
    size = len(from_pages)
    return _merged(
        from_pages, new_kv, start, q_len, kv_len, block,
        row=lambda position, prefix: start + position % size,
    )  # fmt: skip


@merge.mistake("the row of new_kv is the position in the sequence: the cached prefix has no rows")
def _row_is_position(from_pages, new_kv, start, q_len, kv_len, block):
    return _merged(
        from_pages, new_kv, start, q_len, kv_len, block,
        row=lambda position, prefix: start + position,
    )  # fmt: skip


@merge.mistake("kv_len is taken for the cached prefix; it counts the new tokens, too")
def _merge_kv_len_is_prefix(from_pages, new_kv, start, q_len, kv_len, block):
    return _merged(from_pages, new_kv, start, q_len, kv_len, block, prefix=kv_len)


@merge.mistake(
    "the tail keeps what was in the buffer, or that times zero: stale memory may be NaN, and "
    "has to be replaced"
)
def _tail_kept(from_pages, new_kv, start, q_len, kv_len, block):
    return _merged(from_pages, new_kv, start, q_len, kv_len, block, tail=None)


@merge.mistake(
    "the first new token is left out: position kv_len - q_len is a new one, so >= and not >"
)
def _one_new_too_few(from_pages, new_kv, start, q_len, kv_len, block):
    merged = _merge_block(from_pages, new_kv, start, q_len, kv_len, block)
    first = kv_len - q_len - block * len(merged)
    if 0 <= first < len(merged):
        merged[first] = from_pages[first]
    return merged


@merge.mistake("the tail begins one row too late: position kv_len is no token")
def _one_row_too_many(from_pages, new_kv, start, q_len, kv_len, block):
    merged = _merge_block(from_pages, new_kv, start, q_len, kv_len, block)
    end = kv_len - block * len(merged)
    if 0 <= end < len(merged):
        merged[end] = new_kv[min(start + q_len, len(new_kv) - 1)]
    return merged


@merge.mistake("the cached prefix is taken one too long: the first new token stands at its end")
def _prefix_too_long(from_pages, new_kv, start, q_len, kv_len, block):
    prefix = kv_len - q_len + 1
    return _merged(from_pages, new_kv, start, q_len, kv_len, block, prefix=prefix)


@merge.mistake(
    "every block is taken for the first one: row r of a block stands at position "
    "block * block_tokens + r"
)
def _block_0(from_pages, new_kv, start, q_len, kv_len, block):
    return _merge_block(from_pages, new_kv, start, q_len, kv_len, 0)


@merge.mistake(
    "kv_len is compared with the row of the block: what earlier blocks hold has to be counted off"
)
def _tail_by_row(from_pages, new_kv, start, q_len, kv_len, block):
    size, end = len(from_pages), (block + 1) * len(from_pages)
    merged = _merged(from_pages, new_kv, start, q_len, end, block, prefix=kv_len - q_len)
    merged[min(kv_len, size) :] = 0
    return merged


# 6.4 the copies of the write-back -----------------------------------------------------------------


def _stores(kv_len, q_len, block, pages, page_size, block_tokens):
    """Token by token, and neighbours on one page joined."""
    stores = []
    for position in range(max(kv_len - q_len, block * block_tokens), kv_len):
        row = position - block * block_tokens
        if row >= block_tokens:
            break
        page, slot = int(pages[position // page_size]), position % page_size
        if stores and stores[-1][1] == page and slot > 0:
            stores[-1] = (*stores[-1][:3], stores[-1][3] + 1)
        else:
            stores.append((row, page, slot, 1))
    return stores


def list_of_copies(function, *arguments):
    """The learner's list as plain tuples of integers, or a sentence on what it is instead."""
    copies = function(*arguments)
    if not isinstance(copies, list):
        raise WrongResult(
            f"your function returns a {type(copies).__name__}, expected a list of tuples "
            "(buffer_row, page, page_row, num_tokens)"
        )
    for copy in copies:
        if not (isinstance(copy, tuple | list) and len(copy) == 4):
            raise WrongResult(
                f"an entry of your list is {copy!r}, expected a tuple of four numbers "
                "(buffer_row, page, page_row, num_tokens)"
            )
    return [tuple(int(number) for number in copy) for copy in copies]


stores = Exercise("6.4", _stores, convert=np.array, drive=list_of_copies)
stores.case(
    "one new token of a decode", kv_len=6, q_len=1, block=0, pages=ints(5, 2), page_size=4,
    block_tokens=8,
)  # fmt: skip
stores.case(
    "three new tokens that cross a page", kv_len=6, q_len=3, block=0, pages=ints(5, 2),
    page_size=4, block_tokens=8,
)  # fmt: skip
stores.case(
    "a block of cached tokens only", kv_len=12, q_len=2, block=0, pages=ints(5, 2, 7),
    page_size=4, block_tokens=8,
)  # fmt: skip
stores.case(
    "the second block of a prompt", kv_len=21, q_len=15, block=1, pages=ints(9, 4, 1, 8, 0, 6),
    page_size=4, block_tokens=8,
)  # fmt: skip
stores.case(
    "new tokens that end with a page", kv_len=16, q_len=5, block=0, pages=ints(3, 1, 8, 2),
    page_size=4, block_tokens=16,
)  # fmt: skip


def _store_runs(first, last, block, pages, page_size, block_tokens, *, whole=False, table=None):
    """One copy a page for the rows [first, last) of a block."""
    found = []
    for page in range(first // page_size, -(-last // page_size)) if first < last else []:
        begin = page * page_size if whole else max(first, page * page_size)
        end = (page + 1) * page_size if whole else min(last, (page + 1) * page_size)
        entry = block * block_tokens // page_size + page
        number = entry if table is None else table(page, entry)
        owner = number if table is False else int(pages[min(number, len(pages) - 1)])
        found.append((begin, owner, begin - page * page_size, end - begin))
    return found


def _bounds(kv_len, q_len, block, block_tokens):
    first = int(np.clip(kv_len - q_len - block * block_tokens, 0, block_tokens))
    return first, int(np.clip(kv_len - block * block_tokens, 0, block_tokens))


@stores.mistake(
    "whole pages are written: that overwrites cached tokens before the new ones, and moves rows "
    "behind them that hold nothing"
)
def _whole_pages(kv_len, q_len, block, pages, page_size, block_tokens):
    first, last = _bounds(kv_len, q_len, block, block_tokens)
    return _store_runs(first, last, block, pages, page_size, block_tokens, whole=True)


@stores.mistake(
    "the cached tokens of the block are written back, too; they are in the cache already"
)
def _cached_too(kv_len, q_len, block, pages, page_size, block_tokens):
    first, last = _bounds(kv_len, q_len, block, block_tokens)
    first = 0 if first < last else last
    return _store_runs(first, last, block, pages, page_size, block_tokens)


@stores.mistake(
    "the page table is asked from its beginning; the pages of this block begin at entry "
    "block * block_tokens // page_size"
)
def _entries_of_block_0(kv_len, q_len, block, pages, page_size, block_tokens):
    first, last = _bounds(kv_len, q_len, block, block_tokens)
    return _store_runs(
        first, last, block, pages, page_size, block_tokens, table=lambda page, entry: page
    )


@stores.mistake(
    "all new tokens are written with one copy: pages that follow each other in the sequence lie "
    "anywhere in the cache"
)
def _one_copy(kv_len, q_len, block, pages, page_size, block_tokens):
    first, last = _bounds(kv_len, q_len, block, block_tokens)
    found = _store_runs(first, last, block, pages, page_size, block_tokens)
    return [(*found[0][:3], last - first)] if found else []


@stores.mistake(
    "every copy begins at row 0 of its page; on the first page the new tokens stand behind cached "
    "ones"
)
def _page_row_zero(kv_len, q_len, block, pages, page_size, block_tokens):
    found = _stores(kv_len, q_len, block, pages, page_size, block_tokens)
    return [(row, page, 0, size) for row, page, _, size in found]


@stores.mistake(
    "buffer rows count from the first new token; the block has its cached tokens before it"
)
def _rows_from_new(kv_len, q_len, block, pages, page_size, block_tokens):
    found = _stores(kv_len, q_len, block, pages, page_size, block_tokens)
    return [(row - found[0][0], page, slot, size) for row, page, slot, size in found]


@stores.mistake(
    "new tokens of the block before are written once more: a block writes those in its own rows, "
    "from row 0 on"
)
def _begin_not_clipped(kv_len, q_len, block, pages, page_size, block_tokens):
    first = kv_len - q_len - block * block_tokens
    last = _bounds(kv_len, q_len, block, block_tokens)[1]
    return _store_runs(first, last, block, pages, page_size, block_tokens)


@stores.mistake(
    "new tokens of the blocks behind are written, too: a block writes those in its own rows, at "
    "most block_tokens"
)
def _end_not_clipped(kv_len, q_len, block, pages, page_size, block_tokens):
    first = max(kv_len - q_len - block * block_tokens, 0)
    last = kv_len - block * block_tokens
    return _store_runs(first, last, block, pages, page_size, block_tokens)


@stores.mistake("the page comes first in the tuple: (buffer_row, page, page_row, num_tokens)")
def _page_first(kv_len, q_len, block, pages, page_size, block_tokens):
    found = _stores(kv_len, q_len, block, pages, page_size, block_tokens)
    return [(page, row, slot, size) for row, page, slot, size in found]


@stores.mistake("the last number is where the rows end; it should say how many there are")
def _end_for_number(kv_len, q_len, block, pages, page_size, block_tokens):
    found = _stores(kv_len, q_len, block, pages, page_size, block_tokens)
    return [(row, page, slot, row + size) for row, page, slot, size in found]


@stores.mistake("each token is a copy of its own: right, but a page needs only one")
def _token_by_token(kv_len, q_len, block, pages, page_size, block_tokens):
    found = _stores(kv_len, q_len, block, pages, page_size, block_tokens)
    return [(row + i, page, slot + i, 1) for row, page, slot, size in found for i in range(size)]


@stores.mistake("the last page is left out: the number of pages is rounded down")
def _last_page_missing(kv_len, q_len, block, pages, page_size, block_tokens):
    found = _stores(kv_len, q_len, block, pages, page_size, block_tokens)
    _, last = _bounds(kv_len, q_len, block, block_tokens)
    return found if last % page_size == 0 else found[:-1]


@stores.mistake(
    "the last page is written to its end: rows behind kv_len hold nothing, and the page's next "
    "tokens may be somebody's"
)
def _to_the_end_of_the_page(kv_len, q_len, block, pages, page_size, block_tokens):
    found = _stores(kv_len, q_len, block, pages, page_size, block_tokens)
    return [(row, page, slot, page_size - slot) for row, page, slot, _ in found]


@stores.mistake("the page table is not asked: that is the page of the sequence, not of the cache")
def _table_not_asked(kv_len, q_len, block, pages, page_size, block_tokens):
    first, last = _bounds(kv_len, q_len, block, block_tokens)
    own = np.arange(max(len(pages), kv_len))
    return _store_runs(first, last, block, own, page_size, block_tokens)


@stores.mistake("buffer rows are those of the page: a block has several pages")
def _buffer_row_of_page(kv_len, q_len, block, pages, page_size, block_tokens):
    found = _stores(kv_len, q_len, block, pages, page_size, block_tokens)
    return [(slot, page, slot, size) for _, page, slot, size in found]


@stores.mistake(
    "buffer rows are positions in the sequence: what earlier blocks hold has to be counted off"
)
def _buffer_row_of_sequence(kv_len, q_len, block, pages, page_size, block_tokens):
    found = _stores(kv_len, q_len, block, pages, page_size, block_tokens)
    return [(block * block_tokens + row, page, slot, size) for row, page, slot, size in found]


# 6.5 the write-back and its waits -----------------------------------------------------------------

BY_TURNS = "writes back and computes by turns: no write-back is on its way while it computes"
NO_PREFETCH = "loads and computes by turns: no block is on its way in while it computes"


def judge_write_back(timeline, new_kv, cache, page_indices):
    """Refuse a kernel that reads its blocks while no copy is on its way in, or none out."""
    filled = {copy.target.buffer for copy in timeline.copies if copy.target.buffer.space == "VMEM"}
    outward, inward = False, len(page_indices) < 2 or not filled
    for event, flying in in_flight(timeline):
        if event.kind == "load" and event.source.buffer in filled:
            outward |= any(copy.source.buffer in filled for copy in flying)
            inward |= any(copy.target.buffer in filled for copy in flying)
    if not inward:
        return faults.explain(NO_PREFETCH, ["Start the next load before you wait for this one."])
    if outward or not any(copy.source.buffer in filled for copy in timeline.copies):
        return None
    advice = (
        "Start the write-back, compute, and wait for it only before the buffer is filled again."
    )
    return faults.explain(BY_TURNS, [advice])


def _write_back_model(new_kv, cache, page_indices, written=None, added=None):
    """The sum of the blocks in `added`, and the cache with the pages in `written`."""
    cache, page_size = np.array(cache), cache.shape[1]
    blocks = np.asarray(new_kv).reshape(-1, page_size, cache.shape[2])
    for b, page in enumerate(np.asarray(page_indices)):
        if written is None or b in written:
            cache[page] = blocks[b]
    return (blocks if added is None else blocks[added]).sum(axis=0), cache


def _write_back(new_kv, cache, page_indices):
    return _write_back_model(new_kv, cache, page_indices)


def _write_back_arguments(page_indices):
    new_kv = RNG.standard_normal((len(page_indices) * 8, 128))
    cache = RNG.standard_normal((6, 8, 128))
    return {
        "new_kv": new_kv.astype(np.float32),
        "cache": cache.astype(np.float32),
        "page_indices": ints(*page_indices),
    }


write_back_kernel = dma_exercise(
    "6.5",
    _write_back,
    run_write_back,
    judge=judge_write_back,
    outputs=("sum", "cache"),
    faults=(
        faults.LEFTOVER,
        faults.TWO_COPIES,
        faults.WAIT_TOO_LATE,
        faults.NOBODY_SIGNALS,
        BY_TURNS,
        NO_PREFETCH,
    ),
)
write_back_kernel.case("one block", **_write_back_arguments([4]))
write_back_kernel.case("two blocks, a buffer for each", **_write_back_arguments([3, 0]))
write_back_kernel.case("five blocks in two buffers", **_write_back_arguments([5, 1, 4, 0, 2]))


@write_back_kernel.mistake("nothing is written back: the cache is what it was")
def _never_stores(new_kv, cache, page_indices):
    return _write_back_model(new_kv, cache, page_indices, written=())


@write_back_kernel.mistake("the last block is not written back")
def _last_not_stored(new_kv, cache, page_indices):
    return _write_back_model(new_kv, cache, page_indices, written=range(len(page_indices) - 1))


@write_back_kernel.mistake("only the last block is in the sum: each one replaces it (`=` for `+=`)")
def _sum_replaced(new_kv, cache, page_indices):
    return _write_back_model(new_kv, cache, page_indices, added=slice(-1, None))


@write_back_kernel.mistake(
    "the sum is not set to zero first, or the other buffer is added: VMEM begins as anything, here "
    "NaN"
)
def _sum_not_zeroed(new_kv, cache, page_indices):
    total, cache = _write_back(new_kv, cache, page_indices)
    return np.full_like(total, np.nan), cache


# 6.6 the fused kernel, whole ----------------------------------------------------------------------

NO_ALIAS = (
    "the cache that comes out is not the one that went in: input_output_aliases counts the "
    "prefetched scalars as inputs"
)


def _fresh_cache(*arguments, **options):
    """The cache as a new array in which only the new tokens are written: NaN everywhere else."""
    queries, keys, values, kv_cache, batch = arguments
    output, _ = assembly.ragged(*arguments, **options)
    blank = np.full_like(kv_cache, np.nan)
    _, cache = assembly.ragged(queries, keys, values, blank, batch, **options)
    return output, cache


def wrong_ragged(options):
    def wrong(*arguments, **more):
        return assembly.ragged(*arguments, **(more | options))

    return wrong


RAGGED_MISTAKES = {
    "the new tokens are not in the cache: what came into the buffer is written to their pages": {
        "store": False
    },
    "every new token is written to the first row of its page, and not to its own": {
        "store_row": lambda p, page_size, first_new: p - max(first_new, p // page_size * page_size)
    },
    "new tokens are taken from row 0 of new_kv on: a sequence owns the rows from its own start": {
        "new_row": lambda start, p, first_new, block_tokens: p - first_new
    },
    "in every block of keys the first new row is taken again: new tokens go on where the block "
    "before ended": {
        "new_row": lambda start, p, first_new, block_tokens: (
            start + p - max(first_new, p // block_tokens * block_tokens)
        )
    },
    "the new tokens are read from their pages, too early: they are not written there yet": {
        "new_row": lambda start, p, first_new, block_tokens: -1
    },
    "the causal mask is missing: a new token sees those after it": {
        "sees": lambda position, key, first_new: key == key
    },
    "the causal mask ignores the cached prefix": {
        "sees": lambda position, key, first_new: key <= position - first_new
    },
    "a token does not see itself": {
        "sees": lambda position, key, first_new: (key < position) | (position == 0)
    },
    "keys and values are swapped": {"swap": True},
    "the scores are not scaled by sm_scale": {"sm_scale": 1.0},
}


fused_attention = Exercise(
    "6.6",
    assembly.ragged,
    outputs=("output", "kv_cache", "rows of kv_cache that are right bit by bit"),
    tolerance=1e-4,
    place=ragged,
    drive=assembly.run_batch,
    runner=assembly.runner(judge_overlap),
    limit_s=LIMIT_S,
    epilogue=assembly.compiled("6.6"),
    faults=(faults.NOBODY_SIGNALS, faults.LEFTOVER),
)
for _title, _lengths in {
    "one decode, 13 tokens with the new one": [(1, 13)],
    "three new tokens that cross a page and a block": [(3, 18)],
    "an idle slot, a decode, five and four new tokens": [(0, 9), (1, 24), (5, 35), (4, 4)],
}.items():
    _sizes = {} if len(_lengths) > 1 else {"num_q_heads": 2, "num_kv_heads": 1}
    _case = assembly.make_batch(RNG, _lengths, **_sizes)
    fused_attention.case(_title, **_case, block_tokens=16)
for _words, _options in RAGGED_MISTAKES.items():
    fused_attention.mistake(_words)(wrong_ragged(_options))
fused_attention.mistake(NO_ALIAS)(_fresh_cache)
