"""What one call of a function of any signature executes: any kernel, not only attention."""

from rpa.lab.schedule.execution import Execution, chip_to_execute
from rpa.lab.schedule.schedule import Schedule, schedule_for


def execute_call(
    chip, fn, *args, kwargs=None, kernel="", use_cache=True, keep_events=False
) -> tuple[Schedule, Execution]:
    """The schedule of a function's Pallas kernel, and what one call of it executes.

    Args:
        chip: one of `rpa.lab.schedule.execution.CHIPS`.
        fn: a function at the top level of a module, or "module:function", or "file.py:function".
        *args: arrays; the integers among them decide what is executed, of the others the shapes
            are enough.
        kwargs: keyword arguments: arrays likewise, or what JSON can hold.
        kernel: regular expression that finds exactly one of the function's kernels by its name.
        use_cache: False compiles again.
        keep_events: also note when which copy starts, and when which is waited for.

    Raises:
        rpa.lab.schedule.NoSchedule: if it does not compile.
        rpa.lab.schedule.execution.CannotRun: if the kernel decides by what only vectors know.
        ValueError: if `fn` cannot be imported, or schedules cannot be executed for the chip.
    """
    name = chip_to_execute(chip).name
    schedule = schedule_for(name, fn, *args, kwargs=kwargs, kernel=kernel, use_cache=use_cache)
    return schedule, schedule.execute(*args, kwargs=kwargs, keep_events=keep_events)
