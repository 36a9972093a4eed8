"""Rung 5 against the float64 oracle and rung 3, in both interpreter modes, with seeded faults."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import interpreter, streamed
from rpa.lab.copies.timeline import record_dmas
from rpa.paging import cdiv, get_kv_cache_shape
from rpa.ragged import ref_ragged_paged_attention
from tests import dma_programs as programs
from tests import mutants
from tests.batches import Shape, make_case
from tests.kernel_harness import (
    EAGER,
    MODES,
    ON_WAIT,
    KernelFault,
    assert_compiles,
    check,
    run,
)

pytestmark = pytest.mark.core

SMALL = Shape(
    num_q_heads=2, num_kv_heads=1, head_dim=64, page_size=4, pages_per_seq=5, num_tokens=7
)
SHAPES = {
    "MHA": Shape(2, 2, 128, page_size=8, num_tokens=7),
    "GQA, a group of 3": Shape(6, 2, 64, page_size=8, num_tokens=7, dtype="bfloat16"),
    "MQA, head_dim 80": Shape(5, 1, 80, page_size=8, num_tokens=7),
}
KV_LENS = {
    "page ends": [1, 3, 4, 5, 8, 9],
    "block ends": [7, 8, 9, 15, 16],
    "idle anywhere": [0, 9, 0, 0, 1, 0],
    "one": [16],
    "none": [],
    "all idle": [0, 0],
}


def decode_case(shape, kv_lens, seed=0):
    """A batch with one new token per sequence; kv_len 0 is an idle slot."""
    return make_case(shape, [(min(kv_len, 1), kv_len) for kv_len in kv_lens], seed=seed)


def check_decode(mode, shape, kv_lens, *, block_tokens=8, seed=0):
    case = decode_case(shape, kv_lens, seed)
    attend = partial(streamed.attention, block_tokens=block_tokens, interpret=mode.params)
    check(case, *run(attend, *case.arrays, case.batch, sm_scale=0.125), sm_scale=0.125)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", KV_LENS)
def test_lengths(name, mode):
    check_decode(mode, SMALL, KV_LENS[name])


@pytest.mark.parametrize(
    "name",
    [n if n == "GQA, a group of 3" else pytest.param(n, marks=pytest.mark.full) for n in SHAPES],
)
def test_shapes(name):
    check_decode(ON_WAIT, SHAPES[name], [9, 0, 16, 21], block_tokens=8)


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_generated_lengths(seed, mode):
    rng = np.random.default_rng(seed)
    kv_lens = rng.integers(0, 17, 6) * rng.integers(0, 2, 6)
    for shape in (SMALL, *SHAPES.values()):
        for block_tokens in (8, 16):
            check_decode(mode, shape, kv_lens, block_tokens=block_tokens, seed=seed)


def test_agrees_with_rung_3_and_its_own_reference():
    case = decode_case(SMALL, [9, 0, 16, 5])
    options = {"sm_scale": 0.125, "block_tokens": 8, "interpret": ON_WAIT.params}
    output, cache = run(streamed.attention, *case.arrays, case.batch, **options)
    expected, expected_cache = ref_ragged_paged_attention(
        *case.arrays, *case.metadata, sm_scale=0.125
    )
    np.testing.assert_allclose(output, expected, atol=2e-6)
    queries = jnp.pad(case.queries[:3], ((0, 3), (0, 0), (0, 0)))
    kv_lens = np.array([9, 16, 5, 0, 0, 0])
    table = case.batch.page_indices.reshape(6, -1)[[0, 2, 3, 4, 4, 4]].reshape(-1)
    arrays = (queries, expected_cache, kv_lens, table)
    decoded = run(streamed.paged_decode, *arrays, num_kv_heads=1, **options)
    pure = streamed.reference(*arrays, num_kv_heads=1, sm_scale=0.125)
    np.testing.assert_allclose(decoded, pure, atol=2e-6)
    np.testing.assert_allclose(decoded[:3], expected[:3], atol=2e-6)


def test_more_than_one_new_token_is_refused_or_nan():
    case = make_case(SMALL, [(1, 5), (3, 7)])
    with pytest.raises(ValueError, match="sequence 1 has q_len 3"):
        streamed.attention(*case.arrays, case.batch)
    attend = jax.jit(partial(streamed.attention, block_tokens=8, interpret=ON_WAIT.params))
    output, _ = run(attend, *case.arrays, case.batch)
    assert np.isfinite(output[0]).all() and np.isnan(output[1:4]).all() and not output[4:].any()


def recorded_steps(kv_lens):
    case = decode_case(SMALL, kv_lens)
    with record_dmas() as timeline:
        attend = partial(streamed.attention, block_tokens=8, interpret=ON_WAIT.params)
        run(attend, *case.arrays, case.batch)
    return programs.steps_of(timeline, case.kv_cache[0, 0].nbytes)


def test_the_next_block_is_on_its_way_before_this_one_is_waited_for():
    """In pages of 4 and blocks of 8: 9 tokens are 8 and 1; the idle sequence does not occur."""
    assert recorded_steps([9, 0, 3]) == [
        ("start", 0, 8, 2), ("start", 1, 1, 1), ("wait", 0, 8, 2), ("compute", 0),
        ("start", 0, 3, 1), ("wait", 1, 1, 1), ("compute", 1),
        ("wait", 0, 3, 1), ("compute", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("kv_lens", KV_LENS.values(), ids=KV_LENS)
def test_no_buffer_is_filled_while_it_is_in_use(kv_lens):
    """Every block is started once, before it is waited for, into a buffer that is free."""
    holds, started = {}, 0
    for kind, buffer, *tokens_and_copies in recorded_steps(kv_lens):
        if kind == "start":
            assert buffer not in holds
            holds[buffer] = tokens_and_copies
            started += tokens_and_copies[0]
        elif kind == "wait":
            assert holds[buffer] == tokens_and_copies
        else:
            assert kind == "compute"
            del holds[buffer]
    assert not holds and started == sum(kv_lens)


# --- Seeded faults ------------------------------------------------------------------------------


def check_both_modes():
    """A block that is not full, an idle sequence, three blocks: both buffers are filled twice."""
    for mode in MODES:
        check_decode(mode, SMALL, [3, 0, 17])


def whole_pages(kv_len, block, block_tokens):
    """The last page is taken as full, and its tail as keys."""
    return jnp.minimum(cdiv(kv_len, SMALL.page_size) * SMALL.page_size - block * block_tokens, 8)


PAGE_COPY, READ_HEAD = streamed.page_copy, streamed.read_kv_head
WRONG_PARTS = {
    "page index off by one": (
        "page_copy",
        lambda refs, page, *rest: PAGE_COPY(refs, (page + 1) % refs.kv_cache.shape[0], *rest),
    ),
    "pages of a block change places": (
        "page_copy",
        lambda refs, page, row, slot, to, rows: PAGE_COPY(refs, page, row, slot, 4 - to, rows),
    ),
    "tail of the last page taken as keys": ("valid_tokens", whole_pages),
    "V tail not zeroed": ("zero_tail", lambda values, num_valid: values),
    "reads the other buffer": (
        "read_kv_head",
        lambda buffers, slot, h: READ_HEAD(buffers, 1 - slot, h),
    ),
    "next sequence is not the next live one": (
        "find_next_live",
        lambda kv_lens: jnp.arange(kv_lens.shape[0] + 1, dtype=jnp.int32),
    ),
    "first block of a sequence skipped": (
        "successor",
        lambda refs, sizes, s, block: (s, block + 1),
    ),
}
needs_deadlock_errors = pytest.mark.skipif(
    not interpreter.deadlocks_can_raise(), reason="this JAX's interpreter hangs on a missing signal"
)


@needs_deadlock_errors
def test_a_missing_wait_is_found():
    """One mode finds it: on_wait, where the bytes then never arrive."""
    check_on_wait = partial(check_decode, ON_WAIT, SMALL, [3, 0, 17])
    case = decode_case(SMALL, [3, 0, 17])
    attend = partial(streamed.attention, *case.arrays, case.batch, block_tokens=8)
    faults = mutants.list_faults(partial(jax.eval_shape, attend))  # to list, tracing is enough
    waits = [fault for fault in faults if fault.site.operation == "wait"]
    assert [fault.action for fault in waits] == ["drop", "other_semaphore"]
    verdicts = [mutants.verdict(check_on_wait, fault) for fault in waits]
    assert verdicts == ["numbers", "deadlock"]


@pytest.mark.full
@needs_deadlock_errors
def test_every_start_and_wait_is_needed():
    faults = mutants.list_faults(check_both_modes)
    assert len(faults) == 6  # two starts and a wait: dropped, and on the other semaphore
    verdicts = {str(fault): mutants.verdict(check_both_modes, fault) for fault in faults}
    assert "survived" not in verdicts.values(), verdicts
    check_both_modes()


@needs_deadlock_errors
@pytest.mark.full
@pytest.mark.parametrize("name", WRONG_PARTS)
def test_a_wrong_part_is_found(name):
    part = mutants.replaced(streamed, *WRONG_PARTS[name])
    assert mutants.verdict(check_both_modes, part) != "survived"


@needs_deadlock_errors
def test_overwriting_the_live_buffer_is_a_race():
    """Seen by the race detector alone: with on_wait the bytes come too late to do harm."""

    def copy_to_the_other_buffer(refs, page, page_row, slot, buffer_row, rows):
        return pltpu.make_async_copy(
            refs.kv_cache.at[page, pl.ds(page_row, rows)],
            refs.buffers.at[0, pl.ds(buffer_row, rows)],
            refs.sems.at[slot],
        )

    def read_it(buffers, slot, h):
        return READ_HEAD(buffers, 0, h)

    with (
        mutants.replaced(streamed, "read_kv_head", read_it),
        mutants.replaced(streamed, "page_copy", copy_to_the_other_buffer),
    ):
        check_decode(ON_WAIT, SMALL, [17])
        with pytest.raises(KernelFault, match="race"):
            check_decode(EAGER, SMALL, [17])


# --- The compiler ---------------------------------------------------------------------------------

LLAMA_3_8B = (32, 8, 128, 16)
LLAMA_3_70B_ON_8 = (8, 1, 128, 16)
SMOLLM2 = (9, 3, 64, 128)


FAST = [("v5e", "bfloat16", LLAMA_3_70B_ON_8)]
"""The other chips are asked by the tests of rung 6, which has all that rung 5 has."""
THOROUGH = itertools.product(
    ("v5e", "v6e", "tpu7x"), ("float32", "bfloat16"), (LLAMA_3_8B, LLAMA_3_70B_ON_8, SMOLLM2)
)


@pytest.mark.parametrize(
    "chip, dtype, heads",
    FAST + [pytest.param(*c, marks=pytest.mark.full) for c in THOROUGH if c not in FAST],
)
def test_compiles_for(chip, dtype, heads):
    num_q_heads, num_kv_heads, head_dim, page_size = heads
    cache = get_kv_cache_shape(4096, page_size, num_kv_heads, head_dim, dtype)
    result = assert_compiles(
        chip,
        streamed.paged_decode,
        jax.ShapeDtypeStruct((64, num_q_heads, head_dim), dtype),
        jax.ShapeDtypeStruct(cache, dtype),
        jax.ShapeDtypeStruct((64,), jnp.int32),
        jax.ShapeDtypeStruct((64 * 64,), jnp.int32),
        kwargs={"num_kv_heads": num_kv_heads, "interpret": False},
        keep_hlo=True,
    )
    assert not result.copies_of(jax.ShapeDtypeStruct(cache, dtype))
