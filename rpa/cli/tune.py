"""`python -m rpa lab tune`: sweep rung 8's block sizes, and judge its defaults by the sweep."""

import argparse
import json
from functools import partial

import jax
from tqdm import tqdm

from rpa import chips
from rpa.cli.clock import Clock
from rpa.cli.options import SEVERAL_CHIPS, add_options
from rpa.lab.bench import tune
from rpa.lab.bench.tables.table import NOTE, SECONDS, Table, rows_of


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    several = {"default": None, "action": "append", "help": "may be given several times"}
    add_options(parser, "chip", "model", chip=SEVERAL_CHIPS,
                model=several | {"choices": tune.MODELS})  # fmt: skip
    parser.add_argument("--case", choices=tune.CASES, **several)
    parser.add_argument("--check", action="store_true", help="judge by the last sweep, no new one")
    add_options(parser, "workers", "json")


def main(args) -> int:
    """Sweep, then judge; the exit code is 1 if a default is too far from the best."""
    # Everything here runs on the host; a TPU that is there stays free.
    jax.config.update("jax_platforms", "cpu")
    if not args.check:
        start = Clock.now()
        _sweep(places_of(args), args.workers)
        if not args.json:
            print(f"Swept in {Clock.now() - start}.")
    verdicts = tune.check()
    print(
        json.dumps({"verdicts": [to_json(v) for v in verdicts]}) if args.json else table(verdicts)
    )
    return int(not all(verdict.passed for verdict in verdicts))


def places_of(args) -> list[tune.Place]:
    """What was asked for."""
    return [
        place
        for place in tune.PLACES
        if place.chip in (args.chip or chips.CHIPS)
        and place.model in (args.model or tune.MODELS)
        and place.case in (args.case or tune.CASES)
    ]


def _sweep(places, workers):
    """Predict every candidate; what is known is written after each place."""
    swept = tune.read()
    cells = {place: [{"blocks": blocks} for blocks in tune.candidates(place)] for place in places}
    with tqdm(total=sum(map(len, cells.values())), leave=False, disable=None) as bar:
        for place, mine in cells.items():
            bar.set_description_str(place.key)
            job = Table(place.key, "", {}, None, partial(_predict, place))
            entry = {}
            for row in rows_of(job, mine, workers):
                name, _ = ",".join(map(str, row.pop("blocks"))), row.pop(SECONDS)
                entry[name] = {"refused": row[NOTE]} if NOTE in row else row
                bar.update()
            swept[place.key] = entry
            tune.write(swept)


def _predict(place, blocks):
    return tune.predict(place, blocks)


def to_json(verdict: tune.Verdict) -> dict:
    """A verdict as JSON can hold it."""
    best = {kind: {"blocks": b, "score": s} for kind, (b, s) in verdict.best.items()}
    told = {"place": verdict.place.key, "default": verdict.default, "best": best}
    return told | {"of_best": verdict.of_best, "passed": verdict.passed}


def table(verdicts) -> str:
    """A line for each place, for people.

    >>> place, best = tune.Place("v5e", "llama-3-8b", "decode"), ((1, 512, 1, 512), 1.0)
    >>> kinds = ("at peak", "calibrated")
    >>> one = tune.Verdict(place, (1, 8, 1, 8), dict.fromkeys(kinds, best),
    ...                    dict.fromkeys(kinds, 1.1))
    >>> print(table([one]).splitlines()[1])  # doctest: +NORMALIZE_WHITESPACE
    v5e llama-3-8b decode   1,8,1,8   1.10 of 1,512,1,512   1.10 of 1,512,1,512   over 1.05
    """
    lines = [f"{'':25} {'default':18} {'at peak':27} {'calibrated':21}"]
    for v in verdicts:
        parts = [_part(v, kind) for kind in ("at peak", "calibrated")]
        verdict = "" if v.passed else f"over {tune.LIMIT}"
        lines.append(
            f"{v.place.key:25} {_name(v.default):18} {parts[0]:27} {parts[1]:21} {verdict}".rstrip()
        )
    missing = len(tune.PLACES) - len(verdicts)
    return "\n".join([*lines, *([f"{missing} places were not swept."] if missing else [])])


def _name(blocks):
    return ",".join(map(str, blocks))


def _part(verdict, kind):
    part, (blocks, _) = verdict.of_best[kind], verdict.best[kind]
    return f"{'not swept' if part is None else format(part, '.2f')} of {_name(blocks)}"
