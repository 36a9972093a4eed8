# %% [markdown]
# # Chapter 0: Start here, warm-up
#
# One exercise, to learn how exercises work here. Do these three things, in this order, and read
# what the check says each time:
#
# 1. run the notebook as it is: the check says that you have not started;
# 2. write `return batch_size * (weight_bytes + kv_len * token_bytes)`, run that cell and the check:
#    the check names the mistake;
# 3. correct it.

# %%
import rpa
from rpa.shapes import LLAMA3_8B

# %% [markdown]
# ## Exercise 0.1: What does one decode step read?
#
# A served model makes one token for each of `batch_size` sequences, all in one step. Write
# `decode_bytes(weight_bytes, token_bytes, batch_size, kv_len)`: how many bytes that step reads from
# HBM, as an integer.
#
# - All weights together are `weight_bytes`. One read of them serves the whole batch.
# - Each sequence has `kv_len` tokens in the KV cache, `token_bytes` each; the new token is one of
#   them, and it attends to all of them.
#
# By hand: 100 bytes of weights, 2 bytes per token, one sequence of three tokens. 106 bytes.
#
# **Teaches:** weights are shared by a batch, KV caches are not; and how a check talks to you.

# %% [markdown] tags=["hint"]
# Two things are read. One does not depend on the batch, the other grows with it.

# %% [markdown] tags=["hint"]
# Python integers are enough: `+` and `*`.

# %% [markdown] tags=["hint"]
# ```python
# return weight_bytes + <sequences> * <tokens of each> * ...
# ```


# %% tags=["exercise"]
def decode_bytes(weight_bytes, token_bytes, batch_size, kv_len):
    """Bytes that one decode step reads from HBM, as an integer."""
    ### BEGIN SOLUTION
    return weight_bytes + batch_size * kv_len * token_bytes
    ### END SOLUTION


# %% tags=["check"]
rpa.check("0.1", decode_bytes)

# %% [markdown]
# That is how every exercise goes. Where the check names a mistake, the name is an idea and not a
# line number: correct the idea first. Now use what you have written: from which batch on does Llama
# 3 8B read more cache than weights, with 2,048 tokens in each sequence?

# %%
weight_bytes = 2 * LLAMA3_8B.matmul_parameters  # bfloat16
token_bytes = LLAMA3_8B.kv_bytes_per_token()
for batch_size in (1, 32, 55, 56, 64, 128):
    step_bytes = decode_bytes(weight_bytes, token_bytes, batch_size, kv_len=2048)
    share = 1 - weight_bytes / step_bytes
    print(f"{batch_size:4} sequences: {step_bytes / 1e9:5.1f} GB, {share:.2%} of it cache")

# %% [markdown] tags=["explanation"]
# The weights stand alone, everything else is multiplied by the batch. So a larger batch spreads the
# weights over more tokens, and what is left is attention: from 56 sequences on, the cache is the
# larger part.


# %% tags=["wrong"] refused="the weights are read again for every sequence"
def decode_bytes(weight_bytes, token_bytes, batch_size, kv_len):
    return batch_size * (weight_bytes + kv_len * token_bytes)


# %% tags=["wrong"] refused="the cache is read once for the whole batch"
def decode_bytes(weight_bytes, token_bytes, batch_size, kv_len):
    return weight_bytes + token_bytes * kv_len


# %% tags=["wrong"] refused="Is the `return` missing?"
def decode_bytes(weight_bytes, token_bytes, batch_size, kv_len):
    print(weight_bytes + batch_size * kv_len * token_bytes)


# %% tags=["wrong"] refused="kv_len + 1 is too many"
def decode_bytes(weight_bytes, token_bytes, batch_size, kv_len):
    return weight_bytes + batch_size * token_bytes * (kv_len + 1)


# %% tags=["wrong"] refused="Your function returns 106.0, a float"
def decode_bytes(weight_bytes, token_bytes, batch_size, kv_len):
    return weight_bytes + float(batch_size * kv_len * token_bytes)
