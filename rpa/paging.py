"""Rung 2: paged attention. The KV cache becomes a pool of pages, a sequence a list of pages.

A server cannot know how long an answer will be. Reserving the longest possible one for every
sequence wastes most of the memory; pages of a few tokens, handed out as a sequence grows, waste
less than one page a sequence (Kwon et al. 2023, PagedAttention, arXiv 2309.06180).

The file has two parts: the *layout* (how the K and V of a token lie in memory) and *attention
through a page table*. Which page belongs to which sequence is decided in `rpa.page_pool`.

The layout is the one of the production kernel (arXiv 2604.15464, section 3):

    kv_cache [num_pages, page_size, ceil(2 * num_kv_heads / packing), packing, align(head_dim, 128)]

K and V of a head are neighbours (combined head `2h` is K, `2h + 1` is V) and `packing` of them
share 32 bits (2 for bfloat16, 4 for float8). Why: a TPU tiles the last two dimensions of an array,
and a DMA can only cut along untiled ones. Here one token is a slice of an untiled dimension, so a
single DMA moves all heads of any number of tokens, and one 32-bit lane holds K and V together.

At head_dim 64 half of these lanes are padding. A cache may also be made with `share_lanes=True`,
the layout of the production kernel for head_dim 64: K of a head in lanes 0 to 63 and its V in lanes
64 to 127 of the same row, half the bytes:

    kv_cache [num_pages, page_size, ceil(num_kv_heads / packing), packing, 128]

Which of the two a cache has is told by its shape alone, so no function asks for it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rpa import dense
from rpa.chips import LANES  # head_dim is padded to whole rows of a register, 128 lanes
from rpa.page_pool import cdiv, whole_number

# --- The layout -----------------------------------------------------------------------------


def packing_of(dtype) -> int:
    """How many values of a dtype share a 32-bit lane: 1 of float32, 2 of bfloat16, 4 of float8.

    Raises:
        ValueError: for a dtype of more than 32 bits, or of none.

    >>> packing_of(jnp.bfloat16)
    2
    """
    item_bytes = jnp.dtype(dtype).itemsize
    if item_bytes == 0:
        raise ValueError(f"dtype is {dtype!r}, which has no bits: take float32 or bfloat16.")
    if item_bytes > 4:
        raise ValueError(
            f"dtype is {jnp.dtype(dtype).name}, but must have at most 32 bits, as a lane of a TPU "
            "has: take float32, bfloat16 or a float8 type."
        )
    return 4 // item_bytes


def get_kv_cache_shape(
    total_num_pages,
    page_size,
    actual_num_kv_heads,
    actual_head_dim,
    kv_dtype,
    *,
    share_lanes=False,
) -> tuple[int, int, int, int, int]:
    """Shape of the cache array; name and arguments are those of the production kernel.

    Args:
        total_num_pages: pages of the cache.
        page_size: tokens of a page.
        actual_num_kv_heads, actual_head_dim: the true sizes, without padding.
        kv_dtype: of the cache: float32, bfloat16 or a float8 type.
        share_lanes: whether K and V of a head share their 128 lanes; needs head_dim 64. Where so
            few heads are stored that this saves nothing (one of bfloat16, two of float8), the
            shape, and with it the layout, is the one without.

    Raises:
        ValueError: if lanes shall be shared by heads that leave no room for it, for a dtype of
            more than 32 bits, or for a size that is no positive whole number.

    Eight KV heads of 128 in bfloat16: 16 combined heads, in 8 rows of packed pairs. The same of 64,
    with shared lanes: 8 heads in 4 rows.

    >>> get_kv_cache_shape(100, 16, 8, 128, jnp.bfloat16)
    (100, 16, 8, 2, 128)
    >>> get_kv_cache_shape(100, 16, 8, 64, jnp.bfloat16, share_lanes=True)
    (100, 16, 4, 2, 128)
    """
    sizes = {
        "total_num_pages": total_num_pages,
        "page_size": page_size,
        "actual_num_kv_heads": actual_num_kv_heads,
        "actual_head_dim": actual_head_dim,
    }
    for name, size in sizes.items():
        if whole_number(name, size) < 1:
            raise ValueError(f"{name} is {size!r}, but must be positive.")
    packing = packing_of(kv_dtype)
    if share_lanes and 2 * actual_head_dim != LANES:
        raise ValueError(
            f"share_lanes=True with head_dim {actual_head_dim}: only with {LANES // 2} do K and V "
            f"of a head fill {LANES} lanes together. Leave share_lanes out."
        )
    rows = cdiv(actual_num_kv_heads if share_lanes else 2 * actual_num_kv_heads, packing)
    return (total_num_pages, page_size, rows, packing, cdiv(actual_head_dim, LANES) * LANES)


def lanes_are_shared(kv_cache_shape, num_kv_heads, head_dim) -> bool:
    """Whether K and V of a head share their lanes in a cache of this shape.

    Args:
        kv_cache_shape: of a cache, or the last three dimensions of it: (rows, packing, lanes).
        num_kv_heads, head_dim: the true sizes, without padding.

    >>> lanes_are_shared((100, 16, 4, 2, 128), 8, 64), lanes_are_shared((100, 16, 8, 2, 128), 8, 64)
    (True, False)
    """
    rows, packing, lanes = kv_cache_shape[-3:]
    return 2 * head_dim == lanes and rows < cdiv(2 * num_kv_heads, packing)


def kv_token_bytes(kv_cache_shape, dtype) -> int:
    """Bytes that one token takes in the cache of one layer, padding included.

    >>> kv_token_bytes(get_kv_cache_shape(100, 16, 8, 128, jnp.bfloat16), jnp.bfloat16)
    4096
    """
    return int(np.prod(kv_cache_shape[2:])) * jnp.dtype(dtype).itemsize


def pack_kv(keys, values, *, share_lanes=False):
    """Lay K and V of some tokens out as the cache holds them; all padding is written as zeros.

    Args:
        keys, values: [num_tokens, num_kv_heads, head_dim], of one dtype.
        share_lanes: as of `get_kv_cache_shape`.

    Returns:
        [num_tokens, ...], the rest being the last three dimensions of `get_kv_cache_shape`.

    >>> keys, values = jnp.ones((1, 2, 64)) * 3, jnp.ones((1, 2, 64)) * 4
    >>> pack_kv(keys, values)[0, :, 0, 0]  # K and V of head 0, K and V of head 1
    Array([3., 4., 3., 4.], dtype=float32)
    >>> pack_kv(keys, values, share_lanes=True)[0, :, 0, ::64]  # a row is a head
    Array([[3., 4.],
           [3., 4.]], dtype=float32)
    """
    num_tokens, num_kv_heads, head_dim = keys.shape
    one_token = 1, 1, num_kv_heads, head_dim, keys.dtype
    shape = get_kv_cache_shape(*one_token, share_lanes=share_lanes)
    if lanes_are_shared(shape, num_kv_heads, head_dim):
        combined = jnp.concatenate([keys, values], axis=2)
    else:
        combined = jnp.stack([keys, values], axis=2)
        combined = combined.reshape(num_tokens, 2 * num_kv_heads, head_dim)
    _, _, rows, packing, lanes = shape
    pad_heads, pad_lanes = rows * packing - combined.shape[1], lanes - combined.shape[2]
    combined = jnp.pad(combined, ((0, 0), (0, pad_heads), (0, pad_lanes)))
    return combined.reshape(num_tokens, rows, packing, lanes)


def unpack_kv(packed, num_kv_heads, head_dim):
    """Undo `pack_kv`; any number of leading dimensions, so a page or a whole cache will do.

    Args:
        packed: [..., rows, packing, lanes], of either layout.
        num_kv_heads, head_dim: the true sizes, without padding.

    Returns:
        keys, values: [..., num_kv_heads, head_dim].

    >>> keys, values = unpack_kv(jnp.zeros((10, 16, 8, 2, 128), jnp.bfloat16), 8, 128)
    >>> keys.shape
    (10, 16, 8, 128)
    """
    *lead, rows, packing, lanes = packed.shape
    combined = packed.reshape(*lead, rows * packing, lanes)
    if lanes_are_shared(packed.shape, num_kv_heads, head_dim):
        heads = combined[..., :num_kv_heads, :]
        return heads[..., :head_dim], heads[..., head_dim:]
    combined = combined[..., : 2 * num_kv_heads, :head_dim]
    paired = combined.reshape(*lead, num_kv_heads, 2, head_dim)
    return paired[..., 0, :], paired[..., 1, :]


def store_kv(kv_cache, keys, values, pages, slots):
    """Write new tokens into the cache, each at its page and slot; all other bits stay as they are.

    Args:
        kv_cache: see the layout above.
        keys, values: [num_tokens, num_kv_heads, head_dim] in the dtype of the cache.
        pages: i32[num_tokens]; a page that does not exist means "do not store this token".
        slots: i32[num_tokens], the row of the token in its page.

    Returns:
        The new cache; the argument is untouched.

    >>> cache = jnp.zeros(get_kv_cache_shape(2, 4, 1, 128, jnp.float32))
    >>> ones = jnp.ones((1, 1, 128))
    >>> store_kv(cache, ones, ones, jnp.array([1]), jnp.array([2]))[1, :, 0, 0, 0]
    Array([0., 0., 1., 0.], dtype=float32)
    """
    # JAX counts a negative index from the end and clamps one past the end: both would land on a
    # page that is somebody's. A page that does not exist is sent past the end, and dropped there.
    pages = jnp.where(pages < 0, kv_cache.shape[0], pages)
    # As integers: XLA on a CPU scatters float8 by way of float16, which changes the bits of a NaN
    # that an untouched page may hold.
    share_lanes = lanes_are_shared(kv_cache.shape, *keys.shape[1:])
    new_bits = _as_bits(pack_kv(keys, values, share_lanes=share_lanes))
    stored = _as_bits(kv_cache).at[pages, slots].set(new_bits, mode="drop")
    return jax.lax.bitcast_convert_type(stored, kv_cache.dtype)


def _as_bits(array):
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def copy_pages(kv_cache, copies):
    """Carry out the page copies that a copy-on-write asked for (see `PagePool.append`).

    Args:
        kv_cache: see the layout above.
        copies: a list of `rpa.page_pool.PageCopy`, or (source, target); may be empty.

    Returns:
        The new cache, bit for bit; the argument is untouched.

    >>> cache = jnp.arange(3.0).reshape(3, 1, 1, 1, 1)
    >>> copy_pages(cache, [(2, 0)])[:, 0, 0, 0, 0]
    Array([2., 1., 2.], dtype=float32)
    """
    if not copies:
        return kv_cache
    sources, targets = (np.array(column, np.int32) for column in zip(*copies, strict=True))
    copied = _as_bits(kv_cache).at[targets].set(_as_bits(kv_cache)[sources])
    return jax.lax.bitcast_convert_type(copied, kv_cache.dtype)


def paged_attention(
    q,
    kv_cache,
    pages,
    kv_len,
    q_start,
    *,
    num_kv_heads,
    sm_scale=None,
    score_scale=1.0,
    causal=True,
    sliding_window=None,
    soft_cap=None,
    sinks=None,
    return_lse=False,
):
    """Attention of one sequence whose K and V are gathered page by page: rung 2.

    Pass 1 walks over the sequence's pages and fills in the scores, then comes the softmax, and
    pass 2 walks over the same pages to mix the values. Only live pages are touched: not the
    padding of the table, not a page before the sliding window. (That it takes two passes, and a
    row of scores as long as the context, is what rung 4 mends.)

    Args:
        q: [q_len, num_q_heads, head_dim].
        kv_cache: the whole cache, see the layout above; the new tokens are in it already.
        pages: i32[pages_per_seq], the sequence's row of the page table; entries past the live
            ones are not looked at, whatever they hold.
        kv_len: i32[], tokens of the sequence in the cache, the new ones included.
        q_start: i32[], the position of the first query in the sequence.
        num_kv_heads: the true number of KV heads; the cache may be padded.
        sm_scale: None stands for `head_dim ** -0.5`.
        score_scale: a further factor on the scores, for a quantised cache.
        causal, sliding_window, soft_cap, sinks: see `rpa.dense`.
        return_lse: whether to return `dense.log_sum_exp` of each row as well.

    Returns:
        f32[q_len, num_q_heads, head_dim], with return_lse also f32[q_len, num_q_heads].

    >>> cache = jnp.ones(get_kv_cache_shape(4, 8, 2, 64, jnp.float32))
    >>> paged_attention(jnp.ones((1, 4, 64)), cache, jnp.array([3, 999]), 5, 4,
    ...                 num_kv_heads=2).shape
    (1, 4, 64)
    """
    kv_cache, pages = jnp.asarray(kv_cache), jnp.asarray(pages)  # indexed by traced numbers
    q_len, num_q_heads, head_dim = q.shape
    page_size, pages_per_seq = kv_cache.shape[1], pages.shape[0]
    sm_scale = (head_dim**-0.5 if sm_scale is None else sm_scale) * score_scale
    first_page, end_page = live_pages(kv_len, q_start, page_size, sliding_window)

    def score_page(p, scores):  # scores: f32[num_kv_heads, group, q_len, max_kv_len]
        keys, _ = unpack_kv(kv_cache[pages[p]], num_kv_heads, head_dim)
        page_scores = dense.scores_of(q, keys, sm_scale, soft_cap)
        return jax.lax.dynamic_update_slice_in_dim(scores, page_scores, p * page_size, axis=3)

    group = num_q_heads // num_kv_heads
    scores = jnp.zeros((num_kv_heads, group, q_len, pages_per_seq * page_size), jnp.float32)
    scores = jax.lax.fori_loop(first_page, end_page, score_page, scores)

    kv_positions = jnp.arange(pages_per_seq * page_size)
    mask = dense.visible(
        q_start + jnp.arange(q_len), kv_positions, causal=causal, sliding_window=sliding_window
    )
    mask &= kv_positions[None, :] < kv_len
    if sinks is not None:
        sinks = sinks.reshape(num_kv_heads, group)
    weights = dense.masked_softmax(scores, mask, sinks)

    def mix_page(p, output):  # output: f32[q_len, num_q_heads, head_dim]
        _, values = unpack_kv(kv_cache[pages[p]], num_kv_heads, head_dim)
        # The tail of the last page holds whatever the page held before: it may be NaN, and a
        # weight of zero does not make that go away.
        seen = jax.lax.dynamic_slice_in_dim(mask.any(axis=0), p * page_size, page_size)
        values = jnp.where(seen[:, None, None], values, 0)
        page_weights = jax.lax.dynamic_slice_in_dim(weights, p * page_size, page_size, axis=3)
        return output + dense.weighted_values(page_weights, values)

    output = jax.lax.fori_loop(first_page, end_page, mix_page, jnp.zeros(q.shape, jnp.float32))
    if not return_lse:
        return output
    lse = dense.log_sum_exp(scores, mask, sinks)  # [num_kv_heads, group, q_len]
    return output, lse.reshape(num_q_heads, q_len).T


def live_pages(kv_len, q_start, page_size, sliding_window=None):
    """Which pages of a sequence have to be read: `[first_page, end_page)` of its page list.

    The first one is 0, or with a sliding window the page of the first token in the window of the
    first query.

    Args:
        kv_len: tokens of the sequence in the cache; a number, an array or a traced scalar.
        q_start: position of the first query; looked at only with a window.
        page_size, sliding_window: in tokens.

    >>> live_pages(kv_len=33, q_start=32, page_size=16)
    (0, 3)
    >>> [int(page) for page in live_pages(33, 32, 16, sliding_window=2)]
    [1, 3]
    """
    end_page = cdiv(kv_len, page_size)
    if sliding_window is None:
        return 0, end_page
    return jnp.maximum(q_start - sliding_window + 1, 0) // page_size, end_page
