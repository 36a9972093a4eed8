"""Rung 8 inside the serving engines: their attention layers as installed, on eight host devices."""

import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rpa.integrations import sglang_jax, switch, tpu_inference
from rpa.lab import peers
from rpa.paging import get_kv_cache_shape

ROOT = Path(__file__).parents[1]


def engine_of(function):
    return types.SimpleNamespace(__name__="engine", attention=function)


def test_a_refused_call_runs_the_engines_own_kernel_and_says_so_once(caplog):
    def ours(x):
        raise switch.CannotDo("A string is no query.") if isinstance(x, str) else None

    engine = engine_of(lambda x: x + x)
    switch.put_in(engine, "attention", ours)
    assert [engine.attention("a"), engine.attention("b")] == ["aa", "bb"]
    words = [record.getMessage() for record in caplog.records]
    assert words[0] == "engine.attention is replaced: attention runs rung 8 of rpa."
    assert words[1:] == [
        "engine.attention: this call runs the engine's own kernel. A string is no query."
    ]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_mistake_of_ours_is_not_hidden():
    def ours(x):
        raise KeyError(x)

    engine = engine_of(lambda x: x)
    switch.put_in(engine, "attention", ours)
    with pytest.raises(KeyError):
        engine.attention(1)


def test_put_in_twice_is_taken_out_at_once():
    engine = engine_of(theirs := lambda x: x)
    for _ in range(2):
        switch.put_in(engine, "attention", lambda x: -x)
    assert engine.attention(1) == -1
    assert switch.take_out(engine, "attention")
    assert engine.attention is theirs


@pytest.mark.parametrize("wish, acts", [(None, False), ("0", False), ("1", True), ("yes", False)])
def test_the_plugin_acts_only_where_it_is_asked_for(wish, acts, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(tpu_inference, "use_rpa", lambda: asked.append(True))
    monkeypatch.delenv("RPA_IN_VLLM", raising=False)
    if wish is not None:
        monkeypatch.setenv("RPA_IN_VLLM", wish)
    tpu_inference.plugin()
    assert bool(asked) == acts
    assert ("must be 1" in caplog.text) == (wish == "yes")


def test_vllm_finds_the_plugin():
    (plugin,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="rpa")
    assert plugin.load() is tpu_inference.plugin


@pytest.mark.parametrize(
    "options, words",
    [
        ({"custom_mask": jnp.ones(4)}, "custom_mask"),
        ({"xai_temperature_len": 8.0}, "xai_temperature_len"),
        ({"softmax_dtype": jnp.bfloat16}, "softmax_dtype is bfloat16"),
    ],
)
def test_sglang_options_without_an_equal_are_refused_in_words(options, words):
    with pytest.raises(switch.CannotDo, match=words):
        sglang_jax.attention(*[None] * 9, **options)


def test_pages_that_follow_each_other_become_rows():
    rng = np.random.default_rng(0)
    for _ in range(100):
        page_size, kv_lens = int(rng.integers(1, 9)), rng.integers(0, 30, 5)
        counts = -(-kv_lens // page_size)
        pages = rng.permutation(200)[: counts.sum() + 1].astype(np.int32)  # one of padding
        cu_kv_lens = np.concatenate([[0], np.cumsum(counts * page_size)])
        width = int(counts.max()) + 1
        args = (jnp.asarray(array) for array in (pages, cu_kv_lens, kv_lens))
        rows = sglang_jax.rows_of_pages(*args, page_size, width).reshape(5, width)
        expected = np.full((5, width), -1)
        for s, part in enumerate(np.split(pages[:-1], np.cumsum(counts)[:-1])):
            expected[s, : len(part)] = part
        np.testing.assert_array_equal(rows, expected)


def run_engine(package, *cases):
    """The results of tests/engine_programs.py, one per case."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "32",  # eight interpreted devices need more threads than two cores give
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.engine_programs", package, *cases]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(results):
    assert results
    for result in results:
        assert result["runs_ours"] and not result["heard"], result
        assert result["cache_exact"] and result.get("shapes_agree", True), result
        assert result["error"] < 5e-3, result  # bfloat16; float32 far below
        assert result["error"] < 1e-6 or "float" in result["case"] or "64" in result["case"], result


@pytest.mark.skipif(
    peers.absence("v3") is not None, reason=f"no tpu-inference: {peers.absence('v3')}"
)
def test_the_attention_layer_of_tpu_inference_runs_on_rung_8():
    check(run_engine("tpu_inference"))


def no_sglang():
    """Why sglang-jax cannot be tried, or None."""
    found = importlib.util.find_spec("sgl_jax")
    if found is None:
        return "sglang-jax is not installed: put its folder `python` on PYTHONPATH."
    kernel = "srt/kernels/ragged_paged_attention/ragged_paged_attention_v3.py"
    if not Path(found.submodule_search_locations[0], kernel).exists():
        return "this sglang-jax is too old: its kernel has two caches and stores no new tokens."
    return None


@pytest.mark.skipif(no_sglang() is not None, reason=str(no_sglang()))
def test_the_attention_backend_of_sglang_jax_runs_on_rung_8():
    check(run_engine("sgl_jax"))


def test_caches_of_the_engine_have_our_shapes():
    """What `attention_hd64` refuses: heads with which both layouts have one shape."""
    for dtype, ambiguous in [("bfloat16", {1}), ("float8_e4m3fn", {1, 2}), ("float32", set())]:
        for heads in range(1, 9):
            sizes = (10, 16, heads, 64, dtype)
            same = get_kv_cache_shape(*sizes) == get_kv_cache_shape(*sizes, share_lanes=True)
            assert same == (heads in ambiguous)
