"""The forms of `rpa.parallel` on eight devices: models and batches for which one chooses them."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rpa.page_pool import cdiv
from rpa.parallel import DecodeContext, Heads, Parallel, PrefillContext, Sequences
from rpa.ragged import RaggedBatch

TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1")
"""Eight devices each: Kaggle's v5e-8, a host of v6e, four chips of TPU7x with two cores each."""

NUM_LAYERS = 2
"""Layers of the loop that is compiled: enough for a copy of the cache in it to show."""

PAGE_SIZE = 128


@dataclass(frozen=True)
class Case:
    """One form with what it works on.

    Attributes:
        axes: (form, number of devices) for each axis of the mesh; eight devices in all.
        heads: num_q_heads, num_kv_heads and head_dim of the model.
        lengths: (q_len, kv_len) of each sequence of one layer.
        on_chip: (lengths, heads) that one device attends over.
        overlaps: whether copies travel while the device attends.
    """

    axes: tuple
    heads: tuple
    lengths: tuple
    on_chip: tuple
    overlaps: bool = False

    @property
    def num_devices(self):
        """Devices of the mesh."""
        return int(np.prod([size for _, size in self.axes]))


def _decodes(count, kv_len):
    return ((1, kv_len),) * count


CASES = {
    "heads": Case(
        axes=((Heads, 8),),
        heads=(64, 8, 128),
        lengths=_decodes(64, 8192),
        on_chip=(_decodes(64, 8192), (8, 1, 128)),
    ),
    "heads, each KV head on two": Case(
        axes=((Heads, 8),),
        heads=(32, 4, 128),
        lengths=_decodes(64, 8192),
        on_chip=(_decodes(64, 8192), (4, 1, 128)),
    ),
    "sequences": Case(
        axes=((Sequences, 8),),
        heads=(64, 8, 128),
        lengths=_decodes(64, 8192),
        on_chip=(_decodes(8, 8192), (64, 8, 128)),
    ),
    "sequences x heads": Case(
        axes=((Sequences, 2), (Heads, 4)),
        heads=(64, 8, 128),
        lengths=_decodes(64, 8192),
        on_chip=(_decodes(32, 8192), (16, 2, 128)),
    ),
    "decode context": Case(
        axes=((DecodeContext, 8),),
        heads=(8, 1, 128),
        lengths=_decodes(64, 8192),
        on_chip=(_decodes(64, 1024), (8, 1, 128)),
    ),
    "heads x decode context": Case(
        axes=((Heads, 4), (DecodeContext, 2)),
        heads=(32, 4, 128),
        lengths=_decodes(64, 8192),
        on_chip=(_decodes(64, 4096), (8, 1, 128)),
    ),
    "prefill context": Case(
        axes=((PrefillContext, 8),),
        heads=(8, 1, 128),
        lengths=((32_768, 32_768),),
        on_chip=(((4096, 18_432),), (8, 1, 128)),  # its queries see 18,432 keys on average, less 2k
        overlaps=True,
    ),
}
"""Every form, and the compositions that engines use."""


def program(case: Case, devices):
    """The function to compile, its arguments as shapes with shardings, and the mesh.

    A loop over layers as `rpa.models.llama` has it: the caches of all layers in one array, and
    pages found by an offset.
    """
    mesh = Mesh(
        np.array(devices[: case.num_devices]).reshape([size for _, size in case.axes]),
        tuple(form.__name__.lower() for form, _ in case.axes),
    )
    forms = [form(form.__name__.lower()) for form, _ in case.axes]
    parallel = Parallel(mesh, *forms)
    num_ranks = np.prod([size for form, size in case.axes if form is Sequences], dtype=int)
    num_page_chips = np.prod([size for form, size in case.axes if form is not Heads], dtype=int)
    num_q_heads, num_kv_heads, head_dim = case.heads
    num_tokens = sum(q_len for q_len, _ in case.lengths)
    pages_per_seq = max(cdiv(kv_len, PAGE_SIZE) for _, kv_len in case.lengths)
    # A chip's pages of one layer.
    num_pages = cdiv(len(case.lengths) * pages_per_seq, num_page_chips)
    cache_shape = parallel.cache_shape(
        NUM_LAYERS * num_pages * num_page_chips, PAGE_SIZE, num_kv_heads, head_dim, jnp.bfloat16
    )

    def array(name, shape, dtype=jnp.bfloat16):
        sharding = parallel.sharding(name, num_kv_heads)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def of_layers(name, shape):
        spec = PartitionSpec(None, *parallel.specs(num_kv_heads)[name])
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((NUM_LAYERS, *shape), jnp.bfloat16, sharding=sharding)

    num_seqs = len(case.lengths)
    sizes = (num_seqs, num_seqs * pages_per_seq, num_seqs + num_ranks, 3 * num_ranks)
    arguments = (
        array("queries", (num_tokens, num_q_heads, head_dim)),
        # Of each layer its own, or XLA would send what is the same in all of them only once.
        *(of_layers(name, (num_tokens, num_kv_heads, head_dim)) for name in ("keys", "values")),
        array("kv_cache", cache_shape),
        RaggedBatch(*(array("batch", (size,), jnp.int32) for size in sizes)),
    )

    def layers(queries, keys, values, kv_cache, batch):
        def one_layer(carry, layer):
            queries, kv_cache = carry
            index, keys, values = layer
            pages = batch.page_indices + index * num_pages
            own = dataclasses.replace(batch, page_indices=pages)
            return parallel(queries, keys, values, kv_cache, own, sm_scale=0.1), None

        indices = jnp.arange(NUM_LAYERS, dtype=jnp.int32)
        return jax.lax.scan(one_layer, (queries, kv_cache), (indices, keys, values))[0]

    return layers, arguments, mesh
