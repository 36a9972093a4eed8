"""The scalar core while it runs: registers, SMEM, the part of HBM that it reads, a log of DMAs."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from rpa.lab.schedule.values import FIRST_SYMBOL, Unknown, pointer, resolve

GRANULE_BYTES = 32
"""Unit of the sizes of DMAs and of addresses in HBM."""


class Event(NamedTuple):
    """A DMA that starts, or a wait for DMAs.

    Attributes:
        cycle: bundles executed before it.
        action: "hbm_to_vmem", "vmem_to_hbm", ... for a start, or "wait".
        bytes: size of the copy, or what is waited for.
        semaphore: what a copy signals at its end, and what a wait waits for.
        is_spill: whether the compiler moves scalars that it has no room for in SMEM: to memory that
            is no operand, and back.
    """

    cycle: int
    action: str
    bytes: int
    semaphore: int
    is_spill: bool = False


class _Registers(dict):
    def __missing__(self, name):
        return Unknown(f"{name}, which nothing wrote")


class Machine:
    """Registers and SMEM of the scalar core, and a log of DMAs."""

    def __init__(self, operands, keep_events):
        self.cycle = self.end = 0
        self.events = [] if keep_events else None
        self.operands = {i: np.asarray(x).reshape(-1) for i, x in operands.items()}
        self.registers = _Registers()
        self.smem = {}
        self.hbm = {}
        self.copies = Counter()

    def copy(self, kind, bundle, granules, semaphore, beyond_smem=None):
        """Note a DMA; of one to or from SMEM also the pointer at its other end."""
        if isinstance(granules, Unknown):
            bool(granules)
        self.copies[kind, bundle, granules * GRANULE_BYTES] += 1
        is_spill = beyond_smem is not None and resolve(beyond_smem)[0] >= FIRST_SYMBOL
        self.note(kind, bundle, granules, semaphore, is_spill)

    def note(self, action, bundle, granules, semaphore, is_spill=False):
        """Keep an event, if they are kept."""
        if self.events is not None:
            cycle = self.cycle - self.end + bundle
            self.events.append(Event(cycle, action, granules * GRANULE_BYTES, semaphore, is_spill))

    def load(self, place, target):
        """Read SMEM; what was never written is not known, which matters if it decides anything."""
        value = self.smem.get(place)
        return Unknown(f"{target} = sld, of SMEM that nothing wrote") if value is None else value

    def copy_words(self, source_space, source, granules, target_space, target):
        """Copy words between SMEM and HBM (or VMEM, for operands that wait there)."""
        from_thing, first, from_scale = resolve(source)
        to_thing, start, to_scale = resolve(target)
        words = GRANULE_BYTES // 4
        first = first // from_scale if source_space == "smem" else first * words
        start = start // to_scale if target_space == "smem" else start * words
        for word in range(granules * words):
            value = self._read(source_space, from_thing, first + word)
            if value is None:
                continue
            if target_space == "smem":
                self.smem[pointer(to_thing) + start + word] = value
            else:
                self.hbm[to_thing, start + word] = value

    def _read(self, space, thing, word):
        """A word of a thing; None if nothing wrote it."""
        if space == "smem":
            return self.smem.get(pointer(thing) + word)
        if (thing, word) in self.hbm or thing >= FIRST_SYMBOL:
            return self.hbm.get((thing, word))
        array = self.operands.get(thing)
        if array is None:
            return Unknown(f"operand {thing}, whose values were not given")
        # What lies behind an operand's end is its padding.
        return int(array[word]) if word < len(array) else 0

    def operand(self, index):
        """An operand that is passed by its value."""
        return self._read("hbm", index, 0)

    def outputs(self):
        """{operand: {word: value}} of what scalar code wrote into operands."""
        found = {}
        for (thing, word), value in self.hbm.items():
            if thing < FIRST_SYMBOL:
                found.setdefault(thing, {})[word] = value
        return found
