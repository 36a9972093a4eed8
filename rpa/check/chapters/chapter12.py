"""Checks of chapter 12: the comparison.

References and mistakes are NumPy. An entry to the challenge (12.5) runs in the interpreter, traced
once: its kernels take most of the check's time.
"""

import jax
import ml_dtypes
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from rpa import interpreter
from rpa.check.errors import CannotShip, WrongResult
from rpa.check.exercise import Exercise
from rpa.check.sandbox import fast_compile
from rpa.check.sandbox.pickling import pack
from rpa.lab.schedule.pallas_calls import pallas_calls
from rpa.ragged import RaggedBatch

RNG = np.random.default_rng(10)


def floats(*values):
    """f32[len(values)]."""
    return np.array(values, np.float32)


# 12.1 one number for many cases -------------------------------------------------------------------


def _overall(times_us, baseline_us):
    return np.exp(np.log(baseline_us / times_us).mean())


overall = Exercise("12.1", _overall, convert=np.array)
overall.case("one case, twice as fast", times_us=floats(10), baseline_us=floats(20))
overall.case(
    "twice as fast here, half as fast there", times_us=floats(10, 40), baseline_us=floats(20, 20)
)
overall.case("a long case and a short one", times_us=floats(1000, 2), baseline_us=floats(1000, 8))
overall.case(
    "three chips, three batches",
    times_us=floats(138, 71, 36, 52, 31, 19, 410, 260, 120),
    baseline_us=floats(169, 110, 77, 50, 37, 29, 430, 300, 210),
)


@overall.mistake(
    "the arithmetic mean of the ratios is taken: twice and half as fast would be 1.25 times faster"
)
def _arithmetic(times_us, baseline_us):
    return (baseline_us / times_us).mean()


@overall.mistake("times are added up first: the longest case decides alone")
def _ratio_of_sums(times_us, baseline_us):
    return baseline_us.sum() / times_us.sum()


@overall.mistake("the ratio is upside down: a speedup above 1 is faster than the baseline")
def _upside_down(times_us, baseline_us):
    return np.exp(np.log(times_us / baseline_us).mean())


@overall.mistake("the ratios are multiplied and the root is forgotten")
def _no_root(times_us, baseline_us):
    return np.prod(baseline_us / times_us)


@overall.mistake("the mean of time over baseline is taken, and turned round afterwards")
def _harmonic(times_us, baseline_us):
    return 1 / (times_us / baseline_us).mean()


@overall.mistake(
    "the median is taken: it looks at one or two cases, and forgets how far off the others are"
)
def _median(times_us, baseline_us):
    return np.median(baseline_us / times_us)


@overall.mistake("it is the mean of the logarithms; np.exp brings it back")
def _logarithm(times_us, baseline_us):
    return np.log(baseline_us / times_us).mean()


# 12.2 the time of a call --------------------------------------------------------------------------


def _call_time(once_us, twice_us, calls):
    return np.median((twice_us - once_us) / calls)


call_time = Exercise("12.2", _call_time, convert=np.array)
call_time.case("starting takes 50 us, a call 3", once_us=floats(80), twice_us=floats(110), calls=10)
call_time.case(
    "the third sample was disturbed",
    once_us=floats(80, 81, 80, 80, 79),
    twice_us=floats(110, 111, 190, 110, 110),
    calls=10,
)
call_time.case(
    "both loops of a sample were slow together",
    once_us=floats(80, 120, 84, 90, 79),
    twice_us=floats(111, 152, 114, 119, 112),
    calls=10,
)
call_time.case(
    "the first sample was quick",
    once_us=floats(480, 450, 450),
    twice_us=floats(500, 850, 852),
    calls=100,
)

call_time.case(
    "a shorter loop was disturbed so much that the longer one took less time",
    once_us=floats(80, 80, 200, 81, 80),
    twice_us=floats(111, 110, 110, 110, 112),
    calls=10,
)


@call_time.mistake("the longer loop is divided by its calls: what starting costs is in it")
def _start_included(once_us, twice_us, calls):
    return np.median(twice_us / (2 * calls))


@call_time.mistake("the shorter loop is divided by its calls: what starting costs is in it")
def _short_only(once_us, twice_us, calls):
    return np.median(once_us / calls)


@call_time.mistake("the mean is taken: one disturbed sample moves it")
def _mean_of_samples(once_us, twice_us, calls):
    return np.mean((twice_us - once_us) / calls)


@call_time.mistake("the smallest sample is taken: in a difference, a slow start looks like speed")
def _smallest(once_us, twice_us, calls):
    return np.min((twice_us - once_us) / calls)


@call_time.mistake("the difference is divided by 2 * calls; the loops differ by `calls` calls")
def _divided_twice(once_us, twice_us, calls):
    return np.median((twice_us - once_us) / (2 * calls))


@call_time.mistake(
    "the median of each kind of loop is taken before the difference: what disturbs both loops of "
    "a sample cancels only within it"
)
def _medians_first(once_us, twice_us, calls):
    return (np.median(twice_us) - np.median(once_us)) / calls


@call_time.mistake(
    "the sign of the differences is taken away: where the shorter loop was disturbed one may be "
    "negative, and has to stay below the median, not go above it"
)
def _absolute(once_us, twice_us, calls):
    return np.median(np.abs(twice_us - once_us) / calls)


@call_time.mistake(
    "samples with a negative difference are left out: then only those that were disturbed upwards "
    "are left, and the median moves with them"
)
def _positive_only(once_us, twice_us, calls):
    samples_us = (twice_us - once_us) / calls
    return np.median(samples_us[samples_us > 0])


# 12.3 neighbours in one copy ----------------------------------------------------------------------


def list_of_runs(function, *arguments):
    """The learner's list as plain tuples of integers, or a sentence on what it is instead."""
    runs = function(*arguments)
    if not isinstance(runs, list):
        raise WrongResult(
            f"your function returns a {type(runs).__name__}, expected a list of tuples "
            "(first_page, num_pages)"
        )
    for run in runs:
        if not (isinstance(run, tuple | list) and len(run) == 2):
            raise WrongResult(
                f"an entry of your list is {run!r}, expected a tuple of two numbers "
                "(first_page, num_pages)"
            )
    return [tuple(int(number) for number in run) for run in runs]


def _runs(pages, most, joins=lambda last, page: page == last + 1, order=list):
    """Runs of pages; `joins(last page of the run, page)` says whether a page continues it."""
    found = []
    for page in order(pages):
        if found and joins(found[-1][1], page) and found[-1][2] < most:
            found[-1] = (found[-1][0], page, found[-1][2] + 1)
        else:
            found.append((page, page, 1))
    return [(int(first), size) for first, _, size in found]


def _page_runs(pages, most):
    return _runs(pages, most)


def _ints(*values):
    return np.array(values, np.int32)


page_runs = Exercise("12.3", _page_runs, convert=np.array, drive=list_of_runs)
page_runs.case("three neighbours and one alone", pages=_ints(4, 5, 6, 2), most=8)
page_runs.case("a copy takes two pages at most", pages=_ints(4, 5, 6, 7, 8), most=2)
page_runs.case("neighbours in the wrong order", pages=_ints(9, 8, 7, 3, 4), most=4)
page_runs.case("a page twice, as in a table with idle entries", pages=_ints(0, 1, 1, 2), most=4)
page_runs.case("the last run is the longest", pages=_ints(7, 0, 1, 2, 3), most=4)
page_runs.case("neighbours with others between them", pages=_ints(3, 9, 4, 10, 5), most=4)


@page_runs.mistake("the pages are sorted first: then the tokens arrive in another order")
def _sorted(pages, most):
    return _runs(pages, most, order=sorted)


@page_runs.mistake("`most` is not looked at: a copy has one size, and the buffer has an end")
def _no_limit(pages, most):
    return _runs(pages, len(pages))


@page_runs.mistake("a run may be one page longer than `most`")
def _one_too_long(pages, most):
    return _runs(pages, most + 1)


@page_runs.mistake("pages that count down are joined, too: a copy reads upwards")
def _both_ways(pages, most):
    return _runs(pages, most, joins=lambda last, page: abs(page - last) == 1)


@page_runs.mistake("any larger page continues a run: only the next one is its neighbour in memory")
def _any_larger(pages, most):
    return _runs(pages, most, joins=lambda last, page: page > last)


@page_runs.mistake("the last run is left out: the loop ends before it is written down")
def _last_left_out(pages, most):
    return _runs(pages, most)[:-1]


@page_runs.mistake(
    "a page that stands there twice is copied once: each of its places needs its tokens"
)
def _once_each(pages, most):
    return _runs(pages, most, order=lambda pages: dict.fromkeys(pages.tolist()))


@page_runs.mistake(
    "the second number is the last page of the run; it should say how many there are"
)
def _last_page(pages, most):
    return [(first, first + size - 1) for first, size in _page_runs(pages, most)]


@page_runs.mistake(
    "the second number is where the run ends; it should say how many pages there are"
)
def _end_of_run(pages, most):
    return [(first, first + size) for first, size in _page_runs(pages, most)]


@page_runs.mistake("each page is a copy of its own: neighbours can share one")
def _page_by_page(pages, most):
    return _runs(pages, 1)


# 12.4 two parts of one attention ------------------------------------------------------------------


def _merge(output_a, lse_a, output_b, lse_b):
    largest = np.maximum(lse_a, lse_b)
    weight_a, weight_b = np.exp(lse_a - largest), np.exp(lse_b - largest)
    total = weight_a + weight_b
    output = (weight_a[:, None] * output_a + weight_b[:, None] * output_b) / total[:, None]
    return output.astype(np.float32), (largest + np.log(total)).astype(np.float32)


def _merge_arguments(lse_a, lse_b, lanes=2):
    shape = (len(lse_a), lanes)
    return {
        "output_a": RNG.standard_normal(shape).astype(np.float32),
        "lse_a": floats(*lse_a),
        "output_b": RNG.standard_normal(shape).astype(np.float32),
        "lse_b": floats(*lse_b),
    }


merge = Exercise("12.4", _merge, axes=("row", "lane"), outputs=("output", "lse"), convert=np.array)
merge.case("both parts weigh the same", **_merge_arguments([1.0], [1.0]))
merge.case("the first weighs three times as much", **_merge_arguments([np.log(3.0)], [0.0]))
merge.case("several rows", **_merge_arguments([0.5, -2.0, 3.0], [1.5, 2.0, -3.0], lanes=4))
merge.case("large scores", **_merge_arguments([120.0, 95.0], [119.0, 130.0]))
merge.case("nothing in the second part", **_merge_arguments([2.0, 0.0], [-np.inf, -np.inf]))
merge.case("nothing in the first part", **_merge_arguments([-np.inf, -np.inf], [2.0, 0.0]))
merge.case("rows far apart, parts far apart", **_merge_arguments([0.0, 10.0], [120.0, 300.0]))


@merge.mistake("both parts weigh the same: the part with the larger scores has to count more")
def _plain_mean(output_a, lse_a, output_b, lse_b):
    return (output_a + output_b) / 2, np.logaddexp(lse_a, lse_b)


@merge.mistake("the weights are the log-sum-exps themselves: a sum of exponentials is exp(lse)")
def _weights_not_exp(output_a, lse_a, output_b, lse_b):
    total = lse_a + lse_b
    output = (lse_a[:, None] * output_a + lse_b[:, None] * output_b) / total[:, None]
    return output, np.logaddexp(lse_a, lse_b)


@merge.mistake("exp(lse) is taken as it is, and overflows: subtract the larger of the two first")
def _no_maximum(output_a, lse_a, output_b, lse_b):
    with np.errstate(over="ignore", invalid="ignore"):
        weight_a, weight_b = np.exp(lse_a), np.exp(lse_b)
        total = weight_a + weight_b
        output = (weight_a[:, None] * output_a + weight_b[:, None] * output_b) / total[:, None]
        return output, np.log(total)


@merge.mistake("the weights are exchanged")
def _exchanged(output_a, lse_a, output_b, lse_b):
    return _merge(output_b, lse_a, output_a, lse_b)


@merge.mistake("the parts are added without dividing by the sum of both weights")
def _not_divided(output_a, lse_a, output_b, lse_b):
    output, lse = _merge(output_a, lse_a, output_b, lse_b)
    return output * np.exp(lse - np.maximum(lse_a, lse_b))[:, None], lse


@merge.mistake("the log-sum-exps are added: it is their exponentials that add up")
def _lse_added(output_a, lse_a, output_b, lse_b):
    return _merge(output_a, lse_a, output_b, lse_b)[0], lse_a + lse_b


@merge.mistake("the larger log-sum-exp is returned: that of both parts is larger than either")
def _lse_of_larger(output_a, lse_a, output_b, lse_b):
    return _merge(output_a, lse_a, output_b, lse_b)[0], np.maximum(lse_a, lse_b)


@merge.mistake(
    "`lse` lacks what was subtracted: the larger of the two has to be added to the logarithm again"
)
def _lse_without_largest(output_a, lse_a, output_b, lse_b):
    output, lse = _merge(output_a, lse_a, output_b, lse_b)
    return output, lse - np.maximum(lse_a, lse_b)


@merge.mistake("the mean of the log-sum-exps is returned: it is their exponentials that add up")
def _lse_mean(output_a, lse_a, output_b, lse_b):
    return _merge(output_a, lse_a, output_b, lse_b)[0], (lse_a + lse_b) / 2


@merge.mistake("powers and logarithms are those of 2; `lse` is a natural logarithm")
def _powers_of_two(output_a, lse_a, output_b, lse_b):
    factor = np.float32(np.log(2))  # 2^x is e^(x log 2)
    output, lse = _merge(output_a, lse_a * factor, output_b, lse_b * factor)
    return output, lse / factor


@merge.mistake("the smaller of the two is subtracted: then the larger weight overflows")
def _smaller_subtracted(output_a, lse_a, output_b, lse_b):
    smallest = np.minimum(lse_a, lse_b)
    with np.errstate(over="ignore", invalid="ignore"):
        output, lse = _no_maximum(output_a, lse_a - smallest, output_b, lse_b - smallest)
        return output, smallest + lse


# 12.5 the challenge -------------------------------------------------------------------------------

SCALE = 128**-0.5

PAGE_SIZE = 128
"""That of the challenge. Smaller pages are more copies in a row, and take longer to compile."""


_results = {}  # of entries that have run, by `_fingerprint`: one takes some seconds


def _fingerprint(function) -> str | None:
    """The same as long as an entry, and all that it uses of its notebook, stay the same."""
    try:
        parcel = pack(function)
    except CannotShip:
        return None
    return repr((parcel.sources, parcel.values, parcel.imports))


def drive_entry(function, queries, keys, values, kv_cache, batch):
    """(output, kv_cache) of an entry in the interpreter, or of a NumPy model of one."""
    if function.__module__ == __name__:
        return function(queries, keys, values, kv_cache, batch)
    key = _fingerprint(function)
    if key not in _results:
        results = run_entry(function, queries, keys, values, kv_cache, batch)
        if key is None:
            return results
        _results[key] = results
    return _results[key]


def run_entry(function, queries, keys, values, kv_cache, batch):
    """(output, kv_cache) of an entry in the interpreter.

    Raises:
        WrongResult: if it donates the cache, takes no notice of its backend, or returns something
            else than two arrays.
    """
    options = {"sm_scale": SCALE, "backend": _Given(**vars(interpreter.params()))}
    attend = jax.jit(lambda *arrays: function(*arrays, batch, **options))
    with jax.default_device(jax.devices("cpu")[0]):
        traced = attend.trace(queries, keys, values, kv_cache)
        if _gives_away(traced.jaxpr.jaxpr, argument=3):
            raise WrongResult(
                "your function gives the caller's cache away: pass donate=False to rung 8, which "
                "otherwise updates it in place"
            )
        for call in pallas_calls(traced.jaxpr):
            if not isinstance(call.eqn.params["interpret"], _Given):
                raise WrongResult(
                    f"the kernel {call.name!r} does not run where `backend` says: pass "
                    "backend=backend to rung 8, and to a kernel of your own "
                    'interpret=False if backend == "tpu" else backend. Otherwise it cannot be '
                    "counted"
                )
        compiled = traced.lower().compile(compiler_options=fast_compile.options())
        results = compiled(queries, keys, values, kv_cache)
    if not (isinstance(results, tuple | list) and len(results) == 2):
        raise WrongResult(
            f"your function returns a {type(results).__name__}, expected a tuple of two arrays: "
            "(output, kv_cache)"
        )
    return tuple(np.asarray(result) for result in results)


class _Given(pltpu.InterpretParams):
    """The backend of the check, told apart from one that an entry has chosen itself."""


def _gives_away(jaxpr, argument) -> bool:
    """Whether a trace donates this argument to a function that it calls."""
    same = {jaxpr.invars[argument]}  # the variables that stand for it
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "forward_only":  # passes its operands on
            same |= {o for i, o in zip(eqn.invars, eqn.outvars, strict=True) if _is_in(i, same)}
        donated = zip(eqn.invars, eqn.params.get("donated_invars", ()), strict=False)
        if any(is_donated and _is_in(variable, same) for variable, is_donated in donated):
            return True
    return False


def _is_in(atom, variables) -> bool:
    return any(atom is variable for variable in variables)  # a literal has no hash


def _attend(queries, keys, values, kv_cache, batch, *, sm_scale=SCALE, store=True, mask=True,
            seen=None, rounded=lambda x: x):  # fmt: skip
    """Sequence after sequence in NumPy; `seen(s, kv_len)` is the first position that s reads."""
    queries, keys, values = (np.asarray(x) for x in (queries, keys, values))
    cache, output = rounded(np.array(kv_cache)), np.zeros_like(queries)
    new = np.array(cache)
    table = np.asarray(batch.page_indices).reshape(len(batch.kv_lens), -1)
    for s in range(int(batch.num_seqs)):
        start, end = (int(x) for x in batch.cu_q_lens[s : s + 2])
        kv_len, page_size = int(batch.kv_lens[s]), cache.shape[1]
        positions = kv_len - (end - start) + np.arange(end - start)
        place = table[s, positions // page_size], positions % page_size
        new[(*place, slice(0, None, 2), 0)] = rounded(keys[start:end])
        new[(*place, slice(1, None, 2), 0)] = rounded(values[start:end])
        strip = new[table[s]].reshape(-1, *new.shape[2:])[:kv_len, :, 0]
        first = 0 if seen is None else seen(s, kv_len)
        visible = np.arange(kv_len)[None] <= positions[:, None] if mask else True
        visible = visible & (np.arange(kv_len)[None] >= first)
        output[start:end] = _heads(queries[start:end], strip, visible, sm_scale)
    return output, new if store else cache


def _heads(queries, strip, visible, sm_scale):
    """Attention of one sequence: [q_len, num_q_heads, head_dim]; strip [kv_len, 2 * kv, lanes]."""
    output, group = np.zeros_like(queries), queries.shape[1] // (strip.shape[1] // 2)
    for h in range(queries.shape[1]):
        k, v = strip[:, h // group * 2], strip[:, h // group * 2 + 1]
        scores = np.where(visible, sm_scale * queries[:, h].astype(np.float64) @ k.T, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        output[:, h] = weights @ v / weights.sum(axis=1, keepdims=True)
    return output


def _right(queries, keys, values, kv_cache, batch):
    return _attend(queries, keys, values, kv_cache, batch)


def _step_arguments():
    """Two decodes that share their first page, one of its own, a chunk behind 123 cached tokens."""
    table = [[3, 1], [3, 5], [7, 2], [6, 4]]
    batch, _ = RaggedBatch.from_lengths([1, 1, 1, 10], [131, 140, 77, 133], table)
    shapes = [(13, 2, 128), (13, 1, 128), (13, 1, 128), (8, PAGE_SIZE, 2, 1, 128)]
    names = ("queries", "keys", "values", "kv_cache")
    arrays = {
        name: RNG.standard_normal(shape).astype(np.float32)
        for name, shape in zip(names, shapes, strict=True)
    }
    return arrays | {"batch": batch}


entry = Exercise(
    "12.5",
    _right,
    outputs=("output", "kv_cache"),
    axes=("token", "head", "lane"),
    convert=np.array,
    drive=drive_entry,
    limit_s=300.0,
)
entry.case("three decodes, two of them with a shared page, and a chunk", **_step_arguments())


@entry.mistake("the scores are not scaled: pass sm_scale on")
def _entry_not_scaled(*arrays):
    return _attend(*arrays, sm_scale=1.0)


@entry.mistake("the new tokens are not stored: the next step cannot read them")
def _entry_not_stored(*arrays):
    return _attend(*arrays, store=False)


@entry.mistake("a chunk sees its own future: the causal mask is off")
def _entry_not_causal(*arrays):
    return _attend(*arrays, mask=False)


@entry.mistake(
    "K and V are rounded to float8: half of the bytes, and another answer. The challenge is exact"
)
def _entry_rounded(*arrays):
    dtype = ml_dtypes.float8_e4m3fn
    return _attend(*arrays, rounded=lambda x: x.astype(dtype).astype(np.float32))


@entry.mistake(
    "the shared page is read for the first sequence only, and its part is merged into no other"
)
def _entry_prefix_dropped(*arrays):
    return _attend(*arrays, seen=lambda s, kv_len: PAGE_SIZE if s == 1 else 0)


@entry.mistake("the cached tokens are not read: only the new ones are attended to")
def _entry_new_only(queries, keys, values, kv_cache, batch):
    q_lens = np.diff(np.asarray(batch.cu_q_lens))
    return _attend(
        *(queries, keys, values, kv_cache, batch),
        seen=lambda s, kv_len: kv_len - int(q_lens[s]),
    )
