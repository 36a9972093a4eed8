"""The belt: steps on their way from the page table to the products.

A copy from HBM takes a microsecond or two to arrive, however short it is. In that time a TPU7x
could have read five megabytes; so that much has to be on its way at any moment, or HBM is idle.
Therefore every step passes three stations, and at each of them a turn of the loop serves the steps
of another turn:

    turn i   looks up  turn i: which steps? ask for their page-table entries
             fetches   turn i - TABLE_TURNS: start the copies of their pages and queries
             computes  turn i - TABLE_TURNS - turns_ahead: wait for these, compute

In between, a step is a few words in SMEM. Registers would not do: there are 32 scalar ones, and the
steps of two turns of a decode fill them. Its page-table entries stay as long as it does.

The belt begins empty, so the first turns only look up and fetch, and no station has code of its own
for the start. An empty place holds the sequence `end`, for which nobody does anything.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from rpa import compat
from rpa.kernel import traversal
from rpa.kernel.plan import TABLE_TURNS
from rpa.kernel.traversal import STEP_WORDS


class Turn(NamedTuple):
    """Which round of the kernel's loop it is; i32[] scalars."""

    number: Any
    slot: Any  # number mod belt_turns: where on the belt its steps are put

    def earlier(self, plan, turns):
        """The slot of an earlier turn, at most belt_turns - 1 before."""
        slot = self.slot - turns
        return jnp.where(slot < 0, slot + plan.belt_turns, slot)


def clear(plan, refs, end):
    """Empty the belt: no place may say something that nobody put there."""

    @compat.loop_once(0, plan.belt_places)
    def _(place):
        for word in range(STEP_WORDS):
            refs.belt[place * STEP_WORDS + word] = jnp.int32(0) if word else end


def put(plan, refs, turn, steps):
    """Put the steps of a turn on the belt, and return them: now they have a place."""
    first = _first_place(plan, turn.slot)
    steps = tuple(step._replace(place=first + i) for i, step in enumerate(steps))
    for step in steps:
        for word, value in enumerate([*step.seq, *step[1:-1]]):
            refs.belt[step.place * STEP_WORDS + word] = value
    return steps


def to_fetch(plan, refs, turn, end, body):
    """Call body(step) for the steps whose copies a turn starts, one after the other.

    A step is read only when it is its turn, because scalar registers are few; and in a loop,
    because starting all copies of a step is a tenth of the code of the kernel.
    """
    first = _first_place(plan, turn.earlier(plan, TABLE_TURNS))

    @compat.loop_once(0, plan.steps_per_turn)
    def _(i):
        @pl.when(refs.belt[(first + i) * STEP_WORDS] < end)
        def _():
            body(_take(plan, refs, first + i))


def to_compute(plan, refs, turn):
    """The steps that a turn computes; their sequence is `end` where there is none."""
    first = _first_place(plan, turn.earlier(plan, plan.belt_turns - 1))
    return tuple(_take(plan, refs, first + i) for i in range(plan.steps_per_turn))


def _take(plan, refs, place):
    words = [refs.belt[place * STEP_WORDS + word] for word in range(STEP_WORDS)]
    num_of_seq = len(traversal.Sequence._fields)
    step = traversal.Step(traversal.Sequence(*words[:num_of_seq]), *words[num_of_seq:], place)
    if plan.max_q_len == 1:  # known, so that much of what follows is
        step = step._replace(seq=step.seq._replace(q_len=jnp.int32(1)))
    return step


def _first_place(plan, slot):
    """Place of the first step of a turn."""
    return slot * plan.steps_per_turn


def first_turn(plan, step, end):
    """Turn 0; where there is no step at all, the turn after the last."""
    return Turn(jnp.where(step.seq.index < end, 0, plan.belt_turns - 1), jnp.int32(0))


def next_turn(plan, turn):
    """The turn after this one."""
    return Turn(turn.number + 1, traversal.next_slot(turn.slot, plan.belt_turns))


def is_on(plan, refs, turn, end):
    """Whether a turn has anything to do: the belt fills, or there is something to compute."""
    fills = turn.number < plan.belt_turns - 1
    first = _first_place(plan, turn.earlier(plan, plan.belt_turns - 1))
    return fills | (refs.belt[first * STEP_WORDS] < end)
