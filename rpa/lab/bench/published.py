"""Timings of the peers' kernels on real TPUs that somebody published, beside what the lab predicts.

The one check of `rpa.lab.predict` that is possible without a TPU: the same kernels at the same
shapes and block sizes, compiled here. Whatever the error is, it is printed. The fit takes more
timings, of kernels that exclude these versions: `rpa.lab.bench.timed_runs`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from rpa.lab.batches import make_batch
from rpa.lab.predict.batch import Prediction, predict_batch, workload_of
from rpa.lab.programs import Workload
from rpa.ragged import RaggedBatch

PR_3290 = "tpu-inference PR 3290"
PR_1492 = "sglang-jax PR 1492"


@dataclass(frozen=True)
class Timing:
    """One published number.

    Attributes:
        source: where it was published.
        kernel: a name in `rpa.lab.schedule.cases.KERNELS`.
        num_seqs, q_len, kv_len: sequences, all alike.
        time_us: as published.
        blocks: the kernel's block sizes, by case.
        model, kv_dtype: sizes of the layer, dtype of its cache.
        options: of the kernel.
    """

    source: str
    kernel: str
    num_seqs: int
    q_len: int
    kv_len: int
    time_us: float
    blocks: dict
    model: str
    kv_dtype: str
    options: dict = field(default_factory=dict)

    page_size = 256
    chip = "tpu7x"

    @property
    def batch(self) -> RaggedBatch:
        """The batch, its pages shuffled."""
        return make_batch([(self.q_len, self.kv_len)] * self.num_seqs, self.page_size)

    @property
    def sizes(self) -> Workload:
        """What its kernel is compiled for."""
        sizes = {"model": self.model, "page_size": self.page_size, "kv_dtype": self.kv_dtype}
        return workload_of(self.batch, **sizes)


def _batched(num_seqs, time_us, bkv, batch_size):
    """Decode of PR 3290: (q tokens fetched, computed, KV tokens, sequences a batch, buffers)."""
    blocks = {"decode": (1, 1, bkv, batch_size, 3)}
    shape = {"model": "8q-4kv-256", "kv_dtype": "float8_e4m3fn"}
    options = {"sliding_window": 1024}
    return Timing(PR_3290, "batched", num_seqs, 1, 1523, time_us, blocks, options=options, **shape)


def _mixed(num_seqs, time_us, bkv, sliding_window=None):
    """v3 with four new tokens a sequence, of PR 1492."""
    shape = {"model": "16q-1kv-256", "kv_dtype": "bfloat16"}
    options = {} if sliding_window is None else {"sliding_window": sliding_window}
    blocks = {"mixed": (4, bkv, 4, bkv)}
    return Timing(PR_1492, "v3", num_seqs, 4, 16_384, time_us, blocks, options=options, **shape)


TIMINGS = (
    _batched(16, 20, bkv=256, batch_size=8),
    _batched(16, 23, bkv=512, batch_size=8),
    _batched(128, 117, bkv=256, batch_size=16),
    _batched(128, 125, bkv=512, batch_size=8),
    _batched(818, 715, bkv=256, batch_size=16),
    _batched(818, 762, bkv=512, batch_size=8),
    _mixed(4, 54.3, bkv=2048),
    _mixed(32, 397.7, bkv=2048),
    _mixed(4, 9.8, bkv=256, sliding_window=128),
    _mixed(32, 49.8, bkv=256, sliding_window=128),
)
"""In microseconds, on a TPU7x; one TensorCore, as a device of JAX is."""


def compare(timings=TIMINGS, **assumptions) -> Iterator[tuple[Timing, Prediction]]:
    """Predict what was published.

    Args:
        timings: which.
        **assumptions: `hbm_efficiency` and `latency_us` of `rpa.lab.predict.predict_batch`.

    Yields:
        Each timing with its prediction.

    Raises:
        As `predict_batch`; also if a peer is absent, in words.
    """
    for timing in timings:
        yield timing, predict(timing, **assumptions)


def predict(timing: Timing, **assumptions) -> Prediction:
    """The prediction of one published timing."""
    return predict_batch(
        *(timing.kernel, timing.chip, timing.batch),
        room=timing.sizes,
        blocks=timing.blocks,
        options=timing.options,
        **assumptions,
    )
