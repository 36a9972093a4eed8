"""Errors for people: what is checked before anything is computed or written.

Two kinds, because they are known at different times. Shapes and dtypes are known when a function
is traced, so `check_arguments` always runs. Values (lengths, page indices) live in arrays; they
are read on the host, by `check_values`, where that costs nothing or the caller asks for it.

Every message has three parts: what was given, what was expected, and what to do.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rpa.paging import LANES, cdiv, get_kv_cache_shape, lanes_are_shared, packing_of


def check_arguments(
    queries,
    keys,
    values,
    kv_cache,
    batch,
    options,
):
    """Check shapes, dtypes and plain options of an attention call; arrays are not read.

    It runs before anything is computed or donated, so a call that it refuses leaves the cache as it
    was. A scale may be traced: then only its shape is checked.

    Args: see `rpa.ragged.check_call`; options is a `rpa.ragged.AttentionOptions`.

    Raises:
        ValueError: naming the argument, what was given, what was expected and what to do.

    >>> from rpa.ragged import AttentionOptions, RaggedBatch
    >>> batch, _ = RaggedBatch.from_lengths([1], [5], [[0]])
    >>> kv, options = np.ones((1, 2, 64), np.float32), AttentionOptions()
    >>> cache = np.ones((4, 8, 4, 1, 128), np.float32)
    >>> check_arguments(np.ones((1, 4, 64), np.float32), kv, kv, cache, batch, options)
    >>> check_arguments(np.ones((1, 3, 64), np.float32), kv, kv, cache, batch, options)
    Traceback (most recent call last):
        ...
    ValueError: queries has 3 heads and keys has 2: num_q_heads must be a multiple of num_kv_heads.
    """
    _check_tokens(queries, keys, values)
    _check_cache(queries, keys, values, kv_cache)
    _check_metadata_shapes(batch)
    flags = ("use_causal_mask", "update_kv_cache", "skip_kv_mask", "return_lse")
    check_flags(**{name: getattr(options, name) for name in flags})
    if options.use_causal_mask and options.skip_kv_mask:
        raise ValueError(
            "skip_kv_mask=True needs use_causal_mask=False: the causal mask is what hides keys "
            "past kv_len. Set use_causal_mask=False, or leave skip_kv_mask out."
        )
    o = options
    _check_number("sm_scale", o.sm_scale)
    _check_length("sliding_window", o.sliding_window, "None switches it off")
    _check_length("chunk_prefill_size", o.chunk_prefill_size, "None if the batch has no chunks")
    _check_scale("soft_cap", o.soft_cap, "scores stay below it; None switches it off")
    _check_scale("q_scale", o.q_scale, "queries are divided by it; None for 1")
    _check_scale("k_scale", o.k_scale, "stored keys are multiplied with it; None for 1")
    _check_scale("v_scale", o.v_scale, "stored values are multiplied with it; None for 1")
    _check_out_dtype(o.out_dtype)
    mask_value, attention_sink = o.mask_value, o.attention_sink
    if isinstance(mask_value, (int, float)) and not (np.isfinite(mask_value) and mask_value < 0):
        raise ValueError(
            f"mask_value must be a finite negative number, but is {mask_value}: it stands for a "
            "score below all others, and (-inf) - (-inf) is NaN. Leave it out for the default."
        )
    if attention_sink is not None:
        _check_is_array("attention_sink", attention_sink)
        if attention_sink.shape != (queries.shape[1],):
            raise ValueError(
                f"attention_sink has shape {attention_sink.shape}, but must be "
                f"({queries.shape[1]},): one number for each query head."
            )
        if not jnp.issubdtype(attention_sink.dtype, jnp.floating):
            raise ValueError(
                f"attention_sink has dtype {attention_sink.dtype}, but must be floating point: "
                "cast it to float32."
            )


def check_flags(**flags):
    """Refuse options that are not True or False.

    A traced one, above all: what they choose is compiled, or decided on the host.

    >>> check_flags(donate=True, debug_mode=np.bool_(False))
    >>> check_flags(donate="no")
    Traceback (most recent call last):
        ...
    ValueError: donate is 'no', but must be True or False.
    """
    for name, value in flags.items():
        if isinstance(value, jax.core.Tracer):
            raise ValueError(
                f"{name} is a traced value, but must be True or False: it decides what is "
                "compiled. Pass it through static_argnames, or call one function for each value."
            )
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} is {value!r}, but must be True or False.")


NO_LIMIT = 2**31 - 1
"""A window or a chunk of so many tokens holds every sequence: positions are int32."""


def as_length(value):
    """A checked number of tokens as a Python int, or None; NO_LIMIT and more are NO_LIMIT.

    >>> as_length(np.int64(7)), as_length(None), as_length(2**40) == NO_LIMIT
    (7, None, True)
    """
    return None if value is None else min(int(value), NO_LIMIT)


def as_window(value):
    """A checked sliding window as a Python int; None where it hides nothing.

    >>> as_window(4), as_window(2**31)
    (4, None)
    """
    window = as_length(value)
    return None if window == NO_LIMIT else window


def _check_is_array(name, array):
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise ValueError(
            f"{name} is of type {type(array).__name__}, but must be a NumPy or JAX array: convert "
            "it with np.asarray, and give it the dtype that the documentation names."
        )
    is_there = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    if is_there and array.is_deleted():
        raise ValueError(f"{name} has been deleted: {_WHO_DELETED.get(name, _A_DONATION)}")


_A_DONATION = "it was donated to a jitted function. Make it anew, or do not donate it there."
_WHO_DELETED = {
    "kv_cache": (
        "an earlier call has updated it in place, and returned the new one. Go on with the cache "
        "that the call returns (output, kv_cache = ...), or pass donate=False there, which works "
        "on a copy."
    )
}


def _check_tokens(queries, keys, values):
    for name, array in [("queries", queries), ("keys", keys), ("values", values)]:
        _check_is_array(name, array)
        if len(array.shape) != 3:
            raise ValueError(
                f"{name} has shape {array.shape}, but must have three dimensions [num_tokens, "
                "num_heads, head_dim]: concatenate the tokens of all sequences along the first."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} has dtype {array.dtype}, but must be floating point: cast it, or "
                "dequantise it first."
            )
        if jnp.dtype(array.dtype).itemsize > 4:
            raise ValueError(
                f"{name} has dtype {array.dtype}, but a TPU computes with at most 32 bits: cast it "
                "to float32."
            )
        if 0 in array.shape[1:]:
            raise ValueError(f"{name} has shape {array.shape}: no dimension of heads may be 0.")
    if keys.shape != values.shape:
        raise ValueError(
            f"keys has shape {keys.shape} and values has {values.shape}: they must be equal, every "
            "token brings one key and one value for each KV head."
        )
    if queries.shape[0] != keys.shape[0]:
        raise ValueError(
            f"queries has {queries.shape[0]} tokens and keys has {keys.shape[0]}: pass the K and V "
            "of the new tokens only, the cached ones are in kv_cache."
        )
    if queries.shape[2] != keys.shape[2]:
        raise ValueError(
            f"queries has head_dim {queries.shape[2]} and keys has {keys.shape[2]}: they must be "
            "equal. Do not pad head_dim, the cache layout does that."
        )
    if queries.shape[1] % keys.shape[1]:
        raise ValueError(
            f"queries has {queries.shape[1]} heads and keys has {keys.shape[1]}: num_q_heads must "
            "be a multiple of num_kv_heads."
        )


def _check_cache(queries, keys, values, kv_cache):
    _check_is_array("kv_cache", kv_cache)
    if keys.dtype != kv_cache.dtype or values.dtype != kv_cache.dtype:
        raise ValueError(
            f"keys has dtype {keys.dtype}, values {values.dtype} and kv_cache {kv_cache.dtype}: "
            "they must be equal. Quantise keys and values before the call (see k_scale, v_scale), "
            "or cast them."
        )
    if len(kv_cache.shape) != 5:
        raise ValueError(
            f"kv_cache has shape {kv_cache.shape}, but must have five dimensions [num_pages, "
            "page_size, ceil(2 * num_kv_heads / packing), packing, align(head_dim, 128)]: make it "
            "with rpa.get_kv_cache_shape."
        )
    num_pages, page_size = kv_cache.shape[:2]
    if num_pages == 0 or page_size == 0 or page_size % packing_of(kv_cache.dtype):
        raise ValueError(
            f"kv_cache has {num_pages} pages of {page_size} tokens: there must be at least one "
            f"page, and page_size must be a multiple of {packing_of(kv_cache.dtype)} for "
            f"{kv_cache.dtype}."
        )
    expected = _cache_shapes(num_pages, page_size, *keys.shape[1:], kv_cache.dtype)
    if kv_cache.shape not in expected.values():
        words = ", or ".join(f"{shape}{why}" for why, shape in expected.items())
        raise ValueError(
            f"kv_cache has shape {kv_cache.shape}, but for {keys.shape[1]} KV heads of "
            f"{keys.shape[2]} in {kv_cache.dtype} must have {words}: make it with "
            "rpa.get_kv_cache_shape."
        )


def _cache_shapes(*sizes):
    """The shapes that a cache may have, each after the words for when."""
    shapes = {"": get_kv_cache_shape(*sizes)}
    if 2 * sizes[3] == LANES:
        words = " with share_lanes=True, where K and V share the lanes"
        shapes[words] = get_kv_cache_shape(*sizes, share_lanes=True)
    return shapes


def _check_metadata_shapes(batch):
    for name in ("kv_lens", "page_indices", "cu_q_lens", "distribution"):
        array = getattr(batch, name)
        _check_is_array(name, array)
        if array.dtype != np.int32 or len(array.shape) != 1:
            raise ValueError(
                f"{name} has dtype {array.dtype} and shape {array.shape}, but must be one row of "
                f"int32: convert it with np.asarray({name}, np.int32).reshape(-1)."
            )
    max_num_seqs = batch.kv_lens.shape[0]
    if max_num_seqs == 0:
        raise ValueError("kv_lens is empty, but must have room for at least one sequence.")
    if batch.cu_q_lens.shape != (max_num_seqs + 1,):
        raise ValueError(
            f"cu_q_lens has shape {batch.cu_q_lens.shape}, but kv_lens has room for {max_num_seqs} "
            f"sequences, so it must be ({max_num_seqs + 1},): a running sum with a leading 0."
        )
    if batch.distribution.shape != (3,):
        raise ValueError(
            f"distribution has shape {batch.distribution.shape}, but must be (3,): the end of the "
            "decode, of the chunked prefill and of the mixed sequences."
        )
    if batch.page_indices.shape[0] % max_num_seqs or batch.page_indices.shape[0] == 0:
        raise ValueError(
            f"page_indices has {batch.page_indices.shape[0]} entries, but must have "
            f"pages_per_seq for each of the {max_num_seqs} sequences: flatten a table of shape "
            "[max_num_seqs, pages_per_seq]."
        )


def _is_number(value):
    """Whether a value is one real number: Python's, NumPy's, or an array without dimensions."""
    if isinstance(value, (int, float)):
        return True
    if getattr(value, "shape", None) != () or not hasattr(value, "dtype"):
        return False
    return any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _known(value):
    """The value of a number where it is known for free, else None.

    A traced one has none yet, and reading one from a TPU stalls it.
    """
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, jax.Array) and any(d.platform != "cpu" for d in value.devices()):
        return None
    return value


def _is_finite_float32(value):
    # An int may be too large for any float, a float for float32, which all scales become.
    return abs(value) <= float(np.finfo(np.float32).max)  # False for NaN


def _check_number(name, value):
    if not _is_number(value):
        given = f"has shape {value.shape}" if hasattr(value, "shape") else f"is {value!r}"
        if getattr(value, "shape", None) == ():
            given = f"has dtype {value.dtype}"
        raise ValueError(f"{name} {given}, but must be one number, for all heads: pass a float.")
    known = _known(value)
    if known is not None and not _is_finite_float32(known):
        raise ValueError(
            f"{name} is {value}, but must be finite in float32: look where it was computed."
        )


def _check_scale(name, value, meaning):
    """A positive number, or None; a traced one has no value yet."""
    if value is None:
        return
    known = _known(value) if _is_number(value) else None
    if known is not None and not (known > 0 and _is_finite_float32(known)):
        raise ValueError(f"{name} must be positive and finite, but is {value} ({meaning}).")
    _check_number(name, value)


def _check_length(name, value, otherwise):
    """A positive number of tokens, or None; never traced, because blocks and loops depend on it."""
    if value is None:
        return
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} is a traced value, but must be a Python int: it decides which blocks are "
            "read. Pass it through static_argnames, or call one function for each of its values."
        )
    is_whole = _is_number(value) and jnp.issubdtype(jnp.result_type(value), jnp.integer)
    if not (is_whole and value > 0):
        raise ValueError(
            f"{name} must be positive, a whole number of tokens, but is {value!r} ({otherwise})."
        )


def _check_out_dtype(out_dtype):
    try:
        is_floating = out_dtype is None or jnp.issubdtype(jnp.dtype(out_dtype), jnp.floating)
    except TypeError:  # a name that no dtype has
        is_floating = False
    if not is_floating or (out_dtype is not None and jnp.dtype(out_dtype).itemsize > 4):
        raise ValueError(
            f"out_dtype is {out_dtype!r}, but must be a floating-point dtype of at most 32 bits, "
            "such as jnp.bfloat16 or 'float32'; None is the dtype of queries."
        )


def check_values(
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    *,
    num_tokens,
    num_pages,
    page_size,
    chunk_prefill_size=None,
    update_kv_cache=True,
):
    """Check the values of a batch's metadata, which must be NumPy arrays of the right shapes.

    At most 1 ms for 256 sequences x 256 pages, so that a server can afford it every step: all of
    it is vectorised, the one loop is over what has already gone wrong.

    Raises:
        ValueError: naming the sequence, what was given, what was expected and what to do.

    >>> def check(kv_len):
    ...     arrays = ([kv_len], [0], [0, 2], [0, 0, 1])
    ...     check_values(*(np.array(a, np.int32) for a in arrays),
    ...                  num_tokens=2, num_pages=4, page_size=8)
    >>> check(8)
    >>> check(1)
    Traceback (most recent call last):
        ...
    ValueError: kv_lens[0] is 1, but sequence 0 brings 2 new tokens: kv_lens counts the new \
tokens too, so it must be at least 2.
    """
    i, j, k = _check_distribution(distribution, len(kv_lens))
    q_lens = _check_cu_q_lens(cu_q_lens, k, num_tokens)
    _check_q_lens(q_lens, i, j, chunk_prefill_size)
    kv_lens = kv_lens[:k].astype(np.int64)
    pages_per_seq = len(page_indices) // (len(cu_q_lens) - 1)
    _check_kv_lens(kv_lens, q_lens, pages_per_seq, page_size)

    table = page_indices.reshape(-1, pages_per_seq)[:k]  # [k, pages_per_seq]
    column = np.arange(pages_per_seq)
    # Only live entries are looked at: whatever pads the table may hold anything.
    live = column[None, :] < cdiv(kv_lens, page_size)[:, None]
    _refuse(
        live & ((table < 0) | (table >= num_pages)),
        lambda s, p: (
            f"page_indices of sequence {s}, page {p} is {table[s, p]}, but kv_cache has "
            f"{num_pages} pages: it must be between 0 and {num_pages - 1}. Take the pages of a "
            "sequence from a pool of this size (rpa.PagePool)."
        ),
    )
    if update_kv_cache:
        first_written = (kv_lens - q_lens) // page_size
        written = live & (column[None, :] >= first_written[:, None]) & (q_lens > 0)[:, None]
        _check_ownership(table, live, written, num_pages)


def check_padding(kv_cache, batch, num_kv_heads, head_dim, *, update_kv_cache=True):
    """Refuse a cache whose cached keys are not finite in the lanes that pad head_dim.

    A kernel multiplies whole rows of lanes: zeros of the query times what pads the key, and 0 * NaN
    is NaN. Whatever rpa stores is padded with zeros; another program's cache may not be. Reads the
    live pages of the batch. (What pads values, and padding heads, may hold anything.)

    Args:
        kv_cache, batch: see `rpa.ragged.ref_ragged_paged_attention`; the values of the batch are
            valid.
        num_kv_heads, head_dim: the true ones.
        update_kv_cache: whether the new tokens are still to be written.

    Raises:
        ValueError: naming a sequence, a page and a token in it.
    """
    page_size, lanes = kv_cache.shape[1], kv_cache.shape[-1]
    if head_dim == lanes or lanes_are_shared(kv_cache.shape, num_kv_heads, head_dim):
        return
    kv_lens, page_indices, cu_q_lens, distribution = (
        np.asarray(array)
        for array in (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    )
    k = int(distribution[2])
    cached = kv_lens[:k] - (np.diff(cu_q_lens)[:k] if update_kv_cache else 0)  # [k]
    table = page_indices.reshape(len(kv_lens), -1)[:k]
    seqs, columns = np.nonzero(np.arange(table.shape[1]) < cdiv(cached, page_size)[:, None])
    # [live pages, page_size, heads and their padding, lanes]
    pages = np.asarray(kv_cache[table[seqs, columns]]).reshape(len(seqs), page_size, -1, lanes)
    padding = pages[:, :, : 2 * num_kv_heads : 2, head_dim:].astype(np.float32)
    positions = columns[:, None] * page_size + np.arange(page_size)  # [live pages, page_size]
    wrong = ~np.isfinite(padding).all(axis=(2, 3)) & (positions < cached[seqs][:, None])
    _refuse(
        wrong,
        lambda n, slot: (
            f"kv_cache has keys that are not finite in lanes {head_dim} to {lanes - 1}, which pad "
            f"head_dim: first in token {slot} of page {table[seqs[n], columns[n]]} (sequence "
            f"{seqs[n]}). They must be zeros, or any finite numbers: 0 * NaN is NaN."
        ),
    )


def _check_distribution(distribution, max_num_seqs):
    i, j, k = (int(x) for x in distribution)
    if not 0 <= i <= j <= k <= max_num_seqs:
        raise ValueError(
            f"distribution is ({i}, {j}, {k}), but must satisfy 0 <= i <= j <= k <= "
            f"{max_num_seqs} (max_num_seqs): sequences [0, i) decode, [i, j) are chunked prefill, "
            "[j, k) are mixed, and k is how many sequences there are."
        )
    return i, j, k


def _check_cu_q_lens(cu_q_lens, k, num_tokens):
    cu_q_lens = cu_q_lens[: k + 1].astype(np.int64)
    if cu_q_lens[0] != 0:
        raise ValueError(f"cu_q_lens[0] is {cu_q_lens[0]}, but must be 0: the first token's row.")
    q_lens = np.diff(cu_q_lens)
    _refuse(
        q_lens < 0,
        lambda s: (
            f"cu_q_lens falls from {cu_q_lens[s]} to {cu_q_lens[s + 1]} at sequence {s}, but must "
            "not: it is the running sum of the q_lens."
        ),
    )
    if cu_q_lens[k] > num_tokens:
        raise ValueError(
            f"cu_q_lens[{k}] is {cu_q_lens[k]}, but queries has only {num_tokens} tokens: pass the "
            "queries of all sequences, or fewer sequences."
        )
    return q_lens


def _check_q_lens(q_lens, i, j, chunk_prefill_size):
    _refuse(
        q_lens[:i] > 1,
        lambda s: (
            f"sequence {s} has q_len {q_lens[s]}, but distribution says that sequences [0, {i}) "
            "decode, with q_len at most 1: order the batch with RaggedBatch.from_lengths, or move "
            "it to the mixed range."
        ),
    )
    if chunk_prefill_size is not None:
        _refuse(
            q_lens[i:j] > chunk_prefill_size,
            lambda s: (
                f"sequence {i + s} has q_len {q_lens[i + s]}, but distribution says that sequences "
                f"[{i}, {j}) are chunks of at most chunk_prefill_size={chunk_prefill_size} tokens: "
                "move it to the mixed range, or raise chunk_prefill_size."
            ),
        )


def _check_kv_lens(kv_lens, q_lens, pages_per_seq, page_size):
    _refuse(
        kv_lens < q_lens,
        lambda s: (
            f"kv_lens[{s}] is {kv_lens[s]}, but sequence {s} brings {q_lens[s]} new tokens: "
            f"kv_lens counts the new tokens too, so it must be at least {q_lens[s]}."
        ),
    )
    _refuse(
        kv_lens > pages_per_seq * page_size,
        lambda s: (
            f"kv_lens[{s}] is {kv_lens[s]}, but its row of the page table has room for "
            f"{pages_per_seq} pages of {page_size} tokens, {pages_per_seq * page_size} in all: "
            "widen the page table."
        ),
    )


def _check_ownership(table, live, written, num_pages):
    """A page that receives new tokens must stand in one place of the table only."""
    owners = np.bincount(table[live], minlength=num_pages)  # [num_pages]
    pages = np.where(live, table, 0)

    def message(s, p):
        others = np.argwhere(live & (table == table[s, p])).tolist()
        other, at = next(place for place in others if place != [s, p])
        if other == s:
            return (
                f"page {table[s, p]} receives new tokens of sequence {s}, but is listed as its "
                f"pages {at} and {p}: a token would overwrite another one. List each page once."
            )
        return (
            f"page {table[s, p]} receives new tokens of sequence {s} (its page {p}), but page {at} "
            f"of sequence {other} is the same one: a shared page may only be read. Copy it first "
            "(PagePool.append does: copy-on-write)."
        )

    _refuse(written & (owners[pages] > 1), message)


def _refuse(wrong, message):
    """Raise `message(*index)` for the first True of a mask, if there is one."""
    if wrong.any():
        raise ValueError(message(*np.argwhere(wrong)[0]))
