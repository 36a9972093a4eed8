"""What a call computes, as far as it is known before it runs: shapes, dtypes, options."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from rpa.paging import LANES, cdiv, packing_of


def align(x, multiple):
    """The next multiple at or above x.

    >>> align(80, 128)
    128
    """
    return cdiv(x, multiple) * multiple


@dataclass(frozen=True)
class Problem:
    """The static part of one call of the public function.

    It is frozen and hashable, a static argument of `jax.jit`. Lengths, the page table and all
    scales are traced instead: they change from call to call without a recompilation.

    Attributes:
        num_tokens, num_q_heads, num_kv_heads, head_dim, num_pages, page_size, max_num_seqs,
            pages_per_seq: sizes of its arrays, see `rpa.RaggedBatch`; page_size is in tokens.
        q_dtype, kv_dtype, out_dtype: of queries, cache and output.
        causal, update_kv_cache, sliding_window, return_lse, debug_mode: as passed; the window in
            tokens.
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
    return_lse: bool = False
    shares_lanes: bool = False
    debug_mode: bool = False

    @property
    def head_lanes(self):
        """head_dim padded to whole rows of 128 lanes, as the cache holds it."""
        return align(self.head_dim, LANES)

    @property
    def q_per_kv(self):
        """Query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def row_packing(self):
        """Query heads that share a 32-bit word in the queries or in the output, whichever is more.

        Queries and output are cut into tiles by the larger of the two, so that a row of a tile is
        the same (token, head) in both, also if queries are bfloat16 and the output is float32.
        """
        return max(packing_of(self.q_dtype), packing_of(self.o_dtype))

    @property
    def o_dtype(self):
        """What the kernel writes its output in: an lse next to it needs float32."""
        return np.dtype(np.float32) if self.return_lse else self.out_dtype

    @property
    def padded_q_per_kv(self):
        """`q_per_kv` rounded up so that no 32-bit word holds query heads of two KV heads."""
        return align(self.q_per_kv, self.row_packing)

    @property
    def q_shape(self):
        """One token's (padded) query heads: (words, packing, head_lanes)."""
        packing = packing_of(self.q_dtype)
        return self.num_kv_heads * self.padded_q_per_kv // packing, packing, self.head_lanes

    @property
    def o_shape(self):
        """One token's output: (words, packing, o_lanes); the lse is in the last 128 lanes."""
        packing = packing_of(self.o_dtype)
        o_lanes = self.head_lanes + (LANES if self.return_lse else 0)
        return self.num_kv_heads * self.padded_q_per_kv // packing, packing, o_lanes

    @property
    def kv_shape(self):
        """One token in the cache: (words, packing, head_lanes)."""
        packing = packing_of(self.kv_dtype)
        combined_heads = self.num_kv_heads if self.shares_lanes else 2 * self.num_kv_heads
        return cdiv(combined_heads, packing), packing, self.head_lanes

    @property
    def compute_dtype(self):
        """What the MXU multiplies: float32 if anything is, else bfloat16 (float8 is widened)."""
        exact = np.dtype(np.float32) in (self.q_dtype, self.kv_dtype)
        return np.dtype(jnp.float32 if exact else jnp.bfloat16)
