"""How long a batch takes on a chip that is not here: from the schedule, its copies and its waits.

    time = (bundles executed + cycles stalled in waits) / clock

Nothing in `time_us` is fitted: it is the time at peak, which no chip reaches. The bundles are those
of the compiled kernel, run on the batch's own lengths and page table; its copies are put on a queue
with HBM's bandwidth in the cycle in which the kernel starts them, and a wait stalls until its copy
has arrived. So compute and DMA overlap as the kernel overlaps them. Two numbers about HBM are
assumptions, and arguments: the part of the peak bandwidth that copies reach, and their latency.

What a chip takes is `calibrated_us`, within `low_us` to `high_us`: five numbers fitted to published
timings of real TPUs (`rpa.lab.predict.calibration`). `rpa.lab.bench.published` compares both times
with them.

In neither of them: what XLA does before and after the kernel.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from rpa import chips
from rpa.chips import attention_cost
from rpa.lab.batches import metadata_of
from rpa.lab.compile.functions import is_own
from rpa.lab.predict.calibration import FITTED, Calibration, range_us
from rpa.lab.programs import Workload
from rpa.lab.schedule.cases import KERNELS, check_products, compile_kernel
from rpa.lab.schedule.execution import Execution
from rpa.ladder import kv_lens_of, q_lens_of
from rpa.paging import cdiv
from rpa.ragged import RaggedBatch


@dataclass(frozen=True)
class Prediction:
    """What one call of a kernel takes on a chip: predicted, not measured.

    Attributes:
        kernel, chip: names.
        bundles: cycles in which the core issues.
        stalled_cycles: cycles in which it waits for copies.
        hbm_bytes: moved by the kernel's own copies; one inside HBM counts twice.
        least_bytes: every array once, without padding (`rpa.chips.attention_cost`).
        flops: of both products, as causal.
        calibrated_us: microseconds with what was fitted to published timings,
            `rpa.lab.predict.calibration.FITTED`: what a chip takes most likely.
        low_us, high_us: the range that holds nine of ten chips' times, as far as published timings
            tell; None where nothing was calibrated.
    """

    kernel: str
    chip: str
    bundles: int
    stalled_cycles: float
    hbm_bytes: int
    least_bytes: int
    flops: int
    calibrated_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None

    @property
    def time_us(self) -> float:
        """Microseconds."""
        return (self.bundles + self.stalled_cycles) / chips.chip(self.chip).clock_hz * 1e6

    @property
    def hbm_time_us(self) -> float:
        """Microseconds that the moved bytes alone take at peak bandwidth."""
        return self.hbm_bytes / chips.chip(self.chip).hbm_bytes_per_s * 1e6

    @property
    def efficiency(self) -> float:
        """Part of the time in which HBM moves the kernel's bytes, if it moves them at its peak."""
        return self.hbm_time_us / self.time_us

    @property
    def calibrated_efficiency(self) -> float | None:
        """The same part of the calibrated time."""
        return None if self.calibrated_us is None else self.hbm_time_us / self.calibrated_us

    @property
    def mbu(self) -> float:
        """Model bandwidth utilisation: least bytes over what HBM could move in the time."""
        return self.least_bytes / chips.chip(self.chip).hbm_bytes_per_s / self.time_us * 1e6

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation: causal FLOP over bfloat16 peak in the time."""
        return self.flops / chips.chip(self.chip).peak("bfloat16") / self.time_us * 1e6


def predict_batch(
    kernel,
    chip,
    batch: RaggedBatch,
    *,
    model="llama-3-8b",
    page_size=128,
    dtype="bfloat16",
    kv_dtype="bfloat16",
    blocks=None,
    options=None,
    room=None,
    hbm_efficiency=1.0,
    latency_us=0.0,
) -> Prediction:
    """Predict one call of a kernel on a batch.

    A range of the batch without sequences is not counted, although its kernel is launched.

    Args:
        kernel: a name in `rpa.lab.schedule.cases.KERNELS`; or your own, "file.py:function", which
            takes the whole batch in one kernel.
        chip: anything that `rpa.chips.chip` knows.
        batch: NumPy arrays, as `RaggedBatch.from_lengths` makes them.
        model: a name in `rpa.shapes.MODELS`, or (num_q_heads, num_kv_heads, head_dim).
        page_size: tokens of a page.
        dtype, kv_dtype: of queries, and of the cache.
        blocks: {"decode": sizes, "mixed": sizes} of the kernel, its own default where missing.
        options: further keyword arguments of the kernel, only what JSON can hold.
        room: a `Workload`, the sizes that the kernel is compiled for, of which the batch has
            `max_num_seqs` and `pages_per_seq`; None takes those of the batch. Batches that share a
            room share a kernel.
        hbm_efficiency: part of the peak bandwidth that copies reach.
        latency_us: from the end of a copy's turn until its wait ends.

    Raises:
        rpa.lab.schedule.NoSchedule: if the kernel does not compile for the chip.
        rpa.lab.schedule.execution.CannotRun: if its schedule cannot be executed.
        ValueError: if hbm_efficiency is not in (0, 1], or model or chip is unknown.
    """
    if not 0 < hbm_efficiency <= 1:
        raise ValueError(f"hbm_efficiency is {hbm_efficiency}, but is a part of the peak: (0, 1].")
    known = chips.chip(chip)
    sizes = room or workload_of(
        batch, model=model, page_size=page_size, dtype=dtype, kv_dtype=kv_dtype
    )
    runs = run_batch(kernel, known, batch, sizes, blocks=blocks, options=options)
    bundles = sum(run.bundles for run in runs)
    assumed_us = Calibration(hbm_efficiency, latency_us).time_us(runs, known)
    assumed = float(assumed_us) * 1e-6 * known.clock_hz
    cost = _cost(batch, sizes)
    low_us, high_us = range_us(runs, known)
    return Prediction(
        *(kernel, known.name, bundles, assumed - bundles, sum(run.hbm_bytes for run in runs)),
        least_bytes=cost.hbm_bytes,
        flops=cost.flops,
        calibrated_us=float(FITTED.time_us(runs, known)),
        low_us=low_us,
        high_us=high_us,
    )


def run_batch(
    kernel, chip, batch: RaggedBatch, sizes: Workload, *, blocks=None, options=None
) -> list[Execution]:
    """Execute the schedules of the kernels that a batch needs, with their events.

    Args:
        kernel, chip, batch, blocks, options: as in `predict_batch`.
        sizes: what the kernels are compiled for.

    Raises:
        As `predict_batch`.
    """
    runs = []
    cases = cases_of(batch)
    if is_own(kernel):
        cases = ["all"]  # decodes and the rest alike, in one call
    elif len(set(KERNELS[kernel].names.values())) == 1:
        cases = cases[-1:]  # one kernel takes both kinds of sequence
    for case in cases:
        schedule, program = compile_kernel(
            kernel, case, chip, sizes, blocks=(blocks or {}).get(case), options=options
        )
        run = schedule.execute(*program.args[:4], *metadata_of(batch), keep_events=True)
        flops = _least_flops(batch, case, sizes, chip, options or {})
        check_products(schedule, run, chip, flops, sizes.heads[2])
        runs.append(run)
    return runs


def _cost(batch, sizes):
    lengths = q_lens_of(batch), kv_lens_of(batch)
    return attention_cost(*lengths, *sizes.heads, dtype=sizes.dtype, kv_dtype=sizes.kv_dtype)


def _least_flops(batch, case, sizes, chip, options):
    """FLOP that the kernel of a case cannot do without: with a window, of its last queries only.

    In cycles of bfloat16 products: an MXU may multiply 8-bit values twice as fast.
    """
    known, eight_bits = chips.chip(chip), jnp.dtype(sizes.kv_dtype).itemsize == 1
    slower = known.peak("bfloat16") / known.peak(sizes.kv_dtype) if eight_bits else 1.0
    num_decode = int(batch.distribution[0])
    mine = {"decode": slice(0, num_decode), "mixed": slice(num_decode, None)}.get(case, slice(None))
    most = options.get("sliding_window") or np.iinfo(np.int64).max
    q_lens = np.minimum(q_lens_of(batch)[mine], most)
    kv_lens = np.where(q_lens > 0, np.minimum(kv_lens_of(batch)[mine], most), 0)
    return slower * attention_cost(q_lens, kv_lens, *sizes.heads).flops


def workload_of(batch: RaggedBatch, **options) -> Workload:
    """Sizes that hold a batch: its sequences and pages, and at least its tokens.

    >>> batch, _ = RaggedBatch.from_lengths([1, 5], [9, 7], [[0, 1, 2], [3, 4]])
    >>> sizes = workload_of(batch, model="llama-3-8b", page_size=4)
    >>> sizes.num_seqs * sizes.q_len, sizes.pages_per_seq
    (6, 3)
    """
    num_seqs = len(batch.kv_lens)
    sizes = Workload(num_seqs=num_seqs, **options)
    return replace(
        sizes,
        q_len=cdiv(int(batch.cu_q_lens[-1]), num_seqs),
        kv_len=len(batch.page_indices) // num_seqs * sizes.page_size,
    )


def cases_of(batch: RaggedBatch) -> list[str]:
    """Which of a function's kernels a batch needs.

    >>> batch, _ = RaggedBatch.from_lengths([1, 5], [9, 7], [[0, 1, 2], [3, 4]])
    >>> cases_of(batch)
    ['decode', 'mixed']
    """
    num_decode, _, num_seqs = map(int, batch.distribution)
    return ["decode"] * (num_decode > 0) + ["mixed"] * (num_seqs > num_decode)
