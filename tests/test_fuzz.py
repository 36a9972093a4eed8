"""Locks on what held: random batches through rungs 7 and 8, and random faults that are refused.

The generator is another one than `test_kernel_batches` has: it draws how full the pool is, and lets
sequences share prefixes. Caches are compared bit for bit.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import rpa
from rpa import plain
from tests import kernel_runs
from tests.batches import Shape, bits, make_case
from tests.kernel_harness import MODES, check_output, run

FLOAT8 = {"q_dtype": "bfloat16", "k_scale": 0.5, "v_scale": 2.0}
SHAPES = {
    "1/1 of 128, page 1": (Shape(1, 1, 128, 1, pages_per_seq=24), {}),
    "2/1 of 64, page 3": (Shape(2, 1, 64, 3, pages_per_seq=9), {}),
    "5/1 of 64, window": (Shape(5, 1, 64, 8), {"sliding_window": 7}),
    "6/3 of 80": (Shape(6, 3, 80, 8, pages_per_seq=5), {"soft_cap": 2.0}),
    "4/4 of 128, bfloat16": (Shape(4, 4, 128, 8, dtype="bfloat16"), {}),
    "12/2 of 128, bfloat16": (Shape(12, 2, 128, 16, 3, dtype="bfloat16"), {}),
    "3/3 of 240, bfloat16": (Shape(3, 3, 240, 8, dtype="bfloat16"), {}),
    "4/2 of 64, shared lanes": (Shape(4, 2, 64, 8, share_lanes=True), {}),
    "8/8 of 64, float8": (Shape(8, 8, 64, 8, dtype="float8_e4m3fn"), FLOAT8),
    "4/1 of 128, float8": (Shape(4, 1, 128, 16, dtype="float8_e5m2"), FLOAT8),
    "4/2 of 128, all see all": (Shape(4, 2, 128, 8), {"use_causal_mask": False}),
    "one slot": (Shape(2, 2, 64, 8, 6, max_num_seqs=1), {}),
}


def lengths(rng, shape):
    """(q_len, kv_len) of the sequences: from an almost empty pool to a full one."""
    room = shape.page_size * shape.pages_per_seq
    fullness, left, pairs = rng.random(), shape.num_tokens, []
    for _ in range(rng.integers(1, shape.max_num_seqs + 1)):
        kv_len = min(room, int(rng.geometric(1 / (1 + fullness * room))))
        q_len = min(left, int(rng.choice([0, 1, 1, 2, kv_len // 2, kv_len])), kv_len)
        left -= q_len
        pairs.append((q_len, kv_len))
    return pairs


def check_plain(case, mode, *, q_dtype=None, **options):
    """Rung 7, as `kernel_runs.check` does it for rung 8."""
    queries = case.queries if q_dtype is None else case.queries.astype(jnp.dtype(q_dtype))
    scale = case.shape.head_dim**-0.5
    arrays = (queries, *case.arrays[1:], case.batch)
    output, cache = run(plain.attention, *arrays, sm_scale=scale, interpret=mode.params, **options)
    np.testing.assert_array_equal(bits(cache), case.expected_cache())
    truth = kernel_runs.truth_of(case, cache, **options)
    check_output(output, truth, tolerance=kernel_runs.tolerance_of(case, output.dtype))


RUNGS = {"plain": check_plain, "kernel": kernel_runs.check}
WALK = [pytest.param("kernel", "5/1 of 64, window", 4, id="a sample")] + [
    pytest.param(rung, name, num_batches, marks=pytest.mark.full)
    for rung, num_batches in (("plain", 6), ("kernel", 16))
    for name in SHAPES
]


@pytest.mark.parametrize(("rung", "name", "num_batches"), WALK)
def test_random_batches(rung, name, num_batches):
    shape, options = SHAPES[name]
    for seed in range(num_batches):
        rng = np.random.default_rng([seed, len(name)])
        drawn = lengths(rng, shape)
        share = seed % 3 == 2
        case = make_case(shape, drawn, seed=seed, share=share, adjacent=seed % 3 == 1)
        try:
            RUNGS[rung](case, MODES[seed % 2], **options)
        except Exception as error:
            raise AssertionError(f"seed {seed}, (q_len, kv_len) {drawn}") from error


# --- Faults -------------------------------------------------------------------------------------

SMALL = Shape(2, 1, 64, page_size=8, max_num_seqs=5, num_tokens=40)


def a_page(rng, batch, value):
    """Another page in a random live entry; None where there is none."""
    table = batch.page_indices.reshape(batch.max_num_seqs, -1).copy()
    k = int(batch.num_seqs)
    live = np.argwhere(np.arange(table.shape[1]) * 8 < batch.kv_lens[:k, None])
    if not len(live):
        return None
    table[tuple(rng.choice(live))] = value(table, live)
    return dataclasses.replace(batch, page_indices=table.reshape(-1))


def a_length(name, change):
    def fault(rng, batch):
        array = getattr(batch, name).copy()
        array = change(rng, batch, array)
        return None if array is None else dataclasses.replace(batch, **{name: array})

    return fault


def put(array, index, value):
    array[index] = value
    return array


def some_seq(rng, batch):
    return int(rng.integers(0, int(batch.num_seqs)))


def q_len_of(batch, s):
    return int(batch.cu_q_lens[s + 1] - batch.cu_q_lens[s])


def below_q_len(rng, batch, kv_lens):
    s = some_seq(rng, batch)
    return put(kv_lens, s, q_len_of(batch, s) - 1)


def falls(rng, batch, cu_q_lens):
    s = some_seq(rng, batch)
    return put(cu_q_lens, s + 1, cu_q_lens[s] - 1)


def prefill_as_decode(rng, batch, distribution):
    k = int(batch.num_seqs)
    return np.full_like(distribution, k) if q_len_of(batch, k - 1) > 1 else None


def written_twice(rng, batch):
    """A page that gets a new token, in the first place of another sequence."""
    table = batch.page_indices.reshape(batch.max_num_seqs, -1).copy()
    k = int(batch.num_seqs)
    writers = [s for s in range(k) if q_len_of(batch, s)]
    readers = [s for s in range(k) if batch.kv_lens[s] > 0]
    pairs = [(w, r) for w in writers for r in readers if w != r]
    if not pairs:
        return None
    w, r = pairs[rng.integers(len(pairs))]
    table[r, 0] = table[w, (int(batch.kv_lens[w]) - 1) // 8]
    return dataclasses.replace(batch, page_indices=table.reshape(-1))


FAULTS = {
    "page num_pages": lambda rng, b: a_page(rng, b, lambda *_: SMALL.num_pages),
    "page -1": lambda rng, b: a_page(rng, b, lambda *_: -1),
    "page 2**31 - 1": lambda rng, b: a_page(rng, b, lambda *_: 2**31 - 1),
    "page -2**31": lambda rng, b: a_page(rng, b, lambda *_: -(2**31)),
    "page written twice": written_twice,
    "kv_len below q_len": a_length("kv_lens", below_q_len),
    "kv_len past the row": a_length("kv_lens", lambda rng, b, a: put(a, some_seq(rng, b), 33)),
    "kv_len 2**31 - 1": a_length("kv_lens", lambda rng, b, a: put(a, some_seq(rng, b), 2**31 - 1)),
    "cu_q_lens falls": a_length("cu_q_lens", falls),
    "cu_q_lens of ones": a_length("cu_q_lens", lambda rng, b, a: np.ones_like(a)),
    "cu_q_lens past the rows": a_length(
        "cu_q_lens", lambda rng, b, a: put(a, int(b.num_seqs), SMALL.num_tokens + 1)
    ),
    "distribution falls": a_length("distribution", lambda rng, b, a: a[::-1] + np.int32([1, 0, 0])),
    "too many sequences": a_length("distribution", lambda rng, b, a: put(a, 2, 6)),
    "prefill as decode": a_length("distribution", prefill_as_decode),
}


@pytest.mark.core
@pytest.mark.parametrize("kind", FAULTS)
def test_random_faults_are_refused_and_the_cache_is_bit_identical(kind):
    refused = 0
    for seed in range(40):
        rng = np.random.default_rng([seed, len(kind)])
        case = make_case(SMALL, lengths(rng, SMALL), seed=seed)
        batch = FAULTS[kind](rng, case.batch)
        if batch is None:
            continue
        cache = jnp.array(case.kv_cache)
        metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
        arrays = (case.queries, case.keys, case.values, cache)
        with pytest.raises(ValueError, match=r"[a-z].* is |[a-z].* has |falls from|receives"):
            rpa.ragged_paged_attention(*arrays, *metadata, backend="interpret")
        assert not cache.is_deleted()
        np.testing.assert_array_equal(bits(cache), bits(case.kv_cache))
        refused += 1
    assert refused >= 15, "the generator draws too few batches with this fault"
