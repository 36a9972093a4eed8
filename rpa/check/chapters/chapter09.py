"""Checks of chapter 9: reading schedules, and one optimisation whose schedule is compiled.

References and mistakes are NumPy and plain Python; the learner's kernel of 9.3 runs in the
interpreter and is then compiled for a v5e, see `rpa.check.chapters.ablation`.
"""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np

from rpa import interpreter
from rpa.check.chapters.ablation import is_model, with_schedule
from rpa.check.chapters.launchers import interpreted
from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise
from rpa.lab import chip
from rpa.lab.schedule import inner_loop

RNG = np.random.default_rng(8)

# 9.1 name the bound -------------------------------------------------------------------------------

PARTS = ("fill", "spill")  # of loads and of stores: no units of their own


def _shares(bundles, slots, capacity, without=PARTS):
    return {u: n / (capacity[u] * bundles) for u, n in slots.items() if u not in without}


def _fullest(share, least=0.8):
    unit = max(share, key=share.get)
    return unit if share[unit] >= least else "latency"


def _name_the_bound(bundles, slots, capacity, hbm_cycles):
    if hbm_cycles > bundles:
        return "HBM", hbm_cycles
    return _fullest(_shares(bundles, slots, capacity)), bundles


def _listing(bundles, hbm_cycles, **used):
    """A case: (slots used, capacity) by unit."""
    slots = {unit: n for unit, (n, _) in used.items()}
    capacity = {unit: c for unit, (_, c) in used.items()}
    return {"bundles": bundles, "slots": slots, "capacity": capacity, "hbm_cycles": hbm_cycles}


name_the_bound = Exercise(
    "9.1", _name_the_bound, outputs=("bound", "cycles"), convert=np.array, tolerance=1e-6
)
name_the_bound.case("ten bundles", **_listing(10, 4, MATMUL=(9, 1), VALU=(12, 4)))
name_the_bound.case("more slots, less full", **_listing(10, 4, MATMUL=(9, 1), VALU=(28, 4)))
name_the_bound.case("two are full", **_listing(20, 4, MATMUL=(17, 1), VALU=(76, 4)))
name_the_bound.case("no unit is busy", **_listing(10, 4, MATMUL=(5, 1), VALU=(12, 4)))
name_the_bound.case("busy, and waiting for HBM", **_listing(10, 12, MATMUL=(9, 1), VALU=(12, 4)))
name_the_bound.case("idle, and waiting for HBM", **_listing(10, 11, MATMUL=(2, 1), VALU=(8, 4)))
name_the_bound.case(
    "spills", **_listing(100, 60, VALU=(330, 4), XLU=(80, 2), store=(81, 1), spill=(81, 1))
)
name_the_bound.case(
    "exactly 80 %", **_listing(50, 50, MATPUSH=(160, 4), load=(90, 3), fill=(60, 1))
)


@name_the_bound.mistake(
    "the unit with the most slots is taken: a bundle has 4 slots for VALU and 1 for MATMUL, so "
    "count in parts of what there is"
)
def _most_slots(bundles, slots, capacity, hbm_cycles):
    unit = max((u for u in slots if u not in PARTS), key=slots.get)
    full = _shares(bundles, slots, capacity)[unit] >= 0.8
    return ("HBM", hbm_cycles) if hbm_cycles > bundles else (unit if full else "latency", bundles)


@name_the_bound.mistake(
    "the fullest unit is named however idle it is: under 80 % no unit is full, and what takes the "
    "time is waiting for results: latency"
)
def _never_latency(bundles, slots, capacity, hbm_cycles):
    if hbm_cycles > bundles:
        return "HBM", hbm_cycles
    return _fullest(_shares(bundles, slots, capacity), least=0), bundles


@name_the_bound.mistake("HBM is not asked: where its cycles are more than the bundles, it binds")
def _without_hbm(bundles, slots, capacity, hbm_cycles):
    return _fullest(_shares(bundles, slots, capacity)), bundles


@name_the_bound.mistake(
    "HBM and bundles are added: the copies of the next block run while this one is computed"
)
def _added(bundles, slots, capacity, hbm_cycles):
    return _name_the_bound(bundles, slots, capacity, hbm_cycles)[0], bundles + hbm_cycles


@name_the_bound.mistake(
    "where HBM binds, HBM and bundles are added: the copies run while the block before is computed"
)
def _added_where_hbm_binds(bundles, slots, capacity, hbm_cycles):
    bound, cycles = _name_the_bound(bundles, slots, capacity, hbm_cycles)
    return bound, cycles + bundles * (bound == "HBM")


@name_the_bound.mistake("where HBM binds, the bundles are the time: it takes the HBM's cycles")
def _bundles_where_hbm_binds(bundles, slots, capacity, hbm_cycles):
    return _name_the_bound(bundles, slots, capacity, hbm_cycles)[0], bundles


@name_the_bound.mistake(
    "slots are divided by bundles alone: a bundle has more than one slot of some units, and that "
    "is what `capacity` says"
)
def _without_capacity(bundles, slots, capacity, hbm_cycles):
    if hbm_cycles > bundles:
        return "HBM", hbm_cycles
    return _fullest(_shares(bundles, slots, dict.fromkeys(slots, 1))), bundles


@name_the_bound.mistake(
    "a full unit comes before HBM: it may be full and yet have to wait, for time is the larger of "
    "the two"
)
def _unit_first(bundles, slots, capacity, hbm_cycles):
    unit = _fullest(_shares(bundles, slots, capacity))
    right = _name_the_bound(bundles, slots, capacity, hbm_cycles)
    return (unit, right[1]) if unit != "latency" else right


@name_the_bound.mistake("exactly 80 % does not count as full: >= and not >")
def _more_than(bundles, slots, capacity, hbm_cycles):
    bound, cycles = _name_the_bound(bundles, slots, capacity, hbm_cycles)
    if bound in slots and max(_shares(bundles, slots, capacity).values()) <= 0.8:
        return "latency", cycles
    return bound, cycles


@name_the_bound.mistake(
    "fills or spills are named: they are loads and stores, counted there already, and no units"
)
def _parts_are_units(bundles, slots, capacity, hbm_cycles):
    if hbm_cycles > bundles:
        return "HBM", hbm_cycles
    share = _shares(bundles, slots, capacity, without=())
    last_first = dict(reversed(share.items()))  # of two alike the later one
    return _fullest(last_first), bundles


@name_the_bound.mistake("the first unit with 80 % or more is named; asked is the fullest one")
def _first_full(bundles, slots, capacity, hbm_cycles):
    if hbm_cycles > bundles:
        return "HBM", hbm_cycles
    share = _shares(bundles, slots, capacity)
    return next((unit for unit in share if share[unit] >= 0.8), "latency"), bundles


@name_the_bound.mistake(
    "no unit is ever full: a share is a part between 0 and 1 (0.8, not 80), and the fullest unit "
    "decides, not the mean of all"
)
def _always_latency(bundles, slots, capacity, hbm_cycles):
    return ("HBM", hbm_cycles) if hbm_cycles > bundles else ("latency", bundles)


@name_the_bound.mistake("HBM binds where it needs just as many cycles: it has to need more")
def _hbm_when_equal(bundles, slots, capacity, hbm_cycles):
    if hbm_cycles >= bundles:
        return "HBM", hbm_cycles
    return _name_the_bound(bundles, slots, capacity, hbm_cycles)


# 9.2 banks ----------------------------------------------------------------------------------------


def _loads(stride, num_banks, rows):
    return int(np.bincount(stride * np.arange(rows) % num_banks).max())


def _rows(stride, num_banks=32, rows=8):
    return {"stride": stride, "num_banks": num_banks, "rows": rows}


loads_per_register = Exercise("9.2", _loads, convert=np.array, tolerance=0.0)
loads_per_register.case("neighbours", **_rows(1))
loads_per_register.case("every 8th row", **_rows(8))
loads_per_register.case("every 9th", **_rows(9))
loads_per_register.case("every 12th: even, and harmless", **_rows(12))
loads_per_register.case("every 16th", **_rows(16))
loads_per_register.case("every 32nd: all in one bank", **_rows(32))
loads_per_register.case("every 24th", **_rows(24))
loads_per_register.case("every 8th row of 16 banks", **_rows(8, num_banks=16))
loads_per_register.case("16 rows", **_rows(4, rows=16))


@loads_per_register.mistake(
    "an even distance takes two loads, an odd one takes one: how many rows meet depends on how "
    "often 2 divides the distance"
)
def _by_parity(stride, num_banks, rows):
    return 1 if stride % 2 else 2


@loads_per_register.mistake("all rows but the first in a bank are counted, in all banks together")
def _all_collisions(stride, num_banks, rows):
    return rows - len(set(stride * np.arange(rows) % num_banks))


@loads_per_register.mistake(
    "the banks that are used are counted: asked is how many rows share the fullest one"
)
def _used_banks(stride, num_banks, rows):
    return len(set(stride * np.arange(rows) % num_banks))


@loads_per_register.mistake(
    "the rows count as if they went round the banks one by one: row i lies in bank i * stride, "
    "modulo the number of banks"
)
def _without_stride(stride, num_banks, rows):
    return _loads(1, num_banks, rows)


@loads_per_register.mistake(
    "the common divisor of distance and banks is taken: that is how many banks apart the rows "
    "lie, and there may be fewer rows than would fill them"
)
def _divisor(stride, num_banks, rows):
    return int(np.gcd(stride, num_banks))


@loads_per_register.mistake(
    "the bank of a row is r // num_banks: neighbours lie in different banks"
)
def _divided(stride, num_banks, rows):
    return int(np.bincount(stride * np.arange(rows) // num_banks).max())


# 9.3 the order of the products --------------------------------------------------------------------

MOST_BUNDLES = 1500

IN_TURN = "in an order in which the matrix unit waits for every softmax"


def judge_order(bundles, chip):
    """Refuse a schedule that is too long."""
    if bundles <= MOST_BUNDLES:
        return None
    return textwrap.fill(
        f"Your kernel computes the right numbers, {IN_TURN}: {bundles:,} bundles on a {chip}, and "
        f"{MOST_BUNDLES:,} are enough. P V of a head needs its softmax; Q K^T of the next head "
        "needs nothing of it. Which of the two do you issue first?",
        100,
    )


def drive_order(kernel, q, kv, chip):
    """out f32[1, heads, group, head_dim] of a kernel, in the interpreter."""
    if is_model(kernel):
        return kernel(q, kv, chip)
    # The first jax that is supported traces a kernel only as it is called.
    with interpreted():
        return inner_loop.call(kernel, q, kv, interpret=interpreter.params())[0]


def _attend_each(q, kv, chip, *, values_of=None, totals_of=None):
    """Every head; the values, or the sums, of another one where it says so."""
    q, kv = (np.asarray(x, np.float32)[0] for x in (q, kv))
    num_heads = len(q)
    out = []
    for head in range(num_heads):
        weights = _weights(q, kv, head)
        v = kv[:, values_of(head, num_heads) if values_of else head, 1]
        other = totals_of(head, num_heads) if totals_of else head
        out.append(weights @ v / _weights(q, kv, other).sum(axis=1, keepdims=True))
    return np.array(out, np.float32)


def _weights(q, kv, head):
    s = q[head] @ kv[:, head, 0].T
    return np.exp2(s - s.max(axis=1, keepdims=True))


def _heads(num_tokens, chip, num_heads=8):
    q = 0.1 * RNG.standard_normal((1, num_heads, 4, 128))
    kv = RNG.standard_normal((1, num_tokens, num_heads | 1, 2, 128))
    kv[:, :, num_heads:] = np.nan  # no kernel may read what only keeps the distance
    return {"q": q.astype(jnp.bfloat16), "kv": kv.astype(jnp.bfloat16), "chip": chip}


order_of_products = Exercise(
    "9.3",
    _attend_each,
    axes=("head", "row", "lane"),
    drive=drive_order,
    runner=with_schedule(judge_order),
    tolerance=2e-2,
    faults=(IN_TURN,),
)
order_of_products.case("128 tokens", **_heads(128, ""))
order_of_products.case("the schedule of 512 tokens on a v5e", **_heads(128, "v5e"))


@order_of_products.mistake(
    "the last head is never finished: when the loop ends, its P V is still waiting, and out_ref "
    "holds what VMEM held, here NaN"
)
def _never_finished(q, kv, chip):
    out = _attend_each(q, kv, chip)
    out[-1] = np.nan
    return out


@order_of_products.mistake("weights of one head are multiplied by the values of the next one")
def _values_of_next(q, kv, chip):
    return _attend_each(q, kv, chip, values_of=lambda h, n: min(h + 1, n - 1))


@order_of_products.mistake("a head is divided by the sum of the next one's weights")
def _total_of_next(q, kv, chip):
    return _attend_each(q, kv, chip, totals_of=lambda h, n: min(h + 1, n - 1))


@order_of_products.mistake("the result of a head is written to the place of the next one")
def _next_place(q, kv, chip):
    out = _attend_each(q, kv, chip)
    last = out[-1].copy()
    out[1:] = out[:-1].copy()
    out[0], out[-1] = np.nan, last
    return out


@order_of_products.mistake("the weights are not divided by their sum")
def _not_divided(q, kv, chip):
    out = _attend_each(q, kv, chip)
    q, kv = (np.asarray(x, np.float32)[0] for x in (q, kv))
    totals = [_weights(q, kv, head).sum(axis=1, keepdims=True) for head in range(len(q))]
    return (out * np.array(totals)).astype(np.float32)


# 9.4 several heads in one product -----------------------------------------------------------------


def _stacked(q, k, v):
    return np.stack([_attend_one(*head) for head in zip(q, k, v, strict=True)]).astype(np.float32)


def _attend_one(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    s = q @ k.T
    weights = np.exp2(s - s.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


def drive_stacked(attend, q, k, v):
    """out f32[heads, rows, lanes], of two plain products."""
    if not is_model(attend):
        plain, batched = _products(jax.make_jaxpr(attend)(q, k, v).jaxpr)
        if batched:
            raise WrongResult(
                "you use a batched product: to the MXU that is one product a head, each with a few "
                "rows. Put the heads side by side and multiply matrices"
            )
        if plain > 2:
            raise WrongResult(f"you use {plain} products, expected 2 for all heads together")
    return attend(q, k, v)


def _products(jaxpr):
    """(plain, batched) matrix products in a trace, nested ones too."""
    plain = batched = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            is_batched = bool(eqn.params["dimension_numbers"][1][0])
            plain, batched = plain + (not is_batched), batched + is_batched
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                more = _products(getattr(inner, "jaxpr", inner))
                plain, batched = plain + more[0], batched + more[1]
    return plain, batched


def _qkv(heads, rows, tokens, lanes):
    sizes = ((heads, rows, lanes), (heads, tokens, lanes), (heads, tokens, lanes))
    q, k, v = (RNG.standard_normal(size).astype(np.float32) for size in sizes)
    return {"q": q, "k": k, "v": v}


two_products = Exercise(
    "9.4",
    _stacked,
    axes=("head", "row", "lane"),
    drive=drive_stacked,
    tolerance=1e-4,
)
two_products.case(
    "two heads, one row, two tokens",
    q=np.float32([[[1, 0]], [[0, 2]]]),
    k=np.float32([[[1, 0], [0, 0]], [[0, 1], [5, 0]]]),
    v=np.float32([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]),
)
two_products.case("one head", **_qkv(1, 4, 8, 16))
two_products.case("four heads of four rows", **_qkv(4, 4, 16, 32))
two_products.case(
    "scores that exp2 does not hold, in one head and not in the other",
    q=np.float32([[[200, 0]], [[1, 0]]]),
    k=np.float32([[[1, 0], [0.99, 0]], [[1, 0], [0, 1]]]),
    v=np.float32([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]),
)


@two_products.mistake(
    "every row takes the values of head 0: of the wide result, head h has its columns h * lanes to "
    "(h + 1) * lanes, in its own rows"
)
def _first_columns(q, k, v):
    return np.stack([_attend_one(q[h], k[h], v[0]) for h in range(len(q))]).astype(np.float32)


@two_products.mistake(
    "the queries stand side by side without zeros between them: then every row sees the keys of "
    "all heads, and its scores are sums over them"
)
def _not_diagonal(q, k, v):
    wide_k = np.concatenate(list(k), axis=1)
    return np.stack(
        [_attend_one(np.tile(q[h], (1, len(k))), wide_k, v[h]) for h in range(len(q))]
    ).astype(np.float32)


@two_products.mistake(
    "the keys stand below each other (axis 0): the softmax then runs over the tokens of all heads"
)
def _keys_below(q, k, v):
    every_k, every_v = np.concatenate(list(k)), np.concatenate(list(v))
    return np.stack([_attend_one(rows, every_k, every_v) for rows in q]).astype(np.float32)


@two_products.mistake("the weights are not divided by their sum")
def _no_sum(q, k, v):
    scores = np.asarray(q) @ np.swapaxes(np.asarray(k), 1, 2)
    sums = np.exp2(scores - scores.max(axis=2, keepdims=True)).sum(axis=2, keepdims=True)
    return (_stacked(q, k, v) * sums).astype(np.float32)


def _blocks(q, k, v):
    """Weights of each head times the values of each: f32[heads, rows, heads, lanes]."""
    heads = range(len(q))
    return np.stack(
        [np.stack([_attend_one(q[h], k[h], v[other]) for other in heads], axis=1) for h in heads]
    ).astype(np.float32)


@two_products.mistake(
    "the rows of head 0 are taken for all heads: row h * rows + r belongs to row r of head h"
)
def _first_rows(q, k, v):
    return _blocks(q, k, v)[0].swapaxes(0, 1)


@two_products.mistake("the columns of all heads are added: each head wants its own only")
def _all_columns(q, k, v):
    return _blocks(q, k, v).sum(axis=2)


@two_products.mistake("the mean of all columns is taken: each head wants its own only")
def _mean_of_columns(q, k, v):
    return _blocks(q, k, v).mean(axis=2)


def _side_by_side(x):
    """What `x.reshape(tokens, heads * lanes)` makes of [heads, tokens, lanes], by heads again."""
    heads, tokens, lanes = x.shape
    return np.asarray(x).reshape(tokens, heads, lanes).swapaxes(0, 1)


@two_products.mistake(
    "the keys are reshaped, not laid side by side: reshape keeps the order of the numbers, and the "
    "head comes first in k, so a row of it holds several tokens of one head"
)
def _keys_reshaped(q, k, v):
    return _stacked(q, _side_by_side(k), v)


@two_products.mistake(
    "the values are reshaped, not laid side by side: reshape keeps the order of the numbers, and "
    "the head comes first in v, so a row of it holds several tokens of one head"
)
def _values_reshaped(q, k, v):
    return _stacked(q, k, _side_by_side(v))


@two_products.mistake(
    "keys and values are reshaped, not laid side by side: the head comes first in both, so a row "
    "holds several tokens of one head"
)
def _both_reshaped(q, k, v):
    return _stacked(q, _side_by_side(k), _side_by_side(v))


@two_products.mistake(
    "the rows of the result are taken for [rows, heads]: row h * rows + r is row r of head h"
)
def _rows_before_heads(q, k, v):
    heads, rows, lanes = np.shape(q)
    blocks = _blocks(q, k, v).reshape(rows, heads, heads, lanes)
    return np.stack([blocks[:, h, h] for h in range(heads)])


@two_products.mistake("weights are powers of e (exp); rung 8 and this exercise take powers of 2")
def _powers_of_e(q, k, v):
    return _stacked(np.asarray(q) * np.float32(np.log2(np.e)), k, v)


@two_products.mistake(
    "the largest score is not subtracted: exp2 of a large one is infinite, and inf / inf is NaN"
)
def _no_maximum(q, k, v):
    out = _stacked(q, k, v)
    scores = np.asarray(q) @ np.swapaxes(np.asarray(k), 1, 2)
    out[scores.max(axis=2) >= 128] = np.nan
    return out


@two_products.mistake(
    "one largest score is subtracted for all rows: beside that of another head a row's own are so "
    "small that all its weights are 0, and 0 / 0 is NaN"
)
def _one_maximum(q, k, v):
    out = _stacked(q, k, v)
    scores = np.asarray(q) @ np.swapaxes(np.asarray(k), 1, 2)
    out[scores.max(axis=2) < scores.max() - 149] = np.nan
    return out


# 9.5 predict a register ---------------------------------------------------------------------------

LISTING = [
    "%one = llo.constant {value = 1 : i32} : i32",
    "%two = llo.constant {value = 2 : i32} : i32",
    '%place = "llo.saddr.vmem"(%x, %one) : (i32, i32) -> i32',
    "%a = llo.vector_load_slane_stride %place {sublane_count = 8 : i64, sublane_stride = 3 : i64} "
    ": i32 -> vector<8x128xf32>",
    "%b = llo.vrot.slane %a, %two : vector<8x128xf32>, i32 -> vector<8x128xf32>",
    "%c = llo.vsub.f32 %a, %b : vector<8x128xf32>",
    "llo.vector_store %c into %out : vector<8x128xf32> into i32",
]


def _executed(rows):
    """What the lab's machine makes of the listing."""
    out, _ = chip.step_listing(LISTING, np.repeat(rows, 128).reshape(-1, 128))
    return out[:, 0]


predict = Exercise("9.5", _executed, outputs=("sublanes of %c",), convert=np.array, tolerance=1e-6)
predict.case("row r holds r", rows=np.arange(24, dtype=np.float32))
predict.case("row r holds r * r", rows=np.arange(24, dtype=np.float32) ** 2)
predict.case("random rows", rows=RNG.standard_normal(40).astype(np.float32))


@predict.mistake("the register is rotated away from sublane 0: what was in s has to be in s - 2")
def _other_direction(rows):
    a = rows[1::3][:8]
    return a - np.roll(a, 2)


@predict.mistake("the first row is row 0: saddr.vmem moves the address by one row")
def _from_row_0(rows):
    a = rows[0::3][:8]
    return a - np.roll(a, -2)


@predict.mistake("you take eight rows that follow each other: the stride is 3")
def _neighbours(rows):
    a = rows[1:9]
    return a - np.roll(a, -2)


@predict.mistake("what is rotated is lost at the end: a rotation brings it back in sublane 7")
def _shifted(rows):
    a = rows[1::3][:8]
    return a - np.concatenate([a[2:], np.zeros(2, a.dtype)])


# 9.6 find the wrong stride ------------------------------------------------------------------------


def _found(first, stride, words):
    """The register that a load of a row and a stride gives, executed: f32[8]."""
    rows = np.arange(first + 7 * stride + 1)
    numbers = (10 * (rows // words) + rows % words).astype(np.float32)
    listing = [
        f"%first = llo.constant {{value = {first} : i32}} : i32",
        LISTING[2].replace("%one", "%first"),
        LISTING[3].replace("stride = 3", f"stride = {stride}"),
        LISTING[6].replace("%c", "%a"),
    ]
    out, _ = chip.step_listing(listing, numbers.repeat(128).reshape(-1, 128))
    return out[:, 0]


def _find_stride(found, words):
    rows = (found // 10) * words + found % 10
    return int(rows[0]), int(rows[1] - rows[0])


find_stride = Exercise(
    "9.6", _find_stride, outputs=("first row", "stride"), convert=np.array, tolerance=1e-6
)
for _words, _first, _stride in ((4, 1, 3), (4, 1, 4), (9, 2, 8), (9, 11, 1), (3, 5, 2), (6, 0, 12)):
    find_stride.case(
        f"{_words} rows per token", found=_found(_first, _stride, _words), words=_words
    )


@find_stride.mistake("you take differences of the numbers: turn them into rows first")
def _of_numbers(found, words):
    return _find_stride(found, words)[0], int(found[1] - found[0])


@find_stride.mistake("it is counted in tokens: a token has as many rows as `words` says")
def _in_tokens(found, words):
    return int(found[0] // 10), int(found[1] // 10 - found[0] // 10)


@find_stride.mistake("you count ten rows per token: ten is in the numbers only")
def _ten_rows(found, words):
    return int(found[0]), int(found[1] - found[0])
