"""A timeline on the clock of a chip: when do copies arrive, when does the core wait? Predicted."""

from collections.abc import Callable
from dataclasses import dataclass

from rpa import chips
from rpa.lab.copies.events import HBM, Compute, Copy, Event, Timeline


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
    kernel: int | None = None,
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
        kernel: which `pallas_call` of the record, by itself; None takes all, one after the other.
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
        if kernel is not None and event.kernel != kernel:
            continue
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
