"""What the published timings of real TPUs say about HBM: one fit of two numbers, and its error.

The schedule holds the cycles, but neither how long a copy takes to arrive nor what part of its peak
HBM reaches. Two numbers, the same for all kernels and batches, are chosen so that ten published
timings (`rpa.lab.bench.published.TIMINGS`) are met best: least mean square of log(predicted /
published). All ten are of one chip, TPU7x, and of other kernels than ours: elsewhere the calibrated
value is an extrapolation. And that it fits does not say why: whatever a kernel waits for once a
block, beside its bytes, looks like latency here.

`python -m rpa lab predict --calibrate` repeats the fit and prints its error, also that of each
timing when the other nine alone are fitted, or the other source alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rpa import chips
from rpa.lab.predict.waits import cycles_with_waits
from rpa.lab.schedule.execution import Execution


@dataclass(frozen=True)
class Calibration:
    """What is fitted.

    Attributes:
        hbm_efficiency: part of the peak bandwidth that copies reach.
        latency_us: of a copy, from the end of its turn until its wait ends.
    """

    hbm_efficiency: float
    latency_us: float

    def time_us(self, runs: Sequence[Execution], chip) -> float:
        """Microseconds of runs, one after the other, with their events."""
        c = chips.chip(chip)
        rate = c.hbm_bytes_per_s / c.clock_hz * self.hbm_efficiency
        cycles = [cycles_with_waits(run, rate, self.latency_us * 1e-6 * c.clock_hz) for run in runs]
        return sum(cycles) / c.clock_hz * 1e6


AT_PEAK = Calibration(hbm_efficiency=1.0, latency_us=0.0)
"""Nothing fitted: every copy at the peak, and there when its turn ends."""

FITTED = Calibration(hbm_efficiency=0.95, latency_us=1.4)
"""The fit to all ten timings; a test repeats it where the peers are installed."""

GRID = [
    Calibration(efficiency, round(0.2 * step, 1))
    for efficiency in (0.85, 0.9, 0.95, 1.0)
    for step in range(11)
]
"""What is tried."""


@dataclass(frozen=True)
class Fit:
    """The best of GRID for some timings.

    Attributes:
        best: of all timings.
        errors: of each timing at the best, 0.05 is 5 % too long.
        left_out: of each timing at the best of the others.
        source_left_out: of each timing at the best of those from other sources, which are of
            another kernel and at other shapes: what the fit is worth for one that it never saw.
    """

    best: Calibration
    errors: np.ndarray
    left_out: np.ndarray
    source_left_out: np.ndarray


def fit(predicted_us, published_us, sources) -> Fit:
    """Choose from GRID.

    Args:
        predicted_us: f64[len(GRID), num_timings], of each timing with each calibration.
        published_us: f64[num_timings].
        sources: names, of at least two sources.

    >>> published = np.array([10.0, 20.0, 40.0])
    >>> predicted = np.stack([published * (1 + 0.01 * i) for i in range(len(GRID))])
    >>> found = fit(predicted, published, ["a", "a", "b"])
    >>> found.best == GRID[0], found.errors.tolist()
    (True, [0.0, 0.0, 0.0])
    """
    published_us = np.asarray(published_us, float)
    relative = np.asarray(predicted_us) / published_us
    squares = np.log(relative) ** 2
    total = squares.sum(axis=1)
    best = int(total.argmin())
    alone, names = np.eye(len(published_us), dtype=bool), np.array(list(sources))
    of_source = names[:, None] == names
    errors = [_errors_without(relative, squares, same) for same in (alone, of_source)]
    return Fit(GRID[best], relative[best] - 1, *errors)


def _errors_without(relative, squares, same):
    """Errors of each timing t at the best of those that are not `same[t]`."""
    of_others = squares @ ~same.T  # [len(GRID), num_timings]
    return relative[of_others.argmin(axis=0), np.arange(len(same))] - 1


def rms(errors) -> float:
    """Root of the mean square.

    >>> rms([3, 4, 0, 0])
    2.5
    """
    return float(np.sqrt(np.mean(np.square(errors))))
