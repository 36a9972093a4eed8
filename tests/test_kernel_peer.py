"""A second oracle, by other hands: the pure-JAX reference of tpu-inference, on its own test shapes.

Lengths, heads, head_dim, page size, blocks and options are those of the peer's tests of its kernel;
the batches are ours (decodes first, shuffled pages, NaN and garbage wherever nobody may look).

The peer's reference rounds scores and weights to the dtypes it is given, to float8 with a float8
cache. So it gets every array widened to float32: the same numbers, and an oracle that is sharper
than the kernel it judges. With `q_scale` it gets the queries divided and rounded, as it would do.

Where the two differ on purpose, and what is therefore not compared (docs/kernel.md says why):

- padding rows: ours are zero; the peer's reference returns the rows in use, its kernel the queries;
- a window with `use_causal_mask=False`: ours keeps the window, the peer's reference drops it (and
  its kernel does not);
- sequences without new tokens: ours skips them, the peer's reference refuses them;
- `update_kv_cache=False` and attention sinks: the peer's reference has neither (the one for
  head_dim 64, with which shared lanes are compared, has sinks);
- `out_dtype`: ours is what is asked for, the peer's output array has the dtype of the queries.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
import pytest

from rpa import dense
from rpa.lab import peers
from rpa.paging import cdiv
from rpa.ragged import quantize, ref_ragged_paged_attention
from tests.batches import Shape, make_case
from tests.kernel_harness import ON_WAIT
from tests.kernel_runs import attend, tolerance_of

pytestmark = pytest.mark.skipif(
    peers.absence("v3") is not None, reason=f"no second oracle: {peers.absence('v3')}"
)

THREE = [(192, 328), (128, 180), (64, 255)]
DECODES = [18, 129, 597, 122, 64, 322, 463, 181, 1107, 123, 31, 18, 1229, 229, 87, 1328]
PREFILLS = [5, 15, 120, 100, 21, 32, 251, 40, 64, 99, 10, 5, 3, 120, 9, 2]
MIXED = [5, 1, 120, 1, 1, 32, 251, 1, 1, 99, 1, 5, 3, 117, 1, 1]


def random_lengths(num_seqs):
    """(q_len, kv_len) of the peer's randomized tests."""
    rng = np.random.default_rng(1234)
    q_lens = rng.integers(1, 100, num_seqs)
    return list(
        zip(q_lens.tolist(), (q_lens + rng.integers(0, 50, num_seqs)).tolist(), strict=True)
    )


@dataclass(frozen=True)
class Combination:
    """One set of parameters of the peer's tests; `dtype` is that of the cache."""

    lengths: list
    heads: tuple[int, int]
    head_dim: int
    dtype: str
    options: dict = field(default_factory=dict)
    m_block_sizes: tuple = (64, 256, 32, 128)
    share_lanes: bool = False

    @property
    def is_float8(self):
        return self.dtype.startswith("float8")

    @property
    def rows(self):
        """Rows of the cache that are heads and no padding, once it is widened to float32."""
        return self.heads[1] * (1 if self.share_lanes else 2)

    def shape(self):
        num_tokens = sum(q_len for q_len, _ in self.lengths)
        return Shape(
            *self.heads,
            self.head_dim,
            page_size=16,
            pages_per_seq=cdiv(max(kv_len for _, kv_len in self.lengths), 16),
            max_num_seqs=len(self.lengths) + 1,
            num_tokens=num_tokens + 3,
            dtype=self.dtype,
            share_lanes=self.share_lanes,
        )


E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
SCALES = {"k_scale": 0.5, "v_scale": 0.5}
SINKS = np.linspace(-2, 2, 9, dtype=np.float32)
ODD_BLOCKS = (60, 48, 30, 48)
ONE, SEVENTEEN = random_lengths(1), random_lengths(17)
QUICK = "complex, 1 sequence, 5/1, head_dim 80"
COMBINATIONS = {
    QUICK: Combination(ONE, (5, 1), 80, "bfloat16"),
    "basic": Combination(THREE, (32, 8), 128, "float32"),
    "basic, odd blocks": Combination(THREE, (32, 8), 128, "bfloat16", {}, ODD_BLOCKS),
    "basic, not causal": Combination(
        THREE, (32, 8), 128, "bfloat16", {"use_causal_mask": False}, ODD_BLOCKS
    ),
    "float8 cache, e5m2, scales": Combination(THREE, (32, 8), 128, E5M2, SCALES),
    "float8 cache, e4m3fn": Combination(THREE, (32, 8), 128, E4M3),
    "float8 attention, e4m3fn": Combination(THREE, (32, 8), 128, E4M3, {"q_scale": 0.5}),
    "float8 attention, e5m2, scales": Combination(
        THREE, (32, 8), 128, E5M2, SCALES | {"q_scale": 0.5}
    ),
    "decode only": Combination([(1, n) for n in DECODES], (32, 8), 128, "bfloat16"),
    "prefill only": Combination(
        list(zip(PREFILLS, DECODES, strict=True)), (32, 8), 128, "bfloat16"
    ),
    "mixed": Combination(list(zip(MIXED, DECODES, strict=True)), (32, 8), 128, "float32"),
    "complex, 1 sequence, 32/8, head_dim 240": Combination(ONE, (32, 8), 240, "float32"),
    "complex, 1 sequence, 12/2, head_dim 80": Combination(ONE, (12, 2), 80, "float32"),
    "complex, 17 sequences, 12/2, head_dim 240": Combination(SEVENTEEN, (12, 2), 240, "bfloat16"),
    "complex, 17 sequences, 5/1, head_dim 80": Combination(SEVENTEEN, (5, 1), 80, "bfloat16"),
    "complex, 17 sequences, 3/3, head_dim 240": Combination(SEVENTEEN, (3, 3), 240, "float32"),
    "window 5": Combination(random_lengths(5), (4, 4), 128, "float32", {"sliding_window": 5}),
    "window 128": Combination(random_lengths(5), (4, 4), 128, "float32", {"sliding_window": 128}),
    "head_dim 64, sinks": Combination(
        random_lengths(2), (9, 3), 64, "bfloat16", {"attention_sink": SINKS}, share_lanes=True
    ),
    "head_dim 64, sinks, window 128": Combination(
        THREE,
        (9, 3),
        64,
        "float32",
        {"attention_sink": SINKS, "sliding_window": 128},
        share_lanes=True,
    ),
    "head_dim 64, float8 attention": Combination(
        THREE, (64, 8), 64, E4M3, SCALES | {"q_scale": 0.5}, share_lanes=True
    ),
    "soft cap": Combination(random_lengths(2), (16, 2), 128, "float32", {"soft_cap": 50.0}),
}


def widened(array):
    """The same numbers in float32; a cache in the layout that float32 has, packing 1."""
    if array.ndim == 5:
        array = array.reshape(*array.shape[:2], -1, 1, array.shape[-1])
    return jnp.asarray(array.astype(np.float32))


def oracle(c: Combination, case, queries):
    """Output and cache of the peer's reference for the widened numbers of a case."""
    options = dict(c.options)
    sm_scale, q_scale = c.head_dim**-0.5, options.pop("q_scale", None)
    if q_scale is not None:
        queries = np.asarray(quantize(jnp.asarray(queries), q_scale, jnp.dtype(c.dtype)))
        sm_scale *= q_scale
    queries, keys, values, kv_cache = map(widened, (queries, *case.arrays[1:]))
    # In four-byte words float8 has room for two heads more than three: float32 has no such padding.
    kv_cache = kv_cache[:, :, : c.rows]
    metadata = map(jnp.asarray, case.metadata)
    reference = peers.hd64_reference if c.share_lanes else peers.v3_reference
    return reference(queries, keys, values, kv_cache, *metadata, sm_scale=sm_scale, **options)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == QUICK else pytest.mark.full) for n in COMBINATIONS]
)
def test_agrees_with_the_peers_reference(name):
    c = COMBINATIONS[name]
    case = make_case(c.shape(), c.lengths)
    q_dtype = "bfloat16" if c.is_float8 else c.dtype
    ours, cache = attend(case, ON_WAIT, q_dtype=q_dtype, m_block_sizes=c.m_block_sizes, **c.options)
    theirs, their_cache = oracle(c, case, case.queries.astype(jnp.dtype(q_dtype)))
    rows = sum(q_len for q_len, _ in c.lengths)
    assert len(theirs) == rows
    truth = dense.Truth(np.asarray(theirs).astype(np.float64), np.ones(theirs.shape[:2]))
    # In float32 both sides round, the oracle as much as the kernel.
    limit = 5e-6 if c.dtype == "float32" else tolerance_of(case, ours.dtype)
    assert dense.relative_error(ours[:rows], truth) < limit
    cache = np.asarray(widened(cache)[:, :, : c.rows])
    for page, slot in case.new_slots:
        np.testing.assert_array_equal(cache[page, slot], np.asarray(their_cache[page, slot]))


def test_rung_3_agrees_with_the_peers_reference_for_shared_lanes():
    """Their layout is ours: the same cache, bit by bit, and the same output with sinks."""
    c = COMBINATIONS["head_dim 64, sinks"]
    case = make_case(c.shape(), c.lengths)
    options = {"sm_scale": c.head_dim**-0.5, "out_dtype": "float32"} | c.options
    ours, cache = ref_ragged_paged_attention(*case.arrays, *case.metadata, **options)
    theirs, their_cache = oracle(c, case, case.queries)
    truth = dense.Truth(np.asarray(theirs).astype(np.float64), np.ones(theirs.shape[:2]))
    assert dense.relative_error(ours[: len(theirs)], truth) < 2e-6
    cache = np.asarray(widened(np.asarray(cache))[:, :, : c.rows])
    for page, slot in case.new_slots:
        np.testing.assert_array_equal(cache[page, slot], np.asarray(their_cache[page, slot]))
