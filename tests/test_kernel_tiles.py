"""Small tiles for query blocks of few tokens, and the two halves of the last tile."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rpa.kernel import loop, softmax
from rpa.kernel.cases import Case
from rpa.kernel.plan import BlockSizes, Plan
from tests import mutants
from tests.batches import Shape
from tests.kernel_harness import EAGER, ON_WAIT
from tests.kernel_plans import make_problem
from tests.kernel_runs import check_lengths

BLOCKS = {"d_block_sizes": (1, 64, 1, 32), "m_block_sizes": (256, 64, 256, 32)}
LENGTHS = [(1, 9), (3, 40), (33, 50), (64, 64), (65, 70), (260, 300)]
"""One small tile, two of them, as many as there may be; the first length without; and a block of
four tokens after a full one."""


def make_plan(num_heads, bq_c, dtype="bfloat16"):
    problem = make_problem(num_heads, 128, q=dtype, kv=dtype)
    sizes = BlockSizes(256, 1024, bq_c, 512)
    return Plan(problem, Case.MIXED, sizes, interpret=False, is_last=True)


def check_few_tokens(mode=ON_WAIT):
    shape = Shape(8, 1, 64, page_size=8, pages_per_seq=40, num_tokens=440, dtype="bfloat16")
    sinks = np.linspace(-1, 2, 8, dtype=np.float32)
    check_lengths(shape, LENGTHS, mode, attention_sink=sinks, out_dtype=jnp.float32, **BLOCKS)


@pytest.mark.parametrize("mode", [ON_WAIT, EAGER], ids=lambda mode: mode.name)
def test_query_blocks_of_few_tokens(mode):
    check_few_tokens(mode)


TILE, FOR_EACH_PIECE, PARTS_OF_TILE = softmax.Tile, loop._for_each_q_sub, loop._parts_of_tile
WRONG_TILES = {
    "all small tiles in one place": (
        softmax,
        "Tile",
        lambda plan, refs, piece, *rest: TILE(
            plan, refs, 0 * piece if plan.has_small_tiles else piece, *rest
        ),
    ),
    "one small tile, however many tokens": (
        loop,
        "_for_each_q_sub",
        lambda plan, block: (
            loop._repeat(1) if plan.has_small_tiles else FOR_EACH_PIECE(plan, block)
        ),
    ),
    "one half of the last tile left out": (
        loop,
        "_parts_of_tile",
        lambda *args: PARTS_OF_TILE(*args)[:1],
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", WRONG_TILES)
def test_a_wrong_tile_is_found(name):
    part = mutants.replaced(*WRONG_TILES[name])
    assert mutants.verdict(check_few_tokens, part) == "numbers"


def test_a_window_in_small_tiles():
    shape = Shape(4, 2, 128, page_size=8, pages_per_seq=40, num_tokens=440, dtype="float32")
    check_lengths(shape, LENGTHS, ON_WAIT, sliding_window=20, **BLOCKS)


@pytest.mark.parametrize(
    ("num_heads", "bq_c", "tokens"),
    [((8, 1), 256, 32), ((8, 2), 256, 64), ((128, 1), 256, 8), ((2, 2), 256, 128)],
)
def test_how_large_a_small_tile_is(num_heads, bq_c, tokens):
    plan = make_plan(num_heads, bq_c)
    small = plan.in_small_tiles
    assert small.blocks == BlockSizes(256, 1024, tokens, 512)
    # Those of a query block that is cut fit in the memory of one large tile.
    most = -(-(bq_c // 4) // tokens)
    assert most * small.tile_rows <= plan.tile_rows
    assert small.in_small_tiles is None


def test_who_has_no_small_tiles():
    assert make_plan((32, 8), 128).in_small_tiles is None


@pytest.mark.parametrize(
    ("group", "dtype", "parts"),
    [(4, "bfloat16", 2), (1, "bfloat16", 2), (1, "float32", 1), (3, "float32", 1)],
)
def test_the_last_tile_is_cut_where_its_mask_begins_anew(group, dtype, parts):
    plan = make_plan((2 * group, 2), 128, dtype)

    class Ref(SimpleNamespace):
        """A ref that only tells which rows are looked at."""

        @property
        def at(self):
            return self

        def __getitem__(self, place):
            return place

    refs = Ref(q_tiles=Ref(), m=Ref(), acc=Ref(), l=Ref())
    first, last = (loop._parts_of_tile(plan, refs, 0, dot) for dot in (0, 1))
    assert len(first) == 1 and len(last) == parts
    rows = [part.q[2] for part in last]
    assert sum(each.size for each in rows) == plan.tile_rows
    assert [each.start for each in rows] == [i * rows[0].size for i in range(len(rows))]
