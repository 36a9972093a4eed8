"""The subprocess of `rpa.lab.parallel`: compiles one case for a topology, writes one JSON file."""

import functools
import pickle
import sys
from pathlib import Path

import jax
from jax.experimental import topologies

from rpa.lab.compile import words
from rpa.lab.compile.worker import write_answer
from rpa.lab.parallel.cases import CASES, program

COMPILER_OPTIONS = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "false"
    for kind in ("all_gather", "all_reduce")
}
"""On TPU7x the SparseCore may run collectives; a program in which it does, libtpu cannot print."""


def compile_case(spec) -> dict:
    """Compile for the devices of the topology; returns the HLO and the memory of one device."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=spec["topology"])
    function, arguments, mesh = program(CASES[spec["case"]], topology.devices)
    # Inside the mesh pltpu.get_tpu_info() and Pallas itself see these chips, not the host's CPU.
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, donate_argnums=3).lower(*arguments)
    compiled = lowered.compile(compiler_options=COMPILER_OPTIONS)
    memory = compiled.memory_analysis()
    cache = arguments[3]
    return {
        "hlo": words.without_bodies(compiled.as_text()),
        "cache_shape": cache.sharding.shard_shape(cache.shape),
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def main(order, answer):
    """Read the order, compile, write the answer; whatever goes wrong is the answer's "message"."""
    spec, _ = pickle.loads(Path(order).read_bytes())
    write_answer(answer, functools.partial(compile_case, spec), spec)


if __name__ == "__main__":
    main(*sys.argv[1:])
