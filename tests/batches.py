"""Ragged batches for tests: any mix of sequences, with NaN in every place that must not be read.

`Case` is a batch with its arrays; `make_case` builds one from a list of lengths, and `lengths` is a
hypothesis strategy for such lists, drawn around the ends of pages, where mistakes live.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from rpa.paging import cdiv, get_kv_cache_shape, pack_kv
from rpa.ragged import RaggedBatch

GARBAGE = np.array([-7, 2**31 - 1, -(2**31), 10**6], np.int32)


@dataclass(frozen=True)
class Shape:
    """What a jitted function is compiled for; only the metadata varies between cases."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    pages_per_seq: int = 4
    max_num_seqs: int = 6
    num_tokens: int = 40
    dtype: str = "float32"
    share_lanes: bool = False  # the layout of head_dim 64 without padding

    @property
    def num_pages(self) -> int:
        return self.max_num_seqs * self.pages_per_seq + 3

    def pack(self, keys, values) -> np.ndarray:
        """K and V of some tokens as the cache holds them."""
        arrays = jnp.asarray(keys), jnp.asarray(values)
        return np.asarray(pack_kv(*arrays, share_lanes=self.share_lanes))


@dataclass
class Case:
    shape: Shape
    queries: np.ndarray  # [num_tokens, num_q_heads, head_dim]
    keys: np.ndarray  # [num_tokens, num_kv_heads, head_dim]
    values: np.ndarray  # [num_tokens, num_kv_heads, head_dim]
    kv_cache: np.ndarray  # see rpa.paging; NaN wherever no cached token lives
    batch: RaggedBatch
    new_slots: np.ndarray  # i64[new tokens, 2], (page, slot) of every new token, in token order

    @property
    def arrays(self):
        return self.queries, self.keys, self.values, self.kv_cache

    @property
    def metadata(self):
        b = self.batch
        return b.kv_lens, b.page_indices, b.cu_q_lens, b.distribution

    def expected_cache(self) -> np.ndarray:
        """The cache with exactly the new tokens in it, as bits."""
        expected = bits(self.kv_cache).copy()
        packed = bits(self.shape.pack(self.keys, self.values))
        for token, (page, slot) in enumerate(self.new_slots):
            expected[page, slot] = packed[token]
        return expected


def bits(array) -> np.ndarray:
    """Any array as unsigned integers of its own size: NaN compares equal to itself there."""
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def make_case(
    shape: Shape, lengths, *, seed=0, share=False, adjacent=False, new_tokens_only=True
) -> Case:
    """Build a case from (q_len, kv_len) pairs in batch order (they are sorted decode first).

    Args:
        shape: the fixed sizes.
        lengths: (q_len, kv_len) of each sequence.
        seed: of the values and of the page shuffle.
        share: whether sequences share the full pages of a common prefix where they can.
        adjacent: whether the pages of a sequence lie side by side, as in a new pool.
        new_tokens_only: False writes the new tokens to the cache as well (for KV sharing).
    """
    rng = np.random.default_rng(seed)
    ps = shape.page_size
    free = list(rng.permutation(shape.num_pages))
    if adjacent:
        free.sort(reverse=True)
    tables = []
    for s, (q_len, kv_len) in enumerate(lengths):
        shared = 0
        if share and s:
            before = lengths[s - 1][1] - lengths[s - 1][0]
            shared = min((kv_len - q_len) // ps, before // ps)
        pages = tables[s - 1][:shared] if shared else []
        tables.append(pages + [free.pop() for _ in range(cdiv(kv_len, ps) - shared)])

    q_lens, kv_lens = ([pair[i] for pair in lengths] for i in (0, 1))
    batch, order = RaggedBatch.from_lengths(
        q_lens,
        kv_lens,
        tables,
        max_num_seqs=shape.max_num_seqs,
        pages_per_seq=shape.pages_per_seq,
    )
    tables = [tables[s] for s in order]
    batch = _fill_with_garbage(batch, tables, rng)

    total, k = int(sum(q_lens)), len(lengths)
    assert total <= shape.num_tokens, "the test asks for more tokens than its shape has"

    def tokens(num_heads):
        array = rng.standard_normal((shape.num_tokens, num_heads, shape.head_dim))
        array[total:] = np.nan  # padding rows must not be read, nor stored
        return array.astype(jnp.dtype(shape.dtype))

    sizes = (shape.num_pages, ps, shape.num_kv_heads, shape.head_dim, jnp.dtype(shape.dtype))
    cache_shape = get_kv_cache_shape(*sizes, share_lanes=shape.share_lanes)
    queries, keys, values = (
        tokens(n) for n in (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    cache = np.full(cache_shape, np.nan, jnp.dtype(shape.dtype))
    new_slots, cached = [], np.zeros(cache_shape[:2], bool)
    for s in range(k):
        q_len = int(batch.cu_q_lens[s + 1] - batch.cu_q_lens[s])
        for position in range(int(batch.kv_lens[s])):
            place = (tables[s][position // ps], position % ps)
            if position >= batch.kv_lens[s] - q_len:
                new_slots.append(place)
            else:
                cached[place] = True
    # One fixed number of tokens, whatever is cached: JAX would compile for every other one.
    cache[cached] = _packed(rng, cached.size, shape)[: cached.sum()]
    if not new_tokens_only:
        packed = shape.pack(keys, values)
        for token, place in enumerate(new_slots):
            cache[place] = packed[token]
    slots = np.array(new_slots, np.int64).reshape(-1, 2)
    return Case(shape, queries, keys, values, cache, batch, slots)


def _packed(rng, num_tokens, shape):
    kv = rng.standard_normal((2, num_tokens, shape.num_kv_heads, shape.head_dim))
    return shape.pack(*kv.astype(jnp.dtype(shape.dtype)))


def _fill_with_garbage(batch, tables, rng):
    """Overwrite all that no one may look at: table padding, and the slots behind the last one."""
    k = int(batch.num_seqs)
    table = rng.choice(GARBAGE, (batch.max_num_seqs, batch.pages_per_seq))
    for row, pages in zip(table, tables, strict=False):
        row[: len(pages)] = pages
    kv_lens, cu_q_lens = batch.kv_lens.copy(), batch.cu_q_lens.copy()
    kv_lens[k:] = rng.choice(GARBAGE, len(kv_lens) - k)
    cu_q_lens[k + 1 :] = rng.choice(GARBAGE, len(cu_q_lens) - k - 1)
    return RaggedBatch(kv_lens, table.reshape(-1).astype(np.int32), cu_q_lens, batch.distribution)


@st.composite
def lengths(draw, shape: Shape):
    """Lists of (q_len, kv_len): idle slots, decodes, chunks behind a prefix, whole prompts."""
    ps, room = shape.page_size, shape.page_size * shape.pages_per_seq
    near_page_ends = [n for end in range(0, room + 1, ps) for n in (end - 1, end, end + 1)]
    kv_len_of = st.sampled_from([n for n in near_page_ends if 0 <= n <= room]) | st.integers(
        0, room
    )
    pairs, left = [], shape.num_tokens
    for _ in range(draw(st.integers(0, shape.max_num_seqs))):
        kv_len = draw(kv_len_of)
        kind = draw(st.sampled_from(["idle", "decode", "chunk", "prompt"]))
        wanted = {"idle": 0, "decode": 1, "prompt": kv_len}.get(kind)
        q_len = draw(st.integers(0, kv_len)) if wanted is None else wanted
        q_len = min(q_len, kv_len, left)
        left -= q_len
        pairs.append((q_len, kv_len))
    return pairs
