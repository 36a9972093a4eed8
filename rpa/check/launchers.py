"""The calls around the kernels of chapters 4 and 5: the learner writes what runs, not the call.

An exercise's notebook imports its launcher from here to play with a kernel, and its check uses the
same one, so both run the same call.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import compat
from rpa.paging import cdiv


def run_flash(kernel, q, k, v, *, block_q, block_kv):
    """Call a flash attention kernel of one head: a grid of query blocks times key blocks.

    Args:
        kernel: `kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, kv_len, block_kv)`.
        q: f32[q_len, head_dim]; k, v: f32[kv_len, head_dim].
        block_q, block_kv: tokens of a block; the last block of keys may reach past the end.

    Returns:
        f32[q_len, head_dim].

    >>> def kernel(q_ref, k_ref, v_ref, out_ref, *state_refs, kv_len, block_kv):
    ...     out_ref[...] = 2 * q_ref[...]
    >>> q, kv = jnp.ones((8, 128)), jnp.ones((8, 128))
    >>> float(run_flash(kernel, q, kv, kv, block_q=8, block_kv=8)[0, 0])
    2.0
    """
    (q_len, head_dim), kv_len = q.shape, len(k)
    q_spec = pl.BlockSpec((block_q, head_dim), lambda i, j: (i, 0))
    kv_spec = pl.BlockSpec((block_kv, head_dim), lambda i, j: (j, 0))
    return pl.pallas_call(
        partial(kernel, kv_len=kv_len, block_kv=block_kv),
        grid=(cdiv(q_len, block_q), cdiv(kv_len, block_kv)),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        scratch_shapes=[  # of a SoftmaxState: row_max, row_sum, acc
            pltpu.VMEM((block_q, 1), jnp.float32),
            pltpu.VMEM((block_q, 1), jnp.float32),
            pltpu.VMEM((block_q, head_dim), jnp.float32),
        ],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret=compat.choose_interpret(None),
    )(q, k, v)
