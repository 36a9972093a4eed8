"""`rpa.lab.bench.tune`: the arithmetic of the sweep; the last sweep judges the default blocks."""

import json

import pytest

from rpa.__main__ import main
from rpa.lab.bench import tune
from rpa.lab.schedule.execution import CannotRun

PLACE = tune.Place("v6e", "llama-3-8b", "decode")


def times(*microseconds):
    named = dict(zip("abc", microseconds, strict=False))
    return {"at peak": named, "calibrated": {name: 2 * us for name, us in named.items()}}


def entry_with(default_us, best_us):
    default = ",".join(map(str, tune.default_blocks(PLACE)))
    return {"1,8,1,8": times(*best_us), default: times(*default_us), "1,9,1,9": {"refused": "no"}}


def test_a_default_is_judged_over_all_batches():
    (near,) = tune.check({PLACE.key: entry_with((104, 96), (100, 100))})
    assert near.passed and near.of_best["at peak"] <= 1.0
    (far,) = tune.check({PLACE.key: entry_with((106, 112), (100, 100))})
    assert not far.passed and far.of_best["at peak"] == pytest.approx((1.06 * 1.12) ** 0.5)
    assert far.best["calibrated"][0] == (1, 8, 1, 8)


def test_a_default_that_was_not_swept_does_not_pass():
    (verdict,) = tune.check({PLACE.key: {"1,8,1,8": times(1.0)}})
    assert verdict.of_best["at peak"] is None and not verdict.passed


@pytest.mark.parametrize("place", tune.PLACES, ids=lambda place: place.key)
def test_candidates_are_legal_and_hold_the_default(place):
    found = tune.candidates(place)
    assert found[0] == tune.default_blocks(place) and len(found) == len(set(found)) >= 6
    for bq, bkv, bq_c, bkv_c in found:
        assert bq % bq_c == 0 and bkv % bkv_c == 0 and bkv_c % place.room.page_size == 0


def test_the_command_sweeps_writes_and_judges(monkeypatch, tmp_path, capsys):
    def predict(place, blocks):
        if blocks[1] == 4096:
            raise CannotRun("it is not understood.")
        return times(*(2.0 if blocks == best else 3.0,) * 3)

    best = tune.candidates(PLACE)[-3]
    assert best != tune.default_blocks(PLACE)
    monkeypatch.setattr(tune, "FILE", tmp_path / "blocks.json")
    monkeypatch.setattr(tune, "predict", predict)
    asked = ["--chip", "v6e", "--model", "llama-3-8b", "--case", "decode"]
    assert main(["lab", "tune", *asked, "--json"]) == 1
    (told,) = json.loads(capsys.readouterr().out)["verdicts"]
    assert told["best"]["at peak"]["blocks"] == list(best) and told["of_best"]["at peak"] == 1.5
    refused = [t for t in tune.read()[PLACE.key].values() if "refused" in t]
    assert refused and "not understood" in refused[0]["refused"]
    assert main(["lab", "tune", "--check"]) == 1
    assert "11 places were not swept." in capsys.readouterr().out


def test_the_defaults_are_near_the_best_of_the_sweep_in_the_repository():
    verdicts = tune.check()
    assert verdicts, f"{tune.FILE.name} is empty: make tune"
    far = [(v.place.key, v.default, v.best["at peak"]) for v in verdicts if not v.passed]
    assert not far, "change rpa/kernel/blocks.py, or sweep again: make tune"
