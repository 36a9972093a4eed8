"""Pictures of a ragged batch: whose token is whose, who sees what, and what padding wastes."""

import numpy as np
from matplotlib.patches import Patch, Rectangle

from rpa.figures.style import COLORS, alt, new_figure, style

KINDS = ("decode", "chunked prefill", "mixed")
"""The three ranges of `RaggedBatch.distribution`, in its order."""

KIND_COLORS = (COLORS["orange"], COLORS["blue"], COLORS["green"])
KIND_INKS = ("black", "white", "black")
"""What can be read on each of these colours: at least 4.5 to 1."""

CACHED, PADDING = COLORS["light"], "white"
MOST_TOKENS_AS_CELLS = 40
"""Up to this many tokens are drawn one by one; more become bars."""


def batch_figure(batch, *, names=None, num_tokens=None, title="A ragged batch"):
    """Draw a ragged batch: above its tokens in one row, below its sequences, each in its own.

    Args:
        batch: a `RaggedBatch`, whose values are read.
        names: a name for each sequence, in the order of the batch; default "seq 0", "seq 1", ...
        num_tokens: rows of queries, keys and values; default as many as the sequences own. More
            than that are drawn as padding rows.
        title: what stands above the picture.

    Returns:
        A `Picture`.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1, 3], [9, 3], [[0, 1], [2]])
    >>> batch_figure(batch)
    Figure: A ragged batch of 2 sequences and 4 new tokens. ...
    """
    cu_q_lens, kv_lens, kinds = _read(batch)
    names = _names(names, len(kv_lens))
    num_tokens = cu_q_lens[-1] if num_tokens is None else num_tokens
    with style():
        fig = new_figure(9.0, 2.3 + 0.36 * len(kv_lens))
        strip, rows = fig.subplots(2, 1, height_ratios=[1.0, 0.6 + 0.42 * len(kv_lens)])
        _draw_strip(strip, cu_q_lens, kinds, names, num_tokens)
        _draw_sequences(rows, cu_q_lens, kv_lens, kinds, names)
        strip.set_title(title)
        fig.legend(
            handles=_legend(batch, num_tokens > cu_q_lens[-1]), loc="outside lower left", ncols=5
        )
    ranges = [f"{kinds.count(kind)} {name}" for kind, name in enumerate(KINDS)]
    text = (
        f"A ragged batch of {len(kv_lens)} sequences and {cu_q_lens[-1]} new tokens. Above, the "
        "new tokens of all sequences in one row without gaps, cut at cu_q_lens = "
        f"{', '.join(map(str, cu_q_lens))}. Below, one bar a sequence: its cached tokens in grey, "
        f"its new tokens in colour at the end of it. Sequences: {', '.join(ranges)}."
    )
    return alt(fig, text)


def mask_figure(batch, *, names=None, title="Who sees what"):
    """Draw the causal mask of a whole ragged batch, a row a new token, a column a key.

    The keys of all sequences stand side by side; a token sees keys of its own sequence only, all
    of the cached ones, and of the new ones those up to itself. For small batches: it has a square
    for every pair.

    Args:
        batch: a `RaggedBatch`, whose values are read.
        names: a name for each sequence, in the order of the batch.
        title: what stands above the picture.

    Returns:
        A `Picture`.

    >>> from rpa.ragged import RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1, 3], [4, 5], [[0], [1]])
    >>> mask_figure(batch)
    Figure: The causal mask of 4 new tokens and 9 keys of 2 sequences: 16 of 36...
    """
    cu_q_lens, kv_lens, kinds = _read(batch)
    names = _names(names, len(kv_lens))
    cu_kv_lens = np.concatenate([[0], np.cumsum(kv_lens)])
    with style():
        fig = new_figure(9.0, 1.7 + 0.32 * cu_q_lens[-1])
        axes = fig.subplots()
        seen = sum(
            _draw_mask_block(axes, s, cu_q_lens, cu_kv_lens, KIND_COLORS[kind])
            for s, kind in enumerate(kinds)
        )
        for s, name in enumerate(names):
            middle = (cu_kv_lens[s] + cu_kv_lens[s + 1]) / 2
            axes.text(middle, -0.45, f"keys of {name}", ha="center", fontsize=10)
        axes.set(xlim=(-0.05, cu_kv_lens[-1] + 0.05), ylim=(cu_q_lens[-1] + 0.05, -1.2))
        axes.set_xticks(*_positions_ticks(cu_kv_lens))
        axes.set_yticks(np.arange(cu_q_lens[-1]) + 0.5, [f"t = {t}" for t in range(cu_q_lens[-1])])
        axes.set_xlabel("position of the key in its sequence")
        axes.set_title(title)
        _bare(axes)
        fig.legend(handles=_mask_legend(), loc="outside lower left", ncols=3)
    text = (
        f"The causal mask of {cu_q_lens[-1]} new tokens and {cu_kv_lens[-1]} keys of "
        f"{len(kv_lens)} sequences: {seen} of {cu_q_lens[-1] * cu_kv_lens[-1]} pairs are visible. "
        "Each sequence has a block of its own; in it a token sees the whole cached prefix and a "
        "staircase of the new tokens, and the staircase ends in the block's lower right corner."
    )
    return alt(fig, text)


def waste_figure(rows, *, title="What is touched for what is needed"):
    """Draw what each scheme touches beside what is needed, as bars with their ratio.

    Args:
        rows: (quantity, scheme, needed, touched) for each bar, for example
            ("query rows computed", "padded", 9, 16). Each quantity gets a panel, in the order of
            first appearance; its unit belongs into its name.
        title: what stands above the picture.

    Returns:
        A `Picture`.

    >>> waste_figure([("query rows", "padded", 9, 16), ("query rows", "ragged", 9, 9)])
    Figure: What is touched for what is needed. query rows: padded 16 (1.8 times what is needed), \
ragged 9 (1.0 times what is needed).
    """
    quantities = list(dict.fromkeys(row[0] for row in rows))
    sentences = []
    with style():
        most = max(sum(row[0] == quantity for row in rows) for quantity in quantities)
        fig = new_figure(9.0, 0.9 + (0.75 + 0.36 * most) * len(quantities))
        panels = fig.subplots(len(quantities), squeeze=False)[:, 0]
        for axes, quantity in zip(panels, quantities, strict=True):
            bars = [row[1:] for row in rows if row[0] == quantity]
            _draw_waste(axes, quantity, bars)
            words = ", ".join(
                f"{scheme} {touched:,} ({touched / needed:.1f} times what is needed)"
                for scheme, needed, touched in bars
            )
            sentences.append(f"{quantity}: {words}.")
        fig.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        needed, wasted = Patch(color=COLORS["blue"]), Patch(color=COLORS["red"], alpha=0.55)
        fig.legend([needed, wasted], ["needed", "wasted"], loc="outside lower left", ncols=2)
    return alt(fig, f"{title}. {' '.join(sentences)}")


def _read(batch):
    """cu_q_lens, kv_lens and the kind of each sequence, as lists without unused slots."""
    ends = [int(end) for end in batch.distribution]
    kinds = [int(np.searchsorted(ends, s, side="right")) for s in range(ends[2])]
    cu_q_lens = [int(row) for row in np.asarray(batch.cu_q_lens)[: ends[2] + 1]]
    return cu_q_lens, [int(n) for n in np.asarray(batch.kv_lens)[: ends[2]]], kinds


def _names(names, num_seqs):
    return [f"seq {s}" for s in range(num_seqs)] if names is None else list(names)


def _bare(axes):
    """No grid, no frame: the squares are the picture."""
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _bar(axes, start, width, row, as_cells, height=0.76, **kwargs):
    """A run of tokens: separate squares if there are few, else one bar."""
    pieces = range(width) if as_cells else [0]
    for piece in pieces:
        corner = (start + piece, row - height / 2)
        axes.add_patch(Rectangle(corner, 1 if as_cells else width, height, **kwargs))


def _draw_strip(axes, cu_q_lens, kinds, names, num_tokens):
    as_cells = num_tokens <= MOST_TOKENS_AS_CELLS
    edge = {"edgecolor": "white", "linewidth": 1.2} if as_cells else {"linewidth": 0}
    for s, kind in enumerate(kinds):
        start, end = cu_q_lens[s : s + 2]
        _bar(axes, start, end - start, 0, as_cells, facecolor=KIND_COLORS[kind], **edge)
        pieces = range(start, end) if as_cells else [start]
        width = 1 if as_cells else end - start
        # A name needs room: about one percent of the width for each letter.
        if width > 0.012 * len(names[s]) * num_tokens:
            for piece in pieces:
                place = {"ha": "center", "va": "center", "weight": "bold"}
                axes.text(piece + width / 2, 0, names[s], color=KIND_INKS[kind], **place)
    padding = {"facecolor": PADDING, "edgecolor": COLORS["grey"], "hatch": "////", "linewidth": 0.6}
    _bar(axes, cu_q_lens[-1], num_tokens - cu_q_lens[-1], 0, as_cells, **padding)
    cuts = _apart(cu_q_lens, num_tokens)
    for row in cuts:
        axes.plot([row, row], [-0.55, 0.55], color=COLORS["black"], linewidth=1.2, clip_on=False)
    # A batch of idle slots has no rows; an axis needs a width all the same.
    axes.set(xlim=(0, max(num_tokens, 1)), ylim=(-0.6, 0.6), yticks=[])
    axes.set_xticks(cuts)
    where = "" if as_cells else ", where there is room"
    axes.set_xlabel(f"row of queries, keys and values; black lines: cu_q_lens{where}")
    _bare(axes)


def _apart(ticks, length):
    """The ticks with room for their number, 0 first; where they crowd, the last of them."""
    kept, room = [], 0.03 * length
    for tick in sorted(set(ticks), reverse=True):
        if tick == 0 or (tick >= room and (not kept or kept[-1] - tick >= room)):
            kept.append(tick)
    return kept


def _draw_sequences(axes, cu_q_lens, kv_lens, kinds, names):
    longest = max(kv_lens, default=0) or 1  # idle slots may hold no token at all
    as_cells = longest <= MOST_TOKENS_AS_CELLS
    edge = {"edgecolor": "white", "linewidth": 1.2} if as_cells else {"linewidth": 0}
    for s, (kv_len, kind) in enumerate(zip(kv_lens, kinds, strict=True)):
        q_len = cu_q_lens[s + 1] - cu_q_lens[s]
        _bar(axes, 0, kv_len - q_len, s, as_cells, facecolor=CACHED, **edge)
        _bar(axes, kv_len - q_len, q_len, s, as_cells, facecolor=KIND_COLORS[kind], **edge)
        if 0 < q_len < 0.006 * longest:  # one token of thousands is thinner than a pixel
            axes.plot([kv_len] * 2, [s - 0.38, s + 0.38], color=KIND_COLORS[kind], linewidth=2.5)
        words = f"q_len {q_len}, kv_len {kv_len}"
        axes.text(kv_len + 0.012 * longest, s, words, va="center", fontsize=9)
    axes.set(xlim=(0, longest * 1.22), ylim=(len(kv_lens) - 0.4, -0.6))
    axes.set_yticks(range(len(kv_lens)), names)
    ticks = [tick for tick in axes.get_xticks() if tick <= longest and tick == int(tick)]
    axes.set_xticks(ticks)
    axes.set_xlabel("position in the sequence")
    _bare(axes)


def _legend(batch, with_padding):
    i, j, k = (int(end) for end in batch.distribution)
    ranges = [(0, i), (i, j), (j, k)]
    handles = [Patch(facecolor=CACHED, label="cached")]
    for name, color, (first, end) in zip(KINDS, KIND_COLORS, ranges, strict=True):
        handles.append(Patch(facecolor=color, label=f"new: {name} [{first}, {end})"))
    if with_padding:
        hatch = {"facecolor": PADDING, "edgecolor": COLORS["grey"], "hatch": "////"}
        handles.append(Patch(label="padding rows", **hatch))
    return handles


def _draw_mask_block(axes, s, cu_q_lens, cu_kv_lens, color):
    """One sequence's block of the mask; returns how many pairs are visible."""
    q_len, kv_len = cu_q_lens[s + 1] - cu_q_lens[s], cu_kv_lens[s + 1] - cu_kv_lens[s]
    seen = 0
    for t in range(q_len):
        position = kv_len - q_len + t
        for key in range(kv_len):
            corner = (cu_kv_lens[s] + key, cu_q_lens[s] + t)
            visible, cached = key <= position, key < kv_len - q_len
            seen += visible
            axes.add_patch(
                Rectangle(
                    corner,
                    1,
                    1,
                    facecolor=color if visible else "white",
                    alpha=0.45 if cached else 1.0,
                    edgecolor="white" if visible else COLORS["light"],
                    linewidth=1.2,
                )
            )
    corner = (cu_kv_lens[s], cu_q_lens[s])
    frame = {"fill": False, "edgecolor": COLORS["grey"], "linewidth": 1.0}
    axes.add_patch(Rectangle(corner, kv_len, q_len, **frame))
    return seen


def _positions_ticks(cu_kv_lens):
    """A tick in the middle of every key, labelled with its position in its own sequence."""
    places, labels = [], []
    for start, end in zip(cu_kv_lens[:-1], cu_kv_lens[1:], strict=True):
        places += [key + 0.5 for key in range(start, end)]
        labels += [str(key - start) for key in range(start, end)]
    return places, labels


def _mask_legend():
    color = COLORS["blue"]
    return [
        Patch(facecolor=color, alpha=0.45, label="visible, cached (pale)"),
        Patch(facecolor=color, label="visible, new (full colour)"),
        Patch(facecolor="white", edgecolor=COLORS["light"], label="hidden: later in the sequence"),
    ]


def _draw_waste(axes, quantity, bars):
    largest = max(touched for _, _, touched in bars)
    for row, (_, needed, touched) in enumerate(bars):
        axes.barh(row, needed, height=0.7, color=COLORS["blue"])
        axes.barh(row, touched - needed, left=needed, height=0.7, color=COLORS["red"], alpha=0.55)
        ratio = touched / needed
        words = f"{ratio:.{2 if ratio < 10 else 0}f} times what is needed"
        words = words if touched > needed else "no waste"
        axes.text(touched + 0.01 * largest, row, f"{touched:,}: {words}", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [scheme for scheme, _, _ in bars])
    axes.set(xlim=(0, 1.42 * largest), ylim=(len(bars) - 0.5, -0.5), xticks=[])
    axes.set_title(quantity, fontsize=10, fontweight="normal")
    _bare(axes)
