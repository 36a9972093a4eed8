"""`python -m rpa lab parallel`: attention on eight chips, what crosses the wire, an estimate."""

import argparse
import dataclasses
import json

import jax

from rpa.cli.options import add_options
from rpa.lab.parallel import CASES, TOPOLOGIES, estimate_for


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    several = {"action": "append", "help": "may be given several times; default: all"}
    parser.add_argument("--topology", choices=TOPOLOGIES, **several)
    parser.add_argument("--case", choices=list(CASES), **several)
    add_options(parser, "json")


def main(args) -> int:
    """Run the experiment and return its exit code: 1 if a case was not compiled."""
    jax.config.update("jax_platforms", "cpu")
    found = [
        estimate_for(case, topology)
        for case in args.case or CASES
        for topology in args.topology or TOPOLOGIES
    ]
    as_json = [dataclasses.asdict(each) | {"time_us": each.time_us} for each in found]
    print(json.dumps({"estimates": as_json}) if args.json else table(found))
    return int(any(each.error for each in found))


def table(found) -> str:
    """A line for each case and topology, for people."""
    lines = [
        f"{'form':27} {'devices':12} {'collectives per layer':38} {'sent KiB':>9} "
        f"{'wire us':>8} {'attention us':>12} {'layer us':>9} {'one device us':>13}"
    ]
    for each in found:
        if each.error:
            lines.append(f"{each.case:27} {each.topology:12} {each.error}")
            continue
        counted = ", ".join(f"{n} {kind}" for kind, n in each.collectives.items()) or "none"
        lines.append(
            f"{each.case:27} {each.topology:12} {counted:38} {each.sent_bytes / 1024:9,.0f} "
            f"{each.wire_us:8,.1f} {each.on_chip_us:12,.1f} {each.time_us:9,.1f} "
            f"{each.one_chip_us:13,.1f}"
        )
        lines += [f"    over the whole cache: {line[:120]}" for line in each.cache_operations]
    lines.append(
        "(collectives and bytes counted in the compiled program; times are estimates: attention at "
        "the\nroofline of a device, bytes over one link in one direction, no latency)"
    )
    return "\n".join(lines)
