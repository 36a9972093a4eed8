"""`rpa.lab.peers`: the other kernels, found, excused in words, and compiled by their names."""

import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path

import jax
import pytest

from rpa import lab
from rpa.__main__ import main
from rpa.lab import peers
from rpa.lab.bench import compile_time
from rpa.lab.compile import words
from rpa.lab.compile.compiler import CompileResult
from rpa.lab.programs import Workload

ROOT = Path(__file__).parents[1]
HAS_LIBTPU = lab.compile_versions()["libtpu"] is not None
needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason=f"libtpu is not installed ({platform.system()} {platform.machine()})"
)
needs_peer = pytest.mark.skipif(
    peers.absence("v3") is not None, reason=f"no peer here: {peers.absence('v3')}"
)
SMALL = Workload(model="llama-3-70b-on-8", page_size=128, num_seqs=8, kv_len=1024)


def test_make_peers_installs_the_version_that_is_compared():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^PEER_VERSION = (.*)$", makefile, re.M)[1] == peers.PEER_VERSION


@pytest.mark.parametrize("installed", [None, "0.31.0"])
def test_an_absent_peer_is_excused_in_words(installed, monkeypatch):
    def version(_name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    peers._load.cache_clear()
    assert "make peers" in peers.absence("v3") and (installed or "none") in peers.absence("v3")
    with pytest.raises(peers.PeerAbsent, match="make peers"):
        peers.v3_reference()
    assert words.kind_of(f"PeerAbsent: {peers.absence('v3')}") == "no peer"


def test_without_a_chip_it_asks_for_one():
    if jax.default_backend() == "tpu":
        pytest.skip("a TPU is attached")
    with pytest.raises(ValueError, match="name the chip"):
        peers.v3(*[None] * 8)


@needs_peer
def test_a_peer_leaves_the_process_as_it_was():
    before = dict(os.environ)
    peers._load.cache_clear()
    assert callable(peers._load("v3", peers._V3).ref_ragged_paged_attention)
    assert dict(os.environ) == before, "the package's __init__ has run"
    assert not {"vllm", "vllm.logger", "tpu_inference"} & set(sys.modules)


FULL = pytest.mark.full
SMALL_BLOCKS = {"d_block_sizes": [1, 256, 1, 256], "m_block_sizes": [16, 256, 8, 256]}


@needs_libtpu
@needs_peer
@pytest.mark.parametrize(
    "name, chip, kwargs, part_of_a_name",
    [
        ("v3", "v5e", SMALL_BLOCKS, "bq_16_8-bkv_256_256"),
        pytest.param("v3", "v6e", {}, "RPAm", marks=FULL),
        pytest.param("v3", "tpu7x", {}, "bq_256_128-bkv_1024_512", marks=FULL),
        pytest.param("jax", "v5e", {}, "ragged_paged_attention", marks=FULL),
        pytest.param(
            "batched", "tpu7x", {"decode_block_sizes": [1, 1, 256, 8, 3]}, "b8-q1-k256", marks=FULL
        ),
    ],
)
def test_peers_compile_by_name(name, chip, kwargs, part_of_a_name):
    program = peers.PROGRAMS[name](SMALL)
    kwargs = program.kwargs | kwargs | {"chip": chip}
    result = lab.compile_for(
        chip, program.function, *program.args, kwargs=kwargs, donate_argnums=(3,)
    )
    assert result.ok, result.error
    assert any(part_of_a_name in kernel.name for kernel in result.kernels), result.kernels


def result(cpu_s, **fields):
    return CompileResult("v5e", "m:f", **{"ok": True, "compile_cpu_s": cpu_s} | fields)


REFUSED = result(0, ok=False, error_kind="vmem overflow", error="too much")
COMPARISONS = {
    # ours, theirs, default: verdict, passed
    "ok": (result(5.0), result(4.0), result(1.0), "ok", True),
    "goal": (result(5.5), result(4.0), result(1.0), "over the goal of 1.25", True),
    "limit": (result(6.5), result(4.0), result(1.0), "over the LIMIT of 1.5", False),
    "absent": (result(5.0), None, result(1.0), "no peer to compare with", True),
    "peer refused": (result(5.0), REFUSED, result(1.0), "peer refused", True),
    "ours refused": (REFUSED, result(4.0), result(1.0), "REFUSED by the compiler", False),
    "default refused": (result(5.0), result(4.0), REFUSED, "REFUSED by the compiler", False),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_compile_times_are_judged(name, monkeypatch, capsys):
    *results, verdict, passed = COMPARISONS[name]
    comparison = compile_time.Comparison("a row", "v5e", *results)
    assert (comparison.verdict, comparison.passed) == (verdict, passed)
    monkeypatch.setattr(compile_time, "compare", lambda *_: iter([comparison]))
    assert main(["lab", "compile", "--against", "v3", "--chip", "v5e"]) == (not passed)
    printed = capsys.readouterr().out
    assert verdict in printed and ("too much" in printed) == (REFUSED in results)
    main(["lab", "compile", "--against", "v3", "--chip", "v5e", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["verdict"], row["passed"]) == (verdict, passed)


def test_compile_times_are_not_taken_with_a_dump(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_jf_dump_to=/tmp/here")
    with pytest.raises(ValueError, match="unset it"):
        next(compile_time.compare())


def test_the_fastest_of_several_compilations_counts(monkeypatch):
    calls = []

    def compile_for(chip, function, *args, use_cache, **options):
        calls.append((function.split(":")[1], use_cache))
        return result(100.0 - len(calls))

    monkeypatch.setattr(compile_time, "compile_for", compile_for)
    monkeypatch.setattr(peers, "absence", lambda peer: None)
    first, second, *_ = compile_time.compare(chips=["v5e"], repeats=2)
    ours, theirs = ("ragged_paged_attention", False), ("v3", False)
    assert calls[:4] == [ours, theirs, theirs, ours]
    assert calls[4] == (ours[0], True), "the blocks of its own may come from the cache"
    assert calls[5:9] == [theirs, ours, ours, theirs]
    assert (first.ours.compile_cpu_s, first.theirs.compile_cpu_s) == (96.0, 97.0)


@needs_libtpu
@pytest.mark.full
def test_one_row_of_the_compile_times(monkeypatch):
    row = "SmolLM2 135M, page 16"
    monkeypatch.setattr(compile_time, "ROWS", {row: compile_time.ROWS[row]})
    (found,) = compile_time.compare(chips=["v5e"])
    assert found.passed, found
    assert not found.ours.from_cache and found.ours.compile_cpu_s > 0
