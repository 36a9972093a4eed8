"""`python -m rpa lab gain`: what a user gains over v3 and batched, both well configured."""

import argparse
import json
import sys

import jax
from tqdm import tqdm

from rpa.lab.bench import gain


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    parser.add_argument(
        "--record", action="store_true", help="compute it anew and keep it in the package"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args) -> int:
    """Print the table; the exit code is 1 if a kernel has no number."""
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    if args.record:
        try:
            found = gain.run(lambda rows: tqdm(rows, leave=False, disable=None))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        gain.RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not gain.RECORD.exists():
        print("not recorded yet: python -m rpa lab gain --record (half an hour)", file=sys.stderr)
        return 1
    found = gain.recorded()
    print(json.dumps(found) if args.json else f"{gain.TABLE.title}\n\n{gain.table(found)}")
    return 0
