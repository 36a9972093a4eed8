"""`python -m rpa lab roofline`: what bounds a batch on each chip, and the least time it takes."""

import argparse
import dataclasses
import json

import jax

from rpa import chips
from rpa.cli.options import SEVERAL_CHIPS, add_options
from rpa.lab.batches import lengths_of
from rpa.lab.predict.roofline import Floor, floors
from rpa.shapes import MODELS


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    names = ("chip", "model", "batch", "dtype", "kv_dtype", "picture", "json")
    add_options(parser, *names, chip=SEVERAL_CHIPS)


def main(args) -> int:
    """Run the experiment and return its exit code."""
    # Nothing here needs a device; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    options = {"model": args.model, "dtype": args.dtype, "kv_dtype": args.kv_dtype}
    names = args.chip or list(chips.CHIPS)
    found = [each for name in names for each in floors(lengths_of(args.batch), name, **options)]
    if args.picture:
        _draw(found, args)
    print(json.dumps({"floors": [to_json(each) for each in found]}) if args.json else table(found))
    return 0


def _draw(found, args):
    # Only who wants a picture waits for Matplotlib.
    from rpa.figures.roofline import under_roof

    name = found[0].chip
    mine = {f"{each.part}, at best": each for each in found if each.chip == name}
    under_roof(name, mine, head_dim=MODELS[args.model][2], dtype=args.dtype).save(args.picture)


def to_json(floor: Floor) -> dict:
    """All numbers of a floor."""
    derived = (
        *("intensity_flops_per_byte", "ridge_flops_per_byte"),
        *("memory_us", "compute_us", "time_us", "bound"),
    )
    return dataclasses.asdict(floor) | {name: getattr(floor, name) for name in derived}


def table(found) -> str:
    """A line for each chip and part, for people.

    >>> print(table(floors([(1, 4096)] * 128, "v6e")))
    chip   part      FLOP/byte  ridge  memory us  compute us   at least  bound by
    v6e    decode          4.0    280    1,311.0        18.7    1,311.0  memory
    (one layer on one TensorCore, predicted: every array once at peak bandwidth; causal FLOP at the
    peak of the part of the MXU that heads of this size fill: v6e 50 %)
    """
    lines = [
        f"{'chip':6} {'part':8} {'FLOP/byte':>10} {'ridge':>6} {'memory us':>10} "
        f"{'compute us':>11} {'at least':>10}  bound by"
    ]
    lines += [
        f"{f.chip:6} {f.part:8} {f.intensity_flops_per_byte:10,.1f} "
        f"{f.ridge_flops_per_byte:6,.0f} {f.memory_us:10,.1f} {f.compute_us:11,.1f} "
        f"{f.time_us:10,.1f}  {f.bound}"
        for f in found
    ]
    fills = dict.fromkeys(f"{f.chip} {f.mxu_fill:.0%}".replace("%", " %") for f in found)
    lines.append(
        "(one layer on one TensorCore, predicted: every array once at peak bandwidth; causal FLOP "
        f"at the\npeak of the part of the MXU that heads of this size fill: {', '.join(fills)})"
    )
    return "\n".join(lines)
