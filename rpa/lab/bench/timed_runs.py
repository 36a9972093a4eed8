"""58 published timings on TPU7x, with the recorded runs of their kernels: what time is fitted to.

A run is the schedule of a kernel executed on the batch that was timed: its bundles, and in which
cycle it starts and awaits which copy. They are recorded because the kernels are of versions that
exclude each other; a fit then takes seconds and no peer.

| source | kernel | compiled as |
|---|---|---|
| tpu-inference PR 3290 | `batched`, decode with a window | tpu-inference 0.32.0, and its flag |
| sglang-jax PR 1492 | v3, 4 new tokens | v3 of tpu-inference 0.32.0, same blocks |
| sglang-jax guard, prefill | v3 in one call, a fork | v3 of tpu-inference 0.13.3, same blocks |
| sglang-jax guard, decode | the same | the same |
| tpu-inference PR 3361 | stacked RPA, decode | tpu-inference 0.27.0, and its flag |

"Its flag" is `--xla_tpu_use_dynamic_smem_negotiation=true`, which tpu-inference sets at import:
without it, `batched` moves scalars out of SMEM all the time and takes a quarter more bundles.
The fork was compiled as v3: what differs between the two is an error of the model here.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from rpa.lab.schedule.execution import Execution
from rpa.lab.schedule.machine import Event

FILE = Path(__file__).parents[2] / "data" / "timed_runs.npz"

CHIP = "tpu7x"

ACTIONS = ("wait", "hbm_to_vmem", "vmem_to_hbm", "hbm_to_smem", "smem_to_hbm")


@dataclass(frozen=True)
class TimedRun:
    """One published number and the run that it times.

    Attributes:
        source: where it was published, as in the table above.
        case: the kernel's mode and shape in words.
        time_us: as published.
        run: the execution; of its hits only their sum is known.
    """

    source: str
    case: str
    time_us: float
    run: Execution = field(repr=False)


@cache
def timed_runs() -> tuple[TimedRun, ...]:
    """All of them.

    >>> len(timed_runs()), len({each.source for each in timed_runs()})
    (58, 5)
    """
    with np.load(FILE) as kept:
        names = zip(kept["source"], kept["case"], kept["time_us"], kept["bundles"], strict=True)
        return tuple(
            TimedRun(str(source), str(case), float(time_us), _run(kept[f"run{i}"], bundles))
            for i, (source, case, time_us, bundles) in enumerate(names)
        )


def _run(table, bundles) -> Execution:
    """An execution from rows of (cycles since the last event, action, bytes, semaphore, spill)."""
    cycles = np.cumsum(table[:, 0], dtype=np.int64).tolist()
    rows = zip(cycles, *table[:, 1:].T.tolist(), strict=True)
    events = tuple(
        Event(cycle, ACTIONS[action], size, semaphore, bool(is_spill))
        for cycle, action, size, semaphore, is_spill in rows
    )
    return Execution(np.array([bundles]), events=events)
