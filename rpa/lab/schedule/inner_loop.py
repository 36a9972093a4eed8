"""The inner loop of a decode on the bench: one KV block in VMEM, one optimisation after the other.

Rung 8 has a schedule of thousands of bundles, in which the reason for one number is hard to see.
This is its inner loop alone, small enough to compile while one waits: 512 tokens of a KV cache
(8 KV heads, 32 query heads, head_dim 128, bfloat16) that lie in VMEM, one query token per sequence,
no copies by hand, no masks. `STEPS` names the optimisations of chapter 9, each on top of the last.

    q    [num_seqs, num_kv_heads, group, head_dim]
    kv   [num_seqs, num_tokens, words, 2, head_dim]: K and V of a head in the same 32-bit words, and
         words >= num_kv_heads, the distance from token to token
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rpa import interpreter
from rpa.kernel import layout

NUM_KV_HEADS, GROUP, HEAD_DIM, NUM_TOKENS = 8, 4, 128, 512
"""Llama 3 8B, and the tokens of the KV block."""


# --- The parts --------------------------------------------------------------------------------


def load_by_value(kv_ref, head):
    """K and V of a head as one would write it, each [num_tokens, head_dim]."""
    return kv_ref[:, head, 0], kv_ref[:, head, 1]


def load_strided(kv_ref, head):
    """The same as every `words`-th row of a plain matrix of 32-bit words: compiled only."""
    num_tokens, words, _, lanes = kv_ref.shape
    matrix = kv_ref.bitcast(jnp.uint32).reshape(num_tokens * words, lanes)
    rows = matrix[pl.ds(head, num_tokens, stride=words)]
    return tuple(layout.unpack(rows, place, kv_ref.dtype, kv_ref.dtype) for place in range(2))


def scores(q, k):
    """Q K^T, f32[rows, num_tokens]."""
    return lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def scores_swapped(q, k, quarters):
    """The same; for so many quarters of the keys as (K Q^T)^T, with the queries as weights."""
    swapped = len(k) * quarters // 4
    parts = [scores(k[:swapped], q).T] if swapped else []
    return jnp.concatenate([*parts, scores(q, k[swapped:])], axis=1)


def softmax(s):
    """Weights that are not normalised, f32[rows, num_tokens], and their sums, f32[rows, 1]."""
    weights = jnp.exp2(s - jnp.max(s, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def weighted_values(weights, v):
    """P V, f32[rows, head_dim]."""
    return jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


# --- The loops --------------------------------------------------------------------------------


def in_turn(q_ref, kv_ref, out_ref, load):
    """One head after the other, as one would write it."""
    for head in range(NUM_KV_HEADS):
        k, v = load(kv_ref.at[0], head)
        weights, total = softmax(scores(q_ref[0, head], k))
        out_ref[0, head] = weighted_values(weights, v) / total


def ahead(q_ref, kv_ref, out_ref, load, *, num_ahead):
    """P V of a head when Q K^T of the `num_ahead` next ones has been issued."""
    pending = []

    def finish(head, weights, total, v):
        out_ref[0, head] = weighted_values(weights, v) / total

    for head in range(NUM_KV_HEADS):
        k, v = load(kv_ref.at[0], head)
        s = scores(q_ref[0, head], k)
        if len(pending) == num_ahead:
            finish(*pending.pop(0))
        pending.append((head, *softmax(s), v))
    for chain in pending:
        finish(*chain)


def stacked(q_ref, kv_ref, out_ref, load, *, heads_per_group, num_ahead, quarters=0):
    """Several heads in one product, block-diagonally; sequences by turns; some keys swapped."""
    pending = []

    def finish(seq, first, weights, total, v):
        out = weighted_values(weights, v) / total
        for i in range(heads_per_group):
            rows = out[i * GROUP : (i + 1) * GROUP]
            out_ref[seq, first + i] = rows[:, i * HEAD_DIM : (i + 1) * HEAD_DIM]

    for first in range(0, NUM_KV_HEADS, heads_per_group):
        for seq in range(q_ref.shape[0]):
            heads = range(first, first + heads_per_group)
            keys, values = zip(*(load(kv_ref.at[seq], head) for head in heads), strict=True)
            q = block_diagonal([q_ref[seq, head] for head in heads])
            s = scores_swapped(q, jnp.concatenate(keys, axis=1), quarters)
            if len(pending) == num_ahead:
                finish(*pending.pop(0))
            pending.append((seq, first, *softmax(s), jnp.concatenate(values, axis=1)))
    for chain in pending:
        finish(*chain)


def block_diagonal(tiles):
    """Tiles [rows, lanes] as one matrix in which each has rows and lanes of its own, else zeros.

    >>> block_diagonal([jnp.array([[1, 2]]), jnp.array([[3, 4]])]).tolist()
    [[1, 2, 0, 0], [0, 0, 3, 4]]
    """
    lanes = tiles[0].shape[1]
    before = [(0, 0), (0, 0)]
    rows = []
    for i, tile in enumerate(tiles):
        before[1] = (i * lanes, (len(tiles) - 1 - i) * lanes)
        # Zeros of a packed type would be shifted into place; those of float32 are just there.
        rows.append(jnp.pad(tile.astype(jnp.float32), before).astype(tile.dtype))
    return jnp.concatenate(rows, axis=0)


# --- On the bench -----------------------------------------------------------------------------


class Step(NamedTuple):
    """One optimisation.

    Attributes:
        kernel: `kernel(q_ref, kv_ref, out_ref, load)`.
        load: how it reads K and V of a head, on the chip.
        words: 32-bit rows from token to token.
        num_seqs: sequences that are computed together.
    """

    kernel: Callable
    load: Callable = load_strided
    words: int = NUM_KV_HEADS | 1
    num_seqs: int = 1


STEPS: dict[str, Step] = {
    "as written": Step(in_turn, load_by_value, NUM_KV_HEADS),
    "strided loads": Step(in_turn, words=NUM_KV_HEADS),
    "odd stride": Step(in_turn),
    "Q K one head ahead": Step(partial(ahead, num_ahead=1)),
    "two heads ahead": Step(partial(ahead, num_ahead=2)),
    "four heads a product": Step(partial(stacked, heads_per_group=4, num_ahead=1)),
    "two sequences together": Step(partial(stacked, heads_per_group=4, num_ahead=3), num_seqs=2),
    "a quarter of the keys swapped": Step(
        partial(stacked, heads_per_group=4, num_ahead=3, quarters=1), num_seqs=2
    ),
}
"""The optimisations in the order of chapter 9, each on top of the last."""


def shapes(step):
    """Shapes of q and kv for a step of STEPS."""
    n, words = STEPS[step].num_seqs, STEPS[step].words
    q = (n, NUM_KV_HEADS, GROUP, HEAD_DIM)
    return tuple(
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in (q, (n, NUM_TOKENS, words, 2, HEAD_DIM))
    )


def attend(q, kv, *, step, interpret=False):
    """One query token a sequence attends to a KV block, by a step of STEPS.

    Args:
        q, kv: see above; the queries are scaled already, also by log2(e).
        step: a name in STEPS.
        interpret: as in `rpa.tiled.flash_attention`; the lab's compiler wants False.

    Returns:
        f32, the shape of q.

    All steps compute the same:

    >>> q = jnp.ones((1, 8, 4, 128), jnp.bfloat16)
    >>> kv = jnp.ones((1, 16, 9, 2, 128), jnp.bfloat16)
    >>> float(attend(q, kv, step="two heads ahead", interpret=None)[0, 7, 3, 127])
    1.0
    """
    return call(STEPS[step].kernel, q, kv, load=STEPS[step].load, interpret=interpret)


def attend_ahead(q, kv, *, num_ahead):
    """`attend`, compiled, with Q K^T so many heads ahead of P V."""
    return call(partial(ahead, num_ahead=num_ahead), q, kv)


def attend_swapped(q, kv, *, quarters):
    """`attend`, compiled, by the last step with another part of the keys swapped."""
    return call(partial(STEPS["two sequences together"].kernel, quarters=quarters), q, kv)


def call(kernel, q, kv, *, load=load_strided, interpret=False):
    """Call such a kernel; in the interpreter, which knows no bitcast, it reads by value."""
    interpret = interpreter.choose_interpret(interpret)
    return pl.pallas_call(
        partial(kernel, load=load_by_value if interpret else load),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        interpret=interpret,
        name="inner_loop",
    )(q, kv)


def every_row(matrix, *, stride, num_rows=512, interpret=False):
    """Load every `stride`-th row of a matrix and nothing else: what does a load cost?

    Args:
        matrix: f32[num_rows * stride, 128].

    Returns:
        f32[num_rows, 128].

    >>> matrix = jnp.arange(16.0)[:, None] * jnp.ones(128)
    >>> every_row(matrix, stride=2, num_rows=8, interpret=None)[:, 0].tolist()
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]
    """

    def kernel(matrix_ref, out_ref):
        out_ref[...] = matrix_ref[pl.ds(0, num_rows, stride=stride)]

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_rows, matrix.shape[1]), matrix.dtype),
        interpret=interpreter.choose_interpret(interpret),
        name="every_row",
    )(matrix)
