"""The DMA engine: copies that end when they like, and the semaphores that count them.

A copy may end at once, or as late as it can: only when a wait needs it. A kernel is right only if
both give the same; a wait that was forgotten shows in the second.
"""

import itertools

import numpy as np

from rpa.lab.chip.errors import KernelFault

SPACES = ("hbm", "vmem", "smem")


class DmaEngine:
    """Copies in flight.

    A semaphore is a word of memory. It counts granules: the unit of a copy's size, 32 bytes on v6e
    and TPU7x, 512 bytes on v5e.
    """

    def __init__(self, memory, granule_words, late):
        """With `late` a copy ends when a wait needs it, otherwise at once."""
        self.memory, self.granule_words, self.late = memory, granule_words, late
        self.in_flight = {}  # semaphore's address to a list of copies, the oldest first

    def start(self, source, target, semaphore, granules, steps, sizes):
        """Start a copy.

        Args:
            source, target, semaphore: addresses in bytes.
            granules: size of all of it.
            steps: [(in the source, in the target)] from one piece to the next, in granules.
            sizes: how many pieces for each of `steps`, then the granules of a piece.
        """
        if int(np.prod(sizes)) != granules:
            raise KernelFault(f"a copy of {granules} granules has pieces of {sizes}.")
        self.memory.check("a semaphore", semaphore // 4, semaphore // 4 + 1, "semaphore_mem")
        copy = (source // 4, target // 4, granules, steps, sizes)
        for first, second, words in self._pieces(copy):
            self.memory.check("the source of a copy", first, first + words, *SPACES)
            self.memory.check("the target of a copy", second, second + words, *SPACES)
        if self.late:
            self.in_flight.setdefault(semaphore, []).append(copy)
        else:
            self._finish(semaphore, copy)

    def wait(self, semaphore, granules):
        """Wait until a semaphore has counted so many granules, and take them off it."""
        self.wait_for(semaphore, granules)
        self.add(semaphore, -granules)

    def wait_for(self, semaphore, count):
        """Wait until a semaphore has reached a count."""
        copies = self.in_flight.get(semaphore, [])
        while self._count(semaphore)[0] < count:
            if not copies:
                raise KernelFault(
                    f"deadlock: a wait until a semaphore reaches {count}, but it has "
                    f"{self._count(semaphore)[0]} and no copy is in flight."
                )
            self._finish(semaphore, copies.pop(0))

    def add(self, semaphore, count):
        """Signal a semaphore, or take from it what was waited for."""
        self.memory.check("a semaphore", semaphore // 4, semaphore // 4 + 1, "semaphore_mem")
        self._count(semaphore)[0] += count

    def check_idle(self):
        """Raise if a copy is still in flight: no wait ever needed it."""
        if left := sum(map(len, self.in_flight.values())):
            raise KernelFault(f"the kernel ended with {left} copies in flight: a wait is missing.")

    def _count(self, semaphore):
        return self.memory.words[semaphore // 4 : semaphore // 4 + 1].view(np.int32)

    def _pieces(self, copy):
        """First word in the source and in the target, and number of words, of each piece."""
        source, target, _, steps, (*counts, size) = copy
        unit = self.granule_words
        for place in itertools.product(*map(range, counts)):
            pairs = list(zip(place, steps, strict=True))
            first = source + unit * sum(i * step for i, (step, _) in pairs)
            second = target + unit * sum(i * step for i, (_, step) in pairs)
            yield first, second, unit * size

    def _finish(self, semaphore, copy):
        words = self.memory.words
        for first, second, size in self._pieces(copy):
            words[second : second + size] = words[first : first + size]
        self._count(semaphore)[0] += copy[2]
