"""Heads: each chip has some of the heads, of queries and of the cache. Nothing crosses the wire.

Attention of one head knows nothing of the others. So the projections before it are cut by columns
and the one after it by rows (Shoeybi et al. 2019, arXiv 1909.08053): only that one needs a sum over
chips, and it is outside of attention.

    8 query heads, 2 KV heads, 2 chips     chip 0  q 0 1 2 3   kv 0
                                           chip 1  q 4 5 6 7   kv 1

With more chips than KV heads a KV head is on several of them, each with some of its query heads.
Such a copy costs memory, not time on the wire: every chip computes its keys and values itself.

    4 chips                                chip 0  q 0 1       kv 0
                                           chip 1  q 2 3       kv 0
                                           chip 2  q 4 5       kv 1
                                           chip 3  q 6 7       kv 1

(Beyond that point context is what is left to share out: see `decode_context`.)
"""

from dataclasses import dataclass

import jax

from rpa.parallel.cut import Form


@dataclass(frozen=True)
class Heads(Form):
    """Share the heads out; the number of chips and of KV heads must divide one another."""

    def cuts(self, num_chips, num_kv_heads):
        """{array: the dimension of its heads}; keys and values stay whole where heads are copied.

        Raises:
            ValueError: if heads and chips do not fit together.

        >>> Heads("model").cuts(2, 8)["keys"], "keys" in Heads("model").cuts(8, 4)
        (1, False)
        """
        if num_chips % num_kv_heads and num_kv_heads % num_chips:
            raise ValueError(
                f"{num_kv_heads} KV heads cannot be shared out over {num_chips} chips: one number "
                "must divide the other. Take another axis of the mesh, or pad the model with heads "
                "of zeros."
            )
        cuts = dict(queries=1, kv_cache=2, attention_sink=0, output=1, lse=1)
        return cuts if num_chips > num_kv_heads else cuts | dict(keys=1, values=1)

    def kv_heads_on_chip(self, num_chips, num_kv_heads):
        """How many KV heads a chip has: at least one.

        >>> Heads("model").kv_heads_on_chip(2, 8), Heads("model").kv_heads_on_chip(8, 4)
        (4, 1)
        """
        return max(1, num_kv_heads // num_chips)

    def on_chip(self, attention, num_chips, num_kv_heads):
        """Attention over the heads of this chip."""

        def attend(queries, keys, values, kv_cache, batch, **options):
            if num_chips > num_kv_heads:  # keys and values are those of all heads: one is ours
                head = jax.lax.axis_index(self.axis) * num_kv_heads // num_chips
                keys, values = (
                    jax.lax.dynamic_slice_in_dim(x, head, 1, axis=1) for x in (keys, values)
                )
            return attention(queries, keys, values, kv_cache, batch, **options)

        return attend
