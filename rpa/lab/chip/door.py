"""`run`: call a function as if the chip were here."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpa import chips
from rpa.lab.chip.dump import compiled_texts, on_chip
from rpa.lab.chip.evaluate import evaluate, kernels_in
from rpa.lab.chip.kernel import Kernel
from rpa.lab.chip.machine import MODELS

DMA_ORDERS = ("late", "eager")


def run(function, *args, chip="v5e", dma="late"):
    """What a function returns on a chip that is not here, its Pallas kernels executed as compiled.

    The kernels are compiled by libtpu for the chip and executed instruction by instruction in
    NumPy; everything around them is computed by JAX on the CPU. Memory that was not written is
    NaN, and every load, store and copy is checked.

    Args:
        function: a function of arrays that calls `pl.pallas_call`, without `interpret`.
        *args: pytrees of arrays, of NumPy or JAX.
        chip: "v5e", "v6e" or "tpu7x", or anything else that `rpa.chips.chip` has for them.
        dma: when copies end: "late" (only when a wait needs them) or "eager" (at once). A kernel
            is right only if both give the same.

    Returns:
        What the function returns, its arrays as `jax.Array`.

    Raises:
        NotCompiled: if there is no libtpu, or the compiler refuses, in words.
        UnknownOperation: if the kernel needs an instruction that the machine does not know, or
            libtpu is of a version that was not tested.
        KernelFault: if the kernel leaves a buffer, waits for ever, or leaves a semaphore or a
            result behind.
        ValueError: if the chip or the order is unknown.

    >>> from jax.experimental import pallas as pl
    >>> def double(x_ref, out_ref):
    ...     out_ref[...] = 2 * x_ref[...]
    >>> x = np.arange(3 * 130, dtype=np.float32).reshape(3, 130)
    >>> double_all = pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))
    >>> out = run(double_all, x, chip="v6e")  # doctest: +SKIP
    >>> bool((out == 2 * x).all())  # doctest: +SKIP
    True
    """
    if not isinstance(dma, str) or dma not in DMA_ORDERS:
        raise ValueError(f"dma is {dma!r}, but must be one of {', '.join(map(repr, DMA_ORDERS))}.")
    return prepare(function, *args, chip=chip)(*args, dma=dma)


def prepare(function, *args, chip="v5e", watch=None) -> "Prepared":
    """The same in two steps: compile for the shapes and dtypes of args, then call it often.

    Args and errors are those of `run`; of `args` only shapes and dtypes are used. `watch` is called
    after every instruction, see `rpa.lab.chip.stepping`.
    """
    name = chips.chip(chip).name
    if name not in MODELS:
        raise ValueError(f"chip is {chip!r}, but only {', '.join(MODELS)} can be executed.")
    with on_chip(name):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    return Prepared(
        closed, jax.tree.structure(shape), compile_kernels(kernels_in(closed), name, watch)
    )


class Prepared(NamedTuple):
    """A function whose kernels are compiled and translated; call it like the function.

    Attributes:
        closed: the traced function.
        structure: of what it returns.
        kernels: its kernels, in the order of `kernels_in`.
    """

    closed: Any
    structure: Any
    kernels: list[Kernel]

    def __call__(self, *args, dma="late"):
        """What `run` returns."""
        kernels = {
            id(eqn): kernel
            for eqn, kernel in zip(kernels_in(self.closed), self.kernels, strict=True)
        }

        def run_kernel(eqn, inputs):
            return kernels[id(eqn)].run(inputs, late=dma == "late")

        leaves = [
            _as_traced(leaf, aval)
            for leaf, aval in zip(jax.tree.leaves(args), self.closed.in_avals, strict=True)
        ]
        outputs = evaluate(self.closed, leaves, run_kernel)
        return jax.tree.unflatten(self.structure, list(map(jnp.asarray, outputs)))


def _as_traced(leaf, aval) -> np.ndarray:
    """An argument as the kernels were compiled for it: JAX traces NumPy's float64 as float32."""
    array = np.asarray(leaf)
    if array.shape != aval.shape:
        raise ValueError(
            f"an argument has shape {array.shape}, but the function was prepared for "
            f"{aval.shape}: prepare it anew."
        )
    return array.astype(aval.dtype, copy=False)


def compile_kernels(eqns, chip, watch=None) -> list[Kernel]:
    """The compiled and translated kernel of each equation of a `pallas_call`."""
    kernels = []
    for eqn, text in zip(eqns, compiled_texts(eqns, chip), strict=True):
        results = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.outvars)
        aliases = tuple(dict(eqn.params["input_output_aliases"]).items())
        kernels.append(_translated(text, chip, len(eqn.invars), results, aliases, watch))
    return kernels


@functools.lru_cache(maxsize=32)
def _translated(text, chip, num_inputs, results, aliases, watch):
    return Kernel(text, MODELS[chip], num_inputs, results, dict(aliases), watch)
