"""The picture of a kernel's DMAs: which copy is under way while what is computed.

Rows are buffers (and slots), bars are copies on their way, the row at the bottom is the core. Drawn
from a `rpa.lab.copies.timeline.Timeline`, in the order of events or on the predicted clock of a
chip.
"""

from dataclasses import dataclass

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from rpa.figures.style import COLORS, alt, new_figure, style
from rpa.lab.copies.clock import predict_cycles
from rpa.lab.copies.events import HBM

CORE = "core"
READ, WRITE, QUEUED = COLORS["blue"], COLORS["purple"], COLORS["sky"]
COMPUTE, STALL = COLORS["orange"], "white"
COMPUTE_UNITS = 4
"""How wide a computation is where time is counted in events, and a start or a wait is 1."""

POINTS_PER_LETTER = 5.6
ROW_INCHES, PANEL_INCHES, WIDTH_INCHES = 0.5, 1.0, 9.5


@dataclass
class Bar:
    """One bar, from `begin` to `end`; `starts` are the ticks of the copies that it stands for."""

    row: str
    begin: float
    end: float
    color: str
    labels: list
    hatch: str | None = None
    starts: tuple = ()
    dashed: bool = False

    def label(self, letters):
        """At most two different labels and how many more there are, in one or two lines.

        Args:
            letters: that fit in a line; nothing is written where two lines are too narrow.
        """
        different = list(dict.fromkeys(self.labels))
        name = different[0].partition("[")[0] + "[" if different else "["
        different[1:] = [text.replace(name, "[", 1) for text in different[1:]]
        more = f" +{len(different) - 2}" if len(different) > 2 else ""
        text = ", ".join(different[:2]) + more
        return next((t for t in (text, _two_lines(text)) if _longest(t) <= letters), "")


def gantt(
    timeline,
    *,
    chip=None,
    compute_ratio=1.0,
    label=None,
    rows=None,
    kernel=None,
    title="What is copied while what is computed",
):
    """Draw one timeline, or several below each other on the same scale: before and after.

    Args:
        timeline: a `Timeline`, or {name: Timeline} for several panels.
        chip: name of a chip to predict times for; None draws events in their order, without times.
        compute_ratio: see `rpa.lab.copies.clock.predict_cycles`.
        label: Copy -> text or None, see `rpa.lab.copies.timeline.page_labels`; default is what is
        copied. rows: buffers to draw, by the names of `Copy.row`; None draws all.
        kernel: which `pallas_call` of the record; None draws all.
        title: what stands above the picture.

    Returns:
        A `Picture`.

    Raises:
        ValueError: if nothing was recorded, or nothing is left to draw.

    >>> from rpa.lab.copies.events import Timeline
    >>> gantt(Timeline())
    Traceback (most recent call last):
        ...
    ValueError: timeline is empty: the record has no DMA. Run the kernel inside record_dmas(), \
interpreted with interpreter.params().
    """
    panels = timeline if isinstance(timeline, dict) else {"": timeline}
    drawn = {}
    for name, record in panels.items():
        keep = _keep(record, rows, kernel)
        if chip is None:
            drawn[name] = _bars_in_order(record, keep, label)
        else:
            prediction = predict_cycles(record, chip, compute_ratio=compute_ratio, kernel=kernel)
            drawn[name] = _bars_on_clock(prediction, keep, label)
    heights = [PANEL_INCHES + ROW_INCHES * len(_row_names(bars)) for bars in drawn.values()]
    with style():
        fig = new_figure(WIDTH_INCHES, sum(heights) + 0.6)
        panes = fig.subplots(len(drawn), 1, sharex=True, squeeze=False, height_ratios=heights)
        end = max(bar.end for bars in drawn.values() for bar in bars)
        for axes, (name, bars) in zip(panes[:, 0], drawn.items(), strict=True):
            _draw(axes, bars, end, _heading(name, bars, chip))
        panes[-1, 0].set_xlabel(
            "events of the kernel, in its order (no times)"
            if chip is None
            else f"cycles of a {chip}, predicted; computing takes {compute_ratio:g} x the transfer"
        )
        fig.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        fig.legend(handles=_legend(drawn, chip), loc="outside lower left", ncols=5)
    return alt(fig, _words(title, drawn, chip, compute_ratio))


def _two_lines(text):
    """Broken at the space nearest to the middle."""
    spaces = [i for i, letter in enumerate(text) if letter == " "]
    if not spaces:
        return text
    middle = min(spaces, key=lambda i: abs(i - len(text) / 2))
    return text[:middle] + "\n" + text[middle + 1 :]


def _longest(text):
    return max(map(len, text.split("\n")))


def _keep(timeline, rows, kernel):
    """Which copies and computations are drawn."""
    if not timeline.copies:
        raise ValueError(
            "timeline is empty: the record has no DMA. Run the kernel inside record_dmas(), "
            "interpreted with interpreter.params()."
        )
    known = dict.fromkeys(copy.row for copy in timeline.copies)
    wrong = [row for row in rows or () if row not in known]
    if wrong:
        raise ValueError(f"rows has {wrong[0]!r}, but the record has only {', '.join(known)}.")
    copies = [c for c in timeline.copies if rows is None or c.row in rows]
    copies = [c for c in copies if kernel is None or c.kernel == kernel]
    if not copies:
        raise ValueError(f"kernel is {kernel}, but the record has no DMA of it in these rows.")
    return copies


def _label_of(copy, label):
    text = label(copy) if label is not None else None
    if text is not None:
        return text
    in_hbm = copy.source if copy.source.buffer.space == HBM else copy.target
    first = in_hbm.index[0]
    place = first if isinstance(first, int) else f"{first.start}:{first.stop}"
    return f"{in_hbm.buffer.name}[{place}]"


def _color(copy):
    return WRITE if copy.target.buffer.space == HBM else READ


def _groups(copies):
    """Copies of one row that one wait ends: one bar."""
    groups = {}
    for copy in copies:
        groups.setdefault((copy.row, copy.wait, _color(copy)), []).append(copy)
    return groups


def _bars_in_order(timeline, copies, label):
    """Bars from start to wait, a unit of width for each start and wait."""
    orders = {c.start for c in copies} | {c.wait for c in copies if c.wait is not None}
    kernels = {c.kernel for c in copies}
    computes = {c.first: c for c in timeline.computes if c.kernel in kernels}
    places, now, bars = {}, 0.0, []
    for order in sorted(orders | set(computes)):
        width = COMPUTE_UNITS if order in computes else 1
        places[order] = now
        if order in computes:
            what = _computed_on(computes[order], copies, label)
            bars.append(Bar(CORE, now, now + width, COMPUTE, what))
        now += width
    for (row, wait, color), group in _groups(copies).items():
        starts = tuple(places[c.start] for c in group)
        end = now if wait is None else places[wait] + 1
        labels = [_label_of(c, label) for c in group]
        bars.append(Bar(row, starts[0], end, color, labels, None, starts, dashed=wait is None))
    stuck = timeline.unfinished_wait
    if stuck is not None:
        bars.append(Bar(CORE, now, now + COMPUTE_UNITS, STALL, ["waits for ever"], "///"))
    return bars


def _bars_on_clock(prediction, copies, label):
    """Bars from the first byte to the last, a pale one before for what waits for the HBM."""
    numbers, kernels = {c.number for c in copies}, {c.kernel for c in copies}
    flights = {f.copy.number: f for f in prediction.flights if f.copy.number in numbers}
    bars = []
    for (row, wait, color), group in _groups(copies).items():
        mine = [flights[c.number] for c in group]
        labels = [_label_of(c, label) for c in group]
        starts = tuple(f.start_cycles for f in mine)
        begin, end = mine[0].begin_cycles, mine[-1].arrival_cycles
        if begin > starts[0]:
            bars.append(Bar(row, starts[0], begin, QUEUED, []))
        bars.append(Bar(row, begin, end, color, labels, None, starts, dashed=wait is None))
    for span in prediction.spans:
        if span.what.kernel not in kernels:
            continue
        times = (span.begin_cycles, span.end_cycles)
        if span.kind == "compute":
            what = _computed_on(span.what, copies, label)
            bars.append(Bar(CORE, *times, COMPUTE, what))
        else:
            bars.append(Bar(CORE, *times, STALL, [], "////"))
    return bars


def _computed_on(compute, copies, label):
    """What had last arrived in the buffers that a computation touches; their names if nothing."""
    labels = []
    for row in compute.rows:
        here = [c for c in copies if c.row == row and c.target.row == row]
        arrived = [c for c in here if c.wait is not None and c.wait < compute.first]
        last = max((c.wait for c in arrived), default=None)
        labels += [_label_of(c, label) for c in arrived if c.wait == last] or [row]
    return labels


def _row_names(bars):
    """The rows from top to bottom: buffers in the order in which they are first used."""
    names = dict.fromkeys(bar.row for bar in sorted(bars, key=lambda bar: bar.begin))
    names.pop(CORE, None)
    # Slots of one buffer stand together.
    first = {name.split("[")[0]: place for place, name in reversed(list(enumerate(names)))}
    return [*sorted(names, key=lambda name: (first[name.split("[")[0]], name)), CORE]


def _draw(axes, bars, end, heading):
    names = _row_names(bars)
    place = {name: len(names) - 1 - i for i, name in enumerate(names)}
    points_per_unit = (WIDTH_INCHES - 1.9) * 72 / end
    for bar in bars:
        y, width = place[bar.row], bar.end - bar.begin
        axes.barh(
            y,
            width,
            left=bar.begin,
            height=0.68,
            color=bar.color,
            edgecolor="#333333" if not bar.dashed else COLORS["red"],
            linestyle="--" if bar.dashed else "-",
            linewidth=0.8 if not bar.dashed else 2,
            hatch=bar.hatch,
        )
        for start in bar.starts:
            axes.plot([start, start], [y - 0.34, y + 0.44], color="black", lw=1.6)
        text = bar.label(width * points_per_unit / POINTS_PER_LETTER - 0.5)
        if text:
            ink = "white" if bar.color == READ else "black"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if bar.hatch else None
            middle = bar.begin + width / 2
            axes.text(
                middle,
                y,
                text,
                ha="center",
                va="center",
                color=ink,
                size=9,
                linespacing=0.95,
                bbox=box,
            )
    axes.set_yticks(list(place.values()), list(place))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, end)
    axes.grid(axis="y", visible=False)
    axes.tick_params(labelbottom=True)
    axes.set_title(heading, fontsize=11)


def _heading(name, bars, chip):
    if chip is None:
        return name
    total, stalled = _cycles(bars)
    numbers = f"{total:,.0f} cycles, {stalled:,.0f} of them the core waits (predicted)"
    return f"{name}: {numbers}" if name else numbers


def _cycles(bars):
    stalls = [bar.end - bar.begin for bar in bars if bar.row == CORE and bar.hatch]
    return max(bar.end for bar in bars), sum(stalls)


def _legend(drawn, chip):
    colors = {bar.color for bars in drawn.values() for bar in bars if not bar.hatch}
    words = {READ: "copy from HBM", WRITE: "copy to HBM", QUEUED: "started, HBM busy with others"}
    handles = [Patch(facecolor=c, edgecolor="#333333", label=w) for c, w in words.items()]
    handles = [h for h, color in zip(handles, words, strict=True) if color in colors]
    handles.append(Patch(facecolor=COMPUTE, edgecolor="#333333", label="computing on"))
    if any(bar.hatch for bars in drawn.values() for bar in bars):
        handles.append(Patch(facecolor=STALL, edgecolor="#333333", hatch="////", label="waiting"))
    if any(bar.dashed for bars in drawn.values() for bar in bars):
        red = COLORS["red"]
        handles.append(
            Patch(facecolor="white", edgecolor=red, ls="--", lw=2, label="never waited for")
        )
    # A tick at the beginning of a bar: several stand in one bar where one wait ends several copies.
    tick = {"marker": "|", "markersize": 12, "markeredgewidth": 1.6, "linestyle": "none"}
    return [*handles, Line2D([], [], color="black", label="start()", **tick)]


def _words(title, drawn, chip, compute_ratio):
    text = f"{title}: one row per buffer, a bar for the copies that one wait ends, the core below."
    for name, bars in drawn.items():
        copies = sum(len(bar.starts) for bar in bars)
        computing = sum(bar.color == COMPUTE for bar in bars)
        text += f" {name or 'The kernel'}: {copies} copies, {computing} computations"
        if chip is not None:
            total, stalled = _cycles(bars)
            text += f", {total:,.0f} cycles predicted on {chip} of which {stalled:,.0f} waiting"
        lost = sum(bar.dashed for bar in bars)
        text += f", {lost} bars never waited for." if lost else "."
    if chip is not None:
        text += f" Computing is taken as {compute_ratio:g} times the transfer of the same bytes."
    return text
