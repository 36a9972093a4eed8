"""The third result, the log-sum-exp, of the reference and of rungs 7 and 8; and merging by it.

Held against the float64 oracle: on generated batches, with every option. Then one pass over all
keys is compared with parts of them, merged.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpa import dense, plain
from rpa.kernel import prepare, ragged_paged_attention, refs
from rpa.parallel.merge import merge
from rpa.ragged import ref_ragged_paged_attention
from tests.batches import Shape, lengths, make_case
from tests.kernel_harness import MODES, ON_WAIT, check_output, run
from tests.kernel_runs import tolerance_of, truth_of

pytestmark = pytest.mark.core

SMALL = Shape(2, 1, 64, page_size=8)
MIXED = [(1, 9), (0, 5), (1, 8), (7, 7), (0, 0), (9, 17)]  # decodes, idle slots, prompt, chunk
SINKS = np.linspace(-2, 6, 6).astype(np.float32)
GQA = Shape(6, 2, 64, page_size=8)
FLOAT8 = Shape(6, 2, 64, page_size=8, dtype="float8_e4m3fn", share_lanes=True)
FEATURES = {
    "plain": (GQA, {}),
    "window and cap": (GQA, {"sliding_window": 5, "soft_cap": 3.0}),
    "not causal, window": (GQA, {"use_causal_mask": False, "sliding_window": 5}),
    "sinks": (GQA, {"attention_sink": SINKS}),
    "float8, scales, sinks": (
        FLOAT8,
        {"q_dtype": "bfloat16", "q_scale": 0.1, "k_scale": 0.5, "v_scale": 2.0}
        | {"attention_sink": SINKS, "out_dtype": "float32"},
    ),
    "bfloat16": (Shape(6, 2, 64, page_size=8, dtype="bfloat16"), {"out_dtype": "bfloat16"}),
}


def reference(queries, keys, values, kv_cache, batch, **options):
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    return ref_ragged_paged_attention(queries, keys, values, kv_cache, *metadata, **options)


def rung_7(*args, mode=ON_WAIT, **options):
    return plain.attention(*args, block_q=4, block_kv=12, interpret=mode.params, **options)


def rung_8(queries, keys, values, kv_cache, batch, mode=ON_WAIT, **options):
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    small = {"d_block_sizes": (1, 16, 1, 8), "m_block_sizes": (8, 16, 8, 16)}
    return ragged_paged_attention(
        *(queries, keys, values, kv_cache, *metadata), backend=mode.params, **small | options
    )


RUNGS = {"reference": reference, "rung 7": rung_7, "rung 8": rung_8}
on_all = pytest.mark.parametrize("rung", RUNGS)


def check_lse(lse, truth, *, tolerance):
    """-inf exactly where the oracle has it; elsewhere as exact as the scores it is made of."""
    lse = np.asarray(lse)
    assert lse.dtype == np.float32 and not np.isnan(lse).any()
    has_key = np.isfinite(truth.lse)
    np.testing.assert_array_equal(lse == -np.inf, ~has_key)
    difference = np.abs(lse[has_key] - truth.lse[has_key])
    assert (difference <= 4 * tolerance * np.maximum(1, truth.scale[has_key])).all()


def attend(rung, case, *, q_dtype=None, **options):
    queries = case.queries if q_dtype is None else case.queries.astype(jnp.dtype(q_dtype))
    options = {"sm_scale": case.shape.head_dim**-0.5} | options
    return run(RUNGS[rung], queries, *case.arrays[1:], case.batch, **options)


def check(rung, case, **options):
    output, kv_cache, lse = attend(rung, case, return_lse=True, **options)
    truth = truth_of(case, kv_cache, **options)
    tolerance = tolerance_of(case, output.dtype)
    check_output(output, truth, tolerance=tolerance)
    check_lse(lse, truth, tolerance=tolerance)


@on_all
@pytest.mark.parametrize("name", FEATURES)
def test_options(rung, name):
    shape, options = FEATURES[name]
    check(rung, make_case(shape, MIXED), **options)


@on_all
@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data())
def test_generated_batches(rung, data):
    check(rung, make_case(SMALL, data.draw(lengths(SMALL)), seed=data.draw(st.integers(0, 99))))


@pytest.mark.parametrize("kernel", [rung_7, rung_8])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_kernels_in_both_modes(mode, kernel):
    case = make_case(SMALL, MIXED)
    output, kv_cache, lse = run(
        partial(kernel, mode=mode), *case.arrays, case.batch, sm_scale=0.125, return_lse=True
    )
    truth = truth_of(case, kv_cache)
    check_output(output, truth, tolerance=2e-6)
    check_lse(lse, truth, tolerance=2e-6)


@on_all
def test_the_output_is_the_same_with_and_without(rung):
    case = make_case(GQA, MIXED)
    with_lse = attend(rung, case, return_lse=True)
    without = attend(rung, case)
    assert len(with_lse) == 3 and len(without) == 2
    np.testing.assert_array_equal(with_lse[0], without[0])


@on_all
def test_no_tokens_at_all(rung):
    *_, lse = attend(
        rung, make_case(Shape(2, 1, 64, page_size=8, num_tokens=0), []), return_lse=True
    )
    assert lse.shape == (0, 2)


@on_all
def test_other_values_are_refused_in_words(rung):
    with pytest.raises(ValueError, match="return_lse is 'yes', but must be True or False"):
        RUNGS[rung](
            *make_case(SMALL, MIXED).arrays, make_case(SMALL, MIXED).batch, return_lse="yes"
        )


# --- What is not asked for is not in the program ------------------------------------------------


def test_rung_7_without_it_is_the_kernel_that_it_was():
    """No more lanes of output, no more copies: the third result is all that the flag adds."""
    case = make_case(Shape(2, 1, 64, page_size=8, dtype="bfloat16"), MIXED)

    def kernel_outputs(**options):
        jaxpr = jax.make_jaxpr(partial(rung_7, **options))(*case.arrays, case.batch)
        (inner,) = [e for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
        (call,) = [e for e in inner.params["jaxpr"].eqns if e.primitive.name == "pallas_call"]
        return [(aval.aval.shape, aval.aval.dtype.name) for aval in call.outvars]

    assert kernel_outputs()[0] == ((40, 2, 128), "bfloat16")
    assert kernel_outputs(return_lse=True)[0] == ((40, 2, 256), "float32")


def test_rung_8_without_it_is_the_kernel_that_it_was():
    case = make_case(Shape(2, 1, 64, page_size=8, dtype="bfloat16"), MIXED)

    def outputs(**options):
        plans = prepare(*case.arrays, *case.metadata, **options)
        found = [refs.outputs(plan).output for plan in plans]
        return {(output.shape[1:], output.dtype.name) for output in found}

    assert outputs() == {((1, 2, 128), "bfloat16")}
    assert outputs(return_lse=True) == {((2, 1, 256), "float32")}


# --- Merging ------------------------------------------------------------------------------------


def parts_of(rng, *, cuts, num_keys=24, sinks=None):
    """Dense attention of 5 queries over all keys, and over the parts between the cuts."""
    q, k, v = (rng.standard_normal((n, h, 16)) for n, h in ((5, 4), (num_keys, 2), (num_keys, 2)))
    whole = dense.oracle(q, k, v, causal=False, sinks=sinks)
    ends = [0, *sorted(cuts), num_keys]
    parts = [
        dense.oracle(q, k[a:b], v[a:b], causal=False) for a, b in zip(ends, ends[1:], strict=False)
    ]
    return whole, parts


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    cuts=st.lists(st.integers(0, 24), min_size=0, max_size=6),
    with_sinks=st.booleans(),
)
def test_merged_parts_are_one_pass(seed, cuts, with_sinks):
    """Also with empty parts: equal cuts. What an empty part's output holds does not matter."""
    sinks = np.array([-1.0, 0.0, 3.0, 40.0]) if with_sinks else None
    whole, parts = parts_of(np.random.default_rng(seed), cuts=cuts, sinks=sinks)
    outputs = np.stack([np.where(np.isfinite(p.lse)[..., None], p.output, np.nan) for p in parts])
    output, lse = merge(
        jnp.asarray(outputs, jnp.float32),
        jnp.asarray(np.stack([p.lse for p in parts]), jnp.float32),
        None if sinks is None else jnp.asarray(sinks),
    )
    assert dense.relative_error(output, whole) <= 2e-6
    np.testing.assert_allclose(lse, whole.lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("sinks", [None, np.zeros(4, np.float32)], ids=["no sink", "sinks"])
def test_no_part_has_a_key(sinks):
    outputs, lses = jnp.full((3, 5, 4, 16), jnp.nan), jnp.full((3, 5, 4), -jnp.inf)
    output, lse = merge(outputs, lses, sinks)
    assert not output.any() and (lse == -jnp.inf).all()


def test_far_apart_parts_do_not_overflow():
    output, lse = merge(jnp.array([1.0, 5.0]).reshape(2, 1, 1, 1), jnp.array([[[900.0]], [[1e-3]]]))
    assert output[0, 0, 0] == 1.0 and lse[0, 0] == 900.0


def test_a_nan_of_a_part_that_counts_stays_visible():
    output, _ = merge(jnp.full((1, 1, 1, 4), jnp.nan), jnp.zeros((1, 1, 1)))
    assert jnp.isnan(output).all()
