"""Options that several experiments have, in one place, so that they are spelled alike."""

import argparse

from rpa import chips
from rpa.lab.batches import PAGES, parse_batch
from rpa.lab.compile.functions import is_own
from rpa.shapes import MODELS

DEFAULT = "default: %(default)s"

COMMON = {
    "chip": {"choices": list(chips.CHIPS), "help": DEFAULT},
    "model": {"choices": list(MODELS), "default": "llama-3-8b", "help": DEFAULT},
    "batch": {
        "type": parse_batch,
        "default": "128x1/4096",
        "help": f"sequences as COUNTxQ_LEN/KV_LEN, several with commas; {DEFAULT}",
    },
    "page_size": {"type": int, "default": 128, "help": DEFAULT},
    "pages": {"choices": PAGES, "default": "shuffled", "help": f"of a sequence; {DEFAULT}"},
    "share_lanes": {
        "action": "store_true",
        "help": "K and V share the lanes of the cache; with head_dim 64",
    },
    "dtype": {"default": "bfloat16", "help": f"of queries; {DEFAULT}"},
    "kv_dtype": {"default": "bfloat16", "help": f"of the cache; {DEFAULT}"},
    "picture": {"metavar": "FILE.png", "help": "also draw it"},
    "json": {"action": "store_true", "help": "print JSON"},
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
