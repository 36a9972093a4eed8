"""The software pipeline: work items between the page table and the products.

A copy from HBM takes a microsecond or two to arrive, however short it is. In that time a TPU7x
could read five megabytes; so that much has to be in flight at any moment, or HBM is idle. Therefore
every work item passes three stages, and an iteration of the kernel's loop serves each stage with
the items of another iteration:

    iteration i   looks up   iteration i: resolve its items, copy their page-table entries
                  fetches    iteration i - TABLE_ITERATIONS: copy their pages and queries
                  computes   iteration i - TABLE_ITERATIONS - iterations_ahead: wait, compute

In between, a work item is a few words of a ring in SMEM. Registers would not do: there are 32
scalar ones, and the items of two iterations of a decode fill them.

The ring begins empty, so the first iterations only look up and fetch, and no stage has code of its
own for the start. An empty entry of the ring holds no tokens, and every stage skips it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from rpa import compat
from rpa.kernel import traversal
from rpa.kernel.traversal import STORED_FIELDS, WorkItem
from rpa.kernel.tricks import TABLE_ITERATIONS


class Iteration(NamedTuple):
    """Which iteration of the kernel's loop it is; i32[] scalars."""

    number: Any
    index: Any  # number modulo the depth of the pipeline: where in the ring its items are


class Ring:
    """The work items in flight, `items_per_iteration` in a row for each of `depth` iterations."""

    def __init__(self, plan, ring_ref):
        self.ref, self.depth, self.num_items = ring_ref, plan.depth, plan.tricks.items_per_iteration
        # What another field implies is not stored; see `_get`.
        implied = {"q_len": plan.max_q_len == 1, "num_cached": plan.has_one_query_block}
        self.stored = [name for name in STORED_FIELDS if not implied.get(name)]
        self.words = len(self.stored)  # of a work item in the ring

    def clear(self):
        """Empty the ring: what no iteration has put there must not be read as a work item."""

        @compat.loop_once(0, self.depth * self.num_items)
        def _(ring_index):
            for word in range(self.words):
                self.ref[ring_index * self.words + word] = jnp.int32(0)

    def first_iteration(self, has_work):
        """Iteration 0; where there is no work at all, the iteration after the last."""
        return Iteration(jnp.where(has_work, 0, self.depth - 1), jnp.int32(0))

    def next_iteration(self, iteration):
        """The iteration after this one."""
        return Iteration(iteration.number + 1, traversal.next_slot(iteration.index, self.depth))

    def is_running(self, iteration):
        """Whether the pipeline fills, or an iteration has anything to compute."""
        fills = iteration.number < self.depth - 1
        first = self._first(iteration, self.depth - 1)
        return fills | (self.ref[first * self.words] > 0)

    def put(self, iteration, items):
        """Store the work items of an iteration, and return them with their ring indices."""
        first = self._first(iteration, 0)
        items = [item._replace(ring_index=first + i) for i, item in enumerate(items)]
        for item in items:
            for word, name in enumerate(self.stored):
                self.ref[item.ring_index * self.words + word] = getattr(item, name)
        return items

    def for_each_to_fetch(self, iteration, body):
        """Call body(item) for the work items whose copies an iteration starts.

        In a loop, because starting all copies of an item is a tenth of the code of the kernel; and
        each is read where it is used, because scalar registers are few.
        """
        first = self._first(iteration, TABLE_ITERATIONS)

        @compat.loop_once(0, self.num_items)
        def _(i):
            @pl.when(self.ref[(first + i) * self.words] > 0)
            def _():
                body(self._get(first + i))

    def to_compute(self, iteration):
        """The work items that an iteration computes; not all of them need exist."""
        first = self._first(iteration, self.depth - 1)
        return tuple(self._get(first + i) for i in range(self.num_items))

    def _first(self, iteration, ago):
        """Ring index of the first work item of an iteration some iterations ago."""
        index = iteration.index - ago
        return jnp.where(index < 0, index + self.depth, index) * self.num_items

    def _get(self, ring_index):
        first = ring_index * self.words
        item = {name: self.ref[first + word] for word, name in enumerate(self.stored)}
        implied = {"q_len": 1, "num_cached": item["position"], "exists": item["num_tokens"] > 0}
        return WorkItem(**(implied | item), ring_index=ring_index)
