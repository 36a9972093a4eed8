"""`lab schedule --save` and `--against`: what is kept is what is compared."""

import pytest

from rpa.__main__ import main
from rpa.lab.schedule import before_after

ROW = {"blocks": [1, 1024, 1, 512]} | dict.fromkeys(before_after.COLUMNS, 300.0)
ROWS = {"v6e decode": ROW, "v6e mixed": ROW | {"blocks": None, "sequence": None}}


def test_what_is_saved_is_loaded(tmp_path):
    before_after.save(ROWS, tmp_path / "rows.json")
    assert before_after.load(tmp_path / "rows.json") == ROWS


def test_ratios_name_the_worst_place():
    before = {"v6e decode": ROW | {"of 1,024": 250.0}, "v6e mixed": ROW | {"chunk": 600.0}}
    lines = before_after.table(ROWS, before).splitlines()
    assert "300 1.200" in lines[1] and "300 0.500" in lines[2] and "its own" in lines[2]
    assert lines[-1] == "bundles now / before; worst 1.200: v6e decode, of 1,024"


def test_a_table_without_a_common_place_says_so():
    lines = before_after.table(ROWS, {"v5e decode": ROW}).splitlines()
    assert lines[-1] == "none of these was saved before; saved were: v5e decode"


@pytest.mark.parametrize("text", [None, "no json", "[1]", '{"v6e": {"chunk": 1}}'])
def test_another_file_is_refused_before_anything_is_compiled(tmp_path, capsys, text):
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    options = ["--chip", "all", "--case", "all", "--against", str(file)]
    assert main(["lab", "schedule", *options]) == 2
    assert "but must be the name of a kernel, or a file that --save has" in capsys.readouterr().err
