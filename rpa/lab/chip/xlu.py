"""The transpose unit (XLU): 128 rows go in, register by register; columns come out as rows."""

import numpy as np

from rpa.lab.chip.errors import KernelFault
from rpa.lab.chip.registers import LANES


class TransposeUnit:
    """One transpose unit, with what is in it."""

    def __init__(self):
        self.rows, self.results = [], []

    def push(self, *registers):
        """Take 8, 16 or 32 rows of one matrix, or of two; after 128 rows the results are ready."""
        self.rows.append(registers)
        height = len(registers[0])
        if height * len(self.rows) < LANES:
            return
        columns = [np.concatenate(rows).T for rows in zip(*self.rows, strict=True)]
        self.rows = []
        for row in range(0, LANES, height):
            self.results += [matrix[row : row + height] for matrix in columns]

    def pop_result(self) -> np.ndarray:
        """The oldest result, as high as the registers that went in."""
        if not self.results:
            raise KernelFault("a result of a transposition was taken before 128 rows were in.")
        return self.results.pop(0)
