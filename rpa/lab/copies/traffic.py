"""HBM bytes that a rung really moves for a batch, from its own transfers, against the least.

    from rpa.lab.copies.traffic import count
    from rpa.shapes import AttentionShape

    traffic = count("kernel", batch, AttentionShape.of("llama-3-8b", page_size=128))
    print(traffic.table())
    traffic.kinds["KV read"].num_bytes, traffic.least_bytes, traffic.excess

Nothing here is a formula for what a kernel moves: `rpa.lab.copies.dryrun` runs the control flow of
the function, traced for the TPU, and every copy that it starts is counted. A copy from HBM to HBM
counts twice, as read and as written. What stands around a kernel in plain JAX (packing the new K
and V, views of the queries) is not counted, but for reads and writes by index of the cache: that is
how rungs 1 to 4 gather, and rungs 4 and 5 store.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np

from rpa import chips, fused, interpreter, ladder, plain, streamed, tiled
from rpa.kernel import ragged_paged_attention
from rpa.lab import peers
from rpa.lab.compile.functions import is_own, load
from rpa.lab.copies.dryrun import OUTPUT, dry_run
from rpa.lab.copies.events import HBM, SMEM
from rpa.paging import cdiv
from rpa.ragged import RaggedBatch
from rpa.shapes import AttentionShape
from rpa.validation import as_window

KV_READ, NEW_KV, CACHE_WRITE = "KV read", "new KV", "cache write"
QUERIES, OUTPUTS, PAGE_TABLE, METADATA, OTHER = "q", "o", "page table", "metadata", "other"
KINDS = (KV_READ, NEW_KV, CACHE_WRITE, QUERIES, OUTPUTS, PAGE_TABLE, METADATA, OTHER)
"""What is moved, in the order of the table."""


@dataclass
class Moved:
    """What was moved of one kind.

    Attributes:
        num_bytes: HBM bytes, read or written.
        num_copies: DMAs, or blocks of the automatic pipeline.
        sizes: {bytes of a copy: how many of that size}.
    """

    num_bytes: int = 0
    num_copies: int = 0
    sizes: Counter = field(default_factory=Counter)

    def add(self, num_bytes, is_copy=True):
        """Count a copy; not as one if it is the source of a copy from HBM to HBM."""
        self.num_bytes += num_bytes
        if is_copy:
            self.num_copies += 1
            self.sizes[num_bytes] += 1


@dataclass
class Traffic:
    """HBM bytes of one call, by kind, and the least that they could be.

    Attributes:
        rung: what was counted.
        kinds: {kind: Moved} for the kinds in KINDS that occurred.
        least: {kind: bytes} for the kinds that were counted: every cached token read once, every
            new one read and written once, queries and output once, the live entries of the page
            table once.
        least_blocked_bytes: the same, but K and V once for each block of queries (see q_block).
        q_block: query tokens that the kernel fetched together at most; 0 if it fetches none.
        padding_bytes: of K and V moved: what the cache's layout pads.
        outside: {operation: bytes} of the cache, by index, outside of kernels; in `kinds` too.
    """

    rung: str
    kinds: dict[str, Moved]
    least: dict[str, int]
    least_blocked_bytes: int
    q_block: int
    padding_bytes: int
    outside: dict

    @property
    def num_bytes(self) -> int:
        """All HBM bytes."""
        return sum(moved.num_bytes for moved in self.kinds.values())

    @property
    def num_copies(self) -> int:
        """All copies."""
        return sum(moved.num_copies for moved in self.kinds.values())

    @property
    def least_bytes(self) -> int:
        """The least that any kernel has to move."""
        return sum(self.least.values())

    @property
    def excess(self) -> float:
        """How far above the least: 0.02 is 2 % more."""
        return self.num_bytes / self.least_bytes - 1

    @property
    def excess_blocked(self) -> float:
        """How far above the least of a kernel that reads K and V once for each query block."""
        return self.num_bytes / self.least_blocked_bytes - 1

    def table(self) -> str:
        """The traffic as text."""
        lines = [f"{self.rung:14}{'bytes':>16}{'least':>16}{'copies':>9}  sizes of copies (bytes)"]
        for kind in KINDS:
            moved = self.kinds.get(kind, Moved())
            if moved.num_bytes or self.least.get(kind):
                least = f"{self.least[kind]:,}" if kind in self.least else ""
                sizes = common_sizes(moved.sizes)
                numbers = f"{moved.num_bytes:>16,}{least:>16}{moved.num_copies:>9,}"
                lines.append(f"{kind:14}{numbers}  {sizes}")
        total = f"{self.num_bytes:>16,}{self.least_bytes:>16,}{self.num_copies:>9,}"
        lines.append(f"{'all':14}{total}  {self.excess:+.2%} of the least")
        if self.q_block > 1:
            lines.append(
                f"in query blocks of {self.q_block}, K and V once for each: "
                f"{self.least_blocked_bytes:,} bytes; moved {self.excess_blocked:+.2%} of that"
            )
        share = self.padding_bytes / self.num_bytes if self.num_bytes else 0.0
        lines.append(f"the cache's layout pads {self.padding_bytes:,} of all bytes ({share:.1%})")
        if self.outside:
            words = [f"{name} {num_bytes:,}" for name, num_bytes in sorted(self.outside.items())]
            lines.append(f"in plain JAX, outside of kernels: {', '.join(words)}; the rest of what")
            lines.append("plain JAX moves depends on what XLA fuses, and is not counted")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The traffic as one JSON object."""
        kinds = {kind: vars(moved) for kind, moved in self.kinds.items()}
        data = vars(self) | {"kinds": kinds}
        for name in ("num_bytes", "num_copies", "least_bytes", "excess", "excess_blocked"):
            data[name] = getattr(self, name)
        return json.dumps(data, indent=2, default=int)


def common_sizes(sizes, most=4) -> str:
    """The commonest sizes, as text."""
    common = Counter(sizes).most_common()
    words = [f"{count:,} x {size:,}" for size, count in common[:most]]
    rest = sum(count for _, count in common[most:])
    return ", ".join([*words, *([f"{rest:,} others"] if rest else [])])


def count(rung, batch: RaggedBatch, layer: AttentionShape, **options) -> Traffic:
    """Count the HBM bytes that a rung moves for a batch.

    Args:
        rung: a name in RUNGS, your own as "file.py:function", or a function (queries, keys,
            values, kv_cache, batch, *, sm_scale, **options) -> anything.
        batch: with NumPy values; its pages need not be owned by anybody.
        layer: sizes.
        options: for the rung's function, as `d_block_sizes` or `sliding_window`.

    Raises:
        ValueError: if the rung cannot take the batch, or its transfers depend on computed values.

    >>> batch, _ = RaggedBatch.from_lengths([1, 1], [40, 9], [[0, 1, 2], [3]])
    >>> traffic = count("streamed", batch, AttentionShape(8, 2, 128))
    >>> traffic.kinds["KV read"].num_bytes == 49 * 2 * 2 * 128 * 2
    True
    """
    function = _function_of(rung, batch)
    num_tokens = int(np.asarray(batch.cu_q_lens)[int(batch.num_seqs)])
    pages = np.asarray(batch.page_indices)
    num_pages = max(1, int(pages.max(initial=0)) + 1)
    new = jax.ShapeDtypeStruct((num_tokens, layer.num_kv_heads, layer.head_dim), layer.kv_dtype)
    with interpreter.compiled():
        run = dry_run(
            lambda *arrays: function(*arrays, batch, sm_scale=layer.head_dim**-0.5, **options),
            jax.ShapeDtypeStruct((num_tokens, layer.num_q_heads, layer.head_dim), layer.dtype),
            new,
            new,
            jax.ShapeDtypeStruct(layer.cache_shape(num_pages), layer.kv_dtype),
            names=("queries", "keys", "values", "kv_cache"),
        )
    name = rung if isinstance(rung, str) else getattr(rung, "__name__", "function")
    name = "yours" if is_own(name) else name
    window = as_window(options.get("sliding_window"))
    return _traffic(name, run, batch, layer, layer.cache_shape(num_pages), window)


def _function_of(rung, batch):
    if not isinstance(rung, str):
        return rung
    if is_own(rung):
        return load(rung)
    if rung not in RUNGS:
        raise ValueError(
            f"rung is {rung!r}, but must be one of {', '.join(RUNGS)}, or your own as "
            "'file.py:function'."
        )
    return RUNGS[rung](batch)


def _traffic(name, run, batch, layer, cache_shape, window):
    kinds = {}

    def add(kind, num_bytes, is_copy=True):
        kinds.setdefault(kind, Moved()).add(num_bytes, is_copy)

    q_block, num_tokens = 0, int(ladder.q_lens_of(batch).sum())
    for event in run.timeline.events:
        if event.kind not in ("start", "fetch", "flush", "prefetch"):
            continue
        source, target = event.source.buffer, event.target.buffer
        reads, writes = source.space == HBM, target.space == HBM
        if reads:
            kind = kind_read(event)
            add(kind, event.num_bytes, is_copy=not writes)
            if kind == QUERIES and event.kind == "start":
                q_block = max(q_block, event.num_bytes * num_tokens // source.num_bytes)
        if writes:
            add(_kind_written(target), event.num_bytes)
    # Only of the cache itself: what was read of it may be read once more where it lies then.
    cache_bytes = np.prod(cache_shape) * np.dtype(layer.kv_dtype).itemsize
    whole_cache = ("kv_cache", int(cache_bytes))
    outside = {key[0]: size for key, size in run.array_ops.items() if key[1:] == whole_cache}
    for operation, num_bytes in outside.items():
        writes = operation in ("scatter", "dynamic_update_slice")
        add(CACHE_WRITE if writes else KV_READ, num_bytes, is_copy=False)
    in_cache = sum(kinds[k].num_bytes for k in (KV_READ, NEW_KV, CACHE_WRITE) if k in kinds)
    blocked = least(batch, layer, q_block or None, window)
    return Traffic(
        rung=name,
        kinds=kinds,
        least=_least_of(kinds, least(batch, layer, sliding_window=window)),
        least_blocked_bytes=sum(_least_of(kinds, blocked).values()),
        q_block=q_block,
        padding_bytes=round(in_cache * (1 - layer.true_token_bytes / layer.token_bytes)),
        outside=outside,
    )


def _least_of(kinds, all_least):
    """The least of the kinds that were counted: plain JAX shows nothing of q, o and new K and V."""
    if NEW_KV not in kinds:  # new tokens are read from the cache, like all others
        all_least[KV_READ] += all_least[NEW_KV]
    return {kind: num_bytes for kind, num_bytes in all_least.items() if kind in kinds}


def kind_read(event) -> str:
    """What an event reads from HBM, by the argument that it comes from and where it goes."""
    source = event.source.buffer
    if event.target.buffer.space == SMEM:
        is_table = event.kind == "start" or "page" in source.name
        return PAGE_TABLE if is_table else METADATA
    origins = {"kv_cache": KV_READ, "queries": QUERIES}
    if source.origin in origins:
        return origins[source.origin]
    is_new = source.origin.startswith(("keys", "values"))
    return NEW_KV if is_new else OTHER


def _kind_written(target):
    # v3 writes the output over the queries.
    return {"kv_cache": CACHE_WRITE, OUTPUT: OUTPUTS, "queries": OUTPUTS}.get(target.origin, OTHER)


def least(
    batch: RaggedBatch,
    layer: AttentionShape,
    q_block: int | None = None,
    sliding_window: int | None = None,
) -> dict[str, int]:
    """The least HBM bytes of one call, by kind.

    Args:
        batch, layer: as in `count`.
        q_block: None reads K and V of a sequence once; a number reads, for each block of so many
            of its queries, the keys that the block sees.
        sliding_window: tokens that a query sees, itself included, or None for all.

    >>> batch, _ = RaggedBatch.from_lengths([4], [40], [[0, 1, 2]])
    >>> layer = AttentionShape(8, 2, 128)
    >>> least(batch, layer)["KV read"], least(batch, layer, 2)["KV read"]
    (36864, 73728)
    >>> least(batch, layer, sliding_window=9)["KV read"]
    8192
    """
    window = np.iinfo(np.int32).max if sliding_window is None else sliding_window
    q_lens, kv_lens = ladder.q_lens_of(batch), ladder.kv_lens_of(batch)
    q_lens, kv_lens = q_lens[q_lens > 0], kv_lens[q_lens > 0]
    new, cached, seen_new = int(q_lens.sum()), 0, 0
    for q_len, first_query in zip(q_lens, kv_lens - q_lens, strict=True):
        starts = np.arange(0, q_len, q_block or q_len)  # of the blocks, in new tokens
        ends = np.minimum(starts + (q_block or q_len), q_len)
        first_seen = np.maximum(first_query + starts - window + 1, 0)
        cached += int(np.maximum(first_query - first_seen, 0).sum())
        seen_new += int((ends - np.maximum(first_seen - first_query, 0)).sum())
    first_pages = np.maximum(kv_lens - q_lens - window + 1, 0) // layer.page_size
    entries = int((cdiv(kv_lens, layer.page_size) - first_pages).sum())
    return {
        KV_READ: cached * layer.token_bytes,
        NEW_KV: seen_new * layer.token_bytes,
        CACHE_WRITE: new * layer.token_bytes,
        QUERIES: new * layer.row_bytes,
        OUTPUTS: new * layer.row_bytes,
        PAGE_TABLE: entries * 4,
    }


def _compiled_kernel(queries, keys, values, kv_cache, batch, **options):
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    fixed = {"backend": "tpu", "donate": False, "validate": False}
    return ragged_paged_attention(queries, keys, values, kv_cache, *metadata, **fixed, **options)


def _v3(queries, keys, values, kv_cache, batch, *, chip="v6e", **options):
    """The production kernel; told the chip's VMEM, it does not ask for a chip."""
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    options = {"vmem_limit_bytes": chips.chip(chip).vmem_bytes, "chip": chip} | options
    return peers.v3(queries, keys, values, kv_cache, *metadata, **options)


def _from_ladder(name):
    rung = next(rung for rung in ladder.LADDER if rung.name == name)
    return rung.attention_for


RUNGS = {
    "dense": _from_ladder("dense"),
    "paging": _from_ladder("paging"),
    "ragged": _from_ladder("ragged"),
    "tiled": lambda batch: partial(tiled.attention, interpret=False),
    "streamed": lambda batch: partial(streamed.attention, interpret=False),
    "fused": lambda batch: partial(fused.attention, interpret=False),
    "plain": lambda batch: partial(plain.attention, interpret=False),
    "kernel": lambda batch: _compiled_kernel,
    "v3": lambda batch: _v3,
}
"""Batch -> the function of each rung, and of the production kernel, as compiled for a TPU."""
