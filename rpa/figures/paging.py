"""Pictures of chapter 2: memory that is reserved and not used, pages and their owners, the layout.

`page_owners` is the one figure that moves through the chapter: the page table above, the pool
below, drawn again after each step.
"""

import matplotlib.colors
import numpy as np
from matplotlib.patches import Rectangle

from rpa.figures.style import COLORS, CYCLE, alt, new_figure, style
from rpa.paging import cdiv

FREE = COLORS["light"]
PAGES_PER_ROW = 8
"""Pages of the pool that `page_owners` draws side by side."""


def pale(color, white=0.55):
    """Mix a colour with white, so that dark text on it can be read.

    >>> pale("#000000", white=1.0)
    '#ffffff'
    """
    rgb = np.array(matplotlib.colors.to_rgb(color))
    return matplotlib.colors.to_hex(rgb * (1 - white) + white)


def lengths(series, markers=()):
    """Draw how lengths are distributed: for every length, the part of requests at most as long.

    Args:
        series: name to int[num_requests], in tokens.
        markers: (label, tokens) pairs, each a vertical line.

    >>> lengths({"prompt": np.array([10, 30, 900])}, markers=[("context", 8192)]).text[:47]
    'Cumulative distribution of lengths in tokens, l'
    """
    with style():
        fig = new_figure(8, 3.8)
        axes = fig.subplots()
        for name, values in series.items():
            ordered = np.sort(values)
            share = np.arange(1, len(ordered) + 1) / len(ordered) * 100
            axes.plot(ordered, share, label=f"{name}: median {int(np.median(ordered)):,}")
        for label, tokens in markers:
            axes.axvline(tokens, color=COLORS["black"], linestyle="--", linewidth=1.2)
            axes.annotate(
                f"{label}: {tokens:,}", (tokens, 4), (-4, 0), textcoords="offset points", ha="right"
            )
        axes.set(xscale="log", xlabel="tokens", ylabel="requests at most this long, %")
        axes.set(title="Nobody knows how long a request will be", ylim=(0, 101))
        axes.legend(loc="upper left")
        medians = "; ".join(f"{name} {int(np.median(v)):,}" for name, v in series.items())
        return alt(
            fig,
            f"Cumulative distribution of lengths in tokens, logarithmic. Medians: {medians}. "
            f"The longest are far from the median: requests differ by orders of magnitude.",
        )


STRIP_KINDS = {
    "live": ("tokens in the cache now", COLORS["blue"]),
    "later": ("reserved, used later", COLORS["sky"]),
    "never": ("reserved, never used", COLORS["orange"]),
    "free": ("free", FREE),
}
"""What a piece of memory can be in `memory_strip` and `memory_use`, with its words and colour."""


def memory_strip(pieces, num_slots, title):
    """Draw a small memory as one strip of token slots.

    Args:
        pieces: (start, end, kind, label) tuples in slots; kind is one of `STRIP_KINDS`. What no
            piece covers is free.
        num_slots: length of the strip.
        title: what happened.

    >>> memory_strip([(0, 3, "live", "a")], num_slots=8, title="One sequence")
    Figure: One sequence. A strip of 8 slots. slots 0 to 2: a, live. The others are free.
    """
    with style():
        fig = new_figure(8, 2.2)
        axes = fig.subplots()
        axes.add_patch(Rectangle((0, 0), num_slots, 1, facecolor=FREE))
        used = ["free"]
        for start, end, kind, label in pieces:
            box = Rectangle((start, 0), end - start, 1, facecolor=_kind_color(kind))
            axes.add_patch(box)
            axes.text((start + end) / 2, 0.5, label, ha="center", va="center")
            used = used if kind in used else [*used, kind]
        for slot in range(num_slots + 1):
            axes.plot([slot, slot], [0, 1], color="white", linewidth=1)
        axes.set(xlim=(0, num_slots), ylim=(0, 1), yticks=[], xlabel="slot", title=title)
        axes.set_xticks(range(0, num_slots + 1, 4))
        axes.grid(False)
        shown = {kind: STRIP_KINDS[kind][0] for kind in STRIP_KINDS if kind in used}
        _legend_of_kinds(fig, shown, ncols=4)
        words = "; ".join(f"slots {s} to {e - 1}: {label}, {kind}" for s, e, kind, label in pieces)
        return alt(fig, f"{title}. A strip of {num_slots} slots. {words}. The others are free.")


def _legend_of_kinds(fig, kinds, ncols):
    """Explain the colours of `STRIP_KINDS`; `kinds` is kind to words, in the order shown."""
    handles = [Rectangle((0, 0), 1, 1, color=_kind_color(kind)) for kind in kinds]
    fig.legend(handles, list(kinds.values()), loc="outside lower center", ncols=ncols)


def _kind_color(kind):
    return FREE if kind == "free" else pale(STRIP_KINDS[kind][1], 0.3)


def memory_use(measured, num_slots):
    """Draw where the memory goes under each way to hand it out, as one stacked bar each.

    Args:
        measured: name to a dict with `running` (sequences served at once) and the slots that are
            `live`, `later` and `never` (see `STRIP_KINDS`); what is missing to num_slots is free.
        num_slots: token slots of the memory.

    >>> memory_use({"pages": {"running": 2, "live": 90, "later": 0, "never": 5}}, num_slots=100)
    Figure: Stacked bars of memory use. pages: 90 % live tokens, 2 sequences running.
    """
    with style():
        fig = new_figure(8, 0.9 + 0.62 * len(measured))
        axes = fig.subplots()
        for row, use in enumerate(measured.values()):
            left = 0.0
            slots = {kind: use[kind] for kind in ("live", "later", "never")}
            slots["free"] = num_slots - sum(slots.values())
            for kind, count in slots.items():
                percent = 100 * count / num_slots
                axes.barh(row, percent, left=left, color=_kind_color(kind))
                if percent >= 4:
                    axes.text(left + percent / 2, row, f"{percent:.0f}", ha="center", va="center")
                left += percent
            axes.text(101, row, f"{use['running']:.0f} running", va="center")
        axes.set_yticks(range(len(measured)), list(measured))
        axes.invert_yaxis()
        axes.set(xlim=(0, 118), xlabel="part of the memory, %", title="What the memory holds")
        axes.set_xticks(range(0, 101, 20))
        axes.grid(False)
        words = {kind: text for kind, (text, _) in STRIP_KINDS.items()}
        words["free"] = "free, but too little or too scattered for the next request"
        _legend_of_kinds(fig, words, ncols=2)
        text = "; ".join(
            f"{name}: {100 * use['live'] / num_slots:.0f} % live tokens, {use['running']:.0f} "
            "sequences running"
            for name, use in measured.items()
        )
        return alt(fig, f"Stacked bars of memory use. {text}.")


def page_owners(pool, names, title, pages_per_seq=None):
    """Draw a pool: the page table above, every slot of every page below, coloured by owner.

    A slot shows the position of its token in its sequence; a page that several sequences list has
    a stripe of each colour.

    Args:
        pool: an `rpa.page_pool.PagePool`, small enough to look at.
        names: the sequences to draw, in order; each gets a colour.
        title: what has just happened.
        pages_per_seq: width of the table drawn; default the longest page list.

    >>> from rpa.page_pool import PagePool
    >>> pool = PagePool(num_pages=4, page_size=2)
    >>> copies = pool.allocate("a", 3)
    >>> page_owners(pool, ["a"], "One sequence")
    Figure: One sequence. a has 3 tokens in pages [0, 1]. 2 of 4 pages of 2 slots are free.
    """
    colors = {name: pale(color) for name, color in zip(names, CYCLE, strict=False)}
    width = pages_per_seq or max([1, *(len(pool.pages(name)) for name in names)])
    pool_rows = cdiv(pool.num_pages, PAGES_PER_ROW)
    with style():
        fig = new_figure(8, 0.9 + 0.36 * len(names) + 0.8 * pool_rows)
        heights = [0.36 * len(names) + 0.3, 0.8 * pool_rows]
        table_axes, pool_axes = fig.subplots(2, 1, height_ratios=heights)
        _draw_table(table_axes, pool, colors, width)
        _draw_pool(pool_axes, pool, colors)
        table_axes.set_title(title)
    tables = "; ".join(
        f"{name} has {pool.kv_len(name)} tokens in pages {pool.pages(name)}" for name in names
    )
    return alt(
        fig,
        f"{title}. {tables or 'No sequence yet'}. {pool.num_free} of {pool.num_pages} pages of "
        f"{pool.page_size} slots are free.",
    )


def _draw_table(axes, pool, colors, width):
    for row, (name, color) in enumerate(colors.items()):
        axes.text(-0.15, row + 0.5, f"{name}:", ha="right", va="center", fontsize=11)
        pages = pool.pages(name)
        for i in range(width):
            live = i < len(pages)
            box = Rectangle((i, row + 0.1), 0.94, 0.8, facecolor=color if live else FREE)
            axes.add_patch(box)
            if live:
                axes.text(i + 0.47, row + 0.5, f"page {pages[i]}", ha="center", va="center")
        axes.text(width + 0.1, row + 0.5, f"kv_len {pool.kv_len(name)}", va="center")
    axes.set(xlim=(-1.6, max(width + 2, 7)), ylim=(max(1, len(colors)), 0))
    axes.axis("off")


def _draw_pool(axes, pool, colors):
    page_size = pool.page_size
    for page in range(pool.num_pages):
        row, column = divmod(page, PAGES_PER_ROW)
        left, top = column * (page_size + 0.6), row * 1.7
        axes.text(left, top - 0.12, f"page {page}", va="bottom", fontsize=9)
        owners = [name for name in colors if page in pool.pages(name)]
        for slot in range(page_size):
            box = Rectangle((left + slot, top), 0.94, 1, facecolor=FREE)
            axes.add_patch(box)
            filled = [
                (name, pool.pages(name).index(page) * page_size + slot)
                for name in owners
                if pool.pages(name).index(page) * page_size + slot < pool.kv_len(name)
            ]
            for stripe, (name, _) in enumerate(filled):
                height = 1 / len(filled)
                stripe = Rectangle((left + slot, top + stripe * height), 0.94, height)
                stripe.set_facecolor(colors[name])
                axes.add_patch(stripe)
            if filled:
                text = str(filled[0][1])
                axes.text(left + slot + 0.47, top + 0.5, text, ha="center", va="center", fontsize=9)
    columns = min(PAGES_PER_ROW, pool.num_pages)
    axes.set(xlim=(-0.3, columns * (page_size + 0.6)))
    axes.set_ylim(cdiv(pool.num_pages, PAGES_PER_ROW) * 1.7 - 0.5, -0.7)
    axes.axis("off")


def token_layout(num_kv_heads, head_dim, packing, lanes):
    """Draw one token of the cache as the TPU holds it: rows of 32-bit words, K and V packed.

    Args:
        num_kv_heads, head_dim: the true sizes.
        packing: values that share 32 bits.
        lanes: head_dim padded to whole rows of 128.

    >>> token_layout(num_kv_heads=3, head_dim=64, packing=2, lanes=128).text[:41]
    'One token of 3 KV heads of 64: 3 rows of '
    """
    rows = cdiv(2 * num_kv_heads, packing)
    with style():
        fig = new_figure(8, 0.9 + 0.32 * rows * packing)
        axes = fig.subplots()
        for combined in range(rows * packing):
            row, sub = divmod(combined, packing)
            y = row * (packing + 0.35) + sub
            head, is_value = divmod(combined, 2)
            real = head < num_kv_heads
            name = f"{'V' if is_value else 'K'} of head {head}" if real else "padding"
            color = pale(COLORS["orange" if is_value else "blue"]) if real else FREE
            axes.add_patch(Rectangle((0, y), lanes, 0.94, facecolor=FREE))
            axes.add_patch(Rectangle((0, y), head_dim if real else lanes, 0.94, facecolor=color))
            middle = (head_dim if real else lanes) / 2
            axes.text(middle, y + 0.47, name, ha="center", va="center", fontsize=9)
            if real and head_dim < lanes:
                text_x = (head_dim + lanes) / 2
                axes.text(text_x, y + 0.47, "padding", ha="center", va="center", fontsize=9)
            if sub == 0:
                middle_y = y + packing / 2 - 0.03
                axes.text(-2, middle_y, f"row {row}", ha="right", va="center")
        axes.set(xlim=(-14, lanes), ylim=(rows * (packing + 0.35), 0), yticks=[])
        axes.set(xlabel="lane", title=f"One token: {rows} rows, {packing} values in 32 bits")
        axes.set_xticks(range(0, lanes + 1, 32))
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_bounds(0, lanes)
        used = 2 * num_kv_heads * head_dim / (rows * packing * lanes)
        return alt(
            fig,
            f"One token of {num_kv_heads} KV heads of {head_dim}: {rows} rows of {lanes} lanes, "
            f"{packing} values in each 32-bit word, K and V of a head next to each other. "
            f"{100 * used:.0f} % of the bytes are K or V, the rest is padding.",
        )


def layout_waste(used_percent, head_counts, head_dims):
    """Draw how much of the cache is K and V, and how much is padding, as a table of colours.

    Args:
        used_percent: dtype name to f[len(head_counts), len(head_dims)].
        head_counts, head_dims: the numbers of KV heads and the head_dims of rows and columns.

    >>> table = np.array([[50.0, 100.0]])
    >>> layout_waste({"float32": table, "bfloat16": table}, [8], [64, 128]).text[:27]
    'Percent of the cache that i'
    """
    with style():
        fig = new_figure(8, 1.3 + 0.42 * len(head_counts))
        fig.suptitle("K and V, % of the cache", x=0.01, ha="left", weight="bold")
        grid = fig.subplots(1, len(used_percent), sharey=True)
        for axes, (dtype, table) in zip(grid, used_percent.items(), strict=True):
            axes.imshow(table, vmin=0, vmax=170, cmap="Blues", aspect="auto")
            for (row, column), percent in np.ndenumerate(table):
                axes.text(column, row, f"{percent:.0f}", ha="center", va="center")
            axes.set_xticks(range(len(head_dims)), head_dims)
            axes.set_yticks(range(len(head_counts)), head_counts)
            axes.set_title(dtype, weight="normal")
            axes.set(xlabel="head_dim")
            axes.grid(False)
        grid[0].set_ylabel("num_kv_heads")
        worst = min((table.min(), dtype) for dtype, table in used_percent.items())
        return alt(
            fig,
            "Percent of the cache that is K and V, by number of KV heads, head_dim and dtype. "
            f"The rest is padding. The least is {worst[0]:.0f} %, in {worst[1]}; head_dim 128 with "
            "an even number of heads wastes nothing.",
        )


def page_size_trade(page_sizes, waste_percent, page_kib, table_kib, smem_kib):
    """Draw what grows and what shrinks with the page size, one panel each.

    Args:
        page_sizes: tokens per page.
        waste_percent: part of the owned slots that is empty.
        page_kib: KiB that one copy of a page moves.
        table_kib: KiB of the page table of a whole batch.
        smem_kib: KiB of the chip's SMEM, drawn as a line.

    >>> page_size_trade([8, 16], [0.3, 0.6], [32, 64], [16384, 8192], smem_kib=1024).text[:46]
    'Three curves over the page size, 8 to 16 token'
    """
    panels = [
        ("Empty slots, %", waste_percent, "orange"),
        ("One page copy, KiB", page_kib, "green"),
        ("Page table, KiB", table_kib, "blue"),
    ]
    with style():
        fig = new_figure(8.6, 3.4)
        for axes, (title, values, color) in zip(fig.subplots(1, 3), panels, strict=True):
            axes.plot(page_sizes, values, "o-", color=COLORS[color])
            axes.set(title=title, xlabel="page_size, tokens")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", nonpositive="mask")  # pages of one token waste nothing
            shown = page_sizes[::2]
            axes.set_xticks(shown, [str(size) for size in shown])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.axhline(smem_kib, color=COLORS["black"], linestyle="--", linewidth=1.2)
        axes.annotate("SMEM", (page_sizes[0], smem_kib), (0, 4), textcoords="offset points")
        return alt(
            fig,
            f"Three curves over the page size, {page_sizes[0]} to {page_sizes[-1]} tokens. Empty "
            f"slots grow from {min(waste_percent):.2g} to {max(waste_percent):.2g} percent, the "
            f"bytes of a page copy grow in proportion, the page table shrinks in proportion, from "
            f"{max(table_kib):,.0f} to {min(table_kib):,.0f} KiB.",
        )


def prefix_bytes(alone_bytes, shared_bytes):
    """Draw the cache bytes of many sequences with one prefix, each with its own copy and shared.

    Args:
        alone_bytes, shared_bytes: (prefix, rest) of each.

    >>> prefix_bytes((4 * 2**30, 2**30), (2**30, 2**30)).text[-34:]
    ' shared pages 2.00 GiB: 60 % less.'
    """
    with style():
        fig = new_figure(8, 2.3)
        axes = fig.subplots()
        rows = {"own copies": alone_bytes, "shared pages": shared_bytes}
        for row, (prefix, rest) in enumerate(rows.values()):
            axes.barh(row, prefix / 2**30, color=pale(COLORS["orange"], 0.3))
            axes.barh(row, rest / 2**30, left=prefix / 2**30, color=pale(COLORS["blue"], 0.3))
            axes.text(
                (prefix + rest) / 2**30, row, f" {(prefix + rest) / 2**30:.2f} GiB", va="center"
            )
        axes.set_yticks(range(2), list(rows))
        axes.invert_yaxis()
        axes.set(xlabel="GiB of cache", title="One prefix, many sequences")
        axes.set_xlim(0, sum(alone_bytes) / 2**30 * 1.15)
        axes.grid(False)
        colors = [pale(COLORS[name], 0.3) for name in ("orange", "blue")]
        handles = [Rectangle((0, 0), 1, 1, color=color) for color in colors]
        fig.legend(handles, ["the prefix", "the rest"], loc="outside lower center", ncols=2)
        saved = 1 - sum(shared_bytes) / sum(alone_bytes)
        return alt(
            fig,
            f"Two bars of cache bytes. With its own copy of the prefix for each sequence "
            f"{sum(alone_bytes) / 2**30:.2f} GiB, with shared pages "
            f"{sum(shared_bytes) / 2**30:.2f} GiB: {100 * saved:.0f} % less.",
        )


def query_padding(q_lens):
    """Draw the queries of a batch padded to the longest: one column a sequence.

    Args:
        q_lens: new tokens of each sequence.

    >>> query_padding([1, 1, 8])
    Figure: 3 columns of 8 rows. 10 of 24 rows are queries, 42 %; the rest is padding.
    """
    q_lens = np.asarray(q_lens)
    with style():
        fig = new_figure(8, 3.2)
        axes = fig.subplots()
        places = np.arange(len(q_lens))
        axes.bar(places, np.full(len(q_lens), q_lens.max()), color=FREE, label="padding")
        axes.bar(places, q_lens, color=COLORS["blue"], label="queries that exist")
        axes.set(xlabel="sequence", ylabel="rows of queries", xticks=places)
        used = 100 * q_lens.sum() / (q_lens.max() * len(q_lens))
        axes.set_title(f"Padded to the longest: {used:.0f} % of the rows are queries")
        fig.legend(loc="outside lower center", ncols=2)
        return alt(
            fig,
            f"{len(q_lens)} columns of {q_lens.max()} rows. {int(q_lens.sum())} of "
            f"{int(q_lens.max() * len(q_lens))} rows are queries, {used:.0f} %; the rest is "
            "padding.",
        )
