"""`python -m rpa lab schedule`: what a kernel's schedule costs, from a terminal."""

import argparse
import itertools
import json
import sys

import jax

from rpa import chips
from rpa.cli.options import add_options, kernel_of, whole
from rpa.cli.spinner import waiting
from rpa.lab.compile.functions import is_own
from rpa.lab.programs import MODELS
from rpa.lab.schedule import before_after
from rpa.lab.schedule.cases import CASES, KERNELS, Measured, label, measure
from rpa.lab.schedule.execution import CannotRun
from rpa.lab.schedule.loop_tree import bound, shares
from rpa.lab.schedule.schedule import NoSchedule

ALL = "all"


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    each = {"required": True, "choices": [*chips.CHIPS, ALL], "help": "all: one table of all"}
    add_options(parser, "chip", chip=each)
    parser.add_argument("--case", choices=[*CASES, ALL], required=True)
    known = {"type": kernel_of(KERNELS), "metavar": f"{','.join(KERNELS)},FILE.py:FUNCTION"}
    parser.add_argument("--kernel", **known, default="rpa", help="default: rpa")
    parser.add_argument(
        "--blocks",
        type=_four_sizes,
        metavar="bq,bkv,bq_c,bkv_c",
        help="block sizes; default: the kernel's own",
    )
    model = {"choices": [*MODELS, ALL]}
    add_options(parser, "model", "page_size", "kv_dtype", "share_lanes", model=model)
    parser.add_argument(
        "--against",
        metavar="KERNEL|FILE",
        help="compare with v3 or batched, or with what was saved",
    )
    parser.add_argument("--save", metavar="FILE", help="keep the table for a later --against FILE")
    parser.add_argument("--fresh", action="store_true", help="do not take a kept schedule")
    add_options(parser, "picture", "json", picture={"help": "draw the units' occupancy"})


def main(args) -> int:
    """Run the experiment and return its exit code.

    Raises:
        NoSchedule, CannotRun: in words.
    """
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    is_file = args.against is not None and not (args.against in KERNELS or is_own(args.against))
    if is_file or args.save or ALL in (args.chip, args.case, args.model):
        return _tabulate(args)
    measured = _measure(args, args.kernel, args.blocks)
    against = _measure(args, args.against, None) if args.against else None
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


def _four_sizes(text):
    sizes = [whole(1, 2**20)(n) for n in text.split(",")]
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not four sizes: bq,bkv,bq_c,bkv_c")
    return sizes


def _tabulate(args):
    """One table of all places asked for; what one of them cannot be counted for is printed."""
    before = before_after.load(args.against) if args.against else None
    rows, missing = {}, []
    for chip, case, model in itertools.product(
        _every(args.chip, chips.CHIPS), _every(args.case, CASES), _every(args.model, MODELS)
    ):
        place = f"{chip} {case} {model}"
        one = argparse.Namespace(**vars(args) | {"chip": chip, "case": case, "model": model})
        try:
            rows[place] = before_after.row_of(_measure(one, args.kernel, args.blocks))
        except (NoSchedule, CannotRun, ValueError) as error:
            missing.append(f"{place}: {error}")
    if args.save:
        before_after.save(rows, args.save)
    if rows:
        print(json.dumps(rows) if args.json else before_after.table(rows, before))
    for line in missing:
        print(line, file=sys.stderr)
    return 1 if missing else 0


def _every(name, names):
    return list(names) if name == ALL else [name]


def _measure(args, kernel, blocks):
    with waiting(f"{kernel} for {args.chip}: compiling and reading its schedule"):
        return measure(
            *(kernel, args.case, args.chip),
            model=args.model,
            page_size=args.page_size,
            kv_dtype=args.kv_dtype,
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
        "blocks": measured.blocks,
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
        f"{_title(measured)}, {measured.case}, (bq, bkv, bq_c, bkv_c) = "
        f"{tuple(measured.blocks) if measured.blocks else 'its own'}, bundles per chunk:",
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
