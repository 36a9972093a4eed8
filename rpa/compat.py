"""What differs between the JAX versions that rpa supports, and nothing else.

The floor is jax 0.7.2, which Colab's TPU runtime ships; the newest JAX is tested too. Every other
file imports from here what has moved, so that a version is dropped by editing one file.
"""

import contextlib
import dataclasses
import importlib
import threading
import types

import jax
import jax.numpy as jnp
from jax._src import dispatch
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])
"""The running JAX as a comparable tuple, e.g. (0, 10, 2)."""

JAX_FLOOR = (0, 7, 2)
"""The oldest JAX that rpa is tested with (Colab's TPU runtime of 2026-08)."""


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
    """What `pallas_call` gets as `interpret`: None compiles on a TPU and interprets elsewhere."""
    if interpret is not None:
        return interpret
    return False if jax.default_backend() == "tpu" else interpreter_params()


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
