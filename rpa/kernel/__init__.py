"""Rung 8: the complete kernel, in rooms.

`api` is the public function. `cases` says which kernel computes which sequences, `plan` what is
static about one of them, `blocks` how large its blocks are, `launch` how it is called,
`page_table` what
it is told about neighbouring pages. Inside it, `loop` is the loop nest (`decode` the one of
decode), `pipeline` how far copies run ahead, `tiles` brings queries in and results out,
`traversal` is the
order of the blocks, `transfers` every copy, `layout` how values lie in memory, `softmax` the
arithmetic of one tile, `mxu` what an MXU does for it that would be idle otherwise.

What it does otherwise than the production kernel, and why, is in docs/kernel.md.
"""

from rpa.kernel.api import ragged_paged_attention

__all__ = ["ragged_paged_attention"]
