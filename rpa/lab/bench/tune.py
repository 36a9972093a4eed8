"""Block sizes by sweep: how far are rung 8's defaults from the best of what was tried?

`make tune` predicts a set of batches with every candidate and writes `rpa/data/blocks.json`: by
chip, model and case the microseconds of each batch with each candidate. Decode is weighed over long
sequences, short ones and real lengths, since a block that suits the one need not suit the other: a
candidate's score is the geometric mean over the batches of its time over the best time there.

The defaults in `rpa/kernel/blocks.py` are a rule, not a table: `check` says what the sweep thinks
of what the rule chooses.
"""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rpa.kernel import prepare
from rpa.lab.bench.tables import whole
from rpa.lab.bench.tables.whole import BATCHES, CONTEXTS, ROOM
from rpa.lab.schedule.execution import CHIPS

FILE = Path(__file__).parents[2] / "data" / "blocks.json"

LIMIT = 1.05
"""What the default may take of the best candidate's time."""

MODELS = ("llama-3-8b", "llama-3-70b-on-8")

CASES = ("decode", "mixed")

CANDIDATES = {
    "decode": [
        (1, bkv, 1, bkv_c)
        for bkv, bkv_c in itertools.product((512, 1024, 2048, 4096), (512, 1024))
        if bkv % bkv_c == 0
    ],
    "mixed": [
        (bq, bkv, bq, bkv_c)
        for bq, bkv, bkv_c in [
            *((128, 512, 512), (128, 1024, 512), (128, 2048, 512), (128, 1024, 1024)),
            *((64, 1024, 512), (256, 1024, 512), (256, 2048, 512)),
        ]
    ],
}
"""(bq, bkv, bq_c, bkv_c) that are tried, besides the default."""

LENGTHS = {
    "decode": BATCHES,
    "mixed": {
        **{f"2,048 after {cached:,}": [(2048, cached + 2048)] for cached in CONTEXTS},
        "4 prompts of 512": [(512, 512)] * 4,
    },
}
"""What is weighed, by case."""


@dataclass(frozen=True)
class Place:
    """What a sweep is for: one entry of the file."""

    chip: str
    model: str
    case: str

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.chip} {self.model} {self.case}"

    @property
    def room(self):
        """What the kernel is compiled for."""
        return replace(ROOM, model=self.model)


PLACES = [Place(*each) for each in itertools.product(CHIPS, MODELS, CASES)]
"""All that `make tune` sweeps."""


def candidates(place: Place) -> list[tuple[int, ...]]:
    """What is tried there: the default first."""
    return list(dict.fromkeys([default_blocks(place), *CANDIDATES[place.case]]))


def default_blocks(place: Place) -> tuple[int, ...]:
    """What `rpa/kernel/blocks.py` chooses, (bq, bkv, bq_c, bkv_c); nothing is compiled.

    >>> bq, bkv, bq_c, bkv_c = default_blocks(Place("v6e", "llama-3-8b", "decode"))
    >>> (bq, bq_c), bkv % bkv_c
    ((1, 1), 0)
    """
    w = place.room
    new = w.kv(w.num_seqs * w.q_len)
    queries = w.queries(w.num_seqs * w.q_len)
    plans = prepare(queries, new, new, w.kv_cache, *w.metadata, chip=place.chip)
    (blocks,) = (plan.blocks for plan in plans if plan.case.label == place.case)
    return tuple(blocks)


def predict(place: Place, blocks) -> dict[str, dict[str, float]]:
    """Predicted microseconds of each batch: {"at peak": {batch: us}, "calibrated": {...}}.

    Raises:
        As `rpa.lab.predict.predict_batch`: a candidate may not fit in the chip's memory.
    """
    times = {"at peak": {}, "calibrated": {}}
    for name, lengths in LENGTHS[place.case].items():
        p = whole.predict("rpa", place.chip, lengths, place.room, blocks={place.case: blocks})
        times["at peak"][name] = round(p.time_us, 2)
        times["calibrated"][name] = round(p.calibrated_us, 2)
    return times


def scores(entry, kind) -> dict[tuple[int, ...], float]:
    """How much longer each candidate takes than the best of each batch, geometric mean.

    Args:
        entry: {"bq,bkv,bq_c,bkv_c": times}, as in the file; refusals are left out.
        kind: "at peak" or "calibrated".

    >>> long, short = ({"at peak": {"a": a, "b": b}} for a, b in ((10, 40), (40, 10)))
    >>> scores({"1,512,1,512": long, "1,128,1,128": short}, "at peak")
    {(1, 512, 1, 512): 2.0, (1, 128, 1, 128): 2.0}
    """
    known = {parse(text): times[kind] for text, times in entry.items() if kind in times}
    table = np.array([list(times.values()) for times in known.values()], float)
    relative = np.exp(np.log(table / table.min(axis=0)).mean(axis=1))
    return dict(zip(known, relative.tolist(), strict=True))


def parse(text) -> tuple[int, ...]:
    """Block sizes from their name in the file.

    >>> parse("1,512,1,512")
    (1, 512, 1, 512)
    """
    return tuple(int(size) for size in text.split(","))


@dataclass(frozen=True)
class Verdict:
    """What the sweep says of a default.

    Attributes:
        place, default: what is judged.
        best: {kind: (blocks, score)} of the candidate with the least score.
        of_best: {kind: score of the default over the best one}; None where it was not swept.
    """

    place: Place
    default: tuple[int, ...]
    best: dict
    of_best: dict

    @property
    def passed(self) -> bool:
        """Whether the default was swept and is within LIMIT of the best, copies at peak."""
        part = self.of_best["at peak"]
        return part is not None and part <= LIMIT


def check(swept=None) -> list[Verdict]:
    """Judge the defaults of every place that was swept.

    Args:
        swept: contents of FILE; read if it is None.
    """
    swept = read() if swept is None else swept
    verdicts = []
    for place in PLACES:
        if place.key not in swept:
            continue
        default, best, of_best = default_blocks(place), {}, {}
        for kind in ("at peak", "calibrated"):
            found = scores(swept[place.key], kind)
            winner = min(found, key=found.get)
            best[kind] = winner, found[winner]
            of_best[kind] = found[default] / found[winner] if default in found else None
        verdicts.append(Verdict(place, default, best, of_best))
    return verdicts


def read() -> dict:
    """{place: {blocks: times or {"refused": why}}} as `make tune` wrote it."""
    return json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}


def write(swept: dict):
    """Write the file, one candidate a line."""
    places = []
    for key, entry in swept.items():
        lines = ",\n".join(f"  {json.dumps(b)}: {json.dumps(t)}" for b, t in entry.items())
        places.append(f"{json.dumps(key)}: {{\n{lines}\n}}")
    FILE.write_text("{\n" + ",\n".join(places) + "\n}\n", "utf-8")
