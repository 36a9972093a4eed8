"""Schedules as the compiler wrote them once, for machines whose compiler does not write any.

Chapter 9 reads some forty schedules, which takes an hour to compile. `tools/record_schedules.py`
did it, and what the chapter needs of them is in `rpa/data/schedules.json`: bundles, slots, and the
occupancy of the units. On a machine with libtpu the chapter compiles one of them anew and compares.
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rpa.lab.schedule import inner_loop
from rpa.lab.schedule.loop_tree import bound, shares
from rpa.lab.schedule.schedule import Schedule, schedule_for

FILE = Path(__file__).parents[2] / "data" / "schedules.json"

COLUMNS = 160
"""Of an occupancy: each is the mean of some bundles."""


@dataclass(frozen=True)
class Occupancy:
    """What the units do in some bundles.

    Attributes:
        bundles: how many.
        slots: used, by unit.
        capacity: of each unit in one bundle.
        busy: by unit, the share of its slots used in each of COLUMNS stretches; empty if not kept.
    """

    bundles: int
    slots: dict[str, int]
    capacity: dict[str, int]
    busy: dict[str, list[float]]

    @property
    def share(self) -> dict[str, float]:
        """Of its slots, by unit."""
        return shares(self.slots, self.capacity, self.bundles)

    @property
    def bound(self) -> str:
        """The unit that is full, or "latency"."""
        return bound(self.share)


def occupancy_of(schedule: Schedule, span=None, *, with_busy=True) -> Occupancy:
    """The occupancy of a loop or region of a schedule, or of all of it."""
    span = schedule.loops if span is None else span
    slots = schedule.slots(schedule.once(span))
    busy = {}
    if with_busy:
        listing = schedule.listing
        used = listing.slot_matrix[span.start : span.end] / np.array(listing.capacity)
        edges = np.linspace(0, len(used), COLUMNS + 1).astype(int)
        means = np.add.reduceat(used, edges[:-1], axis=0) / np.diff(edges)[:, None]
        busy = {
            unit: [round(float(x), 2) for x in column]
            for unit, column in zip(schedule.capacity, means.T, strict=True)
        }
    return Occupancy(span.num_bundles, slots, schedule.capacity, busy)


def compile_step(chip, step, *, with_busy=True) -> Occupancy:
    """Compile a step of `rpa.lab.schedule.inner_loop` for a chip and read its schedule.

    Raises:
        rpa.lab.schedule.NoSchedule: where the compiler does not show one, in words.
    """
    shapes = inner_loop.shapes(step)
    schedule = schedule_for(chip, inner_loop.attend, *shapes, kwargs={"step": step})
    return occupancy_of(schedule, with_busy=with_busy)


def recorded_step(chip, step) -> Occupancy:
    """`compile_step` as it was recorded.

    >>> recorded_step("v5e", "two sequences together").bound
    'MATPUSH'
    """
    return Occupancy(**recorded("inner_loop")[chip][step])


def recorded(section):
    """A section of the record: numbers by name.

    >>> recorded("versions")["libtpu"]
    '0.0.52'
    """
    return _read()[section]


@functools.cache
def _read():
    return json.loads(FILE.read_text(encoding="utf-8"))


def write(section, value):
    """Replace a section of the record; an `Occupancy` becomes a dictionary."""
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    kept[section] = value
    text = json.dumps(kept, indent=1, sort_keys=True, default=asdict)
    FILE.write_text(_on_one_line(text) + "\n", encoding="utf-8")
    _read.cache_clear()


def _on_one_line(text):
    """JSON in which a list of numbers takes one line."""
    lines, joined = [], None
    for line in text.splitlines():
        if joined is None and line.endswith("["):
            joined = line
        elif joined is not None:
            joined += line.strip() + (" " if line.endswith(",") else "")
            if line.strip() in ("]", "],"):
                lines.append(joined)
                joined = None
        else:
            lines.append(line)
    return "\n".join(lines)
