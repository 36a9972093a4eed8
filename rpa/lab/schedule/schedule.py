"""The machine schedule of a kernel: what each of its cycles does, read without a TPU.

The TPU issues one VLIW bundle a cycle, in order. The compiler decides all of it beforehand, so
the listing of the bundles is the program's timetable. `schedule_for` gets it from the real
compiler; `Schedule.execute` then counts which bundles a batch passes, by running the kernel's
scalar instructions with the batch's lengths and pages.

Counted: every bundle from the kernel's first to its last, each as often as it is passed: products
and softmax, masks, the loops around them, the issue of every copy, each block's and each
sequence's overhead. Not counted, because no schedule holds it: waiting for copies, instruction
fetch, the launch of the kernel, and what XLA does before and after it.
"""

import hashlib
import json
import platform
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rpa import chips
from rpa.lab.arguments import static_and_arrays
from rpa.lab.compile import words
from rpa.lab.compile.compiler import (
    FORMAT,
    ask_worker,
    cache_dir,
    compile_versions,
    described,
    read_kept,
    shapes_of,
    write_kept,
)
from rpa.lab.compile.functions import import_path
from rpa.lab.schedule import dumps, feeds, loop_tree, pallas_calls
from rpa.lab.schedule.execution import Execution, Program


class NoSchedule(RuntimeError):
    """The kernel did not compile, or its schedule was not written; the message says why.

    Attributes:
        kind: one of `rpa.lab.compile.words.KINDS`.
    """

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Stage:
    """A kernel that can be executed.

    Attributes:
        listing: bundles, slots and scalar instructions.
        feed: values of its integer operands.
        outputs: {operand: shape} of its results.
    """

    listing: dumps.Listing
    feed: feeds.Feed
    outputs: dict[int, tuple[int, ...]]

    @cached_property
    def program(self) -> Program:
        """The scalar program, ready to run."""
        return Program(self.listing)

    def execute(self, integers, keep_events=False) -> Execution:
        """Run it on the integers that its feed takes."""
        return self.program.run(self.feed(*integers), keep_events)

    def results(self, execution) -> list[np.ndarray]:
        """Its results, as far as the scalar core wrote them; zeros elsewhere."""
        arrays = []
        for operand, shape in self.outputs.items():
            array = np.zeros(int(np.prod(shape)), np.int32)
            for word, value in execution.outputs.get(operand, {}).items():
                if word < len(array):
                    array[word] = value
            arrays.append(array.reshape(shape))
        return arrays


@dataclass(frozen=True)
class Schedule:
    """A compiled kernel's bundles.

    Attributes:
        chip: short name of the chip.
        function: "module:function" in which the kernel is called.
        kernel: the kernel's name.
        stages: the kernel, behind kernels of integers alone whose results it reads.
    """

    chip: str
    function: str
    kernel: str
    stages: tuple[Stage, ...] = field(repr=False)

    @property
    def listing(self) -> dumps.Listing:
        """Its bundles, slots and scalar instructions."""
        return self.stages[-1].listing

    @property
    def num_bundles(self) -> int:
        """Bundles in the listing, each once."""
        return len(self.listing.slots)

    @property
    def capacity(self) -> dict[str, int]:
        """Slots of each unit in one bundle."""
        return loop_tree.capacity(self.listing)

    @cached_property
    def loops(self) -> loop_tree.Span:
        """Loops and predicated regions, nested."""
        return loop_tree.tree(self.listing)

    @property
    def tile(self) -> loop_tree.Span:
        """The smallest loop or region that holds most of the products: one tile's work."""
        spans = [span for _, span in self.loops.walk()]
        products = self.slots(self.once(self.loops))["MATMUL"]
        most = [s for s in spans if 2 * self.slots(self.once(s))["MATMUL"] > products]
        return min(most, key=lambda span: span.num_bundles, default=self.loops)

    def execute(self, *args, kwargs=None, keep_events=False) -> Execution:
        """Count the bundles that one call executes.

        Args:
            *args: the arguments that the schedule was made for; the integer arrays among them have
                values, of the others nothing is used.
            kwargs: its keyword arguments, of which the same holds.
            keep_events: also note when which copy starts, and when which is waited for.

        Raises:
            rpa.lab.schedule.execution.CannotRun: if the kernel decides by what only vectors know.
        """
        call = (args, static_and_arrays(kwargs)[1])
        leaves = jax.tree.leaves(call)
        integers = [np.asarray(leaves[i]) for i in pallas_calls.integer_leaves(call)]
        for stage in self.stages[:-1]:
            integers += stage.results(stage.execute(integers))
        return self.stages[-1].execute(integers, keep_events)

    def slots(self, weights) -> dict[str, int]:
        """Slots used by unit, each bundle counted as often as `weights` (hits) says."""
        return loop_tree.used(self.listing, weights)

    def once(self, span) -> np.ndarray:
        """Weights that count each bundle of a span once, int64[num_bundles]."""
        weights = np.zeros(self.num_bundles, np.int64)
        weights[span.start : span.end] = 1
        return weights

    def describe(self, span) -> dict[str, Any]:
        """Bundles, slots and bound of a loop or region as JSON can hold them."""
        slots = self.slots(self.once(span))
        share = loop_tree.shares(slots, self.capacity, span.num_bundles)
        return {
            "kind": span.kind,
            "start": span.start,
            "end": span.end,
            "bundles": span.num_bundles,
            "slots": slots,
            "bound": loop_tree.bound(share),
            "children": [self.describe(child) for child in span.children],
        }

    def to_json(self) -> dict[str, Any]:
        """All of it that is not an instruction."""
        return {
            "chip": self.chip,
            "function": self.function,
            "kernel": self.kernel,
            "bundles": self.num_bundles,
            "capacity": self.capacity,
            "tree": self.describe(self.loops),
        }


def schedule_for(
    chip, fn, *args, kwargs=None, kernel="", timeout_s=1200.0, use_cache=True, flags=""
) -> Schedule:
    """The schedule of one Pallas kernel of `fn(*args, **kwargs)`.

    The kernel is compiled alone, with its operands already laid out. What was parsed is kept on
    disk, under the program that the compiler was given: an edit that does not change it costs
    tracing only.

    Args:
        chip: anything that `rpa.chips.chip` knows.
        fn: a function at the top level of a module, or "module:function", or "file.py:function".
        *args: pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are used.
        kwargs: keyword arguments: arrays (or shapes) are operands, all others are compiled in and
            must be something that JSON can hold.
        kernel: regular expression that finds exactly one of the kernels by its name.
        flags: further flags of the compiler, as in `LIBTPU_INIT_ARGS`.
        timeout_s: end the compiler after this many seconds; with dumps it is slow.
        use_cache: False compiles again.

    Raises:
        NoSchedule: if there is no libtpu, or the compiler refuses, in words.
        ValueError: if `fn` cannot be imported by its name, or `chip` is unknown.
    """
    known = chips.chip(chip)
    static, arrays = static_and_arrays(kwargs)
    spec = {
        "chip": known.name,
        "topology": known.topology,
        "function": import_path(fn),
        **described(args, static, arrays),
        "kernel": kernel,
        "versions": compile_versions(),
        "format": FORMAT,
        "home": str(Path(__file__).parents[3]),
    }
    if flags:
        spec["flags"] = flags
    directory = _directory()
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    entry = directory / f"{key}.json"
    answer = read_kept(entry) if use_cache else None
    if answer is not None:
        try:
            return _schedule(spec, answer)
        except (OSError, ValueError, LookupError, TypeError, EOFError):
            pass  # half of it is gone, or it is something else: compiled anew
    order = spec | {"directory": str(directory), "fresh": not use_cache or answer is not None}
    answer = _compile(order, shapes_of((args, arrays)), timeout_s)
    write_kept(entry, answer)
    return _schedule(spec, answer)


def _schedule(spec, answer):
    stages = tuple(map(_stage, answer["stages"]))
    return Schedule(spec["chip"], spec["function"], answer["kernel"], stages)


def num_kept() -> int:
    """Listings that are kept, each of one compiled program."""
    return len(list(_directory().glob("*.json.gz")))


def _directory():
    return cache_dir().parent / "schedule"


def _stage(kept):
    return Stage(
        dumps.read_listing(Path(kept["listing"])),
        feeds.Feed(**kept["feed"]),
        {operand: tuple(shape) for operand, shape in kept["outputs"]},
    )


def _compile(spec, shapes, timeout_s):
    if spec["versions"]["libtpu"] is None:
        raise NoSchedule(*words.no_libtpu(platform.system(), platform.machine()))
    with tempfile.TemporaryDirectory() as dump:
        flags = f"{dumps.FLAGS.format(directory=dump)} {spec.get('flags', '')}".strip()
        answer = ask_worker(
            *(spec | {"dump": dump}, shapes, timeout_s, "rpa.lab.schedule.worker"),
            environment={"LIBTPU_INIT_ARGS": flags},
        )
    if "message" in answer:
        kind, text = words.explain(answer["message"], spec["chip"], spec["versions"])
        at = f" (at {answer['where']})" if "where" in answer else ""
        raise NoSchedule(kind, text + at)
    return answer
