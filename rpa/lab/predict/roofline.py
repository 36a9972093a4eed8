"""The roofline of a batch: what bounds its attention on a chip, and the least time it can take.

    intensity = FLOP / HBM bytes          least time = max(FLOP / peak, bytes / bandwidth)

The bytes are those of an ideal kernel, every array once (`rpa.chips.attention_cost`), and FLOP are
counted as causal. The peak is that of the part of the MXU which heads of this size can fill
(`rpa.chips.mxu_fill`): no kernel is faster than this, and none is told how to reach it.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from rpa import chips
from rpa.shapes import heads_of


@dataclass(frozen=True)
class Floor:
    """The least that attention of some sequences takes on one TensorCore of a chip.

    Attributes:
        chip: short name.
        part: which sequences: "decode", "prefill", or "all".
        flops: of both products, as causal.
        hbm_bytes: every array once, without padding.
        peak_flops_per_s: of the dtype, with the whole MXU.
        mxu_fill: part of the MXU that heads of this size can use.
    """

    chip: str
    part: str
    flops: int
    hbm_bytes: int
    peak_flops_per_s: float
    mxu_fill: float

    @property
    def intensity_flops_per_byte(self) -> float:
        """FLOP per byte of HBM."""
        return self.flops / self.hbm_bytes

    @property
    def ridge_flops_per_byte(self) -> float:
        """The intensity from which on the MXU sets the pace."""
        return self.mxu_fill * self.peak_flops_per_s / chips.chip(self.chip).hbm_bytes_per_s

    @property
    def memory_us(self) -> float:
        """Microseconds to move the bytes at peak bandwidth."""
        return self.hbm_bytes / chips.chip(self.chip).hbm_bytes_per_s * 1e6

    @property
    def compute_us(self) -> float:
        """Microseconds of the products, on the part of the MXU that they can fill."""
        return self.flops / (self.mxu_fill * self.peak_flops_per_s) * 1e6

    @property
    def time_us(self) -> float:
        """The larger of the two, in microseconds."""
        return max(self.memory_us, self.compute_us)

    @property
    def bound(self) -> str:
        """What it waits for: "compute" or "memory"."""
        return "compute" if self.compute_us > self.memory_us else "memory"


@dataclass(frozen=True)
class Point:
    """A run, for `rpa.figures.roofline`: a `rpa.lab.predict.Prediction` has the same attributes.

    Attributes:
        flops: FLOP done.
        hbm_bytes: moved.
        time_us: microseconds.
    """

    flops: float
    hbm_bytes: float
    time_us: float


def peak_flops_per_s(chip, dtype) -> float:
    """Peak FLOP/s for queries of a dtype; a float32 product at full precision is six bfloat16 ones.

    >>> peak_flops_per_s("v5e", "bfloat16") / peak_flops_per_s("v5e", "float32")
    6.0
    """
    if jnp.dtype(dtype) == jnp.float32:
        return chips.chip(chip).peak("bfloat16") / 6
    return chips.chip(chip).peak(dtype)


def floors(
    lengths, chip, *, model="llama-3-8b", dtype="bfloat16", kv_dtype="bfloat16"
) -> list[Floor]:
    """The floors of a batch on a chip: of its decodes, of the others, and of all together.

    Args:
        lengths: (q_len, kv_len) of each sequence.
        chip: anything that `rpa.chips.chip` knows.
        model: a name in `rpa.shapes.MODELS`, or its three numbers of heads.
        dtype, kv_dtype: of queries, and of the cache.

    Returns:
        One Floor a part that has sequences, and one of all if there are two parts. That of all may
        be less than the sum: one part can compute while the other loads.

    Raises:
        ValueError: for an unknown chip or a dtype without a peak, or lengths that cannot be.

    >>> decode, prefill, both = floors([(1, 4096)] * 64 + [(1024, 4096)], "v5e")
    >>> decode.bound, round(decode.intensity_flops_per_byte, 1), prefill.bound, both.part
    ('memory', 4.0, 'compute', 'all')
    >>> both.time_us < decode.time_us + prefill.time_us
    True
    """
    known, heads = chips.chip(chip), heads_of(model)
    lengths = [length for length in lengths if length[0]]  # an idle slot costs nothing
    if not lengths:
        raise ValueError("lengths have no new token, so there is nothing to compute or to move.")
    parts = {
        "decode": [length for length in lengths if length[0] <= 1],
        "prefill": [length for length in lengths if length[0] > 1],
        "all": list(lengths),
    }
    if not (parts["decode"] and parts["prefill"]):
        del parts["all"]
    found = []
    for part, sequences in parts.items():
        if sequences:
            q_lens, kv_lens = zip(*sequences, strict=True)
            cost = chips.attention_cost(q_lens, kv_lens, *heads, dtype=dtype, kv_dtype=kv_dtype)
            peak, fill = peak_flops_per_s(known, dtype), chips.mxu_fill(known, heads[2])
            found.append(Floor(known.name, part, cost.flops, cost.hbm_bytes, peak, fill))
    return found
