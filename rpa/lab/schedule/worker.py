"""The subprocess of `rpa.lab.schedule`: compile one kernel with dumps on, and parse them.

Run as `python -m rpa.lab.schedule.worker ORDER ANSWER`, with `LIBTPU_INIT_ARGS` set by the parent:
libtpu reads it once, when it is loaded.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import pickle
import re
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rpa import compat
from rpa.lab.compile import functions, words, worker
from rpa.lab.schedule import feeds, pallas_calls
from rpa.lab.schedule.dumps import FORMAT, parse_dump, write_listing


def compile_kernel(spec, call) -> dict:
    """Compile one kernel of a function for one chip, and those before it whose integers it reads.

    Args:
        spec: `rpa.lab.schedule.schedule_for` says what is in it.
        call: (arguments, {name: array}), pytrees of shapes.

    Returns:
        {"kernel": name, "stages": a list of {"listing": file, "feed": of a `Feed`, "outputs":
        [(operand, shape)]}}; the last stage is the kernel.
    """
    function = functools.partial(functions.load(spec["function"]), **spec["kwargs"])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=spec["topology"])
    mesh = Mesh(np.array(topology.devices[:1]), "x")
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(lambda args, arrays: function(*args, **arrays))(*call)
    calls = pallas_calls.pallas_calls(traced)
    target = choose(calls, spec["kernel"])
    if calls[target].eqn.params["interpret"]:
        raise ValueError(
            f"the kernel {calls[target].name} asks for the interpreter (interpret=...), so there "
            "is nothing to compile: leave it out, or pass interpret=False."
        )
    sources = feeds.sources_of(traced, call, target)
    stages = []
    for i, index in enumerate([*sources, target]):
        feed = feeds.make_feed(traced, call, index, sources[:i])
        outputs = [
            (len(calls[index].eqn.invars) + k, list(var.aval.shape))
            for k, var in enumerate(calls[index].eqn.outvars)
        ]
        listing = _listing(spec, calls[index], mesh)
        stages.append({"listing": listing, "feed": dataclasses.asdict(feed), "outputs": outputs})
    return {"kernel": calls[target].name, "stages": stages}


def _listing(spec, call, mesh) -> str:
    """File with the listing of one kernel, compiled now unless it is there."""
    on_chip = NamedSharding(mesh, PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_chip) for x in call.shapes]
    aliased = tuple(i for i, _ in call.eqn.params["input_output_aliases"])
    with jax.set_mesh(mesh):
        lowered = jax.jit(functools.partial(_alone, call), donate_argnums=aliased).lower(*shapes)
    # What the compiler is given, with its own version, decides what it makes of it.
    compiler = f"{spec['versions']['libtpu']} {spec.get('flags', '')}".strip()
    text = f"{FORMAT} {compiler} {spec['topology']} {lowered.as_text()}"
    listing = Path(spec["directory"]) / f"{hashlib.sha256(text.encode()).hexdigest()}.json.gz"
    with _alone_with(listing):
        if spec["fresh"] or not listing.exists():
            names = [name for name, *_ in words.kernels_in_hlo(lowered.compile().as_text())]
            write_listing(listing, parse_dump(Path(spec["dump"]), names[0]))
    return str(listing)


@contextlib.contextmanager
def _alone_with(listing):
    """Wait until no other process compiles the same program: then its listing is there."""
    listing.parent.mkdir(parents=True, exist_ok=True)
    # A lock ends with its process, however that ends; the empty file stays for the next one.
    with open(listing.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _alone(call, *operands):
    """The kernel with its operands where it wants them: XLA would move small ones to VMEM."""
    grid = call.eqn.params["grid_mapping"]
    prefetched = len(operands) - grid.num_inputs
    spaces = ["smem"] * prefetched
    spaces += [str(m.transformed_block_aval.memory_space) for m in grid.block_mappings]
    return call.bind(
        *(
            compat.keep_in_hbm(x, interpret=False) if space in ("hbm", "any") else x
            for x, space in zip(operands, spaces, strict=False)
        )
    )


def choose(calls, pattern) -> int:
    """Index of the one kernel whose name the pattern finds.

    Raises:
        ValueError: if it is not exactly one.
    """
    found = [i for i, call in enumerate(calls) if re.search(pattern, call.name)]
    if len(found) != 1:
        names = [call.name for call in calls]
        hint = " Give each of them a name of its own." if len(set(names)) < len(names) else ""
        raise ValueError(
            f"kernel is {pattern!r}, which must find exactly one of the kernels of this function: "
            f"{', '.join(names) or 'none'}.{hint}"
        )
    return found[0]


def main(order, answer):
    """Read the order, compile, write the answer; whatever goes wrong is the answer's "message"."""
    spec, call = pickle.loads(Path(order).read_bytes())
    worker.write_answer(answer, functools.partial(compile_kernel, spec, call), spec)


if __name__ == "__main__":
    main(*sys.argv[1:])
