"""Pictures of a served model: how the bytes of a decode step divide into weights and attention."""

import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator

from rpa.figures.style import COLORS, CYCLE, alt, new_figure, style
from rpa.shapes import decode_step


def decode_share(
    model,
    batch_sizes=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    kv_lens=(512, 2048, 8192, 32768),
    dtype="bfloat16",
):
    """Draw how much of a decode step's bytes is attention, as batch and context grow.

    Args:
        model: a `rpa.shapes.ModelShape`.
        batch_sizes: sequences that decode together, the horizontal axis of both panels.
        kv_lens: contexts in tokens, one line each; the right panel takes the second.
        dtype: of weights and KV cache.

    >>> from rpa.shapes import LLAMA3_8B
    >>> decode_share(LLAMA3_8B, (1, 256), (512, 2048)).text[-59:]
    'and from 1.8 % to 82.1 % with 2,048 tokens of context each.'
    """
    with style():
        fig = new_figure(9.6, 4.2)
        left, right = fig.subplots(1, 2, width_ratios=[1.25, 1])
        shares = {
            kv_len: [decode_step(model, b, kv_len, dtype).attention_share for b in batch_sizes]
            for kv_len in kv_lens
        }
        _draw_share_lines(left, batch_sizes, shares)
        _draw_byte_bars(right, model, batch_sizes, kv_lens[1], dtype)
        fig.suptitle(f"One decode step of {model.name}, {dtype}", x=0.01, ha="left",
                     fontweight="bold")  # fmt: skip
    return alt(fig, _share_in_words(model, batch_sizes, shares))


def _draw_share_lines(axes, batch_sizes, shares):
    for (kv_len, share), color in zip(shares.items(), CYCLE, strict=False):
        axes.plot(batch_sizes, 100 * np.array(share), "o-", color=color, markersize=4,
                  label=f"{kv_len:,} tokens")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(batch_sizes, [str(b) for b in batch_sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 100)
    axes.set_xlabel("Sequences in the batch")
    axes.set_ylabel("Attention, share of HBM bytes (%)")
    axes.legend(title="Context of each", loc="upper left", frameon=True, framealpha=1,
                edgecolor="white")  # fmt: skip


def _draw_byte_bars(axes, model, batch_sizes, kv_len, dtype):
    steps = [decode_step(model, b, kv_len, dtype) for b in batch_sizes]
    weights = np.array([step.weight_bytes for step in steps]) / 1e9
    attention = np.array([step.attention_bytes for step in steps]) / 1e9
    rows = np.arange(len(batch_sizes))
    axes.bar(rows, weights, color=COLORS["light"], edgecolor="#333333", label="weights")
    axes.bar(rows, attention, bottom=weights, color=CYCLE[1], edgecolor="#333333",
             label=f"attention at {kv_len:,} tokens")  # fmt: skip
    axes.set_xticks(rows, [str(b) for b in batch_sizes])
    axes.set_xlabel("Sequences in the batch")
    axes.set_ylabel("HBM bytes of the step (GB)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(False, axis="x")
    axes.legend(loc="upper left")


def _share_in_words(model, batch_sizes, shares):
    lines = ", and ".join(
        f"from {100 * share[0]:.1f} % to {100 * share[-1]:.1f} % with {kv_len:,} tokens of context"
        for kv_len, share in shares.items()
    )
    return (
        f"The share of attention in the HBM bytes of one decode step of {model.name} rises with "
        f"the batch. Between {batch_sizes[0]} and {batch_sizes[-1]} sequences it goes {lines} each."
    )
