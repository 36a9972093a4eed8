"""One kernel of a call: a problem, the tiles it is cut into, and the tricks that make it fast."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from jax.experimental.pallas.tpu import InterpretParams

from rpa.chips import CHIPS, SUBLANES
from rpa.kernel import page_table, tricks
from rpa.kernel.cases import Case
from rpa.kernel.problem import Problem, align

SMALLEST_VMEM_BYTES = min(chip.vmem_bytes for chip in CHIPS.values())
"""What a kernel may take where the chip is not known: what fits there fits everywhere."""


class BlockSizes(NamedTuple):
    """Tokens per block, in the order of the public `*_block_sizes` tuples."""

    bq: int  # query tokens that are fetched, and whose output is sent, together
    bkv: int  # KV tokens that are fetched together; a multiple of page_size
    bq_c: int  # query tokens in one product; divides bq
    bkv_c: int  # KV tokens in one product; divides bkv


@dataclass(frozen=True)
class Tiles:
    """How queries, scores and accumulators are cut; everything that `layout` has to know."""

    problem: Problem
    blocks: BlockSizes
    heads_per_group: int

    @property
    def num_groups(self):
        """Head groups."""
        return self.problem.num_kv_heads // self.heads_per_group

    @property
    def num_q_subs(self):
        """Sub-blocks of a query block."""
        return self.blocks.bq // self.blocks.bq_c

    @property
    def is_one_token(self):
        """Whether a query block is one token: then its word rows, not its tokens, fill a tile."""
        return self.blocks.bq == 1

    @property
    def q_sub_rows(self):
        """bq_c rounded up to whole registers; rows past bq_c are never stored."""
        return 1 if self.is_one_token else align(self.blocks.bq_c, SUBLANES)

    @property
    def rows_per_head(self):
        """Word rows that hold the query heads of one KV head, of one token."""
        return self.problem.padded_q_per_kv // self.problem.row_packing

    @property
    def rows(self):
        """Rows of a tile."""
        return self.heads_per_group * self.problem.padded_q_per_kv * self.q_sub_rows

    @property
    def group_lanes(self):
        """Columns of a tile's accumulator: the heads of its group side by side."""
        return self.heads_per_group * self.problem.head_lanes

    @property
    def mask_rows(self):
        """Rows that the mask differs in: the one token of a decode stands in all rows."""
        return self.rows if self.is_one_token else self.q_sub_rows

    @property
    def buffer_tokens(self):
        """Query tokens of a q or o buffer: the last sub-block may reach past bq."""
        return self.blocks.bq - self.blocks.bq_c + self.q_sub_rows


@dataclass(frozen=True)
class Plan:
    """One kernel, resolved: hashable, a static argument of `jax.jit`.

    Attributes:
        problem, case, blocks: what is computed, for which sequences, in which blocks.
        max_q_len: the most new tokens of a sequence, or None for any number.
        interpret: the interpreter's parameters, or None where it is compiled. The interpreter knows
            no bitcasts, see `layout`.
        vmem_limit_bytes: VMEM that it may take.
        disable_bounds_checks, disable_semaphore_checks: options of the compiler.
        mxu_size: side of the chip's MXU, see `rpa.chips.Chip`.
        native_float8: whether the chip's MXU multiplies float8; if not, it is widened first.
        iterations_ahead: iterations whose copies are in flight while one is computed.
        has_small_tiles: whether this is the `in_small_tiles` of a plan.
    """

    problem: Problem
    case: Case
    blocks: BlockSizes
    max_q_len: int | None = None
    interpret: InterpretParams | None = None
    vmem_limit_bytes: int = SMALLEST_VMEM_BYTES
    disable_bounds_checks: bool = True
    disable_semaphore_checks: bool = True
    mxu_size: int = 256
    native_float8: bool = False
    iterations_ahead: int = 1
    has_small_tiles: bool = False

    @cached_property
    def is_decode(self):
        """Whether `decode` computes it, and not `mixed`: one token per query block and sequence.

        A caller's d_block_sizes may ask for larger query blocks; then `mixed` computes `DECODE`.
        """
        return self.blocks.bq == 1 and self.max_q_len == 1

    @cached_property
    def has_one_query_block(self):
        """Whether all new tokens of any sequence fit in one query block, as a decode's do."""
        return self.max_q_len is not None and self.max_q_len <= self.blocks.bq

    @cached_property
    def tricks(self) -> tricks.Tricks:
        """Its optimisations."""
        return tricks.choose(self)

    @cached_property
    def tiles(self) -> Tiles:
        """How it is cut."""
        return Tiles(self.problem, self.blocks, self.tricks.heads_per_group)

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

    @cached_property
    def num_slots(self):
        """Buffers of each kind: one iteration is computed while others are fetched."""
        return (1 + self.iterations_ahead) * self.tricks.items_per_iteration

    @cached_property
    def depth(self):
        """Iterations from looking an item up to computing it, both included."""
        return tricks.TABLE_ITERATIONS + self.iterations_ahead + 1

    @cached_property
    def ring_items(self):
        """Work items in flight."""
        return self.depth * self.tricks.items_per_iteration
