"""What the exercises about DMA kernels share: how they are called, and what must overlap.

The learner's kernels run in the sandbox (`rpa.check.sandbox`). References and mistakes are NumPy
models of what comes out; what breaks a rule of DMAs without a number of its own (a wait that is
missing, or never ends) the sandbox finds, see `rpa.check.sandbox.faults`.
"""

import functools
from collections.abc import Callable, Iterator

from rpa.check.exercise import Exercise
from rpa.check.sandbox.process import in_sandbox
from rpa.lab.copies.events import Copy, Event, Timeline

LIMIT_S = 10.0


def dma_exercise(
    number: str, reference: Callable, launcher: Callable, *, judge: Callable | None = None, **more
) -> Exercise:
    """An exercise whose answer is a kernel with DMAs of its own.

    Args:
        number, reference, **more: of `Exercise`.
        launcher: `launcher(kernel, *arguments)` calls a kernel; it stands at the top of a module.
        judge: of `rpa.check.sandbox.in_sandbox`.
    """
    drive = functools.partial(launch, launcher)
    return Exercise(
        number, reference, drive=drive, runner=in_sandbox(judge), limit_s=LIMIT_S, **more
    )


def launch(launcher: Callable, kernel: Callable, *arguments):
    """Call the learner's kernel by its launcher; a model of the result is simply called."""
    is_model = kernel.__module__.startswith("rpa.check.chapters.chapter")
    return kernel(*arguments) if is_model else launcher(kernel, *arguments)


def in_flight(timeline: Timeline) -> Iterator[tuple[Event, list[Copy]]]:
    """Every event of a record with the copies that nobody has waited for when it happens.

    A start is not yet among them, a copy whose wait this is no longer.

    >>> list(in_flight(Timeline()))
    []
    """
    starts = {copy.start: copy for copy in timeline.copies}
    flying: dict[int, Copy] = {}
    for event in timeline.events:
        for number in event.copies:
            flying.pop(number, None)
        yield event, list(flying.values())
        if event.order in starts:
            flying[starts[event.order].number] = starts[event.order]
