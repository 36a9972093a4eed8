"""Evaluate a traced function on the host, its Pallas kernels by somebody else.

What XLA would do around the kernels is done by the JAX of the CPU, operation by operation.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.extend import core

from rpa.lab.chip.errors import UnknownOperation


def evaluate(closed, inputs, run_kernel: Callable) -> list:
    """The outputs of a `jax.make_jaxpr` for a list of arrays.

    Args:
        closed: the traced function.
        inputs: an array for each of its inputs.
        run_kernel: (equation of the `pallas_call`, operands) -> its results.

    >>> closed = jax.make_jaxpr(lambda x: 2 * x + 1)(3.0)
    >>> float(evaluate(closed, [np.float32(3)], None)[0])
    7.0
    """
    return _Evaluation(run_kernel).outputs(closed.jaxpr, closed.consts, inputs)


class _Evaluation:
    def __init__(self, run_kernel):
        self.run_kernel = run_kernel

    def outputs(self, jaxpr, consts, inputs):
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            results = self.results(eqn, [read(atom) for atom in eqn.invars])
            values |= zip(eqn.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def results(self, eqn, inputs):
        name = eqn.primitive.name
        if name == "pallas_call":
            return self.run_kernel(eqn, [np.asarray(x) for x in inputs])
        if name == "with_memory_space_constraint":
            return inputs  # the host has one memory
        if not _has_kernel(eqn):
            results = eqn.primitive.bind(*inputs, **eqn.params)
            return results if eqn.primitive.multiple_results else [results]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if name == "scan":
            return self.scan(eqn.params, inner, inputs)
        if name == "while":
            return self.loop(eqn.params, inputs)
        if name == "cond":
            index, *operands = inputs
            branch = eqn.params["branches"][int(index)]
            return self.outputs(branch.jaxpr, branch.consts, operands)
        if isinstance(inner, core.ClosedJaxpr):
            return self.outputs(inner.jaxpr, inner.consts, inputs)
        raise UnknownOperation(f"a kernel inside {name} cannot be executed here.")

    def loop(self, params, inputs):
        """`lax.while_loop`, and `fori_loop` of a dynamic length."""
        condition, body = params["cond_jaxpr"], params["body_jaxpr"]
        first, second = params["cond_nconsts"], params["body_nconsts"]
        for_condition, for_body = inputs[:first], inputs[first : first + second]
        carried = inputs[first + second :]
        while bool(self.outputs(condition.jaxpr, condition.consts, [*for_condition, *carried])[0]):
            carried = self.outputs(body.jaxpr, body.consts, [*for_body, *carried])
        return carried

    def scan(self, params, body, inputs):
        """`lax.scan`, step by step."""
        num_consts, num_carried = params["num_consts"], params["num_carry"]
        consts, rest = inputs[:num_consts], inputs[num_consts:]
        carried, rows = rest[:num_carried], rest[num_carried:]
        steps = range(params["length"])
        collected = {}
        for step in reversed(steps) if params["reverse"] else steps:
            found = self.outputs(
                body.jaxpr, body.consts, [*consts, *carried, *(x[step] for x in rows)]
            )
            carried, collected[step] = found[:num_carried], found[num_carried:]
        return [*carried, *(np.stack(x) for x in zip(*(collected[i] for i in steps), strict=True))]


def kernels_in(closed) -> list:
    """The equations of all `pallas_call`s of a traced function, at any depth."""
    found = []
    for eqn in getattr(closed, "jaxpr", closed).eqns:
        if eqn.primitive.name == "pallas_call":
            found.append(eqn)
        else:
            found += [inner for jaxpr in _jaxprs(eqn.params) for inner in kernels_in(jaxpr)]
    return found


def _has_kernel(eqn) -> bool:
    """Whether an equation holds, at any depth, what the host's JAX cannot evaluate."""
    return eqn.primitive.name in ("pallas_call", "with_memory_space_constraint") or any(
        _has_kernel(inner) for jaxpr in _jaxprs(eqn.params) for inner in jaxpr.eqns
    )


def _jaxprs(params):
    for leaf in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(leaf):
            yield getattr(leaf, "jaxpr", leaf)


def _is_jaxpr(x):
    return isinstance(x, (core.ClosedJaxpr, core.Jaxpr))
