# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 1: Dense attention, exercises
#
# You write the pieces of attention for one sequence: the softmax, the causal mask behind a cached
# prefix, grouped heads, the sliding window, and the sums that say which chip limit each phase
# meets. Read the lesson first: `notebooks/01_dense.ipynb`.
#
# Every exercise is a function to fill in and a check to run. A check starts with a case that you
# can do by hand, stops at the first difference, and says what it recognises.

# %%
import jax.numpy as jnp

import rpa

# %% [markdown]
# ## Exercise 1.1: A softmax that does not overflow
#
# Write `softmax(scores)` for `scores` of shape `[q_len, kv_len]`: each row becomes weights that are
# positive and sum to 1. Scores may be large, 100 or more, so subtract what can be subtracted.
#
# **Teaches:** why every attention kernel carries a running maximum.

# %% [markdown] tags=["hint"]
# $e^{s_j} / \sum_k e^{s_k}$ does not change if the same number is subtracted from every score of a
# row. Subtract one that leaves no positive exponent.

# %% [markdown] tags=["hint"]
# `scores.max(axis=-1, keepdims=True)` keeps the axis with length 1, so that the difference
# broadcasts along each row. `jnp.exp` and `.sum` with the same arguments do the rest.

# %% [markdown] tags=["hint"]
# ```python
# weights = jnp.exp(scores - <largest of each row>)
# return weights / <sum of each row>
# ```


# %% tags=["exercise"]
def softmax(scores):
    """Attention weights: f32[q_len, kv_len] to f32[q_len, kv_len], each row sums to 1."""
    ### BEGIN SOLUTION
    row_max = scores.max(axis=-1, keepdims=True)  # [q_len, 1]
    weights = jnp.exp(scores - row_max)
    return weights / weights.sum(axis=-1, keepdims=True)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("1.1", softmax)

# %% [markdown] tags=["explanation"]
# After the subtraction the largest exponent of a row is 0, so no weight exceeds 1 and at least one
# is 1: the sum lies between 1 and `kv_len` and neither overflows nor vanishes. The price is a pass
# over the row before the first `exp`. Chapter 4 removes that pass: it keeps a *running* maximum.


# %% tags=["wrong"] refused="the largest score is not subtracted before exp"
def softmax(scores):
    exponentials = jnp.exp(scores)
    return exponentials / exponentials.sum(axis=1)[:, None]


# %% tags=["wrong"] refused="the sum runs over the queries (axis 0)"
def softmax(scores):
    weights = jnp.exp(scores - scores.max(axis=0))
    return weights / weights.sum(axis=0)


# %% tags=["wrong"] refused="shape (2,), expected (2, 3)"
def softmax(scores):
    return jnp.exp(scores).sum(axis=-1)
