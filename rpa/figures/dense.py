"""Pictures of chapter 1: the formula with its numbers, masks, shared heads, a growing cache.

`by_hand` is the figure that moves through the chapter: scores, weights, output of three tokens.
"""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rpa.figures.style import COLORS, CYCLE, alt, new_figure, style

WHITE_TO_BLUE = LinearSegmentedColormap.from_list("white to blue", ["#FFFFFF", "#7FB8D9"])
"""Pale enough at its dark end that black numbers can be read on it."""

HIDDEN = COLORS["light"]

MASK_COLORS = {
    "seen, cached before": COLORS["sky"],
    "seen, new": COLORS["blue"],
    "hidden": HIDDEN,
}


def by_hand(scores, weights, output):
    """Draw attention of a few tokens with all its numbers: scores, weights, output.

    Args:
        scores: f32[q_len, kv_len]; -inf is drawn as hidden.
        weights: f32[q_len, kv_len].
        output: f32[q_len, head_dim].

    >>> by_hand(np.zeros((1, 2)), np.full((1, 2), 0.5), np.ones((1, 2))).text[:36]
    'Three tables, one row per query. Sco'
    """
    panels = {
        "scores = q · k / √head_dim": ("key", scores),
        "weights = softmax(scores)": ("key", weights),
        "output = weights · V": ("lane", output),
    }
    with style():
        fig = new_figure(9.0, 1.5 + 0.55 * len(scores))
        for axes, (title, (axis, table)) in zip(fig.subplots(1, 3), panels.items(), strict=True):
            _draw_table(axes, np.asarray(table, float), title, axis)
    words = "; ".join(
        f"{title.split(' = ')[0].capitalize()}: {_rows_in_words(np.asarray(table, float))}"
        for title, (_, table) in panels.items()
    )
    return alt(fig, f"Three tables, one row per query. {words}.")


def _draw_table(axes, table, title, axis):
    hidden = ~np.isfinite(table)
    shown = np.where(hidden, 0.0, table)
    axes.imshow(shown, cmap=WHITE_TO_BLUE, vmin=0.0, vmax=max(1.0, shown.max()), aspect="auto")
    for row, column in np.ndindex(*table.shape):
        if hidden[row, column]:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=HIDDEN))
        text = "hidden" if hidden[row, column] else f"{table[row, column]:.2f}"
        axes.text(column, row, text, ha="center", va="center")
    axes.set_xticks(range(table.shape[1]), [f"{axis} {i}" for i in range(table.shape[1])])
    axes.set_yticks(range(table.shape[0]), [f"query {i}" for i in range(table.shape[0])])
    axes.set_title(title, fontsize=11)
    axes.grid(False)
    axes.tick_params(length=0)


def _rows_in_words(table):
    rows = (", ".join(f"{x:.2f}" if np.isfinite(x) else "hidden" for x in row) for row in table)
    return " | ".join(rows)


def masks(named, cached=0):
    """Draw masks side by side: which query (row) sees which key (column).

    Args:
        named: title to bool[q_len, kv_len], all with the same kv_len.
        cached: keys before this one are in the cache already; a line marks where new ones begin.
            An int for all masks, or one for each.

    >>> masks({"decode": np.ones((1, 4), bool)}, cached=3).text
    'Masks, one row per query. decode: 1 x 4, sees 4 of 4 keys; 3 keys are cached.'
    """
    cached = np.broadcast_to(cached, len(named)).tolist()
    widest = max(mask.shape[1] for mask in named.values())
    tallest = max(mask.shape[0] for mask in named.values())
    with style():
        fig = new_figure(2.5 * len(named), 1.3 + 2.0 * tallest / widest)
        panels = np.atleast_1d(fig.subplots(1, len(named)))
        for axes, (title, mask), old in zip(panels, named.items(), cached, strict=True):
            _draw_mask(axes, np.asarray(mask), title, old, tallest)
        panels[0].set_ylabel("query position")
        handles = [Rectangle((0, 0), 1, 1, color=color) for color in MASK_COLORS.values()]
        fig.legend(handles, list(MASK_COLORS), loc="outside lower center", ncols=3)
    words = "; ".join(
        f"{title}: {mask.shape[0]} x {mask.shape[1]}, sees {int(mask.sum())} of {mask.size} keys; "
        f"{old} keys are cached"
        for (title, mask), old in zip(named.items(), cached, strict=True)
    )
    return alt(fig, f"Masks, one row per query. {words}.")


def _draw_mask(axes, mask, title, cached, tallest):
    q_len, kv_len = mask.shape
    for row, column in np.ndindex(q_len, kv_len):
        seen = "seen, cached before" if column < cached else "seen, new"
        face = MASK_COLORS[seen if mask[row, column] else "hidden"]
        axes.add_patch(Rectangle((column, row), 0.92, 0.92, facecolor=face))
    if 0 < cached < kv_len:
        axes.plot([cached - 0.04] * 2, [-0.1, q_len], color=COLORS["black"], linewidth=2)
    first_position = kv_len - q_len
    axes.set_yticks(np.arange(q_len) + 0.46, [str(first_position + row) for row in range(q_len)])
    axes.set_xticks(np.arange(kv_len) + 0.46, [str(column) for column in range(kv_len)])
    axes.set(xlim=(-0.1, kv_len), ylim=(tallest, -0.1), aspect="equal", xlabel="key position")
    axes.set_title(title, fontsize=11)
    axes.grid(False)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def heads(named, num_q_heads=8):
    """Draw which KV head each query head reads, for MHA, GQA and MQA.

    Args:
        named: title to num_kv_heads, which divides num_q_heads.
        num_q_heads: query heads.

    >>> heads({"MQA": 1}, num_q_heads=4).text
    'Query heads above, KV heads below. MQA: 4 query heads a KV head, 1 KV heads to store.'
    """
    with style():
        fig = new_figure(3.2 * len(named), 2.4)
        panels = np.atleast_1d(fig.subplots(1, len(named)))
        for axes, (title, num_kv_heads) in zip(panels, named.items(), strict=True):
            _draw_heads(axes, title, num_q_heads, num_kv_heads)
    words = "; ".join(
        f"{title}: {num_q_heads // n} query heads a KV head, {n} KV heads to store"
        for title, n in named.items()
    )
    return alt(fig, f"Query heads above, KV heads below. {words}.")


def _draw_heads(axes, title, num_q_heads, num_kv_heads):
    group = num_q_heads // num_kv_heads
    for q_head in range(num_q_heads):
        kv_head = q_head // group
        color = CYCLE[kv_head % 6]
        middle = (kv_head + 0.5) * group - 0.5
        axes.plot([q_head, middle], [1.0, 0.0], color=color, linewidth=1.5, zorder=1)
        axes.plot(q_head, 1.0, "o", color=color, markersize=13)
        axes.text(q_head, 1.28, str(q_head), ha="center", va="center")
    for kv_head in range(num_kv_heads):
        middle = (kv_head + 0.5) * group - 0.5
        axes.plot(middle, 0.0, "s", color=CYCLE[kv_head % 6], markersize=14)
        axes.text(middle, -0.3, str(kv_head), ha="center", va="center")
    axes.set(xlim=(-0.7, num_q_heads - 0.3), ylim=(-0.45, 1.45), xticks=[], yticks=[])
    axes.set_yticks([0, 1], ["KV", "query"])
    axes.set_title(title, fontsize=11)
    axes.grid(False)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def growing_cache(named_ms, kv_lens, machine):
    """Draw the time of each decode step while the cache grows, one line a way to hold the cache.

    Args:
        named_ms: label to f64[num_steps], milliseconds per step.
        kv_lens: i64[num_steps], length of the cache at each step.
        machine: where it was measured, for the title.

    >>> growing_cache({"a": [1.0, 2.0]}, [8, 9], "a laptop").text
    'Milliseconds of each decode step, measured on a laptop. a: median 1.5 ms.'
    """
    with style():
        fig = new_figure(8.0, 3.6)
        axes = fig.subplots()
        for (label, steps_ms), marker in zip(named_ms.items(), "os^D", strict=False):
            axes.plot(kv_lens, steps_ms, marker=marker, label=label)
        axes.set_yscale("log")
        times_ms = np.concatenate([np.asarray(steps) for steps in named_ms.values()])
        axes.set_ylim(times_ms.min() / 1.6, times_ms.max() * 1.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="tokens in the cache (kv_len)", ylabel="time of one decode step (ms)")
        axes.set_title(f"Measured on {machine}")
        axes.legend()
    words = "; ".join(
        f"{label}: median {np.median(steps):,.1f} ms" for label, steps in named_ms.items()
    )
    return alt(fig, f"Milliseconds of each decode step, measured on {machine}. {words}.")
