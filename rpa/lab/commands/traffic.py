"""`python -m rpa lab traffic`: the HBM bytes that a rung moves, from a terminal."""

import argparse
import re

import numpy as np

from rpa import chips
from rpa.lab.peers import PeerAbsent
from rpa.lab.programs import MODELS
from rpa.lab.traffic import RUNGS, Layer, count
from rpa.lab.waiting import waiting
from rpa.paging import cdiv
from rpa.ragged import RaggedBatch

LENGTHS = re.compile(r"(\d+)x(\d+)/(\d+)")


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    parser.add_argument("--kernel", choices=list(RUNGS), default="kernel", help="a rung, or a peer")
    parser.add_argument("--model", choices=list(MODELS), default="llama-3-8b")
    parser.add_argument(
        "--batch",
        type=parse_batch,
        default="128x1/4096",
        help="sequences as COUNTxQ_LEN/KV_LEN, several with commas; default: %(default)s",
    )
    parser.add_argument("--page-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="of queries; default: %(default)s")
    parser.add_argument("--kv-dtype", default="bfloat16", help="of the cache; default: %(default)s")
    parser.add_argument("--chip", choices=list(chips.CHIPS), help="whose HBM time to say too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args) -> int:
    """Run the experiment; the exit code is 1 if the rung cannot take the batch."""
    layer = Layer.of(args.model, page_size=args.page_size, dtype=args.dtype, kv_dtype=args.kv_dtype)
    options = {"chip": args.chip} if args.kernel in ("kernel", "v3") and args.chip else {}
    try:
        with waiting(f"running the transfers of {args.kernel}"):
            traffic = count(args.kernel, make_batch(args.batch, args.page_size), layer, **options)
    except (ValueError, PeerAbsent) as error:
        print(f"{args.kernel}: not applicable: {error}")
        return 1
    if args.json:
        print(traffic.to_json())
        return 0
    print(traffic.table())
    if args.chip:
        seconds = traffic.num_bytes / chips.chip(args.chip).hbm_bytes_per_s
        print(f"at the peak bandwidth of {args.chip}: {seconds * 1e6:,.1f} us (predicted)")
    return 0


def parse_batch(text):
    """The lengths in an argument: [(count, q_len, kv_len), ...].

    >>> parse_batch("128x1/4096,1x512/2048")
    [(128, 1, 4096), (1, 512, 2048)]
    """
    groups = []
    for part in text.split(","):
        match = LENGTHS.fullmatch(part.strip())
        if match is None or int(match[2]) > int(match[3]):
            raise argparse.ArgumentTypeError(
                f"{part!r} is no COUNTxQ_LEN/KV_LEN with Q_LEN at most KV_LEN, like 128x1/4096"
            )
        groups.append(tuple(map(int, match.groups())))
    return groups


def make_batch(groups, page_size) -> RaggedBatch:
    """A batch of such lengths, its pages in order.

    >>> make_batch([(2, 1, 40)], 16).page_indices.tolist()
    [0, 1, 2, 3, 4, 5]
    """
    q_lens = [q_len for number, q_len, _ in groups for _ in range(number)]
    kv_lens = [kv_len for number, _, kv_len in groups for _ in range(number)]
    ends = np.cumsum([cdiv(kv_len, page_size) for kv_len in kv_lens])
    starts = [0, *ends[:-1]]
    pages = [list(range(start, end)) for start, end in zip(starts, ends, strict=True)]
    batch, _ = RaggedBatch.from_lengths(q_lens, kv_lens, pages)
    return batch
