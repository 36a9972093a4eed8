"""`python -m rpa lab race`: every rung and its peers on one step, bytes and predicted time."""

import argparse
import json
import sys

import jax

from rpa.lab import peers, race
from rpa.lab.schedule import NoSchedule
from rpa.lab.schedule_run import CannotRun
from rpa.lab.waiting import waiting


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    parser.add_argument(
        "--record", action="store_true", help="compute everything anew and keep it in the package"
    )
    parser.add_argument(
        "--only", choices=list(race.RACERS), action="append", help="with --record: renew these rows"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args) -> int:
    """Run the experiment; the exit code is 1 if a row could not be computed."""
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    if args.record:
        try:
            renew(args.only or list(race.RACERS))
        except (NoSchedule, CannotRun, peers.PeerAbsent) as error:
            print(error, file=sys.stderr)
            return 1
    found = race.recorded()
    print(json.dumps(found) if args.json else race.table(found))
    return 0


def renew(names) -> None:
    """Compute these rows, keep the others, and write the record after each of them."""
    if not race.RECORD.exists():
        race.RECORD.write_text('{"rows": [], "prefill": []}', encoding="utf-8")
    for name in names:
        with waiting(f"{name}: counting, compiling for {', '.join(race.CHIPS)}"):
            row = race.run_row(name)
        keep(rows={name: row})
    if {"kernel", "v3"} <= set(names):
        with waiting("prefill: compiling"):
            prefill = race.prefill_chunks()
        keep(prefill=prefill)


def keep(rows=None, prefill=None) -> None:
    """Write new rows, or the numbers of prefill, into the record as it is now."""
    found = race.recorded()
    by_name = {row["name"]: row for row in found["rows"]} | (rows or {})
    ordered = [by_name[name] for name in race.RACERS if name in by_name]
    record = race.record(ordered, found["prefill"] if prefill is None else prefill)
    race.RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
