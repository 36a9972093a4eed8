"""Where the bytes go: what kernels move, kind by kind, beside the least that they could."""

import numpy as np
from matplotlib.patches import Patch

from rpa.figures.style import COLORS, alt, new_figure, style
from rpa.lab.copies.traffic import KINDS

KIND_COLORS = ("blue", "sky", "purple", "orange", "yellow", "green", "grey", "light")
"""A colour for each of `rpa.lab.copies.traffic.KINDS`."""

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def where_bytes_go(traffic, *, title="Where the bytes go"):
    """Draw the HBM bytes of one or several kernels as stacked bars, a black line at the least.

    Args:
        traffic: {name: `rpa.lab.copies.traffic.Traffic`}, from top to bottom.
        title: what stands above the picture.

    Returns:
        A `Picture`.

    Raises:
        ValueError: if there is nothing to draw.

    >>> where_bytes_go({})
    Traceback (most recent call last):
        ...
    ValueError: traffic is empty: give {name: rpa.lab.copies.traffic.count(...)}.
    """
    if not traffic:
        raise ValueError("traffic is empty: give {name: rpa.lab.copies.traffic.count(...)}.")
    most = max(t.num_bytes for t in traffic.values())
    unit = [name for name, size in UNITS.items() if size <= most or size == 1][-1]
    with style():
        fig = new_figure(9.0, 1.6 + 0.5 * len(traffic))
        axes = fig.subplots()
        for y, counted in enumerate(traffic.values()):
            _draw_bar(axes, y, counted, UNITS[unit], most)
        axes.set_yticks(range(len(traffic)), traffic)
        axes.set_ylim(len(traffic) - 0.4, -0.6)
        axes.set_xlim(0, 1.3 * most / UNITS[unit])
        axes.set_xlabel(f"HBM bytes of one call ({unit}), counted from the kernels' own transfers")
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
        fig.legend(handles=_legend(traffic.values()), loc="outside lower left", ncols=5)
    return alt(fig, _words(title, traffic))


def _draw_bar(axes, y, counted, unit_bytes, most):
    left = 0.0
    for kind, color in zip(KINDS, KIND_COLORS, strict=True):
        if kind in counted.kinds:
            width = counted.kinds[kind].num_bytes / unit_bytes
            edge = {"edgecolor": "#333333", "linewidth": 0.6}
            axes.barh(y, width, left=left, height=0.62, color=COLORS[color], **edge)
            left += width
    least = counted.least_bytes / unit_bytes
    axes.plot([least, least], [y - 0.42, y + 0.42], color="black", lw=2.5)
    words = f"{counted.num_copies:,} copies, {counted.excess:+.1%}"
    axes.text(left + 0.015 * most / unit_bytes, y, words, va="center", size=10)


def _legend(counted):
    used = {kind for t in counted for kind in t.kinds}
    colors = dict(zip(KINDS, KIND_COLORS, strict=True))
    handles = [
        Patch(facecolor=COLORS[colors[kind]], edgecolor="#333333", label=kind)
        for kind in KINDS
        if kind in used
    ]
    return [*handles, Patch(facecolor="black", label="the least")]


def _words(title, traffic):
    text = f"{title}: stacked bars of the HBM bytes that one call moves, a line at the least."
    for name, counted in traffic.items():
        kinds = sorted(counted.kinds, key=lambda kind: -counted.kinds[kind].num_bytes)[:3]
        shares = np.array([counted.kinds[kind].num_bytes for kind in kinds]) / counted.num_bytes
        parts = ", ".join(f"{k} {s:.1%}" for k, s in zip(kinds, shares, strict=True))
        text += (
            f" {name}: {counted.num_bytes:,} bytes in {counted.num_copies:,} copies, "
            f"{counted.excess:+.1%} of the least; {parts}."
        )
    return text
