"""`python -m rpa lab all`: every table of the lab from nothing; `make bench` with the peers."""

import argparse
import dataclasses
import json

import jax
from tqdm import tqdm

from rpa.cli.clock import Clock
from rpa.cli.options import SEVERAL_CHIPS, add_options
from rpa.lab import peers
from rpa.lab.bench.tables import SECONDS, TABLES, Scope, as_markdown, rows_of
from rpa.lab.compile.compiler import compile_versions
from rpa.lab.schedule.cases import KERNELS
from rpa.lab.schedule.schedule import num_kept

LEAVES_OUT = (
    "--quick leaves out: v5e and v6e; the kernel batched_rpa; blocks other than 1,024 and the "
    "kernel's own; page 16; v3's mixed kernel; and the tables {}."
)


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    parser.add_argument("--table", choices=list(TABLES), action="append", help="default: all")
    add_options(parser, "chip", chip=SEVERAL_CHIPS | {"choices": list(Scope().chips)})
    parser.add_argument("--quick", action="store_true", help="under 10 minutes: a part of it")
    add_options(parser, "workers", "json")


def main(args) -> int:
    """Print the tables; the exit code is 1 if rung 8 has no number somewhere."""
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    scope, absent = scope_of(args.chip, args.quick)
    chosen = args.table or [n for n, table in TABLES.items() if table.in_quick or not args.quick]
    if not args.json:
        print(heading(absent, args.quick), flush=True)
    kept, told, clocks = num_kept(), {}, [Clock.now()]
    for name, rows, cells_s in measured(chosen, scope, args.workers):
        clocks.append(Clock.now())
        spent = clocks[-1] - clocks[-2]
        told[name] = {"title": TABLES[name].title, "rows": rows, "spent": spent._asdict()}
        told[name] |= {"cells_s": cells_s}
        if not args.json:
            cost = f"Cells: {len(cells_s)}, the longest {max(cells_s, default=0):.0f} s: {spent}."
            print(as_text(name, rows), cost, sep="\n\n", flush=True)
    spent, compiled = clocks[-1] - clocks[0], num_kept() - kept
    if args.json:
        about = {"scope": dataclasses.asdict(scope), "versions": compile_versions()}
        about |= {"absent": absent, "spent": spent._asdict(), "compiled": compiled, "kept": kept}
        print(json.dumps(about | {"tables": told}))
    else:
        print(f"\nAll tables: {spent}; {compiled} schedules were compiled, {kept} kept before.")
    ours = [row for t in told.values() for row in t["rows"] if row.get("kernel", "rpa") == "rpa"]
    return int(any("note" in row for row in ours))


def scope_of(chips=None, quick=False) -> tuple[Scope, list[str]]:
    """What is asked for of what is there, and why the other kernels are not."""
    reasons = {name: peers.absence(name) for name in KERNELS if name in peers.PROGRAMS}
    there = ["rpa", *(name for name, reason in reasons.items() if reason is None)]
    if quick:
        chips, there = chips or ["tpu7x"], [name for name in there if name != "batched"]
    scope = Scope(tuple(chips or Scope().chips), tuple(there), quick)
    return scope, [reason for reason in reasons.values() if reason is not None]


def measured(names, scope, workers=2):
    """Measure tables one after the other, with one progress bar for all.

    Yields:
        Name, rows as they are shown, seconds that each of its cells took.
    """
    cells = {name: TABLES[name].cells(scope) for name in names}
    with tqdm(total=sum(map(len, cells.values())), leave=False, disable=None) as bar:
        for name, mine in cells.items():
            bar.set_description_str(name)
            rows, cells_s = [], []
            for row in rows_of(TABLES[name], mine, workers):
                cells_s.append(row.pop(SECONDS))
                rows.append(row)
                bar.update()
            yield name, TABLES[name].finish(rows), cells_s


def heading(absent, quick) -> str:
    """What stands above the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in compile_versions().items())
    lines = [
        "Predicted: read from the compiler's schedule and the kernels' own copies, without a TPU.",
        f"With {versions}. Three goals are for v5e / v6e / TPU7x. Bundles are cycles that issue.",
        *(f"Not compared: {reason}" for reason in absent),
    ]
    if quick:
        left = [name for name, table in TABLES.items() if not table.in_quick]
        lines.append(LEAVES_OUT.format(", ".join(left)))
    return "\n".join(lines)


def as_text(name, rows) -> str:
    """A table with its heading."""
    table = TABLES[name]
    return f"\n## {name}\n\n{table.title}\n\n{as_markdown(table, rows)}"
