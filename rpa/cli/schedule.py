"""`python -m rpa lab schedule`: what a kernel's schedule costs, from a terminal."""

import argparse
import json
import sys

import jax

from rpa.cli.options import add_options, kernel_of
from rpa.cli.spinner import waiting
from rpa.lab.schedule.cases import CASES, KERNELS, Measured, label, measure
from rpa.lab.schedule.execution import CannotRun
from rpa.lab.schedule.loop_tree import bound, shares
from rpa.lab.schedule.schedule import NoSchedule


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    add_options(parser, "chip", chip={"required": True, "help": None})
    parser.add_argument("--case", choices=list(CASES), required=True)
    known = {"type": kernel_of(KERNELS), "metavar": f"{','.join(KERNELS)},FILE.py:FUNCTION"}
    parser.add_argument("--kernel", **known, default="rpa", help="default: rpa")
    parser.add_argument(
        "--blocks",
        type=lambda text: [int(n) for n in text.split(",")],
        metavar="bq,bkv,bq_c,bkv_c",
        help="block sizes; default: the kernel's own",
    )
    add_options(parser, "model", "page_size", "share_lanes")
    parser.add_argument("--against", **known, help="compare with this kernel")
    parser.add_argument("--fresh", action="store_true", help="do not take a kept schedule")
    add_options(parser, "picture", "json", picture={"help": "draw the units' occupancy"})


def main(args) -> int:
    """Run the experiment; the exit code is 1 if there is no schedule."""
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    try:
        measured = _measure(args, args.kernel, args.blocks)
        against = _measure(args, args.against, None) if args.against else None
    except (NoSchedule, CannotRun, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.picture:
        _draw(measured, args.picture)
    if args.json:
        found = to_json(measured)
        if against is not None:
            found["against"] = to_json(against)
            found["ratio"] = measured.bundles_per_chunk / against.bundles_per_chunk
        print(json.dumps(found))
    else:
        print(describe(measured))
        if against is not None:
            print("", describe(against), "", side_by_side(measured, against), sep="\n")
    return 0


def _measure(args, kernel, blocks):
    with waiting(f"{kernel} for {args.chip}: compiling and reading its schedule"):
        return measure(
            *(kernel, args.case, args.chip),
            model=args.model,
            page_size=args.page_size,
            share_lanes=args.share_lanes,
            blocks=blocks,
            use_cache=not args.fresh,
        )


def _draw(measured, file):
    # Only who wants a picture waits for Matplotlib.
    from rpa.figures.schedule import occupancy

    span = measured.busiest_span
    occupancy(measured.schedule, span, title=_title(measured)).save(file)


def _title(measured):
    name = measured.schedule.kernel
    if label(measured.kernel) == "yours":
        name = f"yours, {measured.kernel.rpartition(':')[2]}"
    return f"{name} on {measured.chip}"


def to_json(measured: Measured) -> dict:
    """All numbers of one measurement."""
    slots, capacity = measured.slots, measured.schedule.capacity
    share = shares(slots, capacity, measured.executed_per_chunk)
    return {
        "kernel": measured.kernel,
        "case": measured.case,
        "chip": measured.chip,
        "pallas_call": measured.schedule.kernel,
        "bundles_per_chunk": measured.bundles_per_chunk,
        "executed_per_chunk": measured.executed_per_chunk,
        "page_issue_per_chunk": measured.page_issue_per_chunk,
        "interior_region": measured.interior,
        "masked_region": measured.masked,
        "per_sequence": measured.per_sequence,
        "step_1024": measured.step,
        "floor": measured.floor,
        "floor_of": measured.floor_of,
        "bound": bound(share),
        "spills": slots["spill"],
        "fills": slots["fill"],
        "slots": slots,
        "capacity": capacity,
        "share": share,
        "bundles_in_listing": measured.schedule.num_bundles,
    }


def describe(measured: Measured) -> str:
    """A table for people."""
    numbers = to_json(measured)
    lines = [
        f"{_title(measured)}, {measured.case}, bundles per chunk:",
        f"  {measured.bundles_per_chunk:9,.0f}  counted  ({measured.floor_of} floor "
        f"{measured.floor:,.0f})",
        f"  {measured.executed_per_chunk:9,.0f}  with everything executed",
        f"  {measured.page_issue_per_chunk:9,.0f}  issuing page copies",
    ]
    if measured.masked is not None:
        lines.append(f"  {measured.interior:9,.0f}  the region without a mask")
        lines.append(f"  {measured.masked:9,.0f}  the region with a mask")
    if measured.per_sequence is not None:
        lines.append(f"  {measured.per_sequence:9,.0f}  a sequence, besides its chunks")
        lines.append(f"  {measured.step:9,.0f}  a sequence of 1,024 tokens, all in all")
    lines.append(f"slots per chunk, share of capacity (bound: {numbers['bound']}):")
    lines += [
        f"  {unit:8} {n:9,.0f}  {numbers['share'][unit]:6.1%}" for unit, n in measured.slots.items()
    ]
    lines.append("loops and regions: bundles, MATMULs, spills, bound")
    lines += tree_lines(measured)
    return "\n".join(lines)


def tree_lines(measured):
    """One line a loop or region of at least 50 bundles; * marks what the counted chunks execute."""
    schedule = measured.schedule
    lines = []
    for depth, span in schedule.loops.walk():
        if span.num_bundles < 50:
            continue
        told = schedule.describe(span)
        matmuls, spills = told["slots"]["MATMUL"], told["slots"]["spill"]
        mark = "*" if measured.chunks.hits[span.start : span.end].any() else " "
        lines.append(
            f"{mark} {'  ' * depth}{span.kind} {span.start:#x}..{span.end:#x}: "
            f"{told['bundles']:,}, {matmuls:,}, {spills:,}, {told['bound']}"
        )
    return lines


def side_by_side(ours: Measured, theirs: Measured) -> str:
    """Two kernels in the same case: bundles and slots per chunk, and the ratio of the first."""
    left, right = to_json(ours), to_json(theirs)
    names = ("bundles_per_chunk", "executed_per_chunk", "page_issue_per_chunk")
    rows = [(name.replace("_", " "), left[name], right[name]) for name in names]
    rows += [(unit, n, right["slots"][unit]) for unit, n in left["slots"].items()]
    lines = [f"{'':22}{label(ours.kernel):>10}{label(theirs.kernel):>10}{'ratio':>8}"]
    for name, mine, other in rows:
        ratio = f"{mine / other:8.2f}" if other else f"{'':8}"
        lines.append(f"{name:22}{mine:10,.0f}{other:10,.0f}{ratio}")
    return "\n".join(lines)
