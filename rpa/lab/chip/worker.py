"""The subprocess of `rpa.lab.chip.dump`: compile kernels, return the last text of each dump.

Run as `python -m rpa.lab.chip.worker ORDER ANSWER`, with `LIBTPU_INIT_ARGS` set by the parent:
libtpu reads it once, when it is loaded.
"""

import functools
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rpa import compat
from rpa.lab.compile import worker


def compile_kernels(order) -> dict:
    """Compile the kernels of an order, one after the other: {"texts": [...]}."""
    return {"texts": [_compile(spec, Path(order["dump"])) for spec in order["kernels"]]}


def _compile(spec, dump):
    """The compiled text of the custom call that `rpa.lab.chip.dump` describes."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=spec["topology"])
    mesh = Mesh(np.array(topology.devices[:1]), "x")
    on_chip = NamedSharding(mesh, PartitionSpec())
    aliases = dict(spec["aliases"])
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=on_chip)
        for shape, dtype in spec["inputs"]
    ]
    outputs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in spec["outputs"]]

    def kernel(*operands):
        # Where the kernel wants them: XLA would move small ones to VMEM.
        operands = [
            compat.keep_in_hbm(x, interpret=False) if space in ("hbm", "any") else x
            for x, space in zip(operands, spec["spaces"], strict=True)
        ]
        return jax.ffi.ffi_call(
            "tpu_custom_call",
            outputs,
            has_side_effect=True,  # or XLA drops a kernel whose results it does not need
            custom_call_api_version=1,
            legacy_backend_config=spec["config"],
            input_output_aliases=aliases,
        )(*operands)

    jax.jit(kernel, donate_argnums=tuple(aliases)).lower(*inputs).compile()
    (file,) = dump.glob("*post-finalize-llo.txt")
    text = file.read_text()
    for file in dump.iterdir():  # twenty of them, and the next kernel writes its own
        file.unlink()
    return text


def main(order, answer):
    """Read the order, compile, write the answer; whatever goes wrong is the answer's "message"."""
    order, _ = pickle.loads(Path(order).read_bytes())
    worker.write_answer(answer, functools.partial(compile_kernels, order), order)


if __name__ == "__main__":
    main(*sys.argv[1:])
