"""`python -m rpa lab traffic`: the HBM bytes that a rung moves, from a terminal."""

import argparse

from rpa import chips
from rpa.cli.call import is_call, mistakes_in_words, require_own, values_of
from rpa.cli.options import add_options, kernel_of
from rpa.cli.spinner import waiting
from rpa.lab.batches import lengths_of, make_batch
from rpa.lab.compile.functions import load
from rpa.lab.copies.call_traffic import count_call
from rpa.lab.copies.traffic import RUNGS, count
from rpa.shapes import AttentionShape


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    parser.add_argument(
        "--kernel",
        type=kernel_of(RUNGS),
        metavar=f"{','.join(RUNGS)},FILE.py:FUNCTION",
        default="kernel",
        help="a rung, a peer, or your own: with the ladder's signature, or with --arg; "
        "default: %(default)s",
    )
    add_options(parser, "arg", "option")
    names = ("model", "batch", "page_size", "pages", "share_lanes", "dtype", "kv_dtype")
    add_options(parser, *names, "chip", "json", chip={"help": "whose HBM time to say too"})


def main(args) -> int:
    """Run the experiment and return its exit code.

    Raises:
        ValueError: the rung cannot take the batch.
        PeerAbsent: in words.
    """
    traffic = _of_call(args) if is_call(args) else _of_batch(args)
    if args.json:
        print(traffic.to_json())
        return 0
    print(traffic.table())
    if args.chip:
        seconds = traffic.num_bytes / chips.chip(args.chip).hbm_bytes_per_s
        print(f"at the peak bandwidth of {args.chip}: {seconds * 1e6:,.1f} us (predicted)")
    return 0


def _of_call(args):
    require_own(args)
    with mistakes_in_words(args.kernel), waiting(f"running the transfers of {args.kernel}"):
        return count_call(load(args.kernel), *values_of(args), **dict(args.option))


def _of_batch(args):
    layer = AttentionShape.of(
        args.model,
        page_size=args.page_size,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        share_lanes=args.share_lanes,
    )
    options = dict(args.option)
    if args.kernel in ("kernel", "v3") and args.chip:
        options["chip"] = args.chip
    with mistakes_in_words(args.kernel), waiting(f"running the transfers of {args.kernel}"):
        batch = make_batch(lengths_of(args.batch), args.page_size, args.pages)
        try:
            return count(args.kernel, batch, layer, **options)
        except ValueError as error:
            raise ValueError(f"{args.kernel}: not applicable: {error}") from None
