"""The page table as the kernel reads it: in HBM, in chunks, with contiguous blocks marked.

SMEM is small (1 MiB), and a long context has many pages. So the table stays in HBM, and every work
item brings the entries of its own KV block in one aligned chunk.

In a new pool the pages of a sequence are contiguous, and a KV block of 64 pages is one copy.
Comparing 64 entries costs the scalar core more than starting 64 copies (some five cycles each). So
contiguity is computed before the kernel, for all blocks at once, and stored in the sign bit of each
block's first entry.
"""

from typing import NamedTuple

import jax.numpy as jnp

from rpa import compat
from rpa.kernel.problem import align
from rpa.kernel.tricks import PAGES_UNROLLED
from rpa.paging import cdiv

TABLE_TILE_WORDS = compat.SMEM_TILE_WORDS
"""A chunk starts at, and is, a multiple of this."""


class Chunks(NamedTuple):
    """How the page table is cut."""

    whole_pages: int  # that fill a KV block
    pages_unrolled: int  # copies of whole pages per iteration of their loop
    chunk_words: int  # entries fetched for a KV block: its pages, wherever they begin in a tile
    table_words: int  # of the table in HBM, padded so that the last chunk ends inside it


def chunks(problem, bkv) -> Chunks:
    """How the page table is cut for KV blocks of bkv tokens."""
    whole_pages = bkv // problem.page_size
    unrolled = min(PAGES_UNROLLED, whole_pages)
    # A window may begin inside of a page; and the unrolled loop reads entries that it passes over.
    reach = align(whole_pages, unrolled) + (problem.sliding_window is not None)
    chunk_words = align(reach + TABLE_TILE_WORDS - 1, TABLE_TILE_WORDS)
    entries = problem.max_num_seqs * problem.pages_per_seq
    table_words = max(align(entries + reach, TABLE_TILE_WORDS), chunk_words)
    return Chunks(whole_pages, unrolled, chunk_words, table_words)


def prepare(plan, page_indices, kv_lens):
    """The page table of one kernel: padded, so that every chunk of it ends inside, and marked.

    Args:
        page_indices: i32[max_num_seqs * pages_per_seq]; kv_lens: i32[max_num_seqs].

    Returns:
        i32[table_words].
    """
    p, table = plan.problem, plan.table
    if plan.tricks.marks_contiguous:
        rows = page_indices.reshape(p.max_num_seqs, p.pages_per_seq)
        num_pages = cdiv(kv_lens, p.page_size)
        page_indices = mark_contiguous(rows, num_pages, table.whole_pages).reshape(-1)
    return jnp.pad(page_indices, (0, table.table_words - page_indices.size))


def mark_contiguous(rows, num_pages, whole_pages):
    """Mark the first entry of each block whose pages are contiguous.

    Args:
        rows: i32[max_num_seqs, pages_per_seq], the page table.
        num_pages: i32[max_num_seqs], how many entries of a row are in use.
        whole_pages: entries of a block; the last block of a row may have fewer.

    Returns:
        i32, shaped like rows: `~page` where a block is contiguous, else `page`. Entries that are
        not in use do not matter.

    >>> mark_contiguous(jnp.array([[4, 5, 6, 9, 3, 0]]), jnp.array([5]), whole_pages=2)
    Array([[-5,  5,  6,  9, -4,  0]], dtype=int32)
    """
    num_seqs, pages_per_seq = rows.shape
    missing = -pages_per_seq % whole_pages
    blocks = jnp.pad(rows, ((0, 0), (0, missing))).reshape(num_seqs, -1, whole_pages)
    # Three dimensions each: a caller may have forbidden JAX to add the missing ones.
    in_row = jnp.arange(pages_per_seq + missing).reshape(1, *blocks.shape[1:])
    in_block = jnp.arange(whole_pages)[None, None]
    is_used = in_row < num_pages[:, None, None]
    goes_on = blocks == blocks[..., :1] + in_block
    are_contiguous = jnp.all(goes_on | ~is_used, axis=2, keepdims=True)
    marked = jnp.where(are_contiguous & (in_block == 0), ~blocks, blocks)
    return marked.reshape(num_seqs, -1)[:, :pages_per_seq]


def is_contiguous(entry):
    """Whether the block that begins with an entry is contiguous."""
    return entry < 0


def page(entry):
    """The page of an entry, marked or not.

    >>> page(jnp.array([-5, 5])).tolist()
    [4, 5]
    """
    return jnp.maximum(entry, ~entry)
