"""A kernel's control flow and its transfers, without its arithmetic: what it moves, at any size.

The TPU interpreter runs everything, and copies every byte: too slow for 128 sequences of 4,096
tokens. Which copies a kernel starts depends on integers only: lengths, page indices, counters. So
here the function is traced to a jaxpr, as for the chip, and the jaxpr is run with scalars and
small integer arrays computed, everything else left unknown, and every DMA, wait and block of the
automatic pipeline written to a timeline. It is the kernel's own program, not a formula for it.

    run = dry_run(function, *args)
    run.timeline.copies, run.array_ops

Around a kernel, in plain JAX, reads by index (`gather`, `dynamic_slice`) and writes by index
(`scatter`, `dynamic_update_slice`) are counted per array; what XLA fuses is not known here.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import numpy as np

from rpa import compat, interpreter
from rpa.lab.copies import dryrun_program as program
from rpa.lab.copies.events import (
    Buffer,
    Slice,
    Timeline,
    Writer,
    input_names,
    semaphore_name,
    short_name,
)


@dataclass
class DryRun:
    """What a dry run saw.

    Attributes:
        timeline: DMAs, waits and the automatic pipeline's blocks of all kernels, in order.
        array_ops: {(operation, argument, bytes of the array): bytes} of plain JAX outside
            kernels, reads and writes by index of what is made of an argument alone.
    """

    timeline: Timeline
    array_ops: Counter


def dry_run(function, *args, names=(), kernel_names=()) -> DryRun:
    """Run a function's control flow and transfers, not its arithmetic.

    Args:
        function: anything that JAX can trace, with Pallas kernels for the TPU in it or without.
        args: arrays, whose integers are used; or shapes (`jax.ShapeDtypeStruct`), of which only
            the sizes are known: no memory is taken.
        names: what to call the arguments, in their order.
        kernel_names: other names for references of a kernel, as in `record_dmas`.

    Raises:
        ValueError: where a branch, a loop or a copy depends on something that is not known.

    >>> import jax.numpy as jnp
    >>> from rpa.streamed import paged_decode
    >>> run = dry_run(
    ...     lambda q, cache: paged_decode(q, cache, np.array([29, 3]), np.arange(8),
    ...                                   num_kv_heads=2, block_tokens=16, interpret=False),
    ...     jax.ShapeDtypeStruct((2, 4, 64), "float32"),
    ...     jax.ShapeDtypeStruct((8, 8, 4, 1, 128), "float32"))
    >>> [copy.source.label for copy in run.timeline.copies]  # doctest: +ELLIPSIS
    ['kv_cache[0]', 'kv_cache[1]', 'kv_cache[2]', 'kv_cache[3, 0:5]', 'kv_cache[4, 0:3]']
    """
    flat, tree = jax.tree.flatten(args)
    shapes = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in flat]
    closed = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(tree, flat)))(*shapes)
    labels = [*names, *[""] * len(flat)][: len(flat)]
    values = [
        program.Unknown(label) if isinstance(x, jax.ShapeDtypeStruct) else np.asarray(x)
        for x, label in zip(flat, labels, strict=True)
    ]
    machine = _Machine(dict(kernel_names))
    jaxpr, consts = compat.open_jaxpr(closed)
    program.block_of(jaxpr, in_kernel=False).run(machine, [*consts, *values])
    return DryRun(machine.writer.timeline, machine.array_ops)


@dataclass
class _Machine:
    """What the programs act on: the record, and where in a grid they are."""

    kernel_names: dict
    writer: Writer = field(default_factory=Writer)
    array_ops: Counter = field(default_factory=Counter)
    grid_point: tuple = ()
    grid: tuple = ()
    scoped: int = 0

    def allocate(self, aval, name=None) -> "Ref":
        """Memory for a scratch argument or for `pl.run_scoped`."""
        space = compat.memory_space_name(aval).upper()
        if name is None:
            self.scoped += 1
            name = f"{space} scratch {self.scoped}"
        data = None
        if space == "SMEM":  # the memory that decides; what nobody wrote is unknown
            data = np.full(aval.shape, program.UNKNOWN, object)
        return Ref(self._buffer(name, space, aval.shape, aval.dtype), data)

    def _buffer(self, name, space, shape, dtype, origin=""):
        is_number = space != "SEMAPHORE"
        dtype_name = np.dtype(dtype).name if is_number else "int32"
        name = short_name(name, self.kernel_names)
        return Buffer(name, space, tuple(map(int, shape)), dtype_name, origin)

    def run_kernel(self, eqn, values):
        """A `pallas_call`: its grid, the blocks of every step, and the kernel's own program."""
        self.writer.begin_kernel()
        params = eqn.params
        grid_mapping = params["grid_mapping"]
        arguments = interpreter.kernel_arguments(**params)
        num_dynamic = grid_mapping.num_dynamic_grid_bounds
        bounds, values = iter(values[:num_dynamic]), values[num_dynamic:]
        grid = tuple(
            size if isinstance(size, int) else int(next(bounds)) for size in grid_mapping.grid
        )
        refs, blocks = self._arguments(arguments, values, params, grid_mapping)
        kernel = program.block_of(params["jaxpr"], in_kernel=True)
        self.grid, steps = grid, list(np.ndindex(grid))
        num_scalars = grid_mapping.num_index_operands
        for block in blocks:
            block.places = [block.place(self, point, refs[:num_scalars]) for point in steps]
        for i, point in enumerate(steps):
            self.grid_point = point
            for block in blocks:
                block.fetch(self.writer, i)
            kernel.run(self, refs)
            for block in blocks:
                block.flush(self.writer, i)
            self.writer.end_step()
        outputs = [ref for ref, a in zip(refs, arguments, strict=True) if a.role == "output"]
        return [program.Unknown(ref.buffer.origin) for ref in outputs]

    def _arguments(self, arguments, values, params, grid_mapping):
        """A Ref for every argument of a kernel, and a Block for each that is not whole in HBM."""
        names, refs, blocks, arrays = iter(input_names(arguments)), [], [], []
        num_scalars = grid_mapping.num_index_operands
        for place, (a, var) in enumerate(zip(arguments, params["jaxpr"].invars, strict=True)):
            if a.role == "scratch":
                refs.append(self.allocate(var.aval, a.name))
                continue
            name = next(names) if a.role == "input" else a.name
            value = values[place] if a.role in ("scalar", "input") else program.UNKNOWN
            origin = OUTPUT if a.role == "output" else getattr(value, "name", "")
            array = Ref(self._buffer(name, "HBM", a.shape, a.dtype, origin), _data(value))
            if a.role == "scalar":
                in_smem = self._buffer(name, "SMEM", a.shape, a.dtype, origin)
                refs.append(Ref(in_smem, _own(array)))
                if prod(a.shape):
                    self.writer.block("prefetch", _whole(array.buffer), _whole(in_smem))
                continue
            if a.role == "output" and a.alias is not None:
                array = arrays[a.alias]
            arrays.append(array)
            if a.space == "hbm":
                refs.append(array)
                continue
            space = a.space.upper()
            data = _own(array) if space == "SMEM" else None
            refs.append(Ref(self._buffer(name, space, a.block_shape, a.dtype, origin), data))
            mapping = grid_mapping.block_mappings[place - num_scalars]
            blocks.append(Block(a.role, mapping, array.buffer, refs[-1].buffer))
        return refs, blocks


OUTPUT = "output"
"""The origin of what a kernel writes, unless it is an argument's memory too."""


def _data(value):
    return None if isinstance(value, program.Unknown) else np.asarray(value)


def _own(array):
    """What is in an argument's memory in SMEM: a kernel may write in it as in any other."""
    if array.data is None:
        return np.full(array.buffer.shape, program.UNKNOWN, object)
    return array.data.astype(object)


@dataclass
class Ref:
    """A reference: its buffer, and what is in it where that is known (None: nothing is)."""

    buffer: Buffer
    data: Any

    def semaphore(self, index):
        """The name of one of its semaphores."""
        return semaphore_name(self.buffer.name, tuple(index))


@dataclass
class Block:
    """The automatic pipeline of one argument: a block is copied when its place changes."""

    role: str
    mapping: Any  # the BlockMapping of the argument
    array: Buffer
    window: Buffer
    places: list = field(default_factory=list)

    def place(self, machine, point, scalars):
        """The part of the array that the block stands for at a point of the grid."""
        jaxpr, consts = compat.open_jaxpr(self.mapping.index_map_jaxpr)
        block = program.block_of(jaxpr, in_kernel=True)
        machine.grid_point = point
        indices = block.run(machine, [*consts, *point, *scalars])
        parts = []
        for i, index, size in zip(
            indices, compat.block_dimensions(self.mapping), self.array.shape, strict=True
        ):
            whole, squeezed = index
            if isinstance(i, program.Unknown):
                raise ValueError(
                    f"the index map of {self.array.name} depends on values that a dry run does "
                    "not compute: give the arguments that decide as arrays, not as shapes."
                )
            begin = int(i) * whole
            # The last block may reach behind the array: only what exists is copied.
            parts.append(begin if squeezed else range(begin, min(begin + whole, size)))
        return Slice(self.array, tuple(parts))

    def fetch(self, writer, step):
        """Copy the block in, if it is an input's and not there already."""
        if self.role == "input" and (step == 0 or self.places[step] != self.places[step - 1]):
            writer.block("fetch", self.places[step], _whole(self.window))

    def flush(self, writer, step):
        """Copy the block out, if it is an output's and the next step has another one."""
        last = step + 1 == len(self.places)
        if self.role == "output" and (last or self.places[step] != self.places[step + 1]):
            writer.block("flush", _whole(self.window), self.places[step])


def _whole(buffer):
    return Slice(buffer, tuple(map(range, buffer.shape)))
