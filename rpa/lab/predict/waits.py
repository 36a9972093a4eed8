"""How long an executed kernel takes with its waits, if HBM delivers at a given rate.

The schedule says in which cycle every copy starts and every wait comes; the rest is one queue.
Copies share HBM's bandwidth one after the other, in the order of their starts, and a wait ends when
the copies that it names have ended. Copies of scalars, to or from SMEM, have a queue of their own:
they are a few bytes, and a kernel that waits for one at once would otherwise wait for all the pages
that it asked for before.

Where the scalar core runs out of registers and SMEM, the compiler moves the smallest pieces that a
chip can out and in (32 bytes; 512 on v5e), and waits for each at once. They take no latency here: a
peer's kernel does 879 of these in a call that real chips finish in 20 us
(`rpa.lab.bench.published`).
"""

from collections import defaultdict, deque

from rpa.lab.schedule.execution import Execution


def cycles_with_waits(execution: Execution, bytes_per_cycle, latency_cycles=0.0) -> float:
    """Cycles from the first bundle to the last, waits included.

    A copy inside HBM reads and writes, so it takes twice its bytes. A model, not a measurement: no
    refresh, no two copies at once, one latency for all.

    Args:
        execution: with its events, see `rpa.lab.schedule.Schedule.execute`.
        bytes_per_cycle: of HBM: bandwidth by clock, times the efficiency that is assumed.
        latency_cycles: from the end of a copy's turn until its semaphore knows.

    Raises:
        ValueError: if the events were not kept.

    >>> import numpy as np
    >>> from rpa.lab.schedule.machine import Event
    >>> events = Event(10, "hbm_to_vmem", 1000, 1), Event(20, "wait", 1000, 1)
    >>> cycles_with_waits(Execution(np.ones(50, int), events=events), bytes_per_cycle=10)
    140.0
    """
    if not execution.events and execution.copies:
        raise ValueError("execution has no events: call execute(..., keep_events=True).")
    on_their_way = defaultdict(deque)  # semaphore to (cycle at its end, bytes)
    stalled, free_from = 0.0, {True: 0.0, False: 0.0}  # when a queue is empty, by is_scalar
    for event in execution.events:
        now = event.cycle + stalled
        if event.action == "wait":
            end = _end_of(on_their_way[event.semaphore], event.bytes)
            stalled += max(0.0, end - now)
            continue
        passes = event.action.split("_to_").count("hbm")
        is_scalar = "smem" in event.action
        end = max(now, free_from[is_scalar]) + passes * event.bytes / bytes_per_cycle
        free_from[is_scalar] = end
        arrives = end if event.is_spill else end + latency_cycles
        on_their_way[event.semaphore].append((arrives, event.bytes))
    return execution.bundles + stalled


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
