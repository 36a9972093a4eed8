"""Checks of chapter 7: the keys and the order of one kernel for any batch, and your own.

References and mistakes are NumPy and plain Python, and say the same as the kernel by brute force.
"""

import operator
from functools import partial

import numpy as np

from rpa.check.chapters import assembly
from rpa.check.chapters.chapter05 import judge_overlap
from rpa.check.chapters.chapter06 import RAGGED_MISTAKES, wrong_ragged
from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise
from rpa.check.index_words import ragged
from rpa.check.sandbox.dma import LIMIT_S
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
    "copy that is never started",
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
_wrong_step("the KV blocks do not begin at 0 with a new query block", keeps_kv=True)
_wrong_step("the query blocks do not begin at 0 with a new sequence", keeps_q=True)
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


# 7.3 your own kernel for any batch ----------------------------------------------------------------


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
    "7.3",
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
    "7.3",
    assembly.ragged,
    outputs=("output", "kv_cache", "rows of kv_cache that are right bit by bit"),
    tolerance=1e-4,
    place=ragged,
    drive=assembly.run_batch,
    runner=assembly.runner(judge_overlap),
    limit_s=LIMIT_S,
    pieces=(query_blocks,),
    epilogue=assembly.compiled("7.3"),
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


# 7.4 right numbers, too many bytes ----------------------------------------------------------------


def _work_list(q_lens, kv_lens, block_q, window, *, num_blocks=cdiv, end_of=min, begin_of=None):
    """(seq, q_block, begin, end) of every block of queries; by its options, of a wrong list."""
    begin_of = begin_of or (lambda first, end, window: first - window + 1)
    work = []
    for seq, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        for q_block in range(num_blocks(q_len, block_q)):
            first = kv_len - q_len + q_block * block_q
            end = end_of(first + block_q, kv_len)
            work.append((seq, q_block, max(begin_of(first, end, window), 0), end))
    return work


def _is_list(function, *arguments):
    """The learner's list of tuples of integers."""
    work = function(*arguments)
    if not isinstance(work, list) or not all(len(entry) == 4 for entry in work):
        raise WrongResult("expected a list of tuples (seq, q_block, begin, end)")
    return [tuple(int(number) for number in entry) for entry in work]


work_list = Exercise("7.4", _work_list, convert=np.array, drive=_is_list)
for title, q_lens, kv_lens, block_q, window in [
    ("the author's test: a prompt of 6", [6], [6], 4, 100),
    ("by hand: one full block", [4], [9], 4, 3),
    ("a block that is not full", [6], [6], 4, 2),
    ("a decode, an idle slot, a chunk", [1, 0, 5], [20, 7, 12], 4, 3),
    ("blocks of one query", [1, 1], [5, 9], 1, 4),
]:
    work_list.case(title, q_lens=q_lens, kv_lens=kv_lens, block_q=block_q, window=window)


def _wrong_list(words, **options):
    def wrong(*arguments):
        return _work_list(*arguments, **options)

    work_list.mistake(words)(wrong)


_EXTRA = {"num_blocks": lambda q_len, block_q: q_len // block_q + 1}
_BEHIND = {"end_of": lambda end, kv_len: end}
_LAST = {"begin_of": lambda first, end, window: end - window}
_wrong_list(
    "a full last block is followed by an empty one, and an idle slot has one, too", **_EXTRA
)
_wrong_list("the last block goes on behind the last token of its sequence", **_BEHIND)
_wrong_list(
    "the window is measured from the last query of the block: the first query sees earlier keys",
    **_LAST,
)
_wrong_list("two bugs are left: one block too many, and an end behind the last token",
            **_EXTRA, **_BEHIND)  # fmt: skip
_wrong_list("two bugs are left: one block too many, and the window of the last query",
            **_EXTRA, **_LAST)  # fmt: skip
_wrong_list("two bugs are left: an end behind the last token, and the window of the last query",
            **_BEHIND, **_LAST)  # fmt: skip
_wrong_list("it is the list of the author, with all three bugs", **_EXTRA, **_BEHIND, **_LAST)
_wrong_list(
    "a block of queries that is not full is left out",
    num_blocks=lambda q_len, block_q: q_len // block_q,
)
_wrong_list(
    "the window is one key too long: it counts the query's own key",
    begin_of=lambda first, end, window: first - window,
)
