"""Rung 8 inside SGLang on TPU: what sglang-jax's flash attention backend calls.

    from rpa.integrations import sglang_jax
    sglang_jax.use_rpa(max_kv_len=32_768)   # before the first model is compiled
    ...
    sglang_jax.use_original()

Their cache has our layout. Their page table has not: the pages of all sequences stand in one row,
each sequence's behind those of the one before, so the rows are cut out here.
"""

import importlib
from functools import partial

import jax.numpy as jnp

from rpa.integrations.switch import CannotDo, put_in, take_out
from rpa.kernel import ragged_paged_attention
from rpa.paging import cdiv

BACKEND = "sgl_jax.srt.layers.attention.flashattention_backend"


def use_rpa(max_kv_len=None) -> None:
    """Let the flash attention backend of sglang-jax run rung 8.

    Args:
        max_kv_len: tokens of the longest sequence, the server's --context-length. It bounds the
            rows of the page table, which are written anew in every layer; None is always right,
            and slow with many pages.

    Raises:
        ImportError: if sglang-jax is not installed.
        AttributeError: for a version whose kernel does not store the new tokens itself.
    """
    ours = partial(attention, max_kv_len=max_kv_len)
    put_in(importlib.import_module(BACKEND), "ragged_paged_attention_v3", ours)


def use_original() -> None:
    """Let it run its own kernel again; what is compiled stays compiled."""
    take_out(importlib.import_module(BACKEND), "ragged_paged_attention_v3")


def attention(
    queries,
    keys,
    values,
    kv_cache,
    kv_lens,
    page_indices,
    cu_q_lens,
    cu_kv_lens,
    distribution,
    custom_mask=None,
    attention_sink=None,
    *,
    causal=1,
    xai_temperature_len=None,
    softmax_dtype=None,
    mask_aligned_to_cu_kv=False,
    d_block_sizes=None,
    p_block_sizes=None,
    m_block_sizes=None,
    max_kv_len=None,
    **options,
):
    """`rpa.ragged_paged_attention` by the arguments of sglang-jax's kernel.

    Args:
        queries, keys, values, kv_cache, kv_lens, cu_q_lens, distribution: as there.
        page_indices: i32[any length], the pages of the sequences one behind the other.
        cu_kv_lens: i32[max_num_seqs + 1]: sequence i's pages start at entry
            `cu_kv_lens[i] / page_size`.
        custom_mask: None; a mask of its own per query and key is refused.
        attention_sink: f32[num_q_heads] or None.
        causal: 1 or 0.
        xai_temperature_len: None; a factor that grows with the position is refused.
        softmax_dtype: None or float32, in which rung 8 computes always.
        mask_aligned_to_cu_kv: says how custom_mask is laid out.
        d_block_sizes, p_block_sizes, m_block_sizes: blocks of their kernel, not used.
        max_kv_len: as of `use_rpa`.
        **options: as there.

    Returns:
        output, kv_cache.

    Raises:
        CannotDo: for custom_mask, xai_temperature_len or a softmax_dtype that is not float32.
        As `rpa.ragged_paged_attention`.
    """
    if custom_mask is not None:
        raise CannotDo("custom_mask is given, and rung 8 has the causal mask and the window only.")
    if xai_temperature_len is not None:
        raise CannotDo("xai_temperature_len is given, and rung 8 scales all scores alike.")
    if softmax_dtype is not None and jnp.dtype(softmax_dtype) != jnp.float32:
        raise CannotDo(f"softmax_dtype is {jnp.dtype(softmax_dtype)}; rung 8 computes in float32.")
    page_size, width = kv_cache.shape[1], len(page_indices)
    if max_kv_len is not None:
        width = min(width, cdiv(max_kv_len, page_size))
    table = rows_of_pages(page_indices, cu_kv_lens, kv_lens, page_size, width)
    return ragged_paged_attention(
        *(queries, keys, values, kv_cache, kv_lens, table, cu_q_lens, distribution),
        attention_sink=attention_sink,
        use_causal_mask=bool(causal),
        **options,
    )


def rows_of_pages(page_indices, cu_kv_lens, kv_lens, page_size, pages_per_seq):
    """A page table with a row per sequence, from one in which the sequences follow each other.

    Args:
        page_indices: i32[num_entries].
        cu_kv_lens: i32[max_num_seqs + 1], tokens before each sequence, in whole pages.
        kv_lens: i32[max_num_seqs].
        page_size: tokens of a page.
        pages_per_seq: entries of a row; `num_entries` where one sequence may own all pages.

    Returns:
        i32[max_num_seqs * pages_per_seq]; entries behind a sequence's last page are -1.

    >>> pages = jnp.array([7, 3, 5, 0])
    >>> rows_of_pages(pages, jnp.array([0, 8, 12]), jnp.array([6, 4]), 4, 3).reshape(2, 3)
    Array([[ 7,  3, -1],
           [ 5, -1, -1]], dtype=int32)
    """
    entry = jnp.arange(pages_per_seq, dtype=jnp.int32)[None]  # [1, pages_per_seq]
    first = cdiv(cu_kv_lens[:-1], page_size)[:, None]  # [max_num_seqs, 1]
    pages = jnp.take(page_indices, first + entry, mode="clip")
    return jnp.where(entry < cdiv(kv_lens, page_size)[:, None], pages, -1).reshape(-1)
