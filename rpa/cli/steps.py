"""`python -m rpa lab steps`: from rung 7 to rung 8 one step at a time, and what each is worth."""

import argparse
import json
import sys

import jax

from rpa.cli.spinner import waiting
from rpa.lab.schedule import steps
from rpa.lab.schedule.schedule import NoSchedule


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    parser.add_argument(
        "--compile", action="store_true", help="compile the inner loop now: minutes; default: read"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args) -> int:
    """Print the table; the exit code is 1 if it should be compiled and cannot be."""
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    try:
        if args.compile:
            with waiting("compiling the inner loop for three chips"):
                found = steps.rows(compiled=True)
        else:
            found = steps.rows()
    except NoSchedule as error:
        print(f"{error}\nWithout --compile the recorded numbers are printed.", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps([row._asdict() for row in found]))
        return 0
    print(steps.table(found))
    print(
        "\nBundles (cycles that issue), except batch: microseconds, predicted. The inner loop is a "
        "decode\nof 512 tokens, each step on top of the last; the kernel is rung 8, with one step "
        "taken away.\n"
    )
    for number, step in enumerate(steps.STEPS, start=1):
        print(f"{number}. {step.name}: {step.change}.\n   Why: {step.why}.")
    return 0
