"""Pictures of chapter 4: the online softmax, tiles, a block's journey, blocks skipped."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from rpa.chips import chip
from rpa.figures.schedule import occupancy
from rpa.figures.style import COLORS, alt, new_figure, style
from rpa.lab.schedule.schedule import schedule_for
from rpa.paging import cdiv
from rpa.tiled import flash_attention

BLOCK_KINDS = {"#": "whole: no mask", "+": "partly visible: masked", ".": "skipped"}
BLOCK_COLORS = {"#": COLORS["blue"], "+": COLORS["sky"], ".": COLORS["light"]}


def online_softmax(scores, states, *, title="The online softmax, block after block"):
    """Draw the scores of one row, cut into blocks, and the sum that is kept after each block.

    When the maximum grows, what was summed up before shrinks: its old size is drawn as an outline.

    Args:
        scores: f32[kv_len] of one query.
        states: (end, row_max, row_sum) after each block; `end` is one behind its last key.
        title: what stands above the picture.

    >>> online_softmax([1.0, 3.0, 2.0], [(2, 3.0, 1.14), (3, 3.0, 1.5)]).text[:50]
    'The scores of one query as bars, cut into 2 blocks'
    """
    scores = np.asarray(scores, float)
    with style():
        fig = new_figure(9.6, 3.9)
        above, kept = fig.subplots(1, 2, width_ratios=[3, 2])
        start = 0
        for end, row_max, _ in states:
            new = row_max > (scores[:start].max() if start else -np.inf)
            above.bar(range(start, end), scores[start:end], width=0.8, color=COLORS["sky"])
            above.plot([start - 0.45, end - 0.55], [row_max] * 2, color=COLORS["red"])
            words = f"max {row_max:g}" + (" (new)" if new and start else "")
            above.text((start + end - 1) / 2, row_max + 0.15, words, ha="center", va="bottom")
            if start:
                above.axvline(start - 0.5, color=COLORS["black"], linestyle="--", linewidth=1.2)
            start = end
        above.set(xlabel="key", ylabel="score", xticks=range(len(scores)))
        above.set_ylim(min(0.0, scores.min()), scores.max() * 1.25)
        above.set_title(title)
        shrunk = _draw_kept(kept, states)
    steps = "; ".join(f"after key {e - 1}: max {m:g}, sum {s:.3f}" for e, m, s in states)
    return alt(
        fig,
        f"The scores of one query as bars, cut into {len(states)} blocks, with the running maximum "
        "as a line. Next to them the running sum after each block: what was kept, shrunk by the "
        f"growth of the maximum, and on top of it the new weights. {steps}. {shrunk}".strip(),
    )


def _draw_kept(axes, states):
    """The running sum after each block, old and new part; returns what shrank, in words."""
    words, old_max, old_sum = [], None, 0.0
    for i, (_, row_max, row_sum) in enumerate(states):
        kept = 0.0 if old_max is None else old_sum * float(np.exp(old_max - row_max))
        axes.bar(i, kept, width=0.6, color=COLORS["blue"])
        axes.bar(i, row_sum - kept, bottom=kept, width=0.6, color=COLORS["sky"])
        axes.text(i, row_sum + 0.02, f"sum {row_sum:.3f}", ha="center", va="bottom")
        if kept < old_sum:
            axes.bar(i, old_sum, width=0.6, fill=False, edgecolor="black", ls="--", lw=1.2)
            factor = f"x {kept / old_sum:.3f}"
            axes.annotate(factor, (i, kept), (i + 0.34, kept), va="bottom", color=COLORS["blue"])
            words.append(f"Before block {i} is added, {old_sum:.3f} shrinks to {kept:.3f}.")
        old_max, old_sum = row_max, row_sum
    names = [f"after block {i}" for i in range(len(states))]
    axes.set_xticks(range(len(states)), names)
    axes.set_xlim(-0.6, len(states) - 0.1)
    axes.set_ylim(0, 1.25 * max(row_sum for _, _, row_sum in states))
    axes.set_title("What is kept: the sum", fontsize=11)
    axes.grid(axis="x", visible=False)
    handles = [
        Patch(facecolor="white", edgecolor="black", ls="--", label="the sum before"),
        Patch(facecolor=COLORS["blue"], label="kept of it"),
        Patch(facecolor=COLORS["sky"], label="new weights"),
    ]
    axes.figure.legend(handles=handles, loc="outside lower right", ncols=3)
    return " ".join(words)


def tiles(shapes, tile_rows=8, lanes=128):
    """Draw arrays cut into tiles, with the padding that fills the last ones up.

    Args:
        shapes: title to (rows, columns).
        tile_rows, lanes: of a tile; 8 x 128 for 32-bit types.

    >>> tiles({"a head": (5, 64)}).text
    'Arrays cut into tiles of 8 x 128. a head: 5 x 64 takes 1 tile, 31% of it used.'
    """
    words = []
    with style():
        fig = new_figure(9.0, 3.3)
        panels = np.atleast_1d(fig.subplots(1, len(shapes)))
        tallest = max(cdiv(rows, tile_rows) for rows, _ in shapes.values()) * tile_rows
        widest = max(cdiv(columns, lanes) for _, columns in shapes.values()) * lanes
        for axes, (title, (rows, columns)) in zip(panels, shapes.items(), strict=True):
            down, across = cdiv(rows, tile_rows), cdiv(columns, lanes)
            used = rows * columns / (down * across * tile_rows * lanes)
            _draw_tiles(axes, rows, columns, down, across, tile_rows, lanes)
            axes.set(xlim=(-2, widest + 2), ylim=(tallest + 0.2, -0.2))
            axes.set_title(f"{title}\n{rows} x {columns}: {used:.0%} used", fontsize=10)
            count = f"{down * across} tile{'s' if down * across > 1 else ''}"
            words.append(f"{title}: {rows} x {columns} takes {count}, {used:.0%} of it used")
        handles = [Patch(facecolor=COLORS["blue"]), Patch(facecolor=COLORS["light"])]
        fig.legend(handles, ["numbers", "padding"], loc="outside lower left", ncols=2)
    return alt(fig, f"Arrays cut into tiles of {tile_rows} x {lanes}. {'; '.join(words)}.")


def _draw_tiles(axes, rows, columns, down, across, tile_rows, lanes):
    axes.add_patch(
        Rectangle((0, 0), across * lanes, down * tile_rows, facecolor=COLORS["light"], linewidth=0)
    )
    axes.add_patch(Rectangle((0, 0), columns, rows, facecolor=COLORS["blue"], linewidth=0))
    for i, j in np.ndindex(down, across):
        edge = {"fill": False, "edgecolor": COLORS["black"], "linewidth": 1.0}
        axes.add_patch(Rectangle((j * lanes, i * tile_rows), lanes, tile_rows, **edge))
    axes.set_xticks(range(0, across * lanes + 1, lanes))
    axes.set_yticks(range(0, down * tile_rows + 1, tile_rows))
    axes.set_xlabel("lanes")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def journey(chip_or_name="v5e", *, rows=512, columns=128, item_bytes=2, q_rows=128):
    """Draw one block of K on its way from HBM to the matrix unit, with the time of each stage.

    Args:
        chip_or_name: a `Chip` or its name.
        rows, columns, item_bytes: of the block: tokens, head_dim, bytes of a number.
        q_rows: rows of queries that the block is multiplied with.

    >>> journey("v5e").text[:60]
    'The journey of a block of K, 512 x 128 numbers of 2 bytes (1'
    """
    c = chip(chip_or_name)
    block_bytes = rows * columns * item_bytes
    tile_rows = 8 * (4 // item_bytes)
    num_tiles = cdiv(rows, tile_rows) * cdiv(columns, 128)
    hbm_cycles = c.cycles(block_bytes / c.hbm_bytes_per_s)
    load_cycles = num_tiles / c.vload_slots
    product_cycles = 2 * q_rows * rows * columns / c.mxu_flops_per_cycle
    product_cycles *= max(1.0, c.mxu_size / columns)  # a narrow matrix leaves a wide MXU half empty
    stages = [
        ("HBM", "pages of the\nKV cache", f"DMA: {hbm_cycles:,.0f} cycles"),
        ("VMEM", f"one block:\n{block_bytes // 1024} KiB", f"loads: {load_cycles:,.0f} cycles"),
        (
            "VREGs",
            f"{num_tiles} tiles of\n{tile_rows} x 128",
            f"product: {product_cycles:,.0f} cycles",
        ),
        ("MXU", f"scores of\n{q_rows} rows", ""),
    ]
    with style():
        fig = new_figure(9.6, 2.6)
        axes = fig.subplots()
        axes.set_axis_off()
        axes.set(xlim=(-0.5, 100.5), ylim=(0, 22))
        for place, (name, holds, leaves) in enumerate(stages):
            _draw_stage(axes, 29 * place, name, holds, leaves, compute=name == "MXU")
        axes.set_title(
            f"A block of K, {rows} tokens x {columns}, on its way through a {c.name} (predicted)"
        )
    return alt(
        fig,
        f"The journey of a block of K, {rows} x {columns} numbers of {item_bytes} bytes "
        f"({block_bytes // 1024} KiB), through a {c.name}: from HBM to VMEM by DMA in "
        f"{hbm_cycles:,.0f} cycles, from VMEM to the vector registers as {num_tiles} tiles of "
        f"{tile_rows} x 128 in {load_cycles:,.0f} cycles, and through the matrix unit with "
        f"{q_rows} rows of queries in {product_cycles:,.0f} cycles, all predicted from peak rates.",
    )


def _draw_stage(axes, x, name, holds, leaves, compute):
    tint = "#FBEBCB" if compute else "#DCEBF5"
    axes.add_patch(Rectangle((x, 2), 12.5, 17, facecolor=tint, edgecolor="#333333", linewidth=1.3))
    axes.text(x + 6.25, 16.2, name, ha="center", va="center", fontsize=12, fontweight="bold")
    axes.text(x + 6.25, 8.5, holds, ha="center", va="center")
    if leaves:
        look = {"arrowstyle": "-|>", "mutation_scale": 16, "linewidth": 2.2, "shrinkA": 0}
        axes.add_patch(
            FancyArrowPatch((x + 13, 8), (x + 28.5, 8), color=COLORS["blue"], shrinkB=0, **look)
        )
        axes.text(x + 20.75, 12.6, leaves.replace(": ", "\n"), ha="center", va="center")


def block_grid(kinds, *, title="Which blocks are computed"):
    """Draw what happens to each pair of blocks, queries down, keys across.

    Args:
        kinds: str[num_q_blocks, num_kv_blocks] of "#", "+", ".", from `rpa.tiled.block_map`.
        title: what stands above the picture.

    >>> block_grid(np.array([["#", "+", "."], ["#", "#", "+"]])).text
    'A grid of 2 blocks of queries and 3 blocks of keys: 3 whole, 2 partly visible, 1 skipped.'
    """
    kinds = np.asarray(kinds)
    with style():
        fig = new_figure(8.0, 1.6 + 0.36 * len(kinds))
        axes = fig.subplots()
        for (i, j), kind in np.ndenumerate(kinds):
            color = BLOCK_COLORS[kind]
            axes.add_patch(Rectangle((j, i), 0.94, 0.94, facecolor=color, linewidth=0))
        axes.set(xlim=(-0.1, kinds.shape[1]), ylim=(len(kinds), -0.1))
        axes.set_xticks(np.arange(kinds.shape[1]) + 0.47, range(kinds.shape[1]))
        axes.set_yticks(np.arange(len(kinds)) + 0.47, range(len(kinds)))
        axes.set(xlabel="block of keys", ylabel="block of queries", title=title)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        handles = [Patch(facecolor=color) for color in BLOCK_COLORS.values()]
        fig.legend(handles, list(BLOCK_KINDS.values()), loc="outside lower left", ncols=3)
    counts = [int((kinds == kind).sum()) for kind in BLOCK_KINDS]
    return alt(
        fig,
        f"A grid of {kinds.shape[0]} blocks of queries and {kinds.shape[1]} blocks of keys: "
        f"{counts[0]} whole, {counts[1]} partly visible, {counts[2]} skipped.",
    )


def block_occupancy(chip_name="v5e"):
    """Compile rung 4 for a chip and draw which unit is busy while it computes one block of keys.

    512 rows (128 tokens x 4 heads) x 512 keys x head_dim 128, bfloat16, causal.

    Raises:
        rpa.lab.schedule.NoSchedule: where the compiler does not show its schedule, in words.
    """
    q, kv = (jax.ShapeDtypeStruct((n, h, 128), jnp.bfloat16) for n, h in ((512, 4), (1024, 1)))
    options = {"interpret": False, "block_q": 128, "block_kv": 512}
    schedule = schedule_for(chip_name, flash_attention, q, kv, kv, kwargs=options)
    products = (
        span for _, span in schedule.loops.walk() if schedule.describe(span)["slots"]["MATMUL"]
    )
    *_, innermost = products
    title = f"One block of 512 rows x 512 keys on a {chip_name}"
    return occupancy(schedule, innermost, title=title)


RECORDED = Path(__file__).parents[1] / "data" / "flash_occupancy_v5e.png"


def recorded_occupancy():
    """`block_occupancy` as tools/record_occupancy.py recorded it, where no compiler shows it.

    >>> recorded_occupancy().text[:22]
    'Occupancy of each unit'
    """
    pixels = matplotlib.image.imread(RECORDED)
    fig = new_figure(9.5, 9.5 * pixels.shape[0] / pixels.shape[1])
    fig.add_axes([0, 0, 1, 1], frameon=False, xticks=[], yticks=[]).imshow(pixels)
    return alt(fig, RECORDED.with_suffix(".txt").read_text(encoding="utf-8"))
