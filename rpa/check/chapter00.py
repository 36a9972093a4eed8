"""Check of chapter 0: the warm-up, what one decode step reads."""

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


decode = Exercise("0.1", _bytes, tolerance=0.0)
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
