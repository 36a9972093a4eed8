"""The chip on a laptop: execute what the TPU compiler makes of a kernel, in NumPy.

`run` is the door. The interpreter runs a kernel's Python; this runs the instructions that libtpu
makes of it for one chip: layouts, addresses, packing, strided loads, copies and semaphores are
those of the chip. In the order in which a kernel passes through the files:

    dump.py          lowered and compiled for a chip that is not there, kept on disk
    text.py          the compiled text as operations
    translate.py     operations as lines of Python
    instructions/    what an instruction does: NumPy functions, a file for each unit
    registers.py     values in registers; layout.py: arrays in memory
    machine.py       memory.py, dma.py, mxu.py, xlu.py: the units with what is in them
    run.py           one execution: operands in, grid and windows, outputs out
    evaluate.py      the function around the kernels
    stepping.py      the same instruction by instruction, with what each one gave

docs/chip.md says what this proves and what it does not.
"""

from rpa.lab.chip.door import DMA_ORDERS, prepare, run
from rpa.lab.chip.dump import check_compiler
from rpa.lab.chip.errors import ChipError, KernelFault, NotCompiled, UnknownOperation
from rpa.lab.chip.stepping import Step, step_listing, step_through, strided_load

__all__ = ["DMA_ORDERS", "ChipError", "KernelFault", "NotCompiled", "UnknownOperation"]
__all__ += ["Step", "check_compiler", "prepare", "run", "step_listing", "step_through"]
__all__ += ["strided_load"]
