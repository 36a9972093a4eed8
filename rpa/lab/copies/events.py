"""What a timeline is made of: buffers, slices of them, events, copies, computations.

Two things write timelines: `rpa.lab.copies.timeline` records the TPU interpreter,
`rpa.lab.copies.dryrun` runs a kernel's control flow without its arithmetic.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

HBM, VMEM, SMEM = "HBM", "VMEM", "SMEM"


@dataclass(frozen=True)
class Buffer:
    """An array that a kernel's reference stands for.

    Attributes:
        name: of the kernel's argument, without a trailing `_ref`; memory space and number for
            what `pl.run_scoped` allocated.
        space: "HBM", "VMEM" or "SMEM".
        shape: of all of it, with all slots.
        dtype: NumPy's name of its type.
        origin: in a dry run, which argument of the function this memory comes from, or "".
    """

    name: str
    space: str
    shape: tuple[int, ...]
    dtype: str
    origin: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Slice:
    """A part of a buffer; `index` has an int or a range for every dimension.

    >>> buffer = Buffer("kv", "VMEM", (2, 16, 128), "float32")
    >>> part = Slice(buffer, (1, range(4, 8), range(128)))
    >>> part.label, part.num_bytes, part.row
    ('kv[1, 4:8]', 2048, 'kv[1]')
    """

    buffer: Buffer
    index: tuple

    @property
    def num_bytes(self) -> int:
        """Bytes of the part."""
        counts = [len(i) for i in self.index if isinstance(i, range)]
        return prod(counts) * np.dtype(self.buffer.dtype).itemsize

    @property
    def label(self) -> str:
        """As one would write it, without the dimensions at the end that are taken whole."""
        index = list(self.index)
        while index and index[-1] == range(self.buffer.shape[len(index) - 1]):
            index.pop()
        return self.buffer.name + (f"[{', '.join(map(_index_label, index))}]" if index else "")

    @property
    def row(self) -> str:
        """Where it stands in a picture: the buffer, and its slot if the first index is one."""
        first = self.index[0] if len(self.index) > 1 else None
        if isinstance(first, range) and len(first) == 1 < self.buffer.shape[0]:
            first = first[0]
        return f"{self.buffer.name}[{first}]" if isinstance(first, int) else self.buffer.name

    def overlaps(self, other: "Slice") -> bool:
        """Whether both have an element in common."""
        if self.buffer != other.buffer:
            return False
        return all(
            _as_range(a).start < _as_range(b).stop and _as_range(b).start < _as_range(a).stop
            for a, b in zip(self.index, other.index, strict=True)
        )


def _as_range(index):
    return index if isinstance(index, range) else range(index, index + 1)


def _index_label(index):
    return f"{index.start}:{index.stop}" if isinstance(index, range) else str(index)


@dataclass(frozen=True)
class Event:
    """One thing that a kernel did.

    Attributes:
        order: its place in the timeline.
        kind: "start", "wait" (of a DMA), "load", "store" (a kernel's own, in VMEM or SMEM),
            "fetch", "flush" (a block that the automatic pipeline copies in or out), "prefetch" (a
            scalar argument that lies in SMEM before the kernel starts; in a dry run only),
            "signal", "semaphore_wait" or "step" (a step of the grid ends).
        kernel, step: which `pallas_call` of the record, and which step of its grid, from 0.
        source, target: what is copied, and where to; a load has a source, a store a target.
        num_bytes: of a copy, of what is waited for, of what is loaded or stored.
        semaphore: its name, with the index if there are several.
        copies: numbers of the copies that a wait has waited for.
        missing_bytes: what a wait wants beyond all that was started: it never ends.
        where: the kernel's line, where JAX knows it.
    """

    order: int
    kind: str
    kernel: int
    step: int
    source: Slice | None = None
    target: Slice | None = None
    num_bytes: int = 0
    semaphore: str = ""
    copies: tuple[int, ...] = ()
    missing_bytes: int = 0
    where: str = ""

    def __str__(self):
        parts = [self.source and self.source.label, self.target and self.target.label]
        what = " -> ".join(part for part in parts if part)
        if self.kind == "wait":
            what = "for copies " + ", ".join(map(str, self.copies))
            what += f"; {self.missing_bytes} bytes never come" if self.missing_bytes else ""
        return f"{self.order:5} {self.kind:6} {what:60} {self.num_bytes:8} {self.semaphore}"


@dataclass(frozen=True)
class Copy:
    """One DMA; `start` and `wait` are the `order` of its events, wait None if there was none."""

    number: int
    source: Slice
    target: Slice
    num_bytes: int
    semaphore: str
    start: int
    wait: int | None
    kernel: int
    step: int
    where: str

    @property
    def row(self) -> str:
        """Where it stands in a picture: the end of it that is not in HBM."""
        if self.target.buffer.space != HBM:
            return self.target.row
        if self.source.buffer.space != HBM:
            return self.source.row
        return f"{self.source.buffer.name} to {self.target.buffer.name}"


@dataclass(frozen=True)
class Compute:
    """What a kernel computed between two DMA events: the loads and stores of its copied buffers.

    Attributes:
        first, last: `order` of its first and last load or store.
        rows: the buffers (and slots) that it touched, see `Slice.row`.
        loaded_bytes: loaded from buffers that DMAs fill.
        kernel, step: as in Event.
    """

    first: int
    last: int
    rows: tuple[str, ...]
    loaded_bytes: int
    kernel: int
    step: int


@dataclass
class Timeline:
    """What kernels did, in order; filled while `record_dmas` is open."""

    events: list[Event] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    @property
    def never_awaited(self) -> list[Copy]:
        """Copies that nobody waited for."""
        return [copy for copy in self.copies if copy.wait is None]

    @property
    def unfinished_wait(self) -> Event | None:
        """The first wait for more bytes than were ever started on its semaphore, or None."""
        return next((event for event in self.events if event.missing_bytes), None)

    @property
    def block_copies(self) -> list[Event]:
        """The automatic pipeline's copies between HBM and the blocks of a BlockSpec."""
        return [event for event in self.events if event.kind in ("fetch", "flush")]

    @property
    def touched_in_flight(self) -> list[tuple[Event, Copy]]:
        """Loads and stores of memory that a copy is still moving: each is a race.

        A load of what a copy writes, or a store to what a copy reads or writes.
        """
        found, flying = [], {}
        starts = {copy.start: copy for copy in self.copies}
        for event in self.events:
            if event.kind == "start":
                flying[starts[event.order].number] = starts[event.order]
            for number in event.copies:
                flying.pop(number, None)
            for copy in flying.values():
                read = event.kind == "load" and event.source.overlaps(copy.target)
                ends = (copy.source, copy.target)
                written = event.kind == "store" and any(map(event.target.overlaps, ends))
                if read or written:
                    found.append((event, copy))
        return found

    @property
    def computes(self) -> list[Compute]:
        """Runs of loads and stores in buffers that copies fill or empty, between DMA events."""
        copied = {end.buffer for copy in self.copies for end in (copy.source, copy.target)}
        filled = {copy.target.buffer for copy in self.copies}
        runs, run = [], []
        for event in self.events:
            if event.kind in ("load", "store"):
                if (event.source or event.target).buffer in copied:
                    run.append(event)
            elif run:
                runs.append(_compute(run, filled))
                run = []
        return [*runs, _compute(run, filled)] if run else runs

    def table(self, kinds=("start", "wait", "fetch", "flush", "compute")) -> str:
        """The events of some kinds as text; "compute" sums up loads and stores in one line."""
        lines = {event.order: str(event) for event in self.events if event.kind in kinds}
        if "compute" in kinds:
            lines |= {c.first: f"{c.first:5} compute on {', '.join(c.rows)}" for c in self.computes}
        return "\n".join(lines[order] for order in sorted(lines))


def _compute(run, filled):
    rows = dict.fromkeys((event.source or event.target).row for event in run)
    loaded = [e.num_bytes for e in run if e.kind == "load" and e.source.buffer in filled]
    first, last = run[0], run[-1]
    return Compute(first.order, last.order, tuple(rows), sum(loaded), first.kernel, first.step)


class Writer:
    """Writes a Timeline, and knows which wait ends which copy."""

    def __init__(self):
        self.timeline = Timeline()
        self._kernel, self._step = -1, 0
        self._pending = defaultdict(deque)

    def begin_kernel(self):
        """A `pallas_call` begins."""
        self._kernel, self._step = self._kernel + 1, 0
        self._pending = defaultdict(deque)  # semaphore: [copy number, bytes not awaited yet]

    def note(self, kind, **fields):
        """Write an event and return it."""
        order = len(self.timeline.events)
        event = Event(order, kind, self._kernel, self._step, **fields)
        self.timeline.events.append(event)
        return event

    def start(self, source, target, semaphore, where):
        """A copy is started."""
        ends = {"source": source, "target": target, "semaphore": semaphore, "where": where}
        num_bytes = source.num_bytes
        event = self.note("start", num_bytes=num_bytes, **ends)
        number = len(self.timeline.copies)
        here = {"kernel": self._kernel, "step": self._step}
        copy = Copy(number, num_bytes=num_bytes, start=event.order, wait=None, **here, **ends)
        self.timeline.copies.append(copy)
        self._pending[semaphore].append([number, num_bytes])

    def wait(self, semaphore, num_bytes, where):
        """Copies are waited for: a semaphore counts bytes, first started is first arrived."""
        waiting, finished, missing = self._pending[semaphore], [], num_bytes
        while missing and waiting:
            number, rest = waiting[0]
            taken = min(missing, rest)
            missing, waiting[0][1] = missing - taken, rest - taken
            if taken == rest:
                waiting.popleft()
                finished.append(number)
        event = self.note(
            "wait",
            num_bytes=num_bytes,
            semaphore=semaphore,
            copies=tuple(finished),
            missing_bytes=missing,
            where=where,
        )
        for number in finished:
            self.timeline.copies[number] = replace(self.timeline.copies[number], wait=event.order)

    def block(self, kind, source, target):
        """The automatic pipeline copies a block: "fetch" or "flush"."""
        in_hbm = target if kind == "flush" else source
        self.note(kind, source=source, target=target, num_bytes=in_hbm.num_bytes)

    def end_step(self):
        """A step of the grid ends."""
        self.note("step")
        self._step += 1


def short_name(name, names=()):
    """What a reference is called in a timeline.

    >>> short_name("kv_ref"), short_name("args[0]", {"args[0]": "kv"})
    ('kv', 'kv')
    """
    return dict(names).get(name, name.removesuffix("_ref"))


def semaphore_name(name, index):
    """The name of one of an array of semaphores.

    >>> semaphore_name("sems", (1,)), semaphore_name("sem", ())
    ('sems[1]', 'sem')
    """
    return name + (f"[{', '.join(map(str, index))}]" if index else "")


def input_names(arguments):
    """Names of a kernel's inputs; one that is called `_` and is an output too takes its name."""
    outputs = {a.alias: a.name for a in arguments if a.role == "output" and a.alias is not None}
    inputs = [a.name for a in arguments if a.role == "input"]
    return [outputs.get(i, name) if name.startswith("_") else name for i, name in enumerate(inputs)]
