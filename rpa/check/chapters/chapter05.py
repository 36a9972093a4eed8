"""Checks of chapter 5: copies by hand. The learner's kernels run in the sandbox (`dma.py`)."""

import numpy as np

from rpa.check.chapters import assembly
from rpa.check.chapters.launchers import (
    run_chunks,
    run_copy,
    run_pages,
    run_sequences,
    run_tokens,
    run_weighted,
)
from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise
from rpa.check.sandbox import faults
from rpa.check.sandbox.dma import LIMIT_S, dma_exercise, in_flight
from rpa.check.sandbox.pickling import names_in

RNG = np.random.default_rng(5)

NO_OVERLAP = "copies and computes by turns: no copy is on its way while it computes"
ONE_BY_ONE = "waits for each copy before it starts the next one"
TOO_MUCH = "copies rows behind the last token"


def normal(*shape):
    """f32[shape] of standard normal numbers, the same at every run."""
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values):
    """i32[len(values)]."""
    return np.array(values, np.int32)


# What has to overlap ------------------------------------------------------------------------------


def judge_overlap(timeline, *_):
    """Refuse a kernel that computes while nothing is on its way, but for its last computation."""
    filled, computed = {copy.target.buffer for copy in timeline.copies}, None
    for event, flying in in_flight(timeline):
        if event.kind == "start" and computed:
            read = f"{faults.line_of(computed.where)} reads {computed.source.label}"
            advice = "Start the copy of the next block before you wait for this one."
            return faults.explain(NO_OVERLAP, [f"{read}, and the HBM is idle.", advice])
        if event.kind == "load" and event.source.buffer in filled and not flying:
            computed = event  # right only if no copy is started after it
    return None


def judge_together(timeline, *_):
    """Refuse a kernel that has never two copies on their way, though it makes several."""
    together = any(event.kind == "start" and flying for event, flying in in_flight(timeline))
    if len(timeline.copies) < 2 or together:
        return None
    latency = "A copy waits for about a microsecond before its first byte comes: pay that once."
    return faults.explain(ONE_BY_ONE, [latency, "Start all of them, then wait for all."])


def judge_tokens(timeline, cache, page_indices, kv_len):
    """Refuse copies of rows behind kv_len, also where zeros cover them; then pages by turns."""
    copied = sum(copy.num_bytes for copy in timeline.copies)
    if copied > kv_len * cache[0, 0].nbytes:
        lines = [
            f"{copied // cache[0, 0].nbytes} rows are copied, and there are {kv_len} tokens.",
            "What lies behind them is not yours: a read brings what the page's last owner left.",
        ]
        return faults.explain(TOO_MUCH, lines)
    return judge_together(timeline)


# 5.1 a copy ---------------------------------------------------------------------------------------


def run_async_copy(kernel, x):
    """Call the kernel of 5.1; `pltpu.sync_copy` would hide the two halves that it is about."""
    if "sync_copy" in set(names_in(kernel)):
        raise WrongResult(
            "your kernel calls pltpu.sync_copy, which starts a copy and waits for it in one: write "
            "the two, make_async_copy(...).start() and .wait(), because what happens between "
            "them is the chapter"
        )
    return run_copy(kernel, x)


copy = dma_exercise(
    "5.1",
    lambda x: 2 * np.asarray(x),
    run_async_copy,
    axes=("row", "lane"),
    faults=(
        faults.READ_TOO_EARLY,
        faults.WAIT_TOO_LATE,
        faults.LEFTOVER,
        faults.NOBODY_SIGNALS,
        faults.WRITTEN_IN_FLIGHT,
    ),
)
copy.case("one tile of ones", x=np.ones((8, 128), np.float32))
copy.case("two tiles", x=normal(16, 128))


@copy.mistake("the array is copied and not doubled")
def _not_doubled(x):
    return np.asarray(x)


@copy.mistake(
    "nothing is copied back, or what comes back was never filled (source and target swapped?): "
    "memory that was never written is NaN here"
)
def _not_copied_back(x):
    return np.full(x.shape, np.nan, np.float32)


@copy.mistake("the result is doubled twice")
def _twice(x):
    return 4 * np.asarray(x)


# 5.2 a double buffer ------------------------------------------------------------------------------


def _sum_of(x, chunk_rows, first=0, end=None):
    return np.asarray(x).reshape(-1, chunk_rows, x.shape[1])[first:end].sum(axis=0)


chunks = dma_exercise(
    "5.2",
    _sum_of,
    run_chunks,
    judge=judge_overlap,
    axes=("row", "lane"),
    faults=(
        faults.READ_TOO_EARLY,
        faults.NOBODY_SIGNALS,
        faults.LEFTOVER,
        faults.TWO_COPIES,
        faults.DOUBTFUL,
        NO_OVERLAP,
    ),
)
chunks.case("one chunk", x=np.full((8, 128), 3, np.float32), chunk_rows=8)
chunks.case(
    "four chunks: 1, 10, 100, 1000",
    x=np.repeat(np.float32([1, 10, 100, 1000]), 8)[:, None] * np.ones(128, np.float32),
    chunk_rows=8,
)
chunks.case("five chunks", x=normal(40, 128), chunk_rows=8)


@chunks.mistake("the last chunk is missing: the loop ends one chunk early")
def _without_last(x, chunk_rows):
    return _sum_of(x, chunk_rows, 0, -1)


@chunks.mistake("the first chunk is missing")
def _without_first(x, chunk_rows):
    return _sum_of(x, chunk_rows, 1)


@chunks.mistake("chunk n begins at row n of x, and not at row n * rows")
def _overlapping(x, chunk_rows):
    x, num_chunks = np.asarray(x), len(x) // chunk_rows
    return sum(x[n : n + chunk_rows] for n in range(num_chunks))


@chunks.mistake("only the last chunk is left: each one replaces the sum (`=` for `+=`)")
def _last_only(x, chunk_rows):
    return _sum_of(x, chunk_rows, -1)


@chunks.mistake(
    "out_ref is not zero when the first chunk is added, or a buffer is added that nothing was "
    "copied into: VMEM begins as anything, NaN"
)
def _not_zeroed(x, chunk_rows):
    return np.full((chunk_rows, x.shape[1]), np.nan, np.float32)


# 5.3 pages ----------------------------------------------------------------------------------------


def _collect(cache, page_indices):
    return np.asarray(cache)[np.asarray(page_indices)].reshape(-1, cache.shape[2])


pages = dma_exercise(
    "5.3",
    _collect,
    run_pages,
    judge=judge_together,
    axes=("row", "lane"),
    faults=(faults.LEFTOVER, faults.NOBODY_SIGNALS, faults.TWO_COPIES, ONE_BY_ONE),
)
pages.case(
    "pages 2 and 0 of three; the number says the page",
    cache=np.repeat(np.float32([0, 1, 2]), 8).reshape(3, 8, 1) * np.ones(128, np.float32),
    page_indices=ints(2, 0),
)
pages.case("one page", cache=normal(2, 8, 128), page_indices=ints(1))
pages.case("four pages of nine", cache=normal(9, 8, 128), page_indices=ints(7, 1, 8, 3))


@pages.mistake("page p of the sequence is copied from page p of the cache: look into the table")
def _logical_pages(cache, page_indices):
    return _collect(cache, np.arange(len(page_indices)))


@pages.mistake("all copies take the first entry of the table")
def _first_page(cache, page_indices):
    return _collect(cache, np.repeat(np.asarray(page_indices)[:1], len(page_indices)))


@pages.mistake("the last page of the table is left out, and its rows hold what VMEM held: NaN")
def _without_last_page(cache, page_indices):
    rows = _collect(cache, page_indices)
    rows[-cache.shape[1] :] = np.nan
    return rows


# 5.4 a dynamic size -------------------------------------------------------------------------------


def _tokens(cache, page_indices, kv_len, copied=None, rest=0.0):
    """The first `copied` tokens of the pages, default kv_len, and `rest` behind them."""
    room = len(page_indices) * cache.shape[1]
    rows = np.full((room, cache.shape[2]), rest, np.float32)
    copied = min(kv_len if copied is None else copied, room)
    live = np.asarray(page_indices)[: -(-copied // cache.shape[1])]
    rows[:copied] = _collect(cache, live)[:copied]
    return rows


def _pool(num_pages):
    return normal(num_pages, 8, 128)


tokens = dma_exercise(
    "5.4",
    _tokens,
    run_tokens,
    judge=judge_tokens,
    axes=("token", "lane"),
    faults=(faults.NOBODY_SIGNALS, faults.WRITTEN_IN_FLIGHT, TOO_MUCH, ONE_BY_ONE),
)
tokens.case("two full pages of two", cache=_pool(3), page_indices=ints(2, 0), kv_len=16)
tokens.case("13 tokens: a page and five", cache=_pool(3), page_indices=ints(2, 0), kv_len=13)
tokens.case(
    "5 tokens; the second entry is garbage",
    cache=_pool(3),
    page_indices=ints(1, 9999),
    kv_len=5,
)
tokens.case("no token yet", cache=_pool(3), page_indices=ints(-1, -1), kv_len=0)


@tokens.mistake("the last page is left out where it is not full: kv_len // page_size rounds down")
def _full_pages_only(cache, page_indices, kv_len):
    return _tokens(cache, page_indices, kv_len, kv_len // cache.shape[1] * cache.shape[1])


@tokens.mistake("out_ref is not set to zero first: behind the last token it holds NaN")
def _no_zeros(cache, page_indices, kv_len):
    return _tokens(cache, page_indices, kv_len, rest=np.nan)


@tokens.mistake(
    "every page is copied as far as the last one is filled: the size is "
    "min(kv_len - p * page_size, page_size), for each page p"
)
def _last_size_for_all(cache, page_indices, kv_len):
    rows, page_size = _tokens(cache, page_indices, kv_len), cache.shape[1]
    if kv_len % page_size:
        for p in range(kv_len // page_size):
            rows[p * page_size + kv_len % page_size : (p + 1) * page_size] = 0
    return rows


# 5.5 three bugs -----------------------------------------------------------------------------------


def _sums(x, block_tokens):
    return np.asarray(x).sum(axis=1)


three_bugs = dma_exercise(
    "5.5",
    _sums,
    run_sequences,
    judge=judge_overlap,
    axes=("sequence", "lane"),
    tolerance=1e-4,
    faults=(
        faults.TWO_COPIES,
        faults.WAIT_TOO_LATE,
        faults.LEFTOVER,
        faults.NOBODY_SIGNALS,
        faults.DOUBTFUL,
        NO_OVERLAP,
    ),
)
three_bugs.case("one sequence, one block", x=normal(1, 8, 128), block_tokens=8)
three_bugs.case("one sequence, three blocks", x=normal(1, 24, 128), block_tokens=8)
three_bugs.case("two sequences of three blocks", x=normal(2, 24, 128), block_tokens=8)


@three_bugs.mistake("the sum goes on over the end of a sequence: it begins at block 0 of each")
def _running(x, block_tokens):
    return _sums(x, block_tokens).cumsum(axis=0)


@three_bugs.mistake("only the last block of each sequence is left")
def _last_block(x, block_tokens):
    return np.asarray(x)[:, -block_tokens:].sum(axis=1)


@three_bugs.mistake("only the first block of each sequence is added")
def _first_block(x, block_tokens):
    return np.asarray(x)[:, :block_tokens].sum(axis=1)


# 5.6 paged decode, whole --------------------------------------------------------------------------


def _fold(queries, num_kv_heads, *, padded=True, interleaved=False):
    n, num_q_heads, head_dim = queries.shape
    group = num_q_heads // num_kv_heads
    if interleaved:
        folded = np.asarray(queries).reshape(n, group, num_kv_heads, head_dim).swapaxes(1, 2)
    else:
        folded = np.asarray(queries).reshape(n, num_kv_heads, group, head_dim)
    return np.pad(folded, [(0, 0)] * 3 + [(0, -head_dim % 128)]) if padded else folded


fold_heads = Exercise(
    "5.6", _fold, name="fold_heads", axes=("sequence", "KV head", "query head", "lane")
)
fold_heads.case("four heads of 128 on two KV heads", queries=normal(2, 4, 128), num_kv_heads=2)
fold_heads.case("head_dim 64", queries=normal(2, 4, 64), num_kv_heads=2)


@fold_heads.mistake("head_dim is not filled up to a multiple of 128")
def _not_padded(queries, num_kv_heads):
    return _fold(queries, num_kv_heads, padded=False)


@fold_heads.mistake("query head h is given to KV head h % num_kv_heads; it is h // group")
def _interleaved(queries, num_kv_heads):
    return _fold(queries, num_kv_heads, interleaved=True)


DECODE_MISTAKES = {
    "page p of the sequence is copied from page p of the cache: look into the table": {
        "page_of": lambda table, s, b, p, n: s * table.shape[1] + b * n + p
    },
    "the table's entry is taken for a place in the sequence: every page is page p of the cache": {
        "page_of": lambda table, s, b, p, n: b * n + p
    },
    "every sequence reads the pages of the first one: its row of the table begins at "
    "s * pages_per_seq": {"page_of": lambda table, s, b, p, n: table[0, b * n + p]},
    "every block reads the pages of the first one: block b begins b * block_tokens // page_size "
    "entries later": {"page_of": lambda table, s, b, p, n: table[s, p]},
    "all pages of a block are its first one": {
        "page_of": lambda table, s, b, p, n: table[s, b * n]
    },
    "K and V are swapped: combined head 2h is K": {
        "combined": lambda head, n: (2 * head + 1, 2 * head)
    },
    "all K stand before all V: in the cache K and V of a head are neighbours": {
        "combined": lambda head, n: (head, head + n // 2)
    },
    "every query head reads KV head 0": {"kv_head": lambda h, group: 0},
    "the last block is left out where it is not full: kv_len // block_tokens rounds down": {
        "num_blocks": lambda kv_len: kv_len // 16
    },
    "only the first block of each sequence is computed": {"num_blocks": lambda kv_len: kv_len > 0},
    "stale keys of the last block count as visible: the buffer holds NaN, or another block's": {
        "stale_is_seen": True
    },
    "the scores are not scaled by sm_scale": {"sm_scale": 1.0},
}


def _decode_exercise(number, judge, fault_words, pieces):
    exercise = Exercise(
        number,
        assembly.decode,
        axes=("sequence", "head", "lane"),
        tolerance=1e-4,
        drive=assembly.run_decode,
        runner=assembly.runner(judge),
        limit_s=LIMIT_S,
        pieces=pieces,
        epilogue=assembly.compiled(number),
        faults=fault_words,
    )
    one = {"num_q_heads": 2, "num_kv_heads": 1}
    cases = {
        "one sequence, two pages, the second one not full": ([13], one),
        "two sequences, blocks of two pages, two and three blocks": ([29, 37], {}),
        "idle slots, one token, and a last block that is full": ([0, 1, 0, 32], one),
    }
    for title, (kv_lens, sizes) in cases.items():
        exercise.case(title, **assembly.make_decode(RNG, kv_lens, **sizes), block_tokens=16)
    for words, options in DECODE_MISTAKES.items():
        exercise.mistake(words)(_wrong_decode(options))
    return exercise


def _wrong_decode(options):
    def wrong(*arguments, **more):
        return assembly.decode(*arguments, **(more | options))

    return wrong


def judge_decode(timeline, queries, kv_cache, kv_lens, *_):
    """Refuse copies of rows behind the last tokens; then pages by turns."""
    copied = sum(copy.num_bytes for copy in timeline.copies) // kv_cache[0, 0].nbytes
    if copied > sum(kv_lens):
        lines = [
            f"{copied} rows are copied, and there are {sum(kv_lens)} tokens.",
            "The last page of a sequence is copied only as far as it is filled.",
        ]
        return faults.explain(TOO_MUCH, lines)
    return judge_together(timeline)


paged_decode = _decode_exercise(
    "5.6",
    judge_decode,
    (faults.READ_TOO_EARLY, faults.NOBODY_SIGNALS, ONE_BY_ONE, TOO_MUCH),
    (fold_heads,),
)


# 5.7 the prefetch over the boundary ---------------------------------------------------------------

NO_BOUNDARY = "lets no copy go over the end of a sequence"


def _order(kv_lens, block_tokens, *, inclusive=False, passes_idle=True, wrong_self=False):
    kv_lens, n = np.asarray(kv_lens), len(kv_lens)
    num_blocks = -(-kv_lens // block_tokens)
    number = np.cumsum(num_blocks) - (0 if inclusive else num_blocks)
    first = lambda s: next((t for t in range(s, n) if kv_lens[t] > 0 or not passes_idle), n)  # noqa: E731
    next_live = [first(s if wrong_self else s + 1) for s in range(n)]
    return number.astype(np.int32), np.array(next_live, np.int32)


block_order = Exercise(
    "5.7", _order, name="block_order", outputs=("number", "next_live"), axes=("sequence",)
)
block_order.case("9 tokens, an idle slot, 3 tokens", kv_lens=ints(9, 0, 3), block_tokens=8)
block_order.case("idle at both ends", kv_lens=ints(0, 16, 17, 0, 0), block_tokens=8)
block_order.case("one sequence", kv_lens=ints(5), block_tokens=8)


@block_order.mistake("the number of a sequence counts its own blocks, too")
def _inclusive(kv_lens, block_tokens):
    return _order(kv_lens, block_tokens, inclusive=True)


@block_order.mistake("an idle sequence is not passed over")
def _idle_is_next(kv_lens, block_tokens):
    return _order(kv_lens, block_tokens, passes_idle=False)


@block_order.mistake("next_live[s] may be s itself: it is the next one after s")
def _itself(kv_lens, block_tokens):
    return _order(kv_lens, block_tokens, wrong_self=True)


def judge_prefetch(timeline, *_):
    """Refuse a kernel that computes while nothing is on its way, and say where it does so."""
    if not judge_overlap(timeline):
        return judge_together(timeline)
    filled = {copy.target.buffer for copy in timeline.copies}
    computes = (
        flying
        for event, flying in in_flight(timeline)
        if event.kind == "load" and event.source.buffer in filled
    )
    if not any(computes):
        return judge_overlap(timeline)
    lines = [
        "While the last block of a sequence is computed, the HBM is idle.",
        "Start the first block of the next live sequence before you wait for that one.",
    ]
    return faults.explain(NO_BOUNDARY, lines)


prefetched_decode = _decode_exercise(
    "5.7",
    judge_prefetch,
    (faults.NOBODY_SIGNALS, faults.TWO_COPIES, NO_OVERLAP, NO_BOUNDARY),
    (block_order,),
)


# 5.8 one semaphore for all ------------------------------------------------------------------------


def _weighted(k, v, block_tokens):
    k, v = np.asarray(k), np.asarray(v)
    return (k.sum(axis=1, keepdims=True) * v).sum(axis=0, keepdims=True)


weighted = dma_exercise(
    "5.8",
    _weighted,
    run_weighted,
    judge=judge_overlap,
    axes=("row", "lane"),
    tolerance=1e-4,
    faults=(
        faults.DOUBTFUL,
        faults.READ_TOO_EARLY,
        faults.WAIT_TOO_LATE,
        faults.LEFTOVER,
        NO_OVERLAP,
    ),
)
weighted.case("one block", k=normal(8, 128), v=normal(8, 128), block_tokens=8)
weighted.case("two blocks", k=normal(16, 128), v=normal(16, 128), block_tokens=8)
weighted.case("five blocks", k=normal(40, 128), v=normal(40, 128), block_tokens=8)


@weighted.mistake("keys and values are swapped")
def _values_weigh(k, v, block_tokens):
    return _weighted(v, k, block_tokens)


@weighted.mistake("only the last block is left: out_ref is added to, not written")
def _only_the_last_block(k, v, block_tokens):
    return _weighted(k[-block_tokens:], v[-block_tokens:], block_tokens)


@weighted.mistake("the values are added up without their weights")
def _no_weights(k, v, block_tokens):
    return np.asarray(v).sum(axis=0, keepdims=True)
