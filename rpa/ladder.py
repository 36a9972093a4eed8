"""The ladder: every rung under one signature, so that one can be swapped for the next.

    attention(queries, keys, values, kv_cache, batch, *, sm_scale) -> (output, kv_cache)

    queries       [num_tokens, num_q_heads, head_dim], the new tokens of all sequences
    keys, values  [num_tokens, num_kv_heads, head_dim], in the dtype of the cache
    kv_cache      see `rpa.paging`
    batch         `rpa.ragged.RaggedBatch`
    output        [num_tokens, num_q_heads, head_dim]; rows that no sequence owns are zero

Each rung keeps its own natural function; the adapters here give it this signature. Beside every
adapter stands what it touches, counted from the sizes and trip counts that it really runs with.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rpa import dense, fused, plain, streamed, tiled
from rpa.kernel import ragged_paged_attention
from rpa.paging import cdiv, live_pages, paged_attention, unpack_kv
from rpa.ragged import Q_BLOCK, RaggedBatch, ref_ragged_paged_attention, store_new_tokens


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    Attributes:
        number, name: its place and its name, which is also the name of its file.
        changes: what it does differently from the rung before.
        attention_for: RaggedBatch (NumPy) -> a function with the one signature. Rungs that pad
            need the longest lengths before they are compiled; the others ignore the batch.
        kv_tokens_read: (batch, page_size) -> tokens of K and V that one call reads; None where
            only the kernel's own transfers can tell.
        query_rows: batch -> rows of queries that one call computes, padding included, or None.
        max_q_len: the most new tokens of a sequence that it takes, or None for any number.
        is_kernel: whether it is a Pallas kernel, which without a TPU runs in the interpreter.
    """

    number: int
    name: str
    changes: str
    attention_for: Callable
    kv_tokens_read: Callable[[RaggedBatch, int], int] | None = None
    query_rows: Callable[[RaggedBatch], int] | None = None
    max_q_len: int | None = None
    is_kernel: bool = False

    def refuses(self, batch: RaggedBatch) -> str | None:
        """Why this rung cannot run a batch, in words, or None if it can."""
        longest = int(q_lens_of(batch).max(initial=0))
        if self.max_q_len is None or longest <= self.max_q_len:
            return None
        tokens = "1 new token" if self.max_q_len == 1 else f"{self.max_q_len} new tokens"
        return f"takes at most {tokens} per sequence, the batch has {longest}"


def q_lens_of(batch: RaggedBatch) -> np.ndarray:
    """New tokens of each sequence, i64[num_seqs], read on the host.

    >>> q_lens_of(RaggedBatch.from_lengths([1, 3], [5, 9], [[0], [1]])[0])
    array([1, 3])
    """
    return np.diff(np.asarray(batch.cu_q_lens)[: int(batch.num_seqs) + 1]).astype(np.int64)


def kv_lens_of(batch: RaggedBatch) -> np.ndarray:
    """All tokens of each sequence, i64[num_seqs], read on the host.

    >>> kv_lens_of(RaggedBatch.from_lengths([1, 3], [5, 9], [[0], [1]])[0])
    array([5, 9])
    """
    return np.asarray(batch.kv_lens)[: int(batch.num_seqs)].astype(np.int64)


def kv_tokens_needed(batch: RaggedBatch) -> int:
    """The least tokens of K and V that attention has to read: each sequence's, once.

    >>> kv_tokens_needed(RaggedBatch.from_lengths([1, 0], [5, 9], [[0], [1]])[0])
    5
    """
    return int(kv_lens_of(batch)[q_lens_of(batch) > 0].sum())


def pad_queries(queries, batch: RaggedBatch, max_q_len: int):
    """Spread the flat row of tokens over a rectangle, one row for each sequence.

    Returns:
        q [max_num_seqs, max_q_len, num_q_heads, head_dim], q_lens and kv_lens i32[max_num_seqs],
        both 0 for slots that are not in use. What stands past a q_len is padding.
    """
    in_use = jnp.arange(batch.max_num_seqs) < batch.num_seqs
    cu_q_lens = jnp.asarray(batch.cu_q_lens)
    q_lens = jnp.where(in_use, cu_q_lens[1:] - cu_q_lens[:-1], 0)
    kv_lens = jnp.where(in_use, jnp.asarray(batch.kv_lens), 0)
    rows = cu_q_lens[:-1, None] + jnp.arange(max_q_len)  # [max_num_seqs, max_q_len]
    return queries[jnp.clip(rows, 0, queries.shape[0] - 1)], q_lens, kv_lens


def unpad_output(padded, batch: RaggedBatch, num_tokens: int):
    """Collect the rectangle's rows back into the flat row of tokens: undoes `pad_queries`.

    Args:
        padded: [max_num_seqs, max_q_len, num_q_heads, head_dim].

    Returns:
        [num_tokens, num_q_heads, head_dim]; rows that no sequence owns are zero.
    """
    seqs, _, owned = batch.token_positions(num_tokens)
    row_in_sequence = jnp.arange(num_tokens) - jnp.asarray(batch.cu_q_lens)[seqs]
    output = padded[seqs, jnp.where(owned, row_in_sequence, 0)]
    return jnp.where(owned[:, None, None], output, 0)


def dense_rung(queries, keys, values, kv_cache, batch, *, sm_scale, max_q_len, max_kv_len):
    """Rung 1 under the one signature: every sequence padded to the longest, queries and KV.

    It reads the cache as a server without pages would hold it: one strip of `max_kv_len` tokens
    for each sequence, copied together here from its pages.
    """
    kv_cache = store_new_tokens(kv_cache, keys, values, batch)
    q, q_lens, kv_lens = pad_queries(queries, batch, max_q_len)
    positions = jnp.arange(max_kv_len)
    table = jnp.asarray(batch.page_indices).reshape(batch.max_num_seqs, -1)
    page_size = kv_cache.shape[1]
    strips = kv_cache[table[:, positions // page_size], positions % page_size]
    k, v = unpack_kv(strips, keys.shape[1], queries.shape[2])
    padded = dense.padded_attention(q, k, v, q_lens, kv_lens, sm_scale=sm_scale)
    return unpad_output(padded, batch, queries.shape[0]), kv_cache


def paged_rung(queries, keys, values, kv_cache, batch, *, sm_scale, max_q_len):
    """Rung 2 under the one signature: K and V through the page table, queries still padded."""
    kv_cache = store_new_tokens(kv_cache, keys, values, batch)
    q, q_lens, kv_lens = pad_queries(queries, batch, max_q_len)
    table = jnp.asarray(batch.page_indices).reshape(batch.max_num_seqs, -1)

    def one_sequence(sequence):
        q, q_len, kv_len, pages = sequence
        kv_len = jnp.where(q_len > 0, kv_len, 0)  # an idle slot reads nothing
        return paged_attention(
            q,
            kv_cache,
            pages,
            kv_len,
            kv_len - q_len,
            num_kv_heads=keys.shape[1],
            sm_scale=sm_scale,
        )

    padded = jax.lax.map(one_sequence, (q, q_lens, kv_lens, table))
    return unpad_output(padded, batch, queries.shape[0]).astype(queries.dtype), kv_cache


def ragged_rung(queries, keys, values, kv_cache, batch, *, sm_scale, **options):
    """Rung 3 under the one signature: the reference, nothing padded but the last block."""
    return ref_ragged_paged_attention(
        queries,
        keys,
        values,
        kv_cache,
        batch.kv_lens,
        batch.page_indices,
        batch.cu_q_lens,
        batch.distribution,
        sm_scale=sm_scale,
        **options,
    )


def kernel_rung(queries, keys, values, kv_cache, batch, *, sm_scale, **options):
    """Rung 8 under the one signature; unlike by itself, it leaves the caller's cache as it is."""
    return ragged_paged_attention(
        queries,
        keys,
        values,
        kv_cache,
        batch.kv_lens,
        batch.page_indices,
        batch.cu_q_lens,
        batch.distribution,
        sm_scale=sm_scale,
        donate=False,
        **options,
    )


def decode_part(batch: RaggedBatch) -> RaggedBatch:
    """The decode sequences of a batch, as a batch of its own: the others become unused slots.

    >>> batch, _ = RaggedBatch.from_lengths([1, 3], [5, 9], [[0], [1]])
    >>> decode_part(batch).distribution.tolist()
    [1, 1, 1]
    """
    return replace(batch, distribution=np.full(3, batch.distribution[0], np.int32))


def _longest(batch):
    return max(1, int(q_lens_of(batch).max(initial=0)))


def _dense_for(batch):
    longest_kv = max(1, int(kv_lens_of(batch).max(initial=0)))
    return partial(dense_rung, max_q_len=_longest(batch), max_kv_len=longest_kv)


def _live_tokens(batch, page_size, visits):
    """Tokens of the live pages of every sequence, read `visits[s]` times each."""
    _, end_pages = live_pages(kv_lens_of(batch), None, page_size)
    return int((end_pages * page_size * visits).sum())


def _q_blocks(batch):
    """How many blocks of queries rung 3 takes for each sequence, and the rows of each block."""
    decodes = np.arange(int(batch.num_seqs)) < int(batch.distribution[0])
    rows = np.where(decodes, 1, Q_BLOCK)
    return cdiv(q_lens_of(batch), rows), rows


LADDER = [
    Rung(
        number=1,
        name="dense",
        changes="the formula; every sequence padded to the longest",
        attention_for=_dense_for,
        kv_tokens_read=lambda batch, page_size: (
            batch.max_num_seqs * int(kv_lens_of(batch).max(initial=0))
        ),
        query_rows=lambda batch: batch.max_num_seqs * _longest(batch),
    ),
    Rung(
        number=2,
        name="paging",
        changes="K and V in pages: only live pages are read",
        attention_for=lambda batch: partial(paged_rung, max_q_len=_longest(batch)),
        kv_tokens_read=lambda batch, page_size: _live_tokens(
            batch, page_size, q_lens_of(batch) > 0
        ),
        query_rows=lambda batch: batch.max_num_seqs * _longest(batch),
    ),
    Rung(
        number=3,
        name="ragged",
        changes="tokens side by side: queries are not padded either",
        attention_for=lambda batch: ragged_rung,
        kv_tokens_read=lambda batch, page_size: _live_tokens(batch, page_size, _q_blocks(batch)[0]),
        query_rows=lambda batch: int(np.prod(_q_blocks(batch), axis=0).sum()),
    ),
    Rung(
        number=4,
        name="tiled",
        changes="a Pallas kernel: tiles in VMEM, online softmax",
        attention_for=lambda batch: tiled.attention,
        is_kernel=True,
    ),
    Rung(
        number=5,
        name="streamed",
        changes="the kernel fetches pages by its own DMAs, ahead of time",
        attention_for=lambda batch: streamed.attention,
        max_q_len=1,
        is_kernel=True,
    ),
    Rung(
        number=6,
        name="fused",
        changes="new K and V enter the block and are written back while it computes",
        attention_for=lambda batch: fused.attention,
        max_q_len=fused.MAX_Q_LEN,
        is_kernel=True,
    ),
    Rung(
        number=7,
        name="plain",
        changes="any mix and every option: a list of query blocks, made before the kernel",
        attention_for=lambda batch: plain.attention,
        is_kernel=True,
    ),
    Rung(
        number=8,
        name="kernel",
        changes="the same, optimized: each kind of sequence with a kernel of its own",
        attention_for=lambda batch: kernel_rung,
        is_kernel=True,
    ),
]
"""All rungs, from the bottom."""
