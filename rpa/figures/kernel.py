"""Pictures of chapters 7 and 8: the kernel as one diagram, and a ragged batch going through it."""

from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from rpa.figures.style import COLORS, alt, new_figure, style

BOXES = {  # name: (left, bottom, width, height, text)
    "table": (0.3, 6.3, 2.3, 0.8, "page table"),
    "cache": (0.3, 4.5, 2.3, 1.2, "KV cache\n(pages)"),
    "new": (0.3, 3.1, 2.3, 0.8, "new K and V"),
    "queries": (0.3, 1.8, 2.3, 0.8, "queries"),
    "output": (0.3, 0.5, 2.3, 0.8, "output"),
    "chunk": (4.6, 6.3, 2.6, 0.8, "entries of the\nKV blocks"),
    "kv": (4.6, 3.9, 2.6, 1.3, "KV blocks\nof some iterations"),
    "q": (4.6, 1.8, 2.6, 0.8, "query blocks"),
    "o": (4.6, 0.5, 2.6, 0.8, "output blocks"),
    "traversal": (8.9, 6.3, 2.8, 0.8, "traversal: what is next?\npipeline: what is in flight?"),
    "tile": (8.9, 3.4, 2.8, 1.8, "one tile:\nQ K$^T$, mask if needed,\nexp, P V"),
    "state": (8.9, 1.4, 2.8, 1.1, "softmax state\nof the query block"),
}
MEMORIES = {  # title: (left, bottom, width, height)
    "HBM": (0.1, 0.2, 2.7, 7.5),
    "SMEM": (4.4, 6.1, 7.5, 1.6),
    "VMEM": (4.4, 0.2, 7.5, 5.5),
}
ARROWS = [  # from, to, when
    ("table", "chunk", "looked up"),
    ("cache", "kv", "fetched, some iterations later"),
    ("new", "kv", "fetched, some iterations later"),
    ("queries", "q", "fetched, some iterations later"),
    ("kv", "cache", "stored at the same time"),
    ("kv", "tile", "computed, some iterations later"),
    ("q", "tile", "computed, some iterations later"),
    ("tile", "state", "computed, some iterations later"),
    ("state", "o", "at the end of a query block"),
    ("o", "output", "at the end of a query block"),
    ("traversal", "chunk", "looked up"),
]
NUDGED = {("cache", "kv"): (0.3, 0.35), ("kv", "cache"): (0.05, -0.15), ("new", "kv"): (0, -0.4)}
"""How much higher an arrow starts and ends than in the middle of its boxes: apart from others."""

WHEN = {
    "looked up": COLORS["purple"],
    "fetched, some iterations later": COLORS["blue"],
    "computed, some iterations later": COLORS["orange"],
    "stored at the same time": COLORS["red"],
    "at the end of a query block": COLORS["green"],
}
"""What an arrow's colour means, in the order of the legend."""

TILE_LOOKS = {
    "interior": (COLORS["sky"], None),
    "masked": (COLORS["orange"], "///"),
    "skip": ("white", None),
}
"""Colour and hatch of a tile by what the mask does to it."""


def diagram():
    """Draw the whole kernel: its memories, what lies where, and every way that data takes.

    >>> diagram().text[:46]
    'The kernel in one picture. In HBM: page table,'
    """
    with style():
        fig = new_figure(9.6, 6.6)
        axes = fig.subplots()
        for title, (left, bottom, width, height) in MEMORIES.items():
            box = Rectangle((left, bottom), width, height, facecolor="#F4F4F4", edgecolor="#999999")
            axes.add_patch(box)
            axes.text(left + 0.1, bottom + height + 0.08, title, fontweight="bold", va="bottom")
        for left, bottom, width, height, text in BOXES.values():
            box = Rectangle((left, bottom), width, height, facecolor="white", edgecolor="black")
            axes.add_patch(box)
            axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center")
        for source, target, when in ARROWS:
            nudge = NUDGED.get((source, target), (0, 0))
            _draw_arrow(axes, BOXES[source], BOXES[target], WHEN[when], nudge)
        axes.set(xlim=(0, 12.1), ylim=(0, 8.2))
        axes.axis("off")
        handles = [Patch(color=color, label=when) for when, color in WHEN.items()]
        fig.legend(handles=handles, loc="outside lower left", ncols=3)
    return alt(
        fig,
        "The kernel in one picture. In HBM: page table, KV cache, new K and V, queries, output. In "
        "SMEM: the table entries of the KV blocks, the traversal that says which work item is "
        "next, and the ring of those in flight. In VMEM: KV blocks of some iterations, query and "
        "output blocks, and the softmax state of the query block. A work item is looked up: its "
        "table entries are asked for. Some iterations later it is fetched: pages, new K and V and "
        "queries; new K and V are stored in the cache out of the KV blocks at the same time (only "
        "a decode stores its one token from HBM to HBM). Some iterations later one tile after the "
        "other is computed. At the end of a query block the output leaves.",
    )


def _draw_arrow(axes, source, target, color, nudge):
    """From the nearer sides of two boxes, in the middle of them or `nudge` higher."""
    (x0, y0, w0, h0, _), (x1, y1, w1, h1, _) = source, target
    middle0 = (x0 + w0 / 2, y0 + h0 / 2 + nudge[0])
    middle1 = (x1 + w1 / 2, y1 + h1 / 2 + nudge[1])
    if x0 + w0 <= x1:
        start, end = (x0 + w0, middle0[1]), (x1, middle1[1])
    elif x1 + w1 <= x0:
        start, end = (x0, middle0[1]), (x1 + w1, middle1[1])
    elif y0 > y1:
        start, end = (middle0[0], y0), (middle1[0], y1 + h1)
    else:
        start, end = (middle0[0], y0 + h0), (middle1[0], y1)
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=16, color=color, linewidth=2.2,
        shrinkA=1, shrinkB=1,
    )  # fmt: skip
    axes.add_patch(arrow)


def batch_walk(steps, num_kv_blocks, names, title="A ragged batch on its way through the kernel"):
    """Draw the steps of a batch: a grid a sequence, query blocks down, KV blocks across.

    Args:
        steps: (sequence, query block, KV block, kind) in the kernel's order; kind is one of
            `TILE_LOOKS`. Steps are numbered from 0.
        num_kv_blocks: for each sequence, KV blocks that hold its tokens; those that no step visits
            are drawn empty.
        names: for each sequence, what stands beside its grid.
        title: what stands above the picture.

    >>> batch_walk([(0, 0, 0, "masked"), (1, 0, 0, "masked")], [1, 2], ["A", "B"])
    Figure: A ragged batch on its way through the kernel. 2 steps: A 1 (masked), B 1 (masked).
    """
    num_q_blocks = [
        1 + max((q for s, q, *_ in steps if s == i), default=0) for i in range(len(names))
    ]
    with style():
        fig = new_figure(9.4, 1.3 + 0.42 * (sum(num_q_blocks) + len(names)))
        axes = fig.subplots()
        top = 0.0
        for s, name in enumerate(names):
            _draw_grid(axes, steps, s, top, num_q_blocks[s], num_kv_blocks[s])
            axes.text(-0.15, top + num_q_blocks[s] / 2, name, ha="right", va="center")
            top += num_q_blocks[s] + 0.55
        widest = max(num_kv_blocks)
        for block in range(widest):
            axes.text(block + 0.5, -0.25, f"KV block {block}", ha="center", va="bottom", size=9)
        axes.set(xlim=(-0.02 - 0.32 * widest, widest + 0.05), ylim=(top - 0.4, -0.9))
        axes.axis("off")
        axes.set_title(title)
        words = {"interior": "no mask needed", "masked": "masked", "skip": "not read"}
        handles = [
            Patch(facecolor=c, hatch=h, edgecolor="#333333", label=words[kind])
            for kind, (c, h) in TILE_LOOKS.items()
        ]
        fig.legend(handles=handles, loc="outside lower left", ncols=3)
    return alt(fig, f"{title}. {len(steps)} steps: {_walk_in_words(steps, names)}.")


def _draw_grid(axes, steps, s, top, num_q_blocks, num_kv_blocks):
    """The blocks of one sequence; the number in a block is the step that computes it."""
    visited = {(q, b): (n, kind) for n, (i, q, b, kind) in enumerate(steps) if i == s}
    for q in range(num_q_blocks):
        for b in range(num_kv_blocks):
            number, kind = visited.get((q, b), (None, "skip"))
            color, hatch = TILE_LOOKS[kind]
            axes.add_patch(
                Rectangle((b, top + q), 1, 1, facecolor=color, hatch=hatch, edgecolor="#333333")
            )
            if number is not None:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axes.text(
                    b + 0.5, top + q + 0.5, str(number), ha="center", va="center", bbox=box
                )  # fmt: skip


def _walk_in_words(steps, names):
    words = []
    for s, name in enumerate(names):
        kinds = [kind for i, *_, kind in steps if i == s]
        counts = ", ".join(f"{kinds.count(k)} {k}" for k in TILE_LOOKS if k in kinds)
        words.append(f"{name} none" if not kinds else f"{name} {counts}")
        if len(set(kinds)) == 1:
            words[-1] = f"{name} {len(kinds)} ({kinds[0]})"
    return ", ".join(words)
