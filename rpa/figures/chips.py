"""Pictures of the hardware: one TensorCore in one picture, chips side by side, the roofline."""

import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import FuncFormatter, NullLocator

from rpa.chips import (
    GIB,
    KIB,
    LANES,
    MIB,
    SUBLANES,
    attainable_flops_per_s,
    chip,
    ridge_flops_per_byte,
)
from rpa.figures.style import COLORS, CYCLE, alt, new_figure, style

TINTS = {
    "memory": "#DCEBF5",
    "compute": "#FBEBCB",
    "control": "#E6E6E6",
    "core": "#F7F7F7",
}
"""Pale fills of the boxes, dark ink on all of them."""


def _box(axes, x, y, width, height, tint, title, lines=(), edge="#333333"):
    """A rounded box with a bold title and lines of small print, in axes units."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=1.2",
            facecolor=tint, edgecolor=edge, linewidth=1.3,
        )
    )  # fmt: skip
    middle, top = x + width / 2, y + height
    axes.text(middle, top - 1.8, title, ha="center", va="top", fontsize=12, fontweight="bold")
    axes.text(middle, top - 6.0, "\n".join(lines), ha="center", va="top", fontsize=10,
              linespacing=1.35)  # fmt: skip


def _arrow(axes, start, end, color, dashed=False, both=False):
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="<|-|>" if both else "-|>", mutation_scale=16, linewidth=2.2,
            color=color, linestyle=(0, (4, 2)) if dashed else "-", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def tpu(chip_or_name="v5e"):
    """Draw one TensorCore and its HBM with the sizes and bandwidths of a chip.

    Args:
        chip_or_name: a `Chip` or its name.

    >>> tpu("v5e").text[:28]
    'One TensorCore of a TPU v5e.'
    """
    c = chip(chip_or_name)
    with style():
        fig = new_figure(9.6, 5.2)
        axes = fig.subplots()
        axes.set_axis_off()
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 54)
        _draw_memories(axes, c)
        _draw_units(axes, c)
        _draw_paths(axes, c)
    return alt(fig, _tpu_in_words(c))


def _draw_memories(axes, c):
    on_a_chip = f"{c.cores_per_chip} TensorCores" if c.cores_per_chip > 1 else "1 TensorCore"
    axes.set_title(f"{c.device_kinds[-1]}: one TensorCore and its HBM", fontsize=13)
    axes.set_title(f"{c.clock_hz / 1e9:g} GHz, {on_a_chip} a chip", fontsize=10, loc="right",
                   fontweight="normal")  # fmt: skip
    axes.add_patch(
        FancyBboxPatch((31.5, 0.5), 68, 52.5, boxstyle="round,pad=0,rounding_size=1.5",
                       facecolor=TINTS["core"], edgecolor="#333333", linewidth=1.3,
                       linestyle="--")
    )  # fmt: skip
    _box(axes, 0.5, 2.5, 16.5, 48.5, TINTS["memory"], "HBM",
         [f"{c.hbm_bytes / GIB:g} GiB", "", "weights,", "the KV cache,", "queries, outputs",
          "", "No unit computes", "on HBM: what", "you work on is", "copied first."])  # fmt: skip
    _box(
        axes,
        33.5,
        20.5,
        16,
        30.5,
        TINTS["memory"],
        "VMEM",
        [f"{c.vmem_bytes / MIB:g} MiB", "", "the blocks that", "you work on,", "accumulators"],
    )
    _box(axes, 61.5, 20.5, 14.5, 30.5, TINTS["memory"], "VREGs",
         [f"{c.vreg_file_bytes // KIB} KiB", "", f"{c.num_vregs} registers",
          f"of {SUBLANES} x {LANES}", "x 32 bit"])  # fmt: skip
    _box(axes, 33.5, 2.5, 16, 13, TINTS["memory"], "SMEM",
         [f"{c.smem_bytes / MIB:g} MiB", "lengths, pages"])  # fmt: skip


def _draw_units(axes, c):
    _box(axes, 82, 37, 16, 14, TINTS["compute"], "MXU",
         [f"{c.num_mxus} x {c.mxu_size} x {c.mxu_size}",
          f"{c.peak() / 1e12:,.0f} TFLOP/s bf16"])  # fmt: skip
    _box(axes, 82, 20.5, 16, 14, TINTS["compute"], "VPU",
         [f"{c.valu_slots} x {SUBLANES} x {LANES} lanes", "exp, max, masks"])  # fmt: skip
    _box(axes, 61.5, 2.5, 36.5, 13, TINTS["control"], "Scalar core",
         ["loops and addresses;", "starts every copy and waits for it"])  # fmt: skip
    _box(axes, 20, 27, 9, 11, TINTS["control"], "DMA", ["engine"])


def _draw_paths(axes, c):
    blue, grey = COLORS["blue"], "#444444"
    for start, end in [((17, 32), (20, 32)), ((29, 32), (33.5, 32)), ((49.5, 32), (61.5, 32)),
                       ((76, 44), (82, 44)), ((76, 27), (82, 27))]:  # fmt: skip
        _arrow(axes, start, end, blue, both=True)
    axes.plot([22.5, 22.5], [27, 8], color=blue, linewidth=2.2)
    _arrow(axes, (22.3, 8), (33.5, 8), blue)
    _arrow(axes, (61.5, 8), (49.5, 8), grey, both=True)
    # The command to copy goes from the scalar core between VMEM and SMEM to the DMA engine.
    axes.plot([70, 70, 26.5], [15.5, 18, 18], color=grey, linewidth=2.2, linestyle=(0, (4, 2)))
    _arrow(axes, (26.5, 18), (26.5, 27), grey, dashed=True)
    for x, y, rate, what in [
        (24.5, 42, c.hbm_bytes_per_s, "HBM to VMEM"),
        (55.5, 37, c.vmem_load_bytes_per_s, "VMEM loads"),
    ]:
        axes.text(x, y + 3.3, f"{rate / 1e12:.3g} TB/s", ha="center", fontsize=11,
                  fontweight="bold", color=blue)  # fmt: skip
        axes.text(x, y, what, ha="center", fontsize=10, color=blue)


def _tpu_in_words(c):
    ratio = c.vmem_load_bytes_per_s / c.hbm_bytes_per_s
    return (
        f"One TensorCore of a {c.device_kinds[-1]}. On the left HBM with {c.hbm_bytes / GIB:g} "
        f"GiB, joined by a DMA engine at {c.hbm_bytes_per_s / 1e12:.3g} TB/s to VMEM with "
        f"{c.vmem_bytes / MIB:g} MiB. VMEM feeds {c.num_vregs} vector registers at up to "
        f"{c.vmem_load_bytes_per_s / 1e12:.3g} TB/s, {ratio:.0f} times as fast; the registers feed "
        f"{c.num_mxus} matrix units of {c.mxu_size} x {c.mxu_size} ({c.peak() / 1e12:,.0f} TFLOP/s "
        f"in bfloat16) and the vector unit. A scalar core with {c.smem_bytes / MIB:g} MiB of SMEM "
        "runs the loops and starts every DMA."
    )


def compare(names=("v5e", "v6e", "tpu7x")):
    """Draw chips side by side, one TensorCore each: compute, bandwidth, memories, ridge point.

    Args:
        names: chips or their names.

    >>> compare(["v5e", "v6e"]).text.startswith("Bars of v5e, v6e")
    True
    """
    chips = [chip(name) for name in names]
    panels = [
        ("Peak, bf16\n(TFLOP/s)", [c.peak() / 1e12 for c in chips]),
        ("HBM bandwidth\n(TB/s)", [c.hbm_bytes_per_s / 1e12 for c in chips]),
        ("Ridge point\n(FLOP/byte)", [ridge_flops_per_byte(c) for c in chips]),
        ("HBM\n(GiB)", [c.hbm_bytes / GIB for c in chips]),
        ("VMEM\n(MiB)", [c.vmem_bytes / MIB for c in chips]),
    ]
    with style():
        fig = new_figure(9.6, 1.7 + 0.45 * len(chips))
        for axes, (title, values) in zip(fig.subplots(1, len(panels)), panels, strict=True):
            _draw_bars(axes, title, values, [c.name for c in chips])
            if title != panels[0][0]:
                axes.set_yticklabels([])
        fig.suptitle("One TensorCore of each chip", x=0.01, ha="left", fontweight="bold")
    words = "; ".join(
        f"{c.name} {c.peak() / 1e12:,.0f} TFLOP/s, {c.hbm_bytes_per_s / 1e12:.3g} TB/s, ridge at "
        f"{ridge_flops_per_byte(c):.0f} FLOP a byte, {c.hbm_bytes / GIB:g} GiB of HBM, "
        f"{c.vmem_bytes / MIB:g} MiB of VMEM"
        for c in chips
    )
    return alt(fig, f"Bars of {', '.join(c.name for c in chips)}, a TensorCore each: {words}.")


def _draw_bars(axes, title, values, labels):
    rows = np.arange(len(values))
    axes.barh(rows, values, color=CYCLE[: len(values)], height=0.62)
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_xlim(0, 1.55 * max(values))  # room for the numbers behind the bars
    axes.set_title(title, fontsize=10, fontweight="normal")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    for row, value in zip(rows, values, strict=True):
        axes.text(value, row, f" {value:,.3g}" if value < 1000 else f" {value:,.0f}", va="center")


def roofline(names=("v5e", "v6e", "tpu7x"), points=(), dtype="bfloat16"):
    """Draw the rooflines of chips, and computations at their intensity.

    Args:
        names: chips or their names.
        points: (label, intensity in FLOP per HBM byte) of each computation; a vertical line is
            drawn there, and a dot where it meets each roof.
        dtype: the type that the MXU multiplies.

    >>> roofline(["v5e"], [("decode", 4.0)]).text[-60:]
    'At 4 FLOP a byte (decode) v5e can do 3 TFLOP/s, 2 % of peak.'
    """
    chips = [chip(name) for name in names]
    intensities = np.geomspace(0.5, 1e4, 200)
    with style():
        fig = new_figure(8.0, 5.0)
        axes = fig.subplots()
        for c, color in zip(chips, CYCLE, strict=False):
            roof = attainable_flops_per_s(c, intensities, dtype) / 1e12
            ridge = ridge_flops_per_byte(c, dtype)
            axes.plot(intensities, roof, color=color, label=f"{c.name} (ridge at {ridge:.0f})")
            meets = [attainable_flops_per_s(c, x, dtype) / 1e12 for _, x in points]
            axes.plot([x for _, x in points], meets, "o", color=color, markersize=7)
        _draw_intensities(axes, points)
        label_roofline(axes, dtype)
    return alt(fig, _roofline_in_words(chips, points, dtype))


def _draw_intensities(axes, points):
    """A lettered line for each point; the key spells the letters out, so labels never collide."""
    key = []
    for letter, (label, intensity) in zip("ABCDEFGH", points, strict=False):
        axes.axvline(intensity, color=COLORS["grey"], linestyle=":", linewidth=1.5)
        axes.annotate(letter, (intensity, 1.0), (0, 3), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="center", fontsize=11, fontweight="bold",
                      annotation_clip=False)  # fmt: skip
        key.append(f"{letter}  {label}: {intensity:,.3g} FLOP/byte" if intensity < 100
                   else f"{letter}  {label}: {intensity:,.0f} FLOP/byte")  # fmt: skip
    axes.text(0.98, 0.04, "\n".join(key), transform=axes.transAxes, ha="right", va="bottom",
              fontsize=10, linespacing=1.5, multialignment="left",
              bbox={"facecolor": "white", "edgecolor": "#BBBBBB", "pad": 5})  # fmt: skip


def label_roofline(axes, dtype):
    """Axes, title and legend of a roofline, shared with `rpa.figures.roofline`."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("Intensity (FLOP per byte of HBM)")
    axes.set_ylabel(f"Attainable, {dtype} (TFLOP/s)")
    axes.set_title("Roofline of one TensorCore", pad=20)
    axes.legend(loc="upper left", frameon=True, framealpha=1, edgecolor="white")


def _roofline_in_words(chips, points, dtype):
    ridges = ", ".join(f"{c.name} {ridge_flops_per_byte(c, dtype):.0f}" for c in chips)
    words = [
        "Rooflines on logarithmic axes: attainable TFLOP/s rises with intensity, then is flat at "
        f"the peak. Ridge points in FLOP a byte: {ridges}."
    ]
    for label, intensity in points:
        reached = ", ".join(
            f"{c.name} can do {flops / 1e12:,.0f} TFLOP/s, {flops / c.peak(dtype):.0%} of peak"
            for c in chips
            for flops in [attainable_flops_per_s(c, intensity, dtype)]
        ).replace("%", " %")
        words.append(f"At {intensity:,.0f} FLOP a byte ({label}) {reached}.")
    return " ".join(words)
