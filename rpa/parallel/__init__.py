"""From one chip to many: any rung under `jax.shard_map`, and what must cross the wire for it.

Read the files in this order; each adds one idea.

| file | how the work is shared out | what crosses the wire |
|---|---|---|
| `cut.py` | a form is a table: which dimension of which array is cut over which axis of a mesh | |
| `heads.py` | each chip has some heads (tensor parallel) | nothing |
| `sequences.py` | each chip has a batch of its own (data parallel) | nothing |
| `merge.py` | attention over some keys, and over the others: joined by the log-sum-exp | |
| `decode_context.py` | each chip has some pages of every sequence | outputs and log-sum-exps |
| `prefill_context.py` | each chip has some tokens of one long prompt | keys and values, in a ring |

>>> import jax
>>> from rpa.parallel import Heads, Parallel
>>> mesh = jax.make_mesh((1,), ("model",))
>>> attention = Parallel(mesh, Heads("model"))  # the one signature, as every rung of the ladder
"""

from rpa.parallel.cut import Parallel
from rpa.parallel.decode_context import DecodeContext
from rpa.parallel.heads import Heads
from rpa.parallel.merge import merge
from rpa.parallel.prefill_context import PrefillContext, zigzag
from rpa.parallel.sequences import Sequences, stack

__all__ = [
    "DecodeContext",
    "Heads",
    "Parallel",
    "PrefillContext",
    "Sequences",
    "merge",
    "stack",
    "zigzag",
]
