"""The matrix unit: a systolic array that keeps weights and multiplies the rows that pass.

Weights are pushed into the array by registers of 8 rows (`vlatch`), rows of the left side follow
(`vmatmul`), products come out in a queue (`vmatres`). An array of 256 x 256 takes a register for
lanes 0 to 127 and one before it for lanes 128 to 255 (`vmatprep`).

A product of float32 is six products of bfloat16: a value is the sum of a high, a middle and a low
part of 8 bits each, and `mode` says which part a push or a pass takes.
"""

import ml_dtypes
import numpy as np

from rpa.lab.chip.errors import KernelFault, UnknownOperation
from rpa.lab.chip.registers import LANES, SUBLANES, widen_float8


class Mxu:
    """One matrix unit.

    Attributes:
        size: side of the array.
        newest_row_first: whether the weights pushed last are those of row 0 (v5e, v6e); on TPU7x
            those pushed first are.
    """

    def __init__(self, size, newest_row_first):
        self.size, self.newest_row_first = size, newest_row_first
        self.weights = None  # f32[size, size]: row k meets lane k of the left side
        self.pushed = []  # (half of the array, mode, rows) since the last product
        self.weight_lanes_128 = self.row_lanes_128 = None  # lanes 128 to 255 of what comes next
        self.results = []

    def prepare_weights(self, rows):
        """Lanes 128 to 255 of the next push."""
        self.weight_lanes_128 = rows

    def push_weights(self, rows, mode, half):
        """Push rows of weights into one half of the array."""
        if self.weight_lanes_128 is not None:
            rows = np.concatenate([rows, self.weight_lanes_128], axis=1)
        self.weight_lanes_128 = None
        self.pushed.append((half, mode, rows))

    def prepare_rows(self, rows):
        """Lanes 128 to 255 of the next product."""
        self.row_lanes_128 = rows

    def multiply(self, rows, mode):
        """Multiply rows with the weights; the products go to the queue."""
        if self.pushed:
            self._take_weights()
        if self.weights is None:
            raise KernelFault("a product without weights.")
        if self.row_lanes_128 is not None:
            rows = np.concatenate([rows, self.row_lanes_128], axis=1)
        self.row_lanes_128 = None
        left = part(rows, mode)
        weights = self.weights[: left.shape[1]]
        # One result at a time: a product so small stays in this thread, where a larger one waits
        # for threads of a library that other work keeps busy.
        for row in range(0, len(left), SUBLANES):
            for lane in range(0, self.size, LANES):
                columns = weights[:, lane : lane + LANES]
                self.results.append(left[row : row + SUBLANES] @ columns)

    def pop_result(self) -> np.ndarray:
        """The oldest result, f32[8, 128]."""
        if not self.results:
            raise KernelFault("a result of a product was taken that was never computed.")
        return self.results.pop(0)

    def _take_weights(self):
        """What was pushed becomes the weights."""
        modes = {mode for _, mode, _ in self.pushed}
        if len(modes) > 1:
            raise UnknownOperation(f"weights pushed in different modes: {', '.join(modes)}.")
        (mode,) = modes
        pushes = self.pushed[::-1] if self.newest_row_first else self.pushed
        pushes = sorted(pushes, key=lambda push: push[0])  # stable: the first half comes first
        rows = np.concatenate([part(r, mode.removeprefix("xpose.")) for _, _, r in pushes])
        weights = np.zeros((self.size, self.size), np.float32)
        weights[: rows.shape[0], : rows.shape[1]] = rows
        self.weights = weights.T if mode.startswith("xpose.") else weights
        self.pushed = []


def part(rows, mode) -> np.ndarray:
    """What a mode takes of values, as f32.

    >>> x = np.float32([[1 + 2**-9 + 2**-18]])
    >>> [float(part(x, mode)[0, 0]) for mode in ("high", "low", "soft_low_eight")]
    [1.0, 0.001953125, 3.814697265625e-06]
    """
    if mode in ("f8e4m3b_to_bf16", "e4m3b_to_bf16"):
        return widen_float8(rows, bias_11=True)
    if mode in _WHOLE:
        return rows.astype(ml_dtypes.bfloat16).astype(np.float32)
    if mode not in _HIGH | _MIDDLE | _LOW:
        raise UnknownOperation(f"mode {mode} of a matrix product is not known here.")
    high = rows.astype(ml_dtypes.bfloat16).astype(np.float32)
    if mode in _HIGH:
        return high
    middle = (rows - high).astype(ml_dtypes.bfloat16).astype(np.float32)
    if mode in _MIDDLE:
        return middle
    return (rows - high - middle).astype(ml_dtypes.bfloat16).astype(np.float32)


_WHOLE = {"packed.bf16", "f32", "round", "f8e4m3b", "e4m3b", "f8e5m2", "f8e5m2_to_bf16"}
_HIGH, _MIDDLE, _LOW = (
    {"high", "hi.f32"},
    {"low", "low.f32", "soft_middle_eight", "soft_middle_eight.f32"},
    {"soft_low_eight", "soft_low_eight.f32"},
)
