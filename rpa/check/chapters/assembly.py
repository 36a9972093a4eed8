"""What the assembly exercises share: how they are called, NumPy models of them, and the compiler.

A model does what the kernel does, block by block with a buffer that begins as NaN, so that a model
which is wrong in one place is wrong as a learner's kernel would be.
"""

import functools
import hashlib
import inspect
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rpa.check.errors import CannotShip, KernelFault, WrongResult
from rpa.check.runner import in_process
from rpa.check.sandbox import in_sandbox
from rpa.check.yours import LINE, collect
from rpa.check.yours.growing import FILE_NAME, MODULE
from rpa.lab.compile.compiler import cache_dir
from rpa.lab.programs import Workload
from rpa.lab.schedule.recorded import recorded
from rpa.lab.schedule.schedule import NoSchedule, schedule_for
from rpa.paging import cdiv, get_kv_cache_shape, pack_kv, unpack_kv
from rpa.ragged import RaggedBatch

SM_SCALE = 0.3
"""Of all cases: no power of head_dim, so that a kernel that takes another one is seen."""


# --- How the learner's functions are called ------------------------------------------------------


def run_flash_attention(function, q, k, v, block_q, block_kv):
    """Call the flash attention of 4.7; it has to come from a kernel."""
    options = {"sm_scale": SM_SCALE, "block_q": block_q, "block_kv": block_kv}
    if _is_model(function):
        return function(q, k, v, **options)
    return _from_kernel(functools.partial(function, **options), q, k, v)


def run_decode(function, queries, kv_cache, kv_lens, page_indices, num_kv_heads, block_tokens):
    """Call a paged decode of chapter 5."""
    options = {"num_kv_heads": num_kv_heads, "sm_scale": SM_SCALE, "block_tokens": block_tokens}
    arrays = (queries, kv_cache, kv_lens, page_indices)
    if _is_model(function):
        return function(*map(np.asarray, arrays), **options)
    return _from_kernel(functools.partial(function, **options), *arrays)


def run_batch(function, queries, keys, values, kv_cache, batch, block_tokens):
    """Call a kernel that updates the cache: output, cache, and which rows are right bit by bit."""
    options = {"sm_scale": SM_SCALE, "block_tokens": block_tokens}
    arrays = (queries, keys, values, kv_cache, batch)
    if _is_model(function):
        output, cache = function(*jax.tree.map(np.asarray, arrays), **options)
    else:
        output, cache = _from_kernel(functools.partial(function, **options), *arrays)
    _, expected = ragged(*jax.tree.map(np.asarray, arrays), **options)
    same = np.asarray(cache).view(np.uint32) == expected.view(np.uint32)
    return output, cache, same.all(axis=(2, 3, 4))


def runner(judge):
    """The sandbox for a learner's kernel; a NumPy model has no copies, and runs here."""
    return functools.partial(_run, in_sandbox(judge))


def _run(sandbox, drive, function, arguments, limit_s):
    run = in_process if _is_model(function) else sandbox
    return run(drive, function, arguments, limit_s)


def _is_model(function):
    return getattr(function, "__module__", "").startswith("rpa.check.chapters.")


def _from_kernel(function, *arrays):
    """Trace once, look for a kernel, run: one program is sooner compiled than many operations."""
    arrays = jax.tree.map(jnp.asarray, arrays)
    traced = jax.jit(function).trace(*arrays)
    if "pallas_call" not in str(traced.jaxpr):
        raise WrongResult("your function has no kernel: the result has to come from pl.pallas_call")
    return jax.jit(function)(*arrays)


# --- Cases ---------------------------------------------------------------------------------------


def make_batch(
    rng, lengths, *, num_q_heads=4, num_kv_heads=2, page_size=8, pages_per_seq=5, poison=True
):
    """Arguments of a case: the pages of all sequences permuted, NaN where no cached token lives.

    Args:
        rng: of all numbers.
        lengths: (q_len, kv_len) of each sequence; decodes first.
        poison: whether pages that no sequence owns are NaN as well; else they look like any other.

    Returns:
        queries, keys, values, kv_cache and batch, by name.
    """
    q_lens, kv_lens = (np.array(column) for column in zip(*lengths, strict=True))
    num_pages, head_dim = len(lengths) * pages_per_seq + 1, 128
    pages = list(rng.permutation(num_pages))
    table = [[pages.pop() for _ in range(cdiv(kv_len, page_size))] for kv_len in kv_lens]
    batch, _ = RaggedBatch.from_lengths(q_lens, kv_lens, table, pages_per_seq=pages_per_seq)
    rows = max(1, int(q_lens.sum()))
    queries, keys, values = (
        rng.standard_normal((rows, heads, head_dim)).astype(np.float32)
        for heads in (num_q_heads, num_kv_heads, num_kv_heads)
    )
    shape = get_kv_cache_shape(num_pages, page_size, num_kv_heads, head_dim, np.float32)
    kv_cache = np.full(shape, np.nan, np.float32)
    if not poison:
        free = np.setdiff1d(np.arange(num_pages), np.concatenate([[], *table]))
        kv_cache[free.astype(int)] = rng.standard_normal((len(free), *shape[1:]))
    for row, q_len, kv_len in zip(table, q_lens, kv_lens, strict=True):
        for position in range(kv_len - q_len):
            token = rng.standard_normal(shape[2:])
            kv_cache[row[position // page_size], position % page_size] = token
    arrays = {"queries": queries, "keys": keys, "values": values, "kv_cache": kv_cache}
    return arrays | {"batch": batch}


def make_decode(rng, kv_lens, **sizes):
    """The same for a decode whose tokens are all in the cache: arguments of `run_decode`."""
    case = make_batch(rng, [(0, kv_len) for kv_len in kv_lens], poison=False, **sizes)
    heads = (len(kv_lens), sizes.get("num_q_heads", 4), 128)
    return {
        "queries": rng.standard_normal(heads).astype(np.float32),
        "kv_cache": case["kv_cache"],
        "kv_lens": case["batch"].kv_lens,
        "page_indices": case["batch"].page_indices,
        "num_kv_heads": sizes.get("num_kv_heads", 2),
    }


# --- Models --------------------------------------------------------------------------------------


def flash(
    q, k, v, *, sm_scale, block_q, block_kv, sees=None, kv_head=None, tail=0.0, keep_state=False,
    divide=True, last_block_only=False,
):  # fmt: skip
    """Causal attention of one sequence in float64, f32[q_len, num_q_heads, head_dim].

    Args:
        sees: (position, key, row) -> whether it is visible; row counts in its block, a row a head.
        kv_head: (query head, num_q_heads, num_kv_heads) -> the KV head that it reads.
        tail: what the values behind the last key are; NaN spoils each row that reads their block.
        keep_state: whether a block of queries goes on with the state of the one before it.
        divide: whether the output is divided by the sum of the weights.
        last_block_only: whether only the last block of keys that a block of queries reads counts.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (q_len, num_q_heads, _), (kv_len, num_kv_heads, _) = q.shape, k.shape
    group = num_q_heads // num_kv_heads
    sees = sees or (lambda position, key, row: key <= position)
    kv_head = kv_head or (lambda h, num_q_heads, num_kv_heads: h // group)
    t, key = np.arange(q_len)[:, None], np.arange(kv_len)[None]
    output = np.zeros(q.shape)
    for h in range(num_q_heads):
        position, row = kv_len - q_len + t, t % block_q * group + h % group
        seen = sees(position, key, row) & (key < kv_len)
        first = kv_len - q_len + t // block_q * block_q  # position of the block's first query
        end = np.minimum(kv_len, first + block_q)
        if last_block_only:
            seen &= key // block_kv == (end - 1) // block_kv
        head = kv_head(h, num_q_heads, num_kv_heads)
        scores = q[:, h] @ k[:, head].T * sm_scale
        weights = np.where(seen, np.exp(scores), 0)
        total, mixed = weights.sum(axis=1, keepdims=True), weights @ v[:, head]
        if keep_state:
            for i in range(block_q, q_len):
                total[i] += total[i - block_q]
                mixed[i] += mixed[i - block_q]
        spoiled = (end > kv_len // block_kv * block_kv) & (kv_len % block_kv > 0)
        mixed = np.where(spoiled, mixed + tail, mixed)
        output[:, h] = mixed / np.where(total > 0, total, 1) if divide else mixed
    return output.astype(np.float32)


def decode(
    queries, kv_cache, kv_lens, page_indices, *, num_kv_heads, sm_scale, block_tokens, page_of=None,
    num_blocks=None, stale_is_seen=False, combined=None, kv_head=None,
):  # fmt: skip
    """A paged decode as the kernel does it, f32[num_seqs, num_q_heads, head_dim].

    Args:
        page_of: (table [num_seqs, pages_per_seq], s, block, page of the block, pages of a block)
            -> page of the cache.
        num_blocks: kv_len -> blocks that are computed.
        stale_is_seen: whether keys behind the last one are seen, with whatever the buffer holds.
        combined: (head, number of combined heads) -> the combined heads of its K and of its V.
        kv_head: (query head, group) -> the KV head that it reads.
    """
    page_size, pages_a_block = kv_cache.shape[1], block_tokens // kv_cache.shape[1]
    table = page_indices.reshape(len(queries), -1)
    page_of = page_of or (lambda table, s, b, p, n: table[s, b * n + p])
    num_blocks = num_blocks or (lambda kv_len: cdiv(kv_len, block_tokens))
    combined = combined or (lambda head, n: (2 * head, 2 * head + 1))
    kv_head = kv_head or (lambda h, group: h // group)
    group = queries.shape[1] // num_kv_heads
    lanes = kv_cache.reshape(*kv_cache.shape[:2], -1, kv_cache.shape[-1]).astype(np.float64)
    buffer = np.full((block_tokens, *lanes.shape[2:]), np.nan)
    output = np.zeros(queries.shape)
    for s, kv_len in enumerate(kv_lens):
        total = np.zeros((queries.shape[1], 1))
        for b in range(num_blocks(int(kv_len))):
            num_keys = min(kv_len - b * block_tokens, block_tokens)
            for p in range(cdiv(num_keys, page_size)):
                rows = min(num_keys - p * page_size, page_size)
                page = page_of(table, s, b, p, pages_a_block)
                buffer[p * page_size : p * page_size + rows] = lanes[page, :rows]
            for h in range(queries.shape[1]):
                k, v = (buffer[:, c] for c in combined(kv_head(h, group), lanes.shape[2]))
                weights = np.exp(k @ queries[s, h].astype(np.float64) * sm_scale)
                if not stale_is_seen:
                    weights[num_keys:] = 0
                total[h] += weights.sum()
                output[s, h] += weights[:num_keys] @ v[:num_keys]
        output[s] /= np.where(total == 0, 1, total)  # NaN stays what it is
    return output.astype(np.float32)


def ragged(
    queries, keys, values, kv_cache, batch, *, sm_scale, block_tokens, sees=None, new_row=None,
    store_row=None, store=True, swap=False, kv_end=None,
):  # fmt: skip
    """Ragged paged attention with the update of the cache: output and cache.

    Args:
        sees: (position, key, first new position) -> whether it is visible.
        new_row: (start, position, first new position, block_tokens) -> row of a new token.
        store_row: (position, page size, first new position) -> row of the page it is written to.
        store: whether new tokens are written at all.
        swap: whether K and V of the new tokens are swapped.
        kv_end: (q_len, kv_len) -> one past the last key that is there.
    """
    cu_q_lens, kv_lens = np.asarray(batch.cu_q_lens), np.asarray(batch.kv_lens)
    table = np.asarray(batch.page_indices).reshape(len(kv_lens), -1)
    num_kv_heads, head_dim = keys.shape[1:]
    page_size, group = kv_cache.shape[1], queries.shape[1] // num_kv_heads
    sees = sees or (lambda position, key, first_new: key <= position)
    new_row = new_row or (lambda start, p, first_new, block_tokens: start + p - first_new)
    store_row = store_row or (lambda p, page_size, first_new: p % page_size)
    pair = (values, keys) if swap else (keys, values)
    packed = np.asarray(pack_kv(*map(jnp.asarray, pair)))
    output, cache = np.zeros(queries.shape), kv_cache.copy()
    for s in range(int(batch.distribution[2])):
        start, q_len = int(cu_q_lens[s]), int(cu_q_lens[s + 1] - cu_q_lens[s])
        kv_len, first_new = int(kv_lens[s]), int(kv_lens[s]) - q_len
        if not q_len:
            continue
        tokens = np.full((kv_len, *kv_cache.shape[2:]), np.nan, np.float32)
        for p in range(kv_len):
            page = table[s, p // page_size]
            if p < first_new:
                tokens[p] = kv_cache[page, p % page_size]
                continue
            row = new_row(start, p, first_new, block_tokens)
            tokens[p] = packed[row] if 0 <= row < len(packed) else np.nan
            if store:
                cache[page, store_row(p, page_size, first_new)] = tokens[p]
        k, v = (np.asarray(x, np.float64) for x in unpack_kv(tokens, num_kv_heads, head_dim))
        position, key = first_new + np.arange(q_len)[:, None], np.arange(kv_len)[None]
        seen = sees(position, key, first_new)
        for h in range(queries.shape[1]):
            scores = queries[start : start + q_len, h] @ k[:, h // group].T * sm_scale
            weights = np.where(seen, np.exp(scores), 0)
            mixed = weights @ v[:, h // group]
            output[start : start + q_len, h] = mixed / weights.sum(axis=1, keepdims=True)
    return output.astype(np.float32), cache


# --- The compiler --------------------------------------------------------------------------------


def _programs():
    """By exercise: arguments and options of its function, and the rung that is compared with it."""
    w = Workload("llama-3-8b-on-4", page_size=128, num_seqs=4, kv_len=2048)
    chunk = Workload("llama-3-8b-on-4", page_size=128, num_seqs=4, kv_len=2048, q_len=32)
    q, kv = w.queries(512), w.kv(1024)
    kv_lens, page_indices, _, _ = w.metadata
    scale, heads = {"sm_scale": 128**-0.5}, {"num_kv_heads": w.heads[1]}
    blocks, block = {"block_q": 32, "block_kv": 512}, {"block_tokens": 512}
    decode = (w.queries(4), w.kv_cache, kv_lens, page_indices)
    batch = (w.queries(4), w.kv(4), w.kv(4), w.kv_cache, RaggedBatch(*w.metadata))
    mixed = (chunk.queries(128), chunk.kv(128), chunk.kv(128), *batch[3:])
    rung_4 = ("rung 4", "rpa.tiled:flash_attention", blocks)
    rung_5 = ("rung 5", "rpa.streamed:paged_decode", heads | block)
    rung_6 = ("rung 6", "rpa.fused:fused_attention", block | {"max_q_len": 8})
    rung_7 = ("rung 7", "rpa.plain:attention", {"block_q": 32, "block_kv": 512})
    return {
        "4.7": ((q, kv, kv), scale | blocks, rung_4),
        "5.6": (decode, scale | heads | block, rung_5),
        "5.7": (decode, scale | heads | block, rung_5),
        "6.6": (batch, scale | block, rung_6),
        "7.3": (mixed, scale | block, rung_7),
    }


def compiled(number: str) -> Callable[[Callable], str]:
    """What a check says about the compiled kernel of an exercise: `Exercise.epilogue`."""
    return functools.partial(_compiled, number)


def _compiled(number, function) -> str:
    numbers = recorded("assembly")[number]
    rung = f"{numbers['rung']} takes {numbers['rung_bundles']:,}"
    try:
        bundles = compile_tile(number, function)
    except NoSchedule as reason:
        refused = ("vmem overflow", "smem overflow", "hbm overflow", "unsupported")
        if reason.kind in refused or (reason.kind == "error" and "no dump" not in str(reason)):
            raise KernelFault(
                f"It is right in the interpreter, and the TPU's compiler refuses it for v5e: "
                f"{reason}"
            ) from None
        return (
            f"Not compiled here ({reason.kind}). Recorded for v5e: the course's solution takes "
            f"{numbers['solution_bundles']:,} bundles a tile, {rung}."
        )
    except CannotShip as reason:
        return f"Not compiled: {reason}"
    return f"Compiled for v5e: {bundles:,} bundles a tile, {rung}."


def compile_tile(number: str, function: Callable) -> int:
    """Bundles of a tile of a learner's kernel on a v5e.

    Raises:
        NoSchedule: if it does not compile, or there is no libtpu.
    """
    args, kwargs, _ = _programs()[number]
    path = f"{_written(number, function)}:{LINE[number]}"
    return schedule_for("v5e", path, *args, kwargs=kwargs, timeout_s=60.0).tile.num_bundles


def record(number: str) -> dict:
    """What `rpa/data/schedules.json` keeps: bundles a tile of the solution, and of the rung."""
    args, kwargs, (rung, function, options) = _programs()[number]
    options = options | {"sm_scale": kwargs["sm_scale"], "interpret": False}
    solution = schedule_for("v5e", f"rpa.yours.reference:{LINE[number]}", *args, kwargs=kwargs)
    theirs = schedule_for("v5e", function, *args, kwargs=options)
    return {
        "rung": rung,
        "rung_bundles": theirs.tile.num_bundles,
        "solution_bundles": solution.tile.num_bundles,
    }


def _written(number, function):
    """A file with the function and all that it needs; the same text has the same place."""
    plain = inspect.unwrap(function)
    if plain.__module__ == MODULE:
        return plain.__code__.co_filename
    folder = cache_dir().parent / "yours"
    draft = folder / f"draft_{os.getpid()}" / FILE_NAME
    draft.parent.mkdir(parents=True, exist_ok=True)
    collect(number, function, draft)
    text = draft.read_text(encoding="utf-8")
    home = folder / hashlib.sha256(text.encode()).hexdigest()[:16] / FILE_NAME
    home.parent.mkdir(exist_ok=True)
    draft.replace(home)
    draft.parent.rmdir()
    return home
