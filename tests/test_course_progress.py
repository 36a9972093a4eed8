"""Progress of a learner: what is kept, what is printed, and that it never stands in the way."""

import importlib
import json
import os
import subprocess
import sys

import pytest

import rpa.check
from rpa.check import CheckFailed, NotStarted
from rpa.check.registry import all_exercises

module = importlib.import_module("rpa.check.progress")
pytestmark = pytest.mark.core


def right(weight_bytes, token_bytes, batch_size, kv_len):
    return weight_bytes + batch_size * kv_len * token_bytes


def wrong(weight_bytes, token_bytes, batch_size, kv_len):
    return weight_bytes


def stub(weight_bytes, token_bytes, batch_size, kv_len):
    raise NotImplementedError("Exercise 0.1: write decode_bytes (about 1 line)")


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("RPA_PROGRESS", str(tmp_path / "kept.json"))
    monkeypatch.setattr(module, "_said", set())
    return tmp_path / "kept.json"


def attempt(function):
    with pytest.raises((CheckFailed, NotStarted)):
        rpa.check("0.1", function)


def kept(path):
    return json.loads(path.read_text())


def test_attempts_are_counted_until_the_first_right_answer(path):
    attempt(wrong)
    attempt(wrong)
    assert kept(path) == {"0.1": {"attempts": 2, "solved": False}}
    rpa.check("0.1", right)
    rpa.check("0.1", right)
    attempt(wrong)
    assert kept(path) == {"0.1": {"attempts": 3, "solved": True}}


def test_a_stub_is_no_attempt(path):
    attempt(stub)
    assert not path.exists()


def test_entries_of_other_exercises_stay(path):
    path.write_text('{"9.9": {"attempts": 1, "solved": true}}')
    rpa.check("0.1", right)
    assert set(kept(path)) == {"0.1", "9.9"}


def test_nothing_is_left_beside_the_file(path):
    rpa.check("0.1", right)
    assert [file.name for file in path.parent.iterdir()] == ["kept.json"]


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"0.1": 3}', '{"0.1": {"attempts": "x"}}'])
def test_a_broken_file_is_said_once_and_left_alone(path, text, capsys):
    path.write_text(text)
    rpa.check("0.1", right)
    rpa.check("0.1", right)
    said = capsys.readouterr().out
    assert said.count("Progress is not kept") == 1 and "cannot be read" in said
    assert said.count("✓ Exercise 0.1") == 2
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    # A path below a file fails for root, too, who may write into read-only folders.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RPA_PROGRESS", str(tmp_path / "absent" / "kept.json"))
    monkeypatch.setattr(module, "_said", set())
    rpa.check("0.1", right)
    attempt(wrong)
    said = capsys.readouterr().out
    assert said.count("Progress is not kept") == 1 and "cannot be written" in said
    monkeypatch.setenv("RPA_PROGRESS", str(tmp_path / "file" / "kept.json"))
    rpa.check("0.1", right)
    assert "cannot be read" in capsys.readouterr().out


def test_a_rename_that_fails_leaves_the_old_file(path, monkeypatch, capsys):
    attempt(wrong)
    before = path.read_text()

    def refuse(source, target):
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    rpa.check("0.1", right)
    assert "cannot be written (not permitted)" in capsys.readouterr().out
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["kept.json"]


def test_never_in_the_package(monkeypatch, capsys):
    inside = module.PACKAGE / "check" / "kept.json"
    monkeypatch.setenv("RPA_PROGRESS", str(inside))
    monkeypatch.setattr(module, "_said", set())
    rpa.check("0.1", right)
    assert "lies inside the package" in capsys.readouterr().out
    assert not inside.exists()


def test_plain_python_keeps_nothing_unless_told(tmp_path):
    code = "import rpa; rpa.check('0.1', lambda w, t, b, k: w + b * k * t); rpa.check.progress()"
    env = {key: value for key, value in os.environ.items() if key != "RPA_PROGRESS"}
    env |= {"PYTHONPATH": str(module.PACKAGE.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert "No progress is kept outside a notebook" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_keeps_it_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("RPA_PROGRESS", raising=False)
    monkeypatch.setattr(module, "in_notebook", lambda: True)
    monkeypatch.chdir(tmp_path)
    rpa.check("0.1", right)
    assert kept(tmp_path / ".progress.json") == {"0.1": {"attempts": 1, "solved": True}}


def test_off_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "in_notebook", lambda: True)
    monkeypatch.setenv("RPA_PROGRESS", "off")
    monkeypatch.chdir(tmp_path)
    rpa.check("0.1", right)
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_a_row_a_chapter_and_a_cell_an_exercise(path, capsys):
    path.write_text(
        '{"1.1": {"attempts": 1, "solved": true}, "1.2": {"attempts": 4, "solved": false}}'
    )
    rpa.check.progress()
    said = capsys.readouterr().out
    (row,) = [line for line in said.splitlines() if line.startswith("chapter 1 ")]
    assert "1 of 5" in row and "✓ 1" in row and "✗ 4" in row and row.count("·") == 3
    assert f"1 of {len(all_exercises())} solved" in said
