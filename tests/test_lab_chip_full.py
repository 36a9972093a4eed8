"""All that `rpa.lab.chip` proves: every tiny kernel, every path of rung 8, and its seeded faults.

A fault of the layout code that only the chip takes (word index, stride, order of rows, packing) is
invisible to the interpreter, which reads the same rows by value. Executed as compiled it is wrong.
"""

import contextlib
import platform
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from rpa import lab, ragged_paged_attention, selftest
from rpa.kernel import layout
from rpa.lab import chip
from rpa.lab.chip import conformance, hunt
from rpa.lab.chip.machine import MODELS
from tests.test_lab_chip import assert_right_as_compiled

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        lab.compile_versions()["libtpu"] is None,
        reason=f"libtpu is not installed ({platform.system()} {platform.machine()})",
    ),
]


@pytest.mark.parametrize("name", MODELS)
def test_every_tiny_kernel_and_every_operation_of_the_ladder(name):
    outcomes = list(conformance.all_outcomes(name))
    assert {o.kernel: o.wrong for o in outcomes if o.wrong} == {}
    ladder = {name: conformance.ladder_operations(name)}
    assert conformance.untested(outcomes, ladder) == {name: KNOWN_GAPS[name]}


KNOWN_GAPS = {
    "v5e": {"vcmp.ne.s16"},
    "v6e": {"vcmp.ne.s16"},
    "tpu7x": {"vcmp.ne.s16"},
}
"""By chip, operations of the ladder that no tiny kernel makes the compiler use there."""


FLOAT32 = selftest.PATHS[0]


def attention_on(name, dma="late"):
    """The public function, executed as compiled for a chip."""

    def attention(*args, **options):
        function = partial(ragged_paged_attention, **options | dict(backend="tpu", chip=name))
        return chip.run(function, *args, chip=name, dma=dma)

    return attention


def verdict(path, attention, on_tpu=True) -> str:
    """What is wrong with a path of the self-test, "" if nothing is."""
    errors, limit, wrong, _ = selftest.check_path(path, on_tpu, attention)
    return wrong or ("" if max(errors.values()) <= limit else f"error {errors}")


@pytest.mark.parametrize("dma", chip.DMA_ORDERS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("path", selftest.PATHS, ids=str)
def test_every_path_of_rung_8(path, name, dma):
    assert verdict(path, attention_on(name, dma)) == ""


OF_RUNG_7 = [path for path in selftest.PATHS if path.plain_too]


@pytest.mark.parametrize("dma", chip.DMA_ORDERS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("path", OF_RUNG_7, ids=str)
def test_rung_7(path, name, dma):
    def attention(*args, **options):
        return chip.run(partial(selftest.by_rung_7, **options), *args, chip=name, dma=dma)

    assert verdict(path, attention) == ""


@pytest.mark.parametrize("dma", chip.DMA_ORDERS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("path", [FLOAT32, *OF_RUNG_7], ids=str)
def test_the_learners_kernel(path, name, dma):
    assert_right_as_compiled(conformance.LEARNER, path, name, dma)


@pytest.mark.parametrize("name", MODELS)
def test_generated_problems(name):
    # Other numbers than those of the command's first run.
    assert [str(found) for found in hunt.hunt(20, name, first=1000) if found.wrong] == []


@pytest.mark.parametrize("name", MODELS)
def test_the_default_blocks_of_the_sweep(name):
    found = [
        finding
        for problem in hunt.default_block_problems(name)
        for finding in hunt.check_problem(problem, name, num_batches=2)
    ]
    assert [str(finding) for finding in found if finding.wrong] == []


# --- Seeded faults --------------------------------------------------------------------------------

ROWS = layout.WordRows
LOAD, STORE, STRIDES = ROWS.load, ROWS.store, ROWS._strides


def _on_chip(wrong, right):
    """The wrong method where values are bitcast on a chip; the interpreter never comes there."""
    return lambda self, *args: (right if self._matrix is None else wrong)(self, *args)


def _wrong_load(change):
    """`load` whose words are changed after they are loaded."""
    return "load", _on_chip(lambda self, *args: change(LOAD(self, *args)), LOAD)


def _wrong_store(change):
    def wrong(self, slot, token, word, words, *stride):
        STORE(self, slot, token, word, change(words), *stride)

    return "store", _on_chip(wrong, STORE)


def _neighbours(self, slot, token, word, n, stride):
    return [
        pl.ds(rows.start, n, stride=self._folds)
        for rows in STRIDES(self, slot, token, word, n, stride)
    ]


def _halves_not_skipped(self, slot, token, word, n, stride):
    stride = stride or self._words
    return [
        pl.ds(rows.start, n, stride=stride) for rows in STRIDES(self, slot, token, word, n, stride)
    ]


def _only_the_first_fold(self, slot, token, word, words, stride=None):
    rows = self._strides(slot, token, word, len(words), stride)[0]
    self._matrix[rows] = words[:, :128]


def _folds_reversed(self, slot, token, word, n, stride=None):
    strides = self._strides(slot, token, word, n, stride)[::-1]
    return jnp.concatenate([self._matrix[rows] for rows in strides], axis=1)


BFLOAT16, FLOAT8, WIDE = selftest.PATHS[5], selftest.PATHS[7], selftest.PATHS[4]
FAULTS = {
    "word index: the next word row": (
        "_strides",
        lambda self, slot, token, word, *rest: STRIDES(self, slot, token, (word + 1) % 2, *rest),
        BFLOAT16,
    ),
    "word index: tokens one word row apart": (
        "_strides",
        lambda self, slot, token, word, *rest: STRIDES(self, slot, 0, word + token, *rest),
        BFLOAT16,
    ),
    "word index: the other buffer": (
        "_strides",
        lambda self, slot, *rest: STRIDES(self, 0 * slot, *rest),
        FLOAT8,
    ),
    "stride: neighbours instead of every stride-th row": ("_strides", _neighbours, BFLOAT16),
    "stride: halves of wide rows not skipped": ("_strides", _halves_not_skipped, WIDE),
    "row order: every row at the next one's place": (
        *_wrong_load(lambda words: jnp.roll(words, 1, axis=0)),
        BFLOAT16,
    ),
    "row order: halves of wide rows exchanged": ("load", _on_chip(_folds_reversed, LOAD), WIDE),
    "row order: only half of a wide row stored": (
        "store",
        _on_chip(_only_the_first_fold, STORE),
        WIDE,
    ),
    "packing: values exchanged in loaded words": (
        *_wrong_load(lambda words: (words << 16) | (words >> 16)),
        BFLOAT16,
    ),
    "packing: values exchanged in stored words": (
        *_wrong_store(lambda words: (words << 16) | (words >> 16)),
        WIDE,
    ),
    "packing: bytes turned in loaded words": (
        *_wrong_load(lambda words: (words << 8) | (words >> 24)),
        FLOAT8,
    ),
}
"""By name: the method of `WordRows`, what replaces it, and the path that takes it."""


@contextlib.contextmanager
def fault(name):
    """Kernels traced inside have the fault."""
    method, wrong, _ = FAULTS[name]
    jax.clear_caches()
    try:
        with mock.patch.object(ROWS, method, wrong):
            yield
    finally:
        jax.clear_caches()


@pytest.mark.parametrize("name", FAULTS)
def test_a_layout_fault_is_found_as_compiled(name):
    path = FAULTS[name][2]
    with fault(name):
        try:
            found = verdict(path, attention_on("v5e"))
        except chip.KernelFault as error:
            found = str(error)
    assert found


@pytest.mark.parametrize("name", FAULTS)
def test_a_layout_fault_is_invisible_to_the_interpreter(name):
    with fault(name):
        assert verdict(FAULTS[name][2], ragged_paged_attention, on_tpu=False) == ""


def test_without_a_fault_these_paths_are_right():
    for path in (BFLOAT16, FLOAT8, WIDE):
        assert verdict(path, attention_on("v5e")) == ""
