"""`python -m rpa lab compile --against v3`: compile time of rung 8 beside a peer's."""

import dataclasses
import json
import sys

from tqdm import tqdm

from rpa import chips
from rpa.lab import peers
from rpa.lab.bench import compile_time
from rpa.lab.compile.compiler import CompileResult, compile_versions


def main(args) -> int:
    """Compile all rows; the exit code is 1 if one is refused or takes more than the limit."""
    absent = peers.absence(args.against)
    if absent is not None:
        print(f"Only rung 8 below. {absent}", file=sys.stderr)
    chosen = args.chip or compile_time.CHIPS
    total = len(compile_time.ROWS) * len(chosen)
    rows = compile_time.compare(args.against, chosen, args.repeats)
    found = list(tqdm(rows, total=total, desc="compiling", leave=False))
    if args.json:
        print(json.dumps(as_json(args.against, absent, found), indent=2))
    else:
        print(table(args.against, found))
    return 0 if all(comparison.passed for comparison in found) else 1


def as_json(peer, absent, found) -> dict:
    """All that was measured, as one object."""
    return {
        "peer": peer,
        "peer_absence": absent,
        "versions": compile_versions(),
        "limit": compile_time.LIMIT,
        "goal": compile_time.GOAL,
        "blocks": compile_time.BLOCKS,
        "rows": [
            dataclasses.asdict(c) | {"ratio": c.ratio, "verdict": c.verdict, "passed": c.passed}
            for c in found
        ],
    }


def table(peer, found) -> str:
    """A line for each row and chip, for people."""
    lines = [
        "CPU seconds to trace and lower + to compile; in brackets, wall seconds of both.",
        f"Blocks of both sides: {blocks_in_words()}.",
        f"{'':33} {'':6} {'rung 8':>19} {peer:>19} ratio  VMEM at rung 8's own blocks",
    ]
    for c in found:
        ratio = "" if c.ratio is None else f"{c.ratio:.2f}"
        lines.append(
            f"{c.row:33} {c.chip:6} {seconds(c.ours):>19} {seconds(c.theirs):>19} {ratio:>5}  "
            f"{vmem(c.default):16} {c.verdict}"
        )
        refused = {"rung 8": c.ours, peer: c.theirs, "rung 8 at its own blocks": c.default}
        for who, result in refused.items():
            if result is not None and not result.ok:
                lines.append(f"    {who}: {result.error_kind}: {result.error}")
    ratios = [c.ratio for c in found if c.ratio is not None]
    if ratios:
        lines.append(
            f"Largest ratio {max(ratios):.2f}; limit {compile_time.LIMIT}, "
            f"goal {compile_time.GOAL}."
        )
    return "\n".join(lines)


def seconds(result: CompileResult | None) -> str:
    """CPU seconds of the two parts, and wall seconds of both.

    >>> seconds(CompileResult("v5e", "f", True, 1.0, 5.0, trace_cpu_s=0.9, compile_cpu_s=4.1))
    '0.9 +  4.1  (6)'
    """
    if result is None or not result.ok:
        return "-"
    wall_s = result.trace_time_s + result.compile_time_s
    return f"{result.trace_cpu_s:.1f} + {result.compile_cpu_s:4.1f}  ({wall_s:.0f})"


def vmem(result: CompileResult) -> str:
    """VMEM that a compiled program takes, of what the chip has."""
    if not result.ok:
        return "-"
    whole = chips.chip(result.chip).vmem_bytes
    return f"{result.vmem_used_bytes / chips.MIB:.1f} of {whole / chips.MIB:.0f} MiB"


def blocks_in_words() -> str:
    """The blocks that both sides are compiled with."""
    return ", ".join(f"{name} {sizes}" for name, sizes in compile_time.BLOCKS.items())
