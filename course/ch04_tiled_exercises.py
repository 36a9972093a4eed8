# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 4: Tiled attention, exercises
#
# You write your first Pallas kernel, the step of the online softmax, and then flash attention
# itself; and the two pieces of bookkeeping that make it quick: which blocks of keys to skip, and
# how the heads that share keys become rows of one matrix. Read the lesson first:
# `notebooks/04_tiled.ipynb`.
#
# Every exercise is a function to fill in and a check to run. Without a TPU kernels run in the TPU
# interpreter, where memory that was never written holds NaN: what you forget, you see.
#
# **Time:** about two hours; 4.1, 4.5 and 4.6 are short, 4.4 is the chapter in one function, and 4.7
# the first whole kernel of your own.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import rpa
from rpa.check.chapters.launchers import run_flash
from rpa.figures import exercises as pictures
from rpa.figures import show_source
from rpa.interpreter import choose_interpret
from rpa.tiled import MASK_VALUE, dot, empty_state, finish, read_state, write_state, zero_tail
from rpa.yours import earlier

# %% [markdown]
# ## Exercise 4.1: What a block takes in VMEM
#
# VMEM holds arrays in **tiles**: 8 rows of 128 lanes of 32 bits. Narrower types pack more rows into
# the same 4,096 bytes: 16 rows of bfloat16, 32 of float8. The last two dimensions of an array are
# cut into tiles, each filled up to a whole number of them; dimensions before these are only
# counted.
#
# Write `vmem_bytes(shape, item_bytes)`: the bytes that an array takes, padding included.
# `item_bytes` is 4, 2 or 1, and `shape` has two dimensions or more.
#
# By hand: (5, 128) in bfloat16. 5 rows fill up to 16, 128 lanes are whole: 16 x 128 x 2 = 4,096
# bytes, one tile.
#
# **Teaches:** the last two dimensions decide how much of VMEM, and of every instruction, is
# padding.

# %%
pictures.strips(
    [(f"row {r}", "_ 0 1 2 ... 126 127 |") for r in range(5)] + [("rows 5 to 15", "_ - - - - - -")],
    "A bfloat16 array of five rows and 128 lanes in one tile of 16 rows: rows 5 to 15 are padding.",
    legend={"": "5 rows of 128 lanes", "-": "padding up to 16 rows"},
)

# %% [markdown] tags=["hint"]
# Pad the last dimension to whole lanes and the one before it to whole rows of a tile, each by
# itself. Then multiply everything.

# %% [markdown] tags=["hint"]
# `*untiled, rows, columns = shape` takes a shape apart. A tile has `8 * (4 // item_bytes)` rows.
# `-(-a // b)` divides and rounds up. `np.prod([])` is 1.

# %% [markdown] tags=["hint"]
# ```python
# *untiled, rows, columns = shape
# tile_rows = 8 * (4 // item_bytes)
# rows = -(-rows // tile_rows) * tile_rows
# columns = ...
# return int(np.prod(untiled)) * ...
# ```


# %% tags=["exercise"]
def vmem_bytes(shape, item_bytes):
    """Bytes of an array of this shape in VMEM, where its last two dimensions are tiled."""
    ### BEGIN SOLUTION
    *untiled, rows, columns = shape
    tile_rows = 8 * (4 // item_bytes)
    rows = -(-rows // tile_rows) * tile_rows
    columns = -(-columns // 128) * 128
    return int(np.prod(untiled)) * rows * columns * item_bytes
    ### END SOLUTION


# %% tags=["check"]
rpa.check("4.1", vmem_bytes)

# %% [markdown]
# Ask it about the cache: one page of 16 tokens, K and V of 8 heads of 128, bfloat16, with the
# tokens in the last dimension but one, and with the heads there.

# %%
print("heads x tokens x lanes:", vmem_bytes((16, 16, 128), 2), "bytes")
print("one token, its heads as rows:", vmem_bytes((16, 128), 2), "bytes")
print("one token of 3 KV heads of 64:", vmem_bytes((6, 64), 2), "bytes for", 6 * 64 * 2)

# %% [markdown] tags=["explanation"]
# Each of the two dimensions is padded by itself, because a tile is never shared by two arrays or by
# two rows of tiles. Narrow types pack *rows*, not lanes: a 32-bit word holds two neighbouring rows
# of bfloat16. That is why a decode with its single query row uses one sublane of eight, or of
# sixteen, and why attention kernels stack query heads into rows (exercise 4.6). For very short
# arrays the compiler may choose smaller tiles, such as (1, 128); the rule here is the one to plan
# with.


# %% tags=["wrong"] refused="nothing is padded"
def vmem_bytes(shape, item_bytes):
    return int(np.prod(shape)) * item_bytes


# %% tags=["wrong"] refused="a tile has 8 rows for every dtype"
def vmem_bytes(shape, item_bytes):
    *untiled, rows, columns = shape
    rows, columns = (rows + 7) // 8 * 8, (columns + 127) // 128 * 128
    return int(np.prod(untiled)) * rows * columns * item_bytes


# %% tags=["wrong"] refused="the number of rows of a tile shrinks"
def vmem_bytes(shape, item_bytes):
    tile_rows = 8 * item_bytes // 4
    rows, columns = -(-shape[-2] // tile_rows) * tile_rows, -(-shape[-1] // 128) * 128
    return int(np.prod(shape[:-2])) * rows * columns * item_bytes


# %% tags=["wrong"] refused="the array counts as one long row"
def vmem_bytes(shape, item_bytes):
    return -(-int(np.prod(shape)) * item_bytes // 4096) * 4096


# %% [markdown]
# ## Exercise 4.2: A first kernel
#
# Write `row_sums(x, block_rows, block_columns)`: the sum of each row, f32[rows, 1], by a kernel
# that sees one block of x at a time. The blocks divide x. The grid walks over rows of blocks (i)
# and, inside, over columns of blocks (j); the output block of row i stays in VMEM while j runs, so
# each step adds its part to it.
#
# By hand: x has 8 rows of 256, in blocks of 8 x 128. Step (0, 0) stores the sums of the left block,
# step (0, 1) adds those of the right one. *What does the output block hold before the first step?*
# It is undefined; in the interpreter it is NaN.
#
# **Teaches:** grid, `BlockSpec`, `program_id`, and an accumulator that lives over grid steps: the
# skeleton of flash attention.

# %%
pictures.strips(
    [("x, 8 rows", "*0,0 *0,0 *0,0 *0,0 | #0,1 #0,1 #0,1 #0,1"), ("out, 8 rows", "_ _ _ *+ #+")],
    "x is cut into two blocks of 8 rows and 128 columns. Grid step (0, 0) adds the left block's "
    "row sums into the output block, step (0, 1) those of the right one, into the same block.",
    arrows=[((0, 1), (1, 3)), ((0, 6), (1, 4))],
    legend={"*": "step (0, 0): j = 0 stores", "#": "step (0, 1): adds to it"},
)

# %% [markdown] tags=["hint"]
# The kernel has two parts: in the first column of blocks it writes zeros into the output block; in
# every step it adds the row sums of the block that it sees.

# %% [markdown] tags=["hint"]
# `pl.program_id(1)` is j. `@pl.when(condition)` runs the function below it only where the condition
# holds. `out_ref[...] += ...` reads, adds and stores. `.sum(axis=1, keepdims=True)` keeps two
# dimensions. `pl.BlockSpec(block_shape, index_map)`: the map returns *block numbers*, not elements.

# %% [markdown] tags=["hint"]
# ```python
# def kernel(x_ref, out_ref):
#     @pl.when(pl.program_id(1) == 0)
#     def _():
#         out_ref[...] = jnp.zeros_like(out_ref)
#
#     out_ref[...] += ...
#
# rows, columns = x.shape
# return pl.pallas_call(
#     kernel,
#     grid=(rows // block_rows, ...),
#     in_specs=[pl.BlockSpec((block_rows, block_columns), lambda i, j: ...)],
#     out_specs=pl.BlockSpec((block_rows, 1), lambda i, j: ...),
#     out_shape=jax.ShapeDtypeStruct((rows, 1), x.dtype),
#     interpret=choose_interpret(None),
# )(x)
# ```


# %% tags=["exercise"]
def row_sums(x, block_rows, block_columns):
    """The sum of each row of x f32[rows, columns]: f32[rows, 1], block by block in a kernel."""

    ### BEGIN SOLUTION
    def kernel(x_ref, out_ref):
        @pl.when(pl.program_id(1) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        out_ref[...] += x_ref[...].sum(axis=1, keepdims=True)

    rows, columns = x.shape
    return pl.pallas_call(
        kernel,
        grid=(rows // block_rows, columns // block_columns),
        in_specs=[pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, 1), x.dtype),
        interpret=choose_interpret(None),
    )(x)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("4.2", row_sums)

# %% [markdown] tags=["explanation"]
# The output's index map ignores j, so all steps (i, 0), (i, 1), ... want the same block and Pallas
# leaves it where it is; it goes back to HBM when i changes. That is only right because the *last*
# axis of the grid runs fastest. And because VMEM is not cleared, a kernel that accumulates has
# to begin, once for each output block and not once for all: at j == 0.


# %% tags=["wrong"] refused="each column block replaces the sum of those before it"
def row_sums(x, block_rows, block_columns):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...].sum(axis=1, keepdims=True)

    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // block_rows, x.shape[1] // block_columns),
        in_specs=[pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], 1), x.dtype),
        interpret=choose_interpret(None),
    )(x)


# %% tags=["wrong"] refused="the output block is never set to zero"
def row_sums(x, block_rows, block_columns):
    def kernel(x_ref, out_ref):
        out_ref[...] += x_ref[...].sum(axis=1, keepdims=True)

    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // block_rows, x.shape[1] // block_columns),
        in_specs=[pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], 1), x.dtype),
        interpret=choose_interpret(None),
    )(x)


# %% tags=["wrong"] refused="the zeros are written where program_id(0) is 0"
def row_sums(x, block_rows, block_columns):
    def kernel(x_ref, out_ref):
        @pl.when(pl.program_id(0) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        out_ref[...] += x_ref[...].sum(axis=1, keepdims=True)

    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // block_rows, x.shape[1] // block_columns),
        in_specs=[pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], 1), x.dtype),
        interpret=choose_interpret(None),
    )(x)


# %% tags=["wrong"] refused="Your function has no kernel"
def row_sums(x, block_rows, block_columns):
    return x.sum(axis=1, keepdims=True)


# %% tags=["wrong"] refused="asks for block (1, 0) of x_ref"
def row_sums(x, block_rows, block_columns):
    def kernel(x_ref, out_ref):
        @pl.when(pl.program_id(1) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        out_ref[...] += x_ref[...].sum(axis=1, keepdims=True)

    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // block_rows, x.shape[1] // block_columns),
        in_specs=[pl.BlockSpec((block_rows, block_columns), lambda i, j: (j, i))],
        out_specs=pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], 1), x.dtype),
        interpret=choose_interpret(None),
    )(x)


# %% tags=["wrong"] refused="the zeros are written in the very first step only"
def row_sums(x, block_rows, block_columns):
    def kernel(x_ref, out_ref):
        @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        out_ref[...] += x_ref[...].sum(axis=1, keepdims=True)

    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // block_rows, x.shape[1] // block_columns),
        in_specs=[pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], 1), x.dtype),
        interpret=choose_interpret(None),
    )(x)


# %% tags=["wrong"] refused="comes back to an output block that it had left"
def row_sums(x, block_rows, block_columns):
    def kernel(x_ref, out_ref):
        @pl.when(pl.program_id(0) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        out_ref[...] += x_ref[...].sum(axis=1, keepdims=True)

    rows, columns = x.shape
    return pl.pallas_call(
        kernel,
        grid=(columns // block_columns, rows // block_rows),
        in_specs=[pl.BlockSpec((block_rows, block_columns), lambda j, i: (i, j))],
        out_specs=pl.BlockSpec((block_rows, 1), lambda j, i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, 1), x.dtype),
        interpret=choose_interpret(None),
    )(x)


# %% tags=["wrong"] refused="Give it `interpret=choose_interpret(None)`"
# instead of
#         interpret=choose_interpret(None),
# write
#         interpret=False,


# %% [markdown]
# ## Exercise 4.3: One step of the online softmax
#
# A row of scores arrives block by block. Kept in between, for each row: the largest score so far
# `row_max`, the sum `row_sum` of $e^{s - \text{row\_max}}$ and the mixture `acc` of the values with
# the same weights, not divided yet. Write `online_step(row_max, row_sum, acc, scores, values)`:
# take one more block of keys in and return the new three.
#
# By hand: so far `row_max` 0, `row_sum` 2, `acc` 6. A block with scores (1, 2) arrives: the new
# maximum is 2, so everything kept shrinks by $e^{0 - 2}$ = 0.135. The new weights are
# $e^{1 - 2}$ = 0.368 and $e^{2 - 2}$ = 1. `row_sum` becomes 0.271 + 1.368 = 1.639.
#
# Rows are queries: `row_max` and `row_sum` are [rows, 1], `acc` is [rows, head_dim].
#
# **Teaches:** a softmax needs its maximum only at the end; until then any will do, if it is the
# same one everywhere.

# %% [markdown] tags=["hint"]
# All that is kept was computed against the old maximum. Multiplying by one factor, the same for sum
# and output, turns it into what the new maximum would have given.

# %% [markdown] tags=["hint"]
# `jnp.maximum(a, b)` compares two arrays number by number; `scores.max(axis=1, keepdims=True)` is
# [rows, 1]. The factor is `jnp.exp(old - new)`, at most 1. `weights @ values` mixes.

# %% [markdown] tags=["hint"]
# ```python
# new_max = jnp.maximum(row_max, ...)
# rescale = jnp.exp(row_max - new_max)
# weights = jnp.exp(scores - ...)
# new_sum = row_sum * rescale + ...
# return new_max, new_sum, acc * rescale + ...
# ```


# %% tags=["exercise"]
def online_step(row_max, row_sum, acc, scores, values):
    """Take a block of keys into the online softmax.

    row_max, row_sum: f32[rows, 1]; acc: f32[rows, head_dim]; scores: f32[rows, keys];
    values: f32[keys, head_dim]. Returns the new row_max, row_sum and acc.
    """
    ### BEGIN SOLUTION
    new_max = jnp.maximum(row_max, scores.max(axis=1, keepdims=True))
    rescale = jnp.exp(row_max - new_max)
    weights = jnp.exp(scores - new_max)
    new_sum = row_sum * rescale + weights.sum(axis=1, keepdims=True)
    return new_max, new_sum, acc * rescale + weights @ values
    ### END SOLUTION


# %% tags=["check"]
rpa.check("4.3", online_step)

# %% [markdown] tags=["explanation"]
# The invariant: `row_sum` and `acc` are what they would be if `row_max` had been known from the
# start. $e^{s - m} \cdot e^{m - m'} = e^{s - m'}$, so one factor keeps it. At the first block
# `row_max` is MASK_VALUE, a huge negative number: the factor is 0 and wipes out the zeros that were
# there anyway. It is finite on purpose; with $-\infty$ a row that sees nothing would compute
# $-\infty - (-\infty)$, and that is NaN for good.


# %% tags=["wrong"] refused="what was kept is not rescaled"
def online_step(row_max, row_sum, acc, scores, values):
    new_max = jnp.maximum(row_max, scores.max(axis=1, keepdims=True))
    weights = jnp.exp(scores - new_max)
    return new_max, row_sum + weights.sum(axis=1, keepdims=True), acc + weights @ values


# %% tags=["wrong"] refused="the output (acc) is not"
def online_step(row_max, row_sum, acc, scores, values):
    new_max = jnp.maximum(row_max, scores.max(axis=1, keepdims=True))
    weights = jnp.exp(scores - new_max)
    new_sum = row_sum * jnp.exp(row_max - new_max) + weights.sum(axis=1, keepdims=True)
    return new_max, new_sum, acc + weights @ values


# %% tags=["wrong"] refused="the factor is the wrong way round"
def online_step(row_max, row_sum, acc, scores, values):
    new_max = jnp.maximum(row_max, scores.max(axis=1, keepdims=True))
    rescale, weights = jnp.exp(new_max - row_max), jnp.exp(scores - new_max)
    new_sum = row_sum * rescale + weights.sum(axis=1, keepdims=True)
    return new_max, new_sum, acc * rescale + weights @ values


# %% tags=["wrong"] refused="the maximum of this block only"
def online_step(row_max, row_sum, acc, scores, values):
    new_max = scores.max(axis=1, keepdims=True)
    rescale, weights = jnp.exp(row_max - new_max), jnp.exp(scores - new_max)
    new_sum = row_sum * rescale + weights.sum(axis=1, keepdims=True)
    return new_max, new_sum, acc * rescale + weights @ values


# %% tags=["wrong"] refused="each step divides by its own sum"
def online_step(row_max, row_sum, acc, scores, values):
    new_max = jnp.maximum(row_max, scores.max(axis=1, keepdims=True))
    rescale, weights = jnp.exp(row_max - new_max), jnp.exp(scores - new_max)
    new_sum = row_sum * rescale + weights.sum(axis=1, keepdims=True)
    return new_max, new_sum, (acc * rescale + weights @ values) / new_sum


# %% [markdown]
# ## Exercise 4.4: Flash attention
#
# Now the kernel. `run_flash` calls it for one head, without a causal mask, over a grid of query
# blocks (axis 0) times key blocks (axis 1). You get references to one block of each array, and
# three scratch references that live from one step to the next: the state of the online softmax.

# %%
show_source(run_flash)

# %% [markdown]
# Write the kernel. From `rpa.tiled` you have
#
# - `empty_state(rows, head_dim)`, `softmax_step(state, scores, values)`, `finish(state, dtype)`:
#   the state before the first key, the step of 4.3, and the division at the end;
# - `read_state(state_refs)` and `write_state(state_refs, state)`;
# - `dot(a, b, contract=(1, 1))`: the product of the rows of a with the rows of b;
# - `zero_tail(values, num_valid)`: rows from `num_valid` on become zero.
#
# The scale is `head_dim ** -0.5`. `kv_len` need not be a multiple of `block_kv`: what the last
# block holds behind the end may be anything, and the check makes it NaN. So hide those scores
# (`MASK_VALUE`) **and** zero those values.
#
# **Teaches:** one pass over the keys, and no score ever leaves VMEM.

# %%
online_step = earlier("online_step")


def softmax_step(state, scores, values):
    """Take a block into a SoftmaxState, by the step of 4.3."""
    return online_step(*state, scores, values)


# %% [markdown] tags=["hint"]
# Three parts, two of them under `pl.when`: at the first block of keys empty the state; at every
# block compute scores, hide, and take a step; at the last block write the output.

# %% [markdown] tags=["hint"]
# `pl.program_id(1)` is the block of keys, `pl.num_programs(1)` how many there are.
# `jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)` numbers the columns of the block; the
# position of a key in the sequence is that plus where the block begins.
# `jnp.where(position < kv_len, scores, MASK_VALUE)` hides.

# %% [markdown] tags=["hint"]
# ```python
# kv_block = pl.program_id(1)
#
# @pl.when(kv_block == 0)
# def _():
#     write_state(state_refs, empty_state(*out_ref.shape))
#
# scores = dot(q_ref[...], k_ref[...], contract=(1, 1)) * ...
# position = kv_block * block_kv + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
# scores = ...
# values = zero_tail(v_ref[...], ...)
# write_state(state_refs, ...)
#
# @pl.when(kv_block == ...)
# def _():
#     out_ref[...] = finish(...)
# ```


# %% tags=["exercise"]
def flash_kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, kv_len, block_kv):
    """Attention of a block of queries over all blocks of keys, without a causal mask.

    q_ref, out_ref: f32[block_q, head_dim]; k_ref, v_ref: f32[block_kv, head_dim]; state_refs: the
    three parts of a SoftmaxState.
    """
    ### BEGIN SOLUTION
    kv_block = pl.program_id(1)

    @pl.when(kv_block == 0)
    def _():
        write_state(state_refs, empty_state(*out_ref.shape))

    scores = dot(q_ref[...], k_ref[...], contract=(1, 1)) * q_ref.shape[1] ** -0.5
    position = kv_block * block_kv + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(position < kv_len, scores, MASK_VALUE)
    values = zero_tail(v_ref[...], kv_len - kv_block * block_kv)
    write_state(state_refs, softmax_step(read_state(state_refs), scores, values))

    @pl.when(kv_block == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = finish(read_state(state_refs), out_ref.dtype)

    ### END SOLUTION


# %% tags=["check"]
rpa.check("4.4", flash_kernel)

# %% [markdown] tags=["explanation"]
# This is `row_sums` of exercise 4.2 with a richer accumulator. The state lives in scratch, the
# scores live for one step and are gone; what goes through HBM is Q and the output once, and K and V
# once for each block of queries. The tail needs both halves of its guard. A hidden score gets
# weight 0, but `0 * NaN` is NaN, so the *value* behind the end must be a number too. On a TPU the
# tail holds whatever was there before, mostly harmless, and once in a while not.


# %% tags=["wrong"] refused="only the last block of keys is left"
def flash_kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, kv_len, block_kv):
    write_state(state_refs, empty_state(*out_ref.shape))
    first = pl.program_id(1) * block_kv
    scores = dot(q_ref[...], k_ref[...], contract=(1, 1)) * q_ref.shape[1] ** -0.5
    position = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(position < kv_len, scores, MASK_VALUE)
    values = zero_tail(v_ref[...], kv_len - first)
    write_state(state_refs, softmax_step(read_state(state_refs), scores, values))
    out_ref[...] = finish(read_state(state_refs), out_ref.dtype)


# %% tags=["wrong"] refused="the state is never emptied"
def flash_kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, kv_len, block_kv):
    scores = dot(q_ref[...], k_ref[...], contract=(1, 1)) * q_ref.shape[1] ** -0.5
    write_state(state_refs, softmax_step(read_state(state_refs), scores, v_ref[...]))
    out_ref[...] = finish(read_state(state_refs), out_ref.dtype)


# %% tags=["wrong"] refused="what lies behind the last key is not kept out"
def flash_kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, kv_len, block_kv):
    @pl.when(pl.program_id(1) == 0)
    def _():
        write_state(state_refs, empty_state(*out_ref.shape))

    scores = dot(q_ref[...], k_ref[...], contract=(1, 1)) * q_ref.shape[1] ** -0.5
    position = pl.program_id(1) * block_kv + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(position < kv_len, scores, MASK_VALUE)
    write_state(state_refs, softmax_step(read_state(state_refs), scores, v_ref[...]))
    out_ref[...] = finish(read_state(state_refs), out_ref.dtype)


# %% tags=["wrong"] refused="the state is emptied for the first block of queries only"
def flash_kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, kv_len, block_kv):
    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _():
        write_state(state_refs, empty_state(*out_ref.shape))

    first = pl.program_id(1) * block_kv
    scores = dot(q_ref[...], k_ref[...], contract=(1, 1)) * q_ref.shape[1] ** -0.5
    position = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(position < kv_len, scores, MASK_VALUE)
    values = zero_tail(v_ref[...], kv_len - first)
    write_state(state_refs, softmax_step(read_state(state_refs), scores, values))
    out_ref[...] = finish(read_state(state_refs), out_ref.dtype)


# %% tags=["wrong"] refused="the output is not divided by the sum of the weights"
def flash_kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, kv_len, block_kv):
    @pl.when(pl.program_id(1) == 0)
    def _():
        write_state(state_refs, empty_state(*out_ref.shape))

    first = pl.program_id(1) * block_kv
    scores = dot(q_ref[...], k_ref[...], contract=(1, 1)) * q_ref.shape[1] ** -0.5
    position = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(position < kv_len, scores, MASK_VALUE)
    values = zero_tail(v_ref[...], kv_len - first)
    write_state(state_refs, softmax_step(read_state(state_refs), scores, values))
    out_ref[...] = state_refs[2][...]


# %% [markdown]
# ## Exercise 4.5: Which blocks of keys to skip
#
# With a causal mask, half of all pairs are hidden, and most of these fill whole blocks. For a block
# of queries, all blocks of keys fall into three kinds, in this order: **whole** (every query sees
# every key, no mask needed), **partly** visible, and **skipped** (no query sees any key).
#
# Write `key_blocks(q_block, q_len, kv_len, block_q, block_kv)`. It returns two integers:
#
# - `whole`: how many blocks of keys are whole; a block that reaches past the last key is not;
# - `end`: how many are whole or partly visible, so the walk over the keys ends there.
#
# By hand: `q_len` 8, `kv_len` 13, blocks of 4. The queries of block 0 stand at positions 5 to 8.
# The first sees keys 0 to 5: one whole block. The last sees keys 0 to 8: three blocks. So (1, 3).
#
# **Teaches:** the first query of a block decides where masks begin, the last one where work ends.

# %%
pictures.mask_tiles(
    [*range(5, 13)], 13, 4, 4,
    words="Queries at positions 5 to 12 in two blocks of four, 13 keys in blocks of four. For the "
    "first block of queries, keys 0 to 3 are whole, 4 to 11 partly visible, 12 is skipped.",
)  # fmt: skip

# %% [markdown] tags=["hint"]
# Find the positions of the first and of the last query of the block. A query at position p sees
# p + 1 keys. Whole blocks are counted by rounding down, needed ones by rounding up.

# %% [markdown] tags=["hint"]
# The first query of block i stands at `kv_len - q_len + i * block_q`. The last block of queries may
# be filled up with rows that do not exist: `min(..., kv_len)`. `//` rounds down, `-(-a // b)` up.

# %% [markdown] tags=["hint"]
# ```python
# first = kv_len - q_len + q_block * block_q
# seen_by_first = first + 1
# seen_by_last = min(..., kv_len)
# return seen_by_first // block_kv, ...
# ```


# %% tags=["exercise"]
def key_blocks(q_block, q_len, kv_len, block_q, block_kv):
    """How many blocks of keys are whole, and how many are needed, for one block of queries."""
    ### BEGIN SOLUTION
    first = kv_len - q_len + q_block * block_q
    seen_by_first, seen_by_last = first + 1, min(first + block_q, kv_len)
    return seen_by_first // block_kv, -(-seen_by_last // block_kv)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("4.5", key_blocks)

# %% [markdown]
# How much does that save in a prefill? Change the blocks: large ones skip less.

# %%
for block in (64, 256, 1024):
    needed = sum(key_blocks(i, 4096, 4096, block, block)[1] for i in range(4096 // block))
    masked = needed - sum(key_blocks(i, 4096, 4096, block, block)[0] for i in range(4096 // block))
    print(f"blocks of {block:4}: {needed / (4096 // block) ** 2:4.0%} of all pairs of blocks are "
          f"computed, {masked / needed:4.0%} of these with a mask")  # fmt: skip

# %% [markdown] tags=["explanation"]
# A kernel uses both numbers. `end` bounds its loop, and the index map clamps to `end - 1`, so that
# a skipped step asks for the block that is already in VMEM and nothing is fetched. `whole` is for
# later: comparing positions costs vector instructions, and rung 8 runs the blocks before `whole`
# without them. Neither needs the table of the mask, only two positions.


# %% tags=["wrong"] refused="the cached prefix is forgotten"
def key_blocks(q_block, q_len, kv_len, block_q, block_kv):
    first = q_block * block_q
    return (first + 1) // block_kv, -(-min(first + block_q, kv_len) // block_kv)


# %% tags=["wrong"] refused="`end` is rounded down"
def key_blocks(q_block, q_len, kv_len, block_q, block_kv):
    first = kv_len - q_len + q_block * block_q
    return (first + 1) // block_kv, min(first + block_q, kv_len) // block_kv


# %% tags=["wrong"] refused="`whole` follows the last query of the block"
def key_blocks(q_block, q_len, kv_len, block_q, block_kv):
    seen = min(kv_len - q_len + (q_block + 1) * block_q, kv_len)
    return seen // block_kv, -(-seen // block_kv)


# %% tags=["wrong"] refused="`end` goes past the last key"
def key_blocks(q_block, q_len, kv_len, block_q, block_kv):
    first = kv_len - q_len + q_block * block_q
    return (first + 1) // block_kv, -(-(first + block_q) // block_kv)


# %% tags=["wrong"] refused="a token does not see itself"
def key_blocks(q_block, q_len, kv_len, block_q, block_kv):
    first = kv_len - q_len + q_block * block_q
    return first // block_kv, -(-min(first + block_q, kv_len) // block_kv)


# %% [markdown]
# ## Exercise 4.6: Heads that share their keys become rows
#
# The `group` query heads that share a KV head all want the same K. So a kernel stacks them: one
# matrix with `q_len * group` rows for each KV head, and one product instead of `group`.
#
# Write `grouped_rows(q, num_kv_heads, kv_len)` for q [q_len, num_q_heads, head_dim]; the queries
# are the last `q_len` of `kv_len` tokens. It returns
#
# - `rows` [num_kv_heads, q_len * group, head_dim]: row `t * group + g` is query head `g` of the
#   group, of token t. Query head h reads KV head `h // group`;
# - `positions` i32[q_len * group]: the position of each row's token, which the causal mask
#   compares.
#
# By hand: two tokens, two query heads on one KV head, nothing cached. The rows are (token 0, head
# 0), (token 0, head 1), (token 1, head 0), (token 1, head 1), and the positions 0, 0, 1, 1.
#
# **Teaches:** GQA is a taller matrix, not a loop; and the mask goes by token, not by row.

# %%
pictures.strips(
    [("token 0", "*h0 #h1"), ("token 1", "_ _ *h0 #h1"), ("rows of KV head 0", "*h0 #h1 *h0 #h1"),
     ("positions", "0 0 1 1")],
    "Two tokens with two query heads each become four rows of one KV head: token 0 head 0, token 0 "
    "head 1, token 1 head 0, token 1 head 1, at positions 0, 0, 1, 1.",
    arrows=[((1, 2), (2, 2)), ((1, 3), (2, 3))],
    legend={"*": "query head 0", "#": "query head 1"},
)  # fmt: skip

# %% [markdown] tags=["hint"]
# Split the head axis into [num_kv_heads, group], bring the KV heads to the front, and join tokens
# and group. Every token has `group` rows in a line, all with its position.

# %% [markdown] tags=["hint"]
# `q.reshape(q_len, num_kv_heads, group, head_dim)` splits, `.transpose(1, 0, 2, 3)` reorders,
# another `reshape` joins. `jnp.arange(n) // group` counts 0, 0, 1, 1, ...

# %% [markdown] tags=["hint"]
# ```python
# q_len, num_q_heads, head_dim = q.shape
# group = num_q_heads // num_kv_heads
# rows = q.reshape(...).transpose(...).reshape(num_kv_heads, q_len * group, head_dim)
# positions = kv_len - q_len + jnp.arange(q_len * group) ...
# return rows, positions
# ```


# %% tags=["exercise"]
def grouped_rows(q, num_kv_heads, kv_len):
    """q as rows of one matrix a KV head, and the position of every row."""
    ### BEGIN SOLUTION
    q_len, num_q_heads, head_dim = q.shape
    group = num_q_heads // num_kv_heads
    rows = q.reshape(q_len, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    positions = kv_len - q_len + jnp.arange(q_len * group) // group
    return rows.reshape(num_kv_heads, q_len * group, head_dim), positions
    ### END SOLUTION


# %% tags=["check"]
rpa.check("4.6", grouped_rows)

# %% [markdown] tags=["explanation"]
# The matrix unit takes 128 rows or more at a time, and one decode token has one row per head.
# Stacking the group makes 4 of it with Llama 3 8B, for the same K and V: what limits a decode is
# bytes, and a byte of K now serves the whole group. Token-major order (all heads of token 0, then
# token 1) keeps the rows of a block of tokens together, so that a block of queries is a slice; and
# `row // group` finds the token again, for the mask and for the tail.


# %% tags=["wrong"] refused="the rows stand head by head"
def grouped_rows(q, num_kv_heads, kv_len):
    q_len, num_q_heads, head_dim = q.shape
    rows = q.transpose(1, 0, 2).reshape(num_kv_heads, -1, head_dim)
    return rows, kv_len - q_len + jnp.arange(rows.shape[1]) % q_len


# %% tags=["wrong"] refused="the rows are reshaped without a transpose"
def grouped_rows(q, num_kv_heads, kv_len):
    rows = q.reshape(num_kv_heads, -1, q.shape[2])
    group = q.shape[1] // num_kv_heads
    return rows, kv_len - len(q) + jnp.arange(rows.shape[1]) // group


# %% tags=["wrong"] refused="every row counts as a token of its own"
def grouped_rows(q, num_kv_heads, kv_len):
    q_len, _, head_dim = q.shape
    rows = q.reshape(q_len, num_kv_heads, -1, head_dim).transpose(1, 0, 2, 3)
    rows = rows.reshape(num_kv_heads, -1, head_dim)
    return rows, kv_len - q_len + jnp.arange(rows.shape[1])


# %% tags=["wrong"] refused="positions begin at kv_len - q_len"
def grouped_rows(q, num_kv_heads, kv_len):
    q_len, num_q_heads, head_dim = q.shape
    group = num_q_heads // num_kv_heads
    rows = q.reshape(q_len, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    return rows.reshape(num_kv_heads, -1, head_dim), jnp.arange(q_len * group) // group


# %% [markdown]
# ## Exercise 4.7: Flash attention, whole
#
# Now put it together: causal attention of one sequence, with groups of query heads, from your own
# pieces, and the `pallas_call` by hand. This is the first whole kernel of a file that grows from
# here to chapter 7: when the check is passed, the cell goes to `my_rpa.py` next to this notebook,
# and later exercises take your functions from there. At the end stands a ragged paged attention
# kernel that you wrote.
#
# Fill in the functions from top to bottom; the check tries them in this order.
#
# - `new_state`, `output_of`: what the kernel keeps between blocks of keys, and what it makes of it;
# - `causal_mask`: row `t * group + g` of a block is query head `g` of token t (exercise 4.6);
# - `attend`: scores, mask, your `online_step`. Keys from `num_keys` on do not exist: the last block
#   reaches past the end of K and V, where memory may hold NaN;
# - `causal_kernel`: 4.4 with the causal mask. Blocks of keys that no query sees are not computed;
# - `flash_attention`: heads to the front, a grid of (KV heads, blocks of queries, blocks of keys),
#   and back.
#
# By hand: q_len 8, kv_len 13, blocks of 4 tokens. The grid has 2 x 4 steps for each KV head; the
# queries of block 0 stand at positions 5 to 8 and see blocks 0 to 2, so step (h, 0, 3) computes
# nothing.
#
# **Teaches:** a kernel is a grid, blocks, scratch, and a function of one step.

# %%
pictures.mask_tiles(
    [*range(5, 13)], 13, 4, 4,
    words="Two blocks of queries at positions 5 to 12, four blocks of keys: eight grid steps for "
    "each KV head. Step (h, 0, 3) sees nothing and computes nothing.",
    title="one KV head: rows are i, columns are j",
)  # fmt: skip

# %%
online_step = earlier("online_step")

# %% [markdown] tags=["hint"]
# Everything is in 4.2 to 4.6: an accumulator that begins at j == 0 and is written at the last j
# (4.2), the step (4.3), the tail (4.4), which blocks are needed (4.5), the rows (4.6). New is only
# that three of them meet in one function.

# %% [markdown] tags=["hint"]
# `pl.BlockSpec((None, rows, head_dim), lambda h, i, j: (h, i, 0))`: `None` is a dimension that the
# kernel does not see. Scratch is `scratch_shapes=[pltpu.VMEM(shape, jnp.float32), ...]` and arrives
# behind the outputs. `jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())),
# preferred_element_type=jnp.float32)` is Q K^T with a float32 result. `partial(causal_kernel,
# q_len=...)` hands numbers to the kernel.

# %% [markdown] tags=["hint"]
# ```python
# # causal_mask
# row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
# return (kv_position + column <= q_position + row // group) & (...)
#
# # causal_kernel
# q_position, kv_position = kv_len - q_len + i * block_q, j * block_kv
#
# @pl.when(j == 0)
# def _():
#     for ref, part in zip(state_refs, new_state(*out_ref.shape)):
#         ref[...] = part
#
# @pl.when(kv_position < jnp.minimum(kv_len, q_position + block_q))
# def _():
#     state = [ref[...] for ref in state_refs]
#     visible = causal_mask((q_ref.shape[0], block_kv), group, q_position, kv_position, kv_len)
#     state = attend(state, q_ref[...], k_ref[...], v_ref[...], visible, ..., sm_scale)
#     ...
#
# # flash_attention
# rows = q.reshape(q_len, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
# rows = rows.reshape(num_kv_heads, q_len * group, head_dim)
# out = pl.pallas_call(
#     partial(causal_kernel, q_len=q_len, kv_len=kv_len, group=group, sm_scale=sm_scale),
#     grid=(num_kv_heads, pl.cdiv(q_len, block_q), pl.cdiv(kv_len, block_kv)),
#     in_specs=[..., ..., ...],
#     out_specs=...,
#     out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
#     scratch_shapes=[...],
#     interpret=choose_interpret(None),
# )(rows, k.transpose(1, 0, 2), v.transpose(1, 0, 2))
# ```


# %% tags=["exercise"]
MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)


def new_state(rows, lanes):
    """The online softmax before the first key: row_max, row_sum [rows, 1], acc [rows, lanes]."""
    ### BEGIN SOLUTION
    column = jnp.zeros((rows, 1), jnp.float32)
    return column + MASK_VALUE, column, jnp.zeros((rows, lanes), jnp.float32)
    ### END SOLUTION


def output_of(state, dtype):
    """The output of a finished state, dtype[rows, lanes]; zeros in rows that have seen no key."""
    ### BEGIN SOLUTION
    _, row_sum, acc = state
    return (acc / jnp.where(row_sum > 0, row_sum, 1.0)).astype(dtype)
    ### END SOLUTION


def causal_mask(shape, group, q_position, kv_position, kv_len):
    """Which key each row sees, bool[rows, keys]: keys up to its own position, and below kv_len.

    Row t * group + g is query head g of token t; token 0 stands at position q_position, and key 0
    at position kv_position.
    """
    ### BEGIN SOLUTION
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    key = kv_position + column
    return (key <= q_position + row // group) & (key < kv_len)
    ### END SOLUTION


def attend(state, q, k, v, visible, num_keys, sm_scale):
    """Take a block of keys into the state; keys from num_keys on do not exist, and may be NaN.

    q: [rows, lanes]; k, v: [keys, lanes] in the dtype of q; visible: bool[rows, keys].
    """
    # A TPU rounds the factors of a float32 product to bfloat16, unless it is told not to.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        ### BEGIN SOLUTION
        q_k_t = (((1,), (1,)), ((), ()))  # contract dimension 1 of both
        scores = jax.lax.dot_general(q, k, q_k_t, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, scores * sm_scale, MASK_VALUE)
        exists = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < num_keys
        return online_step(*state, scores, jnp.where(exists, v, 0))
        ### END SOLUTION


def causal_kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, q_len, kv_len, group, sm_scale):
    """A block of queries of one KV head against one block of keys: grid step (head, i, j).

    q_ref, out_ref: VMEM [block_q * group, head_dim]; k_ref, v_ref: VMEM [block_kv, head_dim];
    state_refs: VMEM, the three parts of the state, kept from one step to the next.
    """
    i, j = pl.program_id(1), pl.program_id(2)
    block_q, block_kv = q_ref.shape[0] // group, k_ref.shape[0]
    ### BEGIN SOLUTION
    q_position, kv_position = kv_len - q_len + i * block_q, j * block_kv

    @pl.when(j == 0)
    def _():
        for ref, part in zip(state_refs, new_state(*out_ref.shape), strict=True):
            ref[...] = part

    @pl.when(kv_position < jnp.minimum(kv_len, q_position + block_q))
    def _():
        state, num_keys = [ref[...] for ref in state_refs], kv_len - kv_position
        shape = (q_ref.shape[0], block_kv)
        visible = causal_mask(shape, group, q_position, kv_position, kv_len)
        state = attend(state, q_ref[...], k_ref[...], v_ref[...], visible, num_keys, sm_scale)
        for ref, part in zip(state_refs, state, strict=True):
            ref[...] = part

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = output_of([ref[...] for ref in state_refs], out_ref.dtype)

    ### END SOLUTION


def flash_attention(q, k, v, *, sm_scale, block_q=128, block_kv=512):
    """Causal attention of one sequence: [q_len, num_q_heads, head_dim] in the dtype of q.

    q: [q_len, num_q_heads, head_dim], the last q_len of kv_len tokens;
    k, v: [kv_len, num_kv_heads, head_dim]. No length has to be a multiple of a block.
    """
    (q_len, num_q_heads, head_dim), (kv_len, num_kv_heads, _) = q.shape, k.shape
    group = num_q_heads // num_kv_heads
    block_q, block_kv = min(block_q, q_len), min(block_kv, kv_len)
    ### BEGIN SOLUTION
    rows = q.reshape(q_len, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    rows = rows.reshape(num_kv_heads, q_len * group, head_dim)
    q_spec = pl.BlockSpec((None, block_q * group, head_dim), lambda h, i, j: (h, i, 0))
    kv_spec = pl.BlockSpec((None, block_kv, head_dim), lambda h, i, j: (h, j, 0))
    sizes = {"q_len": q_len, "kv_len": kv_len, "group": group, "sm_scale": sm_scale}
    out = pl.pallas_call(
        partial(causal_kernel, **sizes),
        grid=(num_kv_heads, pl.cdiv(q_len, block_q), pl.cdiv(kv_len, block_kv)),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
        scratch_shapes=[
            pltpu.VMEM((block_q * group, 1), jnp.float32),
            pltpu.VMEM((block_q * group, 1), jnp.float32),
            pltpu.VMEM((block_q * group, head_dim), jnp.float32),
        ],
        interpret=choose_interpret(None),
    )(rows, k.transpose(1, 0, 2), v.transpose(1, 0, 2))
    out = out.reshape(num_kv_heads, q_len, group, head_dim).transpose(1, 0, 2, 3)
    return out.reshape(q.shape)
    ### END SOLUTION


# %% tags=["check"]
rpa.check("4.7", flash_attention)

# %% [markdown]
# SmolLM2 with *your* attention. A kernel in the interpreter is slow, so it attends in one layer of
# thirty, and writes two words for each prompt; `through_strips` gathers K and V of a sequence from
# its pages before your function is called.

# %%
from rpa.models.speak import speak, through_strips

speak(through_strips(flash_attention), own_layers=1, num_tokens=2)

# %% [markdown] tags=["explanation"]
# One kernel, three levels: the grid says which blocks meet, `causal_kernel` what happens when they
# do, `attend` what one block does to the state. Only the last of the three comes back in chapters 5
# to 7, unchanged: from there on the kernel itself decides which keys it gets, and when. Two guards
# stand in `attend`, as in 4.4. The mask hides the *score* of a key, and the `where` in front of the
# product removes its *value*: a weight of zero times NaN would be NaN.
#
# The last block of queries may reach past `q_len`, too. Its rows are computed from whatever is
# there, and Pallas does not write them back: nothing has to be done about them.

# %% tags=["wrong"] refused="the causal mask ignores the cached prefix"
# instead of
#     return (key <= q_position + row // group) & (key < kv_len)
# write
#     return (key <= q_position - q_position + row // group) & (key < kv_len)

# %% tags=["wrong"] refused="every row counts as a token of its own"
# instead of
#     return (key <= q_position + row // group) & (key < kv_len)
# write
#     return (key <= q_position + row) & (key < kv_len)

# %% tags=["wrong"] refused="keys behind the last one count as visible"
# instead of
#     return (key <= q_position + row // group) & (key < kv_len)
# write
#     return key <= q_position + row // group

# %% tags=["wrong"] refused="the scores are not scaled"
# instead of
#     scores = jnp.where(visible, scores * sm_scale, MASK_VALUE)
# write
#     scores = jnp.where(visible, scores, MASK_VALUE)

# %% tags=["wrong"] refused="what lies behind the last key is not kept out of the values"
# instead of
#     return online_step(*state, scores, jnp.where(exists, v, 0))
# write
#     return online_step(*state, scores, v)

# %% tags=["wrong"] refused="the state is emptied for the first block of queries only"
# instead of
#     @pl.when(j == 0)
# write
#     @pl.when((i == 0) & (j == 0))

# %% tags=["wrong"] refused="the walk over the keys ends too early"
# instead of
#     @pl.when(kv_position < jnp.minimum(kv_len, q_position + block_q))
# write
#     @pl.when(kv_position < jnp.minimum(kv_len, q_position))

# %% tags=["wrong"] refused="each query head reads the KV head of another group"
# instead of
#     rows = q.reshape(q_len, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
# write
#     rows = q.reshape(q_len, group, num_kv_heads, head_dim).transpose(2, 0, 1, 3)
# instead of
#     out = out.reshape(num_kv_heads, q_len, group, head_dim).transpose(1, 0, 2, 3)
# write
#     out = out.reshape(num_kv_heads, q_len, group, head_dim).transpose(1, 2, 0, 3)


# %% tags=["wrong"] refused="Your function has no kernel"
def flash_attention(q, k, v, *, sm_scale, block_q=128, block_kv=512):
    return rpa.dense.attention(q, k, v, sm_scale=sm_scale)
