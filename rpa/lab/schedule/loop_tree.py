"""Loops and predicated regions of a kernel, found by its branches, and what bounds them.

A loop is a branch backwards: from its target to the delay slots of the branch. A predicated region
is a branch forwards: what lies between it and its target is skipped if the condition says so.
"""

from dataclasses import dataclass, field

import numpy as np

from rpa.lab.schedule.execution import DELAY_SLOTS, branches

UNITS = {
    "VLOAD": "load",
    "VLOAD:FILL": "fill",
    "VSTORE": "store",
    "VSTORE:SPILL": "spill",
}
"""Our names of the compiler's units where they differ. A fill is a load, a spill is a store."""

BOUND_SHARE = 0.8
"""A unit bounds a loop that uses this share of its slots; below, latency does."""


@dataclass(frozen=True)
class Span:
    """A loop or a predicated region: bundles [start, end), and what lies inside.

    Attributes:
        kind: "loop", "region", or "kernel" for all of it.
        start, end: its bundles; of a loop with the delay slots of its branch.
        children: loops and regions directly inside, in order.
    """

    kind: str
    start: int
    end: int
    children: tuple["Span", ...] = field(default=())

    def walk(self, depth=0):
        """(depth, span) of this span and all below, in order."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)

    @property
    def num_bundles(self) -> int:
        """Bundles in its text, all children included, each once."""
        return self.end - self.start

    @property
    def is_innermost_loop(self) -> bool:
        """A loop without a loop inside."""
        inside = [span.kind for child in self.children for _, span in child.walk()]
        return self.kind == "loop" and "loop" not in inside


def tree(listing) -> Span:
    """Loops and regions of a listing, nested, under one span that is the whole kernel."""
    spans = set()
    for bundle, branch in branches(listing).items():
        after = bundle + DELAY_SLOTS + 1
        if branch.target <= bundle:
            spans.add((branch.target, -after, "loop"))
        elif branch.target > after:
            spans.add((after, -branch.target, "region"))
    # A loop that may turn zero times is a region around itself.
    spans -= {(start, end, "region") for start, end, kind in spans if kind == "loop"}
    ordered = [(start, -end, kind) for start, end, kind in sorted(spans)]
    return _nest("kernel", 0, len(listing.slots), ordered)


def _nest(kind, start, end, spans):
    children, position = [], start
    for i, (first, last, inner) in enumerate(spans):
        # A span that straddles the end of one before it cannot be drawn in a tree; none is known.
        if first >= position and last <= end:
            inside = [s for s in spans[i + 1 :] if first <= s[0] and s[1] <= last]
            children.append(_nest(inner, first, last, inside))
            position = last
    return Span(kind, start, end, tuple(children))


def used(listing, weights) -> dict[str, int]:
    """Slots used by unit, each bundle counted as often as `weights` says.

    Args:
        listing: a `rpa.lab.schedule.dumps.Listing`.
        weights: int64[num_bundles], for instance the hits of an execution.
    """
    totals = np.asarray(weights) @ listing.slot_matrix
    return {unit_name(unit): int(n) for unit, n in zip(listing.units, totals, strict=True)}


def capacity(listing) -> dict[str, int]:
    """Slots by unit in one bundle."""
    return {unit_name(u): n for u, n in zip(listing.units, listing.capacity, strict=True)}


def unit_name(unit) -> str:
    """Our name of one of the compiler's units.

    >>> unit_name("VSTORE:SPILL"), unit_name("MATMUL")
    ('spill', 'MATMUL')
    """
    return UNITS.get(unit, unit)


def shares(slots, capacities, bundles) -> dict[str, float]:
    """Share of its slots that each unit uses in so many bundles.

    >>> shares({"XLU": 10}, {"XLU": 2}, 10)
    {'XLU': 0.5}
    """
    return {unit: n / (capacities[unit] * bundles) if bundles else 0.0 for unit, n in slots.items()}


def bound(share) -> str:
    """The unit that bounds a loop, or "latency".

    >>> bound({"XLU": 0.5, "VALU": 0.9, "spill": 0.95, "store": 0.85})
    'VALU'
    >>> bound({"XLU": 0.5, "VALU": 0.4})
    'latency'
    """
    units = {unit: part for unit, part in share.items() if unit not in ("fill", "spill")}
    unit = max(units, key=units.get)
    return unit if units[unit] >= BOUND_SHARE else "latency"
