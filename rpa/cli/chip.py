"""`python -m rpa lab chip`: compiled kernels, executed without a TPU."""

import argparse
import sys

import jax

from rpa.cli.options import whole
from rpa.lab.chip import ChipError
from rpa.lab.chip.hunt import check_problem, default_block_problems, hunt
from rpa.lab.chip.machine import MODELS


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    parser.add_argument(
        "--chip", choices=[*MODELS, "all"], default="all", help="default: %(default)s"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--conformance",
        action="store_true",
        help="execute every tiny kernel, and print the table of operations",
    )
    what.add_argument(
        "--hunt",
        type=whole(1, 10**6),
        metavar="N",
        help="run N generated problems of rung 8 a chip",
    )
    what.add_argument(
        "--blocks",
        action="store_true",
        help="run the default block sizes of the sweep, on contexts of twice their length",
    )
    what.add_argument(
        "--selftest",
        action="store_true",
        help="run every layout path of the self-test, rungs 7 and 8",
    )
    parser.add_argument(
        "--first", type=whole(0, 10**9), default=0, help="number of the first problem"
    )


def main(args) -> int:
    """Run the experiment; the exit code is 1 if anything was wrong."""
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    names = list(MODELS) if args.chip == "all" else [args.chip]
    try:
        if args.conformance:
            return _conformance(names)
        if args.blocks:
            return _report(names, _default_blocks)
        if args.selftest:
            return _selftest(names)
        return _report(names, lambda chip: hunt(args.hunt, chip, args.first))
    except ChipError as error:
        print(error, file=sys.stderr)
        return 1


def _conformance(names):
    from rpa.lab.chip import conformance

    outcomes = [outcome for chip in names for outcome in conformance.all_outcomes(chip)]
    ladder = {chip: conformance.ladder_operations(chip) for chip in names}
    print(*conformance.table(outcomes, ladder), sep="\n")
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    for outcome in wrong:
        print(f"WRONG {outcome.kernel} on {outcome.chip}: {outcome.wrong}")
    missing = conformance.untested(outcomes, ladder)
    for chip, operations in missing.items():
        count = sum(outcome.chip == chip for outcome in outcomes)
        print(
            f"{chip}: {count} kernels, {sum(o.chip == chip for o in wrong)} wrong; "
            f"{len(ladder[chip])} operations in the ladder's kernels, not tested: "
            f"{', '.join(sorted(operations)) or 'none'}"
        )
    return 1 if wrong else 0


def _selftest(names):
    from rpa import selftest

    bad = 0
    for name in names:
        print(selftest.heading_as_compiled(name))
        for result in selftest.run_as_compiled(name):
            print(selftest.line(result), flush=True)
            bad += bool(result.wrong)
    return 1 if bad else 0


def _default_blocks(chip):
    for problem in default_block_problems(chip):
        yield from check_problem(problem, chip, num_batches=4)


def _report(names, find):
    """Print what `find(chip)` yields, and how much of it is wrong."""
    bad = 0
    for chip in names:
        count = wrong = 0
        for finding in find(chip):
            print(finding, flush=True)
            count, wrong = count + 1, wrong + bool(finding.wrong)
        print(f"{chip}: {count} cases, {wrong} wrong", flush=True)
        bad += wrong
    return 1 if bad else 0
