"""The bugs of production kernels, one test each by name, on rung 8; rung 3 has its own file.

Every batch is poisoned (`tests.batches`): NaN wherever nothing may be read, garbage in the page
table behind the live pages and in the metadata behind the last sequence. Tests that use the same
shape and options share one compilation, which is nearly all that a test costs.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpa import chips, interpreter
from rpa.kernel import blocks, ragged_paged_attention, traversal
from rpa.kernel.cases import Case
from rpa.kernel.page_table import TABLE_TILE_WORDS
from rpa.kernel.plan import Plan
from tests.batches import Shape, bits, make_case
from tests.kernel_harness import EAGER, ON_WAIT
from tests.kernel_plans import make_problem
from tests.kernel_runs import BLOCKS, attend, check, check_lengths, with_distribution

pytestmark = pytest.mark.core

SMALL = Shape(2, 1, 64, page_size=8)
PADDED = {
    "5/1, 80": Shape(5, 1, 80, page_size=8, dtype="bfloat16"),
    "3/3, 240": Shape(3, 3, 240, page_size=8, dtype="bfloat16"),
    "9/3, 64": Shape(9, 3, 64, page_size=8, dtype="bfloat16"),
    "9/3, 64, shared lanes": Shape(9, 3, 64, page_size=8, dtype="bfloat16", share_lanes=True),
    "12/2, 128": Shape(12, 2, 128, page_size=8, dtype="bfloat16"),
}


def check_small(lengths, mode=ON_WAIT, **options):
    return check_lengths(SMALL, lengths, mode, **(BLOCKS | options))


def test_01_sliding_window_stores_every_new_token():
    """The last query block never looks at the first tokens of its sequence: who stores them?"""
    check_small([(1, 20), (32, 32), (7, 30)], sliding_window=5)


def test_02_prefill_range_without_chunk_size_is_computed():
    check_small([(1, 9), (5, 20), (9, 9), (3, 31)], num_chunked=2)


def test_03_wrong_distribution_is_refused():
    case = make_case(SMALL, [(1, 9), (3, 17), (2, 8)])
    case.batch = with_distribution(case.batch, 3, 3, 3)
    with pytest.raises(ValueError, match="sequence 1 has q_len 3, but distribution says"):
        ragged_paged_attention(*case.arrays, *case.metadata)


def test_03_a_negative_distribution_reads_nothing_before_the_arrays():
    plan = SimpleNamespace(max_q_len=1, problem=SimpleNamespace(max_num_seqs=2))
    lengths = SimpleNamespace(kv_lens=jnp.array([3, 5]), cu_q_lens=jnp.array([0, 1, 2]))
    for first, end in [(0, -1), (-2, -1), (-2, 2)]:
        cursor = traversal.start(plan, lengths, jnp.int32(first), jnp.int32(end))
        assert cursor.seq.index == 0, "an index that is not below `end` ends the traversal"


def test_03_wrong_distribution_harms_nobody_else():
    """Not validated: the sequence's own output is unspecified; nothing hangs, nothing leaks."""
    case = make_case(SMALL, [(1, 9), (3, 17), (2, 8)])
    right, _ = attend(case, ON_WAIT, **BLOCKS)
    case.batch = with_distribution(case.batch, 2, 2, 3)  # the q_len of 3 counts as a decode
    output, cache = attend(case, ON_WAIT, validate=False, **BLOCKS)
    np.testing.assert_array_equal(output[[0, 4, 5]], right[[0, 4, 5]])
    own = case.batch.page_indices.reshape(6, -1)[1, :3]
    others = np.setdiff1d(np.arange(SMALL.num_pages), own)
    np.testing.assert_array_equal(bits(cache)[others], case.expected_cache()[others])


@pytest.mark.parametrize("mode", [ON_WAIT, EAGER], ids=str)
def test_04_idle_slots_are_skipped_wherever_they_are(mode):
    check_small([(0, 0), (1, 9), (0, 17), (0, 0), (5, 8), (2, 2)], mode)


def test_04_idle_slots_in_every_range():
    batch = [(0, 3), (1, 9), (5, 8), (4, 6)]
    case = make_case(SMALL, batch)
    idle_between = case.batch.cu_q_lens.copy()
    idle_between[3:5] = idle_between[2], idle_between[2]  # sequences 2 and 3: q_len 0
    case.batch = type(case.batch)(
        case.batch.kv_lens, case.batch.page_indices, idle_between, np.array([2, 3, 4], np.int32)
    )
    case.new_slots = case.new_slots[: idle_between[4]]
    check(case, ON_WAIT, **BLOCKS)


def test_04_batches_of_idle_slots_only_and_of_nothing():
    for lengths in ([], [(0, 0), (0, 9)]):
        assert not check_small(lengths).any()


LONG = Shape(
    2, 1, 128, page_size=256, pages_per_seq=132, max_num_seqs=1, num_tokens=4, dtype="bfloat16"
)
LONG_OPTIONS = {
    "d_block_sizes": (1, 8192, 1, 4096),
    "m_block_sizes": (8, 4096, 8, 1024),
    "sliding_window": 33_000,
    # Rounding a handful of outputs to bfloat16 would hide what the test looks for.
    "out_dtype": "float32",
}


@pytest.mark.parametrize("q_len", [1, pytest.param(3, marks=pytest.mark.full)])
def test_05_positions_past_int16(q_len):
    check_lengths(LONG, [(q_len, 33_500)], ON_WAIT, **LONG_OPTIONS)


def test_06_softmax_state_does_not_saturate():
    """Equal scores and values that rise along the sequence: a sum that stops growing shows."""
    case = make_case(LONG, [(1, 33_500)])
    case.queries[:1] = 0
    pages = case.batch.page_indices[: -(-33_500 // 256)]
    ramp = (np.arange(len(pages) * 256) / 33_500).reshape(len(pages), 256, 1)
    case.kv_cache[pages, :, 0, 1] = ramp  # V of the only head
    case.values[:1] = 1
    output = check(case, ON_WAIT, **LONG_OPTIONS)
    seen = ramp.reshape(-1)[500:33_500]
    np.testing.assert_allclose(output[0].astype(np.float64), seen.mean(), rtol=4e-3)


def test_07_nan_of_one_sequence_stays_there():
    """A short sequence follows, in the same buffer, one whose keys and values are NaN."""
    case = make_case(SMALL, [(1, 16), (1, 16), (1, 3), (1, 2), (16, 16), (16, 16), (1, 1)][:6])
    clean, _ = attend(case, ON_WAIT, **BLOCKS)
    own = case.batch.page_indices.reshape(6, -1)
    case.kv_cache[own[:2, :2]] = np.nan
    case.values[4:20] = np.nan
    output, _ = attend(case, ON_WAIT, **BLOCKS)
    assert np.isnan(output[:2]).all() and np.isnan(output[4:20]).all()
    kept = [2, 3, *range(20, 36)]
    np.testing.assert_array_equal(output[kept], clean[kept])


@pytest.mark.parametrize("mode", [ON_WAIT, EAGER], ids=str)
def test_08_page_table_garbage_is_not_followed(mode):
    """The last sequence fills its row of the table: the next entry is behind the table's end."""
    check_small([(1, 1), (1, 32), (1, 31), (2, 25), (3, 32), (4, 32)], mode)


@pytest.mark.full
def test_09_window_without_causal_mask():
    check_small([(1, 20), (32, 32), (3, 31)], use_causal_mask=False, sliding_window=5)


def test_10_padding_rows_are_zero():
    output = check_small([(1, 9), (2, 8)])
    assert output[:3].all() and not output[3:].any()


def test_11_kv_sharing_ignores_new_kv_and_leaves_the_cache():
    case = make_case(SMALL, [(1, 9), (9, 17)], new_tokens_only=False)
    case.keys[:], case.values[:] = np.nan, np.nan
    check(case, ON_WAIT, update_kv_cache=False, **BLOCKS)


@pytest.mark.parametrize("mode", [ON_WAIT, EAGER], ids=str)
def test_12_new_tokens_around_page_ends(mode):
    check_small([(3, 9), (4, 8), (5, 7), (2, 17), (8, 16), (9, 25)], mode)


@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_13_default_blocks_fit_in_vmem(chip):
    limit = chips.chip(chip).vmem_bytes
    for heads, head_dim, dtype in [((32, 8), 128, "bfloat16"), ((128, 16), 256, "float32")]:
        problem = make_problem(heads, head_dim, kv=dtype, page_size=16, pages_per_seq=8192)
        for case in (Case.DECODE, Case.MIXED):
            sizes = blocks.default_block_sizes(problem, case, None)
            plan = blocks.shrink_to_fit(Plan(problem, case, sizes, vmem_limit_bytes=limit))
            assert sum(blocks.vmem_bytes(plan).values()) <= limit


def test_13_blocks_that_do_not_fit_name_what_to_shrink():
    case = make_case(Shape(32, 8, 128, page_size=128), [(1, 9)])
    options = {"chip": "tpu7x", "backend": ON_WAIT.params}
    with pytest.raises(ValueError, match=r"m_block_sizes .* of VMEM.*: shrink bkv, which takes"):
        ragged_paged_attention(
            *case.arrays, *case.metadata, m_block_sizes=(8, 16384, 8, 128), **options
        )
    with pytest.raises(ValueError, match="shrink bq, which takes"):
        ragged_paged_attention(
            *case.arrays, *case.metadata, m_block_sizes=(1024, 128, 8, 128), **options
        )


def test_14_page_table_needs_no_room_in_smem():
    """What is in SMEM does not grow with the context; test_kernel_compile compiles a million."""
    words = []
    for pages_per_seq in (64, 65_536):
        problem = make_problem((32, 8), 128, page_size=16, pages_per_seq=pages_per_seq)
        sizes = blocks.default_block_sizes(problem, Case.DECODE, 1)
        plan = Plan(problem, Case.DECODE, sizes)
        words.append(plan.table.chunk_words)
    assert words[0] == words[1] <= 2 * TABLE_TILE_WORDS


@pytest.mark.parametrize(
    "name", [n if "9/3" in n else pytest.param(n, marks=pytest.mark.full) for n in PADDED]
)
@pytest.mark.parametrize("out_dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_15_heads_that_need_padding(name, out_dtype):
    shape = PADDED[name]
    sinks = np.random.default_rng(0).standard_normal(shape.num_q_heads).astype(np.float32)
    options = {"attention_sink": sinks, "out_dtype": out_dtype} | BLOCKS
    output = check_lengths(shape, [(1, 9), (1, 17), (5, 20), (9, 9)], ON_WAIT, **options)
    assert output.dtype == jnp.dtype(out_dtype)


def test_16_any_scale_uses_the_same_compiled_kernel():
    case = make_case(SMALL, [(1, 9), (5, 20)])
    for sm_scale in (0.3, np.float32(0.2), jnp.float32(0.1)):
        check(case, ON_WAIT, sm_scale=sm_scale, **BLOCKS)


@pytest.mark.full
def test_16_traced_scale():
    case = make_case(SMALL, [(1, 9), (5, 20)])
    expected = check(case, ON_WAIT, sm_scale=0.3, **BLOCKS)

    @jax.jit
    def scaled(sm_scale):
        args = (*map(jnp.asarray, case.arrays), *case.metadata)
        return ragged_paged_attention(*args, sm_scale=sm_scale, backend=ON_WAIT.params, **BLOCKS)[0]

    np.testing.assert_allclose(scaled(0.3), expected, atol=1e-6)


@pytest.mark.full
def test_17_block_sizes_that_do_not_divide():
    shape = Shape(2, 1, 64, page_size=16, pages_per_seq=7, num_tokens=80)
    check_lengths(shape, [(1, 50), (70, 100), (9, 49)], ON_WAIT, m_block_sizes=(60, 48, 30, 48))


def test_18_only_the_cache_is_donated():
    case = make_case(SMALL, [(1, 9), (2, 8)])
    arrays = [jnp.asarray(x) for x in case.arrays]
    ragged_paged_attention(*arrays, *case.metadata, backend=ON_WAIT.params, **BLOCKS)
    assert [array.is_deleted() for array in arrays] == [False, False, False, True]


@pytest.mark.full
def test_18_nothing_is_donated_on_request():
    case = make_case(SMALL, [(1, 9), (2, 8)])
    arrays = [jnp.asarray(x) for x in case.arrays]
    options = {"backend": ON_WAIT.params, "donate": False} | BLOCKS
    ragged_paged_attention(*arrays, *case.metadata, **options)
    assert not any(array.is_deleted() for array in arrays)
    np.testing.assert_array_equal(bits(arrays[3]), bits(case.kv_cache))


def test_19_shared_pages_are_read():
    case = make_case(SMALL, [(1, 25), (1, 20), (3, 19), (4, 28)], share=True)
    table = case.batch.page_indices.reshape(6, -1)
    assert len(set(table[:4, 0])) < 4, "the case shares nothing"
    check(case, ON_WAIT, **BLOCKS)


def test_19_writing_into_a_shared_page_is_refused():
    case = make_case(SMALL, [(1, 12), (1, 12)])
    table = case.batch.page_indices.reshape(6, -1)
    table[1] = table[0]
    with pytest.raises(ValueError, match="a shared page may only be read"):
        ragged_paged_attention(*case.arrays, *case.metadata)


def test_20_output_dtype_defaults_to_that_of_queries():
    case = make_case(SMALL, [(1, 9), (2, 8)])
    assert attend(case, ON_WAIT, **BLOCKS)[0].dtype == jnp.float32
    shape = jax.eval_shape(
        lambda *args: ragged_paged_attention(*args, *case.metadata, backend="interpret"),
        *(jnp.asarray(x).astype(jnp.bfloat16) for x in case.arrays[:3]),
        jnp.zeros((SMALL.num_pages, 8, 1, 2, 128), jnp.bfloat16),
    )
    assert shape[0].dtype == jnp.bfloat16


def test_21_padding_of_new_tokens_is_zero():
    """Three float8 heads fill six of eight places, head_dim 64 half of the lanes."""
    shape = Shape(3, 3, 64, page_size=8, dtype="float8_e4m3fn")
    case = make_case(shape, [(1, 9), (5, 20)])
    _, cache = attend(case, ON_WAIT, q_dtype="bfloat16", **BLOCKS)
    np.testing.assert_array_equal(bits(cache), case.expected_cache())
    for page, slot in case.new_slots:
        token = bits(cache)[page, slot].reshape(8, 128)
        assert token[:6, :64].any(axis=1).all() and not token[6:].any() and not token[:, 64:].any()


@pytest.mark.full
def test_21_padding_of_new_tokens_with_shared_lanes_is_zero():
    """Three float8 heads fill three of four places, K and V all of the lanes."""
    shape = Shape(3, 3, 64, page_size=8, dtype="float8_e5m2", share_lanes=True)
    case = make_case(shape, [(1, 9), (5, 20)])
    _, cache = attend(case, ON_WAIT, q_dtype="bfloat16", **BLOCKS)
    np.testing.assert_array_equal(bits(cache), case.expected_cache())
    for page, slot in case.new_slots:
        heads = bits(cache)[page, slot].reshape(4, 2, 64)
        assert heads[:3].any(axis=2).all() and not heads[3].any()


@pytest.mark.skipif(
    not interpreter.deadlocks_can_raise(), reason="this JAX's interpreter would hang"
)
def test_no_wait_is_left_without_a_start():
    """All of the above once more as a deadlock test: the smallest batch of each kind."""
    with interpreter.deadlocks_raise():
        for lengths in ([(1, 1)], [(2, 2)], [(0, 0), (1, 1), (0, 0), (2, 2)], []):
            check_small(lengths)
