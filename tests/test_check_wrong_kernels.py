"""The wrong kernels of chapter 11 pass an ordinary test, as the chapter says; so their bug is real.

That each of them can be convicted is what the exercises' own proofs show.
"""

import numpy as np
import pytest

from rpa import dense
from rpa.check.chapters import wrong_kernels


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_forgetful_gives_the_right_output_and_stores_short_chunks(rng):
    kv, queries = rng.standard_normal((200, 2, 8)), rng.standard_normal((50, 8))
    before = np.where(np.arange(200)[:, None, None] < 150, kv, 0)
    output, after = wrong_kernels.forgetful(queries, kv[150:], before, window=64, bq=16, bkv=128)
    truth = dense.oracle(queries[:, None], kv[:, :1], kv[:, 1:], sliding_window=64)
    assert dense.relative_error(output[:, None], truth) < 1e-12
    np.testing.assert_array_equal(after, kv)


def test_trusting_is_right_where_stale_memory_is_finite(rng):
    queries, cache = rng.standard_normal((2, 8)), rng.standard_normal((5, 4, 2, 8))
    output = wrong_kernels.trusting(queries, cache, np.array([3, 6]), np.array([[4, 0], [2, 1]]))
    for query, row, pages, kv_len in zip(queries, output, ([4, 0], [2, 1]), (3, 6), strict=True):
        kv = cache[pages].reshape(-1, 2, 8)[:kv_len]
        truth = dense.oracle(query[None, None], kv[:, :1], kv[:, 1:])
        assert dense.relative_error(row[None, None], truth) < 1e-12


@pytest.mark.parametrize("window", [None, 128])
def test_narrow_is_right_in_a_context_of_8k(window):
    right = dense.visible(np.array([8191]), np.arange(8192), sliding_window=window)[0]
    np.testing.assert_array_equal(wrong_kernels.narrow(8191, 8192, window), right)


def test_rounded_passes_on_random_numbers_and_is_exact_with_a_float32_state(rng):
    scores, values = rng.standard_normal(8192), rng.standard_normal((8192, 4))
    weights = np.exp(scores) / np.exp(scores).sum()
    given = scores.astype(np.float32), values.astype(np.float32)
    assert np.abs(wrong_kernels.rounded(*given, 512) - weights @ values).max() < 1e-3
    exact = wrong_kernels.rounded(*given, 512, np.float32)
    np.testing.assert_allclose(exact, weights @ values, atol=1e-6)


def test_lopsided_is_right_where_groups_need_no_padding():
    heads = np.arange(8, dtype=np.float32)
    np.testing.assert_array_equal(wrong_kernels.lopsided(heads, 2, 4), heads.reshape(2, 4))
