"""`python -m rpa lab EXPERIMENT`: the lab from a terminal, a module an experiment.

An experiment is a module with two functions: `add_arguments(parser)` and `main(args)`, which
returns the exit code.
"""

import argparse
import importlib

EXPERIMENTS = {
    "all": "print every table of the lab: what is claimed about rung 8's speed",
    "chip": "execute what the compiler makes of kernels, without a TPU",
    "compile": "compile a kernel for a chip that is not here",
    "schedule": "read a compiled kernel's schedule: bundles, loops, units",
    "timeline": "record a kernel's copies: a table, a player, a trace for Perfetto",
    "steps": "say what each optimisation of rung 8 is worth on three chips",
    "predict": "say how long a batch takes on a chip that is not here",
    "gain": "what a user gains over v3 and batched, both well configured",
    "compare": "every rung and its peers on one step: lines, bytes, predicted time",
    "roofline": "say what bounds a batch on each chip, and the least time it takes",
    "tune": "sweep rung 8's block sizes, and judge its defaults",
    "parallel": "compile attention for eight chips: collectives, bytes on the wire, an estimate",
    "traffic": "count the HBM bytes that a rung moves, against the least possible",
}
"""The module of each experiment in this package, and what it does."""


def add_arguments(parser: argparse.ArgumentParser):
    """Add the lab's experiments and their options to the command `lab`."""
    experiments = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, help_text in EXPERIMENTS.items():
        _module(name).add_arguments(
            experiments.add_parser(name, help=help_text, description=help_text)
        )


def main(args) -> int:
    """Run the chosen experiment and return its exit code."""
    return _module(args.experiment).main(args)


def _module(name):
    return importlib.import_module(f"rpa.cli.{name}")
