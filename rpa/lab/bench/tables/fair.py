"""Kernels compared fairly: each as a user gets it, and each at the best of the same kind of sweep.

*own*: no block argument is passed. *best*: the best of own and `CANDIDATES`, as many for each
kernel, by the time on a chip. A ratio is to the *best* row of the best peer, and a difference is
established only where the ranges of the two times are apart (`rpa.lab.predict.calibration`).
"""

from rpa.lab.bench.tables.table import NOTE, ratio
from rpa.lab.predict.calibration import are_established

CANDIDATES = {
    "rpa": ((1, 512, 1, 512), (1, 1024, 1, 1024), (1, 2048, 1, 2048)),
    "v3": ((1, 512, 1, 512), (1, 1024, 1, 1024), (1, 2048, 1, 2048)),
    "batched": ((1, 1, 256, 16, 3), (1, 1, 512, 8, 3), (1, 1, 1024, 4, 3)),
}
"""Decode blocks that are tried besides a kernel's own, in its public argument. rpa and
v3: `d_block_sizes` (query tokens and KV tokens fetched, then computed); `batched`:
`decode_block_sizes` (the last three: KV tokens, sequences at once, buffers).
v3's own are 4,096 KV tokens with 8 KV heads."""

PEERS = ("v3", "batched")

COLUMNS = {
    "row": "", "blocks": "", "on a chip us": ",.0f", "range": "", "of best peer": ".2f",
    "established": "",
}  # fmt: skip


def candidate_cells(cells, quick) -> list[dict]:
    """Each cell with each of its kernel's blocks; cells of one block follow each other.

    >>> len(candidate_cells([{"kernel": "rpa"}, {"kernel": "v3"}], quick=False))
    8
    """
    places = 1 if quick else 1 + len(CANDIDATES["rpa"])
    return [
        cell | {"block": None if place == 0 else CANDIDATES[cell["kernel"]][place - 1]}
        for place in range(places)
        for cell in cells
    ]


def blocks_of(block) -> dict | None:
    """The argument `blocks` of `rpa.lab.predict.predict_batch`."""
    return None if block is None else {"decode": block}


def times(p) -> dict:
    """The columns of a prediction."""
    return {
        "on a chip us": p.calibrated_us,
        "ends": (p.low_us, p.high_us),
        "range": f"{p.low_us:,.0f} to {p.high_us:,.0f}",
    }


def own_and_best(rows, same, column="on a chip us") -> list[dict]:
    """Two rows per kernel and situation, each next to the best row of the best peer.

    Args:
        rows: of all candidates; one that was refused is left out if it is not a kernel's own.
        same: names of the columns that make a situation.
        column: the number; where it has no ranges ("ends") no difference is called established.

    >>> def row(kernel, block, us):
    ...     return {"kernel": kernel, "block": block, "on a chip us": us, "ends": (us, us)}
    >>> tried = row("rpa", None, 9.0), row("v3", None, 18.0), row("v3", (1, 512), 6.0)
    >>> for r in own_and_best(tried, []):
    ...     print(r["kernel"], r["row"], r["of best peer"], r["established"])
    rpa own 1.5 yes
    rpa best 1.5 yes
    v3 own 3.0 yes
    v3 best 1.0 -
    """
    found = []
    for situation in dict.fromkeys(tuple(row[name] for name in same) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in same) == situation]
        kept = []
        for kernel in dict.fromkeys(row["kernel"] for row in mine):
            tried = [row for row in mine if row["kernel"] == kernel]
            known = [row for row in tried if column in row]
            own = next(row for row in tried if row["block"] is None)
            kept.append(own | {"row": "own", "blocks": "own"})
            if known:
                best = min(known, key=lambda row: row[column])
                kept.append(best | {"row": "best", "blocks": _in_words(best["block"])})
        peers = [row for row in kept if row["kernel"] in PEERS and column in row]
        best = min(peers, key=lambda row: row[column], default=None)
        found += [row | _beside(row, best, column) for row in kept]
    return [{k: v for k, v in row.items() if k not in ("ends", "block")} for row in found]


def _beside(row, best, column) -> dict:
    """The ratio to the best peer, and whether the ranges say that there is a difference."""
    if best is None or NOTE in row:
        return {"of best peer": None, "established": ""}
    apart = "ends" in row and are_established(row["ends"], best["ends"])
    is_best = row["kernel"] == best["kernel"] and row["row"] == "best"
    return {
        "of best peer": ratio(row[column], best[column]),
        "established": "-" if is_best else "yes" if apart else "no",
    }


def _in_words(block) -> str:
    return "own" if block is None else " ".join(map(str, block))
