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

docs/kernel.md lists where it differs from the production kernel, and why.
"""

from rpa.kernel.api import prepare, ragged_paged_attention
from rpa.kernel.launch import compiler_options

__all__ = ["compiler_options", "prepare", "ragged_paged_attention"]
