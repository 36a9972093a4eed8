"""Whole batches, predicted: decode, chunked prefill, a mixed batch beside its parts, a window.

All batches are run by kernels that are compiled for the same room, as a server compiles its kernel
once: what changes is the metadata.
"""

from dataclasses import replace
from functools import partial

import numpy as np

from rpa import chips
from rpa.lab.batches import make_batch
from rpa.lab.bench.around import around_us
from rpa.lab.bench.tables import fair
from rpa.lab.bench.tables.chunks import bundles_of_blocks
from rpa.lab.bench.tables.table import Scope, Table
from rpa.lab.predict.batch import predict_batch
from rpa.lab.programs import Workload
from rpa.lab.schedule.cases import CASES, measure
from rpa.traces import sample_requests

ROOM = Workload(page_size=128, num_seqs=256, q_len=9, kv_len=10_240)
"""Sequences, new tokens in all (2,304) and tokens of a sequence that there is room for."""

WINDOW = 128
"""Tokens of the sliding window."""

WINDOW_ROOM = Workload(page_size=128, num_seqs=128, q_len=1, kv_len=16_512)


def real_lengths(num_seqs=64, seed=0) -> list[tuple[int, int]]:
    """(q_len, kv_len) of sequences that decode, at a random point of their answers.

    Contexts and answers are as in the conversation trace of `rpa.traces`.

    >>> sorted(kv_len for _, kv_len in real_lengths())[::21]
    [12, 455, 1395, 5729]
    """
    context, answer = sample_requests(num_seqs, seed)
    part = np.random.default_rng(seed).random(num_seqs)
    return [(1, int(kv_len)) for kv_len in context + np.ceil(part * answer)]


def _chunk(cached):
    return [(2048, cached + 2048)]


BATCHES = {
    "128 of 4,096": [(1, 4096)] * 128,
    "256 of 512": [(1, 512)] * 256,
    "64 of real lengths": real_lengths(),
}
"""Decode: name to lengths. Goal of each: 0.90, 0.80, 0.80."""

PARTS = {
    "64 real decodes": real_lengths(),
    "2,048 tokens after 6,144": _chunk(6144),
    "both": real_lengths() + _chunk(6144),
}
"""A mixed batch and its two parts."""

CONTEXTS = (4096, 6144, 8192)
"""Tokens before a chunk of 2,048."""


def predict(kernel, chip, lengths, room=ROOM, **options):
    """The prediction of a batch by a kernel that is compiled for a room."""
    size = {"max_num_seqs": room.num_seqs, "pages_per_seq": room.pages_per_seq}
    batch = make_batch(lengths, room.page_size, **size)
    return predict_batch(kernel, chip, batch, room=room, page_size=room.page_size, **options)


def _cells(names, kernels=None, quick_kernels=("rpa", "v3")):
    def cells(scope: Scope):
        chosen = [k for k in scope.kernels if kernels is None or k in kernels]
        if scope.quick:
            chosen = [k for k in chosen if k in quick_kernels]
        return [
            # Batches outermost: two cells that are measured at once need different schedules.
            {"batch": name, "chip": chip, "kernel": kernel}
            for name in names
            for chip in scope.chips
            for kernel in chosen
        ]

    return cells


def _fair_cells(scope: Scope):
    return fair.candidate_cells(_cells(BATCHES)(scope), scope.quick)


def _whole(*, chip, batch, kernel, block):
    p = predict(kernel, chip, BATCHES[batch], blocks=fair.blocks_of(block))
    return {
        "at peak us": p.time_us,
        **fair.times(p),
        "HBM us": p.hbm_time_us,
        "efficiency": p.efficiency,
        "calibrated efficiency": p.calibrated_efficiency,
        "around us": around_us(kernel, chip, replace(ROOM, q_len=1)),
    }


def _times(p):
    return {
        "us": p.time_us,
        "on a chip us": p.calibrated_us,
        "range": f"{p.low_us:,.0f} to {p.high_us:,.0f}",
        "HBM us": p.hbm_time_us,
    }


TIMES = {"us": ",.0f", "on a chip us": ",.0f", "range": "", "HBM us": ",.0f"}

WHOLE = Table(
    "whole batches",
    "Whole batches of decode, predicted: one layer of Llama 3 8B, page 128. Own: nothing passed; "
    "best: of own and three more blocks for each kernel. At peak: copies at HBM's peak, nothing "
    "fitted; on a chip: calibrated, with the range of nine in ten. Of best peer: on a chip, to the "
    "best row of v3 and batched; established where the ranges are apart. Around: XLA's estimate of "
    "the other operations of the call (256 sequences x 80 pages). Efficiency: HBM us / at peak us. "
    "Goal: 0.90 / 0.80 / 0.80.",
    {"batch": "", "chip": "", "kernel": "", **fair.COLUMNS, "around us": ",.0f",
     "at peak us": ",.0f", "HBM us": ",.0f", "efficiency": ".2f"},
    _fair_cells,
    _whole,
    partial(fair.own_and_best, same=["batch", "chip"]),
)  # fmt: skip


def _prefill_cells(scope: Scope):
    return [{"cached": cached, "chip": chip} for cached in CONTEXTS for chip in scope.chips]


def _prefill(*, chip, cached):
    p = predict("rpa", chip, _chunk(cached))
    known = chips.chip(chip)
    bundles = bundles_of_blocks(measure("rpa", "mixed", chip))
    alone = sum(np.multiply(blocks_of_chunk(2048, cached), bundles))
    alone_us = alone / known.clock_hz * 1e6
    return {
        **_times(p), "blocks us": alone_us, "blocks/time": alone_us / p.time_us, "MFU": p.mfu,
        "of MXU in use": p.mfu / chips.mxu_fill(known, ROOM.heads[2]),
    }  # fmt: skip


def blocks_of_chunk(q_len, cached) -> tuple[int, int]:
    """How many 128 x 512 blocks of a chunk need no mask, and how many do.

    >>> blocks_of_chunk(256, 512)
    (2, 2)
    """
    what = CASES["mixed"]
    starts = np.arange(cached, cached + q_len, what.chunk_q)
    interior = (starts + 1) // what.chunk_kv  # all their keys are seen by the first query
    touched = -(-(starts + what.chunk_q) // what.chunk_kv)
    return int(interior.sum()), int((touched - interior).sum())


PREFILL = Table(
    "prefill",
    "Chunked prefill of 2,048 tokens, predicted, against the 128 x 512 blocks that it consists of, "
    "alone (table mixed). MFU: causal FLOP over the bfloat16 peak. Goal: blocks/time 0.85.",
    {"cached": ",d", "chip": "", **TIMES, "blocks us": ",.0f", "blocks/time": ".2f", "MFU": ".0%",
     "of MXU in use": ".0%"},
    _prefill_cells,
    _prefill,
)  # fmt: skip


def _parts(*, chip, batch, kernel):
    return _times(predict(kernel, chip, PARTS[batch]))


def _finish_parts(rows):
    """The whole beside the sum of what was run alone."""
    found = []
    for row in rows:
        mine = [r for r in rows if r["chip"] == row["chip"] and "us" in r]
        alone = [r["us"] for r in mine if r["batch"] != "both"]
        is_whole = row["batch"] == "both" and len(alone) == len(PARTS) - 1 and "us" in row
        found.append(row | ({"of its parts": row["us"] / sum(alone)} if is_whole else {}))
    return found


PARTED = Table(
    "mixed batch",
    "A mixed batch of 64 decodes of real lengths and a chunk, predicted, against the sum of its "
    "parts run alone. Goal: at most 1.0.",
    {"batch": "", "chip": "", "kernel": "", **TIMES, "of its parts": ".3f"},
    _cells(PARTS, ("rpa",)),
    _parts,
    _finish_parts,
)


def window_lengths() -> list[tuple[int, int]]:
    """128 decodes whose windows begin at every place of a page."""
    return [(1, kv_len) for kv_len in range(16_321, 16_449)]


def _window_cells(scope: Scope):
    kernels = scope.kernels[:1] if scope.quick else scope.kernels
    cells = [{"chip": chip, "kernel": kernel} for chip in scope.chips for kernel in kernels]
    return fair.candidate_cells(cells, scope.quick)


def _window(*, chip, kernel, block):
    options = {"sliding_window": WINDOW}
    blocks = fair.blocks_of(block)
    p = predict(kernel, chip, window_lengths(), WINDOW_ROOM, blocks=blocks, options=options)
    least_bytes = len(window_lengths()) * WINDOW * ROOM.layer.true_token_bytes
    least_us = least_bytes / chips.chip(chip).hbm_bytes_per_s * 1e6
    return {
        "at peak us": p.time_us,
        **fair.times(p),
        "window us": least_us,
        "of window": p.time_us / least_us,
    }


SLIDING = Table(
    "sliding window",
    "Sliding window of 128, 128 decodes of 16,321 to 16,448 tokens, predicted, against reading "
    "just the windows (at peak). Own and best as in whole batches. Goal: 1.5 (v5e, v6e), 2.2 "
    "(TPU7x).",
    {"chip": "", "kernel": "", **fair.COLUMNS, "at peak us": ",.0f", "window us": ",.0f",
     "of window": ".2f"},
    _window_cells,
    _window,
    partial(fair.own_and_best, same=["chip"]),
)  # fmt: skip
