"""Pages that lie side by side are one copy: what is marked, what is copied, what comes out."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from rpa.kernel import page_table
from rpa.lab.batches import make_batch
from rpa.lab.copies.traffic import count
from rpa.paging import cdiv
from rpa.shapes import AttentionShape
from tests.batches import Shape, make_case
from tests.kernel_harness import ON_WAIT
from tests.kernel_runs import BLOCKS, attend

pytestmark = pytest.mark.core


def marked(row, num_pages, whole_pages):
    """`mark_contiguous` of one row, as one would say it."""
    result = list(row)
    for first in range(0, len(row), whole_pages):
        used = row[first : min(first + whole_pages, max(num_pages, first + 1))]
        if used == list(range(used[0], used[0] + len(used))):
            result[first] = ~row[first]
    return result


@pytest.mark.parametrize("whole_pages", [1, 2, 3, 8])
def test_marks(whole_pages):
    """Rows of runs of random lengths, cut off anywhere; what is not in use is any number."""
    rng = np.random.default_rng(whole_pages)
    rows, num_pages = [], []
    for _ in range(200):
        row = []
        while len(row) < 7:
            first = int(rng.integers(0, 50))
            row += range(first, first + int(rng.integers(1, 8)))
        num_pages.append(int(rng.integers(0, 8)))
        row[num_pages[-1] :] = rng.integers(0, 2**31 - 1, 8).tolist()
        rows.append(row[:7])
    got = np.asarray(page_table.mark_contiguous(jnp.array(rows), jnp.array(num_pages), whole_pages))
    expected = [marked(*pair, whole_pages) for pair in zip(rows, num_pages, strict=True)]
    np.testing.assert_array_equal(got, expected)
    assert (got < 0).any() and (whole_pages == 1 or (got[:, 0] >= 0).any())
    np.testing.assert_array_equal(page_table.page(got), rows)


def test_where_the_pages_lie_does_not_change_the_output():
    """The same values in other pages: bit-identical, with whole and part runs, old and new."""
    shape = Shape(2, 1, 64, page_size=8)  # other tests use the same compiled kernels
    lengths = [(1, 16), (1, 9), (1, 32), (1, 1), (13, 30), (8, 8)]
    outputs = []
    for adjacent in (False, True):
        case = make_case(shape, lengths, adjacent=adjacent)
        tables = np.asarray(case.batch.page_indices).reshape(shape.max_num_seqs, -1)
        tokens = np.random.default_rng(7).standard_normal((6, 4, *case.kv_cache.shape[1:]))
        for row, values, kv_len in zip(tables, tokens, case.batch.kv_lens, strict=True):
            live = cdiv(int(kv_len), shape.page_size)
            case.kv_cache[row[:live]] = values[:live]
        outputs.append(attend(case, ON_WAIT, **BLOCKS)[0])
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("page_size, of_shuffled", [(16, 64), (128, 8)])
def test_a_run_is_one_copy_of_the_same_bytes(page_size, of_shuffled):
    """Blocks of 1,024 tokens, 4 a sequence."""
    layer = AttentionShape.of("llama-3-8b", page_size=page_size)
    moved = {}
    for pages in ("shuffled", "adjacent"):
        batch = make_batch([(1, 4096)] * 3, page_size, pages)
        moved[pages] = count("kernel", batch, layer, d_block_sizes=(1, 1024, 1, 1024))
    shuffled, adjacent = moved["shuffled"], moved["adjacent"]
    assert shuffled.num_bytes == adjacent.num_bytes
    # The last block has its last token from elsewhere: a run, too.
    assert shuffled.num_copies - adjacent.num_copies == 3 * 4 * (of_shuffled - 1)
    sizes = Counter()
    for kind in adjacent.kinds.values():
        sizes.update(kind.sizes)
    token_bytes = 2 * 8 * 128 * 2
    assert sizes[1024 * token_bytes] == 3 * 3 and sizes[1023 * token_bytes] == 3
