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
    all-reduce    the sum of the weighted outputs, 4 * head_dim bytes for each query and head
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from rpa.parallel.cut import Form, refuse_window
from rpa.parallel.merge import merge_weights, weighted
from rpa.ragged import store_new_tokens


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
            num_pages, page_size = kv_cache.shape[:2]
            chip = jax.lax.axis_index(self.axis)
            # Page indices that count from this chip's first page: the others are out of range.
            batch = replace(batch, page_indices=batch.page_indices - chip * num_pages)
            if update_kv_cache:
                kv_cache = store_new_tokens(kv_cache, keys, values, batch)
            mine, has_key = local_batch(batch, queries.shape[0], num_pages, page_size)
            output, kv_cache, lse = attention(
                queries, keys, values, kv_cache, mine, use_causal_mask=False, validate=False,
                update_kv_cache=False, return_lse=True, out_dtype=jnp.float32, **options,
            )  # fmt: skip
            lse = jnp.where(has_key[:, None], lse, -jnp.inf)
            # [num_chips, num_tokens, num_q_heads]
            lses = jax.lax.all_gather(lse, self.axis)
            weights, lse = merge_weights(lses, attention_sink)
            output = jax.lax.psum(weighted(output, weights[chip]), self.axis)
            output = output.astype(queries.dtype if out_dtype is None else out_dtype)
            return (output, kv_cache, lse) if return_lse else (output, kv_cache)

        return attend


def local_batch(batch, num_tokens, num_pages, page_size):
    """The part of a batch whose pages are on one chip, as a batch of its own.

    Args:
        batch: page indices outside of [0, num_pages) are on other chips.
        num_tokens: rows of the queries.
        num_pages, page_size: of this chip's cache.

    Returns:
        The batch: of each sequence its pages here, in their order, and their tokens. And
        bool[num_tokens], whether this chip has a key for a query. Where it has none the sequence
        is given one token of some page, because a query without a key is an error; what comes of
        it has to be dropped.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1, 1], [11, 3], [[7, 1, 2], [5]])
    >>> mine, has_key = local_batch(batch, 2, num_pages=4, page_size=4)
    >>> mine.page_indices.reshape(2, 3)[0], mine.kv_lens, has_key
    (Array([1, 2, 0], dtype=int32), Array([7, 1], dtype=int32), Array([ True, False], dtype=bool))
    """
    table = jnp.asarray(batch.page_indices).reshape(batch.max_num_seqs, -1)
    first_tokens = jnp.arange(batch.pages_per_seq) * page_size  # of each page
    tokens = jnp.clip(jnp.asarray(batch.kv_lens)[:, None] - first_tokens, 0, page_size)
    mine = (tokens > 0) & (table >= 0) & (table < num_pages)
    # Own pages first. Their order stays, so that the one that is not full is the last of them.
    order = jnp.argsort(~mine, axis=1, stable=True)
    pages = jnp.take_along_axis(jnp.where(mine, table, 0), order, axis=1)
    kv_lens = jnp.where(mine, tokens, 0).sum(axis=1, dtype=jnp.int32)
    local = replace(batch, kv_lens=jnp.maximum(kv_lens, 1), page_indices=pages.reshape(-1))
    seqs, _, owned = batch.token_positions(num_tokens)
    return local, owned & (kv_lens[seqs] > 0)
