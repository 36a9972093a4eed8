"""Sequences: each chip has a batch of its own, and pages of its own. Nothing crosses the wire.

A server with several replicas of a model in one program: rank r gets its requests, its `PagePool`,
its page indices from 0. All ranks run the same program, so their batches have the same room; a rank
with less to do has idle slots, and a rank without work has the batch of no sequences.
"""

from dataclasses import dataclass

import jax
import numpy as np

from rpa.parallel.cut import Form
from rpa.ragged import RaggedBatch


def stack(batches) -> RaggedBatch:
    """The batches of all ranks, as `Sequences` shares them out: each array one after the other.

    Args:
        batches: a `RaggedBatch` for each rank, with the same max_num_seqs and pages_per_seq. Page
            indices count the pages of the rank. Tokens are stacked the same way: rank r owns rows
            [r * num_tokens, (r + 1) * num_tokens) of queries, keys and values.

    Returns:
        A container of the same four arrays, each `len(batches)` times as long.

    Raises:
        ValueError: if they have not the same room.

    >>> busy, _ = RaggedBatch.from_lengths([1], [5], [[3]])
    >>> idle, _ = RaggedBatch.from_lengths([], [], [], max_num_seqs=1, pages_per_seq=1)
    >>> stack([busy, idle]).cu_q_lens.tolist()
    [0, 1, 0, 0]
    """
    rooms = {(batch.max_num_seqs, batch.pages_per_seq) for batch in batches}
    if len(rooms) != 1:
        raise ValueError(
            f"the ranks have room for (sequences, pages of a sequence) {sorted(rooms)}, but need "
            "the same: fix max_num_seqs and pages_per_seq of RaggedBatch.from_lengths."
        )
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


@dataclass(frozen=True)
class Sequences(Form):
    """Share sequences out; batch and arrays are those of all ranks, one after the other."""

    def cuts(self, num_chips, num_kv_heads):
        """{array: its first dimension}: tokens, pages, and all that says whose they are."""
        names = ("queries", "keys", "values", "kv_cache", "batch", "output", "lse")
        return dict.fromkeys(names, 0)

    def on_chip(self, attention, num_chips, num_kv_heads):
        """Attention as it is: a rank has all that it needs."""
        return attention

    def batches(self, batch, num_tokens, num_pages, num_chips):
        """The batch of each rank, undoing `stack`."""

        def of_rank(r):
            return jax.tree.map(lambda array: np.split(np.asarray(array), num_chips)[r], batch)

        sizes = (num_tokens // num_chips, num_pages // num_chips)
        return [(of_rank(r), *sizes) for r in range(num_chips)]
