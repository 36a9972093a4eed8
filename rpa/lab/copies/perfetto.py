"""A timeline as a Chrome trace, which https://ui.perfetto.dev opens: predicted, not measured.

One track for the core (computing, waiting) and one for each buffer that copies fill or empty. A
copy is drawn while the HBM moves it; its arguments say when it was started, and on which semaphore.
"""

from rpa import chips
from rpa.lab.copies.clock import predict_cycles
from rpa.lab.copies.events import Timeline

CORE = 0
"""The track of the core; buffers follow."""


def chrome_trace(timeline: Timeline, chip: str = "v5e", **options) -> dict:
    """A timeline as the JSON of a Chrome trace, on the predicted clock of a chip.

    Args:
        timeline: of `record_dmas`.
        chip: anything that `rpa.chips.chip` knows.
        options: of `rpa.lab.copies.clock.predict_cycles`.

    Returns:
        {"traceEvents": [...]}: times in microseconds.

    >>> chrome_trace(Timeline())["traceEvents"][0]["args"]["name"]
    'v5e, predicted'
    """
    known = chips.chip(chip)
    prediction = predict_cycles(timeline, known.name, **options)
    rows = list(dict.fromkeys(flight.copy.row for flight in prediction.flights))
    tracks = {row: number for number, row in enumerate(rows, start=1)}

    def complete(name, track, begin_cycles, end_cycles, **arguments):
        begin_us, end_us = (c / known.clock_hz * 1e6 for c in (begin_cycles, end_cycles))
        times = {"ts": begin_us, "dur": end_us - begin_us}
        return {"name": name, "ph": "X", "pid": 0, "tid": track, "args": arguments} | times

    events = [_name("process_name", CORE, f"{known.name}, predicted")]
    events += [
        _name("thread_name", number, name) for name, number in [("core", CORE), *tracks.items()]
    ]
    for span in prediction.spans:
        name = "wait" if span.kind == "stall" else f"compute on {', '.join(span.what.rows)}"
        events.append(complete(name, CORE, span.begin_cycles, span.end_cycles))
    for flight in prediction.flights:
        copy = flight.copy
        arguments = {
            "bytes": copy.num_bytes,
            "semaphore": copy.semaphore,
            "started_us": flight.start_cycles / known.clock_hz * 1e6,
            "line": copy.where,
        }
        name = f"{copy.source.label} -> {copy.target.label}"
        ends = (flight.begin_cycles, flight.arrival_cycles)
        events.append(complete(name, tracks[copy.row], *ends, **arguments))
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _name(what, track, name):
    return {"name": what, "ph": "M", "pid": 0, "tid": track, "args": {"name": name}}
