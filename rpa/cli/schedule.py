"""`python -m rpa lab schedule`: what a kernel's schedule costs, from a terminal."""

import argparse
import itertools
import json
import sys

import jax

from rpa import chips
from rpa.cli.call import is_call, require_own, values_of
from rpa.cli.options import add_options, chip_to_execute, kernel_of, whole
from rpa.cli.spinner import waiting
from rpa.lab.compile.functions import is_own
from rpa.lab.programs import MODELS
from rpa.lab.schedule import before_after
from rpa.lab.schedule.call import execute_call
from rpa.lab.schedule.cases import CASES, KERNELS, Measured, label, measure
from rpa.lab.schedule.execution import CHIPS, CannotRun, Execution
from rpa.lab.schedule.loop_tree import bound, shares
from rpa.lab.schedule.schedule import NoSchedule, Schedule

ALL = "all"


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    each = {"choices": None, "type": chip_to_execute(ALL), "metavar": ",".join([*CHIPS, ALL])}
    add_options(parser, "chip", chip=each | {"required": True, "help": "all: one table of all"})
    parser.add_argument("--case", choices=[*CASES, ALL], help="required without --arg")
    known = {"type": kernel_of(KERNELS), "metavar": f"{','.join(KERNELS)},FILE.py:FUNCTION"}
    help_text = "your own with the ladder's signature, or with --arg; default: rpa"
    parser.add_argument("--kernel", **known, default="rpa", help=help_text)
    add_options(parser, "arg", "option", "pallas_call")
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
    if is_call(args):
        require_own(args)
    elif args.case is None:
        raise ValueError(
            f"--case is missing: expected one of {', '.join([*CASES, ALL])}; or --arg, for a "
            "function of your own with other arguments."
        )
    is_file = args.against is not None and not (args.against in KERNELS or is_own(args.against))
    if is_file or args.save or ALL in (args.chip, args.case, args.model):
        return _tabulate(args)
    if is_call(args):
        return _print_call(args)
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
        _every(args.chip, CHIPS), _every(args.case, CASES), _every(args.model, MODELS)
    ):
        place = f"{chip} {case} {model}"
        one = argparse.Namespace(**vars(args) | {"chip": chip, "case": case, "model": model})
        try:
            if is_call(args):
                place = f"{chip} {args.kernel}"
                rows[place] = before_after.row_of_call(_execute(one, args.kernel)[1])
            else:
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
            options=dict(args.option),
            use_cache=not args.fresh,
        )


def _execute(args, kernel):
    """The schedule of a function's kernel for the arguments given, and its execution."""
    with waiting(f"{kernel} for {args.chip}: compiling and reading its schedule"):
        return execute_call(
            *(args.chip, kernel, *values_of(args)),
            kwargs=dict(args.option),
            kernel=args.pallas_call,
            use_cache=not args.fresh,
        )


def _print_call(args) -> int:
    schedule, run = _execute(args, args.kernel)
    against = _execute(args, args.against) if args.against else None
    if args.picture:
        from rpa.figures.schedule import occupancy

        occupancy(schedule, schedule.tile, title=f"{schedule.kernel} on {args.chip}").save(
            args.picture
        )
    if args.json:
        found = call_to_json(schedule, run)
        if against is not None:
            found["against"] = call_to_json(*against)
            found["ratio"] = run.bundles / against[1].bundles
        print(json.dumps(found))
        return 0
    print(describe_call(schedule, run))
    if against is not None:
        print("", describe_call(*against), "", sep="\n")
        print(f"bundles, {args.kernel} / {args.against}: {run.bundles / against[1].bundles:.3f}")
    return 0


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


def call_to_json(schedule: Schedule, run: Execution) -> dict:
    """All numbers of one call of a function."""
    slots = schedule.slots(run.hits)
    share = shares(slots, schedule.capacity, run.bundles)
    return {
        "function": schedule.function,
        "chip": schedule.chip,
        "pallas_call": schedule.kernel,
        "bundles": run.bundles,
        "issue_us": run.bundles / chips.chip(schedule.chip).clock_hz * 1e6,
        "hbm_bytes": run.hbm_bytes,
        "bound": bound(share),
        "slots": slots,
        "capacity": schedule.capacity,
        "share": share,
        "bundles_in_listing": schedule.num_bundles,
    }


def describe_call(schedule: Schedule, run: Execution) -> str:
    """The same for people."""
    numbers = call_to_json(schedule, run)
    return "\n".join(
        [
            f"{schedule.function.rpartition(':')[2]} on {schedule.chip}, kernel {schedule.kernel}: "
            f"{run.bundles:,} bundles executed, {numbers['issue_us']:,.2f} us to issue (predicted, "
            "waits for copies not counted)",
            f"  {schedule.num_bundles:,} bundles in the listing; its copies move "
            f"{run.hbm_bytes:,} HBM bytes",
            f"slots, share of capacity (bound: {numbers['bound']}):",
            *(
                f"  {unit:8} {n:9,}  {numbers['share'][unit]:6.1%}"
                for unit, n in numbers["slots"].items()
            ),
            "loops and regions: bundles, MATMULs, spills, bound",
            *tree_lines(schedule, run.hits),
        ]
    )


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
    lines += tree_lines(measured.schedule, measured.chunks.hits)
    return "\n".join(lines)


def tree_lines(schedule, hits):
    """One line per loop or region of at least 50 bundles; * marks what was executed."""
    lines = []
    for depth, span in schedule.loops.walk():
        if span.num_bundles < 50:
            continue
        told = schedule.describe(span)
        matmuls, spills = told["slots"]["MATMUL"], told["slots"]["spill"]
        mark = "*" if hits[span.start : span.end].any() else " "
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
