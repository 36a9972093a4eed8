"""rpa: Ragged Paged Attention for TPUs, built rung by rung.

Read the package in the order of the ladder: `chips`, `dense`, `page_pool`, `paging`, `ragged`,
`tiled`, `streamed`, `fused`, `plain`, `kernel`. Each file answers the same question, attention over
a batch of sequences with a KV cache, and changes one thing in how it is answered.

>>> import rpa
>>> rpa.get_kv_cache_shape(100, 16, 8, 128, "bfloat16")
(100, 16, 8, 2, 128)
"""

import importlib
import importlib.metadata

from rpa._repository import DISTRIBUTION
from rpa.doctor import doctor, warn_of_foreign_rpa

try:
    __version__ = importlib.metadata.version(DISTRIBUTION)
except importlib.metadata.PackageNotFoundError:
    __version__ = "0+checkout"  # imported from a clone that is not installed

warn_of_foreign_rpa()

# Imported when first asked for: the doctor must be able to say that jax is missing or too old.
_HOMES = {
    "PagePool": "rpa.page_pool",
    "RaggedBatch": "rpa.ragged",
    "get_kv_cache_shape": "rpa.paging",
    "ragged_paged_attention": "rpa.kernel",
    "ref_ragged_paged_attention": "rpa.ragged",
    "rows_in_batch": "rpa.ragged",
}

_ROOMS = (
    *(
        "chips",
        "dense",
        "paging",
        "ragged",
        "tiled",
        "streamed",
        "fused",
        "plain",
        "kernel",
        "ladder",
    ),
    *("check", "figures", "lab", "models", "parallel", "shapes", "traces"),
)

__all__ = ["check", "doctor", *_HOMES]


def __getattr__(name):
    if name in _ROOMS:  # so that `rpa.models.load_smollm2()` works behind `import rpa` alone
        return importlib.import_module(f"rpa.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rpa' has no attribute {name!r}; it has {', '.join(__all__)}.")


def __dir__():
    return sorted({*globals(), *__all__, *_ROOMS})
