"""`Feed`s: how the integers that a kernel reads follow from a function's arguments, on the host.

Mostly they are the arguments, padded or shifted. But a kernel may also read what another kernel of
the same function wrote, a list of blocks for instance. Then that one is compiled and executed as
well, in the same way, before it.
"""

import base64
import pickle
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import serialize_executable

from rpa.lab.schedule import pallas_calls


@dataclass(frozen=True)
class Feed:
    """From the integer arguments, and the results of kernels before, to a kernel's operands.

    Attributes:
        operands: indices of the kernel's operands whose values it yields.
        program: compiled for the host, in base 64.
    """

    operands: tuple[int, ...]
    program: str

    def __call__(self, *integers) -> dict[int, np.ndarray]:
        """{operand: values}."""
        parts = pickle.loads(base64.b64decode(self.program))
        run = serialize_executable.deserialize_and_load(*parts, backend="cpu")
        return dict(zip(self.operands, map(np.asarray, run(*integers)), strict=True))


def make_feed(traced, args, target, sources) -> Feed:
    """The feed of one kernel.

    Args:
        traced: the function's jaxpr.
        args: its arguments, pytrees of shapes.
        target: index of the kernel among those of the function.
        sources: indices of the kernels whose results it is given besides the integer arguments.
    """
    calls = pallas_calls.pallas_calls(traced)
    shapes = _integer_shapes(args)
    for index in sources:
        shapes += [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in _outputs(calls, index)]
    operands = []

    def feed(*values):
        known = _known_operands(traced, args, target, _split(calls, args, sources, values))
        operands.extend(known)
        return list(known.values())

    compiled = jax.jit(feed).lower(*shapes).compile()
    program = pickle.dumps(serialize_executable.serialize(compiled))
    return Feed(tuple(operands), base64.b64encode(program).decode())


def sources_of(traced, args, target) -> list[int]:
    """Indices of the kernels of integers alone whose results one kernel reads as integers."""
    calls = pallas_calls.pallas_calls(traced)
    plain = _count_known(traced, args, target, calls, [])
    return [
        index
        for index in range(target)
        if all(np.issubdtype(var.aval.dtype, np.integer) for var in calls[index].eqn.invars)
        and _count_known(traced, args, target, calls, [index]) > plain
    ]


def _count_known(traced, args, target, calls, sources):
    found = []

    def probe(*values):
        known = _known_operands(traced, args, target, _split(calls, args, sources, values))
        found.append(len(known))

    shapes = _integer_shapes(args)
    for index in sources:
        shapes += [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in _outputs(calls, index)]
    jax.eval_shape(probe, *shapes)
    return found[0]


def _split(calls, args, sources, values):
    """Known arguments, and results of kernels, from one list of both."""
    places = pallas_calls.integer_leaves(args)
    known, rest = dict(zip(places, values, strict=False)), list(values[len(places) :])
    results = {}
    for index in sources:
        count = len(_outputs(calls, index))
        results[index], rest = rest[:count], rest[count:]
    return known, results


def _known_operands(traced, args, target, known_and_results):
    call = pallas_calls.pallas_calls(traced, *known_and_results)[target]
    return pallas_calls.known_operands(call)


def _outputs(calls, index):
    return calls[index].eqn.outvars


def _integer_shapes(args):
    leaves = jax.tree.leaves(args)
    places = pallas_calls.integer_leaves(args)
    return [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in places]
