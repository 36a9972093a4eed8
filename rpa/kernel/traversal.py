"""Which block comes next: the order of sequences, query blocks and KV blocks.

A work item is one KV block of one query block of one sequence. A `Cursor` says where the traversal
is; `work_item` resolves it, once, into everything that looking up, fetching and computing have to
know. So copies run ahead across the ends of query blocks and of sequences: a pipeline that drains
at every sequence end waits for HBM at each of them.

Idle sequences (q_len 0) have no work items and are passed over, wherever they are.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax


class Sequence(NamedTuple):
    """One sequence of the batch; all i32[] scalars, in tokens except for index."""

    index: Any
    q_start: Any  # row of its first new token in queries, keys and values
    q_len: Any
    kv_len: Any

    @property
    def num_cached(self):
        """Tokens before its first new one, and so the position of that one."""
        return self.kv_len - self.q_len


class Cursor(NamedTuple):
    """Where the traversal is; all i32[] scalars."""

    seq: Sequence  # its index is `end` when the traversal is over
    q_index: Any  # which query block of the sequence
    kv_index: Any  # which KV block of the query block
    q_slot: Any  # which buffer holds the query block, and which its output
    kv_slot: Any  # which buffer holds the KV block


class QueryBlock(NamedTuple):
    """bq query tokens of a sequence, and the keys that at least one of them sees."""

    q_row: Any  # of its first token in queries
    q_len: Any
    position: Any  # of its first token in the sequence
    kv_start: Any  # the first key that any of its queries sees
    kv_end: Any  # one past the last


class WorkItem(NamedTuple):
    """One KV block of one query block, resolved; all i32[] scalars.

    Positions count tokens of the sequence from 0. Token `position` is row `q_row` of queries and of
    the new keys and values, so token x is row `q_row + x - position`.
    """

    num_tokens: Any  # in the KV block; 0 if the work item does not exist
    kv_position: Any  # of the KV block's first token
    entry: Any  # of its first page, in the page table
    q_row: Any  # of the query block's first token in queries
    q_len: Any  # tokens of the query block
    position: Any  # of its first token
    num_cached: Any  # tokens of the sequence before its first new one
    is_first: Any  # whether the KV block is the query block's first, 0 or 1
    is_last: Any  # whether it is its last, 0 or 1
    q_slot: Any
    kv_slot: Any
    exists: Any  # whether there is anything to do: bool[]
    ring_index: Any = None  # where it is in the ring, see `pipeline`


STORED_FIELDS = WorkItem._fields[:-2]
"""What the ring holds of a work item: the number of its tokens first. The rest follows from it."""


def sequence(plan, refs, index):
    """Read a sequence's lengths from kv_lens and cu_q_lens, within bounds for any `index`."""
    # `end` may be past the arrays; what is read instead is never used.
    row = jnp.minimum(index, plan.problem.max_num_seqs - 1)
    q_start = refs.cu_q_lens[row]
    q_len = refs.cu_q_lens[row + 1] - q_start
    if plan.max_q_len is not None:
        # A longer one is the caller's mistake. Its output is unspecified, but no loop may run past
        # what the buffers of this kernel are made for.
        q_len = jnp.minimum(q_len, plan.max_q_len)
    return Sequence(index, q_start, q_len, refs.kv_lens[row])


def query_block(plan, seq, index):
    """The query block `index` of a sequence."""
    p = plan.problem
    first_row = 0 if plan.has_one_query_block else index * plan.blocks.bq
    q_len = 1 if plan.max_q_len == 1 else jnp.minimum(plan.blocks.bq, seq.q_len - first_row)
    position = seq.num_cached + first_row
    kv_start = jnp.int32(0)
    if p.sliding_window is not None:
        kv_start = jnp.maximum(position - p.sliding_window + 1, 0)
    kv_end = position + q_len if p.causal else seq.kv_len
    return QueryBlock(seq.q_start + first_row, q_len, position, kv_start, kv_end)


def work_item(plan, cursor, end):
    """Resolve a cursor."""
    p, bkv, seq = plan.problem, plan.blocks.bkv, cursor.seq
    block = query_block(plan, seq, cursor.q_index)
    kv_position = block.kv_start + cursor.kv_index * bkv
    left = block.kv_end - kv_position
    num_tokens = jnp.where(seq.index < end, jnp.minimum(bkv, left), 0)
    return WorkItem(
        num_tokens=num_tokens,
        kv_position=kv_position,
        entry=seq.index * p.pages_per_seq + divide(kv_position, p.page_size),
        q_row=block.q_row,
        q_len=block.q_len,
        position=block.position,
        num_cached=seq.num_cached,
        is_first=(cursor.kv_index == 0).astype(jnp.int32),
        is_last=(left <= bkv).astype(jnp.int32),
        q_slot=cursor.q_slot,
        kv_slot=cursor.kv_slot,
        exists=num_tokens > 0,
    )


def first_active(plan, refs, index, end):
    """The first sequence from `index` on that is not idle, or `end`."""

    def is_idle(i):
        seq = sequence(plan, refs, i)
        has_work = (seq.q_len > 0) & (seq.kv_len >= seq.q_len)  # and lengths that make sense
        return (i < end) & jnp.logical_not(has_work)

    return lax.while_loop(is_idle, lambda i: i + 1, index)


def start(plan, refs, first, end):
    """The cursor at the first work item of sequences [first, end)."""
    zero = jnp.int32(0)
    # From here on indices only grow, so a wrong `distribution` cannot make one negative.
    first = jnp.maximum(jnp.minimum(first, end), 0)
    index = first_active(plan, refs, first, end)
    return Cursor(sequence(plan, refs, index), zero, zero, zero, zero)


def advance(plan, refs, cursor, item, end):
    """The cursor behind its work item; its sequence is `end` if that was the last."""
    next_q = item.is_last != 0
    next_seq, q_index = next_q, cursor.q_index
    if not plan.has_one_query_block:
        q_index = jnp.where(next_q, q_index + 1, q_index)
        next_seq = q_index == divide_up(cursor.seq.q_len, plan.blocks.bq)
        q_index = jnp.where(next_seq, 0, q_index)
    index = cursor.seq.index
    index = first_active(plan, refs, jnp.where(next_seq, index + 1, index), end)
    return Cursor(
        sequence(plan, refs, index),
        q_index,
        jnp.where(next_q, 0, cursor.kv_index + 1),
        jnp.where(next_q, next_slot(cursor.q_slot, plan.num_slots), cursor.q_slot),
        next_slot(cursor.kv_slot, plan.num_slots),
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
