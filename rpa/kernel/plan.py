"""Everything about one kernel call that is known before it runs: shapes, options, blocks, tiles.

A `Problem` describes the call of the public function, a `Plan` one of its (up to three) kernels.
Both are frozen and hashable, so they are static arguments of `jax.jit`: what is in them is compiled
in, what is not (lengths, page table, scales) can change from step to step without a recompilation.

Words that all rooms use:

    block   bq query tokens or bkv KV tokens, which are fetched together
    piece   bq_c query tokens or bkv_c keys of a block, which one product takes; in `decode` keys
            of the products that are computed in a row
    dot     one product, of heads_per_group KV heads and all query heads that read them
    tile    its rows: [tile_rows, lanes], in which order is said in `layout`
    step    one KV block of one query block of one sequence, see `traversal`
    iteration    one round of the kernel's loop; items_per_iteration steps are computed together in
    it slot    one of num_slots buffers of a kind
    word    32 bits; they hold as many values, of neighbouring heads, as the dtype's packing
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from rpa import compat
from rpa.chips import SUBLANES
from rpa.kernel.cases import Case
from rpa.kernel.traversal import ITEM_WORDS
from rpa.paging import LANES, cdiv, packing_of

TABLE_TILE_WORDS = compat.SMEM_TILE_WORDS
"""The page table goes to SMEM in pieces that start at, and are, a multiple of this."""

PAGES_UNROLLED = 8
"""Copies of pages that are issued in a row: an iteration of a loop costs about as much as two
copies."""

TABLE_ITERATIONS = 2
"""Turns from a copy of page-table entries to its use: a short iteration ends before it arrives."""

MAX_TOKENS_FOR_FOUR = 256
"""KV blocks of a decode with a window this short are computed by fours, not by twos."""

DECODE_QK_AHEAD = 7
"""Chains of a decode (see `decode`) that have started when the values of one are multiplied."""

MIN_LANES_TO_SWAP = 384
"""Dots of a decode with so many lanes iteration some of their keys, see `mxu`."""

SMALL_TILE_ROWS, MIN_TOKENS_TO_CUT = 256, 256
"""Rows of small tiles, and the bq_c from which on a plan has them, see `Plan.in_small_tiles`."""

MAX_ROWS_PER_HEAD_GROUP, MAX_LANES_PER_HEAD_GROUP = 16, 512
"""How far decode stacks KV heads in one dot: 16 rows fill the registers of a bfloat16 product."""


def align(x, multiple):
    """The next multiple at or above x.

    >>> align(80, 128)
    128
    """
    return cdiv(x, multiple) * multiple


@dataclass(frozen=True)
class BlockSizes:
    """Tokens per block, in the order of the public `*_block_sizes` tuples.

    Attributes:
        bq: query tokens that are fetched, and whose output is sent, together.
        bkv: KV tokens that are fetched together; a multiple of page_size.
        bq_c: query tokens in one product; divides bq.
        bkv_c: KV tokens in one product; divides bkv.
    """

    bq: int
    bkv: int
    bq_c: int
    bkv_c: int


@dataclass(frozen=True)
class Problem:
    """The static part of one call of the public function.

    Attributes:
        num_tokens, num_q_heads, num_kv_heads, head_dim, num_pages, page_size, max_num_seqs,
            pages_per_seq: sizes of its arrays, see `rpa.RaggedBatch`; page_size is in tokens.
        q_dtype, kv_dtype, out_dtype: of queries, cache and output.
        causal, update_kv_cache, sliding_window, debug_mode: as passed; the window in tokens.
        has_soft_cap, has_q_scale, has_sinks: whether there is one; its value is not compiled in.
        shares_lanes: whether K and V of a head share the lanes of the cache, see `rpa.paging`.
    """

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    pages_per_seq: int
    q_dtype: np.dtype
    kv_dtype: np.dtype
    out_dtype: np.dtype
    causal: bool = True
    update_kv_cache: bool = True
    sliding_window: int | None = None
    has_soft_cap: bool = False
    has_q_scale: bool = False
    has_sinks: bool = False
    shares_lanes: bool = False
    debug_mode: bool = False

    @property
    def lanes(self):
        """head_dim padded to whole rows of 128 lanes, as the cache holds it."""
        return align(self.head_dim, LANES)

    @property
    def q_per_kv(self):
        """Query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def row_packing(self):
        """Query heads that share a 32-bit word in the queries or in the output, whichever is more.

        Both are cut into tiles in steps of it, so that a row of a tile is the same (token, head)
        on the way in and on the way out, also where a bfloat16 query has a float32 output.
        """
        return max(packing_of(self.q_dtype), packing_of(self.out_dtype))

    @property
    def padded_q_per_kv(self):
        """`q_per_kv` rounded up so that no 32-bit word holds query heads of two KV heads."""
        return align(self.q_per_kv, self.row_packing)

    def head_words(self, dtype):
        """32-bit rows of one token's (padded) query heads in queries or output."""
        return self.num_kv_heads * self.padded_q_per_kv // packing_of(dtype)

    @property
    def kv_words(self):
        """32-bit rows of one token in the cache."""
        rows = self.num_kv_heads if self.shares_lanes else 2 * self.num_kv_heads
        return cdiv(rows, packing_of(self.kv_dtype))

    @property
    def compute_dtype(self):
        """What the MXU multiplies: float32 if anything is, else bfloat16 (float8 is widened)."""
        exact = np.dtype(np.float32) in (self.q_dtype, self.kv_dtype)
        return np.dtype(jnp.float32 if exact else jnp.bfloat16)

    @property
    def max_kv_len(self):
        """Tokens that one row of the page table has room for."""
        return self.pages_per_seq * self.page_size


@dataclass(frozen=True)
class Plan:
    """One kernel: a problem, the sequences it computes, its block sizes, where it runs.

    Attributes:
        problem, case, blocks: see there.
        interpret: whether it runs in the interpreter, which knows no bitcasts (see `layout`).
        is_last: whether it is the last kernel of the call, which fills the rows that nobody owns.
        max_q_len: the most new tokens of a sequence, or None for any number.
        mxu_size: side of the chip's MXU, see `rpa.chips.Chip`.
        native_float8: whether the chip's MXU multiplies float8; if not, it is widened first.
        iterations_ahead: iterations whose copies are on their way while one is computed, see
        `belt`. has_small_tiles: whether this is the `in_small_tiles` of a plan.
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

    @cached_property
    def in_small_tiles(self):
        """This plan with tiles for query blocks that fill a quarter of a large one, or None.

        A large tile takes its time however few of its tokens exist: a sequence with four new ones,
        as after a speculation, would wait for 256. The small tiles lie in the memory of the first
        large one, as many as there are tokens for. They have code of their own, all of it masked.
        """
        size = max(SUBLANES, SMALL_TILE_ROWS // self.problem.padded_q_per_kv // SUBLANES * SUBLANES)
        b = self.blocks
        if self.has_small_tiles or b.bq_c < MIN_TOKENS_TO_CUT or b.bq_c < 2 * size:
            return None
        return replace(self, blocks=replace(b, bq_c=size), has_small_tiles=True)

    @property
    def masks_always(self):
        """Whether a block that needs no mask runs the code of one that does.

        A second copy of the code takes its time to compile. In a decode of one dot it would save
        up to 3 % of the cycles. Where the MXU does not multiply float8, it would save 7 to 10 %,
        but widening keeps the vector unit busy from end to end, and is most of the code.
        """
        has_one_head_group = self.is_decode and self.num_head_groups == 1
        return self.widens_float8 or has_one_head_group or self.has_small_tiles

    @property
    def widens_float8(self):
        """Whether the MXU does not multiply what the cache holds."""
        return self.problem.kv_dtype.itemsize == 1 and not self.native_float8

    @property
    def uses_idle_mxu(self):
        """Whether products of this kernel leave half of the MXU idle, see `mxu`.

        Decode fills the depth of the MXU with several heads, and float32 takes it three times.
        """
        idle = 2 * self.tile_lanes <= self.mxu_size
        return idle and self.blocks.bq > 1 and self.problem.compute_dtype != np.float32

    @cached_property
    def heads_per_group(self):
        """KV heads whose products share one dot, block-diagonally.

        Decode has a handful of query rows a head: too few to hide the latency of the MXU and of the
        softmax. Several heads in one dot cost the MXU nothing (it is busy with K and V, which it
        takes in or lets through once) and fill the rows. With many query tokens it only wastes.
        """
        p = self.problem
        if self.blocks.bq > 1:
            return 1
        fits = [
            d
            for d in range(1, p.num_kv_heads + 1)
            if p.num_kv_heads % d == 0
            and d * p.padded_q_per_kv <= MAX_ROWS_PER_HEAD_GROUP
            and d * p.lanes <= MAX_LANES_PER_HEAD_GROUP
        ]
        return max(fits, default=1)

    @property
    def num_head_groups(self):
        """Tiles that hold all heads."""
        return self.problem.num_kv_heads // self.heads_per_group

    @property
    def is_decode(self):
        """Whether there is one query token a sequence, and so the room `decode` computes."""
        return self.blocks.bq == 1 and self.max_q_len == 1

    @property
    def swaps_operands(self):
        """Whether some keys of a product go through the MXU, instead of being its weights.

        See `mxu`. Turned keys cost registers of results, one for 8 keys of a dot; in a dot of few
        lanes that mostly is more than it saves. Float32 goes through in six passes: MATMUL is full.
        """
        is_exact = self.problem.compute_dtype == np.float32
        return self.is_decode and self.tile_lanes >= MIN_LANES_TO_SWAP and not is_exact

    @property
    def items_per_iteration(self):
        """KV blocks that are computed together: the less work in one, the more fill the time."""
        if not self.is_decode:
            return 1
        is_short = (
            self.problem.sliding_window is not None and self.blocks.bkv <= MAX_TOKENS_FOR_FOUR
        )
        return 4 if is_short or self.num_head_groups == 1 else 2

    @property
    def num_slots(self):
        """Buffers of each kind: an iteration's steps are computed while those of others are
        fetched."""
        return (1 + self.iterations_ahead) * self.items_per_iteration

    @property
    def ring_iterations(self):
        """Turns whose steps are looked up and not yet computed, and the one being looked up."""
        return TABLE_ITERATIONS + self.iterations_ahead + 1

    @property
    def ring_items(self):
        """Steps of these iterations."""
        return self.ring_iterations * self.items_per_iteration

    @property
    def ring_words(self):
        """Words of SMEM for these steps."""
        return self.ring_items * ITEM_WORDS

    @property
    def products_unrolled(self):
        """Products of bkv_c keys that a decode computes together: of one dot four, else two."""
        if self.widens_float8:
            return 1  # one product leaves no unit idle, and is half of the code
        most = 4 if self.num_head_groups == 1 else 2
        return math.gcd(most, self.blocks.bkv // self.blocks.bkv_c)

    @property
    def has_one_query_block(self):
        """Whether all new tokens of any sequence fit in one query block, as a decode's do."""
        return self.max_q_len is not None and self.max_q_len <= self.blocks.bq

    @property
    def num_q_subs(self):
        """Compute blocks of bq_c query tokens in a block of bq."""
        return self.blocks.bq // self.blocks.bq_c

    @property
    def q_sub_rows(self):
        """bq_c, rounded up to whole registers; rows past bq_c are computed and never stored."""
        return 1 if self.blocks.bq == 1 else align(self.blocks.bq_c, SUBLANES)

    @property
    def tile_rows(self):
        """Rows of one dot's scores and accumulator; `layout` says which (head, token) each is."""
        return self.heads_per_group * self.problem.padded_q_per_kv * self.q_sub_rows

    @property
    def tile_lanes(self):
        """Columns of one dot's accumulator."""
        return self.heads_per_group * self.problem.lanes

    @property
    def mask_rows(self):
        """Rows of a tile that the mask differs in: the one token of a decode stands in all rows."""
        return self.tile_rows if self.blocks.bq == 1 else self.q_sub_rows

    @property
    def buffer_tokens(self):
        """Query tokens that a q or o buffer has room for: the last piece may reach past bq."""
        return (self.num_q_subs - 1) * self.blocks.bq_c + self.q_sub_rows

    @property
    def kv_buffer_words(self):
        """32-bit rows from token to token in the KV buffer: odd, and so often one more than needed.

        Reading one head of many tokens takes every kv_buffer_words-th row. With an even distance
        the rows lie in few of VMEM's banks, and a load waits for the one before.
        """
        return self.problem.kv_words | 1

    @property
    def whole_pages(self):
        """Pages that fill a block of bkv tokens."""
        return self.blocks.bkv // self.problem.page_size

    @property
    def pages_per_block(self):
        """Pages that a block of bkv tokens touches: a window may begin inside of one."""
        return self.whole_pages + (self.problem.sliding_window is not None)

    @property
    def pages_unrolled(self):
        """Whole pages that are copied in one iteration of a loop."""
        return min(PAGES_UNROLLED, self.whole_pages)

    @property
    def table_reach(self):
        """Page-table entries that are read for a KV block, also of pages that are not there."""
        passed_over = align(self.whole_pages, self.pages_unrolled) - self.whole_pages
        return self.pages_per_block + passed_over

    @property
    def table_chunk_words(self):
        """Page-table entries fetched for a KV block: its pages, wherever they begin in a tile."""
        return align(self.table_reach + TABLE_TILE_WORDS - 1, TABLE_TILE_WORDS)

    @property
    def table_words(self):
        """Words of the page table in HBM, padded so that the last chunk ends inside it."""
        entries = self.problem.max_num_seqs * self.problem.pages_per_seq
        return max(align(entries + self.table_reach, TABLE_TILE_WORDS), self.table_chunk_words)
