"""`rpa.lab.bench.tables` and `python -m rpa lab all`: what is compared, printed, refused."""

import itertools
import json
import platform
import re

import pytest

from rpa import lab
from rpa.__main__ import main
from rpa.cli import all as command
from rpa.kernel import prepare
from rpa.lab import peers, programs
from rpa.lab.bench import tables
from rpa.lab.bench.tables import TABLES, Scope, chunks, moved, table, whole
from rpa.lab.schedule.execution import CannotRun

needs_libtpu = pytest.mark.skipif(
    lab.compile_versions()["libtpu"] is None,
    reason=f"libtpu is not installed ({platform.system()} {platform.machine()})",
)


def decode_row(kernel, block, **numbers):
    return {"chip": "v6e", "kv heads": 8, "kernel": kernel, "block": block} | numbers


def test_each_kernel_is_compared_at_one_block_and_at_its_best():
    rows = chunks.DECODE.finish(
        [
            decode_row("rpa", None, bundles=1500.0),
            decode_row("rpa", 1024, bundles=1700.0),
            decode_row("rpa", 4096, bundles=1400.0),
            decode_row("v3", 1024, bundles=2550.0),
            decode_row("v3", 4096, bundles=2000.0),
            decode_row("batched", None, note="no."),
        ]
    )
    told = [(row["kernel"], row["at"], row.get("best block"), row.get("of v3")) for row in rows]
    assert told == [
        ("rpa", "1,024", None, pytest.approx(1700 / 2550)),
        ("rpa", "best", "4,096", pytest.approx(0.7)),
        ("v3", "1,024", None, 1.0),
        ("v3", "best", "4,096", 1.0),
        ("batched", "best", "own", None),
    ]


def test_blocks_of_rung_7_are_left_out_just_where_vmem_has_no_room_for_them():
    refused = set()
    for (heads, model), chip in itertools.product(chunks.HEADS.items(), table.CHIPS):
        for block in filter(None, chunks.SWEPT["rpa"]):
            sizes = programs.Workload(model, page_size=128, num_seqs=16, q_len=1, kv_len=16_384)
            new = sizes.kv(sizes.num_seqs)
            args = (sizes.queries(sizes.num_seqs), new, new, sizes.kv_cache, *sizes.metadata)
            try:
                prepare(*args, chip=chip, d_block_sizes=(1, block, 1, block))
            except ValueError as error:
                assert "of VMEM" in str(error)
                refused.add((chip, heads, block))
    assert refused == chunks.TOO_LARGE


def test_a_whole_is_compared_with_its_parts_only_if_all_are_there():
    times = dict(zip(whole.PARTS, (10.0, 20.0, 27.0), strict=True))
    rows = [{"chip": "v5e", "batch": name, "us": us} for name, us in times.items()]
    assert whole.PARTED.finish(rows)[-1]["of its parts"] == pytest.approx(0.9)
    rows[0] = {"chip": "v5e", "batch": rows[0]["batch"], "note": "no."}
    assert not any("of its parts" in row for row in whole.PARTED.finish(rows))


def test_blocks_of_a_chunk_are_those_that_a_query_sees():
    for cached in (0, 100, 512, 4096):
        interior = masked = 0
        for start in range(cached, cached + 512, 128):
            for key in range(0, cached + 512, 512):
                interior += key + 511 <= start
                masked += start < key + 511 and key <= start + 127
        assert whole.blocks_of_chunk(512, cached) == (interior, masked), cached


def test_batches_fit_their_room():
    for lengths in [*whole.BATCHES.values(), *whole.PARTS.values()]:
        assert len(lengths) <= whole.ROOM.num_seqs
        assert sum(q_len for q_len, _ in lengths) <= whole.ROOM.num_seqs * whole.ROOM.q_len
        assert max(kv_len for _, kv_len in lengths) <= whole.ROOM.kv_len
    assert max(whole.CONTEXTS) + 2048 <= whole.ROOM.kv_len
    assert max(kv_len for _, kv_len in whole.window_lengths()) <= whole.WINDOW_ROOM.kv_len


def test_a_refusal_is_a_row_in_words():
    def measure(chip):
        if chip == "v6e":
            raise CannotRun("it is not understood.")
        return {"bundles": 7}

    a_table = table.Table("t", "", {"chip": "", "bundles": "d"}, None, measure)
    rows = list(tables.rows_of(a_table, [{"chip": "v5e"}, {"chip": "v6e"}]))
    assert all(row.pop(tables.SECONDS) >= 0 for row in rows)
    assert rows[0] == {"chip": "v5e", "bundles": 7}
    assert tables.as_markdown(a_table, rows).endswith("v6e: CannotRun: it is not understood.")


@pytest.mark.parametrize("quick", [False, True])
def test_every_table_has_cells_and_all_columns_are_filled_by_it(quick):
    scope = Scope(("v5e",), ("rpa", "v3", "batched"), quick)
    for each in TABLES.values():
        cells = each.cells(scope)
        assert cells and all(cell.get("chip", "v5e") == "v5e" for cell in cells)
        assert len({json.dumps(cell) for cell in cells}) == len(cells)


def test_quick_is_a_part_of_the_whole():
    for each in TABLES.values():
        most = each.cells(Scope(("tpu7x",)))
        assert all(cell in most for cell in each.cells(Scope(("tpu7x",), quick=True)))


def test_the_command_prints_tables_or_json(capsys, monkeypatch):
    monkeypatch.setattr(moved, "BATCHES", {"2 decodes": [(1, 300)] * 2})
    monkeypatch.setattr(peers, "absence", lambda name: f"{name} is not installed.")
    assert main(["lab", "all", "--quick", "--table", "bytes moved", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (ours, *_) = rows = told["tables"]["bytes moved"]["rows"]
    printed = command.as_text("bytes moved", rows)
    assert (
        printed.startswith("\n## bytes moved\n")
        and "| 2 decodes |  128 | shuffled | rpa " in printed
    )
    assert "--quick leaves out: v5e and v6e" in command.heading([], quick=True)
    assert ours["kernel"] == "rpa" and 1 <= ours["of least"] < 1.2
    assert told["spent"]["wall_s"] >= told["tables"]["bytes moved"]["spent"]["wall_s"] > 0
    assert told["compiled"] == 0
    assert told["absent"] == [r for k in ("v3", "batched") if (r := peers.absence(k)) is not None]


def test_the_command_says_what_it_took(capsys, monkeypatch):
    monkeypatch.setattr(moved, "BATCHES", {"2 decodes": [(1, 300)] * 2})
    monkeypatch.setattr(peers, "absence", lambda name: f"{name} is not installed.")
    assert main(["lab", "all", "--quick", "--table", "bytes moved"]) == 0
    *_, of_table, _, of_all = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Cells: 1, the longest \d+ s: [\d.]+ minutes \(.* processor\)\.", of_table)
    assert re.fullmatch(r"All tables: .*; 0 schedules were compiled, \d+ kept before\.", of_all)


def test_cells_that_are_measured_at_once_do_not_wait_for_the_same_schedule():
    """Two workers; a schedule depends on all columns but the batch."""
    for each in (whole.WHOLE, whole.PREFILL, whole.PARTED):
        cells = [
            {k: v for k, v in cell.items() if k not in ("batch", "cached")}
            for cell in each.cells(Scope())
        ]
        assert all(one != next_one for one, next_one in itertools.pairwise(cells))


def test_absent_peers_are_said_and_not_measured(monkeypatch, capsys):
    monkeypatch.setattr(peers, "absence", lambda name: f"{name} is not installed.")
    scope, absent = command.scope_of()
    assert scope.kernels == ("rpa",) and absent == [
        "v3 is not installed.",
        "batched is not installed.",
    ]
    assert "Not compared: v3 is not installed." in command.heading(absent, quick=False)


@needs_libtpu
@pytest.mark.full
def test_the_tables_of_one_chip_are_complete(capsys):
    names = ["whole batches", "prefill", "mixed batch", "sliding window", "mixed"]
    asked = [word for name in names for word in ("--table", name)]
    assert main(["lab", "all", "--quick", "--json", *asked]) == 0
    told = json.loads(capsys.readouterr().out)["tables"]
    for name in names:
        assert all("note" not in row for row in told[name]["rows"]), name
    for row in told["whole batches"]["rows"]:
        assert 0 < row["calibrated efficiency"] <= row["efficiency"] <= 1.01
    assert all(0 < row["blocks/time"] <= 1.01 for row in told["prefill"]["rows"])
