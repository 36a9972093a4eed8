"""Decode context: each chip has some pages of every sequence. Outputs and log-sum-exps are merged.

Heads run out: a model with one KV head per layer has nothing to share out on eight chips but copies
of it, and a context of a million tokens may not fit one chip. Then the *keys* are shared out. A
page is on one chip, told by its index; each chip attends over the pages that it has, for all the
queries, and what it found is merged:

    page of a sequence   0    1    2    3    4         chip 0 sees pages 0 and 3,
    page index           2    9    12   1    6         chip 1 pages 1 and 4, chip 2 page 2
    its chip (4 each)    0    2    3    0    1         (index // pages per chip)

A new token is the last of its sequence, so it sees all other keys: no chip needs to know at which
positions its keys are, and any page may be on any chip. For the same reason this form takes at most
one new token per sequence.

What crosses the wire does not depend on the length of the context:

    all-gather    the lse of each query and head, 4 bytes, from each chip
    all-reduce    the sum of the weighted outputs, head_dim numbers for each query and head: in
                  float32, except where the TPU's compiler sees a bfloat16 out_dtype and takes that
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from rpa.parallel.cut import Form, refuse_window
from rpa.parallel.merge import merge_weights, weighted
from rpa.ragged import RaggedBatch
from rpa.streamed import live_lengths


@dataclass(frozen=True)
class DecodeContext(Form):
    """Share the pages out; the page indices count the pages of all chips, chip after chip."""

    def cuts(self, num_chips, num_kv_heads):
        """{array: dimension}: the pages of the cache."""
        return dict(kv_cache=0)

    def batches(self, batch, num_tokens, num_pages, num_chips):
        """The batch, if no sequence has more than one new token."""
        q_lens = np.diff(np.asarray(batch.cu_q_lens))[: int(batch.num_seqs)]
        if (q_lens > 1).any():
            raise ValueError(
                f"sequence {int(q_lens.argmax())} has q_len {int(q_lens.max())}, but "
                "DecodeContext takes at most one new token per sequence: run prompts by "
                "PrefillContext or Heads."
            )
        return [(batch, num_tokens, num_pages)]

    def on_chip(self, attention, num_chips, num_kv_heads):
        """Attention over the pages of this chip, merged with that of the others."""

        def attend(
            queries, keys, values, kv_cache, batch, *, update_kv_cache=True, use_causal_mask=True,
            attention_sink=None, return_lse=False, out_dtype=None, validate=None, **options,
        ):  # fmt: skip
            refuse_window(self, options)
            chip = jax.lax.axis_index(self.axis)
            local, is_last_here = local_batch(batch, chip, *kv_cache.shape[:2])
            output = jnp.zeros(queries.shape, jnp.float32)
            lse = jnp.full(queries.shape[:2], -jnp.inf)
            # Only the chip that has a sequence's last page stores the new token: one call for the
            # sequences of which that is this chip, and one that only reads, for the others.
            stored = is_last_here if update_kv_cache else jnp.zeros_like(is_last_here)
            for stores in (True, False) if update_kv_cache else (False,):
                part, rows, places = only(local, stored if stores else ~stored, len(queries))
                found, kv_cache, found_lse = attention(
                    queries[rows], keys[rows], values[rows], kv_cache, part, return_lse=True,
                    update_kv_cache=stores, out_dtype=jnp.float32, validate=False, **options,
                )  # fmt: skip
                is_in = places >= 0  # bool[num_tokens]
                output = jnp.where(is_in[:, None, None], found[places], output)
                lse = jnp.where(is_in[:, None], found_lse[places], lse)

            lses = jax.lax.all_gather(lse, self.axis)  # [num_chips, num_tokens, num_q_heads]
            weights, lse = merge_weights(lses, attention_sink)
            output = jax.lax.psum(weighted(output, weights[chip]), self.axis)
            output = output.astype(queries.dtype if out_dtype is None else out_dtype)
            return (output, kv_cache, lse) if return_lse else (output, kv_cache)

        return attend


def local_batch(batch, chip, num_pages, page_size):
    """The part of a batch whose pages are on one chip: of each sequence its pages, its tokens.

    Args:
        batch: page indices count the pages of all chips; no q_len is above 1.
        chip: which of them; may be traced.
        num_pages, page_size: of a chip's cache.

    Returns:
        The batch: kv_lens count the tokens on this chip, 0 where there is none, and page_indices
        its own pages, in the order of the sequence. And bool[max_num_seqs], whether the last page
        of a sequence is here.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1, 1], [11, 3], [[7, 1, 2], [5]])
    >>> local, is_last_here = local_batch(batch, chip=0, num_pages=4, page_size=4)
    >>> local.page_indices.reshape(2, 3)[0], local.kv_lens, is_last_here
    (Array([1, 2, 0], dtype=int32), Array([7, 0], dtype=int32), Array([ True, False], dtype=bool))
    """
    table = jnp.asarray(batch.page_indices).reshape(batch.max_num_seqs, -1)
    first_tokens = jnp.arange(batch.pages_per_seq) * page_size  # of each page
    tokens = jnp.clip(jnp.asarray(batch.kv_lens)[:, None] - first_tokens, 0, page_size)
    mine = (tokens > 0) & (table // num_pages == chip)  # [max_num_seqs, pages_per_seq]
    # Own pages first. Their order stays, so that the one that is not full is the last of them.
    is_other, pages = jnp.int32(~mine), jnp.where(mine, table % num_pages, 0)
    _, pages = jax.lax.sort((is_other, pages), dimension=1, is_stable=True, num_keys=1)
    kv_lens = jnp.where(mine, tokens, 0).sum(axis=1, dtype=jnp.int32)
    last_page = (tokens > 0).sum(axis=1, keepdims=True) - 1
    is_last_here = (mine & (jnp.arange(batch.pages_per_seq) == last_page)).any(axis=1)
    return replace(batch, kv_lens=kv_lens, page_indices=pages.reshape(-1)), is_last_here


def only(batch, chosen, num_tokens):
    """The chosen sequences of a batch of decodes that have a query and a key, as a batch of theirs.

    Args:
        batch: no q_len is above 1.
        chosen: bool[max_num_seqs].
        num_tokens: rows of the queries.

    Returns:
        The batch. i32[max_num_seqs], which row of the queries each of its rows is (those that it
        does not use are any). And i32[num_tokens], which of its rows each row is, or -1.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1, 0, 1], [11, 9, 3], [[0], [1], [2]])
    >>> part, rows, places = only(batch, jnp.array([False, True, True]), 2)
    >>> part.kv_lens[:1], part.cu_q_lens, rows[:1], places
    (Array([3], dtype=int32), Array([0, 1, 1, 1], dtype=int32), Array([1], dtype=int32), \
Array([-1,  0], dtype=int32))
    """
    starts, q_lens, kv_lens = live_lengths(batch)
    chosen &= (q_lens > 0) & (kv_lens > 0)
    num_chosen = chosen.sum(dtype=jnp.int32)
    order = jnp.argsort(~chosen, stable=True)  # the chosen first
    table = jnp.asarray(batch.page_indices).reshape(batch.max_num_seqs, -1)
    part = RaggedBatch(
        kv_lens=kv_lens[order],
        page_indices=table[order].reshape(-1),
        cu_q_lens=jnp.minimum(jnp.arange(batch.max_num_seqs + 1, dtype=jnp.int32), num_chosen),
        distribution=jnp.full(3, num_chosen),
    )
    seqs, _, owned = batch.token_positions(num_tokens)
    place = jnp.cumsum(chosen, dtype=jnp.int32) - 1  # of each chosen sequence among them
    return part, starts[order], jnp.where(owned & chosen[seqs], place[seqs], -1)
