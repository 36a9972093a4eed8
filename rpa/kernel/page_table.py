"""The page table as the kernel reads it: blocks whose pages lie side by side are marked.

In a new pool the pages of a sequence lie one after the other, and a KV block of 64 pages is one
copy. To find that out, the scalar core would compare 64 entries: more work than to start 64 copies
(some five cycles each). So it is found out before the kernel, for all blocks at once, and told in a
bit of the page table that nothing else uses: the sign of a block's first entry.
"""

import jax.numpy as jnp

from rpa.paging import cdiv


def prepare(plan, page_indices, kv_lens):
    """The page table of one kernel: padded, so that every chunk of it ends inside, and marked.

    Args:
        page_indices: i32[max_num_seqs * pages_per_seq]; kv_lens: i32[max_num_seqs].

    Returns:
        i32[plan.table_words].
    """
    p = plan.problem
    if marks(plan):
        rows = page_indices.reshape(p.max_num_seqs, p.pages_per_seq)
        page_indices = mark_contiguous(rows, cdiv(kv_lens, p.page_size), plan.whole_pages).reshape(
            -1
        )
    return jnp.pad(page_indices, (0, plan.table_words - page_indices.size))


def mark_contiguous(rows, num_pages, whole_pages):
    """Mark the first entry of each block whose pages lie side by side.

    Args:
        rows: i32[max_num_seqs, pages_per_seq], the page table.
        num_pages: i32[max_num_seqs], how many entries of a row are in use.
        whole_pages: entries of a block; the last block of a row may have fewer.

    Returns:
        i32, shaped like rows: `~page` where a block is a run, else `page`. What is not in use does
        not matter.

    >>> mark_contiguous(jnp.array([[4, 5, 6, 9, 3, 0]]), jnp.array([5]), whole_pages=2)
    Array([[-5,  5,  6,  9, -4,  0]], dtype=int32)
    """
    num_seqs, pages_per_seq = rows.shape
    missing = -pages_per_seq % whole_pages
    blocks = jnp.pad(rows, ((0, 0), (0, missing))).reshape(num_seqs, -1, whole_pages)
    in_row = jnp.arange(pages_per_seq + missing).reshape(blocks.shape[1:])
    in_block = jnp.arange(whole_pages)
    is_used = in_row < num_pages[:, None, None]
    goes_on = blocks == blocks[..., :1] + in_block
    is_contiguous = jnp.all(goes_on | ~is_used, axis=2, keepdims=True)
    marked = jnp.where(is_contiguous & (in_block == 0), ~blocks, blocks)
    return marked.reshape(num_seqs, -1)[:, :pages_per_seq]


def marks(plan):
    """Whether blocks are marked: with a window they do not begin where a page does."""
    return plan.problem.sliding_window is None


def is_contiguous(entry):
    """Whether the block that begins with an entry is a run."""
    return entry < 0


def page(entry):
    """The page of an entry, marked or not.

    >>> page(jnp.array([-5, 5])).tolist()
    [4, 5]
    """
    return jnp.maximum(entry, ~entry)
