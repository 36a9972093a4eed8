"""One kernel of a call: a problem, the tiles it is cut into, and the tricks that make it fast.

Words that all files use:

    block       bq query tokens or bkv KV tokens, which are fetched together
    sub-block   bq_c query tokens (q_sub) or bkv_c keys (kv_sub) of a block: one product
    head group  the KV heads of one product, and all query heads that read them
    tile        the rows of one head group and one q_sub: [rows, lanes], ordered as in `layout`
    work item   one KV block of one query block of one sequence, see `traversal`
    iteration   of the kernel's loop; it computes `items_per_iteration` work items together
    slot        one of num_slots buffers of a kind
    word        32 bits; they hold as many values, of neighbouring heads, as the dtype's packing
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from rpa.chips import SUBLANES
from rpa.kernel import page_table, tricks
from rpa.kernel.cases import Case
from rpa.kernel.problem import Problem, align


class BlockSizes(NamedTuple):
    """Tokens per block, in the order of the public `*_block_sizes` tuples."""

    bq: int  # query tokens that are fetched, and whose output is sent, together
    bkv: int  # KV tokens that are fetched together; a multiple of page_size
    bq_c: int  # query tokens in one product; divides bq
    bkv_c: int  # KV tokens in one product; divides bkv


class Tiles(NamedTuple):
    """How queries, scores and accumulators are cut; everything that `layout` has to know."""

    num_groups: int  # head groups
    heads_per_group: int
    q_per_kv: int  # query heads per KV head, padded to whole 32-bit words
    row_packing: int  # query heads in a 32-bit word
    num_q_subs: int  # of a query block
    q_sub: int  # query tokens of one: bq_c
    q_sub_rows: int  # bq_c rounded up to whole registers; rows past bq_c are never stored
    kv_sub: int  # keys of one: bkv_c
    head_lanes: int  # head_dim, padded
    compute_dtype: np.dtype
    shares_lanes: bool  # whether K and V of a head share the lanes of the cache

    @property
    def is_one_token(self):
        """Whether a query block is one token: then its word rows, not its tokens, fill a tile."""
        return self.num_q_subs * self.q_sub == 1

    @property
    def rows(self):
        """Rows of a tile."""
        return self.heads_per_group * self.q_per_kv * self.q_sub_rows

    @property
    def lanes(self):
        """Columns of a tile's accumulator: the heads of its group side by side."""
        return self.heads_per_group * self.head_lanes

    @property
    def mask_rows(self):
        """Rows that the mask differs in: the one token of a decode stands in all rows."""
        return self.rows if self.is_one_token else self.q_sub_rows

    @property
    def buffer_tokens(self):
        """Query tokens of a q or o buffer: the last sub-block may reach past bq."""
        return (self.num_q_subs - 1) * self.q_sub + self.q_sub_rows


@dataclass(frozen=True)
class Plan:
    """One kernel, resolved: hashable, a static argument of `jax.jit`.

    Attributes:
        problem, case, blocks: what is computed, for which sequences, in which blocks.
        interpret: whether it runs in the interpreter, which knows no bitcasts (see `layout`).
        is_last: whether it is the last kernel of the call, which fills the rows of no sequence.
        max_q_len: the most new tokens of a sequence, or None for any number.
        mxu_size: side of the chip's MXU, see `rpa.chips.Chip`.
        native_float8: whether the chip's MXU multiplies float8; if not, it is widened first.
        iterations_ahead: iterations whose copies are in flight while one is computed.
        has_small_tiles: whether this is the `in_small_tiles` of a plan.
    """

    problem: Problem
    case: Case
    blocks: BlockSizes
    interpret: bool
    is_last: bool
    max_q_len: int | None = None
    mxu_size: int = 256
    native_float8: bool = False
    iterations_ahead: int = 1
    has_small_tiles: bool = False

    @property
    def is_decode(self):
        """Whether every sequence has one new token: then `decode` computes, otherwise `mixed`."""
        return self.blocks.bq == 1 and self.max_q_len == 1

    @property
    def has_one_query_block(self):
        """Whether all new tokens of any sequence fit in one query block, as a decode's do."""
        return self.max_q_len is not None and self.max_q_len <= self.blocks.bq

    @cached_property
    def tricks(self) -> tricks.Tricks:
        """Its optimisations."""
        chip = (self.mxu_size, self.native_float8)
        return tricks.choose(self.problem, self.blocks, self.is_decode, self.has_small_tiles, *chip)

    @cached_property
    def tiles(self) -> Tiles:
        """How it is cut."""
        p, b, heads = self.problem, self.blocks, self.tricks.heads_per_group
        return Tiles(
            num_groups=p.num_kv_heads // heads,
            heads_per_group=heads,
            q_per_kv=p.padded_q_per_kv,
            row_packing=p.row_packing,
            num_q_subs=b.bq // b.bq_c,
            q_sub=b.bq_c,
            q_sub_rows=1 if b.bq == 1 else align(b.bq_c, SUBLANES),
            kv_sub=b.bkv_c,
            head_lanes=p.lanes,
            compute_dtype=p.compute_dtype,
            shares_lanes=p.shares_lanes,
        )

    @cached_property
    def table(self) -> page_table.Chunks:
        """How its page table is cut."""
        return page_table.chunks(self.problem, self.blocks.bkv)

    @cached_property
    def in_small_tiles(self):
        """This plan with tiles for query blocks that fill a quarter of a large one, or None.

        The small tiles lie in the memory of the first large one, as many as there are tokens for.
        """
        if self.tricks.small_q_sub is None:
            return None
        blocks = self.blocks._replace(bq_c=self.tricks.small_q_sub)
        return replace(self, blocks=blocks, has_small_tiles=True)

    @property
    def num_slots(self):
        """Buffers of each kind: one iteration is computed while others are fetched."""
        return (1 + self.iterations_ahead) * self.tricks.items_per_iteration

    @property
    def depth(self):
        """Iterations from looking an item up to computing it, both included."""
        return tricks.TABLE_ITERATIONS + self.iterations_ahead + 1

    @property
    def ring_items(self):
        """Work items in flight."""
        return self.depth * self.tricks.items_per_iteration
