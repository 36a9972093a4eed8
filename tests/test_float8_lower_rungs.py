"""Rungs 4 to 6 with a float8 cache: read and stored exactly; float8 queries are refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpa import fused, streamed, tiled
from rpa.paging import get_kv_cache_shape
from rpa.ragged import RaggedBatch, oracle_ragged
from tests.batches import Shape, bits, make_case
from tests.kernel_harness import EAGER, ON_WAIT, TOLERANCE, assert_compiles, check_output, run

pytestmark = pytest.mark.core

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
DECODES = [(1, 9), (0, 5), (1, 8), (1, 17)]
RUNGS = {
    "tiled": (partial(tiled.attention, block_q=8, block_kv=16), [(1, 9), (0, 5), (3, 8), (9, 17)]),
    "streamed": (partial(streamed.attention, block_tokens=8), DECODES),
    "fused": (
        partial(fused.attention, max_q_len=5, block_tokens=8),
        [(1, 9), (0, 5), (3, 8), (5, 17)],
    ),
}


def check_float8(name, dtype, heads, mode, q_dtype="bfloat16"):
    """Values of float8 are exact in bfloat16: what is left is bfloat16's own rounding."""
    attention, lengths = RUNGS[name]
    shape = Shape(*heads, 64, page_size=8, pages_per_seq=3, num_tokens=16, dtype=dtype)
    case = make_case(shape, lengths)
    queries = case.queries.astype(jnp.dtype(q_dtype))
    attend = partial(attention, interpret=mode.params, sm_scale=0.125)
    output, kv_cache = run(attend, queries, *case.arrays[1:], case.batch)
    np.testing.assert_array_equal(bits(kv_cache), case.expected_cache())
    assert output.dtype == queries.dtype
    truth = oracle_ragged(
        queries.astype(np.float32),
        kv_cache.astype(np.float32),
        case.batch,
        heads[1],
        sm_scale=0.125,
    )
    check_output(output, truth, tolerance=TOLERANCE[q_dtype])


@pytest.mark.parametrize(
    "name, dtype",
    [("tiled", "float8_e4m3fn"), ("streamed", "float8_e5m2"), ("fused", "float8_e4m3fn")],
)
def test_a_float8_cache_is_read_and_stored_exactly(name, dtype):
    """Three KV heads: six of eight places of two words, the others are padding."""
    check_float8(name, dtype, (3, 3), ON_WAIT)


@pytest.mark.full
@pytest.mark.parametrize("mode", [ON_WAIT, EAGER], ids=str)
@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(2, 1), (4, 2), (3, 3)], ids=["2/1", "4/2", "3/3"])
@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("name", RUNGS)
def test_float8_in_every_combination(name, dtype, heads, q_dtype, mode):
    check_float8(name, dtype, heads, mode, q_dtype)


@pytest.mark.parametrize("dtype", [*FLOAT8, "float16"])
@pytest.mark.parametrize("name", RUNGS)
def test_other_queries_are_refused(name, dtype):
    attention, _ = RUNGS[name]
    case = make_case(Shape(2, 1, 64, page_size=8, num_tokens=4), [(1, 9)])
    case = replace(case, queries=case.queries.astype(jnp.dtype(dtype)))
    with pytest.raises(ValueError, match=f"the queries are {dtype}, but must be float32 or bfloat"):
        attention(*case.arrays, case.batch, interpret=ON_WAIT.params)


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_a_float8_cache_compiles_for(chip, dtype):
    """Rungs 5 and 6 read it themselves; rung 4 is given bfloat16."""

    def integers(n):
        return jax.ShapeDtypeStruct((n,), jnp.int32)

    queries = jax.ShapeDtypeStruct((64, 8, 128), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((64, 2, 128), dtype)
    cache = jax.ShapeDtypeStruct(get_kv_cache_shape(4096, 16, 2, 128, dtype), dtype)
    decode = (queries, cache, integers(64), integers(64 * 64))
    options = {"num_kv_heads": 2, "interpret": False}
    assert_compiles(chip, streamed.paged_decode, *decode, kwargs=options)
    batch = RaggedBatch(*map(integers, (64, 64 * 64, 65, 3)))
    arrays = (queries, new, new, cache, batch)
    assert_compiles(chip, fused.fused_attention, *arrays, kwargs={"interpret": False})
