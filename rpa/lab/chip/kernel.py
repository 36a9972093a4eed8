"""A compiled kernel, ready to run: its translated step, its grid, and what its operands are."""

import re
from typing import NamedTuple

import numpy as np

from rpa.lab.chip.errors import UnknownOperation
from rpa.lab.chip.layout import Layout, parse_layout
from rpa.lab.chip.machine import Model
from rpa.lab.chip.run import Run
from rpa.lab.chip.text import parse
from rpa.lab.chip.translate import Translated, translate


class Operand(NamedTuple):
    """One argument of the kernel that is an array.

    Attributes:
        name: for messages.
        layout: of what the kernel sees.
        kind: "scalars" (prefetched), "input", "output" or "scratch".
        in_place: whether the kernel sees the array itself and copies of it what it wants.
        index_map: from the step to the block, None if the window is the whole array.
    """

    name: str
    layout: Layout
    kind: str
    in_place: bool
    index_map: Translated | None


class Kernel:
    """A kernel of one chip.

    Attributes:
        name: of the `pallas_call`.
        body: the translated step; its `source` is what is executed.
        grid: steps in each dimension, () without a grid.
        operands: all arrays, in order.
    """

    def __init__(self, text, model: Model, num_inputs, results, aliases, watch=None):
        """Read the compiled text of a kernel.

        Args:
            text: what the compiler wrote.
            model: of the chip that it was compiled for.
            num_inputs: its inputs, scalars included.
            results: `jax.ShapeDtypeStruct` of each output.
            aliases: {input: output} that share memory.
            watch: see `translate`.

        Raises:
            UnknownOperation: if it holds anything that the machine does not know.
        """
        self.results, self.aliases = tuple(results), dict(aliases)
        kernel, *others = parse(text)
        maps = {function.name: translate(function) for function in others}
        self.name, self.model, self.num_inputs = kernel.name, model, num_inputs
        self.body = translate(kernel, watch)
        self.grid = _integers(r"iteration_bounds = array<i64: ([-\d, ]+)>", kernel.attributes)
        if any(bound < 0 for bound in self.grid):
            raise UnknownOperation(f"{self.name} has a grid whose size is known at run time only.")
        self.operands = _operands(kernel, maps, len(self.grid), num_inputs, len(results))

    def run(self, inputs, late) -> list[np.ndarray]:
        """Execute it on an array for each input, and return an array for each output.

        Args:
            inputs: arrays.
            late: whether a copy ends only when a wait needs it, otherwise at once.

        Raises:
            KernelFault: if the kernel does something that it must not.
        """
        return Run(self, inputs, late).execute()


def _operands(kernel, maps, num_indices, num_inputs, num_outputs):
    types, in_place = kernel.types[num_indices:], kernel.in_place[num_indices:]
    (num_scalars,) = _integers(r"scalar_prefetch = (\d+)", kernel.attributes) or (0,)
    windows = [None] * num_scalars + _windows(kernel.attributes)
    operands = []
    for i, memref in enumerate(types):
        kind = "scratch" if i >= num_inputs + num_outputs else "output"
        kind = "scalars" if i < num_scalars else "input" if i < num_inputs else kind
        window = windows[i] if i < len(windows) else None
        operands.append(
            Operand(
                name=f"{kind} {i}",
                layout=parse_layout(memref),
                kind=kind,
                in_place=in_place[i],
                index_map=maps[window] if window else None,
            )
        )
    return operands


def _windows(attributes):
    """The name of each window's index map, None if it has none."""
    found = re.search(r"window_params = \[(.*?)\], xir", attributes)
    if found is None:
        return []
    windows = []
    for text in re.findall(r"\{(.*?)\}", found[1]):
        surplus = set(re.findall(r"(\w+) = ", text)) - {
            *("transform_indices", "window_bounds", "pipeline_mode"),
        }
        if surplus:
            raise UnknownOperation(f"a window with {', '.join(surplus)}: {text!r}.")
        name = re.search(r"transform_indices = @([\w.$-]+)", text)
        windows.append(name[1] if name else None)
    return windows


def _integers(pattern, text):
    found = re.search(pattern, text)
    return tuple(int(n) for n in found[1].split(",")) if found else ()
