"""The player and the trace hold what was recorded, and need nothing else."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import interpreter
from rpa.figures.player import player
from rpa.lab.copies.events import Timeline
from rpa.lab.copies.perfetto import chrome_trace
from rpa.lab.copies.timeline import record_dmas

pytestmark = pytest.mark.core


def double(x_ref, out_ref, buffers_ref, sems):
    # </script> in a comment does not end the player's script
    def copy(n):
        source = x_ref.at[pl.ds(8 * n, 8)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2])

    copy(0).start()
    for n in range(3):
        if n < 2:
            copy(n + 1).start()
        copy(n).wait()
        out_ref[pl.ds(8 * n, 8)] = 2 * buffers_ref[n % 2]


@pytest.fixture(scope="module")
def timeline():
    call = pl.pallas_call(
        double,
        out_shape=jax.ShapeDtypeStruct((24, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((2, 8, 128), jnp.float32), pltpu.SemaphoreType.DMA((2,))],
        interpret=interpreter.params(),
    )
    with record_dmas() as recorded:
        jax.block_until_ready(call(jnp.ones((24, 128))))
    return recorded


def data_of(text):
    return json.loads(re.search(r"const data=(.*), root=", text)[1])


def test_the_player_has_every_copy_and_the_line_it_was_started_in(timeline, tmp_path):
    text = player(timeline, double).save(tmp_path / "player.html").read_text()
    data = data_of(text)
    assert data["rows"] == [{"name": "buffers[0]", "size": 8}, {"name": "buffers[1]", "size": 8}]
    starts = [step for step in data["steps"] if step["kind"] == "start"]
    assert [step["target"]["row"] for step in starts] == [
        "buffers[0]", "buffers[1]", "buffers[0]"
    ]  # fmt: skip
    lines = {(file, number): line for file, number, line in data["source"]}
    assert ".start()" in lines[starts[0]["file"], starts[0]["line"]]
    waits = [step for step in data["steps"] if step["kind"] == "wait"]
    assert [len(step["arrived"]) for step in waits] == [1, 1, 1]
    assert sum(step["bytes"] for step in starts) == sum(step["bytes"] for step in waits)


def test_the_player_asks_no_network_and_cannot_be_broken_by_a_source(timeline):
    text = player(timeline, double).text
    assert "http" not in text and "src=" not in text and "@import" not in text
    assert text.count("</script>") == 1


def test_a_record_without_copies_is_refused_in_words():
    with pytest.raises(ValueError, match="started no copy"):
        player(Timeline())


def test_the_trace_has_a_span_for_each_copy_on_a_track_with_a_name(timeline):
    trace = json.loads(json.dumps(chrome_trace(timeline, "v5e")))
    names = {
        e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"
    }
    assert names == {0: "core", 1: "buffers[0]", 2: "buffers[1]"}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    copies = [event for event in spans if event["tid"]]
    assert [event["args"]["bytes"] for event in copies] == [4096] * 3
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    ends = [event["ts"] + event["dur"] for event in copies]
    assert ends == sorted(ends)  # one HBM serves them in the order of their starts


def test_the_command_line_writes_both(tmp_path):
    page, trace = tmp_path / "dmas.html", tmp_path / "dmas.json"
    command = [sys.executable, "-m", "rpa", "lab", "timeline"]
    command += ["--kernel", "rpa.yours.reference:ragged_attention", "--batch", "1x1/20,1x5/9"]
    done = subprocess.run(
        [*command, "--html", page, "--perfetto", trace], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "start" in done.stdout and data_of(page.read_text())["steps"]
    assert json.loads(trace.read_text())["traceEvents"]
