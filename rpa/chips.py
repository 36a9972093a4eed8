"""What each chip has, and what a shape can cost at best: the numbers everything else asks for.

All numbers are **per TensorCore**, as in JAX's `TpuInfo`: a kernel runs on one TensorCore, its
buffers must fit that core's VMEM, and its DMAs share that core's part of the HBM bandwidth. v5e
and v6e have one TensorCore a chip, so chip and core are the same. TPU7x and v5p have two:
multiply by `cores_per_chip` for the chip. (JAX shows a TPU7x chip as two devices, one a core.)

A roofline (Williams, Waterman and Patterson 2009) is a floor under the time, never a forecast:
the larger of the time to compute and the time to move the bytes, as if both ran at their peak.
"""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

KIB, MIB, GIB = 2**10, 2**20, 2**30

LANES, SUBLANES = 128, 8
"""A vector register holds 8 sublanes x 128 lanes of 32 bits, on every TPU listed here."""

VREG_BYTES = LANES * SUBLANES * 4
"""Bytes of one vector register."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One TensorCore of a TPU chip and its share of the chip's HBM; `SOURCES` says where from.

    Attributes:
        name: the short name, e.g. "v5e".
        device_kinds: what `jax.devices()[0].device_kind` says on this chip.
        topology: a name for `jax.experimental.topologies`, to compile with no such chip here.
        url: the vendor's page about the chip.
        cores_per_chip: TensorCores a chip.
        cores_per_device: TensorCores that JAX shows as one device (2 is "megacore").
        clock_hz: cycles per second of the TensorCore.
        mxu_size: side of the systolic array of one MXU, the matrix unit, in multipliers.
        num_mxus: MXUs of the core.
        mxu_rows_per_cycle: bfloat16 rows that enter one MXU a cycle, see `SOURCES`.
        peak_flops_per_s: FLOP/s for each type that the MXU multiplies natively; see `peak`.
        hbm_bytes: size of the HBM.
        hbm_bytes_per_s: bytes per second between HBM and the chip.
        vmem_bytes: size of VMEM, the scratchpad that the vector and matrix units read.
        smem_bytes: size of SMEM, the scalar core's memory.
        num_vregs: vector registers of `VREG_BYTES`.
        valu_slots, eup_slots: vector arithmetic (VALU) and transcendental (EUP: exp, tanh)
            instructions per cycle.
        vload_slots, vstore_slots: vector registers loaded from and stored to VMEM a cycle.
        ici_links: links of a *chip* to its neighbours, over the interconnect between chips (ICI).
        ici_bytes_per_s: bytes per second over one link, in one of its two directions.
    """

    name: str
    device_kinds: tuple[str, ...]
    topology: str
    url: str
    cores_per_chip: int
    cores_per_device: int
    clock_hz: float
    mxu_size: int
    num_mxus: int
    mxu_rows_per_cycle: int
    peak_flops_per_s: Mapping[str, float]
    hbm_bytes: int
    hbm_bytes_per_s: float
    vmem_bytes: int
    smem_bytes: int
    num_vregs: int
    valu_slots: int
    eup_slots: int
    vload_slots: int
    vstore_slots: int
    ici_links: int
    ici_bytes_per_s: float

    def peak(self, dtype="bfloat16"):
        """Return the peak FLOP/s of a matrix product of `dtype`, on one TensorCore.

        Where the MXU does not multiply an 8-bit type natively, values are widened to bfloat16
        first, so the bfloat16 peak holds.

        Raises:
            ValueError: for a type without a published peak, float32 among them.

        >>> chip("v5e").peak("int8") / chip("v5e").peak("bfloat16")
        2.0
        """
        dtype_name = jnp.dtype(dtype).name
        family = "float8" if dtype_name.startswith("float8") else dtype_name
        if family in self.peak_flops_per_s:
            return self.peak_flops_per_s[family]
        if family in ("float8", "int8"):
            return self.peak_flops_per_s["bfloat16"]
        raise ValueError(
            f"dtype: no published peak for {dtype_name} on {self.name}; expected bfloat16, int8 "
            "or a float8 type. A float32 product at Precision.HIGHEST is six bfloat16 products: "
            "use peak('bfloat16') / 6."
        )

    @property
    def mxu_flops_per_cycle(self):
        """bfloat16 FLOP per cycle of all MXUs of the core; a multiply and an add count as two."""
        return 2 * self.mxu_size**2 * self.mxu_rows_per_cycle * self.num_mxus

    @property
    def vreg_file_bytes(self):
        """Bytes in all vector registers."""
        return self.num_vregs * VREG_BYTES

    @property
    def vmem_load_bytes_per_s(self):
        """Bytes a second from VMEM to vector registers, every load slot used in every cycle."""
        return self.vload_slots * VREG_BYTES * self.clock_hz

    def cycles(self, seconds):
        """Return how many cycles of the TensorCore `seconds` are.

        >>> round(chip("v5e").cycles(1e-6))
        1500
        """
        return seconds * self.clock_hz


_TPU_INFO = "JAX TpuInfo (jax 0.10.2, jax/_src/pallas/mosaic/tpu_info.py)"
_SCHEDULE = (
    "the capacity row of the compiler's schedule (libtpu 0.0.52, LIBTPU_INIT_ARGS=--xla_jf_dump_to)"
)

SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "cores_per_chip": _TPU_INFO + ", num_physical_tensor_cores_per_chip; vendor pages",
        "cores_per_device": _TPU_INFO + ", num_cores of an ahead-of-time topology",
        "clock_hz": "peak bfloat16 FLOP/s / FLOP per cycle: 1.503, 1.755, 2.203, 1.751 GHz before "
        "rounding. v5e and v5p as in the scaling book, https://jax-ml.github.io/scaling-book/tpus",
        "mxu_size": _TPU_INFO + ", mxu_column_size",
        "num_mxus": _TPU_INFO + f", num_mxus; and MATMUL in {_SCHEDULE}. One version of the "
        "vendor's v6e page says 4",
        "mxu_rows_per_cycle": "a 1024x1024x1024 bfloat16 matmul needs 16,384 (v5e) and 4,096 (v6e, "
        "TPU7x) MATMUL slots an MXU: 2 * 1024^3 / (slots * num_mxus * 2 * mxu_size^2) = 1 and 2. "
        "Read from the schedule; the vendor does not publish it",
        "peak_flops_per_s": _TPU_INFO + ", *_ops_per_second. Vendor pages: v5e 197 T bf16, 393 T "
        "int8; v6e 918 T, 1,836 T; TPU7x 2,307 T bf16, 4,614 T fp8 a chip; v5p 459 T bf16 a chip",
        "hbm_bytes": "vendor pages, a chip: 16 (v5e), 32 (v6e), 192 (TPU7x), 95 GiB (v5p)",
        "hbm_bytes_per_s": _TPU_INFO + ", mem_bw_bytes_per_second. Vendor pages: v5e 819 (newer: "
        "800), v6e 1,640 (newer: 1,600) GB/s. The scaling book has 2,800 GB/s for a v5p chip",
        "vmem_bytes": _TPU_INFO + ", vmem_capacity_bytes",
        "smem_bytes": _TPU_INFO + ", smem_capacity_bytes",
        "num_vregs": "the highest register that the compiler allocates in a matmul that fills them "
        "(libtpu 0.0.52): v0 to v63",
        "valu_slots": "VALU in " + _SCHEDULE,
        "eup_slots": "EUP in " + _SCHEDULE,
        "vload_slots": "VLOAD in " + _SCHEDULE,
        "vstore_slots": "VSTORE in " + _SCHEDULE,
        "ici_links": "vendor pages: 4 ports and a 2D torus (v5e, v6e), a 3D torus (v5p, TPU7x)",
        "ici_bytes_per_s": "the scaling book, https://jax-ml.github.io/scaling-book/tpus, one-way "
        "per link. Vendor pages, all links and both directions of a chip: 400 (v5e), 800 (v6e), "
        "1,200 GB/s (v5p, TPU7x), a tenth more than links * 2 * this",
    }
)
"""Where each number of a `Chip` comes from. A test compares them with TpuInfo where libtpu is."""


def _per_core(**flops_per_s):
    return MappingProxyType(flops_per_s)


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v5e": Chip(
            name="v5e",
            device_kinds=("TPU v5 lite", "TPU v5e"),
            topology="v5e:2x2",
            url="https://cloud.google.com/tpu/docs/v5e",
            cores_per_chip=1,
            cores_per_device=1,
            clock_hz=1.5e9,
            mxu_size=128,
            num_mxus=4,
            mxu_rows_per_cycle=1,
            peak_flops_per_s=_per_core(bfloat16=1.97e14, int8=3.94e14),
            hbm_bytes=16 * GIB,
            hbm_bytes_per_s=8.2e11,
            vmem_bytes=128 * MIB,
            smem_bytes=1 * MIB,
            num_vregs=64,
            valu_slots=4,
            eup_slots=1,
            vload_slots=3,
            vstore_slots=1,
            ici_links=4,
            ici_bytes_per_s=4.5e10,
        ),
        "v6e": Chip(
            name="v6e",
            device_kinds=("TPU v6 lite", "TPU v6e"),
            topology="v6e:2x2",
            url="https://cloud.google.com/tpu/docs/v6e",
            cores_per_chip=1,
            cores_per_device=1,
            clock_hz=1.755e9,
            mxu_size=256,
            num_mxus=2,
            mxu_rows_per_cycle=2,
            peak_flops_per_s=_per_core(bfloat16=9.2e14, int8=1.84e15, float8=9.2e14),
            hbm_bytes=32 * GIB,
            hbm_bytes_per_s=1.64e12,
            vmem_bytes=128 * MIB,
            smem_bytes=1 * MIB,
            num_vregs=64,
            valu_slots=4,
            eup_slots=1,
            vload_slots=3,
            vstore_slots=2,
            ici_links=4,
            ici_bytes_per_s=9e10,
        ),
        "tpu7x": Chip(
            name="tpu7x",
            device_kinds=("TPU7x",),
            topology="tpu7x:2x2x1",
            url="https://docs.cloud.google.com/tpu/docs/tpu7x",
            cores_per_chip=2,
            cores_per_device=1,
            clock_hz=2.2e9,
            mxu_size=256,
            num_mxus=2,
            mxu_rows_per_cycle=2,
            peak_flops_per_s=_per_core(bfloat16=1.155e15, float8=2.3e15),
            hbm_bytes=96 * GIB,
            hbm_bytes_per_s=3.7e12,
            vmem_bytes=64 * MIB,
            smem_bytes=1 * MIB,
            num_vregs=64,
            valu_slots=4,
            eup_slots=1,
            vload_slots=3,
            vstore_slots=2,
            ici_links=6,
            ici_bytes_per_s=9e10,
        ),
        "v5p": Chip(
            name="v5p",
            device_kinds=("TPU v5", "TPU v5p"),
            topology="v5p:2x2x1",
            url="https://cloud.google.com/tpu/docs/v5p",
            cores_per_chip=2,
            cores_per_device=2,
            clock_hz=1.75e9,
            mxu_size=128,
            num_mxus=4,
            mxu_rows_per_cycle=1,
            peak_flops_per_s=_per_core(bfloat16=2.295e14, int8=4.59e14),
            hbm_bytes=95 * GIB // 2,
            hbm_bytes_per_s=1.23e12,
            vmem_bytes=64 * MIB,
            smem_bytes=1 * MIB,
            num_vregs=64,
            valu_slots=4,
            eup_slots=1,
            vload_slots=3,
            vstore_slots=1,
            ici_links=6,
            ici_bytes_per_s=9e10,
        ),
    }
)
"""Every chip that rpa knows, by its short name."""

_ALIASES = {
    **{"5e": "v5e", "5lite": "v5e", "5litepod": "v5e"},
    **{"6e": "v6e", "6lite": "v6e", "trillium": "v6e"},
    **{"7x": "tpu7x", "7": "tpu7x", "ironwood": "tpu7x"},
    **{"5p": "v5p", "5": "v5p"},
}


def chip(name):
    """Return the `Chip` of a name as people and JAX write it.

    Args:
        name: a `Chip` (returned as it is), a short name, a JAX device kind or a product name, with
            or without a slice size: "v5e", "TPU v5 lite", "v5litepod-4", "v7x", "Ironwood".

    Raises:
        ValueError: for a chip that rpa has no numbers of.

    >>> chip("TPU v5 lite").name, chip("v7x").name, chip("v6e-8").name
    ('v5e', 'tpu7x', 'v6e')
    """
    if isinstance(name, Chip):
        return name
    text = re.sub(r"(-\d+|:[\dx]+)$", "", str(name).lower())  # a slice size: v5e-8, v5e:2x2
    key = re.sub(r"[\s_-]", "", text).removeprefix("tpu").removeprefix("v")
    if key not in _ALIASES:
        raise ValueError(
            f"name: {name!r} is no chip that rpa has numbers of; expected one of "
            f"{', '.join(CHIPS)}, or JAX's device kind of one of them. To add a chip, add it to "
            "rpa.chips.CHIPS with its sources."
        )
    return CHIPS[_ALIASES[key]]


def current():
    """Return the `Chip` of the attached device, or None where JAX's first device is no TPU.

    This starts JAX's backend if nothing has, so no module calls it on import.

    Raises:
        ValueError: when a TPU is attached that rpa has no numbers of.

    >>> attached = current()
    >>> (attached is None) == (jax.devices()[0].platform != "tpu")
    True
    """
    device = jax.devices()[0]
    return chip(device.device_kind) if device.platform == "tpu" else None


def ridge_flops_per_byte(chip_or_name, dtype="bfloat16"):
    """Return the intensity at which the two roofs meet: FLOP per HBM byte at which both are busy.

    Below it a computation waits for memory, above it for the MXU.

    Args:
        chip_or_name: a `Chip` or its name.
        dtype: the type that the MXU multiplies.

    Raises:
        ValueError: for an unknown chip, or a type without a published peak.

    >>> round(ridge_flops_per_byte("v5e"))
    240
    """
    c = chip(chip_or_name)
    return c.peak(dtype) / c.hbm_bytes_per_s


def attainable_flops_per_s(chip_or_name, intensity_flops_per_byte, dtype="bfloat16"):
    """Return the roofline: the most FLOP/s that an intensity allows on one TensorCore.

    Args:
        chip_or_name: a `Chip` or its name.
        intensity_flops_per_byte: FLOP per HBM byte, a number or an array of any shape.
        dtype: the type that the MXU multiplies.

    Returns:
        A float, or an f64 array of that shape.

    Raises:
        ValueError: for an unknown chip, or a type without a published peak.

    >>> attainable_flops_per_s("v5e", 1.0) == chip("v5e").hbm_bytes_per_s
    True
    """
    c = chip(chip_or_name)
    memory_roof = np.asarray(intensity_flops_per_byte, dtype=float) * c.hbm_bytes_per_s
    result = np.minimum(memory_roof, c.peak(dtype))
    return float(result) if result.ndim == 0 else result


@dataclasses.dataclass(frozen=True)
class RooflineTime:
    """The two floors under the time of a computation, in seconds."""

    compute_s: float
    memory_s: float

    @property
    def time_s(self):
        """The larger floor: both run side by side at best."""
        return max(self.compute_s, self.memory_s)

    @property
    def bound(self):
        """What it waits for: "compute" or "memory"."""
        return "compute" if self.compute_s > self.memory_s else "memory"


def roofline_time(chip_or_name, flops, hbm_bytes, dtype="bfloat16"):
    """Return the floors under the time of `flops` FLOP and `hbm_bytes` bytes on one TensorCore.

    Args:
        chip_or_name: a `Chip` or its name.
        flops: of the matrix products, a multiply and an add count as two.
        hbm_bytes: bytes between HBM and the chip.
        dtype: the type that the MXU multiplies.

    Raises:
        ValueError: for an unknown chip, or a type without a published peak.

    One token that multiplies a 4096 x 4096 bfloat16 matrix reads far more than it computes:

    >>> t = roofline_time("v5e", flops=2 * 4096**2, hbm_bytes=2 * 4096**2)
    >>> t.bound, round(t.time_s * 1e6, 1)
    ('memory', 40.9)
    """
    c = chip(chip_or_name)
    return RooflineTime(compute_s=flops / c.peak(dtype), memory_s=hbm_bytes / c.hbm_bytes_per_s)


def mxu_fill(chip_or_name, head_dim):
    """Return the part of the MXU that attention at `head_dim` can use, between 0 and 1.

    Both products have one side of head_dim: Q K^T sums over it, P V puts it out. A head_dim that
    does not fill a whole number of MXU sides leaves multipliers idle, so attention cannot pass
    `mxu_fill * peak`, whatever the kernel does.

    Raises:
        ValueError: for an unknown chip, or a head without elements.

    >>> mxu_fill("v5e", 128), mxu_fill("v6e", 128), mxu_fill("v6e", 64)
    (1.0, 0.5, 0.25)
    """
    side = chip(chip_or_name).mxu_size
    _check_head_dim(head_dim)
    return head_dim / (-(-head_dim // side) * side)


@dataclasses.dataclass(frozen=True)
class AttentionCost:
    """What attention must at least do: its FLOP, and the HBM bytes of each array.

    Attributes:
        flops: of the two matrix products; softmax runs on the vector unit and is not counted.
        q_bytes: queries read.
        kv_read_bytes: K and V of every token of every sequence, read once.
        kv_write_bytes: K and V of the new tokens, written into the cache.
        out_bytes: output written.
    """

    flops: int
    q_bytes: int
    kv_read_bytes: int
    kv_write_bytes: int
    out_bytes: int

    @property
    def hbm_bytes(self):
        """All bytes between HBM and the chip."""
        return self.q_bytes + self.kv_read_bytes + self.kv_write_bytes + self.out_bytes

    @property
    def intensity_flops_per_byte(self):
        """FLOP per HBM byte, what the roofline is entered with."""
        return self.flops / self.hbm_bytes


def attention_cost(
    q_len,
    kv_len,
    num_q_heads,
    num_kv_heads,
    head_dim,
    dtype="bfloat16",
    *,
    kv_dtype=None,
    causal=True,
    sliding_window=None,
):
    """Return the least FLOP and HBM bytes of attention over a batch of sequences.

    FLOP are counted as causal by default: a (query, key) pair that the mask hides is not work.
    `causal=False` counts the whole q_len x kv_len rectangle, as some published utilisations do;
    for a long prefill that is twice as much. Bytes are those of an ideal kernel: each array
    crosses HBM once, without the padding of the cache layout.

    Args:
        q_len: new tokens, an int or i32[num_seqs].
        kv_len: tokens in the cache with the new ones, an int or i32[num_seqs]; at least q_len.
        num_q_heads: a multiple of num_kv_heads.
        num_kv_heads: K and V heads.
        head_dim: elements of a head.
        dtype: of queries and output.
        kv_dtype: of the cache; `dtype` when left out.
        causal: which FLOP to count.
        sliding_window: tokens that a query sees, itself included, or None for all.

    Raises:
        ValueError: when lengths or heads do not fit together.

    Decode does 4 FLOP a byte with 4 query heads a KV head, far left of every ridge:

    >>> decode = attention_cost(1, 4096, num_q_heads=32, num_kv_heads=8, head_dim=128)
    >>> round(decode.intensity_flops_per_byte, 1)
    4.0
    >>> prefill = attention_cost(4096, 4096, num_q_heads=32, num_kv_heads=8, head_dim=128)
    >>> round(prefill.intensity_flops_per_byte)
    1366
    """
    q_len, kv_len = np.broadcast_arrays(np.asarray(q_len, np.int64), np.asarray(kv_len, np.int64))
    _check_attention_shape(q_len, kv_len, num_q_heads, num_kv_heads)
    _check_head_dim(head_dim)
    item_bytes = jnp.dtype(dtype).itemsize
    kv_item_bytes = jnp.dtype(dtype if kv_dtype is None else kv_dtype).itemsize
    pairs = q_len * kv_len
    if causal:
        # The last new token sees all kv_len keys, the one before it one less, and so on.
        pairs = pairs - q_len * (q_len - 1) // 2
    kv_seen = np.where(q_len == 0, 0, kv_len)  # a sequence that asks nothing reads nothing
    if sliding_window is not None:
        # The last new token does not see the first kv_len - window keys, the one before it sees one
        # more of them, and so on.
        last = kv_len - sliding_window
        pairs = pairs - _sum_to(last) + _sum_to(last - q_len)
        kv_seen = np.minimum(kv_seen, q_len - 1 + sliding_window)
    token_q_bytes = num_q_heads * head_dim * item_bytes
    token_kv_bytes = 2 * num_kv_heads * head_dim * kv_item_bytes  # K and V
    return AttentionCost(
        flops=int(4 * num_q_heads * head_dim * pairs.sum()),  # 2 for Q K^T, 2 for P V
        q_bytes=int(token_q_bytes * q_len.sum()),
        kv_read_bytes=int(token_kv_bytes * kv_seen.sum()),
        kv_write_bytes=int(token_kv_bytes * q_len.sum()),
        out_bytes=int(token_q_bytes * q_len.sum()),
    )


def _sum_to(n):
    """1 + 2 + ... + n; 0 for n below 1."""
    n = np.maximum(n, 0)
    return n * (n + 1) // 2


def _check_head_dim(head_dim):
    if head_dim < 1:
        raise ValueError(
            f"head_dim: given {head_dim}; expected the elements of one head, at least 1, such as "
            "64 or 128."
        )


def _check_attention_shape(q_len, kv_len, num_q_heads, num_kv_heads):
    if (q_len < 0).any() or (kv_len < q_len).any():
        raise ValueError(
            f"kv_len: given {kv_len.tolist()} for q_len {q_len.tolist()}; kv_len counts the new "
            "tokens too, so expected 0 <= q_len <= kv_len for every sequence."
        )
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads: given {num_q_heads} for num_kv_heads {num_kv_heads}; expected a "
            "multiple, because every KV head serves the same number of query heads."
        )
