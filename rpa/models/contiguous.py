"""One sequence whose cache is one page: the simplest KV cache that the forward pass accepts.

It serves two purposes. It is how `logits` and `generate` run a single sequence, without depending
on any later rung; and it shows what paging has to replace: room for the longest sequence is
reserved before its first token is known.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rpa import dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneSequence:
    """The batch of one sequence: where its new tokens begin, and which page is its own.

    `start` is i32[], the position of the first new token; `page_indices` is i32[1].
    """

    start: jax.Array
    page_indices: jax.Array

    @classmethod
    def starting_at(cls, start):
        """New tokens begin at position `start`, behind `start` tokens that are cached."""
        return cls(jnp.asarray(start, jnp.int32), jnp.zeros(1, jnp.int32))


def new_contiguous_cache(config, capacity, dtype=jnp.float32):
    """An empty cache for `capacity` tokens: [num_layers, 2, capacity, num_kv_heads, head_dim].

    Dimension 0 counts pages, one per layer; dimension 1 is K, then V.
    """
    shape = (config.num_layers, 2, capacity, config.num_kv_heads, config.head_dim)
    return jnp.zeros(shape, dtype)


def contiguous_attention(queries, keys, values, kv_cache, batch, *, sm_scale):
    """Dense causal attention (`rpa.dense`) with a contiguous cache, in the signature of a rung.

    New tokens may be padded at the end: a padding token is behind every real one, so no real
    query sees it, and the next call writes over it.

    Args:
        queries: [num_tokens, num_q_heads, head_dim].
        keys, values: [num_tokens, num_kv_heads, head_dim].
        kv_cache: see `new_contiguous_cache`; start + num_tokens must not exceed its capacity.
        batch: OneSequence.
        sm_scale: the factor before the softmax.

    Returns:
        output [num_tokens, num_q_heads, head_dim] in the dtype of queries, and the cache.
    """
    page = batch.page_indices[0]
    new = jnp.stack([keys, values])[None]  # [1, 2, num_tokens, num_kv_heads, head_dim]
    kv_cache = jax.lax.dynamic_update_slice(kv_cache, new, (page, 0, batch.start, 0, 0))
    cached_keys, cached_values = kv_cache[page]  # [capacity, num_kv_heads, head_dim] each
    mask = dense.visible(
        batch.start + jnp.arange(queries.shape[0]), jnp.arange(cached_keys.shape[0])
    )
    output = dense.attend(queries, cached_keys, cached_values, mask, sm_scale=sm_scale)
    return output.astype(queries.dtype), kv_cache
