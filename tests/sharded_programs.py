"""What `test_models_sharded` runs on eight devices: `python -m tests.sharded_programs NAME`.

A small Llama with random parameters on eight devices of this process, or, with JAX's variables set,
of several processes: its logits have to be those of one device, and so do the caches of both.
"""

import os
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rpa.demo_devices import start_devices
from rpa.ladder import ragged_rung
from rpa.models import LlamaConfig, forward
from rpa.models.llama import param_shapes
from rpa.models.sharded import pad_heads, shard_params
from rpa.paging import get_kv_cache_shape, unpack_kv
from rpa.parallel import Heads, Parallel
from rpa.ragged import RaggedBatch

PAGE_SIZE, NUM_PAGES = 8, 12

CONFIGS = {"padded": (9, 3), "copied": (16, 4), "shared": (8, 8)}
"""What becomes of the KV heads on eight devices: (query heads, KV heads)."""


def config_of(num_q_heads, num_kv_heads):
    return LlamaConfig(
        num_layers=2, hidden_size=32, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads,
        head_dim=16, ffn_size=64, vocab_size=96, context_len=64,
    )  # fmt: skip


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5,
        param_shapes(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def step_of(attention, config, whole=None):
    """Two steps of the model: a batch of prompts, then one decode of each."""

    @partial(jax.jit, static_argnames="config")
    def run(params, token_ids, positions, kv_cache, batch, config):
        logits, kv_cache = forward(params, config, token_ids, positions, kv_cache, batch, attention)
        if whole is not None:
            logits = jax.lax.with_sharding_constraint(logits, whole)
        return logits, kv_cache

    return partial(run, config=config)


def two_steps(run, params, kv_cache):
    rng = np.random.default_rng(1)
    table = rng.permutation(NUM_PAGES).reshape(2, 6)
    found = []
    for q_lens, kv_lens in [([9, 20], [9, 20]), ([1, 1], [10, 21])]:
        batch, _ = RaggedBatch.from_lengths(q_lens, kv_lens, table)
        positions = np.concatenate(
            [np.arange(k - q, k) for q, k in zip(q_lens, kv_lens, strict=True)]
        )
        token_ids = rng.integers(0, 96, len(positions)).astype(np.int32)
        logits, kv_cache = run(params, token_ids, positions.astype(np.int32), kv_cache, batch)
        found.append(np.asarray(logits))
    return found, kv_cache


def check(num_q_heads, num_kv_heads, devices):
    config = config_of(num_q_heads, num_kv_heads)
    params = random_params(config)
    pages = config.num_layers * NUM_PAGES
    shape = get_kv_cache_shape(pages, PAGE_SIZE, num_kv_heads, config.head_dim, jnp.float32)
    with jax.default_device(jax.local_devices()[0]):
        expected, expected_cache = two_steps(step_of(ragged_rung, config), params, jnp.zeros(shape))

    mesh = Mesh(np.array(devices), ("model",))
    padded_params, padded = pad_heads(params, config, len(devices))
    attention = Parallel(mesh, Heads("model"), attention=ragged_rung)
    shape = attention.cache_shape(
        pages, PAGE_SIZE, padded.num_kv_heads, config.head_dim, jnp.float32
    )
    sharding = attention.sharding("kv_cache", padded.num_kv_heads)
    cache = jax.jit(partial(jnp.zeros, shape), out_shardings=sharding)()
    whole = NamedSharding(mesh, PartitionSpec())
    run = step_of(attention, padded, whole)
    logits, cache = two_steps(run, shard_params(padded_params, padded, mesh, "model"), cache)
    for one, many in zip(expected, logits, strict=True):
        np.testing.assert_allclose(many, one, atol=2e-5)
    # Each device of this process: the heads that it has, as one device has them.
    for shard in cache.addressable_shards:
        device = devices.index(shard.device)
        on_device = shard.data.shape[2] // 2
        first = device * padded.num_kv_heads // len(devices)
        mine = unpack_kv(np.asarray(shard.data), on_device, config.head_dim)
        whole_cache = unpack_kv(np.asarray(expected_cache), num_kv_heads, config.head_dim)
        for own, of_all in zip(mine, whole_cache, strict=True):
            wanted = of_all[..., first : first + on_device, :]
            np.testing.assert_allclose(own[..., : wanted.shape[-2], :], wanted, atol=2e-5)
            assert not own[..., wanted.shape[-2] :, :].any(), "a padding head is not zero"


if __name__ == "__main__":
    distributed = "JAX_COORDINATOR_ADDRESS" in os.environ
    start_devices(8, distributed)
    assert jax.device_count() == 8, jax.devices()
    for name in sys.argv[1:]:
        check(*CONFIGS[name], jax.devices())
        print(f"{name}: right, processes: {jax.process_count()}")
