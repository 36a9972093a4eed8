"""How a command ends: with its result, or with a sentence and an exit code, never with a traceback.

| exit code | what happened |
|---|---|
| 0, 1 | what the command itself says |
| 2 | it could not be done; a sentence on standard error says why |
| 130 | Ctrl-C; 143: ended by another program |

With `--json` standard output holds one object in any case: the result, or {"error": sentence}.
"""

import argparse
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable

TRACEBACK = "RPA_TRACEBACK"
"""Set to anything, this environment variable keeps the tracebacks."""

EXPECTED = (ValueError, OSError, ImportError, RuntimeError, MemoryError, NotImplementedError)
"""What the package raises in words, what the system refuses, and what JAX says of its backends."""


class WrongUsage(SystemExit):
    """The arguments of a command are wrong; `text` says which, after it was printed."""

    def __init__(self, text):
        super().__init__(2)
        self.text = text


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations: `--js` is no `--json`."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def error(self, message):
        """Print the usage and the message, and end."""
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise WrongUsage(message)


def in_words(command: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Decorate `command(argv) -> exit code`: whatever is to be expected ends in one line.

    >>> @in_words
    ... def command(argv):
    ...     raise ValueError("no such thing")
    >>> command([])
    2
    """

    @functools.wraps(command)
    def run(argv):
        _any_terminal()
        _end_like_an_exit(signal.SIGTERM)
        try:
            code = command(argv)
            sys.stdout.flush()  # here, where a full disk is still an error of ours
            return code
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `| head` has seen enough
            _print_no_more()
            return 1
        except WrongUsage as usage:
            if "--json" in argv:
                print(json.dumps({"error": usage.text}))
            raise
        except EXPECTED as error:
            if os.environ.get(TRACEBACK):
                raise
            return _say(error, "--json" in argv)
        finally:
            _end_workers()

    return run


def _say(error, as_json):
    text = str(error).strip() or type(error).__name__
    try:
        if as_json:
            print(json.dumps({"error": text}))
        sys.stdout.flush()
    except OSError:
        _print_no_more()
    print(f"rpa: {text}", file=sys.stderr)
    return 2


def _any_terminal():
    """A terminal that has no "✓" or "µ" gets "?" instead of an exception."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no need of it
            stream.reconfigure(errors="replace")


def _print_no_more():
    """Python flushes at exit: to nowhere, or it would complain."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a file
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def _end_like_an_exit(signal_number):
    """So that what this process started is ended, too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal_number, lambda number, frame: sys.exit(128 + number))


def _end_workers():
    """The compiler's processes, if there are any: without importing it."""
    compiler = sys.modules.get("rpa.lab.compile.compiler")
    if compiler is not None:
        compiler.end_workers()
