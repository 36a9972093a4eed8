"""Bundles a chunk: decode by model and block, a sequence by page size, mixed batches."""

from functools import partial

from rpa.lab.bench.tables import fair
from rpa.lab.bench.tables.table import Scope, Table, beside_v3, ratio
from rpa.lab.schedule.cases import Measured, measure

HEADS = {8: "llama-3-8b", 2: "llama-3-8b-on-4", 1: "llama-3-70b-on-8"}
"""Models by their KV heads a chip."""

BLOCK = 1024
"""KV tokens of the block at which kernels are compared."""

SWEPT = {
    "rpa": (None, BLOCK, 2048, 4096),
    "v3": (None, BLOCK),
    "batched": (None,),
}
"""Decode blocks that each kernel is tried at; None is its own default, which the others need not
contain: v3's is 4,096 with 8 heads. `batched` sizes its block by bytes and has no block of 1,024
that is the same."""

TOO_LARGE = {("tpu7x", 8, 4096), ("tpu7x", 2, 4096)}
"""(chip, KV heads, block) of rung 8 that VMEM has no room for: not tried."""

V3_FEW_HEADS = (BLOCK, 4096, 8192)
"""With 2 heads v3's own block is 16,384 tokens, with 1 as large as the table of pages: the runs
that are compared would be one block each. 8,192 is the largest that they are whole blocks of."""


def _decode_cells(heads):
    def cells(scope: Scope):
        return [
            {"chip": chip, "kv heads": n, "kernel": kernel, "block": block}
            for n in heads
            for chip in scope.chips
            for kernel in scope.kernels
            for block in swept(kernel, n)
            if not (kernel == "rpa" and (chip, n, block) in TOO_LARGE)
            if not (scope.quick and block not in (None, BLOCK))
        ]

    return cells


def swept(kernel, num_kv_heads) -> tuple[int | None, ...]:
    """Decode blocks that a kernel is tried at.

    >>> swept("v3", 8), swept("v3", 2)
    ((None, 1024), (1024, 4096, 8192))
    """
    return V3_FEW_HEADS if kernel == "v3" and num_kv_heads < 8 else SWEPT[kernel]


def _decode(**cell):
    block = cell["block"]
    m = measure(
        *(cell["kernel"], "decode", cell["chip"]),
        model=HEADS[cell["kv heads"]],
        blocks=None if block is None else (1, block, 1, block),
    )
    return {
        "bundles": m.bundles_per_chunk,
        "page issue": m.page_issue_per_chunk,
        "floor": m.floor,
        "a sequence": m.per_sequence,
    }


def _finish_decode(rows):
    """The row at BLOCK and the best row of each kernel, each beside v3's."""
    kept = []
    for place in dict.fromkeys((row["kv heads"], row["chip"]) for row in rows):
        mine = [row for row in rows if (row["kv heads"], row["chip"]) == place]
        for kernel in dict.fromkeys(row["kernel"] for row in mine):
            of_kernel = [row for row in mine if row["kernel"] == kernel]
            kept += [row | {"at": "1,024"} for row in of_kernel if row["block"] == BLOCK]
            known = [row for row in of_kernel if "bundles" in row]
            best = min(known, key=lambda row: row["bundles"], default=of_kernel[0])
            tried = "own" if best["block"] is None else f"{best['block']:,}"
            kept.append(best | {"at": "best", "best block": tried})
            kept += [row | {"at": "best"} for row in of_kernel if "note" in row and row != best]
    return beside_v3(kept, ["kv heads", "chip", "at"], "bundles")


def _decode_table(name, heads, title, in_quick):
    columns = {
        "chip": "", "kv heads": "d", "kernel": "", "at": "", "best block": "",
        "bundles": ",.0f", "of v3": ".2f", "page issue": ",.0f", "a sequence": ",.0f",
        "floor": ",.0f",
    }  # fmt: skip
    return Table(name, title, columns, _decode_cells(heads), _decode, _finish_decode, in_quick)


DECODE = _decode_table(
    "decode",
    (8,),
    "Decode, bundles per 1,024 KV tokens x 8 KV heads (Llama 3 8B, bfloat16, page 128), what "
    "longer sequences execute more; page issue apart. At a block of 1,024, and each kernel at the "
    "best of the blocks tried that fit. Floor: HBM. Goal: 0.80 / 0.64 / 0.62 of v3; best 0.80 / "
    "0.70 / 0.68.",
    True,
)
FEW_HEADS = _decode_table(
    "few heads",
    (2, 1),
    "The same for 2 and 1 KV heads a chip (8 query heads): bundles per 1,024 KV tokens x these. v3 "
    "at 1,024, 4,096 and 8,192: its own block here is longer than the lengths that are compared.",
    False,
)


def _step_cells(scope: Scope):
    pages = (128,) if scope.quick else (128, 16)
    cells = [
        {"chip": chip, "page": page, "kernel": kernel}
        for chip in scope.chips
        for page in pages
        for kernel in scope.kernels
    ]
    return fair.candidate_cells(cells, scope.quick)


def _step(*, chip, page, kernel, block):
    m = measure(kernel, "decode", chip, page_size=page, blocks=block)
    return {"cycles": m.step, "HBM": m.floor, "of HBM": m.step / m.floor}


STEP = Table(
    "step",
    "A whole decode step of one sequence of 1,024 tokens: everything executed for one more of them "
    "(page issue, block and sequence overheads), over the cycles that HBM needs for its KV. Own: "
    "nothing passed; best: of own and three more blocks for each kernel. Bundles, no times. Goal "
    "on TPU7x: 0.85 at page 128, 1.0 at page 16.",
    {"chip": "", "page": "d", "kernel": "", "row": "", "blocks": "", "cycles": ",.0f",
     "of best peer": ".2f", "HBM": ",.0f", "of HBM": ".2f"},
    _step_cells,
    _step,
    partial(fair.own_and_best, same=["chip", "page"], column="cycles"),
)  # fmt: skip


def _mixed_cells(scope: Scope):
    kernels = [kernel for kernel in scope.kernels if kernel != "batched"]
    kernels = kernels[:1] if scope.quick else kernels
    return [{"chip": chip, "kernel": kernel} for chip in scope.chips for kernel in kernels]


def _mixed(*, chip, kernel):
    m = measure(kernel, "mixed", chip)
    interior, masked = bundles_of_blocks(m)
    return {
        "interior": interior,
        "masked": masked,
        "loop": m.bundles_per_chunk,
        "floor": m.floor,
        "floor/interior": m.floor / interior,
        "masked/interior": ratio(m.masked, m.interior),
        "spills": m.slots["spill"],
    }


def bundles_of_blocks(m: Measured) -> tuple[float, float]:
    """Bundles of a block without and with a mask; the same where a kernel masks every block."""
    if m.masked is None:
        return m.bundles_per_chunk, m.bundles_per_chunk
    return m.interior, m.masked


MIXED = Table(
    "mixed",
    "Mixed batches and prefill, bundles per 128 query x 512 KV tokens x 8 KV heads, own default "
    "blocks. Interior blocks need no mask; v3 masks all. Loop: with what the innermost loop does "
    "besides. Floor: MATMUL. Goal: floor/interior 95 / 81 / 81 %, masked at most 1.10 of interior.",
    {"chip": "", "kernel": "", "interior": ",.0f", "masked": ",.0f", "loop": ",.0f",
     "of v3": ".2f", "floor": ",.0f", "floor/interior": ".0%", "masked/interior": ".2f",
     "spills": ",.0f"},
    _mixed_cells,
    _mixed,
    partial(beside_v3, same=["chip"], column="loop"),
)  # fmt: skip
