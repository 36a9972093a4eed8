"""The lab's tables: everything that is claimed about rung 8's speed, from nothing, in one command.

`python -m rpa lab all` prints them, README.md and the documentation quote them.
"""

from rpa.lab.bench.tables.chunks import DECODE, FEW_HEADS, MIXED, STEP
from rpa.lab.bench.tables.moved import MOVED
from rpa.lab.bench.tables.outside import COMPILE, PUBLISHED
from rpa.lab.bench.tables.table import NOTE, SECONDS, Scope, Table, as_markdown, rows_of
from rpa.lab.bench.tables.whole import PARTED, PREFILL, SLIDING, WHOLE

TABLES = {
    table.name: table
    for table in (
        *(DECODE, FEW_HEADS, STEP, MIXED, WHOLE, PREFILL, PARTED, SLIDING),
        *(MOVED, COMPILE, PUBLISHED),
    )
}
"""By name, in the order in which they are printed."""

__all__ = ["NOTE", "SECONDS", "TABLES", "Scope", "Table", "as_markdown", "rows_of"]
