"""Rung 8: the complete kernel, optimized, in the order in which to read it.

| file | question it answers |
|---|---|
| `api` | What may be passed, what is refused, and which kernels does a call run? |
| `cases`, `problem`, `plan` | Which sequences does a kernel compute, and in which tiles? |
| `tricks` | What makes it fast, when, and by how much? |
| `blocks` | How large are the blocks, and do they fit in VMEM? |
| `launch`, `refs` | Which arrays go in and out, and where do they lie? |
| `loop` | What does one iteration do? The kernel on one screen |
| `traversal`, `pipeline` | Which work item is next, and how far ahead of it do copies run? |
| `transfers`, `page_table` | Which copy starts when, and what waits for it? |
| `mixed`, `decode` | In which order is a work item computed? |
| `softmax`, `mxu` | What is computed on one tile? |
| `layout` | How do values lie in memory, on the chip and in the interpreter? |

Words that all files use:

    block       bq query tokens or bkv KV tokens, which are fetched together
    sub-block   bq_c query tokens (q_sub) or bkv_c keys (kv_sub) of a block: one product
    head group  the KV heads of one product, and all query heads that read them
    tile        the rows of one head group and one q_sub, ordered as in `layout`. Its queries and
                its output have head_lanes columns; its accumulator has group_lanes, the heads of
                the group side by side
    work item   one KV block of one query block of one sequence, see `traversal`
    iteration   of the kernel's loop; it computes `items_per_iteration` work items together
    slot        one of num_slots buffers of a kind
    word        32 bits; they hold as many values, of neighbouring heads, as the dtype's packing

What rung 7 has too bears the same name: q_row, q_len, position, num_cached, kv_start, kv_end.
docs/kernel.md lists where it differs from the production kernel, and why.
"""

from rpa.kernel.api import prepare, ragged_paged_attention
from rpa.kernel.launch import compiler_options

__all__ = ["compiler_options", "prepare", "ragged_paged_attention"]
