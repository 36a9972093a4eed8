"""Rung 6 against the float64 oracle and to the last bit of the cache; its three rules broken."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import compat, fused, interpreter
from rpa.lab.copies.timeline import record_dmas
from rpa.paging import get_kv_cache_shape
from rpa.ragged import RaggedBatch, ref_ragged_paged_attention
from tests import dma_programs as programs
from tests import mutants
from tests.batches import Shape, bits, make_case
from tests.kernel_harness import MODES, ON_WAIT, assert_compiles, check, run

pytestmark = pytest.mark.core

SMALL = Shape(
    num_q_heads=2, num_kv_heads=1, head_dim=64, page_size=4, pages_per_seq=5, num_tokens=12
)
OPTIONS = {"max_q_len": 5, "block_tokens": 8}
SHAPES = {
    "MHA": Shape(2, 2, 128, page_size=8, num_tokens=12),
    "GQA, a group of 3": Shape(6, 2, 64, page_size=8, num_tokens=12, dtype="bfloat16"),
    "MQA, head_dim 80": Shape(5, 1, 80, page_size=8, num_tokens=12),
}
LENGTHS = {
    "page and block ends": [(1, 4), (1, 5), (1, 8), (1, 9), (1, 17)],
    "new tokens cross a page": [(3, 5), (2, 9), (4, 18), (3, 12)],  # TRAPS 12
    "new tokens cross a block": [(5, 11), (2, 17), (5, 20)],
    "nothing cached": [(1, 1), (4, 4), (5, 5)],
    "idle anywhere": [(0, 9), (1, 9), (0, 0), (0, 3), (2, 2), (0, 0)],
    "none": [],
    "all idle": [(0, 0), (0, 7)],
}


def check_fused(mode, shape, lengths, *, seed=0, share=False):
    case = make_case(shape, lengths, seed=seed, share=share)
    attend = partial(fused.attention, interpret=mode.params, **OPTIONS)
    check(case, *run(attend, *case.arrays, case.batch, sm_scale=0.125), sm_scale=0.125)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name, mode):
    check_fused(mode, SMALL, LENGTHS[name])


@pytest.mark.parametrize(
    "name",
    [n if n == "GQA, a group of 3" else pytest.param(n, marks=pytest.mark.full) for n in SHAPES],
)
def test_shapes(name):
    check_fused(ON_WAIT, SHAPES[name], [(1, 9), (0, 5), (3, 18), (5, 8)])


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_generated_lengths(seed, mode):
    rng = np.random.default_rng(seed)
    kv_lens = rng.integers(0, 21, 4)
    lengths = [(min(int(kv_len), int(rng.integers(0, 4))), int(kv_len)) for kv_len in kv_lens]
    for shape in (SMALL, *SHAPES.values()):
        check_fused(mode, shape, lengths, seed=seed, share=bool(seed % 2))


def test_agrees_with_rung_3():
    case = make_case(SMALL, LENGTHS["new tokens cross a page"])
    options = {"sm_scale": 0.125, "interpret": ON_WAIT.params}
    output, cache = run(fused.attention, *case.arrays, case.batch, **options, **OPTIONS)
    expected = ref_ragged_paged_attention(*case.arrays, *case.metadata, sm_scale=0.125)
    np.testing.assert_allclose(output, expected[0], atol=2e-6)
    np.testing.assert_array_equal(bits(cache), bits(expected[1]))


def test_too_many_new_tokens_are_refused_or_nan_but_stored():
    case = make_case(SMALL, [(1, 5), (7, 9)])
    with pytest.raises(ValueError, match="sequence 1 has q_len 7.*at most 5"):
        fused.attention(*case.arrays, case.batch, **OPTIONS)
    attend = jax.jit(partial(fused.attention, interpret=ON_WAIT.params, **OPTIONS))
    output, cache = run(attend, *case.arrays, case.batch)
    assert np.isfinite(output[:6]).all() and np.isnan(output[6:8]).all() and not output[8:].any()
    np.testing.assert_array_equal(bits(cache), case.expected_cache())


NAMES = {"scratch[0]": "buffers", "scratch[1]": "sems", "scratch[2]": "store_sems"}


def recorded_steps(lengths):
    case = make_case(SMALL, lengths)
    with record_dmas(NAMES) as timeline:
        run(partial(fused.attention, interpret=ON_WAIT.params, **OPTIONS), *case.arrays, case.batch)
    return programs.steps_of(timeline, case.kv_cache[0, 0].nbytes)


def test_a_block_is_stored_while_it_is_computed_and_left_alone_until_then():
    """In pages of 4 and blocks of 8: the last token of each sequence is new."""
    assert recorded_steps([(1, 9), (1, 3)]) == [
        ("start", 0, 8, 2), ("start", 1, 1, 1), ("wait", 0, 8, 2), ("compute", 0),
        ("start", 0, 3, 2), ("wait", 1, 1, 1), ("store", 1, 1, 1), ("compute", 1),
        ("wait_store", 1, 1, 1), ("wait", 0, 3, 2), ("store", 0, 1, 1), ("compute", 0),
        ("wait_store", 0, 1, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_copies_follow_the_three_rules(lengths):
    busy, stored = {}, 0
    for kind, buffer, *tokens in recorded_steps(lengths):
        if kind == "start":
            assert buffer not in busy, "a buffer is filled while it is in use"
            busy[buffer] = {"compute"}
        elif kind == "store":
            busy[buffer].add("wait_store")
            stored += tokens[0]
        elif kind != "wait":
            busy[buffer].remove(kind)
            if not busy[buffer]:
                del busy[buffer]
    assert not busy and stored == sum(q_len for q_len, _ in lengths)


# --- Seeded faults ------------------------------------------------------------------------------

FAULTY_LENGTHS = [(1, 7), (0, 4), (1, 1), (3, 18)]
"""Cached and new in one block; idle; new alone; new tokens in the last two of three blocks."""


def check_both_modes():
    for mode in MODES:
        check_fused(mode, SMALL, FAULTY_LENGTHS)


STORE_COPY, CACHED, MASK = fused.store_copy, fused.cached_tokens, fused.causal_mask


def all_cached(kv_len, q_len, block, block_tokens):
    """The new tokens are read from the cache, before anyone has written them there."""
    return jnp.clip(kv_len - block * block_tokens, 0, block_tokens)


def store_from_the_other_buffer(refs, page, page_row, slot, buffer_row, rows):
    return pltpu.make_async_copy(
        refs.buffers.at[1 - slot, pl.ds(buffer_row, rows)],
        refs.kv_cache.at[page, pl.ds(page_row, rows)],
        refs.store_sems.at[slot],
    )


WRONG_PARTS = {
    "new tokens read from the cache": ("cached_tokens", all_cached),
    "one token too many taken as cached": (
        "cached_tokens",
        lambda kv_len, q_len, *rest: CACHED(kv_len, jnp.maximum(q_len - 1, 0), *rest),
    ),
    "write-back one page further": (
        "store_copy",
        lambda refs, page, *rest: STORE_COPY(refs, (page + 1) % SMALL.num_pages, *rest),
    ),
    "write-back from the other buffer": (
        "store_copy",
        store_from_the_other_buffer,
    ),
    "mask ignores the cached prefix": (
        "causal_mask",
        lambda refs, sizes, s, block, **kw: MASK(
            refs._replace(q_lens=refs.kv_lens), sizes, s, block, **kw
        ),
    ),
    "buffer reused before its write-back arrived": ("wait_store", lambda refs, slot: None),
}
needs_deadlock_errors = pytest.mark.skipif(
    not interpreter.deadlocks_can_raise(), reason="this JAX's interpreter hangs on a missing signal"
)


@pytest.mark.full
@needs_deadlock_errors
def test_a_missing_wait_is_found():
    check_on_wait = partial(check_fused, ON_WAIT, SMALL, FAULTY_LENGTHS)
    faults = [
        fault
        for fault in mutants.list_faults(check_on_wait)
        if fault.site.operation == "wait" and fault.action == "drop"
    ]
    verdicts = [mutants.verdict(check_on_wait, fault) for fault in faults]
    # The block's wait, and the write-back's: before a buffer is reused, and at the end.
    assert verdicts == ["numbers"] * 3, list(map(str, faults))


@pytest.mark.full
@needs_deadlock_errors
def test_every_start_and_wait_is_needed():
    faults = mutants.list_faults(check_both_modes)
    verdicts = {str(fault): mutants.verdict(check_both_modes, fault) for fault in faults}
    assert len(verdicts) == 16 and "survived" not in verdicts.values(), verdicts
    check_both_modes()


@pytest.mark.full
@needs_deadlock_errors
@pytest.mark.parametrize("name", WRONG_PARTS)
def test_a_wrong_part_is_found(name):
    part = mutants.replaced(fused, *WRONG_PARTS[name])
    assert mutants.verdict(check_both_modes, part) != "survived"


# --- The compiler ---------------------------------------------------------------------------------


def compile_fused(chip, dtype, heads, **options):
    """Compile at 64 sequences of up to 1,024 tokens; returns the CompileResult and the cache."""
    num_q_heads, num_kv_heads, head_dim, page_size = heads

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = array(*get_kv_cache_shape(4096, page_size, num_kv_heads, head_dim, dtype))
    batch = RaggedBatch(*(array(n, dtype="int32") for n in (64, 64 * 1024 // page_size, 65, 3)))
    new = array(64, num_kv_heads, head_dim)
    result = assert_compiles(
        chip,
        fused.fused_attention,
        array(64, num_q_heads, head_dim),
        new,
        new,
        cache,
        batch,
        kwargs={"interpret": False},
        keep_hlo=True,
        **options,
    )
    return result, cache


LLAMA_3_8B, LLAMA_3_70B_ON_8, SMOLLM2 = (32, 8, 128, 16), (8, 1, 128, 16), (9, 3, 64, 128)


@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_compiles_for(chip):
    result, cache = compile_fused(chip, "bfloat16", LLAMA_3_70B_ON_8, donate_argnums=(3,))
    assert not result.copies_of(cache), "a donated cache is copied"


@pytest.mark.full
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [LLAMA_3_8B, SMOLLM2])
def test_more_shapes_compile(chip, dtype, heads):
    compile_fused(chip, dtype, heads)


@pytest.mark.full
@pytest.mark.skipif(compat.JAX_VERSION < (0, 10, 2), reason="see rpa.compat.keep_in_hbm")
def test_a_cache_that_is_not_donated_is_copied_once():
    """What the ladder pays for keeping its arguments, and why rung 8 donates."""
    result, cache = compile_fused("v5e", "bfloat16", LLAMA_3_70B_ON_8)
    assert len(result.copies_of(cache)) == 1
