"""rpa: Ragged Paged Attention for TPUs, built rung by rung.

Read the package in the order of the ladder: `chips`, `dense`, `paging`, `ragged`, `tiled`,
`streamed`, `fused`, `kernel`. Each file answers the same question, attention over a batch of
sequences with a KV cache, and changes one thing in how it is answered.

>>> import rpa
>>> rpa.get_kv_cache_shape(100, 16, 8, 128, "bfloat16")
(100, 16, 8, 2, 128)
"""

from rpa import check
from rpa.doctor import doctor
from rpa.paging import PagePool, get_kv_cache_shape
from rpa.ragged import RaggedBatch, ref_ragged_paged_attention

__version__ = "0.1.0"

__all__ = [
    "PagePool",
    "RaggedBatch",
    "check",
    "doctor",
    "get_kv_cache_shape",
    "ref_ragged_paged_attention",
]
