"""Small tiles for query blocks of few tokens, and the two halves of the last tile."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rpa.kernel.cases import Case
from rpa.kernel.mixed import Tiled
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
    return Plan(problem, Case.MIXED, sizes)


def check_few_tokens(mode=ON_WAIT):
    shape = Shape(8, 1, 64, page_size=8, pages_per_seq=40, num_tokens=440, dtype="bfloat16")
    sinks = np.linspace(-1, 2, 8, dtype=np.float32)
    check_lengths(shape, LENGTHS, mode, attention_sink=sinks, out_dtype=jnp.float32, **BLOCKS)


@pytest.mark.parametrize("mode", [ON_WAIT, EAGER], ids=lambda mode: mode.name)
def test_query_blocks_of_few_tokens(mode):
    check_few_tokens(mode)


TILE, NUM_Q_SUBS, PARTS_OF_TILE = Tiled._state, Tiled._num_q_subs, Tiled._parts_of_tile
WRONG_TILES = {
    "all small tiles in one place": (
        Tiled,
        "_state",
        lambda self, q_sub, *rest: TILE(
            self, 0 * q_sub if self.plan.has_small_tiles else q_sub, *rest
        ),
    ),
    "one small tile, however many tokens": (
        Tiled,
        "_num_q_subs",
        lambda self, item: 1 if self.plan.has_small_tiles else NUM_Q_SUBS(self, item),
    ),
    "one half of the last tile left out": (
        Tiled,
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
    assert most * small.tiles.rows <= plan.tiles.rows
    assert small.in_small_tiles is None


def test_who_has_no_small_tiles():
    assert make_plan((32, 8), 128).in_small_tiles is None


@pytest.mark.parametrize(
    ("q_per_kv", "dtype", "parts"),
    [(4, "bfloat16", 2), (1, "bfloat16", 2), (1, "float32", 1), (3, "float32", 1)],
)
def test_the_last_tile_is_cut_where_its_mask_begins_anew(q_per_kv, dtype, parts):
    plan = make_plan((2 * q_per_kv, 2), 128, dtype)

    class Ref(SimpleNamespace):
        """A ref that only tells which rows are looked at."""

        @property
        def at(self):
            return self

        def __getitem__(self, index):
            return index

    refs = Ref(q_tiles=Ref(), row_max=Ref(), acc=Ref(), row_sum=Ref(), scalars=None, sinks=None)
    tiled = Tiled(plan, refs, buffers=None)
    first, last = (tiled._parts_of_tile(0, group) for group in (0, 1))
    assert len(first) == 1 and len(last) == parts
    rows = [part.q[2] for part in last]
    assert sum(each.size for each in rows) == plan.tiles.rows
    assert [each.start for each in rows] == [i * rows[0].size for i in range(len(rows))]
