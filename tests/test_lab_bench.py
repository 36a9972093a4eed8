"""`python -m rpa bench`: the clock, what is timed where, and that it compiles for a TPU."""

import json
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpa import chips, dense, lab
from rpa.__main__ import main
from rpa.lab import peers
from rpa.lab.bench import on_device, stopwatch
from rpa.lab.bench.stopwatch import Chain, Timing, time_calls
from rpa.lab.predict.batch import Prediction
from rpa.lab.programs import Workload
from rpa.lab.schedule.schedule import NoSchedule
from rpa.ladder import LADDER
from rpa.ragged import oracle_ragged
from tests import bench_programs

ON_A_TPU = jax.default_backend() == "tpu"
SMALL = Workload("smollm2-135m", "float32", "float32", page_size=16, num_seqs=3, kv_len=40)
NAMES = [f"rung {rung.number} {rung.name}" for rung in LADDER]


class Clock:
    """A machine whose calls take `call_s`, each loop `start_s` more, with noise on top."""

    def __init__(self, call_s, start_s, noise_s=0.0):
        self.now, self.call_s, self.start_s, self.noise_s = 0.0, call_s, start_s, noise_s
        self.rng = np.random.default_rng(0)

    def run(self, calls):
        noise_s = self.noise_s * self.rng.random()
        self.now += self.start_s + calls * self.call_s + noise_s

    def __call__(self):
        return self.now


@pytest.mark.parametrize("call_s, start_s", [(2e-5, 1e-4), (0.3, 0.0), (1e-6, 1e-3)])
def test_what_starting_a_loop_costs_is_not_counted(call_s, start_s):
    clock = Clock(call_s, start_s)
    timing = time_calls(clock.run, clock=clock)
    assert timing.median_s == pytest.approx(call_s, rel=1e-3)
    assert timing.samples == stopwatch.FEWEST_SAMPLES
    assert timing.calls * call_s + start_s >= stopwatch.LEAST_S


def test_a_noisy_machine_is_sampled_longer_but_not_for_ever():
    clock = Clock(1e-4, 1e-4, noise_s=0.02)
    noisy = time_calls(clock.run, clock=clock)
    assert noisy.samples > stopwatch.FEWEST_SAMPLES and noisy.spread > 0
    assert clock.now < stopwatch.MOST_S + 2
    slow = Clock(30.0, 0.0)
    assert time_calls(slow.run, clock=slow).samples == 1


def test_every_call_of_a_chain_stands_on_the_one_before():
    chain = Chain(lambda q, k, v, cache: (q + k, cache + q), *map(jnp.float32, (0, 1, 0, 0)))
    chain.run(3)
    chain.run(1)
    assert [float(x) for x in chain.state] == [4.0, 0 + 1 + 2 + 3]


FULL = pytest.mark.full
CASES = ["mixed", pytest.param("decode", marks=FULL), pytest.param("prefill", marks=FULL)]


@pytest.mark.parametrize("case", CASES)
def test_what_is_timed_is_right(case):
    """One call of each plain JAX rung, as the bench builds it, against the float64 oracle."""
    batch = on_device.batch_of(case, SMALL)
    for name, contender in on_device.contenders(SMALL, batch, ()):
        if contender.refuses(batch, None) is not None:
            continue
        queries, keys, values, kv_cache = on_device.make_arrays(SMALL, batch, contender.cache_shape)
        output, stored = jax.jit(contender.attend)(queries, keys, values, kv_cache)
        truth = oracle_ragged(queries, stored, batch, SMALL.heads[1])
        assert dense.relative_error(output, truth) < 2e-6, name


def test_the_command_times_what_this_machine_can(monkeypatch, capsys):
    timing = Timing(2e-3, 1.9e-3, 2.2e-3, calls=8, samples=5)
    monkeypatch.setattr(on_device, "time_calls", lambda run: timing)
    command = ["bench", "--num-seqs", "2", "--kv-len", "20", "--case", "decode", "--peer", "jax"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert ("CPU" in printed) == (not ON_A_TPU) and "2,000.0" in printed
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["kernel"]: row for row in found["rows"]}
    assert list(rows) == [*NAMES, "peer jax"] and found["machine"]["jax"] == jax.__version__
    assert rows["rung 3 ragged"]["timing"]["median_s"] == timing.median_s
    if not ON_A_TPU:
        assert on_device.NO_PREDICTION in printed and found["prediction"] == on_device.NO_PREDICTION
        assert rows["rung 8 kernel"]["timing"] is None
        assert "interpreter" in rows["rung 8 kernel"]["note"]


def test_a_tpu_has_a_prediction_beside_what_was_measured(monkeypatch):
    def predict(kernel, chip, batch, **sizes):
        if kernel == "v3":
            raise NoSchedule("timeout", "too slow")
        seen.append((kernel, chip.name, int(batch.num_seqs), sizes["page_size"]))
        return Prediction(kernel, chip.name, round(5e-6 * chip.clock_hz), 0.0, 9, 9, 9, 6.5)

    seen, batch, v6e = [], on_device.batch_of("decode", SMALL), chips.chip("v6e")
    monkeypatch.setattr(on_device, "predict_batch", predict)
    ours, v3, rung_4 = (
        on_device.with_prediction(on_device.Row("decode", name), SMALL, batch, v6e)
        for name in ("rung 8 kernel", "peer v3", "rung 4 tiled")
    )
    assert ours.predicted_us == pytest.approx(5.0) and ours.calibrated_us == 6.5
    assert seen == [("rpa", "v6e", SMALL.num_seqs, SMALL.page_size)]
    assert v3.predicted_us is None and v3.note == "no prediction: too slow"
    assert rung_4 == on_device.Row("decode", "rung 4 tiled")
    assert set(on_device.PREDICTED) <= {*NAMES, "peer v3", "peer batched"}


def test_an_absent_peer_is_a_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(peers, "absence", lambda peer: f"no {peer}: make peers")
    batch = on_device.batch_of("decode", SMALL)
    contender = dict(on_device.contenders(SMALL, batch, ["tpu-inference"]))["peer v3"]
    assert contender.refuses(batch, chips.chip("v5e")) == "no v3: make peers"


def test_what_does_not_fit_is_a_row_too(monkeypatch):
    def refuse(message):
        def time_calls(run):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(on_device, "time_calls", time_calls)
        return next(on_device.bench(SMALL, ["decode"]))

    assert refuse("RESOURCE_EXHAUSTED: out of memory").note == on_device.TOO_LARGE
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        refuse("INTERNAL: something else")


def compiled(chip, name, case):
    absence = peers.absence(name.removeprefix("peer ")) if name.startswith("peer") else None
    if absence is not None:
        pytest.skip(f"no peer here: {absence}")
    args = bench_programs.arguments(name, case)
    kwargs = {"name": name, "case": case, "chip": chip}
    return args, lab.compile_for(
        chip, bench_programs.repeat, *args, kwargs=kwargs, donate_argnums=(0,), keep_hlo=True
    )


@pytest.mark.skipif(
    lab.compile_versions()["libtpu"] is None,
    reason=f"libtpu is not installed ({platform.system()} {platform.machine()})",
)
@pytest.mark.full
@pytest.mark.parametrize(
    "chip, name, case",
    [("v5e", name, "decode") for name in (*NAMES, "peer v3", "peer jax")]
    # For v5e libtpu takes minutes for this peer.
    + [("tpu7x", "rung 8 kernel", "mixed"), ("tpu7x", "peer batched", "decode")],
)
def test_what_a_tpu_would_time_compiles_and_copies_no_cache(chip, name, case):
    args, result = compiled(chip, name, case)
    assert result.ok, result.error
    (_, kv_cache), *_ = args
    updates_in_place = name.startswith("peer") or int(name.split()[1]) >= 6
    if updates_in_place:
        assert result.copies_of(kv_cache) == [], "a copy in the loop would be timed with it"
