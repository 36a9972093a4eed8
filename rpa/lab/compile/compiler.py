"""Compile for a chip that is not there: libtpu holds the whole TPU compiler and needs no TPU.

Every compilation runs in a subprocess, for three reasons: libtpu reads its environment once, when
it is loaded; the caller keeps its own JAX platform; and a compiler that crashes or never ends
takes only the worker with it. Results are kept on disk until a source file that was loaded for
them, or a version, changes.

(Ahead-of-time topologies: `jax.experimental.topologies`; https://openxla.org/xla/errors.)
"""

import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from rpa import chips
from rpa.lab.arguments import static_and_arrays
from rpa.lab.compile import words
from rpa.lab.compile.functions import import_path

ENVIRONMENT = {
    # The worker itself computes on the CPU; libtpu is only asked to compile.
    "JAX_PLATFORMS": "cpu",
    # Without these libtpu asks a metadata server that does not exist, for minutes.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Without it a second process that loads libtpu dies on a lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Meant for the XLA of the CPU: that of libtpu ends at a flag that it does not know, and what is
    # kept of a schedule does not say with which flags it was compiled.
    "XLA_FLAGS": "",
}
"""What libtpu needs to be quick and quiet on a machine without a TPU."""

BUSY_RETRIES, BUSY_WAIT_S = 20, 3.0
"""An older libtpu lets one process in at a time, whatever the environment says: wait for it."""


@dataclass(frozen=True)
class Kernel:
    """One Pallas kernel in the compiled program and the VMEM that it takes, in bytes.

    `vmem_limit_bytes` is what the kernel asked for by `CompilerParams`, None if it did not ask.
    """

    name: str
    vmem_used_bytes: int
    vmem_limit_bytes: int | None


@dataclass(frozen=True)
class CompileResult:
    """What the compiler said; `ok` or `error` says which half of the fields is filled.

    Attributes:
        chip: short name of the chip it was compiled for.
        function: "module:function" or "/absolute/file.py:function".
        ok: whether it compiled.
        trace_time_s: time for tracing and lowering to MLIR, in the worker.
        compile_time_s: time in the TPU compiler.
        trace_cpu_s, compile_cpu_s: the same in CPU seconds of all threads, which a busy machine
            does not make more.
        kernels: the Pallas kernels in it, with their VMEM.
        argument_bytes, output_bytes, alias_bytes, temp_bytes: HBM of the program; `alias_bytes`
            are outputs that live in a donated argument.
        hlo: the compiled program as text, without the kernels' bodies; None unless asked for.
        error_kind: None, or one of `rpa.lab.compile.words.KINDS`.
        error: None, or what went wrong and what to do, in words.
        from_cache: whether this was read from disk.
    """

    chip: str
    function: str
    ok: bool
    trace_time_s: float = 0.0
    compile_time_s: float = 0.0
    trace_cpu_s: float = 0.0
    compile_cpu_s: float = 0.0
    kernels: tuple[Kernel, ...] = ()
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    temp_bytes: int = 0
    hlo: str | None = None
    error_kind: str | None = None
    error: str | None = None
    from_cache: bool = False

    @property
    def vmem_used_bytes(self) -> int:
        """VMEM of the kernel that takes the most; kernels run one after the other."""
        return max((kernel.vmem_used_bytes for kernel in self.kernels), default=0)

    def copies_of(self, array) -> list[str]:
        """Lines of the HLO that copy something of the shape and dtype of `array`.

        An empty list for the cache of a kernel is the proof that it is updated in place.

        Raises:
            ValueError: if the HLO was not kept.
        """
        if self.hlo is None:
            raise ValueError("hlo was not kept: call compile_for(..., keep_hlo=True).")
        return words.copies_in_hlo(self.hlo, array.shape, array.dtype)


def compile_for(
    chip, fn, *args, kwargs=None, donate_argnums=(), keep_hlo=False, timeout_s=600.0, use_cache=True
) -> CompileResult:
    """Compile `jax.jit(fn)(*args, **kwargs)` for a chip that is not there.

    Args:
        chip: anything that `rpa.chips.chip` knows, "v5e" or "TPU v6 lite".
        fn: a function at the top level of a module, or "module:function", or "file.py:function".
        *args: pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are used.
        kwargs: keyword arguments: arrays (or shapes) are operands, all others are compiled in and
            must be something that JSON can hold.
        donate_argnums: as in `jax.jit`.
        keep_hlo: keep the compiled program's text.
        timeout_s: end the compiler after this many seconds.
        use_cache: False compiles again, for instance to time it on a quiet machine.

    Returns:
        A CompileResult. What the compiler refuses is a result with `error`, not an exception.

    Raises:
        ValueError: if `fn` cannot be imported by its name, or `chip` is unknown.
    """
    static, arrays = static_and_arrays(kwargs)
    spec = {
        "chip": chips.chip(chip).name,
        "topology": chips.chip(chip).topology,
        "function": import_path(fn),
        **described(args, static, arrays),
        "donate_argnums": list(donate_argnums),
        "keep_hlo": keep_hlo,
        "versions": compile_versions(),
        "format": FORMAT,
        # Two checkouts of this package share the cache, and hold different kernels.
        "home": str(Path(__file__).parents[3]),
    }
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    entry = cache_dir() / f"{key}.json"
    cached = _read_entry(entry) if use_cache else None
    if cached is not None:
        return replace(cached, from_cache=True)
    if spec["versions"]["libtpu"] is None:
        return _failure(spec, words.no_libtpu(platform.system(), platform.machine()))
    answer = ask_worker(spec, shapes_of((args, arrays)), timeout_s)
    result = _result(spec, answer)
    if result.error_kind not in words.PASSING:
        write_kept(entry, {"result": asdict(result), "files": answer.get("files", {})})
    return result


def described(args, static, arrays) -> dict:
    """What a call is, as an order to a worker says it: shapes, and what is compiled in.

    >>> described((jax.ShapeDtypeStruct((2,), "int32"),), {"step": 1}, {})
    {'args': "('int32[2]',)", 'kwargs': {'step': 1}}
    """

    def written(tree):
        return str(jax.tree.map(lambda x: f"{jnp.dtype(x.dtype).name}{list(x.shape)}", tree))

    said = {"args": written(args), "kwargs": static}
    return said | ({"arrays": written(arrays)} if arrays else {})


def shapes_of(tree):
    """The shapes of arrays in a pytree, which another process is sent."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


FORMAT = 2
"""Of what is kept: another number, and everything is compiled anew."""


def cache_dir() -> Path:
    """Where results are kept: `$XDG_CACHE_HOME/rpa/compile`, or below `~/.cache`.

    Where nothing can be written there (a read-only home, none at all, a file in its place), they
    are kept in a folder that lasts as long as this process, and that is said once.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # without $HOME, for a user that the system does not know
        return _temporary_folder(str(error))
    return _cache_in(base)


@functools.cache
def _cache_in(base):
    folder = base / "rpa" / "compile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tried")
    except (OSError, ValueError) as error:
        return _temporary_folder(str(error))
    return folder


@functools.cache
def _temporary_folder(why):
    _say_once(f"(What is compiled is not kept for the next time: {why})")
    whole = tempfile.TemporaryDirectory(prefix="rpa_")
    atexit.register(whole.cleanup)
    folder = Path(whole.name) / "rpa" / "compile"
    folder.mkdir(parents=True)
    return folder


@functools.cache
def compile_versions() -> dict:
    """Versions that decide what is compiled; libtpu is None where it is not installed."""
    installed = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed | {"python": platform.python_version()}


def ask_worker(spec, shapes, timeout_s, worker="rpa.lab.compile.worker", environment=None) -> dict:
    """Run a worker and return its answer; a dict with "message" if it could not answer.

    Args:
        spec: what to compile, anything that can be pickled.
        shapes: pytrees of `jax.ShapeDtypeStruct`.
        timeout_s: end it after this many seconds.
        worker: module that is run with two files: the order and the answer.
        environment: variables besides `ENVIRONMENT`.
    """
    for _ in range(BUSY_RETRIES):
        answer = _run_worker(spec, shapes, timeout_s, worker, environment or {})
        if words.kind_of(answer.get("message", "")) != "libtpu busy":
            break
        time.sleep(BUSY_WAIT_S)
    return answer


def _run_worker(spec, shapes, timeout_s, worker, environment) -> dict:
    home = str(Path(__file__).parents[3])
    path = os.pathsep.join([home, *(p or _working_folder(home) for p in sys.path)])
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": path} | environment
    with tempfile.TemporaryDirectory() as scratch:
        order, answer = Path(scratch) / "order.pickle", Path(scratch) / "answer.json"
        order.write_bytes(pickle.dumps((spec, shapes)))
        # -P: this package, not one that lies in the current directory.
        command = [sys.executable, "-P", "-m", worker, str(order), str(answer)]
        code, complaint = _wait_for(command, environment, timeout_s)
        if code is None:
            return {"message": f"{words.TIMED_OUT} after {timeout_s:.0f} s"}
        if not answer.exists():
            return {"message": f"{words.DIED} (exit code {code}): {complaint[-2000:]}"}
        return json.loads(answer.read_text())


_running = set()
"""The workers' processes, of all threads."""


def _wait_for(command, environment, timeout_s):
    """(exit code, standard error) of a process; no exit code if it took too long."""
    # A session of its own: Ctrl-C is for this process, which then ends the other one.
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _running.add(process)
    try:
        _, complaint = process.communicate(timeout=timeout_s)
        return process.returncode, complaint
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        _running.discard(process)
        process.kill()
        process.wait()


def end_workers():
    """End all compilers that still run; whatever waits for one is told that it died."""
    for process in list(_running):
        process.kill()


def _working_folder(otherwise):
    try:
        return os.getcwd()
    except OSError:  # deleted
        return otherwise


def _result(spec, answer) -> CompileResult:
    if "message" in answer:
        kind, text = words.explain(answer["message"], spec["chip"], spec["versions"])
        # A plain Python error in the caller's function: the place is what helps most.
        at = f" (at {answer['where']})" if kind == "error" and "where" in answer else ""
        return _failure(spec, (kind, text + at))
    hlo = answer.pop("hlo")
    fields = {name: answer[name] for name in answer if name in CompileResult.__annotations__}
    return CompileResult(
        chip=spec["chip"],
        function=spec["function"],
        ok=True,
        kernels=tuple(Kernel(*found) for found in words.kernels_in_hlo(hlo)),
        hlo=words.without_bodies(hlo) if spec["keep_hlo"] else None,
        **fields,
    )


def _failure(spec, kind_and_text) -> CompileResult:
    kind, text = kind_and_text
    return CompileResult(
        chip=spec["chip"], function=spec["function"], ok=False, error_kind=kind, error=text
    )


def read_kept(entry: Path) -> dict | None:
    """What `write_kept` wrote; None if a file that was loaded for it has changed since.

    None, too, for whatever another program, or another version of this one, has left there.
    """
    try:
        kept = json.loads(entry.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            return None
        changed = any(file_hash(path) != seen for path, seen in kept["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return None if changed else kept


def write_kept(entry: Path, kept: dict):
    """Keep a dictionary, in which "files" says what it depends on: {path: hash}.

    Where that fails (a full disk), it is said once; a result that is not kept is still one.
    """
    # Written aside and renamed: another process or thread never reads half of it.
    aside = entry.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(kept | {"format": FORMAT}), encoding="utf-8")
        aside.replace(entry)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        _say_once(f"(What is compiled is not kept for the next time: {error.strerror})")


@functools.cache
def _say_once(text):
    print(text, file=sys.stderr)


def _read_entry(entry: Path) -> CompileResult | None:
    kept = read_kept(entry)
    try:
        kernels = tuple(Kernel(**kernel) for kernel in kept["result"].pop("kernels"))
        return CompileResult(**kept["result"], kernels=kernels)
    except (LookupError, TypeError, AttributeError):  # nothing is kept, or something else
        return None


def file_hash(path) -> str | None:
    """SHA-256 of a file, None if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None
