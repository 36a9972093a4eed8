"""What a table of the lab is: cells that are measured one by one, and how its rows are printed.

A cell is what is asked ({"chip": "v6e", "kernel": "v3"}), and its row is that and the answer. Cells
know nothing of each other, so they can be measured side by side; what compares them comes at the
end, in `finish`.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rpa.lab.compile.compiler import end_workers
from rpa.lab.peers import PeerAbsent
from rpa.lab.schedule.execution import CHIPS, CannotRun
from rpa.lab.schedule.schedule import NoSchedule

NOTE = "note"
"""The column that says why a row has no numbers."""

SECONDS = "seconds"
"""The column that says how long a row took."""


@dataclass(frozen=True)
class Scope:
    """What is asked for.

    Attributes:
        chips: short names.
        kernels: names in `rpa.lab.schedule.cases.KERNELS`: rung 8, and the peers that are here.
        quick: leave out what takes long.
    """

    chips: tuple[str, ...] = CHIPS
    kernels: tuple[str, ...] = ("rpa", "v3", "batched")
    quick: bool = False


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: of it, and of its part in README.md where it is there.
        title: what is counted, in which unit, at which shapes.
        columns: {name: format of its values, or what an f-string takes}.
        cells: Scope to the cells.
        measure: the values of a cell to a dict of numbers; may raise what is in `REFUSALS`.
        finish: all rows to the rows that are shown; adds what compares them.
        in_quick: whether the quick subset has it.
    """

    name: str
    title: str
    columns: dict[str, str]
    cells: Callable[[Scope], list[dict]]
    measure: Callable[..., dict]
    finish: Callable[[list[dict]], list[dict]] = list
    in_quick: bool = True


REFUSALS = (NoSchedule, CannotRun, PeerAbsent)
"""Why a cell may have no numbers; each says it in words."""


def rows_of(table: Table, cells, workers=2) -> Iterator[dict]:
    """Measure cells, some at once, in their order; each says how long it took.

    Compiling happens in processes of their own, so two threads keep two cores busy.

    >>> table = Table("t", "", {}, None, lambda n: {"square": n * n})
    >>> [(row["n"], row["square"]) for row in rows_of(table, [{"n": 2}, {"n": 3}])]
    [(2, 4), (3, 9)]
    """
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(lambda cell: cell | _answer(table, cell), cells)
        except BaseException:  # Ctrl-C: the threads wait for the processes
            pool.shutdown(wait=False, cancel_futures=True)
            end_workers()
            raise


def _answer(table, cell):
    start = time.monotonic()
    try:
        found = table.measure(**cell)
    except REFUSALS as error:
        found = {NOTE: f"{type(error).__name__}: {error}"}
    return found | {SECONDS: time.monotonic() - start}


def as_markdown(table: Table, rows) -> str:
    """Rows as a table that is read as text and drawn by GitHub; notes stand below it.

    >>> columns = {"chip": "", "bundles": ",.0f", "of v3": ".2f"}
    >>> table = Table("t", "", columns, None, None)
    >>> rows = [{"chip": "v6e", "bundles": 1402.4, "of v3": 0.73}, {"chip": "v5e", "note": "no."}]
    >>> print(as_markdown(table, rows))
    | chip | bundles | of v3 |
    |:-----|--------:|------:|
    | v6e  |   1,402 |  0.73 |
    | v5e  |         |       |
    <BLANKLINE>
    v5e: no.
    """
    names = list(table.columns)
    cells = [[_cell(row.get(name), table.columns[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    left = [not table.columns[name] for name in names]

    def line(texts):
        put = zip(texts, widths, left, strict=True)
        return f"| {' | '.join(t.ljust(w) if at_left else t.rjust(w) for t, w, at_left in put)} |"

    rule = [f":{'-' * (w + 1)}" if at_left else f"{'-' * (w + 1)}:"
            for w, at_left in zip(widths, left, strict=True)]  # fmt: skip
    lines = [line(names), f"|{'|'.join(rule)}|", *map(line, cells)]
    notes = [f"{_who(row, table)}: {row[NOTE]}" for row in rows if row.get(NOTE)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _who(row, table):
    return " ".join(str(row[name]) for name in table.columns if isinstance(row.get(name), str))


def _cell(value, spec):
    if value is None:
        return ""
    return format(value, spec).replace("%", " %") if spec else str(value)


def ratio(part, whole):
    """A quotient, None where one of the two is missing.

    >>> ratio(3, 4), ratio(3, None)
    (0.75, None)
    """
    return None if part is None or not whole else part / whole


def beside_v3(rows, same, column) -> list[dict]:
    """All rows with a column "of v3": their number over that of v3 in the same situation.

    Args:
        rows: with a column "kernel".
        same: names of the columns in which both agree.
        column: the number.

    >>> rows = [{"chip": "v5e", "kernel": k, "us": us} for k, us in (("rpa", 3.0), ("v3", 4.0))]
    >>> [row["of v3"] for row in beside_v3(rows, ["chip"], "us")]
    [0.75, 1.0]
    """

    def situation(row):
        return tuple(row[name] for name in same)

    of_v3 = {situation(row): row.get(column) for row in rows if row["kernel"] == "v3"}
    return [row | {"of v3": ratio(row.get(column), of_v3.get(situation(row)))} for row in rows]
