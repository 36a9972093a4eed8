"""Checks of chapter 11: what a test must vary to find the bugs of production kernels.

In 11.1, 11.3 and 11.4 the learner writes a *witness*: a batch, a length, some numbers on which a
wrong kernel of `wrong_kernels.py` gives itself away. The check runs the suspect on it, and what is
compared is the verdict. References and mistakes are NumPy.
"""

import ml_dtypes
import numpy as np

from rpa.check.chapters import wrong_kernels
from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise
from rpa.paging import cdiv

RNG = np.random.default_rng(9)
GUILTY = "guilty"


def ints(*values):
    """i32[len(values)]."""
    return np.array(values, np.int32)


# 11.1 the lost tokens -----------------------------------------------------------------------------

MOST_TOKENS = 4096


def judge_lengths(witness, bq, bkv, window):
    """The verdict over `suspects.forgetful` on one sequence of the learner's lengths."""
    q_len, kv_len = _pair(witness(bq, bkv, window))
    most_new = window + bkv + bq
    if q_len > most_new:
        raise WrongResult(
            f"your sequence has {q_len} new tokens, expected at most window + bkv + bq = "
            f"{most_new}: a witness that fits every kernel says nothing about this one"
        )
    if not 1 <= q_len <= kv_len <= MOST_TOKENS:
        raise WrongResult(
            f"your sequence has q_len {q_len} and kv_len {kv_len}, expected 1 <= q_len <= kv_len "
            f"<= {MOST_TOKENS}: kv_len counts the new tokens, too"
        )
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((kv_len, 2, 4)).astype(np.float32)
    before = kv.copy()
    before[kv_len - q_len :] = 0
    queries = rng.standard_normal((q_len, 4)).astype(np.float32)
    _, after = wrong_kernels.forgetful(
        queries, kv[kv_len - q_len :], before, window=window, bq=bq, bkv=bkv
    )
    return (
        GUILTY if (after != kv).any() else _why_nothing_is_lost(q_len, kv_len, bq, bkv, window),
    )


def _pair(result):
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise WrongResult(f"your function returns {result!r}, expected two numbers (q_len, kv_len)")
    return tuple(int(number) for number in result)


def _why_nothing_is_lost(q_len, kv_len, bq, bkv, window):
    if q_len <= bq:
        return "acquitted: there is one query block"
    last_block = kv_len - q_len + (q_len - 1) // bq * bq
    first_key = max(last_block - window + 1, 0)
    if first_key >= bkv and first_key // bkv * bkv <= kv_len - q_len:
        return "acquitted: the blocks of keys that the last query block skips are cached"
    if first_key <= kv_len - q_len:
        return "acquitted: the last query block still sees the first new token"
    return "acquitted: the last query block skips no whole block of keys with new tokens"


lengths = Exercise(
    "11.1",
    lambda bq, bkv, window: (window + bkv + bq,) * 2,
    outputs=("verdict",),
    convert=np.array,
    drive=judge_lengths,
)
lengths.case("small enough to draw", bq=2, bkv=4, window=3)
lengths.case("blocks of keys longer than the window", bq=8, bkv=32, window=8)
lengths.case("a window longer than a block of keys", bq=8, bkv=16, window=100)
lengths.case("a window of one key", bq=16, bkv=16, window=1)
lengths.case("blocks of a real kernel", bq=32, bkv=256, window=128)


@lengths.mistake(
    "the new tokens fit in one query block: it is the last one, and it sees all of them"
)
def _one_query_block(bq, bkv, window):
    return bq, bq + 4 * (bkv + window)


@lengths.mistake(
    "the sequence is not longer than the window: then the last query block still comes by the "
    "first new token"
)
def _no_longer_than_window(bq, bkv, window):
    q_len = max(window, bq + 1)
    return q_len, q_len


@lengths.mistake(
    "the last query block starts behind the first new tokens, but in the same block of keys: whole "
    "blocks are written back, so a whole one has to be skipped"
)
def _same_block_of_keys(bq, bkv, window):
    return window + bq, window + bq


@lengths.mistake(
    "what the window skips are cached tokens: those are in the cache already, and only new ones "
    "can be lost"
)
def _only_cached_skipped(bq, bkv, window):
    q_len = bq + 1
    return q_len, q_len + bkv * cdiv(window + bkv, bkv)


# 11.2 poison --------------------------------------------------------------------------------------

GARBAGE = 999_999


def _kept(kv_cache, counts, page_table):
    """bool[num_pages, page_size]: the first `counts[s]` tokens of each sequence."""
    page_size = kv_cache.shape[1]
    kept = np.zeros(kv_cache.shape[:2], bool)
    for pages, count in zip(page_table.tolist(), counts.tolist(), strict=True):
        for position in range(count):
            kept[pages[position // page_size], position % page_size] = True
    return kept


def _poisoned(kv_cache, kept):
    return np.where(kept.reshape(*kept.shape, *[1] * (kv_cache.ndim - 2)), kv_cache, np.nan)


def _poisoned_table(page_table, num_live):
    column = np.arange(page_table.shape[1])
    return np.where(column < num_live[:, None], page_table, GARBAGE).astype(np.int32)


def _poison(kv_cache, q_lens, kv_lens, page_table):
    kept = _kept(kv_cache, kv_lens - q_lens, page_table)
    table = _poisoned_table(page_table, cdiv(kv_lens, kv_cache.shape[1]))
    return _poisoned(kv_cache, kept), table


def _poison_arguments(q_lens, kv_lens, page_table, num_pages, page_size=4):
    numbers = 1 + np.arange(num_pages * page_size * 2)
    return {
        "kv_cache": numbers.reshape(num_pages, page_size, 2).astype(np.float32),
        "q_lens": ints(*q_lens),
        "kv_lens": ints(*kv_lens),
        "page_table": np.array(page_table, np.int32),
    }


poison = Exercise("11.2", _poison, outputs=("kv_cache", "page_table"), convert=np.array)
poison.case("a decode behind two cached tokens", **_poison_arguments([1], [3], [[1, 0]], 3))
poison.case("the new token begins a page of its own", **_poison_arguments([1], [5], [[2, 0, 0]], 4))
poison.case(
    "a decode, a chunk, an idle slot",
    **_poison_arguments([1, 6, 0], [4, 9, 7], [[3, 0, 0], [1, 5, 2], [6, 4, 0]], 8),
)
poison.case(
    "two sequences with a common first page",
    **_poison_arguments([1, 2], [7, 6], [[2, 4], [2, 1]], 6),
)


@poison.mistake(
    "the places of the new tokens keep what they hold: those tokens are not in the cache before "
    "the step, the kernel has to bring them"
)
def _new_tokens_kept(kv_cache, q_lens, kv_lens, page_table):
    _, table = _poison(kv_cache, q_lens, kv_lens, page_table)
    return _poisoned(kv_cache, _kept(kv_cache, kv_lens, page_table)), table


@poison.mistake(
    "only pages without an owner are poisoned: the tail of a last page may hold anything, too"
)
def _tails_kept(kv_cache, q_lens, kv_lens, page_table):
    cache, table = _poison(kv_cache, q_lens, kv_lens, page_table)
    used = np.isfinite(cache[..., 0]).any(axis=1)  # bool[num_pages]
    return _poisoned(kv_cache, np.repeat(used[:, None], kv_cache.shape[1], axis=1)), table


@poison.mistake("the page table is not asked: page p of a sequence lies anywhere in the cache")
def _table_not_asked(kv_cache, q_lens, kv_lens, page_table):
    _, table = _poison(kv_cache, q_lens, kv_lens, page_table)
    own = np.broadcast_to(np.arange(page_table.shape[1]), page_table.shape)
    return _poisoned(kv_cache, _kept(kv_cache, kv_lens - q_lens, own)), table


@poison.mistake("the page table is left as it is: entries behind the live ones are padding")
def _table_kept(kv_cache, q_lens, kv_lens, page_table):
    return _poison(kv_cache, q_lens, kv_lens, page_table)[0], page_table


@poison.mistake(
    "live pages are counted from the cached tokens: the page that the new token begins is live, "
    "and the kernel has to find it"
)
def _live_by_cached(kv_cache, q_lens, kv_lens, page_table):
    cache, _ = _poison(kv_cache, q_lens, kv_lens, page_table)
    return cache, _poisoned_table(page_table, cdiv(kv_lens - q_lens, kv_cache.shape[1]))


@poison.mistake("cached tokens and the rest are the wrong way round: what must be read is NaN")
def _inverted(kv_cache, q_lens, kv_lens, page_table):
    cache, table = _poison(kv_cache, q_lens, kv_lens, page_table)
    return _poisoned(kv_cache, np.isnan(cache[..., 0])), table


@poison.mistake("zeros are put where NaN belongs: a zero is forgiven where NaN is not")
def _zeros(kv_cache, q_lens, kv_lens, page_table):
    cache, table = _poison(kv_cache, q_lens, kv_lens, page_table)
    return np.nan_to_num(cache), table


@poison.mistake("live pages are rounded down: a page that is begun is live")
def _live_rounded_down(kv_cache, q_lens, kv_lens, page_table):
    cache, _ = _poison(kv_cache, q_lens, kv_lens, page_table)
    return cache, _poisoned_table(page_table, kv_lens // kv_cache.shape[1])


@poison.mistake("there is one live page too many where a sequence ends with its page")
def _one_live_too_many(kv_cache, q_lens, kv_lens, page_table):
    cache, _ = _poison(kv_cache, q_lens, kv_lens, page_table)
    return cache, _poisoned_table(page_table, kv_lens // kv_cache.shape[1] + 1)


@poison.mistake("entries that are 0 are taken for padding: page 0 is a page like any other")
def _page_0_is_padding(kv_cache, q_lens, kv_lens, page_table):
    cache, _ = _poison(kv_cache, q_lens, kv_lens, page_table)
    return cache, np.where(page_table > 0, page_table, GARBAGE).astype(np.int32)


# 11.3 sixteen bits --------------------------------------------------------------------------------


def judge_length(witness, window):
    """The verdict over `suspects.narrow` on the last token of the learner's sequence."""
    kv_len = witness(window)
    if not isinstance(kv_len, int | np.integer) or not 1 <= kv_len <= 2**20:
        raise WrongResult(f"your function returns {kv_len!r}, expected a kv_len, 1 to 2**20")
    kv_len = int(kv_len)
    if _narrow_is_right(kv_len, window):
        return (f"acquitted at {kv_len:,} tokens",)
    if kv_len > 1 and not _narrow_is_right(kv_len - 1, window):
        return (f"guilty, but so it is at {kv_len - 1:,} tokens",)
    return (GUILTY,)


def _narrow_is_right(kv_len, window):
    keys = np.arange(kv_len)
    right = keys > kv_len - 1 - (kv_len if window is None else window)
    return bool((wrong_kernels.narrow(kv_len - 1, kv_len, window) == right).all())


narrow = Exercise(
    "11.3",
    lambda window: 2**15 + 1 - (window or 0),
    outputs=("verdict",),
    convert=np.array,
    drive=judge_length,
)
narrow.case("no window", window=None)
narrow.case("a window of 128 tokens", window=128)
narrow.case("a window of one token", window=1)
narrow.case("a window of 4,096 tokens", window=4096)


@narrow.mistake(
    "the last position is taken to be kv_len: a sequence of 32,768 tokens ends at position 32,767, "
    "which fits"
)
def _position_is_length(window):
    return 2**15 - (window or 0)


@narrow.mistake("the window is not thought of: `k + window` overflows long before `k` does")
def _window_forgotten(window):
    return 2**15 + 1


@narrow.mistake("the numbers are taken as unsigned: an int16 ends at 2**15 - 1, not at 2**16 - 1")
def _unsigned(window):
    return 2**16 + 1 - (window or 0)


@narrow.mistake("the window is added: it makes the sum larger, so the sequence may be shorter")
def _window_added(window):
    return 2**15 + 1 + (window or 0)


# 11.4 the rounded state ---------------------------------------------------------------------------

FAR_OFF = 0.1
"""An error of this part of the largest value convicts."""


def judge_numbers(witness, kv_len, block_tokens):
    """The verdict over `suspects.rounded` on the learner's scores and values."""
    scores, values = _two_rows(witness(kv_len, block_tokens), kv_len)
    largest = np.abs(values).max()
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    truth = weights @ values
    given = scores.astype(np.float32), values.astype(np.float32)[:, None]
    error = abs(wrong_kernels.rounded(*given, block_tokens)[0] - truth)
    if error > FAR_OFF * largest:
        return (GUILTY,)
    if 1 / (weights**2).sum() < kv_len / 8:
        return ("acquitted: a small part of the tokens has nearly all of the weight",)
    if (values == 0).mean() > 7 / 8:
        return ("acquitted: nearly all values are zero",)
    if abs(truth) <= FAR_OFF * largest:
        return ("acquitted: the right answer is close to zero",)
    if np.ptp(values.reshape(-1, block_tokens).mean(axis=1)) <= FAR_OFF * largest:
        return ("acquitted: all blocks have nearly the same mean of values",)
    return ("acquitted: it is off by less than a tenth of the largest value",)


def _two_rows(result, kv_len):
    shapes = [np.shape(row) for row in result] if isinstance(result, tuple | list) else None
    if shapes != [(kv_len,), (kv_len,)]:
        raise WrongResult(
            f"your function returns {shapes or type(result).__name__}, expected two arrays "
            f"(scores, values) of shape ({kv_len},)"
        )
    scores, values = (np.asarray(row, np.float64) for row in result)
    if not (np.isfinite(scores).all() and np.isfinite(values).all() and np.abs(values).max() > 0):
        raise WrongResult("a score or value is not finite, or all values are zero")
    return scores, values


def _ramp(kv_len, block_tokens):
    return np.zeros(kv_len), np.linspace(0, 1, kv_len)


rounded = Exercise(
    "11.4", _ramp, outputs=("verdict",), convert=np.array, drive=judge_numbers
)  # fmt: skip
rounded.case("4,096 tokens in blocks of 8", kv_len=4096, block_tokens=8)
rounded.case("16,384 tokens in blocks of 32", kv_len=16_384, block_tokens=32)
rounded.case("262,144 tokens in blocks of 512", kv_len=262_144, block_tokens=512)


@rounded.mistake(
    "all values are 1, or in each block the same in the mean: the accumulator stops growing "
    "exactly where the sum does, and their quotient stays right"
)
def _equal_values(kv_len, block_tokens):
    return np.zeros(kv_len), np.ones(kv_len)


@rounded.mistake(
    "values are random around zero: the right answer is nearly zero, and so is any wrong one"
)
def _random_values(kv_len, block_tokens):
    return np.zeros(kv_len), np.random.default_rng(0).standard_normal(kv_len)


@rounded.mistake(
    "one token, or a few, have a value, and all others are zero: its share of the answer is too "
    "small for a tenth of the largest value, right or wrong"
)
def _needle(kv_len, block_tokens):
    values = np.zeros(kv_len)
    values[-1] = 1
    return np.zeros(kv_len), values


@rounded.mistake(
    "few tokens have most of the weight: the sum stays small, and a small sum is exact enough"
)
def _few_tokens(kv_len, block_tokens):
    return np.linspace(0, 20, kv_len), np.linspace(0, 1, kv_len)


@rounded.mistake(
    "scores are random: the largest one sets the scale, most weights are small beside it, and the "
    "sum is still growing when the sequence ends"
)
def _random_scores(kv_len, block_tokens):
    scores = np.random.default_rng(0).standard_normal(kv_len)
    return scores, np.linspace(0, 1, kv_len)


# 11.5 the heads of a group ------------------------------------------------------------------------


def _group_rows(x, num_kv_heads, group_rows):
    grouped = np.zeros((num_kv_heads, group_rows), np.float32)
    group = len(x) // num_kv_heads
    for head in range(len(x)):
        grouped[head // group, head % group] = x[head]
    return grouped


def _heads(number):
    return 10.0 + np.arange(number, dtype=np.float32)


heads = Exercise("11.5", _group_rows, axes=("KV head", "row of its group"))
heads.case("three heads for each of two KV heads", x=_heads(6), num_kv_heads=2, group_rows=4)
heads.case("nothing to pad", x=_heads(8), num_kv_heads=2, group_rows=4)
heads.case("five heads, one KV head", x=_heads(5), num_kv_heads=1, group_rows=8)
heads.case("nine heads, three KV heads", x=_heads(9), num_kv_heads=3, group_rows=4)
heads.case("one query head for each KV head", x=_heads(3), num_kv_heads=3, group_rows=2)


@heads.mistake("all padding stands at the end: that is the suspect's own bug")
def _padded_at_the_end(x, num_kv_heads, group_rows):
    return wrong_kernels.lopsided(x, num_kv_heads, group_rows)


@heads.mistake("padding stands in front of each group: head 0 of a group has row 0")
def _padded_in_front(x, num_kv_heads, group_rows):
    missing = group_rows - len(x) // num_kv_heads
    return np.roll(_group_rows(x, num_kv_heads, group_rows), missing, axis=1)


@heads.mistake(
    "heads are dealt out in turns: query head h belongs to KV head h // group, so the heads of a "
    "group are neighbours"
)
def _dealt_out(x, num_kv_heads, group_rows):
    dealt = np.asarray(x).reshape(-1, num_kv_heads).T.reshape(-1)
    return _group_rows(dealt, num_kv_heads, group_rows)


@heads.mistake("rows without a head repeat another head: they have to be zero")
def _repeated(x, num_kv_heads, group_rows):
    group = len(x) // num_kv_heads
    padding = ((0, 0), (0, group_rows - group))
    return np.pad(np.asarray(x).reshape(num_kv_heads, group), padding, mode="edge")


# 11.6 quantise ------------------------------------------------------------------------------------

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def _quantized(x, scale, dtype, clip=True):
    wide = np.asarray(x).astype(np.float32) / np.float32(scale)
    if clip:
        wide = np.clip(wide, -LARGEST[dtype], LARGEST[dtype])
    with np.errstate(over="ignore"):
        return wide.astype(np.dtype(dtype)), float(scale)


def _scale(sample, dtype):
    largest = np.abs(np.asarray(sample).astype(np.float32)).max()
    return largest / LARGEST[dtype] if largest else 1.0


def _quantize(sample, x, dtype):
    return _quantized(x, _scale(sample, dtype), dtype)


def drive_quantize(function, sample, x, dtype):
    """(stored, scale), with the scale as a plain number."""
    result = function(sample, x, dtype)
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise WrongResult(
            f"your function returns a {type(result).__name__}, expected two: (stored, scale)"
        )
    stored, scale = result
    if np.ndim(scale) != 0:
        raise WrongResult(f"scale has shape {np.shape(scale)}, expected one number for the layer")
    return stored, float(scale)


def _on_grid(largest, dtype="float8_e4m3fn", in_dtype="float32", size=24, beyond=1.0):
    """A sample whose largest absolute value is negative, and x that does not lie near a tie."""
    grid = RNG.choice([-1, 1], size) * 2.0 ** RNG.integers(-3, 5, size)
    grid *= 1 + RNG.integers(0, 4, size) / 4
    unit = largest / LARGEST[dtype]
    x = grid * unit * (1 + 0.02 * RNG.uniform(-1, 1, size))
    x[0] = beyond * largest
    sample = 0.5 * largest * RNG.uniform(-1, 1, size)
    sample[3] = -largest
    shape = (size // 4, 2, 2)
    arrays = (a.reshape(shape).astype(np.dtype(in_dtype)) for a in (sample, x))
    return dict(zip(("sample", "x"), arrays, strict=True)) | {"dtype": dtype}


quantize = Exercise(
    "11.6",
    _quantize,
    axes=("token", "head", "lane"),
    outputs=("stored", "scale"),
    drive=drive_quantize,
)
quantize.case(
    "a sample from -8.96 to 1", sample=np.float32([[[1, -8.96]]]), x=np.float32([[[0.2, -4.48]]]),
    dtype="float8_e4m3fn",
)  # fmt: skip
quantize.case("keys of six tokens, two heads", **_on_grid(3.0))
quantize.case("a new token beyond the sample", **_on_grid(3.0, beyond=1.5))
quantize.case("the same, and negative", **_on_grid(3.0, beyond=-1.5))
quantize.case("the wider type", **_on_grid(5.0, "float8_e5m2"))
quantize.case("bfloat16 in", **_on_grid(2.95, in_dtype="bfloat16"))
quantize.case(
    "bfloat16 in, just above the middle of two numbers that are stored",
    sample=np.array([[[1, -296]]], ml_dtypes.bfloat16),
    x=np.array([[[11.25, -90]]], ml_dtypes.bfloat16), dtype="float8_e4m3fn",
)  # fmt: skip
quantize.case(
    "a sample of zeros", sample=np.zeros((1, 2, 2), np.float32),
    x=np.float32([[[0, 0.5], [1, -2]]]), dtype="float8_e4m3fn",
)  # fmt: skip


@quantize.mistake(
    "nothing is clipped: a number beyond the largest one becomes NaN (e4m3fn has no infinity), and "
    "the whole sequence with it"
)
def _not_clipped(sample, x, dtype):
    return _quantized(x, _scale(sample, dtype), dtype, clip=False)


@quantize.mistake(
    "the scale is taken from x: it has to be the same for all tokens of the layer, those of "
    "yesterday too, so it comes from the sample"
)
def _scale_of_x(sample, x, dtype):
    return _quantize(x, x, dtype)


@quantize.mistake(
    "the scale is taken from sample and x together: it is chosen once, before x is known, so it "
    "comes from the sample alone"
)
def _scale_of_both(sample, x, dtype):
    both = np.concatenate([np.ravel(np.asarray(a).astype(np.float32)) for a in (sample, x)])
    return _quantize(both, x, dtype)


@quantize.mistake("numbers are rounded to integers: float8 has fractions, and rounds by itself")
def _to_integers(sample, x, dtype):
    scale = _scale(sample, dtype)
    wide = np.asarray(x).astype(np.float32) / np.float32(scale)
    return _quantized(np.round(wide), 1.0, dtype)[0], scale


@quantize.mistake("the scale comes from the mean absolute value: it has to hold the largest one")
def _mean_scale(sample, x, dtype):
    mean = float(np.abs(np.asarray(sample).astype(np.float32)).mean())
    return _quantized(x, mean / LARGEST[dtype] if mean else 1.0, dtype)


@quantize.mistake("the sign is not thought of: the largest *absolute* value decides")
def _without_abs(sample, x, dtype):
    largest = max(float(np.asarray(sample).astype(np.float32).max()), 0.0)
    return _quantized(x, largest / LARGEST[dtype] if largest else 1.0, dtype)


@quantize.mistake(
    "the scale is the wrong way round: the kernel multiplies what is stored with it, to get back "
    "what it was"
)
def _inverse(sample, x, dtype):
    stored, scale = _quantize(sample, x, dtype)
    return stored, 1 / scale


@quantize.mistake(
    "the sample's largest value becomes 1: numbers from 1 up to the largest of the type are never "
    "used, and small ones lose digits at the lower end"
)
def _scaled_to_one(sample, x, dtype):
    largest = float(np.abs(np.asarray(sample).astype(np.float32)).max())
    return _quantized(x, largest or 1.0, dtype)


@quantize.mistake("448 is the largest number of e4m3fn; the other type reaches further")
def _always_448(sample, x, dtype):
    largest = float(np.abs(np.asarray(sample).astype(np.float32)).max())
    return _quantized(x, largest / 448.0 if largest else 1.0, dtype)


@quantize.mistake("a sample of zeros divides by zero: then any scale is right, take 1")
def _zero_over_zero(sample, x, dtype):
    largest = np.abs(np.asarray(sample).astype(np.float32)).max()
    with np.errstate(all="ignore"):
        return _quantized(x, largest / np.float32(LARGEST[dtype]), dtype)


@quantize.mistake(
    "x is divided as it comes, in bfloat16: its 8 bits are rounded once more to those of the type, "
    "and what was just above the middle goes down. Make it float32 first"
)
def _divided_in_bfloat16(sample, x, dtype):
    scale = _scale(sample, dtype)
    wide = np.asarray(x) / np.asarray(scale, x.dtype)
    return _quantized(wide, 1.0, dtype)[0], scale


@quantize.mistake("the scale is computed in bfloat16, which is off by up to 0.4 %")
def _scale_in_bfloat16(sample, x, dtype):
    largest = np.abs(np.asarray(sample)).max()
    scale = float(largest / np.asarray(LARGEST[dtype], sample.dtype)) if largest else 1.0
    return _quantized(x, scale, dtype)


@quantize.mistake("x is multiplied by the scale: what is stored is x / scale")
def _multiplied(sample, x, dtype):
    scale = _scale(sample, dtype)
    return _quantized(x, 1 / scale, dtype)[0], scale


@quantize.mistake("only numbers that are too large are clipped; those below -largest become NaN")
def _clipped_above(sample, x, dtype):
    scale = _scale(sample, dtype)
    wide = np.asarray(x).astype(np.float32) / np.float32(scale)
    return _quantized(np.minimum(wide, LARGEST[dtype]), 1.0, dtype, clip=False)[0], scale


# 11.7 a validator ---------------------------------------------------------------------------------

RULES = ("decode", "kv_len", "room", "page")


def _problems(
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    num_tokens,
    num_pages,
    page_size,
    *,
    slots=None,
    decode_end=0,
    live_of=None,
    page_is_wrong=None,
    too_short=None,
    not_decode=None,
):
    """The truth, and by its options what it is without one of its thoughts."""
    i, j, k = distribution.tolist()
    if not 0 <= i <= j <= k <= len(kv_lens):
        return [(-1, "distribution")]
    cu = cu_q_lens[: k + 1].tolist()
    if cu[0] != 0 or any(b < a for a, b in zip(cu, cu[1:], strict=False)) or cu[-1] > num_tokens:
        return [(-1, "cu_q_lens")]
    table = page_indices.reshape(len(kv_lens), -1)
    room = table.shape[1]
    page_is_wrong = page_is_wrong or (lambda page: not 0 <= page < num_pages)
    too_short = too_short or (lambda kv_len, q_len: kv_len < q_len)
    not_decode = not_decode or (lambda q_len: q_len > 1)
    problems = []
    for s in range(k if slots is None else slots(k, len(kv_lens))):
        q_len, kv_len = int(cu_q_lens[s + 1] - cu_q_lens[s]), int(kv_lens[s])
        live = min(cdiv(kv_len, page_size), room) if live_of is None else live_of(kv_len, room)
        broken = (
            s < (i, j)[decode_end] and not_decode(q_len),
            too_short(kv_len, q_len),
            kv_len > room * page_size,
            any(page_is_wrong(page) for page in table[s, : max(live, 0)].tolist()),
        )
        problems += [(s, rule) for rule, wrong in zip(RULES, broken, strict=True) if wrong]
    return problems


def list_of_problems(function, *arguments):
    """The learner's list as plain tuples, or a sentence on what it is instead."""
    problems = function(*arguments)
    if not isinstance(problems, list):
        raise WrongResult(
            f"your function returns a {type(problems).__name__}, expected a list of tuples "
            "(sequence, rule); the empty list for a legal batch"
        )
    for problem in problems:
        if not (isinstance(problem, tuple | list) and len(problem) == 2):
            raise WrongResult(
                f"an entry of your list is {problem!r}, expected a tuple (sequence, rule)"
            )
    return [(int(sequence), str(rule)) for sequence, rule in problems]


def _step(kv_lens, table, cu_q_lens, distribution, num_tokens=8):
    return {
        "kv_lens": ints(*kv_lens),
        "page_indices": np.array(table, np.int32).reshape(-1),
        "cu_q_lens": ints(*cu_q_lens),
        "distribution": ints(*distribution),
        "num_tokens": num_tokens,
        "num_pages": 10,
        "page_size": 4,
    }


G = GARBAGE
validator = Exercise("11.7", _problems, convert=np.array, drive=list_of_problems)
validator.case(
    "a decode and a fresh prompt, legal", **_step([5, 3], [[0, 9], [7, 1]], [0, 1, 4], [1, 1, 2])
)
validator.case(
    "a decode with two new tokens", **_step([5, 3], [[0, 1], [7, 2]], [0, 2, 5], [1, 1, 2])
)
validator.case(
    "kv_len without the new tokens", **_step([5, 0], [[0, 1], [7, 2]], [0, 1, 4], [1, 1, 2])
)
validator.case(
    "a page that does not exist", **_step([5, 8], [[0, 10], [-1, 2]], [0, 1, 4], [1, 1, 2])
)
validator.case(
    "garbage where no kernel looks, idle slots: legal",
    **_step(
        [5, 3, 0, 7, -G], [[0, 1], [7, -G], [G, G], [3, 4], [G, -1]], [0, 1, 3, 3, 3, -7],
        [1, 2, 4],
    ),
)  # fmt: skip
validator.case(
    "a sequence longer than its row", **_step([9, 4], [[0, 1], [7, 2]], [0, 1, 4], [1, 1, 2])
)
validator.case(
    "ranges that overlap", **_step([5, 3], [[0, 1], [7, 2]], [0, 1, 4], [2, 1, 2])
)  # fmt: skip
validator.case(
    "cu_q_lens that falls", **_step([5, 3, 4], [[0, 1], [7, 2], [3, 4]], [0, 3, 2, 5], [0, 0, 3])
)
validator.case(
    "more tokens than rows", **_step([5, 9], [[0, 1], [7, 2]], [0, 1, 9], [1, 1, 2])
)  # fmt: skip
validator.case(
    "as many tokens as rows: legal", **_step([5, 3], [[0, 9], [7, 1]], [0, 1, 4], [1, 1, 2], 4)
)
validator.case(
    "garbage in cu_q_lens behind the sequences in use: legal",
    **_step([5, 3, 0], [[0, 9], [7, 1], [G, G]], [0, 1, 4, G], [1, 1, 2]),
)
validator.case(
    "cu_q_lens that begins with 1", **_step([5, 3], [[0, 9], [7, 1]], [1, 2, 5], [1, 1, 2])
)
validator.case("a negative range", **_step([5, 3], [[0, 9], [7, 1]], [0, 1, 4], [-1, 1, 2]))
validator.case(
    "more sequences in use than there are slots",
    **_step([5, 3], [[0, 9], [7, 1]], [0, 1, 4], [1, 1, 3]),
)
validator.case(
    "an idle slot among the decodes: legal", **_step([5, 3], [[0, 9], [7, 1]], [0, 1, 1], [2, 2, 2])
)
validator.case(
    "two rules broken by one sequence", **_step([1, 3], [[0, 9], [7, 1]], [0, 2, 5], [1, 1, 2])
)
validator.case(
    "several things at once",
    **_step([9, 2, 3], [[0, 12], [7, 2], [-4, 3]], [0, 3, 6, 7], [1, 2, 3]),
)


validator.case(
    "three rules broken by one sequence: longer than its row, and shorter than its new tokens",
    **_step([9, 3], [[0, 9], [7, 1]], [0, 10, 13], [1, 1, 2], 16),
)


@validator.mistake("slots from distribution[2] on are looked at: they are unused, and hold garbage")
def _all_slots(*arguments):
    return _problems(*arguments, slots=lambda k, room: room)


@validator.mistake(
    "all entries of a row are looked at: those behind ceil(kv_len / page_size) are padding"
)
def _padding_too(*arguments):
    return _problems(*arguments, live_of=lambda kv_len, room: room)


@validator.mistake("page number num_pages passes: the last page is num_pages - 1")
def _one_page_too_many(*arguments):
    return _problems(*arguments, page_is_wrong=lambda page: not 0 <= page <= arguments[5])


@validator.mistake(
    "a negative page number passes: JAX counts it from the end, on another sequence's page"
)
def _negative_passes(*arguments):
    return _problems(*arguments, page_is_wrong=lambda page: page >= arguments[5])


@validator.mistake("a fresh prompt is refused: there kv_len equals q_len, which is legal")
def _fresh_refused(*arguments):
    return _problems(*arguments, too_short=lambda kv_len, q_len: kv_len <= q_len and q_len > 0)


@validator.mistake(
    "an idle slot is refused: q_len 0, with kv_len 0 too, is legal wherever it stands"
)
def _idle_refused(*arguments):
    return _problems(*arguments, too_short=lambda kv_len, q_len: kv_len < max(q_len, 1))


@validator.mistake("only the first problem is reported: each mended one then needs another call")
def _first_only(*arguments):
    return _problems(*arguments)[:1]


@validator.mistake("the chunked range [i, j) is held to one new token, too: only [0, i) decodes")
def _chunks_decode(*arguments):
    return _problems(*arguments, decode_end=1)


@validator.mistake("an idle slot in [0, i) is refused: a decode has at most one new token, or none")
def _idle_no_decode(*arguments):
    return _problems(*arguments, not_decode=lambda q_len: q_len != 1)


@validator.mistake("live pages are rounded down: a page that is begun is looked at, too")
def _live_rounded_down_too(*arguments):
    page_size = arguments[6]
    return _problems(*arguments, live_of=lambda kv_len, room: min(kv_len // page_size, room))


@validator.mistake("only the first broken rule of each sequence is reported: they are four ifs")
def _first_rule(*arguments):
    first = {}
    for sequence, rule in _problems(*arguments):
        first.setdefault(sequence, rule)
    return list(first.items())


@validator.mistake("`room` is asked only if `kv_len` holds: both rules may be broken")
def _room_in_elif(*arguments):
    found = _problems(*arguments)
    return [(s, rule) for s, rule in found if rule != "room" or (s, "kv_len") not in found]


@validator.mistake("a range that is empty is refused: i == j means that no sequence is a chunk")
def _empty_range_refused(*arguments):
    i, j, k = arguments[3].tolist()
    return _problems(*arguments) if 0 <= i < j < k else [(-1, "distribution")]


@validator.mistake("`cu_q_lens` that begins with another number than 0 passes")
def _any_begin(kv_lens, page_indices, cu_q_lens, *rest):
    shifted = np.append(0, cu_q_lens[1:]) if cu_q_lens[0] > 0 else cu_q_lens
    found = _problems(kv_lens, page_indices, shifted, *rest)
    if shifted is cu_q_lens or found[:1] == [(-1, "cu_q_lens")]:
        return found
    return _problems(kv_lens, page_indices, cu_q_lens - cu_q_lens[0], *rest)


@validator.mistake("idle slots are refused: `cu_q_lens` must not fall, and it may stay as it is")
def _must_grow(*arguments):
    cu, k = arguments[2], int(arguments[3][2])
    found = _problems(*arguments)
    if found[:1] == [(-1, "distribution")] or (np.diff(cu[: k + 1]) > 0).all():
        return found
    return [(-1, "cu_q_lens")]


@validator.mistake(
    "all of `cu_q_lens` is looked at: behind entry k it may hold anything, and entry k is the one "
    "that must not be more than num_tokens"
)
def _all_of_cu(*arguments):
    cu, num_tokens = arguments[2], arguments[4]
    found = _problems(*arguments)
    wrong = (np.diff(cu) < 0).any() or cu[-1] > num_tokens
    return [(-1, "cu_q_lens")] if wrong and found[:1] != [(-1, "distribution")] else found


@validator.mistake(
    "the last entry of `cu_q_lens` is compared with num_tokens: it is entry k, behind which there "
    "may be garbage"
)
def _last_entry_of_cu(*arguments):
    too_many = arguments[2][-1] > arguments[4]
    found = _problems(*arguments[:4], 10**6, *arguments[5:])
    return [(-1, "cu_q_lens")] if too_many and found[:1] != [(-1, "distribution")] else found


@validator.mistake("a batch whose k is larger than the number of slots passes")
def _k_not_bounded(kv_lens, page_indices, cu_q_lens, distribution, *sizes):
    cut = np.minimum(distribution, len(kv_lens)).astype(np.int32)
    return _problems(kv_lens, page_indices, cu_q_lens, cut, *sizes)
