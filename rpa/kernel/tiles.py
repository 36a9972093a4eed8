"""One tile on its way in and out: queries laid out for the MXU, the result into the o buffer."""

import jax.numpy as jnp

from rpa.kernel import layout, softmax


def load_queries(plan, refs, slot, q_sub, head_group):
    """The queries of a head_group, f32[tile_rows, tile_lanes]."""
    p = plan.problem
    tile = layout.load_q_tile(plan, refs.q_rows, slot, q_sub, head_group)
    if p.has_q_scale:
        largest = float(jnp.finfo(p.kv_dtype).max)
        tile = jnp.clip(tile / refs.scalars[softmax.QUERY_SCALE], -largest, largest)
        tile = tile.astype(p.kv_dtype).astype(jnp.float32)
    return layout.spread_heads(plan, tile)


def store_output(plan, refs, slot, q_sub, head_group, acc, row_sums):
    """Normalise the accumulator of a head_group, f32[tile_rows, tile_lanes], into the o buffer."""
    output = softmax.normalise(plan, refs.scalars, layout.gather_heads(plan, acc), row_sums)
    layout.store_o_tile(plan, refs.o_rows, slot, q_sub, head_group, output)
