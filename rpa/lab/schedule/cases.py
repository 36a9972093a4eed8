"""The two questions that kernels are compared by: what does a chunk of decode, or of prefill, cost?

| case | one chunk | runs compared |
|---|---|---|
| decode | 1 query token, 1,024 KV tokens, all heads | 8 sequences, kv_len 16,384 and 8,192 |
| mixed | 128 query tokens, 512 KV tokens, all heads | 1 sequence of 2,048 query tokens, likewise |

Several sequences, because a kernel may take several at once and does the work of all of them even
if there is only one. A chunk's cost is the difference of two executions, so that nothing hides
outside a loop: what longer sequences execute more, by the number of chunks that they have more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from rpa import chips
from rpa.kernel import prepare
from rpa.lab import peers, programs
from rpa.lab.batches import make_batch, metadata_of
from rpa.lab.compile.functions import is_own
from rpa.lab.schedule.execution import DELAY_SLOTS, Execution, chip_to_execute
from rpa.lab.schedule.schedule import Schedule, schedule_for
from rpa.lab.schedule.values import CannotRun
from rpa.paging import kv_token_bytes

LONG, SHORT = 16_384, 8_192
"""kv_len of the two runs whose difference counts."""


@dataclass(frozen=True)
class Case:
    """What is run, and what one chunk of it is.

    Attributes:
        q_len: new tokens of the sequence.
        num_seqs: sequences that are run, all alike.
        max_num_seqs: sequences that there is room for.
        chunk_q, chunk_kv: query and KV tokens of a chunk.
    """

    q_len: int
    num_seqs: int
    max_num_seqs: int
    chunk_q: int
    chunk_kv: int

    @property
    def num_chunks(self) -> int:
        """Chunks that the long run has more than the short one; none of them needs a mask."""
        return self.num_seqs * self.q_len // self.chunk_q * ((LONG - SHORT) // self.chunk_kv)


CASES = {
    "decode": Case(1, 8, 16, 1, 1024),
    "mixed": Case(2048, 1, 8, 128, 512),
}


@dataclass(frozen=True)
class KernelChoice:
    """How a kernel is found in its function, and how its blocks are chosen.

    Attributes:
        program: workload to the function and its arguments.
        names: by case, the pattern of the `pallas_call`'s name.
        blocks: by case, the keyword argument for its blocks.
        default_blocks: (program, chip, case, options) to the blocks that it chooses; None: it does
            not say.
        asks_for_chip: whether it takes the name of the chip.
        flags: further flags of the compiler.
    """

    program: Callable
    names: dict[str, str]
    blocks: dict[str, str]
    default_blocks: Callable = lambda *_: None
    asks_for_chip: bool = True
    flags: str = ""


def rung_8_blocks(program, chip, case, options) -> tuple[int, ...]:
    """The blocks that rung 8 chooses: (bq, bkv, bq_c, bkv_c)."""
    plans = prepare(*program.args, **options | {"chip": chip, "backend": "tpu"})
    return next(tuple(plan.blocks) for plan in plans if plan.case.label == case)


KERNELS = {
    "rpa": KernelChoice(
        programs.kernel,
        {"decode": "^rpa_decode$", "mixed": "^rpa_mixed$"},
        {"decode": "d_block_sizes", "mixed": "m_block_sizes"},
        rung_8_blocks,
    ),
    "plain": KernelChoice(
        programs.plain,
        {"decode": "^plain_attention$", "mixed": "^plain_attention$"},
        {"decode": "blocks", "mixed": "blocks"},
    ),
    "v3": KernelChoice(
        peers.PROGRAMS["v3"],
        {"decode": "^RPAd", "mixed": "^RPAm"},
        {"decode": "d_block_sizes", "mixed": "m_block_sizes"},
    ),
    "batched": KernelChoice(
        peers.PROGRAMS["batched"],
        {"decode": "^RPAd", "mixed": "^RPAm"},
        {"decode": "decode_block_sizes", "mixed": "prefill_block_sizes"},
        flags=peers.COMPILER_FLAGS,
    ),
}
"""What the command `lab schedule` knows by name."""


def kernel_choice(kernel) -> KernelChoice:
    """How a kernel is found: by a name in KERNELS, or one's own by "file.py:function".

    A kernel of one's own has the ladder's signature, and one `pallas_call` for all cases.

    Raises:
        ValueError: for a name that is neither.

    >>> kernel_choice("rpa").names["decode"]
    '^rpa_decode$'
    """
    if kernel in KERNELS:
        return KERNELS[kernel]
    if not is_own(kernel):
        raise ValueError(
            f"kernel is {kernel!r}, but must be one of {', '.join(KERNELS)}, or your own as "
            "'file.py:function'."
        )
    return KernelChoice(
        partial(programs.own, kernel), dict.fromkeys((*CASES, "all"), ""), {}, asks_for_chip=False
    )


def label(kernel) -> str:
    """A kernel in a table: its name, or "yours".

    >>> label("v3"), label("my_rpa.py:ragged_attention")
    ('v3', 'yours')
    """
    return "yours" if is_own(kernel) else kernel


@dataclass(frozen=True)
class Measured:
    """One kernel, on one chip, in one case.

    Attributes:
        kernel, case, chip: names.
        blocks: (bq, bkv, bq_c, bkv_c); None where the kernel chose them and does not say.
        schedule: of the compiled kernel.
        chunks: what `num_chunks` chunks execute.
        num_chunks: how many.
        floor: cycles that a chunk takes at least.
        floor_of: what gives that floor, "HBM" or "MATMUL".
        interior, masked: bundles of the region that computes a chunk without and with a mask; None
            if the kernel has only one kind of chunk.
        per_sequence: decode: bundles of one sequence besides its chunks; None for mixed.
        step: decode: all bundles of one more sequence of 1,024 tokens; None for mixed.
    """

    kernel: str
    case: str
    chip: str
    blocks: tuple[int, ...] | None
    schedule: Schedule
    chunks: Execution
    num_chunks: int
    floor: float
    floor_of: str
    interior: float | None
    masked: float | None
    per_sequence: float | None
    step: float | None

    @property
    def executed_per_chunk(self) -> float:
        """All bundles."""
        return self.chunks.bundles / self.num_chunks

    @property
    def page_issue_per_chunk(self) -> float:
        """Bundles of the loops or regions that start the copies of pages."""
        return self._page_issue / self.num_chunks

    @property
    def _page_issue(self):
        return page_issue(self.schedule, self.chunks)

    @property
    def bundles_per_chunk(self) -> float:
        """Decode: all but page issue. Mixed: the innermost loop that multiplies."""
        if self.case == "decode":
            return self.executed_per_chunk - self.page_issue_per_chunk
        inner = innermost(self.schedule, self.chunks)
        # Where the loop that multiplies also starts copies, none is innermost: all but page issue.
        bundles = inner or self.executed_per_chunk * self.num_chunks - self._page_issue
        return bundles / self.num_chunks

    @property
    def busiest_span(self):
        """The smallest loop or region that holds most of the products of the counted chunks."""
        hits = self.chunks.hits
        total = self.schedule.slots(hits)["MATMUL"]
        best = self.schedule.loops
        for _, span in best.walk():
            inside = np.zeros_like(hits)
            inside[span.start : span.end] = hits[span.start : span.end]
            if self.schedule.slots(inside)["MATMUL"] > total / 2:
                best = span
        return best

    @property
    def slots(self) -> dict[str, float]:
        """Slots used by unit, a chunk."""
        slots = self.schedule.slots(self.chunks.hits)
        return {unit: n / self.num_chunks for unit, n in slots.items()}


def measure(
    kernel,
    case,
    chip,
    *,
    model="llama-3-8b",
    page_size=128,
    kv_dtype="bfloat16",
    share_lanes=False,
    blocks=None,
    options=None,
    use_cache=True,
) -> Measured:
    """Compile a kernel for a chip and count what a chunk of a case costs.

    Args:
        kernel: a name in KERNELS, or "file.py:function" (see `kernel_choice`).
        case: a name in CASES.
        chip: anything that `rpa.chips.chip` knows.
        model: a name in `rpa.shapes.MODELS`, or its three numbers of heads.
        page_size: tokens of a page.
        kv_dtype: of the cache.
        share_lanes: whether K and V share the lanes of the cache, see `rpa.get_kv_cache_shape`.
        blocks: the kernel's block sizes, None for its own default.
        options: further keyword arguments of the function: arrays, or what JSON can hold.
        use_cache: False compiles again.

    Raises:
        rpa.lab.schedule.NoSchedule: if it does not compile.
        rpa.lab.schedule.execution.CannotRun: if it cannot be counted.
        ValueError: if schedules cannot be executed for the chip.
    """
    what, options = CASES[case], options or {}
    sizes = programs.Workload(
        model,
        page_size=page_size,
        kv_dtype=kv_dtype,
        num_seqs=what.max_num_seqs,
        q_len=max(1, what.q_len // 4),
        kv_len=LONG,
        share_lanes=share_lanes,
    )
    schedule, program = compile_kernel(
        kernel, case, chip, sizes, blocks=blocks, options=options, use_cache=use_cache
    )

    def run(num_seqs, kv_len):
        room = {"max_num_seqs": sizes.num_seqs, "pages_per_seq": sizes.pages_per_seq}
        batch = make_batch([(what.q_len, kv_len)] * num_seqs, page_size, **room)
        return schedule.execute(*program.args[:4], *metadata_of(batch), kwargs=options)

    short = run(what.num_seqs, SHORT)
    chunks = run(what.num_seqs, LONG) - short
    if not schedule.slots(chunks.hits)["MATMUL"]:
        raise CannotRun(
            f"{schedule.kernel} on {chips.chip(chip).name}: {LONG:,} tokens take no more products "
            f"than {SHORT:,}, as where one block holds them all: give it a smaller block. A "
            "sliding window never has more: lab predict counts a whole batch."
        )
    floor, floor_of = chunk_floor(chips.chip(chip), case, sizes)
    flops = 4 * what.chunk_q * what.chunk_kv * sizes.heads[0] * sizes.heads[2] * what.num_chunks
    check_products(schedule, chunks, chip, flops, sizes.heads[2])
    per_sequence = step = None
    if case == "decode":
        n = what.num_seqs
        more = (run(2 * n, SHORT) - short).bundles
        per_sequence = (more - chunks.bundles * SHORT / (LONG - SHORT)) / n
        step = (run(2 * n, what.chunk_kv) - run(n, what.chunk_kv)).bundles / n
    known = chips.chip(chip).name
    choice = kernel_choice(kernel)
    chosen = blocks or options.get(choice.blocks.get(case))
    if chosen is None:
        chosen = choice.default_blocks(program, known, case, options)
    return Measured(
        *(kernel, case, known, chosen, schedule, chunks, what.num_chunks),
        floor,
        floor_of,
        *regions(schedule, chunks, what.num_chunks),
        per_sequence,
        step,
    )


def compile_kernel(
    kernel, case, chip, sizes, *, blocks=None, options=None, use_cache=True
) -> tuple[Schedule, programs.Program]:
    """The schedule of one kernel for one case, and the function and arguments it belongs to.

    Args:
        kernel: a name in KERNELS, or "file.py:function" (see `kernel_choice`).
        case: a name in CASES: which of the function's kernels.
        chip: anything that `rpa.chips.chip` knows.
        sizes: a `rpa.lab.programs.Workload`: shapes that it is compiled for.
        blocks: the kernel's block sizes, None for its own default.
        options: further keyword arguments of the function: arrays, or what JSON can hold.
        use_cache: False compiles again.

    Raises:
        rpa.lab.schedule.NoSchedule: if it does not compile.
        ValueError: if schedules cannot be executed for the chip.
    """
    choice, chip = kernel_choice(kernel), chip_to_execute(chip)
    program = choice.program(sizes)
    # A kernel that compiles its scale in would save itself the work for a scale of 1.
    kwargs = program.kwargs | {"sm_scale": sizes.heads[2] ** -0.5} | (options or {})
    if choice.asks_for_chip:
        kwargs["chip"] = chip.name
    if blocks is not None:
        if case not in choice.blocks:
            raise ValueError(f"blocks is {blocks}, but {kernel} chooses its own: leave it out.")
        kwargs[choice.blocks[case]] = list(blocks)
    schedule = schedule_for(
        *(chip.name, program.function, *program.args),
        kwargs=kwargs,
        kernel=choice.names[case],
        use_cache=use_cache,
        flags=choice.flags,
    )
    return schedule, program


def check_products(schedule, run, chip, flops, head_dim):
    """Refuse a run whose products are fewer than the work needs.

    Heads that fill a part of the MXU take the cycles of all of it. A loop that ends too early, by
    a scalar instruction that is not understood, would otherwise be a kernel that is fast.

    Raises:
        rpa.lab.schedule.execution.CannotRun: with what was executed, and what is needed.
    """
    c = chips.chip(chip)
    needed = flops / (c.mxu_flops_per_cycle * chips.mxu_fill(c, head_dim))
    cycles = schedule.slots(run.hits)["MATMUL"] / schedule.capacity["MATMUL"]
    if cycles < needed:
        raise CannotRun(
            f"{schedule.kernel} on {c.name}: the run multiplied for {cycles:,.0f} cycles, but this "
            f"batch needs {needed:,.0f}: its schedule is not understood."
        )


def chunk_floor(chip, case, sizes) -> tuple[float, str]:
    """Cycles that a chunk takes at least, and why: its bytes at HBM's peak, or its products.

    A product pays for whole MXU tiles: with a head_dim of 128, an MXU 256 wide is half empty.

    >>> sizes = programs.Workload(page_size=128)
    >>> chunk_floor(chips.chip("v6e"), "mixed", sizes)
    (4096.0, 'MATMUL')
    >>> round(chunk_floor(chips.chip("tpu7x"), "decode", sizes)[0])
    2494
    """
    what = CASES[case]
    num_q_heads, _, head_dim = sizes.heads
    if case == "decode":
        kv_bytes = kv_token_bytes(sizes.kv_cache.shape, sizes.kv_dtype)
        return chip.cycles(what.chunk_kv * kv_bytes / chip.hbm_bytes_per_s), "HBM"
    rows = what.chunk_q * num_q_heads
    deep, wide = -(-head_dim // chip.mxu_size), -(-what.chunk_kv // chip.mxu_size)
    # Q K^T contracts head_dim, P V contracts the chunk; both push every row once a tile.
    return 2 * rows * deep * wide / (chip.mxu_rows_per_cycle * chip.num_mxus), "MATMUL"


def page_issue(schedule, run) -> int:
    """Bundles executed in the smallest loops or regions that start copies and multiply nothing."""
    starts = [bundle for kind, bundle, _ in run.copies if kind == "hbm_to_vmem"]
    spans = [span for _, span in schedule.loops.walk() if not _matmuls(schedule, span)]
    found = set()
    for bundle in starts:
        around = [(s.start, s.end) for s in spans if s.start <= bundle < s.end]
        if around:
            found.add(min(around, key=lambda span: span[1] - span[0]))
    inner = {span for span in found if not any(o != span and _inside(o, span) for o in found)}
    return sum(int(run.hits[start:end].sum()) for start, end in inner)


def _inside(span, other):
    return other[0] <= span[0] and span[1] <= other[1]


def innermost(schedule, run) -> int:
    """Bundles executed in the loops that multiply and have no loop inside that multiplies."""

    def loops_in(span):
        return [s for _, s in span.walk() if s.kind == "loop" and _matmuls(schedule, s)]

    return sum(
        int(run.hits[span.start : span.end].sum())
        for span in loops_in(schedule.loops)
        if loops_in(span) == [span]
    )


def regions(schedule, run, num_chunks) -> tuple[float | None, float | None]:
    """Bundles per chunk takes in the region that multiplies, without and with a mask.

    A kernel that computes both kinds of chunk has two such regions with the same products, of which
    a run without masks skips one; what has other products computes less than a whole block. Sizes
    are scaled by their products, to the work of one chunk. The branch into a region is counted with
    it.
    """
    per_chunk = schedule.slots(run.hits)["MATMUL"] / num_chunks
    passed, skipped = None, {}
    for _, span in schedule.loops.walk():
        inner = [s for child in span.children for _, s in child.walk()]
        matmuls = _matmuls(schedule, span)
        if span.kind != "region" or not matmuls or any(_matmuls(schedule, s) for s in inner):
            continue
        size = (span.num_bundles + DELAY_SLOTS + 1) * per_chunk / matmuls
        if run.hits[span.start]:
            passed = matmuls, size
        else:
            skipped[matmuls] = size
    if passed is None or passed[0] not in skipped:
        return None, None
    return passed[1], skipped[passed[0]]


def _matmuls(schedule, span) -> int:
    return schedule.slots(schedule.once(span))["MATMUL"]
