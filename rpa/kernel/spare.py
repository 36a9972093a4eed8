"""What the idle half of a wide MXU does for us: it scales the scores and adds up the weights.

An MXU of 256 x 256 multiplies a product with a depth or a width of 128 no faster than one of 256.
At head_dim 128 both products of attention leave half of it idle: Q K^T is 128 deep, P V is 128
wide. On a 128 x 128 MXU (v5e) nothing is idle, and `Plan.has_spare_mxu` says no.

The vector unit has no time to spare: it touches every score some seven times. So two things that it
did are given to the idle halves:

    [q_high, q_low] [k, k]^T = (q_high + q_low) k^T    scores that are scaled already
    P [V, 1]                 = [P V, sum P]            the row sums beside the values

**Scaling.** Queries scaled by sm_scale * log2(e) and rounded to bfloat16 would be off by 2^-9,
enough to double the error of the whole kernel. What the rounding leaves over is again nearly a
bfloat16: with `q_low` beside `q_high` 16 bits are kept, and no score has to be multiplied.

**Row sums** are sums of the rounded weights, the ones that multiply V; so what the rounding adds to
a row it adds to its sum too. They are rescaled together with the accumulator, of which they are the
last 128 columns, all alike.
"""

import jax.numpy as jnp

from rpa.paging import LANES


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
