"""Rung 3: ragged batching. Sequences of any length side by side, without padding.

A server's step mixes sequences that decode (one new token) with chunks of prompts (hundreds).
Padding all of them to the longest wastes most of the work. So the new tokens of all sequences are
concatenated, and four small integer arrays say whose is whose: `RaggedBatch`.

`ref_ragged_paged_attention` is the complete semantics of the production function in plain JAX. It
is the reference for every kernel that follows: what they must return, and what they must write.
(Ragged Paged Attention: arXiv 2604.15464, section 3.)
"""

from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpa import dense
from rpa.page_pool import NO_PAGE
from rpa.paging import cdiv, paged_attention, store_kv, unpack_kv
from rpa.validation import (
    as_length,
    as_window,
    check_arguments,
    check_flags,
    check_padding,
    check_values,
)

Q_BLOCK = 64
"""Query tokens that the reference takes at a time, except in the decode range: one."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv_lens", "page_indices", "cu_q_lens", "distribution"],
    meta_fields=[],
)
@dataclass(frozen=True)
class RaggedBatch:
    """Which tokens, which pages, which kind: all that attention has to know about a batch.

    A pytree of four int32 arrays, so it can be passed through `jax.jit` and change every step
    without a recompilation; NumPy on the host, JAX arrays on a device.

    Attributes:
        kv_lens: i32[max_num_seqs], tokens of each sequence in the cache, *new ones included*.
        page_indices: i32[max_num_seqs * pages_per_seq], the page table, flattened; entries past
            a sequence's live pages are never looked at.
        cu_q_lens: i32[max_num_seqs + 1], running sum of the q_lens: sequence s owns the rows
            `cu_q_lens[s] : cu_q_lens[s + 1]` of queries, keys and values.
        distribution: i32[3], (i, j, k): sequences [0, i) decode (q_len at most 1), [i, j) are
            chunked prefill (q_len at most chunk_prefill_size), [j, k) are anything; slots from k
            on are unused and may hold anything.

    A sequence with q_len 0, with or without cached tokens, is an idle slot: legal and skipped.
    """

    kv_lens: jax.Array
    page_indices: jax.Array
    cu_q_lens: jax.Array
    distribution: jax.Array

    @classmethod
    def from_lengths(
        cls,
        q_lens,
        kv_lens,
        page_table,
        *,
        max_num_seqs=None,
        pages_per_seq=None,
        chunk_prefill_size=None,
    ):
        """Build a batch from lengths in any order; the sequences are sorted, decode first.

        Args:
            q_lens: new tokens of each sequence, int[num_seqs].
            kv_lens: all tokens of each sequence, new ones included, int[num_seqs].
            page_table: the pages of each sequence: an array, or a list of lists.
            max_num_seqs: room for sequences, default as many as there are. Fix it, and
                pages_per_seq, so that a jitted function is compiled only once.
            pages_per_seq: room for pages of one sequence, default the most that one has.
            chunk_prefill_size: sequences of exactly this q_len form the chunked prefill range; a
                last chunk, which is shorter, counts as mixed.

        Returns:
            The batch (NumPy arrays), and i64[num_seqs], the order: sequence s of the batch is
            sequence `order[s]` of the arguments. Concatenate the tokens in this order, or take
            `rows_in_batch` of arrays that are in the order of the arguments.

        Raises:
            ValueError: if the arguments differ in length, or do not fit the room.

        >>> batch, order = RaggedBatch.from_lengths([3, 1], [7, 9], [[0, 1], [2, 3, 4]])
        >>> order, batch.cu_q_lens, batch.distribution
        (array([1, 0]), array([0, 1, 4], dtype=int32), array([1, 1, 2], dtype=int32))
        >>> batch.page_indices.reshape(2, -1)
        array([[ 2,  3,  4],
               [ 0,  1, -1]], dtype=int32)
        """
        num_seqs = len(q_lens)
        if not num_seqs == len(kv_lens) == len(page_table):
            raise ValueError(
                f"q_lens has {num_seqs} entries, kv_lens {len(kv_lens)} and page_table "
                f"{len(page_table)}: give one of each for every sequence."
            )
        widest = max((len(row) for row in page_table), default=1)
        max_num_seqs = _room("max_num_seqs", max_num_seqs, num_seqs, "sequences")
        pages_per_seq = _room("pages_per_seq", pages_per_seq, widest, "pages of a sequence")

        q_lens, kv_lens = np.asarray(q_lens, np.int32), np.asarray(kv_lens, np.int32)
        decode = q_lens <= 1
        chunk = ~decode & (q_lens == chunk_prefill_size)
        # A stable sort: within a kind the sequences stay in the order in which they came.
        order = np.argsort(np.where(decode, 0, np.where(chunk, 1, 2)), kind="stable")

        table = np.full((max_num_seqs, pages_per_seq), NO_PAGE, np.int32)
        for row, s in zip(table, order, strict=False):
            row[: len(page_table[s])] = page_table[s]
        padded_q_lens = np.zeros(max_num_seqs, np.int32)
        padded_q_lens[:num_seqs] = q_lens[order]
        padded_kv_lens = np.zeros(max_num_seqs, np.int32)
        padded_kv_lens[:num_seqs] = kv_lens[order]
        ends = [decode.sum(), decode.sum() + chunk.sum(), num_seqs]  # (i, j, k)
        batch = cls(
            kv_lens=padded_kv_lens,
            page_indices=table.reshape(-1),
            cu_q_lens=np.concatenate([[0], np.cumsum(padded_q_lens)]).astype(np.int32),
            distribution=np.array(ends, np.int32),
        )
        return batch, order

    @property
    def num_seqs(self):
        """How many sequences there are, i32[]: the last entry of `distribution`."""
        return self.distribution[2]

    @property
    def max_num_seqs(self) -> int:
        """Room for sequences."""
        return self.kv_lens.shape[0]

    @property
    def pages_per_seq(self) -> int:
        """Room for pages of one sequence."""
        return self.page_indices.shape[0] // self.max_num_seqs

    def token_positions(self, num_tokens):
        """Owner and position of every token of the batch.

        Args:
            num_tokens: rows of queries, keys and values; rows that no sequence owns are padding.

        Returns:
            seqs i32[num_tokens], the sequence of each token (0 for padding), positions
            i32[num_tokens], its position in that sequence, and owned bool[num_tokens].

        >>> batch, _ = RaggedBatch.from_lengths([1, 2], [5, 9], [[0], [1]])
        >>> [x.tolist() for x in batch.token_positions(4)]
        [[0, 1, 1, 0], [4, 7, 8, 0], [True, True, True, False]]
        """
        tokens = jnp.arange(num_tokens)
        slots = jnp.arange(self.max_num_seqs)
        # Slots from num_seqs on hold anything; their end is moved past the last token.
        ends = jnp.where(slots < self.num_seqs, jnp.asarray(self.cu_q_lens)[1:], num_tokens)
        seqs = jnp.searchsorted(ends, tokens, side="right").astype(jnp.int32)
        owned = seqs < self.num_seqs
        seqs = jnp.where(owned, seqs, 0)
        # The row before a sequence's end is its last token, at position kv_len - 1.
        positions = jnp.asarray(self.kv_lens)[seqs] - ends[seqs] + tokens
        return seqs, jnp.where(owned, positions, 0), owned

    def validate(
        self, *, num_tokens, num_pages, page_size, chunk_prefill_size=None, update_kv_cache=True
    ):
        """Check the values on the host: lengths, order, page indices, and who owns what is written.

        Reads the arrays, which costs a transfer if they live on a device. At most 1 ms for 256
        sequences x 256 pages of NumPy arrays.

        Args:
            num_tokens: rows of queries, keys and values.
            num_pages, page_size: of the cache.
            chunk_prefill_size: as passed to attention.
            update_kv_cache: False if nothing will be written, so that pages may be shared.

        Raises:
            ValueError: with the sequence, what was given, what was expected, and what to do.

        >>> batch, _ = RaggedBatch.from_lengths([1], [9], [[7]])
        >>> batch.validate(num_tokens=1, num_pages=8, page_size=8)
        Traceback (most recent call last):
            ...
        ValueError: kv_lens[0] is 9, but its row of the page table has room for 1 pages of 8 \
tokens, 8 in all: widen the page table.
        """
        arrays = (self.kv_lens, self.page_indices, self.cu_q_lens, self.distribution)
        check_values(
            *(np.asarray(array) for array in arrays),
            num_tokens=num_tokens,
            num_pages=num_pages,
            page_size=page_size,
            chunk_prefill_size=as_length(chunk_prefill_size),
            update_kv_cache=update_kv_cache,
        )


def rows_in_batch(q_lens, order) -> np.ndarray:
    """Which of the caller's rows stands in each row of a batch, i64[num_tokens].

    The caller's queries, keys and values follow the sequences as they were given to
    `RaggedBatch.from_lengths`; those of the batch follow the `order` that it returned. So
    `queries[rows]` is what attention takes, and `result[rows] = output` puts its output back.

    Args:
        q_lens: new tokens of each sequence, as given to `from_lengths`, int[num_seqs].
        order: as returned by it, int[num_seqs].

    Raises:
        ValueError: if `order` does not name each sequence once.

    Sequence 1 decodes, so it comes first; its one token is the caller's row 3.

    >>> rows_in_batch([3, 1], order=[1, 0])
    array([3, 0, 1, 2])
    """
    q_lens, order = np.asarray(q_lens, np.int64), np.asarray(order, np.int64)
    if not np.array_equal(np.sort(order), np.arange(len(q_lens))):
        raise ValueError(
            f"order is {order.tolist()}, but must name each of the {len(q_lens)} sequences of "
            "q_lens once: take the one that RaggedBatch.from_lengths returned."
        )
    starts = np.cumsum(q_lens) - q_lens  # the caller's first row of each sequence
    counts = q_lens[order]
    token = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts[order], counts) + token


def _room(name, given, needed, what):
    if given is not None and given < needed:
        raise ValueError(f"{name} is {given}, but there are {needed} {what}: make it larger.")
    return max(1, needed if given is None else given)


def should_validate(batch: RaggedBatch, validate: bool | None) -> bool:
    """Whether to read the batch's values on the host: the meaning of `validate=`.

    None checks what can be read for free: NumPy arrays always, JAX arrays only where the device is
    the host itself (a read from a TPU stalls it), tracers never, since they have no values yet.
    True forces the check (and under jit raises, in words), and reads the cached keys, too: what
    pads their head_dim must be finite (`rpa.validation.check_padding`). False skips it.

    >>> batch, _ = RaggedBatch.from_lengths([1], [5], [[0]])
    >>> should_validate(batch, None), should_validate(batch, False)
    (True, False)
    """
    if validate is not None:
        check_flags(validate=validate)
    arrays = jax.tree.leaves(batch)
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    if validate and traced:
        raise ValueError(
            "validate=True needs the values of the batch, but inside jit they are not known yet: "
            "call RaggedBatch.validate() before, outside of jit, or leave validate out."
        )
    if validate is not None or traced:
        return bool(validate)
    devices = [d for array in arrays if isinstance(array, jax.Array) for d in array.devices()]
    return all(device.platform == "cpu" for device in devices)


_static = partial(field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What attention computes, besides whose tokens are whose: a call's options in one record.

    A pytree: the scales and the sinks may be traced, all other fields are compiled in. What each of
    them means is said once, at `ref_ragged_paged_attention`.
    """

    sm_scale: Any = 1.0
    soft_cap: Any = None
    q_scale: Any = None
    k_scale: Any = None
    v_scale: Any = None
    attention_sink: Any = None
    use_causal_mask: bool = _static(default=True)
    update_kv_cache: bool = _static(default=True)
    skip_kv_mask: bool = _static(default=False)
    sliding_window: int | None = _static(default=None)
    out_dtype: Any = _static(default=None)
    mask_value: float | None = _static(default=None)
    chunk_prefill_size: int | None = _static(default=None)
    return_lse: bool = _static(default=False)

    @classmethod
    def among(cls, arguments):
        """Those of a function's arguments that are options, {name: value}."""
        return {f.name: arguments[f.name] for f in fields(cls) if f.name in arguments}

    def resolved(self, q_dtype):
        """The same options with one value for each meaning, so that `jax.jit` compiles once for it.

        Args:
            q_dtype: of the queries; the output's where none is given.

        >>> options = AttentionOptions(sliding_window=np.int64(2**31), mask_value=-1e9, k_scale=2)
        >>> resolved = options.resolved("bfloat16")
        >>> resolved.sliding_window, resolved.mask_value, resolved.k_scale, resolved.out_dtype
        (None, None, np.float32(2.0), dtype(bfloat16))
        """
        scales = {name: getattr(self, name) for name in _SCALES}
        is_number = {name: isinstance(x, (int, float, np.number)) for name, x in scales.items()}
        return replace(
            self,
            **{name: np.float32(x) if is_number[name] else x for name, x in scales.items()},
            out_dtype=jnp.dtype(q_dtype if self.out_dtype is None else self.out_dtype),
            sliding_window=as_window(self.sliding_window),
            chunk_prefill_size=as_length(self.chunk_prefill_size),
            skip_kv_mask=False,  # neither changes a result
            mask_value=None,
        )


_SCALES = ("sm_scale", "soft_cap", "q_scale", "k_scale", "v_scale")


def check_call(
    queries, keys, values, kv_cache, batch: RaggedBatch, *, validate=None, **options
) -> AttentionOptions:
    """The options of a call, resolved; a call whose arguments do not fit together is refused.

    In words, and before anything is written.

    Args:
        queries, keys, values, kv_cache: see `ref_ragged_paged_attention`.
        batch: who owns which row, and which page.
        validate: see `should_validate`.
        **options: fields of `AttentionOptions`.

    Raises:
        ValueError: naming the argument, what was given, what was expected and what to do.

    >>> batch, _ = RaggedBatch.from_lengths([1], [5], [[4]])
    >>> new, cache = jnp.ones((1, 1, 64)), jnp.zeros((2, 8, 2, 1, 128))
    >>> check_call(new, new, new, cache, batch)
    Traceback (most recent call last):
        ...
    ValueError: page_indices of sequence 0, page 0 is 4, but kv_cache has 2 pages: it must be \
between 0 and 1. Take the pages of a sequence from a pool of this size (rpa.PagePool).
    """
    options = AttentionOptions(**options)
    check_arguments(queries, keys, values, kv_cache, batch, options)
    if should_validate(batch, validate):
        batch.validate(
            num_tokens=queries.shape[0],
            num_pages=kv_cache.shape[0],
            page_size=kv_cache.shape[1],
            chunk_prefill_size=options.chunk_prefill_size,
            update_kv_cache=options.update_kv_cache,
        )
    if validate:
        check_padding(kv_cache, batch, *keys.shape[1:], update_kv_cache=options.update_kv_cache)
    return options.resolved(queries.dtype)


def ref_ragged_paged_attention(
    queries,
    keys,
    values,
    kv_cache,
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    *,
    use_causal_mask=True,
    update_kv_cache=True,
    skip_kv_mask=False,
    sm_scale=1.0,
    sliding_window=None,
    soft_cap=None,
    out_dtype=None,
    mask_value=None,
    q_scale=None,
    k_scale=None,
    v_scale=None,
    chunk_prefill_size=None,
    attention_sink=None,
    return_lse=False,
    validate=None,
):
    """Ragged paged attention in plain JAX: rung 3, and the specification of rung 8.

    First the keys and values of the new tokens are stored in the cache, then every token attends
    to its own sequence. Computed in float32 whatever the dtypes. Nothing is donated: the arguments
    stay as they are, and a call that raises has written nothing.

    Args:
        queries: [num_tokens, num_q_heads, head_dim], the new tokens of all sequences in a row.
        keys, values: [num_tokens, num_kv_heads, head_dim], in the dtype of the cache.
        kv_cache: [num_pages, page_size, ceil(2 * num_kv_heads / packing), packing,
            align(head_dim, 128)], or with head_dim 64 the shape with `share_lanes=True`, see
            `rpa.paging`.
        kv_lens, page_indices, cu_q_lens, distribution: int32, see `RaggedBatch`.
        use_causal_mask: False lets a token see all of its sequence; the window still applies.
        update_kv_cache: False ignores keys and values and reads all from the cache, which stays
            bit-identical (layers that share the KV of another one).
        skip_kv_mask: a promise about lengths that lets a kernel leave out a mask; needs
            use_causal_mask=False and changes no result.
        sm_scale: factor on the scores; a number or a traced scalar.
        sliding_window: tokens that a query sees, itself included, or None for all.
        soft_cap: `soft_cap * tanh(score / soft_cap)`, or None.
        out_dtype: dtype of the output; None is the dtype of queries.
        mask_value: accepted for the sake of the signature: the score below all others that a
            kernel gives to a masked key. A masked key has weight 0, whatever it is.
        q_scale: if given, queries are divided by it and rounded to the dtype of the cache.
        k_scale, v_scale: what the stored keys and values have to be multiplied with.
        chunk_prefill_size: the largest q_len in the chunked prefill range of the distribution.
        attention_sink: f32[num_q_heads], adds `exp(sink)` to the softmax's denominator, or None.
        return_lse: whether to return the logarithm of that denominator as well, to merge this
            output with one over other keys (see `rpa.parallel.merge`).
        validate: see `should_validate`.

    Where tpu-inference's function of this name differs: it returns only the rows that sequences
    own (here: all, padding zero), applies the window only under the causal mask, gives float32 or
    bfloat16 whatever the dtype of queries, takes no idle slots, and has no attention_sink.

    Returns:
        output: [num_tokens, num_q_heads, head_dim] in out_dtype. Rows that no sequence owns, and
            rows that see no key, are zero.
        kv_cache: the cache with the new tokens in it.
        lse: only with return_lse: f32[num_tokens, num_q_heads], natural logarithm, scales, cap and
            sink included; -inf in rows that no sequence owns, and rows that see no key.

    Raises:
        ValueError: for arguments that do not fit together, in words, before anything is computed.

    It can be mapped with `jax.vmap` and differentiated forwards (`jax.jvp`); not backwards: how
    often its loops run is read from the batch. Train with `rpa.dense.attention`.

    >>> batch, _ = RaggedBatch.from_lengths([1, 3], [9, 3], [[0, 1], [2]])
    >>> q, kv = jnp.ones((4, 4, 64)), jnp.ones((4, 2, 64))
    >>> cache = jnp.zeros((4, 8, 4, 1, 128))
    >>> output, cache = ref_ragged_paged_attention(
    ...     q, kv, kv, cache, batch.kv_lens, batch.page_indices, batch.cu_q_lens,
    ...     batch.distribution, sm_scale=64**-0.5)
    >>> output.shape
    (4, 4, 64)
    """
    batch = RaggedBatch(kv_lens, page_indices, cu_q_lens, distribution)
    options = check_call(
        queries,
        keys,
        values,
        kv_cache,
        batch,
        validate=validate,
        update_kv_cache=update_kv_cache,
        use_causal_mask=use_causal_mask,
        skip_kv_mask=skip_kv_mask,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        out_dtype=out_dtype,
        mask_value=mask_value,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        chunk_prefill_size=chunk_prefill_size,
        attention_sink=attention_sink,
        return_lse=return_lse,
    )
    return store_and_attend(queries, keys, values, kv_cache, batch, options)


@jax.jit
def store_and_attend(queries, keys, values, kv_cache, batch, options):
    """What `ref_ragged_paged_attention` returns, for what `check_call` has checked.

    Args:
        queries, keys, values, kv_cache, batch: as checked.
        options: the `AttentionOptions` that the check returned.
    """
    o = options
    if o.update_kv_cache:
        kv_cache = store_new_tokens(kv_cache, keys, values, batch)
    if o.q_scale is not None:
        queries = quantize(queries, o.q_scale, kv_cache.dtype)
    q_scale, k_scale = (1.0 if scale is None else scale for scale in (o.q_scale, o.k_scale))
    attend_block = partial(
        paged_attention,
        num_kv_heads=keys.shape[1],
        sm_scale=o.sm_scale,
        score_scale=q_scale * k_scale,
        causal=o.use_causal_mask,
        sliding_window=o.sliding_window,
        soft_cap=o.soft_cap,
        sinks=o.attention_sink,
        return_lse=o.return_lse,
    )
    attended = attend_sequences(queries, kv_cache, batch, attend_block)
    output, *lse = attended if o.return_lse else (attended,)
    if o.v_scale is not None:
        output = output * o.v_scale
    _, _, owned = batch.token_positions(queries.shape[0])
    lse = [jnp.where(owned[:, None], rows, -jnp.inf) for rows in lse]
    return output.astype(o.out_dtype), kv_cache, *lse


def quantize(x, scale, dtype):
    """Divide by the scale and round to a dtype, clipped to its range, in float32 until then.

    >>> quantize(jnp.array([1.0, 1000.0]), 0.5, jnp.float8_e4m3fn).astype(jnp.float32)
    Array([  2., 448.], dtype=float32)
    """
    largest = float(jnp.finfo(dtype).max)
    # Without the clip e4m3fn, which has no infinity, would turn a large value into NaN.
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype)


def store_new_tokens(kv_cache, keys, values, batch: RaggedBatch):
    """Write the new tokens of a batch to their places in the cache; nothing else changes a bit.

    Args:
        kv_cache: see `rpa.paging`.
        keys, values: [num_tokens, num_kv_heads, head_dim] in the dtype of the cache.
        batch: who owns which row, and which page.

    Returns:
        The new cache.

    >>> batch, _ = RaggedBatch.from_lengths([2], [5], [[1, 0]])  # new tokens at positions 3, 4
    >>> kv = jnp.ones((2, 1, 64))
    >>> store_new_tokens(jnp.zeros((2, 4, 2, 1, 128)), kv, kv, batch)[:, :, 0, 0, 0]
    Array([[1., 0., 0., 0.],
           [0., 0., 0., 1.]], dtype=float32)
    """
    num_pages, page_size = kv_cache.shape[:2]
    seqs, positions, owned = batch.token_positions(keys.shape[0])
    table = jnp.asarray(batch.page_indices).reshape(-1, batch.pages_per_seq)
    # A padding row must not be stored anywhere: it is sent to a page that does not exist.
    pages = jnp.where(owned, table[seqs, positions // page_size], num_pages)
    return store_kv(kv_cache, keys, values, pages, positions % page_size)


def attend_sequences(queries, kv_cache, batch: RaggedBatch, attend_block):
    """Attention of every sequence of a batch, in blocks of queries, each through its page table.

    The decode range is taken one query at a time, the others in blocks of Q_BLOCK. So the
    work is what the sequences need, not what the longest of them would need: the trip counts of
    both loops are read from the batch.

    Args:
        queries: [num_tokens, num_q_heads, head_dim].
        kv_cache: see `rpa.paging`; the new tokens are in it.
        batch: see `RaggedBatch`.
        attend_block: `paged_attention` with its options filled in: (q [q_block, num_q_heads,
            head_dim], kv_cache, pages i32[pages_per_seq], kv_len, q_start) -> f32[like q], or with
            its return_lse a pair of arrays with a row for each query.

    Returns:
        f32[num_tokens, num_q_heads, head_dim], or such a pair; rows that no sequence owns are zero.

    >>> batch, _ = RaggedBatch.from_lengths([1], [5], [[0, 1]])
    >>> attend_block = partial(paged_attention, num_kv_heads=1)
    >>> attend_sequences(jnp.ones((2, 1, 64)), jnp.ones((2, 4, 2, 1, 128)), batch,
    ...                  attend_block)[:, 0, 0]
    Array([1., 0.], dtype=float32)
    """
    num_tokens = queries.shape[0]
    kv_lens, cu_q_lens, ends = (
        jnp.asarray(x) for x in (batch.kv_lens, batch.cu_q_lens, batch.distribution)
    )
    # i32[max_num_seqs, pages_per_seq]
    table = jnp.asarray(batch.page_indices).reshape(-1, batch.pages_per_seq)
    # The last block of a sequence may reach past the last token: give it room, or
    # dynamic_slice would move the block's start to make it fit.
    queries = jnp.pad(queries, ((0, Q_BLOCK), (0, 0), (0, 0)))
    shapes = jax.eval_shape(attend_block, queries, kv_cache, table[0], kv_lens[0], q_start=0)
    output = jax.tree.map(lambda shape: jnp.zeros(shape.shape, jnp.float32), shapes)

    def one_sequence(s, output, q_block):
        row, q_len = cu_q_lens[s], cu_q_lens[s + 1] - cu_q_lens[s]

        def one_block(b, output):
            start = row + b * q_block
            q = jax.lax.dynamic_slice_in_dim(queries, start, q_block)
            attended = attend_block(
                q, kv_cache, table[s], kv_lens[s], q_start=kv_lens[s] - q_len + b * q_block
            )
            # The rows after the sequence's last query belong to the next sequence.
            owned = b * q_block + jnp.arange(q_block) < q_len

            def keep_owned(output, attended):
                kept = jax.lax.dynamic_slice_in_dim(output, start, q_block)
                mask = owned.reshape(-1, *[1] * (output.ndim - 1))
                attended = jnp.where(mask, attended, kept)
                return jax.lax.dynamic_update_slice_in_dim(output, attended, start, axis=0)

            return jax.tree.map(keep_owned, output, attended)

        return jax.lax.fori_loop(0, cdiv(q_len, q_block), one_block, output)

    output = jax.lax.fori_loop(0, ends[0], partial(one_sequence, q_block=1), output)
    output = jax.lax.fori_loop(ends[0], ends[2], partial(one_sequence, q_block=Q_BLOCK), output)
    return jax.tree.map(lambda rows: rows[:num_tokens], output)


def oracle_ragged(queries, kv_cache, batch: RaggedBatch, num_kv_heads, **options) -> dense.Truth:
    """The float64 oracle for a whole batch: gathers every sequence with NumPy, then `dense.oracle`.

    Args:
        queries: [num_tokens, num_q_heads, head_dim].
        kv_cache: the cache *with* the new tokens in it.
        batch: see `RaggedBatch`; values are read.
        num_kv_heads: the true number of KV heads.
        **options: of `dense.oracle`.

    Returns:
        `dense.Truth` over all rows; rows that no sequence owns are zero, and their lse is -inf.

    >>> batch, _ = RaggedBatch.from_lengths([1], [5], [[0, 1]])
    >>> oracle_ragged(np.ones((2, 1, 64)), np.ones((2, 4, 2, 1, 128)), batch, 1).output[:, 0, 0]
    array([1., 0.])
    """
    queries, kv_cache = np.asarray(queries), np.asarray(kv_cache)
    num_tokens, num_q_heads, head_dim = queries.shape
    per_head = (num_tokens, num_q_heads)
    truth = dense.Truth(np.zeros(queries.shape), np.ones(per_head), np.full(per_head, -np.inf))
    table = np.asarray(batch.page_indices).reshape(-1, batch.pages_per_seq)
    for s in range(int(batch.num_seqs)):
        rows = slice(int(batch.cu_q_lens[s]), int(batch.cu_q_lens[s + 1]))
        kv_len = int(batch.kv_lens[s])
        pages = table[s, : cdiv(kv_len, kv_cache.shape[1])]
        tokens = kv_cache[pages].reshape(-1, *kv_cache.shape[2:])[:kv_len]  # [kv_len, rows, ...]
        k, v = unpack_kv(tokens, num_kv_heads, head_dim)
        for whole, part in zip(truth, dense.oracle(queries[rows], k, v, **options), strict=True):
            whole[rows] = part
    return truth
