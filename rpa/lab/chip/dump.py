"""Get a kernel's compiled text: lower it here, compile it in a subprocess, keep it on disk.

A kernel is lowered for a chip that is not there, which needs no libtpu. What the compiler is given
then is a text, and its hash is the name of what is kept: an edit that does not change the kernel
costs tracing only, and any function will do, also a lambda of a notebook.
"""

import hashlib
import json
import platform
import re
import tempfile

import jax
import numpy as np

from rpa import chips, compat
from rpa.lab.chip.errors import NotCompiled, UnknownOperation
from rpa.lab.compile import words
from rpa.lab.compile.compiler import ask_worker, cache_dir, compile_versions, read_kept, write_kept

KNOWN_LIBTPU = ("0.0.52",)
"""Versions whose text the conformance kernels were executed with."""

TIMEOUT_S = 600.0


def check_compiler():
    """Return if kernels can be compiled and executed here.

    Raises:
        NotCompiled: if this JAX cannot lower for a chip that is not here, or there is no libtpu.
        UnknownOperation: if libtpu is of a version that was not tested.
    """
    _check_jax()
    versions = compile_versions()
    if versions["libtpu"] is None:
        raise NotCompiled(words.no_libtpu(platform.system(), platform.machine())[1])
    if versions["libtpu"] not in KNOWN_LIBTPU:
        raise UnknownOperation(
            f"libtpu is {versions['libtpu']}, but what a compiled kernel means was tested with "
            f"{', '.join(KNOWN_LIBTPU)} only: pip install libtpu=={KNOWN_LIBTPU[-1]}, or add "
            "this version to KNOWN_LIBTPU and run `python -m rpa lab chip --conformance`."
        )


def _check_jax():
    if compat.JAX_VERSION < (0, 10, 2):
        raise NotCompiled(
            f"jax {jax.__version__} cannot lower a kernel for a chip that is not here: install "
            "jax 0.10.2 or newer."
        )


def on_chip(chip):
    """Context manager: trace and lower for one core of a chip that is not there.

    Raises:
        NotCompiled: if this JAX cannot.
    """
    known = chips.chip(chip)
    _check_jax()
    device = jax.sharding.AbstractDevice(known.device_kinds[0], known.cores_per_device, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def compiled_texts(eqns, chip) -> list[str]:
    """The compiled text of each kernel for one chip; those that are not kept in one subprocess.

    Args:
        eqns: equations of `pallas_call`s in a traced function.
        chip: anything that `rpa.chips.chip` knows.

    Raises:
        NotCompiled: if there is no libtpu, or the compiler refuses, in words.
        UnknownOperation: if libtpu is of a version that was not tested.
    """
    known = chips.chip(chip)
    specs = [_spec(eqn, known) for eqn in eqns]
    entries = [cache_dir().parent / "chip" / f"{_hash(spec)}.json" for spec in specs]
    kept = {entry: read_kept(entry) for entry in entries}
    missing = {entry: spec for entry, spec in zip(entries, specs, strict=True) if not kept[entry]}
    if missing:
        texts = _compile(list(missing.values()), known)
        for entry, text in zip(missing, texts, strict=True):
            kept[entry] = {"text": text, "files": {}}
            write_kept(entry, kept[entry])
    return [kept[entry]["text"] for entry in entries]


def _spec(eqn, chip):
    """All that decides what the compiler makes of a kernel."""
    if eqn.params.get("interpret"):
        raise UnknownOperation(
            "the function asks for the interpreter (interpret=...), so there is no kernel to "
            "compile: leave it out, or pass interpret=False."
        )
    return {
        "topology": chip.topology,
        "libtpu": compile_versions()["libtpu"],
        "config": _custom_call(eqn, chip),
        "spaces": _memory_spaces(eqn),
        "aliases": list(dict(eqn.params["input_output_aliases"]).items()),
        "inputs": [_spelled(v.aval) for v in eqn.invars],
        "outputs": [_spelled(v.aval) for v in eqn.outvars],
    }


def _hash(spec):
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def _compile(specs, chip):
    check_compiler()
    with tempfile.TemporaryDirectory() as dump:
        order = {"kernels": specs, "function": "rpa.lab.chip.worker:main", "dump": dump}
        answer = ask_worker(
            *(order, (), TIMEOUT_S),
            worker="rpa.lab.chip.worker",
            environment={"LIBTPU_INIT_ARGS": f"--xla_mosaic_dump_to={dump}"},
        )
    if "message" in answer:
        raise NotCompiled(words.explain(answer["message"], chip.name, compile_versions())[1])
    return answer["texts"]


def _custom_call(eqn, chip) -> str:
    """What the compiler is given: the `backend_config` of the kernel's custom call."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    with on_chip(chip.name):
        traced = jax.jit(lambda *xs: eqn.primitive.bind(*xs, **eqn.params)).trace(*shapes)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    (found,) = re.findall(r'@tpu_custom_call.*?backend_config = "((?:[^"\\]|\\.)*)"', text)
    return re.sub(r"\\([0-9A-Fa-f]{2})", lambda code: chr(int(code[1], 16)), found)


def _memory_spaces(eqn) -> list[str]:
    """Where the kernel wants each input: "hbm", "any", "smem", "vmem" ..."""
    grid = eqn.params["grid_mapping"]
    spaces = ["smem"] * (len(eqn.invars) - grid.num_inputs)
    return spaces + [
        str(mapping.transformed_block_aval.memory_space)
        for mapping in grid.block_mappings[: grid.num_inputs]
    ]


def _spelled(x):
    return [list(x.shape), np.dtype(x.dtype).name]
