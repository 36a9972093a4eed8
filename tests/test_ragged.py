"""Rungs 2 and 3 against the float64 oracle, to the last bit of the cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpa.compat import JAX_FLOOR, JAX_VERSION
from rpa.dense import relative_error, scaled_error
from rpa.paging import get_kv_cache_shape, lanes_are_shared, pack_kv, unpack_kv
from rpa.ragged import (
    RaggedBatch,
    oracle_ragged,
    ref_ragged_paged_attention,
    rows_in_batch,
)
from tests.batches import Shape, bits, lengths, make_case

pytestmark = pytest.mark.core

SHAPES = [
    Shape(num_q_heads=4, num_kv_heads=4, head_dim=16, page_size=4),  # MHA
    Shape(num_q_heads=6, num_kv_heads=2, head_dim=64, page_size=8),  # GQA, a group of 3
    Shape(num_q_heads=5, num_kv_heads=1, head_dim=80, page_size=3),  # MQA, odd everything
    Shape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=1, pages_per_seq=9),
    Shape(num_q_heads=9, num_kv_heads=3, head_dim=64, page_size=8, share_lanes=True),
]
FLOAT32_LIMIT = 2e-6
# The floor repeats what the tested version has shown: a sample is enough there.
NUM_BATCHES = 130 if JAX_VERSION > JAX_FLOOR else 30


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=NUM_BATCHES, deadline=None, derandomize=True)
@given(data=st.data())
def test_generated_batches(shape, data):
    """5 x NUM_BATCHES batches: both measures of difference, and every bit of the cache."""
    case = make_case(
        shape,
        data.draw(lengths(shape)),
        seed=data.draw(st.integers(0, 2**16)),
        share=data.draw(st.booleans()),
    )
    sm_scale = shape.head_dim**-0.5
    output, cache = ref_ragged_paged_attention(*case.arrays, *case.metadata, sm_scale=sm_scale)
    assert_matches_oracle(case, output, cache, sm_scale=sm_scale)


def assert_matches_oracle(case, output, cache, *, limit=FLOAT32_LIMIT, queries=None, **options):
    np.testing.assert_array_equal(bits(cache), case.expected_cache())
    queries = case.queries if queries is None else queries
    truth = oracle_ragged(queries, cache, case.batch, case.shape.num_kv_heads, **options)
    assert np.isfinite(np.asarray(output, np.float32)).all()
    assert relative_error(output, truth) <= limit
    assert scaled_error(output, truth) <= limit


MIXED = [(1, 9), (0, 5), (1, 8), (7, 7), (0, 0), (9, 17)]  # decodes, idle slots, prompt, chunk
GQA = SHAPES[1]
FEATURES = {
    "window": dict(sliding_window=5),
    "window of one": dict(sliding_window=1),
    "window, not causal": dict(sliding_window=5, use_causal_mask=False),
    "not causal": dict(use_causal_mask=False),
    "not causal, mask skipped": dict(use_causal_mask=False, skip_kv_mask=True),
    "soft cap": dict(soft_cap=3.0),
    "sinks": dict(attention_sink=np.linspace(-2, 2, 6).astype(np.float32)),
    "all at once": dict(
        sliding_window=6, soft_cap=2.0, attention_sink=np.linspace(-2, 2, 6).astype(np.float32)
    ),
    "mask value": dict(mask_value=-1e9),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name):
    options = FEATURES[name]
    case = make_case(GQA, MIXED, seed=1)
    output, cache = ref_ragged_paged_attention(
        *case.arrays, *case.metadata, sm_scale=0.125, **options
    )
    assert_matches_oracle(case, output, cache, sm_scale=0.125, **for_oracle(options))


def for_oracle(options):
    names = {"use_causal_mask": "causal", "attention_sink": "sinks"}
    kept = {"sliding_window", "soft_cap", *names}
    return {names.get(name, name): value for name, value in options.items() if name in kept}


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    "num_kv_heads, share_lanes", [(1, False), (2, False), (3, False), (3, True)]
)
def test_narrow_caches_with_scales(dtype, num_kv_heads, share_lanes):
    heads = (2 * num_kv_heads, num_kv_heads)
    shape = Shape(*heads, 64, page_size=8, dtype=dtype, share_lanes=share_lanes)
    case = make_case(shape, MIXED, seed=2)
    scales = dict(q_scale=0.5, k_scale=0.25, v_scale=2.0)
    queries = np.random.default_rng(3).standard_normal(case.queries.shape).astype(np.float32)
    output, cache = ref_ragged_paged_attention(
        queries, *case.arrays[1:], *case.metadata, sm_scale=0.125, **scales
    )
    assert output.dtype == jnp.float32
    # Rounded by NumPy: jax 0.7.2 on a CPU rounds to float8 by way of float16 outside of jit.
    largest = float(jnp.finfo(dtype).max)
    rounded = np.clip(queries / np.float32(0.5), -largest, largest).astype(jnp.dtype(dtype))
    # V is doubled by v_scale, so half of the output is compared with the oracle of the cache.
    assert_matches_oracle(case, output / 2, cache, queries=rounded, sm_scale=0.125 * 0.5 * 0.25)


@pytest.mark.parametrize("out_dtype", [None, "float32", "bfloat16"])
def test_trap20_out_dtype_is_what_you_get(out_dtype):
    case = make_case(Shape(6, 2, 64, page_size=8, dtype="bfloat16"), MIXED)
    output, _ = ref_ragged_paged_attention(
        *case.arrays, *case.metadata, out_dtype=None if out_dtype is None else jnp.dtype(out_dtype)
    )
    assert output.dtype == (out_dtype or "bfloat16")


def test_trap1_sliding_window_loses_no_token():
    shape = Shape(4, 1, 16, page_size=16, pages_per_seq=25, num_tokens=400)
    case = make_case(shape, [(393, 393)])
    _, cache = ref_ragged_paged_attention(*case.arrays, *case.metadata, sliding_window=128)
    np.testing.assert_array_equal(bits(cache), case.expected_cache())


@pytest.mark.parametrize("ends", [(2, 2, 6), (2, 6, 6), (2, 4, 6), (0, 0, 6), (0, 6, 6)])
def test_trap2_no_sequence_is_dropped_whatever_the_distribution(ends):
    case = make_case(GQA, [(1, 9), (1, 8), (7, 7), (9, 17), (4, 4), (2, 20)], seed=4)
    metadata = (*case.metadata[:3], np.array(ends, np.int32))
    output, cache = ref_ragged_paged_attention(*case.arrays, *metadata, sm_scale=0.125)
    assert_matches_oracle(case, output, cache, sm_scale=0.125)


def test_trap3_a_wrong_distribution_under_jit_stays_on_its_own_pages():
    case = make_case(GQA, [(7, 7), (9, 17)], seed=5)
    metadata = (*case.metadata[:3], np.array([2, 2, 2], np.int32))  # "both decode": a lie
    with pytest.raises(ValueError, match="sequence 0 has q_len 7"):
        ref_ragged_paged_attention(*case.arrays, *metadata)
    _, cache = jax.jit(ref_ragged_paged_attention)(*case.arrays, *metadata)
    np.testing.assert_array_equal(bits(cache), case.expected_cache())


def test_trap8_page_indices_that_do_not_exist_write_nowhere():
    case = make_case(GQA, [(7, 7)], seed=5)
    for page in (-1, case.shape.num_pages):
        table = np.full_like(case.batch.page_indices, page)
        metadata = (case.metadata[0], table, *case.metadata[2:])
        _, cache = jax.jit(ref_ragged_paged_attention)(*case.arrays, *metadata)
        np.testing.assert_array_equal(bits(cache), bits(case.kv_cache))


def test_trap10_padding_rows_and_rows_without_a_key_are_zero():
    case = make_case(GQA, [(1, 9)], seed=6)
    output, _ = ref_ragged_paged_attention(*case.arrays, *case.metadata)
    assert not np.asarray(output[1:]).any()


def test_trap11_kv_sharing_ignores_k_and_v():
    case = make_case(GQA, MIXED, seed=7, new_tokens_only=False)
    poison = np.full_like(case.keys, np.nan)
    output, cache = ref_ragged_paged_attention(
        case.queries, poison, poison, case.kv_cache, *case.metadata, update_kv_cache=False
    )
    np.testing.assert_array_equal(bits(cache), bits(case.kv_cache))
    expected, _ = ref_ragged_paged_attention(*case.arrays, *case.metadata)
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("end", [-1, 0, 1])
def test_trap12_chunks_that_end_around_a_page_end(end):
    case = make_case(GQA, [(5, 16 + end), (3, 8 + end)], seed=8)
    output, cache = ref_ragged_paged_attention(*case.arrays, *case.metadata, sm_scale=0.125)
    assert_matches_oracle(case, output, cache, sm_scale=0.125)


@pytest.mark.parametrize("heads", [(5, 1), (3, 3), (9, 3), (12, 2)])
@pytest.mark.parametrize("head_dim", [64, 80, 240])
def test_trap15_heads_and_dims_that_need_padding(heads, head_dim):
    shape = Shape(*heads, head_dim, page_size=8, dtype="bfloat16")
    case = make_case(shape, MIXED, seed=9)
    output, cache = ref_ragged_paged_attention(
        *case.arrays, *case.metadata, sm_scale=0.1, out_dtype=jnp.float32
    )
    assert_matches_oracle(case, output, cache, sm_scale=0.1)


def test_trap16_a_traced_scale_works():
    case = make_case(GQA, MIXED, seed=10)
    run = jax.jit(lambda scale, *args: ref_ragged_paged_attention(*args, sm_scale=scale))
    output, cache = run(0.125, *case.arrays, *case.metadata)
    assert_matches_oracle(case, output, cache, sm_scale=0.125)


def test_trap19_shared_pages_are_read_and_writing_into_one_is_an_error():
    case = make_case(GQA, [(1, 20), (3, 20)], seed=11, share=True)
    table = case.batch.page_indices.reshape(-1, 4).copy()
    assert table[0, 0] == table[1, 0], "the case was meant to share a page"
    output, cache = ref_ragged_paged_attention(*case.arrays, *case.metadata, sm_scale=0.125)
    assert_matches_oracle(case, output, cache, sm_scale=0.125)

    table[1, 2] = table[0, 2]  # the page with the new tokens of sequence 1
    metadata = (case.metadata[0], table.reshape(-1), *case.metadata[2:])
    with pytest.raises(ValueError, match="a shared page may only be read"):
        ref_ragged_paged_attention(*case.arrays, *metadata)
    ref_ragged_paged_attention(*case.arrays, *metadata, update_kv_cache=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 5])
def test_trap21_packing_round_trip_with_zero_padding(dtype, num_kv_heads):
    rng = np.random.default_rng(0)
    keys, values = (
        jnp.asarray(rng.standard_normal((7, num_kv_heads, 80)), jnp.dtype(dtype)) for _ in range(2)
    )
    packed = pack_kv(keys, values)
    assert packed.shape[1:] == get_kv_cache_shape(1, 8, num_kv_heads, 80, packed.dtype)[2:]
    for got, want in zip(unpack_kv(packed, num_kv_heads, 80), (keys, values), strict=True):
        np.testing.assert_array_equal(bits(got), bits(want))
    assert not bits(packed[..., 80:]).any(), "lanes behind head_dim"
    assert not bits(packed.reshape(7, -1, 128)[:, 2 * num_kv_heads :]).any(), "padding heads"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 5])
def test_trap21_shared_lanes_round_trip_with_zero_padding(dtype, num_kv_heads):
    rng = np.random.default_rng(0)
    keys, values = (
        jnp.asarray(rng.standard_normal((7, num_kv_heads, 64)), jnp.dtype(dtype)) for _ in range(2)
    )
    packed = pack_kv(keys, values, share_lanes=True)
    shape = get_kv_cache_shape(1, 8, num_kv_heads, 64, packed.dtype, share_lanes=True)
    assert packed.shape[1:] == shape[2:]
    for got, want in zip(unpack_kv(packed, num_kv_heads, 64), (keys, values), strict=True):
        np.testing.assert_array_equal(bits(got), bits(want))
    if not lanes_are_shared(shape, num_kv_heads, 64):
        assert shape == get_kv_cache_shape(1, 8, num_kv_heads, 64, packed.dtype)
        np.testing.assert_array_equal(bits(packed), bits(pack_kv(keys, values)))
        return
    rows = bits(packed.reshape(7, -1, 128))
    np.testing.assert_array_equal(rows[:, :num_kv_heads, :64], bits(keys))
    np.testing.assert_array_equal(rows[:, :num_kv_heads, 64:], bits(values))
    assert not rows[:, num_kv_heads:].any(), "padding heads"


def test_nothing_is_donated_and_one_compilation_serves_all_metadata():
    arguments = [jnp.asarray(x) for x in make_case(GQA, MIXED).arrays]
    traced = []

    @jax.jit
    def run(batch):
        traced.append(batch)
        return ref_ragged_paged_attention(
            *arguments, batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution
        )

    for pairs in (MIXED, [(1, 3)], []):
        run(make_case(GQA, pairs).batch)
    assert len(traced) == 1
    assert not any(x.is_deleted() for x in arguments)


def test_from_lengths_orders_decode_then_chunks_then_mixed():
    tables = [[i] for i in range(6)]
    batch, order = RaggedBatch.from_lengths(
        [3, 1, 4, 0, 4, 7], [8] * 6, tables, max_num_seqs=8, chunk_prefill_size=4
    )
    assert order.tolist() == [1, 3, 2, 4, 0, 5]
    assert batch.distribution.tolist() == [2, 4, 6]
    assert batch.cu_q_lens.tolist() == [0, 1, 1, 5, 9, 12, 19, 19, 19]
    assert batch.page_indices.tolist() == [1, 3, 2, 4, 0, 5, -1, -1]


def test_a_batch_is_a_pytree():
    batch, _ = RaggedBatch.from_lengths([1], [5], [[0]])
    assert len(jax.tree.leaves(batch)) == 4
    moved = jax.tree.map(jnp.asarray, batch)
    assert isinstance(moved, RaggedBatch) and isinstance(moved.kv_lens, jax.Array)


_run = partial(ref_ragged_paged_attention, validate=True)


def test_validation_cannot_be_forced_under_jit():
    case = make_case(GQA, MIXED)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(_run)(*case.arrays, *case.metadata)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.sampled_from([None, 3]))
def test_rows_go_into_the_batch_and_back(q_lens, chunk_prefill_size):
    tables = [[s] for s in range(len(q_lens))]
    batch, order = RaggedBatch.from_lengths(
        q_lens, [max(q, 1) for q in q_lens], tables, chunk_prefill_size=chunk_prefill_size
    )
    tokens = np.array([10 * s + t for s, q_len in enumerate(q_lens) for t in range(q_len)], int)
    rows = rows_in_batch(q_lens, order)
    in_batch = tokens[rows]
    for s, arguments_s in enumerate(order):
        own = in_batch[batch.cu_q_lens[s] : batch.cu_q_lens[s + 1]]
        assert own.tolist() == [10 * arguments_s + t for t in range(q_lens[arguments_s])]
    back = np.empty_like(tokens)
    back[rows] = in_batch
    np.testing.assert_array_equal(back, tokens)


def test_an_order_that_names_a_sequence_twice_is_refused():
    with pytest.raises(ValueError, match=r"order is \[1, 1\], but must name each of the 2"):
        rows_in_batch([3, 1], [1, 1])
