"""Kernels of the interpreter compiled in haste: a check runs each of them for a moment.

To compile rung 7 for a CPU takes most of the time of a check that runs it. What makes a program
fast is left out; the numbers stay the same.
"""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import jax

from rpa.kernel import api

_IN_HASTE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,  # the older ones take two thirds of the time
}


@functools.cache
def options() -> dict[str, int | bool]:
    """`compiler_options` of `jax.jit` for a program that runs once, on a CPU.

    >>> options()["xla_backend_optimization_level"]
    0
    """
    return {name: value for name, value in _IN_HASTE.items() if _is_known(name, value)}


def _is_known(name, value):
    """Whether the XLA of this JAX has the option; the names are nobody's promise."""
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            jax.jit(lambda: 0, compiler_options={name: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@contextlib.contextmanager
def rung_7() -> Iterator[None]:
    """Compile rung 7 in haste where it is called in the body; on a TPU nothing is different."""
    if jax.default_backend() == "tpu":
        yield
        return
    with mock.patch.multiple(api, **_runs_in_haste()):
        yield


@functools.cache
def _runs_in_haste():
    """By name in `api`; made once, because a `jax.jit` remembers what it has compiled."""
    haste = functools.partial(jax.jit, static_argnames=api.STATIC, compiler_options=options())
    return {
        "_run_on_copy": haste(api._run_on_copy),
        "_run_in_place": haste(api._run_in_place, donate_argnames="kv_cache"),
    }
