"""One token stored by one DMA, in two layouts of a page: what does the TPU compiler allow?

A DMA cuts an array anywhere along its untiled dimensions, but along the last two, which lie in
tiles, only at whole tiles. `lab.compile_for("v5e", heads_first, ...)` is refused for that reason,
`tokens_first` is not. Chapter 6 shows both; neither is of use for anything else.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import compat, interpreter

SHAPES = {
    "heads_first": ((8, 2, 1, 128), (8, 2, 16, 128)),  # [KV head, K or V, token, lane]
    "tokens_first": ((1, 8, 2, 128), (16, 8, 2, 128)),  # [token, KV head, K or V, lane]
}
"""Shape of a token and of a page of 16 tokens, 8 KV heads of 128, by the name of the layout."""


def heads_first(row, token, page, *, interpret=None):
    """Store a token where the tokens of a head are neighbours.

    Args:
        row: i32[1], where in the page.
        token, page: of SHAPES["heads_first"].
        interpret: see `rpa.tiled.flash_attention`; the lab's compiler wants False.

    Returns:
        The page with the token in it; on a TPU it does not compile.
    """
    return _store(lambda ref, r: ref.at[:, :, pl.ds(r, 1)], row, token, page, interpret)


def tokens_first(row, token, page, *, interpret=None):
    """Store a token where all heads of a token are neighbours, as in `rpa.paging`.

    >>> import jax.numpy as jnp
    >>> token, page = (jnp.full(s, x) for x, s in zip((1.0, 0.0), SHAPES["tokens_first"]))
    >>> tokens_first(jnp.array([3]), token, page)[:, 0, 0, 0].astype(int).tolist()
    [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    """
    return _store(lambda ref, r: ref.at[pl.ds(r, 1)], row, token, page, interpret)


def _store(place, row, token, page, interpret):
    def kernel(row_ref, token_ref, _, page_ref, sem):
        copy = pltpu.make_async_copy(token_ref, place(page_ref, row_ref[0]), sem)
        copy.start()
        copy.wait()

    interpret = interpreter.choose_interpret(interpret)
    hbm = pl.BlockSpec(memory_space=compat.hbm_memory_space(interpret))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(page.shape, page.dtype),
        input_output_aliases={2: 0},
        interpret=interpret,
    )(row, token, page)
