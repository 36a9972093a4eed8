"""Who comes next: the order in which a kernel visits sequences, query blocks and KV blocks.

A `WorkItem` is one KV block of one query block of one sequence. The kernel is one loop; a
iteration of it
computes one item (in decode two, or four), while the pages of later turns are copied (see
`pipeline`).
So copies run ahead across the ends of query blocks and of sequences: a pipeline that drains at
every sequence end waits for HBM at each of them.

Idle sequences (q_len 0) have no items and are passed over, wherever they are.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

TOKENS_IN_FLIGHT, ROWS_IN_FLIGHT = 0, 1
"""Rows of the ref `state`, i32[2 * num_slots] in SMEM: of each slot the tokens that its KV buffer
is still storing in the cache, and the output rows that its o buffer is still sending."""


class Sequence(NamedTuple):
    """One sequence of the batch; all i32[] scalars, in tokens but for index."""

    index: Any
    q_start: Any  # row of its first new token in queries, keys and values
    q_len: Any
    kv_len: Any

    @property
    def first_new(self):
        """Position of its first new token."""
        return self.kv_len - self.q_len


class WorkItem(NamedTuple):
    """A KV block of a query block of a sequence; all i32[] scalars."""

    seq: Sequence
    q_index: Any  # which query block of the sequence
    kv_index: Any  # which KV block of the query block
    q_slot: Any  # which buffer holds the query block, and which its output
    kv_slot: Any  # which buffer holds the KV block
    ring_index: Any = None  # where on the belt it is, see there, once it is


ITEM_WORDS = len(Sequence._fields) + len(WorkItem._fields) - 2
"""Words of a work item on the belt, where its ring_index need not be said."""


class QueryBlock(NamedTuple):
    """bq query tokens of a sequence, and the keys that at least one of them sees."""

    seq: Sequence
    row: Any  # of its first token in queries
    num_rows: Any
    position: Any  # of its first token in the sequence
    kv_start: Any  # first position that is fetched
    kv_end: Any  # one past the last


def sequence(plan, refs, index):
    """Read a sequence's lengths; also what a wrong `distribution` says stays in bounds."""
    q_start = refs.cu_q_lens[index]
    q_len = refs.cu_q_lens[index + 1] - q_start
    if plan.max_q_len is not None:
        # A longer one is the caller's mistake. Its output is unspecified, but the loops below
        # must not run past what the buffers of this case are made for.
        q_len = jnp.minimum(q_len, plan.max_q_len)
    return Sequence(index, q_start, q_len, refs.kv_lens[index])


def is_active(seq):
    """Whether there is anything to compute: a new token (and lengths that make sense)."""
    return (seq.q_len > 0) & (seq.kv_len >= seq.q_len)


def num_query_blocks(plan, seq):
    """Blocks of bq that hold the new tokens of a sequence."""
    return divide_up(seq.q_len, plan.blocks.bq)


def query_block(plan, seq, index):
    """The query block `index` of a sequence."""
    p = plan.problem
    first_row = 0 if plan.has_one_query_block else index * plan.blocks.bq
    num_rows = 1 if plan.max_q_len == 1 else jnp.minimum(plan.blocks.bq, seq.q_len - first_row)
    position = seq.first_new + first_row
    kv_start = jnp.int32(0)
    if p.sliding_window is not None:
        kv_start = jnp.maximum(position - p.sliding_window + 1, 0)
    kv_end = position + num_rows if p.causal else seq.kv_len
    return QueryBlock(seq, seq.q_start + first_row, num_rows, position, kv_start, kv_end)


def num_kv_blocks(plan, block):
    """Blocks of bkv tokens from kv_start on; at least one, a token sees itself."""
    return divide_up(block.kv_end - block.kv_start, plan.blocks.bkv)


def kv_block_start(plan, block, index):
    """Position of the first token of a KV block."""
    return block.kv_start + index * plan.blocks.bkv


def kv_block_tokens(plan, block, index):
    """Tokens in a KV block: bkv, or what is left."""
    return jnp.minimum(plan.blocks.bkv, block.kv_end - kv_block_start(plan, block, index))


def first_active(plan, refs, index, end):
    """The first sequence from `index` on that is not idle, or `end`."""

    def idle(i):
        return (i < end) & jnp.logical_not(is_active(_sequence_or_end(plan, refs, i, end)))

    return lax.while_loop(idle, lambda i: i + 1, index)


def first_item(plan, refs, first, end):
    """The first item of the batch."""
    zero = jnp.int32(0)
    # From here on indices only grow, so a wrong `distribution` cannot make one negative.
    first = jnp.maximum(jnp.minimum(first, end), 0)
    index = first_active(plan, refs, first, end)
    return WorkItem(_sequence_or_end(plan, refs, index, end), zero, zero, zero, zero)


def next_item(plan, refs, item, end):
    """The item after this one; its sequence is `end` if this was the last."""
    seq, block = item.seq, query_block(plan, item.seq, item.q_index)
    kv_index = item.kv_index + 1
    next_q = kv_index == num_kv_blocks(plan, block)
    next_seq, q_index = next_q, item.q_index
    if not plan.has_one_query_block:
        q_index = jnp.where(next_q, q_index + 1, q_index)
        next_seq = q_index == num_query_blocks(plan, seq)
        q_index = jnp.where(next_seq, 0, q_index)
    index = first_active(plan, refs, jnp.where(next_seq, seq.index + 1, seq.index), end)
    return WorkItem(
        _sequence_or_end(plan, refs, index, end),
        q_index,
        jnp.where(next_q, 0, kv_index),
        jnp.where(next_q, next_slot(item.q_slot, plan.num_slots), item.q_slot),
        next_slot(item.kv_slot, plan.num_slots),
    )


def divide(x, size):
    """x // size of an i32[] that is not negative, and a static size; most are powers of two.

    `//` would ask for the signs of both: ten operations to trace and to lower instead of one.

    >>> divide(jnp.int32(300), 128).item(), divide(jnp.int32(300), 96).item()
    (2, 3)
    """
    is_power = size & (size - 1) == 0
    return x >> (size.bit_length() - 1) if is_power else lax.div(x, jnp.int32(size))


def divide_up(x, size):
    """How many `size` it takes to hold x: `paging.cdiv` of what `divide` divides."""
    return divide(x + (size - 1), size)


def next_slot(slot, num_slots):
    """The slot after this one, in a ring; a division would take longer."""
    return jnp.where(slot == num_slots - 1, 0, slot + 1)


def items_of_iteration(plan, refs, item, end):
    """A item and those that are computed together with it, items_per_iteration in all."""
    items = [item]
    while len(items) < plan.items_per_iteration:
        items.append(next_item(plan, refs, items[-1], end))
    return tuple(items)


def _sequence_or_end(plan, refs, index, end):
    # `end` may be past the arrays; what is read instead is never used.
    seq = sequence(plan, refs, jnp.minimum(index, plan.problem.max_num_seqs - 1))
    return seq._replace(index=index)
