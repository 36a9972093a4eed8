"""What the lab compiles by name: the kernels of the ladder at the sizes of models."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax

from rpa import plain as _plain
from rpa.lab.compile.functions import import_path
from rpa.paging import cdiv, get_kv_cache_shape
from rpa.ragged import RaggedBatch
from rpa.shapes import MODELS as MODELS
from rpa.shapes import AttentionShape, heads_of


@dataclass(frozen=True)
class Workload:
    """Sizes of a batch in which all sequences are alike.

    Attributes:
        model: a name in `rpa.shapes.MODELS`, or (num_q_heads, num_kv_heads, head_dim).
        dtype, kv_dtype: of queries, and of the cache.
        page_size: tokens of a page.
        num_seqs: sequences.
        q_len, kv_len: new tokens and all tokens of each.
        share_lanes: whether K and V share the lanes of the cache, see `rpa.get_kv_cache_shape`.
    """

    model: str | tuple[int, int, int] = "llama-3-8b"
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    page_size: int = 16
    num_seqs: int = 64
    q_len: int = 1
    kv_len: int = 4096
    share_lanes: bool = False

    @property
    def heads(self):
        return heads_of(self.model)

    @property
    def layer(self) -> AttentionShape:
        """One attention layer of the model, with this cache."""
        cache = {"page_size": self.page_size, "share_lanes": self.share_lanes}
        return AttentionShape(*self.heads, dtype=self.dtype, kv_dtype=self.kv_dtype, **cache)

    @property
    def pages_per_seq(self) -> int:
        return cdiv(self.kv_len, self.page_size)

    def queries(self, *tokens):
        """Shape of queries: [*tokens, num_q_heads, head_dim]."""
        return jax.ShapeDtypeStruct((*tokens, self.heads[0], self.heads[2]), self.dtype)

    def kv(self, *tokens):
        """Shape of keys, or values: [*tokens, num_kv_heads, head_dim] in the cache's dtype."""
        return jax.ShapeDtypeStruct((*tokens, *self.heads[1:]), self.kv_dtype)

    @property
    def kv_cache(self):
        """Shape of a cache that holds all sequences."""
        shape = get_kv_cache_shape(
            self.num_seqs * self.pages_per_seq,
            self.page_size,
            *self.heads[1:],
            self.kv_dtype,
            share_lanes=self.share_lanes,
        )
        return jax.ShapeDtypeStruct(shape, self.kv_dtype)

    @property
    def metadata(self):
        """Shapes of kv_lens, page_indices, cu_q_lens and distribution."""
        n = self.num_seqs
        sizes = (n, n * self.pages_per_seq, n + 1, 3)
        return tuple(jax.ShapeDtypeStruct((size,), "int32") for size in sizes)


@dataclass(frozen=True)
class Program:
    """A function to compile: the arguments of `rpa.lab.compile_for`."""

    function: str
    args: tuple
    kwargs: dict = field(default_factory=dict)
    donate_argnums: tuple = ()


def tiled(w: Workload) -> Program:
    """Rung 4, one sequence."""
    args = (w.queries(w.q_len), w.kv(w.kv_len), w.kv(w.kv_len))
    return Program("rpa.tiled:flash_attention", args, {"interpret": False})


def streamed(w: Workload) -> Program:
    """Rung 5, one query per sequence."""
    kv_lens, page_indices, _, _ = w.metadata
    args = (w.queries(w.num_seqs), w.kv_cache, kv_lens, page_indices)
    kwargs = {"num_kv_heads": w.heads[1], "interpret": False}
    return Program("rpa.streamed:paged_decode", args, kwargs)


def fused(w: Workload) -> Program:
    """Rung 6, with the cache donated."""
    num_tokens = w.num_seqs * w.q_len
    new = w.kv(num_tokens)
    args = (w.queries(num_tokens), new, new, w.kv_cache, RaggedBatch(*w.metadata))
    kwargs = {"max_q_len": w.q_len, "interpret": False}
    return Program("rpa.fused:fused_attention", args, kwargs, donate_argnums=(3,))


def whole_call(w: Workload) -> tuple:
    """Shapes of what rungs 7 and 8 take: queries, keys, values, cache and the metadata."""
    num_tokens = w.num_seqs * w.q_len
    return w.queries(num_tokens), w.kv(num_tokens), w.kv(num_tokens), w.kv_cache, *w.metadata


def plain(w: Workload) -> Program:
    """Rung 7, with the cache donated."""
    return Program("rpa.lab.programs:plain_attention", whole_call(w), donate_argnums=(3,))


def plain_attention(
    queries, keys, values, kv_cache, *metadata, blocks=(None, None), chip=None, **options
):
    """Rung 7 compiled for a TPU, called as rung 8 is; `blocks` are block_q and block_kv."""
    block_q, block_kv = blocks  # the chip does not matter to it: it is one program for all
    batch = RaggedBatch(*metadata)
    return _plain.attention(
        *(queries, keys, values, kv_cache, batch),
        **(options | {"block_q": block_q, "block_kv": block_kv, "interpret": False}),
    )


def kernel(w: Workload) -> Program:
    """Rung 8, with the cache donated."""
    args = whole_call(w)
    return Program(
        "rpa.kernel.api:ragged_paged_attention", args, {"backend": "tpu"}, donate_argnums=(3,)
    )


def own(path: str, w: Workload) -> Program:
    """A kernel of one's own with the ladder's signature, with the cache donated.

    Args:
        path: "file.py:function" or "module:function".
        w: sizes.

    >>> own("rpa.fused:attention", Workload(num_seqs=2)).args[0].shape
    (2, 32, 128)
    """
    num_tokens = w.num_seqs * w.q_len
    new = w.kv(num_tokens)
    args = (w.queries(num_tokens), new, new, w.kv_cache, RaggedBatch(*w.metadata))
    kwargs = {"sm_scale": w.heads[2] ** -0.5}
    return Program(import_path(path), args, kwargs, donate_argnums=(3,))


def own_call(path: str, args, kwargs=None) -> Program:
    """A function of any signature.

    Args:
        path: "file.py:function" or "module:function".
        args: arrays or shapes.
        kwargs: keyword arguments.
    """
    return Program(import_path(path), tuple(args), kwargs or {})


PROGRAMS: dict[str, Callable[[Workload], Program]] = {
    "tiled": tiled,
    "streamed": streamed,
    "fused": fused,
    "plain": plain,
    "kernel": kernel,
}
"""By the name of the rung's file."""
