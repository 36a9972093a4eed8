# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 11: Production
#
# **Time:** 60 minutes to read and run, about 110 minutes for the exercises.
#
# **You need:** chapters 2, 3, 6 and 8: pages and forks, `kv_lens`, `cu_q_lens` and `distribution`,
# the fused update, and the whole kernel. No TPU.
#
# **You will be able to:** say what each feature of a served model asks of the kernel, and what it
# saves; keep a cache in 8 bits; tell how five bugs came into production kernels and got past their
# tests; write the test that finds each; build the metadata of a step as vLLM and SGLang do; and say
# how exact attention is at 256K tokens.
#
# The kernel is complete and fast. Now it leaves the house. Other people's models want features, and
# other people's servers call it in ways that its author did not think of. Most of this chapter is
# about bugs. **All of them are real**: each was in a kernel that served users, or follows from its
# code. No author was careless. Each of them passed its tests.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import rpa
from rpa import chips, dense, ragged
from rpa.check.chapters import wrong_kernels
from rpa.figures import production as pictures
from rpa.figures import show_source
from rpa.kernel import cases, softmax
from rpa.paging import get_kv_cache_shape, kv_token_bytes

# %%
HOST = jax.devices("cpu")[0]  # where the TPU interpreter runs, also next to a TPU

# %% [markdown]
# ## 1. What does a model ask of its attention?
#
# | feature | what it does | who has it | keyword |
# |---|---|---|---|
# | sliding window | a query sees the last w keys only | Gemma 2 and 3, gpt-oss | `sliding_window` |
# | soft cap | scores bend towards a limit | Gemma 2 | `soft_cap` |
# | attention sink | a head may attend to nothing | gpt-oss | `attention_sink` |
# | 8-bit cache | K and V in float8, with scales | servers, as an option | `k_scale`, `v_scale` |
# | KV sharing | a layer reads another layer's K and V | Gemma 3n | `update_kv_cache=False` |
#
# Three of them change the softmax. By hand, for two keys with scores 100 and 50: without anything
# the first has all of the weight. A cap of 50 makes them `50 tanh(2) = 48.2` and `50 tanh(1) =
# 38.1`. And a sink of 48.2 is a third key, as strong as the first one, whose value is nothing:

# %%
scores, mask = jnp.array([[100.0, 50.0]]), jnp.ones((1, 2), bool)
capped = 50 * jnp.tanh(scores / 50)
sunk = dense.masked_softmax(capped[None], mask, sinks=jnp.array([48.2]))
for name, weights in [
    ("plain", dense.masked_softmax(scores, mask)),
    ("soft cap", dense.masked_softmax(capped, mask)),
    ("soft cap and sink", sunk[0]),
]:
    print(f"{name:18} weights {np.round(weights[0], 4)}, together {weights.sum():.3f}")
assert abs(float(sunk.sum()) - 0.5) < 1e-2

# %% [markdown]
# With a sink the weights of the keys no longer add up to 1: a head that finds nothing can say so.
# What does it cost in the kernel? A key without a value needs no tile and no copy. The softmax just
# *begins* as if it had been seen:

# %%
show_source(softmax.Softmax.nothing_seen)

# %% [markdown]
# Now everything at once, on the real kernel: a float8 cache, window, cap and sinks, two decodes and
# a chunk. A batch for the rest of the chapter:


# %%
def make_step(dtype=np.float32, q_lens=(1, 1, 6), kv_lens=(21, 9, 30), heads=(4, 2)):
    """Queries, keys, values, a cache with numbers in it, and the batch; pages of 8."""
    rng, pool = np.random.default_rng(9), rpa.PagePool(12, 8)
    for s, kv_len in enumerate(kv_lens):
        pool.allocate(s, kv_len)
    batch, _ = rpa.RaggedBatch.from_lengths(q_lens, kv_lens, pool.page_table(range(3), 4))
    cache_shape = get_kv_cache_shape(12, 8, heads[1], 128, dtype)
    shapes = [(8, h, 128) for h in (heads[0], heads[1], heads[1])]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in (*shapes, cache_shape)]
    return arrays[0], *(array.astype(dtype) for array in arrays[1:]), batch


def metadata(batch):
    return batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution


# %%
BLOCKS = {"d_block_sizes": (1, 16, 1, 16), "m_block_sizes": (8, 16, 8, 16)}
*tokens, cache, batch = make_step(jnp.float8_e4m3fn)
sinks = np.float32([0.5, -1.0, 2.0, 0.0])
features = {"sliding_window": 12, "soft_cap": 5.0, "attention_sink": sinks}
scales = {"k_scale": 0.5, "v_scale": 2.0}
with jax.default_device(HOST):
    output, new_cache = rpa.ragged_paged_attention(
        *tokens, jnp.array(cache), *metadata(batch), sm_scale=128**-0.5, **features, **scales,
        **BLOCKS, backend="interpret",
    )  # fmt: skip

# %% [markdown]
# The oracle knows nothing of kernels. It reads the cache as it is, and takes the scales into the
# factor on the scores and into the output:

# %%
known = {"sliding_window": 12, "soft_cap": 5.0, "sinks": sinks, "sm_scale": 0.5 * 128**-0.5}
truth = ragged.oracle_ragged(tokens[0], new_cache, batch, 2, **known)
truth = dense.Truth(2.0 * truth.output, 2.0 * truth.scale)
print(f"relative error {dense.relative_error(output, truth):.1e}")
assert dense.relative_error(output, truth) < 1e-5

# %% [markdown]
# **Takeaway.** A feature of the softmax is a line in the kernel. Whether it is right *next to the
# others*, in every batch, is the work.

# %% [markdown]
# ## 2. Where do the bytes go?
#
# The other features are about memory. Llama 3 8B, 64 sequences of 4,096 tokens, a decode step. A
# server pays twice for its cache: it must **keep** it in HBM, and in every step it must **read**
# it. By hand: 128 KiB per token and 64 x 4,096 tokens make 32 GiB, kept and read.

# %%
from rpa.shapes import LLAMA3_8B, decode_step

token_bytes = LLAMA3_8B.kv_bytes_per_token("bfloat16")
num_seqs, kv_len, prefix, window = 64, 4096, 3072, 1024
all_bytes = num_seqs * kv_len * token_bytes
in_window = num_seqs * window * token_bytes
shared = (prefix + num_seqs * (kv_len - prefix)) * token_bytes  # the prefix once
print(f"{all_bytes / 2**30:.0f} GiB")
assert all_bytes == 32 * 2**30

# %%
ways = {
    "bfloat16": (all_bytes, all_bytes),
    "float8": (all_bytes / 2, all_bytes / 2),
    "window of 1,024 in every second layer": (all_bytes, (all_bytes + in_window) / 2),
    "a common prefix of 3,072": (shared, all_bytes),
    "K and V shared by pairs of layers": (all_bytes / 2, all_bytes),
}
pictures.kept_and_read(ways, decode_step(LLAMA3_8B, num_seqs, kv_len).weight_bytes)

# %% [markdown]
# Look at "no change". A window saves reading, and keeps everything until the server gives the pages
# behind it away. A shared prefix and shared layers save memory and **not one byte of reading**:
# each sequence and each layer reads the pages for itself. Only the 8-bit cache saves both.
#
# **Takeaway.** Ask of each feature: does it keep less, or read less? Decode time follows what is
# read; how many users fit follows what is kept.

# %% [markdown]
# ## 3. How many bits does a key need?
#
# A float8 has eight: `e4m3fn` spends four on the exponent and three on the digits, `e5m2` five and
# two. So between 1 and 2 there are 8 numbers, or 4; and what is too large is NaN in the first,
# which has no infinity:

# %%
for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
    numbers = jnp.array([1.06, 1.2, 0.01, 440.0, 500.0]).astype(dtype).astype(jnp.float32)
    print(f"{jnp.dtype(dtype).name:14}", "  ".join(f"{x:g}" for x in np.asarray(numbers)))
assert np.isnan(np.float32(jnp.float8_e4m3fn(500.0)))

# %% [markdown]
# Keys are not made for this range, so they are divided by a **scale** first and clipped; the kernel
# multiplies by the scale again. One number for a layer, so it costs nothing: it is folded into the
# factor on the scores (`k_scale`) and into the last division (`v_scale`).

# %%
show_source(ragged.quantize)

# %% [markdown]
# What does it do to the output? Attention of one query over 2,048 tokens, K and V with a scale that
# maps their largest value to the largest of the type. Then once more with a single **outlier** in
# K, a hundred times larger than the rest: it takes the whole range for itself.


# %%
def stored(x, dtype):
    """What comes out of a cache of this dtype, with the best scale for x."""
    if dtype == jnp.bfloat16:
        return x.astype(dtype).astype(jnp.float32)
    scale = float(jnp.abs(x).max() / float(jnp.finfo(dtype).max))
    return ragged.quantize(x, scale, dtype).astype(jnp.float32) * scale


def error_of(q, k, v, dtype):
    """Relative error of attention through a cache of this dtype, against float64."""
    return dense.relative_error(
        dense.attention(q, stored(k, dtype), stored(v, dtype)), dense.oracle(q, k, v)
    )


# %%
rng = np.random.default_rng(3)
q, k, v = (jnp.array(rng.standard_normal((n, 4, 128)), jnp.float32) for n in (1, 2048, 2048))
outlier = k.at[1000, :, 5].set(400.0)
errors = {}
for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2):
    errors[jnp.dtype(dtype).name] = [error_of(q, each, v, dtype) for each in (k, outlier)]
    plain, with_outlier = errors[jnp.dtype(dtype).name]
    print(f"{jnp.dtype(dtype).name:14} {plain:.4f}, with an outlier {with_outlier:.4f}")

# %%
assert errors["bfloat16"][0] < errors["float8_e4m3fn"][0] < errors["float8_e5m2"][0]

# %% [markdown]
# Fifteen times the error of bfloat16, in random data. Whether a model minds is measured on the
# model, not here. What can be said here: the outlier, feared in integers, does little, since a
# *floating* format has its digits at every size. That is why the cache is float8 and not int8.
#
# **Takeaway.** Eight bits halve the bytes and cost digits, not range, if a scale puts the numbers
# in the range and a clip keeps them there. Exercise 11.6.

# %% [markdown]
# ## 4. Who else reads these pages?
#
# **Two layers, one cache.** A layer that shares K and V of another one calls the kernel with
# `update_kv_cache=False`: its `keys` and `values` are ignored, all is read from the cache, and the
# cache must come back *bit by bit* as it was. So NaN in the arguments must not matter:

# %%
*tokens, cache, batch = make_step()
nothing = np.full_like(tokens[1], np.nan)
with jax.default_device(HOST):
    shared_output, same_cache = rpa.ragged_paged_attention(
        tokens[0], nothing, nothing, jnp.array(cache), *metadata(batch), sm_scale=128**-0.5,
        update_kv_cache=False, **BLOCKS, backend="interpret",
    )  # fmt: skip
truth = ragged.oracle_ragged(tokens[0], cache, batch, 2, sm_scale=128**-0.5)
assert dense.scaled_error(shared_output, truth) < 8e-6
assert np.asarray(same_cache).tobytes() == cache.tobytes()

# %% [markdown]
# **Two sequences, one prefix.** The pool of chapter 2 forks: the child lists the same pages. What
# may it do with them? Read. Before it writes, the half-full last page has to be copied, and
# `append` says so. Who forgets the copy is told by the validator:

# %%
pool = rpa.PagePool(12, 8)
pool.allocate("system prompt", 12)
pool.fork("system prompt", "user")
pages = [pool.pages(name) for name in ("system prompt", "user")]
forgot_the_copy, _ = rpa.RaggedBatch.from_lengths([0, 1], [12, 13], pages)
try:
    forgot_the_copy.validate(num_tokens=1, num_pages=12, page_size=8)
except ValueError as error:
    refusal = str(error)
print(refusal)
assert "a shared page may only be read" in refusal

# %%
copies = pool.append("user", 1)
pages = [pool.pages(name) for name in ("system prompt", "user")]
legal, _ = rpa.RaggedBatch.from_lengths([0, 1], [12, 13], pages)
legal.validate(num_tokens=1, num_pages=12, page_size=8)
print(copies, "->", pages)

# %% [markdown]
# **Takeaway.** Sharing needs nothing from the kernel but that it keeps its hands off what it does
# not own. That is a promise about *writes*, and only a bit-by-bit comparison of the cache tests it.

# %% [markdown]
# ## 5. Case one: the answer that was right
#
# *Symptom.* A model with a sliding window answers well. Later a second user asks about the same
# document. The server finds its pages in the cache, reuses them, and the answer is nonsense.
#
# *Clue.* It happens only with prompts longer than the window, and only if they were computed in
# one piece. Here is the kernel, without heads and pages. It stores new tokens while it is at it:

# %%
show_source(wrong_kernels.forgetful)

# %%
rng = np.random.default_rng(0)
q_len, window, bq, bkv = 393, 128, 32, 256  # nothing is cached
queries, kv = rng.standard_normal((q_len, 64)), rng.standard_normal((q_len, 2, 64))
empty = np.zeros_like(kv)
output, cache = wrong_kernels.forgetful(queries, kv, empty, window=window, bq=bq, bkv=bkv)

one_head = queries[:, None], kv[:, :1], kv[:, 1:]
truth = dense.oracle(*one_head, sliding_window=window)
print(f"output: relative error {dense.relative_error(output[:, None], truth):.0e}")
missing = (cache != kv).any(axis=(1, 2))
print(f"cache: {missing.sum()} of {q_len} tokens are not there, the first {missing.argmin()}")
assert dense.relative_error(output[:, None], truth) < 1e-6 and missing.sum() == 256

# %% [markdown]
# *Cause.* Only the last query block writes back. It used to see all earlier keys; under a window it
# skips the blocks before it, and what it does not visit it does not write. In small, 11 tokens:

# %%
pictures.lost_tokens(11, window=3, bq=2, bkv=4)

# %% [markdown]
# *Why the tests passed.* They compared the output. And in the same request every token that was
# lost lies behind the window for good, so even the next decode is right. Only a reader with other
# positions notices: a request that reuses the *prefix*.
#
# *The test.* Compare the cache, bit by bit, with a chunk much longer than window and key block.
# Exercise 11.1 asks how long. In rung 8 the store of a token hangs on nothing but its own query
# block (chapter 8, section 6).
#
# **Takeaway.** A kernel has two results. The second one is the cache.

# %% [markdown]
# ## 6. Case two: the server that stopped at night
#
# *Symptom.* Under load all is well. At three in the morning the server hangs; no error, no output.
#
# *Clue.* At night requests end and no request takes their slots. A slot with `q_len` 0 stands
# between two others. *Cause:* the chain of chapter 5. Each sequence, while it computes, starts the
# copies of the next one. Who computes nothing starts nothing:


# %%
def run(q_lens):
    """The chain of prefetches: who computes starts the copies of the next sequence."""
    on_the_way = {0}  # the first copies are started before the loop
    for s, q_len in enumerate(q_lens):
        if q_len == 0:
            continue  # nothing to compute, and nothing is started
        if s not in on_the_way:
            return f"waits for sequence {s} for ever"
        on_the_way.add(s + 1)
    return "ends"


# %%
for q_lens in ([1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1]):
    print(q_lens, run(q_lens))
assert run([1, 1, 0]) == "ends" and "for ever" in run([1, 0, 1])

# %% [markdown]
# *Why the tests passed.* Idle slots at the *end* do no harm, and that is where tests put their
# padding. *The test:* an idle slot at the beginning, two in the middle, a batch of nothing else;
# with a time limit. The whole kernel, with our second sequence idle:


# %%
def rung8(batch, arrays, **options):
    """The whole kernel in the interpreter."""
    *tokens, cache = arrays
    with jax.default_device(HOST):
        return rpa.ragged_paged_attention(
            *tokens, jnp.array(cache), *metadata(batch), sm_scale=128**-0.5,
            backend="interpret", **BLOCKS, **options,
        )  # fmt: skip


# %%
def error_and_missing(batch, arrays, results):
    """Worst (token, head) of the output, and how many rows of the cache are not as in rung 3."""
    options = {"sm_scale": 128**-0.5}
    _, right = rpa.ref_ragged_paged_attention(*arrays, *metadata(batch), **options)
    truth = ragged.oracle_ragged(arrays[0], right, batch, 2, **options)
    wrong_rows = (np.asarray(results[1]) != np.asarray(right)).any((2, 3, 4)).sum()
    return dense.scaled_error(results[0], truth), int(wrong_rows)


# %%
*arrays, idle = make_step(q_lens=(1, 0, 6))
error, wrong_rows = error_and_missing(idle, arrays, rung8(idle, arrays))
print(f"q_lens {np.diff(idle.cu_q_lens)}: error {error:.1e}, wrong rows in the cache {wrong_rows}")
assert error < 8e-6 and wrong_rows == 0

# %% [markdown]
# **Takeaway.** "Nothing to do" is a case. In code that runs ahead it is the hardest one.

# %% [markdown]
# ## 7. Case three: the answer that echoed the question
#
# *Symptom.* One server's prefill works with the kernel, another server's returns noise. No NaN, the
# numbers have the right size.
#
# *Clue.* The noise is familiar: the output *is* the array of queries. *Cause:* `distribution` =
# (i, j, k) has a range of its own for chunks, [i, j). The kernel that computes it is compiled only
# if `chunk_prefill_size` is given. If not, no kernel computes the range; and the output shares its
# memory with the queries, to save a buffer. Two servers, 5 sequences each; the first has 3 decodes:

# %%
for server, (i, j, k) in {
    "decodes first, the rest mixed": (3, 3, 5),
    "a step of prefills only": (0, 5, 5),
}.items():
    computed = set(range(i)) | set(range(j, k))  # decode kernel, mixed kernel
    missed = sorted(set(range(k)) - computed)
    print(f"{server:30} distribution {(i, j, k)}: not computed {missed or 'none'}")

# %% [markdown]
# Both are legal. vLLM sorts its batch and sends the first kind; SGLang keeps prefill and decode
# apart and sends (n, n, n) or (0, n, n). *Why the tests passed:* they were those of the first
# server. What rung 8 does without a chunk size: its mixed kernel begins where the decodes end.

# %%
show_source(cases.cases_of)

# %%
*arrays, batch = make_step(q_lens=(2, 3, 3))
batch.distribution[:] = 0, 3, 3
results = rung8(batch, arrays)
error, wrong_rows = error_and_missing(batch, arrays, results)
print(f"distribution {batch.distribution}: error {error:.1e}, wrong rows {wrong_rows}")
assert error < 8e-6 and wrong_rows == 0

# %% [markdown]
# **Takeaway.** Memory that was never written is not empty. Outputs of tests are filled with NaN
# first, and every legal shape of an argument is daily use for one of its callers.

# %% [markdown]
# ## 8. Case four: the cell that ran only once
#
# *Symptom.* A notebook cell works. Run it again: "Array has been deleted". *Cause:* the kernel
# updates the cache **in place**. Its memory is donated, and the caller's array is gone:

# %%
*tokens, cache = arrays
with jax.default_device(HOST):
    cache = jnp.array(cache)
    rpa.ragged_paged_attention(
        *tokens, cache, *metadata(batch), sm_scale=128**-0.5, backend="interpret", **BLOCKS
    )
print("deleted:", cache.is_deleted(), "- queries:", type(arrays[0]).__name__, "as before")
assert cache.is_deleted()

# %% [markdown]
# That is a feature: a copy of the cache in every step of every layer would cost more than
# attention. (One peer donates queries, keys and values as well.) The opposite bug is worse, because
# it is silent. A server wraps the layers in a `jit` of its own. If **that** one does not
# donate, the promise inside is void, and XLA copies every cache before it is touched. Ask the
# compiler, with the store of rung 3 in two layers:


# %%
def two_layers(caches, keys, values):
    """What a model does with its caches: each layer stores the new tokens in its own."""
    return [ragged.store_new_tokens(cache, keys, values, batch) for cache in caches]


# %%
caches = [jnp.array(arrays[3], device=HOST) for layer in range(2)]  # a TPU would pad them
both_bytes = sum(cache.nbytes for cache in caches)
for donated in ((), (0,)):
    step = jax.jit(two_layers, donate_argnums=donated)
    compiled = step.lower(caches, *tokens[1:]).compile()
    in_place = compiled.memory_analysis().alias_size_in_bytes
    print(f"donate_argnums={donated}: {in_place:,} of {both_bytes:,} bytes of cache in place")
    assert in_place == (both_bytes if donated else 0)

# %% [markdown]
# *The test.* Read the compiled program, as here. No output will ever show it, only the memory; and
# a cache of 10 GB does not fit twice on a v5e.
#
# **Takeaway.** Donation belongs to the outermost `jit`. Take the cache that a call returns, and
# forget the one that you passed.

# %% [markdown]
# ## 9. Case five: the context that was too long
#
# *Symptom.* At 8K tokens a model is as good as its paper says, at 256K it is not.
#
# Two suspects. One compares positions in 16 bits, which end at 32,767 (exercise 11.3). The other is
# the online softmax itself. Three numbers are carried from block to block: running maximum, sum,
# accumulator. To save registers they can be kept in bfloat16. Eight bits of precision:

# %%
print(jnp.bfloat16(255) + jnp.bfloat16(1), jnp.bfloat16(256) + jnp.bfloat16(1))
assert jnp.bfloat16(256) + jnp.bfloat16(1) == 256

# %% [markdown]
# A sum of 256 does not notice 1. With blocks of 512 keys of equal weight it stops at 256 x 512 =
# 131,072 tokens, and is half of what it should be at 262,144. Does that ever happen? Measure, with
# an online softmax that keeps its state in any dtype, against float64:

# %%
show_source(wrong_kernels.rounded)

# %%
LENGTHS = [2**n for n in range(10, 19)]  # 1,024 to 262,144 tokens: all measured, none extrapolated
RNG = np.random.default_rng(4)
RANDOM = RNG.standard_normal((2, LENGTHS[-1])).astype(np.float32)


def make_numbers(kind, n):
    """Scores and values f32[n]: an ordinary test, one that knows what it looks for, the worst."""
    scores = np.zeros(n, np.float32) if kind == "equal scores" else RANDOM[0, :n]
    rising = np.linspace(0.1, 1, n, dtype=np.float32)
    return scores, RANDOM[1, :n] if kind == "all random" else rising


# %%
def error(kind, n, state_dtype):
    """|online softmax - float64|, as a part of the largest value."""
    scores, values = make_numbers(kind, n)
    weights = np.exp(scores.astype(np.float64) - scores.max())
    truth = weights @ values.astype(np.float64) / weights.sum()
    given = wrong_kernels.rounded(scores, values[:, None], 512, state_dtype)[0]
    return abs(given - truth) / np.abs(values).max()


# %%
kinds = ["all random", "random scores, rising values", "equal scores"]
errors = {
    f"{jnp.dtype(dtype).name} state, {kind}": [error(kind, n, dtype) for n in LENGTHS]
    for dtype in (jnp.bfloat16, np.float32)
    for kind in kinds
}
for name, each in errors.items():
    print(f"{name:46}", "  ".join(f"{e:.0e}" for e in each[::2]))

# %%
rounding = [("rounding the output to bfloat16", 2**-9)]
pictures.error_by_length(LENGTHS, errors, rounding)

# %%
worst = {name: max(each) for name, each in errors.items()}
assert worst["bfloat16 state, equal scores"] > 0.3
assert worst["bfloat16 state, random scores, rising values"] > 0.1
assert worst["bfloat16 state, all random"] < 0.01
assert max(error for name, error in worst.items() if name.startswith("float32")) < 1e-4

# %% [markdown]
# Look at the first line. That is an ordinary test at 256K tokens, and it **passes**: values around
# zero average to nearly zero, and a wrong mean of them, too. The same state is off by a fifth as
# soon as the values have a direction, and by nearly half with equal scores; one leaves the noise of
# rounding behind from 32K tokens on, the other from 128K. The float32 state stays far below what
# rounding the output costs anyway, at every length. It takes registers and no HBM; rung 8 has it,
# at any length and for every dtype of the cache.
#
# *The test.* Values that rise along the sequence. Exercise 11.4 finds them.
#
# **Takeaway.** Data that averages out hides what was lost. A test needs an answer that depends on
# every token.

# %% [markdown]
# ## 10. What does an ordinary test not vary?
#
# Five cases, one pattern: what the test kept fixed is where the bug was. The list by which this
# project tests its kernels (`tests/test_traps.py` has a test by each number):
#
# | trap | what a test has to vary |
# |---|---|
# | 1 window loses K and V | q_len far beyond window and key block; the *cache* |
# | 2 sequences dropped, 3 wrong distribution | every legal (i, j, k), and illegal ones |
# | 4 idle slots hang | q_len 0 first, in the middle, everywhere; a time limit |
# | 5 positions in 16 bits, 6 state in bfloat16 | length; values with a direction |
# | 7 0 x NaN, 8 garbage in the page table | NaN and garbage in all that no sequence owns |
# | 9 window and mask | window smaller than a block; without causality |
# | 10 padding rows | rows that no sequence owns, filled with NaN |
# | 11 KV sharing | NaN as new K and V; the cache as bits |
# | 12 new tokens around a page end | ends one before, at, one after |
# | 13 VMEM, 14 SMEM | every chip; the longest table |
# | 15 groups that need padding | 5/1, 3/3, 9/3, 12/2 heads, sinks all different |
# | 16 a traced scale | the same call inside and outside of `jit` |
# | 17 blocks that do not divide | (60, 48, 30, 48) and pages of 16 |
# | 18 donation | the second call; the compiled program |
# | 19 shared pages | a common prefix that is read, one that is written |
# | 20 output dtype, 21 padding of new tokens | float32 out of bfloat16; head_dim 64, three heads |
#
# **Takeaway.** Random numbers test arithmetic. Bugs live in lengths, garbage, neighbours and time.

# %% [markdown]
# ## 11. Who builds the batch?
#
# A server, at every step, on the host, in a few NumPy arrays that it keeps from step to step:
#
# | ours | vLLM on TPU | SGLang on JAX |
# |---|---|---|
# | `kv_lens` | `seq_lens`: computed tokens + those of the step | `seq_lens` |
# | `cu_q_lens` | `query_start_loc`: a running sum | `cu_q_lens` |
# | `page_indices` | `block_tables`, a fixed row for each slot | `page_indices`, from token slots |
# | `distribution` | `request_distribution`, (d, d, n) | (n, n, n) decode, (0, n, n) prefill |
# | unused slots | `seq_lens` 0, `query_start_loc` repeats its last entry | `seq_lens` 0 |
# | the caches | one array per layer, donated | one buffer per layer, donated |
#
# One transfer brings them to the device, and then **the same arrays serve all layers**. That is why
# they are so small, and why a mistake in them is a mistake in every layer. In the way of vLLM, for
# two decodes and a chunk, in room for 6:

# %%
room, pages_per_seq = 6, 4
computed = np.array([20, 8, 24])  # tokens in the cache
scheduled = np.array([1, 1, 6])  # new ones in this step, decodes first
n = len(computed)

seq_lens = np.zeros(room, np.int32)
seq_lens[:n] = computed + scheduled
query_start_loc = np.zeros(room + 1, np.int32)
query_start_loc[1 : n + 1] = np.cumsum(scheduled)
query_start_loc[n + 1 :] = query_start_loc[n]
num_decodes = int((scheduled <= 1).sum())
request_distribution = np.array([num_decodes, num_decodes, n], np.int32)
print(seq_lens, query_start_loc, request_distribution, sep="\n")

# %%
*_, batch = make_step()
block_tables = np.zeros((room, pages_per_seq), np.int32)
block_tables[:n] = batch.page_indices.reshape(n, -1)
served = rpa.RaggedBatch(
    seq_lens, block_tables.reshape(-1), query_start_loc, request_distribution
)  # fmt: skip
served.validate(num_tokens=8, num_pages=12, page_size=8)
assert (served.kv_lens[:n] == batch.kv_lens).all()
assert (served.cu_q_lens[: n + 1] == batch.cu_q_lens).all()

# %% [markdown]
# Shapes must not change, or XLA compiles. The room for sequences is fixed; the number of tokens
# cannot be (a step may have 8 or 8,000), so it is rounded up to a **bucket**. The rows behind the
# last token are the padding rows of chapter 3. A thousand steps of a server with 64 slots, each a
# decode, and in one step of four a chunk of up to 2,048 tokens:

# %%
rng = np.random.default_rng(11)
chunks = np.where(rng.random(1000) < 0.25, rng.integers(1, 2049, 1000), 0)
tokens_of_step = rng.integers(32, 65, 1000) + chunks
buckets = np.maximum(16, 2 ** np.ceil(np.log2(tokens_of_step)).astype(int))
print(f"exact: {len(set(tokens_of_step.tolist()))} programs to compile, no padding")
print(f"buckets: {len(set(buckets.tolist()))} programs, "
      f"{buckets.sum() / tokens_of_step.sum() - 1:.0%} more rows")  # fmt: skip
assert len(set(buckets.tolist())) < 10

# %% [markdown]
# For the projections around it a padding row costs what a real one costs. For this kernel it costs
# a row of zeros: the walk of chapter 8 never comes there.
#
# **Takeaway.** Four small arrays, built once per step, read by every layer. Room for sequences,
# buckets for tokens, garbage allowed in what is left over.

# %% [markdown]
# ## 12. What does it cost to look?
#
# A wrong page number does not crash. So every batch should be looked at, if it costs nothing.
# 256 sequences with 256 pages each, on the machine that runs this notebook:

# %%
import os
import time

table = np.random.default_rng(0).permutation(256 * 256).reshape(256, 256)
big, _ = rpa.RaggedBatch.from_lengths([1] * 256, [4096] * 256, table)
times_ms = []
for _ in range(20):
    start = time.perf_counter()
    big.validate(num_tokens=256, num_pages=256 * 256, page_size=16)
    times_ms.append(1e3 * (time.perf_counter() - start))

# %%
check_ms = min(times_ms)
print(f"validate: {check_ms:.2f} ms on a host with {os.cpu_count()} cores")

# %%
step = decode_step(LLAMA3_8B, 256, 4096, kv_dtype="float8_e4m3fn")
for name in ("v5e", "v6e", "tpu7x"):
    step_ms = 1e3 * step.hbm_bytes / 8 / chips.chip(name).hbm_bytes_per_s
    print(f"{name:6} decode step on 8 cores, at least {step_ms:4.1f} ms (predicted): "
          f"the check is {check_ms / step_ms:.0%} of it")  # fmt: skip

# %% [markdown]
# Not nothing, but it runs on the host while the device computes the step before. So the public
# function checks NumPy metadata always. What is on the device already is left alone, since reading
# it back would stall the device; inside a `jit` there are no values to look at (`validate=`,
# chapter 3).
#
# **Takeaway.** Check on the host, before anything is written, in words; it is paid for with idle
# time. Exercise 11.7 is yours.

# %% [markdown]
# ## What is still slow
#
# Correct in every corner, and still with bytes and time to give away. The common prefix of section
# 2: 64 sequences read the same 3,072 tokens, each for itself. One layer, predicted:

# %%
layer_bytes = kv_token_bytes(get_kv_cache_shape(1, 16, 8, 128, jnp.bfloat16), jnp.bfloat16)
for name in ("v5e", "v6e", "tpu7x"):
    bandwidth = chips.chip(name).hbm_bytes_per_s
    now, once = (
        1e6 * (count * prefix + 64 * (4096 - prefix)) * layer_bytes / bandwidth for count in (64, 1)
    )
    print(f"{name:6} as it is {now:5.0f} us, the prefix read once {once:4.0f} us "
          f"({now / once:.1f} times faster)")  # fmt: skip
assert now > 3 * once

# %% [markdown]
# Nearly four times, for the workload that every chat server has: one system prompt for all. The
# kernel would have to compute the queries of all sequences against one block of keys, as a prefill
# does, and merge two softmax states at the end. That is an open problem here.
#
# Second, float8. Four values share 32 bits, and the K and V of *one* head are two. If a model is
# split over many chips, each has few heads:

# %%
for num_kv_heads in (8, 4, 2, 1):
    sizes = [
        kv_token_bytes(get_kv_cache_shape(1, 16, num_kv_heads, 128, dtype), dtype)
        for dtype in (jnp.bfloat16, jnp.float8_e4m3fn)
    ]
    print(f"{num_kv_heads} KV heads per chip: bfloat16 {sizes[0]:5,} bytes per token, "
          f"float8 {sizes[1]:5,}: {sizes[1] / sizes[0]:.0%}")  # fmt: skip
assert sizes[0] == sizes[1]

# %% [markdown]
# With one head per chip the float8 cache is as large as the bfloat16 one: half of it is padding,
# and the digits were given away for nothing.
#
# Third, float8 halves the bytes, and not the work. The cores widen it to bfloat16 and multiply as
# before, so a decode that waited for HBM may now wait for the machine's schedule. How much of the
# roofline is left then, on which chip, next to which peer: **chapter 12** puts every rung on one
# page, measures what can be measured on your machine, and leaves the open problems to you.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/11_production.ipynb).
#
# **Read more:**
#
# - [Efficient streaming language models with attention sinks](https://arxiv.org/abs/2309.17453),
#   Xiao et al. 2023.
# - [FP8 formats for deep learning](https://arxiv.org/abs/2209.05433), Micikevicius et al. 2022:
#   what the eight bits of a cache can say.
