"""`rpa.lab.predict`: a prediction keeps to what bounds it, and moves as its assumptions do."""

import json
import platform

import numpy as np
import pytest

from rpa import chips, lab
from rpa.__main__ import main
from rpa.cli.predict import describe, table, to_json
from rpa.lab import peers
from rpa.lab.bench import measured, published
from rpa.lab.bench.timed_runs import timed_runs
from rpa.lab.predict import calibration, waits
from rpa.lab.predict.batch import Prediction, predict_batch
from rpa.lab.schedule import cases
from rpa.lab.schedule.execution import CannotRun, Execution
from rpa.lab.schedule.machine import Event
from rpa.ragged import RaggedBatch

needs_libtpu = pytest.mark.skipif(
    lab.compile_versions()["libtpu"] is None,
    reason=f"libtpu is not installed ({platform.system()} {platform.machine()})",
)
needs_peers = pytest.mark.skipif(peers.absence("v3") is not None, reason=str(peers.absence("v3")))


def a_batch(q_lens, kv_lens, page_size=128):
    pages_per_seq = -(-max(kv_lens) // page_size)
    table = [[i * pages_per_seq + j for j in range(pages_per_seq)] for i in range(len(q_lens))]
    return RaggedBatch.from_lengths(q_lens, kv_lens, table)[0]


@needs_libtpu
@pytest.mark.full
def test_a_prediction_keeps_to_its_bounds():
    batch = a_batch([1] * 8, [1024, 900, 700, 512, 300, 200, 128, 5])
    at_peak = predict_batch("rpa", "tpu7x", batch)
    chip = chips.chip("tpu7x")
    assert at_peak.time_us >= at_peak.bundles / chip.clock_hz * 1e6
    assert at_peak.time_us >= at_peak.hbm_time_us
    assert at_peak.least_bytes <= at_peak.hbm_bytes <= 1.1 * at_peak.least_bytes
    slow = predict_batch("rpa", "tpu7x", batch, hbm_efficiency=0.5, latency_us=1.0)
    assert slow.bundles == at_peak.bundles and slow.time_us > at_peak.time_us
    assert slow.time_us >= 2 * at_peak.hbm_time_us


@needs_libtpu
@pytest.mark.full
def test_a_mixed_batch_is_both_kernels():
    decode, chunk = a_batch([1] * 4, [700] * 4), a_batch([256], [1024])
    both = a_batch([1] * 4 + [256], [700] * 4 + [1024])
    parts = [predict_batch("rpa", "v5e", batch) for batch in (decode, chunk)]
    whole = predict_batch("rpa", "v5e", both)
    assert whole.flops == sum(part.flops for part in parts)
    assert whole.time_us == pytest.approx(sum(part.time_us for part in parts), rel=0.1)


@pytest.mark.parametrize("efficiency", [0.0, 1.5, -1])
def test_an_efficiency_is_a_part(efficiency):
    with pytest.raises(ValueError, match="part of the peak"):
        predict_batch("rpa", "v5e", a_batch([1], [5]), hbm_efficiency=efficiency)


def test_published_timings_are_printed_with_their_error():
    timing = published.TIMINGS[-1]
    clock_hz = chips.chip("tpu7x").clock_hz
    double = Prediction(
        *("v3", "tpu7x", round(2e-6 * timing.time_us * clock_hz), 0.0, 10, 10, 10),
        calibrated_us=1.5 * timing.time_us,
    )
    assert table([(timing, double)]).splitlines()[1].split()[-3::2] == ["+100%", "+50%"]
    assert to_json(double)["time_us"] == pytest.approx(2 * timing.time_us, rel=1e-3)
    assert "predicted, not measured" in describe(double)
    assert "fitted to 58 published timings" in describe(double)


def test_the_calibration_is_the_fit_to_all_timings_and_holds_for_those_left_out(capsys):
    assert main(["lab", "predict", "--calibrate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert calibration.Calibration(**found["best"]) == calibration.FITTED
    assert calibration.rms(found["left_out"]) < 0.1
    assert calibration.rms(found["errors"]) < 0.1
    plausible = tuple(calibration.Calibration(**each) for each in found["plausible"])
    assert plausible == calibration.PLAUSIBLE
    assert 0.88 <= np.mean(found["covered"]) <= 0.95  # of timings left out with their source


def test_a_timing_that_is_left_out_does_not_choose_its_own_fit():
    published_us, best = np.array([10.0, 10.0, 10.0]), 4
    predicted = np.full((len(calibration.GRID), 3), 20.0)
    predicted[best] = 10.0
    predicted[7] = [12.0, 12.0, 10.0]
    found = calibration.fit(predicted, published_us, "aab")
    assert found.best == calibration.GRID[best] and not found.errors.any()
    predicted[best, 0] = 20.0  # without the first timing it is still the best
    found = calibration.fit(predicted, published_us, "aab")
    assert found.best == calibration.GRID[7]
    assert found.left_out.tolist() == pytest.approx([1.0, 0.2, 0.0])
    assert found.source_left_out.tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_a_run_that_multiplied_too_little_is_refused():
    class Halved:
        kernel, capacity = "v3", {"MATMUL": 2}

        def slots(self, hits):
            return {"MATMUL": int(hits.sum())}

    peak, run = chips.chip("v5e").mxu_flops_per_cycle, Execution(np.full(10, 2))
    cases.check_products(Halved(), run, "v5e", 10 * peak, head_dim=128)
    with pytest.raises(CannotRun, match="for 10 cycles, but this batch needs 11"):
        cases.check_products(Halved(), run, "v5e", 11 * peak, head_dim=128)
    with pytest.raises(CannotRun, match="needs 20"):  # a head fills half of the lanes
        cases.check_products(Halved(), run, "v5e", 10 * peak, head_dim=64)


@pytest.mark.parametrize("timing", published.TIMINGS, ids=lambda t: f"{t.kernel}-{t.num_seqs}")
def test_published_batches_are_what_was_published(timing):
    batch = timing.batch
    assert set(batch.kv_lens) == {timing.kv_len} and len(batch.kv_lens) == timing.num_seqs
    assert int(batch.cu_q_lens[-1]) == timing.num_seqs * timing.q_len
    num_tokens, num_pages = int(batch.cu_q_lens[-1]), len(batch.page_indices)
    batch.validate(num_tokens=num_tokens, num_pages=num_pages, page_size=timing.page_size)


def test_a_range_holds_its_time_and_many_rates_are_the_single_ones():
    each = timed_runs()[20]
    low_us, high_us = calibration.range_us([each.run], "tpu7x")
    assert low_us < calibration.FITTED.time_us([each.run], "tpu7x") < high_us
    many = calibration.times_of([each.run], "tpu7x")
    for i in (0, 700, len(calibration.GRID) - 1):
        assert many[i] == pytest.approx(calibration.GRID[i].time_us([each.run], "tpu7x"))


def test_few_bytes_in_flight_are_read_slowly_and_writes_are_slow():
    def took(*events, **rates):
        run = Execution(np.ones(10, int), events=tuple(events))
        return waits.cycles_with_waits(run, bytes_per_cycle=1e6, **rates)

    read, wait = Event(0, "hbm_to_vmem", 2_000_000, 1), Event(1, "wait", 2_000_000, 1)
    write = Event(0, "vmem_to_hbm", 2_000_000, 1)
    assert took(read, wait) == 11 and took(write, wait) == 11
    assert took(read, wait, few_bytes_part=0.5) == 13 and took(write, wait, write_part=0.5) == 13
    # The third of these starts with 4 MB in flight.
    others = [Event(0, "hbm_to_vmem", 2_000_000, 2)] * 2
    assert took(*others, read, wait, few_bytes_part=0.5) == 10 + 9


def test_a_measured_file_is_compared_and_fitted(tmp_path, monkeypatch):
    row = {"case": "decode", "lab_kernel": "rpa", "lengths": [[1, 300]] * 2}
    row |= {"timing": {"median_s": 9e-6}, "calibrated_us": 8.0, "low_us": 6.5, "high_us": 9.5}
    sizes = {"model": "llama-3-8b", "page_size": 128, "dtype": "bfloat16", "kv_dtype": "bfloat16"}
    found = {"schema": measured.SCHEMA, "machine": {"chip": "tpu7x"}, "workload": sizes}
    file = tmp_path / "found.json"
    file.write_text(json.dumps(found | {"rows": [row, row | {"lab_kernel": None}]}))
    (kept,) = measured.read(file)
    assert kept.is_in_range and kept.time_us == pytest.approx(9.0)
    monkeypatch.setattr(measured, "_times", lambda row: np.full(len(calibration.GRID), 9.0))
    _, sources = measured.refit([kept])
    assert sources[-1] == measured.SOURCE and len(sources) == len(timed_runs()) + 1
    file.write_text(json.dumps(found | {"machine": {"chip": None}, "rows": [row]}))
    with pytest.raises(ValueError, match="measured on a CPU"):
        measured.read(file)
    file.write_text("{}")
    with pytest.raises(ValueError, match="no file of"):
        measured.read(file)
