"""Time every rung and its peers on the attached device, and say what part of the chip that is.

On a TPU everything is timed. On a CPU only the rungs in plain JAX are: the others are TPU kernels,
which run there in an interpreter that simulates memory and semaphores, a thousand times slower and
not in proportion. What the lab knows about those without a TPU, it reads from the compiler.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from rpa import chips
from rpa.chips import AttentionCost, attention_cost
from rpa.lab import peers
from rpa.lab.batches import make_batch
from rpa.lab.bench.stopwatch import Chain, Timing, time_calls
from rpa.lab.predict.batch import predict_batch
from rpa.lab.predict.roofline import peak_flops_per_s
from rpa.lab.programs import Workload
from rpa.lab.schedule.execution import CannotRun
from rpa.lab.schedule.schedule import NoSchedule
from rpa.ladder import LADDER, kv_lens_of, q_lens_of
from rpa.ragged import RaggedBatch, check_call

INTERPRETED = "needs a TPU: the time of its interpreter says nothing"

TOO_LARGE = "does not fit in the device's memory"

PEERS = {"jax": {"jax": peers.jax_v2}, "tpu-inference": {"v3": peers.v3, "batched": peers.batched}}
"""What `--peer` times, by the package that it comes from."""

DEFAULTS = {
    "tpu": Workload("llama-3-8b", "bfloat16", "bfloat16", page_size=128, num_seqs=64, kv_len=4096),
    "cpu": Workload("smollm2-135m", "float32", "float32", page_size=16, num_seqs=8, kv_len=512),
}
"""What is timed unless the caller says otherwise: one layer, by the platform of the device."""


def batch_lengths(case, w: Workload) -> list[tuple[int, int]]:
    """(q_len, kv_len) of each sequence of a case.

    >>> w = Workload(num_seqs=16, kv_len=64)
    >>> batch_lengths("decode", w)[:2], batch_lengths("prefill", w), len(batch_lengths("mixed", w))
    ([(1, 64), (1, 64)], [(16, 64)], 16)
    """
    chunk = (max(1, w.kv_len // 4), w.kv_len)
    return {
        "decode": [(1, w.kv_len)] * w.num_seqs,
        "prefill": [chunk] * max(1, w.num_seqs // 16),
        "mixed": [(1, w.kv_len)] * (w.num_seqs - 1) + [chunk],
    }[case]


CASES = ("decode", "prefill", "mixed")


@dataclass(frozen=True)
class Row:
    """One kernel on one case; `timing` is None where `note` says why it was not timed.

    Attributes:
        case, kernel: which.
        timing: of one call.
        mbu: least HBM bytes of the batch (`rpa.chips.attention_cost`: every array once, no padding)
            over the bytes that the HBM could move in the time; None on a device without a peak.
        mfu: FLOP of the batch, as causal, over the peak's in the time, in the dtype of queries.
        predicted_us, calibrated_us: microseconds that the lab says for this batch on this chip
            (`rpa.lab.predict`), at peak and on a chip; None where it cannot say.
        low_us, high_us: the range of the latter.
        note: what else there is to say.
    """

    case: str
    kernel: str
    timing: Timing | None = None
    mbu: float | None = None
    mfu: float | None = None
    predicted_us: float | None = None
    calibrated_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    note: str = ""


PREDICTED = {
    "rung 7 plain": "plain",
    "rung 8 kernel": "rpa",
    "peer v3": "v3",
    "peer batched": "batched",
}
"""What the lab calls the contenders that it can predict."""

NO_PREDICTION = "There is no prediction for a CPU: the lab predicts from the schedule of a TPU."


def bench(w: Workload, cases=CASES, peer_packages=(), predict=True) -> Iterator[Row]:
    """Time all rungs, and the peers asked for, on the attached device.

    Args:
        w: model, dtypes and sizes; `q_len` is not used, each case has its own.
        cases: of `CASES`.
        peer_packages: of `PEERS`.
        predict: say on a TPU what the lab predicts, too; compiles each kernel once more, with its
            schedule written down, which takes minutes the first time.

    Yields:
        A Row for each case and kernel, as soon as it is timed.
    """
    chip = chips.current()
    for case in cases:
        batch = batch_of(case, w)
        cost = attention_cost(
            q_lens_of(batch),
            kv_lens_of(batch),
            *w.heads,
            dtype=w.dtype,
            kv_dtype=w.kv_dtype,
        )
        for name, contender in contenders(w, batch, peer_packages):
            note = contender.refuses(batch, chip)
            if note is not None:
                yield Row(case, name, note=note)
                continue
            timing = measure(w, batch, contender)
            if timing is None:
                yield Row(case, name, note=TOO_LARGE)
                continue
            row = Row(case, name, timing, note=contender.note)
            if chip is not None:
                row = with_utilisation(row, cost, chip, w.dtype)
                row = with_prediction(row, w, batch, chip) if predict else row
            yield row


def check_cases(w: Workload, cases=CASES):
    """Refuse before anything is timed what a rung would refuse: rung 8 comes last, after minutes.

    Raises:
        ValueError: in the words of the rungs.
    """
    for case in cases:
        batch = batch_of(case, w)
        num_tokens = int(batch.cu_q_lens[-1])
        new = w.kv(num_tokens)
        check_call(w.queries(num_tokens), new, new, w.kv_cache, batch)


def with_prediction(row: Row, w: Workload, batch: RaggedBatch, chip) -> Row:
    """The row with what the lab predicts, or with a note why it does not."""
    if row.kernel not in PREDICTED:
        return row
    sizes = {"model": w.model, "page_size": w.page_size, "dtype": w.dtype, "kv_dtype": w.kv_dtype}
    try:
        predicted = predict_batch(PREDICTED[row.kernel], chip, batch, **sizes)
    except (NoSchedule, CannotRun) as error:
        return replace(row, note=f"{row.note} no prediction: {error}".strip())
    names = ("calibrated_us", "low_us", "high_us")
    found = {name: getattr(predicted, name) for name in names}
    return replace(row, predicted_us=predicted.time_us, **found)


def measure(w: Workload, batch: RaggedBatch, contender) -> Timing | None:
    """Time one contender on random arrays; None where the device has not enough memory for it."""
    try:
        arrays = make_arrays(w, batch, contender.cache_shape)
        return time_calls(Chain(contender.attend, *arrays).run)
    except jax.errors.JaxRuntimeError as error:
        # A rung that pads every sequence to the longest may want more than the chip has: that is
        # a result, and the others are still to be timed.
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise


@dataclass(frozen=True)
class Contender:
    """A kernel to time.

    Attributes:
        attend: (queries, keys, values, kv_cache) -> (output, kv_cache).
        refuses: (batch, chip or None) -> why it is not timed, or None.
        cache_shape: of the cache that it wants.
        note: what the time does not say.
    """

    attend: Callable
    refuses: Callable
    cache_shape: tuple[int, ...]
    note: str = ""


def contenders(w: Workload, batch: RaggedBatch, peer_packages) -> Iterator[tuple[str, Contender]]:
    """Names and kernels that run one batch: the ladder from the bottom, then the peers."""
    shape, sm_scale = w.kv_cache.shape, w.heads[2] ** -0.5
    for rung in LADDER:
        attend = partial(_with_batch, rung.attention_for(batch), batch, sm_scale)
        refuses = partial(_rung_refuses, rung)
        yield f"rung {rung.number} {rung.name}", Contender(attend, refuses, shape)
    metadata = [jnp.asarray(x) for x in jax.tree.leaves(batch)]
    for package in peer_packages:
        for name, function in PEERS[package].items():
            attend = partial(_with_metadata, function, metadata, sm_scale)
            contender = Contender(attend, partial(_peer_refuses, name), shape)
            if name == "jax":
                combined = (*shape[:2], 2 * w.heads[1], w.heads[2])
                note = "does not store the new tokens"
                contender = replace(contender, cache_shape=combined, note=note)
            yield f"peer {name}", contender


def _with_batch(attention, batch, sm_scale, queries, keys, values, kv_cache):
    return attention(queries, keys, values, kv_cache, batch, sm_scale=sm_scale)


def _with_metadata(function, metadata, sm_scale, queries, keys, values, kv_cache):
    return function(queries, keys, values, kv_cache, *metadata, sm_scale=sm_scale)


def _rung_refuses(rung, batch, chip) -> str | None:
    if chip is None and rung.is_kernel:
        return INTERPRETED
    return rung.refuses(batch)


def _peer_refuses(name, batch, chip) -> str | None:
    return peers.absence(name) or (INTERPRETED if chip is None else None)


def batch_of(case, w: Workload) -> RaggedBatch:
    """The batch of a case; the pages of all sequences are shuffled, as in a pool that was used."""
    return make_batch(batch_lengths(case, w), w.page_size)


def make_arrays(w: Workload, batch: RaggedBatch, cache_shape):
    """Random queries, keys and values of the batch's new tokens, and a random cache."""
    num_tokens = int(batch.cu_q_lens[-1])
    shapes = [w.queries(num_tokens), w.kv(num_tokens), w.kv(num_tokens)]
    shapes.append(jax.ShapeDtypeStruct(cache_shape, w.kv_dtype))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, each.shape, jnp.bfloat16).astype(each.dtype)
        for key, each in zip(keys, shapes, strict=True)
    ]


def with_utilisation(row: Row, cost: AttentionCost, chip, dtype) -> Row:
    """The row with MBU and MFU of its time on a chip.

    >>> cost = attention_cost(1, 4096, 32, 8, 128)
    >>> row = Row("decode", "rung 8", Timing(41e-6, 40e-6, 42e-6, calls=9, samples=5))
    >>> round(with_utilisation(row, cost, chips.chip("v5e"), "bfloat16").mbu, 2)
    0.5
    """
    seconds = row.timing.median_s
    return replace(
        row,
        mbu=cost.hbm_bytes / chip.hbm_bytes_per_s / seconds,
        mfu=cost.flops / peak_flops_per_s(chip, dtype) / seconds,
    )
