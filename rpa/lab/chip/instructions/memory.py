"""Loads, stores and copies."""

from rpa.lab.chip.errors import UnknownOperation
from rpa.lab.chip.instructions.table import by_operation, instruction
from rpa.lab.chip.registers import LANES, SUBLANES, from_words, rows_and_dtype, to_words

ROW_BYTES = 4 * LANES

# --- Scalars in SMEM


@by_operation("sld", form=r"%( \+ %)?", machine=True)
def scalar_load(operation, _):
    is_float = operation.result_type == "f32"
    if operation.result_type not in ("f32", "i32"):
        raise UnknownOperation(f"{operation.text[:200]!r} does not load an i32 or f32.")

    def load(machine, address, offset=0):
        memory, place = machine.memory, address + 4 * offset
        return memory.load_float(place) if is_float else memory.load_integer(place)

    return load


@instruction("sst", machine=True)
def scalar_store(machine, address, value):
    machine.memory.store_scalar(address, value)


# --- Registers in VMEM: "% + % masked %" is an address, an offset in rows, a mask of sublanes

_PLACE = r"%( \+ %)?( masked %)?"


def _place(values, has_offset, has_mask):
    """(address, sublanes) of the operands that follow the value."""
    values = list(values)
    address = values.pop(0)
    if has_offset:
        address += ROW_BYTES * values.pop(0)
    return address, _sublanes(values.pop(0)) if has_mask else range(SUBLANES)


def _sublanes(mask):
    return [s for s in range(SUBLANES) if mask >> s & 1]


@by_operation(
    *["vector_load", "vector_load_slane_stride"],
    form=_PLACE,
    attributes=["sublane_count", "sublane_stride"],
    machine=True,
)
def load(operation, offset, mask):
    """Sublane s from row s * stride behind the address; stride 0 is one row eight times."""
    _, dtype = rows_and_dtype(operation.result_type)
    stride = _stride(operation)

    def load(machine, *values):
        return from_words(machine.memory.load(*_place(values, offset, mask), stride), dtype)

    return load


@by_operation(
    "vld_sublane_shuffle", form=r"%( \+ %)?", attributes=["sublane_offsets"], machine=True
)
def load_rows(operation, offset):
    _, dtype = rows_and_dtype(operation.result_type)
    rows = [int(n) for n in operation.attributes["sublane_offsets"].split(",")]

    def load(machine, *values):
        address, _ = _place(values, offset, None)
        return from_words(machine.memory.load_rows(address, rows), dtype)

    return load


@by_operation(
    "vst_sublane_shuffle", form=r"% into %( \+ %)?", attributes=["sublane_offsets"], machine=True
)
def store_rows(operation, offset):
    """Sublanes exchanged in pairs: only there is the row of a sublane the sublane of a row too."""
    rows = [int(n) for n in operation.attributes["sublane_offsets"].split(",")]
    if [rows[row] for row in rows if row < SUBLANES] != list(range(SUBLANES)):
        raise UnknownOperation(f"{operation.text[:200]!r} does not exchange sublanes in pairs.")

    def store(machine, value, *values):
        address, sublanes = _place(values, offset, None)
        machine.memory.store(address, to_words(value)[rows], sublanes)

    return store


@by_operation(
    *["vector_store", "vector_store_slane_stride"],
    form="% into " + _PLACE,
    attributes=["sublane_count", "sublane_stride"],
    machine=True,
)
def store(operation, offset, mask):
    stride = _stride(operation)

    def store(machine, value, *values):
        address, sublanes = _place(values, offset, mask)
        machine.memory.store(address, to_words(value), sublanes, stride)

    return store


@by_operation(*["vector_store_masked"], form=r"% into %( \+ %)? masked %( slmask %)?", machine=True)
def store_masked(operation, offset, sublane_mask):
    """Only the words of a mask, a bool of [8, 128]."""

    def store(machine, value, *values):
        values = list(values)
        lanes = values.pop(-2 if sublane_mask else -1)
        address, sublanes = _place(values, offset, sublane_mask)
        # A sublane without a word is not touched: it may lie beyond the buffer.
        sublanes = [s for s in sublanes if lanes[s].any()]
        machine.memory.store(address, to_words(value), sublanes, lanes=lanes)

    return store


def _stride(operation):
    if int(operation.attributes.get("sublane_count", SUBLANES)) != SUBLANES:
        raise UnknownOperation(f"{operation.text[:200]!r} does not take 8 sublanes.")
    return int(operation.attributes.get("sublane_stride", 1))


@by_operation("internal_scratch", form="", machine=True)
def internal_scratch(operation):
    """Where the compiler keeps something for a moment."""
    return lambda machine: machine.scratch_address


_UNITS = {"alloca_vmem": ("vmem", LANES), "alloca_smem": ("smem", 1)}
_UNITS["alloca_sflag"] = ("semaphore_mem", 1)


@by_operation(*_UNITS, form=r"(\d+)", machine=True)
def allocate(operation, count):
    """Memory of `pl.run_scoped`: rows of VMEM, words of SMEM, semaphores."""
    space, unit_words = _UNITS[operation.name]
    place = object()
    return lambda machine: machine.allocate(place, space, unit_words * int(count))


# --- Copies


@by_operation(
    *["enqueue_dma"],
    form=r"%(?:, %)+",
    attributes=["done_count", "operandSegmentSizes", "priority", "sequencer_type"],
    machine=True,
)
def start_copy(operation):
    """Operands: source, size, target, semaphore, steps in the source, in the target, sizes."""
    segments = [int(n) for n in operation.attributes["operandSegmentSizes"].split(",")]
    sources, targets, sizes = segments[5:8]
    if segments[:5] != [1, 0, 1, 1, 1] or any(segments[8:]) or not sources == targets == sizes - 1:
        raise UnknownOperation(f"{operation.text[:300]!r} is not a copy inside one chip.")
    if operation.attributes["done_count"] != "false":
        raise UnknownOperation(f"{operation.text[:300]!r} counts itself.")

    def start(machine, source, granules, target, semaphore, *rest):
        steps = list(zip(rest[:sources], rest[sources : 2 * sources], strict=True))
        machine.dma.start(source, target, semaphore, granules, steps, rest[2 * sources :])

    return start


@instruction("dma_done", machine=True, attributes=["emit_sfence"])
def wait_for_copy(machine, granules, semaphore):
    machine.dma.wait(semaphore, granules)


# --- Semaphores without a copy


@instruction("vsync.add", machine=True)
def signal(machine, semaphore, count):
    machine.dma.add(semaphore, count)


@instruction("vwait.ge", machine=True)
def wait_for_count(machine, semaphore, count):
    machine.dma.wait_for(semaphore, count)
