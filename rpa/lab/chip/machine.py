"""One core of a chip: its memory and its units, with what is in them."""

from typing import NamedTuple

from rpa.lab.chip.dma import DmaEngine
from rpa.lab.chip.errors import KernelFault
from rpa.lab.chip.layout import POISON
from rpa.lab.chip.memory import Memory
from rpa.lab.chip.mxu import Mxu
from rpa.lab.chip.xlu import TransposeUnit


class Model(NamedTuple):
    """What differs from chip to chip in what an instruction does.

    Attributes:
        mxu_size: side of the matrix unit.
        granule_words: the unit of a copy's size.
        newest_row_first: see `Mxu`.
    """

    mxu_size: int
    granule_words: int
    newest_row_first: bool


MODELS = {
    "v5e": Model(128, 128, True),
    "v6e": Model(256, 8, True),
    "tpu7x": Model(256, 8, False),
}
"""By `rpa.chips.Chip.name`."""

SCRATCH_WORDS = 2**17
"""VMEM that the compiler keeps for itself."""


class Machine:
    """A core that executes one kernel.

    Attributes:
        memory, dma: see `Memory` and `DmaEngine`; the buffers that were asked for come first.
        scratch_address: of the compiler's own VMEM.
    """

    def __init__(self, model, buffers, late):
        """`buffers` is a list of (name, space, number of words)."""
        self.model = model
        scratch = ("the compiler's scratch", "vmem", SCRATCH_WORDS)
        self.memory = Memory([*buffers, scratch])
        self.scratch_address = self.memory.buffers[-1].address
        self._scoped = {}  # where the program allocates to the buffer
        for buffer in self.memory.buffers:
            if buffer.space == "semaphore_mem":
                self.memory.contents(buffer)[:] = 0
        self.dma = DmaEngine(self.memory, model.granule_words, late)
        self._mxus, self._transpose_units = {}, {}

    def mxu(self, number) -> Mxu:
        """A matrix unit by its number."""
        if number not in self._mxus:
            self._mxus[number] = Mxu(self.model.mxu_size, self.model.newest_row_first)
        return self._mxus[number]

    def transpose_unit(self, number) -> TransposeUnit:
        """A transpose unit by its number."""
        return self._transpose_units.setdefault(number, TransposeUnit())

    def allocate(self, place, space, num_words) -> int:
        """The address of a buffer of `pl.run_scoped`: poison, or semaphores at zero.

        A place of the program, any hashable object, has one buffer, however often it comes by.
        """
        if place not in self._scoped:
            name = f"run_scoped {len(self._scoped)}"
            self._scoped[place] = self.memory.add(name, space, num_words)
        elif space == "semaphore_mem":
            self._check_semaphore(self._scoped[place])
        buffer = self._scoped[place]
        self.memory.contents(buffer)[:] = 0 if space == "semaphore_mem" else POISON
        return buffer.address

    def check_end(self):
        """Raise if the kernel leaves something behind: a copy, a count, a result."""
        self.dma.check_idle()
        for buffer in self.memory.buffers:
            if buffer.space == "semaphore_mem":
                self._check_semaphore(buffer)
        left = sum(len(unit.results) for unit in self._mxus.values())
        left += sum(len(unit.results) for unit in self._transpose_units.values())
        if left:
            raise KernelFault(f"{left} results of products or transpositions were never taken.")

    def _check_semaphore(self, buffer):
        counts = self.memory.contents(buffer)
        if counts.any():
            raise KernelFault(
                f"{buffer.name} ends at {counts.tolist()[:8]}, but every semaphore must be back "
                "at zero: a wait is missing, or waits for less than was copied."
            )
