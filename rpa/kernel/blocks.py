"""Block sizes: what fits in VMEM, sensible defaults for a chip, and errors that say what to shrink.

A larger KV block means fewer waits and fewer iterations of the loops; a larger query block reads
the KV cache less often. Both cost VMEM, of which a TPU7x core has half as much as a v5e.
"""

import math
from dataclasses import replace

import numpy as np

from rpa.chips import SUBLANES
from rpa.kernel import refs, tricks
from rpa.kernel.cases import Case
from rpa.kernel.plan import BlockSizes, Plan
from rpa.kernel.problem import align
from rpa.paging import LANES, cdiv

KV_BLOCK_BYTES = 4 * 2**20
"""KV fetched together by default: a few microseconds of HBM, so that a copy's latency is hidden.

Not more: decode computes two blocks of unequal length together, and the shorter one waits.
"""

SCORE_ROWS, SCORE_COLUMNS = 512, 512
"""Largest tile of scores by default: what of it does not fit in registers goes through VMEM."""

SCORE_ROWS_OF_ONE = 2048
"""Rows of the tile where one KV head is alone: no other head has products next to its softmax.
With two heads each has half as many."""

DECODE_COLUMNS, PRODUCTS = 512, 4
"""Keys per product in decode; and the most products that the keys of any block take."""

COMPILER_BYTES = 4 * 2**20
"""VMEM left to the compiler besides the values of one tile: spilled registers, its own buffers."""


def vmem_bytes(plan: Plan):
    """VMEM that a plan needs, {what: bytes}: its buffers, and the compiler's share, estimated."""
    sizes = {
        name: int(np.prod(shape)) * np.dtype(dtype).itemsize
        for name, (shape, dtype) in refs.vmem_buffers(plan).items()
    }
    return sizes | {"compiler": _bytes_of_values(plan) + COMPILER_BYTES}


def _bytes_of_values(plan):
    """Scores, weights, K and V of the tiles that are in work at once, most of them spilled."""
    t, bkv_c = plan.tiles, plan.blocks.bkv_c
    if plan.is_decode:
        products = plan.tricks.items_per_iteration * plan.tricks.products_unrolled * t.num_groups
        k_and_v = 2 * bkv_c * t.group_lanes * plan.problem.compute_dtype.itemsize
        return min(plan.tricks.qk_ahead + 1, products) * (8 * t.rows * bkv_c + k_and_v)
    # The tile in work and the one that waits.
    return 16 * bkv_c * (t.rows + t.group_lanes)


def check_block_sizes(name, sizes, problem):
    """A `*_block_sizes` argument as BlockSizes, or an error in words.

    Args:
        name: of the argument, for the message.
        sizes: (bq, bkv, bq_c, bkv_c) in tokens, as the caller gave it.
        problem: the `Problem`; its page_size must divide bkv_c.

    Raises:
        ValueError: naming the argument, the entry that is wrong, and what it must be.
    """
    four = isinstance(sizes, (tuple, list)) and len(sizes) == 4
    if not (four and all(isinstance(size, (int, np.integer)) for size in sizes)):
        raise ValueError(
            f"{name} is {sizes!r}, but must be four numbers (bq, bkv, bq_c, bkv_c), whole ones: "
            "query and KV tokens fetched together, and query and KV tokens in one product."
        )
    bq, bkv, bq_c, bkv_c = (int(size) for size in sizes)
    for whole, part, size, part_size in [("bq", "bq_c", bq, bq_c), ("bkv", "bkv_c", bkv, bkv_c)]:
        if not (part_size > 0 and size > 0 and size % part_size == 0):
            raise ValueError(
                f"{name} is {tuple(sizes)}: {part}={part_size} must be positive and divide "
                f"{whole}={size}."
            )
    if bkv_c % problem.page_size:
        raise ValueError(
            f"{name} is {tuple(sizes)}: bkv_c={bkv_c} must be a multiple of page_size="
            f"{problem.page_size}, since a block is made of whole pages."
        )
    return BlockSizes(bq, bkv, bq_c, bkv_c)


def default_block_sizes(problem, case, max_q_len):
    """Sizes that suit the shape, before VMEM is looked at.

    Args:
        problem: the `Problem`, whose page_size and longest sequence the blocks are cut to.
        case: `Case.DECODE` gets one query token a block, all others as many as fill a tile.
        max_q_len: the most new tokens of a sequence, or None.

    Returns:
        `BlockSizes`, in tokens.
    """
    p = problem
    most_q = p.num_tokens if max_q_len is None else min(max_q_len, p.num_tokens)
    # KV tokens come in whole pages, and where a page is a part of a register, in whole registers.
    whole = align(max(p.page_size, LANES), p.page_size) if LANES % p.page_size == 0 else p.page_size
    most = align(p.pages_per_seq * p.page_size, whole)
    if case is Case.DECODE:
        if p.sliding_window is not None:
            most = min(most, align(p.sliding_window, whole))  # a block begins where the window does
        bkv_c = min(most, _down(DECODE_COLUMNS, whole))
        token_bytes = math.prod(p.kv_shape) * p.kv_dtype.itemsize
        bkv = min(align(most, bkv_c), max(bkv_c, _down(KV_BLOCK_BYTES // token_bytes, bkv_c)))
        bkv = min(bkv, PRODUCTS * bkv_c)
        return BlockSizes(1, bkv, 1, bkv_c)
    rows, tokens = SCORE_ROWS, LANES
    if p.num_kv_heads <= 2:
        rows, tokens = SCORE_ROWS_OF_ONE // p.num_kv_heads, 2 * LANES
    bq = min(_down(rows // p.padded_q_per_kv, SUBLANES), tokens, align(max(1, most_q), SUBLANES))
    bkv_c = min(most, _down(SCORE_COLUMNS, whole))
    return BlockSizes(bq, min(align(most, bkv_c), PRODUCTS * bkv_c), bq, bkv_c)


def _down(x, multiple):
    return max(multiple, x // multiple * multiple)


def plan_ahead(plan: Plan) -> Plan:
    """The same plan with as many iterations ahead as fit in VMEM; with one, whether it fits or not.

    How far it runs ahead before does not matter.
    """
    most = tricks.DECODE_ITERATIONS_AHEAD if plan.is_decode else tricks.ITERATIONS_AHEAD
    ahead = [replace(plan, iterations_ahead=iterations) for iterations in range(most, 0, -1)]
    return next(filter(_fits, ahead), ahead[-1])


def _fits(plan):
    return sum(vmem_bytes(plan).values()) <= plan.vmem_limit_bytes


def shrink_to_fit(plan: Plan) -> Plan:
    """The same plan with default blocks halved until they fit: first the KV block, then the tile.

    Raises:
        ValueError: if not even the smallest blocks fit.
    """
    plan = plan_ahead(plan)
    while not _fits(plan) and (smaller := _smaller(plan)):
        plan = plan_ahead(replace(plan, blocks=smaller))
    check_fits("default blocks", plan)
    return plan


def _smaller(plan):
    """The next smaller blocks, None after the smallest."""
    b, page_size = plan.blocks, plan.problem.page_size
    if b.bkv > b.bkv_c:
        halves = b.bkv // 2 % b.bkv_c == 0
        return b._replace(bkv=b.bkv // 2 if halves else b.bkv_c)
    if b.bkv_c > LANES and b.bkv_c % 2 == 0 and b.bkv_c // 2 % page_size == 0:
        return b._replace(bkv=b.bkv_c // 2, bkv_c=b.bkv_c // 2)
    if b.bq > SUBLANES:
        bq = align(cdiv(b.bq, 2), SUBLANES)
        return b._replace(bq=bq, bq_c=bq)
    return None


def check_fits(name, plan):
    """Raise if a plan needs more VMEM than it may take, and say which block to shrink.

    Args:
        name: what the sizes are called in the message.
        plan: the `Plan`.

    Raises:
        ValueError: with the bytes of every buffer, largest first.
    """
    if _fits(plan):
        return
    sizes = vmem_bytes(plan)
    total = sum(sizes.values())
    kv_bytes = sizes["kv_buffer"]
    q_bytes = total - kv_bytes - sizes["compiler"]
    largest, what = max((kv_bytes, "bkv"), (q_bytes, "bq"), (sizes["compiler"], "bkv_c and bq_c"))
    listed = ", ".join(
        f"{key} {size / 2**20:.1f}" for key, size in sorted(sizes.items(), key=lambda x: -x[1])
    )
    raise ValueError(
        f"{name} of the {plan.case.label} kernel, (bq, bkv, bq_c, bkv_c) = "
        f"{tuple(plan.blocks)}, need {total / 2**20:.1f} MiB of VMEM, but "
        f"{plan.vmem_limit_bytes / 2**20:.1f} MiB are there: shrink {what}, which takes "
        f"{largest / 2**20:.1f} MiB. (MiB: {listed}.)"
    )
