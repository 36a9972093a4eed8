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

from rpa import chips
from rpa.chips import attention_cost
from rpa.lab.batches import metadata_of
from rpa.lab.compile.functions import is_own
from rpa.lab.predict.calibration import FITTED, Calibration, range_us
from rpa.lab.programs import Workload
from rpa.lab.schedule.call import execute_call
from rpa.lab.schedule.cases import KERNELS, check_products, compile_kernel
from rpa.lab.schedule.execution import Execution, chip_to_execute
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
        least_bytes: every array once, without padding (`rpa.chips.attention_cost`); None where it
            is not known what the kernel computes, see `predict_call`.
        flops: of both products, as causal; None likewise.
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
    least_bytes: int | None
    flops: int | None
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
    def mbu(self) -> float | None:
        """Model bandwidth utilisation: least bytes over what HBM could move in the time."""
        if self.least_bytes is None:
            return None
        return self.least_bytes / chips.chip(self.chip).hbm_bytes_per_s / self.time_us * 1e6

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilisation: causal FLOP over bfloat16 peak in the time."""
        if self.flops is None:
            return None
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
        options: further keyword arguments of the kernel: arrays, or what JSON can hold.
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
    known = chip_to_execute(chip)
    sizes = room or workload_of(
        batch, model=model, page_size=page_size, dtype=dtype, kv_dtype=kv_dtype
    )
    assumed = _assumed(hbm_efficiency, latency_us)
    runs = run_batch(kernel, known, batch, sizes, blocks=blocks, options=options)
    cost = _cost(batch, sizes, (options or {}).get("sliding_window"))
    return _prediction(kernel, known, runs, assumed, cost)


def predict_call(
    chip, fn, *args, kwargs=None, kernel="", hbm_efficiency=1.0, latency_us=0.0, use_cache=True
) -> Prediction:
    """Predict one call of a function of any signature with one Pallas kernel.

    Args:
        chip, hbm_efficiency, latency_us: as in `predict_batch`.
        fn, *args, kwargs, kernel, use_cache: as in `rpa.lab.schedule.call.execute_call`.

    Raises:
        As `predict_batch`.
    """
    known, assumed = chip_to_execute(chip), _assumed(hbm_efficiency, latency_us)
    options = {"kwargs": kwargs, "kernel": kernel, "use_cache": use_cache, "keep_events": True}
    schedule, run = execute_call(known, fn, *args, **options)
    return _prediction(schedule.function, known, [run], assumed)


def _assumed(hbm_efficiency, latency_us) -> Calibration:
    if not 0 < hbm_efficiency <= 1:
        raise ValueError(f"hbm_efficiency is {hbm_efficiency}, but is a part of the peak: (0, 1].")
    return Calibration(hbm_efficiency, latency_us)


def _prediction(kernel, chip, runs, assumed, cost=None) -> Prediction:
    bundles = sum(run.bundles for run in runs)
    cycles = float(assumed.time_us(runs, chip)) * 1e-6 * chip.clock_hz
    low_us, high_us = range_us(runs, chip)
    return Prediction(
        *(kernel, chip.name, bundles, cycles - bundles, sum(run.hbm_bytes for run in runs)),
        least_bytes=None if cost is None else cost.hbm_bytes,
        flops=None if cost is None else cost.flops,
        calibrated_us=float(FITTED.time_us(runs, chip)),
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
        run = schedule.execute(
            *(*program.args[:4], *metadata_of(batch)), kwargs=options, keep_events=True
        )
        flops = _least_flops(batch, case, sizes, chip, options or {})
        check_products(schedule, run, chip, flops, sizes.heads[2])
        runs.append(run)
    return runs


def _cost(batch, sizes, window):
    dtypes = {"dtype": sizes.dtype, "kv_dtype": sizes.kv_dtype}
    lengths = q_lens_of(batch), kv_lens_of(batch)
    return attention_cost(*lengths, *sizes.heads, sliding_window=window, **dtypes)


def _least_flops(batch, case, sizes, chip, options):
    """FLOP that the kernel of a case cannot do without.

    In cycles of bfloat16 products: an MXU may multiply 8-bit values twice as fast.
    """
    known, eight_bits = chips.chip(chip), jnp.dtype(sizes.kv_dtype).itemsize == 1
    slower = known.peak("bfloat16") / known.peak(sizes.kv_dtype) if eight_bits else 1.0
    num_decode = int(batch.distribution[0])
    mine = {"decode": slice(0, num_decode), "mixed": slice(num_decode, None)}.get(case, slice(None))
    lengths, window = (
        (q_lens_of(batch)[mine], kv_lens_of(batch)[mine]),
        options.get("sliding_window"),
    )
    return slower * attention_cost(*lengths, *sizes.heads, sliding_window=window).flops


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
