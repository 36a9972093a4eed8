"""A player for DMAs: what `record_dmas` recorded, step by step, as one HTML file.

    with record_dmas() as timeline:
        my_kernel(...)
    player(timeline, my_kernel).save("dmas.html")   # in a notebook, the last line of a cell

Buffers fill while copies are on their way, memory that was never written is hatched, semaphores
count bytes, and the line of the kernel is marked. Arrow keys step, Home and End jump, space plays.
The file holds everything that it needs: it asks no network for anything.
"""

import html
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

from rpa.lab.copies.events import HBM, Slice, Timeline

TEMPLATE = Path(__file__).parents[1] / "data" / "dma_player.html"


@dataclass(frozen=True)
class Player:
    """One HTML file; a notebook shows it in a frame of its own."""

    text: str

    def save(self, path) -> Path:
        """Write it, and return where."""
        path = Path(path)
        path.write_text(self.text, encoding="utf-8")
        return path

    def _repr_html_(self):
        frame = 'style="width:100%;height:640px;border:0"'
        return f'<iframe srcdoc="{html.escape(self.text)}" {frame}></iframe>'


def player(timeline: Timeline, *functions, kernel: int = 0) -> Player:
    """The player of one kernel of a record.

    Args:
        timeline: of `rpa.lab.copies.timeline.record_dmas`.
        functions: of the kernel, whose source is shown with the line of each step marked.
        kernel: which `pallas_call` of the record.

    Raises:
        ValueError: if the kernel started no copy.
    """
    events = [event for event in timeline.events if event.kernel == kernel]
    copies = {copy.number: copy for copy in timeline.copies if copy.kernel == kernel}
    if not copies:
        raise ValueError(
            f"kernel {kernel} of the record started no copy: record one that is interpreted and "
            "moves something itself, or take another number."
        )
    ends = [end for copy in copies.values() for end in (copy.source, copy.target)]
    buffers = {end.buffer for end in ends if end.buffer.space != HBM}
    rows = {end.row: _extent(end)[2] for end in ends if end.buffer in buffers}
    steps = [step for event in events if (step := _step(event, copies, buffers))]
    data = {
        "rows": [{"name": name, "size": size} for name, size in sorted(rows.items())],
        "steps": steps,
        "source": [line for function in functions for line in _source_of(function)],
    }
    # A "</script>" in a learner's source would end the script.
    text = json.dumps(data).replace("</", "<\\/")
    return Player(TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", text))


def _step(event, copies, buffers) -> dict | None:
    file, line, where = _place(event.where)
    step = {"kind": event.kind, "bytes": event.num_bytes, "file": file, "line": line}
    if event.kind == "start":
        step |= {"sem": event.semaphore, "source": _part(event.source, buffers)}
        step["target"] = _part(event.target, buffers)
        what = f"{event.source.label} -> {event.target.label}"
        text = f"start {what}: {event.num_bytes:,} bytes on {event.semaphore}"
    elif event.kind == "wait":
        done = [copies[number] for number in event.copies]
        parts = [_part(end, buffers) for copy in done for end in (copy.source, copy.target)]
        step |= {"sem": event.semaphore, "arrived": [part for part in parts if part]}
        text = f"wait for {event.num_bytes:,} bytes on {event.semaphore}: {len(done)} copies"
        if event.missing_bytes:
            text += f", and {event.missing_bytes:,} bytes never come"
    elif event.kind in ("load", "store"):
        end = event.source or event.target
        if end.buffer not in buffers:
            return None
        step["parts"] = [_part(end, buffers)]
        text = f"{'read' if event.kind == 'load' else 'write'} {end.label}"
    else:
        return None
    return step | {"text": f"{text}\n{where}"}


def _part(end: Slice | None, buffers) -> dict | None:
    if end is None or end.buffer not in buffers:
        return None
    begin, stop, _ = _extent(end)
    return {"row": end.row, "begin": begin, "end": stop}


def _extent(end: Slice) -> tuple[int, int, int]:
    """First and one past the last unit of a slice in its row, and the units of the row."""
    shape, index = end.buffer.shape, end.index
    dimension = 1 if end.row != end.buffer.name and len(index) > 1 else 0
    at = index[dimension]
    at = at if isinstance(at, range) else range(at, at + 1)
    return at.start, at.stop, shape[dimension]


def _place(where):
    """File, line and words of "file.py:12:4 (function)".

    >>> _place("my_rpa.py:12:4 (start_pages)")
    ('my_rpa.py', 12, 'my_rpa.py, line 12 (start_pages)')
    """
    file, _, rest = where.partition(":")
    number = rest.partition(":")[0].partition(" ")[0]
    if not number.isdigit():
        return "", 0, where
    function = where.partition(" ")[2]
    return file, int(number), f"{file}, line {number} {function}".rstrip()


def _source_of(function):
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    file = Path(function.__code__.co_filename).name
    return [(file, number, line.rstrip("\n")) for number, line in enumerate(lines, start=first)]
