"""`python -m rpa lab predict`: how long a batch takes on a chip that is not here."""

import argparse
import dataclasses
import json

import jax
import numpy as np
from tqdm import tqdm

from rpa.cli.call import is_call, require_own, values_of
from rpa.cli.options import add_options, chip_to_execute, kernel_of, real
from rpa.cli.spinner import waiting
from rpa.lab.batches import lengths_of, make_batch
from rpa.lab.bench import measured, published
from rpa.lab.bench.timed_runs import CHIP, timed_runs
from rpa.lab.peers import PeerAbsent, absence
from rpa.lab.predict.batch import Prediction, predict_batch, predict_call
from rpa.lab.predict.calibration import Fit, fit, rms, times_of
from rpa.lab.schedule.cases import KERNELS, label
from rpa.lab.schedule.execution import CHIPS


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    executed = {"default": "v5e", "choices": None, "type": chip_to_execute()}
    add_options(parser, "chip", chip=executed | {"metavar": ",".join(CHIPS)})
    parser.add_argument(
        "--kernel",
        type=kernel_of(KERNELS),
        metavar=f"{','.join(KERNELS)},FILE.py:FUNCTION",
        default="rpa",
        help="your own with the ladder's signature, or with --arg; default: rpa",
    )
    add_options(parser, "arg", "option", "pallas_call")
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
    parser.add_argument(
        "--measured",
        metavar="FILE",
        help="compare with what `rpa bench --out FILE` measured on a TPU, and fit again with it",
    )


def main(args) -> int:
    """Run the experiment and return its exit code.

    Raises:
        NoSchedule, CannotRun, PeerAbsent: in words.
    """
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    if args.measured:
        return _measured(args)
    if args.calibrate or args.published:
        return _calibrate(args) if args.calibrate else _published(args)
    return _predict(args)


def _predict(args) -> int:
    with waiting(f"{args.kernel} for {args.chip}: compiling, executing the schedule"):
        prediction = _of_call(args) if is_call(args) else _of_batch(args)
    print(json.dumps(to_json(prediction)) if args.json else describe(prediction))
    return 0


def _of_call(args) -> Prediction:
    require_own(args)
    return predict_call(
        *(args.chip, args.kernel, *values_of(args)),
        kwargs=dict(args.option),
        kernel=args.pallas_call,
        **_assumptions(args),
    )


def _of_batch(args) -> Prediction:
    return predict_batch(
        *(args.kernel, args.chip),
        make_batch(lengths_of(args.batch), args.page_size, args.pages),
        model=args.model,
        page_size=args.page_size,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        options=dict(args.option),
        **_assumptions(args),
    )


def _calibrate(args) -> int:
    sources = [each.source for each in timed_runs()]
    bar = tqdm(timed_runs(), leave=False, disable=None)
    predicted_us = np.stack([times_of([each.run], CHIP) for each in bar], axis=1)
    found = fit(predicted_us, [each.time_us for each in timed_runs()], sources)
    print(json.dumps(fit_to_json(found)) if args.json else describe_fit(found, sources))
    return 0


def fit_to_json(found: Fit) -> dict:
    """All of a fit."""
    arrays = ("errors", "left_out", "source_left_out", "covered")
    return {
        "best": dataclasses.asdict(found.best),
        "plausible": [dataclasses.asdict(each) for each in found.plausible],
        **{name: getattr(found, name).tolist() for name in arrays},
    }


def _measured(args) -> int:
    """Each measured time beside its prediction, and what the fit says with them."""
    rows = measured.read(args.measured)
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return 0
    print(measured.table(rows))
    found, sources = measured.refit(rows)
    print(describe_fit(found, sources))
    return 0


def _require_peers():
    reasons = [reason for peer in ("v3", "batched") if (reason := absence(peer)) is not None]
    if reasons:
        raise PeerAbsent("\n".join(reasons))


def describe_fit(found: Fit, sources) -> str:
    """A fit for people: a line per source of timings.

    >>> from rpa.lab.predict.calibration import FITTED
    >>> errors = np.array([[0.1, -0.1], [0.2, 0.0], [0.3, 0.3]])
    >>> print(describe_fit(Fit(FITTED, *errors, (), np.array([True, False])), ["a", "b"]))
    fitted to 2 timings of 2 sources: 1.2 cycles per bundle, 1 us of latency, 1.5 us per kernel,
    HBM read at 95 % of its peak, at 70 % of that with little in flight, written at 20 % of that
    errors, RMS and worst; in the range: of the timings that are left out with their source
      source                     timings      fitted   source left out  in the range
      a                                1  10 %  +10 %     30 %  +30 %         100 %
      b                                1  10 %  -10 %     30 %  +30 %           0 %
      all                              2  10 %  +10 %     30 %  +30 %          50 %
    """
    best, names = found.best, np.array(list(sources))
    lines = [
        f"fitted to {len(names)} timings of {len(set(names))} sources: {best.cycles_per_bundle:g} "
        f"cycles per bundle, {best.latency_us:g} us of latency, {best.launch_us:g} us per kernel,",
        f"HBM read at {best.hbm_efficiency:.0%} of its peak, at {best.few_bytes_part:.0%} of that "
        f"with little in flight, written at {best.write_part:.0%} of that",
        "errors, RMS and worst; in the range: of the timings that are left out with their source",
        f"  {'source':26} {'timings':>7} {'fitted':>11} {'source left out':>17}  in the range",
    ]
    for name in [*dict.fromkeys(sources), "all"]:
        mine = (names == name) | (name == "all")
        ends = [
            f"{rms(errors[mine]):4.0%} {max(errors[mine], key=abs):+5.0%}"
            for errors in (found.errors, found.source_left_out)
        ]
        in_range = f"{found.covered[mine].mean():.0%}"
        lines.append(f"  {name:26} {mine.sum():7} {ends[0]}    {ends[1]} {in_range:>12}")
    return "\n".join(lines).replace("%", " %")


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
    rpa on v5e: at peak 1,000.0 us (predicted, not measured)
      1,000,000 cycles issue, 500,000 wait for copies
      8,190,000 bytes of HBM, 10.0 us at its peak: 1.0 % of the time
      MBU 1.0 % (every array once, without padding), MFU 0.5 % (causal FLOP)
    """
    lines = [] if p.calibrated_us is None else [calibrated(p)]
    used = []
    if p.mbu is not None:
        used.append(
            f"  MBU {p.mbu:.1%} (every array once, without padding), "
            f"MFU {p.mfu:.1%} (causal FLOP)".replace("%", " %")
        )
    return "\n".join(
        [
            f"{label(p.kernel)} on {p.chip}: at peak {p.time_us:,.1f} us (predicted, not measured)",
            *lines,
            f"  {p.bundles:,} cycles issue, {p.stalled_cycles:,.0f} wait for copies",
            f"  {p.hbm_bytes:,} bytes of HBM, {p.hbm_time_us:,.1f} us at its peak: "
            f"{p.efficiency:.1%} of the time".replace("%", " %"),
            *used,
        ]
    )


def calibrated(p: Prediction) -> str:
    """The calibrated time and its range, and what these words mean here."""
    beyond = "" if p.chip == CHIP else "; of a TPU7x, here extrapolated"
    ends = "" if p.low_us is None else f", {p.low_us:,.1f} to {p.high_us:,.1f}"
    return (
        f"  on a chip: {p.calibrated_us:,.1f} us{ends} (nine of ten), "
        f"fitted to {len(timed_runs())} published timings{beyond}"
    )


def ends(p) -> str:
    """The range of a prediction, or of a row that has one.

    >>> ends(Prediction("v3", "v6e", 1, 0.0, 1, 1, 1, 5.0, 4.0, 6.25))
    '4.0 to 6.2'
    """
    return "" if p.low_us is None else f"{p.low_us:,.1f} to {p.high_us:,.1f}"


def table(rows) -> str:
    """Predicted beside published, one line a timing."""
    lines = [
        f"{'source':22} {'kernel':8} {'batch':>11} {'block':>6} {'window':>6} "
        f"{'published us':>12} {'predicted us':>12} {'error':>6} {'on a chip':>10} {'error':>6} "
        f"{'range':>15}"
    ]
    for t, p in rows:
        (blocks,) = t.blocks.values()
        bkv = blocks[2] if t.kernel == "batched" else blocks[1]
        window = t.options.get("sliding_window", "-")
        lines.append(
            f"{t.source:22} {t.kernel:8} {f'{t.num_seqs}x{t.q_len}/{t.kv_len}':>11} {bkv:6} "
            f"{window:>6} {t.time_us:12.1f} {p.time_us:12.1f} {p.time_us / t.time_us - 1:+6.0%} "
            f"{p.calibrated_us:10.1f} {p.calibrated_us / t.time_us - 1:+6.0%} {ends(p):>15}"
        )
    return "\n".join(lines)
