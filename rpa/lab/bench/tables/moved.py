"""Bytes moved, counted from the kernels' own copies, against the least; sizes of DMAs."""

from collections import Counter

from rpa.lab.batches import make_batch
from rpa.lab.bench.tables.table import Scope, Table
from rpa.lab.copies.traffic import count
from rpa.shapes import AttentionShape

BATCHES = {
    "16 decodes of 4,096": [(1, 4096)] * 16,
    "2,048 tokens after 4,096": [(2048, 6144)],
    "both": [(1, 4096)] * 16 + [(2048, 6144)],
}


def _cells(scope: Scope):
    kernels = [kernel for kernel in ("rpa", "v3") if kernel in scope.kernels]
    pages = [(128, "shuffled"), (16, "shuffled"), (16, "adjacent")]
    return [
        {"batch": name, "page": page, "pages": where, "kernel": kernel}
        for name in BATCHES
        for page, where in (pages[:1] if scope.quick else pages)
        for kernel in kernels
    ]


def _count(*, batch, page, pages, kernel):
    made = make_batch(BATCHES[batch], page, pages)
    layer = AttentionShape.of("llama-3-8b", page_size=page)
    t = count({"rpa": "kernel"}.get(kernel, kernel), made, layer)
    sizes = Counter()
    for moved in t.kinds.values():
        sizes.update(moved.sizes)
    size, _ = max(sizes.items(), key=lambda item: item[0] * item[1])
    return {
        "MiB": t.num_bytes / 2**20, "of least": t.num_bytes / t.least_blocked_bytes,
        "padding": t.padding_bytes / t.num_bytes, "DMAs": t.num_copies,
        "of which": sizes[size], "KiB": size / 2**10, "q block": t.q_block,
    }  # fmt: skip


MOVED = Table(
    "bytes moved",
    "HBM bytes of one call, counted from the kernels' own copies (Llama 3 8B, bfloat16), over the "
    "least: every live token, q, o, new KV and table once, K and V once for each query block; what "
    "the cache's layout pads; the DMAs, and those of the size that moves most. Goal: 1.02.",
    {"batch": "", "page": "d", "pages": "", "kernel": "", "MiB": ",.1f", "q block": "d",
     "of least": ".3f", "padding": ".0%", "DMAs": ",d", "of which": ",d", "KiB": ",.0f"},
    _cells,
    _count,
)  # fmt: skip
