"""Rung 8 on generated ragged batches: a few shapes, each compiled once, and ever new metadata."""

import numpy as np
import pytest

from tests.batches import Shape
from tests.kernel_harness import EAGER, MODES, ON_WAIT
from tests.kernel_runs import BLOCKS, check_lengths

pytestmark = pytest.mark.core

FLOAT32 = Shape(2, 1, 64, page_size=8)
SHAPES = {
    "MQA 2/1, float32": (FLOAT32, {}),  # test_traps uses the same compiled kernels
    "GQA 4/2, float32": (Shape(4, 2, 128, page_size=8), {}),
    "9/3 of 64, bfloat16, sinks": (
        Shape(9, 3, 64, page_size=8, dtype="bfloat16"),
        {"attention_sink": np.linspace(-2, 2, 9, dtype=np.float32)},
    ),
    "window of 5 with soft cap": (FLOAT32, {"sliding_window": 5, "soft_cap": 3.0}),
    "4/2 of 256, float8": (
        Shape(4, 2, 256, page_size=8, dtype="float8_e4m3fn"),
        {"q_dtype": "bfloat16", "k_scale": 0.5, "v_scale": 2.0},
    ),
    "float8 queries too": (
        Shape(4, 2, 128, page_size=8, dtype="float8_e5m2"),
        {"q_dtype": "bfloat16", "q_scale": 0.1},
    ),
    "9/3 of 64, shared lanes, bfloat16, sinks": (
        Shape(9, 3, 64, page_size=8, dtype="bfloat16", share_lanes=True),
        {"attention_sink": np.linspace(-2, 2, 9, dtype=np.float32)},
    ),
    "8/4 of 64, shared lanes, float8": (
        Shape(8, 4, 64, page_size=8, dtype="float8_e4m3fn", share_lanes=True),
        {"q_dtype": "bfloat16", "k_scale": 0.5, "v_scale": 2.0},
    ),
    "2/2 of 64, shared lanes, float32, window of 5": (
        Shape(2, 2, 64, page_size=8, share_lanes=True),
        {"sliding_window": 5},
    ),
    "chunks of at most 12": (FLOAT32, {"chunk_prefill_size": 12}),
    "four products in a row": (FLOAT32, {"d_block_sizes": (1, 32, 1, 8)}),
    "many pages a block": (
        Shape(2, 1, 64, page_size=8, pages_per_seq=16, max_num_seqs=4),
        {"d_block_sizes": (1, 96, 1, 32), "m_block_sizes": (8, 96, 8, 32)},  # two turns of copies
    ),
}


def random_lengths(rng, shape):
    """Up to max_num_seqs (q_len, kv_len) pairs around page and block ends, idle slots anywhere."""
    room, pairs, left = shape.page_size * shape.pages_per_seq, [], shape.num_tokens
    for _ in range(rng.integers(0, shape.max_num_seqs + 1)):
        end = shape.page_size * rng.integers(0, shape.pages_per_seq + 1)
        near_end = int(np.clip(end + rng.integers(-1, 2), 0, room))
        kv_len = near_end if rng.random() < 0.7 else int(rng.integers(0, room + 1))
        kind = rng.choice(["idle", "decode", "decode", "chunk", "prompt"])
        q_len = {"idle": 0, "decode": 1, "prompt": kv_len}.get(kind)
        q_len = int(rng.integers(0, kv_len + 1)) if q_len is None else q_len
        pairs.append((min(q_len, kv_len, left), kv_len))
        left -= pairs[-1][0]
    return sorted(pairs, key=lambda pair: pair[0] > 1)


def check_batches(name, mode, seeds):
    shape, options = SHAPES[name]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        lengths = random_lengths(rng, shape)
        longer = [q_len for q_len, _ in lengths if q_len > 1]
        chunk_prefill_size = options.get("chunk_prefill_size", 10**6)
        short = next((i for i, q in enumerate(longer) if q > chunk_prefill_size), len(longer))
        num_chunked = int(rng.integers(0, short + 1))
        try:
            check_lengths(
                shape,
                lengths,
                mode,
                seed=seed,
                num_chunked=num_chunked,
                adjacent=seed % 3 == 0,
                **(BLOCKS | options),
            )
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {lengths}, {num_chunked} chunked") from error


def test_some_batches():
    check_batches("MQA 2/1, float32", ON_WAIT, range(10))


def test_some_batches_have_no_race():
    check_batches("MQA 2/1, float32", EAGER, range(6))


def test_some_batches_with_shared_lanes_have_no_race():
    check_batches("9/3 of 64, shared lanes, bfloat16, sinks", EAGER, range(4))


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_many_batches(name, mode):
    """11 shapes x 2 modes x 25 = 550 batches, 275 of them different ones."""
    check_batches(name, mode, range(100, 125))
