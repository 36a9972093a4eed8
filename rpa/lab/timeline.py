"""The DMA and compute timeline of any Pallas kernel that runs in the TPU interpreter, unchanged.

    from rpa.lab.timeline import record_dmas

    with record_dmas() as timeline:
        my_kernel(...)                    # interpreted: interpret=compat.interpreter_params()

    print(timeline.table())               # every start, wait, compute and block copy, in order
    timeline.copies[0].num_bytes          # also .source, .target, .semaphore, .start, .wait
    timeline.never_awaited                # copies that nobody waited for
    timeline.unfinished_wait              # the wait in which a kernel hangs, or None
    rpa.figures.timeline.gantt(timeline)  # the picture; see there for before and after
    predict_cycles(timeline, "v5e").total_cycles

`record_dmas` sees what the interpreter does, in the kernel's own order, also if the interpreter
executes a copy only when it is waited for. So it works for a learner's kernel as for rungs 5 to 7,
and a kernel that hangs or fails leaves the record of what it did until then.

Compute has no time in an interpreter. `predict_cycles` lays the record on a clock: copies take what
the chip's HBM takes, computing takes a multiple of it that the caller chooses. It is a prediction.
"""

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from rpa import chips, compat

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
    """

    name: str
    space: str
    shape: tuple[int, ...]
    dtype: str

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
            "fetch", "flush" (a block that the automatic pipeline copies in or out), "signal",
            "semaphore_wait" or "step" (a step of the grid ends).
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


@contextlib.contextmanager
def record_dmas(names: dict[str, str] | None = None):
    """Record what kernels do in the TPU interpreter while the context is open.

    The first use in a process drops JAX's compiled functions, see `compat.observe_interpreter`.

    Args:
        names: other names for arguments of the kernel, {"args[0]": "kv"}.

    Yields:
        A `Timeline`, empty for a kernel that was compiled, or interpreted with `interpret=True`.

    Raises:
        RuntimeError: if this JAX's interpreter cannot be observed.

    >>> import jax, jax.numpy as jnp
    >>> from jax.experimental import pallas as pl
    >>> from jax.experimental.pallas import tpu as pltpu
    >>> def kernel(x_ref, out_ref, buffer_ref, sem):
    ...     copy = pltpu.make_async_copy(x_ref.at[pl.ds(8, 8)], buffer_ref, sem)
    ...     copy.start()
    ...     copy.wait()
    ...     out_ref[...] = buffer_ref[...] + 1
    >>> call = pl.pallas_call(
    ...     kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    ...     in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
    ...     scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    ...     interpret=compat.interpreter_params())
    >>> with record_dmas() as timeline:
    ...     _ = call(jnp.ones((16, 128)))
    >>> [(event.kind, event.num_bytes) for event in timeline.events]  # doctest: +ELLIPSIS
    [('start', 4096), ('wait', 4096), ('load', 4096), ('store', 4096), ('flush', 4096), ('step', 0)]
    >>> timeline.copies[0].source.label, timeline.copies[0].target.row
    ('x[8:16]', 'buffer')
    """
    recorder = Recorder(names)
    with compat.observe_interpreter(recorder):
        yield recorder.timeline


class Recorder:
    """Makes a Timeline of `compat.InterpreterCall`s."""

    def __init__(self, names=None):
        self.timeline = Timeline()
        self._names = names or {}
        self._kernel = -1
        self._begin([])

    def __call__(self, call):
        getattr(self, f"_on_{call.name}")(**call.arguments, result=call.result, where=call.where)

    def _begin(self, arguments):
        self._kernel, self._step = self._kernel + 1, 0
        self._buffers, self._semaphores = {}, {}  # by the interpreter's ids
        self._block = None  # the half of a block copy that has been seen
        self._expected = deque(_allocation_order(arguments))
        self.pending = defaultdict(deque)  # semaphore: [copy number, bytes not awaited yet]

    def _on_kernel(self, arguments, **_):
        self._begin(arguments)

    def _name(self, space, shape=None):
        """The name of what is allocated now: arguments come first, in a known order."""
        if self._expected:
            return self._expected.popleft()
        number = len(self._buffers) + len(self._semaphores)
        return (f"{space} scratch {number}", shape)

    def _on_allocate(self, memory_space, val, result, **_):
        val = np.asarray(val)
        name, shape = self._name(memory_space.upper(), val.shape)
        # A block is smaller than its array, an array may be padded to whole blocks.
        shape = tuple(min(a, b) for a, b in zip(shape, val.shape, strict=True))
        space = memory_space.upper()
        self._buffers[int(result)] = Buffer(self._short(name), space, shape, val.dtype.name)

    def _on_allocate_semaphores(self, result, **_):
        name, _ = self._name("semaphore")
        for index in np.ndindex(result.shape):
            label = self._short(name) + (f"[{', '.join(map(str, index))}]" if index else "")
            self._semaphores[int(result[index])] = label

    def _short(self, name):
        return self._names.get(name, name.removesuffix("_ref"))

    def _slice(self, buffer_id, transforms):
        buffer = self._buffers[buffer_id]
        index = list(transforms) + [slice(None)] * (len(buffer.shape) - len(transforms))
        return Slice(
            buffer,
            tuple(
                range(*i.indices(size)) if isinstance(i, slice) else int(i)
                for i, size in zip(index, buffer.shape, strict=True)
            ),
        )

    def _note(self, kind, **fields):
        order = len(self.timeline.events)
        event = Event(order, kind, self._kernel, self._step, **fields)
        self.timeline.events.append(event)
        return event

    def _on_dma_start(self, src_id, src_transforms, dst_id, dst_transforms, dst_sem_id, where, **_):
        source, target = self._slice(src_id, src_transforms), self._slice(dst_id, dst_transforms)
        semaphore = self._semaphores.get(dst_sem_id, "semaphore")
        ends = {"source": source, "target": target, "semaphore": semaphore, "where": where}
        event = self._note("start", num_bytes=source.num_bytes, **ends)
        number = len(self.timeline.copies)
        self.timeline.copies.append(
            Copy(
                number=number,
                num_bytes=source.num_bytes,
                start=event.order,
                wait=None,
                kernel=self._kernel,
                step=self._step,
                **ends,
            )
        )
        self.pending[semaphore].append([number, source.num_bytes])

    def _on_dma_wait(self, sem_id, size, where, **_):
        semaphore, size = self._semaphores.get(sem_id, "semaphore"), int(size)
        finished, missing = self._match(semaphore, size)
        event = self._note(
            "wait",
            num_bytes=size,
            semaphore=semaphore,
            copies=tuple(finished),
            missing_bytes=missing,
            where=where,
        )
        for number in finished:
            self.timeline.copies[number] = replace(self.timeline.copies[number], wait=event.order)

    def _match(self, semaphore, size):
        """The copies that a wait ends: a semaphore counts bytes, first started first arrived."""
        waiting, finished = self.pending[semaphore], []
        while size and waiting:
            number, rest = waiting[0]
            taken = min(size, rest)
            size, waiting[0][1] = size - taken, rest - taken
            if taken == rest:
                waiting.popleft()
                finished.append(number)
        return finished, size

    def _on_get(self, memory_space, buffer_id, transforms, where, input_name=None, **_):
        part = self._slice(buffer_id, transforms)
        if input_name is None and where:
            self._note("load", source=part, num_bytes=part.num_bytes, where=where)
        elif input_name is not None or memory_space != "hbm":
            self._block = part  # the next store completes the pipeline's copy
        # What is left is the array's result, read by the host.

    def _on_store(self, memory_space, buffer_id, transforms, **_):
        part, other = self._slice(buffer_id, transforms), self._block
        kind = "flush" if memory_space == "hbm" else "fetch"
        in_hbm = part if kind == "flush" else other
        self._note(kind, source=other, target=part, num_bytes=in_hbm.num_bytes)

    def _on_swap(self, buffer_id, transforms, where, **_):
        part = self._slice(buffer_id, transforms)
        self._note("store", target=part, num_bytes=part.num_bytes, where=where)

    def _on_semaphore_signal(self, sem_id, where, **_):
        self._note("signal", semaphore=self._semaphores.get(sem_id, "barrier"), where=where)

    def _on_semaphore_wait(self, sem_id, where, **_):
        self._note("semaphore_wait", semaphore=self._semaphores.get(sem_id, "barrier"), where=where)

    def _on_step(self, **_):
        self._note("step")
        self._step += 1


def _allocation_order(arguments):
    """(name, shape) in the order in which the interpreter allocates a kernel's arguments.

    Arrays of inputs, arrays of outputs that are no input's, then all arguments that are not in
    HBM, among them a block for each blocked input and output.
    """
    inputs = [a for a in arguments if a.role == "input"]
    outputs = [a for a in arguments if a.role == "output"]
    # A kernel that calls an aliased input `_` calls the same memory by its name as an output.
    shown = {a.alias: a.name for a in outputs if a.alias is not None}
    for i, a in enumerate(inputs):
        yield (shown.get(i, a.name) if a.name.startswith("_") else a.name), a.shape
    yield from ((a.name, a.shape) for a in outputs if a.alias is None)
    blocks = [a for a in arguments if a.space != "hbm"]
    yield from ((a.name, a.block_shape) for a in blocks)


# --- On a clock --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flight:
    """A copy on the clock: started, moved by the HBM from `begin_cycles` to `arrival_cycles`."""

    copy: Copy
    start_cycles: float
    begin_cycles: float
    arrival_cycles: float


@dataclass(frozen=True)
class Span:
    """A stretch of the core's time: "compute" (of a Compute) or "stall" (a wait's Event)."""

    kind: str
    begin_cycles: float
    end_cycles: float
    what: Compute | Event


@dataclass(frozen=True)
class Prediction:
    """A timeline on the clock of a chip: predicted, never measured."""

    chip: str
    compute_ratio: float
    flights: list[Flight]
    spans: list[Span]
    total_cycles: float

    @property
    def stall_cycles(self) -> float:
        """Time in which the core waits for copies."""
        return sum(s.end_cycles - s.begin_cycles for s in self.spans if s.kind == "stall")


def predict_cycles(
    timeline: Timeline,
    chip: str = "v5e",
    *,
    compute_ratio: float = 1.0,
    latency_cycles: float = 0.0,
    compute_cycles: Callable[[Compute], float] | None = None,
) -> Prediction:
    """Lay a timeline on a clock: when do copies arrive, when does the core compute, when wait?

    One HBM serves the copies in the order of their starts, each at the chip's full bandwidth (a
    copy from HBM to HBM passes it twice); starting a copy and waiting for one that has arrived
    cost nothing. The automatic pipeline's block copies are left out.

    Args:
        timeline: a record.
        chip: name of a chip in `rpa.chips`.
        compute_ratio: what computing on fetched bytes takes, as a multiple of their transfer.
        latency_cycles: from a start to the first byte.
        compute_cycles: cycles of a Compute, instead of compute_ratio.

    Returns:
        Times in cycles of the core from the first event.
    """
    bytes_per_cycle = chips.chip(chip).hbm_bytes_per_s / chips.chip(chip).clock_hz
    if compute_cycles is None:

        def compute_cycles(compute):
            return compute_ratio * compute.loaded_bytes / bytes_per_cycle

    starts = {copy.start: copy for copy in timeline.copies}
    computes = {compute.first: compute for compute in timeline.computes}
    now, hbm_free, arrivals, flights, spans = 0.0, 0.0, {}, [], []
    for event in timeline.events:
        if event.order in starts:
            copy = starts[event.order]
            begin = max(now + latency_cycles, hbm_free)
            passes = [copy.source.buffer.space, copy.target.buffer.space].count(HBM)
            hbm_free = begin + passes * copy.num_bytes / bytes_per_cycle
            arrivals[copy.number] = hbm_free
            flights.append(Flight(copy, now, begin, hbm_free))
        elif event.kind == "wait":
            end = max([now, *(arrivals[number] for number in event.copies)])
            if end > now:
                spans.append(Span("stall", now, end, event))
            now = end
        elif event.order in computes:
            compute = computes[event.order]
            end = now + compute_cycles(compute)
            if end > now:
                spans.append(Span("compute", now, end, compute))
            now = end
    return Prediction(chip, compute_ratio, flights, spans, max([now, *arrivals.values()]))


# --- Labels ------------------------------------------------------------------------------------


def page_labels(page_indices, pages_per_seq, *, page_size=None, block_tokens=None, cache=None):
    """A labeller for pictures: which sequence and page (or block) a copy of pages belongs to.

    Args:
        page_indices: i32[num_seqs * pages_per_seq], live entries only count; a page that two
            sequences share is labelled with the first.
        pages_per_seq: pages of a row of the table.
        page_size, block_tokens: if both are given, blocks are named instead of pages.
        cache: name of the cache's buffer; None takes any HBM array indexed by a page first.

    Returns:
        A function from a Copy to its label, or None where it does not know.

    >>> cache = Buffer("kv_cache", "HBM", (9, 16, 4, 1, 128), "float32")
    >>> part = Slice(cache, (7, range(16), range(4), range(1), range(128)))
    >>> to = Slice(Buffer("kv", "VMEM", (16, 4, 1, 128), "float32"), part.index[1:])
    >>> copy = Copy(0, part, to, part.num_bytes, "sem", 0, None, 0, 0, "")
    >>> page_labels([3, 5, 7, 1], 2)(copy)
    'seq 1 page 0'
    """
    owners = {}
    for entry, page in enumerate(np.asarray(page_indices).tolist()):
        owners.setdefault(page, divmod(entry, pages_per_seq))
    pages_per_block = block_tokens // page_size if page_size and block_tokens else None

    def label(copy):
        end = copy.source if copy.source.buffer.space == HBM else copy.target
        known = cache is None or end.buffer.name == cache
        if not (known and isinstance(end.index[0], int) and end.index[0] in owners):
            return None
        seq, page = owners[end.index[0]]
        if pages_per_block:
            return f"seq {seq} block {page // pages_per_block}"
        return f"seq {seq} page {page}"

    return label
