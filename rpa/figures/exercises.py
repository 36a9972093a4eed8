"""Small pictures above exercises: strips of tokens, tiles of a mask, copies next to computing.

Each draws the numbers that the exercise works out by hand, so that the statement, the picture and
the first case of the check are the same example.
"""

from matplotlib.patches import Patch, Rectangle

from rpa.figures.paging import pale
from rpa.figures.style import COLORS, alt, new_figure, style

ROLES = {
    "": ("cached", COLORS["light"], None),
    "+": ("new", COLORS["orange"], None),
    "*": ("looked at", COLORS["sky"], None),
    "#": ("another sequence", pale(COLORS["green"]), None),
    "-": ("stale, or not used", "white", "///"),
}
"""What stands before the text of a cell: its meaning, which `legend` may say better, and look."""

LABEL_INCHES, CELL_INCHES, ROW_INCHES = 1.6, 0.42, 0.62
LEAST_INCHES = 6.8
"""Room for the legend, however few cells there are."""


def strips(rows, words, *, arrows=(), legend=None, title=""):
    """Draw rows of cells, as tokens lie in memory; arrows say where a cell comes from or goes to.

    Args:
        rows: list of (label, cells). In the string `cells` each cell is a word: "7" is cached,
            "+7" new, "*7" looked at, "#7" another sequence's, "-" stale; "_" leaves room for one,
            and "|" draws a line where a page or a block ends.
        words: what the picture shows, for readers who cannot see it.
        arrows: list of ((row, cell), (row, cell)), counted from 0.
        legend: {mark: words} for the marks to explain; None explains those that are used.
        title: what stands above the picture.

    >>> strips([("page 7", "0 1 2 +3")], "Page 7 holds three cached tokens and a new one.")
    Figure: Page 7 holds three cached tokens and a new one.
    """
    parsed = [(label, _cells(text)) for label, text in rows]
    width = max(cell.column for _, cells in parsed for cell in cells) + 1
    legend = _used(parsed) if legend is None else legend
    with style():
        inches = max(LEAST_INCHES, LABEL_INCHES + CELL_INCHES * (width + 0.5))
        fig = new_figure(inches, 0.5 + ROW_INCHES * len(rows) + 0.3 * bool(title))
        axes = fig.subplots()
        for row, (label, cells) in enumerate(parsed):
            _draw_strip(axes, -1.5 * row, label, cells)
        for tail, head in arrows:
            _draw_arrow(axes, tail, head)
        right = (inches - LABEL_INCHES) / CELL_INCHES  # a cell has the same size in every picture
        axes.set(xlim=(-LABEL_INCHES / CELL_INCHES, right), ylim=(-1.5 * len(rows) + 0.6, 1.1))
        axes.axis("off")
        if title:
            axes.set_title(title, fontsize=11)
        _explain(fig, legend)
    return alt(fig, words)


class _Cell:
    def __init__(self, text, column):
        mark = text[0] if text[0] in ROLES else ""
        self.mark, self.text, self.column = mark, text[len(mark) :], column
        self.ends = False


def _cells(text):
    cells, column = [], 0
    for word in text.split():
        if word == "|":
            cells[-1].ends = True
            continue
        if word != "_":
            cells.append(_Cell(word, column))
        column += 1
    return cells


def _used(parsed):
    marks = {cell.mark for _, cells in parsed for cell in cells}
    return {mark: ROLES[mark][0] for mark in ROLES if mark in marks}


def _draw_strip(axes, bottom, label, cells):
    axes.text(-0.3, bottom + 0.45, label, ha="right", va="center")
    for cell in cells:
        _, color, hatch = ROLES[cell.mark]
        look = {"facecolor": color, "hatch": hatch, "edgecolor": "#888888"}
        axes.add_patch(Rectangle((cell.column, bottom), 1, 0.9, **look))
        axes.text(cell.column + 0.5, bottom + 0.45, cell.text, ha="center", va="center")
    first = None
    for cell in cells:
        first = first or cell
        if cell.ends or cell is cells[-1]:
            frame = {"fill": False, "edgecolor": "black", "linewidth": 1.6}
            width = cell.column + 1 - first.column
            axes.add_patch(Rectangle((first.column, bottom), width, 0.9, **frame))
            first = None


def _draw_arrow(axes, tail, head):
    (from_row, from_cell), (to_row, to_cell) = tail, head
    down = to_row > from_row
    start = (from_cell + 0.5, -1.5 * from_row + (-0.05 if down else 0.95))
    end = (to_cell + 0.5, -1.5 * to_row + (0.95 if down else -0.05))
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "->", "color": COLORS["red"], "lw": 1.5}
    )


def _explain(fig, legend):
    handles = [
        Patch(facecolor=ROLES[mark][1], hatch=ROLES[mark][2], edgecolor="#888888", label=meaning)
        for mark, meaning in legend.items()
    ]
    if handles:
        fig.legend(handles=handles, loc="outside lower left", ncols=3)


def mask_tiles(queries, num_keys, block_q, block_kv, *, window=None, words, title=""):
    """Draw which query sees which key, with the blocks that a kernel cuts both into.

    Args:
        queries: positions of the queries, one row each; a block has `block_q` of them.
        num_keys: columns.
        block_q, block_kv: sizes of the blocks, whose lines are drawn.
        window: how many keys a query sees at most, its own among them; None for all.
        words: what the picture shows.
        title: what stands above the picture.

    >>> mask_tiles([5, 6], 8, 2, 4, words="Two queries, two blocks of keys.")
    Figure: Two queries, two blocks of keys.
    """
    with style():
        fig = new_figure(1.6 + 0.36 * num_keys, 1.4 + 0.36 * len(queries) + 0.3 * bool(title))
        axes = fig.subplots()
        for row, position in enumerate(queries):
            for key in range(num_keys):
                seen = key <= position and (window is None or key > position - window)
                color = COLORS["sky"] if seen else "white"
                axes.add_patch(Rectangle((key, row), 1, 1, facecolor=color, edgecolor="#BBBBBB"))
        for line in [*range(0, num_keys, block_kv), num_keys]:
            axes.plot([line, line], [0, len(queries)], color="black", lw=1.8)
        for line in [*range(0, len(queries), block_q), len(queries)]:
            axes.plot([0, num_keys], [line, line], color="black", lw=1.8)
        axes.set(xlim=(-0.1, num_keys + 0.1), ylim=(len(queries) + 0.1, -0.1), aspect="equal")
        axes.set_xticks([k + 0.5 for k in range(num_keys)], range(num_keys))
        axes.set_yticks([r + 0.5 for r in range(len(queries))], queries)
        axes.set(xlabel="position of the key", ylabel="of the query")
        axes.grid(False)
        axes.tick_params(length=0)
        if title:
            axes.set_title(title, fontsize=11)
        handle = Patch(facecolor=COLORS["sky"], edgecolor="#BBBBBB", label="seen")
        fig.legend(handles=[handle], loc="outside lower left")
    return alt(fig, words)


def lanes(named, words, title=""):
    """Draw what is under way at the same time: a lane of bars each for copies, computing and so on.

    Args:
        named: {lane: list of (start, length, text)}, in any unit of time.
        words: what the picture shows.
        title: what stands above the picture.

    >>> lanes({"copy": [(0, 2, "0")], "add": [(2, 1, "0")]}, "One copy, then one sum.")
    Figure: One copy, then one sum.
    """
    colors = [COLORS[name] for name in ("sky", "orange", "light", "yellow")]
    with style():
        fig = new_figure(8.4, 0.9 + 0.48 * len(named) + 0.3 * bool(title))
        axes = fig.subplots()
        for row, (bars, color) in enumerate(zip(named.values(), colors, strict=False)):
            for start, length, text in bars:
                axes.barh(row, length, left=start, height=0.7, color=color, edgecolor="#555555")
                axes.text(start + length / 2, row, text, ha="center", va="center")
        axes.set_yticks(range(len(named)), list(named))
        axes.invert_yaxis()
        axes.set(xticks=[], xlabel="time, from left to right")
        axes.grid(False)
        axes.tick_params(axis="y", length=0)
        if title:
            axes.set_title(title, fontsize=11)
    return alt(fig, words)
