"""The public function of rung 8: backends, block sizes, and errors in words before any work."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpa.kernel import blocks, ragged_paged_attention, tricks
from rpa.kernel.cases import Case, cases_of
from rpa.kernel.plan import BlockSizes, Plan
from rpa.paging import get_kv_cache_shape
from tests.batches import Shape, make_case
from tests.kernel_plans import make_problem

pytestmark = pytest.mark.core

SMALL = Shape(2, 1, 64, page_size=8)


def call(case, **options):
    return ragged_paged_attention(*case.arrays, *case.metadata, **options)


WRONG_OPTIONS = {
    "backend": ({"backend": "gpu"}, "backend is 'gpu', but must be one of 'tpu'"),
    "out_dtype": ({"out_dtype": "float16"}, "out_dtype has dtype float16, but must be one of"),
    "three block sizes": ({"m_block_sizes": (8, 16, 8)}, "m_block_sizes is .* four numbers"),
    "bq_c": ({"m_block_sizes": (8, 16, 3, 8)}, "bq_c=3 must be positive and divide bq=8"),
    "bkv_c": ({"d_block_sizes": (1, 16, 1, 0)}, "d_block_sizes is .* bkv_c=0 must be positive"),
    "pages": ({"m_block_sizes": (8, 12, 8, 12)}, "bkv_c=12 must be a multiple of page_size=8"),
    "chunked": (
        {"p_block_sizes": (0, 16, 0, 16), "chunk_prefill_size": 4},
        "p_block_sizes is .* bq_c=0",
    ),
    "VMEM": ({"vmem_limit_bytes": 0}, "vmem_limit_bytes is 0, but must be positive"),
    "chip": ({"chip": "abacus"}, "'abacus' is no chip that rpa has numbers of"),
    "too little VMEM": ({"vmem_limit_bytes": 1000}, "default blocks of the decode kernel"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_wrong_options_are_refused_in_words(name):
    options, message = WRONG_OPTIONS[name]
    case = make_case(SMALL, [(1, 9), (2, 8)])
    before = case.kv_cache.copy()
    with pytest.raises(ValueError, match=message):
        call(case, **options)
    np.testing.assert_array_equal(case.kv_cache, before)


def test_a_traced_window_is_refused_in_words():
    case = make_case(SMALL, [(1, 9)])
    with pytest.raises(ValueError, match="sliding_window is a traced value"):
        jax.jit(lambda window: call(case, sliding_window=window))(5)


def test_values_are_validated_on_the_host_only_when_that_is_free():
    case = make_case(SMALL, [(1, 9), (2, 8)])
    case.batch.kv_lens[1] = 1
    with pytest.raises(ValueError, match=r"kv_lens\[1\] is 1, but sequence 1 brings 2 new"):
        call(case)
    with pytest.raises(ValueError, match="validate=True needs the values of the batch"):
        jax.jit(lambda *args: ragged_paged_attention(*args, validate=True))(
            *case.arrays, *case.metadata
        )


def test_reference_backend_is_rung_3():
    case = make_case(SMALL, [(1, 9), (2, 8)])
    output, cache = call(case, backend="reference", sm_scale=0.125, out_dtype="bfloat16")
    assert output.dtype == jnp.bfloat16 and cache.shape == case.kv_cache.shape


def test_a_batch_without_tokens_has_an_empty_output():
    case = make_case(Shape(2, 1, 64, page_size=8, num_tokens=0), [(0, 0), (0, 9)])
    output, cache = call(case)
    assert output.shape == (0, 2, 64) and cache is case.kv_cache


def test_each_sequence_has_one_kernel():
    for chunk_prefill_size in (None, 4):
        for distribution in [(0, 0, 0), (2, 5, 9), (3, 3, 3), (0, 4, 4)]:
            owned = []
            for case, _ in cases_of(chunk_prefill_size):
                owned += range(*case.bounds(distribution))
            assert owned == list(range(distribution[2]))


@pytest.mark.parametrize("page_size", [8, 16, 48, 128, 256])
@pytest.mark.parametrize("case", [Case.DECODE, Case.MIXED], ids=lambda case: case.label)
def test_default_blocks_are_legal(case, page_size):
    for pages_per_seq in (1, 5, 4096):
        problem = make_problem((32, 8), 128, page_size=page_size, pages_per_seq=pages_per_seq)
        sizes = blocks.default_block_sizes(problem, case, None)
        b = (sizes.bq, sizes.bkv, sizes.bq_c, sizes.bkv_c)
        assert blocks.check_block_sizes("default", b, problem) == sizes
        plan = Plan(problem, case, sizes)
        # A chunk holds all entries of a block, wherever in a tile of 128 words they begin.
        table = plan.table
        assert table.chunk_words >= table.whole_pages + 127
        assert table.table_words >= table.chunk_words and table.table_words % 128 == 0


def test_shrinking_keeps_blocks_legal_and_ends():
    problem = make_problem((64, 8), 256, kv="float32", page_size=16, pages_per_seq=4096)
    big = Plan(problem, Case.MIXED, BlockSizes(128, 8192, 128, 1024))
    for limit_mib in (256, 64, 48, 32):
        plan = blocks.shrink_to_fit(replace(big, vmem_limit_bytes=limit_mib * 2**20))
        b = plan.blocks
        assert sum(blocks.vmem_bytes(plan).values()) <= limit_mib * 2**20
        blocks.check_block_sizes("shrunk", (b.bq, b.bkv, b.bq_c, b.bkv_c), problem)
    with pytest.raises(ValueError, match="default blocks of the mixed kernel, .* MiB of VMEM"):
        blocks.shrink_to_fit(replace(big, vmem_limit_bytes=2**20))


def test_copies_run_as_far_ahead_as_vmem_allows():
    problem = make_problem((32, 8), 128, page_size=128, pages_per_seq=64)
    sizes = BlockSizes(1, 1024, 1, 512)
    plan = Plan(problem, Case.DECODE, sizes, max_q_len=1)
    needed = [
        sum(blocks.vmem_bytes(replace(plan, iterations_ahead=ahead)).values())
        for ahead in (1, 2, 3)
    ]
    assert needed == sorted(needed)
    for limit, ahead in zip([needed[0] - 1, *needed, 4 * needed[2]], [1, 1, 2, 3, 3], strict=True):
        assert blocks.plan_ahead(replace(plan, vmem_limit_bytes=limit)).iterations_ahead == ahead


def test_each_trick_names_a_heading_of_the_ablations():
    text = (Path(__file__).parents[1] / "docs" / "ablations.md").read_text("utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    named = re.findall(r'\("([^"]+)"\)', tricks.__doc__)
    assert len(named) == 10 and set(named) <= set(headings)


def test_decode_stacks_heads_until_the_rows_are_full():
    """(num_q_heads, num_kv_heads): KV heads in one product."""
    expected = {(32, 8): 4, (8, 1): 1, (9, 3): 3, (12, 2): 2, (32, 32): 4, (64, 8): 2}
    for heads, heads_per_group in expected.items():
        problem = make_problem(heads, 128)
        sizes = BlockSizes(1, 128, 1, 128)
        plan = Plan(problem, Case.DECODE, sizes)
        assert plan.tricks.heads_per_group == heads_per_group


@pytest.mark.parametrize("options", [{}, {"sliding_window": 7, "soft_cap": 5.0}], ids=str)
def test_a_caller_may_forbid_rank_promotion(options):
    """As the engines' own tests do: every array has all of its dimensions written out."""
    shape = jax.ShapeDtypeStruct
    tokens = [shape((40, heads, 128), jnp.float32) for heads in (8, 4, 4)]
    cache = shape(get_kv_cache_shape(27, 8, 4, 128, jnp.float32), jnp.float32)
    metadata = [shape((n,), jnp.int32) for n in (6, 24, 7, 3)]
    call = partial(ragged_paged_attention, backend="interpret", **options)
    with jax.numpy_rank_promotion("raise"):
        output, _ = jax.eval_shape(call, *tokens, cache, *metadata)
    assert output.shape == (40, 8, 128)
