"""Options that several experiments have, in one place, so that they are spelled alike."""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rpa import chips
from rpa.lab.arguments import parse_argument, parse_option
from rpa.lab.batches import PAGES, parse_batch
from rpa.lab.compile.functions import is_own
from rpa.lab.schedule import execution
from rpa.shapes import MODELS

DEFAULT = "default: %(default)s"

Q_DTYPES = ("float32", "bfloat16")
KV_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def whole(lowest: int, highest: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option that is a whole number in a range.

    >>> whole(1)("16")
    16
    """

    def number(text):
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {lowest:,} to {highest:,}"
            )
        return value

    return number


def real(lowest: float, highest: float) -> Callable[[str], float]:
    """The type of an option that is a number in a range; NaN is in none.

    >>> real(0, 1)("0.9")
    0.9
    """

    def number(text):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number from {lowest:g} to {highest:g}"
            )
        return value

    return number


def in_words(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an option whose parser raises sentences: `argparse` shows only those of its own.

    >>> in_words(parse_argument)("i32[2]=3").values
    (3,)
    """

    def parsed(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def chip_to_execute(*more: str) -> Callable[[str], str]:
    """The type of an option that names a chip whose schedules are executed, or one of more words.

    >>> chip_to_execute("all")("v6e"), chip_to_execute("all")("all")
    ('v6e', 'all')
    """
    return in_words(lambda text: text if text in more else execution.chip_to_execute(text).name)


def picture_file(text: str) -> Path:
    """The type of an option that names a picture to write: tried before the work, not after it."""
    path = Path(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not end in {', '.join(PICTURES)}, the pictures that can be drawn"
        )
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, not a file")
    _try_to_write(path.parent)
    return path


PICTURES = (".png", ".svg", ".pdf")


def output_folder(text: str) -> Path:
    """The type of an option that names a folder for results: made, and tried, before the work."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a folder")
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be made a folder: {error}") from None
    _try_to_write(path)
    return path


def _try_to_write(folder):
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tried")
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"nothing can be written into {str(folder)!r}: {error}"
        ) from None


COMMON = {
    "chip": {"choices": list(chips.CHIPS), "help": DEFAULT},
    "model": {"choices": list(MODELS), "default": "llama-3-8b", "help": DEFAULT},
    "batch": {
        "type": parse_batch,
        "default": "128x1/4096",
        "help": f"sequences as COUNTxQ_LEN/KV_LEN, several with commas; {DEFAULT}",
    },
    "page_size": {"type": whole(1, 2**16), "default": 128, "help": DEFAULT},
    "pages": {"choices": PAGES, "default": "shuffled", "help": f"of a sequence; {DEFAULT}"},
    "share_lanes": {
        "action": "store_true",
        "help": "K and V share the lanes of the cache; with head_dim 64",
    },
    "dtype": {"choices": Q_DTYPES, "default": "bfloat16", "help": f"of queries; {DEFAULT}"},
    "kv_dtype": {"choices": KV_DTYPES, "default": "bfloat16", "help": f"of the cache; {DEFAULT}"},
    "arg": {
        "type": in_words(parse_argument),
        "action": "append",
        "metavar": "ARRAY",
        "help": "an argument of your own function, which then may have any signature: DTYPE[SIZES] "
        "or DTYPE[SIZES]=VALUES, like 'f32[64,128]' or 'i32[2]=5,7'; once for each, in order",
    },
    "option": {
        "type": in_words(parse_option),
        "action": "append",
        "default": [],
        "metavar": "NAME=VALUE",
        "help": "a keyword argument of the kernel, like sliding_window=1024, update_kv_cache=false "
        "or 'attention_sink=f32[32]=ones'; may be given several times",
    },
    "pallas_call": {
        "default": "",
        "metavar": "PATTERN",
        "help": "with --arg: finds one of several Pallas kernels of the function by its name",
    },
    "picture": {"type": picture_file, "metavar": "FILE.png", "help": "also draw it"},
    "json": {"action": "store_true", "help": "print one JSON object and nothing else"},
    "workers": {"type": whole(1, 256), "default": 2, "help": DEFAULT},
}
"""What `argparse` is told of each, unless an experiment wants it otherwise."""

SEVERAL_CHIPS = {"action": "append", "help": "may be given several times; default: all"}


def kernel_of(names):
    """What `argparse` makes of a kernel: one of these names, or one's own, "file.py:function".

    >>> kernel_of(["rpa", "v3"])("my_rpa.py:ragged_attention")
    'my_rpa.py:ragged_attention'
    """

    def parse(text):
        if text in names or is_own(text):
            return text
        raise argparse.ArgumentTypeError(
            f"{text!r} is no kernel: expected {', '.join(names)}, or your own as file.py:function"
        )

    return parse


def add_options(parser, *names, **changes):
    """Add options to a parser.

    Args:
        parser: an `argparse.ArgumentParser`.
        *names: of COMMON, in the order in which the help shows them.
        **changes: {name: what is different here}.

    >>> import argparse
    >>> parser = argparse.ArgumentParser()
    >>> add_options(parser, "chip", "page_size", chip={"required": True})
    >>> parser.parse_args(["--chip", "v5e"])
    Namespace(chip='v5e', page_size=128)
    """
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", **(COMMON[name] | changes.get(name, {})))
