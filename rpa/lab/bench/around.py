"""What XLA does around a kernel in one call, counted from the compiled HLO.

Every operation of it carries XLA's own estimate, `estimated_cycles`; the kernels carry none. So the
sum is what a call takes besides its kernels: transposes, padding, page tables, new K next to V.
An estimate of XLA's, no measurement, and nothing of it overlaps a kernel.
"""

import re

from rpa import chips
from rpa.lab.compile.compiler import compile_for
from rpa.lab.programs import Workload
from rpa.lab.schedule.cases import KERNELS
from rpa.lab.schedule.schedule import NoSchedule

ESTIMATE = re.compile(r'"estimated_cycles":\s*"?(\d+)')


def around_us(kernel, chip, sizes: Workload) -> float:
    """Microseconds of all operations around the kernels of one call.

    Args:
        kernel: a name in `rpa.lab.schedule.cases.KERNELS`.
        chip: anything that `rpa.chips.chip` knows.
        sizes: what it is compiled for.

    Raises:
        rpa.lab.schedule.NoSchedule: if it does not compile.
    """
    known, program = chips.chip(chip), KERNELS[kernel].program(sizes)
    compiled = compile_for(
        *(known.name, program.function, *program.args),
        kwargs=program.kwargs | {"chip": known.name, "sm_scale": sizes.heads[2] ** -0.5},
        donate_argnums=program.donate_argnums,
        keep_hlo=True,
    )
    if not compiled.ok:
        raise NoSchedule(compiled.error_kind, compiled.error)
    return estimated_cycles(compiled.hlo) / known.clock_hz * 1e6


def estimated_cycles(hlo) -> int:
    """The sum of XLA's estimates in a compiled program's text.

    >>> estimated_cycles('{"estimated_cycles":"40"} {"estimated_cycles":"2"}')
    42
    """
    return sum(map(int, ESTIMATE.findall(hlo)))
