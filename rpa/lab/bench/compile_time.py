"""How long the compiler takes for rung 8, beside a peer at blocks of the same size.

A kernel that takes a minute to compile is a kernel that nobody changes. Both are compiled anew, one
after the other and in turns first, and judged by CPU seconds, so that other processes on the
machine do not decide.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from rpa.lab import peers, programs
from rpa.lab.compile.compiler import CompileResult, compile_for
from rpa.lab.programs import Program, Workload
from rpa.lab.schedule.execution import CHIPS

LIMIT, GOAL = 1.5, 1.25
"""What rung 8 may at most take of a peer's time, and what it should."""

BLOCKS = {"d_block_sizes": (1, 1024, 1, 1024), "m_block_sizes": (128, 1024, 128, 512)}
"""(bq, bkv, bq_c, bkv_c) of both kernels of both sides; they fit in the VMEM of every chip."""


def _workload(model, page_size, kv_dtype="bfloat16") -> Workload:
    return Workload(model, "bfloat16", kv_dtype, page_size, num_seqs=64, q_len=8, kv_len=8192)


ROWS = {
    "Llama 3 8B, page 16": _workload("llama-3-8b", 16),
    "Llama 3 8B, page 128": _workload("llama-3-8b", 128),
    "Llama 3 70B on 8 chips, page 128": _workload("llama-3-70b-on-8", 128),
    "SmolLM2 135M, page 16": _workload("smollm2-135m", 16),
    "head_dim 256, float8 KV, page 64": _workload("head-dim-256", 64, "float8_e4m3fn"),
}
"""What is compiled: 512 tokens of 64 sequences, of at most 8,192 tokens each."""


@dataclass(frozen=True)
class Comparison:
    """One row on one chip.

    Attributes:
        row: a name in ROWS.
        chip: short name of the chip.
        ours, theirs: rung 8 and the peer at BLOCKS; `theirs` is None where the peer is absent.
        default: rung 8 at the blocks that it chooses itself.
    """

    row: str
    chip: str
    ours: CompileResult
    theirs: CompileResult | None
    default: CompileResult

    @property
    def ratio(self) -> float | None:
        """CPU seconds of rung 8 over those of the peer; None without two results."""
        if self.theirs is None or not (self.ours.ok and self.theirs.ok):
            return None
        return cpu_s(self.ours) / cpu_s(self.theirs)

    @property
    def verdict(self) -> str:
        """What the ratio means, in a word or two.

        >>> fast, slow = (CompileResult("v5e", "f", True, compile_cpu_s=s) for s in (4, 5.8))
        >>> Comparison("a row", "v5e", slow, fast, slow).verdict
        'over the goal of 1.25'
        """
        if not (self.ours.ok and self.default.ok):
            return "REFUSED by the compiler"
        if self.ratio is None:
            return "no peer to compare with" if self.theirs is None else "peer refused"
        for name, most in (("LIMIT", LIMIT), ("goal", GOAL)):
            if self.ratio > most:
                return f"over the {name} of {most}"
        return "ok"

    @property
    def passed(self) -> bool:
        """Whether rung 8 compiled, at both blocks, within the limit where there is a peer."""
        return self.ours.ok and self.default.ok and (self.ratio is None or self.ratio <= LIMIT)


def cpu_s(result: CompileResult) -> float:
    """CPU seconds of tracing, lowering and compiling together."""
    return result.trace_cpu_s + result.compile_cpu_s


def compare(peer="v3", chips=CHIPS, repeats=1) -> Iterator[Comparison]:
    """Compile every row for every chip: rung 8 and the peer at the same blocks, rung 8 at its own.

    Args:
        peer: "v3", the one that takes the same block sizes.
        chips: short names.
        repeats: how often each is compiled; the fastest counts, since noise only adds.

    Yields:
        One Comparison after another; each takes half a minute.

    Raises:
        ValueError: if the compiler is told to dump, which makes it up to 30 times slower.
    """
    for number, (row, chip) in enumerate((row, chip) for row in ROWS for chip in chips):
        yield compare_row(row, chip, peer, repeats, number)


def compare_row(row, chip, peer="v3", repeats=1, first_turn=0) -> Comparison:
    """Compile one row for one chip.

    Args:
        row: a name in ROWS.
        chip: short name.
        peer, repeats: as in `compare`.
        first_turn: who begins: rung 8 if it is even.

    Raises:
        ValueError: as `compare`.
    """
    if "dump" in os.environ.get("LIBTPU_INIT_ARGS", ""):
        raise ValueError(
            "LIBTPU_INIT_ARGS asks the compiler for a dump, which would be most of the time "
            "measured here: unset it."
        )
    jobs = {"ours": programs.kernel(ROWS[row])}
    if peers.absence(peer) is None:
        jobs["theirs"] = peers.PROGRAMS[peer](ROWS[row])
    runs = {side: [] for side in jobs}
    for turn in range(first_turn, first_turn + repeats):
        for side in list(jobs) if turn % 2 == 0 else reversed(jobs):
            runs[side].append(_compile(jobs[side], chip, BLOCKS, use_cache=False))
    best = {side: min(results, key=cpu_s) for side, results in runs.items()}
    # Its time is not compared, only whether it fits.
    default = _compile(jobs["ours"], chip, {}, use_cache=True)
    return Comparison(row, chip, best["ours"], best.get("theirs"), default)


def _compile(program: Program, chip, blocks, *, use_cache) -> CompileResult:
    return compile_for(
        chip,
        program.function,
        *program.args,
        kwargs=program.kwargs | blocks | {"chip": chip},
        donate_argnums=program.donate_argnums,
        use_cache=use_cache,
    )
