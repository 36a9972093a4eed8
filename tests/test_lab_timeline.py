"""The recorded timeline: exact on kernels that fit on a page, and on rung 5."""

import jax.numpy as jnp
import numpy as np
import pytest

from rpa import interpreter, streamed
from rpa.figures.timeline import gantt
from rpa.lab.copies.timeline import page_labels, predict_cycles, record_dmas
from tests import dma_programs as programs
from tests.test_figures import MIN_FONT_POINTS, check_places, drawn_texts

pytestmark = pytest.mark.core

X = jnp.ones((programs.NUM_CHUNKS * programs.CHUNK, 128))
CHUNK_BYTES = programs.CHUNK * 128 * 4
MODES = [{"dma_execution_mode": "on_wait"}, {"dma_execution_mode": "eager", "detect_races": True}]

KV_LENS, PAGE_SIZE, BLOCK_TOKENS = np.array([29, 0, 20], np.int32), 8, 16
TABLE = np.array([5, 2, 7, 1, 9, 9, 9, 9, 0, 3, 4, 9], np.int32)


def record(kernel, mode=MODES[0]):
    with record_dmas() as timeline:
        programs.call(kernel, interpret=interpreter.params(**mode))(X)
    return timeline


def record_rung_5():
    q, cache = jnp.ones((3, 4, 64)), jnp.ones((10, PAGE_SIZE, 4, 1, 128))
    with record_dmas() as timeline:
        streamed.paged_decode(
            q, cache, KV_LENS, TABLE, num_kv_heads=2, block_tokens=BLOCK_TOKENS,
            interpret=interpreter.params(),
        )  # fmt: skip
    return timeline


@pytest.fixture(scope="module")
def rung_5():
    return record_rung_5()


@pytest.fixture(scope="module")
def buffering():
    return {k.__name__: record(k) for k in (programs.single_buffer, programs.double_buffer)}


def order_of(timeline):
    """Starts and waits by chunk, computations by slot."""
    events = {c.start: f"start {c.number}" for c in timeline.copies}
    events |= {c.wait: f"wait {c.number}" for c in timeline.copies}
    events |= {c.first: f"compute {c.rows[0]}" for c in timeline.computes}
    return [events[order] for order in sorted(events)]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["dma_execution_mode"])
def test_events_stand_in_the_order_of_the_program_whenever_copies_are_executed(mode):
    timeline = record(programs.double_buffer, mode)
    assert order_of(timeline) == [
        "start 0", "start 1", "wait 0", "compute buffers[0]",
        "start 2", "wait 1", "compute buffers[1]",
        "start 3", "wait 2", "compute buffers[0]",
        "wait 3", "compute buffers[1]",
    ]  # fmt: skip
    assert timeline.never_awaited == [] and timeline.touched_in_flight == []


def test_a_copy_says_what_it_moves_where_and_whom_it_tells(buffering):
    copy = buffering["double_buffer"].copies[3]
    assert (copy.source.label, copy.target.label, copy.row) == (
        "x[24:32]",
        "buffers[1]",
        "buffers[1]",
    )
    assert (copy.source.buffer.space, copy.target.buffer.space) == ("HBM", "VMEM")
    assert (copy.num_bytes, copy.semaphore) == (CHUNK_BYTES, "sems[1]")
    assert copy.where.startswith("dma_programs.py:") and "double_buffer" in copy.where


def test_a_second_kernel_is_recorded_too_though_it_is_compiled_already(buffering):
    with record_dmas() as timeline:
        call = programs.call(programs.single_buffer, interpret=interpreter.params())
        call(X), call(X)
    assert [copy.kernel for copy in timeline.copies] == [0] * 4 + [1] * 4
    with record_dmas() as again:
        call(X)
    assert [str(event) for event in again.events] == [
        str(event) for event in buffering["single_buffer"].events
    ]


def test_what_is_not_recorded_is_not_disturbed():
    call = programs.call(programs.single_buffer, interpret=interpreter.params())
    with record_dmas() as timeline:
        pass
    np.testing.assert_array_equal(call(X), np.full((programs.CHUNK, 128), programs.NUM_CHUNKS))
    assert timeline.events == []


def test_a_forgotten_wait_is_seen_and_what_was_read_too_early():
    timeline = record(programs.forgets_a_wait)
    assert [copy.number for copy in timeline.never_awaited] == [0]
    ((event, copy),) = timeline.touched_in_flight
    assert (event.kind, event.source.label, copy.number) == ("load", "buffers[0]", 0)
    assert "1 bars never waited for" in gantt(timeline).text


@pytest.mark.skipif(not interpreter.deadlocks_can_raise(), reason="jax 0.7.2 hangs for ever")
def test_a_kernel_that_hangs_leaves_its_record_with_the_wait_that_never_ends():
    with pytest.raises(Exception, match="deadlock"), record_dmas() as timeline:  # noqa: SIM117
        with interpreter.deadlocks_raise():
            call = programs.call(
                programs.waits_on_the_wrong_semaphore, interpret=interpreter.params()
            )
            call(X).block_until_ready()
    interpreter.reset()
    stuck = timeline.unfinished_wait
    assert (stuck.kind, stuck.semaphore, stuck.missing_bytes) == ("wait", "sems[1]", CHUNK_BYTES)
    assert "4096 bytes never come" in timeline.table()
    words = [text.get_text() for text, _ in drawn_texts(gantt(timeline).fig)]
    assert any("waits for" in word for word in words)


def test_rung_5_starts_the_next_block_before_it_waits(rung_5):
    """29 tokens are blocks of 16 and 13, 20 are 16 and 4; in pages of 8."""
    assert programs.steps_of(rung_5, 4 * 128 * 4) == [
        ("start", 0, 16, 2), ("start", 1, 13, 2), ("wait", 0, 16, 2), ("compute", 0),
        ("start", 0, 16, 2), ("wait", 1, 13, 2), ("compute", 1),
        ("start", 1, 4, 1), ("wait", 0, 16, 2), ("compute", 0),
        ("wait", 1, 4, 1), ("compute", 1),
    ]  # fmt: skip


def test_pages_are_labelled_with_their_sequence(rung_5):
    label = page_labels(TABLE, 4, page_size=PAGE_SIZE, block_tokens=BLOCK_TOKENS)
    assert [label(copy) for copy in rung_5.copies] == [
        "seq 0 block 0", "seq 0 block 0", "seq 0 block 1", "seq 0 block 1",
        "seq 2 block 0", "seq 2 block 0", "seq 2 block 1",
    ]  # fmt: skip
    assert [page_labels(TABLE, 4)(copy) for copy in rung_5.copies[-2:]] == [
        "seq 2 page 1", "seq 2 page 2",
    ]  # fmt: skip


def test_automatic_block_copies_are_seen(rung_5):
    kinds = [(event.kind, event.num_bytes) for event in rung_5.block_copies]
    assert kinds == [("fetch", 2048), ("flush", 2048)] * 3  # q and o of a sequence: 4 x 128 x 4


def test_the_clock_counts_what_can_be_counted_by_hand(buffering):
    """With HBM and compute equally fast, four chunks: 8 units one after the other, 5 overlapped."""
    unit = predict_cycles(buffering["single_buffer"], "v5e").total_cycles / 8
    assert unit == pytest.approx(CHUNK_BYTES / (819e9 / 1.5e9), rel=0.01)
    overlapped = predict_cycles(buffering["double_buffer"], "v5e")
    assert overlapped.total_cycles == pytest.approx(5 * unit)
    assert overlapped.stall_cycles == pytest.approx(unit)
    slow = predict_cycles(buffering["double_buffer"], "v5e", compute_ratio=3)
    assert slow.total_cycles == pytest.approx(13 * unit)
    late = predict_cycles(buffering["double_buffer"], "v5e", latency_cycles=100)
    assert late.total_cycles >= overlapped.total_cycles + 100
    free = predict_cycles(buffering["double_buffer"], "v5e", compute_cycles=lambda compute: 0)
    assert free.total_cycles == pytest.approx(4 * unit)


def test_each_kernel_of_a_record_can_be_timed_by_itself(buffering):
    call = programs.call(programs.single_buffer, interpret=interpreter.params())
    with record_dmas() as twice:
        call(X), call(X)
    once = predict_cycles(buffering["single_buffer"]).total_cycles
    assert predict_cycles(twice).total_cycles == pytest.approx(2 * once)
    assert predict_cycles(twice, kernel=1).total_cycles == pytest.approx(once)
    first_bar = min(
        patch.get_x() for patch in gantt(twice, chip="v5e", kernel=1).fig.axes[0].patches
    )
    assert first_bar == 0


FIGURES = {
    "in order": {},
    "on the clock": {"chip": "v5e"},
    "compute-bound": {"chip": "tpu7x", "compute_ratio": 2.5},
}


@pytest.mark.parametrize("options", FIGURES.values(), ids=FIGURES)
def test_pictures_can_be_read(options, buffering, rung_5):
    for timeline in (buffering, rung_5):
        picture = gantt(timeline, **options)
        texts = drawn_texts(picture.fig)
        check_places(texts, *picture.fig.canvas.get_width_height())
        assert min(text.get_fontsize() for text, _ in texts) >= MIN_FONT_POINTS
        assert 60 < len(picture.text) < 1200


def test_pictures_say_what_they_show(buffering):
    text = gantt(buffering, chip="v5e").text
    assert "single_buffer: 4 copies, 4 computations, 60 cycles predicted on v5e" in text
    assert "double_buffer: 4 copies, 4 computations, 37 cycles predicted on v5e" in text


def test_a_row_that_is_not_there_is_refused(buffering):
    with pytest.raises(ValueError, match=r"rows has 'kv'.*only buffers\[0\]"):
        gantt(buffering["single_buffer"], rows=["kv"])
    with pytest.raises(ValueError, match="kernel is 3"):
        gantt(buffering["single_buffer"], kernel=3)
