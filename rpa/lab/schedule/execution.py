"""Run a kernel's scalar instructions, to count which bundles a batch executes, and how often.

What a kernel executes depends on its loops, and those on lengths and page tables: integers that
the scalar core reads from its memory, SMEM. So the scalar instructions of the listing are
executed here, in Python, with the real metadata of a batch, and nothing else: vector instructions
never decide where the program goes. Every bundle passed is one cycle. Not in it is whatever the
schedule does not hold: waits for DMAs, instruction fetch.

Two things of the machine matter. A branch takes effect after `DELAY_SLOTS` more bundles, which are
executed either way. And a DMA into SMEM is done at its start, as if the wait for it had come.
"""

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from rpa import chips
from rpa.lab.schedule.coder import BRANCH, Coder
from rpa.lab.schedule.machine import Event, Machine
from rpa.lab.schedule.values import CannotRun

CHIPS = ("v5e", "v6e", "tpu7x")
"""Chips whose schedules are executed: those that the tests and all tables cover."""

DELAY_SLOTS = 4
"""Bundles behind a branch that are executed before it takes effect."""

LONGEST_RUN = 50_000_000
"""Basic blocks after which a run is given up: a kernel that never ends."""


def chip_to_execute(name) -> chips.Chip:
    """The chip of a name, if its schedules can be executed.

    Raises:
        ValueError: with the chips that can, and why not this one.

    >>> chip_to_execute("v5p")
    Traceback (most recent call last):
        ...
    ValueError: chip is v5p, but schedules can be executed for v5e, v6e, tpu7x only: what libtpu \
writes for another chip keeps scalars where the executed program does not look. lab compile takes \
v5p.
    """
    chip = chips.chip(name)
    if chip.name not in CHIPS:
        raise ValueError(
            f"chip is {chip.name}, but schedules can be executed for {', '.join(CHIPS)} only: what "
            "libtpu writes for another chip keeps scalars where the executed program does not "
            f"look. lab compile takes {chip.name}."
        )
    return chip


@dataclass(frozen=True)
class Execution:
    """What one run executed.

    Attributes:
        hits: how often each bundle was executed, int64[num_bundles].
        copies: {(kind, bundle, bytes): count} of the DMAs started; kind is "hbm_to_vmem", ...
        events: starts and waits of DMAs in order, if they were asked for.
        outputs: {operand: {word: value}} of what the scalar core wrote into operands.
    """

    hits: np.ndarray
    copies: Counter = field(default_factory=Counter)
    events: tuple[Event, ...] = ()
    outputs: dict[int, dict[int, int]] = field(default_factory=dict)

    @property
    def bundles(self) -> int:
        """All bundles executed: cycles without waits."""
        return int(self.hits.sum())

    @property
    def hbm_bytes(self) -> int:
        """HBM bytes of all DMAs; one inside HBM counts twice, as read and as written."""
        return sum(
            size * count * kind.split("_to_").count("hbm")
            for (kind, _, size), count in self.copies.items()
        )

    def bytes_moved(self, kind="") -> int:
        """Bytes of all DMAs, or of those of a kind."""
        return sum(
            size * count for (of, _, size), count in self.copies.items() if of.startswith(kind)
        )

    def __sub__(self, other):
        """What this run executed more than another one of the same kernel."""
        copies = Counter(self.copies)
        copies.subtract(other.copies)
        return Execution(self.hits - other.hits, Counter({k: n for k, n in copies.items() if n}))


class Program:
    """The scalar instructions of a listing, compiled to one Python function a basic block.

    Args:
        listing: a `rpa.lab.schedule.dumps.Listing`.

    Raises:
        CannotRun: if a branch is of a kind that is not known.
    """

    def __init__(self, listing):
        self.num_bundles = len(listing.slots)
        self.branches = branches(listing)
        self.leaders = _leaders(self.num_bundles, self.branches)
        texts = [[] for _ in self.leaders]
        for bundle, text in _with_late_spills_early(listing.scalar, self.branches):
            texts[bisect_right(self.leaders, bundle) - 1].append((bundle, text))
        coder = Coder(listing.scalar)
        self._blocks = [
            coder.function(block, self._successors(start)) for start, block in self._zip(texts)
        ]

    def _zip(self, texts):
        return zip(self.leaders, texts, strict=True)

    def _successors(self, start):
        """Index of the next block, and of the one that a branch goes to; one behind: the end."""
        after = bisect_right(self.leaders, start)
        end = self.leaders[after] if after < len(self.leaders) else self.num_bundles
        branch = self.branches.get(end - DELAY_SLOTS - 1)
        target = None if branch is None else self.leaders.index(branch.target)
        return after, target

    def run(self, operands, keep_events=False) -> Execution:
        """Execute the kernel with these integer operands.

        Args:
            operands: {index: int32 array} of the kernel's operands that hold integers.
            keep_events: note every start of a DMA and every wait, with its cycle.

        Raises:
            CannotRun: if a branch depends on what only the vector units know.
        """
        machine = Machine(operands, keep_events)
        ends = [*self.leaders[1:], self.num_bundles]
        lengths = [end - start for start, end in zip(self.leaders, ends, strict=True)]
        counts = [0] * len(self._blocks)
        blocks, current, steps = self._blocks, 0, 0
        while current < len(blocks):
            counts[current] += 1
            steps += 1
            if steps > LONGEST_RUN:
                raise CannotRun(f"the kernel did not end within {LONGEST_RUN} basic blocks.")
            machine.cycle += lengths[current]
            # A cycle in this block is the one at its end, less what is left of the block.
            machine.end = ends[current]
            current = blocks[current](machine)
        hits = np.repeat(np.array(counts, np.int64), lengths)
        return Execution(hits, machine.copies, tuple(machine.events or ()), machine.outputs())


@dataclass(frozen=True)
class Branch:
    """A branch: where it goes, and the predicate (with "!" in front, negated) or None."""

    target: int
    predicate: str | None


def branches(listing) -> dict[int, Branch]:
    """{bundle: Branch} of a listing.

    Raises:
        CannotRun: if there is a branch of another kind.
    """
    found = {}
    for bundle, text in listing.scalar:
        if re.match(r"(%\w+ = )?(sbr|s?call|halt)", text) is None:
            continue
        match = BRANCH.match(text)
        if match is None:
            raise CannotRun(f"bundle {bundle:#x}: branch of an unknown kind: {text[:100]}")
        found[bundle] = Branch(int(match[2]), match[1])
    return found


_SPILL = re.compile(r"%\w+ = sst \[smem:\[#allocation\d+_spill\]\] (%s\d+_s\d+)$")


def _with_late_spills_early(scalar, found):
    """The instructions in order, a spill that the listing has behind the delay slots within them.

    Where a value is computed in a branch's delay slots and spilled, the listing may have the store
    in the first bundle behind them, which is passed over where the branch is taken; but the value
    is read on both ways. Without this, v3's mixed kernel on TPU7x computes a block of queries of
    its second sequence, and no more.
    """
    written = {}
    for bundle, text in scalar:
        if (definition := re.match(r"(%s\d+_s\d+) = ", text)) is not None:
            written[definition[1]] = bundle
    moved = []
    for bundle, text in scalar:
        branch, spill = bundle - DELAY_SLOTS - 1, _SPILL.match(text)
        if spill and branch in found and branch < written.get(spill[1], branch) < bundle:
            bundle -= 1
        moved.append((bundle, text))
    return sorted(moved, key=lambda pair: pair[0])


def _leaders(num_bundles, found):
    """First bundles of the basic blocks, in order."""
    starts = {0} | {branch.target for branch in found.values()}
    starts |= {bundle + DELAY_SLOTS + 1 for bundle in found}
    for bundle in found:
        inside = [s for s in starts if bundle < s <= bundle + DELAY_SLOTS]
        if inside:
            raise CannotRun(f"bundle {inside[0]:#x} is entered between a branch and its effect.")
    return sorted(s for s in starts if s < num_bundles)
