"""What each instruction does: NumPy functions in a file per unit, which fill the table."""

from rpa.lab.chip.instructions import lanes, matrix, memory, packing, scalar, vector
from rpa.lab.chip.instructions.table import (
    INSTRUCTIONS,
    Instruction,
    by_operation,
    function_of,
    instruction,
)

__all__ = ["INSTRUCTIONS", "Instruction", "by_operation", "function_of", "instruction"]
__all__ += ["lanes", "matrix", "memory", "packing", "scalar", "vector"]
