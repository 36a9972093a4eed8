"""JAX's TPU interpreter: how rpa starts it, what it reports of a run, and what a kernel does in it.

Everything that is read out of the interpreter, or patched into it, is here; what only differs
between JAX versions is in `rpa.compat`.
"""

import contextlib
import functools
import importlib
import inspect
import threading
import types
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import dispatch, source_info_util
from jax.experimental.pallas import tpu as pltpu

from rpa.compat import JAX_FLOOR, space_name


def params(*, dma_execution_mode="on_wait", detect_races=False):
    """Parameters of the TPU interpreter that behave alike in every supported JAX.

    `on_race` is new and by default raises in the middle of a kernel; "warn" everywhere lets
    `races_found` answer afterwards, as the older versions do.
    """
    chosen = {"dma_execution_mode": dma_execution_mode, "detect_races": detect_races}
    if "on_race" in pltpu.InterpretParams.__dataclass_fields__:
        chosen["on_race"] = "warn"
    return pltpu.InterpretParams(**chosen)


def choose_interpret(interpret):
    """What `pallas_call` gets as `interpret`: None compiles on a TPU and interprets elsewhere.

    Tracing for a TPU that is not here (`rpa.lab`) counts as on a TPU. Where it interprets, an
    earlier call that failed is forgotten, see `forget_failure`.
    """
    if interpret is None:
        traced_for = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
        on_tpu = "tpu" in (jax.default_backend(), getattr(traced_for, "platform", None))
        interpret = False if _compiling or on_tpu else params()
    if interpret:
        forget_failure()
    return interpret


_one_at_a_time = threading.RLock()


def run_alone(call):
    """`call()`, which interprets kernels, while no other thread does; returns when they have run.

    The interpreter has one memory for the whole process, and no lock around it. A call that fails
    raises here, and leaves nothing behind in which the next one would fail.

    >>> run_alone(lambda: 1 + 1)
    2
    """
    with _one_at_a_time:
        forget_failure()
        try:
            # Inside a caller's jit nothing runs yet, and a tracer is ready at once.
            return jax.block_until_ready(call())
        except BaseException:  # the Stop button, too
            reset()
            raise


def forget_failure():
    """Reset the interpreter if an earlier kernel failed in it; otherwise wait for that kernel.

    JAX keeps the order of host callbacks by a token that every call takes from the one before. The
    token of a failed call raises that call's error again in each later one.
    """
    try:
        dispatch.runtime_tokens.block_until_ready()
    except Exception:
        reset()


_compiling = []


@contextlib.contextmanager
def compiled():
    """Let `choose_interpret(None)` compile in the body, where no mesh says so: nothing is lowered.

    The lab traces a kernel as a chip would run it, and only follows its copies on the host.

    >>> with compiled():
    ...     choose_interpret(None)
    False
    """
    _compiling.append(True)
    try:
        yield
    finally:
        _compiling.pop()


def reset():
    """Forget the interpreter's state: after an exception inside a kernel it is left half-way."""
    _interpreter().reset_tpu_interpret_mode_state()
    # The failed callback's token would raise the same error again in the next kernel, or at exit.
    dispatch.runtime_tokens.clear()


def races_found() -> bool:
    """Whether the last interpreted kernel, run with `detect_races=True`, had a data race."""
    races = _interpreter().races
    return races is not None and races.races_found


def deadlocks_can_raise() -> bool:
    """Whether `deadlocks_raise` works: the interpreter of jax 0.7.2 is one file, and spins."""
    return hasattr(importlib.import_module(_INTERPRETER), "__path__")


@contextlib.contextmanager
def deadlocks_raise():
    """Make a wait that nobody can end raise an error, where the interpreter would hang for ever.

    One core and no remote copies: whatever signals a semaphore has been started by the waiting
    core itself. So an interpreter that waits for another thread waits in vain.
    """
    memory = importlib.import_module(_INTERPRETER + ".shared_memory")
    threads = memory.threading
    memory.threading = types.SimpleNamespace(**vars(threads) | {"Condition": _Impatient})
    try:
        yield
    finally:
        memory.threading = threads


class _Impatient(threading.Condition):
    def wait(self, timeout=None):
        raise RuntimeError("deadlock: the kernel waits for a semaphore that no copy signals")


_INTERPRETER = "jax._src.pallas.mosaic.interpret"


def _interpreter():
    """The module that holds the interpreter's state; a package since it outgrew one file."""
    module = importlib.import_module(_INTERPRETER)
    if hasattr(module, "races"):
        return module
    return importlib.import_module(_INTERPRETER + ".interpret_pallas_call")


# --- What a kernel does in the interpreter, call by call ---------------------------------------


class KernelArgument(NamedTuple):
    """A reference that a kernel gets; `alias` is the index of the input that an output is."""

    name: str
    role: str  # "scalar", "input", "output" or "scratch"
    space: str  # "hbm", "vmem", "smem", "semaphore"
    shape: tuple[int, ...]  # of the whole array
    block_shape: tuple[int, ...]  # of what the kernel sees of it
    dtype: Any
    alias: int | None


class InterpreterCall(NamedTuple):
    """One thing that the TPU interpreter does, in the order in which it does it.

    Attributes:
        name: "kernel" (a `pallas_call` begins), "allocate", "allocate_semaphores", "dma_start",
            "dma_wait", "get", "store", "swap", "semaphore_signal", "semaphore_wait" or "step" (a
            step of the grid ends).
        arguments: of the interpreter's function of that name, as NumPy values, by name; of a
            transformed reference the index: a tuple of ints and slices.
        result: what it returned, for the allocations; None for all others, which are reported
            before they are done: also a wait that never ends is seen.
        where: the kernel's place, as of `source_line`, or "" where JAX does not say.
    """

    name: str
    arguments: dict[str, Any]
    result: Any
    where: str


def observe(observer):
    """Context manager: call `observer(InterpreterCall)` for all that interpreted kernels do.

    The interpreter runs a kernel as host callbacks, one after the other. The first use puts a hook
    around each of these functions and, because a compiled kernel holds on to the function itself,
    drops everything that was compiled before (`jax.clear_caches`). Hooks without an observer only
    pass on, so later uses cost nothing.

    Raises:
        RuntimeError: if this JAX's interpreter is not made as expected.
    """
    _install_hooks()
    return _observing(observer)


@contextlib.contextmanager
def _observing(observer):
    _observers.append(observer)
    try:
        yield
        jax.effects_barrier()  # a call returns before its callbacks have run
    finally:
        _observers.remove(observer)


_observers = []

_REPORTED = {"arguments", "memory_space", "buffer_id", "transforms", "val", "input_name"} | {
    f"{end}_{what}" for end in ("src", "dst") for what in ("id", "memory_space", "transforms")
}
_REPORTED |= {"dst_sem_id", "src_sem_id", "sem_id", "size", "inc", "value"}
"""The arguments that an observer gets; the others, tokens and clocks, cost time to convert."""

_HOOKS = {
    "_allocate_buffer": "allocate",
    "_allocate_semaphores": "allocate_semaphores",
    "_check_for_revisiting": "step",
} | {
    name: name
    for name in ("dma_start", "dma_wait", "get", "store", "swap")
    + ("semaphore_signal", "semaphore_wait")
}


@functools.cache
def _install_hooks():
    module = _interpreter()
    missing = [name for name in (*_HOOKS, "interpret_pallas_call") if not hasattr(module, name)]
    if missing:
        raise RuntimeError(
            f"jax {jax.__version__}: its TPU interpreter has no {', '.join(missing)}, so what a "
            f"kernel does cannot be recorded. Use a JAX between {'.'.join(map(str, JAX_FLOOR))} "
            "and 0.12."
        )
    for name, called in _HOOKS.items():
        setattr(module, name, _hook(getattr(module, name), called))
    module.interpret_pallas_call = _hook_kernel(module.interpret_pallas_call)
    jax.clear_caches()


def _hook(original, name):
    inner = inspect.unwrap(original)
    signature = inspect.signature(inner)

    @functools.wraps(original)
    def hooked(*args, **kwargs):
        if not _observers:
            return original(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        # The interpreter itself reads and writes so when it executes a copy: not the kernel.
        if arguments.get("src_device_id") is not None:
            return original(*args, **kwargs)
        if name.startswith("allocate"):
            result = original(*args, **kwargs)
            # Newer versions thread a token through all calls.
            _report(name, arguments, result[1] if isinstance(result, tuple) else result)
            return result
        _report(name, arguments)
        return original(*args, **kwargs)

    # `get.__wrapped__(...)` is how newer versions read in a copy; it must not pass here.
    hooked.__wrapped__ = inner
    return hooked


def _report(name, arguments, result=None):
    where = source_line(arguments.get("source_info"))
    values = {key: _host_value(key, arguments[key]) for key in arguments.keys() & _REPORTED}
    call = InterpreterCall(name, values, None if result is None else np.asarray(result), where)
    for observer in list(_observers):
        observer(call)


def _host_value(key, value):
    if key.endswith("transforms"):
        module = _interpreter()
        # One file in jax 0.7.2, later in a file of its own.
        to_range = getattr(module, "_to_range", None) or module.interpret_utils.to_range
        return to_range(jax.tree.map(int, value))
    if key.endswith("memory_space"):
        space = _interpreter().TPU_MEMORY_SPACE_NAMES[int(value)]
        return "hbm" if space == "any" else space.removesuffix("_mem")
    if key.endswith("_id") and value is not None:
        return int(value)
    return value


@functools.lru_cache(maxsize=4096)
def source_line(source_info):
    """The line of the program that an equation comes from, "file.py:12:4 (function)", or ""."""
    if source_info is None:
        return ""
    path, _, rest = source_info_util.summarize(source_info).partition(":")
    return f"{path.rpartition('/')[2]}:{rest}"


def _hook_kernel(original):
    @functools.wraps(original)
    def hooked(*args, **kwargs):
        # Traced like the kernel itself: the report comes each time it runs, before it allocates.
        arguments = kernel_arguments(**kwargs)
        report = functools.partial(_report, "kernel", {"arguments": arguments})
        jax.experimental.io_callback(lambda: _observers and report(), None, ordered=True)
        return original(*args, **kwargs)

    return hooked


def kernel_arguments(*, jaxpr, grid_mapping, input_output_aliases, **_):
    """The references of a kernel, from the parameters of its `pallas_call`, in their order."""
    names = jaxpr.debug_info.arg_names or [f"args[{i}]" for i in range(len(jaxpr.invars))]
    num_scalars, num_inputs = grid_mapping.num_index_operands, grid_mapping.num_inputs
    num_blocks = num_inputs + grid_mapping.num_outputs
    # Inputs are counted with the scalars, outputs from 0.
    aliases = {out: before - num_scalars for before, out in input_output_aliases}
    arguments = []
    for place, (name, var) in enumerate(zip(names, jaxpr.invars, strict=True)):
        i = place - num_scalars
        space = getattr(var.aval, "memory_space", None)
        shape = block_shape = tuple(var.aval.shape)
        if 0 <= i < num_blocks:
            mapping = grid_mapping.block_mappings[i]
            shape, space = _whole_array(mapping), _block_space(mapping, space)
        role = "scratch" if i >= num_blocks else "output" if i >= num_inputs else "input"
        role, space = ("scalar", "smem") if i < 0 else (role, space_name(space))
        alias = aliases.get(i - num_inputs) if role == "output" else None
        dtype = getattr(var.aval, "dtype", None)
        # Of a record of references, what its field is called.
        name = (name or f"args[{place}]").rpartition(".")[2]
        arguments.append(KernelArgument(name, role, space, shape, block_shape, dtype, alias))
    return arguments


def _whole_array(mapping):
    array = getattr(mapping, "array_aval", None) or mapping.array_shape_dtype
    return tuple(array.shape)


def _block_space(mapping, default):
    block = getattr(mapping, "transformed_block_aval", None)
    return getattr(block, "memory_space", None) or default
