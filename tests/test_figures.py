"""Every figure can be read: fonts, contrast with the page, no overlaps, words for who cannot see.

What a figure shows is tested by its words, which are made from the same numbers.
"""

import io
import itertools
import sys

import matplotlib.image
import numpy as np
import pytest

from rpa import figures
from rpa.chips import CHIPS, chip
from rpa.figures import chips as chip_pictures
from rpa.figures import comparison as race_pictures
from rpa.figures import (
    dense,
    exercises,
    fused,
    kernel,
    optimise,
    overview,
    paging,
    production,
    ragged,
    tiled,
)
from rpa.figures.roofline import under_roof
from rpa.figures.style import CYCLE, MIN_FONT_POINTS
from rpa.lab.bench.comparison import recorded
from rpa.lab.predict.roofline import Point
from rpa.lab.schedule.recorded import recorded_step
from rpa.ragged import RaggedBatch
from rpa.shapes import LLAMA3_8B
from rpa.tiled import block_map
from rpa.traces import SERVICES, sample_requests

POINTS = [("decode, one token", 4.0), ("chunk of 128", 380.0), ("prefill of 4,096", 1366.0)]

RUNS = {
    "rung 5, decode": Point(flops=4e9, hbm_bytes=1e9, time_us=700),
    "rung 8, prefill": Point(flops=4e12, hbm_bytes=4e9, time_us=1e4),
}

TRIANGLE = np.tri(6, dtype=bool)
USE = {"running": 3, "live": 300, "later": 200, "never": 400}
PERCENT = np.array([[50.0], [94.0]])
BATCH, _ = RaggedBatch.from_lengths([1, 1, 2, 3], [5, 6, 4, 3], [[0, 1], [2, 3], [4], [5]])
IDLE, _ = RaggedBatch.from_lengths([0, 0], [5, 0], [[0, 1], [2]])

EXAMPLES = {
    "tpu_v5e": lambda: figures.tpu("v5e"),
    "tpu_tpu7x": lambda: figures.tpu("tpu7x"),
    "compare_all": lambda: figures.compare(tuple(CHIPS)),
    "roofline": lambda: chip_pictures.roofline(points=POINTS),
    "under_roof": lambda: under_roof("v6e", RUNS),
    "under_roof of runs in one place": lambda: under_roof(
        "v5e", {f"rung {n}": Point(4e9, 1e9, 1250 + n) for n in range(1, 8)}
    ),
    "the race": lambda: race_pictures.ladder(recorded()),
    "decode_share": lambda: figures.decode_share(LLAMA3_8B),
    "by_hand": lambda: dense.by_hand(
        np.where(np.tri(3), 1.41, -np.inf), np.tri(3) / 3, np.ones((3, 2))
    ),
    "masks": lambda: dense.masks({"prefill": TRIANGLE, "chunk": TRIANGLE[4:]}, cached=(0, 4)),
    "heads": lambda: dense.heads({"MHA": 8, "GQA": 2, "MQA": 1}),
    "growing_cache": lambda: dense.growing_cache(
        {"grow": [30.0, 40.0, 35.0], "reserve": [1.0, 1.2, 1.1]}, [500, 501, 502], "cpu, 2 cores"
    ),
    "lengths": lambda: paging.lengths(
        {service: sample_requests(500, 0, service)[0] for service in SERVICES}, [("limit", 8192)]
    ),
    "memory_strip": lambda: paging.memory_strip([(0, 6, "live", "a")], 24, "Six slots are live"),
    "memory_use": lambda: paging.memory_use({"reserve": USE, "pages": USE}, num_slots=1000),
    "token_layout": lambda: paging.token_layout(3, 64, packing=2, lanes=128),
    "layout_waste": lambda: paging.layout_waste(
        {"float32": PERCENT, "int8": PERCENT}, [1, 8], [64]
    ),
    "page_size_trade": lambda: paging.page_size_trade(
        [8, 16, 32, 64], [1, 2, 4, 8], [16, 32, 64, 128], [400, 200, 100, 50], 1024
    ),
    "prefix_bytes": lambda: paging.prefix_bytes((3 * 2**30, 2**30), (2**28, 2**30)),
    "query_padding": lambda: paging.query_padding([1, 1, 40, 1, 7]),
    "batch_figure": lambda: ragged.batch_figure(BATCH, names=["A", "B", "C", "D"]),
    "batch_figure of idle slots only": lambda: ragged.batch_figure(IDLE),
    "mask_figure": lambda: ragged.mask_figure(BATCH),
    "bytes_moved": lambda: fused.bytes_moved(
        {
            "prompt": {
                "separate": {"new, read": 40, "new, read back": 40},
                "fused": {"new, read": 40},
            }
        }
    ),
    "blocks_and_pages": lambda: fused.blocks_and_pages(
        13, 4, [5, 2, 7, 3], page_size=4, block_tokens=8
    ),
    "diagram": kernel.diagram,
    "batch_walk": lambda: kernel.batch_walk(
        [(0, 0, 0, "interior"), (0, 0, 1, "masked"), (2, 0, 0, "masked")],
        [2, 1, 3],
        ["A decode", "(idle)", "B chunk"],
    ),
    "before_after": lambda: optimise.before_after(
        {step: recorded_step("v5e", step) for step in ("odd stride", "two sequences together")}
    ),
    "steps_against_hbm": lambda: optimise.steps_against_hbm(
        {chip: {"as written": 9000, "with a trick": 2200} for chip in ("v5e", "tpu7x")},
        {"v5e": 3836, "tpu7x": 1247},
    ),
    "banks": lambda: optimise.banks([1, 8, 9, 16]),
    "block_diagonal": optimise.block_diagonal,
    "two_lanes": lambda: optimise.two_lanes([(0, 2), (2, 4)], [(2, 5), (5, 8)]),
    "strips": lambda: exercises.strips(
        [("page 7", "0 1 | +2 -"), ("block", "_ *1 #2")],
        "Page 7 holds two cached tokens and a new one, which goes into the block.",
        arrows=[((0, 1), (1, 1))],
    ),
    "mask_tiles": lambda: exercises.mask_tiles(
        [*range(4, 10)],
        10,
        4,
        4,
        window=3,
        words="Six queries from position 4 on, ten keys, a window of three keys.",
    ),
    "lanes": lambda: exercises.lanes(
        {"copy": [(0, 2, "0")], "add": [(2, 1, "0")]},
        "A copy of block 0 in the lane of copies, then its sum in the other lane.",
    ),
    "waste_figure": lambda: ragged.waste_figure(
        [("query rows", "padded", 9, 16), ("query rows", "ragged", 9, 9)]
    ),
    "kept_and_read": lambda: production.kept_and_read(
        {"bfloat16": (2**35, 2**35), "a window in every second layer": (2**35, 2**34)}, 2**33
    ),
    "lost_tokens": lambda: production.lost_tokens(11, window=3, bq=2, bkv=4),
    "error_by_length": lambda: production.error_by_length(
        [1024, 2048], {"bfloat16": [0.001, 0.5], "float32": [1e-7, 0]}, [("rounding", 0.002)]
    ),
    "ragged_paged": overview.example,
    "online_softmax": lambda: tiled.online_softmax([1, 3, 2, 5], [(2, 3.0, 1.1), (4, 5.0, 1.2)]),
    "tiles": lambda: tiled.tiles({"8 heads of 64": (8, 64), "a row of 200": (1, 200)}),
    "journey": lambda: tiled.journey("tpu7x"),
    "block_grid": lambda: tiled.block_grid(block_map(512, 1280, block_q=64, block_kv=128)),
}


def drawn_texts(fig):
    """Every piece of text that the reader sees, with its box in pixels."""
    fig.canvas.draw()
    pieces = list(fig.texts)
    for legend in fig.legends:
        pieces += legend.get_texts()
    for axes in fig.axes:
        pieces += [*axes.texts, axes.title, axes._left_title, axes._right_title]
        if axes.get_legend() is not None:
            pieces += axes.get_legend().get_texts()
        if not axes.axison:
            continue
        pieces += [axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks() + axis.get_minor_ticks()
            pieces += [t.label1 for t in ticks if low <= t.get_loc() <= high]
    shown = [t for t in pieces if t.get_visible() and t.get_text().strip()]
    return [(t, t.get_window_extent()) for t in shown]


@pytest.fixture(scope="module")
def texts(picture):
    return drawn_texts(picture.fig)


@pytest.fixture(scope="module", params=EXAMPLES)
def picture(request):
    return EXAMPLES[request.param]()


def test_no_text_is_small(texts):
    assert len(texts) >= 5
    assert not [t.get_text() for t, _ in texts if t.get_fontsize() < MIN_FONT_POINTS]


def test_no_text_overlaps_another_or_leaves_the_picture(picture, texts):
    check_places(texts, *picture.fig.canvas.get_width_height())


def check_places(texts, width, height):
    for text, box in texts:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{text.get_text()!r} leaves the picture"
    for (a, box_a), (b, box_b) in itertools.combinations(texts, 2):
        assert not box_a.shrunk(0.97, 0.9).overlaps(box_b.shrunk(0.97, 0.9)), (
            f"{a.get_text()!r} overlaps {b.get_text()!r}"
        )


def test_the_overlap_check_sees_an_overlap():
    with figures.style():
        fig = figures.new_figure(3, 2)
        axes = fig.subplots()
        axes.text(0.5, 0.5, "one")
        axes.text(0.52, 0.5, "two")
    with pytest.raises(AssertionError, match="'one' overlaps 'two'"):
        check_places(drawn_texts(fig), 300, 200)


def test_the_ground_is_opaque_white_and_the_width_fits_a_laptop(picture):
    pixels = matplotlib.image.imread(io.BytesIO(figures.png_bytes(picture.fig)))
    assert pixels[0, 0, :3].tolist() == pixels[-1, -1, :3].tolist() == [1, 1, 1]
    assert (pixels[..., 3] == 1).all()
    assert 400 <= pixels.shape[1] <= 1100


@pytest.mark.parametrize(
    "name", ["roofline", "under_roof", "compare_all", "decode_share", "growing_cache"]
)
def test_axes_have_units(name):
    """An axis with numbers says of what, and in which unit; a bar panel says it in its title."""
    for axes in EXAMPLES[name]().fig.axes:
        if not axes.axison:
            continue
        words = f"{axes.get_xlabel()} {axes.get_ylabel()} {axes.get_title(loc='left')}"
        assert "(" in words and ")" in words, words


def test_words_are_there_and_short_enough_to_listen_to(picture):
    assert 60 < len(picture.text) < 1200
    assert repr(picture) == f"Figure: {picture.text}"


def test_words_carry_the_numbers():
    assert "0.82 TB/s" in figures.tpu("v5e").text and "197 TFLOP/s" in figures.tpu("v5e").text
    assert "ridge at 561" in figures.compare().text
    assert "v5e can do 3 TFLOP/s, 2 % of peak" in chip_pictures.roofline(points=POINTS).text
    assert (
        "rung 8, prefill: 1,000.0 FLOP a byte, 400 TFLOP/s, 87 % of the"
        in under_roof("v6e", RUNS).text
    )
    assert "from 0.4 % to 53.6 %" in figures.decode_share(LLAMA3_8B).text


def test_the_picture_draws_the_numbers_of_the_chip():
    for name in CHIPS:
        texts = " ".join(t.get_text() for t, _ in drawn_texts(figures.tpu(name).fig))
        c = chip(name)
        assert f"{c.num_mxus} x {c.mxu_size} x {c.mxu_size}" in texts
        assert f"{c.hbm_bytes / 2**30:g} GiB" in texts
        assert f"{c.vmem_bytes // 2**20} MiB" in texts


def test_a_picture_needs_words():
    with pytest.raises(ValueError, match="alt: text is empty"):
        figures.alt(figures.new_figure(1, 1), "  ")


def test_a_notebook_gets_a_png_with_alternative_text_and_the_words_folded_below(monkeypatch):
    shown = []
    monkeypatch.setattr(
        "IPython.display.display",
        lambda data, metadata=None, raw=None: shown.append((data, metadata)),
    )
    figures.alt(figures.new_figure(1, 1), "Less <than> 1 & more")._ipython_display_()
    (image, metadata), (words, _) = shown
    assert image["image/png"].startswith("iVBORw0KGgo") and metadata["image/png"]["alt"]
    assert image["text/plain"] == "Figure: Less <than> 1 & more"
    assert (
        "<details>" in words["text/html"] and "Less &lt;than&gt; 1 &amp; more" in words["text/html"]
    )
    assert "text/html" not in image, "GitHub strips images in HTML: the picture must be the PNG"


def test_a_picture_is_saved(tmp_path):
    path = figures.compare().save(tmp_path / "docs" / "chips.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_show_source_prints_where_and_what(capsys):
    figures.show_source(figures.alt)
    out = capsys.readouterr().out
    assert out.startswith("# rpa/figures/style.py, line ")
    assert "def alt(fig, text):" in out


def test_show_source_is_markdown_in_a_notebook(monkeypatch):
    shown = []
    monkeypatch.setattr(sys.modules["rpa.figures.style"], "_in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda data, raw=None: shown.append(data))
    figures.show_source(chip)
    (data,) = shown
    assert data["text/markdown"].startswith("```python\n# rpa/chips.py, line ")
    assert data["text/markdown"].endswith("\n```") and "def chip(name):" in data["text/plain"]


def test_colours_are_told_apart_by_brightness_on_white():
    """A line must stand out from the page: contrast at least 2 to 1 (WCAG luminance)."""

    def luminance(colour):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for colour in CYCLE:
        assert 1.05 / (luminance(colour) + 0.05) >= 2, colour
