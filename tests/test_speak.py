"""What the model writes with a function of the learner: the words, and the adapters before it."""

import jax
import numpy as np
import pytest

from rpa.ladder import ragged_rung
from rpa.models import ModelNotInstalled, speak
from rpa.models.llama import LlamaConfig
from rpa.ragged import RaggedBatch, store_new_tokens
from rpa.yours import reference

PROMPTS = ("Hi!", "Count to three.")


def needs_model():
    try:
        return speak._model()
    except ModelNotInstalled as reason:
        pytest.skip(str(reason))


def right(*arrays, sm_scale):
    return ragged_rung(*arrays, sm_scale=sm_scale)


def keys_for_values(queries, keys, values, kv_cache, batch, *, sm_scale):
    return ragged_rung(queries, values, keys, kv_cache, batch, sm_scale=sm_scale)


def test_a_right_function_writes_what_rung_3_writes_and_a_wrong_one_does_not(capsys):
    needs_model()
    speak.speak(right, prompts=PROMPTS, num_tokens=3)
    printed = capsys.readouterr().out
    assert printed.count("rung 3:  the same") == 2 and "in all layers" in printed
    speak.speak(keys_for_values, prompts=PROMPTS, num_tokens=3, own_prompt=False)
    printed = capsys.readouterr().out
    assert "the same" not in printed and "after the prompts" in printed


def test_a_page_table_may_be_changed_after_the_prompts():
    model = needs_model()

    def exchange_rows(table):
        return table[::-1]

    said = speak.write(model, None, PROMPTS, 3)
    assert speak.write(model, None, PROMPTS, 3, after_prompt=exchange_rows) != said


def test_where_the_model_is_not_installed_it_is_said(monkeypatch, capsys):
    def absent():
        raise ModelNotInstalled("gguf")

    monkeypatch.setattr(speak, "load_smollm2", absent)
    speak._model.cache_clear()
    speak.speak(right)
    assert "does not speak here" in capsys.readouterr().out
    speak._model.cache_clear()


def case(q_lens):
    config = LlamaConfig(1, 64, 4, 2, 64, 64, 64, 64)
    rng = np.random.default_rng(0)
    batch, _ = RaggedBatch.from_lengths(q_lens, [5, 9], [[3, 1], [0, 2]])
    sizes = [(sum(q_lens), h, config.head_dim) for h in (4, 2, 2)]
    arrays = [jax.numpy.asarray(rng.standard_normal(size, np.float32)) for size in sizes]
    return *arrays, jax.numpy.zeros((4, 8, 4, 1, 128)), batch


@pytest.mark.parametrize(
    ("attention", "q_lens"),
    [
        (speak.through_strips(reference.flash_attention), [1, 3]),
        (speak.behind_store(reference.paged_decode), [1, 1]),
    ],
)
def test_earlier_functions_under_the_signature_of_the_ladder(attention, q_lens):
    arrays = case(q_lens)
    batch = arrays[-1]
    output, cache = attention(*arrays, sm_scale=0.125)
    expected = store_new_tokens(arrays[3], *arrays[1:3], batch)
    assert np.array_equal(cache, expected)
    truth = ragged_rung(*arrays, sm_scale=0.125)[0]
    np.testing.assert_allclose(output, truth, atol=2e-5)
