"""Decode: which side of Q K^T the MXU takes in, and which goes through it; some keys are turned.

A product keeps the MXU busy in two ways: one side is taken in as weights (MATPUSH), then the rows
of the other go through (MATMUL). A decode has 16 rows of queries and 1,024 keys. Written as Q K^T,
all keys are weights, for 16 rows that go through: MATPUSH is nearly full, MATMUL idles. Turned
round,

    Q K^T = (K Q^T)^T

16 rows are weights, and all keys go through: now MATMUL has the work. A bundle has slots for both.
So some keys go one way and the others the other way, at the same time. V stays weights: to go
through it would have to be transposed. K Q^T is [keys, 16], and the XLU turns it back: one register
of results for 8 keys, however many heads share the product. So it pays where they are many
(`Plan.turns_keys`).

The MXU takes its work in the order of the program. If all turned keys of a long product came first,
MATMUL would work alone, and then MATPUSH; in cells of CELL_TOKENS they overlap.
"""

import jax.numpy as jnp

from rpa.paging import LANES

CELL_TOKENS = 512
"""Keys of which the first part is turned, and the rest is not."""

TURNED_PARTS = {128: 1, 256: 2}
"""Quarters of a cell that are turned, by the side of the MXU: all take in a key in the same time,
but a wide one lets twice as many lanes through in a cycle."""


def parts(num_keys, mxu_size):
    """How the keys of a product are cut: (first, last + 1, whether they are turned).

    Turned keys come by 128, a register of scores; so a short cell may turn none.

    >>> parts(512, mxu_size=128)
    [(0, 128, True), (128, 512, False)]
    >>> parts(1024, mxu_size=256)
    [(0, 256, True), (256, 512, False), (512, 768, True), (768, 1024, False)]
    """
    cut = []
    for start in range(0, num_keys, CELL_TOKENS):
        end = min(start + CELL_TOKENS, num_keys)
        turned = (end - start) * TURNED_PARTS[mxu_size] // 4 // LANES * LANES
        cut += [(start, start + turned, True), (start + turned, end, False)]
    return [part for part in cut if part[0] < part[1]]


def product(q, k, mxu_size, dot):
    """Q K^T, f32[rows, keys], some of whose keys go through the MXU.

    Args:
        q: [rows, lanes]; k: [keys, lanes].
        dot: `dot(a, b)` is the float32 product A B^T.
    """
    scores = []
    for first, end, is_turned in parts(len(k), mxu_size):
        keys = k[first:end]
        scores.append(dot(keys, q).T if is_turned else dot(q, keys))
    return jnp.concatenate(scores, axis=1)
