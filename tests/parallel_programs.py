"""What `test_parallel` runs on eight host devices: `python -m tests.parallel_programs NAME`.

A process of its own, because how many devices a host has is decided before JAX starts. Every
program holds a form of `rpa.parallel` against the float64 oracle of the same batch on one device,
and every bit of the cache against what it must be.
"""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rpa import dense, ladder, plain
from rpa.paging import get_kv_cache_shape, pack_kv, unpack_kv
from rpa.parallel import DecodeContext, Heads, Parallel, PrefillContext, Sequences, stack, zigzag
from rpa.ragged import RaggedBatch
from tests.batches import Shape, bits, lengths, make_case
from tests.kernel_harness import EAGER, ON_WAIT, KernelFault, check_output, run
from tests.kernel_runs import tolerance_of, truth_of
from tests.test_lse import check_lse

MIXED = [(1, 9), (0, 5), (1, 8), (7, 7), (0, 0), (9, 17)]


def rung_7(*args, mode=ON_WAIT, **options):
    return plain.attention(*args, block_q=4, block_kv=12, interpret=mode.params, **options)


def rung_8(*args, **options):
    blocks = {"d_block_sizes": (1, 16, 1, 8), "m_block_sizes": (8, 16, 4, 8)}
    return ladder.kernel_rung(*args, backend=ON_WAIT.params, **blocks, **options)


RUNGS = {3: ladder.ragged_rung, 7: rung_7, 8: rung_8, "7, eager": partial(rung_7, mode=EAGER)}


def mesh_of(**sizes):
    """A mesh over the first devices: {name of the axis: its size}."""
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))])
    return jax.sharding.Mesh(devices.reshape(*sizes.values()), tuple(sizes))


def bits_on_chips(cache, shape, num_chips):
    """The bits of a cache of one chip, laid out as `Heads` has it on several."""
    heads = unpack_kv(bits(cache), shape.num_kv_heads, shape.head_dim)
    on_chip = max(1, shape.num_kv_heads // num_chips)
    parts = []
    for chip in range(num_chips):
        first = chip * shape.num_kv_heads // num_chips
        keys, values = (x[..., first : first + on_chip, :] for x in heads)
        flat = [x.reshape(-1, on_chip, shape.head_dim) for x in (keys, values)]
        packed = np.asarray(pack_kv(*flat, share_lanes=shape.share_lanes))
        parts.append(packed.reshape(*cache.shape[:2], *packed.shape[1:]))
    return np.concatenate(parts, axis=2)


def check_results(case, results, parallel, *, num_head_chips=1, **options):
    """Output, cache and log-sum-exp of one case, against what they must be."""
    output, kv_cache, lse = results
    stored = options.get("update_kv_cache", True)
    expected = case.expected_cache() if stored else bits(case.kv_cache)
    if num_head_chips > 1:
        expected = bits_on_chips(expected, case.shape, num_head_chips)
    np.testing.assert_array_equal(bits(kv_cache), expected)
    whole = expected_cache_of(case, stored)
    truth = truth_of(case, whole, **options)
    tolerance = tolerance_of(case, output.dtype)
    check_output(output, truth, tolerance=tolerance)
    check_lse(lse, truth, tolerance=tolerance)


def expected_cache_of(case, stored=True):
    return case.expected_cache().view(case.kv_cache.dtype) if stored else case.kv_cache


def attend(parallel, case, *, num_head_chips=1, q_dtype=None, **options):
    """A form on one case, everything asked for."""
    queries = case.queries if q_dtype is None else case.queries.astype(jnp.dtype(q_dtype))
    cache = case.kv_cache
    if num_head_chips > 1:
        cache = bits_on_chips(cache, case.shape, num_head_chips).view(cache.dtype)
        heads = (case.shape.num_kv_heads, case.shape.head_dim, cache.dtype)
        shape = parallel.cache_shape(*cache.shape[:2], *heads, share_lanes=case.shape.share_lanes)
        assert shape == cache.shape
    options = {"sm_scale": case.shape.head_dim**-0.5, "return_lse": True} | options
    return run(parallel, queries, case.keys, case.values, cache, case.batch, **options)


# --- Heads --------------------------------------------------------------------------------------

SINKS = np.linspace(-2, 4, 8).astype(np.float32)
HEADS = {
    "8/8 of 64": (Shape(8, 8, 64, page_size=8), {}),
    "8/4, two chips a head": (Shape(8, 4, 64, page_size=8), {"attention_sink": SINKS}),
    "8/1, window": (Shape(8, 1, 64, page_size=8), {"sliding_window": 5, "soft_cap": 3.0}),
    "16/8, float8": (
        Shape(16, 8, 64, page_size=8, dtype="float8_e4m3fn"),
        {"q_dtype": "bfloat16", "k_scale": 0.5, "v_scale": 2.0, "out_dtype": "float32"},
    ),
    "16/16, shared lanes": (Shape(16, 16, 64, page_size=8, dtype="bfloat16", share_lanes=True), {}),
}


def check_heads(name, rung, num_chips=8, batch=MIXED, seed=0):
    shape, options = HEADS[name]
    parallel = plan(rung, mesh=(("model", num_chips),), forms=(Heads("model"),))
    case = make_case(shape, batch, seed=seed)
    options = options | {"num_head_chips": num_chips}
    check_results(case, attend(parallel, case, **options), parallel, **options)


PLANS = {}


def plan(rung, mesh, forms):
    """One `Parallel` for equal arguments, so that it is compiled once."""
    key = (rung, mesh, forms)
    if key not in PLANS:
        PLANS[key] = Parallel(mesh_of(**dict(mesh)), *forms, attention=RUNGS[rung])
    return PLANS[key]


def heads():
    for name in HEADS:
        check_heads(name, rung=3)
    check_heads("8/4, two chips a head", rung=7)


def heads_full():
    for name in HEADS:
        check_heads(name, rung=7)
        check_heads(name, rung=3, num_chips=4)
    check_heads("16/8, float8", rung=7, num_chips=2)
    check_heads("8/4, two chips a head", rung="7, eager")
    generated(
        lambda batch, seed: check_heads("8/4, two chips a head", 3, 8, batch, seed),
        HEADS["8/4, two chips a head"][0],
    )


def heads_with_rung_8():
    shape = Shape(8, 4, 64, page_size=8, dtype="bfloat16")
    parallel = plan(8, mesh=(("model", 8),), forms=(Heads("model"),))
    case = make_case(shape, MIXED)
    cache = bits_on_chips(case.kv_cache, shape, 8).view(case.kv_cache.dtype)
    output, kv_cache = run(
        parallel, case.queries, case.keys, case.values, cache, case.batch, sm_scale=0.125
    )
    expected = bits_on_chips(case.expected_cache(), shape, 8)
    np.testing.assert_array_equal(bits(kv_cache), expected)
    check_output(output, truth_of(case, expected_cache_of(case)), tolerance=2.5e-3)


def generated(check, shape, max_examples=20, batches=lengths):
    @settings(deadline=None, max_examples=max_examples, derandomize=True, database=None)
    @given(batch=batches(shape), seed=st.integers(0, 2**16))
    def examples(batch, seed):
        check(batch, seed)

    examples()


# --- Sequences ----------------------------------------------------------------------------------

RANK = Shape(2, 1, 64, page_size=8, max_num_seqs=4, num_tokens=24)


def ranks_of(batches, shape, seed=0):
    """A case for each rank, and all of them as one set of arrays."""
    cases = [make_case(shape, batch, seed=seed + r) for r, batch in enumerate(batches)]
    arrays = [np.concatenate(parts) for parts in zip(*(c.arrays for c in cases), strict=True)]
    return cases, arrays, stack([case.batch for case in cases])


def check_sequences(batches, rung, seed=0, **options):
    parallel = plan(rung, mesh=(("data", len(batches)),), forms=(Sequences("data"),))
    cases, arrays, batch = ranks_of(batches, RANK, seed)
    results = run(parallel, *arrays, batch, sm_scale=0.125, return_lse=True, **options)
    of_ranks = zip(*(np.split(x, len(batches)) for x in results), strict=True)
    for case, of_rank in zip(cases, of_ranks, strict=True):
        check_results(case, of_rank, parallel, **options)


RANKS = [[(1, 9), (5, 20)], [], [(0, 0), (0, 7)], [(24, 32)], [(1, 1)] * 4, [(1, 8)], [], [(3, 3)]]


def sequences():
    check_sequences(RANKS, rung=3)
    check_sequences(RANKS, rung=7, sliding_window=6)


def sequences_full():
    check_sequences(RANKS, rung="7, eager")

    def check(batch, seed):
        rng = np.random.default_rng(seed)
        others = [[(1, int(rng.integers(1, 33)))] * int(rng.integers(0, 5)) for _ in range(7)]
        check_sequences([batch, *others], rung=3, seed=seed)

    generated(check, RANK)


# --- Decode context -----------------------------------------------------------------------------

DECODES = Shape(4, 2, 64, page_size=4, max_num_seqs=5, pages_per_seq=9, num_tokens=8)
DECODE_BATCH = [(1, 33), (0, 9), (1, 1), (1, 4), (1, 36)]


def decode_lengths(shape):
    room = shape.page_size * shape.pages_per_seq
    one = st.tuples(st.integers(0, 1), st.integers(1, room))
    return st.lists(one, max_size=shape.max_num_seqs)


def check_decode_context(batch, rung, num_chips=8, seed=0, shape=DECODES, **options):
    parallel = plan(rung, mesh=(("context", num_chips),), forms=(DecodeContext("context"),))
    stored = options.get("update_kv_cache", True)
    case = make_case(shape, batch, seed=seed, new_tokens_only=stored)
    if not stored:
        case.keys[:], case.values[:] = np.nan, np.nan
    check_results(case, attend(parallel, case, **options), parallel, **options)


def decode_context():
    check_decode_context(DECODE_BATCH, rung=3)
    check_decode_context(DECODE_BATCH, rung=3, attention_sink=SINKS[:4], soft_cap=3.0)
    check_decode_context(DECODE_BATCH, rung=7, num_chips=4)
    check_decode_context(DECODE_BATCH, rung=3, update_kv_cache=False)
    refused(DecodeContext, "at most one new token", [(2, 9)])
    refused(DecodeContext, "sliding_window is 4", [(1, 9)], sliding_window=4)


def refused(form, words, batch, **options):
    parallel = Parallel(mesh_of(context=4), form("context"), attention=RUNGS[3])
    case = make_case(DECODES, batch)
    try:
        parallel(*case.arrays, case.batch, sm_scale=0.125, **options)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


def decode_context_full():
    generated(
        lambda batch, seed: check_decode_context(batch, 3, 8, seed), DECODES, batches=decode_lengths
    )
    generated(
        lambda batch, seed: check_decode_context(batch, 7, 4, seed),
        DECODES,
        batches=decode_lengths,
        max_examples=6,
    )
    check_decode_context(DECODE_BATCH, "7, eager", 4)
    narrow = replace(DECODES, dtype="float8_e4m3fn")
    options = {"q_dtype": "bfloat16", "k_scale": 0.5, "v_scale": 2.0, "out_dtype": "float32"}
    check_decode_context(DECODE_BATCH, 7, 8, shape=narrow, **options)
    shared = replace(DECODES, dtype="bfloat16", share_lanes=True)
    check_decode_context(DECODE_BATCH, 3, 8, shape=shared, out_dtype="float32")


# --- Prefill context ----------------------------------------------------------------------------


def check_prefill_context(
    num_tokens,
    rung,
    num_chips=8,
    *,
    page_size=4,
    pages_per_chunk=1,
    dtype="float32",
    heads=(4, 2),
    seed=0,
    **options,
):
    """A prompt of `num_tokens`, zigzag; its pages shuffled on each chip; against the oracle."""
    rng = np.random.default_rng(seed)
    chunk = page_size * pages_per_chunk
    rows = 2 * num_chips * chunk
    order = zigzag(rows, num_chips)
    num_pages = 2 * pages_per_chunk + 1  # of a chip: one of them is nobody's
    table = np.full(2 * num_chips * pages_per_chunk, -1, np.int32)
    for chip in range(num_chips):
        pages = chip * num_pages + rng.permutation(num_pages)
        for first, part in zip(
            (chip, 2 * num_chips - 1 - chip), np.split(pages[:-1], 2), strict=True
        ):
            table[first * pages_per_chunk : (first + 1) * pages_per_chunk] = part
    batch = RaggedBatch(
        kv_lens=np.array([num_tokens], np.int32),
        page_indices=table,
        cu_q_lens=np.array([0, num_tokens], np.int32),
        distribution=np.array([0, 0, 1], np.int32),
    )

    prompt = [
        rng.standard_normal((rows, h, 64)).astype(jnp.dtype(dtype))
        for h in (heads[0], heads[1], heads[1])
    ]
    for array in prompt:
        array[num_tokens:] = np.nan
    shape = get_kv_cache_shape(num_chips * num_pages, page_size, heads[1], 64, dtype)
    cache = np.full(shape, np.nan, jnp.dtype(dtype))
    expected = bits(cache).copy()
    packed = bits(pack_kv(*prompt[1:]))
    for t in range(num_tokens):
        expected[table[t // page_size], t % page_size] = packed[t]

    new = [array[order] for array in prompt]
    if not options.get("update_kv_cache", True):
        cache = expected.view(cache.dtype)  # keys and values are there, and not given
        new[1:] = [np.full_like(array, np.nan) for array in new[1:]]
    parallel = plan(rung, mesh=(("context", num_chips),), forms=(PrefillContext("context"),))
    output, kv_cache, lse = run(
        parallel,
        *new,
        cache,
        batch,
        sm_scale=0.125,
        return_lse=True,
        **options,
    )
    np.testing.assert_array_equal(bits(kv_cache), expected)
    back = np.argsort(order)
    q, k, v = (x[:num_tokens].astype(np.float32) for x in prompt)
    names = {"attention_sink": "sinks"}
    known = {names.get(n, n): x for n, x in options.items() if n in ("attention_sink", "soft_cap")}
    truth = dense.oracle(q, k, v, sm_scale=0.125, **known)
    tolerance = 2e-6 if dtype == "float32" else 2e-3
    check_output(output[back][:num_tokens], truth, tolerance=tolerance)
    check_lse(lse[back][:num_tokens], truth, tolerance=tolerance)
    assert not output[back][num_tokens:].any() and (lse[back][num_tokens:] == -np.inf).all()


def prefill_context():
    for num_tokens in (64, 61, 5):
        check_prefill_context(num_tokens, rung=3)
    check_prefill_context(30, rung=7, num_chips=4)
    check_prefill_context(61, rung=3, update_kv_cache=False)
    check_prefill_context(60, rung=3, attention_sink=SINKS[:4], soft_cap=3.0)


def prefill_context_full():
    for num_tokens in (1, 4, 33, 63):
        check_prefill_context(num_tokens, rung=7, num_chips=8)
    for num_chips in (1, 2, 3):
        check_prefill_context(8 * num_chips - 1, rung=3, num_chips=num_chips)
    check_prefill_context(30, rung="7, eager", num_chips=4)
    check_prefill_context(100, rung=7, dtype="bfloat16", pages_per_chunk=2, out_dtype="float32")
    generated(
        lambda n, seed: check_prefill_context(n, 3, seed=seed),
        None,
        batches=lambda _: st.integers(1, 64),
    )


# --- Together -----------------------------------------------------------------------------------


def sequences_and_heads():
    """Four ranks of two chips: each rank shares its heads out."""
    shape = Shape(4, 2, 64, page_size=8, max_num_seqs=4, num_tokens=24)
    forms = (Sequences("data"), Heads("model"))
    parallel = plan(3, mesh=(("data", 4), ("model", 2)), forms=forms)
    cases, arrays, batch = ranks_of(RANKS[:4], shape)
    arrays[3] = bits_on_chips(arrays[3], shape, 2).view(arrays[3].dtype)
    results = run(parallel, *arrays, batch, sm_scale=0.125, return_lse=True, sliding_window=6)
    of_ranks = zip(*(np.split(x, 4) for x in results), strict=True)
    for case, of_rank in zip(cases, of_ranks, strict=True):
        check_results(case, of_rank, parallel, num_head_chips=2, sliding_window=6)


def heads_and_decode_context(rung=3):
    """Two KV heads on eight chips: two chips for the heads, four for the pages of each."""
    forms = (Heads("model"), DecodeContext("context"))
    parallel = plan(rung, mesh=(("model", 2), ("context", 4)), forms=forms)
    case = make_case(DECODES, DECODE_BATCH)
    options = {"num_head_chips": 2, "attention_sink": SINKS[:4]}
    check_results(case, attend(parallel, case, **options), parallel, **options)


def a_prompt_and_its_decode():
    """What PrefillContext has stored, DecodeContext reads: same pages, same chips."""
    num_chips, page_size, rows = 4, 4, 32
    rng = np.random.default_rng(0)
    tokens = [rng.standard_normal((rows + 1, h, 64), np.float32) for h in (4, 2, 2)]
    order = zigzag(rows, num_chips)
    table = np.array([0, 3, 6, 9, 10, 7, 4, 1, 2], np.int32)  # the new page is on chip 0
    cache = np.zeros(get_kv_cache_shape(12, page_size, 2, 64, "float32"), np.float32)
    mesh = (("context", num_chips),)
    prompt = RaggedBatch(*map(np.int32, ([rows], table, [0, rows], [0, 0, 1])))
    _, cache = plan(3, mesh, (PrefillContext("context"),))(
        *(x[:-1][order] for x in tokens), cache, prompt, sm_scale=0.125
    )
    step = RaggedBatch(*map(np.int32, ([rows + 1], table, [0, 1], [1, 1, 1])))
    output, _ = plan(3, mesh, (DecodeContext("context"),))(
        *(x[-1:] for x in tokens), cache, step, sm_scale=0.125
    )
    check_output(output, dense.oracle(tokens[0][-1:], *tokens[1:], sm_scale=0.125), tolerance=2e-6)


def together():
    sequences_and_heads()
    heads_and_decode_context()
    a_prompt_and_its_decode()


def together_full():
    heads_and_decode_context(rung=7)


def too_few_threads():
    """Started with NPROC=2: the call is refused, instead of hanging for ever."""
    try:
        check_heads("8/8 of 64", rung=7)
    except KernelFault as error:
        assert "XLA has 2 threads for 8 host devices" in str(error), error
        assert "set NPROC=32" in str(error), error
    else:
        raise AssertionError("not refused")


if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    globals()[sys.argv[1]]()
    print(f"{sys.argv[1]}: right")
