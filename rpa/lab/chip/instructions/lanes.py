"""The cross-lane unit (XLU): rotations, broadcasts, permutations, reductions, transpositions.

What moves sublanes moves whole words, also those of packed values: `on_words`.
"""

import numpy as np

from rpa.lab.chip.errors import UnknownOperation
from rpa.lab.chip.instructions.table import by_operation, instruction
from rpa.lab.chip.registers import LANES, SHAPE, from_words, to_words


def on_words(function):
    """A function of words [8, 128], as a function of registers of any dtype."""

    def of_registers(*registers):
        words = function(*map(to_words, registers))
        return from_words(words, registers[0].dtype)

    return of_registers


@instruction("vrot.slane")
def rotate_sublanes(x, count):
    """Sublane s gets sublane s + count."""
    return on_words(lambda words: np.roll(words, -count, axis=0))(x)


@by_operation("vrot.lane", form=r"%, %, <b32>(?: stride (\d+))?")
def rotate_lanes(operation, stride):
    """Lane n goes to lane n + count, in sublane s to n + count + s * stride."""
    offsets = np.arange(8)[:, None] * int(stride or 0)
    lanes = np.arange(LANES)
    return lambda x, count: np.take_along_axis(x, (lanes - count - offsets) % LANES, axis=1)


@by_operation("slane.shuffle", form=r"%\[\[([\d, ]+)\]\]")
def shuffle_sublanes(operation, order):
    rows = [int(n) for n in order.split(",")]
    return on_words(lambda words: words[rows])


@by_operation("vcombine.sublanes", form="%, %, <(low|high)>")
def combine_sublanes(operation, half):
    """The low, or high, four sublanes of each."""
    part = slice(0, 4) if half == "low" else slice(4, 8)
    return on_words(lambda x, y: np.concatenate([x[part], y[part]]))


@instruction("vslreplicate")
def replicate_sublane(x, sublane):
    return on_words(lambda words: np.broadcast_to(words[sublane], SHAPE))(x)


@by_operation("vperm.sublane", form="%, %", attributes=["granularity"])
def permute_bytes(operation):
    """A byte gets, in its lane, the byte that the pattern names: its sublane | its place << 3."""
    if operation.attributes["granularity"] != "byte":
        raise UnknownOperation(f"{operation.text[:200]!r} does not permute bytes.")

    def permute(x, pattern):
        rows = 4 * (pattern.astype(np.int64) & 7) + (pattern.astype(np.int64) >> 3 & 3)
        return np.take_along_axis(x, rows, axis=0)

    return permute


# Two instructions a permutation of lanes: one starts it, `vpermres` takes the result.


@by_operation("vlbroadcast", form="%, %", attributes=["format"])
def broadcast_lane(operation):
    if operation.attributes["format"] != "b32":
        raise UnknownOperation(f"{operation.text[:200]!r} does not broadcast words.")
    return lambda x, lane: np.broadcast_to(x[:, lane : lane + 1], SHAPE)


@by_operation("vsetperm", form="%, <all_sublanes>,")
def set_permutation(operation):
    return lambda lanes: lanes


@by_operation("vperm", form="%, %,")
def permute_lanes(operation):
    return lambda x, lanes: np.take_along_axis(x, lanes.astype(np.int64) % LANES, axis=1)


@by_operation("vpermres", form="%,")
def permutation_result(operation):
    return lambda x: x


# --- Reductions: the result stands everywhere that was reduced

for _axis, _direction in ((0, "slane"), (1, "xlane")):
    for _name, _reduce in (("add", np.sum), ("max", np.max), ("min", np.min)):

        @instruction(f"v{_name}.{_direction}.f32", f"v{_name}.{_direction}.s32")
        def reduce(x, reduce=_reduce, axis=_axis):
            return np.broadcast_to(reduce(x, axis=axis, keepdims=True).astype(x.dtype), SHAPE)


@instruction("vmax.index.xlane.f32")
def index_of_maximum(x):
    """The first lane that holds the row's maximum."""
    return np.broadcast_to(np.argmax(x, axis=1).astype(np.int32)[:, None], SHAPE)


# --- Transpositions

_CHUNKS = {"b32": 16, "b16.c": 8, "b8.c": 4}
"""By mode, how many registers hold 128 rows."""


@by_operation(
    *["vxpose"],
    form="%, %",
    attributes=["chunk_id", "mode", "number_of_chunks", "xlu_id"],
    machine=True,
)
def push_transpose(operation):
    found, unit = operation.attributes, int(operation.attributes["xlu_id"])
    if _CHUNKS.get(found["mode"]) != int(found["number_of_chunks"]):
        raise UnknownOperation(f"{operation.text[:200]!r} does not transpose 128 rows.")

    def push(machine, rows, width):
        if width != LANES:
            raise UnknownOperation(f"a transposition of {width} lanes is not known here.")
        machine.transpose_unit(unit).push(rows)

    return push


@by_operation(
    *["vxpose.c.b16"],
    form="%, %, %",
    attributes=["chunk_id", "number_of_chunks", "xlu_id"],
    machine=True,
)
def push_transpose_pair(operation):
    """Two transpositions at once, whose results alternate."""
    unit = int(operation.attributes["xlu_id"])

    def push(machine, first, second, width):
        if width != LANES:
            raise UnknownOperation(f"a transposition of {width} lanes is not known here.")
        machine.transpose_unit(unit).push(first, second)

    return push


@by_operation("vxpose.result", form="", attributes=["xlu_id"], machine=True)
def transpose_result(operation):
    unit = int(operation.attributes["xlu_id"])
    return lambda machine: machine.transpose_unit(unit).pop_result()
