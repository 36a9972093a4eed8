"""Checks of chapter 8: the optimized kernel.

References and mistakes are NumPy and plain Python, and say the same as the kernel by brute force.
"""

import jax.numpy as jnp
import numpy as np

from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise
from rpa.check.sandbox import fast_compile
from rpa.dense import oracle

RNG = np.random.default_rng(7)


def ints(*values):
    """i32[len(values)]."""
    return np.array(values, np.int32)


# 8.1 which tiles need a mask ----------------------------------------------------------------------


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


tile_kind = Exercise("8.1", _tile_kind, convert=np.array)
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
tile_kind.case("only the first two queries see the first key", **_tile(40, 4, 26, 8, 16))


@tile_kind.mistake("a tile without a visible pair is computed and masked: skip it")
def _never_skips(q_position, bq_c, kv_position, bkv_c, sliding_window):
    seen = _visible(q_position, bq_c, kv_position, bkv_c, sliding_window)
    return "interior" if seen.all() else "masked"


@tile_kind.mistake("every tile that is computed is masked: most of them need no mask")
def _always_masked(q_position, bq_c, kv_position, bkv_c, sliding_window):
    seen = _visible(q_position, bq_c, kv_position, bkv_c, sliding_window)
    return "masked" if seen.any() else "skip"


@tile_kind.mistake(
    "under a window the first query decides what needs no mask: it is the last one that loses "
    "the first key first"
)
def _first_query_at_the_window(q_position, bq_c, kv_position, bkv_c, sliding_window):
    kind = _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window)
    if sliding_window is None or kind == "skip":
        return kind
    inside = q_position - kv_position < sliding_window
    return "interior" if kv_position + bkv_c - 1 <= q_position and inside else "masked"


@tile_kind.mistake(
    "under a window the last query decides what is skipped: the first one sees the earliest keys"
)
def _last_query_skips(q_position, bq_c, kv_position, bkv_c, sliding_window):
    last = q_position + bq_c - 1
    if sliding_window is not None and last - (kv_position + bkv_c - 1) >= sliding_window:
        return "skip"
    return _tile_kind(q_position, bq_c, kv_position, bkv_c, sliding_window)


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


# 8.2 the distribution of a batch whose order is fixed ---------------------------------------------


def _distribution(q_lens, chunk_prefill_size):
    i = 0
    while i < len(q_lens) and q_lens[i] <= 1:
        i += 1
    j = i
    while chunk_prefill_size is not None and j < len(q_lens) and q_lens[j] <= chunk_prefill_size:
        j += 1
    return ints(i, j, len(q_lens))


distribution = Exercise("8.2", _distribution, axes=("entry",), convert=np.array)
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


# 8.3 run it ---------------------------------------------------------------------------------------


def _arrival_spans(q_lens):
    ends = np.cumsum(q_lens)
    return [(int(end - q_len), int(end)) for q_len, end in zip(q_lens, ends, strict=True)]


GIVEN_AWAY = (
    "your function gives the caller's cache away: unless it is told donate=False, rung 8 updates "
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
    with fast_compile.rung_8():
        results = function(queries, keys, values, callers, *lengths)
    if callers.is_deleted():
        raise WrongResult(GIVEN_AWAY)
    return results


serve_step = Exercise(
    "8.3",
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
