"""Bytes moved: exact on small kernels, as the interpreter records them, as counted by hand."""

import json

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpa import fused, interpreter, ladder, plain, ragged_paged_attention, streamed, tiled
from rpa.__main__ import main
from rpa.figures.traffic import where_bytes_go
from rpa.lab import peers
from rpa.lab.batches import make_batch
from rpa.lab.copies.dryrun import dry_run
from rpa.lab.copies.timeline import record_dmas
from rpa.lab.copies.traffic import count, least
from rpa.ragged import RaggedBatch
from rpa.shapes import AttentionShape
from tests import dma_programs as programs
from tests.batches import Shape, make_case
from tests.test_figures import check_places, drawn_texts

X = jax.ShapeDtypeStruct((programs.NUM_CHUNKS * programs.CHUNK, 128), "float32")
CHUNK_BYTES = programs.CHUNK * 128 * 4
LLAMA = AttentionShape.of("llama-3-8b", page_size=128)
SMALL = AttentionShape(4, 2, 64, page_size=8, dtype="float32", kv_dtype="float32")
ROW = 4 * 64 * 4  # bytes of the queries, or the output, of one token of SMALL
SHAPE = Shape(4, 2, 64, page_size=8)


def moves(timeline):
    """What a timeline moves and waits for, in order, without the names of references."""
    kinds = ("start", "wait", "fetch", "flush", "step")
    return [
        (e.kind, e.kernel, e.step, _place(e.source), _place(e.target), e.num_bytes, e.copies)
        for e in timeline.events
        if e.kind in kinds
    ]


def _place(part):
    return part and (part.buffer.space, part.buffer.shape, part.index)


def bytes_of(traffic):
    return {kind: moved.num_bytes for kind, moved in traffic.kinds.items()}


# --- A dry run does what the interpreter does ---------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("kernel", [programs.double_buffer, programs.reads_twice])
def test_a_small_kernel_dry_and_interpreted_alike(kernel):
    with record_dmas() as timeline:
        programs.call(kernel, interpret=interpreter.params())(jnp.ones(X.shape))
    run = dry_run(programs.call(kernel, interpret=False), X, names=["x"])
    assert moves(run.timeline) == moves(timeline)
    num_copies = {"double_buffer": 4, "reads_twice": 8}[kernel.__name__]
    assert [copy.num_bytes for copy in run.timeline.copies] == [CHUNK_BYTES] * num_copies
    assert {copy.source.buffer.origin for copy in run.timeline.copies} == {"x"}


def test_what_depends_on_computed_values_is_refused_in_words():
    with pytest.raises(ValueError, match=r"the branch at dma_programs.py:.*not compute"):
        dry_run(programs.call(programs.asks_the_data, interpret=False), X)


OPTIONS = {
    "tiled": {"block_q": 8, "block_kv": 8},
    "streamed": {"block_tokens": 16},
    "fused": {"block_tokens": 16},
    "plain": {"block_q": 4, "block_kv": 16},
    "kernel": {"d_block_sizes": (1, 16, 1, 8), "m_block_sizes": (4, 16, 4, 16)},
}


def rung(name, *, interpreted):
    """A rung as a function of all arrays, with the metadata among them: traced once for all."""
    interpret = interpreter.params() if interpreted else False
    if name == "kernel":
        backend = "interpret" if interpreted else "tpu"
        fixed = {"backend": backend, "donate": False, "validate": False, "sm_scale": 0.125}
        return lambda *args: ragged_paged_attention(*args, **fixed, **OPTIONS[name])
    module = {"tiled": tiled, "streamed": streamed, "fused": fused, "plain": plain}[name]

    def attention(q, k, v, cache, *metadata):
        batch, options = RaggedBatch(*metadata), OPTIONS[name]
        return module.attention(
            q, k, v, cache, batch, sm_scale=0.125, interpret=interpret, **options
        )

    return attention


RUNGS = {
    name: (jax.jit(rung(name, interpreted=True)), jax.jit(rung(name, interpreted=False)))
    for name in OPTIONS
}


def check_alike(name, lengths, seed):
    case = make_case(SHAPE, lengths, seed=seed)
    interpreted, compiled = RUNGS[name]
    with record_dmas() as timeline:
        interpreted(*case.arrays, *case.metadata)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in case.arrays]
    dry = dry_run(compiled, *shapes, *case.metadata)
    if name == "tiled":  # the interpreter takes parallel steps of the grid in a random order
        assert {m[3:] for m in moves(dry.timeline)} == {m[3:] for m in moves(timeline)}
    else:
        assert moves(dry.timeline) == moves(timeline)
    assert dry.timeline.unfinished_wait is None and dry.timeline.never_awaited == []


MIXED = [(1, 30), (0, 8), (1, 8), (9, 23), (17, 17)]
DECODES = [(1, 30), (0, 8), (1, 1), (1, 17)]


SLOW = [pytest.param(name, marks=pytest.mark.full) for name in ("tiled", "streamed")]


@pytest.mark.parametrize("name", [*SLOW, "fused", "plain", "kernel"])
def test_a_rung_dry_and_interpreted_alike(name):
    check_alike(name, DECODES if name in ("streamed", "fused") else MIXED, seed=1)


def lengths(most_q):
    pair = st.integers(0, 32).flatmap(
        lambda kv_len: st.tuples(st.integers(0, min(most_q, kv_len)), st.just(kv_len))
    )
    return st.lists(pair, min_size=1, max_size=5).map(
        lambda pairs: sorted(pairs, key=lambda pair: pair[0] > 1)
    )


@pytest.mark.full
@settings(max_examples=25, deadline=None)
@given(lengths(8), st.integers(0, 99))
def test_rung_8_dry_and_interpreted_alike_on_generated_batches(pairs, seed):
    check_alike("kernel", pairs, seed)


@pytest.mark.full
@settings(max_examples=15, deadline=None)
@given(lengths(1), st.integers(0, 99), st.sampled_from(["streamed", "fused"]))
def test_rungs_5_and_6_dry_and_interpreted_alike_on_generated_batches(pairs, seed, name):
    check_alike(name, pairs, seed)


# --- Counts by hand -----------------------------------------------------------------------------

# Three decodes with 29, 16 and 2 tokens in the cache after the step, in pages of 8.
BATCH, _ = RaggedBatch.from_lengths([1, 1, 1], [29, 16, 2], [[3, 1, 0, 2], [4, 5], [6]])
TOKEN = 4 * 128 * 4  # K and V of 2 heads, 64 lanes of 128 used, float32


def test_rung_5_by_hand():
    traffic = count("streamed", BATCH, SMALL, block_tokens=16)
    assert bytes_of(traffic) == {
        "KV read": 47 * TOKEN,  # not a byte behind the last token
        "cache write": 3 * TOKEN,  # by a scatter, before the kernel
        "q": 3 * 2 * ROW,  # 64 lanes padded to 128
        "o": 3 * 2 * ROW,
        "page table": 12 * 4,
        "metadata": 4 * (3 + 4 + 1),  # kv_lens, next_live, sm_scale
    }
    # Pages: 8 + 8 + 8 + 5, 8 + 8, 2 tokens.
    assert traffic.kinds["KV read"].sizes == {8 * TOKEN: 5, 5 * TOKEN: 1, 2 * TOKEN: 1}
    assert traffic.outside == {"scatter": 3 * TOKEN}
    assert traffic.padding_bytes == 50 * TOKEN // 2


def test_rung_6_by_hand():
    traffic = count("fused", BATCH, SMALL, block_tokens=16, max_q_len=1)
    moved = bytes_of(traffic)
    assert moved["KV read"] == (47 - 3) * TOKEN, "the new tokens come from VMEM, not from the cache"
    assert moved["new KV"] == moved["cache write"] == 3 * TOKEN
    # 28 cached tokens are pages of 8, 8, 8, 4; then 8 and 7; then 1.
    assert traffic.kinds["KV read"].sizes == {
        8 * TOKEN: 4, 7 * TOKEN: 1, 4 * TOKEN: 1, TOKEN: 1,
    }  # fmt: skip
    assert traffic.outside == {}


def test_rung_7_by_hand():
    batch, _ = RaggedBatch.from_lengths([1, 6], [29, 20], [[3, 1, 0, 2], [4, 5, 6]])
    moved = bytes_of(count("plain", batch, SMALL, block_q=4, block_kv=16))
    # Query blocks of 1, 4 and 2 tokens. The last two see 18 and 20 keys, 14 of them cached.
    assert moved["KV read"] == (28 + 14 + 14) * TOKEN
    assert moved["new KV"] == (1 + 4 + 6) * TOKEN, "each block takes the new tokens it sees"
    assert moved["cache write"] == 7 * TOKEN
    assert moved["q"] == moved["o"] == 7 * 2 * ROW


def test_rung_8_by_hand():
    batch, _ = RaggedBatch.from_lengths([1, 6], [29, 20], [[3, 1, 0, 2], [4, 5, 6]])
    sizes = {"d_block_sizes": (1, 16, 1, 16), "m_block_sizes": (4, 16, 4, 16)}
    moved = bytes_of(count("kernel", batch, SMALL, **sizes))
    # The second sequence has query blocks of 4 and 2 tokens, which see 18 and 20 keys; its 14
    # cached tokens are read for both, its new ones up to the end of the block.
    assert moved["KV read"] == (28 + 14 + 14) * TOKEN
    # The decode's new token is read once more, to store it; the others are stored from the buffer.
    assert moved["new KV"] == (1 + 4 + 6) * TOKEN + TOKEN
    assert moved["cache write"] == 7 * TOKEN
    assert moved["q"] == moved["o"] == 7 * 2 * ROW


@pytest.mark.parametrize("name", ["paging", "ragged"])
def test_plain_rungs_walk_over_the_pages_twice(name):
    """Once for the scores, once for the values: the tokens are the ladder's, times two."""
    lines = {rung.name: rung.kv_tokens_read for rung in ladder.LADDER}
    traffic = count(name, BATCH, SMALL)
    assert bytes_of(traffic)["KV read"] == 2 * lines[name](BATCH, 8) * TOKEN
    assert traffic.num_copies == 0


def test_rung_1_gathers_what_the_ladder_says():
    tokens = next(rung for rung in ladder.LADDER if rung.name == "dense").kv_tokens_read
    assert bytes_of(count("dense", BATCH, SMALL))["KV read"] == tokens(BATCH, 8) * TOKEN


def test_rung_4_gathers_whole_rows_of_the_table_and_reads_them_again():
    traffic = count("tiled", BATCH, SMALL, block_q=8, block_kv=8)
    assert traffic.outside["gather"] == 3 * 4 * 8 * TOKEN
    blocks = 2 * (4 + 2 + 1)  # K and V for every key block that is needed; a head is 64 lanes
    assert traffic.kinds["KV read"].sizes == {8 * 64 * 4: 2 * blocks}


# --- Rung 8 against the least -------------------------------------------------------------------


def test_decode_moves_within_2_percent_of_the_least():
    traffic = count("kernel", make_batch([(1, 4096)] * 16, 128), LLAMA)
    assert traffic.num_bytes > 16 * 4095 * LLAMA.token_bytes
    assert 0 <= traffic.excess < 0.02
    assert traffic.padding_bytes == 0


def test_prefill_moves_within_2_percent_of_the_least_for_its_query_blocks():
    traffic = count("kernel", make_batch([(2048, 8192)], 128), LLAMA)
    assert traffic.q_block > 1
    assert 0 <= traffic.excess_blocked < 0.02


def test_a_kernel_that_reads_twice_is_seen():
    def twice(q, k, v, cache, batch, **options):
        _, cache = streamed.attention(q, k, v, cache, batch, interpret=False, **options)
        return streamed.attention(q, k, v, cache, batch, interpret=False, **options)

    batch = make_batch([(1, 512)] * 4, 128)
    once, again = count("streamed", batch, LLAMA), count(twice, batch, LLAMA)
    assert once.excess < 0.01
    assert again.kinds["KV read"].num_bytes == 2 * once.kinds["KV read"].num_bytes
    assert again.excess > 0.9


@pytest.mark.skipif(peers.absence("v3") is not None, reason=str(peers.absence("v3")))
def test_the_production_kernel_is_counted_from_its_own_program():
    traffic = count("v3", make_batch([(1, 1000)] * 2, 128), LLAMA)
    assert bytes_of(traffic)["KV read"] == 2 * 999 * LLAMA.token_bytes
    assert traffic.kinds["KV read"].num_copies == 2 * 8
    chunk = count("v3", make_batch([(512, 1024)], 128), LLAMA)
    assert chunk.q_block == 256 and 0 <= chunk.excess_blocked < 0.2
    assert bytes_of(chunk)["q"] == bytes_of(chunk)["o"] == 512 * LLAMA.row_bytes


def test_the_least_counts_tokens_once_and_nothing_of_idle_slots():
    batch, _ = RaggedBatch.from_lengths([1, 0], [29, 8], [[0, 1, 2, 3], [4]])
    assert least(batch, SMALL) == {
        "KV read": 28 * TOKEN, "new KV": TOKEN, "cache write": TOKEN, "q": ROW, "o": ROW,
        "page table": 16,
    }  # fmt: skip


def test_the_picture_of_the_bytes_can_be_read():
    counted = {name: count(name, BATCH, SMALL) for name in ("dense", "streamed", "fused")}
    picture = where_bytes_go(counted)
    check_places(drawn_texts(picture.fig), *picture.fig.canvas.get_width_height())
    assert f"{counted['fused'].num_bytes:,} bytes in {counted['fused'].num_copies}" in picture.text
    assert f"{counted['dense'].excess:+.1%} of the least" in picture.text


# --- From a terminal ----------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(capsys):
    command = ["lab", "traffic", "--kernel", "streamed", "--batch", "2x1/256", "--page-size", "128"]
    assert main([*command, "--chip", "v5e"]) == 0
    table = capsys.readouterr().out
    assert "of the least" in table and "at the peak bandwidth of v5e" in table
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kinds"]["KV read"] == {
        "num_bytes": 2 * 256 * LLAMA.token_bytes,
        "num_copies": 4,
        "sizes": {str(128 * LLAMA.token_bytes): 4},
    }


def test_the_command_says_why_a_rung_cannot_and_what_a_batch_looks_like(capsys):
    assert main(["lab", "traffic", "--kernel", "streamed", "--batch", "1x8/64"]) == 2
    assert "streamed: not applicable: sequence 0 has q_len 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["lab", "traffic", "--batch", "8x64/32"])
    assert "is no COUNTxQ_LEN/KV_LEN" in capsys.readouterr().err
