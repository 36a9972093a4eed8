"""Checks of chapter 5: copies by hand. The learner's kernels run in the sandbox.

References and mistakes are NumPy models of what comes out; what breaks a rule of DMAs without a
number of its own (a wait that is missing, or never ends) the sandbox finds, see `faults.py`.
"""

import functools

import numpy as np

from rpa.check import faults
from rpa.check.exercise import Exercise
from rpa.check.launchers import run_chunks, run_copy, run_pages, run_sequences, run_tokens
from rpa.check.sandbox import in_sandbox

RNG = np.random.default_rng(5)
LIMIT_S = 10.0

NO_OVERLAP = "copies and computes by turns: no copy is on its way while it computes"
ONE_BY_ONE = "waits for each copy before it starts the next one"


def normal(*shape):
    """f32[shape] of standard normal numbers, the same at every run."""
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values):
    """i32[len(values)]."""
    return np.array(values, np.int32)


def launched_by(launcher):
    """A `drive`: the learner's kernel goes into its launcher, a NumPy model is simply called."""

    def decorate(drive):
        @functools.wraps(drive)
        def use(kernel, *arguments):
            is_model = kernel.__module__ == __name__
            return kernel(*arguments) if is_model else launcher(kernel, *arguments)

        return use

    return decorate


# What has to overlap ------------------------------------------------------------------------------


def judge_overlap(timeline):
    """Refuse a kernel that computes while nothing is on its way, but for its last computation."""
    flying, computed = set(), None
    starts = {copy.start: copy.number for copy in timeline.copies}
    filled = {copy.target.buffer for copy in timeline.copies}
    for event in timeline.events:
        flying -= set(event.copies)
        if event.kind == "start":
            if computed:
                read = f"{faults.line_of(computed.where)} reads {computed.source.label}"
                advice = "Start the copy of the next block before you wait for this one."
                return faults.explain(NO_OVERLAP, [f"{read}, and the HBM is idle.", advice])
            flying.add(starts[event.order])
        elif event.kind == "load" and event.source.buffer in filled and not flying:
            computed = event  # right only if no copy is started after it
    return None


def judge_together(timeline):
    """Refuse a kernel that has never two copies on their way, though it makes several."""
    flying, most = set(), 0
    starts = {copy.start: copy.number for copy in timeline.copies}
    for event in timeline.events:
        flying -= set(event.copies)
        if event.kind == "start":
            flying.add(starts[event.order])
            most = max(most, len(flying))
    if len(timeline.copies) < 2 or most > 1:
        return None
    latency = "A copy waits for about a microsecond before its first byte comes: pay that once."
    return faults.explain(ONE_BY_ONE, [latency, "Start all of them, then wait for all."])


# 5.1 a copy ---------------------------------------------------------------------------------------


@launched_by(run_copy)
def drive_copy(kernel, x):
    """out f32[rows, 128] of a kernel that doubles x."""


copy = Exercise(
    "5.1",
    lambda x: 2 * np.asarray(x),
    axes=("row", "lane"),
    drive=drive_copy,
    runner=in_sandbox(),
    limit_s=LIMIT_S,
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


@copy.mistake("nothing is copied back: the result in HBM is what it was, and here that is NaN")
def _not_copied_back(x):
    return np.full(x.shape, np.nan, np.float32)


@copy.mistake("the result is doubled twice")
def _twice(x):
    return 4 * np.asarray(x)


# 5.2 a double buffer ------------------------------------------------------------------------------


@launched_by(run_chunks)
def drive_chunks(kernel, x, chunk_rows):
    """out f32[chunk_rows, 128] of a kernel that adds up chunks."""


def _sum_of(x, chunk_rows, first=0, end=None):
    return np.asarray(x).reshape(-1, chunk_rows, x.shape[1])[first:end].sum(axis=0)


chunks = Exercise(
    "5.2",
    _sum_of,
    axes=("row", "lane"),
    drive=drive_chunks,
    runner=in_sandbox(judge_overlap),
    limit_s=LIMIT_S,
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


@chunks.mistake("only the last chunk is left: each one replaces the sum (`=` for `+=`)")
def _last_only(x, chunk_rows):
    return _sum_of(x, chunk_rows, -1)


@chunks.mistake("out_ref is not zero when the first chunk is added: VMEM begins as anything, NaN")
def _not_zeroed(x, chunk_rows):
    return np.full((chunk_rows, x.shape[1]), np.nan, np.float32)


# 5.3 pages ----------------------------------------------------------------------------------------


@launched_by(run_pages)
def drive_pages(kernel, cache, page_indices):
    """out f32[pages * page_size, 128] of a kernel that collects pages."""


def _collect(cache, page_indices):
    return np.asarray(cache)[np.asarray(page_indices)].reshape(-1, cache.shape[2])


pages = Exercise(
    "5.3",
    _collect,
    axes=("row", "lane"),
    drive=drive_pages,
    runner=in_sandbox(judge_together),
    limit_s=LIMIT_S,
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


@launched_by(run_tokens)
def drive_tokens(kernel, cache, page_indices, kv_len):
    """out f32[room, 128] of a kernel that collects kv_len tokens."""


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


tokens = Exercise(
    "5.4",
    _tokens,
    axes=("token", "lane"),
    drive=drive_tokens,
    runner=in_sandbox(),
    limit_s=LIMIT_S,
    faults=(faults.NOBODY_SIGNALS, faults.WRITTEN_IN_FLIGHT),
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


@tokens.mistake(
    "all rows of the last page are copied: those behind kv_len are not yours, and whoever reads "
    "them reads what the page's last owner left"
)
def _whole_pages(cache, page_indices, kv_len):
    page_size = cache.shape[1]
    return _tokens(cache, page_indices, kv_len, -(-kv_len // page_size) * page_size)


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


@launched_by(run_sequences)
def drive_sequences(kernel, x, block_tokens):
    """out f32[num_seqs, 128] of a kernel that adds up the tokens of each sequence."""


def _sums(x, block_tokens):
    return np.asarray(x).sum(axis=1)


three_bugs = Exercise(
    "5.5",
    _sums,
    axes=("sequence", "lane"),
    drive=drive_sequences,
    runner=in_sandbox(judge_overlap),
    limit_s=LIMIT_S,
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
three_bugs.case("three sequences of two blocks", x=normal(3, 16, 128), block_tokens=8)


@three_bugs.mistake("the sum goes on over the end of a sequence: it begins at block 0 of each")
def _running(x, block_tokens):
    return _sums(x, block_tokens).cumsum(axis=0)


@three_bugs.mistake("only the last block of each sequence is left")
def _last_block(x, block_tokens):
    return np.asarray(x)[:, -block_tokens:].sum(axis=1)


@three_bugs.mistake("only the first block of each sequence is added")
def _first_block(x, block_tokens):
    return np.asarray(x)[:, :block_tokens].sum(axis=1)
