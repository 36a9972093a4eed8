"""Which operations the machine knows, on which chip they occur, and what shows that it is right.

Every kernel of `conformance_kernels` is compiled for a chip, executed with both orders of copies,
and held against `jax.numpy`. An operation is tested on a chip if a kernel that holds it is right.
"""

import dataclasses
from functools import partial

import jax
import numpy as np

from rpa import fused, plain, ragged_paged_attention, selftest, streamed, tiled
from rpa.lab.chip.conformance_kernels import KERNELS, TinyKernel
from rpa.lab.chip.door import DMA_ORDERS, prepare
from rpa.lab.chip.dump import compiled_texts, on_chip
from rpa.lab.chip.errors import ChipError
from rpa.lab.chip.evaluate import kernels_in
from rpa.lab.chip.instructions import INSTRUCTIONS
from rpa.lab.chip.text import parse, walk
from rpa.lab.programs import PROGRAMS, Workload
from rpa.yours import reference


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one kernel gave on one chip.

    Attributes:
        kernel: its name.
        chip: the chip's.
        operations: names of the instructions in it.
        wrong: what is wrong, in words; "" if nothing is.
    """

    kernel: str
    chip: str
    operations: frozenset[str]
    wrong: str


def check(kernel: TinyKernel, chip) -> Outcome:
    """Compile one kernel for a chip, execute it with both orders of copies, and compare."""
    wrong = ""
    try:
        prepared = prepare(kernel.call, *kernel.inputs, chip=chip)
        for dma in DMA_ORDERS:
            output = np.asarray(prepared(*kernel.inputs, dma=dma))
            wrong = wrong or difference(output, kernel.expected(), kernel.tolerance)
    except ChipError as error:
        wrong = f"{type(error).__name__}: {error}"
    return Outcome(kernel.name, chip, operations_of(kernel.call, kernel.inputs, chip), wrong)


def difference(output, expected, tolerance) -> str:
    """What is wrong with an output, in words, "" if nothing is; NaN equals NaN.

    >>> difference(np.float32([1, 2]), np.float32([1, 2.5]), 0.1)
    '1 of 2 elements differ, by up to 0.2'
    """
    if (output.shape, output.dtype) != (expected.shape, expected.dtype):
        return f"{output.dtype}{output.shape} instead of {expected.dtype}{expected.shape}"
    x, y = (array.astype(np.float64) for array in (output, expected))
    equal = (x == y) & (np.signbit(x) == np.signbit(y)) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):  # of two infinities
        error = np.where(equal, 0, np.abs(x - y) / np.maximum(1, np.abs(y)))
    wrong = ~(error <= tolerance) | (~equal if tolerance == 0 else False)
    if not wrong.any():
        return ""
    return f"{wrong.sum()} of {wrong.size} elements differ, by up to {error.max():.1g}"


def operations_of(function, args, chip) -> frozenset[str]:
    """Names of the instructions in the kernels of a function."""
    with on_chip(chip):
        closed = jax.make_jaxpr(function)(*args)
    found = set()
    for text in compiled_texts(kernels_in(closed), chip):
        for part in parse(text):
            found |= {operation.name for operation in walk(part.body)}
    return frozenset(found & set(INSTRUCTIONS))


def compile_all(kernels, chip):
    """Compile many kernels in one subprocess; `check` then finds them kept."""
    eqns = []
    for kernel in kernels:
        with on_chip(chip):
            eqns += kernels_in(jax.make_jaxpr(kernel.call)(*kernel.inputs))
    compiled_texts(eqns, chip)


def ladder_operations(chip) -> frozenset[str]:
    """Names of the instructions in the ladder's kernels.

    Rungs 4 to 6, and on the paths of the self-test rungs 7 and 8 and the kernel of a learner.
    """
    found = set()
    for name, function, q_len in (
        ("tiled", tiled.flash_attention, 40),
        ("streamed", streamed.paged_decode, 1),
        ("fused", fused.fused_attention, 8),
    ):
        for dtype in ("bfloat16", "float32"):
            sizes = Workload("llama-3-8b-on-4", dtype, dtype, num_seqs=3, q_len=q_len, kv_len=100)
            program = PROGRAMS[name](sizes)
            found |= operations_of(partial(function, **program.kwargs), program.args, chip)
    for path in selftest.PATHS:
        case = selftest.make_case(path)
        arrays = (case.queries, case.keys, case.values, case.kv_cache)
        found |= operations_of(rung_8(path, chip), (*arrays, *case.metadata), chip)
        if path.plain_too:
            found |= operations_of(rung_7(path), (*arrays, case.batch), chip)
            found |= operations_of(LEARNER, (*arrays, case.batch), chip)
    return frozenset(found)


def rung_8(path, chip):
    """The public function as the self-test calls it on one path."""
    return partial(
        ragged_paged_attention,
        **path.options,
        **selftest.BLOCKS,
        chunk_prefill_size=selftest.CHUNK_PREFILL_SIZE,
        backend="tpu",
        chip=chip,
        validate=False,
    )


def rung_7(path):
    """Rung 7 on a path that is marked `plain_too`."""
    block_q, block_kv, _, _ = selftest.BLOCKS["m_block_sizes"]
    sizes = {"block_q": block_q, "block_kv": block_kv, "interpret": False}
    return partial(plain.attention, sm_scale=path.head_dim**-0.5, **sizes, **path.options)


LEARNER = partial(reference.ragged_attention, sm_scale=0.1, block_tokens=32)
"""The whole kernel that the course's assembly line gives."""


def table(outcomes, ladder) -> list[str]:
    """Lines of the table of operations.

    Args:
        outcomes: of all kernels on all chips.
        ladder: {chip: names of the instructions in the ladder's kernels}.

    >>> lines = table([Outcome("sums", "v5e", frozenset(["vadd.f32"]), "")], {"v5e": {"vadd.f32"}})
    >>> lines[0].split(), next(line for line in lines if "vadd.f32" in line).split()
    (['operation', 'v5e', 'tested', 'by'], ['vadd.f32', 'tested,', 'ladder', 'sums'])
    """
    lines = [f"{'operation':34}" + "".join(f"{chip:16}" for chip in ladder) + "tested by"]
    for name in sorted(INSTRUCTIONS):
        marks, tests = [], {}
        for chip, seen in ladder.items():
            right = [o for o in outcomes if o.chip == chip and name in o.operations and not o.wrong]
            tests |= {o.kernel: None for o in right}
            words = ["tested"] * bool(right) + ["ladder"] * (name in seen)
            marks.append(", ".join(words) or "-")
        how = ", ".join(list(tests)[:3]) + (f" and {len(tests) - 3} more" if len(tests) > 3 else "")
        lines.append(f"{name:34}" + "".join(f"{mark:16}" for mark in marks) + how)
    return lines


def untested(outcomes, ladder) -> dict[str, set[str]]:
    """{chip: instructions that the ladder's kernels have there and no right tiny kernel has}."""
    return {
        chip: set(seen).difference(
            *(o.operations for o in outcomes if o.chip == chip and not o.wrong)
        )
        for chip, seen in ladder.items()
    }


def all_outcomes(chip, names=tuple(KERNELS)):
    """Yield the `Outcome` of each kernel that the chip's compiler takes."""
    kernels = [KERNELS[name] for name in names if chip in KERNELS[name].chips]
    compile_all(kernels, chip)
    for kernel in kernels:
        yield check(kernel, chip)
