"""Programs around rung 8 that test_kernel_compile and the bench have compiled for a chip."""

import jax
import jax.numpy as jnp

from rpa.kernel import ragged_paged_attention


def attend(queries, keys, values, kv_cache, *metadata, **options):
    """One call, compiled; `options` are those of the public function.

    An array behind the four of metadata is the attention sinks.
    """
    metadata, sinks = metadata[:4], metadata[4:]
    if sinks:
        options["attention_sink"] = sinks[0]
    tokens = (queries, keys, values, kv_cache)
    return ragged_paged_attention(*tokens, *metadata, backend="tpu", **options)


def attend_layers(queries, keys, values, caches, *metadata, **options):
    """A model's loop over layers, one cache a layer: each must be updated in place."""
    updated = []
    for kv_cache in caches:
        queries, kv_cache = attend(queries, keys, values, kv_cache, *metadata, **options)
        updated.append(kv_cache)
    return queries, updated


def attend_scanned_layers(
    queries, keys, values, kv_cache, kv_lens, page_indices, *metadata, num_layers, **options
):
    """A `lax.scan` over layers: the pages of all layers in one cache, which is carried in place."""
    pages_a_layer = kv_cache.shape[0] // num_layers

    def one_layer(carry, layer):
        queries, kv_cache = carry
        table = page_indices + layer * pages_a_layer
        arrays = (queries, keys, values, kv_cache, kv_lens, table, *metadata)
        return attend(*arrays, **options), None

    (queries, kv_cache), _ = jax.lax.scan(one_layer, (queries, kv_cache), jnp.arange(num_layers))
    return queries, kv_cache


def attend_twice_reading(queries, keys, values, kv_cache, *metadata, **options):
    """Two layers that share the KV of an earlier one: both only read the cache."""
    for _ in range(2):
        arrays = (queries, keys, values, kv_cache, *metadata)
        queries, kv_cache = attend(*arrays, update_kv_cache=False, **options)
    return queries, kv_cache
