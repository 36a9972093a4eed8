"""What README.md shows runs: its Python example, its make targets, its links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    assert names["output"].shape == (4, 8, 64)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", README, re.M)):
        assert re.search(rf"^{''.join(target)}:", makefile, re.M), target


def test_the_tables_of_the_lab_are_those_of_make_bench(monkeypatch):
    """One implementation: what README.md quotes is what the command prints."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import update_readme

    from rpa.cli import all as command
    from rpa.lab.bench.tables import TABLES

    assert set(update_readme.TABLES) | {"published"} <= set(TABLES)
    row = {"chip": "v6e", "kernel": "rpa", "of window": 1.1}
    measured = [("sliding window", [row], [1.0])]
    monkeypatch.setattr(command, "measured", lambda names, scope: measured)
    monkeypatch.setattr(command, "scope_of", lambda: (None, []))
    told = update_readme.lab_tables("sliding window")
    printed = command.as_text("sliding window", [row])
    assert told.startswith("#### sliding window\n") and told[2:] == printed.strip()
    monkeypatch.setattr(command, "scope_of", lambda: (None, ["v3 is absent."]))
    with pytest.raises(SystemExit, match="v3 is absent"):
        update_readme.lab_tables("sliding window")


def test_every_linked_file_exists():
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
