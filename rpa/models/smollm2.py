"""SmolLM2-135M-Instruct: load it, ask it for logits, let it continue a text.

A real model, small enough for two CPU cores: 30 layers, 9 query heads on 3 KV heads of 64 lanes.
Allal et al. 2025, "SmolLM2", arXiv 2502.02737.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rpa.models.contiguous import OneSequence, contiguous_attention, new_contiguous_cache
from rpa.models.gguf_file import (
    find_gguf,
    open_gguf,
    read_config,
    read_params,
    read_tokenizer,
    reading,
)
from rpa.models.llama import LlamaConfig, forward
from rpa.models.tokenizer import Tokenizer

CHUNK_LEN = 64
"""Tokens that a prompt is run through at a time: long enough to use the cores, short enough that
the padding of a short prompt costs little."""

MIN_CAPACITY = 512
"""Tokens of the smallest cache; larger ones are powers of two, each compiled when first used. All
are multiples of CHUNK_LEN: XLA would otherwise push the last chunk back to where it fits, over
tokens that are there."""


def load_smollm2(dtype=jnp.float32) -> "SmolLM2":
    """Load SmolLM2-135M-Instruct from its installed package; takes some seconds.

    Args:
        dtype: of the parameters and activations. float32 is what it is compared with; bfloat16
            halves the memory (269 MB) and suits a TPU, while a CPU gets slower by it.

    Returns:
        SmolLM2, with `.tokenizer`, `.logits(token_ids)` and `.generate(token_ids, max_new_tokens)`.

    Raises:
        ModelNotInstalled: an ImportError that says what to install.
        BadModelFile: a ValueError: the file is truncated, or another one; says what to do.
        ValueError: if dtype is no floating point dtype.

    An example, which needs the package (`tests/test_models.py` runs it):

        model = load_smollm2()
        token_ids = model.tokenizer.encode("The capital of France is")
        model.tokenizer.decode(model.generate(token_ids, 2))  # " Paris."
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating point dtype such as float32, but is {dtype}.")
    path = find_gguf()
    with reading(path):
        reader = open_gguf(path)
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
            f32[len(token_ids), vocab_size], 197 kB a token; row t is about token t + 1.

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
