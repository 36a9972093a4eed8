"""Merging: attention over some of the keys, and over the others, make attention over all of them.

A softmax over all keys is a softmax within each part, times the weight of the part. Two numbers
per query and head say all that one part has to tell the others: its output, and the logarithm of
its softmax's denominator, `lse` (see `rpa.dense.log_sum_exp`):

    total  = log(sum of exp(lse))             over the parts
    output = sum of exp(lse - total) * output

It is the online softmax of rung 4 once more, with parts in place of blocks. A part without a key
has an lse of -inf, so its weight is 0. A sink is a part, too: it has no value, and its lse is the
sink. So parts are computed without the sink, and it is counted once, here.
"""

import jax
import jax.numpy as jnp


def merge(outputs, lses, sinks=None):
    """Attention over all keys, of the attention over each part of them; in float32.

    Args:
        outputs: [parts, num_tokens, num_q_heads, head_dim], any float dtype.
        lses: f32[parts, num_tokens, num_q_heads], -inf where a part has no key for a query; the
            output there may be anything.
        sinks: f32[num_q_heads] or None, for parts that were computed without.

    Returns:
        output f32[num_tokens, num_q_heads, head_dim], and lse f32[num_tokens, num_q_heads]: zero
        and -inf where no part has a key.

    Three keys of value 1 in one part, one key of value 5 in the other, equal scores:

    >>> outputs = jnp.array([1.0, 5.0]).reshape(2, 1, 1, 1)
    >>> output, lse = merge(outputs, jnp.log(jnp.array([3.0, 1.0])).reshape(2, 1, 1))
    >>> output[0, 0], jnp.exp(lse[0])
    (Array([2.], dtype=float32), Array([4.], dtype=float32))
    """
    weights, lse = merge_weights(lses, sinks)
    return sum(
        weighted(output, weight) for output, weight in zip(outputs, weights, strict=True)
    ), lse


def merge_weights(lses, sinks=None):
    """How much each part counts, f32 like lses; and lse f32[num_tokens, num_q_heads] of all keys.

    >>> weights, _ = merge_weights(jnp.log(jnp.array([3.0, 1.0])).reshape(2, 1, 1))
    >>> weights.reshape(2)
    Array([0.75, 0.25], dtype=float32)
    """
    lse = jax.nn.logsumexp(jnp.asarray(lses, jnp.float32), axis=0)
    has_key = lse > -jnp.inf
    total = lse if sinks is None else jnp.logaddexp(lse, jnp.asarray(sinks, jnp.float32))
    # (-inf) - (-inf) is NaN, and that is what a row without a key would compute.
    weights = jnp.exp(lses - jnp.where(has_key, total, 0.0))
    return weights, jnp.where(has_key, total, -jnp.inf)


def weighted(output, weight):
    """A part's share of the output, f32; zero, whatever its output holds, where its weight is."""
    weight = weight[..., None]
    return jnp.where(weight > 0, output.astype(jnp.float32) * weight, 0.0)
