"""What the issue trackers of serving engines and of JAX report, as tests of every rung it touches.

Each test names a report that is public, of another program: a length of 32,768, a page of 3 tokens,
a window without a key. Most never happened here, and are kept from happening.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import fused, lab, paging, plain, ragged, streamed, tiled
from rpa.check.chapters.launchers import run_copy
from rpa.check.errors import KernelFault
from rpa.check.sandbox import faults, process
from rpa.kernel import ragged_paged_attention
from tests import dma_programs, kernel_programs, kernel_runs
from tests.batches import Shape, bits, make_case
from tests.kernel_harness import EAGER, ON_WAIT, assert_compiles, check, run


def reference(*arrays, interpret=None, sm_scale, **options):
    queries, keys, values, kv_cache, batch = arrays
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    return ragged.ref_ragged_paged_attention(
        *(queries, keys, values, kv_cache, *metadata), sm_scale=sm_scale, **options
    )


def kernel(*arrays, interpret=None, sm_scale, **options):
    queries, keys, values, kv_cache, batch = arrays
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    return ragged_paged_attention(
        *(jnp.asarray(x) for x in (queries, keys, values, kv_cache)),
        *metadata,
        sm_scale=sm_scale,
        backend="interpret" if interpret is None else interpret,
        **options,
    )


RUNGS = {
    "3 ragged": reference,
    "4 tiled": tiled.attention,
    "5 streamed": streamed.attention,
    "6 fused": fused.attention,
    "7 plain": plain.attention,
    "8 kernel": kernel,
}
ANY_MIX = ("3 ragged", "7 plain", "8 kernel")
DECODE = tuple(RUNGS)


def rarely(*values):
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def check_rung(rung, case, **options):
    interpret = {} if rung == "3 ragged" else {"interpret": ON_WAIT.params}
    scale = case.shape.head_dim**-0.5
    results = run(RUNGS[rung], *case.arrays, case.batch, sm_scale=scale, **interpret, **options)
    named = {
        kernel_runs.ORACLE_NAMES[name]: value
        for name, value in options.items()
        if name in kernel_runs.ORACLE_NAMES
    }
    check(case, *results, sm_scale=scale, **named)
    return results


# --- Lengths ------------------------------------------------------------------------------------

LONG = Shape(num_q_heads=2, num_kv_heads=1, head_dim=128, page_size=256, pages_per_seq=236,
             max_num_seqs=8, num_tokens=8)  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("kv_len", [32_767, 32_768, 32_769])
@pytest.mark.parametrize("rung", DECODE)
def test_positions_around_the_end_of_int16(rung, kv_len):
    check_rung(rung, make_case(LONG, [(1, kv_len), (1, 100)]))


@pytest.mark.full
@pytest.mark.parametrize("rung", DECODE)
def test_one_long_sequence_among_short_ones(rung):
    """A guard by the average length lets one of 60,000 through to int16."""
    check_rung(rung, make_case(LONG, [(1, 100)] * 3 + [(1, 60_000)] + [(1, 100)] * 4))


# --- Pages --------------------------------------------------------------------------------------

SMALL = Shape(num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=8, pages_per_seq=7)


@pytest.mark.parametrize("rung", ["3 ragged", *rarely("6 fused", "7 plain", "8 kernel")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_new_token_leaves_the_rest_of_its_page_as_it_was(rung, dtype):
    """Also the other half of its 32-bit words. The rest of the page is NaN."""
    shape = Shape(2, 1, 128, page_size=8, dtype=dtype, max_num_seqs=3)
    case = make_case(shape, [(1, 6), (1, 9), (1, 16)])
    case.queries = case.queries.astype(jnp.bfloat16)
    interpret = {} if rung == "3 ragged" else {"interpret": ON_WAIT.params}
    _, cache = run(RUNGS[rung], *case.arrays, case.batch, sm_scale=0.1, **interpret)
    np.testing.assert_array_equal(bits(cache), case.expected_cache())


@pytest.mark.parametrize("rung", [*rarely(*DECODE[1:]), "3 ragged"])
@pytest.mark.parametrize("width", [5, 7])
def test_a_table_whose_width_no_block_divides(rung, width):
    shape = Shape(4, 2, 64, page_size=8, pages_per_seq=width)
    check_rung(rung, make_case(shape, [(1, 8 * width), (1, 8 * width - 7), (1, 17)]))


@pytest.mark.parametrize("rung", DECODE)
@pytest.mark.parametrize("page_size", [1, 3, 9])
def test_a_page_that_splits_a_32_bit_word_is_refused_in_words(rung, page_size):
    case = make_case(Shape(4, 2, 64, page_size, dtype="bfloat16"), [(1, 1)])
    with pytest.raises(ValueError, match="page_size must be a multiple of 2 for bfloat16"):
        RUNGS[rung](*case.arrays, case.batch, sm_scale=0.1)


@pytest.mark.parametrize("rung", [*rarely(*DECODE[1:]), "3 ragged"])
@pytest.mark.parametrize("page_size", [1, 3, 9])
def test_pages_of_odd_sizes(rung, page_size):
    shape = Shape(4, 2, 64, page_size, pages_per_seq=7)
    check_rung(rung, make_case(shape, [(1, 7 * page_size), (1, 1), (1, 5 * page_size - 1)]))


@pytest.mark.parametrize("rung", ["3 ragged", *rarely("7 plain", "8 kernel")])
def test_padding_in_the_last_page_of_an_earlier_sequence(rung):
    """Pages gathered side by side and masked by a running sum of lengths would count it."""
    lengths = [(0, 3), (1, 9), (3, 11), (5, 5), (2, 25), (0, 0)]
    check_rung(rung, make_case(SMALL, lengths))


@pytest.mark.parametrize("q_len", [1, 3])
def test_padding_in_the_last_page_of_one_sequence(q_len):
    """Rung 2, by hand: what stands behind kv_len is NaN, and so is all that is not its own."""
    case = make_case(SMALL, [(q_len, 11)], new_tokens_only=False)
    pages = jnp.asarray(case.batch.page_indices[:7])
    output = paging.paged_attention(
        case.queries[:q_len], case.kv_cache, pages, 11, 11 - q_len, num_kv_heads=2
    )
    truth = ragged.oracle_ragged(case.queries, case.kv_cache, case.batch, 2)
    np.testing.assert_allclose(output, truth.output[:q_len], atol=1e-5)


# --- Dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", DECODE)
@pytest.mark.parametrize("cache", ["float8_e4m3fn", "float8_e5m2"])
def test_new_tokens_in_another_dtype_than_the_cache_say_cast(rung, cache):
    case = make_case(Shape(4, 2, 64, 8, dtype=cache), [(1, 9)])
    keys, values = (x.astype(jnp.bfloat16) for x in (case.keys, case.values))
    with pytest.raises(ValueError, match="[Cc]ast"):
        RUNGS[rung](case.queries, keys, values, case.kv_cache, case.batch, sm_scale=0.1)


# --- Heads, sinks, windows ----------------------------------------------------------------------


@pytest.mark.parametrize("rung", ["3 ragged", *rarely("7 plain", "8 kernel")])
@pytest.mark.parametrize("heads", [(5, 1), (9, 3)])
def test_sinks_of_heads_that_are_no_power_of_two(rung, heads):
    case = make_case(Shape(*heads, 64, page_size=8), [(1, 9), (3, 20)])
    sinks = np.linspace(-2, 3, heads[0], dtype=np.float32)
    check_rung(rung, case, attention_sink=sinks)


@pytest.mark.parametrize("rung", ["3 ragged", *rarely("7 plain", "8 kernel")])
@pytest.mark.parametrize("window", [1, 3, 8, 9])
def test_a_window_smaller_than_a_block(rung, window):
    case = make_case(SMALL, [(1, 50), (1, 8), (9, 33), (8, 8)])
    check_rung(rung, case, sliding_window=window)


@pytest.mark.parametrize("rung", ["3 ragged", *rarely("7 plain", "8 kernel")])
def test_blocks_without_a_visible_key_add_nothing(rung):
    """Most blocks are outside a window of 2: zeros, not the average of their values."""
    case = make_case(SMALL, [(1, 56), (1, 49)])
    (output, _), (narrow, _) = (
        check_rung(rung, case, sliding_window=window, **options)
        for window, options in ((2, {}), (1, {}))
    )
    assert not np.array_equal(output, narrow)


# --- One semaphore for all ----------------------------------------------------------------------


def one_semaphore(x_ref, out_ref, buffer_ref, sem):
    """K, V and the next block on one semaphore: a wait counts bytes, whichever arrive first."""
    half = 4
    k = pltpu.make_async_copy(x_ref.at[pl.ds(0, half)], buffer_ref.at[pl.ds(0, half)], sem)
    v = pltpu.make_async_copy(x_ref.at[pl.ds(half, half)], buffer_ref.at[pl.ds(half, half)], sem)
    k.start()
    v.start()
    k.wait()
    first = 2 * buffer_ref[:half]
    v.wait()
    buffer_ref[...] = jnp.concatenate([first, 2 * buffer_ref[half:]])
    copy_out = pltpu.make_async_copy(buffer_ref, out_ref, sem)
    copy_out.start()
    copy_out.wait()


def test_one_semaphore_for_two_copies_is_a_data_race(monkeypatch):
    """It shipped in a kernel, where both interpreter modes may give the right numbers."""
    monkeypatch.delitem(__import__("sys").modules, __name__)  # as in a notebook
    x = np.ones((8, 128), np.float32)
    with pytest.raises(KernelFault, match=faults.DOUBTFUL) as fault:
        process.in_sandbox()(run_copy, one_semaphore, (x,), 60.0)
    assert "k.wait()" in str(fault.value)


# --- What compilers take ------------------------------------------------------------------------


def operands(kv_dtype="bfloat16"):
    q = jax.ShapeDtypeStruct((8, 8, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((8, 2, 128), kv_dtype)
    shape = paging.get_kv_cache_shape(4096, 16, 2, 128, kv_dtype)
    metadata = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (4, 32, 5, 3)]
    return q, kv, kv, jax.ShapeDtypeStruct(shape, kv_dtype), *metadata


@pytest.mark.parametrize("chip", ["v5e", *rarely("v6e", "tpu7x")])
def test_layers_that_share_kv_copy_no_cache(chip):
    arrays = operands()
    options = {"donate_argnums": (3,), "keep_hlo": True, "kwargs": {"chip": chip}}
    result = assert_compiles(chip, kernel_programs.attend_twice_reading, *arrays, **options)
    assert result.copies_of(arrays[3]) == []


@pytest.mark.full
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_compiles_on_every_chip(chip, kv_dtype):
    """Those without float8 of their own convert it."""
    arrays = operands(kv_dtype)
    assert_compiles(chip, kernel_programs.attend, *arrays, kwargs={"chip": chip})


EIGHT_ROWS = (
    jax.ShapeDtypeStruct((32, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.int32)
)  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_dynamic_slices_of_8_rows_of_bfloat16_compile_if_they_are_aligned(chip):
    """Reported: on a v6e and not on a TPU7x. With libtpu 0.0.52 the three chips agree."""
    assert_compiles(chip, dma_programs.eight_rows, *EIGHT_ROWS)
    anywhere = lab.compile_for(
        chip, dma_programs.eight_rows, *EIGHT_ROWS, kwargs={"aligned": False}
    )
    assert not anywhere.ok and "multiple of 8" in anywhere.error


@pytest.mark.full
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_rotate_half_rope_compiles_at_head_dim_128(chip):
    x = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    assert_compiles(chip, dma_programs.rotate_half_rope, x, x, x)


def test_rotate_half_rope_is_rope():
    rng = np.random.default_rng(0)
    x, angle = rng.standard_normal((2, 16, 128)).astype(np.float32)
    half = angle[:, :64]
    angle = np.concatenate([half, half], axis=1)
    found = dma_programs.rotate_half_rope(x, np.cos(angle), np.sin(angle), interpret=EAGER.params)
    pairs = (x[:, :64] + 1j * x[:, 64:]) * np.exp(1j * half)
    np.testing.assert_allclose(found, np.concatenate([pairs.real, pairs.imag], axis=1), atol=1e-5)
