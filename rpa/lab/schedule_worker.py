"""The subprocess of `rpa.lab.schedule`: compile one kernel with dumps on, and parse them.

Run as `python -m rpa.lab.schedule_worker ORDER ANSWER`, with `LIBTPU_INIT_ARGS` set by the parent:
libtpu reads it once, when it is loaded.
"""

import base64
import functools
import hashlib
import importlib
import pickle
import re
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import serialize_executable, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rpa import compat
from rpa.lab import schedule_trace, words, worker
from rpa.lab.schedule_dump import FORMAT, parse_dump, write_listing


def compile_kernel(spec, args) -> dict:
    """Compile one kernel of a function for one chip, unless its listing is kept already.

    Args:
        spec: `rpa.lab.schedule.schedule_for` says what is in it.
        args: pytrees of shapes.

    Returns:
        {"kernel": name, "listing": file, "operands": [index], "feed": how their values follow from
        the integer arguments, a compiled program in base 64}.
    """
    module, name = spec["function"].split(":")
    function = functools.partial(getattr(importlib.import_module(module), name), **spec["kwargs"])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=spec["topology"])
    mesh = Mesh(np.array(topology.devices[:1]), "x")
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(function)(*args)
        call = choose(schedule_trace.pallas_calls(traced), spec["kernel"])
        on_chip = NamedSharding(mesh, PartitionSpec())
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_chip) for x in call.shapes]
        aliased = tuple(i for i, _ in call.eqn.params["input_output_aliases"])
        lowered = jax.jit(functools.partial(_alone, call), donate_argnums=aliased).lower(*shapes)
    # What the compiler is given, with its own version, decides what it makes of it.
    text = f"{FORMAT} {spec['versions']['libtpu']} {spec['topology']} {lowered.as_text()}"
    listing = Path(spec["directory"]) / f"{hashlib.sha256(text.encode()).hexdigest()}.json.gz"
    if spec["fresh"] or not listing.exists():
        write_listing(listing, _compile_and_parse(lowered, Path(spec["dump"])))
    feed, operands = export_feed(traced, args, spec["kernel"])
    return {"kernel": call.name, "listing": str(listing), "operands": operands, "feed": feed}


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


def choose(calls, pattern):
    """The one kernel whose name the pattern finds.

    Raises:
        ValueError: if it is not exactly one.
    """
    found = [call for call in calls if re.search(pattern, call.name)]
    if len(found) != 1:
        raise ValueError(
            f"kernel is {pattern!r}, which must find exactly one of the kernels of this function: "
            f"{', '.join(call.name for call in calls) or 'none'}."
        )
    return found[0]


def export_feed(traced, args, pattern):
    """The program from the integer arguments to the kernel's integer operands, for the host.

    Returns:
        The program in base 64, and the operands' indices.
    """
    leaves = jax.tree.leaves(args)
    places = schedule_trace.integer_leaves(args)
    indices = []

    def feed(*integers):
        known = dict(zip(places, integers, strict=True))
        call = choose(schedule_trace.pallas_calls(traced, known), pattern)
        operands = schedule_trace.known_operands(call)
        indices.extend(operands)
        return list(operands.values())

    shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in places]
    compiled = jax.jit(feed).lower(*shapes).compile()
    program = pickle.dumps(serialize_executable.serialize(compiled))
    return base64.b64encode(program).decode(), indices


def _compile_and_parse(lowered, dump):
    compiled = lowered.compile()
    names = [name for name, *_ in words.kernels_in_hlo(compiled.as_text())]
    return parse_dump(dump, names[0])


def main(order, answer):
    """Read the order, compile, write the answer; whatever goes wrong is the answer's "message"."""
    spec, args = pickle.loads(Path(order).read_bytes())
    worker.write_answer(answer, functools.partial(compile_kernel, spec, args), spec)


if __name__ == "__main__":
    main(*sys.argv[1:])
