"""One execution of a kernel: operands into memory, step after step, outputs out of it.

libtpu compiles the body of a grid's step; the copies of windows before and after it are not part
of that text, only the index maps are. So they are made here: the block that a step wants is put
into one of two buffers, whatever it does not cover is poison, and an output goes back to its
array when its block changes. A kernel without a grid is one step whose windows are whole arrays.
"""

import itertools

import numpy as np

from rpa.lab.chip.errors import KernelFault, UnknownOperation
from rpa.lab.chip.layout import POISON
from rpa.lab.chip.machine import Machine


class Run:
    """One execution; `execute` does all of it."""

    def __init__(self, kernel, inputs, late):
        """Place the operands of a `rpa.lab.chip.kernel.Kernel`; see `Kernel.run`."""
        self.kernel, self.operands = kernel, kernel.operands
        self.source = {  # an output's place among the operands to that of its input
            kernel.num_inputs + after: before for before, after in kernel.aliases.items()
        }
        self.arrays = self._arrays(inputs)
        self.places, wanted = [], []  # of each operand: one buffer, or the two of a window
        for i, operand in enumerate(self.operands):
            if operand.in_place and i in self.source:
                self.places.append(self.places[self.source[i]])
                continue
            copies = 2 if operand.index_map else 1
            self.places.append([*range(len(wanted), len(wanted) + copies)])
            buffer = (operand.name, operand.layout.space, operand.layout.num_words)
            wanted += [buffer] * copies
        self.machine = Machine(kernel.model, wanted, late)
        self.blocks = {}  # of each window: the block that is in it

    def execute(self) -> list[np.ndarray]:
        """Run all steps of the grid and return the outputs."""
        for i, operand in enumerate(self.operands):
            if operand.kind in ("scalars", "input") and operand.index_map is None:
                self._fill(i, self.arrays[i])
        with np.errstate(all="ignore"):
            for step in itertools.product(*map(range, self.kernel.grid)):
                self._move_windows(step)
                addresses = [self._buffer(i).address for i in range(len(self.operands))]
                self._step(step, addresses)
        self.machine.check_end()
        for i in self.blocks:
            self._write_back(i)
        return [self._result(i) for i, x in enumerate(self.operands) if x.kind == "output"]

    def _step(self, step, addresses):
        try:
            self.kernel.body.run(self.machine, *step, *addresses)
        except (AttributeError, IndexError, NameError, TypeError, ValueError) as error:
            raise UnknownOperation(
                f"{self.kernel.name}: an instruction met operands that it was not made for "
                f"({error}); the lines above name it."
            ) from error

    def _arrays(self, inputs):
        """{operand: array} of inputs and outputs; an aliased output is the array of its input."""
        arrays = {i: np.array(x) for i, x in enumerate(inputs)}
        for k, result in enumerate(self.kernel.results):
            i = len(inputs) + k
            if i not in self.source:
                arrays[i] = _poisoned(result.shape, np.dtype(result.dtype))
                continue
            if self.operands[i].in_place != self.operands[self.source[i]].in_place:
                raise UnknownOperation(
                    f"output {k} shares memory with an input, and only one of them is a window."
                )
            arrays[i] = arrays[self.source[i]]
        return arrays

    def _buffer(self, i):
        """The buffer of an operand; of a window the one in use."""
        return self.machine.memory.buffers[self.places[i][0]]

    def _fill(self, i, array):
        layout = self.operands[i].layout
        words = layout.to_words(array.reshape(layout.shape))
        self.machine.memory.contents(self._buffer(i))[:] = words

    def _contents(self, i):
        return self.operands[i].layout.to_array(self.machine.memory.contents(self._buffer(i)))

    def _result(self, i):
        array = self.arrays[i]
        return array if self.operands[i].index_map else self._contents(i).reshape(array.shape)

    # --- Windows

    def _move_windows(self, step):
        """Bring the block that this step wants into each window."""
        scalars = [
            self._buffer(i).address for i, x in enumerate(self.operands) if x.kind == "scalars"
        ]
        for i, operand in enumerate(self.operands):
            if operand.index_map is None:
                continue
            block = operand.index_map.run(self.machine, *step, *scalars)
            if self.blocks.get(i) == block:
                continue
            if i in self.blocks:
                self._write_back(i)
            self.blocks[i] = block
            self.places[i].reverse()
            if operand.kind == "input":
                self._fetch(i)
            else:
                self.machine.memory.contents(self._buffer(i))[:] = POISON

    def _fetch(self, i):
        layout, part = self.operands[i].layout, self.arrays[i][self._covered(i)]
        window = _poisoned(layout.shape, layout.dtype)
        window[tuple(map(slice, part.shape))] = part
        self._fill(i, window)

    def _write_back(self, i):
        """An output's block to its array; what lies beyond the array is dropped."""
        if self.operands[i].kind != "output":
            return
        part = self.arrays[i][self._covered(i)]
        part[...] = self._contents(i)[tuple(map(slice, part.shape))]

    def _covered(self, i):
        """The part of the array that the window's block covers."""
        shape, window = self.arrays[i].shape, self.operands[i].layout.shape
        starts = [b * n for b, n in zip(self.blocks[i], window, strict=True)]
        if not all(0 <= start < n for start, n in zip(starts, shape, strict=True)):
            raise KernelFault(
                f"{self.operands[i].name}: the index map wants block {self.blocks[i]} of "
                f"{window}, which begins outside the array of {shape}."
            )
        return tuple(slice(start, start + n) for start, n in zip(starts, window, strict=True))


def _poisoned(shape, dtype):
    """An array of poison: NaN in every float dtype."""
    return np.full(shape, -1, f"i{dtype.itemsize}").view(dtype)
