"""`python -m rpa bench`: the ladder and its peers, timed on the device of this machine."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import jax
from tqdm import tqdm

from rpa import chips
from rpa.cli.options import add_options, whole
from rpa.cli.predict import ends
from rpa.lab.bench import on_device
from rpa.lab.bench.measured import SCHEMA
from rpa.lab.compile.compiler import compile_versions
from rpa.ladder import LADDER

OPTIONS = ("model", "dtype", "kv_dtype", "page_size", "num_seqs", "kv_len")

CONVENTION = (
    "Time of one call of one layer's attention: median, and the middle half of the samples.\n"
    "MBU: least HBM bytes (every array once, no padding) over peak bandwidth x time.\n"
    "MFU: causal FLOP of both products over peak FLOP/s of the queries' dtype x time. "
    "Both per TensorCore."
)

PREDICTION = (
    "Predicted, us: from the compiled schedule and its copies at peak, nothing fitted. On a chip:\n"
    "with five numbers fitted to published timings of a TPU7x, and the range of nine in ten."
)


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the bench."""
    for name in OPTIONS:
        defaults = on_device.DEFAULTS.items()
        each = ", ".join(f"{getattr(w, name)} on a {where}" for where, w in defaults)
        changed = {"default": None, "help": f"default: {each}"}
        if name in ("num_seqs", "kv_len"):
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, type=whole(1, 2**20), **changed)
        else:
            add_options(parser, name, **{name: changed})
    parser.add_argument("--case", choices=on_device.CASES, action="append", help="default: all")
    parser.add_argument("--peer", choices=list(on_device.PEERS), action="append", default=[])
    parser.add_argument(
        "--no-prediction", action="store_true", help="on a TPU, do not predict the same batches"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write all of it as JSON; on a TPU by default, to rpa-bench-CHIP.json",
    )
    add_options(parser, "json")


def main(args) -> int:
    """Run the bench and return its exit code."""
    device = jax.devices()[0]
    default = on_device.DEFAULTS["tpu" if device.platform == "tpu" else "cpu"]
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    workload = dataclasses.replace(default, **given)
    cases = args.case or on_device.CASES
    on_device.check_cases(workload, cases)
    kernels = len(LADDER) + sum(len(on_device.PEERS[package]) for package in args.peer)
    rows = []
    with tqdm(total=len(cases) * kernels, leave=False) as bar:
        for row in on_device.bench(workload, cases, args.peer, not args.no_prediction):
            rows.append(row)
            bar.set_description_str(f"{row.case}, {row.kernel}")
            bar.update()
    if args.json:
        print(json.dumps(as_json(workload, rows), indent=2))
    else:
        print(f"{machine()['device']}, jax {jax.__version__}. {in_words(workload)}")
        print(CONVENTION)
        print(PREDICTION if chips.current() else on_device.NO_PREDICTION)
        print(table(rows))
    chip = chips.current()
    out = args.out or (f"rpa-bench-{chip.name}.json" if chip else None)
    if out is not None:
        Path(out).write_text(json.dumps(as_json(workload, rows), indent=2) + "\n", "utf-8")
        if not args.json:
            print(f"written to {out}; to send it in: .github/ISSUE_TEMPLATE/tpu-timings.md")
    return 0


def machine() -> dict:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    chip = chips.current()
    name = device.device_kind if chip else f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    return {"device": name, "chip": chip.name if chip else None, "jax": jax.__version__}


def as_json(workload, rows) -> dict:
    """All that was measured, as one object; times in seconds."""
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "versions": compile_versions() | {"tpu-inference": version_of("tpu-inference")},
        "workload": dataclasses.asdict(workload),
        "convention": CONVENTION,
        "prediction": PREDICTION if chips.current() else on_device.NO_PREDICTION,
        "rows": [row_as_json(workload, row) for row in rows],
    }


def row_as_json(workload, row) -> dict:
    """A row and what was timed; blocks are the kernel's own, of which nothing was passed."""
    return dataclasses.asdict(row) | {
        "lab_kernel": on_device.PREDICTED.get(row.kernel),
        "lengths": on_device.batch_lengths(row.case, workload),
        "blocks": "own",
    }


def version_of(package) -> str | None:
    """The installed version of a package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def in_words(w) -> str:
    """The workload in a sentence."""
    heads = "{} q heads, {} kv heads of {}".format(*w.heads)
    return (
        f"{w.model} ({heads}), queries {w.dtype}, cache {w.kv_dtype}, pages of {w.page_size}; "
        f"{w.num_seqs} sequences of {w.kv_len} tokens."
    )


def table(rows) -> str:
    """A line for each case and kernel, for people.

    >>> absent = on_device.Row("decode", "rung 4 tiled", note="not here")
    >>> print(table([absent]))  # doctest: +NORMALIZE_WHITESPACE
    case     kernel       time us  middle half of samples   MBU   MFU  predicted on a chip range
    decode   rung 4 tiled       -                                                 not here
    """
    lines = [
        f"{'case':8} {'kernel':16} {'time us':>10}  {'middle half of samples':22} {'MBU':>5} "
        f"{'MFU':>5} {'predicted':>10} {'on a chip':>10} {'range':>19}"
    ]
    for row in rows:
        t = row.timing
        time_us = "-" if t is None else f"{t.median_s * 1e6:,.1f}"
        half = "" if t is None else f"{t.low_s * 1e6:,.1f} to {t.high_s * 1e6:,.1f}"
        lines.append(
            f"{row.case:8} {row.kernel:16} {time_us:>10}  {half:22} {percent(row.mbu):>5} "
            f"{percent(row.mfu):>5} {microseconds(row.predicted_us):>10} "
            f"{microseconds(row.calibrated_us):>10} {ends(row):>19}  {row.note}".rstrip()
        )
    return "\n".join(lines)


def microseconds(time_us) -> str:
    """A time for people, nothing where there is none.

    >>> microseconds(1234.56), microseconds(None)
    ('1,234.6', '')
    """
    return "" if time_us is None else f"{time_us:,.1f}"


def percent(part) -> str:
    """A utilisation for people, nothing where there is none.

    >>> percent(0.857), percent(None)
    ('86 %', '')
    """
    return "" if part is None else f"{part:.0%}".replace("%", " %")
