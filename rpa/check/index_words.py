"""An index into the output of a ragged batch, in the words of the lesson."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def ragged(arguments: Mapping[str, Any], index: tuple[int, ...]) -> str:
    """Say which sequence, token, page and head the first wrong number belongs to.

    Args:
        arguments: the case's arguments; `batch` has `cu_q_lens`, `kv_lens`, `page_indices` and
            `distribution` (a `RaggedBatch`); `kv_cache`, if there, gives the page size.
        index: (token, head, lane) or a beginning of it.

    Returns:
        For example "sequence 1, new token 0 of 2 (position 4; page 1 of the sequence, page 7 of the
        cache), head 3, lane 0".
    """
    batch = arguments["batch"]
    token = index[0]
    cu_q_lens = np.asarray(batch.cu_q_lens)
    num_seqs = int(np.asarray(batch.distribution)[-1])
    rest = "".join(f", {axis} {i}" for axis, i in zip(("head", "lane"), index[1:], strict=False))
    sequence = int(np.searchsorted(cu_q_lens[: num_seqs + 1], token, side="right")) - 1
    if sequence >= num_seqs:
        return f"row {token}, a padding row that no sequence owns{rest}"
    q_len = int(cu_q_lens[sequence + 1] - cu_q_lens[sequence])
    new_token = token - int(cu_q_lens[sequence])
    position = int(np.asarray(batch.kv_lens)[sequence]) - q_len + new_token
    page = _page_words(arguments, sequence, position)
    return (
        f"sequence {sequence}, new token {new_token} of {q_len} (position {position}{page}){rest}"
    )


def _page_words(arguments: Mapping[str, Any], sequence: int, position: int) -> str:
    if "kv_cache" not in arguments:
        return ""
    batch = arguments["batch"]
    page_size = arguments["kv_cache"].shape[1]
    pages_per_seq = len(batch.page_indices) // len(batch.kv_lens)
    page = position // page_size
    owned = int(np.asarray(batch.page_indices)[sequence * pages_per_seq + page])
    return f"; page {page} of the sequence, page {owned} of the cache"
