"""Check of chapter 0: the warm-up, what one decode step reads."""

import numpy as np

from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise


def _bytes(weight_bytes, token_bytes, batch_size, kv_len):
    """Adding up one sequence after the other, so that no formula can be wrong here."""
    total = weight_bytes
    for _ in range(batch_size):
        total += kv_len * token_bytes
    return total


def _shape(weight_bytes, token_bytes, batch_size, kv_len):
    """The arguments of a case by name."""
    names = ("weight_bytes", "token_bytes", "batch_size", "kv_len")
    values = (weight_bytes, token_bytes, batch_size, kv_len)
    return dict(zip(names, values, strict=True))


def whole_number(function, *arguments):
    """Call the learner's function, and refuse a float: it is exact only up to 2**53 bytes."""
    result = function(*arguments)
    if np.issubdtype(np.asarray(result).dtype, np.floating):
        raise WrongResult(
            f"your function returns {result}, a float; bytes are counted in integers: `/` always "
            "makes a float, `+`, `*` and `//` of integers do not"
        )
    return result


decode = Exercise("0.1", _bytes, tolerance=0.0, drive=whole_number)
decode.case("one sequence of three tokens", **_shape(100, 2, 1, 3))
decode.case("two sequences share the weights", **_shape(100, 2, 2, 3))
decode.case("eight sequences that have just begun", **_shape(100, 2, 8, 1))
decode.case("Llama 3 8B, 64 sequences", **_shape(15_009_316_864, 131_072, 64, 2048))


@decode.mistake("the weights are read again for every sequence: one read serves the whole batch")
def _weights_for_each(weight_bytes, token_bytes, batch_size, kv_len):
    return batch_size * (weight_bytes + kv_len * token_bytes)


@decode.mistake("the cache is read once for the whole batch: every sequence has a cache of its own")
def _cache_once(weight_bytes, token_bytes, batch_size, kv_len):
    return weight_bytes + kv_len * token_bytes


@decode.mistake("the weights are left out: every step reads them too")
def _no_weights(weight_bytes, token_bytes, batch_size, kv_len):
    return batch_size * kv_len * token_bytes


@decode.mistake("only one token of each cache is read: the new token attends to all kv_len of them")
def _one_token(weight_bytes, token_bytes, batch_size, kv_len):
    return weight_bytes + batch_size * token_bytes


@decode.mistake("the new token is counted twice: kv_len has it already, so kv_len + 1 is too many")
def _one_more_token(weight_bytes, token_bytes, batch_size, kv_len):
    return weight_bytes + batch_size * (kv_len + 1) * token_bytes
