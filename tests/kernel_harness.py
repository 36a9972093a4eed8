"""How every kernel is tested off-TPU: made-up batches full of poison, run in two interpreter modes.

One mode alone proves nothing. `on_wait` moves a copy's bytes as late as it may, so a missing wait
reads NaN; it does not see a copy that overwrites a live buffer. `eager` with race detection sees
both as a race of two clocks, and is blind to a buffer that is reused before its write-back was
awaited but after it happened. So a kernel has to be right in both, number by number.
"""

import contextlib
import io
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rpa import compat, dense, paging


@dataclass(frozen=True)
class Mode:
    """One way of running the interpreter; `params` goes to a kernel's `interpret` argument."""

    name: str
    dma_execution_mode: str
    detect_races: bool

    @property
    def params(self):
        return compat.interpreter_params(
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
        compat.reset_interpreter()
        raise KernelFault("crash", str(error)[-2000:]) from error
    if compat.races_found() or "RACE DETECTED" in printed.getvalue():
        compat.reset_interpreter()
        raise KernelFault("race", printed.getvalue()[:2000])
    if "non-zero count" in printed.getvalue():
        raise KernelFault("leftover", printed.getvalue()[:2000])
    return results


@dataclass(frozen=True)
class Shape:
    """Everything about a batch that a compiled kernel depends on: one Shape, one compilation."""

    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 8
    num_pages: int = 24
    max_num_seqs: int = 4
    pages_per_seq: int = 6
    max_num_tokens: int = 32
    dtype: str = "float32"

    @property
    def kv_dtype(self):
        return np.dtype(getattr(ml_dtypes, self.dtype, None) or self.dtype)


@dataclass(frozen=True)
class Case:
    """A ragged batch with its cache, and what must come out; all NumPy.

    queries, keys, values: [max_num_tokens, heads, head_dim]; padding rows are NaN.
    kv_cache: the layout of `rpa.paging`; only what the sequences own is finite.
    kv_lens, page_indices, cu_q_lens, distribution: as in RaggedBatch; unused entries are garbage.
    history: per sequence (keys, values) of all kv_len tokens, for the oracle.
    """

    shape: Shape
    q_lens: tuple
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    kv_cache: np.ndarray
    kv_lens: np.ndarray
    page_indices: np.ndarray
    cu_q_lens: np.ndarray
    distribution: np.ndarray
    history: tuple

    @property
    def metadata(self):
        return self.kv_lens, self.page_indices, self.cu_q_lens, self.distribution

    @cached_property
    def batch(self):
        from rpa.ragged import RaggedBatch

        return RaggedBatch(*self.metadata)

    @property
    def table(self):
        """The page table, i32[max_num_seqs, pages_per_seq]."""
        return self.page_indices.reshape(self.shape.max_num_seqs, -1)

    def rows(self, s):
        """Which rows of `queries` are the new tokens of sequence s."""
        return slice(int(self.cu_q_lens[s]), int(self.cu_q_lens[s]) + self.q_lens[s])

    def expected_cache(self):
        """The cache after the new tokens were stored, every other bit as it was."""
        cache = self.kv_cache.copy()
        packed = np.asarray(paging.pack_kv(jnp.asarray(self.keys), jnp.asarray(self.values)))
        for s, q_len in enumerate(self.q_lens):
            for t in range(q_len):
                position = int(self.kv_lens[s]) - q_len + t
                page = self.table[s, position // self.shape.page_size]
                cache[page, position % self.shape.page_size] = packed[self.cu_q_lens[s] + t]
        return cache

    def truth(self, **options) -> dense.Truth:
        """Output and scale of every row in float64; zeros in padding rows. See `dense.oracle`."""
        output = np.zeros(self.queries.shape)
        scale = np.ones(self.queries.shape[:2])
        for s, q_len in enumerate(self.q_lens):
            if q_len:
                rows = self.rows(s)
                keys, values = self.history[s]
                output[rows], scale[rows] = dense.oracle(
                    self.queries[rows], keys, values, **options
                )
        return dense.Truth(output, scale)


def make_case(shape, q_lens, kv_lens, *, seed=0, num_decode=None, num_chunked=0, q_std=1.0):
    """A batch of the given lengths with random values, shuffled pages and poison everywhere else.

    Args:
        shape: the Shape; the same Shape compiles once for all lengths.
        q_lens, kv_lens: per sequence; zero is an idle slot.
        num_decode: how many sequences are in the decode range; None: as many as have q_len <= 1
            before the first longer one.
        num_chunked: how many of the next ones are in the chunked prefill range.
        q_std: standard deviation of the queries; 4 gives scores that a bad softmax overflows on.
    """
    rng = np.random.default_rng(seed)
    num_seqs, dtype = len(q_lens), shape.kv_dtype
    if num_decode is None:
        longer = [s for s, q_len in enumerate(q_lens) if q_len > 1]
        num_decode = longer[0] if longer else num_seqs
    history = tuple(
        tuple(_normal(rng, (kv_len, shape.num_kv_heads, shape.head_dim), dtype) for _ in "kv")
        for kv_len in kv_lens
    )
    table = _shuffled_pages(rng, shape, kv_lens)
    cu_q_lens = np.full(shape.max_num_seqs + 1, -7, np.int32)
    cu_q_lens[: num_seqs + 1] = np.cumsum([0, *q_lens])
    lens = np.full(shape.max_num_seqs, 1 << 30, np.int32)
    lens[:num_seqs] = kv_lens
    tokens = (shape.max_num_tokens, shape.num_kv_heads, shape.head_dim)
    keys, values = np.full(tokens, np.nan, dtype), np.full(tokens, np.nan, dtype)
    queries = np.full((tokens[0], shape.num_q_heads, tokens[2]), np.nan, dtype)
    for s, q_len in enumerate(q_lens):
        rows = slice(cu_q_lens[s], cu_q_lens[s + 1])
        queries[rows] = _normal(rng, (q_len, shape.num_q_heads, shape.head_dim), dtype, q_std)
        keys[rows], values[rows] = (x[len(x) - q_len :] for x in history[s])
    return Case(
        shape=shape,
        q_lens=tuple(q_lens),
        queries=queries,
        keys=keys,
        values=values,
        kv_cache=_cache_before(shape, history, q_lens, table),
        kv_lens=lens,
        page_indices=table.reshape(-1),
        cu_q_lens=cu_q_lens,
        distribution=np.array([num_decode, num_decode + num_chunked, num_seqs], np.int32),
        history=history,
    )


def check_output(output, case, *, tolerance, **options):
    """Both measures of difference against float64; padding rows exactly zero, nothing NaN."""
    output = np.asarray(output).astype(np.float64)
    used = sum(case.q_lens)
    assert np.isfinite(output).all(), f"NaN or inf in rows {_bad_rows(~np.isfinite(output))}"
    assert not output[used:].any(), f"padding rows {_bad_rows(output[used:] != 0, used)} not zero"
    truth = case.truth(**options)
    relative, scaled = dense.relative_error(output, truth), dense.scaled_error(output, truth)
    assert relative <= tolerance, f"relative RMS difference {relative:.2e} > {tolerance:.1e}"
    assert scaled <= 4 * tolerance, f"worst row's difference {scaled:.2e} > {4 * tolerance:.1e}"


def check_cache(kv_cache, case):
    """The cache holds the new tokens exactly, and every other bit is as it was."""
    after, expected = bits(kv_cache), bits(case.expected_cache())
    wrong = np.argwhere((after != expected).any(axis=(2, 3, 4)))
    assert not len(wrong), f"(page, row) with wrong bits: {wrong[:8].tolist()} of {len(wrong)}"


def bits(array):
    """The array as unsigned integers: NaN equals itself, and -0.0 is not 0.0."""
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


TOLERANCE = {"float32": 2e-6, "bfloat16": 2.5e-3}
"""Relative RMS difference to float64 that is allowed; bfloat16 with a bfloat16 output."""


def _normal(rng, size, dtype, std=1.0):
    return (rng.standard_normal(size) * std).astype(dtype)


def _shuffled_pages(rng, shape, kv_lens):
    """A page table with random pages, none used twice; unused entries are far out of range."""
    free = rng.permutation(shape.num_pages).astype(np.int32)
    garbage = rng.choice(np.array([-(1 << 31), -1, 1 << 30, (1 << 31) - 1], np.int32), 1)[0]
    table = np.full((shape.max_num_seqs, shape.pages_per_seq), garbage, np.int32)
    for s, kv_len in enumerate(kv_lens):
        live = -(-kv_len // shape.page_size)
        table[s, :live], free = free[:live], free[live:]
        assert (table[s, :live] >= 0).all() and live <= shape.pages_per_seq, "Shape has no room"
    return table


def _cache_before(shape, history, q_lens, table):
    """A cache of NaN in which the sequences' old tokens are stored."""
    cache_shape = paging.get_kv_cache_shape(
        shape.num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim, shape.kv_dtype
    )
    cache = np.full(cache_shape, np.nan, shape.kv_dtype)
    for s, (keys, values) in enumerate(history):
        packed = np.asarray(paging.pack_kv(jnp.asarray(keys), jnp.asarray(values)))
        for position in range(len(keys) - q_lens[s]):
            page, row = divmod(position, shape.page_size)
            cache[table[s, page], row] = packed[position]
    return cache


def _bad_rows(wrong, first=0):
    return (first + np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1)))[:8].tolist()
