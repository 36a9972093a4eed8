"""Programs around rung 7 that test_kernel_compile and the bench have compiled for a chip."""

from rpa.kernel import ragged_paged_attention


def attend(*arrays, **options):
    """One call, compiled; `options` are those of the public function."""
    return ragged_paged_attention(*arrays, backend="tpu", **options)


def attend_layers(queries, keys, values, caches, *metadata, **options):
    """A model's loop over layers, one cache a layer: each must be updated in place."""
    updated = []
    for kv_cache in caches:
        queries, kv_cache = attend(queries, keys, values, kv_cache, *metadata, **options)
        updated.append(kv_cache)
    return queries, updated
