"""Problems for tests that plan a kernel and do not run it."""

import jax.numpy as jnp
import numpy as np

from rpa.kernel.plan import Problem


def make_problem(
    heads,
    head_dim,
    *,
    q="bfloat16",
    kv="bfloat16",
    out=None,
    page_size=8,
    pages_per_seq=2,
    shares_lanes=False,
):
    """A Problem of 512 tokens and 64 sequences."""
    return Problem(
        512,
        *heads,
        head_dim,
        num_pages=4,
        page_size=page_size,
        max_num_seqs=64,
        pages_per_seq=pages_per_seq,
        q_dtype=np.dtype(jnp.dtype(q)),
        kv_dtype=np.dtype(jnp.dtype(kv)),
        out_dtype=np.dtype(jnp.dtype(out or q)),
        shares_lanes=shares_lanes,
    )
