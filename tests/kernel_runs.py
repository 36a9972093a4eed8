"""Rung 8 on a `tests.batches.Case`, held against the float64 oracle with all of its options."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from rpa import dense
from rpa.check.sandbox import fast_compile
from rpa.kernel import ragged_paged_attention
from rpa.paging import packing_of
from rpa.ragged import RaggedBatch, oracle_ragged, quantize
from tests.batches import bits, make_case
from tests.kernel_harness import check_output, run

BLOCKS = {"d_block_sizes": (1, 16, 1, 8), "m_block_sizes": (8, 16, 4, 8)}
"""Blocks so small that a few tokens make several of each: for pages of 8."""

ORACLE_NAMES = {
    "use_causal_mask": "causal",
    "sliding_window": "sliding_window",
    "soft_cap": "soft_cap",
    "attention_sink": "sinks",
}


def tolerance_of(case, out_dtype):
    """What the Kernels issue allows: float32, bfloat16 by its output, float8."""
    name = case.shape.dtype
    if name == "float32" and out_dtype == jnp.float32:
        return 2e-6
    if packing_of(jnp.dtype(name)) == 4:
        return 1e-2
    return 2e-3 if out_dtype == jnp.float32 else 2.5e-3


def attend(case, mode, *, q_dtype=None, **options):
    """Output and cache of rung 8 in the interpreter; NumPy arrays."""
    queries = case.queries if q_dtype is None else case.queries.astype(jnp.dtype(q_dtype))
    arrays = (jnp.asarray(x) for x in (queries, *case.arrays[1:]))
    options = {"backend": mode.params, "sm_scale": case.shape.head_dim**-0.5} | options
    with fast_compile.rung_8():
        return run(ragged_paged_attention, *arrays, *case.metadata, **options)


def truth_of(case, kv_cache, *, q_dtype=None, **options):
    """The float64 oracle with the options of the public function."""
    queries = case.queries.astype(np.float32)
    scale = options.get("sm_scale", case.shape.head_dim**-0.5) * options.get("k_scale", 1.0)
    if "q_scale" in options:
        rounded = quantize(jnp.asarray(queries), options["q_scale"], kv_cache.dtype)
        queries, scale = np.asarray(rounded.astype(jnp.float32)), scale * options["q_scale"]
    names = {ORACLE_NAMES[name]: value for name, value in options.items() if name in ORACLE_NAMES}
    cache = kv_cache.astype(np.float32)
    heads = case.shape.num_kv_heads
    truth = oracle_ragged(queries, cache, case.batch, heads, sm_scale=scale, **names)
    factor = options.get("v_scale", 1.0)
    return dense.Truth(truth.output * factor, truth.scale * factor, truth.lse)


def check(case, mode, **options):
    """Run rung 8 and hold output and cache against what they must be."""
    output, kv_cache = attend(case, mode, **options)
    stored = options.get("update_kv_cache", True)
    expected = case.expected_cache() if stored else bits(case.kv_cache)
    wrong = np.argwhere((bits(kv_cache) != expected).any(axis=(2, 3, 4)))
    assert not len(wrong), f"(page, slot) with wrong bits: {wrong[:8].tolist()} of {len(wrong)}"
    truth = truth_of(case, kv_cache, **options)
    check_output(output, truth, tolerance=tolerance_of(case, output.dtype))
    return output


def check_lengths(shape, lengths, mode, *, seed=0, num_chunked=0, adjacent=False, **options):
    """`check` a batch of (q_len, kv_len) pairs; `num_chunked` of the longer ones are chunks."""
    stored = options.get("update_kv_cache", True)
    case = make_case(shape, lengths, seed=seed, adjacent=adjacent, new_tokens_only=stored)
    i, _, k = case.batch.distribution
    case.batch = with_distribution(case.batch, i, i + num_chunked, k)
    return check(case, mode, **options)


def with_distribution(batch: RaggedBatch, *ends):
    """The same batch with other ends of its ranges."""
    return replace(batch, distribution=np.array(ends, np.int32))
