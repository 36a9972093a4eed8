"""How long an executed kernel takes with its waits, if HBM delivers at a given rate.

The schedule says in which cycle every copy starts and every wait comes; the rest is one queue.
Copies share HBM's bandwidth one after the other, in the order of their starts, and a wait ends when
the copies that it names have ended. Copies of scalars, to or from SMEM, have a queue of their own:
they are a few bytes, and a kernel that waits for one at once would otherwise wait for all the pages
that it asked for before.

Where the scalar core runs out of registers and SMEM, the compiler moves the smallest pieces that a
chip can out and in (32 bytes; 512 on v5e), and waits for each at once. They take no latency here,
which no timing supports: the kernels that were timed on a chip do none of them (`batched` does,
unless it is compiled with the flag that its package sets: `rpa.lab.peers.COMPILER_FLAGS`).
"""

from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np

from rpa.lab.schedule.execution import Execution

FEW_BYTES = 3e6
"""With fewer bytes in flight, a read is slow: `Rates.few_bytes_part`. About what arrives at the
full rate within one latency; no timing separates it from 2 or 4 MB."""


@dataclass(frozen=True)
class Rates:
    """What an execution is timed with; numbers, or arrays of one shape to try many at once.

    Attributes:
        bytes_per_cycle: of HBM: bandwidth by clock, times the efficiency that is assumed.
        latency_cycles: from the end of a copy's turn until its semaphore knows.
        cycles_per_bundle: 1 if every bundle issues in one cycle of the nominal clock.
        write_part: part of `bytes_per_cycle` at which HBM is written.
        few_bytes_part: part of it at which HBM is read while less than `FEW_BYTES` is in flight.
    """

    bytes_per_cycle: float | np.ndarray
    latency_cycles: float | np.ndarray = 0.0
    cycles_per_bundle: float | np.ndarray = 1.0
    write_part: float | np.ndarray = 1.0
    few_bytes_part: float | np.ndarray = 1.0


def cycles_with_waits(execution: Execution, bytes_per_cycle, latency_cycles=0.0, **rates) -> float:
    """Cycles from the first bundle to the last, waits included.

    A copy inside HBM reads and writes, so it takes twice its bytes. A model, not a measurement: no
    refresh, no two copies at once, one latency for all.

    Args:
        execution: with its events, see `rpa.lab.schedule.Schedule.execute`.
        bytes_per_cycle, latency_cycles, **rates: the fields of `Rates`.

    Returns:
        A float, or an array of the shape of the rates.

    Raises:
        ValueError: if the events were not kept.

    >>> from rpa.lab.schedule.machine import Event
    >>> events = Event(10, "hbm_to_vmem", 1000, 1), Event(20, "wait", 1000, 1)
    >>> run = Execution(np.ones(50, int), events=events)
    >>> float(cycles_with_waits(run, bytes_per_cycle=10))
    140.0
    >>> cycles_with_waits(run, bytes_per_cycle=np.array([10, 100])).tolist()
    [140.0, 50.0]
    """
    if not execution.events and execution.copies:
        raise ValueError("execution has no events: call execute(..., keep_events=True).")
    r = Rates(bytes_per_cycle, latency_cycles, **rates)
    on_their_way = defaultdict(deque)  # semaphore to (cycle at its end, bytes)
    reads = _InFlight()
    stalled, free_from = 0.0, {True: 0.0, False: 0.0}  # when a queue is empty, by is_scalar
    for event in execution.events:
        now = event.cycle * r.cycles_per_bundle + stalled
        if event.action == "wait":
            end = _end_of(on_their_way[event.semaphore], event.bytes)
            stalled = stalled + np.maximum(0.0, end - now)
            continue
        passes = event.action.split("_to_").count("hbm")
        is_scalar, is_write = "smem" in event.action, event.action == "vmem_to_hbm"
        cycles = passes * event.bytes / r.bytes_per_cycle
        if is_write:
            cycles = cycles / r.write_part
        elif not is_scalar:
            cycles = np.where(reads.are_few(now), cycles / r.few_bytes_part, cycles)
        end = np.maximum(now, free_from[is_scalar]) + cycles
        free_from[is_scalar] = end
        arrives = end if event.is_spill else end + r.latency_cycles
        on_their_way[event.semaphore].append((arrives, event.bytes))
        if not (is_scalar or is_write):
            reads.add(arrives, event.bytes)
    return execution.bundles * r.cycles_per_bundle + stalled


class _InFlight:
    """The last reads that hold `FEW_BYTES` together; older ones arrived before the first of them
    or at the same time."""

    def __init__(self):
        self.reads, self.bytes = deque(), 0

    def add(self, arrives, size):
        self.reads.append((arrives, size))
        self.bytes += size
        while self.bytes - self.reads[0][1] >= FEW_BYTES:
            self.bytes -= self.reads.popleft()[1]

    def are_few(self, now):
        """Whether less than `FEW_BYTES` has started and not arrived."""
        return self.bytes < FEW_BYTES or self.reads[0][0] <= now


def _end_of(copies, wanted):
    """When so many bytes have arrived; takes them from the queue."""
    end = 0.0
    while wanted > 0 and copies:
        arrives, size = copies.popleft()
        end = arrives
        if size > wanted:
            copies.appendleft((arrives, size - wanted))
        wanted -= size
    return end
