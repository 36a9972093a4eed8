"""The picture of docs/overview.md: ragged queries, a page table, pages anywhere in the cache."""

import numpy as np
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from rpa.figures.style import COLORS, alt, new_figure, style

OWNERS = ("orange", "green", "sky", "purple", "yellow", "grey")
"""The colour of each sequence; all of them can be read under black letters."""

TABLE_X, CACHE_X = 4.6, 8.6
"""Where the page table and the cache begin; the queries begin at 0."""


def ragged_paged(q_lens, kv_lens, page_table, page_size, num_pages, *, names="ABCDEF"):
    """Draw a batch: new tokens in a row, the page table, the cache with its pages.

    Args:
        q_lens, kv_lens: new tokens, and all tokens, of each sequence; at most six sequences.
        page_table: for each sequence its pages, in the order of its tokens.
        page_size: tokens of a page.
        num_pages: of the cache.
        names: a letter for each sequence.

    Returns:
        A `Picture`.

    >>> ragged_paged([1, 2], [5, 2], [[2, 0], [1]], 4, 4).text.split("numbers. ")[1]
    'A: 1 new of 5 tokens, in pages 2, 0. B: 2 new of 2 tokens, in pages 1. 1 page is free.'
    """
    with style():
        fig = new_figure(9.6, 0.9 + 0.5 * max(num_pages, sum(q_lens)))
        axes = fig.subplots()
        pages_y = 0.95 * np.arange(num_pages)
        table_y = 1.7 * np.arange(len(q_lens)) + 0.6
        rows_y = 0.72 * np.arange(sum(q_lens) + 1)
        _draw_pages(axes, page_size, pages_y)
        for s, (q_len, kv_len, pages) in enumerate(zip(q_lens, kv_lens, page_table, strict=True)):
            color, first = COLORS[OWNERS[s]], sum(q_lens[:s])
            _draw_queries(axes, rows_y[first : first + q_len], color, names[s], kv_len - q_len)
            middle = rows_y[first : first + q_len].mean() + 0.33
            _arrow(axes, (1.75, middle), (TABLE_X - 0.1, table_y[s] + 0.4), color)
            _draw_table_row(axes, pages, table_y[s], color, names[s])
            for i, page in enumerate(pages):
                start = (TABLE_X + 0.8 * len(pages), table_y[s] + 0.4)
                _arrow(axes, start, (CACHE_X - 0.1, pages_y[page] + 0.4), color)
                tokens = np.arange(i * page_size, min((i + 1) * page_size, kv_len))
                _draw_tokens(axes, pages_y[page], tokens, kv_len - q_len, color, names[s])
        titles = {
            0: "new tokens:\nqueries, keys, values",
            TABLE_X: "page table",
            CACHE_X: "KV cache",
        }
        for x, title in titles.items():
            axes.text(x, -0.35, title, fontweight="bold", va="bottom")
        bottom = max(pages_y[-1] + 0.9, rows_y[-1], table_y[-1] + 1)
        axes.set(xlim=(-0.3, CACHE_X + 0.85 * page_size + 0.9), ylim=(bottom + 0.1, -1.4))
        axes.axis("off")
        hatched = Patch(facecolor="white", edgecolor="#333333", hatch="///")
        plain = Patch(facecolor=COLORS["light"], edgecolor="#333333")
        free = Patch(facecolor="white", edgecolor="#999999")
        words = ["new: stored in this step", "plain colour: in the cache already", "free"]
        fig.legend([hatched, plain, free], words, loc="outside lower left", ncols=3)
    return alt(fig, _words(q_lens, kv_lens, page_table, num_pages, names))


def example():
    """The batch of docs/overview.md: two decodes, a chunk and a fresh prompt in pages of four."""
    tables = [[2, 7], [0], [5, 1], [6, 3]]
    return ragged_paged([1, 1, 3, 5], [6, 3, 8, 5], tables, page_size=4, num_pages=9)


def _draw_queries(axes, rows_y, color, name, position):
    for i, y in enumerate(rows_y):
        box = {"facecolor": color, "edgecolor": "#333333", "hatch": "///"}
        axes.add_patch(Rectangle((0, y), 1.7, 0.66, **box))
        _letter(axes, 0.85, y + 0.33, f"{name}{position + i}")


def _draw_table_row(axes, pages, y, color, name):
    axes.text(TABLE_X - 0.05, y - 0.08, f"sequence {name}", va="bottom", size=9)
    for i, page in enumerate(pages):
        box = {"facecolor": color, "edgecolor": "#333333"}
        axes.add_patch(Rectangle((TABLE_X + 0.8 * i, y), 0.8, 0.8, **box))
        axes.text(TABLE_X + 0.8 * i + 0.4, y + 0.4, str(page), ha="center", va="center")


def _draw_pages(axes, page_size, pages_y):
    for page, y in enumerate(pages_y):
        axes.text(CACHE_X + 0.85 * page_size + 0.15, y + 0.4, f"page {page}", va="center", size=9)
        for slot in range(page_size):
            corner = (CACHE_X + 0.85 * slot, y)
            axes.add_patch(Rectangle(corner, 0.85, 0.8, facecolor="white", edgecolor="#999999"))


def _draw_tokens(axes, y, tokens, num_cached, color, name):
    """The tokens of a page, each with its position in the sequence."""
    for slot, token in enumerate(tokens):
        hatch = "///" if token >= num_cached else None
        corner = (CACHE_X + 0.85 * slot, y)
        box = {"facecolor": color, "edgecolor": "#333333", "hatch": hatch}
        axes.add_patch(Rectangle(corner, 0.85, 0.8, **box))
        _letter(axes, corner[0] + 0.42, y + 0.4, f"{name}{token}")


def _letter(axes, x, y, text):
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
    axes.text(x, y, text, ha="center", va="center", size=9, bbox=ground)


def _arrow(axes, start, end, color):
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=12, color=color, linewidth=1.8,
        shrinkA=1, shrinkB=1,
    )  # fmt: skip
    axes.add_patch(arrow)


def _words(q_lens, kv_lens, page_table, num_pages, names):
    sequences = [
        f"{name}: {q_len} new of {kv_len} tokens, in pages {', '.join(map(str, pages))}."
        for name, q_len, kv_len, pages in zip(names, q_lens, kv_lens, page_table, strict=False)
    ]
    free = num_pages - sum(map(len, page_table))
    return (
        "Left, the new tokens of all sequences in one column, nothing padded. In the middle, the "
        "page table, a row per sequence. Right, the cache: pages of a few tokens, in any order; "
        f"tokens carry their numbers. {' '.join(sequences)} "
        f"{free} page{' is' if free == 1 else 's are'} free."
    )
