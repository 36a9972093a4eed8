"""What differs between the JAX versions that rpa supports, and nothing else.

The floor is jax 0.7.2, which Colab's TPU runtime ships; the newest JAX is tested too. Every other
file imports from here what has moved, so that a version is dropped by editing one file.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import threading
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dispatch, source_info_util
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])
"""The running JAX as a comparable tuple, e.g. (0, 10, 2)."""

JAX_FLOOR = (0, 7, 2)
"""The oldest JAX that rpa is tested with (Colab's TPU runtime of 2026-08)."""

SMEM_TILE_WORDS = 128 if JAX_VERSION >= (0, 10, 2) else 1024
"""A DMA between HBM and SMEM starts at, and moves, a multiple of so many words of 32 bits.

The compiler's tile of a row of words. With jax 0.7.2 and its libtpu 0.0.23 it refuses less than
1,024; where between them it changed was not tried, so everything older than what is tested counts.
"""


def interpreter_params(*, dma_execution_mode="on_wait", detect_races=False):
    """Parameters of the TPU interpreter that behave alike in every supported JAX.

    `on_race` is new and by default raises in the middle of a kernel; "warn" everywhere lets
    `races_found` answer afterwards, as the older versions do.
    """
    params = {"dma_execution_mode": dma_execution_mode, "detect_races": detect_races}
    if "on_race" in pltpu.InterpretParams.__dataclass_fields__:
        params["on_race"] = "warn"
    return pltpu.InterpretParams(**params)


def choose_interpret(interpret):
    """What `pallas_call` gets as `interpret`: None compiles on a TPU and interprets elsewhere.

    Tracing for a TPU that is not here (`rpa.lab`) counts as on a TPU.
    """
    if interpret is not None:
        return interpret
    traced_for = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    on_tpu = "tpu" in (jax.default_backend(), getattr(traced_for, "platform", None))
    return False if on_tpu else interpreter_params()


def reset_interpreter():
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
        raise RuntimeError("deadlock: the kernel waits for a semaphore that nobody signals")


def hbm_memory_space(interpret):
    """The memory space for arrays that a kernel moves by its own DMAs: HBM, unless interpreted.

    Interpreted, jax 0.7.2 to 0.9.0 lose what a kernel does not write of an aliased HBM buffer;
    `pl.ANY` is right in all of them.
    """
    return pl.ANY if interpret else pltpu.HBM


def keep_in_hbm(array, interpret):
    """Forbid XLA to place an argument of a kernel anywhere but in HBM, where it is compiled.

    The BlockSpec's memory space tells the kernel where the array is; this tells XLA, which
    otherwise copies what is small enough into VMEM and back: a whole cache on a v5e.

    Tested from jax 0.10.2 on. With 0.7.2 and its libtpu the compiler refuses or crashes where the
    array is aliased, so there XLA keeps the choice.
    """
    if interpret or JAX_VERSION < (0, 10, 2):
        return array
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


def compiler_params(**params):
    """`pltpu.CompilerParams` of those parameters that this JAX knows.

    `disable_semaphore_checks` is younger than the floor, where the checks are always on.
    """
    known = {field.name for field in dataclasses.fields(pltpu.CompilerParams)}
    return pltpu.CompilerParams(**{name: value for name, value in params.items() if name in known})


def loop_once(lower, upper):
    """`pl.loop(lower, upper)` for bounds known at run time, lowered once.

    jax 0.10 lowers the body of a `fori_loop` of dynamic length twice, as if it were unrolled with
    a remainder: five nested loops are 32 copies to trace and to compile. A `while_loop` whose
    condition is not `i < upper` is not recognised as a `fori_loop`.
    """

    def run(body):
        def step(i):
            body(i)
            return i + 1

        first = jnp.minimum(jnp.int32(lower), upper)
        jax.lax.while_loop(lambda i: i != upper, step, first)

    return run


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


def observe_interpreter(observer):
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
        role, space = ("scalar", "smem") if i < 0 else (role, _space_name(space))
        alias = aliases.get(i - num_inputs) if role == "output" else None
        dtype = getattr(var.aval, "dtype", None)
        name = name or f"args[{place}]"
        arguments.append(KernelArgument(name, role, space, shape, block_shape, dtype, alias))
    return arguments


def _whole_array(mapping):
    array = getattr(mapping, "array_aval", None) or mapping.array_shape_dtype
    return tuple(array.shape)


def _block_space(mapping, default):
    block = getattr(mapping, "transformed_block_aval", None)
    return getattr(block, "memory_space", None) or default


def _space_name(space):
    name = str(getattr(space, "value", space)).removesuffix("_mem")
    return {"any": "hbm", "None": "vmem", "default": "vmem"}.get(name, name)


# --- Reading a jaxpr -----------------------------------------------------------------------------


def open_jaxpr(jaxpr):
    """A jaxpr and its constants on the host; before 0.12 JAX kept the two together."""
    return getattr(jaxpr, "jaxpr", jaxpr), [np.asarray(c) for c in getattr(jaxpr, "consts", ())]


def scan_counts(params, num_operands):
    """How many operands of a `scan` are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    groups = params["ft_in"].update(range(num_operands)).unpack()
    consts, carry, _ = (list(group) for group in groups)
    return len(consts), len(carry)


def dma_operands(tree, operands):
    """(source, its transforms, target, its transforms, semaphore, its transforms) of a DMA."""
    parts = jax.tree.unflatten(tree, operands)
    if len(parts) == 9:  # jax 0.7.2: references and transforms one after the other
        return parts[:6]
    ends = []
    for ref in parts[:3]:
        transforms = getattr(ref, "transforms", None)
        ends += [ref, ()] if transforms is None else [ref.ref, transforms]
    return tuple(ends)


def memory_space_name(aval):
    """Where a reference of a kernel is: "hbm", "vmem", "smem" or "semaphore"."""
    return _space_name(getattr(aval, "memory_space", None))


def block_dimensions(mapping):
    """(size, whether the kernel does not see this dimension) for each dimension of a block."""
    dimensions = []
    for size in mapping.block_shape:
        squeezed = type(size).__name__ == "Squeezed" or size is None
        # A size may be wrapped, as `pl.Blocked(8)`.
        dimensions.append((1 if squeezed else int(getattr(size, "block_size", size)), squeezed))
    return dimensions
