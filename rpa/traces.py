"""Request lengths as a public service saw them: a table of quantiles and a seeded sampler.

How much memory a serving scheme wastes depends on how lengths are spread, and real lengths are
nothing like a bell curve. `rpa/data/azure_2023_quantiles.json` holds quantiles of the Azure LLM
inference trace 2023 (CC-BY 4.0; Patel et al., "Splitwise: Efficient generative LLM inference using
phase splitting", ISCA 2024); the trace itself is not part of this project. `tools/fit_traces.py`
makes the table from the trace.

How it samples: a context is drawn by inverting its quantile function, linearly between the
entries of the table. The answer's length is then drawn in the same way from one of twenty tables:
one for each twentieth of the requests, ordered by context. A single correlation would not do:
conversations with about 1,000 tokens of context get answers of about 400, shorter and longer ones
get about 100, so that both are tied and yet hardly correlated. What it does not keep: the order
in time, and spikes at single lengths, which are spread over the gap between two entries.
"""

import functools
import json
from importlib.resources import files

import numpy as np

SERVICES = ("conversation", "code")
"""The two services of the trace: a chat assistant, and code completion."""


@functools.cache
def quantile_table(service="conversation"):
    """Return the quantiles of one service, as they are in the JSON file.

    Args:
        service: one of `SERVICES`.

    Returns:
        A dict: `num_requests`; `probabilities`, a list of n between 0 and 1; `context_tokens`, n
        quantiles; `generated_tokens`, one list of n quantiles for each twentieth of the requests,
        ordered by context.

    Raises:
        ValueError: for another service.

    >>> table = quantile_table("code")
    >>> dict(zip(table["probabilities"], table["context_tokens"]))[0.5]
    1469
    """
    if service not in SERVICES:
        raise ValueError(f"service: given {service!r}; expected one of {', '.join(SERVICES)}.")
    text = files("rpa").joinpath("data/azure_2023_quantiles.json").read_text(encoding="utf-8")
    return json.loads(text)["services"][service]


def sample_requests(num_requests, seed, service="conversation"):
    """Draw the lengths of requests that look like the trace's.

    Args:
        num_requests: how many.
        seed: an int; the same seed gives the same requests.
        service: "conversation" or "code".

    Returns:
        (context_tokens, generated_tokens), each i64[num_requests], all at least 1.

    Raises:
        ValueError: for a negative number or another service.

    >>> context, generated = sample_requests(4, seed=0)
    >>> context.shape, bool((generated >= 1).all())
    ((4,), True)
    """
    if num_requests < 0:
        raise ValueError(f"num_requests: given {num_requests}; expected 0 or more.")
    table = quantile_table(service)
    probabilities = np.array(table["probabilities"])
    rng = np.random.default_rng(seed)
    place = rng.random(num_requests)  # where in the order of contexts each request stands
    luck = rng.random(num_requests)
    context = np.interp(place, probabilities, table["context_tokens"])
    generated = np.empty(num_requests)
    groups = table["generated_tokens"]
    group = (place * len(groups)).astype(int)
    for number, quantiles in enumerate(groups):
        mine = group == number
        generated[mine] = np.interp(luck[mine], probabilities, quantiles)
    return np.rint(context).astype(np.int64), np.rint(generated).astype(np.int64)
