"""The table of the challenge is kept beside the notebook, and what goes wrong stops nobody."""

import importlib
import platform

import jax.numpy as jnp
import pytest

import rpa
from rpa import chips, lab
from rpa.check.chapters import leaderboard
from rpa.check.errors import CheckFailed
from rpa.lab.bench import comparison

needs_libtpu = pytest.mark.skipif(
    lab.compile_versions()["libtpu"] is None,
    reason=f"libtpu is not installed ({platform.system()} {platform.machine()})",
)

ENTRY = {"name": "mine", "num_bytes": 60_000_000, "num_copies": 7, "in_jax_bytes": 0}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "path", lambda: tmp_path / leaderboard.FILE_NAME)
    return tmp_path / leaderboard.FILE_NAME


def test_entries_are_kept_and_stand_in_the_table_by_their_bytes(file):
    assert leaderboard.read() == []
    leaderboard.write([ENTRY])
    assert leaderboard.read() == [ENTRY]
    first = leaderboard.table(leaderboard.read()).splitlines()[1]
    assert first.split()[:3] == ["1", "mine", "60.0"]


def test_an_entry_with_a_time_stands_between_the_recorded_times_of_its_chip():
    recorded = {row["name"]: row["challenge_us"] for row in comparison.recorded()["rows"][6:10]}
    assert list(recorded) == ["plain", "kernel", "yours", "v3"]
    timed = ENTRY | {"chip": "v6e", "time_us": recorded["v3"]["v6e"] + 0.1}
    names = [line[3:24].strip() for line in leaderboard.table([timed]).splitlines()[1:]]
    in_order = ["8 kernel (recorded)", "v3 (recorded)", "mine", "7 plain (recorded)"]
    assert names[:5] == [*in_order, "yours, after 7.3 (rec"]


def test_a_file_that_cannot_be_read_is_said_and_begun_anew(file, capsys):
    file.write_text("[1, 2")
    assert leaderboard.read() == []
    assert "cannot be read" in capsys.readouterr().out


def test_a_wrong_answer_is_not_entered(file, monkeypatch, capsys):
    def refuse(exercise, function):
        raise CheckFailed("the scores are not scaled")

    monkeypatch.setattr(leaderboard, "check_exercise", refuse)
    leaderboard.enter(lambda: None, "mine")
    printed = capsys.readouterr().out
    assert "not entered" in printed and "the scores are not scaled" in printed
    assert not file.exists()


def test_an_entry_becomes_a_module_that_can_be_imported():
    with leaderboard.as_module(twice) as path:
        module, name = path.split(":")
        assert getattr(importlib.import_module(module), name)(4) == 8


def twice(x):
    return 2 * x


def in_plain_jax(queries, keys, values, kv_cache, batch, *, sm_scale, backend):
    return queries, kv_cache


@pytest.mark.parametrize("chip, why", [("v5e", "plain JAX"), ("v9", "v5e")])
def test_where_there_is_no_schedule_no_time_is_told(chip, why, capsys):
    assert leaderboard.schedule(in_plain_jax, chip) == {}
    assert f"No schedule for {chip}" in (printed := capsys.readouterr().out) and why in printed


@needs_libtpu
@pytest.mark.full
def test_an_entry_is_compiled_and_its_kernels_are_timed(file, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "check_exercise", lambda exercise, function: None)
    leaderboard.enter(my_attention, "larger query blocks", chip="TPU v5e")
    rung_8, entry = leaderboard.read()
    assert rung_8["name"] == leaderboard.RUNG_8 and rung_8["time_us"] > 0
    assert rung_8["num_bytes"] > entry["num_bytes"]
    known = chips.chip("v5e")
    assert entry["chip"] == "v5e" and not entry["in_jax_bytes"]
    # Waits only add to its bundles, and its bytes need their time.
    assert entry["time_us"] >= entry["bundles"] / known.clock_hz * 1e6
    assert entry["time_us"] > comparison.hbm_us(entry["num_bytes"], "v5e")
    assert f"{entry['time_us']:.1f} us on v5e" in capsys.readouterr().out


def my_attention(queries, keys, values, kv_cache, batch, *, sm_scale, backend):
    """The answer to exercise 12.5."""
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    return rpa.ragged_paged_attention(
        *(queries, keys, values, kv_cache, *metadata),
        sm_scale=sm_scale,
        backend=backend,
        donate=False,
        m_block_sizes=(512, 512, 128, 512),
    )


def whole_cache_in_jax(queries, keys, values, kv_cache, batch, *, sm_scale, backend):
    scores = jnp.einsum("thd,psrld->ths", queries[:, :, :128], kv_cache)
    return queries * scores.sum(), kv_cache


def test_a_read_of_the_whole_cache_in_plain_jax_is_counted_and_starred():
    entry = leaderboard.count(whole_cache_in_jax)
    assert entry["in_jax_bytes"] >= leaderboard.cache_bytes()
    assert entry["num_bytes"] >= leaderboard.cache_bytes()
    assert " *" not in leaderboard.table([]) and "*" in leaderboard.table([{"name": "x"} | entry])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (in_plain_jax, "the least is"),
        (lambda *a, **o: a[0][int(a[0].sum()) :], "cannot be counted"),
    ],
)
def test_what_cannot_be_counted_is_not_entered(entry, words, file, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "check_exercise", lambda exercise, function: None)
    leaderboard.enter(entry, "mine")
    assert words in capsys.readouterr().out
    assert not file.exists()
