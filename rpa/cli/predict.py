"""`python -m rpa lab predict`: how long a batch takes on a chip that is not here."""

import argparse
import dataclasses
import json

import jax
import numpy as np
from tqdm import tqdm

from rpa.cli.options import add_options, kernel_of, real
from rpa.cli.spinner import waiting
from rpa.lab.batches import lengths_of, make_batch
from rpa.lab.bench import published
from rpa.lab.peers import PeerAbsent, absence
from rpa.lab.predict.batch import Prediction, predict_batch
from rpa.lab.predict.calibration import FITTED, Fit, fit, rms
from rpa.lab.schedule.cases import KERNELS, label


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    add_options(parser, "chip", chip={"default": "v5e"})
    parser.add_argument(
        "--kernel",
        type=kernel_of(KERNELS),
        metavar=f"{','.join(KERNELS)},FILE.py:FUNCTION",
        default="rpa",
        help="default: rpa",
    )
    add_options(parser, "model", "batch", "page_size", "pages", "dtype", "kv_dtype", "json")
    parser.add_argument(
        "--hbm-efficiency",
        type=real(0.01, 1),
        default=1.0,
        help="part of HBM's peak; default: %(default)s",
    )
    parser.add_argument(
        "--latency-us", type=real(0, 1e6), default=0.0, help="of a copy; default: %(default)s"
    )
    parser.add_argument(
        "--published", action="store_true", help="compare with published timings of the peers"
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="repeat the fit to the published timings"
    )


def main(args) -> int:
    """Run the experiment and return its exit code.

    Raises:
        NoSchedule, CannotRun, PeerAbsent: in words.
    """
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    if args.calibrate or args.published:
        return _calibrate(args) if args.calibrate else _published(args)
    return _predict(args)


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


def _calibrate(args) -> int:
    _require_peers()
    bar = tqdm(published.refit(), total=len(published.TIMINGS), leave=False, disable=None)
    predicted_us = np.stack(list(bar), axis=1)
    times_us, sources = zip(*((t.time_us, t.source) for t in published.TIMINGS), strict=True)
    found = fit(predicted_us, times_us, sources)
    if args.json:
        told = {"best": dataclasses.asdict(found.best), "errors": found.errors.tolist()}
        told["left_out"] = found.left_out.tolist()
        print(json.dumps(told | {"source_left_out": found.source_left_out.tolist()}))
    else:
        print(describe_fit(found))
    return 0


def _require_peers():
    reasons = [reason for peer in ("v3", "batched") if (reason := absence(peer)) is not None]
    if reasons:
        raise PeerAbsent("\n".join(reasons))


def describe_fit(found: Fit) -> str:
    """A fit for people.

    >>> errors = np.array([[0.1, -0.1], [0.2, 0.0], [0.3, 0.3]])
    >>> print(describe_fit(Fit(FITTED, *errors)))
    fitted to 2 published timings: copies at 95 % of HBM's peak, 1.4 us of latency
      error of each timing:              +10% -10%; RMS 10%
      fitted to the others, of each:     +20%  +0%; RMS 14%
      fitted to the other source alone:  +30% +30%; RMS 30%
    """
    best, n = found.best, len(found.errors)

    def line(what, errors):
        return f"  {what:34} {' '.join(f'{e:+4.0%}' for e in errors)}; RMS {rms(errors):.0%}"

    head = f"{best.hbm_efficiency:.0%}".replace("%", " %")
    return "\n".join(
        [
            f"fitted to {n} published timings: copies at {head} of HBM's peak, "
            f"{best.latency_us:g} us of latency",
            line("error of each timing:", found.errors),
            line("fitted to the others, of each:", found.left_out),
            line("fitted to the other source alone:", found.source_left_out),
        ]
    )


def _published(args) -> int:
    _require_peers()
    rows = []
    with tqdm(total=len(published.TIMINGS), leave=False, disable=None) as bar:
        for row in published.compare(**_assumptions(args)):
            rows.append(row)
            bar.update()
    if args.json:
        found = [dataclasses.asdict(t) | {"predicted": to_json(p)} for t, p in rows]
        print(json.dumps({"timings": found}))
    else:
        print(table(rows))
    return 0


def _assumptions(args) -> dict:
    return {"hbm_efficiency": args.hbm_efficiency, "latency_us": args.latency_us}


def to_json(prediction: Prediction) -> dict:
    """All numbers of a prediction."""
    derived = ("time_us", "hbm_time_us", "efficiency", "calibrated_efficiency", "mbu", "mfu")
    return dataclasses.asdict(prediction) | {name: getattr(prediction, name) for name in derived}


def describe(p: Prediction) -> str:
    """A prediction for people.

    >>> print(describe(Prediction("rpa", "v5e", 1_000_000, 500_000, 8_190_000, 8_000_000, 10**9)))
    rpa on v5e: 1,000.0 us (predicted, not measured)
      1,000,000 cycles issue, 500,000 wait for copies
      8,190,000 bytes of HBM, 10.0 us at its peak: 1.0 % of the time
      MBU 1.0 % (every array once, without padding), MFU 0.5 % (causal FLOP)
    """
    lines = [] if p.calibrated_us is None else [calibrated(p)]
    return "\n".join(
        [
            f"{label(p.kernel)} on {p.chip}: {p.time_us:,.1f} us (predicted, not measured)",
            f"  {p.bundles:,} cycles issue, {p.stalled_cycles:,.0f} wait for copies",
            f"  {p.hbm_bytes:,} bytes of HBM, {p.hbm_time_us:,.1f} us at its peak: "
            f"{p.efficiency:.1%} of the time".replace("%", " %"),
            f"  MBU {p.mbu:.1%} (every array once, without padding), "
            f"MFU {p.mfu:.1%} (causal FLOP)".replace("%", " %"),
            *lines,
        ]
    )


def calibrated(p: Prediction) -> str:
    """The calibrated time, and what that word means here."""
    beyond = "" if p.chip == "tpu7x" else "; of a TPU7x, here extrapolated"
    return (
        f"  calibrated: {p.calibrated_us:,.1f} us with copies at {FITTED.hbm_efficiency:.0%} of "
        f"HBM's peak and {FITTED.latency_us:g} us of latency, fitted to "
        f"{len(published.TIMINGS)} published timings{beyond}"
    ).replace("%", " %")


def table(rows) -> str:
    """Predicted beside published, one line a timing."""
    lines = [
        f"{'source':22} {'kernel':8} {'batch':>11} {'block':>6} {'window':>6} "
        f"{'published us':>12} {'predicted us':>12} {'error':>6} {'calibrated':>10} {'error':>6}"
    ]
    for t, p in rows:
        (blocks,) = t.blocks.values()
        bkv = blocks[2] if t.kernel == "batched" else blocks[1]
        window = t.options.get("sliding_window", "-")
        lines.append(
            f"{t.source:22} {t.kernel:8} {f'{t.num_seqs}x{t.q_len}/{t.kv_len}':>11} {bkv:6} "
            f"{window:>6} {t.time_us:12.1f} {p.time_us:12.1f} {p.time_us / t.time_us - 1:+6.0%} "
            f"{p.calibrated_us:10.1f} {p.calibrated_us / t.time_us - 1:+6.0%}"
        )
    return "\n".join(lines)
