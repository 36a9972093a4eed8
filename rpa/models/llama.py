"""A small readable Llama in JAX whose attention is a parameter.

The model of Touvron et al. 2023 (arXiv 2302.13971): RMSNorm before each half of a layer, rotary
position embedding (RoPE), grouped-query attention and a SwiGLU feed-forward network. Everything
but attention looks at one token at a time. So `forward` takes one flat row of tokens from any
number of sequences, and only `attention`, which is any rung of the ladder, knows which token
belongs to which sequence.

Layers run in a `lax.scan`: one layer is compiled instead of 30. The KV caches of all layers live
in one array, layer after layer, and a layer finds its pages by an offset on the page indices.
That array is the carry of the scan, so XLA updates it in place; a cache a layer, handed through
the scan one by one, would be copied as a whole at every step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama; hashable, so that it can be a static argument of a jitted function.

    >>> LlamaConfig(num_layers=2, hidden_size=12, num_q_heads=3, num_kv_heads=1, head_dim=4,
    ...             ffn_size=16, vocab_size=10, context_len=8).sm_scale
    0.5
    """

    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_len: int
    rope_base: float = 1e4
    rms_eps: float = 1e-5

    @property
    def sm_scale(self) -> float:
        """The factor on every score before the softmax, 1 / sqrt(head_dim)."""
        return self.head_dim**-0.5


def param_shapes(config: LlamaConfig):
    """Shapes of the parameter pytree; a matrix is [in, out], layers are stacked in dimension 0.

    The embedding serves twice: its rows are the input vectors, and its transpose is the LM head.

    >>> tiny = LlamaConfig(num_layers=2, hidden_size=12, num_q_heads=3, num_kv_heads=1, head_dim=4,
    ...                    ffn_size=16, vocab_size=10, context_len=8)
    >>> param_shapes(tiny)["layers"]["k_proj"]
    (2, 12, 4)
    """
    layers, hidden, ffn = config.num_layers, config.hidden_size, config.ffn_size
    q_size = config.num_q_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    return {
        "embedding": (config.vocab_size, hidden),
        "final_norm": (hidden,),
        "layers": {
            "attention_norm": (layers, hidden),
            "q_proj": (layers, hidden, q_size),
            "k_proj": (layers, hidden, kv_size),
            "v_proj": (layers, hidden, kv_size),
            "o_proj": (layers, q_size, hidden),
            "ffn_norm": (layers, hidden),
            "gate_proj": (layers, hidden, ffn),
            "up_proj": (layers, hidden, ffn),
            "down_proj": (layers, ffn, hidden),
        },
    }


def forward(params, config, token_ids, positions, kv_cache, batch, attention, *, logit_rows=None):
    """Run the whole model on new tokens, with attention done by any rung.

    Args:
        params: pytree with the shapes of `param_shapes`, all of one dtype.
        config: LlamaConfig.
        token_ids: i32[num_tokens], new tokens of all sequences in the order of the batch.
        positions: i32[num_tokens], the position of each token in its sequence.
        kv_cache: [num_layers * num_pages, ...], the caches of all layers, layer after layer, in
            the layout that the rung wants.
        batch: what the rung wants to know about the sequences, a dataclass pytree whose
            `page_indices` count the pages of one layer: a `rpa.ragged.RaggedBatch`.
        attention: `(queries, keys, values, kv_cache, batch, *, sm_scale) -> (output, kv_cache)`.
        logit_rows: i32[num_rows], the tokens whose next token is asked for; None for all. The LM
            head is the largest matrix of a small model: a row not asked for is not computed.

    Returns:
        logits f32[num_rows, vocab_size], and the cache with the new tokens stored.

    A model of ones, one sequence of three tokens:

    >>> from rpa.models.contiguous import OneSequence, contiguous_attention, new_contiguous_cache
    >>> tiny = LlamaConfig(num_layers=2, hidden_size=12, num_q_heads=3, num_kv_heads=1, head_dim=4,
    ...                    ffn_size=16, vocab_size=10, context_len=8)
    >>> params = jax.tree.map(jnp.ones, param_shapes(tiny), is_leaf=lambda x: isinstance(x, tuple))
    >>> logits, _ = forward(params, tiny, jnp.array([7, 8, 9]), jnp.arange(3),
    ...                     new_contiguous_cache(tiny, 8), OneSequence.starting_at(0),
    ...                     contiguous_attention, logit_rows=jnp.array([2]))
    >>> logits.shape
    (1, 10)
    """
    hidden = params["embedding"][token_ids]  # [num_tokens, hidden_size]
    rotation = rope_rotation(config, positions)
    hidden, kv_cache = _run_layers(
        params["layers"], config, hidden, rotation, kv_cache, batch, attention
    )
    if logit_rows is not None:
        hidden = hidden[logit_rows]
    return lm_head(params, config, hidden), kv_cache


def capture_layer(params, config, token_ids, positions, kv_cache, batch, attention, *, layer):
    """What attention of one layer is given by the real model: activations to try a rung on.

    Runs the layers before it, with `attention`, and stops at its door.

    Args:
        layer: int, counted from 0; the others are those of `forward`.

    Returns:
        queries [num_tokens, num_q_heads, head_dim] and keys, values [num_tokens, num_kv_heads,
        head_dim], after RoPE. The cache that belongs to them is `layer_cache(kv_cache, config,
        layer)`, of the same `kv_cache` that was passed in.

    Raises:
        ValueError: if the model has no such layer.
    """
    if not 0 <= layer < config.num_layers:
        raise ValueError(
            f"layer is {layer}, but the model has layers 0 to {config.num_layers - 1}: pass one of "
            "those."
        )
    hidden = params["embedding"][token_ids]
    rotation = rope_rotation(config, positions)
    before = jax.tree.map(lambda stacked: stacked[:layer], params["layers"])
    hidden, _ = _run_layers(before, config, hidden, rotation, kv_cache, batch, attention)
    weights = jax.tree.map(lambda stacked: stacked[layer], params["layers"])
    return qkv_of(weights, config, hidden, rotation)


def layer_cache(kv_cache, config, layer):
    """The pages of one layer, [num_pages, ...], cut out of the cache of all layers."""
    num_pages = kv_cache.shape[0] // config.num_layers
    return kv_cache[layer * num_pages : (layer + 1) * num_pages]


def _run_layers(layers, config, hidden, rotation, kv_cache, batch, attention):
    """Scan over the stacked layers; returns hidden [num_tokens, hidden_size] and the cache."""
    num_pages = kv_cache.shape[0] // config.num_layers

    def one_layer(carry, layer):
        hidden, kv_cache = carry
        index, weights = layer
        # What pads the table stays no page.
        pages = batch.page_indices
        pages_of_layer = jnp.where(pages < 0, pages, pages + index * num_pages)
        batch_of_layer = dataclasses.replace(batch, page_indices=pages_of_layer)
        queries, keys, values = qkv_of(weights, config, hidden, rotation)
        mixed, kv_cache = attention(
            queries,
            keys.astype(kv_cache.dtype),
            values.astype(kv_cache.dtype),
            kv_cache,
            batch_of_layer,
            sm_scale=config.sm_scale,
        )
        hidden = hidden + matmul(mixed.reshape(hidden.shape[0], -1), weights["o_proj"])
        hidden = hidden + feed_forward(weights, config, hidden)
        return (hidden, kv_cache), None

    num_layers = layers["q_proj"].shape[0]
    (hidden, kv_cache), _ = jax.lax.scan(
        one_layer, (hidden, kv_cache), (jnp.arange(num_layers, dtype=jnp.int32), layers)
    )
    return hidden, kv_cache


def qkv_of(weights, config, hidden, rotation):
    """The first half of a layer up to attention: norm, projections, RoPE on q and k.

    Args:
        weights: one layer of `params["layers"]`.
        hidden: [num_tokens, hidden_size].
        rotation: see `rope_rotation`.

    Returns:
        queries [num_tokens, num_q_heads, head_dim], keys and values [num_tokens, num_kv_heads,
        head_dim], in the dtype of hidden.
    """
    normed = rms_norm(hidden, weights["attention_norm"], config.rms_eps)
    per_head = (hidden.shape[0], -1, config.head_dim)
    queries = matmul(normed, weights["q_proj"]).reshape(per_head)
    keys = matmul(normed, weights["k_proj"]).reshape(per_head)
    values = matmul(normed, weights["v_proj"]).reshape(per_head)
    return apply_rope(queries, rotation), apply_rope(keys, rotation), values


def feed_forward(weights, config, hidden):
    """The second half of a layer, SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""
    normed = rms_norm(hidden, weights["ffn_norm"], config.rms_eps)
    gate = jax.nn.silu(matmul(normed, weights["gate_proj"]))  # [num_tokens, ffn_size]
    return matmul(gate * matmul(normed, weights["up_proj"]), weights["down_proj"])


def lm_head(params, config, hidden):
    """Logits f32[num_rows, vocab_size] of hidden [num_rows, hidden_size]; the embedding is tied."""
    normed = rms_norm(hidden, params["final_norm"], config.rms_eps)
    return jnp.einsum(
        "th,vh->tv",
        normed,
        params["embedding"],
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean is taken in float32.

    >>> rms_norm(jnp.array([[1.0, 7.0]]), jnp.array([10.0, 100.0]), 0.0).round()
    Array([[  2., 140.]], dtype=float32)
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight


def matmul(x, weight):
    """x [num_tokens, in] @ weight [in, out].

    HIGHEST: a TPU otherwise rounds float32 inputs to bfloat16, and the logits would differ in the
    second digit from those of the same model on a CPU.
    """
    return jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)


def rope_rotation(config, positions):
    """Cosine and sine of every token's rotation angles (RoFormer, arXiv 2104.09864, section 3.2.2).

    Lane pair i turns by position * base^(-2i / head_dim).

    Args:
        positions: i32[num_tokens].

    Returns:
        cos, sin: f32[num_tokens, 1, head_dim / 2]; the 1 stands for the heads.
    """
    # The frequencies are rounded as transformers rounds them, step by step in float32: at
    # position 8,000 one unit in their last place turns a lane by 5e-4 radians.
    exponents = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_base) ** exponents  # f32[head_dim / 2]
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x, rotation):
    """Rotate every head by its token's angles, lane i together with lane i + head_dim / 2.

    There are two conventions for which lanes form a pair. The paper, and GGUF files, pair 2i with
    2i + 1; Hugging Face checkpoints pair i with i + head_dim / 2, and so do we: two contiguous
    halves are what vector lanes are good at, neighbours would have to be shuffled. The weights
    decide which one is right (see `rpa.models.gguf_file`). With the wrong one the model still
    answers "Paris", because nearby tokens are hardly turned: only its logits show it.

    Args:
        x: [num_tokens, num_heads, head_dim].
        rotation: see `rope_rotation`.

    Returns:
        The same shape and dtype; the arithmetic is float32.

    A quarter turn of the one pair of a head of two lanes:

    >>> apply_rope(jnp.array([[[1.0, 0.0]]]), (jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))))
    Array([[[0., 1.]]], dtype=float32)
    """
    cos, sin = rotation
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)
