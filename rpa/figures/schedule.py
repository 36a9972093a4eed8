"""The picture of a kernel's machine schedule: which unit is busy in which cycle of a loop."""

import numpy as np

from rpa.figures.style import COLORS, alt, new_figure, style
from rpa.lab.schedule.loop_tree import bound, shares

ROWS = {
    "MATMUL": ("MXU: rows through", "blue"),
    "MATPUSH": ("MXU: weights in", "sky"),
    "XLU": ("XLU: across lanes", "purple"),
    "VALU": ("VALU: arithmetic", "orange"),
    "EUP": ("EUP: exp, 1/x", "black"),
    "load": ("loads from VMEM", "green"),
    "fill": ("of these, fills", "red"),
    "store": ("stores to VMEM", "green"),
    "spill": ("of these, spills", "red"),
    "SALU": ("scalar unit", "grey"),
}
"""Units from top to bottom: what is written beside the row, and its colour."""

COLUMNS = 480
"""Most columns of the picture: where a loop is longer, a column is the mean of some bundles."""

ROW_INCHES, WIDTH_INCHES = 0.42, 9.5


def occupancy(schedule, span, title="Which unit is busy when"):
    """Draw the share of its slots that each unit uses, over the bundles of a loop or region.

    Args:
        schedule: a `rpa.lab.schedule.Schedule`.
        span: one of its loops or regions (`schedule.loops.walk()`).
        title: over the picture.

    Returns:
        A `Picture`. A full row is a unit that has work in every cycle; gaps in all rows at once
        are cycles in which everything waits for a result: latency.
    """
    capacity = schedule.capacity
    units = [unit for unit in ROWS if unit in capacity]
    busy = _busy(schedule, span, units)
    slots = schedule.slots(schedule.once(span))
    share = shares(slots, capacity, span.num_bundles)
    with style():
        fig = new_figure(WIDTH_INCHES, 1.3 + ROW_INCHES * len(units))
        axes = fig.subplots()
        for row, unit in enumerate(units):
            _draw_row(axes, row, ROWS[unit], busy[unit], span.num_bundles, share[unit])
        axes.set_ylim(len(units) - 0.1, -0.1)
        axes.set_yticks(np.arange(len(units)) + 0.5, [ROWS[unit][0] for unit in units])
        axes.set_xlim(0, span.num_bundles)
        axes.set_xlabel("bundle: one per cycle")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_title(f"{title}: {span.num_bundles:,} bundles, bound by {bound(share)}")
    return alt(fig, _in_words(span, share, units))


def _busy(schedule, span, units):
    """Mean share of its slots that each unit uses, by column of the picture."""
    listing = schedule.listing
    used = listing.slot_matrix[span.start : span.end] / np.array(listing.capacity)
    columns = min(COLUMNS, len(used))
    edges = np.linspace(0, len(used), columns + 1).astype(int)
    means = np.add.reduceat(used, edges[:-1], axis=0) / np.diff(edges)[:, None]
    names = list(schedule.capacity)
    return {unit: means[:, names.index(unit)] for unit in units}


def _draw_row(axes, row, label_and_color, busy, num_bundles, share):
    """One unit: a baseline, its occupancy above, and the share of the whole at the right."""
    edges = np.linspace(0, num_bundles, len(busy) + 1)
    base = row + 0.92
    axes.stairs(
        base - 0.84 * busy, edges, baseline=base, fill=True, color=COLORS[label_and_color[1]]
    )
    axes.plot([0, num_bundles], [base, base], color="#333333", linewidth=0.6)
    axes.annotate(
        f"{share:.0%}", (1.01, row + 0.5), xycoords=axes.get_yaxis_transform(), va="center"
    )


def _in_words(span, share, units):
    told = ", ".join(f"{unit} {share[unit]:.0%}" for unit in units)
    return (
        f"Occupancy of each unit over the {span.num_bundles:,} bundles of one loop. Share of its "
        f"slots that each uses: {told}. Bound by {bound(share)}."
    )
