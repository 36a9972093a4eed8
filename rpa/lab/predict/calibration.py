"""What published timings of real TPUs say about time: one fit of five numbers, and its error.

The schedule holds the bundles and the copies; how long they take on a chip it does not say. Five
numbers, the same for all kernels and batches, are chosen so that 58 published timings
(`rpa.lab.bench.timed_runs`) are met best:

| number | what it stands for |
|---|---|
| `cycles_per_bundle` | a core issues fewer bundles than one a cycle of the nominal clock: 1.9 GHz |
|  | instead of the 2.2 that TPU7x's peak FLOP/s imply would explain all of it |
| `latency_us` | from the end of a copy's turn until its wait ends |
| `launch_us` | starting and ending a kernel |
| `write_part` | HBM is written at this part of the rate at which it is read |
| `few_bytes_part` | and read at this part while less than 3 MB is in flight |

All timings are of one chip, TPU7x, and of other kernels than ours: elsewhere the calibrated value
is an extrapolation. The fit is a search of `GRID` for the least mean square of log(predicted /
published), in which every source counts the same. The schedule does not decide between causes: the
same 1.2 may be the clock, instruction fetch, or result stalls of the matrix unit.

A predicted time has a range: what all calibrations say whose mean square is at most twice that of
the best, and a tenth on either side. The two numbers are chosen so that nine of ten timings lie in
the range that is predicted for them with their whole source left out of the fit.
`python -m rpa lab predict --calibrate` repeats all of it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from rpa import chips
from rpa.lab.predict.waits import cycles_with_waits
from rpa.lab.schedule.execution import Execution


@dataclass(frozen=True)
class Calibration:
    """What is fitted; numbers, or arrays of one shape to try many at once.

    Attributes:
        hbm_efficiency: part of the peak bandwidth that reads reach.
        latency_us: of a copy, from the end of its turn until its wait ends.
        cycles_per_bundle: of the nominal clock.
        launch_us: of one kernel, once.
        write_part, few_bytes_part: see `rpa.lab.predict.waits.Rates`.
    """

    hbm_efficiency: float
    latency_us: float
    cycles_per_bundle: float = 1.0
    launch_us: float = 0.0
    write_part: float = 1.0
    few_bytes_part: float = 1.0

    def time_us(self, runs: Sequence[Execution], chip):
        """Microseconds of runs, one after the other, with their events."""
        c = chips.chip(chip)
        rate = c.hbm_bytes_per_s / c.clock_hz * self.hbm_efficiency
        rates = {
            "cycles_per_bundle": self.cycles_per_bundle,
            "write_part": self.write_part,
            "few_bytes_part": self.few_bytes_part,
        }
        latency_cycles = self.latency_us * 1e-6 * c.clock_hz
        cycles = [cycles_with_waits(run, rate, latency_cycles, **rates) for run in runs]
        return sum(cycles) / c.clock_hz * 1e6 + len(runs) * self.launch_us


AT_PEAK = Calibration(hbm_efficiency=1.0, latency_us=0.0)
"""Nothing fitted: every copy at the peak, and there when its turn ends."""

GRID = [
    Calibration(0.95, *rest)
    for rest in itertools.product(
        (0.8, 0.9, 1.0, 1.1, 1.2, 1.4),
        (1.2, 1.25, 1.3, 1.35),
        (0.5, 1.0, 1.5),
        (0.2, 0.25, 0.4, 1.0),
        (0.5, 0.6, 0.65, 0.7, 1.0),
    )
]
"""What is tried. At 95 % of HBM's peak the longest copies come out right, whatever the others are;
where computing binds v3 takes at least 1.18 cycles per bundle on a chip, so 1.2 is the least."""

FITTED = Calibration(0.95, 1.0, 1.2, 1.5, 0.2, 0.7)
"""The fit to all timings; a test repeats it."""

TOLERANCE, MARGIN = 2.0, 0.1
"""What makes a range: calibrations up to this many times the least mean square, and this part of
the time on either side."""

PLAUSIBLE = tuple(
    Calibration(0.95, *rest)
    for rest in (
        (0.8, 1.2, 1.5, 0.2, 0.65),
        (0.8, 1.2, 1.5, 0.25, 0.6),
        (0.9, 1.2, 0.5, 0.25, 0.7),
        (1.0, 1.2, 0.5, 0.25, 1.0),
        (1.0, 1.2, 1.5, 0.4, 0.7),
        (1.0, 1.25, 1.5, 0.2, 0.5),
        (1.0, 1.35, 1.5, 0.2, 0.65),
        (1.1, 1.2, 1.0, 0.4, 0.7),
        (1.1, 1.3, 1.5, 0.2, 0.6),
        (1.2, 1.2, 1.0, 0.2, 0.6),
        (1.2, 1.2, 1.5, 0.2, 0.65),
        (1.2, 1.25, 1.5, 0.2, 0.7),
        (1.2, 1.3, 1.5, 0.2, 1.0),
    )
)
"""The calibrations within the tolerance that are the lowest or the highest for a timing; a test
repeats it."""


def range_us(runs: Sequence[Execution], chip) -> tuple[float, float]:
    """Low and high end of the time of runs, in microseconds."""
    times = _many(PLAUSIBLE).time_us(runs, chip)
    return float(times.min() / (1 + MARGIN)), float(times.max() * (1 + MARGIN))


def are_established(range_a, range_b) -> bool:
    """Whether two ranges (low, high) are apart: only then one of two kernels is called faster.

    >>> are_established((1.0, 1.4), (1.5, 2.0)), are_established((1.0, 1.6), (1.5, 2.0))
    (True, False)
    """
    return range_a[1] < range_b[0] or range_b[1] < range_a[0]


def _many(calibrations) -> Calibration:
    """All of them as one, whose fields are arrays."""
    return Calibration(*np.array([astuple(c) for c in calibrations]).T)


def times_of(runs: Sequence[Execution], chip) -> np.ndarray:
    """Microseconds of runs with every calibration of GRID: f64[len(GRID)]."""
    # A launch only adds: calibrations that differ in nothing else are simulated once.
    no_launch = [replace(c, launch_us=0.0) for c in GRID]
    distinct = list(dict.fromkeys(no_launch))
    times = dict(zip(distinct, _many(distinct).time_us(runs, chip), strict=True))
    return np.array(
        [times[n] + len(runs) * c.launch_us for n, c in zip(no_launch, GRID, strict=True)]
    )


@dataclass(frozen=True)
class Fit:
    """The best of GRID for some timings.

    Attributes:
        best: of all timings.
        errors: of each timing at the best, 0.05 is 5 % too long.
        left_out: of each timing at the best of the others.
        source_left_out: of each timing at the best of those from other sources, which are of
            another kernel or at other shapes: what the fit is worth for one that it never saw.
        plausible: what ranges are made of: `PLAUSIBLE` if all timings are fitted.
        covered: of each timing, whether it lies in the range that the other sources predict.
    """

    best: Calibration
    errors: np.ndarray
    left_out: np.ndarray
    source_left_out: np.ndarray
    plausible: tuple[Calibration, ...]
    covered: np.ndarray


def fit(predicted_us, published_us, sources) -> Fit:
    """Choose from GRID.

    Args:
        predicted_us: f64[len(GRID), num_timings], of each timing with each calibration.
        published_us: f64[num_timings].
        sources: names, of at least two sources.

    >>> published = np.array([10.0, 20.0, 40.0])
    >>> predicted = np.stack([published * (1 + 0.01 * i) for i in range(len(GRID))])
    >>> found = fit(predicted, published, ["a", "a", "b"])
    >>> found.best == GRID[0], found.errors.tolist(), found.covered.tolist()
    (True, [0.0, 0.0, 0.0], [True, True, True])
    """
    published_us, names = np.asarray(published_us, float), np.array(list(sources))
    logs = np.log(np.asarray(predicted_us) / published_us)  # [len(GRID), num_timings]
    of_source = names[:, None] == names
    squares = logs**2 / of_source.sum(axis=0)
    alone = np.eye(len(published_us), dtype=bool)
    best = int(squares.sum(axis=1).argmin())
    return Fit(
        GRID[best],
        np.expm1(logs[best]),
        *(_errors_without(logs, squares, same) for same in (alone, of_source)),
        plausible=_hull(logs, squares),
        covered=_covered(logs, squares, of_source),
    )


def _errors_without(logs, squares, same):
    """Errors of each timing t at the best of those that are not `same[t]`."""
    of_others = squares @ ~same.T  # [len(GRID), num_timings]
    return np.expm1(logs[of_others.argmin(axis=0), np.arange(len(same))])


def _hull(logs, squares):
    """The calibrations within the tolerance that are the lowest or the highest for a timing."""
    within = np.flatnonzero(_is_within(squares.sum(axis=1)))
    ends = {*logs[within].argmin(axis=0).tolist(), *logs[within].argmax(axis=0).tolist()}
    return tuple(GRID[within[i]] for i in sorted(ends))


def _covered(logs, squares, of_source):
    """Whether each timing lies in the range that the sources which are not its own predict."""
    covered = []
    for t, same in enumerate(of_source):
        mine = logs[_is_within(squares[:, ~same].sum(axis=1)), t]
        covered.append(mine.min() <= np.log1p(MARGIN) and mine.max() >= -np.log1p(MARGIN))
    return np.array(covered)


def _is_within(loss):
    return loss <= TOLERANCE * loss.min()


def rms(errors) -> float:
    """Root of the mean square.

    >>> rms([3, 4, 0, 0])
    2.5
    """
    return float(np.sqrt(np.mean(np.square(errors))))
