"""The picture of a page pool too large to look into: one cell a page, coloured by its owner."""

from matplotlib.patches import Patch, Rectangle

from rpa.figures.style import CYCLE, alt, new_figure, style
from rpa.paging import cdiv

PAGES_PER_ROW = 16
HATCHES = ("", "///", "...")


def pool_map(pool, names, title="Who owns which page"):
    """Draw every page of a pool: its owner by colour and hatch, how full it is by the filled part.

    A page that several sequences list has a stripe for each of them.

    Args:
        pool: an `rpa.page_pool.PagePool`.
        names: the sequences to draw; more than there are colours get a hatch beside the colour.
        title: what stands above the picture.

    Returns:
        A `Picture`.

    >>> from rpa.page_pool import PagePool
    >>> pool = PagePool(4, 8)
    >>> pool.allocate("a", 12), pool.fork("a", "b", 8)
    ([], None)
    >>> pool_map(pool, ["a", "b"])
    Figure: Who owns which page. 4 pages of 8 tokens, 2 free: a has 12 tokens in 2 pages, b has 8 \
tokens in 1 page. Shared: page 0 of a and b.
    """
    looks = {
        name: (CYCLE[i % len(CYCLE)], HATCHES[i // len(CYCLE) % len(HATCHES)])
        for i, name in enumerate(names)
    }
    owners = {page: [] for page in range(pool.num_pages)}  # page -> (name, tokens in it)
    for name in names:
        for index, page in enumerate(pool.pages(name)):
            used = min(pool.page_size, pool.kv_len(name) - index * pool.page_size)
            owners[page].append((name, used / pool.page_size))
    rows = cdiv(pool.num_pages, PAGES_PER_ROW)
    with style():
        fig = new_figure(9, 1.5 + 0.5 * rows)
        axes = fig.subplots()
        for page, listed in owners.items():
            _draw_page(axes, page, listed, looks)
        axes.set(xlim=(-0.1, PAGES_PER_ROW), ylim=(rows, -0.1))
        axes.axis("off")
        axes.set_title(f"{title} ({pool.num_pages} pages of {pool.page_size} tokens)", loc="left")
        patches = [
            Patch(
                facecolor=color,
                hatch=hatch,
                edgecolor="white",
                label=f"{name} ({pool.kv_len(name)})",
            )
            for name, (color, hatch) in looks.items()
        ]
        fig.legend(handles=patches, ncols=5, loc="outside lower left", title="sequence (kv_len)")
    return alt(fig, _in_words(pool, names, owners, title))


def _draw_page(axes, page, listed, looks):
    left, top = page % PAGES_PER_ROW, page // PAGES_PER_ROW
    axes.add_patch(Rectangle((left, top), 0.92, 0.86, facecolor="#e8e8e8"))
    height = 0.86 / max(1, len(listed))
    for stripe, (name, filled) in enumerate(listed):
        color, hatch = looks[name]
        corner = (left, top + stripe * height)
        axes.add_patch(
            Rectangle(
                corner, 0.92 * filled, height, facecolor=color, hatch=hatch, edgecolor="white"
            )
        )
    axes.text(
        left + 0.46,
        top + 0.43,
        str(page),
        ha="center",
        va="center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85},
    )


def _in_words(pool, names, owners, title):
    each = ", ".join(
        f"{name} has {pool.kv_len(name)} tokens in {len(pool.pages(name))} "
        f"page{'s' * (len(pool.pages(name)) != 1)}"
        for name in names
    )
    shared = "; ".join(
        f"page {page} of {' and '.join(name for name, _ in listed)}"
        for page, listed in owners.items()
        if len(listed) > 1
    )
    return (
        f"{title}. {pool.num_pages} pages of {pool.page_size} tokens, {pool.num_free} free: "
        f"{each}. Shared: {shared or 'none'}."
    )
