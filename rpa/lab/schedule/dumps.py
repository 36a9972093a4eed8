"""Parse what the TPU compiler dumps of a kernel: its VLIW bundles and the slots each one uses.

Two text files are read. `packed-bundles-post-ra`, the bundles after register allocation:

    0x33   : > { %19104 = sbr.rel (%p19103_p5) target bundleno = 86 (0x56), region = 2444  ;; ... }

and `pre-delay ... static-per-bundle-utilization`, one row of used slots per bundle under a row of
capacities. Later dumps undercount: there, empty bundles that the hardware inserts by itself have
been taken out again. The files are large and go; what is kept is a `Listing`: slots by bundle, and
the instructions of the scalar core and of the DMA engine, which decide where the program goes.
"""

import gzip
import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FORMAT = 2
"""Of kept listings; another number makes them all again."""

FLAGS = (
    "--xla_jf_dump_to={directory} "
    "--xla_jf_dump_llo_pass_label_regex=(packed-bundles-post-ra|pre-delay_hlo.*)$"
)
"""`LIBTPU_INIT_ARGS` that write these two files, and few others, for every kernel."""


@dataclass(frozen=True)
class Listing:
    """A kernel's bundles.

    Attributes:
        units: names of the units, e.g. "MATMUL", as the compiler has them.
        capacity: slots of each unit in one bundle.
        slots: slots used, [bundle][unit].
        scalar: (bundle, text) of every instruction that the scalar core or the DMA engine takes,
            in order; of their comments only the names of a DMA's arguments are kept.
    """

    units: tuple[str, ...]
    capacity: tuple[int, ...]
    slots: list[list[int]]
    scalar: list[tuple[int, str]]

    @cached_property
    def slot_matrix(self) -> np.ndarray:
        """The same slots, int64[num_bundles, num_units]."""
        return np.array(self.slots, np.int64)


def parse_dump(directory: Path, kernel: str) -> Listing:
    """Parse the dump of one kernel and delete all dumped files.

    Args:
        directory: what `--xla_jf_dump_to` said.
        kernel: name of the instruction in the compiled HLO, "rpa_decode.1".

    Raises:
        ValueError: if there is no dump of it, with the names that there are.
    """
    files = sorted(directory.iterdir())
    bundles = [f for f in files if re.search(rf"-{re.escape(kernel)}-\d+-packed-b", f.name)]
    usage = [f for f in files if re.search(rf"-{re.escape(kernel)}-\d+-pre-delay_hlo", f.name)]
    if len(bundles) != 1 or len(usage) != 1:
        raise ValueError(
            f"no dump of {kernel} (this libtpu may not write any), only of "
            f"{sorted(f.name for f in files if 'packed-b' in f.name)}."
        )
    listing = parse(bundles[0].read_text(), usage[0].read_text())
    for file in files:
        file.unlink()
    return listing


def parse(bundles_text, usage_text) -> Listing:
    """The listing from the texts of the two files.

    Raises:
        ValueError: if they do not have as many bundles as each other.

    >>> usage = "== CAPACITY:\\nMATMUL, SALU\\n 4 2\\n== UTILIZATION:\\n0 1\\n0 0\\n"
    >>> parse("0 : { %s1_s0 = smov.u32 5 /* x */ ;; %v2_v1 = vld %v9 }\\n0x1 : {}", usage).scalar
    [(0, '%s1_s0 = smov.u32 5')]
    """
    units, capacity, slots = _parse_usage(usage_text)
    bundles = _split_bundles(bundles_text)
    if len(bundles) != len(slots):
        raise ValueError(f"{len(bundles)} bundles, but {len(slots)} rows of used slots.")
    scalar = [(i, text) for i, texts in enumerate(bundles) for text in texts if _is_scalar(text)]
    return Listing(units, capacity, slots, scalar)


def _parse_usage(text):
    head, rows = text.split("== UTILIZATION:")
    _, units, capacity = head.strip().splitlines()
    slots = [[int(n) for n in row.split()] for row in rows.splitlines() if row.strip()]
    return (
        tuple(name.strip() for name in units.split(",")),
        tuple(int(n) for n in capacity.split()),
        slots,
    )


_COMMENT = re.compile(r"/\*(?!\w+=\*/).*?\*/", re.DOTALL)
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*[> ]*\{(.*?)\}\s*$", re.M | re.S)


def _split_bundles(text):
    """The instructions of each bundle."""
    bundles = []
    for number, body in _BUNDLE.findall(_COMMENT.sub("", text)):
        if int(number, 16) != len(bundles):
            raise ValueError(f"bundle {number} follows bundle {len(bundles) - 1:#x}.")
        bundles.append([part.strip() for part in body.split(";;") if part.strip()])
    return bundles


_SCALAR = re.compile(r"%[sp]\d+_[sp]\d+ = |(%\w+ = )?(sst|dma\.|s?call|sbr|halt|inlined_call)")


def _is_scalar(instruction):
    """Whether the scalar core computes by it, starts a DMA or waits for one, or branches."""
    return _SCALAR.match(instruction) is not None


def write_listing(file: Path, listing: Listing):
    """Write a listing as compressed JSON; another process never sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")
    aside.write_bytes(gzip.compress(json.dumps(asdict(listing)).encode(), compresslevel=3))
    aside.replace(file)


def read_listing(file: Path) -> Listing:
    """Read what `write_listing` wrote."""
    kept = json.loads(gzip.decompress(Path(file).read_bytes()))
    return Listing(
        tuple(kept["units"]),
        tuple(kept["capacity"]),
        kept["slots"],
        [(bundle, text) for bundle, text in kept["scalar"]],
    )
