"""Prefill context: each chip has some tokens of one long prompt. Keys and values go in a ring.

Each chip keeps its queries. The keys and values of all chips visit it one after the other; it
attends over what has arrived while that travels on (Liu et al. 2023, ring attention, arXiv
2310.01889). What it finds is merged by the log-sum-exp.

Under a causal mask the last tokens have the most to do. So the prompt is cut into two chunks for
each chip, and chip i has chunk i and chunk 2 * num_chips - 1 - i, an early and a late one: the
*zigzag*. Chunks of 4 chips, and what chip 1 computes while the keys of each chip visit it:

    chunk         0  1  2  3  4  5  6  7        visiting     queries of chunk 1   of chunk 6
    chip          0  1  2  3  3  2  1  0        chip 1 (own) 1, causal            1, and 6 causal
                                                chip 0       0                    0
                                                chip 3       -                    3 and 4
                                                chip 2       -                    2 and 5

Every step but the first is two whole squares on every chip: a chunk is either seen as a whole or
not at all. So the mask is needed for a chip's own keys only, and no chip waits for another.

What visits a chip is laid out as a cache (`rpa.paging.pack_kv`), in pages of its own: to the rung
that runs on the chip it is one more cache, that it reads and does not update.

    collective-permute    2 chunks of keys and values to the next chip, num_chips - 1 times
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rpa.paging import lanes_are_shared, pack_kv, store_kv
from rpa.parallel.cut import Form, refuse_window
from rpa.parallel.merge import merge
from rpa.ragged import RaggedBatch


def zigzag(num_tokens, num_chips):
    """Which token of the prompt stands in which row of queries, keys and values.

    Args:
        num_tokens: of the prompt, padding included.
        num_chips: of the ring; `num_tokens` is a multiple of twice as many.

    Returns:
        i64[num_tokens]: `queries = prompt[zigzag(...)]`, and `output[np.argsort(zigzag(...))]` is
        in the order of the prompt. Chip after chip, its late chunk before its early one: in most
        steps an early chunk has nothing to do, and so stands where padding rows stand.

    >>> zigzag(8, 2)
    array([6, 7, 0, 1, 4, 5, 2, 3])
    """
    chunks = np.arange(num_tokens).reshape(2 * num_chips, -1)
    return np.concatenate([chunks[[-1 - i, i]].reshape(-1) for i in range(num_chips)])


@dataclass(frozen=True)
class PrefillContext(Form):
    """Share the tokens of one prompt out: a batch of one sequence, nothing of it cached before.

    Rows of queries, keys and values are in the order of `zigzag`; rows past the prompt are padding.
    A chip must have the pages of its chunks, so a chunk is a whole number of pages. As with
    `DecodeContext` the page indices count the pages of all chips, chip after chip: which may then
    decode from this cache.
    """

    def cuts(self, num_chips, num_kv_heads):
        """{array: dimension}: tokens, and pages of the cache."""
        return dict.fromkeys(("queries", "keys", "values", "kv_cache", "output", "lse"), 0)

    def batches(self, batch, num_tokens, num_pages, num_chips):
        """Nothing is left to check once it is one whole prompt whose pages are on their chips."""
        q_len, kv_len = int(batch.cu_q_lens[1]), int(batch.kv_lens[0])
        if int(batch.num_seqs) != 1 or q_len != kv_len or q_len > num_tokens:
            raise ValueError(
                f"the batch has {int(batch.num_seqs)} sequences, the first with q_len {q_len} and "
                f"kv_len {kv_len}, and there are {num_tokens} rows: PrefillContext takes one "
                "prompt of which nothing is cached, and rows for all of it."
            )
        return []

    def on_chip(self, attention, num_chips, num_kv_heads):
        """Attention of the queries of this chip over the keys of all chips."""

        def attend(
            queries, keys, values, kv_cache, batch, *, update_kv_cache=True, use_causal_mask=True,
            attention_sink=None, return_lse=False, out_dtype=None, validate=None, **options,
        ):  # fmt: skip
            refuse_window(self, options)
            chip, page_size = jax.lax.axis_index(self.axis), kv_cache.shape[1]
            chunk = _chunk_size(queries.shape[0], page_size, use_causal_mask)
            positions = _positions(chip, chunk, num_chips)
            is_token = positions < batch.kv_lens[0]
            # Padding is after the prompt, so no token sees it; but 0 * NaN is NaN.
            keys, values = (jnp.where(is_token[:, None, None], x, 0) for x in (keys, values))
            if update_kv_cache:
                pages = jnp.asarray(batch.page_indices)[positions // page_size]
                own = jnp.where(is_token, pages - chip * kv_cache.shape[0], -1)
                kv_cache = store_kv(kv_cache, keys, values, own, positions % page_size)

            share_lanes = lanes_are_shared(kv_cache.shape, *keys.shape[1:])
            packed = pack_kv(keys, values, share_lanes=share_lanes)
            visiting = packed.reshape(-1, page_size, *packed.shape[1:])

            def attend_to(visiting, batch, causal):
                output, _, lse = attention(
                    queries, keys, values, visiting, batch, use_causal_mask=causal,
                    update_kv_cache=False, validate=False, return_lse=True, out_dtype=jnp.float32,
                    **options,
                )  # fmt: skip
                return output, lse

            def send_on(visiting):
                to_next = [(i, (i + 1) % num_chips) for i in range(num_chips)]
                return jax.lax.ppermute(visiting, self.axis, to_next)

            def attend_to_visitor(step, visiting, found):
                is_earlier = (chip - step) % num_chips < chip
                batch = visitor_batch(is_earlier, chunk, page_size)
                return _merge_two(found, attend_to(visiting, batch, False))

            def one_step(step, state):
                visiting, found = state
                arriving = send_on(visiting)  # travels while this chip computes
                return arriving, attend_to_visitor(step, visiting, found)

            last = num_chips - 1
            arriving = send_on(visiting) if last else visiting
            found = attend_to(visiting, own_batch(chunk, page_size), True)
            arriving, found = jax.lax.fori_loop(1, last, one_step, (arriving, found))
            if last:  # nothing is sent on after the last visit
                found = attend_to_visitor(last, arriving, found)
            output, lse = merge(*(x[None] for x in found), attention_sink)
            output = jnp.where(is_token[:, None, None], output, 0)
            output = output.astype(queries.dtype if out_dtype is None else out_dtype)
            lse = jnp.where(is_token[:, None], lse, -jnp.inf)
            return (output, kv_cache, lse) if return_lse else (output, kv_cache)

        return attend


def own_batch(chunk, page_size) -> RaggedBatch:
    """A chip's own chunks as two sequences: the late one sees the early one, and both themselves.

    >>> own_batch(8, 4).page_indices.reshape(2, -1)
    Array([[2, 3, 0, 1],
           [2, 3, 0, 1]], dtype=int32)
    """
    return _two_sequences([2 * chunk, chunk], [chunk, chunk], chunk, page_size)


def visitor_batch(is_earlier, chunk, page_size) -> RaggedBatch:
    """What a chip sees of a visitor's chunks: both queries the early one, or the late queries both.

    Args:
        is_earlier: whether the visitor's early chunk is before this chip's; may be traced.
        chunk, page_size: in tokens.

    >>> visitor_batch(True, 8, 4).kv_lens, visitor_batch(False, 8, 4).cu_q_lens
    (Array([8, 8], dtype=int32), Array([0, 8, 8], dtype=int32))
    """
    kv_lens = [jnp.where(is_earlier, chunk, 2 * chunk), jnp.where(is_earlier, chunk, 0)]
    return _two_sequences(kv_lens, [chunk, jnp.where(is_earlier, chunk, 0)], chunk, page_size)


def _two_sequences(kv_lens, q_lens, chunk, page_size):
    """Queries of the late and of the early chunk, over a visitor's pages: early before late."""
    late, early = np.arange(2 * chunk // page_size).reshape(2, -1)  # as the rows are
    pages = np.tile(np.concatenate([early, late]), 2)
    lens = (jnp.stack([jnp.int32(n) for n in lens]) for lens in (kv_lens, [0, *q_lens]))
    kv_lens, cu_q_lens = next(lens), jnp.cumsum(next(lens), dtype=jnp.int32)
    return RaggedBatch(kv_lens, jnp.asarray(pages, jnp.int32), cu_q_lens, jnp.array([0, 0, 2]))


def _positions(chip, chunk, num_chips):
    """Positions of the tokens of a chip, i32[2 * chunk], the late chunk first."""
    late, early = 2 * num_chips - 1 - chip, chip
    tokens = jnp.arange(chunk)
    return jnp.concatenate([late * chunk + tokens, early * chunk + tokens])


def _merge_two(a, b):
    return merge(*(jnp.stack(pair) for pair in zip(a, b, strict=True)))


def _chunk_size(num_rows, page_size, use_causal_mask):
    if num_rows % (2 * page_size):
        raise ValueError(
            f"a chip has {num_rows} rows of queries, but PrefillContext needs two chunks of whole "
            f"pages of {page_size}: pad the prompt to a multiple of {2 * page_size} per chip."
        )
    if not use_causal_mask:
        raise ValueError(
            "use_causal_mask=False: the zigzag of PrefillContext is made for the causal mask. "
            "Leave it out."
        )
    return num_rows // 2
