"""The ring: items on their way from the page table to the products.

A copy from HBM takes a microsecond or two to arrive, however short it is. In that time a TPU7x
could have read five megabytes; so that much has to be on its way at any moment, or HBM is idle.
Therefore every item passes three stations, and at each of them an iteration of the loop serves the
items of another iteration:

    iteration i   looks up  iteration i: which items? ask for their page-table entries
             fetches   iteration i - TABLE_ITERATIONS: start the copies of their pages and queries
             computes  iteration i - TABLE_ITERATIONS - iterations_ahead: wait for these, compute

In between, a work item is a few words in SMEM. Registers would not do: there are 32 scalar ones,
and the
items of two iterations of a decode fill them. Its page-table entries stay as long as it does.

The ring begins empty, so the first iterations only look up and fetch, and no station has code of
its own for the start. An empty ring_index holds the sequence `end`, for which nobody does anything.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from rpa import compat
from rpa.kernel import traversal
from rpa.kernel.plan import TABLE_ITERATIONS
from rpa.kernel.traversal import ITEM_WORDS


class Iteration(NamedTuple):
    """Which round of the kernel's loop it is; i32[] scalars."""

    number: Any
    slot: Any  # number mod ring_iterations: where on the ring its items are put

    def earlier(self, plan, iterations):
        """The slot of an earlier iteration, at most ring_iterations - 1 before."""
        slot = self.slot - iterations
        return jnp.where(slot < 0, slot + plan.ring_iterations, slot)


def clear(plan, refs, end):
    """Empty the ring: no ring_index may say something that nobody put there."""

    @compat.loop_once(0, plan.ring_items)
    def _(ring_index):
        for word in range(ITEM_WORDS):
            refs.ring[ring_index * ITEM_WORDS + word] = jnp.int32(0) if word else end


def put(plan, refs, iteration, items):
    """Put the items of an iteration on the ring, and return them: now they have a ring_index."""
    first = _first_index(plan, iteration.slot)
    items = tuple(item._replace(ring_index=first + i) for i, item in enumerate(items))
    for item in items:
        for word, value in enumerate([*item.seq, *item[1:-1]]):
            refs.ring[item.ring_index * ITEM_WORDS + word] = value
    return items


def to_fetch(plan, refs, iteration, end, body):
    """Call body(item) for the items whose copies an iteration starts, one after the other.

    A item is read only when it is its iteration, because scalar registers are few; and in a loop,
    because starting all copies of a work item is a tenth of the code of the kernel.
    """
    first = _first_index(plan, iteration.earlier(plan, TABLE_ITERATIONS))

    @compat.loop_once(0, plan.items_per_iteration)
    def _(i):
        @pl.when(refs.ring[(first + i) * ITEM_WORDS] < end)
        def _():
            body(_take(plan, refs, first + i))


def to_compute(plan, refs, iteration):
    """The items that an iteration computes; their sequence is `end` where there is none."""
    first = _first_index(plan, iteration.earlier(plan, plan.ring_iterations - 1))
    return tuple(_take(plan, refs, first + i) for i in range(plan.items_per_iteration))


def _take(plan, refs, ring_index):
    words = [refs.ring[ring_index * ITEM_WORDS + word] for word in range(ITEM_WORDS)]
    num_of_seq = len(traversal.Sequence._fields)
    item = traversal.WorkItem(
        traversal.Sequence(*words[:num_of_seq]), *words[num_of_seq:], ring_index
    )
    if plan.max_q_len == 1:  # known, so that much of what follows is
        item = item._replace(seq=item.seq._replace(q_len=jnp.int32(1)))
    return item


def _first_index(plan, slot):
    """Place of the first item of an iteration."""
    return slot * plan.items_per_iteration


def first_iteration(plan, item, end):
    """Iteration 0; where there is no item at all, the iteration after the last."""
    return Iteration(jnp.where(item.seq.index < end, 0, plan.ring_iterations - 1), jnp.int32(0))


def next_iteration(plan, iteration):
    """The iteration after this one."""
    return Iteration(
        iteration.number + 1, traversal.next_slot(iteration.slot, plan.ring_iterations)
    )


def is_running(plan, refs, iteration, end):
    """Whether an iteration has anything to do: the ring fills, or there is something to compute."""
    fills = iteration.number < plan.ring_iterations - 1
    first = _first_index(plan, iteration.earlier(plan, plan.ring_iterations - 1))
    return fills | (refs.ring[first * ITEM_WORDS] < end)
