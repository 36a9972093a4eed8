"""Every rung of the ladder gives the same answer under the one signature, and counts honestly."""

import jax
import numpy as np
import pytest

from rpa import ladder, paging
from rpa.dense import relative_error, scaled_error
from rpa.ladder import LADDER
from rpa.ragged import oracle_ragged
from tests.batches import Shape, bits, make_case

pytestmark = pytest.mark.core

SHAPE = Shape(num_q_heads=6, num_kv_heads=2, head_dim=64, page_size=8, num_tokens=160)
BATCHES = {
    "mixed": [(1, 9), (0, 5), (1, 8), (7, 7), (0, 0), (9, 17)],
    "decode": [(1, 1), (1, 8), (1, 9), (1, 32)],
    "prompts": [(32, 32), (8, 8), (7, 31)],
    "nothing": [],
}


# The kernels have tests of their own; here one batch shows that they answer the same question.
PAIRS = [(rung, name) for rung in LADDER for name in BATCHES if not rung.is_kernel]
PAIRS += [(rung, "decode" if rung.max_q_len else "mixed") for rung in LADDER if rung.is_kernel]


@pytest.mark.parametrize("rung, name", PAIRS, ids=lambda value: getattr(value, "name", value))
def test_every_rung_answers_the_same_question(rung, name):
    case = make_case(SHAPE, BATCHES[name], share=True)
    assert rung.refuses(case.batch) is None
    attention = jax.jit(rung.attention_for(case.batch))
    output, cache = attention(*case.arrays, case.batch, sm_scale=0.125)
    np.testing.assert_array_equal(bits(cache), case.expected_cache())
    truth = oracle_ragged(case.queries, cache, case.batch, SHAPE.num_kv_heads, sm_scale=0.125)
    assert relative_error(output, truth) <= 2e-6
    assert scaled_error(output, truth) <= 2e-6


def test_pages_read_are_counted_as_they_are_read(monkeypatch):
    """Rungs 2 and 3 visit a page twice: once for its keys, once for its values."""
    visits = []

    def counting_unpack(packed, *sizes):
        jax.debug.callback(lambda: visits.append(1))
        return unpack(packed, *sizes)

    unpack = paging.unpack_kv
    monkeypatch.setattr(paging, "unpack_kv", counting_unpack)
    case = make_case(SHAPE, [(1, 9), (0, 5), (1, 8), (30, 31)])
    for rung in LADDER[1:3]:
        visits.clear()
        jax.clear_caches()
        rung.attention_for(case.batch)(*case.arrays, case.batch, sm_scale=0.125)
        jax.effects_barrier()
        expected = rung.kv_tokens_read(case.batch, SHAPE.page_size)
        assert len(visits) / 2 * SHAPE.page_size == expected, rung.name
    jax.clear_caches()


def test_a_rung_that_cannot_run_a_batch_says_why_and_can_run_its_decode_part():
    batch = make_case(SHAPE, BATCHES["mixed"]).batch
    streamed = next(rung for rung in LADDER if rung.name == "streamed")
    assert streamed.refuses(batch) == "takes at most 1 new token per sequence, the batch has 9"
    assert streamed.refuses(ladder.decode_part(batch)) is None


def test_what_each_rung_touches_on_a_batch_that_a_person_can_count():
    """Lengths (q, kv) of (1, 9), (1, 8), (7, 7) with pages of 8; room for 6 sequences."""
    batch = make_case(SHAPE, [(1, 9), (1, 8), (7, 7)]).batch
    assert ladder.kv_tokens_needed(batch) == 9 + 8 + 7
    touched = {r.name: (r.kv_tokens_read(batch, 8), r.query_rows(batch)) for r in LADDER[:3]}
    assert touched == {
        "dense": (6 * 9, 6 * 7),
        "paging": (16 + 8 + 8, 6 * 7),
        "ragged": (16 + 8 + 8, 1 + 1 + 64),
    }
