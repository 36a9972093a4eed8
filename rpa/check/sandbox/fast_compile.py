"""Compile interpreted kernels with optimisation off: a check runs each of them once.

To compile rung 8 for a CPU takes most of the time of a check that runs it. What makes a program
fast is left out; the numbers stay the same except for the last bits of float32.

`python -m rpa.check.sandbox.fast_compile` prints XLA_FLAGS with which a whole process compiles so:
all tests, and the notebooks in `make test`.
"""

import functools

import jax
import jax.numpy as jnp

from rpa.kernel import compiler_options

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
    return {name: value for name, value in _IN_HASTE.items() if _is_safe(name, value)}


def xla_flags() -> str:
    """The same for the environment variable XLA_FLAGS; XLA ends at one that it does not know.

    >>> xla_flags().split()[0]
    '--xla_backend_optimization_level=0'
    """
    known = options()
    if jax.default_backend() == "tpu":  # libtpu reads the variable too, and of these knows this one
        known = {name: known[name] for name in known if name == "xla_backend_optimization_level"}
    return " ".join(f"--{name}={str(value).lower()}" for name, value in known.items())


def _is_safe(name, value):
    """Whether the XLA of this JAX knows the option, and rounds float8 as it does without.

    The names are nobody's promise; and the older fusion emitters of JAX 0.7.2 round float8 twice,
    first to float16: just above a tie of 1 and 1.125 they take the wrong one.
    """
    above_tie = jnp.float32(1.0625 + 2**-14)
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            rounded = jax.jit(_round_to_float8, compiler_options={name: value})(above_tie)
    except jax.errors.JaxRuntimeError:
        return False
    return float(rounded) == 1.125


def _round_to_float8(x):
    return (x + x - x).astype(jnp.float8_e4m3fn)  # not x alone: arithmetic is what gets fused


def rung_8():
    """Context manager: rung 8 compiles fast where it is called in the body; not on a TPU."""
    return compiler_options(**({} if jax.default_backend() == "tpu" else options()))


if __name__ == "__main__":
    print(xla_flags())
