"""Rung 7 against the float64 oracle and to the last bit of the cache; its work list as data.

The bugs of production kernels are named with their numbers, as in `test_traps`. Every batch is
poisoned (`tests.batches`). Tests of one shape and the same options share a compilation, which is
nearly all that a test costs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rpa import compat, interpreter, plain
from rpa.paging import cdiv, get_kv_cache_shape
from rpa.ragged import RaggedBatch, ref_ragged_paged_attention
from tests import mutants
from tests.batches import Shape, bits, lengths, make_case
from tests.kernel_harness import EAGER, MODES, ON_WAIT, assert_compiles, check_output, run
from tests.kernel_runs import tolerance_of, truth_of, with_distribution
from tests.test_kernel_batches import random_lengths
from tests.test_lower_rung_errors import BAD, good

pytestmark = pytest.mark.core

SMALL = Shape(2, 1, 64, page_size=8)
BLOCKS = {"block_q": 4, "block_kv": 12}
"""So small that a few tokens make several of each, and without a common factor with the pages."""

both_modes = pytest.mark.parametrize("mode", MODES, ids=str)


def attend(case, mode=ON_WAIT, *, q_dtype=None, **options):
    """Output and cache of rung 7 in the interpreter; NumPy arrays."""
    queries = case.queries if q_dtype is None else case.queries.astype(jnp.dtype(q_dtype))
    options = BLOCKS | {"interpret": mode.params, "sm_scale": case.shape.head_dim**-0.5} | options
    return run(plain.attention, queries, *case.arrays[1:], case.batch, **options)


def check(case, mode=ON_WAIT, **options):
    """Run rung 7 and hold output and cache against what they must be; returns the output."""
    output, kv_cache = attend(case, mode, **options)
    stored = options.get("update_kv_cache", True)
    expected = case.expected_cache() if stored else bits(case.kv_cache)
    wrong = np.argwhere((bits(kv_cache) != expected).any(axis=(2, 3, 4)))
    assert not len(wrong), f"(page, slot) with wrong bits: {wrong[:8].tolist()} of {len(wrong)}"
    truth = truth_of(case, kv_cache, **options)
    check_output(output, truth, tolerance=tolerance_of(case, output.dtype))
    return output


def check_lengths(shape, lengths, mode=ON_WAIT, *, seed=0, share=False, **options):
    """`check` a batch of (q_len, kv_len) pairs."""
    stored = options.get("update_kv_cache", True)
    case = make_case(shape, lengths, seed=seed, share=share, new_tokens_only=stored)
    return check(case, mode, **options)


# --- The work list ------------------------------------------------------------------------------

LISTED = Shape(1, 1, 64, page_size=4, pages_per_seq=5, num_tokens=24)
LISTS = [
    plain.Options(block_q=4),
    plain.Options(block_q=3, causal=False),
    plain.Options(block_q=7, sliding_window=5),
    plain.Options(block_q=1, sliding_window=6, causal=False, update_kv_cache=False),
]


def keys_seen(position, q_len, kv_len, options):
    """Every key that one of some queries sees, the long way."""
    seen = set()
    for query in range(position, position + q_len):
        for key in range(kv_len):
            late = options.causal and key > query
            early = options.sliding_window is not None and query - key >= options.sliding_window
            if not (late or early):
                seen.add(key)
    return sorted(seen)


@settings(deadline=None, max_examples=40)
@given(lengths=lengths(LISTED))
@pytest.mark.parametrize("options", LISTS, ids=lambda o: f"block_q {o.block_q}")
def test_work_list(options, lengths):
    batch = make_case(LISTED, lengths).batch
    work = plain.work_list(batch, LISTED.num_tokens, options)
    work = plain.WorkList(*map(np.asarray, work))
    used = np.count_nonzero(work.q_len)
    assert len(work.seq) == 1 + min(24, cdiv(24, options.block_q) + 6), "shape depends on shapes"
    assert used < len(work.seq) and not work.q_len[used:].any() and not work.kv_end[used:].any()
    tokens = []
    for seq, q_row, q_len, position, num_cached, kv_start, kv_end in zip(
        *(field[:used].tolist() for field in work), strict=True
    ):
        kv_len = int(batch.kv_lens[seq])
        first_new = kv_len - int(batch.cu_q_lens[seq + 1] - batch.cu_q_lens[seq])
        assert 1 <= q_len <= options.block_q
        assert q_row - batch.cu_q_lens[seq] == position - first_new
        assert num_cached == (first_new if options.update_kv_cache else kv_len)
        assert keys_seen(position, q_len, kv_len, options) == list(range(kv_start, kv_end))
        assert kv_start <= position and position + q_len <= kv_end, "it stores its own tokens"
        tokens += [(seq, position + i) for i in range(q_len)]
    new = [
        (s, kv_len - q_len + i)
        for s, (q_len, kv_len) in enumerate(sorted(lengths, key=lambda pair: pair[0] > 1))
        for i in range(q_len)
    ]
    assert tokens == new, "every new token is in exactly one query block, in the order of the rows"


def test_lengths_that_cannot_be_are_no_work():
    """Under jit nothing refuses them; positions below 0 would be read and written somewhere."""
    arrays = ([5, 1], [0, 1], [0, 2, 5], [0, 0, 2])  # kv_lens[1] is 1, with 3 new tokens
    batch = RaggedBatch(*(np.array(a, np.int32) for a in arrays))
    work = plain.work_list(batch, 5, plain.Options(block_q=4))
    assert work.seq[work.q_len > 0].tolist() == [0] and (work.position >= 0).all()


def test_table_prints_one_line_for_each_query_block():
    batch, _ = RaggedBatch.from_lengths([1, 0, 6], [5, 3, 6], [[0], [1], [2]])
    lines = plain.table(plain.work_list(batch, 7, plain.Options(block_q=4))).splitlines()
    rows = [line.split()[:3] for line in lines]
    assert rows == [["seq", "q_row", "q_len"], ["0", "0", "1"], ["2", "1", "4"], ["2", "5", "2"]]


# --- Traps --------------------------------------------------------------------------------------


@both_modes
def test_01_sliding_window_stores_every_new_token(mode):
    lengths = [(1, 20), (0, 9), (32, 32), (7, 30)]
    check_lengths(SMALL, lengths, mode, sliding_window=5, soft_cap=3.0)


def test_02_and_03_the_distribution_need_not_be_right():
    """All kinds are computed alike: where a decode ends is no matter to this kernel."""
    case = make_case(SMALL, [(1, 9), (5, 20), (9, 9), (3, 31)])
    for ends in [(1, 3, 4), (0, 0, 4), (1, 4, 4)]:
        case.batch = with_distribution(case.batch, *ends)
        check(case)
    case.batch = with_distribution(case.batch, 3, 3, 4)
    with pytest.raises(ValueError, match="sequence 1 has q_len 5, but distribution says"):
        plain.attention(*case.arrays, case.batch)
    check(case, validate=False)


LENGTHS = {
    "04 idle anywhere": [(0, 0), (1, 9), (0, 17), (0, 0), (5, 8), (2, 2)],
    "04 all idle": [(0, 0), (0, 9)],
    "04 nothing": [],
    "08 full rows of the table": [(1, 1), (1, 32), (1, 31), (2, 25), (3, 32), (4, 32)],
    "12 around page ends": [(3, 9), (4, 8), (5, 7), (2, 17), (8, 16), (9, 25)],
    "a decode behind a prompt": [(1, 32), (1, 2), (16, 16)],
}


@both_modes
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name, mode):
    check_lengths(SMALL, LENGTHS[name], mode)


LONG = Shape(
    2, 1, 128, page_size=256, pages_per_seq=132, max_num_seqs=1, num_tokens=4, dtype="bfloat16"
)
LONG_OPTIONS = {"block_kv": 4096, "sliding_window": 33_000, "out_dtype": "float32"}


@pytest.mark.parametrize("q_len", [1, pytest.param(3, marks=pytest.mark.full)])
def test_05_positions_past_int16(q_len):
    check_lengths(LONG, [(q_len, 33_500)], **LONG_OPTIONS)


def test_06_softmax_state_does_not_saturate():
    """Equal scores and values that rise along the sequence: a sum that stops growing shows."""
    case = make_case(LONG, [(1, 33_500)])
    case.queries[:1] = 0
    pages = case.batch.page_indices[: cdiv(33_500, 256)]
    ramp = (np.arange(len(pages) * 256) / 33_500).reshape(len(pages), 256, 1)
    case.kv_cache[pages, :, 0, 1] = ramp  # V of the only head
    case.values[:1] = 1
    output = check(case, **LONG_OPTIONS)
    seen = ramp.reshape(-1)[500:33_500]
    np.testing.assert_allclose(output[0].astype(np.float64), seen.mean(), rtol=4e-3)


def test_07_nan_of_one_sequence_stays_there():
    """A short sequence follows, in the same buffers, one whose keys and values are NaN."""
    case = make_case(SMALL, [(1, 16), (1, 16), (1, 3), (1, 2), (16, 16), (16, 16)])
    clean, _ = attend(case)
    own = case.batch.page_indices.reshape(6, -1)
    case.kv_cache[own[:2, :2]] = np.nan
    case.values[4:20] = np.nan
    case.queries[4:20] = np.nan
    output, _ = attend(case)
    assert np.isnan(output[:2]).all() and np.isnan(output[4:20]).all()
    kept = [2, 3, *range(20, 36)]
    np.testing.assert_array_equal(output[kept], clean[kept])


def test_07_what_is_before_the_window_is_not_read():
    """A server may free these pages: whatever is in them is somebody else's, NaN too."""
    case = make_case(SMALL, [(1, 30), (2, 31)])
    clean, _ = attend(case, sliding_window=5, soft_cap=3.0)
    case.kv_cache[case.batch.page_indices.reshape(6, -1)[:2, :2]] = np.nan
    output, _ = attend(case, sliding_window=5, soft_cap=3.0)
    np.testing.assert_array_equal(output, clean)


def test_09_window_without_causal_mask():
    lengths = [(1, 20), (0, 3), (32, 32), (3, 31)]
    check_lengths(SMALL, lengths, use_causal_mask=False, sliding_window=5)


def test_10_padding_rows_are_zero():
    output = check_lengths(SMALL, [(1, 9), (2, 8)])
    assert output[:3].all() and not output[3:].any()


@pytest.mark.parametrize("mode", [ON_WAIT, pytest.param(EAGER, marks=pytest.mark.full)], ids=str)
def test_11_kv_sharing_ignores_new_kv_and_leaves_the_cache(mode):
    case = make_case(SMALL, [(1, 9), (9, 17)], new_tokens_only=False)
    case.keys[:], case.values[:] = np.nan, np.nan
    check(case, mode, update_kv_cache=False)


HEADS = {
    "9/3, 64": Shape(9, 3, 64, page_size=8, dtype="bfloat16"),
    "5/1, 80": Shape(5, 1, 80, page_size=8, dtype="bfloat16"),
    "3/3, 240": Shape(3, 3, 240, page_size=8, dtype="bfloat16"),
    "12/2, 128": Shape(12, 2, 128, page_size=16, dtype="bfloat16"),
    "9/3, 64, shared lanes": Shape(9, 3, 64, page_size=8, dtype="bfloat16", share_lanes=True),
}


@pytest.mark.parametrize(
    "name", [n if n == "5/1, 80" else pytest.param(n, marks=pytest.mark.full) for n in HEADS]
)
def test_15_heads_that_need_padding(name):
    shape = HEADS[name]
    sinks = np.random.default_rng(0).standard_normal(shape.num_q_heads).astype(np.float32)
    lengths = [(1, 9), (1, 17), (5, 20), (9, 9)]
    output = check_lengths(shape, lengths, attention_sink=sinks, out_dtype="float32")
    assert output.dtype == np.float32


def test_16_traced_scales_and_batch():
    case = make_case(SMALL, [(1, 9), (5, 20)])
    attend = partial(plain.attention, interpret=ON_WAIT.params, **BLOCKS)

    @jax.jit
    def scaled(arrays, batch, sm_scale, soft_cap, v_scale):
        return attend(*arrays, batch, sm_scale=sm_scale, soft_cap=soft_cap, v_scale=v_scale)

    options = {"sm_scale": 0.3, "soft_cap": 2.0, "v_scale": 0.5}
    output, cache = run(scaled, case.arrays, case.batch, *options.values())
    np.testing.assert_array_equal(bits(cache), case.expected_cache())
    check_output(output, truth_of(case, cache, **options), tolerance=2e-6)


@pytest.mark.full
@pytest.mark.parametrize("blocks", [(60, 48), (1, 8), (7, 5), (128, 512)])
def test_17_blocks_that_do_not_divide(blocks):
    shape = Shape(2, 1, 64, page_size=16, pages_per_seq=7, num_tokens=80)
    options = {"block_q": blocks[0], "block_kv": blocks[1]}
    check_lengths(shape, [(1, 50), (70, 100), (9, 49)], **options)


def test_18_nothing_is_donated():
    case = make_case(SMALL, [(1, 9), (2, 8)])
    arrays = [jnp.asarray(x) for x in case.arrays]
    for _ in range(2):  # a notebook cell, run twice
        options = BLOCKS | {"interpret": ON_WAIT.params, "sm_scale": 0.125}
        _, cache = run(plain.attention, *arrays, case.batch, **options)
        np.testing.assert_array_equal(bits(cache), case.expected_cache())
    np.testing.assert_array_equal(bits(arrays[3]), bits(case.kv_cache))


def test_19_shared_pages_are_read():
    case = make_case(SMALL, [(1, 25), (1, 20), (3, 19), (4, 28)], share=True)
    table = case.batch.page_indices.reshape(6, -1)
    assert len(set(table[:4, 0])) < 4, "the case shares nothing"
    check(case)


@pytest.mark.parametrize("out_dtype", [None, "float32", "bfloat16", "float16"])
def test_20_output_dtype(out_dtype):
    case = make_case(SMALL, [(1, 9)])
    arrays = [jnp.asarray(x).astype(jnp.bfloat16) for x in case.arrays[:3]]
    cache = jnp.zeros(get_kv_cache_shape(9, 8, 1, 64, "bfloat16"), jnp.bfloat16)
    attend = partial(plain.attention, batch=case.batch, out_dtype=out_dtype, validate=False)
    output, _ = jax.eval_shape(attend, *arrays, cache)
    assert output.dtype == jnp.dtype(out_dtype or "bfloat16")


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", pytest.param("float8_e5m2", marks=pytest.mark.full)]
)
def test_21_float8_and_the_padding_of_new_tokens(dtype):
    """Three float8 heads fill six of eight places, head_dim 64 half of the lanes."""
    case = make_case(Shape(3, 3, 64, page_size=8, dtype=dtype), [(1, 9), (0, 3), (5, 20)])
    check(case, q_dtype="bfloat16", q_scale=0.1, k_scale=0.5, v_scale=2.0)
    packed = case.expected_cache()[tuple(case.new_slots.T)].reshape(-1, 8, 128)
    assert packed[:, :6, :64].any() and not packed[:, 6:].any() and not packed[:, :, 64:].any()


MIXED_DTYPES = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float8_e5m2")]


@pytest.mark.full
@pytest.mark.parametrize("q_dtype, dtype", MIXED_DTYPES)
def test_queries_of_another_dtype_than_the_cache(q_dtype, dtype):
    """Computed in float32 if either is; what is left is the rounding of the output."""
    shape = Shape(4, 2, 64, page_size=8, dtype=dtype)
    case = make_case(shape, [(1, 9), (5, 20), (9, 9)])
    output, cache = attend(case, q_dtype=q_dtype, out_dtype="float32")
    case.queries = case.queries.astype(jnp.dtype(q_dtype))  # as they were given to the kernel
    check_output(output, truth_of(case, cache), tolerance=2e-6)


def test_a_page_of_one_token():
    shape = Shape(2, 1, 64, page_size=1, pages_per_seq=24, num_tokens=20)
    check_lengths(shape, [(1, 9), (0, 2), (5, 20), (7, 7)])


def test_no_tokens_at_all():
    case = make_case(Shape(2, 1, 64, page_size=8, num_tokens=0), [])
    output, cache = attend(case)
    assert output.shape == (0, 2, 64)
    np.testing.assert_array_equal(bits(cache), bits(case.kv_cache))


def test_agrees_with_rung_3():
    case = make_case(SMALL, LENGTHS["12 around page ends"])
    output, cache = attend(case, sm_scale=0.125)
    expected = ref_ragged_paged_attention(*case.arrays, *case.metadata, sm_scale=0.125)
    np.testing.assert_allclose(output, expected[0], atol=2e-6)
    np.testing.assert_array_equal(bits(cache), bits(expected[1]))


def test_sequences_in_any_order_with_default_blocks():
    """The mixed range may hold anything: decodes between prompts, and idle slots."""
    q_lens, kv_lens = [9, 1, 0, 5, 1, 2], [9, 30, 12, 20, 1, 17]
    rng = np.random.default_rng(0)
    batch = RaggedBatch(
        np.array(kv_lens, np.int32),
        rng.permutation(24).astype(np.int32),
        np.cumsum([0, *q_lens], dtype=np.int32),
        np.array([0, 0, 6], np.int32),
    )
    shape = get_kv_cache_shape(24, 8, 2, 64, "float32")
    arrays = [rng.standard_normal((20, heads, 64), np.float32) for heads in (4, 2, 2)]
    arrays.append(rng.standard_normal(shape, np.float32))
    options = {"sm_scale": 0.125, "sliding_window": 6}
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    expected = ref_ragged_paged_attention(*arrays, *metadata, **options)
    output, cache = run(plain.attention, *arrays, batch, interpret=ON_WAIT.params, **options)
    np.testing.assert_allclose(output, expected[0], atol=2e-6)
    np.testing.assert_array_equal(bits(cache), bits(expected[1]))


# --- Bad calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BAD)
def test_bad_calls_are_refused_in_words_and_write_nothing(kind):
    name, spoil, words = BAD[kind]
    arguments = good()
    before = bits(arguments["kv_cache"]).copy()
    with pytest.raises(ValueError, match=words):
        plain.attention(**arguments | {name: spoil(arguments[name])})
    np.testing.assert_array_equal(bits(arguments["kv_cache"]), before)


BAD_OPTIONS = {
    "block_q": (0, "block_q is 0"),
    "block_kv": (2.5, "block_kv is 2.5"),
    "sliding_window": (0, "sliding_window must be positive"),
    "soft_cap": (-1.0, "soft_cap must be positive"),
    "attention_sink": (np.zeros(3, np.float32), r"must be \(4,\)"),
    "out_dtype": ("int8", "must be a floating-point dtype"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused_in_words(name):
    value, words = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=words):
        plain.attention(**good() | {name: value})


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float16"])
def test_other_queries_are_refused(dtype):
    arguments = good()
    arguments["queries"] = arguments["queries"].astype(jnp.dtype(dtype))
    with pytest.raises(ValueError, match=f"the queries are {dtype}, but must be float32 or bfloat"):
        plain.attention(**arguments)


# --- Generated batches --------------------------------------------------------------------------

SHAPES = {
    "2/1, float32": (SMALL, {}),
    "window and cap": (SMALL, {"sliding_window": 5, "soft_cap": 3.0}),
    "4/2 of 128, odd blocks": (Shape(4, 2, 128, page_size=8), {"block_q": 5, "block_kv": 11}),
    "9/3 of 64, sinks": (HEADS["9/3, 64"], {"attention_sink": np.linspace(-2, 2, 9)}),
    "4/2 of 256, float8": (
        Shape(4, 2, 256, page_size=8, dtype="float8_e4m3fn"),
        {"q_dtype": "bfloat16", "k_scale": 0.5, "v_scale": 2.0},
    ),
    "float8 queries too": (
        Shape(4, 2, 128, page_size=8, dtype="float8_e5m2"),
        {"q_dtype": "bfloat16", "q_scale": 0.1},
    ),
    "8/4 of 64, shared lanes, float8": (
        Shape(8, 4, 64, page_size=8, dtype="float8_e4m3fn", share_lanes=True),
        {"q_dtype": "bfloat16", "k_scale": 0.5},
    ),
    "5/1 of 80, page 1, not causal": (
        Shape(5, 1, 80, page_size=1, pages_per_seq=32),
        {"use_causal_mask": False, "sliding_window": 7},
    ),
    "12/2, page 16, not causal": (HEADS["12/2, 128"], {"use_causal_mask": False}),
    "3/3 of 240, KV sharing": (HEADS["3/3, 240"], {"update_kv_cache": False}),
    "page 128": (
        Shape(4, 1, 64, page_size=128, pages_per_seq=1, num_tokens=200),
        {"block_q": 16, "block_kv": 48},
    ),
}


def check_batches(name, mode, seeds):
    shape, options = SHAPES[name]
    for seed in seeds:
        batch = random_lengths(np.random.default_rng(seed), shape)
        try:
            check_lengths(shape, batch, mode, seed=seed, share=seed % 2 == 0, **options)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {batch}") from error


@both_modes
def test_some_batches(mode):
    check_batches("2/1, float32", mode, range(5))


@pytest.mark.full
@both_modes
@pytest.mark.parametrize("name", SHAPES)
def test_many_batches(name, mode):
    """11 shapes x 2 modes x 8 batches."""
    check_batches(name, mode, range(100, 108))


# --- Seeded faults ------------------------------------------------------------------------------

FAULTY_BATCHES = [
    [(1, 7), (0, 4), (1, 20), (1, 1), (9, 30), (2, 2)],
    [(1, 7), (1, 20), (1, 30)],  # the last query block is a decode: it has its own last waits
]
needs_deadlock_errors = pytest.mark.skipif(
    not interpreter.deadlocks_can_raise(), reason="this JAX's interpreter hangs on a missing signal"
)


def check_both_modes():
    for mode in MODES:
        for batch in FAULTY_BATCHES:
            check_lengths(SMALL, batch, mode)


@pytest.mark.full
@needs_deadlock_errors
def test_every_start_and_wait_is_needed():
    check_both_modes()
    faults = mutants.list_faults(partial(check_lengths, SMALL, FAULTY_BATCHES[0]))
    survivors = [f for f in faults if mutants.verdict(check_both_modes, f) == "survived"]
    assert len(faults) >= 30 and [str(f) for f in survivors] == []


def changed_work(**changes):
    """`work_list` with some columns replaced: {field: lambda work: column}."""

    def wrong(*args):
        work = WORK_LIST(*args)
        return work._replace(**{name: change(work) for name, change in changes.items()})

    return ("work_list", wrong)


WORK_LIST, VISIBLE, HEAD = plain.work_list, plain.visible, plain.read_head
WRONG_PARTS = {
    "last key left out": changed_work(kv_end=lambda w: jnp.maximum(w.kv_end - 1, 1)),
    "new tokens taken from the cache": changed_work(num_cached=lambda w: w.kv_end),
    "position off by one": changed_work(position=lambda w: w.position + 1),
    "rows of the next sequence": changed_work(q_row=lambda w: w.q_row + 1),
    "mask shows every key": ("visible", lambda *args: jnp.ones_like(VISIBLE(*args))),
    "the other buffer": ("read_head", lambda r, o, slot, h: HEAD(r, o, 1 - slot, h)),
    "nothing stored": ("start_stores", lambda refs, options, b, kv_block, slot: None),
}


@pytest.mark.full
@needs_deadlock_errors
@pytest.mark.parametrize("name", WRONG_PARTS)
def test_a_wrong_part_is_found(name):
    part = mutants.replaced(plain, *WRONG_PARTS[name])
    assert mutants.verdict(check_both_modes, part) != "survived"


# --- The compiler -------------------------------------------------------------------------------

CHIPS = ("v5e", "v6e", "tpu7x")


def arguments(heads, head_dim, page_size, q="bfloat16", kv="bfloat16", share_lanes=False):
    """512 tokens of 64 sequences of up to 2,048 tokens, as shapes."""
    num_q_heads, num_kv_heads = heads

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    sizes = (1024, page_size, num_kv_heads, head_dim, kv)
    new = array(512, num_kv_heads, head_dim, dtype=kv)
    cache = array(*get_kv_cache_shape(*sizes, share_lanes=share_lanes), dtype=kv)
    batch = RaggedBatch(*map(array, (64, 64 * 2048 // page_size, 65, 3)))
    return array(512, num_q_heads, head_dim, dtype=q), new, new, cache, batch


PROGRAMS = {
    "Llama 3 70B on 8 chips": (arguments((8, 1), 128, 128), {}),
    "Llama 3 8B": (arguments((32, 8), 128, 16), {}),
    "SmolLM2": (arguments((9, 3), 64, 16), {"sliding_window": 128}),
    "SmolLM2, float32": (arguments((9, 3), 64, 16, "float32", "float32"), {"soft_cap": 30.0}),
    "e4m3fn, 256": (arguments((16, 4), 256, 64, kv="float8_e4m3fn"), {"q_scale": 0.5}),
    "e5m2, 256": (arguments((16, 4), 256, 64, kv="float8_e5m2"), {"use_causal_mask": False}),
    "MHA of 240, page 8": (arguments((3, 3), 240, 8), {"out_dtype": "float32"}),
    "12/2, KV sharing": (arguments((12, 2), 128, 256), {"update_kv_cache": False}),
    "5/1 of 80, odd blocks": (arguments((5, 1), 80, 16), {"block_q": 7, "block_kv": 50}),
    "shared lanes": (arguments((64, 8), 64, 128, share_lanes=True), {}),
    "32/32": (arguments((32, 32), 128, 16), {}),
    "with the log-sum-exp": (arguments((32, 8), 128, 16), {"return_lse": True}),
    "with it, shared lanes": (arguments((64, 8), 64, 128, share_lanes=True), {"return_lse": True}),
    "13: 128/16 of 256, float32": (arguments((128, 16), 256, 64, "float32", "float32"), {}),
}


@pytest.mark.parametrize(
    "chip, name",
    [
        pytest.param(chip, name, marks=() if name == "Llama 3 70B on 8 chips" else pytest.mark.full)
        for chip in CHIPS
        for name in PROGRAMS
    ],
)
def test_compiles_with_default_blocks(chip, name):
    args, options = PROGRAMS[name]
    options = options | {"interpret": False}
    result = assert_compiles(
        chip, plain.attention, *args, kwargs=options, donate_argnums=(3,), keep_hlo=True
    )
    assert len(result.kernels) == 1 and result.kernels[0].name.startswith("plain_attention")
    if compat.JAX_VERSION >= (0, 10, 2):  # see `rpa.compat.keep_in_hbm`
        assert not result.copies_of(args[3]), "a donated cache is copied"
