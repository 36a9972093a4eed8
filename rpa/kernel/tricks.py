"""The optimisations of this kernel in one list: what each does, when it applies, what it is worth.

Rung 7 computes the same without any of them. Bundles are predicted by the schedule for TPU7x unless
another chip is named; the rows behind them are in docs/ablations.md, under the heading in quotes.
`python -m rpa lab steps` prints what each is worth on three chips when it is taken away alone.

| trick | what | when | worth |
|---|---|---|---|
| `heads_per_group` | several KV heads share one block-diagonal product | one query token | 1,706 bundles per 1,024 tokens; 1,954 with half as many ("Decode: what did not help") |
| `items_per_iteration` | two or four KV blocks, mostly of two sequences, overlap | decode | 1,896 instead of 2,188 ("Decode: the way of the data") |
| `products_unrolled` | two or four products per KV block overlap | decode | 394 instead of 553 with one KV head ("Decode with one KV head per chip") |
| `qk_ahead` | P V of a product follows some later Q K^T | always | 1,501 instead of 1,567 ("Decode: the way of the data") |
| `swaps_operands` | a part of K is streamed, with Q^T stationary | decode of 384 lanes or more | 1,428 instead of 1,522 ("Decode: swapped operands") |
| `uses_idle_mxu` | the idle half of a wide MXU scales and sums | 128 lanes on a 256 x 256 MXU | 5,010 instead of 5,138, masked 5,354 instead of 6,042 ("Mixed and prefill") |
| `masks_always` | no second copy of the code without a mask | small or float8 kernels | 15.1 CPU seconds to compile for 18.4 ("Time to compile") |
| `small_q_sub` | small tiles for query blocks of few tokens | large tiles | a tile of 32 tokens 1,151 instead of 3,111 ("Mixed and prefill") |
| `marks_contiguous` | a KV block of contiguous pages is one copy | no window | 596 instead of 949, one KV head, pages of 16 ("Decode: the way of the data") |
| `iterations_ahead` | copies run three (two) iterations ahead | VMEM has room | 0.90 of HBM's peak for 0.62 ("Decode: how far ahead copies run") |

Two more are layouts: strided loads of 32-bit words at an odd distance (`layout.WordRows`), and the
page table in HBM (`page_table`).
"""  # noqa: E501

import math
from dataclasses import dataclass

import numpy as np

from rpa.chips import SUBLANES

MAX_GROUP_ROWS, MAX_GROUP_LANES = 16, 512
"""How far decode stacks KV heads in one product: 16 rows fill the registers of a bfloat16 one."""

MIN_LANES_TO_SWAP = 384
"""Lanes of a product from which on swapped operands save more than the registers they take."""

MAX_TOKENS_FOR_FOUR = 256
"""With a window this short, decode processes four KV blocks per iteration instead of two."""

DECODE_QK_AHEAD, MIXED_QK_AHEAD = 7, 2
"""Products Q K^T issued before P V of an earlier one: the MXU need not wait for a softmax."""

SMALL_TILE_ROWS, MIN_TOKENS_TO_CUT = 256, 256
"""Rows of small tiles, and the bq_c from which on a plan has them."""

TABLE_ITERATIONS = 2
"""Iterations from a copy of page-table entries to its use: a short one ends before it arrives."""

DECODE_ITERATIONS_AHEAD, ITERATIONS_AHEAD = 3, 2
"""Iterations whose KV copies are in flight, if VMEM has room: an iteration of decode is short."""

PAGES_UNROLLED = 8
"""Page copies per iteration of the loop over pages, which itself costs about two copies."""


@dataclass(frozen=True)
class Tricks:
    """Which optimisations one kernel uses, and how far; see the list above.

    Attributes:
        heads_per_group: KV heads of one product.
        items_per_iteration: KV blocks that are computed together.
        products_unrolled: products of bkv_c keys that decode computes together.
        qk_ahead: products Q K^T in flight before the first P V.
        swaps_operands: whether a part of the keys is streamed, see `mxu`.
        uses_idle_mxu: whether half of the MXU is idle and used, see `mxu`.
        masks_always: whether a block that needs no mask runs the code of one that does.
        small_q_sub: bq_c of the small tiles, None without.
        marks_contiguous: whether blocks of contiguous pages are marked, see `page_table`.
    """

    heads_per_group: int
    items_per_iteration: int
    products_unrolled: int
    qk_ahead: int
    swaps_operands: bool
    uses_idle_mxu: bool
    masks_always: bool
    small_q_sub: int | None
    marks_contiguous: bool


def choose(plan) -> Tricks:
    """The optimisations of one kernel, a `Plan`."""
    p, b, is_decode = plan.problem, plan.blocks, plan.is_decode
    is_float32 = p.compute_dtype == np.float32
    # Float8 that has to be widened keeps the vector unit busy, and is most of the code.
    widens_float8 = p.kv_dtype.itemsize == 1 and not plan.native_float8
    heads = _heads_per_group(p) if b.bq == 1 else 1
    group_lanes, is_one_group = heads * p.head_lanes, heads == p.num_kv_heads
    is_window_short = p.sliding_window is not None and b.bkv <= MAX_TOKENS_FOR_FOUR
    most_unrolled = 1 if widens_float8 else 4 if is_one_group else 2
    return Tricks(
        heads_per_group=heads,
        items_per_iteration=(4 if is_window_short or is_one_group else 2) if is_decode else 1,
        products_unrolled=math.gcd(most_unrolled, b.bkv // b.bkv_c),
        qk_ahead=DECODE_QK_AHEAD if is_decode else MIXED_QK_AHEAD,
        # Float32 takes six passes: the streamed side is full.
        swaps_operands=is_decode and group_lanes >= MIN_LANES_TO_SWAP and not is_float32,
        # A decode fills the depth of the MXU with several heads, float32 takes it three times.
        uses_idle_mxu=2 * group_lanes <= plan.mxu_size and b.bq > 1 and not is_float32,
        masks_always=widens_float8 or (is_decode and is_one_group) or plan.has_small_tiles,
        small_q_sub=None if plan.has_small_tiles else _small_q_sub(p, b),
        marks_contiguous=p.sliding_window is None,
    )


def _heads_per_group(p):
    """KV heads whose products share one, block-diagonally.

    One query token per sequence has a handful of rows per head, too few to hide the latency of the
    MXU and of the softmax. Several heads in one product cost the MXU nothing: it is busy with K and
    V, which it takes once either way. With many query tokens it only wastes.
    """
    fits = [
        heads
        for heads in range(1, p.num_kv_heads + 1)
        if p.num_kv_heads % heads == 0
        and heads * p.padded_q_per_kv <= MAX_GROUP_ROWS
        and heads * p.head_lanes <= MAX_GROUP_LANES
    ]
    return max(fits, default=1)


def _small_q_sub(p, b):
    """Query tokens of a small tile, or None.

    A large tile takes its time however few of its tokens exist: a sequence with four new ones, as
    after a speculation, would wait for 256. Small tiles have code of their own, all of it masked.
    """
    size = max(SUBLANES, SMALL_TILE_ROWS // p.padded_q_per_kv // SUBLANES * SUBLANES)
    return size if b.bq_c >= max(MIN_TOKENS_TO_CUT, 2 * size) else None
