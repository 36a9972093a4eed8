"""What a decode step costs, against numbers worked out by hand and against the real model."""

import pytest

from rpa import shapes
from rpa.shapes import LLAMA3_8B, SMOLLM2_135M, decode_step

pytestmark = pytest.mark.core


def test_parameters_are_those_of_the_published_models():
    assert LLAMA3_8B.num_parameters == 8_030_261_248
    assert SMOLLM2_135M.num_parameters == 134_515_008


def test_kv_bytes_per_token():
    assert LLAMA3_8B.kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2  # K and V, layers, heads, bf16
    assert LLAMA3_8B.kv_bytes_per_token("float8_e4m3fn") == 65_536


def test_a_decode_step_by_hand():
    step = decode_step(LLAMA3_8B, batch_size=4, kv_len=1000)
    kv_read = 4 * 1000 * LLAMA3_8B.kv_bytes_per_token()
    new_token = 4 * LLAMA3_8B.kv_bytes_per_token() + 4 * 32 * 2 * (32 * 128 * 2)  # K, V; q, out
    assert step.attention_bytes == kv_read + new_token
    assert step.weight_bytes == 2 * (LLAMA3_8B.num_parameters - 128256 * 4096 - 65 * 4096)
    assert step.weight_flops == 4 * step.weight_bytes  # 2 FLOP for each 2-byte weight, 4 tokens
    assert step.attention_flops == 32 * 4 * 4 * 32 * 128 * 1000
    assert step.hbm_bytes == step.weight_bytes + step.attention_bytes


def test_the_share_of_attention_grows_with_batch_and_context():
    def shares(pairs):
        return [decode_step(LLAMA3_8B, batch, kv_len).attention_share for batch, kv_len in pairs]

    for pairs in ([(1, 4096), (8, 4096), (64, 4096)], [(8, 512), (8, 4096), (8, 32768)]):
        assert shares(pairs) == sorted(shares(pairs))
    half = decode_step(LLAMA3_8B, 64, 8192, kv_dtype="float8_e4m3fn")
    full = decode_step(LLAMA3_8B, 64, 8192)
    assert half.attention_bytes == pytest.approx(full.attention_bytes / 2, rel=0.01)


def test_the_step_reads_what_one_layer_of_the_lab_reads():
    """1,024 tokens of one layer are the 4 MiB that every decode schedule is measured against."""
    one_layer = decode_step(LLAMA3_8B, 1, 1024).attention_bytes / LLAMA3_8B.num_layers
    assert one_layer == pytest.approx(4 * 2**20, rel=0.01)
    assert shapes.LLAMA3_8B.num_q_heads == 4 * shapes.LLAMA3_8B.num_kv_heads
