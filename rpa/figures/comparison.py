"""Picture of chapter 12: the ladder in numbers, from its lowest rung to the peers."""

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from rpa.figures.style import COLORS, alt, new_figure, style
from rpa.lab.bench.comparison import CHIPS, hbm_us

CHIP_STYLE = {"v5e": ("blue", "o"), "v6e": ("orange", "s"), "tpu7x": ("green", "D")}
"""Colour and marker of each chip: readable without colour, too."""


def ladder(found, title="The ladder: one step of 16 decodes, predicted"):
    """Draw the predicted time of every rung and peer on three chips, the least as lines.

    Args:
        found: a record of the comparison, `rpa.lab.bench.comparison.recorded()`.
        title: what stands above the picture.

    Returns:
        A `Picture`.

    >>> row = {"title": "8 kernel", "lines": 9, "num_bytes": 2_000_000, "time_us": {"v5e": 4.0}}
    >>> found = {"rows": [row], "least_bytes": 1_000_000,
    ...          "least_us": {"v5e": 1.2, "v6e": 0.6, "tpu7x": 0.3}}
    >>> ladder(found)  # doctest: +ELLIPSIS
    Figure: The ladder: ... 8 kernel: 9 lines, 2.00 times the least bytes, v5e 4.0 us, ...
    """
    rows = found["rows"]
    with style():
        fig = new_figure(9.0, 1.7 + 0.42 * len(rows))
        axes = fig.subplots()
        for chip in CHIPS:
            axes.axvline(found["least_us"][chip], color=COLORS[CHIP_STYLE[chip][0]], ls=":", lw=1.5)
        for y, row in enumerate(rows):
            _draw_rung(axes, y, row, found["least_bytes"])
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes.set(xscale="log", ylim=(-0.7, len(rows) - 0.3))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("microseconds, predicted; dotted: all bytes once at HBM's peak")
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
        fig.legend(handles=_legend(), loc="outside lower left", ncols=5)
    return alt(fig, _words(title, found))


def _draw_rung(axes, y, row, least_bytes):
    times = [row["time_us"].get(chip, hbm_us(row["num_bytes"], chip)) for chip in CHIPS]
    axes.plot([min(times), max(times)], [y, y], color=COLORS["light"], lw=7, zorder=1)
    for chip, time_us in zip(CHIPS, times, strict=True):
        color, marker = CHIP_STYLE[chip]
        fill = COLORS[color] if chip in row["time_us"] else "white"
        axes.plot(time_us, y, marker, ms=8, mfc=fill, mec=COLORS[color], mew=1.8, zorder=3)
    code = "" if row["lines"] is None else f"{row['lines']:,} lines, "
    words = f"{code}{row['num_bytes'] / least_bytes:.2f} x the bytes"
    axes.annotate(
        words, (1.01, y), xycoords=("axes fraction", "data"), va="center", annotation_clip=False
    )


def _legend():
    handles = [
        Line2D([], [], color=COLORS[color], marker=marker, ls="", ms=8, label=chip)
        for chip, (color, marker) in CHIP_STYLE.items()
    ]
    hollow = Line2D(
        [], [], color=COLORS["grey"], marker="o", mfc="white", ls="", ms=8,
        label="hollow: no schedule; not faster than its bytes",
    )  # fmt: skip
    return [*handles, hollow]


def _words(title, found):
    sentences = []
    for row in found["rows"]:
        times = [
            f"{chip} {row['time_us'][chip]:,.1f} us"
            if chip in row["time_us"]
            else f"{chip} at least {hbm_us(row['num_bytes'], chip):,.1f} us"
            for chip in CHIPS
        ]
        code = "" if row["lines"] is None else f"{row['lines']:,} lines, "
        ratio = row["num_bytes"] / found["least_bytes"]
        sentences.append(
            f"{row['title']}: {code}{ratio:.2f} times the least bytes, {', '.join(times)}."
        )
    least = ", ".join(f"{chip} {found['least_us'][chip]:,.1f} us" for chip in CHIPS)
    return f"{title}, on a logarithmic axis. {' '.join(sentences)} The least: {least}."
