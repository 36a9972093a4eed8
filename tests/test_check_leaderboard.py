"""The table of the challenge is kept beside the notebook, and what goes wrong stops nobody."""

import importlib

import pytest

from rpa.check import leaderboard
from rpa.check.errors import CheckFailed

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
