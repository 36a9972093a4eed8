"""What differs between the JAX versions that rpa supports, and nothing else.

The floor is jax 0.7.2, which Colab's TPU runtime ships; the newest JAX is tested too. Every other
file imports from here what has moved, so that a version is dropped by editing one file.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
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
    return space_name(getattr(aval, "memory_space", None))


def block_dimensions(mapping):
    """(size, whether the kernel does not see this dimension) for each dimension of a block."""
    dimensions = []
    for size in mapping.block_shape:
        squeezed = type(size).__name__ == "Squeezed" or size is None
        # A size may be wrapped, as `pl.Blocked(8)`.
        dimensions.append((1 if squeezed else int(getattr(size, "block_size", size)), squeezed))
    return dimensions


def space_name(space):
    """A memory space of any JAX version as "hbm", "vmem", "smem" or "semaphore"."""
    name = str(getattr(space, "value", space)).removesuffix("_mem")
    return {"any": "hbm", "None": "vmem", "default": "vmem"}.get(name, name)
