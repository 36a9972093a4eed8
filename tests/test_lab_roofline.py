"""`rpa.lab.predict.roofline`: floors of a batch are those of its sequences; the command prints."""

import json

import pytest

from rpa import chips
from rpa.__main__ import main
from rpa.lab.predict.roofline import floors


@pytest.mark.parametrize("name", chips.CHIPS)
def test_decode_waits_for_memory_and_a_long_prefill_for_the_matrix_units(name):
    decode, prefill, both = floors([(1, 4096)] * 8 + [(4096, 4096)], name)
    assert (decode.bound, prefill.bound) == ("memory", "compute")
    assert decode.intensity_flops_per_byte < decode.ridge_flops_per_byte
    assert prefill.intensity_flops_per_byte > prefill.ridge_flops_per_byte
    assert both.flops == decode.flops + prefill.flops
    assert both.hbm_bytes == decode.hbm_bytes + prefill.hbm_bytes
    assert max(decode.time_us, prefill.time_us) <= both.time_us
    assert both.time_us <= decode.time_us + prefill.time_us


def test_a_half_filled_mxu_takes_twice_as_long():
    (whole,) = floors([(512, 512)], "v5e")
    (half,) = floors([(512, 512)], "v6e")
    assert (whole.mxu_fill, half.mxu_fill) == (1.0, 0.5)
    limit = chips.roofline_time("v6e", half.flops, half.hbm_bytes)
    assert half.compute_us == pytest.approx(2e6 * limit.compute_s)
    assert half.memory_us == pytest.approx(1e6 * limit.memory_s)


def test_the_command_prints_a_table_or_json_and_draws(capsys, tmp_path):
    command = ["lab", "roofline", "--batch", "64x1/1024,1x512/2048"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert all(table.count(f"\n{name} ") == 3 for name in chips.CHIPS)
    picture = tmp_path / "roof.png"
    chip = ["--chip", "v6e", "--picture", str(picture)]
    assert main([*command, *chip, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["floors"]
    assert [row["part"] for row in data] == ["decode", "prefill", "all"]
    assert data[0]["bound"] == "memory" and data[0]["time_us"] == data[0]["memory_us"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_lengths_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="kv_len"):
        floors([(8, 4)], "v5e")
