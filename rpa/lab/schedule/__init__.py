"""Read and execute the machine schedule of a kernel, as the TPU compiler wrote it.

| file | what it holds |
|---|---|
| `schedule.py` | the door, `schedule_for`: stages, loops, units of a compiled kernel |
| `worker.py`, `dumps.py` | compile with dumps on; parse the VLIW bundles |
| `pallas_calls.py`, `feeds.py` | find the kernels in a function, and the integers that they read |
| `execution.py`, `coder.py`, `machine.py`, `values.py` | run scalar instructions, count bundles |
| `call.py` | one call of a function of any signature |
| `loop_tree.py` | loops and predicated regions, and what bounds them |
| `cases.py` | what a chunk of decode, or of prefill, costs in each kernel |
| `steps.py` | from rung 7 to rung 8 one step at a time |
| `inner_loop.py`, `recorded.py` | the bench of chapter 9; schedules recorded for other machines |
"""

from rpa.lab.schedule.schedule import NoSchedule, Schedule, schedule_for

__all__ = ["NoSchedule", "Schedule", "schedule_for"]
