"""Picture of chapter 12: the ladder in numbers, from its lowest rung to the peers."""

from matplotlib.lines import Line2D

from rpa.figures.style import COLORS, alt, new_figure, style
from rpa.lab.bench.comparison import hbm_us


def ladder(found, chip="tpu7x", title="The ladder: one step of 16 decodes"):
    """Draw for every rung and peer the bytes it moves, and its predicted time on one chip.

    Both axes are linear. A row without a schedule has no bar of time: its bytes say only that it
    is not faster than HBM delivers them, and that is written, not drawn.

    Args:
        found: a record of the comparison, `rpa.lab.bench.comparison.recorded()`.
        chip: "v5e", "v6e" or "tpu7x".
        title: what stands above the picture.

    Returns:
        A `Picture`.

    >>> row = {"title": "8 kernel", "lines": 9, "num_bytes": 2_000_000, "time_us": {"v5e": 4.0}}
    >>> found = {"rows": [row], "least_bytes": 1_000_000, "least_us": {"v5e": 1.2}}
    >>> ladder(found, "v5e")
    Figure: The ladder: one step of 16 decodes, on v5e. 8 kernel: 2.00 times the least bytes, 4.0 \
us. The least: 1.2 us.
    """
    rows = found["rows"]
    names = [row["title"] for row in rows]
    ratios = [row["num_bytes"] / found["least_bytes"] for row in rows]
    times_us = [row["time_us"].get(chip) for row in rows]
    colors = [COLORS["orange" if name == "yours" else "blue"] for name in names]
    with style():
        fig = new_figure(9.6, 1.5 + 0.36 * len(rows))
        left, right = fig.subplots(1, 2, sharey=True)
        _draw_bars(left, ratios, [f"{ratio:.2f}" for ratio in ratios], colors)
        left.axvline(1, color="black", ls=":", lw=1.5)
        left.set_xlabel("bytes over the least (counted)")
        left.set_yticks(range(len(rows)), names)
        left.invert_yaxis()
        _draw_bars(right, times_us, [f"{us:,.0f}" if us else "" for us in times_us], colors)
        for y, (row, us) in enumerate(zip(rows, times_us, strict=True)):
            if us is None:
                words = f"no schedule read: above {hbm_us(row['num_bytes'], chip):,.0f}"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                right.annotate(words, (6, y), xycoords=("axes points", "data"), va="center",
                               color=COLORS["grey"], bbox=box)  # fmt: skip
        right.axvline(found["least_us"][chip], color="black", ls=":", lw=1.5)
        right.set_xlabel(f"microseconds on a {chip} (predicted)")
        least = Line2D(
            [], [], color="black", ls=":", label="the least: every byte once, at HBM's peak"
        )
        fig.legend(handles=[least], loc="outside lower right")
        fig.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return alt(fig, _words(title, found, chip))


def _draw_bars(axes, values, words, colors):
    most = max(value for value in values if value is not None)
    for y, (value, text) in enumerate(zip(values, words, strict=True)):
        if value is not None:
            axes.barh(y, value, height=0.62, color=colors[y])
            axes.text(value + 0.015 * most, y, text, va="center")
    axes.set_xlim(0, 1.15 * most)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _words(title, found, chip):
    sentences = []
    for row in found["rows"]:
        ratio = row["num_bytes"] / found["least_bytes"]
        time = f"{row['time_us'][chip]:,.1f} us" if chip in row["time_us"] else "no schedule read"
        sentences.append(f"{row['title']}: {ratio:.2f} times the least bytes, {time}.")
    least = f"The least: {found['least_us'][chip]:,.1f} us."
    return f"{title}, on {chip}. {' '.join(sentences)} {least}"
