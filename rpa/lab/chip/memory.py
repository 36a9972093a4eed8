"""Memory of one core: buffers in one row of words, and a check of every access.

An address is a number of bytes, as the program computes it. Buffers lie far apart, and what lies
between them belongs to nothing: an access that leaves its buffer is an error with a sentence.
"""

import bisect
from typing import NamedTuple

import numpy as np

from rpa.lab.chip.errors import KernelFault
from rpa.lab.chip.layout import POISON
from rpa.lab.chip.registers import LANES, SUBLANES

GAP_WORDS = 4096
"""Words between two buffers: more than the reach of an access that is one register too far."""

ALIGN_WORDS = 1024
"""Buffers begin at whole registers."""


class Buffer(NamedTuple):
    """Words `first` to `end` - 1 of the memory."""

    name: str
    space: str
    first: int
    end: int

    @property
    def address(self) -> int:
        """In bytes."""
        return 4 * self.first


class Memory:
    """Words of 32 bits, cut into buffers.

    Attributes:
        words: u32[size].
    """

    def __init__(self, buffers):
        """Place buffers: a list of (name, space, number of words)."""
        self.buffers, end = [], GAP_WORDS
        for name, space, num_words in buffers:
            self.buffers.append(Buffer(name, space, end, end + num_words))
            end += _room(num_words)
        self._set(np.full(end, POISON))

    def add(self, name, space, num_words) -> Buffer:
        """Place one more buffer."""
        first = len(self.words)
        self.buffers.append(Buffer(name, space, first, first + num_words))
        self._set(np.concatenate([self.words, np.full(_room(num_words), POISON)]))
        return self.buffers[-1]

    def _set(self, words):
        self.words = words
        self._integers, self._floats = words.view(np.int32), words.view(np.float32)
        self._rows = words.reshape(-1, LANES)  # buffers begin at whole rows
        self._starts = [buffer.first for buffer in self.buffers]

    def contents(self, buffer) -> np.ndarray:
        """The words of a buffer, to read and to write: u32[num_words]."""
        return self.words[buffer.first : buffer.end]

    def check(self, access, first, end, *spaces):
        """Raise unless words first to end - 1 lie inside one buffer of one of these spaces."""
        place = bisect.bisect_right(self._starts, first) - 1
        buffer = self.buffers[max(place, 0)]
        if place < 0 or end > buffer.end:
            raise KernelFault(
                f"{access} of words {first - buffer.first} to {end - 1 - buffer.first} leaves "
                f"{buffer.name}, which has words 0 to {buffer.end - 1 - buffer.first}."
            )
        if buffer.space not in spaces:
            raise KernelFault(f"{access} in {buffer.name}, which lies in {buffer.space}.")

    # --- The scalar core: one word of SMEM

    def load_integer(self, address) -> int:
        """An i32 of SMEM."""
        self.check("a scalar load", address // 4, address // 4 + 1, "smem")
        return self._integers[address // 4].item()

    def load_float(self, address) -> np.float32:
        """An f32 of SMEM."""
        self.check("a scalar load", address // 4, address // 4 + 1, "smem")
        return self._floats[address // 4]

    def store_scalar(self, address, value):
        """Store an i32 or f32 in SMEM."""
        self.check("a scalar store", address // 4, address // 4 + 1, "smem")
        words = self._floats if isinstance(value, np.float32) else self._integers
        words[address // 4] = value

    # --- The vector core: rows of 128 words of VMEM

    def load(self, address, sublanes=range(SUBLANES), stride=1) -> np.ndarray:
        """A register, u32[8, 128]: sublane s from row `address / 512 + s * stride`.

        Sublanes that are not asked for are poison.
        """
        rows = self._rows_of("a load", address, sublanes, stride)
        if len(sublanes) == SUBLANES:
            return self._rows[rows]
        register = np.full((SUBLANES, LANES), POISON)
        register[sublanes] = self._rows[rows]
        return register

    def store(self, address, words, sublanes=range(SUBLANES), stride=1, lanes=None):
        """Store the sublanes of a register, u32[8, 128], or of these the words of a mask."""
        rows = self._rows_of("a store", address, sublanes, stride)
        if lanes is None:
            self._rows[rows] = words[sublanes]
        else:
            self._rows[rows] = np.where(lanes[sublanes], words[sublanes], self._rows[rows])

    def load_rows(self, address, offsets) -> np.ndarray:
        """A register of rows at any offsets, in rows, from the address."""
        first = address // 4
        for offset in offsets:
            self.check("a load", first + LANES * offset, first + LANES * (offset + 1), "vmem")
        return self._rows[first // LANES + np.array(offsets)]

    def _rows_of(self, access, address, sublanes, stride):
        """Numbers of the rows, checked; an address inside a row is refused."""
        if address % (4 * LANES):
            raise KernelFault(f"{access} at byte {address}, which is inside a row of 128 words.")
        first = address // (4 * LANES)
        rows = [first + s * stride for s in sublanes]
        if rows:
            low, high = min(rows[0], rows[-1]), max(rows[0], rows[-1])
            self.check(access, LANES * low, LANES * (high + 1), "vmem")
        return rows


def _room(num_words):
    """Words that a buffer takes with the gap behind it."""
    return -(-num_words // ALIGN_WORDS) * ALIGN_WORDS + GAP_WORDS
