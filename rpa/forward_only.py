"""Say in words that a kernel has no derivative and takes no `jax.vmap`.

JAX would try: it differentiates the operations inside the kernel, or adds a dimension to its grid,
and fails somewhere in there with a message about aliases or BlockSpecs. So the arguments pass
through an operation that does nothing, on every backend, and has no rule for either transformation.
That works for `jax.grad` of a function that was put into `jax.jit`, too, where a look at the
arguments would not show it.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def forward_only(name: str, operands):
    """The operands, unchanged and not copied; `jax.grad`, `jax.jvp` and `jax.vmap` of them raise.

    Args:
        name: of the function whose arguments they are.
        operands: a pytree of arrays, numbers or tracers.

    Raises:
        NotImplementedError: in words, where the caller differentiates or maps.

    >>> forward_only("attention", {"scale": jax.numpy.float32(2.0), "sinks": None})
    {'scale': Array(2., dtype=float32), 'sinks': None}
    """
    leaves, structure = jax.tree.flatten(operands)
    return jax.tree.unflatten(structure, _forward_only_p.bind(*leaves, name=name))


_forward_only_p = Primitive("forward_only")
_forward_only_p.multiple_results = True
_forward_only_p.def_impl(lambda *operands, name: list(operands))
_forward_only_p.def_abstract_eval(lambda *operands, name: list(operands))
mlir.register_lowering(_forward_only_p, lambda context, *operands, name: operands)


def _no_gradient(primals, tangents, *, name):
    raise NotImplementedError(
        f"{name} has no gradient: it serves trained models, and what a kernel writes in place "
        "cannot be differentiated. Train with an attention that is plain JAX, such as "
        "rpa.dense.attention."
    )


def _no_vmap(arrays, dims, *, name):
    raise NotImplementedError(
        f"{name} cannot be mapped with jax.vmap: a ragged batch holds any number of sequences "
        "already. Put all of them into one batch (RaggedBatch.from_lengths), or loop over batches."
    )


ad.primitive_jvps[_forward_only_p] = _no_gradient
batching.primitive_batchers[_forward_only_p] = _no_vmap
