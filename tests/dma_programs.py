"""Small Pallas kernels with their own DMAs, right and wrong, for tests of the lab."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CHUNK, NUM_CHUNKS = 8, 4


def call(kernel, *scratch, interpret, num_slots=2):
    """f32[NUM_CHUNKS * CHUNK, 128] -> f32[CHUNK, 128] by a kernel of (x, out, buffers, sems)."""
    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        out_shape=jax.ShapeDtypeStruct((CHUNK, 128), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((num_slots, CHUNK, 128), jnp.float32),
            pltpu.SemaphoreType.DMA((num_slots,)),
            *scratch,
        ],
        interpret=interpret,
    )


def chunk_copy(x_ref, buffers_ref, sems, chunk, slot):
    """The copy of a chunk to a buffer."""
    rows = x_ref.at[pl.ds(chunk * CHUNK, CHUNK)]
    return pltpu.make_async_copy(rows, buffers_ref.at[slot], sems.at[slot])


def single_buffer(x_ref, out_ref, buffers_ref, sems):
    """Add up chunks, each fetched when it is needed."""
    out_ref[...] = jnp.zeros_like(out_ref)
    for chunk in range(NUM_CHUNKS):
        copy = chunk_copy(x_ref, buffers_ref, sems, chunk, 0)
        copy.start()
        copy.wait()
        out_ref[...] += buffers_ref[0]


def double_buffer(x_ref, out_ref, buffers_ref, sems):
    """Add up chunks, the next one on its way."""
    out_ref[...] = jnp.zeros_like(out_ref)
    copies = [chunk_copy(x_ref, buffers_ref, sems, i, i % 2) for i in range(NUM_CHUNKS)]
    copies[0].start()
    for chunk, copy in enumerate(copies):
        if chunk + 1 < NUM_CHUNKS:
            copies[chunk + 1].start()
        copy.wait()
        out_ref[...] += buffers_ref[chunk % 2]


def forgets_a_wait(x_ref, out_ref, buffers_ref, sems):
    """Reads a buffer whose copy nobody waited for."""
    chunk_copy(x_ref, buffers_ref, sems, 0, 0).start()
    out_ref[...] = buffers_ref[0]


def waits_on_the_wrong_semaphore(x_ref, out_ref, buffers_ref, sems):
    """Hangs: the copy signals semaphore 0."""
    chunk_copy(x_ref, buffers_ref, sems, 0, 0).start()
    chunk_copy(x_ref, buffers_ref, sems, 0, 1).wait()
    out_ref[...] = buffers_ref[0]


def reads_twice(x_ref, out_ref, buffers_ref, sems):
    """Every chunk is fetched two times."""
    out_ref[...] = jnp.zeros_like(out_ref)

    @pl.loop(0, 2 * NUM_CHUNKS)
    def _(i):
        copy = chunk_copy(x_ref, buffers_ref, sems, i // 2, 0)
        copy.start()
        copy.wait()
        out_ref[...] += buffers_ref[0]


def asks_the_data(x_ref, out_ref, buffers_ref, sems):
    """What is fetched second depends on what was fetched first."""
    out_ref[...] = jnp.zeros_like(out_ref)
    first = chunk_copy(x_ref, buffers_ref, sems, 0, 0)
    first.start()
    first.wait()

    @pl.when(jnp.max(buffers_ref[0]) > 0)
    def _():
        second = chunk_copy(x_ref, buffers_ref, sems, 1, 0)
        second.start()
        second.wait()


# --- What a chip's compiler takes, and another's does not ---------------------------------------


def eight_rows(x, start, *, aligned=True, interpret=False):
    """bfloat16[32, 128], i32[1] -> bfloat16[8, 128]: rows of VMEM from one known at run time."""

    def kernel(start_ref, x_ref, out_ref):
        first = pl.multiple_of(start_ref[0], 8) if aligned else start_ref[0]
        out_ref[...] = x_ref[pl.ds(first, 8)]

    return pl.pallas_call(
        kernel,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.VMEM),
        ],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.bfloat16),
        interpret=interpret,
    )(start, x)


def rotate_half_rope(x, cos, sin, *, interpret=False):
    """f32[tokens, 128] x 3 -> f32[tokens, 128]: x cos + (-second half, first half) sin, in VMEM."""

    def kernel(x_ref, cos_ref, sin_ref, out_ref):
        x = x_ref[...]
        half = x.shape[1] // 2
        rotated = jnp.concatenate([-x[:, half:], x[:, :half]], axis=1)
        out_ref[...] = x * cos_ref[...] + rotated * sin_ref[...]

    vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    return pl.pallas_call(
        kernel,
        in_specs=[vmem] * 3,
        out_specs=vmem,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        interpret=interpret,
    )(x, cos, sin)


def steps_of(timeline, token_bytes):
    """What a kernel with two buffers does, in its order.

    Args:
        timeline: recorded from a kernel whose scratch is called buffers, sems and store_sems.
        token_bytes: of K and V of one token in the cache.

    Returns:
        ("compute", buffer), and (kind, buffer, tokens, copies) with the kinds start and wait for
        what comes into a buffer, store and wait_store for what leaves it. Copies that are started
        together for one buffer are one step.
    """
    computes = {compute.first: compute.rows[0] for compute in timeline.computes}
    steps = []
    for event in timeline.events:
        name, _, index = event.semaphore.partition("[")
        if event.order in computes:
            steps.append(("compute", int(computes[event.order][-2])))
        elif event.kind in ("start", "wait") and name in ("sems", "store_sems"):
            store = {"start": "store", "wait": "wait_store"}
            kind = store[event.kind] if name == "store_sems" else event.kind
            buffer, tokens = int(index[0]), event.num_bytes // token_bytes
            copies = 1 if event.kind == "start" else len(event.copies)
            if event.kind == "start" and steps and steps[-1][:2] == (kind, buffer):
                _, _, more_tokens, more_copies = steps.pop()
                tokens, copies = tokens + more_tokens, copies + more_copies
            steps.append((kind, buffer, tokens, copies))
    return steps
