"""The lab: what the real TPU compiler says about a kernel, on a machine without a TPU.

`compile_for` compiles for a chip that is not there and reports time, VMEM, HBM, HLO, or in words
why not. `schedule_for` reads what was compiled, bundle by bundle. `python -m rpa lab` is the same
from a shell.
"""

from rpa.lab.compile.compiler import CompileResult, Kernel, compile_for, compile_versions
from rpa.lab.schedule.schedule import NoSchedule, Schedule, schedule_for

__all__ = [
    "CompileResult",
    "Kernel",
    "NoSchedule",
    "Schedule",
    "compile_for",
    "compile_versions",
    "schedule_for",
]
