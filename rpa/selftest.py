"""The self-test: rungs 7 and 8 on the device that is here, against rung 3 on the host.

Bitcasts and strided loads run on a chip only; the interpreter reads the same rows by value. So
what the tests prove off-TPU says nothing about these paths, and a compiler of another version may
get one of them wrong. `python -m rpa doctor --selftest` takes every one of them:

    loads       of 32-bit words: one row of 128 lanes per head (head_dim 64 and 128) and two (256);
    packing     1 (float32), 2 (bfloat16) and 4 (float8) values in a word, in queries, K and V;
    kernels     decode (a query block of 1), chunked prefill and mixed (blocks of many);
    stores      of new tokens from HBM to HBM: the cache must be right to the last bit;
    one DMA     that some versions of libtpu get wrong (jax issue 39744).

Rung 7 reads K and V by value, so it has one path per packing: those marked `plain_too`.

Without a TPU `rpa.lab.chip` executes what the compiler makes of all these paths for `CHIP`. Where
that cannot be, a few of the paths run through the interpreter, which tests the self-test and the
rest of the kernel. The output says which of the three it was.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import compat, interpreter, plain
from rpa.kernel import ragged_paged_attention
from rpa.lab import chip as lab_chip
from rpa.paging import cdiv, get_kv_cache_shape, pack_kv, unpack_kv
from rpa.ragged import RaggedBatch, ref_ragged_paged_attention

PAGE_SIZE = 16

LENGTHS = {
    "decode": [(1, 1), (0, 20), (1, 83), (1, 32)],
    "chunk": [(24, 90), (9, 17)],
    "mixed": [(40, 40), (3, 70)],
}
"""(q_len, kv_len) of the sequences of each kernel: an idle slot, parts of pages, many blocks."""

NUM_TOKENS, CHUNK_PREFILL_SIZE = 82, 24
"""Rows of queries, three of them padding; the longest chunk."""

BLOCKS = {
    "d_block_sizes": (1, 64, 1, 32),
    "p_block_sizes": (16, 64, 8, 32),
    "m_block_sizes": (16, 64, 8, 32),
}

CHIP = "v5e"
"""For this one the kernels are compiled where there is no TPU."""

LIMITS = {"float32": 6e-6, "bfloat16": 5e-3, "float8_e4m3fn": 2e-2, "float8_e5m2": 2e-2}
"""Allowed error by dtype of the cache: twice what the tests allow for a whole batch, because one
row of an output has no others to average its rounding with."""


@dataclasses.dataclass(frozen=True)
class Path:
    """A way through the chip's memory, with the smallest problem that takes it.

    Attributes:
        heads: num_q_heads, num_kv_heads.
        head_dim: 64, 128 or 256.
        q_dtype, kv_dtype: of the queries, and of the cache.
        covers: what is special about it.
        options: of the public function.
        off_tpu: whether it also runs where there is no TPU, through the interpreter.
        plain_too: whether rung 7 takes it as well.
    """

    heads: tuple
    head_dim: int
    q_dtype: str
    kv_dtype: str
    covers: str
    options: dict = dataclasses.field(default_factory=dict)
    off_tpu: bool = False
    plain_too: bool = False

    def __str__(self):
        q, kv = self.heads
        return f"{q}/{kv} heads of {self.head_dim}, q {self.q_dtype}, KV {self.kv_dtype}"


PATHS = (
    Path((2, 1), 64, "float32", "float32", "whole words, padded lanes", off_tpu=True),
    Path((8, 4), 256, "float32", "float32", "whole words, two rows of lanes per head"),
    Path((9, 3), 64, "bfloat16", "bfloat16", "2 values per word, padded group", {}, True, True),
    Path((32, 8), 128, "bfloat16", "bfloat16", "4 heads in one product (Llama 3 8B)"),
    Path((8, 1), 256, "bfloat16", "bfloat16", "2 values per word, two rows of lanes per head"),
    Path(
        (8, 2), 128, "bfloat16", "bfloat16", "float32 output of bfloat16", {"out_dtype": "float32"}
    ),
    Path(
        (3, 3), 64, "bfloat16", "float8_e4m3fn", "4 values per word, padded heads", {"k_scale": 0.5}
    ),
    Path(
        (4, 2), 128, "bfloat16", "float8_e5m2", "queries rounded too", {"q_scale": 0.1}, True, True
    ),
    Path((8, 4), 256, "bfloat16", "float8_e4m3fn", "4 values per word, two rows of lanes per head"),
    Path((4, 2), 128, "bfloat16", "bfloat16", "sliding window", {"sliding_window": 20}),
)
"""Every packing with every width of a head's load; the window starts loads inside a sequence."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The arrays of one path, on the host."""

    queries: np.ndarray  # [num_tokens, num_q_heads, head_dim]
    keys: np.ndarray  # [num_tokens, num_kv_heads, head_dim]
    values: np.ndarray  # [num_tokens, num_kv_heads, head_dim]
    kv_cache: np.ndarray  # NaN wherever no cached token lives
    batch: RaggedBatch
    expected_cache: np.ndarray  # with the new tokens in it

    @property
    def metadata(self):
        b = self.batch
        return b.kv_lens, b.page_indices, b.cu_q_lens, b.distribution


@dataclasses.dataclass(frozen=True)
class Result:
    """What one path gave.

    Attributes:
        path, covers: in words.
        errors: {"decode": ..., "chunk": ..., "mixed": ...}, the largest relative RMS difference of
            one (token, head) to the reference.
        limit: what the errors may be.
        wrong: what is wrong, in words; "" if nothing is.
        fix: what to do, or "".
        seconds: compilation included.
    """

    path: str
    covers: str
    errors: dict
    limit: float
    wrong: str
    fix: str
    seconds: float


def run(on_tpu, attention=ragged_paged_attention):
    """Run the self-test; yields one `Result` after the other.

    Args:
        on_tpu: whether to compile for the attached TPU, all paths; otherwise the few marked
            `off_tpu` run through the interpreter.
        attention: what is tested, with the signature of `rpa.ragged_paged_attention`.
    """
    paths = [path for path in PATHS if on_tpu or path.off_tpu]
    yield from _run_paths(paths, on_tpu, attention, by_rung_7, copy_rows)


def run_as_compiled(chip):
    """Run all paths without a TPU; yields one `Result` after the other.

    Args:
        chip: for which one the kernels are compiled; `rpa.lab.chip` executes them.

    >>> [result.wrong for result in run_as_compiled("v5e")]  # doctest: +SKIP
    ['', '', '', '', '', '', '', '', '', '', '', '', '']
    """

    def executed(function):
        return lambda *args, **options: lab_chip.run(partial(function, **options), *args, chip=chip)

    rung_8 = partial(ragged_paged_attention, chip=chip)
    yield from _run_paths(PATHS, True, executed(rung_8), executed(by_rung_7), executed(copy_rows))


def begin(on_tpu, device_kind):
    """(heading, results to come) of the strongest self-test that this machine allows."""
    if on_tpu:
        return heading(True, device_kind), run(True)
    try:
        lab_chip.check_compiler()
    except lab_chip.ChipError as why_not:
        return heading(False, device_kind, str(why_not)), run(False)
    return heading_as_compiled(CHIP), run_as_compiled(CHIP)


def _run_paths(paths, compiled, rung_8, rung_7, copy):
    yield timed(DMA_CHECK, "beside an operand that is not read", partial(check_dma, compiled, copy))
    for path in paths:
        yield timed(str(path), path.covers, partial(check_path, path, compiled, rung_8))
    for path in paths:
        if path.plain_too:
            check = partial(check_path, path, compiled, rung_7)
            yield timed(f"rung 7: {path}", path.covers, check, REPORT_7)


def by_rung_7(queries, keys, values, kv_cache, *metadata, backend, m_block_sizes, **options):
    """Rung 7 with the signature of rung 8, as far as `check_path` uses it."""
    for only_of_rung_8 in ("chunk_prefill_size", "d_block_sizes", "p_block_sizes"):
        del options[only_of_rung_8]
    block_q, block_kv, _, _ = m_block_sizes
    return plain.attention(
        *(queries, keys, values, kv_cache, RaggedBatch(*metadata)),
        block_q=block_q,
        block_kv=block_kv,
        interpret=False if backend == "tpu" else interpreter.params(),
        **options,
    )


DMA_CHECK = "a DMA from HBM (jax issue 39744)"


def timed(path, covers, check: Callable, report=None):
    """The Result of a check that returns (errors, limit, wrong, fix), or raises.

    Args:
        report: what to do if it is wrong; None for what the check says, or REPORT if it raises.
    """
    start = time.perf_counter()
    try:
        errors, limit, wrong, fix = check()
    except Exception as error:  # the compiler's refusal, or a fault of the chip, is the finding
        interpreter.reset()
        message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        errors, limit, wrong, fix = {}, 0.0, f"it did not run: {message}", REPORT
    if wrong and report is not None:
        fix = report
    return Result(path, covers, errors, limit, wrong, fix, time.perf_counter() - start)


REPORT = (
    "Do not use rung 8 with these dtypes and this head_dim here: pass backend='reference'. Try "
    "another libtpu, and report the output of `python -m rpa doctor --selftest --json`."
)

REPORT_7 = (
    "Do not use rung 7 (`rpa.plain`) with these dtypes here: take rung 8 if its lines are ok. "
    "Report the output of `python -m rpa doctor --selftest --json`."
)


# --- One path -----------------------------------------------------------------------------------


def make_case(path, seed=0):
    """Random tokens in shuffled pages, and NaN wherever nothing may be read."""
    rng = np.random.default_rng(seed)
    pairs = [pair for pairs in LENGTHS.values() for pair in pairs]
    q_lens, kv_lens = zip(*pairs, strict=True)
    num_pages = [cdiv(kv_len, PAGE_SIZE) for kv_len in kv_lens]
    shuffled = rng.permutation(sum(num_pages) + 2)
    table = [
        shuffled[end - n : end] for n, end in zip(num_pages, np.cumsum(num_pages), strict=True)
    ]
    batch, _ = RaggedBatch.from_lengths(q_lens, kv_lens, table)
    ends = np.cumsum([len(pairs) for pairs in LENGTHS.values()], dtype=np.int32)
    batch = dataclasses.replace(batch, distribution=ends)

    def tokens(num_heads, dtype, n=NUM_TOKENS):
        return rng.standard_normal((n, num_heads, path.head_dim)).astype(jnp.dtype(dtype))

    num_q_heads, num_kv_heads = path.heads
    queries = tokens(num_q_heads, path.q_dtype)
    keys, values = (tokens(num_kv_heads, path.kv_dtype) for _ in "kv")
    cache_shape = get_kv_cache_shape(
        len(shuffled), PAGE_SIZE, num_kv_heads, path.head_dim, path.kv_dtype
    )
    slots = len(shuffled) * PAGE_SIZE
    stored = pack_kv(*(tokens(num_kv_heads, path.kv_dtype, slots) for _ in "kv"))
    stored, new = np.asarray(stored).reshape(cache_shape), np.asarray(pack_kv(keys, values))
    cache = np.full(cache_shape, np.nan, jnp.dtype(path.kv_dtype))
    expected, token = cache.copy(), 0
    for pages, q_len, kv_len in zip(table, q_lens, kv_lens, strict=True):
        for position in range(kv_len):
            place = pages[position // PAGE_SIZE], position % PAGE_SIZE
            if position < kv_len - q_len:
                cache[place] = expected[place] = stored[place]
            else:
                expected[place], token = new[token], token + 1
    return Case(queries, keys, values, cache, batch, expected)


def check_path(path, on_tpu, attention=ragged_paged_attention):
    """Run a rung on one path; returns (errors, limit, wrong, fix) as in `Result`."""
    with _on_host():
        case = make_case(path)
        truth = _reference(path, case)
    output, kv_cache = attention(
        *(case.queries, case.keys, case.values, case.kv_cache, *case.metadata),
        backend="tpu" if on_tpu else "interpret",
        chunk_prefill_size=CHUNK_PREFILL_SIZE,
        sm_scale=path.head_dim**-0.5,
        **(BLOCKS | path.options),
    )
    output = np.asarray(output).astype(np.float32)
    limit, errors, start = LIMITS[path.kv_dtype], {}, 0
    for kernel, pairs in LENGTHS.items():
        rows = slice(start, start + sum(q_len for q_len, _ in pairs))
        errors[kernel], start = float(row_errors(output[rows], truth[rows]).max()), rows.stop
    wrong = []
    bad = [kernel for kernel, error in errors.items() if not error <= limit]
    if bad:
        with _on_host():
            cause = likely_cause(path, case, output, truth)
        wrong.append(f"{' and '.join(bad)}: {cause}")
    if output[start:].any():
        wrong.append("padding rows of the output are not zero")
    wrong += wrong_places(np.asarray(kv_cache), case)
    return errors, limit, "; ".join(wrong), REPORT if wrong else ""


def _on_host():
    """JAX computes on the host in here; on the default device if the host is switched off."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS=tpu
        return jax.default_device(None)


def _reference(path, case, swap=False):
    """Rung 3 on the same values, all of it in float32; optionally with K and V swapped."""
    keys, values, kv_cache = case.keys, case.values, case.kv_cache
    if swap:
        keys, values = values, keys
        stored = unpack_kv(jnp.asarray(kv_cache), path.heads[1], path.head_dim)
        flat = [x.reshape(-1, *x.shape[2:]) for x in reversed(stored)]
        kv_cache = pack_kv(*flat).reshape(kv_cache.shape)
    output, _ = ref_ragged_paged_attention(
        *(case.queries.astype(np.float32), keys, values, kv_cache, *case.metadata),
        sm_scale=path.head_dim**-0.5,
        **(path.options | {"out_dtype": "float32"}),
    )
    return np.asarray(output)


def row_errors(output, truth):
    """||output - truth|| / ||truth|| of every (token, head): f32[num_tokens, num_q_heads].

    >>> row_errors(np.array([[[3.0, 4.5]]]), np.array([[[3.0, 4.0]]])).tolist()
    [[0.1]]
    """
    scale = np.maximum(np.linalg.norm(truth, axis=-1), 1e-30)
    return np.linalg.norm(output - truth, axis=-1) / scale


def likely_cause(path, case, output, truth):
    """What a wrong output is, if it is something known; otherwise where it is wrong first."""
    limit, num_q_heads = LIMITS[path.kv_dtype], path.heads[0]
    if not np.isfinite(output).all():
        return "NaN or infinity: something was read that was never copied"
    suspects = {
        "all zeros: a copy moved nothing": 0 * truth,
        "K and V are swapped": _reference(path, case, swap=True),
    } | {f"query heads stand {n} too far": np.roll(truth, n, axis=1) for n in range(1, num_q_heads)}
    wrong = ~(row_errors(output, truth) <= limit)
    for cause, suspect in suspects.items():
        difference = np.linalg.norm((output - suspect)[wrong])
        if difference <= limit * np.linalg.norm(truth[wrong]):
            return cause
    token, head = np.argwhere(wrong)[0]
    return f"{wrong.mean():.0%} of all (token, head), first token {token}, head {head}"


def wrong_places(kv_cache, case):
    """What is wrong with the cache, compared bit by bit: a list of words, empty if nothing is."""
    bits = f"u{kv_cache.dtype.itemsize}"
    expected, before = case.expected_cache.view(bits), case.kv_cache.view(bits)
    different = (kv_cache.view(bits) != expected).any(axis=(2, 3, 4))
    is_new = (expected != before).any(axis=(2, 3, 4))
    counts = {
        "new tokens are not in the cache as they should be": (different & is_new).sum(),
        "tokens of the cache were overwritten": (different & ~is_new).sum(),
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


# --- The DMA of jax issue 39744 -----------------------------------------------------------------


def check_dma(compiled, copy):
    """Run `copy_rows`, or what executes it; returns (errors, limit, wrong, fix) as in `Result`."""
    source = np.arange(1.0, 4097.0, dtype=np.float32).reshape(16, 256)
    interpret = False if compiled else interpreter.params()
    copied = np.asarray(copy(source, interpret=interpret))
    if np.array_equal(copied, source[8:]):
        return {}, 0.0, "", ""
    wrong = f"a copy from HBM delivered {'something else' if copied.any() else 'zeros'}"
    return {}, 0.0, wrong, DMA_FIX


DMA_FIX = "Trust no kernel here: install a libtpu other than 0.0.43 to 0.0.45 that fits your jax."


@partial(jax.jit, static_argnames="interpret")
def copy_rows(source, *, interpret):
    """The last 8 rows of f32[16, 256], by way of VMEM, beside an operand that is never read.

    libtpu 0.0.43 to 0.0.45 deliver zeros if that operand is computed by the same jit and has 4
    rows of 128 or more, and the copy takes a part of an array whose rows have 256 floats or more.
    """
    hbm = pl.BlockSpec(memory_space=compat.hbm_memory_space(interpret))
    return pl.pallas_call(
        _copy_rows_kernel,
        in_specs=[hbm, hbm],
        out_specs=hbm,
        out_shape=jax.ShapeDtypeStruct((8, 256), jnp.float32),
        scratch_shapes=[pltpu.VMEM((8, 256), jnp.float32), pltpu.SemaphoreType.DMA((1,))],
        interpret=interpret,
    )(source, jnp.ones((16, 128), jnp.float32))


def _copy_rows_kernel(source, _, target, rows, sems):
    for start, end in [(source.at[pl.ds(8, 8)], rows), (rows, target)]:
        copy = pltpu.make_async_copy(start, end, sems.at[0])
        copy.start()
        copy.wait()


# --- In words -----------------------------------------------------------------------------------


def heading(on_tpu, device_kind, why_not=""):
    """What is run how, as the lines above the table.

    Args:
        on_tpu, device_kind: of this machine.
        why_not: without a TPU, why the kernels are not executed as compiled.

    >>> print(heading(True, "TPU v5 lite").splitlines()[0])
    Self-test of rungs 7 and 8 on TPU v5 lite, compiled, against rung 3 in float32 on the host.
    """
    if on_tpu:
        return (
            f"Self-test of rungs 7 and 8 on {device_kind}, compiled, against rung 3 in float32 on "
            f"the host.\n{COLUMNS}"
        )
    count = sum(path.off_tpu for path in PATHS)
    return (
        f"Self-test of rungs 7 and 8 in the TPU interpreter on {device_kind}, against rung 3 in "
        f"float32.\nThis is {count} of {len(PATHS)} paths, and the interpreter takes neither "
        f"bitcasts nor strided loads:\nonly a TPU can say whether those are right, or the kernels "
        f"executed as compiled. They are not: {why_not}\n{COLUMNS}"
    )


def heading_as_compiled(chip):
    """The same where `rpa.lab.chip` executes the kernels."""
    return (
        f"Self-test of rungs 7 and 8 as libtpu compiles them for {chip}, against rung 3 in "
        f"float32.\nThe instructions are executed here, one by one: all {len(PATHS)} paths. What "
        f"that does not prove: docs/chip.md.\n{COLUMNS}"
    )


COLUMNS = f"{'path':<59}{'decode':>8}{'chunk':>8}{'mixed':>8}{'limit':>9}"


def line(result):
    """A result as text: one line, and two more if something is wrong.

    >>> lines = line(Result("a path", "what it covers", {}, 0.0, "it hangs", "Wait.", 1.0))
    >>> [" ".join(text.split()) for text in lines.splitlines()]
    ['a path WRONG 1 s what it covers', 'it hangs', 'What to do: Wait.']
    """
    errors = [result.errors.get(kernel) for kernel in LENGTHS]
    limit = result.limit if result.errors else None
    numbers = "".join(f"{'' if error is None else format(error, '.1e'):>8}" for error in errors)
    numbers += f"{'' if limit is None else format(limit, '.0e'):>9}"
    verdict = "WRONG" if result.wrong else "ok"
    text = f"{result.path:<59}{numbers}  {verdict:<5} {result.seconds:3.0f} s  {result.covers}"
    if result.wrong:
        text += f"\n    {result.wrong}\n    What to do: {result.fix}"
    return text
