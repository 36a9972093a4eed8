"""What a user gains over v3 and `batched`, both well configured: one small table.

    from rpa.lab.bench import gain

    print(gain.table(gain.recorded()))      # what the repository ships

Its numbers are those of the table "whole batches": the time on a chip, with its range, of rpa as
it is called without block arguments, and of each peer at the best of its sweep.
`python -m rpa lab gain --record` makes them anew.
"""

import json
from pathlib import Path

from rpa.lab.bench.tables import as_markdown
from rpa.lab.bench.tables.fair import PEERS
from rpa.lab.bench.tables.table import Scope, Table, ratio, rows_of
from rpa.lab.bench.tables.whole import WHOLE
from rpa.lab.compile.compiler import compile_versions
from rpa.lab.peers import PEER_VERSION

RECORD = Path(__file__).parents[2] / "data" / "gain.json"

TABLE = Table(
    "gain",
    "Decode on one TensorCore, us, predicted, with the range of nine in ten: rpa with nothing "
    "passed, v3 and batched at the best of four block sizes each.",
    {"case": "", "chip": "", "rpa": ">", "v3, best": ">", "batched, best": ">",
     "of best peer": ".2f", "established": ""},
    None,
    None,
)  # fmt: skip


def run(progress=iter) -> dict:
    """The record, computed now.

    Args:
        progress: wraps the iterator of rows, as tqdm does.

    Raises:
        RuntimeError: if a kernel has no number, in its words.
    """
    rows = WHOLE.finish(list(progress(rows_of(WHOLE, WHOLE.cells(Scope())))))
    refused = [row for row in rows if "note" in row]
    if refused:
        raise RuntimeError("; ".join(f"{r['kernel']} {r['chip']}: {r['note']}" for r in refused))
    names = ("batch", "chip", "kernel", "row", "blocks", "on a chip us", "range")
    kept = [{name: row[name] for name in names} for row in rows]
    return {"versions": compile_versions() | {"tpu-inference": PEER_VERSION}, "rows": kept}


def recorded() -> dict:
    """What `python -m rpa lab gain --record` wrote."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def gains(record) -> list[dict]:
    """A row per case and chip."""
    by_place = {}
    for row in record["rows"]:
        by_place.setdefault((row["batch"], row["chip"]), {})[row["kernel"], row["row"]] = row
    return [_gain(*place, rows) for place, rows in by_place.items()]


def _gain(case, chip, rows) -> dict:
    """One case on one chip.

    >>> def row(us, text):
    ...     return {"on a chip us": us, "range": text}
    >>> found = {("rpa", "own"): row(5.0, "4 to 6"), ("v3", "best"): row(10.0, "8 to 12"),
    ...          ("batched", "best"): row(20.0, "16 to 24")}
    >>> list(_gain("a batch", "v6e", found).values())
    ['a batch', 'v6e', '5 (4 to 6)', '10 (8 to 12)', '20 (16 to 24)', 0.5, 'yes, faster']
    """
    ours, peers = rows["rpa", "own"], [rows[peer, "best"] for peer in PEERS]
    best = min(peers, key=lambda row: row["on a chip us"])
    (low, high), (peer_low, peer_high) = _ends(ours), _ends(best)
    established = "yes, faster" if high < peer_low else "yes, slower" if low > peer_high else "no"
    return {
        "case": case,
        "chip": chip,
        "rpa": _in_words(ours),
        **{f"{peer}, best": _in_words(rows[peer, "best"]) for peer in PEERS},
        "of best peer": ratio(ours["on a chip us"], best["on a chip us"]),
        "established": established,
    }


def _ends(row) -> list[float]:
    return [float(text.replace(",", "")) for text in row["range"].split(" to ")]


def _in_words(row) -> str:
    return f"{row['on a chip us']:,.0f} ({row['range']})"


def table(record) -> str:
    """The gains as Markdown."""
    return as_markdown(TABLE, gains(record))
