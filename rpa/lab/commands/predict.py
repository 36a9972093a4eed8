"""`python -m rpa lab predict`: how long a batch takes on a chip that is not here."""

import argparse
import dataclasses
import json
import sys

import jax
from tqdm import tqdm

from rpa.lab import published
from rpa.lab.batches import lengths_of, make_batch
from rpa.lab.commands.options import add_options
from rpa.lab.peers import absence
from rpa.lab.predict import Prediction, predict_batch
from rpa.lab.schedule import NoSchedule
from rpa.lab.schedule_cases import KERNELS
from rpa.lab.schedule_run import CannotRun
from rpa.lab.waiting import waiting


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    add_options(parser, "chip", chip={"default": "v5e"})
    parser.add_argument("--kernel", choices=list(KERNELS), default="rpa", help="default: rpa")
    add_options(parser, "model", "batch", "page_size", "pages", "dtype", "kv_dtype", "json")
    parser.add_argument(
        "--hbm-efficiency", type=float, default=1.0, help="part of HBM's peak; default: %(default)s"
    )
    parser.add_argument(
        "--latency-us", type=float, default=0.0, help="of a copy; default: %(default)s"
    )
    parser.add_argument(
        "--published", action="store_true", help="compare with published timings of the peers"
    )


def main(args) -> int:
    """Run the experiment; the exit code is 1 if there is no prediction."""
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    try:
        return _published(args) if args.published else _predict(args)
    except (NoSchedule, CannotRun) as error:
        print(error, file=sys.stderr)
        return 1


def _predict(args) -> int:
    with waiting(f"{args.kernel} for {args.chip}: compiling, executing the schedule"):
        prediction = predict_batch(
            *(args.kernel, args.chip),
            make_batch(lengths_of(args.batch), args.page_size, args.pages),
            model=args.model,
            page_size=args.page_size,
            dtype=args.dtype,
            kv_dtype=args.kv_dtype,
            **_assumptions(args),
        )
    print(json.dumps(to_json(prediction)) if args.json else describe(prediction))
    return 0


def _published(args) -> int:
    for peer in ("v3", "batched"):
        if (reason := absence(peer)) is not None:
            print(reason, file=sys.stderr)
            return 1
    rows = []
    with tqdm(total=len(published.TIMINGS), leave=False, disable=None) as bar:
        for row in published.compare(**_assumptions(args)):
            rows.append(row)
            bar.update()
    if args.json:
        found = [dataclasses.asdict(t) | {"predicted": to_json(p)} for t, p in rows]
        print(json.dumps(found))
    else:
        print(table(rows))
    return 0


def _assumptions(args) -> dict:
    return {"hbm_efficiency": args.hbm_efficiency, "latency_us": args.latency_us}


def to_json(prediction: Prediction) -> dict:
    """All numbers of a prediction."""
    derived = ("time_us", "hbm_time_us", "efficiency", "mbu", "mfu")
    return dataclasses.asdict(prediction) | {name: getattr(prediction, name) for name in derived}


def describe(p: Prediction) -> str:
    """A prediction for people.

    >>> print(describe(Prediction("rpa", "v5e", 1_000_000, 500_000, 8_190_000, 8_000_000, 10**9)))
    rpa on v5e: 1,000.0 us (predicted, not measured)
      1,000,000 cycles issue, 500,000 wait for copies
      8,190,000 bytes of HBM, 10.0 us at its peak: 1.0 % of the time
      MBU 1.0 % (every array once, without padding), MFU 0.5 % (causal FLOP)
    """
    return "\n".join(
        [
            f"{p.kernel} on {p.chip}: {p.time_us:,.1f} us (predicted, not measured)",
            f"  {p.bundles:,} cycles issue, {p.stalled_cycles:,.0f} wait for copies",
            f"  {p.hbm_bytes:,} bytes of HBM, {p.hbm_time_us:,.1f} us at its peak: "
            f"{p.efficiency:.1%} of the time".replace("%", " %"),
            f"  MBU {p.mbu:.1%} (every array once, without padding), "
            f"MFU {p.mfu:.1%} (causal FLOP)".replace("%", " %"),
        ]
    )


def table(rows) -> str:
    """Predicted beside published, one line a timing."""
    lines = [
        f"{'source':22} {'kernel':8} {'batch':>11} {'block':>6} {'window':>6} "
        f"{'published us':>12} {'predicted us':>12} {'error':>6}"
    ]
    for t, p in rows:
        (blocks,) = t.blocks.values()
        bkv = blocks[2] if t.kernel == "batched" else blocks[1]
        window = t.options.get("sliding_window", "-")
        lines.append(
            f"{t.source:22} {t.kernel:8} {f'{t.num_seqs}x{t.q_len}/{t.kv_len}':>11} {bkv:6} "
            f"{window:>6} {t.time_us:12.1f} {p.time_us:12.1f} {p.time_us / t.time_us - 1:+6.0%}"
        )
    return "\n".join(lines)
