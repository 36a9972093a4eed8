"""The kernel on one screen: one loop, whose iterations look up, fetch and compute.

Read `kernel` first. `traversal` says what comes next, `pipeline` how far apart the stages are,
`transfers` starts and awaits every copy, `mixed` and `decode` compute.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rpa.kernel import decode, layout, mixed, pipeline, refs, transfers, traversal


def kernel(plan, inputs, outputs, scratch):
    """The body of the `pallas_call`: inputs, outputs and scratch memory are three `Refs`."""
    r = refs.merge(inputs, outputs, scratch)
    first, end = plan.case.bounds(r.distribution)
    buffers = (r.q_buffer, r.o_buffer, r.kv_buffer)
    buffers = layout.Buffers(*(layout.WordRows(buffer, plan.interpret) for buffer in buffers))
    copies = transfers.Copies(plan, r)
    ring = pipeline.Ring(plan, r.ring)
    compute = (decode.Decode if plan.is_decode else mixed.Mixed)(plan, r, buffers, copies)

    def iterate(carry):
        iteration, cursor = carry
        # Before the wait for what is computed: the DMA engine must never be without work.
        ring.for_each_to_fetch(iteration, copies.fetch)
        items = [traversal.work_item(plan, cursor, end)]
        while len(items) < plan.tricks.items_per_iteration:
            cursor = traversal.advance(plan, r, cursor, items[-1], end)
            items.append(traversal.work_item(plan, cursor, end))
        for item in ring.put(iteration, items):
            copies.look_up(item)
        compute(ring.to_compute(iteration))
        return ring.next_iteration(iteration), traversal.advance(plan, r, cursor, items[-1], end)

    copies.clear()
    ring.clear()
    cursor = traversal.start(plan, r, first, end)
    start = ring.first_iteration(cursor.seq.index < end), cursor
    lax.while_loop(lambda carry: ring.is_running(carry[0]), iterate, start)
    copies.wait_all()
    if plan.case.is_last:
        _zero_padding_rows(plan, r, buffers, copies)


def _zero_padding_rows(plan, r, buffers, copies):
    """Write zeros to the rows of the output that no sequence owns."""
    num_used, t = r.cu_q_lens[r.distribution[2]], plan.tiles

    @pl.when(num_used < plan.problem.num_tokens)
    def _():
        zeros = jnp.zeros((t.rows, plan.problem.o_shape[-1]), jnp.float32)
        store = partial(layout.store_o_tile, t, buffers.o, 0, tile=zeros)
        mixed.for_each_tile(t, t.num_q_subs, store)
        copies.write_zero_rows(num_used)
