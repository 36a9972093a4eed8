"""Times that `python -m rpa bench` measured on a TPU next to what was predicted; a fit with them.

The file says what was timed; the kernels are compiled and executed here, as for any prediction. So
whoever receives a file can refit on a laptop. A measured time holds what XLA does around the
kernel, a prediction does not: in short calls that is part of the difference.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rpa.lab.batches import make_batch
from rpa.lab.bench.timed_runs import CHIP, timed_runs
from rpa.lab.predict.batch import run_batch, workload_of
from rpa.lab.predict.calibration import Fit, fit, times_of

SCHEMA = 1
"""Of the file; a reader refuses another number."""

SOURCE = "measured here"


@dataclass(frozen=True)
class Measured:
    """One row of a file: a kernel that the lab can predict.

    Attributes:
        chip, kernel, case: names; kernel as in `rpa.lab.schedule.cases.KERNELS`.
        lengths: (q_len, kv_len) of each sequence.
        sizes: model, page_size, dtype and kv_dtype.
        time_us: measured.
        calibrated_us, low_us, high_us: as predicted when it was measured; None without prediction.
    """

    chip: str
    kernel: str
    case: str
    lengths: list
    sizes: dict = field(repr=False)
    time_us: float
    calibrated_us: float | None
    low_us: float | None
    high_us: float | None

    @property
    def is_in_range(self) -> bool | None:
        """Whether the time lies in its range; None without prediction."""
        return None if self.low_us is None else self.low_us <= self.time_us <= self.high_us


def read(file) -> list[Measured]:
    """The rows of a file that were timed and that the lab can predict.

    Raises:
        ValueError: if it is no file of `rpa bench`, was made on a CPU, or has no such row.
    """
    try:
        found = json.loads(Path(file).read_text("utf-8"))
        schema, chip = found["schema"], found["machine"]["chip"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: no file of `python -m rpa bench --out`: {error!r}.") from None
    if schema != SCHEMA:
        raise ValueError(f"{file}: its schema is {schema}; expected {SCHEMA}: measure again.")
    if chip is None:
        raise ValueError(f"{file}: measured on a CPU, for which there is no prediction.")
    sizes = {k: found["workload"][k] for k in ("model", "page_size", "dtype", "kv_dtype")}
    names = ("calibrated_us", "low_us", "high_us")
    rows = [
        Measured(
            *(chip, row["lab_kernel"], row["case"], row["lengths"], sizes),
            row["timing"]["median_s"] * 1e6,
            **{name: row[name] for name in names},
        )
        for row in found["rows"]
        if row["timing"] is not None and row["lab_kernel"] is not None
    ]
    if not rows:
        raise ValueError(f"{file}: no row of it was timed and can be predicted.")
    return rows


def refit(rows) -> tuple[Fit, list[str]]:
    """The fit to the published timings and these, of TPU7x alone, and the source of each timing.

    Raises:
        ValueError: if they are of another chip: the five numbers are of one.
        As `rpa.lab.predict.predict_batch`.
    """
    if rows[0].chip != CHIP:
        raise ValueError(
            f"measured on {rows[0].chip}, but the published timings are of {CHIP}: a fit of both "
            "would say nothing. The table above compares them."
        )
    kept = timed_runs()
    predicted = [times_of([each.run], CHIP) for each in kept] + [_times(row) for row in rows]
    times_us = [each.time_us for each in kept] + [row.time_us for row in rows]
    sources = [each.source for each in kept] + [SOURCE] * len(rows)
    return fit(np.stack(predicted, axis=1), times_us, sources), sources


def _times(row: Measured) -> np.ndarray:
    batch = make_batch([tuple(each) for each in row.lengths], row.sizes["page_size"])
    sizes = workload_of(batch, **row.sizes)
    return times_of(run_batch(row.kernel, row.chip, batch, sizes), row.chip)


def table(rows) -> str:
    """Measured next to predicted, one line per row.

    >>> row = Measured("v6e", "rpa", "decode", [(1, 512)], {}, 12.0, 10.0, 8.0, 13.0)
    >>> print(table([row]))  # doctest: +NORMALIZE_WHITESPACE
    chip   kernel case    measured us predicted us       range error in its range
    v6e    rpa    decode         12.0         10.0 8.0 to 13.0  -17% yes
    """
    lines = [
        f"{'chip':6} {'kernel':8} {'case':8} {'measured us':>12} {'predicted us':>13} "
        f"{'range':>17} {'error':>6}  in its range"
    ]
    for row in rows:
        head = f"{row.chip:6} {row.kernel:8} {row.case:8} {row.time_us:12,.1f}"
        if row.calibrated_us is None:
            lines.append(f"{head} {'-':>13}")
            continue
        ends, error = f"{row.low_us:,.1f} to {row.high_us:,.1f}", row.calibrated_us / row.time_us
        lines.append(
            f"{head} {row.calibrated_us:13,.1f} {ends:>17} {error - 1:+6.0%}  "
            f"{'yes' if row.is_in_range else 'no'}"
        )
    return "\n".join(lines)
