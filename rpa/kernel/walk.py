"""Who comes next: the order in which a kernel visits sequences, query blocks and KV blocks.

Copies are started one KV block ahead of the computation, across the ends of query blocks and of
sequences, because a pipeline that drains at every sequence end waits for HBM at each of them. So
two places walk the same path: the loop nest (`loop`) and, one block ahead of it, a cursor in SMEM
that says what to fetch next. What both must agree on, the blocks of a sequence, is written here
once.

Idle sequences (q_len 0) have no blocks and are passed over, wherever they are.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from rpa.paging import cdiv

(
    NEXT_SEQ,  # the cursor: the KV block that will be fetched next,
    NEXT_Q_BLOCK,  # whose page-table entries are on their way
    NEXT_KV_BLOCK,
    KV_FETCHED,  # counts KV blocks; their parity is the buffer slot
    KV_USED,
    Q_FETCHED,  # counts query blocks, likewise
    Q_USED,
    ROWS_LEAVING,  # 2 words: output rows that slot 0 and slot 1 are still sending
    _,
    TOKENS_STORED,  # tokens on their way into the cache
    NUM_STATE_WORDS,
) = range(11)


class Sequence(NamedTuple):
    """One sequence of the batch; all scalars."""

    index: Any
    q_start: Any  # row of its first new token in queries, keys and values
    q_len: Any
    kv_len: Any

    @property
    def first_new(self):
        """Position of its first new token."""
        return self.kv_len - self.q_len


class QueryBlock(NamedTuple):
    """bq query tokens of a sequence, and the keys that at least one of them sees."""

    seq: Sequence
    row: Any  # of its first token in queries
    num_rows: Any
    position: Any  # of its first token in the sequence
    kv_start: Any  # first position that is fetched: a page's first
    kv_end: Any  # one behind the last


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
    return cdiv(seq.q_len, plan.blocks.bq)


def query_block(plan, seq, index):
    """The query block `index` of a sequence."""
    p, first_row = plan.problem, index * plan.blocks.bq
    num_rows = jnp.minimum(plan.blocks.bq, seq.q_len - first_row)
    position = seq.first_new + first_row
    kv_start = jnp.int32(0)
    if p.sliding_window is not None:
        first_seen = jnp.maximum(position - p.sliding_window + 1, 0)
        kv_start = first_seen // p.page_size * p.page_size
    kv_end = position + num_rows if p.causal else seq.kv_len
    return QueryBlock(seq, seq.q_start + first_row, num_rows, position, kv_start, kv_end)


def num_kv_blocks(plan, block):
    """Blocks of bkv tokens from kv_start on; at least one, a token sees itself."""
    return cdiv(block.kv_end - block.kv_start, plan.blocks.bkv)


def kv_block_start(plan, block, index):
    """Position of the first token of a KV block."""
    return block.kv_start + index * plan.blocks.bkv


def kv_block_tokens(plan, block, index):
    """Tokens in a KV block: bkv, or what is left."""
    return jnp.minimum(plan.blocks.bkv, block.kv_end - kv_block_start(plan, block, index))


def first_active(plan, refs, index, end):
    """The first sequence at or behind `index` that is not idle, or `end`."""

    def idle(i):
        # `end` itself is never read, it may be behind the arrays; without sequences it is 0.
        seq = sequence(plan, refs, jnp.maximum(jnp.minimum(i, end - 1), 0))
        return (i < end) & jnp.logical_not(is_active(seq))

    return lax.while_loop(idle, lambda i: i + 1, index)


def cursor_block(plan, refs):
    """The query block under the cursor."""
    seq = sequence(plan, refs, refs.state[NEXT_SEQ])
    return query_block(plan, seq, refs.state[NEXT_Q_BLOCK])


def advance(plan, refs, block, end):
    """Move the cursor on to the next KV block: of the query block, the sequence, the batch."""
    state = refs.state
    kv_index = state[NEXT_KV_BLOCK] + 1
    next_q = kv_index == num_kv_blocks(plan, block)
    q_index = jnp.where(next_q, state[NEXT_Q_BLOCK] + 1, state[NEXT_Q_BLOCK])
    next_seq = q_index == num_query_blocks(plan, block.seq)
    state[NEXT_KV_BLOCK] = jnp.where(next_q, 0, kv_index)
    state[NEXT_Q_BLOCK] = jnp.where(next_seq, 0, q_index)

    seq = block.seq.index
    state[NEXT_SEQ] = first_active(plan, refs, jnp.where(next_seq, seq + 1, seq), end)
