"""Are the tests of rung 8 sharp? Every start and wait is removed or swapped, every rule bent."""

import contextlib
import copy
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from rpa import interpreter
from rpa.kernel import layout, page_table, ragged_paged_attention, traversal, tricks
from rpa.kernel.mixed import ScoreTile, Tiled
from rpa.kernel.transfers import Copies
from tests import mutants
from tests.batches import Shape, make_case
from tests.kernel_harness import EAGER, ON_WAIT
from tests.kernel_runs import check_lengths

pytestmark = pytest.mark.core

SMALL = Shape(2, 1, 64, page_size=8, pages_per_seq=128, max_num_seqs=16)
"""Every sequence has its own piece of the page table: one that comes too late is a wrong one."""
LENGTHS = [
    *((1, 75), (0, 3), (1, 93), (1, 9), (1, 40), (1, 64), (1, 33), (1, 70), (1, 12), (1, 85)),
    *((1, 50), (18, 90), (0, 0), (9, 12)),
]
"""Both kernels, two and more blocks of everything, idle slots before and between, part pages; and
more decodes than there are buffers for their output, eight if in short supply."""

BLOCKS = {"d_block_sizes": (1, 80, 1, 16), "m_block_sizes": (8, 80, 4, 16)}
"""So many pages a block that they are issued in two iterations."""

needs_deadlock_errors = pytest.mark.skipif(
    not interpreter.deadlocks_can_raise(), reason="this JAX's interpreter hangs on a missing signal"
)


@contextlib.contextmanager
def in_short_supply():
    """Few buffers, so that they are waited for in a small batch; normally it takes 16 decodes."""
    with mock.patch.object(tricks, "DECODE_ITERATIONS_AHEAD", 1):
        yield


def check_on_wait():
    with in_short_supply():
        check_lengths(SMALL, LENGTHS, ON_WAIT, **BLOCKS)


def check_both_modes():
    check_on_wait()
    with in_short_supply():
        check_lengths(SMALL, LENGTHS, EAGER, **BLOCKS)


def check_window():
    check_lengths(SMALL, LENGTHS, ON_WAIT, sliding_window=5, **BLOCKS)


def changed(function, **changes):
    """`function` with some of its results' fields replaced: {field: lambda old result: new}."""

    def wrong(*args):
        result = function(*args)
        return result._replace(**{name: change(result) for name, change in changes.items()})

    return wrong


PAGE_COPY, START_STORE = Copies._page_copy, Copies._start_store
MASK, ACCUMULATE, LOAD_KV = ScoreTile.mask, Tiled.accumulate, layout.load_kv
QUERY_BLOCK = traversal.query_block
WRONG_PARTS = {
    "page index off by one": (
        Copies,
        "_page_copy",
        lambda self, slot, index, row, n: PAGE_COPY(self, slot, index + 1, row, n),
    ),
    "page lands one row late": (
        Copies,
        "_kv_tokens",
        lambda self, slot, first, n: self.refs.kv_buffer.at[
            slot, pl.ds(jnp.minimum(first + 1, 80 - n), n), pl.ds(0, 2)
        ],
    ),
    "table chunk not aligned back": (Copies, "_chunk_start", lambda self, entry: 0 * entry + 128),
    "every block taken for a contiguous one": (
        page_table,
        "is_contiguous",
        lambda entry: entry >= -(2**31),
    ),
    "mark of a contiguous block left on its page": (page_table, "page", lambda entry: entry),
    "stale rows behind the last token kept": (
        layout,
        "_keep_first",
        lambda words, num_valid: words,
    ),
    "mask one key late": (
        ScoreTile,
        "mask",
        lambda scores: jnp.roll(MASK(scores), 1, axis=1).at[:, 0].set(True),
    ),
    "mask never needed": (ScoreTile, "mask", lambda scores: jnp.ones_like(MASK(scores))),
    "query position off by one": (
        traversal,
        "query_block",
        changed(traversal.query_block, position=lambda block: block.position + 1),
    ),
    "cached prefix ignored by the mask": (
        traversal,
        "query_block",
        lambda plan, seq, index: QUERY_BLOCK(plan, seq, index)._replace(
            position=QUERY_BLOCK(plan, seq, index).position - seq.num_cached
        ),
    ),
    "last key of the last block left out": (
        traversal,
        "query_block",
        changed(traversal.query_block, kv_end=lambda block: jnp.maximum(block.kv_end - 1, 1)),
    ),
    "idle sequences not passed over": (
        traversal,
        "first_active",
        lambda plan, refs, index, end: index,
    ),
    "sequence starts at the next one's row": (
        traversal,
        "sequence",
        changed(traversal.sequence, q_start=lambda seq: seq.q_start + seq.q_len),
    ),
    "padding rows not written": (Copies, "write_zero_rows", lambda self, num_used: None),
    "new tokens not stored": (
        Copies,
        "_start_store",
        lambda self, item, source, position, num_tokens: None,
    ),
    "new tokens stored one row early": (
        Copies,
        "_start_store",
        lambda self, item, source, position, num_tokens: START_STORE(
            self, item, source, jnp.maximum(position - 1, 0), num_tokens
        ),
    ),
    "accumulator not rescaled": (
        Tiled,
        "accumulate",
        lambda self, state, v, p, decay: ACCUMULATE(self, state, v, p, jnp.ones_like(decay)),
    ),
    "state not reset": (Tiled, "reset", lambda self, state, group: None),
    "reads the other buffer": (
        layout,
        "load_kv",
        lambda tiles, buffer, slot, *rest: LOAD_KV(tiles, buffer, 1 - slot, *rest),
    ),
}
WRONG_WINDOWS = {
    "window starts a page late": (
        traversal,
        "query_block",
        changed(traversal.query_block, kv_start=lambda block: jnp.minimum(block.kv_start + 8, 64)),
    ),
    "window ignored by the mask": (
        ScoreTile,
        "mask",
        lambda scores: MASK(scores) | MASK(_shifted_back(scores)),
    ),
}


def _shifted_back(scores):
    """The same rectangle of queries 4 tokens earlier: its window reaches further back."""
    earlier = copy.copy(scores)
    earlier.q_position = scores.q_position - 4
    return earlier


def list_faults():
    """Every fault there is; the kernels need only be traced to find them."""
    case = make_case(SMALL, LENGTHS)

    def trace(*arrays):
        options = {"backend": ON_WAIT.params} | BLOCKS
        return ragged_paged_attention(*arrays, *case.metadata, **options)

    with in_short_supply():
        return mutants.list_faults(lambda: jax.eval_shape(trace, *case.arrays))


@needs_deadlock_errors
def test_a_missing_wait_is_found():
    """The sample of `make test`."""
    wanted = ("drop", "wait", "wait_kv")
    for fault in list_faults():
        # The innermost function waits for any copy.
        found = (fault.action, fault.site.operation, fault.site.where[1].split()[-1])
        if found == wanted:
            assert mutants.verdict(check_on_wait, fault) == "numbers"
            return
    raise AssertionError(f"no site for {wanted}")


@pytest.mark.full
@needs_deadlock_errors
def test_every_start_and_wait_is_needed():
    faults = list_faults()
    assert len(faults) >= 20
    survivors = [f for f in faults if mutants.verdict(check_both_modes, f) == "survived"]
    assert [str(f) for f in survivors] == []


@pytest.mark.full
@needs_deadlock_errors
@pytest.mark.parametrize("name", WRONG_PARTS)
def test_a_wrong_part_is_found(name):
    part = mutants.replaced(*WRONG_PARTS[name])
    assert mutants.verdict(check_both_modes, part) != "survived"


@pytest.mark.full
@needs_deadlock_errors
@pytest.mark.parametrize("name", WRONG_WINDOWS)
def test_a_wrong_window_is_found(name):
    part = mutants.replaced(*WRONG_WINDOWS[name])
    assert mutants.verdict(check_window, part) != "survived"
