"""Checks of chapter 8: reading schedules, and one optimisation whose schedule is compiled.

References and mistakes are NumPy and plain Python; the learner's kernel of 8.3 runs in the
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
from rpa.lab.schedule import inner_loop
from rpa.paging import cdiv

RNG = np.random.default_rng(8)

# 8.1 name the bound -------------------------------------------------------------------------------

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
    "8.1", _name_the_bound, outputs=("bound", "cycles"), convert=np.array, tolerance=1e-6
)
name_the_bound.case("ten bundles", **_listing(10, 4, MATMUL=(9, 1), VALU=(12, 4)))
name_the_bound.case("more slots, less full", **_listing(10, 4, MATMUL=(9, 1), VALU=(28, 4)))
name_the_bound.case("two are full", **_listing(20, 4, MATMUL=(17, 1), VALU=(76, 4)))
name_the_bound.case("nobody is busy", **_listing(10, 4, MATMUL=(5, 1), VALU=(12, 4)))
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
    "the fullest unit is named however idle it is: under 80 % nobody is full, and what takes the "
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


# 8.2 banks ----------------------------------------------------------------------------------------


def _loads(stride, num_banks, rows):
    return int(np.bincount(stride * np.arange(rows) % num_banks).max())


def _rows(stride, num_banks=32, rows=8):
    return {"stride": stride, "num_banks": num_banks, "rows": rows}


loads_per_register = Exercise("8.2", _loads, convert=np.array, tolerance=0.0)
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


# 8.3 the order of the products --------------------------------------------------------------------

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
    kv[:, :, num_heads:] = np.nan  # nobody may read what only keeps the distance
    return {"q": q.astype(jnp.bfloat16), "kv": kv.astype(jnp.bfloat16), "chip": chip}


order_of_products = Exercise(
    "8.3",
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


# 8.4 several heads in one product -----------------------------------------------------------------


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
    "8.4",
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


@two_products.mistake("weights are powers of e (exp); rung 7 and this exercise take powers of 2")
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


# 8.5 blocks under a budget ------------------------------------------------------------------------

TOKEN_BYTES, ROW_BYTES, STATE_BYTES, SCORE_BYTES = 4096, 8192, 49_152, 24
BYTES_A_CYCLE, PAIRS_A_CYCLE, STEP_CYCLES = 500, 8, 300


def _vmem(bq, bkv, buffers=2, with_state=True, with_scores=True):
    kv, q_and_o = buffers * TOKEN_BYTES * bkv, buffers * 2 * ROW_BYTES * bq
    return kv + q_and_o + with_state * STATE_BYTES * bq + with_scores * SCORE_BYTES * bq * bkv


def _steps(q_len, kv_len, bq, bkv, causal=True):
    """KV blocks that the query blocks visit, all together."""
    ends = [kv_len - q_len + min(end, q_len) for end in range(bq, q_len + bq, bq)]
    return sum(cdiv(end if causal else kv_len, bkv) for end in ends)


def _cycles(q_len, kv_len, bq, bkv, **options):
    steps = _steps(q_len, kv_len, bq, bkv, **options)
    return _time(steps, q_len, bq, bkv)


def _time(steps, q_len, bq, bkv, kv_tokens=None):
    """Cycles of a chunk; K and V of `kv_tokens` are read, by default a block a step."""
    kv_tokens = steps * bkv if kv_tokens is None else kv_tokens
    hbm = (kv_tokens * TOKEN_BYTES + 2 * q_len * ROW_BYTES) / BYTES_A_CYCLE
    return max(hbm, steps * bq * bkv / PAIRS_A_CYCLE) + STEP_CYCLES * steps


def _best(candidates, fits, cost):
    return min((pair for pair in candidates if fits(*pair)), key=lambda pair: cost(*pair))


def _choose(candidates, q_len, kv_len, vmem_budget_bytes):
    return _best(
        candidates,
        lambda bq, bkv: _vmem(bq, bkv) <= vmem_budget_bytes,
        lambda bq, bkv: _cycles(q_len, kv_len, bq, bkv),
    )


MIB = 2**20
PAIRS = [(bq, bkv) for bq in (16, 32, 64, 128, 256) for bkv in (128, 256, 512, 1024, 2048)]
"""What there is to choose from; some of it does not fit, some is slow."""


def _job(q_len, kv_len, budget_mib, candidates=PAIRS):
    return {
        "candidates": candidates,
        "q_len": q_len,
        "kv_len": kv_len,
        "vmem_budget_bytes": int(budget_mib * MIB),
    }


choose_blocks = Exercise("8.5", _choose, outputs=("bq", "bkv"), convert=np.array, tolerance=0.0)
choose_blocks.case("one pair fits", **_job(128, 1024, 8, [(128, 512), (16, 128)]))
choose_blocks.case("both fit", **_job(128, 1024, 64, [(128, 512), (16, 128)]))
choose_blocks.case("a chunk in plenty of VMEM", **_job(512, 4096, 64))
choose_blocks.case("a chunk in 16 MiB", **_job(512, 4096, 16))
choose_blocks.case("a chunk in 20 MiB", **_job(512, 4096, 20))
choose_blocks.case("a short chunk", **_job(48, 1000, 12))
choose_blocks.case("a fresh prompt", **_job(1024, 1024, 40))
choose_blocks.case("a long context", **_job(256, 16384, 6))
choose_blocks.case("a chunk that is no whole number of blocks", **_job(300, 1000, 16))
choose_blocks.case("a budget that is just enough", **_job(128, 1024, 15.5, [(128, 512), (16, 128)]))
choose_blocks.case("two that are alike", **_job(16, 128, 64, [(32, 128), (16, 128)]))


def _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, cost=None, **vmem):
    return _best(
        candidates,
        lambda bq, bkv: _vmem(bq, bkv, **vmem) <= vmem_budget_bytes,
        cost or (lambda bq, bkv: _cycles(q_len, kv_len, bq, bkv)),
    )


@choose_blocks.mistake("VMEM is not asked: the pair does not fit")
def _without_budget(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose_with(candidates, q_len, kv_len, np.inf)


@choose_blocks.mistake(
    "every buffer is there once: KV, queries and output need two, one to compute on and one that "
    "is on its way"
)
def _one_buffer(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, buffers=1)


@choose_blocks.mistake("the state of the softmax takes no VMEM: it is 48 KiB a query token")
def _no_state(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, with_state=False)


@choose_blocks.mistake(
    "scores and weights take no VMEM: 24 bytes for each pair of tokens of a tile"
)
def _no_scores(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, with_scores=False)


@choose_blocks.mistake(
    "the pair that fills VMEM most is taken: what is asked for is the least time, and what fits is "
    "not yet fast"
)
def _largest(candidates, q_len, kv_len, vmem_budget_bytes):
    cost = lambda bq, bkv: -_vmem(bq, bkv)  # noqa: E731
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, cost)


@choose_blocks.mistake(
    "every query block reads up to kv_len: the early ones of a chunk end sooner, and large KV "
    "blocks then fetch and compute what nobody sees"
)
def _not_causal(candidates, q_len, kv_len, vmem_budget_bytes):
    cost = lambda bq, bkv: _cycles(q_len, kv_len, bq, bkv, causal=False)  # noqa: E731
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, cost)


@choose_blocks.mistake(
    "HBM and products are added: they overlap, so of the two only the longer one counts"
)
def _added_times(candidates, q_len, kv_len, vmem_budget_bytes):
    def cost(bq, bkv):
        steps = _steps(q_len, kv_len, bq, bkv)
        hbm = steps * bkv * TOKEN_BYTES + 2 * q_len * ROW_BYTES
        return hbm / BYTES_A_CYCLE + steps * (bq * bkv / PAIRS_A_CYCLE + STEP_CYCLES)

    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, cost)


def _wrong_time(words, time):
    """A mistake of the model of time: `time(steps, q_len, kv_len, bq, bkv)` in cycles."""

    def choose(candidates, q_len, kv_len, vmem_budget_bytes):
        def cost(bq, bkv):
            return time(_steps(q_len, kv_len, bq, bkv), q_len, kv_len, bq, bkv)

        return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, cost)

    choose_blocks.mistake(words)(choose)


_wrong_time(
    "K and V are read once, for all query blocks together: each query block reads them again, and "
    "so larger ones save bytes",
    lambda steps, q_len, kv_len, bq, bkv: _time(steps, q_len, bq, bkv, cdiv(kv_len, bkv) * bkv),
)
_wrong_time(
    "HBM is left out: with few queries a block it takes longer than the products",
    lambda steps, q_len, kv_len, bq, bkv: _time(steps, 0, bq, bkv, 0),
)
_wrong_time(
    "the products are left out: with many queries a block they take longer than HBM",
    lambda steps, q_len, kv_len, bq, bkv: _time(steps, q_len, 0, bkv),
)
_wrong_time(
    "the ends of the steps are left out: 300 cycles each",
    lambda steps, q_len, kv_len, bq, bkv: _time(steps, q_len, bq, bkv) - STEP_CYCLES * steps,
)
_wrong_time(
    "the cached tokens are forgotten: a query block ends at kv_len - q_len + min(end, q_len)",
    lambda _, q_len, kv_len, bq, bkv: _time(_steps(q_len, q_len, bq, bkv), q_len, bq, bkv),
)


@choose_blocks.mistake("a pair that takes just the budget is refused: it fits, <= and not <")
def _not_quite(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose(candidates, q_len, kv_len, vmem_budget_bytes - 1)


@choose_blocks.mistake("of two alike the last one is taken")
def _last_of_alike(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose(candidates[::-1], q_len, kv_len, vmem_budget_bytes)


# 8.6 predict MBU ----------------------------------------------------------------------------------


def _blocks_of(kv_lens, block_tokens):
    """Tokens of each block, sequence after sequence."""
    return [
        min(block_tokens, kv_len - first)
        for kv_len in kv_lens.tolist()
        for first in range(0, kv_len, block_tokens)
    ]


def _clocks(tokens, copy_cycles, compute_cycles, buffers=2):
    """When each block is copied and computed: copies in a row, each into a buffer that is free."""
    copied, computed = [], []
    for n, block_tokens in enumerate(tokens):
        free = computed[n - buffers] if n >= buffers else 0
        start = max(copied[-1] if copied else 0, free)
        copied.append(start + block_tokens * copy_cycles)
        computed.append(max(copied[-1], computed[-1] if computed else 0) + compute_cycles)
    return copied, computed


def _pipeline(*arguments, **options):
    """When the last block is computed."""
    return _clocks(*arguments, **options)[1][-1]


def _mbu(kv_lens, block_tokens, copy_cycles, compute_cycles):
    tokens = _blocks_of(kv_lens, block_tokens)
    return float(sum(tokens) * copy_cycles / _pipeline(tokens, copy_cycles, compute_cycles))


def _decodes(kv_lens, block_tokens, copy_cycles, compute_cycles):
    return {
        "kv_lens": np.array(kv_lens, np.int32),
        "block_tokens": block_tokens,
        "copy_cycles": copy_cycles,
        "compute_cycles": compute_cycles,
    }


predict_mbu = Exercise("8.6", _mbu, convert=np.array, tolerance=1e-6)
predict_mbu.case("one block", **_decodes([10], 10, 1, 5))
predict_mbu.case("two blocks, HBM is slower", **_decodes([20], 10, 1, 5))
predict_mbu.case("two blocks, computing is slower", **_decodes([20], 10, 1, 15))
predict_mbu.case("a last block that is not full", **_decodes([13], 10, 1, 5))
predict_mbu.case("two sequences", **_decodes([20, 10], 10, 1, 5))
predict_mbu.case("short ones, then a long one", **_decodes([2, 2, 2, 2, 40], 20, 2, 9))
predict_mbu.case("a v5e, blocks of 1,024", **_decodes([4096, 1000, 2500], 1024, 7.5, 2000))
predict_mbu.case("a TPU7x, short sequences", **_decodes([512] * 8, 1024, 2.44, 1900))


@predict_mbu.mistake(
    "copies and computations take turns: while a block is computed, the next one is on its way"
)
def _no_overlap(kv_lens, block_tokens, copy_cycles, compute_cycles):
    tokens = _blocks_of(kv_lens, block_tokens)
    time = sum(tokens) * copy_cycles + len(tokens) * compute_cycles
    return sum(tokens) * copy_cycles / time


@predict_mbu.mistake(
    "the longer of all copies and all computations is taken: nobody can compute before the first "
    "block is there, and the last one is computed when all copies are done"
)
def _roofline(kv_lens, block_tokens, copy_cycles, compute_cycles):
    tokens = _blocks_of(kv_lens, block_tokens)
    copies = sum(tokens) * copy_cycles
    return copies / max(copies, len(tokens) * compute_cycles)


@predict_mbu.mistake(
    "the copies never wait: there are two buffers, and a third copy has to wait until the first "
    "block is computed"
)
def _endless_buffers(kv_lens, block_tokens, copy_cycles, compute_cycles):
    tokens = _blocks_of(kv_lens, block_tokens)
    time = _pipeline(tokens, copy_cycles, compute_cycles, buffers=len(tokens))
    return sum(tokens) * copy_cycles / time


@predict_mbu.mistake("the last block of a sequence is copied whole: only its tokens are")
def _whole_blocks(kv_lens, block_tokens, copy_cycles, compute_cycles):
    tokens = _blocks_of(kv_lens, block_tokens)
    time = _pipeline([block_tokens] * len(tokens), copy_cycles, compute_cycles)
    return sum(tokens) * copy_cycles / time


@predict_mbu.mistake(
    "the pipeline runs empty between sequences: the first block of the next one is fetched while "
    "the last one of this is computed"
)
def _drained(kv_lens, block_tokens, copy_cycles, compute_cycles):
    each = [_blocks_of(kv_lens[i : i + 1], block_tokens) for i in range(len(kv_lens))]
    time = sum(_pipeline(tokens, copy_cycles, compute_cycles) for tokens in each)
    return sum(map(sum, each)) * copy_cycles / time


@predict_mbu.mistake("it is the time in cycles; asked is the part of it in which HBM delivers")
def _time_only(kv_lens, block_tokens, copy_cycles, compute_cycles):
    return float(_pipeline(_blocks_of(kv_lens, block_tokens), copy_cycles, compute_cycles))


@predict_mbu.mistake(
    "a block that is not full is computed in less time: the products take whole blocks, whatever "
    "is in them"
)
def _scaled_compute(kv_lens, block_tokens, copy_cycles, compute_cycles):
    copied, computed = [], []
    tokens = _blocks_of(kv_lens, block_tokens)
    for n, size in enumerate(tokens):
        start = max(copied[-1] if copied else 0, computed[n - 2] if n >= 2 else 0)
        copied.append(start + size * copy_cycles)
        share = compute_cycles * size / block_tokens
        computed.append(max(copied[-1], computed[-1] if computed else 0) + share)
    return sum(tokens) * copy_cycles / computed[-1]


def _wrong_mbu(words, mbu):
    """A mistake in the end: `mbu(copying, time, tokens, copy_cycles, compute_cycles)`."""

    def predict(kv_lens, block_tokens, copy_cycles, compute_cycles):
        tokens = _blocks_of(kv_lens, block_tokens)
        time = _pipeline(tokens, copy_cycles, compute_cycles)
        return mbu(sum(tokens) * copy_cycles, time, tokens, copy_cycles, compute_cycles)

    predict_mbu.mistake(words)(predict)


_wrong_mbu(
    "there are three buffers: with two, a copy waits until the block before the last is computed",
    lambda copying, time, tokens, *cycles: copying / _pipeline(tokens, *cycles, buffers=3),
)
_wrong_mbu(
    "the time ends with the last copy: the last block is still to be computed then",
    lambda copying, time, tokens, *cycles: copying / _clocks(tokens, *cycles)[0][-1],
)
_wrong_mbu(
    "it is the part of the time in which the core computes; asked is that of the HBM",
    lambda copying, time, tokens, copy_cycles, compute_cycles: len(tokens) * compute_cycles / time,
)
_wrong_mbu(
    "the fraction is upside down: MBU is at most 1",
    lambda copying, time, tokens, copy_cycles, compute_cycles: time / copying,
)


@predict_mbu.mistake("computing takes compute_cycles for each token; it does for each block")
def _compute_a_token(kv_lens, block_tokens, copy_cycles, compute_cycles):
    cycles = copy_cycles, compute_cycles * block_tokens
    return _scaled_compute(kv_lens, block_tokens, *cycles)


@predict_mbu.mistake("blocks go on over the end of a sequence: each sequence begins a new one")
def _across_sequences(kv_lens, block_tokens, copy_cycles, compute_cycles):
    return _mbu(kv_lens.sum(keepdims=True), block_tokens, copy_cycles, compute_cycles)
