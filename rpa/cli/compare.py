"""`python -m rpa lab compare`: every rung and its peers on one step, bytes and predicted time."""

import argparse
import json

import jax

from rpa.cli.options import add_options
from rpa.cli.spinner import waiting
from rpa.lab.bench import comparison


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    parser.add_argument(
        "--record", action="store_true", help="compute everything anew and keep it in the package"
    )
    parser.add_argument(
        "--only",
        choices=list(comparison.RACERS),
        action="append",
        help="with --record: renew these rows",
    )
    add_options(parser, "json")


def main(args) -> int:
    """Run the experiment and return its exit code.

    Raises:
        NoSchedule, CannotRun, PeerAbsent: a row cannot be computed, in words.
    """
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    if args.record:
        renew(args.only or list(comparison.RACERS))
    found = comparison.recorded()
    print(json.dumps(found) if args.json else comparison.table(found))
    return 0


def renew(names) -> None:
    """Compute these rows, keep the others, and write the record after each of them."""
    if not comparison.RECORD.exists():
        comparison.RECORD.write_text('{"rows": [], "prefill": []}', encoding="utf-8")
    for name in names:
        with waiting(f"{name}: counting, compiling for {', '.join(comparison.CHIPS)}"):
            row = comparison.run_row(name)
        keep(rows={name: row})
    if {"kernel", "v3"} <= set(names):
        with waiting("prefill: compiling"):
            prefill = comparison.prefill_chunks()
        keep(prefill=prefill)


def keep(rows=None, prefill=None) -> None:
    """Write new rows, or the numbers of prefill, into the record as it is now."""
    found = comparison.recorded()
    by_name = {row["name"]: row for row in found["rows"]} | (rows or {})
    ordered = [by_name[name] for name in comparison.RACERS if name in by_name]
    record = comparison.record(ordered, found["prefill"] if prefill is None else prefill)
    comparison.RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
