"""The code path that only a chip takes, in the interpreter with race detection.

The interpreter reads no bitcasts and no strides, so `WordRows` reads by value there. Here its
matrix of words is emulated: every row that a strided load names is found by division, and read by
value. So the interpreter's race detection sees the rows that the chip touches, and no others, and a
wrong stride is wrong here, too.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from rpa import interpreter, ragged_paged_attention, selftest
from rpa.kernel import layout
from rpa.paging import LANES

pytestmark = pytest.mark.full  # minutes each: a row of words is a load of its own

ROWS = layout.WordRows
INIT, STRIDES = ROWS.__init__, ROWS._strides


class RowByRow:
    """`ref.bitcast(uint32).reshape(rows, 128)` of a buffer, as far as `WordRows` uses it."""

    def __init__(self, ref):
        self.ref = ref  # [slots, tokens, words, packing, lanes]

    def at(self, row):
        """The part of the buffer that is one row of 128 words: [packing, 128]."""
        _, tokens, words, _, lanes = self.ref.shape
        row, fold = divmod(row, lanes // LANES)
        row, word = divmod(row, words)
        slot, token = divmod(row, tokens)
        return self.ref.at[slot, token, word, :, pl.ds(fold * LANES, LANES)]

    def __getitem__(self, rows):
        found = [self.at(rows.start + i * rows.stride)[...] for i in range(rows.size)]
        return layout._value_words(jnp.stack(found))

    def __setitem__(self, rows, words):
        values = layout._word_values(words, self.ref.dtype)
        for i in range(rows.size):
            self.at(rows.start + i * rows.stride)[...] = values[i]


def _init(self, ref, interpret):
    INIT(self, ref, interpret)
    self._matrix = RowByRow(ref)


@pytest.fixture
def chip_path():
    jax.clear_caches()
    with mock.patch.object(ROWS, "__init__", _init):
        yield
    jax.clear_caches()


def with_races(*args, backend, **options):
    """The public function with copies that end at once, and two clocks."""
    params = interpreter.params(dma_execution_mode="eager", detect_races=True)
    return jax.block_until_ready(ragged_paged_attention(*args, backend=params, **options))


def verdict(path):
    """What is wrong with a path of the self-test, races included; "" if nothing is."""
    errors, limit, wrong, _ = selftest.check_path(path, False, with_races)
    if interpreter.races_found():
        return "a race"
    return wrong or ("" if max(errors.values()) <= limit else f"error {errors}")


FLOAT32, _, BFLOAT16, _, WIDE, _, _, FLOAT8, *_ = selftest.PATHS


@pytest.mark.parametrize("path", [BFLOAT16, FLOAT8, FLOAT32, WIDE], ids=str)
def test_the_path_of_the_chip_is_right_and_has_no_race(path, chip_path):
    assert verdict(path) == ""


def _next_word_row(self, slot, token, word, *rest):
    return STRIDES(self, slot, token, (word + 1) % self._words, *rest)


def _neighbours(self, slot, token, word, n, stride):
    return [
        pl.ds(rows.start, n, stride=self._folds)
        for rows in STRIDES(self, slot, token, word, n, stride)
    ]


def _other_buffer(self, slot, *rest):
    return STRIDES(self, 0 * slot, *rest)


@pytest.mark.parametrize("wrong", [_next_word_row, _neighbours, _other_buffer])
def test_a_wrong_stride_is_found(wrong, chip_path):
    with mock.patch.object(ROWS, "_strides", wrong):
        assert verdict(BFLOAT16)
