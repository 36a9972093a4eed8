"""Rung 8 goes through the real TPU compiler for three chips, with its default blocks."""

import jax
import jax.numpy as jnp
import pytest

from rpa import chips
from rpa.paging import get_kv_cache_shape
from tests import kernel_programs
from tests.kernel_harness import assert_compiles

pytestmark = pytest.mark.core

CHIPS = ("v5e", "v6e", "tpu7x")
BF16, F32, E4M3, E5M2 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.float8_e5m2


def arguments(
    heads,
    head_dim,
    page_size,
    q=BF16,
    kv=BF16,
    *,
    max_kv_len=8192,
    num_pages=1024,
    share_lanes=False,
):
    """512 tokens of 64 sequences, as shapes."""
    num_q_heads, num_kv_heads = heads
    pages_per_seq = max_kv_len // page_size
    sizes = (num_pages, page_size, num_kv_heads, head_dim, kv)
    kv_cache = get_kv_cache_shape(*sizes, share_lanes=share_lanes)
    shapes = [
        ((512, num_q_heads, head_dim), q),
        ((512, num_kv_heads, head_dim), kv),
        ((512, num_kv_heads, head_dim), kv),
        (kv_cache, kv),
        *(((n,), jnp.int32) for n in (64, 64 * pages_per_seq, 65, 3)),
    ]
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


SINKS = jax.ShapeDtypeStruct((64,), F32)


MODELS = {
    "Llama 3 8B, page 16": (arguments((32, 8), 128, 16), {}),
    "Llama 3 8B, page 128": (arguments((32, 8), 128, 128), {}),
    "Llama 3 70B on 8 chips": (arguments((8, 1), 128, 128), {}),
    "SmolLM2": (arguments((9, 3), 64, 16), {}),
    "SmolLM2, float32": (arguments((9, 3), 64, 16, F32, F32), {}),
    "SmolLM2, shared lanes": (arguments((9, 3), 64, 16, share_lanes=True), {}),
    "64/8 of 64, shared lanes, sinks, window": (
        [*arguments((64, 8), 64, 128, share_lanes=True), SINKS],
        {"sliding_window": 128},
    ),
    "64/8 of 64, shared lanes, float8, sinks": (
        [*arguments((64, 8), 64, 128, kv=E4M3, share_lanes=True), SINKS],
        {},
    ),
    "8/4 of 64, shared lanes, float32": (
        arguments((8, 4), 64, 16, F32, F32, share_lanes=True),
        {},
    ),
    "head_dim 256, e4m3fn": (arguments((16, 4), 256, 64, kv=E4M3), {"q_scale": 0.5}),
    "head_dim 256, e5m2, window, cap": (
        arguments((16, 4), 256, 64, kv=E5M2),
        {"sliding_window": 128, "soft_cap": 30.0, "k_scale": 0.5},
    ),
    "MHA 3/3, head_dim 240, page 8": (arguments((3, 3), 240, 8), {}),
    "12/2, page 256, chunked": (arguments((12, 2), 128, 256), {"chunk_prefill_size": 256}),
    "5/1, head_dim 80, odd blocks": (
        arguments((5, 1), 80, 16),
        {"m_block_sizes": (60, 48, 30, 48)},
    ),
    "float32 output": (arguments((8, 2), 128, 128), {"out_dtype": "float32"}),
    "KV sharing": (arguments((8, 2), 128, 128), {"update_kv_cache": False}),
    # v3's page table alone would take 16 MiB of the 1 MiB of SMEM.
    "1,048,576 tokens x 64 sequences": (arguments((8, 1), 128, 16, max_kv_len=2**20), {}),
}
QUICK = [
    ("v5e", "Llama 3 70B on 8 chips"),
    ("v6e", "SmolLM2, shared lanes"),
    ("tpu7x", "1,048,576 tokens x 64 sequences"),
]
"""What `make test` compiles; `make test-full` compiles everything for every chip."""


@pytest.mark.parametrize(
    "chip, name",
    [
        pytest.param(chip, name, marks=() if (chip, name) in QUICK else pytest.mark.full)
        for chip in CHIPS
        for name in MODELS
    ],
)
def test_compiles_with_default_blocks(chip, name):
    args, options = MODELS[name]
    result = assert_compiles(
        chip, kernel_programs.attend, *args, kwargs=options | {"chip": chip}, donate_argnums=(3,)
    )
    assert len(result.kernels) == 2 + ("chunk_prefill_size" in options)
    assert result.vmem_used_bytes <= chips.chip(chip).vmem_bytes
    if options.get("update_kv_cache", True):
        cache_bytes = args[3].size * args[3].dtype.itemsize
        assert result.alias_bytes >= cache_bytes, "the cache is not updated in place"


@pytest.mark.full
@pytest.mark.parametrize("chip", CHIPS)
def test_a_loop_over_layers_copies_no_cache(chip):
    queries, keys, values, kv_cache, *metadata = arguments((8, 1), 128, 128)
    args = (queries, keys, values, [kv_cache] * 3, *metadata)
    check_in_place(chip, kernel_programs.attend_layers, args, kv_cache, num_caches=3)


@pytest.mark.full
@pytest.mark.parametrize("chip", CHIPS)
def test_a_scan_over_layers_copies_no_cache(chip):
    args = arguments((8, 1), 128, 128, num_pages=3 * 1024)
    check_in_place(chip, kernel_programs.attend_scanned_layers, args, args[3], num_layers=3)


def check_in_place(chip, program, args, kv_cache, *, num_caches=1, **options):
    options |= {"chip": chip}
    result = assert_compiles(
        chip, program, *args, kwargs=options, donate_argnums=(3,), keep_hlo=True
    )
    assert result.copies_of(kv_cache) == []
    assert result.alias_bytes >= num_caches * kv_cache.size * 2
