"""The bugs of production kernels that rungs 4 to 6 could have, one test each by name.

Rung 3 and rung 8 have tests of their own. A batch here only decodes where rung 5 is among the
rungs, because that is all it does.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpa import dense, fused, streamed, tiled
from rpa.paging import get_kv_cache_shape, pack_kv
from tests.batches import Shape, bits, make_case
from tests.kernel_harness import ON_WAIT, check, check_output, run

pytestmark = pytest.mark.core

SMALL = Shape(
    num_q_heads=2, num_kv_heads=1, head_dim=64, page_size=4, pages_per_seq=5, num_tokens=12
)
RUNGS = {
    "tiled": partial(tiled.attention, block_q=8, block_kv=8),
    "streamed": partial(streamed.attention, block_tokens=8),
    "fused": partial(fused.attention, block_tokens=8, max_q_len=5),
}
every_rung = pytest.mark.parametrize("rung", RUNGS)


def check_case(rung, case, **options):
    attend = partial(RUNGS[rung], interpret=ON_WAIT.params, **options)
    check(case, *run(attend, *case.arrays, case.batch, sm_scale=0.125), sm_scale=0.125)


@every_rung
def test_04_idle_slots_anywhere(rung):
    check_case(rung, make_case(SMALL, [(0, 9), (1, 9), (0, 0), (0, 4), (1, 1), (0, 0)]))


def test_06_softmax_state_at_length():
    """16,384 tokens whose values vary: a bfloat16 running sum would be some percent off."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((16384, 1, 128)).astype(np.float32)
    v = k * np.linspace(0.5, 2.0, 16384, dtype=np.float32)[:, None, None]
    q = rng.standard_normal((1, 1, 128)).astype(np.float32) * np.float32(0.1)
    cache = pack_kv(k, v).reshape(get_kv_cache_shape(64, 256, 1, 128, "float32"))
    arrays = (q, cache, np.array([16384]), np.arange(64))
    options = {"num_kv_heads": 1, "block_tokens": 1024, "interpret": ON_WAIT.params}
    out = run(streamed.paged_decode, *arrays, **options)
    check_output(out, dense.oracle(q, k, v), tolerance=2e-6)


@every_rung
def test_15_shared_lanes_are_read_or_refused(rung):
    """Rungs 5 and 6 would read the K of another head as V."""
    shape = dataclasses.replace(SMALL, num_kv_heads=2, share_lanes=True)
    case = make_case(shape, [(1, 9), (1, 4), (1, 18)])
    if rung == "tiled":
        check_case(rung, case)
        return
    with pytest.raises(ValueError, match="rungs 5 and 6 know only the one without"):
        RUNGS[rung](*case.arrays, case.batch, sm_scale=0.125)


@every_rung
def test_07_and_08_poison_is_not_read(rung):
    """NaN in every page, tail and padding row that is not owned; garbage behind the page table."""
    case = make_case(SMALL, [(1, 9), (1, 4), (1, 18)])
    free = np.setdiff1d(np.arange(SMALL.num_pages), case.batch.page_indices)
    assert len(free) and np.isnan(case.kv_cache[free]).all()
    assert np.abs(case.batch.page_indices.astype(np.int64)).max() > SMALL.num_pages
    check_case(rung, case)


@every_rung
def test_10_padding_rows_are_zero(rung):
    case = make_case(SMALL, [(1, 9)])
    output, _ = run(RUNGS[rung], *case.arrays, case.batch, interpret=ON_WAIT.params)
    assert output[0].all() and not output[1:].any() and np.isnan(case.queries[1:]).all()


@pytest.mark.parametrize("rung", ["tiled", "fused"])
@pytest.mark.parametrize("kv_lens", [(7, 8, 9), (11, 12, 13), (15, 16, 17)])
def test_12_new_tokens_that_cross_a_page(rung, kv_lens):
    """Three new tokens that end one before, at, and one after the end of a page (or block)."""
    check_case(rung, make_case(SMALL, [(3, kv_len) for kv_len in kv_lens]))


GROUPS = {"5/1, 80": (5, 1, 80), "3/3, 240": (3, 3, 240), "12/2, 64": (12, 2, 64)}


@pytest.mark.full
@every_rung
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", GROUPS)
def test_15_heads_that_need_padding(group, dtype, rung):
    shape = Shape(*GROUPS[group], page_size=8, num_tokens=12, dtype=dtype)
    check_case(rung, make_case(shape, [(1, 9), (0, 3), (1, 16), (1, 25)]))


@pytest.mark.parametrize(
    "rung", ["streamed", "fused"]
)  # test_tiled asks the kernel of rung 4 itself
def test_16_a_traced_scale_works(rung):
    case = make_case(SMALL, [(1, 9), (1, 4), (1, 18)])

    @jax.jit
    def scaled(sm_scale):
        attend = partial(RUNGS[rung], interpret=ON_WAIT.params)
        return attend(*case.arrays, case.batch, sm_scale=sm_scale)

    check(case, *run(scaled, 0.3), sm_scale=0.3)


@pytest.mark.full
@pytest.mark.parametrize("rung", RUNGS)
def test_17_blocks_that_do_not_divide(rung):
    options = {"block_q": 60, "block_kv": 48} if rung == "tiled" else {"block_tokens": 12}
    check_case(rung, make_case(SMALL, [(1, 20), (1, 13), (1, 12), (1, 1)]), **options)


@every_rung
def test_18_nothing_is_donated(rung):
    case = make_case(SMALL, [(1, 9), (1, 4)])
    arrays = [jnp.asarray(array) for array in case.arrays]
    for _ in range(2):  # a notebook cell, run twice
        _, cache = run(RUNGS[rung], *arrays, case.batch, interpret=ON_WAIT.params)
        np.testing.assert_array_equal(bits(cache), case.expected_cache())
    np.testing.assert_array_equal(bits(arrays[3]), bits(case.kv_cache))


@every_rung
def test_19_shared_pages_are_read_by_both(rung):
    check_case(rung, make_case(SMALL, [(1, 13), (1, 14), (1, 10)], share=True))


@pytest.mark.full
@every_rung
def test_queries_wider_than_the_cache(rung):
    """float32 queries over a bfloat16 cache: computed in float32, so held to its limit."""
    shape = dataclasses.replace(SMALL, dtype="bfloat16")
    case = make_case(shape, [(1, 9), (1, 4), (1, 18)])
    case.queries = case.queries.astype(np.float32)
    case.shape = dataclasses.replace(shape, dtype="float32")  # for the tolerance
    check_case(rung, case)
