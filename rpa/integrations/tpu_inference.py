"""Rung 8 inside vLLM on TPU: what tpu-inference's attention layer calls, by its own signatures.

    RPA_IN_VLLM=1 vllm serve ...        # as a plugin, in every process of the server

or, in Python, before the first model is compiled:

    from rpa.integrations import tpu_inference
    tpu_inference.use_rpa()
    ...
    tpu_inference.use_original()

The layer keeps its mesh, its `shard_map` and its caches, whose layouts rung 8 shares. Models that
import the kernel by themselves, past the layer, keep the engine's.
"""

import importlib
import os

import jax.numpy as jnp

from rpa.integrations.switch import CannotDo, log, put_in, take_out
from rpa.kernel import ragged_paged_attention
from rpa.paging import get_kv_cache_shape

LAYER = "tpu_inference.layers.common.attention_interface"

V3_BLOCKS = ("d_block_sizes", "p_block_sizes", "m_block_sizes")
"""Arguments that the layer fills from RPA_V3_*_BLOCK_SIZES: tuned for v3, so not used here."""


def use_rpa() -> None:
    """Let the attention layer of tpu-inference run rung 8.

    Raises:
        ImportError: if tpu-inference is not installed.
    """
    layer = importlib.import_module(LAYER)
    put_in(layer, "ragged_paged_attention", attention)
    put_in(layer, "ragged_paged_attention_hd64", attention_hd64)


def use_original() -> None:
    """Let it run its own kernels again; what is compiled stays compiled."""
    layer = importlib.import_module(LAYER)
    take_out(layer, "ragged_paged_attention")
    take_out(layer, "ragged_paged_attention_hd64")


def plugin() -> None:
    """vLLM calls this in each of its processes; it acts only where RPA_IN_VLLM is 1."""
    wish = os.environ.get("RPA_IN_VLLM", "0")
    if wish == "1":
        use_rpa()
    elif wish != "0":
        log.warning(
            "RPA_IN_VLLM is %r, but must be 1 (attention runs rung 8 of rpa) or 0 or unset (it "
            "runs the engine's own kernel, as now).",
            wish,
        )


def attention(
    queries,
    keys,
    values,
    kv_cache,
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    *,
    decode_query_size=1,
    **options,
):
    """`rpa.ragged_paged_attention` by the arguments that the attention layer passes.

    Args:
        queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution: as there.
        decode_query_size: up to how many new tokens a sequence of the decode range has. With more
            than 1, rung 8 computes that range with its mixed kernel.
        **options: as there; block sizes are those of rung 8, whatever they say.

    Returns:
        output, kv_cache.

    Raises:
        As `rpa.ragged_paged_attention`.
    """
    if decode_query_size > 1:
        distribution = jnp.asarray(distribution).at[:2].set(0)
    options = {name: value for name, value in options.items() if name not in V3_BLOCKS}
    return ragged_paged_attention(
        *(queries, keys, values, kv_cache),
        *(kv_lens, page_indices, cu_q_lens, distribution),
        **options,
    )


def attention_hd64(
    queries,
    keys,
    values,
    kv_cache,
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    attention_sink=None,
    *,
    num_kv_pages_per_block=None,
    num_queries_per_block=None,
    **options,
):
    """The same for heads of 64, whose K and V share the lanes of the cache.

    Args:
        queries to distribution, **options: as of `attention`.
        attention_sink: f32[num_q_heads] or None; their ninth positional argument.
        num_kv_pages_per_block, num_queries_per_block: blocks of their kernel, not used.

    Raises:
        CannotDo: for so few heads that the cache has the same shape with and without shared lanes.
    """
    num_kv_heads, head_dim = keys.shape[1:]
    num_pages, page_size = kv_cache.shape[:2]
    sizes = num_pages, page_size, num_kv_heads, head_dim, kv_cache.dtype
    if get_kv_cache_shape(*sizes) == get_kv_cache_shape(*sizes, share_lanes=True):
        raise CannotDo(
            f"With {num_kv_heads} KV heads of 64 in {kv_cache.dtype}, rung 8 would take their "
            "cache, whose lanes K and V share, for one of its own, whose lanes they do not."
        )
    return attention(
        *(queries, keys, values, kv_cache),
        *(kv_lens, page_indices, cu_q_lens, distribution),
        attention_sink=attention_sink,
        **options,
    )
