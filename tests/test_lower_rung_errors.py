"""Bad calls of rungs 4 to 6: refused in words, before the kernel runs and with the cache as it was.

An exception inside of an interpreted kernel is a page of traceback, and leaves the interpreter
half-way; on a TPU a page that does not exist is read without a word.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from rpa import fused, streamed, tiled
from rpa.ragged import RaggedBatch
from tests.batches import bits

pytestmark = pytest.mark.core

RUNGS = {"tiled": tiled.attention, "streamed": streamed.attention, "fused": fused.attention}


def good():
    """Arguments of a decode step: 2 sequences, 4 query and 2 KV heads of 64, 6 pages of 8."""
    batch, _ = RaggedBatch.from_lengths([1, 1], [9, 3], [[0, 1], [2]])
    queries, new = np.ones((2, 4, 64), np.float32), np.ones((2, 2, 64), np.float32)
    cache = np.ones((6, 8, 4, 1, 128), np.float32)
    return {"queries": queries, "keys": new, "values": new, "kv_cache": cache, "batch": batch}


def with_pages(*pages):
    def change(batch):
        indices = np.array(pages, np.int32)
        return RaggedBatch(batch.kv_lens, indices, batch.cu_q_lens, batch.distribution)

    return change


# argument -> how it is spoilt, words of the message
BAD = {
    "keys unlike the cache": ("keys", lambda a: a.astype(jnp.bfloat16), "keys has dtype bfloat16"),
    "cache of other heads": ("kv_cache", lambda a: a[:, :, :3], "for 2 KV heads of 64"),
    "heads do not divide": ("queries", lambda a: a[:, :3], "must be a multiple"),
    "page that does not exist": ("batch", with_pages(0, 9, 2, 0), "page 1 is 9"),
    "page written twice": ("batch", with_pages(0, 1, 1, 0), "receives new tokens of sequence 0"),
    "queries in a list": ("queries", lambda a: a.tolist(), "queries is of type list"),
}


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("kind", BAD)
def test_bad_calls_are_refused_in_words_and_write_nothing(rung, kind):
    name, spoil, words = BAD[kind]
    arguments = good()
    before = bits(arguments["kv_cache"]).copy()
    with pytest.raises(ValueError, match=words):
        RUNGS[rung](**arguments | {name: spoil(arguments[name])})
    np.testing.assert_array_equal(bits(arguments["kv_cache"]), before)


BAD_DECODES = {
    "page table of two dimensions": ({"page_indices": np.zeros((2, 2), np.int32)}, "flatten"),
    "ragged page table": ({"page_indices": np.zeros(3, np.int32)}, "for each of the 2 sequences"),
    "other lengths": ({"kv_lens": np.ones(3, np.int32)}, r"kv_lens has shape \(3,\)"),
    "heads do not divide": ({"num_kv_heads": 3}, "multiple of num_kv_heads=3"),
    "cache of other heads": ({"num_kv_heads": 1}, "for 1 KV heads of 64"),
    "block of half a page": ({"block_tokens": 4}, "multiple of page_size 8"),
}


@pytest.mark.parametrize("kind", BAD_DECODES)
def test_bad_decodes_are_refused_in_words(kind):
    changes, words = BAD_DECODES[kind]
    arguments = good()
    call = {"kv_lens": np.array([9, 3]), "page_indices": np.zeros(4, np.int32), "num_kv_heads": 2}
    with pytest.raises(ValueError, match=words):
        streamed.paged_decode(arguments["queries"], arguments["kv_cache"], **call | changes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_q": 0}, "block_q is 0"),
        ({"block_kv": -1}, "block_kv is -1"),
        ({"block_kv": 2.5}, "block_kv is 2.5"),
    ],
)
def test_bad_blocks_are_refused_in_words(options, words):
    q, kv = jnp.ones((3, 4, 64)), jnp.ones((5, 2, 64))
    with pytest.raises(ValueError, match=words):
        tiled.flash_attention(q, kv, kv, **options)


def test_keys_in_another_dtype_are_refused_in_words():
    q, kv = jnp.ones((3, 4, 64)), jnp.ones((5, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="q has dtype float32, k bfloat16"):
        tiled.flash_attention(q, kv, kv)
