"""Rung 1 against the float64 oracle, and the oracle against a formula small enough to read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpa import dense

pytestmark = pytest.mark.core


def random_qkv(q_len, kv_len, num_q_heads, num_kv_heads, head_dim=16, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((q_len, num_q_heads, head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, kv_len, num_kv_heads, head_dim)).astype(np.float32)
    return q, k, v


def test_oracle_on_numbers_that_a_person_can_check():
    q = np.array([[[1.0]], [[1.0]]])  # two tokens, one head, head_dim 1
    k = np.array([[[0.0]], [[np.log(3.0)]]])  # scores 0 and ln 3: weights 1/4 and 3/4
    v = np.array([[[4.0]], [[8.0]]])
    out = dense.oracle(q, k, v, sm_scale=1.0).output
    np.testing.assert_allclose(out[:, 0, 0], [4.0, 7.0])  # the first token sees only itself


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("lengths", [(7, 7), (1, 9), (3, 9)], ids=["prefill", "decode", "chunk"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(causal=False), dict(sliding_window=2), dict(soft_cap=1.5), dict(sm_scale=1.0)],
    ids=str,
)
def test_attention_matches_the_oracle(heads, lengths, options):
    q, k, v = random_qkv(*lengths, *heads)
    out = jax.jit(lambda *qkv: dense.attention(*qkv, **options))(q, k, v)
    truth = dense.oracle(q, k, v, **options)
    assert dense.relative_error(out, truth) <= 2e-6
    assert dense.scaled_error(out, truth) <= 2e-6


def test_errors_are_measured():
    """A difference of one part in a thousand is seen by both measures: neither is blind."""
    q, k, v = random_qkv(3, 5, 2, 2)
    truth = dense.oracle(q, k, v)
    off = truth.output * 1.001
    assert dense.relative_error(off, truth) == pytest.approx(1e-3, rel=1e-6)
    assert dense.scaled_error(off, truth) > 1e-5


def test_padding_changes_nothing():
    q_lens, kv_lens = np.array([1, 4, 0]), np.array([6, 4, 3])
    q, k, v = np.full((3, 4, 4, 8), np.nan), *np.full((2, 3, 6, 2, 8), np.nan)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    alone = []
    for s in range(3):
        one = random_qkv(q_lens[s], kv_lens[s], 4, 2, head_dim=8, seed=s)
        q[s, : q_lens[s]], k[s, : kv_lens[s]], v[s, : kv_lens[s]] = one
        alone.append(dense.oracle(*one).output)
    out = np.asarray(dense.padded_attention(q, k, v, q_lens, kv_lens))
    for s in range(3):
        np.testing.assert_allclose(out[s, : q_lens[s]], alone[s], atol=1e-6)


def test_a_row_that_sees_nothing_is_zero_and_its_nan_stays_inside():
    q, k, v = random_qkv(2, 3, 2, 1)
    k[2] = v[2] = np.nan
    mask = jnp.array([[False, False, False], [True, True, False]])
    out = np.asarray(dense.attend(q, k, v, mask, sm_scale=0.25))
    assert not out[0].any() and np.isfinite(out[1]).all()


def test_large_scores_do_not_overflow():
    q, k, v = random_qkv(4, 4, 1, 1)
    out = dense.attention(q * 1e4, k, v, sm_scale=1.0)
    assert np.isfinite(np.asarray(out)).all()


@pytest.mark.parametrize(
    "shapes, words",
    [
        (((4, 8), (4, 2, 8), (4, 2, 8)), "three dimensions"),
        (((1, 4, 8), (3, 2, 8), (3, 1, 8)), "k and v must have the same shape"),
        (((1, 4, 8), (3, 2, 16), (3, 2, 16)), "head_dim 8 and k has 16"),
        (((1, 4, 8), (3, 3, 8), (3, 3, 8)), "multiple of num_kv_heads"),
        (((1, 4, 8), (3, 0, 8), (3, 0, 8)), "multiple of num_kv_heads"),
        (((4, 4, 8), (3, 2, 8), (3, 2, 8)), "q_len 4 is larger than kv_len 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_words(shapes, words):
    with pytest.raises(ValueError, match=words):
        dense.attention(*(np.ones(shape, np.float32) for shape in shapes))
