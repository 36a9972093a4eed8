"""The subprocess of `rpa.lab.compile`: lowers and compiles one function, writes one JSON file."""

import functools
import json
import pickle
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rpa
from rpa.lab.compile import functions
from rpa.lab.compile.compiler import file_hash


def compile_spec(spec, shapes) -> dict:
    """Compile for one chip of the topology; returns the fields of a CompileResult, and the HLO."""
    function = functools.partial(functions.load(spec["function"]), **spec["kwargs"])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=spec["topology"])
    mesh = Mesh(np.array(topology.devices[:1]), "x")
    on_chip = NamedSharding(mesh, PartitionSpec())
    args, arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_chip), shapes
    )
    start = _clocks()
    # Inside the mesh pltpu.get_tpu_info() and Pallas itself see this chip, not the host's CPU.
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, donate_argnums=spec["donate_argnums"]).lower(*args, **arrays)
    traced = _clocks()
    compiled = lowered.compile()
    trace_time_s, trace_cpu_s = (traced - start).tolist()
    compile_time_s, compile_cpu_s = (_clocks() - traced).tolist()
    memory = compiled.memory_analysis()
    return {
        "trace_time_s": trace_time_s,
        "compile_time_s": compile_time_s,
        "trace_cpu_s": trace_cpu_s,
        "compile_cpu_s": compile_cpu_s,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "hlo": compiled.as_text(),
    }


def _clocks():
    """Wall clock, and CPU seconds of all threads: other processes make only the first one slow."""
    return np.array([time.perf_counter(), time.process_time()])


def loaded_files(spec) -> dict:
    """The source files that the result depends on: those of rpa, and those beside the function."""
    module = functions.module_of(spec["function"])
    homes = {str(Path(rpa.__file__).parent)}
    if getattr(module, "__file__", None):
        homes.add(str(Path(module.__file__).parent))
    files = [getattr(m, "__file__", None) for m in list(sys.modules.values())]
    return {f: file_hash(f) for f in files if f and f.startswith(tuple(homes))}


def main(order, answer):
    """Read the order, compile, write the answer; whatever goes wrong is the answer's "message"."""
    spec, shapes = pickle.loads(Path(order).read_bytes())
    write_answer(answer, functools.partial(compile_spec, spec, shapes), spec)


def write_answer(answer, work, spec):
    """Write what `work()` returns, or its error, and the files that it depends on."""
    loaded = {}
    try:
        functions.load_module(spec["function"])
        # As they are now: who edits a file while the compiler works does not change what it has.
        loaded = loaded_files(spec)
        result = work()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        result = {"message": message, "where": functions.line_of(error)}
    Path(answer).write_text(json.dumps(result | {"files": loaded_files(spec) | loaded}))


if __name__ == "__main__":
    main(*sys.argv[1:])
