"""The inner loop on the bench: every step computes the same, and the record says what it should."""

import jax.numpy as jnp
import numpy as np
import pytest

from rpa import chips
from rpa.check.chapters import ablation
from rpa.check.chapters.chapter09 import MOST_BUNDLES
from rpa.check.errors import KernelFault
from rpa.lab.schedule import inner_loop
from rpa.lab.schedule.recorded import recorded, recorded_step
from rpa.lab.schedule.schedule import NoSchedule

CHIPS = ("v5e", "v6e", "tpu7x")
NUM_TOKENS = 16


def expected(q, kv):
    """Attention of every head of every sequence, in float64."""
    q, kv = np.asarray(q, np.float64), np.asarray(kv, np.float64)
    s = np.einsum("nhgd,nthd->nhgt", q, kv[:, :, :8, 0])
    weights = np.exp2(s - s.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("nhgt,nthd->nhgd", weights, kv[:, :, :8, 1])


@pytest.mark.parametrize("step", inner_loop.STEPS)
def test_every_step_computes_the_same(step):
    q, kv = inner_loop.shapes(step)
    rng = np.random.default_rng(8)
    q = jnp.asarray(0.1 * rng.standard_normal(q.shape), q.dtype)
    kv = rng.standard_normal((kv.shape[0], NUM_TOKENS, *kv.shape[2:]))
    kv[:, :, 8:] = np.nan  # what only keeps the distance is never read
    kv = jnp.asarray(kv, jnp.bfloat16)
    output = inner_loop.attend(q, kv, step=step, interpret=None)
    assert np.abs(np.asarray(output) - expected(q, kv)).max() < 2e-2


def test_each_recorded_step_is_shorter_and_the_last_is_shorter_than_hbm_takes():
    for chip in CHIPS:
        bundles = [
            recorded_step(chip, name).bundles / step.num_seqs
            for name, step in inner_loop.STEPS.items()
        ]
        c = chips.chip(chip)
        hbm_cycles = c.cycles(inner_loop.NUM_TOKENS * 4096 / c.hbm_bytes_per_s)
        assert bundles == sorted(bundles, reverse=True)
        assert bundles[-1] < hbm_cycles


def test_reordering_the_products_changes_no_slot_of_the_matrix_unit():
    one, two = (recorded_step("v5e", step) for step in ("odd stride", "two heads ahead"))
    assert [one.slots[unit] for unit in ("MATMUL", "MATPUSH")] == [
        two.slots[unit] for unit in ("MATMUL", "MATPUSH")
    ]


def no_dump(*args, **kwargs):
    raise NoSchedule("error", "ValueError: no dump of inner_loop (this libtpu may not write any)")


def refuses(*args, **kwargs):
    raise NoSchedule("unsupported", "Mosaic failed: a slice that it does not know")


def test_without_a_schedule_the_order_of_the_products_finds_the_recorded_one(monkeypatch, capsys):
    monkeypatch.setattr(ablation, "schedule_for", no_dump)
    bundles, how = ablation.bundles_of(inner_loop.in_turn, "v5e")
    assert bundles == recorded("orders")[0] > MOST_BUNDLES
    assert "recorded" in how and "Not compiled" in capsys.readouterr().out


def test_what_the_compiler_refuses_is_the_learners_to_mend(monkeypatch):
    monkeypatch.setattr(ablation, "schedule_for", refuses)
    with pytest.raises(KernelFault, match="compiler refuses your kernel: Mosaic failed"):
        ablation.bundles_of(inner_loop.in_turn, "v5e")


@pytest.mark.parametrize("num_ahead", [1, 2, 7])
def test_the_order_of_a_kernel_is_read_from_its_trace(num_ahead):
    def kernel(q_ref, kv_ref, out_ref, load):
        inner_loop.ahead(q_ref, kv_ref, out_ref, load, num_ahead=num_ahead)

    assert ablation.heads_ahead(ablation.products(kernel)) == num_ahead
