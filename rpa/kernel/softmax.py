"""The online softmax of one tile: scores, running maximum and sum, accumulated values.

A softmax over all keys needs its maximum first. Online (Milakov and Gimelshein 2018, arXiv
1805.02867; FlashAttention-2, arXiv 2307.08691) the keys come in blocks, and what was summed so far
is rescaled whenever a larger maximum appears:

    m' = max(m, max(s));  l' = 2^(m - m') l + sum 2^(s - m');  acc' = 2^(m - m') acc + 2^(s - m') V

Powers of two, because that is what the hardware has: log2(e) is folded into the factor that the
scores are multiplied with anyway. The state is float32 at any length: a bfloat16 sum stops growing
at 256 equal terms. `l` is kept as 128 partial sums, one per lane, and added up once at the end; or,
where the MXU is half idle, it is a product like the values (see `mxu`).
"""

import jax.numpy as jnp
from jax import lax

from rpa.kernel import layout, mxu
from rpa.paging import LANES, cdiv
from rpa.ragged import quantize
from rpa.tiled import dot

LOWEST_MAX = -1e30
"""Where the running maximum starts. Finite, so that (masked - maximum) is -inf and never NaN."""

SCORE_FACTOR, CAP_FACTOR, QUERY_SCALE, VALUE_SCALE = range(4)
"""Indices in `scalars`, f32[4]: the scales, traced so that a new scale needs no compilation.

    SCORE_FACTOR   Q K^T is multiplied with it: all scales and log2(e), or all scales / soft_cap
    CAP_FACTOR     tanh is multiplied with it: soft_cap log2(e); 1 without a cap
    QUERY_SCALE    queries are divided by it before they are rounded to the cache's dtype
    VALUE_SCALE    the output is multiplied with it
"""

LOG2_E = 1.4426950408889634
"""exp(x) = 2^(x log2(e))"""


def make_scalars(options):
    """The factors of the kernel from the scales of a `rpa.ragged.AttentionOptions`, f32[4].

    >>> from rpa.ragged import AttentionOptions
    >>> make_scalars(AttentionOptions(v_scale=2.0))[VALUE_SCALE]
    Array(2., dtype=float32)
    """
    given = (options.sm_scale, options.q_scale, options.k_scale, options.v_scale)
    log2_e, one = jnp.float32(LOG2_E), jnp.float32(1)
    sm_scale, q_scale, k_scale, v_scale = (one if x is None else jnp.float32(x) for x in given)
    score = sm_scale * q_scale * k_scale
    if options.soft_cap is None:
        return jnp.stack([score * log2_e, one, q_scale, v_scale])
    cap = jnp.float32(options.soft_cap)
    return jnp.stack([score / cap, cap * log2_e, q_scale, v_scale])


class Softmax:
    """The arithmetic of a plan's tiles."""

    def __init__(self, plan, refs):
        self.tiles, self.problem, self.mxu_size = plan.tiles, plan.problem, plan.mxu_size
        self.scalars, self.sinks = refs.scalars, refs.sinks
        self.tricks = plan.tricks

    def queries(self, tile):
        """The left side of a tile's scores, [rows, group_lanes (x 2)] in the compute dtype.

        Args:
            tile: f32[rows, head_lanes], as of `layout.load_q_tile`.
        """
        p = self.problem
        if p.has_q_scale:
            tile = quantize(tile, self.scalars[QUERY_SCALE], p.kv_dtype).astype(jnp.float32)
        tile = layout.spread_heads(self.tiles, tile)
        if self.tricks.uses_idle_mxu:
            return mxu.split_queries(tile, self.scalars[SCORE_FACTOR], p.compute_dtype)
        return tile.astype(p.compute_dtype)

    def scores(self, q, k, mask_limits):
        """Scores of one tile in units of log2, f32[rows, bkv_c].

        Args:
            q: what `queries` returns; k: [bkv_c, group_lanes] in the compute dtype.
            mask_limits: f32[mask_rows, bkv_c], what a score can be at most: inf where a query sees
                a key, else -inf; None if all see all. Rows repeat: rows is a multiple of mask_rows.
        """
        if self.tricks.uses_idle_mxu:
            s = dot(q, mxu.double_keys(k), contract=(1, 1))
        elif self.tricks.swaps_operands:
            s = mxu.product(q, k, self.mxu_size) * self.scalars[SCORE_FACTOR]
        else:
            s = dot(q, k, contract=(1, 1)) * self.scalars[SCORE_FACTOR]
        if self.problem.has_soft_cap:
            s = jnp.tanh(s) * self.scalars[CAP_FACTOR]
        if mask_limits is None:
            return s
        # A load and a minimum, one instruction per register each. A mask would be compared again
        # for every head: there are few registers for masks, and none survives to the next head.
        folded = s.reshape(-1, *mask_limits.shape)
        return jnp.minimum(folded, mask_limits[...][None]).reshape(s.shape)

    def weighted_values(self, p, v):
        """P V of one tile, f32[rows, group_lanes], and next to it their sum from an idle MXU."""
        v = mxu.append_ones(v) if self.tricks.uses_idle_mxu else v
        return dot(p.astype(v.dtype), v, contract=(1, 0))

    def nothing_seen(self, group):
        """The running maximum and sum of a head group before the first key, each f32[rows, 128].

        A sink is a key without a value: the state then starts as if its score had been seen.
        """
        shape = (self.tiles.rows, LANES)
        if self.sinks is None:
            return jnp.full(shape, LOWEST_MAX, jnp.float32), jnp.zeros(shape, jnp.float32)
        sinks = self.sinks[group]  # see `layout.sink_tiles`
        rows = (len(sinks), self.tiles.q_sub_rows, LANES)
        score = jnp.broadcast_to(sinks[:, None], rows).reshape(shape) * LOG2_E
        m = jnp.maximum(score, LOWEST_MAX)
        lane = lax.broadcasted_iota(jnp.int32, m.shape, 1)
        weight = jnp.exp2(score - m)
        return m, weight if self.tricks.uses_idle_mxu else jnp.where(lane == 0, weight, 0.0)

    def normalise(self, acc, row_sums, row_max):
        """Divide by the sum of the weights; rows that saw no key (sum 0) are zero.

        Args:
            acc: f32[rows, group_lanes].
            row_sums: f32[rows, 128]: 128 parts of each sum; from an idle MXU, the sum 128 times.
            row_max: the ref f32[rows, 128].

        Returns:
            f32[rows, o_lanes], ready for `layout.store_o_tile`: with return_lse, the natural
            logarithm of the sum comes next to the output, 128 times. From an idle MXU it is that of
            the rounded weights, so exact to 2^-9.
        """
        acc = layout.gather_heads(self.tiles, acc)
        if self.tricks.uses_idle_mxu:
            total = widen(row_sums, acc.shape[1])
        else:
            total = jnp.sum(row_sums, axis=1, keepdims=True)
        # Not `total > 0`: a NaN in the data has to stay visible.
        factor = jnp.where(total == 0, 0.0, self.scalars[VALUE_SCALE] / total)
        if not self.problem.return_lse:
            return acc * factor
        lse = row_max[...] / LOG2_E + jnp.log(total[:, :LANES])  # [rows, 128]
        return jnp.concatenate([acc * factor, lse], axis=1)


def widen(x, lanes):
    """f32[rows, 128], all lanes of a row alike, to f32[rows, lanes] by naming registers twice."""
    copies = cdiv(lanes, LANES)
    return x[:, :lanes] if copies == 1 else jnp.concatenate([x] * copies, axis=1)[:, :lanes]


def lane_sums(p):
    """Sums of a row by lane, f32[rows, 128]: additions of registers, no reduction across lanes."""
    lanes = p.shape[1]
    if lanes % LANES:
        lane = lax.broadcasted_iota(jnp.int32, (len(p), LANES), 1)
        return jnp.where(lane == 0, jnp.sum(p, axis=1, keepdims=True), 0.0)
    return sum(p[:, start : start + LANES] for start in range(0, lanes, LANES))
