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

Every step except the first is two whole squares on every chip: a chunk is either seen as a whole or
not at all. So the mask is needed for a chip's own keys only, and no chip waits for another.

To the rung on a chip its own two chunks are one sequence of new tokens, which it stores: what is
missing between them does not matter to a causal mask. What visits is laid out as a cache
(`rpa.paging.pack_kv`), in pages of its own, and is one more cache that the rung only reads.

    collective-permute    2 chunks of keys and values to the next chip, num_chips - 1 times
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rpa.paging import lanes_are_shared, pack_kv
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
        in the order of the prompt. Chip after chip, its early chunk and its late one.

    >>> zigzag(8, 2)
    array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    chunks = np.arange(num_tokens).reshape(2 * num_chips, -1)
    return np.concatenate([chunks[[i, -1 - i]].reshape(-1) for i in range(num_chips)])


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
            chip, (num_pages, page_size) = jax.lax.axis_index(self.axis), kv_cache.shape[:2]
            num_tokens = queries.shape[0]
            chunk = _chunk_size(num_tokens, page_size, use_causal_mask)
            own, is_token = own_batch(batch, chip, num_chips, chunk, num_pages, page_size)
            options |= dict(return_lse=True, out_dtype=jnp.float32, validate=False)

            packed = pack_kv(
                keys, values, share_lanes=lanes_are_shared(kv_cache.shape, *keys.shape[1:])
            )
            visiting = packed.reshape(-1, page_size, *packed.shape[1:])
            if not update_kv_cache:  # keys and values are in the cache, and not given
                visiting = kv_cache[own.page_indices]
            # The late chunk first: where the early one sees nothing, its rows are padding.
            late_first = [jnp.roll(x, chunk, axis=0) for x in (queries, keys, values)]

            def send_on(visiting):
                to_next = [(i, (i + 1) % num_chips) for i in range(num_chips)]
                return jax.lax.ppermute(visiting, self.axis, to_next)

            def attend_to_visitor(step, visiting, found):
                is_earlier = (chip - step) % num_chips < chip
                output, _, lse = attention(
                    *late_first, visiting, visitor_batch(is_earlier, chunk, page_size),
                    use_causal_mask=False, update_kv_cache=False, **options,
                )  # fmt: skip
                return _merge_two(found, (output, lse))

            def one_step(step, state):
                visiting, found = state
                arriving = send_on(visiting)  # travels while this chip computes
                return arriving, attend_to_visitor(step, visiting, found)

            last = num_chips - 1
            arriving = send_on(visiting) if last else visiting
            output, kv_cache, lse = attention(
                queries, keys, values, kv_cache, own, update_kv_cache=update_kv_cache, **options
            )
            found = [jnp.roll(x, chunk, axis=0) for x in (output, lse)]
            arriving, found = jax.lax.fori_loop(1, last, one_step, (arriving, tuple(found)))
            if last:  # nothing is sent on after the last visit
                found = attend_to_visitor(last, arriving, found)

            output, lse = (jnp.roll(x, chunk, axis=0) for x in found)
            lse = jnp.where(is_token[:, None], lse, -jnp.inf)
            output, lse = merge(output[None], lse[None], attention_sink)
            output = output.astype(queries.dtype if out_dtype is None else out_dtype)
            return (output, kv_cache, lse) if return_lse else (output, kv_cache)

        return attend


def own_batch(batch, chip, num_chips, chunk, num_pages, page_size):
    """A chip's own chunks as one sequence of new tokens, and which rows are tokens, bool[rows].

    The tokens come first: if the early chunk is not full, the late one is empty.

    >>> batch, _ = RaggedBatch.from_lengths([14], [14], [[0, 5, 6, 3]])
    >>> own, is_token = own_batch(batch, 0, num_chips=2, chunk=4, num_pages=4, page_size=4)
    >>> own.page_indices, own.kv_lens, is_token.sum()
    (Array([0, 3], dtype=int32), Array([6], dtype=int32), Array(6, dtype=int32))
    """
    chunks = jnp.stack([jnp.int32(chip), 2 * num_chips - 1 - chip])
    positions = (chunks[:, None] * chunk + jnp.arange(chunk)).reshape(-1)
    is_token = positions < jnp.asarray(batch.kv_lens)[0]
    num_own = is_token.sum(dtype=jnp.int32)
    own = RaggedBatch(
        kv_lens=num_own[None],
        page_indices=jnp.asarray(batch.page_indices)[positions[::page_size] // page_size]
        - chip * num_pages,
        cu_q_lens=jnp.stack([jnp.int32(0), num_own]),
        distribution=jnp.array([0, 0, 1]),
    )
    return own, is_token


def visitor_batch(is_earlier, chunk, page_size) -> RaggedBatch:
    """What a chip sees of a visitor: all its queries the early chunk, or the late ones both chunks.

    Args:
        is_earlier: whether the visitor's early chunk is before this chip's; may be traced.
        chunk, page_size: in tokens.

    Returns:
        The queries of the late chunk and then of the early one, as two sequences.

    >>> visitor_batch(True, 8, 4).kv_lens, visitor_batch(False, 8, 4).cu_q_lens
    (Array([8, 8], dtype=int32), Array([0, 8, 8], dtype=int32))
    """
    num_pages, chunk = 2 * chunk // page_size, jnp.int32(chunk)
    late_kv_len = jnp.where(is_earlier, chunk, 2 * chunk)
    early_q_len = early_kv_len = jnp.where(is_earlier, chunk, 0)
    return RaggedBatch(
        kv_lens=jnp.stack([late_kv_len, early_kv_len]),
        page_indices=jnp.tile(jnp.arange(num_pages, dtype=jnp.int32), 2),
        cu_q_lens=jnp.stack([jnp.int32(0), chunk, chunk + early_q_len]),
        distribution=jnp.array([0, 0, 2]),
    )


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
