"""Bad input: every kind is refused in words, before anything is written, and quickly."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpa.ragged import RaggedBatch, ref_ragged_paged_attention
from tests.batches import Shape, bits, make_case

pytestmark = pytest.mark.core

SHAPE = Shape(num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=8, max_num_seqs=4)
LENGTHS = [(1, 9), (4, 4), (3, 20)]  # one decode, two mixed


def entry(index, value):
    """Replace one entry of an array."""

    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return change


def replaced(value):
    return lambda array: value


# argument -> how it is spoilt, options of the call, words of the message
BAD = {
    "queries of two dimensions": ("queries", lambda a: a[0], {}, "queries has shape.*three dim"),
    "keys of four dimensions": ("keys", lambda a: a[None], {}, "keys has shape.*three dim"),
    "integer queries": (
        "queries",
        lambda a: np.ones(a.shape, np.int32),
        {},
        "queries has dtype int32",
    ),
    "float64 queries": (
        "queries",
        lambda a: np.ones(a.shape, np.float64),
        {},
        "queries has dtype float64.*at most 32 bits",
    ),
    "queries in a list": ("queries", lambda a: a.tolist(), {}, "queries is of type list.*asarray"),
    "no keys": ("keys", replaced(None), {}, "keys is of type NoneType"),
    "lengths in a list": ("kv_lens", lambda a: a.tolist(), {}, "kv_lens is of type list"),
    "distribution in a tuple": ("distribution", tuple, {}, "distribution is of type tuple"),
    "no heads": ("queries", lambda a: a[:, :0], {}, "no dimension of heads may be 0"),
    "keys unlike values": ("values", lambda a: a[:, :1], {}, "keys has shape.*values has"),
    "token counts differ": ("queries", lambda a: a[:5], {}, "5 tokens and keys has 40"),
    "head_dim differs": ("queries", lambda a: a[..., :32], {}, "head_dim 32 and keys has 64"),
    "heads do not divide": ("queries", lambda a: a[:, :3], {}, "must be a multiple"),
    "dtype unlike the cache": (
        "kv_cache",
        lambda a: a.astype(jnp.bfloat16),
        {},
        "keys has dtype float32.*kv_cache bfloat16.*Quantise",
    ),
    "cache of four dimensions": ("kv_cache", lambda a: a[0], {}, "kv_cache.*five dimensions"),
    "cache of other heads": (
        "kv_cache",
        lambda a: a[:, :, :3],
        {},
        r"for 2 KV heads.*must have \(19, 8, 4, 1, 128\), or \(19, 8, 2, 1, 128\) with share_lanes",
    ),
    "cache without pages": ("kv_cache", lambda a: a[:0], {}, "at least one page"),
    "kv_lens of int64": ("kv_lens", lambda a: a.astype(np.int64), {}, "kv_lens has dtype int64"),
    "page table of two dims": (
        "page_indices",
        lambda a: a.reshape(4, -1),
        {},
        "page_indices has.*one row of int32.*reshape",
    ),
    "no sequences": ("kv_lens", lambda a: a[:0], {}, "kv_lens is empty"),
    "cu_q_lens too short": ("cu_q_lens", lambda a: a[:-1], {}, r"cu_q_lens.*must be \(5,\)"),
    "distribution of two": ("distribution", lambda a: a[:2], {}, r"distribution.*\(3,\)"),
    "ragged page table": ("page_indices", lambda a: a[:-1], {}, "page_indices has 15 entries"),
    "empty page table": ("page_indices", lambda a: a[:0], {}, "page_indices has 0 entries"),
    "causal without kv mask": ("queries", None, dict(skip_kv_mask=True), "use_causal_mask=False"),
    "window of zero": ("queries", None, dict(sliding_window=0), "sliding_window must be positive"),
    "half a token": ("queries", None, dict(sliding_window=2.5), "a whole number of tokens.*2.5"),
    "window in words": ("queries", None, dict(sliding_window="all"), "sliding_window.*'all'"),
    "sm_scale left to us": ("queries", None, dict(sm_scale=None), "sm_scale is None.*one number"),
    "sm_scale of NaN": ("queries", None, dict(sm_scale=float("nan")), "sm_scale is nan.*finite"),
    "a scale a head": ("queries", None, dict(k_scale=np.ones(2)), r"k_scale has shape \(2,\).*one"),
    "soft cap in words": ("queries", None, dict(soft_cap="30"), "soft_cap is '30'.*one number"),
    "no such dtype": ("queries", None, dict(out_dtype="bf16"), "out_dtype is 'bf16'.*bfloat16"),
    "integer output": ("queries", None, dict(out_dtype="int8"), "out_dtype is 'int8'.*floating"),
    "soft cap of zero": ("queries", None, dict(soft_cap=0.0), "soft_cap must be positive"),
    "k_scale of zero": ("queries", None, dict(k_scale=0.0), "k_scale must be positive"),
    "q_scale below zero": ("queries", None, dict(q_scale=-1.0), "q_scale must be positive"),
    "v_scale of NaN": ("queries", None, dict(v_scale=float("nan")), "v_scale must be positive"),
    "chunk of zero": ("queries", None, dict(chunk_prefill_size=0), "chunk_prefill_size must be"),
    "half a chunk": ("queries", None, dict(chunk_prefill_size=2.5), "chunk_prefill_size must be"),
    "sinks in a list": (
        "queries",
        None,
        dict(attention_sink=[0.0] * 4),
        "attention_sink is of type",
    ),
    "infinite mask": ("queries", None, dict(mask_value=-np.inf), "mask_value must be a finite"),
    "sinks of other heads": (
        "queries",
        None,
        dict(attention_sink=np.ones(2, np.float32)),
        r"attention_sink has shape \(2,\).*must be \(4,\)",
    ),
    "distribution falls": ("distribution", replaced(np.array([2, 1, 3], np.int32)), {}, "i <= j"),
    "too many sequences": ("distribution", replaced(np.array([1, 1, 5], np.int32)), {}, "<= 4"),
    "negative distribution": ("distribution", entry(0, -1), {}, "distribution is"),
    "cu_q_lens starts late": ("cu_q_lens", entry(0, 1), {}, r"cu_q_lens\[0\] is 1"),
    "cu_q_lens falls": ("cu_q_lens", entry(2, 0), {}, "falls from 1 to 0 at sequence 1"),
    "more rows than queries": ("cu_q_lens", entry(3, 41), {}, "only 40 tokens"),
    "decode of three": (
        "distribution",
        replaced(np.array([3, 3, 3], np.int32)),
        {},
        "sequence 1 has q_len 4.*q_len at most 1",
    ),
    "chunk too long": (
        "distribution",
        replaced(np.array([1, 3, 3], np.int32)),
        dict(chunk_prefill_size=3),
        "sequence 1 has q_len 4.*chunk_prefill_size=3",
    ),
    "kv_len below q_len": ("kv_lens", entry(1, 3), {}, r"kv_lens\[1\] is 3.*4 new tokens"),
    "negative kv_len": ("kv_lens", entry(0, -1), {}, r"kv_lens\[0\] is -1"),
    "kv_len beyond the table": ("kv_lens", entry(2, 33), {}, r"kv_lens\[2\] is 33.*widen"),
    "page that does not exist": ("page_indices", entry(0, 27), {}, "sequence 0, page 0 is 27"),
    "negative page": ("page_indices", entry(9, -1), {}, "sequence 2, page 1 is -1"),
    "page written twice": (
        "page_indices",
        lambda a: entry(4, a[1])(a),
        {},
        "receives new tokens of sequence 0.*shared page may only be read",
    ),
    "page listed twice": (
        "page_indices",
        lambda a: entry(8, a[10])(a),
        {},
        "receives new tokens of sequence 2.*its pages 0 and 2.*List each page once",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_in_words_and_writes_nothing(kind):
    name, spoil, options, words = BAD[kind]
    case = make_case(SHAPE, LENGTHS)
    names = ["queries", "keys", "values", "kv_cache"]
    names += ["kv_lens", "page_indices", "cu_q_lens", "distribution"]
    arguments = dict(zip(names, (*case.arrays, *case.metadata), strict=True))
    before = bits(case.kv_cache).copy()
    if spoil is not None:
        arguments[name] = spoil(arguments[name])
    with pytest.raises(ValueError, match=f"(?s){words}"):
        ref_ragged_paged_attention(*arguments.values(), **options)
    np.testing.assert_array_equal(bits(case.kv_cache), before)


def test_page_size_must_hold_whole_packed_rows():
    case = make_case(Shape(2, 1, 64, page_size=6, dtype="float8_e4m3fn"), [(1, 3)])
    with pytest.raises(ValueError, match="page_size must be a multiple of 4"):
        ref_ragged_paged_attention(*case.arrays, *case.metadata)


def test_the_good_case_of_the_bad_ones_is_good():
    case = make_case(SHAPE, LENGTHS)
    ref_ragged_paged_attention(*case.arrays, *case.metadata)


def test_when_values_are_checked():
    case = make_case(SHAPE, LENGTHS)
    bad = (entry(1, 3)(case.metadata[0]), *case.metadata[1:])
    on_device = tuple(jnp.asarray(x) for x in bad)
    for metadata in (bad, on_device):  # the device is this very machine: reading is free
        with pytest.raises(ValueError, match="4 new tokens"):
            ref_ragged_paged_attention(*case.arrays, *metadata)
        ref_ragged_paged_attention(*case.arrays, *metadata, validate=False)
    jax.jit(ref_ragged_paged_attention)(*case.arrays, *bad)  # tracers have no values to check


def test_from_lengths_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="q_lens has 2 entries, kv_lens 1"):
        RaggedBatch.from_lengths([1, 1], [5], [[0]])
    with pytest.raises(ValueError, match="max_num_seqs is 1, but there are 2 sequences"):
        RaggedBatch.from_lengths([1, 1], [5, 5], [[0], [1]], max_num_seqs=1)
    with pytest.raises(ValueError, match="pages_per_seq is 1, but there are 2 pages"):
        RaggedBatch.from_lengths([1], [9], [[0, 1]], pages_per_seq=1)


def test_validation_takes_at_most_a_millisecond():
    """256 sequences x 256 pages; the best of seconds, since other work shares this machine."""
    num_pages = 256 * 256
    batch, _ = RaggedBatch.from_lengths(
        [1] * 256, [256 * 16] * 256, np.arange(num_pages).reshape(256, 256)
    )
    times_s = [np.inf]
    while min(times_s) > 1e-3 and len(times_s) <= 2000:
        start = time.perf_counter()
        batch.validate(num_tokens=256, num_pages=num_pages, page_size=16)
        times_s.append(time.perf_counter() - start)
    assert min(times_s) <= 1e-3, f"{min(times_s) * 1e3:.2f} ms"
