"""Pictures of chapters 9 and 10: units before and after, steps against HBM, banks, a diagonal."""

import numpy as np
from matplotlib.patches import Rectangle

from rpa.figures.schedule import ROWS
from rpa.figures.style import COLORS, alt, new_figure, style

SHOWN = ("MATMUL", "MATPUSH", "XLU", "VALU", "EUP", "load", "store")
"""Units of a panel of `before_after`; fills, spills and the rest are in the chapter's tables."""

ROW_INCHES = 0.29


def before_after(panels):
    """Draw which unit is busy when, of some schedules one above the other, on one scale of bundles.

    Args:
        panels: {title: `rpa.lab.schedule.recorded.Occupancy`}, from first to last; each with its
        `busy`.

    >>> from rpa.lab.schedule.recorded import recorded_step
    >>> before_after({"before": recorded_step("v5e", "odd stride")}).text[:42]
    'Which unit is busy when. before: 2,426 bun'
    """
    longest = max(panel.bundles for panel in panels.values())
    with style():
        fig = new_figure(9.5, len(panels) * (ROW_INCHES * len(SHOWN) + 0.75) + 0.2)
        rows = fig.subplots(len(panels), squeeze=False)[:, 0]
        for axes, (title, panel) in zip(rows, panels.items(), strict=True):
            _draw_panel(axes, panel, longest)
            axes.set_title(f"{title}: {panel.bundles:,} bundles, bound by {panel.bound}")
        rows[-1].set_xlabel("bundle: one per cycle")
    words = [
        f"{title}: {panel.bundles:,} bundles, bound by {panel.bound}; "
        + ", ".join(f"{unit} {_percent(panel.share[unit])}" for unit in SHOWN)
        for title, panel in panels.items()
    ]
    return alt(fig, f"Which unit is busy when. {'. '.join(words)}.")


def _draw_panel(axes, panel, longest):
    """A row a unit: its baseline, its occupancy above, its share of the whole at the right."""
    for row, unit in enumerate(SHOWN):
        busy, base = np.array(panel.busy[unit]), row + 0.94
        edges = np.linspace(0, panel.bundles, len(busy) + 1)
        color = COLORS[ROWS[unit][1]]
        axes.stairs(base - 0.86 * busy, edges, baseline=base, fill=True, color=color)
        axes.plot([0, panel.bundles], [base, base], color="#333333", linewidth=0.6)
        axes.annotate(
            _percent(panel.share[unit]),
            (panel.bundles + longest * 0.008, row + 0.5),
            va="center",
        )
    axes.set(xlim=(0, longest * 1.06), ylim=(len(SHOWN) + 0.05, -0.05))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_yticks(np.arange(len(SHOWN)) + 0.5, SHOWN)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def steps_against_hbm(bundles, hbm_cycles):
    """Draw what each optimisation leaves, beside the cycles in which HBM delivers the same tokens.

    Args:
        bundles: {chip: {step: bundles}}, the same steps for each chip, from first to last.
        hbm_cycles: {chip: cycles}.

    >>> picture = steps_against_hbm({"v5e": {"before": 5000, "after": 900}}, {"v5e": 3836})
    >>> picture.text.split("of HBM. ")[1]
    'v5e: HBM 3,836 cycles; before 5,000, after 900 bundles.'
    """
    names = list(next(iter(bundles.values())))
    with style():
        fig = new_figure(9.8, 0.42 * len(names) + 1.5)
        panels = fig.subplots(1, len(bundles), sharey=True, squeeze=False)[0]
        for axes, (chip, steps) in zip(panels, bundles.items(), strict=True):
            _draw_steps(axes, list(steps.values()), hbm_cycles[chip])
            axes.set_title(chip)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        panels[len(panels) // 2].set_xlabel("bundles (logarithmic); dashed: cycles of HBM")
    words = [
        f"{chip}: HBM {hbm_cycles[chip]:,.0f} cycles; "
        + ", ".join(f"{name} {n:,.0f}" for name, n in steps.items())
        + " bundles."
        for chip, steps in bundles.items()
    ]
    return alt(fig, f"Bars of bundles, one per step, next to the time of HBM. {' '.join(words)}")


def _draw_steps(axes, values, hbm_cycles):
    colors = [COLORS["orange" if n > hbm_cycles else "blue"] for n in values]
    axes.barh(range(len(values)), values, color=colors, height=0.62)
    for row, n in enumerate(values):
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(n * 1.12, row, f"{n:,.0f}", va="center", bbox=ground, zorder=5)
    axes.axvline(hbm_cycles, color="black", linestyle="--", linewidth=1.4)
    axes.set_xscale("log")
    axes.set_xlim(300, max(values) * 4)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def banks(strides, num_banks=32, rows=8):
    """Draw in which banks of VMEM the rows of one register lie, for some distances between them.

    >>> banks([8, 9]).text.split("holds. ")[1]
    'Distance 8: 2 rows in the fullest bank. Distance 9: 1 row in the fullest bank.'
    """
    with style():
        fig = new_figure(9.5, 0.75 + 0.62 * len(strides))
        axes = fig.subplots()
        for line, stride in enumerate(strides):
            _draw_banks(axes, line, stride * np.arange(rows) % num_banks, num_banks)
        axes.set(xlim=(-0.1, num_banks + 0.1), ylim=(1.4 * len(strides) - 0.2, -0.3))
        axes.set_yticks([1.4 * i + 0.5 for i in range(len(strides))], map(str, strides))
        axes.set_xticks(np.arange(0, num_banks, 4) + 0.5, range(0, num_banks, 4))
        axes.set(xlabel="bank", ylabel="distance (rows)")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_title(f"Where the {rows} rows of a register lie; orange: two or more in a bank")
    fullest = [int(np.bincount(s * np.arange(rows) % num_banks).max()) for s in strides]
    words = [
        f"Distance {stride}: {n} row{'s' * (n > 1)} in the fullest bank."
        for stride, n in zip(strides, fullest, strict=True)
    ]
    return alt(
        fig, f"{num_banks} banks in a line, and in each the rows it holds. {' '.join(words)}"
    )


def _draw_banks(axes, line, places, num_banks):
    top = 1.4 * line
    for bank in range(num_banks):
        held = np.flatnonzero(places == bank)
        color = ("white", COLORS["sky"], COLORS["orange"])[min(len(held), 2)]
        axes.add_patch(Rectangle((bank, top), 1, 1, facecolor=color, edgecolor="#999999"))
        if len(held):
            axes.text(bank + 0.5, top + 0.5, "\n".join(map(str, held[:2])) + "+" * (len(held) > 2),
                      ha="center", va="center", fontsize=9, linespacing=0.95)  # fmt: skip


def block_diagonal(num_heads=4, group=4, head_dim=128):
    """Draw several heads in one product: block-diagonal queries times keys side by side.

    >>> block_diagonal(2).text[:48]
    'Two products become one. The queries of 2 heads '
    """
    colors = [COLORS[name] for name in ("sky", "orange", "green", "purple")]
    with style():
        fig = new_figure(9.5, 3.6)
        axes = fig.subplots()
        for head in range(num_heads):
            color = colors[head % len(colors)]
            _box(axes, 0.2 + head, 0.6 + 0.55 * head, 1, 0.55, color, f"q{head}")
            _box(axes, 5.6, 0.1 + 0.75 * head, 1.6, 0.75, color, f"k{head}$^T$")
            _box(axes, 8.7, 0.6 + 0.55 * head, 1.6, 0.55, color, f"q{head} k{head}$^T$")
        frame = {"facecolor": "none", "edgecolor": "black"}
        axes.add_patch(Rectangle((0.2, 0.6), num_heads, 0.55 * num_heads, **frame))
        for x, sign in ((4.85, "×"), (7.95, "=")):
            axes.text(x, 1.7, sign, fontsize=18, ha="center", va="center")
        below = 0.6 + 0.55 * num_heads + 0.15
        axes.text(0.2, below, f"{num_heads * group} rows x {num_heads * head_dim} lanes, "
                  "zeros elsewhere", va="top")  # fmt: skip
        axes.text(
            5.6, 0.1 + 0.75 * num_heads + 0.1, "keys side by side\n(here transposed)", va="top"
        )
        axes.text(8.7, below, "scores of each head,\nrow by row", va="top")
        axes.set(xlim=(0, 10.6), ylim=(4.1, -0.1))
        axes.axis("off")
        axes.set_title(f"{num_heads} heads in one product")
    return alt(
        fig,
        f"Two products become one. The queries of {num_heads} heads stand on the diagonal of a "
        "matrix that is zero elsewhere; the keys of these heads lie side by side. Their product "
        f"has the scores of each head in rows of its own: {num_heads * group} rows.",
    )


def _box(axes, x, y, width, height, color, text):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="black"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center")


def two_lanes(copies, computes, unit="cycles"):
    """Draw copies and computations of blocks as a double buffer orders them.

    Args:
        copies, computes: (start, end) of each block.
        unit: of the numbers.

    >>> two_lanes([(0, 2), (2, 4)], [(2, 5), (5, 8)]).text[-40:]
    '2 blocks, the last one done at 8 cycles.'
    """
    with style():
        fig = new_figure(9.0, 2.1)
        axes = fig.subplots()
        for row, (spans, color) in enumerate(((copies, "blue"), (computes, "orange"))):
            for block, (start, end) in enumerate(spans):
                axes.barh(row, end - start, left=start, height=0.6, color=COLORS[color],
                          edgecolor="white")  # fmt: skip
                axes.text((start + end) / 2, row, str(block), ha="center", va="center",
                          color="white" if color == "blue" else "black")  # fmt: skip
        axes.set_yticks([0, 1], ["copy", "compute"])
        axes.set(ylim=(1.5, -0.5), xlabel=unit)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    end = computes[-1][1]
    return alt(
        fig,
        "Two rows of bars, copies above computations, the number of the block in each. "
        f"{len(copies)} blocks, the last one done at {end:,.0f} {unit}.",
    )


def _percent(share):
    return f"{share:.0%}".replace("%", " %")
