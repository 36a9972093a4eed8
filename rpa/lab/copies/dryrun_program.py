"""Jaxprs as programs that compute integers and leave everything else unknown.

A jaxpr becomes a list of steps once, and the list is run as often as loops want. A step is left out
where its results cannot decide what is copied: inside a kernel, everything that is not a scalar.
"""

import operator
from dataclasses import replace
from functools import lru_cache
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rpa import compat, interpreter
from rpa.lab.copies.events import Slice

MOST_ELEMENTS = 2**20
"""Known arrays outside of kernels may be this large; a larger result is left unknown."""


class Unknown:
    """A value that is not computed; `name` says which argument's memory it still is, or ""."""

    def __init__(self, name=""):
        self.name = name

    def __repr__(self):
        return f"Unknown({self.name!r})"


UNKNOWN = Unknown()


@lru_cache(maxsize=512)
def block_of(jaxpr, in_kernel):
    """The program of a jaxpr; kept, so that a loop's body is prepared once."""
    return Program(jaxpr, in_kernel)


class Program:
    """A jaxpr made ready to run: values in numbered slots, and steps that fill them."""

    def __init__(self, jaxpr, in_kernel):
        self.in_kernel = in_kernel
        self._slots, self._template = {}, []
        self._inputs = [self._slot(var) for var in (*jaxpr.constvars, *jaxpr.invars)]
        self._steps = []
        for eqn in jaxpr.eqns:
            run = self._step(eqn)
            if run is not None:
                ins = [self._slot(x) for x in eqn.invars]
                self._steps.append((run, ins, [self._slot(x) for x in eqn.outvars]))
            else:
                for var in eqn.outvars:
                    self._slot(var)
        self._outputs = [self._slot(x) for x in jaxpr.outvars]

    def run(self, machine, values):
        """The values of the outputs for those of constants and inputs."""
        env = self._template.copy()
        for slot, value in zip(self._inputs, values, strict=True):
            env[slot] = value
        for run, ins, outs in self._steps:
            results = run(machine, [env[slot] for slot in ins])
            for slot, value in zip(outs, results, strict=True):
                env[slot] = value
        return [env[slot] for slot in self._outputs]

    def _slot(self, var):
        if isinstance(var, core.Literal):
            self._template.append(_scalar(np.asarray(var.val)))
            return len(self._template) - 1
        if var not in self._slots:
            self._slots[var] = len(self._template)
            self._template.append(UNKNOWN)
        return self._slots[var]

    def _step(self, eqn):
        """What runs an equation, or None if its results stay unknown."""
        name = eqn.primitive.name
        if name in _STEPS:
            return _STEPS[name](eqn, self.in_kernel)
        if self.in_kernel and any(var.aval.shape for var in eqn.outvars):
            return None
        if not eqn.outvars or name in _WITHOUT_RESULT:
            return None
        return _pure(eqn)


# --- Arithmetic ----------------------------------------------------------------------------------


def _quotient(a, b):
    """Integers are divided towards zero, unlike in Python."""
    if isinstance(a, float) or isinstance(b, float):
        return a / b if b else float("nan")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def _remainder(a, b):
    return a - b * _quotient(a, b) if b else a


_SCALAR = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _quotient,
    "rem": _remainder,
    "max": max,
    "min": min,
    "neg": operator.neg,
    "abs": abs,
    "sign": lambda a: (a > 0) - (a < 0),
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": lambda a: not a if isinstance(a, bool) else ~a,
    "clamp": lambda low, a, high: min(max(a, low), high),
    "shift_left": operator.lshift,
    "shift_right_arithmetic": operator.rshift,
    "multiple_of": lambda a: a,
    "squeeze": lambda a: a,
    "reshape": lambda a: a,
    "broadcast_in_dim": lambda a: a,
    "stop_gradient": lambda a: a,
    "convert_element_type": lambda a: a,
}
"""What scalars are computed with: a call of JAX for each would take a hundred times as long."""

_WITHOUT_RESULT = {"debug_callback", "debug_print", "delay", "check", "prng_seed"}


def _scalar(value):
    """A Python number for an array without dimensions; others as they are."""
    return value.item() if isinstance(value, (np.ndarray, np.generic)) and not value.ndim else value


def _pure(eqn):
    """A step that computes if all its inputs are known, and leaves its results unknown if not."""
    shapes = [x.aval.shape for x in (*eqn.invars, *eqn.outvars)]
    dtypes = [np.dtype(x.aval.dtype) if hasattr(x.aval, "dtype") else None for x in eqn.outvars]
    name = eqn.primitive.name
    if name == "select_n" and not any(shapes):
        return _select
    count = len(eqn.outvars)
    too_large = any(prod(x.aval.shape) > MOST_ELEMENTS for x in eqn.outvars)
    if name in _SCALAR and not any(shapes):
        return _scalar_step(_SCALAR[name], _cast(dtypes[0]) if name.startswith("conv") else None)
    avals = [x.aval for x in eqn.invars]

    def run(machine, values):
        if too_large or any(isinstance(value, Unknown) for value in values):
            return [_unknown_of(values, name in ("concatenate", "stack"))] * count
        arrays = [np.asarray(v, a.dtype) for v, a in zip(values, avals, strict=True)]
        result = eqn.primitive.bind(*arrays, **eqn.params)
        results = result if eqn.primitive.multiple_results else [result]
        return [_scalar(np.asarray(r)) for r in results]

    return run


def _cast(dtype):
    if jnp.issubdtype(dtype, jnp.floating):  # bfloat16 has a kind of its own in NumPy
        return float
    return bool if dtype.kind == "b" else int


def _scalar_step(function, cast):
    def run(machine, values):
        for value in values:
            if isinstance(value, Unknown):
                return (UNKNOWN,)
        result = function(*values)
        return (result if cast is None else cast(result),)

    return run


def _select(machine, values):
    which, *cases = values
    return (UNKNOWN if isinstance(which, Unknown) else cases[int(which)],)


def _unknown_of(values, together):
    """What is computed from one argument is named after it, what is put together after all."""
    names = dict.fromkeys(value.name for value in values if isinstance(value, Unknown))
    return Unknown("+".join(names)) if together or len(names) == 1 else UNKNOWN


def _known(value, what):
    if isinstance(value, Unknown):
        raise ValueError(
            f"{what} depends on a value that a dry run does not compute: it knows integers that "
            "come from the arguments given as arrays, and what a kernel keeps in SMEM. Record the "
            "kernel in the interpreter instead (rpa.lab.copies.timeline.record_dmas)."
        )
    return value


# --- Control flow --------------------------------------------------------------------------------


def _call(eqn, in_kernel):
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    jaxpr, consts = compat.open_jaxpr(inner)
    block = block_of(jaxpr, in_kernel)
    return lambda machine, values: block.run(machine, [*consts, *values])


def _cond(eqn, in_kernel):
    opened = [compat.open_jaxpr(branch) for branch in eqn.params["branches"]]
    branches = [(block_of(jaxpr, in_kernel), consts) for jaxpr, consts in opened]
    where = interpreter.source_line(eqn.source_info)

    def run(machine, values):
        index = int(_known(values[0], f"the branch at {where}"))
        block, consts = branches[min(max(index, 0), len(branches) - 1)]
        return block.run(machine, [*consts, *values[1:]])

    return run


def _while(eqn, in_kernel):
    cond_jaxpr, cond_own = compat.open_jaxpr(eqn.params["cond_jaxpr"])
    body_jaxpr, body_own = compat.open_jaxpr(eqn.params["body_jaxpr"])
    cond, body = block_of(cond_jaxpr, in_kernel), block_of(body_jaxpr, in_kernel)
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    where = interpreter.source_line(eqn.source_info)

    def run(machine, values):
        cond_consts = [*cond_own, *values[:num_cond]]
        body_consts = [*body_own, *values[num_cond : num_cond + num_body]]
        state = values[num_cond + num_body :]
        while _known(cond.run(machine, [*cond_consts, *state])[0], f"the loop at {where}"):
            state = body.run(machine, [*body_consts, *state])
        return state

    return run


def _scan(eqn, in_kernel):
    jaxpr, own = compat.open_jaxpr(eqn.params["jaxpr"])
    num_consts, num_carry = compat.scan_counts(eqn.params, len(eqn.invars))
    block, length = block_of(jaxpr, in_kernel), eqn.params["length"]
    order = range(length)[::-1] if eqn.params["reverse"] else range(length)

    def run(machine, values):
        consts, carry = values[:num_consts], values[num_consts : num_consts + num_carry]
        xs = values[num_consts + num_carry :]
        outs = []
        for i in order:
            rows = [x if isinstance(x, Unknown) else _scalar(np.asarray(x)[i]) for x in xs]
            results = block.run(machine, [*own, *consts, *carry, *rows])
            carry = results[:num_carry]
            outs.append(results[num_carry:])
        if eqn.params["reverse"]:
            outs = outs[::-1]
        columns = zip(*outs, strict=True) if outs else [[]] * (len(eqn.outvars) - num_carry)
        return [*carry, *map(_stack, columns)]

    return run


def _stack(values):
    values = list(values)
    if not values or any(isinstance(value, Unknown) for value in values):
        return UNKNOWN
    return np.stack([np.asarray(value) for value in values])


# --- References ----------------------------------------------------------------------------------


class _Operand:
    """Stands for an equation's operand while its tree of indices is taken apart."""

    def __init__(self, place):
        self.place = place


def _value(leaf, values):
    return values[leaf.place] if isinstance(leaf, _Operand) else leaf


class _View:
    """What transforms make of a buffer: prepared once, put in numbers at each run."""

    def __init__(self, transforms):
        self._transforms = transforms

    def slice(self, buffer, values, what):
        """The part of the buffer as a Slice."""
        index = [range(size) for size in buffer.shape]
        for transform in self._transforms:
            if hasattr(transform, "indices"):
                index = _narrow(index, transform.indices, values, what)
            else:  # a bitcast or a reshape: from here on another buffer by the same name
                buffer = _reinterpreted(Slice(buffer, tuple(index)), transform)
                index = [range(size) for size in buffer.shape]
        return Slice(buffer, tuple(index))


def _narrow(index, indexers, values, what):
    """Index what is left of each dimension; one that an int was taken of is gone."""
    indexers, result = iter(indexers), []
    for part in index:
        if not isinstance(part, range):
            result.append(part)
            continue
        indexer = next(indexers)
        if hasattr(indexer, "start"):
            start = int(_known(_value(indexer.start, values), what))
            size = int(_known(_value(indexer.size, values), what))
            stride = indexer.stride
            result.append(part[start : start + (size - 1) * stride + 1 : stride])
        else:
            result.append(part[int(_known(_value(indexer, values), what))])
    return result


def _reinterpreted(part, transform):
    """The buffer that a bitcast or a reshape makes of a part of one, by the same name."""
    shape = tuple(len(i) for i in part.index if isinstance(i, range))
    dtype = np.dtype(part.buffer.dtype)
    if hasattr(transform, "shape"):
        shape = transform.shape
    else:  # narrow rows become fewer wide ones
        rows = shape[-2] * dtype.itemsize // np.dtype(transform.dtype).itemsize
        shape, dtype = (*shape[:-2], rows, shape[-1]), np.dtype(transform.dtype)
    return replace(part.buffer, shape=tuple(shape), dtype=dtype.name)


def _tree(eqn, key, first=0):
    leaves = [_Operand(place) for place in range(first, len(eqn.invars))]
    return jax.tree.unflatten(eqn.params[key], leaves)


def _in_smem(var):
    return compat.memory_space_name(var.aval) == "smem"


def _get(eqn, in_kernel):
    if not _in_smem(eqn.invars[0]):
        return None
    view = _View(_tree(eqn, "tree", 1))

    def run(machine, values):
        ref = values[0]
        part = view.slice(ref.buffer, values, f"what is read of {ref.buffer.name}")
        return (_scalar(ref.data[_numpy_index(part)]),)

    return run


def _put(eqn, view, combine):
    def run(machine, values):
        ref, value = values[0], values[1]
        part = view.slice(ref.buffer, values, f"what is written of {ref.buffer.name}")
        index = _numpy_index(part)
        before = _scalar(ref.data[index])
        ref.data[index] = combine(before, value)
        return (before,) if eqn.outvars else ()

    return run


def _swap(eqn, in_kernel):
    if not _in_smem(eqn.invars[0]):
        return None
    return _put(eqn, _View(_tree(eqn, "tree", 2)), lambda before, value: value)


def _addupdate(eqn, in_kernel):
    if not _in_smem(eqn.invars[0]):
        return None

    def add(before, value):
        unknown = isinstance(before, Unknown) or isinstance(value, Unknown)
        return UNKNOWN if unknown else before + value

    return _put(eqn, _View(_tree(eqn, "tree", 2)), add)


def _numpy_index(part):
    return tuple(i if isinstance(i, int) else slice(i.start, i.stop, i.step) for i in part.index)


def _run_scoped(eqn, in_kernel):
    jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])
    avals = [var.aval for var in jaxpr.invars]
    # What the body closes over comes as constants of its jaxpr.
    block = block_of(jaxpr, in_kernel)

    def run(machine, values):
        scratch = [machine.allocate(aval) for aval in avals]
        return block.run(machine, [*consts, *values, *scratch])

    return run


# --- Transfers -----------------------------------------------------------------------------------


def _dma_start(eqn, in_kernel):
    ends = compat.dma_operands(eqn.params["tree"], [_Operand(i) for i in range(len(eqn.invars))])
    source_ref, source_view, target_ref, target_view, sem_ref, sem_view = (
        _View(part) if i % 2 else part for i, part in enumerate(ends)
    )
    where = interpreter.source_line(eqn.source_info)
    what = f"the copy at {where}"

    def run(machine, values):
        source, target = _value(source_ref, values), _value(target_ref, values)
        source_part = source_view.slice(source.buffer, values, what)
        target_part = target_view.slice(target.buffer, values, what)
        machine.writer.start(
            source_part, target_part, _semaphore(sem_ref, sem_view, values, what), where
        )
        if target.buffer.space == "SMEM":
            known = source.data is not None
            target.data[_numpy_index(target_part)] = (
                source.data[_numpy_index(source_part)] if known else UNKNOWN
            )
        return ()

    return run


def _dma_wait(eqn, in_kernel):
    ends = compat.dma_operands(eqn.params["tree"], [_Operand(i) for i in range(len(eqn.invars))])
    source_ref, source_view, _, _, sem_ref, sem_view = (
        _View(part) if i in (1, 5) else part for i, part in enumerate(ends)
    )
    where = interpreter.source_line(eqn.source_info)
    what = f"the wait at {where}"

    def run(machine, values):
        part = source_view.slice(_value(source_ref, values).buffer, values, what)
        semaphore = _semaphore(sem_ref, sem_view, values, what)
        machine.writer.wait(semaphore, part.num_bytes, where)
        return ()

    return run


def _semaphore(ref, view, values, what):
    ref = _value(ref, values)
    part = view.slice(ref.buffer, values, what)
    return ref.semaphore(i if isinstance(i, int) else i.start for i in part.index)


# --- Reads and writes by index outside of kernels ------------------------------------------------


def _bytes_of(aval):
    return prod(aval.shape) * np.dtype(aval.dtype).itemsize


def _array_op(read):
    """A plain JAX operation that reads or writes part of an array by index."""

    def step(eqn, in_kernel):
        if in_kernel:
            return _pure(eqn)
        pure = _pure(eqn)
        name = eqn.primitive.name
        part = eqn.outvars[0] if read else eqn.invars[1 if name.startswith("dynamic") else 2]
        num_bytes, whole_bytes = _bytes_of(part.aval), _bytes_of(eqn.invars[0].aval)

        def run(machine, values):
            if not isinstance(values[0], Unknown):
                return pure(machine, values)
            machine.array_ops[name, values[0].name, whole_bytes] += num_bytes
            return values[:1]

        return run

    return step


def _grid_value(field):
    def step(eqn, in_kernel):
        axis = eqn.params["axis"]
        return lambda machine, values: (getattr(machine, field)[axis],)

    return step


def _pallas_call(eqn, in_kernel):
    return lambda machine, values: machine.run_kernel(eqn, values)


def _pass_on(eqn, in_kernel):
    """An operation that leaves its operands as they are."""
    return lambda machine, values: values


def _nothing(eqn, in_kernel):
    """An operation that a timeline of one core does not show."""
    results = tuple(UNKNOWN for _ in eqn.outvars)
    return lambda machine, values: results


_STEPS = {
    **dict.fromkeys(["jit", "pjit", "closed_call", "core_call", "remat", "checkpoint"], _call),
    **dict.fromkeys(["custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"], _call),
    **dict.fromkeys(["with_memory_space_constraint", "optimization_barrier", "copy"], _pass_on),
    "forward_only": _pass_on,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "get": _get,
    "swap": _swap,
    "addupdate": _addupdate,
    "run_scoped": _run_scoped,
    "dma_start": _dma_start,
    "dma_wait": _dma_wait,
    "semaphore_signal": _nothing,
    "semaphore_wait": _nothing,
    "program_id": _grid_value("grid_point"),
    "num_programs": _grid_value("grid"),
    "pallas_call": _pallas_call,
    "gather": _array_op(read=True),
    "dynamic_slice": _array_op(read=True),
    "scatter": _array_op(read=False),
    "dynamic_update_slice": _array_op(read=False),
}
"""How an equation is prepared, by the name of its primitive."""
