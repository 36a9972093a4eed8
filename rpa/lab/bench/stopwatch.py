"""Time on a device by a wall clock, and why it can be trusted.

A call returns before the device is done, and starting one takes tens of microseconds, longer than
many a kernel. So a `Chain` runs many calls in one loop *on the device*, each on the output and the
cache of the one before: none can be left out or overlap the next, and the cache, which is donated,
is updated in place as a server would. The time of a call is the difference between a loop of 2n
calls and one of n, divided by n: what starting a loop costs is in both and cancels.
"""

import time
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

LEAST_S = 0.05
"""A loop runs at least this long, a hundred times what its start may vary by."""

STABLE = 0.02
"""Enough samples are taken when the middle half of them lies within this part of the median."""

FEWEST_SAMPLES, MOST_SAMPLES, MOST_S = 5, 40, 20.0
"""Bounds of the number of samples; after `MOST_S` no more are taken, stable or not."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles of `samples` measurements of `calls` calls each."""

    median_s: float
    low_s: float
    high_s: float
    calls: int
    samples: int

    @property
    def spread(self) -> float:
        """Width of the middle half of the samples, as a part of the median.

        >>> round(Timing(2.0, 1.9, 2.2, calls=8, samples=5).spread, 3)
        0.15
        """
        return (self.high_s - self.low_s) / self.median_s


class Chain:
    """Calls of one kernel, each on the results of the one before."""

    def __init__(self, attend, queries, keys, values, kv_cache):
        """Take over `queries` and `kv_cache`, which are donated.

        Args:
            attend: (queries, keys, values, kv_cache) -> (output, kv_cache), shaped and typed like
                the queries and the cache.
            queries: [num_tokens, num_q_heads, head_dim]; the output of one call is the queries of
                the next, which changes the numbers but not the work.
            keys, values: [num_tokens, num_kv_heads, head_dim], the same in every call.
            kv_cache: in the layout that `attend` wants.
        """
        self.state = (queries, kv_cache)
        self.new_tokens = (keys, values)
        self._repeat = jax.jit(partial(repeat, attend), donate_argnums=0)

    def run(self, calls: int):
        """Run `calls` calls in one loop and wait for the end."""
        # A number of the host's would be compiled in; this one is an argument.
        state = self._repeat(self.state, *self.new_tokens, np.int32(calls))
        self.state = jax.block_until_ready(state)


def repeat(attend, state, keys, values, calls):
    """The loop of a `Chain`: (queries, kv_cache) after `calls` calls, a traced i32."""

    def one(_, state):
        queries, kv_cache = state
        return attend(queries, keys, values, kv_cache)

    return jax.lax.fori_loop(0, calls, one, state)


def time_calls(run, *, clock=time.perf_counter) -> Timing:
    """Time one call of what `run(calls)` repeats, until the median is stable.

    Args:
        run: runs that many calls one after the other and waits for the end.
        clock: seconds; a test gives its own.

    >>> seconds = 0.0
    >>> def run(calls):
    ...     global seconds
    ...     seconds += 1.0 + 0.25 * calls  # a start that takes four times as long as a call
    >>> time_calls(run, clock=lambda: seconds).median_s
    0.25
    """

    def elapsed(calls):
        start = clock()
        run(calls)
        return clock() - start

    run(1)  # compiles
    calls = 1
    while elapsed(calls) < LEAST_S:
        calls *= 2
    samples, start = [], clock()
    while True:
        samples.append((elapsed(2 * calls) - elapsed(calls)) / calls)
        low, median, high = (float(x) for x in np.percentile(samples, (25, 50, 75)))
        timing = Timing(median, low, high, calls, len(samples))
        is_stable = len(samples) >= FEWEST_SAMPLES and timing.spread <= STABLE
        if is_stable or len(samples) >= MOST_SAMPLES or clock() - start > MOST_S:
            return timing
