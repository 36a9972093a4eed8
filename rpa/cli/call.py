"""A call of a function of any signature, as options of a command say it: `--arg`, `--option`."""

import contextlib
import os

from rpa.cli.outcome import EXPECTED, TRACEBACK
from rpa.lab.compile.functions import is_in_package, is_own, line_of


def is_call(args) -> bool:
    """Whether the command is asked for one call with arguments of its own, not for a batch."""
    return bool(args.arg)


def require_own(args):
    """Refuse `--arg` for a kernel that the lab knows by name: that one has its own arguments.

    Raises:
        ValueError: naming the kernel.
    """
    if not is_own(args.kernel or ""):
        raise ValueError(
            f"--arg gives the arguments of a function of your own, and --kernel is {args.kernel}: "
            "name a function as file.py:function or module:function, or leave out --arg."
        )


def values_of(args) -> list:
    """The arguments of the call: arrays where they have values, else shapes.

    Raises:
        ValueError: for integers without values.
    """
    return [argument.known() for argument in args.arg]


@contextlib.contextmanager
def mistakes_in_words(kernel):
    """Make one sentence with a line of whatever a kernel of one's own raises on this machine.

    It may raise anything. What the package refuses in words passes as it is.

    >>> with mistakes_in_words("my.py:f"):
    ...     {}["page"]
    Traceback (most recent call last):
        ...
    ValueError: my.py:f raised KeyError: 'page' (at <doctest rpa.cli.call.mistakes_in_words[0]>:2, \
in <module>)
    """
    try:
        yield
    except Exception as error:
        in_words = isinstance(error, EXPECTED) and is_in_package(error)
        if in_words or os.environ.get(TRACEBACK):
            raise
        name = type(error).__name__
        raise ValueError(f"{kernel} raised {name}: {error} (at {line_of(error)})") from error
