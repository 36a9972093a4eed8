"""Shapes: one attention layer, the models that the lab knows, and what a decode step of one costs.

A decode step makes one token for every sequence of the batch. The weights are read once for the
whole batch; the KV cache is read once for each sequence, all of its tokens. So the share of
attention in the bytes grows with the batch and with the context: that is why the kernel matters.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from rpa.chips import attention_cost
from rpa.paging import get_kv_cache_shape

MODELS = {
    "llama-3-8b": (32, 8, 128),
    "llama-3-70b-on-8": (8, 1, 128),  # one chip of eight, the heads shared out
    "llama-3-8b-on-4": (8, 2, 128),
    "smollm2-135m": (9, 3, 64),
    "gpt-oss": (64, 8, 64),
    "head-dim-256": (16, 4, 256),
    "8q-4kv-256": (8, 4, 256),  # shapes that timings were published for: rpa.lab.bench.published
    "16q-1kv-256": (16, 1, 256),
}
"""num_q_heads, num_kv_heads, head_dim of one layer's attention."""


def heads_of(model) -> tuple[int, int, int]:
    """num_q_heads, num_kv_heads and head_dim of a model's name, or of themselves.

    Raises:
        ValueError: for another name, or numbers that are no heads.

    >>> heads_of("llama-3-8b"), heads_of((4, 2, 128))
    ((32, 8, 128), (4, 2, 128))
    """
    if isinstance(model, str):
        if model in MODELS:
            return MODELS[model]
    elif len(model) == 3 and min(model) > 0 and model[0] % model[1] == 0:
        return tuple(model)
    raise ValueError(
        f"model: given {model!r}; expected one of {', '.join(MODELS)}, or (num_q_heads, "
        "num_kv_heads, head_dim) with num_q_heads a multiple of num_kv_heads."
    )


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention layer and its KV cache.

    Attributes:
        num_q_heads, num_kv_heads, head_dim: its heads.
        page_size: tokens per page.
        dtype, kv_dtype: of queries and output, and of the cache.
        share_lanes: whether K and V share the lanes of the cache, see `rpa.get_kv_cache_shape`.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    share_lanes: bool = False

    @classmethod
    def of(cls, model: str, **options) -> "AttentionShape":
        """The attention layer of a model in `MODELS`.

        >>> AttentionShape.of("llama-3-8b", page_size=128).token_bytes
        4096
        """
        return cls(*heads_of(model), **options)

    @property
    def token_bytes(self) -> int:
        """K and V of one token as the cache holds them, padding included."""
        return int(np.prod(self.cache_shape(1)[2:])) * np.dtype(self.kv_dtype).itemsize

    @property
    def true_token_bytes(self) -> int:
        """K and V of one token without padding."""
        return 2 * self.num_kv_heads * self.head_dim * np.dtype(self.kv_dtype).itemsize

    @property
    def row_bytes(self) -> int:
        """The queries, or the output, of one token."""
        return self.num_q_heads * self.head_dim * np.dtype(self.dtype).itemsize

    def cache_shape(self, num_pages):
        """Shape of a cache."""
        sizes = (self.page_size, self.num_kv_heads, self.head_dim, self.kv_dtype)
        return get_kv_cache_shape(num_pages, *sizes, share_lanes=self.share_lanes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The shape of a Llama-like decoder: grouped-query attention and a gated feed-forward.

    Attributes:
        name: what the figures call it.
        num_layers, hidden, num_q_heads, num_kv_heads, head_dim, ffn_hidden, vocab: its sizes.
        tied_embedding: whether the output matrix is the input embedding.
    """

    name: str
    num_layers: int
    hidden: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden: int
    vocab: int
    tied_embedding: bool = False

    @property
    def matmul_parameters(self):
        """Parameters that a step multiplies: all matrices of the layers, and the output matrix.

        The input embedding is not among them: a step looks up one row per token.
        """
        attention = 2 * (self.num_q_heads + self.num_kv_heads) * self.head_dim * self.hidden
        feed_forward = 3 * self.hidden * self.ffn_hidden
        return self.num_layers * (attention + feed_forward) + self.vocab * self.hidden

    @property
    def num_parameters(self):
        """All parameters, with the embedding and the norms.

        >>> LLAMA3_8B.num_parameters
        8030261248
        """
        norms = (2 * self.num_layers + 1) * self.hidden
        embedding = 0 if self.tied_embedding else self.vocab * self.hidden
        return self.matmul_parameters + norms + embedding

    def kv_bytes_per_token(self, dtype="bfloat16"):
        """Bytes that one token keeps in the KV cache, over all layers.

        >>> LLAMA3_8B.kv_bytes_per_token()
        131072
        """
        heads = self.num_q_heads, self.num_kv_heads, self.head_dim
        return self.num_layers * AttentionShape(*heads, kv_dtype=dtype).true_token_bytes


LLAMA3_8B = ModelShape(
    name="Llama 3 8B",
    num_layers=32,
    hidden=4096,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_hidden=14336,
    vocab=128256,
)
"""Source: The Llama 3 Herd of Models, arXiv 2407.21783, table 3; the released configuration."""

SMOLLM2_135M = ModelShape(
    name="SmolLM2 135M",
    num_layers=30,
    hidden=576,
    num_q_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_hidden=1536,
    vocab=49152,
    tied_embedding=True,
)
"""The real model of the demo. Source: the metadata of its GGUF file."""


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """The bytes and FLOP of one decode step of the whole model.

    Attributes:
        weight_bytes: parameters read, once for the batch.
        attention_bytes: what attention moves, nearly all of it KV cache.
        weight_flops: of all matrix products with weights.
        attention_flops: of Q K^T and P V.
    """

    weight_bytes: int
    attention_bytes: int
    weight_flops: int
    attention_flops: int

    @property
    def hbm_bytes(self):
        """All bytes of the step."""
        return self.weight_bytes + self.attention_bytes

    @property
    def attention_share(self):
        """The part of the bytes that attention moves, between 0 and 1."""
        return self.attention_bytes / self.hbm_bytes


def decode_step(model, batch_size, kv_len, dtype="bfloat16", kv_dtype=None):
    """Return what one decode step costs at least: one new token for each sequence.

    Activations between the layers are left out: at one token per sequence they are below 1 % of the
    bytes.

    Args:
        model: a `ModelShape`.
        batch_size: sequences that decode together.
        kv_len: tokens of each sequence, the new one included.
        dtype: of weights and activations.
        kv_dtype: of the KV cache; `dtype` when left out.

    >>> one = decode_step(LLAMA3_8B, batch_size=1, kv_len=1024)
    >>> many = decode_step(LLAMA3_8B, batch_size=64, kv_len=8192)
    >>> f"{one.attention_share:.1%} {many.attention_share:.1%}"
    '0.9% 82.1%'
    """
    attention = attention_cost(
        [1] * batch_size,
        [kv_len] * batch_size,
        model.num_q_heads,
        model.num_kv_heads,
        model.head_dim,
        dtype,
        kv_dtype=kv_dtype,
    )
    return DecodeStep(
        weight_bytes=model.matmul_parameters * jnp.dtype(dtype).itemsize,
        attention_bytes=model.num_layers * attention.hbm_bytes,
        weight_flops=2 * model.matmul_parameters * batch_size,
        attention_flops=model.num_layers * attention.flops,
    )
