"""Look for wrong results of rung 8 on the chip: generated problems, executed as compiled.

A problem is one set of shapes, dtypes and options, drawn from its number; it is compiled once for
a chip and executed on several batches. The output is held against rung 3 in float32, the cache
bit by bit. Wherever nothing may be read there is NaN.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np

from rpa import ragged_paged_attention, ref_ragged_paged_attention, selftest
from rpa.lab.chip.door import DMA_ORDERS, prepare
from rpa.lab.chip.errors import ChipError
from rpa.paging import cdiv, get_kv_cache_shape, pack_kv
from rpa.ragged import RaggedBatch
from rpa.shapes import heads_of

HEADS = ((8, 2), (9, 3), (5, 1), (7, 7), (16, 1), (32, 8), (3, 1), (6, 2), (2, 2))
DTYPES = (
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("bfloat16", "float8_e4m3fn"),
    ("bfloat16", "float8_e5m2"),
    ("float32", "bfloat16"),
    ("float32", "float8_e4m3fn"),
)
BLOCKS = {
    "d_block_sizes": (1, 64, 1, 32),
    "p_block_sizes": (16, 64, 8, 32),
    "m_block_sizes": (16, 64, 8, 32),
}
CHUNK = 24


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes, dtypes and options of one call.

    Attributes:
        number: what it was drawn from.
        heads: num_q_heads, num_kv_heads.
        head_dim, q_dtype, kv_dtype, page_size: of the arrays.
        share_lanes: see `rpa.get_kv_cache_shape`.
        max_num_seqs, pages_per_seq: room of a batch.
        options: of `rpa.ragged_paged_attention`, arrays left out.
        has_sinks: whether there is an attention sink.
    """

    number: int
    heads: tuple[int, int]
    head_dim: int
    q_dtype: str
    kv_dtype: str
    page_size: int
    share_lanes: bool
    max_num_seqs: int
    pages_per_seq: int
    options: dict
    has_sinks: bool

    def __str__(self):
        layout = "K and V share lanes, " if self.share_lanes else ""
        options = {k: v for k, v in self.options.items() if not k.endswith("block_sizes")}
        blocks = self.options.get("d_block_sizes", ())
        blocks = f"blocks {blocks}" if blocks else "default blocks"
        return (
            f"{self.number}: {self.heads[0]}/{self.heads[1]} heads of {self.head_dim}, "
            f"q {self.q_dtype}, KV {self.kv_dtype}, pages of {self.page_size}, {layout}"
            f"{self.max_num_seqs} sequences of up to {self.pages_per_seq * self.page_size}, "
            f"{blocks}, {options}{', sinks' if self.has_sinks else ''}"
        )


def draw_problem(number) -> Problem:
    """The problem of a number, always the same one.

    >>> draw_problem(3) == draw_problem(3)
    True
    """
    rng = np.random.default_rng(number)

    def one_in(n):
        return bool(rng.integers(n) == 0)

    head_dim = int(rng.choice([64, 64, 80, 128, 128, 128, 256]))
    heads = HEADS[rng.integers(len(HEADS) - 3 * (head_dim == 256))]
    q_dtype, kv_dtype = DTYPES[min(rng.integers(9), 5)] if one_in(2) else DTYPES[0]
    page_size = 128 if one_in(5) else 16
    options = {"sm_scale": head_dim**-0.5}
    if one_in(3):
        options["sliding_window"] = int(rng.choice([3, 20, 100, 128]))
    if one_in(4):
        options["soft_cap"] = 5.0
    if one_in(6):
        options["update_kv_cache"] = False
    if one_in(6):
        options["use_causal_mask"] = False
    if one_in(4):
        options["chunk_prefill_size"] = CHUNK
    if one_in(5):
        options["out_dtype"] = str(rng.choice(["float32", "bfloat16"]))
    if one_in(3):
        options |= {"k_scale": 0.5, "v_scale": 2.0}
    if kv_dtype.startswith("float8") and one_in(3):
        options["q_scale"] = 0.1
    if page_size == 16 and one_in(3):
        options |= BLOCKS
    tokens = int(rng.choice([128, 256, 700]))
    return Problem(
        *(number, heads, head_dim, q_dtype, kv_dtype, page_size),
        share_lanes=head_dim == 64 and one_in(2),
        max_num_seqs=int(rng.choice([3, 6, 11])),
        pages_per_seq=cdiv(tokens, page_size),
        options=options,
        has_sinks=one_in(4),
    )


def draw_lengths(problem, rng) -> list[tuple[int, int]]:
    """(q_len, kv_len) of sequences in the order of a batch: decode, chunked prefill, any."""
    room = problem.pages_per_seq * problem.page_size
    chunk = problem.options.get("chunk_prefill_size", 40)
    kinds = np.sort(rng.integers(3, size=problem.max_num_seqs - int(rng.integers(2))))
    pairs = []
    for kind in kinds:
        edge = int(rng.choice([-1, 0, 1])) + problem.page_size * int(rng.integers(1, 8))
        kv_len = edge if rng.integers(2) else int(rng.integers(1, room + 1))
        kv_len = min(max(kv_len, 1), room)
        longest = (1, chunk, 60)[kind]
        q_len = chunk if kind == 1 and rng.integers(2) else int(rng.integers(longest + 1))
        pairs.append((min(q_len, kv_len), kv_len))
    return pairs


def draw_case(problem, seed) -> selftest.Case:
    """Random tokens in shuffled pages, and NaN wherever nothing may be read."""
    rng = np.random.default_rng((problem.number, seed))
    pairs, page_size = draw_lengths(problem, rng), problem.page_size
    num_q_heads, num_kv_heads = problem.heads
    num_pages = problem.max_num_seqs * problem.pages_per_seq + 2
    pages = np.split(
        rng.permutation(num_pages)[: sum(cdiv(kv_len, page_size) for _, kv_len in pairs)],
        np.cumsum([cdiv(kv_len, page_size) for _, kv_len in pairs])[:-1],
    )
    q_lens, kv_lens = zip(*pairs, strict=True)
    batch, order = RaggedBatch.from_lengths(
        *(q_lens, kv_lens, pages),
        max_num_seqs=problem.max_num_seqs,
        pages_per_seq=problem.pages_per_seq,
        chunk_prefill_size=problem.options.get("chunk_prefill_size"),
    )
    num_tokens = 60 * problem.max_num_seqs + 3

    def tokens(num_heads, dtype, n=num_tokens):
        return rng.standard_normal((n, num_heads, problem.head_dim)).astype(jnp.dtype(dtype))

    queries = tokens(num_q_heads, problem.q_dtype)
    keys, values = (tokens(num_kv_heads, problem.kv_dtype) for _ in "kv")
    shape = get_kv_cache_shape(
        *(num_pages, page_size, num_kv_heads, problem.head_dim, problem.kv_dtype),
        share_lanes=problem.share_lanes,
    )
    pack = partial(pack_kv, share_lanes=problem.share_lanes)
    stored = pack(*(tokens(num_kv_heads, problem.kv_dtype, num_pages * page_size) for _ in "kv"))
    stored, new = np.asarray(stored).reshape(shape), np.asarray(pack(keys, values))
    updates = problem.options.get("update_kv_cache", True)
    cache = np.full(shape, np.nan, jnp.dtype(problem.kv_dtype))
    expected, token = cache.copy(), 0
    for i in order:
        for position in range(kv_lens[i]):
            place = pages[i][position // page_size], position % page_size
            is_new = position >= kv_lens[i] - q_lens[i]
            if not (is_new and updates):
                cache[place] = expected[place] = stored[place]
            else:
                expected[place] = new[token]
            token += is_new
    for array in (queries, keys, values):
        array[token:] = np.nan
    return selftest.Case(queries, keys, values, cache, batch, expected)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one batch of a problem gave.

    Attributes:
        problem, chip, seed, dma: which.
        error, limit: the largest relative difference of a (token, head), and what is allowed.
        wrong: what is wrong, in words; "" if nothing is.
    """

    problem: Problem
    chip: str
    seed: int
    dma: str
    error: float
    limit: float
    wrong: str

    def __str__(self):
        verdict = f"WRONG {self.wrong}" if self.wrong else "ok"
        return (
            f"{self.chip} {self.dma} batch {self.seed} of {self.problem}: "
            f"{self.error:.1e} (limit {self.limit:.0e}) {verdict}"
        )


def check_problem(problem, chip, num_batches):
    """Compile a problem for a chip and run batches through it; yields a `Finding` for each."""
    options = dict(problem.options)
    if problem.has_sinks:
        options["attention_sink"] = np.linspace(-1, 2, problem.heads[0]).astype(np.float32)
    attention = partial(
        ragged_paged_attention, **options, backend="tpu", chip=chip, donate=False, validate=False
    )
    prepared = None
    for seed in range(num_batches):
        dma = DMA_ORDERS[seed % 2]
        case = draw_case(problem, seed)
        args = (case.queries, case.keys, case.values, case.kv_cache, *case.metadata)
        error, limit = np.nan, 0.0
        try:
            prepared = prepared or prepare(attention, *args, chip=chip)
            error, limit, wrong = compare(problem, options, case, *prepared(*args, dma=dma))
        except ChipError as fault:
            wrong = f"{type(fault).__name__}: {fault}"
        yield Finding(problem, chip, seed, dma, error, limit, wrong)


def compare(problem, options, case, output, kv_cache):
    """(largest relative error of a row, its limit, what is wrong in words)."""
    plain = {k: v for k, v in options.items() if not k.endswith("block_sizes")}
    truth, _ = ref_ragged_paged_attention(
        *(case.queries.astype(np.float32), case.keys, case.values, case.kv_cache),
        *case.metadata,
        **(plain | {"out_dtype": "float32"}),
    )
    num_seqs = int(np.asarray(case.batch.distribution)[2])
    rows = int(np.asarray(case.batch.cu_q_lens)[num_seqs])
    output = np.asarray(output)
    dtypes = (problem.kv_dtype, problem.q_dtype, output.dtype.name)
    limit = max(selftest.LIMITS[dtype] for dtype in dtypes)
    if "q_scale" in options:
        limit = max(limit, selftest.LIMITS["float8_e5m2"])
    errors = selftest.row_errors(output.astype(np.float32)[:rows], np.asarray(truth)[:rows])
    wrong = selftest.wrong_places(np.asarray(kv_cache), case)
    if not (errors <= limit).all():
        token, head = np.argwhere(~(errors <= limit))[0]
        share = (~(errors <= limit)).mean()
        wrong.append(f"{share:.1%} of all (token, head), first token {token}, head {head}")
    if output[rows:].astype(np.float32).any():
        wrong.append("rows that no sequence owns are not zero")
    return float(np.max(errors, initial=0)), limit, "; ".join(wrong)


def hunt(num_cases, chip, first=0, batches_per_problem=4):
    """Yield a `Finding` for each of so many cases, from a problem's number on."""
    for number in range(first, first + cdiv(num_cases, batches_per_problem)):
        left = num_cases - (number - first) * batches_per_problem
        yield from check_problem(draw_problem(number), chip, min(left, batches_per_problem))


def default_block_problems(chip) -> list[Problem]:
    """The shapes of the sweep of block sizes, with the blocks that are the defaults there.

    Generated problems are small, and so are their blocks; these have room for two of the largest.

    >>> [(p.heads, p.options["d_block_sizes"][1]) for p in default_block_problems("v6e")]
    [((32, 8), 1024), ((8, 1), 2048)]
    """
    from rpa.lab.bench import tune  # here: it imports all that predicts

    problems = []
    for k, model in enumerate(tune.MODELS):
        blocks = {case: tune.default_blocks(tune.Place(chip, model, case)) for case in tune.CASES}
        *heads, head_dim = heads_of(model)
        widest = max(kv_tokens for _, kv_tokens, _, _ in blocks.values())
        problems.append(
            Problem(
                *(10**9 + k, tuple(heads), head_dim),
                *("bfloat16", "bfloat16", 128),
                share_lanes=False,
                max_num_seqs=3,
                pages_per_seq=2 * cdiv(widest, 128) + 1,
                options={
                    "sm_scale": head_dim**-0.5,
                    "d_block_sizes": blocks["decode"],
                    "m_block_sizes": blocks["mixed"],
                },
                has_sinks=False,
            )
        )
    return problems
