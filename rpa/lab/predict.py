"""How long a batch takes on a chip that is not here: from the schedule, its copies and its waits.

    time = (bundles executed + cycles stalled in waits) / clock

Nothing is fitted. The bundles are those of the compiled kernel, run on the batch's own lengths and
page table; its copies are put on a queue with HBM's bandwidth in the cycle in which the kernel
starts them, and a wait stalls until its copy has arrived. So compute and DMA overlap as the kernel
overlaps them. Two numbers about HBM are assumptions, and arguments: the part of the peak bandwidth
that copies reach, and their latency. `rpa.lab.published` compares with timings of real TPUs.

Not in it: launching the kernel, instruction fetch, and what XLA does before and after it.
"""

from dataclasses import dataclass, replace

from rpa import chips
from rpa.chips import attention_cost
from rpa.lab.batches import metadata_of
from rpa.lab.programs import Workload
from rpa.lab.schedule_cases import compile_kernel
from rpa.lab.schedule_clock import cycles_with_waits
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
    """

    kernel: str
    chip: str
    bundles: int
    stalled_cycles: float
    hbm_bytes: int
    least_bytes: int
    flops: int

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
    hbm_efficiency=1.0,
    latency_us=0.0,
) -> Prediction:
    """Predict one call of a kernel on a batch.

    A range of the batch without sequences is not counted, although its kernel is launched.

    Args:
        kernel: "rpa", "v3" or "batched": a name in `rpa.lab.schedule_cases.KERNELS`.
        chip: anything that `rpa.chips.chip` knows.
        batch: NumPy arrays, as `RaggedBatch.from_lengths` makes them.
        model: a name in `rpa.lab.programs.MODELS`.
        page_size: tokens of a page.
        dtype, kv_dtype: of queries, and of the cache.
        blocks: {"decode": sizes, "mixed": sizes} of the kernel, its own default where missing.
        options: further keyword arguments of the kernel, only what JSON can hold.
        hbm_efficiency: part of the peak bandwidth that copies reach.
        latency_us: from the end of a copy's turn until its wait ends.

    Raises:
        rpa.lab.schedule.NoSchedule: if the kernel does not compile for the chip.
        rpa.lab.schedule_run.CannotRun: if its schedule cannot be executed.
        ValueError: if hbm_efficiency is not in (0, 1], or model or chip is unknown.
    """
    if not 0 < hbm_efficiency <= 1:
        raise ValueError(f"hbm_efficiency is {hbm_efficiency}, but is a part of the peak: (0, 1].")
    known = chips.chip(chip)
    sizes = workload_of(batch, model=model, page_size=page_size, dtype=dtype, kv_dtype=kv_dtype)
    bytes_per_cycle = known.hbm_bytes_per_s / known.clock_hz * hbm_efficiency
    bundles, cycles, moved = 0, 0.0, 0
    for case in cases_of(batch):
        schedule, program = compile_kernel(
            kernel, case, known, sizes, blocks=(blocks or {}).get(case), options=options
        )
        run = schedule.execute(*program.args[:4], *metadata_of(batch), keep_events=True)
        bundles += run.bundles
        cycles += cycles_with_waits(run, bytes_per_cycle, latency_us * 1e-6 * known.clock_hz)
        moved += sum(
            size * count * kind.split("_to_").count("hbm")
            for (kind, _, size), count in run.copies.items()
        )
    cost = attention_cost(
        q_lens_of(batch), kv_lens_of(batch), *sizes.heads, dtype=dtype, kv_dtype=kv_dtype
    )
    return Prediction(
        *(kernel, known.name, bundles, cycles - bundles, moved),
        least_bytes=cost.hbm_bytes,
        flops=cost.flops,
    )


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
