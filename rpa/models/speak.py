"""SmolLM2 with your attention: what the model writes when a function of yours attends.

    from rpa.models.speak import speak

    speak(ragged_attention)                    # in every layer
    speak(my_kernel, own_layers=1, own_prompt=False)   # in one layer, from the second step on

Two prompts are served side by side from a small paged cache. What is not yours is rung 3: the other
layers, and the prompts if your function decodes only. A kernel in the interpreter takes most of a
second per call, so one layer of thirty has to do: a wrong answer there changes the words, though
thirty of them would change more.
"""

import functools
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rpa.ladder import ragged_rung
from rpa.models.gguf_file import ModelNotInstalled
from rpa.models.llama import feed_forward, lm_head, matmul, qkv_of, rope_rotation
from rpa.models.smollm2 import SmolLM2, load_smollm2
from rpa.paging import cdiv, get_kv_cache_shape, unpack_kv
from rpa.ragged import RaggedBatch, store_new_tokens

PROMPTS = (
    "What is the capital of France, and which river flows through it?",
    "Write one sentence about a cat.",
)
PAGE_SIZE = 8
OWN_LAYER = 1
"""Where the first layer of yours stands: in a layer that early, a wrong answer changes the text."""


def speak(
    attention: Callable | None,
    *,
    prompts: tuple[str, ...] = PROMPTS,
    num_tokens: int = 10,
    own_layers: int | None = None,
    own_prompt: bool = True,
    after_prompt: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> None:
    """Print what SmolLM2 writes with a function of yours, next to what it writes with rung 3.

    Args:
        attention: (queries, keys, values, kv_cache, batch, *, sm_scale) -> (output, kv_cache), the
            ladder's signature; None for rung 3, to try what else is changed.
        prompts: of the user, one sequence each.
        num_tokens: to write for each.
        own_layers: in how many layers it attends; None for all thirty.
        own_prompt: whether it takes the step that reads the prompts, too.
        after_prompt: changes the page table i32[num_seqs, pages_per_seq] when the prompts are
            stored: what happens if it is wrong?
    """
    try:
        model = _model()
    except ModelNotInstalled as reason:
        print(f"(The model does not speak here: {reason})")
        return
    start = time.perf_counter()
    own = range(model.config.num_layers)[_own_slice(own_layers)]
    theirs = write(model, None, prompts, num_tokens)
    yours = write(model, attention, prompts, num_tokens, own, own_prompt, after_prompt)
    layers = "all layers" if own_layers is None else f"layer {', '.join(map(str, own))} of 30"
    steps = "" if own_prompt else ", after the prompts"
    whose, label = ("rung 3", "changed:") if attention is None else ("your function", "yours:  ")
    print(f"SmolLM2-135M, {whose} in {layers}{steps}; {time.perf_counter() - start:.0f} s")
    for prompt, right, text in zip(prompts, theirs, yours, strict=True):
        print(f"\n{prompt}\n  {label} {text}")
        print("  rung 3:  the same" if text == right else f"  rung 3:  {right}")


def _own_slice(own_layers):
    return slice(None) if own_layers is None else slice(OWN_LAYER, OWN_LAYER + own_layers)


@functools.cache
def _model() -> SmolLM2:
    return load_smollm2()


def write(
    model, attention, prompts, num_tokens, own=(), own_prompt=True, after_prompt=np.asarray
) -> list[str]:
    """The texts that a model writes greedily, a line for each prompt.

    Args:
        model: with `config`, `params` and `tokenizer`.
        attention: attends in the layers `own`; rung 3 attends in the others.
        prompts, num_tokens, own_prompt, after_prompt: as in `speak`.
    """
    tokenizer = model.tokenizer
    chats = [tokenizer.chat_prompt([{"role": "user", "content": text}]) for text in prompts]
    token_ids = [list(tokenizer.encode(chat)) for chat in chats]
    prompt_lens = [len(ids) for ids in token_ids]
    table, num_pages = _scattered_table(max(prompt_lens) + num_tokens, len(prompts))
    caches = _empty_caches(model, num_pages)
    q_lens = prompt_lens
    for step in range(num_tokens):
        news = [ids[len(ids) - n :] for ids, n in zip(token_ids, q_lens, strict=True)]
        kv_lens = [len(ids) for ids in token_ids]
        batch = _batch(q_lens, kv_lens, table)
        attend = attention if step > 0 or own_prompt else None
        logits, caches = _step(model, np.concatenate(news), batch, caches, attend, own)
        for ids, row in zip(token_ids, logits, strict=True):
            ids.append(int(row.argmax()))
        if step == 0:
            table = np.asarray(after_prompt(table.copy()))
        q_lens = [1] * len(prompts)
    return [_text(tokenizer, ids[n:]) for ids, n in zip(token_ids, prompt_lens, strict=True)]


def _scattered_table(most_tokens, num_seqs):
    """A page table whose pages lie anywhere, and the number of pages of the cache."""
    pages_per_seq = cdiv(most_tokens, PAGE_SIZE)
    num_pages = num_seqs * pages_per_seq + 4
    pages = np.random.default_rng(0).permutation(num_pages)[: num_seqs * pages_per_seq]
    return pages.reshape(num_seqs, pages_per_seq).astype(np.int32), num_pages


def _empty_caches(model, num_pages):
    """One cache per layer, so that a table counts the pages of one layer."""
    config = model.config
    sizes = (num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim)
    dtype = model.params["embedding"].dtype
    return [jnp.zeros(get_kv_cache_shape(*sizes, dtype), dtype) for _ in range(config.num_layers)]


def _batch(q_lens, kv_lens, table) -> RaggedBatch:
    """The batch in the order of the prompts; no kernel here asks for decodes in front."""
    batch, order = RaggedBatch.from_lengths(q_lens, kv_lens, table)
    assert order.tolist() == sorted(order), "prompts of one token each, or none"
    return batch


def _step(model, token_ids, batch, caches, attention, own):
    """Logits of the last token of each sequence, and the caches with the new tokens."""
    params, config = model.params, model.config
    ends = np.asarray(batch.cu_q_lens)[1 : int(batch.num_seqs) + 1]
    _, positions, _ = batch.token_positions(len(token_ids))
    hidden = params["embedding"][jnp.asarray(token_ids)]
    rotation = rope_rotation(config, positions)
    new_caches = []
    for layer, kv_cache in enumerate(caches):
        arrays = *_before(params["layers"], layer, config, hidden, rotation), kv_cache
        attend = attention if attention is not None and layer in own else _RUNG_3
        # The interpreter computes inside of callbacks: it hangs if the arrays are still to come.
        arrays = jax.block_until_ready(arrays)
        mixed, kv_cache = jax.block_until_ready(attend(*arrays, batch, sm_scale=config.sm_scale))
        hidden = _after(params["layers"], layer, config, hidden, mixed)
        new_caches.append(kv_cache)
    return np.asarray(lm_head(params, config, hidden[ends - 1])), new_caches


_RUNG_3 = jax.jit(ragged_rung, static_argnames="sm_scale")


@partial(jax.jit, static_argnames="config")
def _before(layers, layer, config, hidden, rotation):
    """Queries, keys and values of a layer."""
    return qkv_of(_weights(layers, layer), config, hidden, rotation)


@partial(jax.jit, static_argnames="config")
def _after(layers, layer, config, hidden, mixed):
    """The second half of a layer: what attention found joins the hidden state."""
    weights = _weights(layers, layer)
    hidden = hidden + matmul(mixed.reshape(hidden.shape[0], -1), weights["o_proj"])
    return hidden + feed_forward(weights, config, hidden)


def _weights(layers, layer):
    return jax.tree.map(lambda stacked: stacked[layer], layers)


def _text(tokenizer, token_ids) -> str:
    if tokenizer.end_token_id in token_ids:
        token_ids = token_ids[: token_ids.index(tokenizer.end_token_id)]
    return " ".join(tokenizer.decode(token_ids).split())


# --- Functions of earlier chapters under the ladder's signature -----------------------------------


def behind_store(decode: Callable) -> Callable:
    """A decode function of chapter 5 under the ladder's signature: the new tokens are stored first.

    Args:
        decode: (queries, kv_cache, kv_lens, page_indices, *, num_kv_heads, sm_scale) -> output.
    """

    @partial(jax.jit, static_argnames="sm_scale")
    def attention(queries, keys, values, kv_cache, batch, *, sm_scale):
        kv_cache = store_new_tokens(kv_cache, keys, values, batch)
        options = {"num_kv_heads": keys.shape[1], "sm_scale": sm_scale}
        return decode(queries, kv_cache, batch.kv_lens, batch.page_indices, **options), kv_cache

    return attention


def through_strips(flash: Callable) -> Callable:
    """A flash attention of chapter 4 under the ladder's signature: pages are gathered before it.

    Args:
        flash: (q, k, v, *, sm_scale) -> output of one sequence; it is called for each.
    """

    def attention(queries, keys, values, kv_cache, batch, *, sm_scale):
        kv_cache = store_new_tokens(kv_cache, keys, values, batch)
        parts = []
        for s in range(int(batch.num_seqs)):
            start, end = (int(x) for x in batch.cu_q_lens[s : s + 2])
            strip = kv_cache[batch.page_indices.reshape(batch.max_num_seqs, -1)[s]]
            strip = strip.reshape(-1, *strip.shape[2:])[: int(batch.kv_lens[s])]
            k, v = unpack_kv(strip, keys.shape[1], queries.shape[2])
            parts.append(flash(queries[start:end], k, v, sm_scale=sm_scale))
        return jnp.concatenate(parts), kv_cache

    return attention
