"""What one decode step of a served model moves and computes: weights against KV cache.

A step makes one token for every sequence of the batch. The weights are read once for the whole
batch; the KV cache is read once for each sequence, all of its tokens. So the share of attention
in the bytes grows with the batch and with the context, and that is why the kernel matters.
"""

import dataclasses

import jax.numpy as jnp

from rpa.chips import attention_cost


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

        The input embedding is not among them: a step looks up one row a token.
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
        item_bytes = jnp.dtype(dtype).itemsize
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * item_bytes


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

    Activations between the layers are left out: at one token a sequence they are below 1 % of the
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
