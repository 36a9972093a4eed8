"""Pictures of chapter 6: what crosses the HBM, and where the tokens of a block come from and go."""

from matplotlib.patches import Patch, Rectangle

from rpa.figures.style import COLORS, alt, new_figure, style
from rpa.paging import cdiv

TRIPS = {
    "cached, read": (COLORS["light"], None),
    "new, read": (COLORS["sky"], None),
    "new, written": (COLORS["orange"], None),
    "new, read back": (COLORS["red"], "///"),
}
"""The ways over the HBM in `bytes_moved`, with colour and hatch."""

CACHED, NEW, STALE = COLORS["light"], COLORS["orange"], "white"


def bytes_moved(work, title="Bytes of K and V over the HBM"):
    """Draw what crosses the HBM, one panel a kind of work, one bar a way of doing it.

    Args:
        work: {kind of work: {way: {trip: bytes}}}; the trips are those of `TRIPS`.
        title: what stands above the picture.

    >>> bytes_moved({"decode": {"separate": {"cached, read": 30, "new, read back": 10},
    ...                         "fused": {"cached, read": 30, "new, read": 10}}}).text
    'Bytes of K and V over the HBM. decode: separate 40 bytes, fused 40 bytes (0.00 % less).'
    """
    sentences = []
    with style():
        fig = new_figure(9.0, 1.2 + 0.95 * len(work))
        panels = fig.subplots(len(work), 1, squeeze=False)[:, 0]
        for axes, (kind, ways) in zip(panels, work.items(), strict=True):
            totals = [sum(trips.values()) for trips in ways.values()]
            saved = 1 - totals[-1] / totals[0]
            _draw_ways(axes, ways, totals)
            axes.set_title(f"{kind}: {100 * saved:.2f} % less", fontsize=11)
            words = ", ".join(f"{w} {total:,} bytes" for w, total in zip(ways, totals, strict=True))
            sentences.append(f"{kind}: {words} ({100 * saved:.2f} % less).")
        fig.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        handles = [
            Patch(facecolor=color, hatch=hatch, edgecolor="#333333", label=trip)
            for trip, (color, hatch) in TRIPS.items()
        ]
        fig.legend(handles=handles, loc="outside lower left", ncols=4)
    return alt(fig, f"{title}. {' '.join(sentences)}")


def _draw_ways(axes, ways, totals):
    for row, trips in enumerate(ways.values()):
        left = 0
        for trip, num_bytes in trips.items():
            color, hatch = TRIPS[trip]
            axes.barh(
                row, num_bytes, left=left, height=0.66, color=color, hatch=hatch,
                edgecolor="#333333", linewidth=0.6,
            )  # fmt: skip
            left += num_bytes
        axes.text(left + 0.01 * max(totals), row, f"{left:,} bytes", va="center")
    axes.set_yticks(range(len(ways)), list(ways))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.16 * max(totals)), xticks=[])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


def blocks_and_pages(kv_len, q_len, pages, *, page_size, block_tokens):
    """Draw the blocks of one sequence in VMEM, and the pages of the cache below them.

    Args:
        kv_len, q_len: of the sequence.
        pages: its pages of the cache, in the order of its tokens.
        page_size, block_tokens: tokens of a page and of a block.

    >>> blocks_and_pages(6, 2, [5, 2], page_size=4, block_tokens=8)
    Figure: A sequence of 6 tokens, the last 2 of them new, in 1 block of 8 tokens and the pages \
5, 2 of 4 tokens. New tokens enter their block from new_kv and leave it for their pages: page 2 \
from row 0 on, 2 tokens.
    """
    num_blocks = cdiv(kv_len, block_tokens)
    width = num_blocks * block_tokens
    first_new = kv_len - q_len
    with style():
        fig = new_figure(9.4, 3.4)
        axes = fig.subplots()
        for position in range(width):
            _draw_row(axes, position, 1.0, kv_len, first_new)
        for position in range(len(pages) * page_size):
            _draw_row(axes, position, -1.0, kv_len, first_new, in_cache=True)
        for block in range(num_blocks):
            _frame(axes, block * block_tokens, block_tokens, 1.0, f"block {block} in VMEM", 1.75)
        for column, page in enumerate(pages):
            _frame(axes, column * page_size, page_size, -1.0, f"page {page}", -1.35)
        for position in range(kv_len):
            _draw_arrow(axes, position + 0.5, to_page=position >= first_new)
        axes.set(xlim=(-0.2, max(width, len(pages) * page_size) + 0.2), ylim=(-1.7, 2.2))
        axes.axis("off")
        handles = [
            Patch(facecolor=CACHED, edgecolor="#333333", label="cached: from its page"),
            Patch(facecolor=NEW, edgecolor="#333333", label="new: from new_kv, then to its page"),
            Patch(
                facecolor=STALE, hatch="///", edgecolor="#999999", label="stale, or not yet used"
            ),
        ]
        fig.legend(handles=handles, loc="outside lower left", ncols=3)
    plural = "s" * (num_blocks != 1)
    return alt(
        fig,
        f"A sequence of {kv_len} tokens, the last {q_len} of them new, in {num_blocks} "
        f"block{plural} of {block_tokens} tokens and the pages {', '.join(map(str, pages))} of "
        f"{page_size} tokens. New tokens enter their block from new_kv and leave it for their "
        f"pages: {_stores_in_words(kv_len, first_new, pages, page_size)}.",
    )


def _draw_row(axes, position, bottom, kv_len, first_new, in_cache=False):
    """One token of a block or of a page."""
    stale = position >= kv_len
    color = STALE if stale else NEW if position >= first_new else CACHED
    hatch = "///" if stale else None
    axes.add_patch(
        Rectangle((position, bottom), 1, 0.8, facecolor=color, hatch=hatch, edgecolor="#999999")
    )
    if not stale:
        axes.text(position + 0.5, bottom + 0.4, str(position), ha="center", va="center", size=10)


def _draw_arrow(axes, x, to_page):
    """Where the bytes of a token go: up into the block, or down to its page."""
    page_end, block_end = (x, -0.18), (x, 0.98)
    head, tail = (page_end, block_end) if to_page else (block_end, page_end)
    color = COLORS["red"] if to_page else COLORS["grey"]
    axes.annotate("", head, tail, arrowprops={"arrowstyle": "->", "color": color})


def _frame(axes, start, width, bottom, title, text_y):
    box = Rectangle((start, bottom), width, 0.8, fill=False, edgecolor="black", linewidth=1.8)
    axes.add_patch(box)
    y = text_y + 0.2 if text_y > 0 else text_y
    axes.text(start + width / 2, y, title, ha="center", va="center", size=10)


def _stores_in_words(kv_len, first_new, pages, page_size):
    words = []
    for column, page in enumerate(pages):
        begin = max(first_new, column * page_size)
        size = min(kv_len, (column + 1) * page_size) - begin
        if size > 0:
            words.append(f"page {page} from row {begin - column * page_size} on, {size} tokens")
    return "; ".join(words)
