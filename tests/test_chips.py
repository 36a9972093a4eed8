"""The table of chips: complete, sourced, consistent, and equal to what JAX says of each chip."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rpa import chips
from rpa.chips import CHIPS, SOURCES, attention_cost, chip
from rpa.lab.compile.compiler import ENVIRONMENT

pytestmark = pytest.mark.core

LLAMA_8B = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}

ASK_JAX = """
import dataclasses, json, jax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from rpa.chips import CHIPS
for name, c in CHIPS.items():
    topology = topologies.get_topology_desc(platform="tpu", topology_name=c.topology)
    with jax.set_mesh(Mesh(topology.devices[:1], "x")):
        info = pltpu.get_tpu_info()
    fields = {k: v for k, v in dataclasses.asdict(info).items() if isinstance(v, (int, float))}
    fields["device_kind"] = topology.devices[0].device_kind
    fields["cores_per_chip"] = info.chip_version.num_physical_tensor_cores_per_chip
    print(json.dumps({"name": name, **fields}))
"""


def test_every_number_has_a_source():
    names = {"name", "device_kinds", "topology", "url"}
    numeric = {field.name for field in dataclasses.fields(chips.Chip)} - names
    assert numeric == set(SOURCES)
    assert all(len(text) > 20 for text in SOURCES.values())


@pytest.mark.parametrize("name", CHIPS)
def test_clock_mxu_and_peak_agree(name):
    c = chip(name)
    np.testing.assert_allclose(c.mxu_flops_per_cycle * c.clock_hz, c.peak("bfloat16"), rtol=0.005)


@pytest.mark.parametrize("name", CHIPS)
def test_agrees_with_the_tpu_info_of_jax(name, tpu_infos):
    c, info = chip(name), tpu_infos[name]
    assert info["device_kind"] in c.device_kinds
    assert info["cores_per_chip"] == c.cores_per_chip
    assert info["num_cores"] == c.cores_per_device
    assert info["num_lanes"] == chips.LANES and info["num_sublanes"] == chips.SUBLANES
    assert info["mxu_column_size"] == c.mxu_size
    assert info["num_mxus"] == c.num_mxus
    assert info["vmem_capacity_bytes"] == c.vmem_bytes
    assert info["smem_capacity_bytes"] == c.smem_bytes
    assert info["mem_bw_bytes_per_second"] == c.hbm_bytes_per_s
    # JAX rounds the capacity to three digits of a chip.
    np.testing.assert_allclose(info["hbm_capacity_bytes"], c.hbm_bytes, rtol=0.01)
    for family, key in (("bfloat16", "bf16"), ("int8", "int8"), ("float8", "fp8")):
        assert info[f"{key}_ops_per_second"] == c.peak_flops_per_s.get(family, 0)


@pytest.fixture(scope="module")
def tpu_infos():
    """What JAX's own table says of each chip, asked in a process of its own: libtpu loads once."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: nothing here to compare the table with")
    from jax.experimental.pallas import tpu as pltpu

    if not hasattr(pltpu, "get_tpu_info"):
        pytest.skip("this JAX has no pltpu.get_tpu_info (it came with 0.8.1)")
    run = subprocess.run(
        [sys.executable, "-c", ASK_JAX],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    infos = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {info["name"]: info for info in infos}


@pytest.mark.parametrize("name", CHIPS)
def test_a_chip_is_found_by_every_name_that_jax_and_people_use(name):
    c = CHIPS[name]
    for alias in (name, name.upper(), f"{name}-8", c.topology, *c.device_kinds, c):
        assert chip(alias) is c


def test_other_names():
    assert chip("v5litepod-4").name == "v5e"
    assert chip("trillium").name == "v6e"
    assert chip("Ironwood").name == chip("v7x").name == chip("TPU 7x").name == "tpu7x"


@pytest.mark.parametrize("name", ["v3", "TPU v4 lite", "H100", "", None])
def test_an_unknown_chip_is_named(name):
    with pytest.raises(ValueError, match="no chip that rpa has numbers of; expected one of v5e"):
        chip(name)


def test_no_tpu_is_attached_here_or_it_is_one_of_ours():
    import jax

    attached = chips.current()
    assert (attached is None) == (jax.devices()[0].platform != "tpu")


def test_peak_by_dtype():
    assert chip("v5e").peak(jnp.float8_e4m3fn) == chip("v5e").peak(jnp.bfloat16)
    assert chip("tpu7x").peak("float8_e5m2") == 2.3e15
    assert chip("tpu7x").peak("int8") == chip("tpu7x").peak()
    with pytest.raises(ValueError, match="dtype: no published peak for float32 on v5e"):
        chip("v5e").peak("float32")


def test_the_hbm_time_of_a_decode_block_is_the_one_the_lab_uses():
    """1,024 tokens of 8 KV heads, 128, bfloat16: the yardstick of every decode schedule."""
    kv_bytes = attention_cost(1, 1024, **LLAMA_8B).kv_read_bytes
    assert kv_bytes == 4_194_304
    cycles = [
        c.cycles(chips.roofline_time(c, 0, kv_bytes).memory_s)
        for c in map(chip, ("v5e", "v6e", "tpu7x"))
    ]
    np.testing.assert_allclose(cycles, [7672, 4488, 2494], atol=1)


def test_roofline_meets_at_the_ridge():
    for c in CHIPS.values():
        ridge = chips.ridge_flops_per_byte(c)
        below, at, above = chips.attainable_flops_per_s(c, np.array([ridge / 2, ridge, 2 * ridge]))
        np.testing.assert_allclose([below, at, above], [c.peak() / 2, c.peak(), c.peak()])
        assert chips.roofline_time(c, flops=0.9 * ridge, hbm_bytes=1.0).bound == "memory"
        assert chips.roofline_time(c, flops=1.1 * ridge, hbm_bytes=1.0).bound == "compute"
        time = chips.roofline_time(c, flops=3 * ridge, hbm_bytes=1.0)
        assert time.time_s == time.compute_s == 3 * ridge / c.peak()


def test_causal_flops_count_the_pairs_that_the_mask_shows():
    """Counted against the mask itself, one (query, key) pair at a time."""
    for q_len, kv_len in [(1, 1), (1, 7), (3, 3), (4, 9), (9, 9)]:
        q_positions = np.arange(kv_len - q_len, kv_len)
        visible_pairs = (np.arange(kv_len)[None, :] <= q_positions[:, None]).sum()
        cost = attention_cost(q_len, kv_len, 4, 2, 64)
        assert cost.flops == 4 * 4 * 64 * visible_pairs
        assert attention_cost(q_len, kv_len, 4, 2, 64, causal=False).flops == (
            4 * 4 * 64 * q_len * kv_len
        )


def test_bytes_are_those_of_the_arrays():
    q_len, kv_len = 5, 33
    cost = attention_cost(q_len, kv_len, 8, 2, 64, jnp.bfloat16, kv_dtype=jnp.float8_e4m3fn)
    queries = np.zeros((q_len, 8, 64), jnp.bfloat16)
    cached = np.zeros((kv_len, 2, 64), jnp.float8_e4m3fn)  # K or V of one sequence
    assert cost.q_bytes == cost.out_bytes == queries.nbytes
    assert cost.kv_read_bytes == 2 * cached.nbytes
    assert cost.kv_write_bytes == 2 * cached[:q_len].nbytes
    assert cost.hbm_bytes == 2 * queries.nbytes + 2 * cached.nbytes + 2 * cached[:q_len].nbytes


def test_a_batch_costs_the_sum_of_its_sequences_and_idle_slots_are_free():
    q_lens, kv_lens = [1, 7, 0, 16], [100, 7, 50, 64]
    batch = attention_cost(q_lens, kv_lens, **LLAMA_8B)
    one_by_one = [
        attention_cost(q, kv, **LLAMA_8B) for q, kv in zip(q_lens, kv_lens, strict=True) if q
    ]
    for field in dataclasses.fields(batch):
        assert getattr(batch, field.name) == sum(getattr(c, field.name) for c in one_by_one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_len": 4, "kv_len": 3}, r"kv_len: given 3 for q_len 4"),
        ({"q_len": -1, "kv_len": 3}, r"expected 0 <= q_len <= kv_len"),
        ({"q_len": [1, 2], "kv_len": [1, 1]}, r"kv_len: given \[1, 1\] for q_len \[1, 2\]"),
        ({"num_q_heads": 9, "num_kv_heads": 2}, r"num_q_heads: given 9 for num_kv_heads 2"),
        ({"num_kv_heads": 0}, r"num_q_heads: given 32 for num_kv_heads 0"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_cost(**{"q_len": 1, "kv_len": 8, **LLAMA_8B, **arguments})


def test_mxu_fill():
    """256-wide MXUs are half empty at head_dim 128, and a head_dim of 240 nearly fills them."""
    expected = {("v5e", 128): 1.0, ("v5e", 64): 0.5, ("v5e", 80): 0.625, ("v5e", 256): 1.0}
    expected |= {("v6e", 128): 0.5, ("tpu7x", 64): 0.25, ("tpu7x", 240): 0.9375}
    for (name, head_dim), fill in expected.items():
        assert chips.mxu_fill(name, head_dim) == fill
