"""How every kernel is tested off-TPU: batches full of poison, run in two interpreter modes.

One mode alone proves nothing. `on_wait` moves a copy's bytes as late as it may, so a missing wait
reads NaN; it does not see a copy that overwrites a live buffer. `eager` with race detection sees
both as a race of two clocks, and is blind to a buffer that is reused before its write-back was
awaited but after it happened. So a kernel has to be right in both, number by number.
"""

import contextlib
import io
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from rpa import dense, interpreter, lab
from rpa.ragged import oracle_ragged
from tests.batches import bits


@dataclass(frozen=True)
class Mode:
    """One way of running the interpreter; `params` goes to a kernel's `interpret` argument."""

    name: str
    dma_execution_mode: str
    detect_races: bool

    @property
    def params(self):
        return interpreter.params(
            dma_execution_mode=self.dma_execution_mode, detect_races=self.detect_races
        )

    def __str__(self):
        return self.name


ON_WAIT = Mode("on_wait", "on_wait", False)
EAGER = Mode("eager_races", "eager", True)
MODES = (ON_WAIT, EAGER)


class KernelFault(AssertionError):
    """What the interpreter holds against a kernel; `kind` is "race", "leftover" or "crash"."""

    def __init__(self, kind, text):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def run(fn, *args, **kwargs):
    """Call a kernel in the interpreter and return NumPy arrays, or raise KernelFault.

    Races and semaphores that are not back at zero when the kernel ends are only printed by the
    interpreter, from other threads; here they fail the test.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            results = jax.block_until_ready(fn(*args, **kwargs))
            results = jax.tree.map(np.asarray, results)
            jax.effects_barrier()
    except Exception as error:
        interpreter.reset()
        raise KernelFault("crash", str(error)[-2000:]) from error
    if interpreter.races_found() or "RACE DETECTED" in printed.getvalue():
        interpreter.reset()
        raise KernelFault("race", printed.getvalue()[:2000])
    if "non-zero count" in printed.getvalue():
        raise KernelFault("leftover", printed.getvalue()[:2000])
    return results


TOLERANCE = {"float32": 2e-6, "bfloat16": 2.5e-3}
"""Relative RMS difference to float64 that is allowed; bfloat16 with a bfloat16 output."""


def check(case, output, kv_cache, **options):
    """Hold a kernel's results against the float64 oracle: all rows, and every bit of the cache.

    Args:
        case: a `tests.batches.Case`.
        output: [num_tokens, num_q_heads, head_dim]; padding rows have to be zero.
        kv_cache: the cache after the call.
        **options: of `rpa.ragged.oracle_ragged` (sm_scale, ...).
    """
    wrong = np.argwhere((bits(kv_cache) != case.expected_cache()).any(axis=(2, 3, 4)))
    assert not len(wrong), f"(page, slot) with wrong bits: {wrong[:8].tolist()} of {len(wrong)}"
    truth = oracle_ragged(case.queries, kv_cache, case.batch, case.shape.num_kv_heads, **options)
    check_output(output, truth, tolerance=TOLERANCE[case.shape.dtype])


def check_output(output, truth, *, tolerance):
    """Both measures of difference of rpa.dense are within the tolerance, and nothing is NaN."""
    output = np.asarray(output).astype(np.float64)
    assert np.isfinite(output).all(), f"rows with NaN or inf: {_rows(~np.isfinite(output))}"
    unseen = ~truth.output.any(axis=(1, 2))
    assert not output[unseen].any(), f"padding rows not zero: {_rows(output[unseen] != 0)}"
    relative, scaled = dense.relative_error(output, truth), dense.scaled_error(output, truth)
    assert relative <= tolerance, f"relative RMS difference {relative:.2e} > {tolerance:.1e}"
    # One row has no other rows to average its rounding errors with.
    assert scaled <= 4 * tolerance, f"worst row's difference {scaled:.2e} > {4 * tolerance:.1e}"


def assert_compiles(chip, fn, *args, **options):
    """The TPU compiler takes it for a chip that is not there; returns the CompileResult.

    Skips, with the reason, where there is no libtpu or it does not know the chip.
    """
    result = lab.compile_for(chip, fn, *args, **options)
    if result.error_kind in ("no libtpu", "unknown chip", "old libtpu"):
        pytest.skip(result.error)
    assert result.ok, f"{chip}: {result.error}"
    return result


def _rows(wrong):
    return np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))[:8].tolist()
