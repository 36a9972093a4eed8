"""Two open notebooks of one learner: what one check writes, another does not write over."""

import json
import os
import subprocess
import sys
import time

import pytest

from rpa.check import one_at_a_time
from rpa.check.one_at_a_time import alone_with
from rpa.check.yours.growing import read

TOGETHER = """
import os, sys, time
from pathlib import Path
def together():
    Path(f"{sys.argv[-1]}.{os.getpid()}.ready").touch()
    while not Path(sys.argv[-1]).exists():
        time.sleep(0.001)
"""
"""A process that calls `together` goes on when all have called it: importing takes seconds."""

COLLECT = """
from rpa.check.yours.growing import collect
sys.path.insert(0, sys.argv[2])
import answers
together()
for k in range(12):
    collect(f"{sys.argv[3]}.{k}", getattr(answers, f"answer_{k}"), Path(sys.argv[1]))
"""

COUNT = """
from rpa.check.progress import note
note("1.1", False)  # fills the table of exercises
together()
for k in range(40):
    note("1.1", False)
    note(f"{sys.argv[1]}.1", True)
"""


def at_once(script, folder, *argument_lists, **environment):
    """Run a script in several processes at once; the folder is theirs."""
    start = folder / "start"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER + script, *map(str, arguments), str(start)],
            env=os.environ | environment,
        )
        for arguments in argument_lists
    ]
    while len(list(folder.glob("start.*"))) < len(processes):
        assert not any(process.poll() for process in processes)
        time.sleep(0.01)
    start.touch()
    assert [process.wait(timeout=120) for process in processes] == [0] * len(processes)


def test_two_notebooks_add_to_one_file_and_nothing_is_lost(tmp_path):
    functions = [f"def answer_{k}(x):\n    return x + {k}\n" for k in range(12)]
    (tmp_path / "answers.py").write_text("\n\n".join(functions), encoding="utf-8")
    path = tmp_path / "my_rpa.py"
    at_once(COLLECT, tmp_path, *((path, tmp_path, chapter) for chapter in (4, 5, 6)))
    assert sorted(read(path)) == sorted(f"{c}.{k}" for c in (4, 5, 6) for k in range(12))
    compile(path.read_text(encoding="utf-8"), "my_rpa.py", "exec")
    assert list(tmp_path.glob("*.lock")) == []


def test_two_notebooks_count_their_attempts_in_one_file(tmp_path):
    path = tmp_path / "progress.json"
    at_once(COUNT, tmp_path, (4,), (5,), (6,), RPA_PROGRESS=str(path))
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept.pop("1.1")["attempts"] == 3 * 41
    assert sorted(kept) == ["4.1", "5.1", "6.1"]


def test_a_lock_left_behind_stops_nobody(tmp_path, monkeypatch):
    path, lock = tmp_path / "file", tmp_path / "file.lock"
    lock.touch()
    old = time.time() - 2 * one_at_a_time.STALE_S
    os.utime(lock, (old, old))
    with alone_with(path):
        assert lock.exists()
    assert not lock.exists()


def test_a_lock_that_is_held_for_long_is_passed_and_stays_its_owners(tmp_path, monkeypatch):
    monkeypatch.setattr(one_at_a_time, "WAIT_S", 0.1)
    with alone_with(tmp_path / "file"):
        with alone_with(tmp_path / "file"):
            pass
        assert (tmp_path / "file.lock").exists()


def test_the_lock_is_dropped_when_a_check_is_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt), alone_with(tmp_path / "file"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
