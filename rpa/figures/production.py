"""Pictures of chapter 11: where the bytes go, what a last query block sees, error and context."""

import numpy as np
from matplotlib.patches import Patch, Rectangle

from rpa.figures.style import COLORS, alt, new_figure, style

GIB = 2**30


def kept_and_read(ways, weight_bytes, title="Where the bytes go"):
    """Draw what each way of keeping a cache holds in HBM, and what a decode step reads.

    Args:
        ways: {name: (bytes of KV kept, bytes of KV read in a step)}; the first is what the others
            are compared with.
        weight_bytes: of the model: kept, and read once in each step.
        title: what stands above the picture.

    >>> kept_and_read({"bfloat16": (2**31, 2**31), "float8": (2**30, 2**30)}, 2**30).text
    'Where the bytes go, in GiB of K and V beside 1.0 GiB of weights. bfloat16: 2.0 kept, 2.0 \
read; float8: 1.0 kept, 1.0 read.'
    """
    names, rows = list(ways), np.arange(len(ways))
    numbers = np.array(list(ways.values())) / GIB  # [ways, (kept, read)]
    with style():
        fig = new_figure(9.6, 1.7 + 0.42 * len(ways))
        panels = fig.subplots(1, 2, sharey=True)
        heads = ("kept in HBM", "read in one decode step")
        colors = (COLORS["sky"], COLORS["orange"])
        limit = 1.6 * (numbers.max() + weight_bytes / GIB)
        for axes, head, column, color in zip(panels, heads, numbers.T, colors, strict=True):
            axes.barh(rows, weight_bytes / GIB, color=COLORS["light"], edgecolor="#333333")
            axes.barh(rows, column, left=weight_bytes / GIB, color=color, edgecolor="#333333")
            for row, amount in zip(rows, column, strict=True):
                same = row > 0 and amount == column[0]
                text = f"{amount:.1f}" + (" no change" if same else "")
                axes.text((amount + weight_bytes / GIB) + 0.01 * limit, row, text, va="center")
            axes.set(xlim=(0, limit), xlabel="GiB")
            axes.set_title(head, fontsize=11)
            axes.grid(False, axis="y")
        panels[0].set_yticks(rows, names)
        panels[0].invert_yaxis()
        fig.suptitle(title, x=0.01, ha="left", fontweight="bold")
        labels = dict(zip(("weights", "K and V, kept", "K and V, read"), (COLORS["light"], *colors),
                          strict=True))  # fmt: skip
        handles = [
            Patch(facecolor=color, edgecolor="#333333", label=label)
            for label, color in labels.items()
        ]
        fig.legend(handles=handles, loc="outside lower left", ncols=3)
    words = "; ".join(
        f"{name}: {kept:.1f} kept, {read:.1f} read"
        for name, (kept, read) in zip(names, numbers, strict=True)
    )
    return alt(
        fig,
        f"{title}, in GiB of K and V beside {weight_bytes / GIB:.1f} GiB of weights. {words}.",
    )


LOOKS = {
    "written": (COLORS["green"], None, "seen by the last query block: written back"),
    "seen": (COLORS["sky"], None, "seen by an earlier query block"),
    "skipped": ("white", None, "hidden by the window, or later"),
    "lost": (COLORS["red"], "///", "new tokens that nobody writes"),
}


def lost_tokens(q_len, window, bq, bkv, title="Who writes the new tokens?"):
    """Draw which blocks of keys each query block of a fresh prompt visits, and which get lost.

    Args:
        q_len: tokens of the prompt; nothing is cached.
        window: keys that a query sees, itself included.
        bq, bkv: queries and keys of a block.
        title: what stands above the picture.

    >>> lost_tokens(7, window=3, bq=2, bkv=4).text[-73:]
    'writes the blocks of keys 1; the new tokens of block 0 are never written.'
    """
    num_q, num_kv = -(-q_len // bq), -(-q_len // bkv)
    visited = [
        range(max(q * bq - window + 1, 0) // bkv, (min((q + 1) * bq, q_len) - 1) // bkv + 1)
        for q in range(num_q)
    ]
    lost = [b for b in range(num_kv) if b not in visited[-1]]
    with style():
        fig = new_figure(9.2, 1.9 + 0.36 * num_q)
        axes = fig.subplots()
        for q, blocks in enumerate(visited):
            kind = "written" if q == num_q - 1 else "seen"
            for b in range(num_kv):
                _draw_cell(axes, b, q, kind if b in blocks else "skipped")
            first, last = q * bq, min((q + 1) * bq, q_len) - 1
            axes.text(
                -0.06, q + 0.5, _span(("query", "queries"), first, last), ha="right", va="center"
            )
        for b in range(num_kv):
            _draw_cell(axes, b, num_q + 0.5, "lost" if b in lost else "written")
            first, last = b * bkv, min((b + 1) * bkv, q_len) - 1
            axes.text(b + 0.5, -0.15, _span(("key", "keys"), first, last), ha="center", va="bottom")
        axes.text(-0.06, num_q + 1, "the cache afterwards", ha="right", va="center")
        axes.set(xlim=(-0.35 * num_kv, 1.01 * num_kv), ylim=(num_q + 1.6, -0.9))
        axes.axis("off")
        axes.set_title(title)
        handles = [
            Patch(facecolor=color, hatch=hatch, edgecolor="#333333", label=label)
            for color, hatch, label in LOOKS.values()
        ]
        fig.legend(handles=handles, loc="outside lower left", ncols=2)
    written = ", ".join(map(str, visited[-1]))
    return alt(
        fig,
        f"{title} A prompt of {q_len} tokens, a window of {window}, {num_q} query blocks of {bq}. "
        f"The last one writes the blocks of keys {written}; the new tokens of block "
        f"{', '.join(map(str, lost)) or 'none'} are never written.",
    )


def _span(names, first, last):
    one, several = names
    return f"{one} {first}" if first == last else f"{several} {first} to {last}"


def _draw_cell(axes, column, row, kind):
    color, hatch, _ = LOOKS[kind]
    axes.add_patch(
        Rectangle((column, row), 1, 1, facecolor=color, hatch=hatch, edgecolor="#333333")
    )


def error_by_length(lengths, errors, levels=(), title="Error against context length"):
    """Draw how wrong a way of computing is as the context grows, both axes logarithmic.

    Args:
        lengths: contexts in tokens.
        errors: {name: errors, one a length}, as parts of the largest value.
        levels: (name, error) of horizontal lines to compare with.
        title: what stands above the picture.

    >>> error_by_length([1024, 2048], {"bfloat16": [0.001, 0.5]}).text
    'Error against context length. bfloat16: 1.0e-03 at 1,024 tokens, 5.0e-01 at 2,048.'
    """
    looks = [("blue", "o", "-"), ("orange", "s", "-"), ("green", "^", "-"), ("red", "D", "--"),
             ("purple", "v", "--"), ("black", "x", "--")]  # fmt: skip
    with style():
        fig = new_figure(9.2, 4.9)
        axes = fig.subplots()
        for (name, values), (color, marker, line) in zip(errors.items(), looks, strict=False):
            axes.plot(
                lengths, np.maximum(values, 1e-9), line, color=COLORS[color], marker=marker,
                markersize=5, label=name,
            )  # fmt: skip
        for name, level in levels:
            axes.axhline(level, color=COLORS["grey"], linestyle=":", linewidth=1.5)
            axes.text(lengths[0], 2 * level, name, va="bottom", color="#333333")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.set(xlabel="Context in tokens", ylabel="Error, part of the largest value")
        axes.set_title(title)
        fig.legend(loc="outside lower left", ncols=2)
    words = "; ".join(
        f"{name}: {values[0]:.1e} at {lengths[0]:,} tokens, {values[-1]:.1e} at {lengths[-1]:,}"
        for name, values in errors.items()
    )
    return alt(fig, f"{title}. {words}.")
