"""The sampler of request lengths: against its own table always, against the trace where it is."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from rpa import traces
from rpa.traces import SERVICES, quantile_table, sample_requests

pytestmark = pytest.mark.core

ROOT = Path(__file__).parent.parent
MANY = 100_000


def load_tool():
    spec = importlib.util.spec_from_file_location("fit_traces", ROOT / "tools" / "fit_traces.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trace_dir():
    """The folder with the trace's files; they are not part of this project."""
    given = os.environ.get("RPA_TRACE_DIR")
    if not given or not (Path(given) / load_tool().FILES["code"]).exists():
        pytest.skip("RPA_TRACE_DIR names no folder with the Azure trace: only the table is tested")
    return Path(given)


@pytest.mark.parametrize("service", SERVICES)
def test_the_table_is_a_quantile_table(service):
    table = quantile_table(service)
    probabilities = table["probabilities"]
    assert probabilities[0] == 0 and probabilities[-1] == 1
    for quantiles in (probabilities, table["context_tokens"], *table["generated_tokens"]):
        assert len(quantiles) == len(probabilities) and quantiles == sorted(quantiles)
    assert table["context_tokens"][0] >= 1 and min(map(min, table["generated_tokens"])) >= 1
    assert len(table["generated_tokens"]) == 20


@pytest.mark.parametrize("service", SERVICES)
def test_the_sampler_gives_back_its_table(service):
    """The share of requests at or below each quantile is that quantile's probability."""
    table = quantile_table(service)
    context, generated = sample_requests(MANY, seed=1, service=service)
    inner = [i for i, p in enumerate(table["probabilities"]) if 0 < p < 1]
    probabilities = np.array(table["probabilities"])[inner]
    bounds = np.array(table["context_tokens"], float)[inner]
    # Where a length repeats in the table, its mass lies between "below" and "at or below" it.
    at_or_below = (context[:, None] <= bounds).mean(axis=0)
    below = (context[:, None] < bounds).mean(axis=0)
    assert (below - 0.01 <= probabilities).all() and (probabilities <= at_or_below + 0.01).all()
    order = np.argsort(context, kind="stable")
    for group, quantiles in zip(np.array_split(order, 20), table["generated_tokens"], strict=True):
        median = np.interp(0.5, table["probabilities"], quantiles)
        np.testing.assert_allclose(np.median(generated[group]), median, rtol=0.1, atol=1)


def test_the_answers_depend_on_the_context_and_not_through_a_correlation():
    context, generated = sample_requests(MANY, seed=2)
    middle = (context > 985) & (context < 1150)
    assert np.median(generated[middle]) > 2.5 * np.median(generated[~middle])
    assert abs(np.corrcoef(context, generated)[0, 1]) < 0.2


def test_a_seed_gives_the_same_requests_and_another_seed_others():
    first, again, other = (sample_requests(50, seed=s)[0] for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_shapes_dtypes_and_bounds():
    for service in SERVICES:
        table = quantile_table(service)
        context, generated = sample_requests(1000, seed=5, service=service)
        assert context.dtype == generated.dtype == np.int64
        assert context.shape == generated.shape == (1000,)
        assert context.min() >= table["context_tokens"][0] >= 1 and generated.min() >= 1
        assert context.max() <= table["context_tokens"][-1]
    assert sample_requests(0, seed=0)[0].shape == (0,)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="service: given 'chat'; expected one of conversation"):
        sample_requests(1, seed=0, service="chat")
    with pytest.raises(ValueError, match="num_requests: given -1"):
        sample_requests(-1, seed=0)


def test_the_source_is_cited():
    text = (ROOT / "rpa/data/azure_2023_quantiles.json").read_text()
    for words in ("CC-BY 4.0", "Splitwise", "ISCA 2024", "github.com/Azure/AzurePublicDataset"):
        assert words in text
        assert words in traces.__doc__ or "github" in words


@pytest.mark.parametrize("service", SERVICES)
def test_the_sampler_looks_like_the_trace(service, trace_dir):
    tool = load_tool()
    real_context, real_generated = tool.read_trace(trace_dir / tool.FILES[service])
    context, generated = sample_requests(MANY, seed=6, service=service)
    for real, drawn in ((real_context, context), (real_generated, generated)):
        np.testing.assert_allclose(drawn.mean(), real.mean(), rtol=0.05)
        grid = np.unique(real)
        real_cdf = np.searchsorted(np.sort(real), grid, side="right") / len(real)
        drawn_cdf = np.searchsorted(np.sort(drawn), grid, side="right") / len(drawn)
        # Kolmogorov-Smirnov distance: the spikes at single lengths are what is left of it.
        assert np.abs(real_cdf - drawn_cdf).max() < 0.04
    for low, high in ((0, 300), (300, 800), (800, 1200), (1200, 3000), (3000, 20000)):
        real_answers = real_generated[(real_context >= low) & (real_context < high)]
        answers = generated[(context >= low) & (context < high)]
        np.testing.assert_allclose(answers.mean(), real_answers.mean(), rtol=0.15)


def test_the_table_is_the_one_that_the_tool_makes(trace_dir):
    tool = load_tool()
    assert tool.as_text(tool.table(trace_dir)) == tool.OUT.read_text(encoding="utf-8")
