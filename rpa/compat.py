"""What differs between the JAX versions that rpa supports, and nothing else.

The floor is jax 0.7.2, which Colab's TPU runtime ships; the newest JAX is tested too. Every other
file imports from here what has moved, so that a version is dropped by editing one file.
"""

import contextlib
import importlib
import threading
import types

import jax
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


def reset_interpreter():
    """Forget the interpreter's state: after an exception inside a kernel it is left half-way."""
    _interpreter().reset_tpu_interpret_mode_state()


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

    Compiled, `pl.ANY` leaves the choice to XLA, which copies what is small enough into VMEM, and
    every "DMA from HBM" of the kernel becomes something else. Interpreted, jax 0.7.2 to 0.9.0 lose
    what a kernel does not write of an aliased HBM buffer; `pl.ANY` is right in all of them.
    """
    return pl.ANY if interpret else pltpu.HBM


_INTERPRETER = "jax._src.pallas.mosaic.interpret"


def _interpreter():
    """The module that holds the interpreter's state; a package since it outgrew one file."""
    module = importlib.import_module(_INTERPRETER)
    if hasattr(module, "races"):
        return module
    return importlib.import_module(_INTERPRETER + ".interpret_pallas_call")
