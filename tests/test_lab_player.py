"""The player and the trace hold what was recorded, and need nothing else."""

import importlib.util
import json
import os
import re
import shutil
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
    check_format(json.loads(trace.read_text()))


# --- In a browser, and in the program that opens traces ------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed here")

PRESS = """<script>
const player = document.querySelector(".rpa-player"), said = [];
for (const key of %s) {
  player.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  said.push({
    now: player.querySelector(".now").textContent,
    cells: [...player.querySelectorAll(".cells")].map(row => row.textContent),
    here: player.querySelector(".here")?.textContent ?? "",
    sems: player.querySelector(".sems").textContent,
  });
}
const result = document.createElement("pre"); result.id = "said";
result.textContent = JSON.stringify(said); document.body.append(result);
</script></body>"""


def in_browser(page, folder, *more):
    """What a headless browser prints of a page; its profile is in a folder of the test."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,700"]
    command += ["--disable-background-networking", f"--user-data-dir={folder / 'profile'}", *more]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60)
    return done.stdout


def after_keys(timeline, keys, folder):
    """What the player shows after each of these keys."""
    page = folder / "player.html"
    text = player(timeline, double).text.replace("</body>", PRESS % json.dumps(keys))
    page.write_text(text, encoding="utf-8")
    dom = in_browser(page, folder, "--dump-dom")
    return json.loads(re.search(r'<pre id="said">(.*?)</pre>', dom, re.S)[1].replace("&gt;", ">")
                      .replace("&lt;", "<").replace("&amp;", "&"))  # fmt: skip


@needs_browser
def test_keys_step_forwards_and_backwards_in_a_real_browser(timeline, tmp_path):
    keys = [
        "Home",
        "ArrowRight",
        "ArrowRight",
        "ArrowLeft",
        "End",
        "ArrowRight",
        "Home",
        "ArrowLeft",
    ]
    seen = after_keys(timeline, keys, tmp_path)
    last = len(data_of(player(timeline, double).text)["steps"])
    assert [int(step["now"].split(".")[0]) for step in seen] == [1, 2, 3, 2, last, last, 1, 1]
    first, second, third = seen[:3]
    assert first["cells"] == [">" * 8, "?" * 8]  # on its way, and never written
    assert second["cells"] == [">" * 8, ">" * 8] and "sems[1] 4,096" in second["sems"]
    assert third["cells"] == ["=" * 8, ">" * 8] and "sems[0] 0" in third["sems"]
    assert "copy(0).start()" in first["here"] and "copy(n).wait()" in third["here"]
    assert seen[3] == second and seen[6] == first  # a step back undoes a step


@needs_browser
def test_a_real_browser_draws_the_player(timeline, tmp_path):
    import matplotlib.image

    page, shot = player(timeline, double).save(tmp_path / "player.html"), tmp_path / "player.png"
    in_browser(page, tmp_path, f"--screenshot={shot}")
    pixels = matplotlib.image.imread(shot)[..., :3]
    near = lambda color: abs(pixels - [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]) < 0.02  # noqa: E731
    for color in ("#F0E442", "#56B4E9", "#0072B2", "#E69F00"):
        assert near(color).all(axis=-1).sum() > 500, color


def test_the_trace_is_what_the_format_asks_for(timeline):
    check_format(chrome_trace(timeline, "v5e"))


def check_format(trace):
    """The documented Trace Event Format, and what its readers need: spans of a track that nest."""
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    tracks = {}
    for event in trace["traceEvents"]:
        assert {"name", "ph", "pid", "tid"} <= set(event) and event["ph"] in "XM"
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
        else:
            assert isinstance(event["ts"], float) and isinstance(event["dur"], float)
            assert event["ts"] >= 0 and event["dur"] >= 0
            tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        for (_, end), (begin, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
            assert begin >= end - 1e-9


def trace_processor():
    """The program of the package `perfetto`, which it downloads at its first use, or why not."""
    if importlib.util.find_spec("perfetto") is None:
        pytest.skip("the package perfetto is not installed")
    where = os.environ.get("TRACE_PROCESSOR") or shutil.which("trace_processor_shell")
    if where is None:
        pytest.skip("no trace_processor_shell here: perfetto would download it")
    return where


def test_perfetto_reads_the_trace(timeline, tmp_path):
    where = trace_processor()
    from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

    path = tmp_path / "trace.json"
    path.write_text(json.dumps(chrome_trace(timeline, "v5e")), encoding="utf-8")
    with TraceProcessor(trace=str(path), config=TraceProcessorConfig(bin_path=where)) as found:
        rows = found.query("select name from slice where name like '%-> buffers%'")
        assert len(list(rows)) == 3
