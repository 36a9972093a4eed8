# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 9: The inner loop, exercises
#
# You name what a schedule is bound by, count what a strided load costs, reorder a kernel and have
# it compiled by the real TPU compiler, put four heads into one product, and read
# instructions that the chip executes. Read the lesson first: `notebooks/09_inner_loop.ipynb`.
#
# Every exercise is a function to fill in and a check to run. A check starts with a case that you
# can do by hand, stops at the first difference, and says what it recognises.
#
# **Time:** about 80 minutes; 9.1 and 9.2 are short. The check of 9.3 compiles your kernel for a
# v5e and takes some seconds; where no compiler shows its schedule, it says so and takes what was
# recorded.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import rpa
from rpa.figures import optimise as pictures
from rpa.figures import show_source
from rpa.lab.chip import step_listing
from rpa.lab.schedule import inner_loop
from rpa.lab.schedule.inner_loop import scores, softmax, weighted_values
from rpa.lab.schedule.recorded import recorded, recorded_step

# %% [markdown]
# ## Exercise 9.1: Name the bound
#
# A schedule gives you three numbers a unit can be judged by: how many `bundles` there are (one is
# issued per cycle), how many slots of each unit they use, `slots[unit]`, and how many slots of it a
# bundle has, `capacity[unit]`. The lab adds the cycles that HBM needs for the bytes of the same
# work, `hbm_cycles`; copies run during the computation.
#
# Write `name_the_bound(bundles, slots, capacity, hbm_cycles)`. It returns two things:
#
# - what binds: `"HBM"` if it needs more cycles than there are bundles; else the unit that uses the
#   largest part of its slots, if that is 80 % or more; else `"latency"`;
# - how many cycles the work takes, if everything overlaps that can.
#
# `"fill"` and `"spill"` are in the table, too, but are no units: they are loads and stores, and
# counted there already.
#
# By hand: 10 bundles, 9 of 10 MATMUL slots, 12 of 40 VALU slots, HBM needs 4 cycles. MATMUL uses
# 90 %: `("MATMUL", 10)`.
#
# **Teaches:** the bound is a part of what there is, not the largest count; and if no unit is full,
# all of them wait.

# %% [markdown] tags=["hint"]
# Two questions, one after the other: is HBM slower than the bundles? If not, which unit is fullest,
# and is it full enough?

# %% [markdown] tags=["hint"]
# `slots[unit] / (capacity[unit] * bundles)` is the part of its slots that a unit uses. `max(share,
# key=share.get)` is the key of the largest value of a dictionary.

# %% [markdown] tags=["hint"]
# ```python
# if hbm_cycles > bundles:
#     return "HBM", hbm_cycles
# share = {unit: ... for unit, n in slots.items() if unit not in ("fill", "spill")}
# unit = max(share, key=share.get)
# return (unit if ... else "latency"), bundles
# ```


# %% tags=["exercise"]
def name_the_bound(bundles, slots, capacity, hbm_cycles):
    """What binds ("HBM", a unit or "latency"), and the cycles that the work takes."""
    ### BEGIN SOLUTION
    if hbm_cycles > bundles:
        return "HBM", hbm_cycles
    units = [unit for unit in slots if unit not in ("fill", "spill")]
    share = {unit: slots[unit] / (capacity[unit] * bundles) for unit in units}
    unit = max(share, key=share.get)
    return (unit if share[unit] >= 0.8 else "latency"), bundles
    ### END SOLUTION


# %% tags=["check"]
rpa.check("9.1", name_the_bound)

# %% [markdown]
# Now ask your function about the inner loop of a decode, as the compiler scheduled it: 512 tokens
# of Llama 3 8B, on a v5e that needs 3,836 cycles of HBM for them, and on a TPU7x that needs 1,247.

# %%
for chip, hbm_cycles in {"v5e": 3836, "tpu7x": 1247}.items():
    for step in ("as written", "odd stride", "four heads a product"):
        one = recorded_step(chip, step)
        bound, cycles = name_the_bound(one.bundles, one.slots, one.capacity, hbm_cycles)
        print(f"{chip:6} {step:22} {one.bundles:6,} bundles: {cycles:6,} cycles, {bound}")

# %% [markdown] tags=["explanation"]
# HBM first, because it runs at the same time as the bundles: the longer of the two is the time, and
# if that is HBM, no unit matters, however full. Then parts, not counts: 28 VALU slots of 40 are 70
# %, 9 MATMUL slots of 10 are 90 %. And under 80 % it is no unit: the bundles are there, their slots
# are empty, and what fills the time is one result waiting for another. A unit that is full wants
# less work; a loop bound by latency wants *more*, independent, at the same time.


# %% tags=["wrong"] refused="the unit with the most slots is taken"
def name_the_bound(bundles, slots, capacity, hbm_cycles):
    if hbm_cycles > bundles:
        return "HBM", hbm_cycles
    unit = max((u for u in slots if u not in ("fill", "spill")), key=slots.get)
    full = slots[unit] / (capacity[unit] * bundles) >= 0.8
    return unit if full else "latency", bundles


# %% tags=["wrong"] refused="the fullest unit is named however idle it is"
def name_the_bound(bundles, slots, capacity, hbm_cycles):
    if hbm_cycles > bundles:
        return "HBM", hbm_cycles
    units = [unit for unit in slots if unit not in ("fill", "spill")]
    return max(units, key=lambda unit: slots[unit] / capacity[unit]), bundles


# %% tags=["wrong"] refused="HBM and bundles are added"
def name_the_bound(bundles, slots, capacity, hbm_cycles):
    units = [unit for unit in slots if unit not in ("fill", "spill")]
    share = {unit: slots[unit] / (capacity[unit] * bundles) for unit in units}
    unit = max(share, key=share.get)
    bound = "HBM" if hbm_cycles > bundles else unit if share[unit] >= 0.8 else "latency"
    return bound, bundles + hbm_cycles


# %% tags=["wrong"] refused="a full unit comes before HBM"
def name_the_bound(bundles, slots, capacity, hbm_cycles):
    units = [unit for unit in slots if unit not in ("fill", "spill")]
    share = {unit: slots[unit] / (capacity[unit] * bundles) for unit in units}
    unit = max(share, key=share.get)
    if share[unit] >= 0.8:
        return unit, max(bundles, hbm_cycles)
    return "HBM" if hbm_cycles > bundles else "latency", max(bundles, hbm_cycles)


# %% tags=["wrong"] refused="the first unit with 80 % or more is named"
def name_the_bound(bundles, slots, capacity, hbm_cycles):
    if hbm_cycles > bundles:
        return "HBM", hbm_cycles
    for unit in slots:
        if unit not in ("fill", "spill") and slots[unit] / (capacity[unit] * bundles) >= 0.8:
            return unit, bundles
    return "latency", bundles


# %% [markdown]
# ## Exercise 9.2: How many loads fill a register?
#
# A register has 8 rows. In the KV buffer the rows that belong in it, one head of 8 tokens, do not
# lie side by side but `stride` rows apart. VMEM lies in banks, row `r` in bank `r % num_banks`, and
# a load takes at most one row from each bank.
#
# Write `loads_per_register(stride, num_banks, rows)`: how many loads bring rows 0, `stride`,
# `2 * stride`, ... (`rows` of them) into a register?
#
# By hand: `stride = 8`, 32 banks, 8 rows. The rows are 0, 8, 16, ..., 56; their banks 0, 8, 16, 24,
# 0, 8, 16, 24. Two in each bank: 2 loads.
#
# **Teaches:** why the KV buffer of rung 8 has one row per token more than it needs.

# %%
pictures.banks([1, 8, 9, 16])

# %% [markdown] tags=["hint"]
# Write down the bank of each row. The fullest bank decides.

# %% [markdown] tags=["hint"]
# `np.bincount(banks)` counts how often each number occurs, `.max()` is the largest count;
# `int(...)` makes a Python integer of it.

# %% [markdown] tags=["hint"]
# ```python
# banks = <row> * np.arange(rows) % <how many>
# return int(np.bincount(banks).max())
# ```


# %% tags=["exercise"]
def loads_per_register(stride, num_banks, rows):
    """Loads that fill a register with rows that lie `stride` apart."""
    ### BEGIN SOLUTION
    banks = stride * np.arange(rows) % num_banks
    return int(np.bincount(banks).max())
    ### END SOLUTION


# %% tags=["check"]
rpa.check("9.2", loads_per_register)

# %% [markdown]
# Is that what VMEM is like? It is not published. But the compiler knows, and its schedules say how
# many loads it takes for a register. Compare, with 32 banks:

# %%
for chip, by_stride in recorded("strides").items():
    compiler = {int(stride): loads for stride, (loads, _) in by_stride.items()}
    mine = {stride: loads_per_register(stride, 32, 8) for stride in compiler}
    print(f"{chip:6} loads by stride: {dict(sorted(compiler.items()))}, "
          f"as predicted: {mine == compiler}")  # fmt: skip

# %% [markdown] tags=["explanation"]
# The rows go round the banks in steps of `stride`. An odd step visits every bank before it comes
# back, whatever power of two their number is, so any odd distance is safe on any chip; an even one
# may be, as 12 is with 32 banks. That is why rung 8 takes `words | 1` rows per token: 8 KV heads in
# bfloat16 need 8, and get 9. The unused row costs an eighth more VMEM and saves half of
# all loads. (On v6e and TPU7x a distance of 4 or 12 takes one load a register, too, but half as
# many of them fit a cycle; odd ones are safe there as well.)


# %% tags=["wrong"] refused="an even distance takes two loads"
def loads_per_register(stride, num_banks, rows):
    return 1 if stride % 2 else 2


# %% tags=["wrong"] refused="the banks that are used are counted"
def loads_per_register(stride, num_banks, rows):
    return len(np.unique(stride * np.arange(rows) % num_banks))


# %% tags=["wrong"] refused="the common divisor of distance and banks is taken"
def loads_per_register(stride, num_banks, rows):
    return int(np.gcd(stride, num_banks))


# %% tags=["wrong"] refused="all rows but the first in a bank are counted"
def loads_per_register(stride, num_banks, rows):
    banks = (stride * np.arange(rows) % num_banks).tolist()
    return sum(bank in banks[:i] for i, bank in enumerate(banks))


# %% [markdown]
# ## Exercise 9.3: Do not make the matrix unit wait
#
# Here is the inner loop of a decode as one would write it: eight heads, one after the other. It is
# right, and the real compiler makes 2,426 bundles of it on a v5e.

# %%
show_source(inner_loop.in_turn)

# %% [markdown]
# P V of a head needs its softmax, which takes some hundred cycles however few the rows are. The MXU
# takes its work in the order in which it is written. So it waits.
#
# Write `attend(q_ref, kv_ref, out_ref, load)`, the same loop in another order: **issue Q K^T of the
# next head before P V of this one**, so that the MXU has work while the vector unit computes the
# softmax. One head ahead is enough; more is allowed.
#
# - `q_ref` bf16[1, heads, rows, lanes], `out_ref` f32[1, heads, rows, lanes];
# - `load(kv_ref.at[0], head)` gives K and V of a head, each bf16[tokens, lanes];
# - `scores(q, k)`, `softmax(s)` -> (weights, their sums), `weighted_values(weights, v)` are those
#   of the loop above.
#
# The check compares the numbers in the interpreter. Then it compiles your kernel for a v5e and
# counts what it executes, a loop as often as it runs: at most 1,500 bundles.
#
# **Teaches:** the same instructions in another order, in little more than half of the time. And how
# an optimisation is judged: by the schedule, not by faith.

# %% [markdown] tags=["hint"]
# Let the loop run one head behind itself: in turn `head` it computes the scores of `head`, then
# finishes `head - 1`, then the softmax of `head`. What is left to do when the loop ends?

# %% [markdown] tags=["hint"]
# The loop is unrolled when it is traced, so an ordinary Python variable (or list) can hold what is
# still to be finished: the head's number, its weights, their sum, its values. All four belong
# together.

# %% [markdown] tags=["hint"]
# ```python
# waiting = None
# for head in range(q_ref.shape[1]):
#     k, v = load(kv_ref.at[0], head)
#     s = scores(q_ref[0, head], k)
#     if waiting is not None:
#         <finish it: place, weights, total, values = waiting>
#     waiting = (head, *softmax(s), v)
# <and once more>
# ```


# %% tags=["exercise"]
def attend(q_ref, kv_ref, out_ref, load):
    """All heads of one KV block, Q K^T one head ahead of P V."""
    ### BEGIN SOLUTION
    waiting = []
    for head in range(q_ref.shape[1] + 1):
        if head < q_ref.shape[1]:
            k, v = load(kv_ref.at[0], head)
            s = scores(q_ref[0, head], k)
        if waiting:
            place, weights, total, values = waiting.pop()
            out_ref[0, place] = weighted_values(weights, values) / total
        if head < q_ref.shape[1]:
            waiting.append((head, *softmax(s), v))
    ### END SOLUTION


# %% tags=["check"]
rpa.check("9.3", attend)

# %% [markdown]
# Does it help to run further ahead? This is what the compiler said of up to seven heads ahead
# (recorded; at seven, all scores come before the first P V):

# %%
for num_ahead, bundles in enumerate(recorded("orders")):
    print(f"{num_ahead} ahead: {bundles:5,} bundles on a v5e  {'#' * (bundles // 60)}")

# %% [markdown] tags=["explanation"]
# Nothing was added and nothing taken away; the products are the same as before. The compiler
# does not find this order by itself, because the queue of the MXU is something that it may not
# reorder: products are taken in the order of the program. One ahead hides most of the softmax
# behind the next product; the second one hides most of what is left; after that the gain is a few
# per cent, and with more rows per head (a prefill) every head that waits takes registers, and
# spills eat the gain: rung 8 runs two ahead there, and seven in a decode (`tricks.MIXED_QK_AHEAD`,
# `tricks.DECODE_QK_AHEAD`; three ahead were 5 % slower in the mixed kernel of a TPU7x when they
# were tried, see `docs/ablations.md`).


# %% tags=["wrong"] refused="in an order in which the matrix unit waits for every softmax"
def attend(q_ref, kv_ref, out_ref, load):
    for head in range(q_ref.shape[1]):
        k, v = load(kv_ref.at[0], head)
        weights, total = softmax(scores(q_ref[0, head], k))
        out_ref[0, head] = weighted_values(weights, v) / total


# %% tags=["wrong"] refused="the last head is never finished"
def attend(q_ref, kv_ref, out_ref, load):
    waiting = None
    for head in range(q_ref.shape[1]):
        k, v = load(kv_ref.at[0], head)
        s = scores(q_ref[0, head], k)
        if waiting is not None:
            place, weights, total, values = waiting
            out_ref[0, place] = weighted_values(weights, values) / total
        waiting = (head, *softmax(s), v)


# %% tags=["wrong"] refused="weights of one head are multiplied by the values of the next one"
def attend(q_ref, kv_ref, out_ref, load):
    waiting = None
    for head in range(q_ref.shape[1]):
        k, v = load(kv_ref.at[0], head)
        s = scores(q_ref[0, head], k)
        if waiting is not None:
            place, weights, total = waiting
            out_ref[0, place] = weighted_values(weights, v) / total
        waiting = (head, *softmax(s))
    place, weights, total = waiting
    out_ref[0, place] = weighted_values(weights, v) / total


# %% tags=["wrong"] refused="a head is divided by the sum of the next one's weights"
def attend(q_ref, kv_ref, out_ref, load):
    waiting, last = None, q_ref.shape[1] - 1
    for head in range(q_ref.shape[1]):
        k, v = load(kv_ref.at[0], head)
        weights, total = softmax(scores(q_ref[0, head], k))
        if waiting is not None:
            out_ref[0, head - 1] = weighted_values(*waiting) / total
        waiting = (weights, v)
    out_ref[0, last] = weighted_values(*waiting) / total


# %% tags=["wrong"] refused="bundles on a v5e, and 1,500 are enough"
def attend(q_ref, kv_ref, out_ref, load):
    def one_head(head, _):
        k, v = load(kv_ref.at[0], head)
        weights, total = softmax(scores(q_ref[0, head], k))
        out_ref[0, head] = weighted_values(weights, v) / total

    jax.lax.fori_loop(0, q_ref.shape[1], one_head, None)


# %% [markdown]
# ## Exercise 9.4: Several heads in one product
#
# A decode has 4 rows of queries for each KV head: too few to keep the MXU busy. Put all heads into
# **one** product Q K^T and **one** product P V.
#
# Write `attend_heads(q, k, v)`:
#
# - `q` f32[heads, rows, lanes], `k`, `v` f32[heads, tokens, lanes]; queries are scaled already;
# - it returns f32[heads, rows, lanes], softmax in powers of two (`jnp.exp2`), as in rung 8;
# - it uses two plain matrix products. The check counts; a batched one is as many as it has heads.
#
# The queries stand on the diagonal of a matrix [heads * rows, heads * lanes] that is zero
# elsewhere, as in the picture of the lesson, and `inner_loop.block_diagonal(list_of_tiles)` makes
# it. Keys lie side by side, values too.
#
# By hand: two heads of one row and two lanes, q0 = (1, 0), q1 = (0, 2). The matrix is
# `[[1, 0, 0, 0], [0, 0, 0, 2]]`; a token whose keys are (3, 4) and (5, 6) has them side by side as
# (3, 4, 5, 6), and gets the scores 3 and 12.
#
# **Teaches:** zeros that cost nothing, because the MXU is busy with something else; and which part
# of a result is meant.

# %%
pictures.block_diagonal(4)

# %% [markdown] tags=["hint"]
# Row `h * rows + r` belongs to row r of head h. Because of the zeros it sees only the keys of its
# own head. P V then gives it the values of *all* heads side by side: which of those columns does it
# want?

# %% [markdown] tags=["hint"]
# `jnp.concatenate(list(k), axis=1)` lays the keys side by side, [tokens, heads * lanes]. With
# `out.reshape(heads, rows, heads, lanes)`, the parts that are meant are `[h, :, h]`.

# %% [markdown] tags=["hint"]
# ```python
# wide_q = inner_loop.block_diagonal(list(q))
# s = wide_q @ <keys side by side>.T
# weights = jnp.exp2(s - <largest of each row>)
# out = weights @ <values side by side> / <sum of each row>
# blocks = out.reshape(...)
# return jnp.stack([blocks[h, :, h] for h in range(heads)])
# ```


# %% tags=["exercise"]
def attend_heads(q, k, v):
    """Attention of all heads by two matrix products, f32[heads, rows, lanes]."""
    heads, rows, lanes = q.shape
    ### BEGIN SOLUTION
    wide_q = inner_loop.block_diagonal(list(q))
    s = wide_q @ jnp.concatenate(list(k), axis=1).T
    weights = jnp.exp2(s - jnp.max(s, axis=1, keepdims=True))
    total = jnp.sum(weights, axis=1, keepdims=True)
    out = weights @ jnp.concatenate(list(v), axis=1) / total
    blocks = out.reshape(heads, rows, heads, lanes)
    return jnp.stack([blocks[h, :, h] for h in range(heads)])
    ### END SOLUTION


# %% tags=["check"]
rpa.check("9.4", attend_heads)

# %% [markdown]
# How many heads should share a product? When it was tried in rung 8 on a TPU7x, two and all eight
# both took about an eighth more bundles than four (`docs/ablations.md`). And in the small kernel of
# exercise 9.3:

# %%
for step in ("two heads ahead", "four heads a product"):
    bundles = {chip: recorded_step(chip, step).bundles for chip in ("v5e", "v6e", "tpu7x")}
    print(f"{step:22} {bundles}")

# %% [markdown] tags=["explanation"]
# Written as here, all keys and all values are weights (rung 8 turns some keys round, section 8 of
# the lesson): that is MATPUSH, and it does not become more. The rows that go through them are few,
# so zeros among them cost no time. What is won is the number of chains: two
# softmaxes in place of eight, each with 16 rows, that is two full registers a column block in place
# of one half-empty one. Eight heads in one product are too many: one single chain, with nothing
# that could overlap it. Off the diagonal the second product computes weights of one head times
# values of another. They are never read, but they have to be finite: 0 times a stale NaN of
# another head would be NaN.


# %% tags=["wrong"] refused="every row takes the values of head 0"
def attend_heads(q, k, v):
    heads, rows, lanes = q.shape
    s = inner_loop.block_diagonal(list(q)) @ jnp.concatenate(list(k), axis=1).T
    weights = jnp.exp2(s - jnp.max(s, axis=1, keepdims=True))
    out = weights @ jnp.concatenate(list(v), axis=1) / jnp.sum(weights, axis=1, keepdims=True)
    return out[:, :lanes].reshape(heads, rows, lanes)


# %% tags=["wrong"] refused="the queries stand side by side without zeros between them"
def attend_heads(q, k, v):
    heads, rows, lanes = q.shape
    wide_q = jnp.tile(q.reshape(heads * rows, lanes), (1, heads))
    s = wide_q @ jnp.concatenate(list(k), axis=1).T
    weights = jnp.exp2(s - jnp.max(s, axis=1, keepdims=True))
    out = weights @ jnp.concatenate(list(v), axis=1) / jnp.sum(weights, axis=1, keepdims=True)
    blocks = out.reshape(heads, rows, heads, lanes)
    return jnp.stack([blocks[h, :, h] for h in range(heads)])


# %% tags=["wrong"] refused="the keys stand below each other (axis 0)"
def attend_heads(q, k, v):
    heads, rows, lanes = q.shape
    s = q.reshape(heads * rows, lanes) @ k.reshape(-1, lanes).T
    weights = jnp.exp2(s - jnp.max(s, axis=1, keepdims=True))
    out = weights @ v.reshape(-1, lanes) / jnp.sum(weights, axis=1, keepdims=True)
    return out.reshape(heads, rows, lanes)


# %% tags=["wrong"] refused="use a batched product"
def attend_heads(q, k, v):
    s = jnp.einsum("hrd,htd->hrt", q, k)
    weights = jnp.exp2(s - jnp.max(s, axis=2, keepdims=True))
    out = jnp.einsum("hrt,htd->hrd", weights, v)
    return out / jnp.sum(weights, axis=2, keepdims=True)


# %% tags=["wrong"] refused="expected 2 for all heads together"
def attend_heads(q, k, v):
    out = []
    for head in range(len(q)):
        s = q[head] @ k[head].T
        weights = jnp.exp2(s - jnp.max(s, axis=1, keepdims=True))
        out.append(weights @ v[head] / jnp.sum(weights, axis=1, keepdims=True))
    return jnp.stack(out)


# %% tags=["wrong"] refused="one largest score is subtracted for all rows"
def attend_heads(q, k, v):
    heads, rows, lanes = q.shape
    s = inner_loop.block_diagonal(list(q)) @ jnp.concatenate(list(k), axis=1).T
    weights = jnp.exp2(s - jnp.max(s))
    out = weights @ jnp.concatenate(list(v), axis=1) / jnp.sum(weights, axis=1, keepdims=True)
    blocks = out.reshape(heads, rows, heads, lanes)
    return jnp.stack([blocks[h, :, h] for h in range(heads)])


# %% [markdown]
# ## Exercise 9.5: Predict a register
#
# A few instructions, as the compiler writes them (section 11 of the lesson):

# %%
LISTING = [
    "%one = llo.constant {value = 1 : i32} : i32",
    "%two = llo.constant {value = 2 : i32} : i32",
    '%place = "llo.saddr.vmem"(%x, %one) : (i32, i32) -> i32',
    "%a = llo.vector_load_slane_stride %place {sublane_count = 8 : i64, sublane_stride = 3 : i64} "
    ": i32 -> vector<8x128xf32>",
    "%b = llo.vrot.slane %a, %two : vector<8x128xf32>, i32 -> vector<8x128xf32>",
    "%c = llo.vsub.f32 %a, %b : vector<8x128xf32>",
    "llo.vector_store %c into %out : vector<8x128xf32> into i32",
]

# %% [markdown]
# `saddr.vmem` moves an address by whole rows. `vrot.slane %a, n` rotates **towards sublane 0**:
# what was in sublane s is then in sublane s - n, and what falls off at 0 comes back at 7.
#
# Write `predict(rows)`: `rows` f32[n] is what the rows of `%x` hold (the same number in all lanes);
# return f32[8], the sublanes of `%c`.
#
# By hand: row r holds r. `%a` is 1, 4, 7, 10, 13, 16, 19, 22; `%b` is 7, 10, 13, 16, 19, 22, 1, 4;
# `%c` is -6 six times, then 18, 18.
#
# **Teaches:** a listing is read line by line, and each line is an array operation on 8 sublanes.

# %% [markdown] tags=["hint"]
# One line of NumPy per instruction. Which rows are in `%a`?

# %% [markdown] tags=["hint"]
# `rows[first::stride][:8]` takes eight rows. `np.roll(a, n)` moves an element from place s to place
# s + n.

# %% [markdown] tags=["hint"]
# ```python
# a = rows[1::...][:8]
# return a - np.roll(a, ...)
# ```


# %% tags=["exercise"]
def predict(rows):
    """The sublanes of %c, f32[8], when row r of %x holds rows[r]."""
    ### BEGIN SOLUTION
    a = rows[1::3][:8]
    return a - np.roll(a, -2)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("9.5", predict)

# %% [markdown]
# Ask the machine. Change the listing and predict again: a stride of 2, a rotation by 5.

# %%
numbers = np.arange(24.0, dtype=np.float32)
_, steps = step_listing(LISTING, numbers.repeat(128).reshape(24, 128))
print(*steps, sep="\n")

# %% [markdown] tags=["explanation"]
# `%a` has the rows 1, 4, ..., 22: the address says where the first one is, the stride how far on
# the next one. Rotating towards sublane 0 is `np.roll` by a negative number. Rotations by 4, 2 and
# 1 with an addition each are how a sum over the 8 sublanes is made: three rotations, not eight
# loads.


# %% tags=["wrong"] refused="rotated away from sublane 0"
# instead of
#     return a - np.roll(a, -2)
# write
#     return a - np.roll(a, 2)


# %% tags=["wrong"] refused="the first row is row 0"
# instead of
#     a = rows[1::3][:8]
# write
#     a = rows[0::3][:8]


# %% tags=["wrong"] refused="eight rows that follow each other"
# instead of
#     a = rows[1::3][:8]
# write
#     a = rows[1:9]


# %% tags=["wrong"] refused="what is rotated is lost at the end"
def predict(rows):
    a = rows[1::3][:8]
    return a - np.concatenate([a[2:], np.zeros(2, a.dtype)])


# %% [markdown]
# ## Exercise 9.6: Find the wrong stride
#
# A kernel loads the keys of one head: `words` rows per token, one of them for each head, and 8
# tokens to a register. The answer is wrong. You fill the buffer with numbers that say where they
# are from: row `token * words + head` holds `10 * token + head` (there are at most 10 heads). Then
# you look at the register.
#
# Write `find_stride(found, words)`: `found` f32[8] are the sublanes of the loaded register. Return
# the row of sublane 0, and the stride of the load, in rows.
#
# By hand: `words` = 4, and head 1 should be 1, 11, 21, ... You see 1, 10, 13, 22, ... 1 is row 1;
# 10 is token 1, head 0, that is row 4; 13 is row 7. `(1, 3)`: the stride is 3, and should be 4.
#
# **Teaches:** numbers that name their place turn a wrong result into a wrong line.

# %% [markdown] tags=["hint"]
# First turn each number back into its row.

# %% [markdown] tags=["hint"]
# The token is `found // 10`, the head `found % 10`; the row is a number of rows, not of tokens.

# %% [markdown] tags=["hint"]
# ```python
# rows = (found // 10) * ... + found % 10
# return int(rows[0]), ...
# ```


# %% tags=["exercise"]
def find_stride(found, words):
    """(row of sublane 0, rows from one sublane to the next) of a load, from what it found."""
    ### BEGIN SOLUTION
    rows = (found // 10) * words + found % 10
    return int(rows[0]), int(rows[1] - rows[0])
    ### END SOLUTION


# %% tags=["check"]
rpa.check("9.6", find_stride)

# %% [markdown] tags=["explanation"]
# The check executed loads with these strides on the lab's machine and gave you what they found. So
# do the tests of rung 8: of eleven faults put into its layout code (another word row, neighbours
# instead of every stride-th row, halves exchanged ...) each is wrong here, and each passes in the
# interpreter (`tests/test_lab_chip_full.py`).


# %% tags=["wrong"] refused="differences of the numbers"
# instead of
#     return int(rows[0]), int(rows[1] - rows[0])
# write
#     return int(rows[0]), int(found[1] - found[0])


# %% tags=["wrong"] refused="counted in tokens"
# instead of
#     rows = (found // 10) * words + found % 10
# write
#     rows = found // 10


# %% tags=["wrong"] refused="ten rows per token"
# instead of
#     rows = (found // 10) * words + found % 10
# write
#     rows = found
