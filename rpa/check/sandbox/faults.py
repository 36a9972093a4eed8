"""What a kernel's DMAs did wrong, in words and with lines: from the record of one run.

The record (`rpa.lab.copies.timeline`) has every start, wait, load and store in the kernel's own
order. On one core that is enough to judge by: between its start and its wait a copy may happen at
any time, so whatever touches its memory in between is wrong, whether or not this run went well.
"""

import linecache
import re
import textwrap
from collections import Counter
from dataclasses import dataclass

from rpa.check.sandbox.pickling import FILE_NAME
from rpa.lab.copies.events import Copy, Event, Timeline

NOBODY_SIGNALS = "waits for a semaphore that no copy signals"
READ_TOO_EARLY = "reads a buffer before its copy has arrived: a wait() is missing"
WAIT_TOO_LATE = "reads a buffer before its copy has arrived: the wait() comes too late"
OVERWRITTEN = "starts a copy into a buffer that is still to be read"
DOUBTFUL = "waits for one of several copies on the same semaphore: any of them may be the one"
WRITTEN_IN_FLIGHT = "writes to memory that a copy is still moving"
TWO_COPIES = "starts a copy on memory that another copy is still moving"
LEFTOVER = "starts a copy that is never waited for"
OUTSIDE = "copies from or to a place outside of an array"
RACE = "has a race: what it computes depends on when a copy arrives"


@dataclass
class Flight:
    """A copy that may be moving; `doubt` is a wait that may have been for it, or for another."""

    copy: Copy
    doubt: Event | None = None


def fault_of(timeline: Timeline) -> str | None:
    """The first thing that is wrong with the copies of a run, in words; None if nothing is.

    >>> fault_of(Timeline()) is None
    True
    """
    if hangs := _hangs(timeline):
        # Of a copy that lies outside of its array fewer bytes arrive than are waited for.
        return outside(timeline) or hangs
    return _collides(timeline) or _never_awaited(timeline)


def _hangs(timeline):
    wait = timeline.unfinished_wait
    if wait is None:
        return None
    line = f"{line_of(wait.where)} waits for {wait.num_bytes:,} bytes on {wait.semaphore}"
    mine = [copy for copy in timeline.copies if copy.semaphore == wait.semaphore]
    if not any(copy.kernel == wait.kernel for copy in mine):
        line += ", and no copy was ever started on it."
    elif wait.missing_bytes == wait.num_bytes:
        line += ", and all copies that were started on it have been waited for already."
    else:
        line += f", and only {wait.num_bytes - wait.missing_bytes:,} bytes are on their way."
    lines = [line]
    for copy in timeline.never_awaited[:1]:
        lines.append(
            f"{line_of(copy.where)} started a copy on {copy.semaphore} that was not waited for: "
            "is that the one?"
        )
    return explain(NOBODY_SIGNALS, lines, "So it hangs.")


def _collides(timeline):
    """The first event that touches memory which a copy may be moving."""
    starts = {copy.start: copy for copy in timeline.copies}
    flights, due_bytes, kernel = [], Counter(), None
    for event in timeline.events:
        if event.kernel != kernel:
            flights, due_bytes, kernel = [], Counter(), event.kernel
        if event.kind == "start":
            copy = starts[event.order]
            if fault := next(filter(None, (_two(timeline, f, copy) for f in flights)), None):
                return fault
            flights.append(Flight(copy))
            due_bytes[copy.semaphore] += copy.num_bytes
        elif event.kind == "wait":
            due_bytes[event.semaphore] -= event.num_bytes
            flights = _after_wait(flights, event, due_bytes[event.semaphore])
        elif event.kind in ("load", "store"):
            touched = (_touched(timeline, flight, event) for flight in flights)
            if fault := next(filter(None, touched), None):
                return fault
    return None


def _after_wait(flights, wait, rest_bytes):
    """What still flies: if not all bytes of a semaphore were waited for, nobody knows which."""
    if rest_bytes == 0:
        return [flight for flight in flights if flight.copy.semaphore != wait.semaphore]
    for flight in flights:
        if flight.copy.semaphore == wait.semaphore:
            flight.doubt = flight.doubt or wait
    return flights


def _two(timeline, flight, copy):
    """A copy is started while another one moves the same memory."""
    other = flight.copy
    pairs = ((copy.target, other.target), (copy.target, other.source), (copy.source, other.target))
    if not any(a.overlaps(b) for a, b in pairs):
        return None
    if flight.doubt:
        return _doubtful(flight, f"{line_of(copy.where)} takes it for arrived")
    lines = [
        f"{line_of(other.where)} starts the copy {_ends(other)}",
        f"{line_of(copy.where)} starts the copy {_ends(copy)} before anybody waited for that",
    ]
    return explain(TWO_COPIES, lines)


def _touched(timeline, flight, event):
    """A load of what a copy writes, or a store to what it reads or writes."""
    copy = flight.copy
    start = f"{line_of(copy.where)} starts the copy {_ends(copy)}"
    if event.kind == "store":
        if not any(event.target.overlaps(end) for end in (copy.source, copy.target)):
            return None
        write = f"{line_of(event.where)} writes {event.target.label} meanwhile"
        return explain(WRITTEN_IN_FLIGHT, [start, write])
    if not event.source.overlaps(copy.target):
        return None
    read = f"{line_of(event.where)} reads {event.source.label}"
    if flight.doubt:
        return _doubtful(flight, read)
    if _was_full(timeline, copy):
        return explain(OVERWRITTEN, [start, f"{read} after that: it wanted what was there before"])
    # A copy more than waits on its semaphore: the later wait was meant for the later copy.
    short = any(other.semaphore == copy.semaphore for other in timeline.never_awaited)
    if copy.wait is None or short:
        return explain(READ_TOO_EARLY, [start, f"{read}, and no wait() stands between"])
    late = f"{line_of(timeline.events[copy.wait].where)} waits for it, after that"
    return explain(WAIT_TOO_LATE, [start, read, late])


def _doubtful(flight, read):
    copy, wait = flight.copy, flight.doubt
    lines = [
        f"{line_of(copy.where)} starts the copy {_ends(copy)} on {copy.semaphore}",
        f"{line_of(wait.where)} waits for {wait.num_bytes:,} bytes on {wait.semaphore}, where more "
        "are on their way, and these may be the first to arrive",
        read,
    ]
    return explain(DOUBTFUL, lines)


def _was_full(timeline, copy):
    """Whether the target held what an earlier copy had brought and nobody had read yet."""
    earlier = [
        other
        for other in timeline.copies[: copy.number]
        if other.target.overlaps(copy.target) and other.wait is not None and other.wait < copy.start
    ]
    if not earlier:
        return False
    between = timeline.events[earlier[-1].wait : copy.start]
    return not any(
        event.kind in ("load", "start") and event.source.overlaps(copy.target) for event in between
    )


def _never_awaited(timeline):
    copies = timeline.never_awaited
    if not copies:
        return None
    first = copies[0]
    lines = [f"{line_of(first.where)} starts the copy {_ends(first)} on {first.semaphore}."]
    if _is_outside(first):
        lines.append("It lies outside of its array: does the loop start one copy too many?")
    if len(copies) > 1:
        lines.append(f"{len(copies)} copies are left over in all.")
    mine = [copy for copy in timeline.copies if copy.semaphore == first.semaphore]
    started = sum(copy.num_bytes for copy in mine)
    waited = sum(
        event.num_bytes
        for event in timeline.events
        if event.kind == "wait" and event.semaphore == first.semaphore
    )
    if len(mine) > 1:
        lines.append(
            f"On {first.semaphore} {started:,} bytes are started in all, and {waited:,} waited "
            "for: a wait counts bytes, and does not say whose."
        )
    lines.append(
        "Its semaphore is not back at zero when the kernel ends, and the copy may end later still: "
        "after what it was to bring has been read."
    )
    return explain(LEFTOVER, lines)


def outside(timeline: Timeline) -> str | None:
    """The first copy of memory that is not there, in words; the interpreter raises where it runs.

    >>> outside(Timeline()) is None
    True
    """
    for copy in timeline.copies:
        if _is_outside(copy):
            buffers = (copy.source.buffer, copy.target.buffer)
            shapes = [f"{b.name} has the shape {b.shape}" for b in buffers]
            start = f"{line_of(copy.where)} starts the copy {_ends(copy)}"
            return explain(OUTSIDE, [start, f"{', '.join(shapes)}."])
    return None


def _is_outside(copy: Copy) -> bool:
    """A record cuts ranges at the end of their array: then both ends differ in size."""
    ends = (copy.source, copy.target)
    return copy.source.num_bytes != copy.target.num_bytes or any(
        isinstance(i, int) and not 0 <= i < size
        for end in ends
        for i, size in zip(end.index, end.buffer.shape, strict=True)
    )


def explain(fault, lines, end=""):
    """The sentence about a fault, and below it what the kernel did, line by line."""
    sentence = textwrap.fill(f"Your kernel {fault}. {end}".rstrip(), 100)
    indent = {"initial_indent": "  ", "subsequent_indent": "    ", "break_on_hyphens": False}
    return "\n".join([sentence, *(textwrap.fill(line, 100, **indent) for line in lines)])


def _ends(copy: Copy) -> str:
    return f"{copy.source.label} -> {copy.target.label}"


def line_of(where: str) -> str:
    """A place in words: the line of the learner's cell with its text, or the place in a file."""
    found = re.match(re.escape(FILE_NAME) + r":(\d+)", where)
    if not found:
        return where or "The kernel"
    number = int(found[1])
    text = linecache.getline(FILE_NAME, number).strip()
    return f"Line {number}, `{text}`," if text else f"Line {number}"
