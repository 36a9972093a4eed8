"""From rung 7 to rung 8 one step at a time: what each optimisation is worth on three chips.

Two kinds of evidence. On the *inner loop* (`inner_loop.py`) each step stands on top of the last: a
decode of 512 tokens, bundles per sequence. On the *kernel*, rung 8 whole, one optimisation is taken
away and everything else stays (`tools/record_steps.py`): what it is worth in its company.

    decode   bundles of a sequence of 1,024 tokens, everything executed
    mixed    bundles of 128 query tokens x 512 keys x 8 KV heads, everything executed
    batch    microseconds of 256 decodes of 512 tokens, predicted with a copy's latency

All of Llama 3 8B, bfloat16. As recorded, or the inner loop compiled now.
"""

from collections.abc import Callable
from typing import NamedTuple

from rpa.lab.schedule import inner_loop
from rpa.lab.schedule.execution import CHIPS
from rpa.lab.schedule.recorded import compile_step, recorded, recorded_step


class Step(NamedTuple):
    """An optimisation, as one change.

    Attributes:
        name: what it is called.
        change: rung 7 does this, rung 8 does that.
        why: the reason in one sentence.
        bench: indices in `inner_loop.STEPS` before and after, or None.
        cases: of rung 8 without it, "decode", "mixed" or "batch".
    """

    name: str
    change: str
    why: str
    bench: tuple[int, int] | None
    cases: tuple[str, ...] = ()


STEPS = (
    Step(
        "strided 32-bit words",
        "K and V of a head are loaded as every n-th row of a matrix of 32-bit words, not by value",
        "a slice across a tiled dimension is a shuffle of registers, a strided load is one load",
        (0, 1),
    ),
    Step(
        "odd stride",
        "a token takes an odd number of rows in the buffer, one of them unused",
        "rows an even distance apart share the banks of VMEM, and their loads wait for each other",
        (1, 2),
        ("decode",),
    ),
    Step(
        "order of products",
        "Q K^T of the next heads is issued before P V of this one",
        "the MXU takes products in program order, and P V waits for a softmax",
        (2, 4),
        ("decode", "mixed"),
    ),
    Step(
        "head groups",
        "several heads share one product, their queries on its diagonal",
        "rows are free where the MXU is bound by its weights, and registers have 8 or 16 of them",
        (4, 5),
        ("decode",),
    ),
    Step(
        "two sequences per iteration",
        "two decodes are computed together",
        "one sequence has too few independent chains to fill the time of a softmax",
        (5, 6),
        ("decode",),
    ),
    Step(
        "swapped operands",
        "for a part of the keys the queries are the weights and the keys go through",
        "taking weights in is a unit of its own, and it is full while the other one idles",
        (6, 7),
        ("decode",),
    ),
    Step(
        "masks only where needed",
        "a block that every query sees whole is computed without a mask",
        "positions are compared by the vector unit, which is the full one in a prefill",
        None,
        ("decode", "mixed"),
    ),
    Step(
        "idle half of the MXU",
        "columns of ones next to V make the sums of the softmax, and the scale is in the queries",
        "an MXU 256 wide multiplies a head of 128 with half of itself; a v5e has no such half",
        None,
        ("mixed",),
    ),
    Step(
        "copies further ahead",
        "three iterations of copies are in flight, not one",
        "a copy arrives a microsecond or two after its start, however short it is",
        None,
        ("batch",),
    ),
)
"""The optimisations in the order of the course. One more has no time to show: the page table stays
in HBM, because SMEM (1 MiB) holds 262,144 page numbers and no more."""


class Row(NamedTuple):
    """What one step is worth in one place: {chip: (without, with)}."""

    step: str
    where: str
    values: dict[str, tuple[float, float]]


def rows(*, compiled=False) -> list[Row]:
    """Every step, on the inner loop and on the kernel.

    Args:
        compiled: compile the inner loop now, instead of reading the record.

    Raises:
        rpa.lab.schedule.NoSchedule: with `compiled`, where the compiler shows no schedule.

    >>> rows()[0].where, rows()[0].values["v5e"]
    ('inner loop', (11318.0, 2530.0))
    """
    read = compile_step if compiled else recorded_step
    return [row for step in STEPS for row in _rows_of(step, read)]


def _rows_of(step: Step, read: Callable):
    if step.bench is not None:
        pairs = {chip: tuple(_bundles(read, chip, i) for i in step.bench) for chip in CHIPS}
        yield Row(step.name, "inner loop", pairs)
    for case in step.cases:
        without, everything = recorded("without"), recorded("without")[f"nothing, {case}"]
        name = step.name if step.name in without else f"{step.name}, {case}"
        pairs = {chip: (without[name][chip], everything[chip]) for chip in CHIPS}
        yield Row(step.name, f"kernel, {case}", pairs)


def _bundles(read, chip, index) -> float:
    """Bundles per sequence of a step of the inner loop."""
    name = list(inner_loop.STEPS)[index]
    return read(chip, name).bundles / inner_loop.STEPS[name].num_seqs


def table(found: list[Row]) -> str:
    """The rows for people: without, with, and how many times less it is."""
    lines = [f"{'':28} {'':15}" + "".join(f"{chip:^23}" for chip in CHIPS).rstrip()]
    lines.append(f"{'step':28} {'where':15}" + f"{'without':>9}{'with':>8}{'':6}" * len(CHIPS))
    before = None
    for row in found:
        cells = "".join(
            f"{without:9,.0f}{kept:8,.0f}{without / kept:5.2f}x"
            for without, kept in (row.values[chip] for chip in CHIPS)
        )
        lines.append(f"{'' if row.step == before else row.step:28} {row.where:15}{cells}")
        before = row.step
    return "\n".join(line.rstrip() for line in lines)
