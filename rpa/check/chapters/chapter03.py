"""Checks of chapter 3: ragged batching.

References and mistakes are NumPy: quick, and apart from what the chapter teaches with.
"""

from collections import Counter
from dataclasses import replace

import numpy as np

from rpa.check.exercise import Exercise
from rpa.check.index_words import ragged
from rpa.dense import oracle
from rpa.paging import cdiv
from rpa.ragged import RaggedBatch

RNG = np.random.default_rng(3)


def normal(*shape):
    """f32[shape] of standard normal numbers, the same at every run."""
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values):
    """i32[len(values)]."""
    return np.array(values, np.int32)


# 3.1 cu_q_lens, and whose token is this? ----------------------------------------------------------


def _cu_q_lens(q_lens):
    return np.concatenate([[0], np.cumsum(np.asarray(q_lens))]).astype(np.int32)


def _token_owner(q_lens, num_tokens):
    cu_q_lens = _cu_q_lens(q_lens)
    owner = np.full(num_tokens, -1, np.int32)
    for s, (start, end) in enumerate(zip(cu_q_lens[:-1], cu_q_lens[1:], strict=True)):
        owner[start:end] = s
    return cu_q_lens, owner


token_owner = Exercise("3.1", _token_owner, outputs=("cu_q_lens", "owner"))
token_owner.case("one token of A, three of B", q_lens=ints(1, 3), num_tokens=4)
token_owner.case("two padding rows", q_lens=ints(1, 1, 3), num_tokens=7)
token_owner.case("an idle slot in the middle", q_lens=ints(1, 0, 2), num_tokens=4)
token_owner.case("idle slots at both ends", q_lens=ints(0, 2, 0, 0), num_tokens=4)
token_owner.case("decodes beside a long chunk", q_lens=ints(1, 1, 1, 1, 40), num_tokens=48)


def _searched(q_lens, num_tokens, side="right", minus=1, padding=-1):
    cu_q_lens = _cu_q_lens(q_lens)
    owner = np.searchsorted(cu_q_lens, np.arange(num_tokens), side=side) - minus
    if padding is not None:
        owner = np.where(np.arange(num_tokens) < cu_q_lens[-1], owner, padding)
    return cu_q_lens, owner.astype(np.int32)


@token_owner.mistake(
    "the first padding row counts as owned: row cu_q_lens[-1] is past the end already, so the "
    "comparison is < and not <="
)
def _end_is_owned(q_lens, num_tokens):
    cu_q_lens, owner = _searched(q_lens, num_tokens, padding=None)
    return cu_q_lens, np.where(np.arange(num_tokens) <= cu_q_lens[-1], owner, -1).astype(np.int32)


@token_owner.mistake(
    "searchsorted keeps its default side='left': the first token of each sequence goes to the one "
    "before it"
)
def _left(q_lens, num_tokens):
    return _searched(q_lens, num_tokens, side="left")


@token_owner.mistake(
    "the 1 is not subtracted: searchsorted counts the entries of cu_q_lens up to t, and the "
    "leading 0 is one of them"
)
def _one_too_high(q_lens, num_tokens):
    return _searched(q_lens, num_tokens, minus=0)


@token_owner.mistake("the padding rows are given to the last sequence and not marked with -1")
def _padding_to_last(q_lens, num_tokens):
    return _searched(q_lens, num_tokens, padding=len(q_lens) - 1)


@token_owner.mistake("the padding rows are not marked: a search past the end answers num_seqs")
def _padding_unmarked(q_lens, num_tokens):
    return _searched(q_lens, num_tokens, padding=None)


@token_owner.mistake(
    "cu_q_lens lacks its leading 0: it has one entry more than there are sequences"
)
def _no_leading_zero(q_lens, num_tokens):
    return _cu_q_lens(q_lens)[1:], _token_owner(q_lens, num_tokens)[1]


@token_owner.mistake(
    "cu_q_lens lacks its leading 0, and the 1 is subtracted all the same: every token goes to the "
    "sequence before its own"
)
def _no_leading_zero_to_count(q_lens, num_tokens):
    cu_q_lens, owner = _token_owner(q_lens, num_tokens)
    return cu_q_lens[1:], np.maximum(owner - 1, -1).astype(np.int32)


@token_owner.mistake("cu_q_lens lacks its last entry, the number of all new tokens")
def _no_total(q_lens, num_tokens):
    return _cu_q_lens(q_lens)[:-1], _token_owner(q_lens, num_tokens)[1]


@token_owner.mistake("the token is looked up in q_lens itself, which is not a running sum")
def _looked_up_in_q_lens(q_lens, num_tokens):
    owner = np.searchsorted(np.asarray(q_lens), np.arange(num_tokens), side="right")
    owned = np.arange(num_tokens) < np.sum(q_lens)
    return _cu_q_lens(q_lens), np.where(owned, owner, -1).astype(np.int32)


# 3.2 the place of each new token ------------------------------------------------------------------


def _spread(kv_lens, cu_q_lens, owner):
    """kv_len, q_len and number within its sequence of each token, i64[num_tokens] each."""
    kv_lens, cu_q_lens, owner = (np.asarray(x, np.int64) for x in (kv_lens, cu_q_lens, owner))
    number = np.arange(len(owner)) - cu_q_lens[owner]
    return kv_lens[owner], np.diff(cu_q_lens)[owner], number


def _places(positions, page_table, page_size, rows, columns=None):
    """Positions, pages and slots; an index past the end is clamped, as JAX does it."""
    page_table, columns = (
        np.asarray(page_table),
        positions // page_size if columns is None else columns,
    )
    rows = np.clip(rows, 0, page_table.shape[0] - 1)
    columns = np.clip(columns, 0, page_table.shape[1] - 1)
    pages = page_table[rows, columns]
    return tuple(x.astype(np.int32) for x in (positions, pages, positions % page_size))


def _token_places(kv_lens, cu_q_lens, page_table, page_size, owner):
    kv_len, q_len, number = _spread(kv_lens, cu_q_lens, owner)
    return _places(kv_len - q_len + number, page_table, page_size, np.asarray(owner))


token_places = Exercise("3.2", _token_places, outputs=("positions", "pages", "slots"))
token_places.case(
    "two new tokens after seven cached ones",
    kv_lens=ints(9),
    cu_q_lens=ints(0, 2),
    page_table=np.array([[5, 2, 7]], np.int32),
    page_size=4,
    owner=ints(0, 0),
)
token_places.case(
    "a chunk of three after four cached tokens, beside a decode",
    kv_lens=ints(6, 7),
    cu_q_lens=ints(0, 1, 4),
    page_table=np.array([[5, 2], [9, 3]], np.int32),
    page_size=4,
    owner=ints(0, 1, 1, 1),
)
token_places.case(
    "a chunk that crosses a page, one that ends with it, a fresh prompt",
    kv_lens=ints(9, 8, 5),
    cu_q_lens=ints(0, 3, 5, 10),
    page_table=np.array([[6, 1, 8], [0, 7, 99], [4, 2, -1]], np.int32),
    page_size=4,
    owner=ints(0, 0, 0, 1, 1, 2, 2, 2, 2, 2),
)
token_places.case(
    "idle slots and pages of 16",
    kv_lens=ints(33, 0, 17, 16),
    cu_q_lens=ints(0, 1, 1, 3, 3),
    page_table=np.array([[3, 1, 4], [9, 9, 9], [2, 6, 5], [8, 7, 0]], np.int32),
    page_size=16,
    owner=ints(0, 2, 2),
)


@token_places.mistake("the cached prefix is forgotten: positions start at 0 with the new tokens")
def _no_prefix(kv_lens, cu_q_lens, page_table, page_size, owner):
    _, _, number = _spread(kv_lens, cu_q_lens, owner)
    return _places(number, page_table, page_size, np.asarray(owner))


@token_places.mistake("kv_len is taken for the cached tokens only; it includes the new ones")
def _kv_len_as_prefix(kv_lens, cu_q_lens, page_table, page_size, owner):
    kv_len, _, number = _spread(kv_lens, cu_q_lens, owner)
    return _places(kv_len + number, page_table, page_size, np.asarray(owner))


@token_places.mistake(
    "positions are counted from 1: with kv_len - q_len tokens before it, the first new token has "
    "exactly that position, since the first token of all has position 0"
)
def _counted_from_1(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions, _, _ = _token_places(kv_lens, cu_q_lens, page_table, page_size, owner)
    return _places(positions + 1, page_table, page_size, np.asarray(owner))


@token_places.mistake("every token of a chunk is put at the position of the first of them")
def _all_at_the_start(kv_lens, cu_q_lens, page_table, page_size, owner):
    kv_len, q_len, _ = _spread(kv_lens, cu_q_lens, owner)
    return _places(kv_len - q_len, page_table, page_size, np.asarray(owner))


@token_places.mistake(
    "every token of a chunk is put at the last position, which is right to decode"
)
def _all_at_the_end(kv_lens, cu_q_lens, page_table, page_size, owner):
    kv_len, _, _ = _spread(kv_lens, cu_q_lens, owner)
    return _places(kv_len - 1, page_table, page_size, np.asarray(owner))


@token_places.mistake("the row t is added without subtracting where the sequence starts")
def _row_of_the_batch(kv_lens, cu_q_lens, page_table, page_size, owner):
    kv_len, q_len, _ = _spread(kv_lens, cu_q_lens, owner)
    positions = kv_len - q_len + np.arange(len(kv_len))
    return _places(positions, page_table, page_size, np.asarray(owner))


@token_places.mistake(
    "the page of the sequence is returned: the page table, which knows the page of the cache, is "
    "not asked"
)
def _logical_page(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions, _, slots = _token_places(kv_lens, cu_q_lens, page_table, page_size, owner)
    return positions, positions // page_size, slots


@token_places.mistake(
    "the column of the page table is position % page_size, the slot; the column is the page of the "
    "sequence, position // page_size"
)
def _column_is_the_slot(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions, _, slots = _token_places(kv_lens, cu_q_lens, page_table, page_size, owner)
    return _places(positions, page_table, page_size, np.asarray(owner), columns=slots)


@token_places.mistake(
    "the slot is position // page_size, the page of the sequence; the row inside a page is what "
    "remains, position % page_size"
)
def _slot_is_the_column(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions, pages, _ = _token_places(kv_lens, cu_q_lens, page_table, page_size, owner)
    return positions, pages, positions // page_size


@token_places.mistake("row t of the page table is asked and not the row of the token's sequence")
def _table_row_of_the_token(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions, _, _ = _token_places(kv_lens, cu_q_lens, page_table, page_size, owner)
    return _places(positions, page_table, page_size, np.arange(len(positions)))


@token_places.mistake(
    "every token goes through row 0 of the page table, or through all rows as one"
)
def _table_row_0(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions, _, _ = _token_places(kv_lens, cu_q_lens, page_table, page_size, owner)
    flat = np.asarray(page_table).reshape(1, -1)
    return _places(positions, flat, page_size, np.zeros(len(positions), int))


@token_places.mistake("the slot counts from the first new token and not from the page's start")
def _slot_of_the_chunk(kv_lens, cu_q_lens, page_table, page_size, owner):
    positions, pages, _ = _token_places(kv_lens, cu_q_lens, page_table, page_size, owner)
    _, _, number = _spread(kv_lens, cu_q_lens, owner)
    return positions, pages, (number % page_size).astype(np.int32)


# 3.3 the causal mask of a ragged batch ------------------------------------------------------------


def _ragged_mask(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_owner, q_positions = _queries(kv_lens, cu_q_lens)
    same = q_owner[:, None] == np.asarray(kv_owner)[None, :]
    return same & (np.asarray(kv_positions)[None, :] <= q_positions[:, None])


def _queries(kv_lens, cu_q_lens):
    """Owner and position of every new token."""
    q_lens = np.diff(np.asarray(cu_q_lens))
    q_owner = np.repeat(np.arange(len(q_lens)), q_lens)
    kv_len, q_len, number = _spread(kv_lens, cu_q_lens, q_owner)
    return q_owner, kv_len - q_len + number


def _mask_arguments(kv_lens, q_lens):
    owners = np.repeat(np.arange(len(kv_lens)), kv_lens)
    positions = [np.arange(kv_len) for kv_len in kv_lens]
    return {
        "kv_lens": ints(*kv_lens),
        "cu_q_lens": _cu_q_lens(q_lens),
        "kv_owner": owners.astype(np.int32),
        "kv_positions": np.concatenate(positions).astype(np.int32),
    }


ragged_mask = Exercise("3.3", _ragged_mask, axes=("token", "key"))
ragged_mask.case("three new tokens after two cached", **_mask_arguments([5], [3]))
ragged_mask.case("a decode beside a fresh prompt", **_mask_arguments([3, 3], [1, 3]))
ragged_mask.case("the batch of the lesson", **_mask_arguments([6, 9, 7, 4], [1, 1, 3, 4]))
ragged_mask.case("idle slots", **_mask_arguments([5, 0, 3, 6], [2, 0, 0, 3]))


@ragged_mask.mistake("the causal mask ignores the cached prefix: token t sees the keys 0 to t only")
def _mask_without_prefix(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_lens = np.diff(np.asarray(cu_q_lens))
    return _ragged_mask(q_lens, cu_q_lens, kv_owner, kv_positions)


@ragged_mask.mistake("a token also sees the keys of other sequences")
def _mask_without_owner(kv_lens, cu_q_lens, kv_owner, kv_positions):
    _, q_positions = _queries(kv_lens, cu_q_lens)
    return np.asarray(kv_positions)[None, :] <= q_positions[:, None]


@ragged_mask.mistake("a token does not see itself: the comparison is < where it should be <=")
def _mask_without_itself(kv_lens, cu_q_lens, kv_owner, kv_positions):
    return _ragged_mask(np.asarray(kv_lens) - 1, cu_q_lens, kv_owner, kv_positions)


@ragged_mask.mistake("a token sees itself and the token after it: the comparison is one too far")
def _mask_one_too_far(kv_lens, cu_q_lens, kv_owner, kv_positions):
    return _ragged_mask(np.asarray(kv_lens) + 1, cu_q_lens, kv_owner, kv_positions)


@ragged_mask.mistake(
    "the comparison is turned round, >= where it should be <=: a token sees itself and what comes "
    "after it"
)
def _mask_of_the_future(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_owner, q_positions = _queries(kv_lens, cu_q_lens)
    same = q_owner[:, None] == np.asarray(kv_owner)[None, :]
    return same & (np.asarray(kv_positions)[None, :] >= q_positions[:, None])


@ragged_mask.mistake("the mask is inverted: it is True where a key is hidden")
def _mask_inverted(kv_lens, cu_q_lens, kv_owner, kv_positions):
    return ~_ragged_mask(kv_lens, cu_q_lens, kv_owner, kv_positions)


@ragged_mask.mistake(
    "every new token has the position of the first one, kv_len - q_len; each row counts one up"
)
def _mask_at_the_first(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_owner, _ = _queries(kv_lens, cu_q_lens)
    first = (np.asarray(kv_lens) - np.diff(np.asarray(cu_q_lens)))[q_owner]
    same = q_owner[:, None] == np.asarray(kv_owner)[None, :]
    return same & (np.asarray(kv_positions)[None, :] <= first[:, None])


@ragged_mask.mistake(
    "a token sees all of its sequence, later tokens too: there is no causal part, or kv_len was "
    "taken for the length of the cached prefix"
)
def _mask_without_causality(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_owner, _ = _queries(kv_lens, cu_q_lens)
    return q_owner[:, None] == np.asarray(kv_owner)[None, :]


@ragged_mask.mistake("only the cached prefix is visible, and none of the new tokens")
def _mask_of_the_prefix(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_owner, _ = _queries(kv_lens, cu_q_lens)
    prefix = (np.asarray(kv_lens) - np.diff(np.asarray(cu_q_lens)))[q_owner]
    same = q_owner[:, None] == np.asarray(kv_owner)[None, :]
    return same & (np.asarray(kv_positions)[None, :] < prefix[:, None])


@ragged_mask.mistake(
    "the row t is compared as if it were a position: it counts through the whole batch, and where "
    "the sequence starts was not subtracted"
)
def _mask_with_rows(kv_lens, cu_q_lens, kv_owner, kv_positions):
    q_owner, _ = _queries(kv_lens, cu_q_lens)
    kv_len, q_len, _ = _spread(kv_lens, cu_q_lens, q_owner)
    positions = kv_len - q_len + np.arange(len(q_owner))
    same = q_owner[:, None] == np.asarray(kv_owner)[None, :]
    return same & (np.asarray(kv_positions)[None, :] <= positions[:, None])


# 3.4 put a batch in order -------------------------------------------------------------------------


def _order_batch(q_lens, kv_lens, page_table, chunk_prefill_size):
    order = []
    for wanted in range(3):
        order += [s for s, q in enumerate(q_lens) if _kind(q, chunk_prefill_size) == wanted]
    return _in_order(order, q_lens, kv_lens, page_table, chunk_prefill_size)


def _kind(q_len, chunk_prefill_size):
    if q_len <= 1:
        return 0
    return 1 if q_len == chunk_prefill_size else 2


def _in_order(order, q_lens, kv_lens, page_table, chunk_prefill_size):
    kinds = np.array([_kind(q, chunk_prefill_size) for q in q_lens])
    ends = ints((kinds == 0).sum(), (kinds <= 1).sum(), len(kinds))
    order = np.array(order, np.int32)
    return order, kv_lens[order], page_table[order], _cu_q_lens(q_lens[order]), ends


order_batch = Exercise(
    "3.4",
    _order_batch,
    outputs=("order", "kv_lens", "page_table", "cu_q_lens", "distribution"),
    convert=np.array,
)
order_batch.case(
    "a fresh prompt, then a decode",
    q_lens=ints(4, 1),
    kv_lens=ints(4, 6),
    page_table=np.array([[8, 0], [2, 3]], np.int32),
    chunk_prefill_size=3,
)
order_batch.case(
    "the batch of the lesson",
    q_lens=ints(3, 1, 4, 1),
    kv_lens=ints(7, 6, 4, 9),
    page_table=np.array([[0, 1, 0], [2, 3, 0], [4, 0, 0], [5, 6, 7]], np.int32),
    chunk_prefill_size=3,
)
order_batch.case(
    "idle slots, short and long rests of prompts",
    q_lens=ints(9, 4, 0, 2, 1, 4, 3),
    kv_lens=ints(9, 8, 5, 7, 3, 4, 11),
    page_table=np.arange(21, dtype=np.int32).reshape(7, 3)[::-1].copy(),
    chunk_prefill_size=4,
)
order_batch.case(
    "decodes only",
    q_lens=ints(1, 1, 0),
    kv_lens=ints(3, 2, 1),
    page_table=np.array([[1], [2], [0]], np.int32),
    chunk_prefill_size=4,
)
# A sort of at most 16 numbers is an insertion sort in NumPy, which is stable by accident.
order_batch.case(
    "thirty sequences",
    q_lens=np.tile(ints(3, 1, 4), 10),
    kv_lens=np.arange(10, 40, dtype=np.int32),
    page_table=np.arange(30, dtype=np.int32)[::-1, None].copy(),
    chunk_prefill_size=3,
)


@order_batch.mistake(
    "the distribution counts the sequences of each kind; it should say where each range ends"
)
def _counts(q_lens, kv_lens, page_table, chunk_prefill_size):
    *rest, ends = _order_batch(q_lens, kv_lens, page_table, chunk_prefill_size)
    return *rest, np.diff(ends, prepend=0).astype(np.int32)


@order_batch.mistake("the page table still has its rows as the sequences arrived")
def _table_as_arrived(q_lens, kv_lens, page_table, chunk_prefill_size):
    order, lens, _, cu, ends = _order_batch(q_lens, kv_lens, page_table, chunk_prefill_size)
    return order, lens, page_table, cu, ends


@order_batch.mistake("the kv_lens still are as the sequences arrived")
def _kv_lens_as_arrived(q_lens, kv_lens, page_table, chunk_prefill_size):
    order, _, table, cu, ends = _order_batch(q_lens, kv_lens, page_table, chunk_prefill_size)
    return order, kv_lens, table, cu, ends


@order_batch.mistake("cu_q_lens sums the q_lens as they arrived, before they are put in order")
def _cu_as_arrived(q_lens, kv_lens, page_table, chunk_prefill_size):
    order, lens, table, _, ends = _order_batch(q_lens, kv_lens, page_table, chunk_prefill_size)
    return order, lens, table, _cu_q_lens(q_lens), ends


@order_batch.mistake("cu_q_lens lacks its leading 0, where the first sequence starts")
def _order_without_leading_zero(q_lens, kv_lens, page_table, chunk_prefill_size):
    order, lens, table, cu, ends = _order_batch(q_lens, kv_lens, page_table, chunk_prefill_size)
    return order, lens, table, cu[1:], ends


@order_batch.mistake(
    "the sequences are sorted by q_len and not by kind: a short rest of a prompt (mixed) then "
    "comes before a full chunk"
)
def _by_q_len(q_lens, kv_lens, page_table, chunk_prefill_size):
    order = np.argsort(q_lens, kind="stable")
    return _in_order(order, q_lens, kv_lens, page_table, chunk_prefill_size)


@order_batch.mistake("the order is upside down: mixed first, decode last")
def _upside_down(q_lens, kv_lens, page_table, chunk_prefill_size):
    kinds = np.array([_kind(q, chunk_prefill_size) for q in q_lens])
    order = np.argsort(-kinds, kind="stable")
    return _in_order(order, q_lens, kv_lens, page_table, chunk_prefill_size)


def _with_other_kinds(kinds, q_lens, kv_lens, page_table):
    order = np.argsort(kinds, kind="stable").astype(np.int32)
    ends = ints((kinds == 0).sum(), (kinds <= 1).sum(), len(kinds))
    return order, kv_lens[order], page_table[order], _cu_q_lens(q_lens[order]), ends


@order_batch.mistake(
    "an idle slot (q_len 0) is not counted among the decodes: there q_len is at most 1, not "
    "exactly 1"
)
def _idle_is_mixed(q_lens, kv_lens, page_table, chunk_prefill_size):
    kinds = np.where(q_lens == 1, 0, np.where(q_lens == chunk_prefill_size, 1, 2))
    return _with_other_kinds(kinds, q_lens, kv_lens, page_table)


@order_batch.mistake(
    'the sort is not stable: without kind="stable", np.argsort may change the order among equals, '
    "and does so from 17 sequences on, on some machines earlier"
)
def _unstable(q_lens, kv_lens, page_table, chunk_prefill_size):
    kinds = np.where(q_lens <= 1, 0, np.where(q_lens == chunk_prefill_size, 1, 2))
    order = np.argsort(kinds)
    return _in_order(order, q_lens, kv_lens, page_table, chunk_prefill_size)


@order_batch.mistake(
    "more tokens than a chunk count as a full chunk: only q_len == chunk_prefill_size is one, what "
    "is longer is mixed"
)
def _long_is_chunk(q_lens, kv_lens, page_table, chunk_prefill_size):
    kinds = np.where(q_lens <= 1, 0, np.where(q_lens >= chunk_prefill_size, 1, 2))
    return _with_other_kinds(kinds, q_lens, kv_lens, page_table)


@order_batch.mistake(
    "prompts' rests that are shorter than a chunk stand among the full chunks: legal, but a kernel "
    "that is built for full chunks computes empty rows for them"
)
def _short_is_chunk(q_lens, kv_lens, page_table, chunk_prefill_size):
    kinds = np.where(q_lens <= 1, 0, np.where(q_lens <= chunk_prefill_size, 1, 2))
    return _with_other_kinds(kinds, q_lens, kv_lens, page_table)


@order_batch.mistake(
    "order is turned round: order[s] should say which arrival stands at place s, not at which "
    "place arrival s stands"
)
def _inverse(q_lens, kv_lens, page_table, chunk_prefill_size):
    order, *rest = _order_batch(q_lens, kv_lens, page_table, chunk_prefill_size)
    return np.argsort(order).astype(np.int32), *rest


# 3.5 ragged paged attention -----------------------------------------------------------------------


def _np_store(keys, values, kv_cache, batch, table=None):
    """The cache with the new tokens in it; a mistake may go through a table of its own."""
    kv_cache, table = np.array(kv_cache), _table(batch) if table is None else table
    page_size = kv_cache.shape[1]
    for s, (start, end) in enumerate(_spans(batch)):
        first = int(batch.kv_lens[s]) - (end - start)
        for t in range(start, end):
            page, slot = divmod(first + t - start, page_size)
            token = kv_cache[table[s, page], slot]  # [2 * num_kv_heads, 1, lanes]
            token[:] = 0
            token[0::2, 0, : keys.shape[2]] = keys[t]
            token[1::2, 0, : keys.shape[2]] = values[t]
    return kv_cache


def _table(batch):
    return np.asarray(batch.page_indices).reshape(len(batch.kv_lens), -1)


def _spans(batch):
    cu_q_lens = np.asarray(batch.cu_q_lens)
    return [(int(cu_q_lens[s]), int(cu_q_lens[s + 1])) for s in range(int(batch.distribution[2]))]


def _np_attend(queries, kv_cache, batch, num_kv_heads, *, causal=True, kv_lens=None, table=None):
    """Attention of every sequence by the float64 oracle, on gathered pages."""
    table = _table(batch) if table is None else table
    kv_lens = np.asarray(batch.kv_lens) if kv_lens is None else kv_lens
    output = np.zeros(queries.shape, np.float32)
    for s, (start, end) in enumerate(_spans(batch)):
        pages = table[s, : cdiv(int(kv_lens[s]), kv_cache.shape[1])]
        tokens = kv_cache[pages].reshape(-1, *kv_cache.shape[2:])[: kv_lens[s], :, 0]
        k, v = tokens[:, 0 : 2 * num_kv_heads : 2], tokens[:, 1 : 2 * num_kv_heads : 2]
        k, v = k[..., : queries.shape[2]], v[..., : queries.shape[2]]
        output[start:end] = oracle(queries[start:end], k, v, causal=causal).output
    return output


def _ragged_attention(queries, keys, values, kv_cache, batch):
    queries, keys, values = (np.asarray(x) for x in (queries, keys, values))
    kv_cache = _np_store(keys, values, kv_cache, batch)
    return _np_attend(queries, kv_cache, batch, keys.shape[1]), kv_cache


def _attention_arguments(q_lens, kv_lens, page_table, *, num_tokens, max_num_seqs=4, free=None):
    """A case of 4 query heads and 2 KV heads of 8 in pages of 4; `free` is what no one owns."""
    batch, _ = RaggedBatch.from_lengths(
        q_lens, kv_lens, page_table, max_num_seqs=max_num_seqs, pages_per_seq=3
    )
    num_seqs = len(q_lens)
    # Unused slots may hold anything: here numbers that look like one more sequence.
    batch.kv_lens[num_seqs:], batch.cu_q_lens[num_seqs + 1 :] = 7, num_tokens
    kv_cache = normal(10, 4, 4, 1, 128) if free is None else np.full((10, 4, 4, 1, 128), free)
    for s, (start, end) in enumerate(_spans(batch)):
        for position in range(batch.kv_lens[s] - (end - start)):
            token = np.pad(normal(4, 1, 8), ((0, 0), (0, 0), (0, 120)))
            kv_cache[_table(batch)[s, position // 4], position % 4] = token
    return {
        "queries": 2 * normal(num_tokens, 4, 8),
        "keys": normal(num_tokens, 2, 8),
        "values": normal(num_tokens, 2, 8),
        "kv_cache": kv_cache.astype(np.float32),
        "batch": batch,
    }


ragged_attention = Exercise(
    "3.5", _ragged_attention, outputs=("output", "kv_cache"), place=ragged, tolerance=1e-5
)
ragged_attention.case("one decode step", **_attention_arguments([1], [3], [[2]], num_tokens=1))
ragged_attention.case(
    "a chunk of three that crosses a page, pages in any order",
    **_attention_arguments([3], [6], [[5, 1]], num_tokens=3),
)
ragged_attention.case(
    "a decode, a chunk, a fresh prompt, and one padding row",
    **_attention_arguments([1, 3, 4], [9, 7, 4], [[7, 2, 4], [0, 3], [6]], num_tokens=9),
)
ragged_attention.case(
    "an idle slot, full pages, and NaN wherever no sequence may look",
    **_attention_arguments(
        [1, 0, 4, 3], [8, 5, 12, 3], [[9, 1], [3, 8], [2, 7, 4], [5]], num_tokens=9, free=np.nan
    ),
)


@ragged_attention.mistake("attention reads the cache before the new tokens are stored in it")
def _reads_before_storing(queries, keys, values, kv_cache, batch):
    queries, old = np.asarray(queries), np.asarray(kv_cache)
    output = _np_attend(queries, old, batch, keys.shape[1])
    return output, _np_store(keys, values, kv_cache, batch)


@ragged_attention.mistake("keys and values are swapped: store_kv takes the keys first")
def _swaps_k_and_v(queries, keys, values, kv_cache, batch):
    kv_cache = _np_store(values, keys, kv_cache, batch)
    return _np_attend(np.asarray(queries), kv_cache, batch, keys.shape[1]), kv_cache


@ragged_attention.mistake("the cache that is returned is the old one, without the new tokens")
def _returns_old_cache(queries, keys, values, kv_cache, batch):
    output, _ = _ragged_attention(queries, keys, values, kv_cache, batch)
    return output, np.asarray(kv_cache)


@ragged_attention.mistake(
    "q_start is kv_len: then every new token counts as the last one, and sees those after it too"
)
def _starts_at_kv_len(queries, keys, values, kv_cache, batch):
    kv_cache = _np_store(keys, values, kv_cache, batch)
    return _np_attend(np.asarray(queries), kv_cache, batch, keys.shape[1], causal=False), kv_cache


@ragged_attention.mistake(
    "the new tokens are not among the keys: kv_len - q_len, the cached prefix, is passed as kv_len"
)
def _prefix_only(queries, keys, values, kv_cache, batch):
    kv_cache, lens = _np_store(keys, values, kv_cache, batch), np.array(batch.kv_lens)
    lens[: len(_spans(batch))] -= [end - start for start, end in _spans(batch)]
    queries, heads = np.asarray(queries), keys.shape[1]
    return _np_attend(queries, kv_cache, batch, heads, causal=False, kv_lens=lens), kv_cache


@ragged_attention.mistake(
    "the new tokens are counted twice: kv_lens includes them, and q_len is added once more"
)
def _counted_twice(queries, keys, values, kv_cache, batch):
    kv_cache, lens = _np_store(keys, values, kv_cache, batch), np.array(batch.kv_lens)
    lens[: len(_spans(batch))] += [end - start for start, end in _spans(batch)]
    return _np_attend(np.asarray(queries), kv_cache, batch, keys.shape[1], kv_lens=lens), kv_cache


@ragged_attention.mistake(
    "new tokens are stored in the page of the sequence (0, 1, ...) and not in the page of the "
    "cache that the page table names"
)
def _stores_by_logical_page(queries, keys, values, kv_cache, batch):
    logical = np.tile(np.arange(_table(batch).shape[1]), (len(batch.kv_lens), 1))
    kv_cache = _np_store(keys, values, kv_cache, batch, logical)
    return _np_attend(np.asarray(queries), kv_cache, batch, keys.shape[1]), kv_cache


@ragged_attention.mistake("q_start is 0: the new tokens stand before the cached prefix, not after")
def _starts_at_zero(queries, keys, values, kv_cache, batch):
    kv_cache = _np_store(keys, values, kv_cache, batch)
    q_lens = np.diff(np.asarray(batch.cu_q_lens))
    output = _np_attend(np.asarray(queries), kv_cache, batch, keys.shape[1], kv_lens=q_lens)
    return output, kv_cache


@ragged_attention.mistake(
    "padding rows are stored as well: they have no owner and land on token 0 of sequence 0"
)
def _stores_padding(queries, keys, values, kv_cache, batch):
    queries, keys, values = (np.asarray(x) for x in (queries, keys, values))
    kv_cache = _np_store(keys, values, kv_cache, batch)
    if _spans(batch)[-1][1] < len(keys):
        token = kv_cache[_table(batch)[0, 0], 0]
        token[:] = 0
        token[0::2, 0, : keys.shape[2]] = keys[-1]
        token[1::2, 0, : keys.shape[2]] = values[-1]
    return _np_attend(queries, kv_cache, batch, keys.shape[1]), kv_cache


@ragged_attention.mistake("rows that no sequence owns hand their query on; they should be zero")
def _padding_is_query(queries, keys, values, kv_cache, batch):
    output, kv_cache = _ragged_attention(queries, keys, values, kv_cache, batch)
    output[_spans(batch)[-1][1] :] = queries[_spans(batch)[-1][1] :]
    return output, kv_cache


@ragged_attention.mistake(
    "the loop runs over all slots (max_num_seqs): those from distribution[2] on hold garbage"
)
def _all_slots(queries, keys, values, kv_cache, batch):
    queries = np.asarray(queries)
    kv_cache = _np_store(keys, values, kv_cache, batch)
    all_of_them = replace(batch, distribution=ints(0, 0, len(batch.kv_lens)))
    return _np_attend(queries, kv_cache, all_of_them, keys.shape[1]), kv_cache


@ragged_attention.mistake("every sequence reads through row 0 of the page table")
def _one_row_for_all(queries, keys, values, kv_cache, batch):
    kv_cache = _np_store(keys, values, kv_cache, batch)
    table = np.repeat(_table(batch)[:1], len(batch.kv_lens), axis=0)
    return _np_attend(np.asarray(queries), kv_cache, batch, keys.shape[1], table=table), kv_cache


# 3.6 a rule for the validator ---------------------------------------------------------------------


def _shared_writes(kv_lens, cu_q_lens, page_table, page_size):
    written = _written(kv_lens, cu_q_lens, page_table, page_size)
    return written & _shared(cdiv(kv_lens, page_size), page_table)


def _written(kv_lens, cu_q_lens, page_table, page_size):
    """bool[num_seqs, pages_per_seq]: a live page that receives new tokens."""
    q_lens, live = np.diff(cu_q_lens), ~_from(cdiv(kv_lens, page_size), page_table)
    return live & _from((kv_lens - q_lens) // page_size, page_table) & (q_lens > 0)[:, None]


def _shared(num_pages, page_table):
    """bool[num_seqs, pages_per_seq]: the page stands twice in the first `num_pages` of the rows."""
    places = {}
    for s, row in enumerate(page_table):
        for p, page in enumerate(row[: num_pages[s]]):
            places.setdefault(int(page), []).append((s, p))
    found = np.zeros(page_table.shape, bool)
    for index in (index for group in places.values() if len(group) > 1 for index in group):
        found[index] = True
    return found


def _from(first_page, page_table):
    return np.arange(page_table.shape[1]) >= first_page[:, None]


shared_writes = Exercise(
    "3.6",
    _shared_writes,
    axes=("sequence", "page of the sequence"),
    convert=np.array,
)
shared_writes.case(
    "two decodes into one half-full page",
    kv_lens=ints(6, 6),
    cu_q_lens=ints(0, 1, 2),
    page_table=np.array([[3, 5], [3, 5]], np.int32),
    page_size=4,
)
shared_writes.case(
    "a shared prefix that is only read",
    kv_lens=ints(6, 9),
    cu_q_lens=ints(0, 1, 2),
    page_table=np.array([[3, 5, 0], [3, 2, 7]], np.int32),
    page_size=4,
)
shared_writes.case(
    "a page that one sequence writes and another one reads",
    kv_lens=ints(6, 9),
    cu_q_lens=ints(0, 1, 2),
    page_table=np.array([[3, 5, 0], [3, 5, 7]], np.int32),
    page_size=4,
)
shared_writes.case(
    "a chunk over three pages, the first of them shared",
    kv_lens=ints(10, 3),
    cu_q_lens=ints(0, 8, 9),
    page_table=np.array([[1, 4, 6], [1, 9, 9]], np.int32),
    page_size=4,
)
shared_writes.case(
    "an idle slot on a shared page, padding that is garbage",
    kv_lens=ints(5, 5, 8),
    cu_q_lens=ints(0, 0, 0, 1),
    page_table=np.array([[2, 7, -9], [2, 7, 6], [8, 6, 999]], np.int32),
    page_size=4,
)
shared_writes.case(
    "one page twice in a sequence, and a last page exactly full",
    kv_lens=ints(8, 8, 4),
    cu_q_lens=ints(0, 1, 5, 6),
    page_table=np.array([[5, 5], [3, 4], [3, 0]], np.int32),
    page_size=4,
)


@shared_writes.mistake("a shared page is reported though it is only read, which is legal")
def _reports_reads(kv_lens, cu_q_lens, page_table, page_size):
    return _shared(cdiv(kv_lens, page_size), page_table)


@shared_writes.mistake(
    "the padding of the page table counts: only the first ceil(kv_len / page_size) entries of a "
    "row mean something"
)
def _counts_padding(kv_lens, cu_q_lens, page_table, page_size):
    q_lens, width = np.diff(cu_q_lens), page_table.shape[1]
    written = _from((kv_lens - q_lens) // page_size, page_table) & (q_lens > 0)[:, None]
    return written & _shared(np.full(len(kv_lens), width), page_table)


@shared_writes.mistake("a page counts as shared that only stands in the padding of another row")
def _padding_owns(kv_lens, cu_q_lens, page_table, page_size):
    live = ~_from(cdiv(kv_lens, page_size), page_table)
    return live & _counts_padding(kv_lens, cu_q_lens, page_table, page_size)


@shared_writes.mistake(
    "only the pages that are written are counted: a page that one sequence writes and another one "
    "only reads is shared, too"
)
def _counts_written(kv_lens, cu_q_lens, page_table, page_size):
    written = _written(kv_lens, cu_q_lens, page_table, page_size)
    counts = Counter(page_table[written].tolist())
    return written & (np.vectorize(counts.__getitem__)(page_table) > 1)


@shared_writes.mistake(
    "a page that stands twice in its own row is left out: places of the table are counted, not "
    "sequences"
)
def _counts_sequences(kv_lens, cu_q_lens, page_table, page_size):
    live = ~_from(cdiv(kv_lens, page_size), page_table)
    counts = Counter(
        page for row, use in zip(page_table, live, strict=True) for page in set(row[use])
    )
    written = _written(kv_lens, cu_q_lens, page_table, page_size)
    return written & (np.vectorize(counts.__getitem__)(page_table) > 1)


@shared_writes.mistake(
    "every place of a page that is written is reported; only the writer's place is"
)
def _reports_readers(kv_lens, cu_q_lens, page_table, page_size):
    shared = _shared(cdiv(kv_lens, page_size), page_table)
    written = _written(kv_lens, cu_q_lens, page_table, page_size)
    return shared & np.isin(page_table, page_table[written])


@shared_writes.mistake("only the last page of a sequence is looked at; a chunk writes several")
def _last_page_only(kv_lens, cu_q_lens, page_table, page_size):
    found = _shared_writes(kv_lens, cu_q_lens, page_table, page_size)
    return found & _from(cdiv(kv_lens, page_size) - 1, page_table)


@shared_writes.mistake(
    "the page that new tokens share with cached ones is left out: the first page written is "
    "(kv_len - q_len) / page_size rounded down, not up"
)
def _rounds_up(kv_lens, cu_q_lens, page_table, page_size):
    first = cdiv(kv_lens - np.diff(cu_q_lens), page_size)
    return _from(first, page_table) & _shared(cdiv(kv_lens, page_size), page_table)


@shared_writes.mistake("an idle slot (q_len 0) is said to write its last page; it writes nothing")
def _idle_writes(kv_lens, cu_q_lens, page_table, page_size):
    first = (kv_lens - np.diff(cu_q_lens)) // page_size
    return _from(first, page_table) & _shared(cdiv(kv_lens, page_size), page_table)


# 3.7 swapped pages --------------------------------------------------------------------------------


def _kinds(kv_len, q_len, page_size):
    """For each live page: whether all of it is cached, and whether nothing of it is."""
    first = np.arange(cdiv(kv_len, page_size)) * page_size
    return first + page_size <= kv_len - q_len, first >= kv_len - q_len


def _pairs(*kinds):
    """Pairs of pages that are both of one of these kinds, and the diagonal."""
    found = np.eye(len(kinds[0]), dtype=bool)
    for kind in kinds:
        found |= np.outer(kind, kind)
    return found


def _harmless_swaps(kv_len, q_len, page_size):
    return _pairs(*_kinds(kv_len, q_len, page_size))


swaps = Exercise("3.7", _harmless_swaps, axes=("page", "page"), convert=np.array)
swaps.case("two cached pages, and one that is cached in part", kv_len=11, q_len=2, page_size=4)
swaps.case("a chunk that begins on a fresh page", kv_len=15, q_len=7, page_size=4)
swaps.case("a chunk that begins in the middle of a page", kv_len=21, q_len=15, page_size=4)
swaps.case("a decode that fills its page", kv_len=12, q_len=1, page_size=4)
swaps.case("a decode on a fresh page", kv_len=13, q_len=1, page_size=4)
swaps.case("a fresh prompt", kv_len=10, q_len=10, page_size=4)


@swaps.mistake(
    "the order of the cached pages is taken to matter; a softmax over keys knows no order, and "
    "each key was rotated by its position before it was stored"
)
def _all_harmful(kv_len, q_len, page_size):
    return np.eye(cdiv(kv_len, page_size), dtype=bool)


@swaps.mistake(
    "pages that the new tokens fill count as cached ones: exchanged with a cached page, they are "
    "stored over its tokens"
)
def _full_is_cached(kv_len, q_len, page_size):
    return _pairs((np.arange(cdiv(kv_len, page_size)) + 1) * page_size <= kv_len)


@swaps.mistake(
    "two pages without a cached token are left out: stored and read through the same table, they "
    "are another allocation"
)
def _new_left_out(kv_len, q_len, page_size):
    return _pairs(_kinds(kv_len, q_len, page_size)[0])


@swaps.mistake(
    "a page that is cached in part counts as cached: exchanged with a full one, its free rows are "
    "read and its new tokens are stored over old ones"
)
def _part_is_cached(kv_len, q_len, page_size):
    _, new = _kinds(kv_len, q_len, page_size)
    return _pairs(~new, new)


@swaps.mistake("a page that is cached in part counts as new: its cached tokens are lost")
def _part_is_new(kv_len, q_len, page_size):
    cached, _ = _kinds(kv_len, q_len, page_size)
    return _pairs(cached, ~cached)


@swaps.mistake("a cached page and a page of new tokens may be exchanged, which they may not")
def _all_pure(kv_len, q_len, page_size):
    cached, new = _kinds(kv_len, q_len, page_size)
    return _pairs(cached | new)


@swaps.mistake("the diagonal is False: a page exchanged with itself changes nothing")
def _no_diagonal(kv_len, q_len, page_size):
    return _harmless_swaps(kv_len, q_len, page_size) & ~np.eye(cdiv(kv_len, page_size), dtype=bool)
