"""Checks of chapter 7: the whole kernel.

References and mistakes are NumPy and plain Python, and say the same as the kernel by brute force.
"""

import operator
from functools import partial

import jax.numpy as jnp
import numpy as np

from rpa.check.chapters import assembly
from rpa.check.chapters.chapter05 import judge_overlap
from rpa.check.chapters.chapter06 import RAGGED_MISTAKES, wrong_ragged
from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise
from rpa.check.index_words import ragged
from rpa.check.sandbox import fast_compile, in_sandbox
from rpa.check.sandbox.dma import LIMIT_S
from rpa.dense import oracle
from rpa.paging import cdiv

RNG = np.random.default_rng(7)


def ints(*values):
    """i32[len(values)]."""
    return np.array(values, np.int32)


# 7.1 the keys of a query block --------------------------------------------------------------------


def _positions(kv_len, q_len, q_block, bq):
    """Positions of the query tokens of a block."""
    rows = np.arange(q_block * bq, min((q_block + 1) * bq, q_len))
    return kv_len - q_len + rows


def _block_keys(kv_len, q_len, q_block, bq, sliding_window):
    positions = _positions(kv_len, q_len, q_block, bq)
    return _first_seen(positions[0], sliding_window), int(positions[-1]) + 1


def _first_seen(position, sliding_window):
    """The first key that a query at `position` sees."""
    if sliding_window is None:
        return 0
    return next(k for k in range(position + 1) if position - k < sliding_window)


def _span(kv_len, q_len, q_block, bq, sliding_window):
    names = ("kv_len", "q_len", "q_block", "bq", "sliding_window")
    values = (kv_len, q_len, q_block, bq, sliding_window)
    return dict(zip(names, values, strict=True))


block_keys = Exercise("7.1", _block_keys, outputs=("kv_start", "kv_end"), convert=np.array)
block_keys.case("the first block of a chunk", **_span(10, 6, 0, 4, None))
block_keys.case("its last block, which is not full", **_span(10, 6, 1, 4, None))
block_keys.case("a decode", **_span(21, 1, 0, 1, None))
block_keys.case("the middle of a fresh prompt", **_span(40, 40, 2, 8, None))
block_keys.case("a window", **_span(30, 6, 0, 4, 7))
block_keys.case("a block as long as its window", **_span(30, 8, 0, 8, 7))
block_keys.case("a window larger than what there is", **_span(9, 4, 0, 4, 100))


@block_keys.mistake(
    "every block reads up to kv_len: a causal query sees nothing after itself, so the early blocks "
    "of a prompt end sooner"
)
def _reads_to_the_end(kv_len, q_len, q_block, bq, sliding_window):
    return _block_keys(kv_len, q_len, q_block, bq, sliding_window)[0], kv_len


@block_keys.mistake(
    "the last block is taken for a full one: it may hold fewer than bq tokens, and keys behind "
    "kv_len do not exist"
)
def _last_block_full(kv_len, q_len, q_block, bq, sliding_window):
    start, _ = _block_keys(kv_len, q_len, q_block, bq, sliding_window)
    return start, kv_len - q_len + (q_block + 1) * bq


@block_keys.mistake(
    "the cached prefix is forgotten: the first query stands at kv_len - q_len, not at 0"
)
def _prefix_forgotten(kv_len, q_len, q_block, bq, sliding_window):
    return _block_keys(q_len, q_len, q_block, bq, sliding_window)


@block_keys.mistake("kv_end is the last key that is read; it should be one past it")
def _end_is_last(kv_len, q_len, q_block, bq, sliding_window):
    start, end = _block_keys(kv_len, q_len, q_block, bq, sliding_window)
    return start, end - 1


@block_keys.mistake(
    "the window of the last query decides where the block begins to read; the first query sees the "
    "earliest keys"
)
def _window_of_last(kv_len, q_len, q_block, bq, sliding_window):
    last = _positions(kv_len, q_len, q_block, bq)[-1]
    _, end = _block_keys(kv_len, q_len, q_block, bq, sliding_window)
    return _first_seen(last, sliding_window), end


@block_keys.mistake(
    "the window is one key too long: it counts the query's own token, so the first key is "
    "position - sliding_window + 1"
)
def _window_too_long(kv_len, q_len, q_block, bq, sliding_window):
    window = None if sliding_window is None else sliding_window + 1
    return _block_keys(kv_len, q_len, q_block, bq, window)


@block_keys.mistake(
    "the window is one key too short: it counts the query's own token, so the first key is "
    "position - sliding_window + 1 and not the one after it"
)
def _window_too_short(kv_len, q_len, q_block, bq, sliding_window):
    window = None if sliding_window is None else sliding_window - 1
    return _block_keys(kv_len, q_len, q_block, bq, window)


@block_keys.mistake("the window is not thought of: with one, kv_start is not 0")
def _no_window(kv_len, q_len, q_block, bq, sliding_window):
    return _block_keys(kv_len, q_len, q_block, bq, None)


@block_keys.mistake("kv_start is negative where the window is longer than what there is")
def _negative(kv_len, q_len, q_block, bq, sliding_window):
    start, end = _block_keys(kv_len, q_len, q_block, bq, sliding_window)
    if sliding_window is not None:
        first = int(_positions(kv_len, q_len, q_block, bq)[0]) - sliding_window + 1
        start = first
    return start, end


@block_keys.mistake(
    "every block is taken for the first one: block q_block begins q_block * bq later"
)
def _first_block_only(kv_len, q_len, q_block, bq, sliding_window):
    return _block_keys(kv_len, q_len, 0, bq, sliding_window)


@block_keys.mistake(
    "the window is counted from kv_len, as for a decode; the block's first query stands earlier"
)
def _window_from_kv_len(kv_len, q_len, q_block, bq, sliding_window):
    _, end = _block_keys(kv_len, q_len, q_block, bq, sliding_window)
    return _first_seen(kv_len - 1, sliding_window), end


# 7.2 the next step --------------------------------------------------------------------------------


def _all_steps(q_lens, kv_lens, bq, bkv):
    """Every (sequence, query block, KV block) of a batch, in order."""
    steps = []
    for s, (q_len, kv_len) in enumerate(zip(q_lens.tolist(), kv_lens.tolist(), strict=True)):
        for q in range(cdiv(q_len, bq)):
            end = kv_len - q_len + min((q + 1) * bq, q_len)
            steps += [(s, q, b) for b in range(cdiv(end, bkv))]
    return steps


def _next_step(q_lens, kv_lens, bq, bkv, seq, q_block, kv_block):
    """Look the step up in the list of all, and take the one behind it."""
    steps = [*_all_steps(q_lens, kv_lens, bq, bkv), (len(q_lens), 0, 0)]
    return steps[steps.index((seq, q_block, kv_block)) + 1]


def _at(q_lens, kv_lens, step, bq=4, bkv=8):
    seq, q_block, kv_block = step
    lens = {"q_lens": ints(*q_lens), "kv_lens": ints(*kv_lens), "bq": bq, "bkv": bkv}
    return lens | {"seq": seq, "q_block": q_block, "kv_block": kv_block}


next_step = Exercise("7.2", _next_step, outputs=("seq", "q_block", "kv_block"), convert=np.array)
# Numbers are chosen so that no likely wrong step is the right one in another order.
next_step.case("the next KV block of a decode", **_at([1, 1, 1], [7, 9, 20], (2, 0, 0)))
next_step.case("the next sequence", **_at([1, 1, 1], [9, 20, 3], (1, 0, 2)))
next_step.case("the next query block of a chunk", **_at([14], [30], (0, 1, 2)))
next_step.case("the second query block of four", **_at([16], [23], (0, 1, 1)))
next_step.case("a query block that needs one KV block more", **_at([8], [21], (0, 0, 1)))
next_step.case(
    "an early query block, which sees less than there is", **_at([12, 1], [20, 5], (0, 0, 1))
)
next_step.case("a last query block that is not full", **_at([1, 6], [9, 18], (1, 0, 1)))
next_step.case("after it, a decode", **_at([6, 1], [15, 9], (0, 1, 1)))
next_step.case("a last query block that is full, then a decode", **_at([8, 1], [16, 9], (0, 1, 1)))
next_step.case("two idle slots in between", **_at([1, 0, 0, 3], [7, 9, 0, 3], (0, 0, 0)))
next_step.case("a KV block that ends with a sequence", **_at([1, 1], [16, 3], (0, 0, 1)))
next_step.case("the last step of the batch", **_at([1, 5], [7, 13], (1, 1, 1)))
next_step.case("only idle slots are left", **_at([2, 0, 0], [8, 3, 0], (0, 0, 0)))


def _block_end(q_len, kv_len, bq, q_block):
    """Where the keys end that a query block sees."""
    return kv_len - q_len + min((q_block + 1) * bq, q_len)


def _one_more(a, b):
    """`cdiv`, but for a whole number of b, where it is one too many."""
    return a // b + 1


def _odometer(
    q_lens, kv_lens, bq, bkv, seq, q_block, kv_block, *,
    end=_block_end, num_kv=cdiv, num_q=cdiv, most_idle=-1, keeps_kv=False, keeps_q=False,
):  # fmt: skip
    """The next step as one writes it down, with a screw for each thing that may be forgotten."""
    q_len, kv_len = int(q_lens[seq]), int(kv_lens[seq])
    if kv_block + 1 < num_kv(end(q_len, kv_len, bq, q_block), bkv):
        return seq, q_block, kv_block + 1
    if q_block + 1 < num_q(q_len, bq):
        return seq, q_block + 1, kv_block if keeps_kv else 0
    seq, passed = seq + 1, 0
    while seq < len(q_lens) and q_lens[seq] == 0 and passed != most_idle:
        seq, passed = seq + 1, passed + 1
    return seq, q_block if keeps_q else 0, 0


def _wrong_step(words, **screws):
    next_step.mistake(words)(partial(_odometer, **screws))


_wrong_step(
    "an idle slot (q_len 0) is visited: it has no query block, and the kernel would wait for a "
    "copy that nobody starts",
    most_idle=0,
)
_wrong_step("only one idle slot is passed over; there may be several in a row", most_idle=1)
_wrong_step(
    "every query block goes on to kv_len: a causal one ends at its own last token, and what comes "
    "after that it does not see",
    end=lambda q_len, kv_len, bq, q_block: kv_len,
)
_wrong_step(
    "the cached prefix is forgotten: the first new token stands at kv_len - q_len, not at 0",
    end=lambda q_len, kv_len, bq, q_block: min((q_block + 1) * bq, q_len),
)
_wrong_step(
    "the last query block is taken for a full one: it ends with the sequence, so min(..., q_len)",
    end=lambda q_len, kv_len, bq, q_block: kv_len - q_len + (q_block + 1) * bq,
)
_wrong_step(
    "a query block ends where it begins: block q_block ends with token (q_block + 1) * bq",
    end=lambda q_len, kv_len, bq, q_block: kv_len - q_len + q_block * bq,
)
_wrong_step(
    "the end of the next query block is taken: block q_block ends with token (q_block + 1) * bq, "
    "so a later block's keys, which it does not see, are fetched",
    end=lambda q_len, kv_len, bq, q_block: kv_len - q_len + min((q_block + 2) * bq, q_len),
)
_wrong_step("the KV blocks are not begun anew with a new query block", keeps_kv=True)
_wrong_step("the query blocks are not begun anew with a new sequence", keeps_q=True)
_wrong_step(
    "the sequence ends with the KV blocks of one query block: there may be more query blocks",
    num_q=lambda q_len, bq: 1,
)
_wrong_step(
    "a query block that is not full is left out: q_len / bq is rounded down, not up",
    num_q=operator.floordiv,
)
_wrong_step(
    "there is one query block too many: where q_len ends exactly with a block, no other one "
    "follows",
    num_q=_one_more,
)
_wrong_step(
    "every sequence has one query block too many: their numbers end at cdiv(q_len, bq) - 1",
    num_q=lambda q_len, bq: cdiv(q_len, bq) + 1,
)
_wrong_step(
    "every query block has one KV block too many: their numbers end at cdiv(end, bkv) - 1",
    num_kv=lambda end, bkv: cdiv(end, bkv) + 1,
)
_wrong_step(
    "there is one KV block too many: where the keys end exactly with a block, no other one follows",
    num_kv=_one_more,
)


# 7.3 which tiles need a mask ----------------------------------------------------------------------


def _visible(q_position, bq_c, kv_position, bkv_c, sliding_window):
    """bool[bq_c, bkv_c], pair by pair."""
    q = q_position + np.arange(bq_c)[:, None]
    k = kv_position + np.arange(bkv_c)[None, :]
    seen = k <= q
    return seen if sliding_window is None else seen & (q - k < sliding_window)


def _kind(seen):
    return "interior" if seen.all() else "masked" if seen.any() else "skip"


def _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window):
    return _kind(_visible(q_position, bq_c, kv_position, bkv_c, sliding_window))


def _tile(q_position, bq_c, kv_position, bkv_c, sliding_window=None):
    names = ("q_position", "bq_c", "kv_position", "bkv_c", "sliding_window")
    values = (q_position, bq_c, kv_position, bkv_c, sliding_window)
    return dict(zip(names, values, strict=True))


tile_kind = Exercise("7.3", _tile_kind, convert=np.array)
tile_kind.case("keys long before the queries", **_tile(8, 4, 0, 4))
tile_kind.case("the diagonal", **_tile(8, 4, 8, 4))
tile_kind.case("keys long after the queries", **_tile(8, 4, 16, 4))
tile_kind.case("keys that end with the first query's own", **_tile(7, 4, 4, 4))
tile_kind.case("keys that begin with the last query's own", **_tile(5, 4, 8, 4))
tile_kind.case("keys that begin between the first query and the last", **_tile(5, 4, 6, 4))
tile_kind.case("keys that begin one after the last query", **_tile(4, 4, 8, 4))
tile_kind.case("a decode", **_tile(9, 1, 8, 4))
tile_kind.case("before the window", **_tile(40, 4, 0, 8, 16))
tile_kind.case("where the window begins", **_tile(40, 4, 24, 8, 16))
tile_kind.case("inside of the window", **_tile(40, 4, 32, 8, 16))
tile_kind.case("the last key that the window leaves", **_tile(40, 4, 18, 8, 16))
tile_kind.case("one key further back", **_tile(40, 4, 17, 8, 16))
tile_kind.case("the last query sees the first key just so", **_tile(40, 4, 28, 8, 16))
tile_kind.case("and here it does not", **_tile(40, 4, 27, 8, 16))


@tile_kind.mistake("a tile without a visible pair is computed and masked: skip it")
def _never_skips(q_position, bq_c, kv_position, bkv_c, sliding_window):
    seen = _visible(q_position, bq_c, kv_position, bkv_c, sliding_window)
    return "interior" if seen.all() else "masked"


@tile_kind.mistake("every tile that is computed is masked: most of them need no mask")
def _always_masked(q_position, bq_c, kv_position, bkv_c, sliding_window):
    seen = _visible(q_position, bq_c, kv_position, bkv_c, sliding_window)
    return "masked" if seen.any() else "skip"


@tile_kind.mistake("the window is not thought of")
def _window_ignored(q_position, bq_c, kv_position, bkv_c, sliding_window):
    return _tile_kind(q_position, bq_c, kv_position, bkv_c, None)


@tile_kind.mistake(
    "the first query decides what is skipped; the last one sees the most keys on the right"
)
def _skips_by_first(q_position, bq_c, kv_position, bkv_c, sliding_window):
    if kv_position > q_position:
        return "skip"
    return _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window)


@tile_kind.mistake(
    "the last query decides what needs no mask; the first one sees the fewest keys on the right"
)
def _interior_by_last(q_position, bq_c, kv_position, bkv_c, sliding_window):
    kind = _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window)
    last_sees = _tile_kind(q_position + bq_c - 1, 1, kv_position, bkv_c, sliding_window)
    return "interior" if last_sees == "interior" else kind


@tile_kind.mistake("a token does not see itself: the comparison is < where it should be <=")
def _not_itself(q_position, bq_c, kv_position, bkv_c, sliding_window):
    window = None if sliding_window is None else sliding_window - 1
    return _tile_kind(q_position - 1, bq_c, kv_position, bkv_c, window)


@tile_kind.mistake("the window is one key too long: it counts the query's own token")
def _window_long(q_position, bq_c, kv_position, bkv_c, sliding_window):
    window = None if sliding_window is None else sliding_window + 1
    return _tile_kind(q_position, bq_c, kv_position, bkv_c, window)


@tile_kind.mistake(
    "a tile at distance 0 is skipped: the last query sees the first key if it is its own, so skip "
    "only where the largest distance is below 0"
)
def _skips_own_key(q_position, bq_c, kv_position, bkv_c, sliding_window):
    if q_position + bq_c - 1 == kv_position:
        return "skip"
    return _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window)


@tile_kind.mistake(
    "a tile whose largest distance is just the window is taken for interior: a visible pair is "
    "*less* than sliding_window apart"
)
def _interior_at_window(q_position, bq_c, kv_position, bkv_c, sliding_window):
    if q_position + bq_c - 1 - kv_position == sliding_window:
        return _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window + 1)
    return _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window)


@tile_kind.mistake(
    "a tile is skipped as soon as one pair is outside of the window: it is when the pair with the "
    "smallest distance is"
)
def _skips_by_largest(q_position, bq_c, kv_position, bkv_c, sliding_window):
    if sliding_window is not None and q_position + bq_c - 1 - kv_position >= sliding_window:
        return "skip"
    return _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window)


@tile_kind.mistake('"interior" and "masked" are swapped: interior tiles are those without a mask')
def _names_swapped(q_position, bq_c, kv_position, bkv_c, sliding_window):
    kind = _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window)
    return {"interior": "masked", "masked": "interior"}.get(kind, kind)


@tile_kind.mistake("the last query is taken one too late: it stands at q_position + bq_c - 1")
def _last_query_too_late(q_position, bq_c, kv_position, bkv_c, sliding_window):
    if q_position + bq_c == kv_position:
        return "masked"
    return _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window)


# 7.4 the distribution of a batch whose order is fixed ---------------------------------------------


def _distribution(q_lens, chunk_prefill_size):
    i = 0
    while i < len(q_lens) and q_lens[i] <= 1:
        i += 1
    j = i
    while chunk_prefill_size is not None and j < len(q_lens) and q_lens[j] <= chunk_prefill_size:
        j += 1
    return ints(i, j, len(q_lens))


distribution = Exercise("7.4", _distribution, axes=("entry",), convert=np.array)
distribution.case("two decodes, a chunk, a rest", q_lens=ints(1, 1, 4, 9), chunk_prefill_size=4)
distribution.case("a decode that came too late", q_lens=ints(1, 4, 4, 7, 1), chunk_prefill_size=4)
distribution.case("an idle slot in front", q_lens=ints(0, 1, 0, 4), chunk_prefill_size=4)
distribution.case(
    "a short chunk and a decode among full ones",
    q_lens=ints(1, 4, 2, 1, 4, 6),
    chunk_prefill_size=4,
)
distribution.case("no kernel for chunks", q_lens=ints(1, 4, 4), chunk_prefill_size=None)
distribution.case("nothing but a prompt", q_lens=ints(9, 1), chunk_prefill_size=4)
distribution.case("nothing but decodes", q_lens=ints(1, 1, 1), chunk_prefill_size=4)
distribution.case("nothing but chunks", q_lens=ints(4, 3), chunk_prefill_size=4)


@distribution.mistake("the three numbers count; they should say where each range ends")
def _counts(q_lens, chunk_prefill_size):
    i, j, k = _distribution(q_lens, chunk_prefill_size)
    return ints(i, j - i, k - j)


@distribution.mistake(
    "all decodes are counted, wherever they stand, as if the batch were sorted: only those in "
    "front are in the first range, or the decode kernel would compute somebody's prompt"
)
def _counts_all(q_lens, chunk_prefill_size):
    i = int((q_lens <= 1).sum())
    chunk = 1 if chunk_prefill_size is None else chunk_prefill_size
    return ints(i, max(i, int((q_lens <= chunk).sum())), len(q_lens))


@distribution.mistake("an idle slot ends the decode range: q_len 0 is legal there, it is skipped")
def _idle_ends(q_lens, chunk_prefill_size):
    _, j, k = _distribution(q_lens, chunk_prefill_size)
    decodes = q_lens == 1
    return ints(len(q_lens) if decodes.all() else int(np.argmin(decodes)), j, k)


@distribution.mistake(
    "only full chunks are in the second range; a kernel for chunks of that size takes shorter "
    "ones, too (and a decode)"
)
def _only_full_chunks(q_lens, chunk_prefill_size):
    i, j, k = (int(x) for x in _distribution(q_lens, chunk_prefill_size))
    while i < j and (q_lens[i:j] != chunk_prefill_size).any():
        j -= 1
    return ints(i, j, k)


@distribution.mistake(
    "without a chunk_prefill_size there is no kernel for the second range: j is i"
)
def _chunks_without_kernel(q_lens, chunk_prefill_size):
    if chunk_prefill_size is None:
        return ints(_distribution(q_lens, None)[0], len(q_lens), len(q_lens))
    return _distribution(q_lens, chunk_prefill_size)


@distribution.mistake(
    "i counts all decodes, wherever they stand, and the chunks are looked for behind that many: "
    "only those in front are in the first range, or the decode kernel would compute somebody's "
    "prompt"
)
def _counts_decodes(q_lens, chunk_prefill_size):
    i = int((q_lens <= 1).sum())
    rest = _distribution(np.maximum(q_lens[i:], 2), chunk_prefill_size)
    return ints(i, i + rest[1], len(q_lens))


@distribution.mistake("a chunk of just chunk_prefill_size ends the second range: <= and not <")
def _full_chunk_ends(q_lens, chunk_prefill_size):
    size = None if chunk_prefill_size is None else chunk_prefill_size - 1
    return _distribution(q_lens, size)


@distribution.mistake(
    "a decode ends the second range: the kernel for chunks takes whatever is not too long"
)
def _decode_ends_chunks(q_lens, chunk_prefill_size):
    i, j, k = (int(x) for x in _distribution(q_lens, chunk_prefill_size))
    short = [n for n in range(i, j) if q_lens[n] <= 1]
    return ints(i, min([j, *short]), k)


@distribution.mistake("idle slots are not counted in k: it is where the last range ends, a slot")
def _without_idle(q_lens, chunk_prefill_size):
    i, j, _ = _distribution(q_lens, chunk_prefill_size)
    return ints(i, j, int((q_lens > 0).sum()))


@distribution.mistake("a decode is not counted as one: it has one new token, so <= 1 and not < 1")
def _no_decode(q_lens, chunk_prefill_size):
    i = int(np.logical_and.accumulate(q_lens < 1).sum())
    rest = _distribution(np.maximum(q_lens[i:], 2), chunk_prefill_size)
    return ints(i, i + rest[1], len(q_lens))


@distribution.mistake(
    "without a chunk_prefill_size j is 0: the ranges are neighbours, so an empty one begins and "
    "ends at i"
)
def _j_is_zero(q_lens, chunk_prefill_size):
    i, j, k = _distribution(q_lens, chunk_prefill_size)
    return ints(i, 0 if chunk_prefill_size is None else j, k)


# 7.5 run it ---------------------------------------------------------------------------------------


def _arrival_spans(q_lens):
    ends = np.cumsum(q_lens)
    return [(int(end - q_len), int(end)) for q_len, end in zip(q_lens, ends, strict=True)]


GIVEN_AWAY = (
    "your function gives the caller's cache away: unless it is told donate=False, rung 7 updates "
    "the cache in place, and the array that it was called with is deleted"
)


def _numpy_step(
    queries, keys, values, kv_cache, q_lens, kv_lens, page_table, *, sm_scale=None, rows=None
):
    """Store and attend, sequence after sequence; `rows` says whose tokens each sequence takes."""
    queries, keys, values = (np.asarray(x) for x in (queries, keys, values))
    cache, output = np.array(kv_cache), np.zeros(queries.shape, np.float32)
    page_size, num_kv_heads, head_dim = cache.shape[1], keys.shape[1], queries.shape[2]
    sm_scale = head_dim**-0.5 if sm_scale is None else sm_scale
    for s, (start, end) in enumerate(_arrival_spans(q_lens) if rows is None else rows):
        positions = int(kv_lens[s]) - (end - start) + np.arange(end - start)
        pages, slots = np.asarray(page_table)[s, positions // page_size], positions % page_size
        cache[pages, slots] = 0
        cache[pages, slots, 0::2, 0, :head_dim] = keys[start:end]
        cache[pages, slots, 1::2, 0, :head_dim] = values[start:end]
        tokens = cache[page_table[s]].reshape(-1, *cache.shape[2:])[: int(kv_lens[s]), :, 0]
        k, v = tokens[:, 0 : 2 * num_kv_heads : 2], tokens[:, 1 : 2 * num_kv_heads : 2]
        k, v = k[..., :head_dim], v[..., :head_dim]
        output[start:end] = oracle(queries[start:end], k, v, sm_scale=sm_scale).output
    return output, cache


def _serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    return _numpy_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table)


def _step_arguments(q_lens, kv_lens, page_table):
    """A case of 2 query heads and a KV head of 64, rows of two pages of 128; lengths stay NumPy.

    Every head, and every page of a block, is code that has to be compiled.
    """
    num_tokens, kv_cache = sum(q_lens), RNG.standard_normal((8, 128, 2, 1, 128))
    kv_cache[..., 64:] = 0
    return {
        "queries": RNG.standard_normal((num_tokens, 2, 64)).astype(np.float32),
        "keys": RNG.standard_normal((num_tokens, 1, 64)).astype(np.float32),
        "values": RNG.standard_normal((num_tokens, 1, 64)).astype(np.float32),
        "kv_cache": kv_cache.astype(np.float32),
        "q_lens": ints(*q_lens),
        "kv_lens": ints(*kv_lens),
        "page_table": np.array(page_table, np.int32),
    }


def drive_step(function, queries, keys, values, kv_cache, *lengths):
    """The results of a step by the learner's function, or by a model of it."""
    if function.__module__ == __name__:
        return function(queries, keys, values, kv_cache, *lengths)
    callers = jnp.array(kv_cache)
    with fast_compile.rung_7():
        results = function(queries, keys, values, callers, *lengths)
    if callers.is_deleted():
        raise WrongResult(GIVEN_AWAY)
    return results


serve_step = Exercise(
    "7.5",
    _serve_step,
    outputs=("output", "kv_cache"),
    axes=("token", "head", "lane"),
    convert=np.array,
    drive=drive_step,
    limit_s=120.0,
)
serve_step.case(
    "two decodes and a chunk, in order",
    **_step_arguments([1, 1, 6], [5, 217, 133], [[3, 0], [7, 1], [2, 5]]),
)
serve_step.case(
    "a prompt arrives first, and a chunk last",
    **_step_arguments([4, 1, 3], [4, 140, 250], [[6, 0], [4, 3], [2, 5]]),
)


def _order(q_lens):
    return np.argsort(np.asarray(q_lens) > 1, kind="stable")


def _sorted_spans(q_lens):
    """Where each arrival's tokens stand once the decodes are in front."""
    order, spans = _order(q_lens), [None] * len(q_lens)
    ends = np.cumsum(np.asarray(q_lens)[order])
    for place, s in enumerate(order):
        spans[s] = (int(ends[place] - q_lens[s]), int(ends[place]))
    return spans


def _rows_in_order(q_lens):
    """Row of the arrival for each row of the ordered batch."""
    spans = _arrival_spans(q_lens)
    return np.concatenate([np.arange(*spans[s]) for s in _order(q_lens)])


@serve_step.mistake("sm_scale is left at its default, 1; attention divides by sqrt(head_dim)")
def _no_scale(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    return _numpy_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table, sm_scale=1.0)


@serve_step.mistake(
    "the sequences were put in order, and the tokens were not: everybody is answered with somebody "
    "else's words"
)
def _tokens_not_ordered(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    output, cache = _numpy_step(
        queries, keys, values, kv_cache, q_lens, kv_lens, page_table, rows=_sorted_spans(q_lens)
    )
    back = np.empty_like(output)
    back[_rows_in_order(q_lens)] = output
    return back, cache


@serve_step.mistake(
    "neither the tokens were put in order nor the output put back: the sequences alone were"
)
def _nothing_ordered(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    return _numpy_step(
        queries, keys, values, kv_cache, q_lens, kv_lens, page_table, rows=_sorted_spans(q_lens)
    )


@serve_step.mistake("the output is in the order of the batch; the caller wants that of the arrival")
def _output_not_put_back(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    output, cache = _serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table)
    return output[_rows_in_order(q_lens)], cache


@serve_step.mistake(
    "the output is put back with rows instead of its inverse: output[rows] orders once more"
)
def _ordered_twice(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    output, cache = _serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table)
    rows = _rows_in_order(q_lens)
    return output[rows][rows], cache


@serve_step.mistake("the cache that is returned is the old one, without the new tokens")
def _old_cache(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    output, _ = _serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, page_table)
    return output, np.array(kv_cache)


@serve_step.mistake("keys and values are swapped")
def _swapped(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    return _numpy_step(queries, values, keys, kv_cache, q_lens, kv_lens, page_table)


@serve_step.mistake(
    "the scale is that of a row of the cache, which is padded to 128 lanes: heads have head_dim of "
    "them, queries.shape[-1]"
)
def _scaled_by_lanes(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    arguments = queries, keys, values, kv_cache, q_lens, kv_lens, page_table
    return _numpy_step(*arguments, sm_scale=kv_cache.shape[-1] ** -0.5)


@serve_step.mistake(
    "the page table is passed as it arrived, and the sequences are in another order: everybody "
    "gets somebody else's pages. batch.page_indices has its rows in order"
)
def _table_not_ordered(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    table = np.asarray(page_table)[np.argsort(_order(q_lens))]
    return _serve_step(queries, keys, values, kv_cache, q_lens, kv_lens, table)


@serve_step.mistake(
    "the kv_lens are passed as they arrived, and the sequences are in another order: batch.kv_lens"
)
def _lens_not_ordered(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    lens = np.asarray(kv_lens)[np.argsort(_order(q_lens))]
    return _serve_step(queries, keys, values, kv_cache, q_lens, lens, page_table)


@serve_step.mistake("the queries were put in order, and keys and values were not")
def _only_queries_ordered(queries, keys, values, kv_cache, q_lens, kv_lens, page_table):
    back = np.argsort(_rows_in_order(q_lens))
    new = np.asarray(keys)[back], np.asarray(values)[back]
    return _serve_step(queries, *new, kv_cache, q_lens, kv_lens, page_table)


# 7.6 your own kernel for any batch ----------------------------------------------------------------


def _query_blocks(
    starts, q_lens, kv_lens, num_tokens, block_q, *, num_blocks=None, kv_end=None, first_new=None,
    offset=None, absent=0,
):  # fmt: skip
    """One block after the other, in plain Python; absent: what a block that is not there reads."""
    num_blocks = num_blocks or (lambda q_len: cdiv(q_len, block_q))
    kv_end = kv_end or (lambda kv_len, position: min(kv_len, position + block_q))
    first_new = first_new or (lambda kv_len, q_len: kv_len - q_len)
    offset = offset or (lambda i: i * block_q)
    columns = []
    for s, (start, q_len, kv_len) in enumerate(zip(starts, q_lens, kv_lens, strict=True)):
        for i in range(num_blocks(int(q_len))):
            new = first_new(int(kv_len), int(q_len))
            position = new + offset(i)
            columns.append((kv_end(kv_len, position), position, new, start + offset(i), s))
    room = cdiv(num_tokens, block_q) + len(q_lens) - len(columns)
    columns += [(absent, 0, 0, num_tokens, 0)] * room
    fields = [np.array(field, np.int32) for field in zip(*columns, strict=True)]
    exists = fields[3] < num_tokens  # of the others only kv_end and row are asked
    return tuple(f if i in (0, 3) else np.where(exists, f, 0) for i, f in enumerate(fields))


def drive_blocks(function, starts, q_lens, kv_lens, num_tokens, block_q):
    """The learner's columns, with zeros where a field of a block that is not there is free."""
    fields = function(starts, q_lens, kv_lens, num_tokens, block_q)
    if not isinstance(fields, tuple | list) or len(fields) != 5:
        raise WrongResult(
            "expected five arrays: kv_end, position, first_new, row and seqs, in this order"
        )
    kv_end, position, first_new, row, seqs = (np.asarray(field) for field in fields)
    if len({field.shape for field in (kv_end, position, first_new, row, seqs)}) > 1:
        shapes = ", ".join(str(np.shape(field)) for field in fields)
        raise WrongResult(f"expected five arrays of one length, and these have {shapes}")
    there = row < num_tokens
    fields = (np.where(there, f, 0) for f in (position, first_new, seqs))
    position, first_new, seqs = fields
    return tuple(x.astype(np.int32) for x in (kv_end, position, first_new, row, seqs))


query_blocks = Exercise(
    "7.6",
    _query_blocks,
    name="query_blocks",
    outputs=("kv_end", "position", "first_new", "row", "seqs"),
    axes=("block of queries",),
    tolerance=0.0,
    drive=drive_blocks,
)
query_blocks.case(
    "one decode", starts=ints(0), q_lens=ints(1), kv_lens=ints(9), num_tokens=1, block_q=1
)
query_blocks.case(
    "a decode, an idle slot, six tokens behind 28",
    **{"starts": ints(0, 1, 1), "q_lens": ints(1, 0, 6), "kv_lens": ints(29, 0, 34)},
    **{"num_tokens": 7, "block_q": 4},
)
query_blocks.case(
    "a whole prompt between two decodes, an unused slot, padding",
    **{"starts": ints(0, 1, 9, 12), "q_lens": ints(1, 8, 1, 0), "kv_lens": ints(5, 8, 17, 0)},
    **{"num_tokens": 12, "block_q": 4},
)


def _blocks_mistake(words, **options):
    def wrong(*arguments):
        return _query_blocks(*arguments, **options)

    query_blocks.mistake(words)(wrong)


_blocks_mistake(
    "a block of queries reads the keys of the whole sequence: its last query sees itself, and "
    "nothing after it",
    kv_end=lambda kv_len, position: kv_len,
)
_blocks_mistake(
    "positions begin at 0: the cached prefix is forgotten", first_new=lambda kv_len, q_len: 0
)
_blocks_mistake("all blocks of a sequence are its first one", offset=lambda i: 0)


@query_blocks.mistake("blocks that do not exist have keys: their kv_end has to be 0")
def _absent_blocks_read(starts, q_lens, kv_lens, num_tokens, block_q):
    fields = _query_blocks(starts, q_lens, kv_lens, num_tokens, block_q)
    w = np.arange(len(fields[0]))
    ends = np.cumsum(cdiv(q_lens, block_q))
    offset = (w - (ends - cdiv(q_lens, block_q))[-1]) * block_q
    behind = np.minimum(kv_lens[-1], (kv_lens - q_lens)[-1] + offset + block_q)
    return np.where(w < ends[-1], fields[0], behind).astype(np.int32), *fields[1:]


@query_blocks.mistake("a sequence without new tokens is given a block: an idle slot has none")
def _idle_has_block(starts, q_lens, kv_lens, num_tokens, block_q):
    arguments = (starts, q_lens, kv_lens, num_tokens, block_q)
    return _query_blocks(*arguments, num_blocks=lambda q_len: max(1, cdiv(q_len, block_q)))


@query_blocks.mistake(
    "the last block of a sequence is left out where it is not full: q_len // block_q rounds down"
)
def _full_blocks_only(starts, q_lens, kv_lens, num_tokens, block_q):
    arguments = (starts, q_lens, kv_lens, num_tokens, block_q)
    return _query_blocks(*arguments, num_blocks=lambda q_len: q_len // block_q)


ragged_attention = Exercise(
    "7.6",
    assembly.ragged,
    outputs=("output", "kv_cache", "rows of kv_cache that are right bit by bit"),
    tolerance=1e-4,
    place=ragged,
    drive=assembly.run_batch,
    runner=in_sandbox(judge_overlap),
    limit_s=LIMIT_S,
    pieces=(query_blocks,),
    epilogue=assembly.compiled("7.6"),
)
for _title, _lengths in {
    "one decode": [(1, 13)],
    "decodes with idle slots, a chunk behind a prefix, a whole prompt": [
        *[(0, 9), (1, 24), (0, 0), (1, 17), (9, 29), (19, 19)]
    ],
}.items():
    ragged_attention.case(
        _title, **assembly.make_batch(RNG, _lengths, num_q_heads=2, num_kv_heads=1), block_tokens=16
    )
for _words, _options in RAGGED_MISTAKES.items():
    ragged_attention.mistake(_words)(wrong_ragged(_options))
