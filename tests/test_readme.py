"""What README.md shows runs: its Python example, its make targets, its links."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)  # interpreted where there is no TPU
    assert names["output"].shape == (4, 8, 64)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", README, re.M)):
        assert re.search(rf"^{''.join(target)}:", makefile, re.M), target


def test_what_commands_wrote_into_it_is_up_to_date(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr("sys.argv", ["update_readme.py", "--check"])
    import update_readme

    assert update_readme.main() == 0, capsys.readouterr().out


def test_every_linked_file_exists():
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
