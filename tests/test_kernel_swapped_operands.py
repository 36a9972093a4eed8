"""Swapped operands: which keys are streamed, and that the scores are the same."""

import jax.numpy as jnp
import numpy as np
import pytest

from rpa import chips
from rpa.kernel import mxu
from rpa.kernel.cases import Case
from rpa.kernel.plan import BlockSizes, Plan
from tests.batches import Shape
from tests.kernel_harness import ON_WAIT
from tests.kernel_plans import make_problem
from tests.kernel_runs import check_lengths

pytestmark = pytest.mark.core


@pytest.mark.parametrize("num_keys", [8, 128, 200, 256, 512, 768, 1024, 1152, 4096])
@pytest.mark.parametrize("mxu_size", sorted({c.mxu_size for c in chips.CHIPS.values()}))
def test_every_key_has_its_score(num_keys, mxu_size):
    parts = mxu.parts(num_keys, mxu_size)
    assert [key for first, end, _ in parts for key in range(first, end)] == list(range(num_keys))
    swaps_some = num_keys >= (512 if mxu_size == 128 else 256)  # a quarter or a half, in 128s
    assert any(is_swapped for *_, is_swapped in parts) == swaps_some
    rng = np.random.default_rng(num_keys)
    q, k = (rng.integers(-8, 9, (n, 16)).astype(np.float32) for n in (4, num_keys))
    scores = mxu.product(jnp.asarray(q), jnp.asarray(k), mxu_size)
    np.testing.assert_array_equal(scores, q @ k.T)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_output_where_operands_are_swapped(chip):
    shape = Shape(4, 4, 128, page_size=64, pages_per_seq=17, dtype="bfloat16")
    lengths = [(1, 1), (1, 300), (1, 512), (1, 1030)]
    check_lengths(shape, lengths, ON_WAIT, chip=chip, d_block_sizes=(1, 1024, 1, 512))


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "expected"),
    [
        ((32, 8), 128, "bfloat16", True),
        ((32, 8), 128, "float32", False),
        ((4, 2), 256, "bfloat16", True),
        ((9, 3), 64, "bfloat16", True),
        ((16, 2), 128, "bfloat16", False),  # two heads fill the rows of a product
        ((8, 1), 128, "bfloat16", False),
    ],
)
def test_which_products_swap_operands(heads, head_dim, dtype, expected):
    problem = make_problem(heads, head_dim, q=dtype, kv=dtype)
    plan = Plan(problem, Case.DECODE, BlockSizes(1, 1024, 1, 512), max_q_len=1)
    assert plan.tricks.swaps_operands == expected


def test_only_a_decode_swaps_operands():
    blocks = BlockSizes(8, 1024, 8, 512)
    plan = Plan(make_problem((32, 8), 128), Case.MIXED, blocks)
    assert not plan.tricks.swaps_operands
