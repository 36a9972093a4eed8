"""`rpa.parallel` on eight host devices: programs of `tests.parallel_programs`, one a process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from rpa import plain
from rpa.ladder import ragged_rung
from rpa.parallel import DecodeContext, Heads, Parallel, Sequences
from rpa.parallel.cut import check_host_devices

ROOT = Path(__file__).parents[1]


def run_on_host_devices(*command, num_devices=8, timeout_s=900, **environment):
    """Run a module in a process with so many host devices; returns what it printed.

    NPROC: with as many threads as a small machine has cores the interpreter would hang for ever.
    """
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    )
    environment = {"JAX_PLATFORMS": "cpu", "NPROC": "32", "XLA_FLAGS": flags} | environment
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.core
@pytest.mark.parametrize("name", ["heads", "sequences", "decode_context", "prefill_context"])
def test_form(name):
    assert f"{name}: right" in run_on_host_devices("tests.parallel_programs", name)


@pytest.mark.parametrize("name", ["together", "heads_with_rung_8"])
def test_together(name):
    assert f"{name}: right" in run_on_host_devices("tests.parallel_programs", name)


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["heads", "sequences", "decode_context", "prefill_context", "together"]
)
def test_form_on_generated_batches(name):
    assert "right" in run_on_host_devices("tests.parallel_programs", f"{name}_full")


def test_a_machine_on_which_the_interpreter_would_hang_is_told_so():
    printed = run_on_host_devices("tests.parallel_programs", "too_few_threads", NPROC="2")
    assert "too_few_threads: right" in printed


def test_one_device_needs_no_more_threads(monkeypatch):
    monkeypatch.setenv("NPROC", "1")
    check_host_devices(jax.make_mesh((1,), ("x",)), plain.attention)


def test_kernels_on_host_devices_of_several_processes_are_refused(monkeypatch):
    class Device(NamedTuple):
        process_index: int
        platform: str = "cpu"

    class Mesh(NamedTuple):
        devices: np.ndarray
        size: int = 2

    devices = np.empty(2, object)
    devices[:] = [Device(0), Device(1)]
    monkeypatch.setenv("NPROC", "32")
    with pytest.raises(ValueError, match="several processes.* attention=rpa.ladder.ragged_rung"):
        check_host_devices(Mesh(devices), plain.attention)
    check_host_devices(Mesh(devices), ragged_rung)


def test_axes_that_the_mesh_has_not_are_refused():
    mesh = jax.make_mesh((1,), ("model",))
    with pytest.raises(
        ValueError, match=r"along \['data'\], but the mesh has the axes \['model'\]"
    ):
        Parallel(mesh, Heads("data"))
    with pytest.raises(ValueError, match="no two the same"):
        Parallel(mesh, Heads("model"), Sequences("model"))


@pytest.mark.parametrize("num_chips, num_kv_heads", [(8, 3), (3, 8), (6, 4)])
def test_heads_that_cannot_be_shared_out_are_refused(num_chips, num_kv_heads):
    with pytest.raises(ValueError, match=f"{num_kv_heads} KV heads cannot be shared out over"):
        Heads("model").cuts(num_chips, num_kv_heads)


def test_forms_on_one_axis_of_an_array_are_cut_outermost_first():
    mesh = jax.make_mesh((1, 1), ("data", "context"))
    specs = Parallel(mesh, Sequences("data"), DecodeContext("context")).specs(1)
    assert tuple(specs["kv_cache"]) == (("data", "context"),)
    assert tuple(specs["queries"]) == ("data",)
