"""`python -m rpa COMMAND`: the things that rpa does from a terminal.

A command is a module with two functions: `add_arguments(parser)` and `main(args)`, which returns
the exit code.
"""

import importlib
import sys

from rpa import __version__
from rpa.cli.outcome import Parser, in_words

COMMANDS = {
    "doctor": ("rpa.doctor", "say what this machine has, what will run how, and what is wrong"),
    "demo": ("rpa.demo", "run the ladder on a real model and print one table"),
    "bench": ("rpa.cli.bench", "time the ladder and its peers on this machine's device"),
    "lab": ("rpa.cli.lab", "ask the TPU compiler about a kernel, without a TPU"),
}


def main(argv=None):
    """Run one command and return its exit code, see `rpa.cli.outcome`.

    Args:
        argv: the arguments after `python -m rpa`; the process's own when left out.
    """
    return run(sys.argv[1:] if argv is None else list(argv))


@in_words
def run(argv: list[str]) -> int:
    """Run one command; what it raises is turned into words."""
    parser = Parser(prog="python -m rpa", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"rpa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        # Only the chosen command is imported: the doctor must answer on a machine where another
        # command's imports fail.
        if argv[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    return importlib.import_module(COMMANDS[args.command][0]).main(args)


if __name__ == "__main__":
    sys.exit(main())
