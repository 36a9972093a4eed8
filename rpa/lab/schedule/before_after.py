"""The schedules of many places in one table, to be kept and compared: did a change cost anything?

python -m rpa lab schedule --chip all --case all --save before.json
python -m rpa lab schedule --chip all --case all --against before.json
"""

import json
from pathlib import Path

COLUMNS = {
    "chunk": "bundles_per_chunk",
    "executed": "executed_per_chunk",
    "without mask": "interior",
    "with mask": "masked",
    "sequence": "per_sequence",
    "of 1,024": "step",
}
"""Column of the table: attribute of `rpa.lab.schedule.cases.Measured`."""


def row_of(measured) -> dict:
    """What is kept of one `Measured`: {"blocks": [...], column: bundles or None}."""
    values = {name: getattr(measured, attribute) for name, attribute in COLUMNS.items()}
    return {"blocks": measured.blocks} | values


def row_of_call(run) -> dict:
    """What is kept of one `Execution` of a function of any signature: it has no chunks."""
    return {"blocks": None} | dict.fromkeys(COLUMNS) | {"executed": run.bundles}


def save(rows, file):
    """Keep rows, {place: what `row_of` returns}, in a file."""
    Path(file).write_text(json.dumps(rows, indent=1) + "\n")


def load(file) -> dict:
    """Rows from a file.

    Raises:
        ValueError: if it is not there, or not what `save` writes.
    """
    try:
        rows = json.loads(Path(file).read_text())
        assert all(COLUMNS.keys() <= row.keys() for row in rows.values())
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"--against is {str(file)!r}, but must be the name of a kernel, or a file that "
            f"--save has written ({type(error).__name__}): check the name, or save one anew."
        ) from None
    return rows


def table(rows, before=None) -> str:
    """Bundles per place and, if there are rows from before, their ratios to those.

    >>> row = {"blocks": [1, 1024, 1, 512]} | dict.fromkeys(COLUMNS, 300.0)
    >>> text = table({"v6e decode": row}, {"v6e decode": row | {"chunk": 200.0}})
    >>> text.splitlines()[-1]
    'bundles now / before; worst 1.500: v6e decode, chunk'
    """
    wide = max(map(len, rows))
    lines = [f"{'':{wide}}  {'blocks':20}" + "".join(f"{name:>13}" for name in COLUMNS)]
    worst = []
    for place, row in rows.items():
        cells = []
        for name in COLUMNS:
            new, old = row[name], (before or {}).get(place, {}).get(name)
            ratio = new / old if new and old else None
            worst += [(ratio, place, name)] if ratio else []
            told = "" if new is None else f"{new:,.0f}"
            cells.append(f"{told:>7}" + (f" {ratio:5.3f}" if ratio else 6 * " "))
        blocks = ",".join(map(str, row["blocks"])) if row["blocks"] else "its own"
        lines.append(f"{place:{wide}}  {blocks:20}" + "".join(cells))
    if worst:
        ratio, place, name = max(worst)
        lines.append(f"bundles now / before; worst {ratio:.3f}: {place}, {name}")
    elif before is not None:
        lines.append(f"none of these was saved before; saved were: {', '.join(before)}")
    return "\n".join(line.rstrip() for line in lines)
