"""The idle half of a wide MXU: chosen by chip and shape, right with it and without."""

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
from tests.kernel_runs import BLOCKS, check_lengths

SHAPE = Shape(4, 2, 128, page_size=8, pages_per_seq=4, dtype="bfloat16")
LENGTHS = [(1, 17), (20, 31), (9, 9)]


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_output_with_and_without_an_idle_half(chip):
    sinks = np.linspace(-1, 2, 4, dtype=np.float32)
    options = {"attention_sink": sinks, "soft_cap": 2.0, "out_dtype": jnp.float32}
    check_lengths(SHAPE, LENGTHS, ON_WAIT, chip=chip, **(BLOCKS | options))


@pytest.mark.parametrize(
    ("chip", "bq", "head_dim", "dtype", "expected"),
    [
        ("v6e", 8, 128, "bfloat16", True),
        ("tpu7x", 8, 64, "bfloat16", True),
        ("v5e", 8, 128, "bfloat16", False),
        ("v6e", 8, 256, "bfloat16", False),
        ("v6e", 8, 128, "float32", False),
        ("v6e", 1, 128, "bfloat16", False),
    ],
)
def test_which_plans_have_an_idle_half(chip, bq, head_dim, dtype, expected):
    problem = make_problem((8, 2), head_dim, q=dtype, kv=dtype)
    case = Case.DECODE if bq == 1 else Case.MIXED
    blocks, mxu_size = BlockSizes(bq, 16, bq, 16), chips.chip(chip).mxu_size
    plan = Plan(problem, case, blocks, mxu_size=mxu_size)
    assert plan.tricks.uses_idle_mxu == expected


def test_two_parts_keep_sixteen_bits_of_a_scaled_query():
    tile = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    factor = np.float32(128**-0.5 * 1.4426950408889634)
    parts = np.asarray(mxu.split_queries(jnp.asarray(tile), factor, jnp.bfloat16))
    high, low = np.split(parts.astype(np.float64), 2, axis=1)
    exact = tile.astype(np.float64) * factor
    assert np.abs((high + low) / exact - 1).max() < 2**-16
    assert np.abs(high / exact - 1).max() > 2**-10  # one part alone is a bfloat16
