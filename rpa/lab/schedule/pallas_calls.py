"""Find the Pallas kernels inside a function, and what each of their operands is made of.

A schedule is read of one kernel alone, with its operands already laid out: what XLA does around it
(transposes, copies) is another program. And a run of that kernel needs the values of its integer
operands, lengths and page tables, which decide how often its loops turn. Both come from the
function's jaxpr, walked with the integers known and all other arrays by their shape only.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from rpa.lab.schedule.values import CannotRun


class PallasCall(NamedTuple):
    """One `pallas_call` of a traced function."""

    name: str
    eqn: Any  # the jaxpr equation
    operands: list  # a known array, or the abstract value, of each

    @property
    def shapes(self):
        """`jax.ShapeDtypeStruct` of each operand."""
        return [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in self.eqn.invars]

    def bind(self, *operands):
        """The kernel alone, as a function of its operands."""
        return self.eqn.primitive.bind(*operands, **self.eqn.params)


class _Unknown(NamedTuple):
    aval: Any


def pallas_calls(closed, known=None, results=None) -> list[PallasCall]:
    """The kernels of a traced function, in order, also inside nested jits and scans.

    A kernel in the body of a scan is found once per iteration.

    Args:
        closed: what `jax.make_jaxpr` returns.
        known: {index among the function's inputs: array} of values to follow through it. None
            evaluates nothing.
        results: {index among the kernels: arrays} of kernels whose outputs are known as well.

    Returns:
        For each kernel its operands, known or not.

    Raises:
        rpa.lab.schedule.execution.CannotRun: if a kernel is inside a loop or a branch whose
            iterations are not known from the program alone.

    >>> from jax.experimental import pallas as pl
    >>> copy = lambda i_ref, x_ref, o_ref: None
    >>> f = lambda i, x: pl.pallas_call(copy, out_shape=x, name="copy")(i + 1, x * 2)
    >>> closed = jax.make_jaxpr(f)(np.zeros(3, "int32"), np.zeros((8, 128), "float32"))
    >>> call, = pallas_calls(closed, {0: np.arange(3)})
    >>> call.name, call.operands[0].tolist()
    ('copy', [1, 2, 3])
    """
    values = [(known or {}).get(i, _Unknown(v.aval)) for i, v in enumerate(closed.jaxpr.invars)]
    walk = _Walk([], known is not None, results or {})
    walk.outputs(closed.jaxpr, closed.consts, values)
    return walk.found


def integer_leaves(args) -> list[int]:
    """Places of the integer arrays among the leaves of args: what is followed through a function.

    >>> integer_leaves((np.zeros(3, "float32"), np.arange(2)))
    [1]
    """
    leaves = jax.tree.leaves(args)
    return [i for i, x in enumerate(leaves) if np.issubdtype(x.dtype, np.integer)]


class _Walk(NamedTuple):
    """Evaluates what depends on known values only, and collects the kernels on its way."""

    found: list
    evaluate: bool
    results: dict

    def outputs(self, jaxpr, consts, values):
        """What a jaxpr returns, known or not."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= zip(jaxpr.invars, values, strict=True)

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            env |= zip(eqn.outvars, self._results(eqn, [read(x) for x in eqn.invars]), strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _results(self, eqn, inputs):
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        unknown = [_Unknown(var.aval) for var in eqn.outvars]
        if eqn.primitive.name == "pallas_call":
            self.found.append(PallasCall(_kernel_name(eqn), eqn, inputs))
            return self.results.get(len(self.found) - 1, unknown)
        if eqn.primitive.name in ("with_memory_space_constraint", "forward_only"):
            return inputs  # they pass their operands on, known or not
        if eqn.primitive.name == "scan":
            return self._scan(eqn, inputs)
        if isinstance(inner, core.ClosedJaxpr):
            return self.outputs(inner.jaxpr, inner.consts, inputs)
        if _has_kernel(eqn):
            raise CannotRun(
                f"There is a kernel inside `{eqn.primitive.name}`, and how often it runs there is "
                f"not known before the program runs: call it outside, or inside `lax.scan`."
            )
        if not self.evaluate or any(isinstance(value, _Unknown) for value in inputs):
            return unknown
        result = eqn.primitive.bind(*inputs, **eqn.params)
        return result if eqn.primitive.multiple_results else [result]

    def _scan(self, eqn, inputs):
        """What a scan returns: its body is followed as often as it runs."""
        has_kernel = _has_kernel(eqn)
        unknown = [isinstance(value, _Unknown) for value in inputs]
        if not has_kernel and (not self.evaluate or all(unknown)):
            return [_Unknown(var.aval) for var in eqn.outvars]
        if not has_kernel and not any(unknown):
            return eqn.primitive.bind(*inputs, **eqn.params)
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        first_x = num_consts + num_carry
        consts, carry, xs = inputs[:num_consts], inputs[num_consts:first_x], inputs[first_x:]
        avals = [var.aval for var in body.jaxpr.invars[first_x:]]  # of one iteration's x
        ys = [None] * length
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            now = [
                _Unknown(aval) if isinstance(x, _Unknown) else x[i]
                for x, aval in zip(xs, avals, strict=True)
            ]
            found = self.outputs(body.jaxpr, body.consts, [*consts, *carry, *now])
            carry, ys[i] = found[:num_carry], found[num_carry:]
        return [*carry, *map(_stack, zip(*ys, strict=True), eqn.outvars[num_carry:])]


def _stack(values, var):
    """The values of one output of a scan's iterations as one array, if all of them are known."""
    if not values or any(isinstance(value, _Unknown) for value in values):
        return _Unknown(var.aval)
    return np.stack(values).astype(var.aval.dtype)


def _has_kernel(eqn):
    """Whether a `pallas_call` is somewhere inside an equation's own programs."""
    for param in jax.tree.leaves(list(eqn.params.values())):
        jaxpr = getattr(param, "jaxpr", param)  # of a ClosedJaxpr
        for inner in getattr(jaxpr, "eqns", ()):
            if inner.primitive.name == "pallas_call" or _has_kernel(inner):
                return True
    return False


def _kernel_name(eqn):
    named = eqn.params.get("name_and_src_info")
    name = named.name if named is not None else eqn.params.get("name")
    return name or "unnamed"  # pallas_call without `name`, and all of them in jax 0.7.2


def known_operands(call: PallasCall) -> dict[int, Any]:
    """{index: array} of the operands whose values followed from what was known."""
    return {
        i: value
        for i, value in enumerate(call.operands)
        if not isinstance(value, _Unknown) and np.issubdtype(value.dtype, np.integer)
    }
