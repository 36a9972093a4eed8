"""Runs under the roofline of one chip: how near each comes to the best for its intensity."""

import numpy as np

from rpa.chips import attainable_flops_per_s, chip, mxu_fill
from rpa.figures.chips import label_roofline
from rpa.figures.style import COLORS, CYCLE, alt, new_figure, style

MARKERS = "osD^vPX*"
"""Shapes, so that nobody has to tell colours apart."""


def under_roof(chip_or_name, runs, *, head_dim=128, dtype="bfloat16", title=None):
    """Draw runs as points under the roofline of a chip.

    Args:
        chip_or_name: a `Chip` or its name.
        runs: {name: run} from first to last; a run has `flops`, `hbm_bytes` (moved) and `time_us`:
            a `rpa.lab.predict.Prediction`, or a `rpa.lab.predict.roofline.Point`.
        head_dim: of the heads; where they fill only a part of the MXU, the flat roof that attention
            can reach is drawn as well, dashed.
        dtype: of queries.
        title: what stands above the picture.

    Returns:
        A `Picture`.

    Raises:
        ValueError: for no runs, or more than there are shapes.

    Two kernels that decode the same batch, one in twice the time:

    >>> from rpa.lab.predict.roofline import Point
    >>> slow, fast = (Point(flops=4e9, hbm_bytes=1e9, time_us=us) for us in (2700, 1350))
    >>> picture = under_roof("v5e", {"rung 5": slow, "rung 8": fast})
    >>> picture.text[-69:]
    'of the roof. rung 8: 4.0 FLOP a byte, 2.96 TFLOP/s, 90 % of the roof.'
    """
    if not 1 <= len(runs) <= len(MARKERS):
        raise ValueError(f"runs has {len(runs)} entries; expected 1 to {len(MARKERS)}.")
    c = chip(chip_or_name)
    placed = {name: _place(c, run, head_dim, dtype) for name, run in runs.items()}
    with style():
        fig = new_figure(8.0, 5.4)
        axes = fig.subplots()
        _draw_roofs(axes, c, head_dim, dtype, placed)
        for (name, (x, y, part)), marker, color in zip(
            placed.items(), MARKERS, [*CYCLE, COLORS["grey"]], strict=False
        ):
            label = f"{name}: {y / 1e12:,.3g} TFLOP/s, {_percent(part)} of the roof"
            axes.plot([x], [y / 1e12], marker, color=color, markersize=9, label=label,
                      markeredgecolor="black", linestyle="none")  # fmt: skip
        label_roofline(axes, dtype)
        axes.get_legend().remove()
        axes.set_title(title or f"Under the roof of one TensorCore of {c.name}")
        fig.legend(loc="outside lower left", ncols=1 if len(runs) < 4 else 2)
    return alt(fig, _in_words(c, placed))


def _place(c, run, head_dim, dtype):
    """Intensity, FLOP/s, and the part of the roof at that intensity that they are."""
    intensity, flops_per_s = run.flops / run.hbm_bytes, run.flops / run.time_us * 1e6
    return intensity, flops_per_s, flops_per_s / _roof(c, intensity, head_dim, dtype)


def _roof(c, intensity, head_dim, dtype):
    return np.minimum(
        attainable_flops_per_s(c, intensity, dtype), mxu_fill(c, head_dim) * c.peak(dtype)
    )


def _draw_roofs(axes, c, head_dim, dtype, placed):
    reached = [x for x, _, _ in placed.values()]
    intensities = np.geomspace(min(1.0, *reached) / 2, max(2e3, *reached) * 2, 400)
    peak = attainable_flops_per_s(c, intensities, dtype) / 1e12
    axes.plot(intensities, peak, color=COLORS["black"], label=f"roof of {c.name}")
    fill = mxu_fill(c, head_dim)
    if fill < 1:
        roof = _roof(c, intensities, head_dim, dtype) / 1e12
        lower = roof < peak
        axes.plot(intensities[lower], roof[lower], color=COLORS["black"], linestyle="--",
                  label=f"heads of {head_dim} fill {_percent(fill)} of the MXU")  # fmt: skip


def _percent(part):
    return f"{part:.0%}".replace("%", " %")


def _in_words(c, placed):
    words = [
        f"The roofline of one TensorCore of {c.name} on logarithmic axes: attainable TFLOP/s over "
        "FLOP per byte of HBM. Under it a point for each run."
    ]
    words += [
        f"{name}: {x:,.1f} FLOP a byte, {y / 1e12:,.3g} TFLOP/s, {_percent(part)} of the roof."
        for name, (x, y, part) in placed.items()
    ]
    return " ".join(words)
