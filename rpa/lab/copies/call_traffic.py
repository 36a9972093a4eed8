"""HBM bytes that a function of any signature moves, by array: `traffic.count` without attention.

traffic = count_call(my_kernel, np.int32([5, 7]), jax.ShapeDtypeStruct((64, 128), "float32"))
print(traffic.table())
"""

import inspect
import json
from dataclasses import dataclass, field
from math import prod

import numpy as np

from rpa import interpreter
from rpa.lab.copies.dryrun import OUTPUT, dry_run
from rpa.lab.copies.events import HBM
from rpa.lab.copies.traffic import Moved, common_sizes


@dataclass
class ArrayTraffic:
    """What kernels moved of one array.

    Attributes:
        array_bytes: of all of it; 0 if it is made inside the function.
        read, written: HBM bytes and copies.
    """

    array_bytes: int = 0
    read: Moved = field(default_factory=Moved)
    written: Moved = field(default_factory=Moved)


@dataclass
class CallTraffic:
    """HBM bytes of one call.

    Attributes:
        arrays: {name: ArrayTraffic}: arguments by the function's own names, then outputs and what
            the function makes itself, by the kernel's.
        outside: {operation and argument: bytes} by index in plain JAX, outside of kernels; in
            none of the numbers above.
    """

    arrays: dict[str, ArrayTraffic]
    outside: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """All HBM bytes that kernels moved."""
        return sum(a.read.num_bytes + a.written.num_bytes for a in self.arrays.values())

    @property
    def num_copies(self) -> int:
        """All copies; one inside HBM is counted where it was written."""
        return sum(a.read.num_copies + a.written.num_copies for a in self.arrays.values())

    def table(self) -> str:
        """The traffic as text."""
        lines = [f"{'':16}{'array':>14}{'read':>14}{'written':>14}{'copies':>9}  sizes (bytes)"]
        for name, a in self.arrays.items():
            copies = a.read.num_copies + a.written.num_copies
            whole = f"{a.array_bytes:,}" if a.array_bytes else ""
            lines.append(
                f"{name:16}{whole:>14}{a.read.num_bytes:>14,}{a.written.num_bytes:>14,}"
                f"{copies:>9,}  {common_sizes(a.read.sizes + a.written.sizes)}".rstrip()
            )
        lines.append(f"all: {self.num_bytes:,} bytes in {self.num_copies:,} copies")
        if not self.num_copies:
            lines.append("no kernel of this call copies anything")
        if self.outside:
            words = [f"{name} {num_bytes:,}" for name, num_bytes in sorted(self.outside.items())]
            lines.append(f"in plain JAX, outside of kernels: {', '.join(words)}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The traffic as one JSON object."""
        arrays = {
            name: {
                "array_bytes": a.array_bytes,
                "read_bytes": a.read.num_bytes,
                "written_bytes": a.written.num_bytes,
                "copies": a.read.num_copies + a.written.num_copies,
            }
            for name, a in self.arrays.items()
        }
        numbers = {"num_bytes": self.num_bytes, "num_copies": self.num_copies}
        return json.dumps(numbers | {"arrays": arrays, "outside": self.outside}, indent=2)


def count_call(function, *args, **kwargs) -> CallTraffic:
    """Count the HBM bytes that the kernels of one call move, by array.

    Args:
        function: anything that JAX can trace, with Pallas kernels for the TPU in it.
        *args: arrays, whose integers are used; or shapes, of which only the sizes are known.
        **kwargs: the function's keyword arguments; arrays among them are constants of it.

    Raises:
        ValueError: if a branch, a loop or a copy depends on values that are not known.

    >>> import jax
    >>> from rpa.tiled import flash_attention
    >>> q, kv = (jax.ShapeDtypeStruct((64, heads, 128), "float32") for heads in (4, 2))
    >>> count_call(flash_attention, q, kv, kv).arrays["q"].read.num_bytes
    131072
    """
    names = _names_of(function, args)
    with interpreter.compiled():
        run = dry_run(lambda *arrays: function(*arrays, **kwargs), *args, names=names)
    traffic = CallTraffic({}, {})
    for name, x in zip(names, args, strict=True):
        size = prod(x.shape) * np.dtype(x.dtype).itemsize
        traffic.arrays[name] = ArrayTraffic(array_bytes=size)
    for event in run.timeline.events:
        if event.kind not in ("start", "fetch", "flush", "prefetch"):
            continue
        reads, writes = (end.buffer.space == HBM for end in (event.source, event.target))
        if reads:
            _of(traffic, event.source.buffer).read.add(event.num_bytes, is_copy=not writes)
        if writes:
            _of(traffic, event.target.buffer).written.add(event.num_bytes)
    for (operation, argument, _), num_bytes in run.array_ops.items():
        traffic.outside[f"{operation} {argument}".strip()] = num_bytes
    return traffic


def _of(traffic, buffer):
    name = buffer.name if buffer.origin in ("", OUTPUT) else buffer.origin
    return traffic.arrays.setdefault(name, ArrayTraffic())


def _names_of(function, args):
    """The function's own names of its arguments, numbers for those of `*args`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [named[i] if i < len(named) else f"argument {i}" for i in range(len(args))]
