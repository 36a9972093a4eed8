"""The online softmax of one tile: scores, running maximum and sum, accumulated values.

A softmax over all keys needs its maximum first. Online (Milakov and Gimelshein 2018, arXiv
1805.02867; FlashAttention-2, arXiv 2307.08691) the keys come in blocks, and what was summed so far
is rescaled whenever a larger maximum appears:

    m' = max(m, max(s));  l' = 2^(m - m') l + sum 2^(s - m');  acc' = 2^(m - m') acc + 2^(s - m') V

Powers of two, because that is what the hardware has: log2(e) is folded into the factor that the
scores are multiplied with anyway. The state is float32 at any length: a bfloat16 sum stops growing
at 256 equal terms. `l` is kept as 128 partial sums, one a lane, and added up once at the end; or,
where the MXU is half idle, it is a product like the values (see `mxu`).
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rpa.kernel import mxu
from rpa.paging import LANES, cdiv

LOWEST_MAX = -1e30
"""Where the running maximum starts. Finite, so that (masked - maximum) is -inf and never NaN."""

SCORE_FACTOR, CAP_FACTOR, QUERY_SCALE, VALUE_SCALE = range(4)
"""Places in `scalars`, f32[4]: the scales, traced so that a new scale needs no compilation.

    SCORE_FACTOR   Q K^T is multiplied with it: all scales and log2(e), or all scales / soft_cap
    CAP_FACTOR     tanh is multiplied with it: soft_cap log2(e); 1 without a cap
    QUERY_SCALE    queries are divided by it before they are rounded to the cache's dtype
    VALUE_SCALE    the output is multiplied with it
"""

LOG2_E = 1.4426950408889634
"""exp(x) = 2^(x log2(e))"""


def make_scalars(sm_scale, soft_cap, q_scale, k_scale, v_scale):
    """The factors of the kernel from the scales of the public function, f32[4].

    Args:
        sm_scale, soft_cap, q_scale, k_scale, v_scale: numbers or traced scalars; all but sm_scale
            may be None, which stands for 1, and for no cap.

    >>> make_scalars(1.0, None, None, None, 2.0)[VALUE_SCALE]
    Array(2., dtype=float32)
    """
    log2_e = jnp.float32(LOG2_E)
    one = jnp.float32(1)
    q_scale, k_scale, v_scale = (
        one if scale is None else jnp.float32(scale) for scale in (q_scale, k_scale, v_scale)
    )
    score = jnp.float32(sm_scale) * q_scale * k_scale
    if soft_cap is None:
        return jnp.stack([score * log2_e, one, q_scale, v_scale])
    cap = jnp.float32(soft_cap)
    return jnp.stack([score / cap, cap * log2_e, q_scale, v_scale])


def start(plan, tile, sinks):
    """Set the state of one tile to "no key seen yet".

    A sink is a key without a value: the state then starts as if its score had been seen.

    Args:
        tile: `Tile`.
        sinks: f32[tile_rows / q_sub_rows, 128] or None, see `layout.sink_tiles`.
    """
    tile.acc[...] = jnp.zeros(tile.acc.shape, jnp.float32)
    tile.m[...], tile.l[...] = nothing_seen(plan, sinks)


def nothing_seen(plan, sinks):
    """The running maximum and sum before the first key, each f32[tile_rows, 128]; see `start`."""
    shape = (plan.tile_rows, LANES)
    if sinks is None:
        return jnp.full(shape, LOWEST_MAX, jnp.float32), jnp.zeros(shape, jnp.float32)
    rows = (len(sinks), plan.q_sub_rows, LANES)
    score = jnp.broadcast_to(sinks[:, None], rows).reshape(shape) * LOG2_E
    m = jnp.maximum(score, LOWEST_MAX)
    lane = lax.broadcasted_iota(jnp.int32, m.shape, 1)
    weight = jnp.exp2(score - m)
    return m, weight if plan.uses_idle_mxu else jnp.where(lane == 0, weight, 0.0)


class Tile:
    """The refs of a tile, or of num_rows of its rows from `first` on.

    q [rows, tile_lanes (x 2)]; m, l f32[rows, 128]; acc f32[rows, tile_lanes], of which the row
    sums l are the next 128 columns where half of the MXU is spare.
    """

    def __init__(self, plan, refs, q_sub, dot, first=0, num_rows=None):
        if plan.has_small_tiles:  # pieces of the first large tile
            first = pl.multiple_of(q_sub * plan.tile_rows + first, num_rows or plan.tile_rows)
            q_sub = 0
        index = (q_sub, dot, pl.ds(first, num_rows or plan.tile_rows))
        self.q, self.m, self.acc = (ref.at[index] for ref in (refs.q_tiles, refs.m, refs.acc))
        if plan.uses_idle_mxu:
            self.l = refs.acc.at[(*index, pl.ds(plan.tile_lanes, LANES))]
        else:
            self.l = refs.l.at[index]


def queries(plan, scalars_ref, tile):
    """The left side of a tile's scores, in the compute dtype; tile: f32[tile_rows, tile_lanes]."""
    dtype = plan.problem.compute_dtype
    if plan.uses_idle_mxu:
        return mxu.split_queries(tile, scalars_ref[SCORE_FACTOR], dtype)
    return tile.astype(dtype)


def scores(plan, scalars_ref, q, k, mask_limits):
    """Scores of one tile in units of log2, f32[tile_rows, bkv_c].

    Args:
        q: what `queries` returns; k: [bkv_c, tile_lanes] in the compute dtype.
        mask_limits: f32[mask_rows, bkv_c], what a score can be at most: inf where a query sees a
        key,
            else -inf; None if all see all. Rows repeat: tile_rows is a multiple of mask_rows.
    """
    contract_lanes = (((1,), (1,)), ((), ()))

    def dot(a, b):
        return lax.dot_general(a, b, contract_lanes, precision=precision(plan), **FLOAT32)

    if plan.uses_idle_mxu:
        k = mxu.double_keys(k)
    s = mxu.product(q, k, plan.mxu_size, dot) if plan.swaps_operands else dot(q, k)
    if not plan.uses_idle_mxu:
        s = s * scalars_ref[SCORE_FACTOR]
    if plan.problem.has_soft_cap:
        s = jnp.tanh(s) * scalars_ref[CAP_FACTOR]
    if mask_limits is None:
        return s
    # Loaded and taken the minimum of, one instruction a register. A mask would be compared anew for
    # every head: there are few registers for masks, and none survives from one head to the next.
    folded = s.reshape(-1, *mask_limits.shape)
    return jnp.minimum(folded, mask_limits[...][None]).reshape(s.shape)


def update(plan, s, tile):
    """Take the scores of a `Tile` into the running maximum and sum.

    Args:
        s: what `scores` returns, f32[rows, bkv_c].

    Returns:
        p: f32[rows, bkv_c], the weights so far, not normalised.
        decay: f32[rows, 128], what everything before has to be multiplied with.
    """
    m_before = tile.m[...]
    m = jnp.maximum(m_before, jnp.max(s, axis=1, keepdims=True))
    p = jnp.exp2(s - widen(m, s.shape[1]))
    decay = jnp.exp2(m_before - m)
    tile.m[...] = m
    if not plan.uses_idle_mxu:
        tile.l[...] = decay * tile.l[...] + lane_sums(p)
    return p, decay


def accumulate(plan, p, v, decay, tile):
    """Add the weighted values of a `Tile`: p and decay as of `update`, v [bkv_c, tile_lanes]."""
    pv = weighted_values(plan, p, v)
    tile.acc[...] = widen(decay, pv.shape[1]) * tile.acc[...] + pv


def weighted_values(plan, p, v):
    """P V of one tile, f32[tile_rows, tile_lanes], and their sum where the MXU is half idle."""
    contract_keys = (((1,), (0,)), ((), ()))
    if plan.uses_idle_mxu:
        v = mxu.append_ones(v)
    p = p.astype(plan.problem.compute_dtype)
    return lax.dot_general(p, v, contract_keys, precision=precision(plan), **FLOAT32)


def normalise(plan, scalars_ref, acc, row_sums):
    """Divide by the sum of the weights; rows that saw no key (sum 0) are zero.

    Args:
        acc: f32[tile_rows, lanes].
        row_sums: f32[tile_rows, 128], the `l` of a `Tile`.
    """
    if plan.uses_idle_mxu:  # all lanes alike
        total = widen(row_sums, acc.shape[1])
    else:
        total = jnp.sum(row_sums, axis=1, keepdims=True)
    # Not `total > 0`: a NaN in the data has to stay visible.
    factor = jnp.where(total == 0, 0.0, scalars_ref[VALUE_SCALE] / total)
    return acc * factor


FLOAT32 = {"preferred_element_type": jnp.float32}
"""What both products of a tile give, whatever they multiply."""


def precision(plan):
    """Float32 is multiplied as three bfloat16 parts, in all passes; bfloat16 needs one."""
    exact = plan.problem.compute_dtype == jnp.float32
    return lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT


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
