"""Three ways to keep the MXU busy: later products first, swapped operands, and the idle half.

# Later products first

P V has to wait for its softmax, and the MXU, which takes its work in the order of the program,
would wait with it. So Q K^T of a few later products is issued before (`delayed`).

# Decode: swapped operands

A product has a stationary operand, which the MXU takes in as weights (MATPUSH), and a streamed one,
whose rows pass through it (MATMUL). A decode has 16 rows of queries and 1,024 keys. Written as
Q K^T, all keys are stationary, for 16 rows that are streamed: MATPUSH is nearly full, MATMUL idles.
With the operands swapped,

    Q K^T = (K Q^T)^T

16 rows are stationary and all keys are streamed: now MATMUL has the work. A bundle has slots for
both. So some keys are stationary and others streamed, at the same time. V stays stationary: to be
streamed it would have to be transposed. K Q^T is [keys, 16], and the XLU transposes it back: one
register of results for 8 keys, however many heads share the product. So it pays where they are many
(`Tricks.swaps_operands`).

The MXU takes its work in the order of the program. If all streamed keys of a long product came
first, MATMUL would work alone, and then MATPUSH; in cells of CELL_TOKENS they overlap.

# Prefill: the idle half of a wide MXU

An MXU of 256 x 256 multiplies a product with a depth or a width of 128 no faster than one of 256.
At head_dim 128 both products of attention leave half of it idle: Q K^T is 128 deep, P V is 128
wide. On a 128 x 128 MXU (v5e) nothing is idle, and `Tricks.uses_idle_mxu` says no.

The vector unit is busy: it touches every score some seven times. So two things that it did are
given to the idle halves:

    [q_high, q_low] [k, k]^T = (q_high + q_low) k^T    scores that are scaled already
    P [V, 1]                 = [P V, sum P]            the row sums next to the values

**Scaling.** Queries scaled by sm_scale * log2(e) and rounded to bfloat16 would be off by 2^-9,
enough to double the error of the whole kernel. What the rounding leaves over is again nearly a
bfloat16: with `q_low` next to `q_high` 16 bits are kept, and no score has to be multiplied.

**Row sums** are sums of the rounded weights, the ones that multiply V; so what the rounding adds to
a row it adds to its sum too. They are rescaled together with the accumulator, of which they are the
last 128 columns, all alike.
"""

from collections import deque

import jax.numpy as jnp

from rpa.paging import LANES
from rpa.tiled import dot

CELL_TOKENS = 512
"""Keys of which the first part is streamed, and the rest is stationary."""

SWAPPED_QUARTERS = {128: 1, 256: 2}
"""Quarters of a cell that are streamed, by the side of the MXU: all take in a stationary key in the
same time, but a wide one streams twice as many lanes per cycle."""


def parts(num_keys, mxu_size):
    """How the keys of a product are cut: (first, last + 1, whether they are streamed).

    Streamed keys come by 128, a register of scores; so a short cell may stream none.

    >>> parts(512, mxu_size=128)
    [(0, 128, True), (128, 512, False)]
    >>> parts(1024, mxu_size=256)
    [(0, 256, True), (256, 512, False), (512, 768, True), (768, 1024, False)]
    """
    cut = []
    for start in range(0, num_keys, CELL_TOKENS):
        end = min(start + CELL_TOKENS, num_keys)
        streamed = (end - start) * SWAPPED_QUARTERS[mxu_size] // 4 // LANES * LANES
        cut += [(start, start + streamed, True), (start + streamed, end, False)]
    return [part for part in cut if part[0] < part[1]]


def delayed(results, by):
    """The results of a generator, each once the generator has made `by` later ones.

    >>> made = (print("Q K^T", i) or i for i in range(3))
    >>> for i in delayed(made, by=1):
    ...     print("P V", i)
    Q K^T 0
    Q K^T 1
    P V 0
    Q K^T 2
    P V 1
    P V 2
    """
    pending = deque()
    for result in results:
        pending.append(result)
        if len(pending) > by:
            yield pending.popleft()
    yield from pending


def product(q, k, mxu_size):
    """Q K^T of [rows, lanes] and [keys, lanes], f32[rows, keys], some keys as streamed operand."""
    scores = []
    for first, end, is_streamed in parts(len(k), mxu_size):
        a, b = (k[first:end], q) if is_streamed else (q, k[first:end])
        s = dot(a, b, contract=(1, 1))
        scores.append(s.T if is_streamed else s)
    return jnp.concatenate(scores, axis=1)


# --- The idle half of a wide MXU ---------------------------------------------------------------


def split_queries(tile, factor, dtype):
    """Scaled queries in two parts that add up to them: [rows, lanes] to dtype[rows, 2 * lanes].

    >>> high, low = split_queries(jnp.ones((1, 1)), 0.1234567, jnp.bfloat16)[0].tolist()
    >>> f"{high:.7f} + {low:.7f} = {high + low:.7f}"
    '0.1235352 + -0.0000787 = 0.1234565'
    """
    scaled = tile * factor
    high = scaled.astype(dtype)
    low = (scaled - high.astype(jnp.float32)).astype(dtype)
    return jnp.concatenate([high, low], axis=1)


def double_keys(k):
    """[bkv_c, lanes] to [bkv_c, 2 * lanes]: one copy for each part of the queries."""
    return jnp.concatenate([k, k], axis=1)


def append_ones(v):
    """[bkv_c, lanes] to [bkv_c, lanes + 128]: columns whose product with the weights is their sum.

    A whole register of columns, although one would do: nothing is cheaper than that.
    """
    return jnp.concatenate([v, jnp.ones((len(v), LANES), v.dtype)], axis=1)
