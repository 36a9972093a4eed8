"""Batches that the lab asks about: lengths as people write them, and a page table to go with them.

Where the pages of a sequence lie decides how many copies a kernel makes that joins neighbours, so
each batch says it: "shuffled", as in a pool that was used for a while, or "adjacent", as in a new
one.
"""

import argparse
import re

import numpy as np

from rpa.paging import cdiv
from rpa.ragged import RaggedBatch

LENGTHS = re.compile(r"(\d+)x(\d+)/(\d+)")

MOST_TOKENS = 2**26
"""Cached tokens of a batch: 256 GB of a Llama 3 8B's layer, more than any chip has."""

PAGES = ("shuffled", "adjacent")
"""Where the pages of a sequence lie."""


def parse_batch(text) -> list[tuple[int, int, int]]:
    """The lengths in an argument of a command: [(count, q_len, kv_len), ...].

    Raises:
        argparse.ArgumentTypeError: if it is not written as COUNTxQ_LEN/KV_LEN.

    >>> parse_batch("128x1/4096,1x512/2048")
    [(128, 1, 4096), (1, 512, 2048)]
    """
    groups = []
    for part in text.split(","):
        match = LENGTHS.fullmatch(part.strip())
        if match is None or int(match[2]) > int(match[3]):
            raise argparse.ArgumentTypeError(
                f"{part!r} is no COUNTxQ_LEN/KV_LEN with Q_LEN at most KV_LEN, like 128x1/4096"
            )
        groups.append(tuple(map(int, match.groups())))
        if not (groups[-1][0] and groups[-1][2]):
            raise argparse.ArgumentTypeError(f"{part!r} has no sequence, or one without a token")
    if not any(q_len for _, q_len, _ in groups):
        raise argparse.ArgumentTypeError(f"{text!r} has no new token: there is nothing to compute")
    num_tokens = sum(count * kv_len for count, _, kv_len in groups)
    if num_tokens > MOST_TOKENS:
        raise argparse.ArgumentTypeError(
            f"{text!r} has {num_tokens:,} tokens, and a batch may have {MOST_TOKENS:,}"
        )
    return groups


def lengths_of(groups) -> list[tuple[int, int]]:
    """(q_len, kv_len) of each sequence of such groups.

    >>> lengths_of([(2, 1, 40), (1, 8, 16)])
    [(1, 40), (1, 40), (8, 16)]
    """
    return [(q_len, kv_len) for count, q_len, kv_len in groups for _ in range(count)]


def make_batch(lengths, page_size, pages="shuffled", **room) -> RaggedBatch:
    """A batch of sequences, each with pages of its own.

    Args:
        lengths: (q_len, kv_len) of each sequence, decodes first if their order matters.
        page_size: tokens of a page.
        pages: one of PAGES.
        **room: `max_num_seqs` and `pages_per_seq` of `RaggedBatch.from_lengths`.

    Raises:
        ValueError: for other pages, or lengths that do not fit the room.

    >>> make_batch([(1, 40), (1, 9)], 16, "adjacent").page_indices.tolist()
    [0, 1, 2, 3, -1, -1]
    >>> sorted(make_batch([(1, 40)], 16).page_indices.tolist())
    [0, 1, 2]
    """
    if pages not in PAGES:
        raise ValueError(f"pages is {pages!r}; expected one of {', '.join(PAGES)}.")
    q_lens, kv_lens = zip(*lengths, strict=True)
    ends = np.cumsum([cdiv(kv_len, page_size) for kv_len in kv_lens])
    order = np.arange(ends[-1])
    if pages == "shuffled":
        order = np.random.default_rng(0).permutation(order)
    return RaggedBatch.from_lengths(q_lens, kv_lens, np.split(order, ends[:-1]), **room)[0]


def metadata_of(batch: RaggedBatch) -> tuple[np.ndarray, ...]:
    """The four arrays of a batch in the order of the drop-in signature.

    >>> [len(x) for x in metadata_of(make_batch([(1, 40)], 16))]
    [1, 3, 2, 3]
    """
    names = ("kv_lens", "page_indices", "cu_q_lens", "distribution")
    return tuple(np.asarray(getattr(batch, name)) for name in names)
