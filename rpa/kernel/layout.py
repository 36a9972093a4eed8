"""How arrays lie in VMEM: the one file that knows bitcasts, strides and packing.

Buffers have the shape [slots, tokens, words, packing, lanes]. A *word row* is `packing` rows of
narrow values that share 32-bit words: it is what the hardware loads. Seen as 32-bit words a buffer
is a plain matrix of word rows, token by token, and "head h of n tokens" is every `words`-th row of
it, which is one strided load on the chip. `ref[:, h]` says the same and costs 4 to 5 times as much.

The interpreter knows neither bitcasts nor reshapes of a ref. There the same rows are read by value
and packed into words (`_value_words`), so that all code but that of `WordRows`, which alone touches
a ref, is the same in both worlds.

**Rows of a tile.** A tile is the queries (or the output) of one head group, [rows, head_lanes]. Row
order: first the index in the word (0 .. row_packing), then the word row, then the token. So a tile
is put together from whole strided loads, and no value moves from one register row to another.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rpa.paging import LANES, packing_of

# --- Words and values ------------------------------------------------------------------------


def unpack(words, index, dtype, to_dtype):
    """Values at one index of 32-bit words.

    Args:
        words: u32[n, lanes].
        index: which of the packed values, 0 is the lowest bits.
        dtype: what is packed; to_dtype: what is returned.

    Returns:
        to_dtype[n, lanes].

    >>> unpack(jnp.array([[0x3F80_4000]], jnp.uint32), 1, jnp.bfloat16, jnp.float32)
    Array([[1.]], dtype=float32)
    """
    packing = packing_of(dtype)
    if packing == 1:
        return lax.bitcast_convert_type(words, dtype).astype(to_dtype)
    bits = 32 // packing
    narrow = (words >> (index * bits)).astype(jnp.dtype(f"uint{bits}"))
    return lax.bitcast_convert_type(narrow, dtype).astype(to_dtype)


def pack(values, dtype):
    """Round float32 values to a dtype and pack them into 32-bit words; undoes `unpack`.

    Args:
        values: one f32[n, lanes] for each index of a word.

    Returns:
        u32[n, lanes].

    >>> [hex(w) for w in pack([jnp.array([2.0]), jnp.array([1.0])], jnp.bfloat16).tolist()]
    ['0x3f804000']
    """
    if packing_of(dtype) == 1:
        return lax.bitcast_convert_type(values[0].astype(dtype), jnp.uint32)
    bits = 32 // len(values)
    words = 0
    for index, value in enumerate(values):
        narrow = lax.bitcast_convert_type(value.astype(dtype), jnp.dtype(f"uint{bits}"))
        words = words | (narrow.astype(jnp.uint32) << (index * bits))
    return words


def _value_words(value):
    """[n, packing, lanes] values as u32[n, lanes] words, what a bitcast of the ref would give."""
    n, packing, lanes = value.shape
    if packing == 1:
        return lax.bitcast_convert_type(value[:, 0], jnp.uint32)
    return lax.bitcast_convert_type(jnp.swapaxes(value, 1, 2), jnp.uint32).reshape(n, lanes)


def _word_values(words, dtype):
    """u32[n, lanes] words as [n, packing, lanes] values; undoes `_value_words`."""
    values = lax.bitcast_convert_type(words, dtype)
    return values[:, None] if packing_of(dtype) == 1 else jnp.swapaxes(values, 1, 2)


# --- Rows of a buffer ------------------------------------------------------------------------


class WordRows:
    """The word rows of a buffer in VMEM, to load and to store.

    One is made for each buffer at the start of the kernel: JAX works out what a bitcast of a ref is
    whenever one is written down, and a third of the time to trace the kernel went there.

    Attributes:
        dtype: of the values in the words.
    """

    def __init__(self, ref, interpret):
        """See ref, [slots, tokens, words, packing, lanes], as u32[..., 128] if it is on a chip."""
        slots, self._tokens, self._words, _, lanes = ref.shape
        self.dtype, self._ref, self._folds = ref.dtype, ref, lanes // LANES
        self._matrix = None
        if not interpret:
            rows = slots * self._tokens * self._words
            by_row = ref.bitcast(jnp.uint32).reshape(rows, lanes)
            self._matrix = by_row.reshape(rows * self._folds, LANES)

    def load(self, slot, token, word, n, stride=None):
        """n word rows, u32[n, lanes]: word row `word` of n tokens, or a stride apart in one."""
        if self._matrix is None:
            if stride is None:
                return _value_words(self._ref[slot, pl.ds(token, n), word])
            return _value_words(self._ref[slot, token, pl.ds(word, (n - 1) * stride + 1)][::stride])
        strides = self._strides(slot, token, word, n, stride)
        return jnp.concatenate([self._matrix[rows] for rows in strides], axis=1)

    def store(self, slot, token, word, words, stride=None):
        """Write u32[n, lanes] to the word rows that `load` loads."""
        if self._matrix is not None:
            for fold, rows in enumerate(self._strides(slot, token, word, len(words), stride)):
                self._matrix[rows] = words[:, fold * LANES : (fold + 1) * LANES]
        elif stride is None:
            self._ref[slot, pl.ds(token, len(words)), word] = _word_values(words, self.dtype)
        else:
            for i, row in enumerate(_word_values(words, self.dtype)):
                self._ref[slot, token, word + i * stride] = row

    def _strides(self, slot, token, word, n, stride):
        """Rows of the matrix; a word row of 256 lanes is two of 128."""
        first, folds = (slot * self._tokens + token) * self._words + word, self._folds
        stride = (stride or self._words) * folds
        return [pl.ds(first * folds + fold, n, stride=stride) for fold in range(folds)]


class Buffers(NamedTuple):
    """The `WordRows` of the three kinds of buffer."""

    q: WordRows
    o: WordRows
    kv: WordRows


# --- Tiles -----------------------------------------------------------------------------------


def load_q_tile(tiles, buffer, slot, q_sub, group):
    """The queries of one head group, f32[rows, head_lanes].

    Args:
        tiles: `plan.Tiles`.
        buffer: `WordRows` of the q buffer.
        slot, q_sub, group: which buffer, which bq_c tokens of the block, which head group.
    """
    packing = packing_of(buffer.dtype)
    parts = []
    for index in range(tiles.problem.row_packing):
        word, inner = divmod(index, packing)
        for r in _row_sets(tiles, packing, q_sub, group):
            words = buffer.load(slot, r.token, r.word + word, r.n, r.stride)
            parts.append(unpack(words, inner, buffer.dtype, jnp.float32))
    return jnp.concatenate(parts, axis=0)


def store_o_tile(tiles, buffer, slot, q_sub, group, tile):
    """Write the output of one head group, f32[rows, o_lanes], to the o buffer.

    It undoes `load_q_tile`.
    """
    packing = packing_of(buffer.dtype)
    row_sets = _row_sets(tiles, packing, q_sub, group)

    def starts(word, i):
        """First row in the tile of row set i, for each value of a word."""
        first = word * packing
        return [((first + inner) * len(row_sets) + i) * row_sets[i].n for inner in range(packing)]

    for word in range(tiles.problem.row_packing // packing):
        for i, r in enumerate(row_sets):
            parts = [tile[start : start + r.n] for start in starts(word, i)]
            buffer.store(slot, r.token, r.word + word, pack(parts, buffer.dtype), r.stride)


class _RowSet(NamedTuple):
    """Strided word rows of a tile: one of all tokens, or with a stride all of the one token."""

    token: Any
    word: Any
    n: int
    stride: int | None = None


def _row_sets(tiles, packing, q_sub, group):
    """The strided sets of word rows that make up a tile, for one index in the word."""
    stride = tiles.problem.row_packing // packing  # word rows that hold row_packing heads
    per_head = tiles.rows_per_head
    first = group * tiles.heads_per_group * per_head
    if tiles.is_one_token:
        return [_RowSet(0, first * stride, tiles.heads_per_group * per_head, stride)]
    token = q_sub * tiles.blocks.bq_c
    return [_RowSet(token, (first + i) * stride, tiles.q_sub_rows) for i in range(per_head)]


def rows_of_head(tiles, head_in_group, shape):
    """Which rows of a decode tile belong to one of the KV heads of its group, bool[shape]."""
    per_head = tiles.rows_per_head
    rows_per_set = tiles.heads_per_group * per_head
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    for _ in range(tiles.problem.row_packing - 1):
        row = jnp.where(row >= rows_per_set, row - rows_per_set, row)
    return (row >= head_in_group * per_head) & (row < (head_in_group + 1) * per_head)


def spread_heads(tiles, tile):
    """Block-diagonal queries: [rows, head_lanes] to [rows, group_lanes].

    Row r has its values in the columns of its own KV head and zeros elsewhere, so that one product
    with K of several heads side by side gives every row the scores of its own head.
    """
    if tiles.heads_per_group == 1:
        return tile
    heads = range(tiles.heads_per_group)
    parts = [jnp.where(rows_of_head(tiles, h, tile.shape), tile, 0.0) for h in heads]
    return jnp.concatenate(parts, axis=1)


def gather_heads(tiles, tile):
    """The diagonal blocks of [rows, group_lanes], [rows, head_lanes]: undoes `spread_heads`.

    The other blocks hold probabilities of one head times V of another: computed, never used.
    """
    lanes = tiles.problem.head_lanes
    result = tile[:, :lanes]
    for h in range(1, tiles.heads_per_group):
        part = tile[:, h * lanes : (h + 1) * lanes]
        result = jnp.where(rows_of_head(tiles, h, part.shape), part, result)
    return result


def load_kv(tiles, buffer, slot, token, group, num_valid=None):
    """K and V of one head group, each [bkv_c, group_lanes] in the compute dtype.

    Where the two share their lanes, both are the same matrix: [k, v] of each head. The queries are
    zero past head_dim, so [q, 0] [k, v]^T = q k^T; and P [k, v] = [P k, P v], of which
    `unview_output` takes the second half. No value moves to another lane.

    Args:
        tiles: `plan.Tiles`.
        buffer: `WordRows` of the KV buffer [num_slots, bkv, words | 1, packing, head_lanes].
        slot, token, group: which buffer, its first token, which head group.
        num_valid: tokens from there that hold a key; rows behind them are zeros. Without it
            stale memory, which may be NaN, would reach the output as 0 * NaN. None: all are valid.
    """
    first, count = group * tiles.heads_per_group, tiles.heads_per_group
    load = partial(_load_heads, tiles, buffer, slot, token, num_valid)
    if tiles.problem.shares_lanes:
        both = jnp.concatenate(load(range(first, first + count)), axis=1)
        return both, both
    heads = load(range(2 * first, 2 * (first + count)))
    return jnp.concatenate(heads[::2], axis=1), jnp.concatenate(heads[1::2], axis=1)


def _load_heads(tiles, buffer, slot, token, num_valid, combined):
    """Combined heads of bkv_c tokens, each [bkv_c, head_lanes]; those of a word are loaded once."""
    packing, to_dtype = packing_of(buffer.dtype), tiles.problem.compute_dtype
    words = {}
    for word in sorted({head // packing for head in combined}):
        loaded = buffer.load(slot, token, word, tiles.blocks.bkv_c)
        words[word] = _keep_first(loaded, num_valid)
    return [unpack(words[h // packing], h % packing, buffer.dtype, to_dtype) for h in combined]


def _keep_first(words, num_valid):
    """u32[n, lanes] with zeros in the rows from num_valid on; None keeps all."""
    if num_valid is None:
        return words
    row = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    return jnp.where(row < num_valid, words, jnp.uint32(0))


# --- Around the kernel -----------------------------------------------------------------------


def view_heads(problem, array):
    """[num_tokens, num_q_heads, head_dim] as [num_tokens, words, packing, lanes].

    Where neither q_per_kv nor head_dim needs padding this is a view: the bytes stay as they are.
    """
    p = problem
    grouped = array.reshape(p.num_tokens, p.num_kv_heads, p.q_per_kv, p.head_dim)
    padding = ((0, 0), (0, 0), (0, p.padded_q_per_kv - p.q_per_kv), (0, p.head_lanes - p.head_dim))
    return jnp.pad(grouped, padding).reshape(p.num_tokens, *p.q_shape)


def unview_output(problem, array):
    """What `view_heads` is for queries, undone for the output: the pair of output and lse, or None.

    Where K and V share their lanes, the output is in those of V.
    """
    p = problem
    grouped = array.reshape(p.num_tokens, p.num_kv_heads, p.padded_q_per_kv, -1)
    first = p.head_dim if p.shares_lanes else 0
    heads = grouped[:, :, : p.q_per_kv, first : first + p.head_dim]
    output = heads.reshape(p.num_tokens, p.num_q_heads, p.head_dim).astype(p.out_dtype)
    if not p.return_lse:
        return output, None
    return output, grouped[:, :, : p.q_per_kv, p.head_lanes].reshape(p.num_tokens, p.num_q_heads)


def sink_tiles(tiles, attention_sink):
    """f32[num_q_heads] as f32[num_groups, rows / q_sub_rows, 128], in the order of tile rows."""
    p = tiles.problem
    sinks = attention_sink.astype(jnp.float32).reshape(p.num_kv_heads, p.q_per_kv)
    sinks = jnp.pad(sinks, ((0, 0), (0, p.padded_q_per_kv - p.q_per_kv)))
    # (group, head in group, word row, index) to (group, index, head in group, word row)
    sinks = sinks.reshape(tiles.num_groups, tiles.heads_per_group, -1, p.row_packing)
    rows = jnp.moveaxis(sinks, 3, 1).reshape(tiles.num_groups, -1, 1)
    return jnp.broadcast_to(rows, (*rows.shape[:2], LANES))
