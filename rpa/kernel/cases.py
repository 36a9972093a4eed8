"""Which sequences each kernel computes: decode, chunked prefill, mixed.

`distribution` (i, j, k) sorts the sequences of a batch. Each kind has a kernel of its own because
the best tiles differ: a decode has one query token per sequence and waits for HBM, a prefill has
hundreds and waits for the MXU.
"""

import enum


class Case(enum.Enum):
    """A kernel's name, and the first and last entry of `distribution` that bound its sequences."""

    DECODE = ("decode", None, 0)
    PREFILL = ("prefill", 0, 1)
    MIXED = ("mixed", 1, 2)
    # Without a chunk_prefill_size there is no kernel for [i, j): v3 then computes nothing for
    # them and returns the queries as their output. Here the mixed kernel takes them along.
    PREFILL_AND_MIXED = ("mixed", 0, 2)

    def __init__(self, label, first, last):
        self.label = label
        self.first_entry = first
        self.last_entry = last

    @property
    def is_last(self):
        """Whether it is the last kernel of a call, which fills the rows of no sequence."""
        return self.last_entry == 2

    def bounds(self, distribution):
        """First sequence, and one past the last.

        >>> Case.PREFILL_AND_MIXED.bounds([3, 5, 8])
        (3, 8)
        """
        first = 0 if self.first_entry is None else distribution[self.first_entry]
        return first, distribution[self.last_entry]


def cases_of(chunk_prefill_size):
    """The kernels of one call, in order, each with its largest q_len (None: any).

    >>> [(case.name, max_q_len) for case, max_q_len in cases_of(None)]
    [('DECODE', 1), ('PREFILL_AND_MIXED', None)]
    """
    if chunk_prefill_size is None:
        return [(Case.DECODE, 1), (Case.PREFILL_AND_MIXED, None)]
    return [(Case.DECODE, 1), (Case.PREFILL, chunk_prefill_size), (Case.MIXED, None)]
