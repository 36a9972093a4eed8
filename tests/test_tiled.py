"""Rung 4 against the float64 oracle: lengths around block ends, poison behind every end."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpa import dense, tiled
from tests.batches import Shape, make_case
from tests.kernel_harness import (
    EAGER,
    MODES,
    ON_WAIT,
    TOLERANCE,
    assert_compiles,
    check,
    check_output,
    run,
)

pytestmark = pytest.mark.core

BLOCKS = {"block_q": 8, "block_kv": 16}
HEADS = {"MHA": (2, 2, 128), "GQA, a group of 3": (6, 2, 64), "MQA": (4, 1, 80)}
LENGTHS = [(1, 1), (1, 40), (24, 40), (24, 24), (8, 16), (9, 17), (7, 15), (16, 33), (0, 5), (0, 0)]


def tokens(rng, num_tokens, num_heads, head_dim, dtype, used):
    """Random tokens, NaN behind the used ones."""
    array = rng.standard_normal((num_tokens, num_heads, head_dim))
    array[used:] = np.nan
    return jnp.asarray(array, dtype)


def check_flash(mode, heads, dtype, q_len, kv_len, *, causal=True, max_lens=(24, 40), q_std=1.0):
    num_q_heads, num_kv_heads, head_dim = heads
    rng = np.random.default_rng(q_len + 100 * kv_len)
    q = tokens(rng, max_lens[0], num_q_heads, head_dim, dtype, q_len) * q_std
    k, v = (tokens(rng, max_lens[1], num_kv_heads, head_dim, dtype, kv_len) for _ in "kv")
    options = dict(causal=causal, interpret=mode.params, **BLOCKS)
    out = run(tiled.flash_attention, q, k, v, q_len=q_len, kv_len=kv_len, **options)
    assert out.dtype == q.dtype and not out[q_len:].astype(np.float32).any()
    truth = dense.oracle(q[:q_len], k[:kv_len], v[:kv_len], causal=causal)
    check_output(out[:q_len], truth, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("heads, dtype", [("MHA", "float32"), ("GQA, a group of 3", "bfloat16")])
def test_lengths_around_block_ends(heads, dtype):
    for q_len, kv_len in LENGTHS[3:]:
        check_flash(ON_WAIT, HEADS[heads], dtype, q_len, kv_len)


def test_race_detector_finds_nothing():
    for q_len, kv_len in LENGTHS[1:4]:
        check_flash(EAGER, HEADS["MQA"], "float32", q_len, kv_len)


def test_without_the_causal_mask():
    for q_len, kv_len in LENGTHS[1:4]:
        check_flash(ON_WAIT, HEADS["MQA"], "bfloat16", q_len, kv_len, causal=False)


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", HEADS)
def test_every_combination(heads, dtype, causal, mode):
    for q_len, kv_len in LENGTHS:
        check_flash(mode, HEADS[heads], dtype, q_len, kv_len, causal=causal)


def test_static_lengths_that_no_block_divides():
    for lens in [(5, 37), (1, 16)]:
        check_flash(ON_WAIT, HEADS["MQA"], "float32", *lens, max_lens=lens)


def test_scores_that_overflow_a_bad_softmax():
    """q of std 30: scores of some hundred, where exp() without the running maximum is infinite."""
    check_flash(ON_WAIT, HEADS["MHA"], "float32", 24, 40, q_std=30.0)


def test_no_keys_or_no_queries_is_zero():
    q, kv = jnp.ones((2, 2, 128)), jnp.ones((0, 2, 128))
    assert not tiled.flash_attention(q, kv, kv, causal=False, kv_len=0).any()
    assert tiled.flash_attention(q[:0], q, q).shape == (0, 2, 128)


def test_a_traced_scale_works():
    q, k, v = (
        jnp.asarray(np.random.default_rng(s).standard_normal((9, 2, 128)), "float32")
        for s in range(3)
    )
    out = jax.jit(lambda scale: tiled.flash_attention(q, k, v, sm_scale=scale, **BLOCKS))(0.3)
    check_output(out, dense.oracle(q, k, v, sm_scale=0.3), tolerance=2e-6)


@pytest.mark.parametrize("shapes", [((2, 3, 8), (2, 2, 8)), ((5, 2, 8), (4, 2, 8))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    q, kv = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="num_q_heads must be a multiple|larger than kv_len"):
        tiled.flash_attention(q, kv, kv)


def test_softmax_state_stays_exact_over_many_blocks():
    """TRAPS 6: a bfloat16 running sum would be 8 % off here; the values vary along the sequence."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, 1, 128)) * 0.1, jnp.float32)
    k = jnp.asarray(rng.standard_normal((16384, 1, 128)), jnp.float32)
    v = k * jnp.linspace(0.5, 2.0, 16384)[:, None, None]
    out = run(tiled.flash_attention, q, k, v, block_kv=1024, interpret=ON_WAIT.params)
    check_output(out, dense.oracle(q, k, v), tolerance=2e-6)


def test_block_map_is_the_mask():
    """The picture says what the mask says, block by block."""
    for q_len, kv_len in [(8, 13), (1, 9), (13, 13), (5, 16)]:
        visible = dense.visible(np.arange(kv_len - q_len, kv_len), np.arange(kv_len))
        for (i, j), sign in np.ndenumerate(tiled.block_map(q_len, kv_len, block_q=4, block_kv=4)):
            block = visible[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            # A tail block is never whole: its mask has to hide what lies behind the end.
            whole = block.all() and block.shape[1] == 4
            assert sign == ("#" if whole else "+" if block.any() else ".")


def test_skipped_blocks_are_not_fetched():
    lens = jnp.array([8, 13])
    options = {"block_q": 4, "block_kv": 4, "causal": True}
    fetched = [int(tiled._kv_block_index(0, 0, j, lens, None, **options)[1]) for j in range(4)]
    assert fetched == [0, 1, 2, 2]


@pytest.mark.parametrize("mode", [ON_WAIT, pytest.param(EAGER, marks=pytest.mark.full)], ids=str)
def test_ladder_signature(mode):
    shape = Shape(num_q_heads=2, num_kv_heads=1, head_dim=64, page_size=8, num_tokens=20)
    attend = partial(tiled.attention, interpret=mode.params, **BLOCKS)
    case = make_case(shape, [(1, 9), (0, 5), (1, 8), (7, 7), (0, 0), (9, 17)])
    check(case, *run(attend, *case.arrays, case.batch, sm_scale=0.125), sm_scale=0.125)


@pytest.mark.parametrize(
    "chip, dtype",
    [
        ("tpu7x", "bfloat16"),
        *(
            pytest.param(chip, dtype, marks=pytest.mark.full)
            for chip, dtype in [("v5e", "bfloat16"), ("v6e", "bfloat16")]
            + [(chip, "float32") for chip in ("v5e", "v6e", "tpu7x")]
        ),
    ],
)
def test_compiles_for(chip, dtype):
    q = jax.ShapeDtypeStruct((1000, 32, 128), dtype)  # no block divides any length here
    kv = jax.ShapeDtypeStruct((3000, 8, 128), dtype)
    assert_compiles(chip, tiled.flash_attention, q, kv, kv, kwargs={"interpret": False})
