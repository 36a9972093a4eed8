"""The public function: a drop-in for the production kernel (tpu-inference, version 3)."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from rpa import chips, interpreter
from rpa.forward_only import forward_only
from rpa.kernel import blocks, launch
from rpa.kernel.cases import cases_of
from rpa.kernel.plan import Plan
from rpa.kernel.problem import Problem
from rpa.paging import lanes_are_shared
from rpa.ragged import AttentionOptions, RaggedBatch, check_call, store_and_attend
from rpa.validation import check_flags

Q_DTYPES = ("float32", "bfloat16")
KV_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")
BACKENDS = ("tpu", "interpret", "reference")


def ragged_paged_attention(
    queries,
    keys,
    values,
    kv_cache,
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    *,
    use_causal_mask=True,
    update_kv_cache=True,
    skip_kv_mask=False,
    sm_scale=1.0,
    sliding_window=None,
    soft_cap=None,
    out_dtype=None,
    mask_value=None,
    q_scale=None,
    k_scale=None,
    v_scale=None,
    chunk_prefill_size=None,
    d_block_sizes=None,
    p_block_sizes=None,
    m_block_sizes=None,
    vmem_limit_bytes=None,
    debug_mode=False,
    disable_bounds_checks=True,
    disable_semaphore_checks=True,
    attention_sink=None,
    return_lse=False,
    validate=None,
    backend=None,
    donate=True,
    chip=None,
):
    """Ragged paged attention, rung 8: any mix of decode and prefill in one pass over the KV cache.

    First the keys and values of the new tokens are stored in the cache, then every token attends
    to its own sequence. Same arguments, layouts and results as tpu-inference v3; where that one is
    wrong (it can lose tokens under a sliding window, drop a prefill range, hang on an idle slot)
    this one is right. What is computed is specified by `rpa.ref_ragged_paged_attention`.

    Args:
        queries: [num_tokens, num_q_heads, head_dim], float32 or bfloat16: the new tokens of all
            sequences in a row.
        keys, values: [num_tokens, num_kv_heads, head_dim], in the dtype of the cache.
        kv_cache: [num_pages, page_size, ceil(2 * num_kv_heads / packing), packing,
            align(head_dim, 128)], float32, bfloat16, float8_e4m3fn or float8_e5m2; with head_dim 64
            also the shape of half the size that `rpa.get_kv_cache_shape` has for
            `share_lanes=True`. Where head_dim is padded to 128 lanes, the padding of cached keys
            must be finite: zeros in whatever rpa stores; validate=True checks it.
        kv_lens, page_indices, cu_q_lens, distribution: int32, see `rpa.RaggedBatch`.
        use_causal_mask: False lets a token see all of its sequence; the window still applies.
        update_kv_cache: False ignores keys and values and reads all from the cache, which stays
            bit-identical (layers that share the KV of another one).
        skip_kv_mask: accepted and without effect: blocks that need no mask run without one anyway.
        sm_scale: factor on the scores; a number or a traced scalar, like all scales here.
        sliding_window: tokens that a query sees, itself included, or None for all.
        soft_cap: `soft_cap * tanh(score / soft_cap)`, or None.
        out_dtype: float32 or bfloat16; None is the dtype of queries.
        mask_value: accepted and without effect: a masked key has weight 0, whatever it is.
        q_scale: if given, queries are divided by it and rounded to the dtype of the cache.
        k_scale, v_scale: what the stored keys and values have to be multiplied with.
        chunk_prefill_size: the largest q_len in the chunked prefill range, which then has a kernel
            of its own; without it the mixed kernel computes that range.
        d_block_sizes, p_block_sizes, m_block_sizes: (bq, bkv, bq_c, bkv_c) for decode, chunked
            prefill and mixed, in tokens: query and KV tokens fetched together, query and KV tokens
            in one product. None: chosen for the chip. Those of a kernel that the call does not have
            (chunked prefill, without chunk_prefill_size) are not looked at.
        vmem_limit_bytes: VMEM that a kernel may take; None is all of the chip's, and without a chip
            that of the smallest one.
        debug_mode: print one line for each block of queries.
        disable_bounds_checks, disable_semaphore_checks: compiler options; the checks are slow.
        attention_sink: f32[num_q_heads], adds `exp(sink)` to the softmax's denominator, or None.
        return_lse: whether to return the logarithm of that denominator as well, to merge this
            output with one over other keys (see `rpa.parallel.merge`). The kernel then writes its
            output in float32, with 128 lanes more per token and head.
        validate: whether to check the values of the lengths and pages on the host; see
            `rpa.ragged.should_validate`.
        backend: "tpu" (compiled), "interpret" (the TPU interpreter, or the `InterpretParams` to
            use), "reference" (plain JAX, which ignores all options from d_block_sizes to
            disable_semaphore_checks, and donates nothing); None is "tpu" where there is one, else
            "interpret".
        donate: whether the cache may be updated in place, which deletes the caller's array; False
            copies it. Nothing else is ever donated.
        chip: name of the chip to choose block sizes for; None is the attached one, if it is a TPU.

    Returns:
        output: [num_tokens, num_q_heads, head_dim] in out_dtype. Rows that no sequence owns, and
            rows that see no key, are zero.
        kv_cache: the cache with the new tokens in it.
        lse: only with return_lse: f32[num_tokens, num_q_heads], natural logarithm, scales, cap and
            sink included; -inf in rows that no sequence owns, and rows that see no key.

    Raises:
        ValueError: for arguments that do not fit together, or blocks that do not fit in VMEM, in
            words, before anything is computed: the cache is as it was, also with donate=True.
        NotImplementedError: under `jax.grad`, `jax.jvp` or `jax.vmap`, which backend "reference"
            takes except for reverse differentiation.

    Scores (scaled, soft-capped) must lie above -1e30: a key with less is seen as if it were masked.
    In the interpreter, calls of several threads run one after the other; inside a caller's jit that
    is the caller's task.

    >>> batch, _ = RaggedBatch.from_lengths([1, 3], [9, 3], [[0, 1], [2]])
    >>> q, kv = jnp.ones((4, 4, 64)), jnp.ones((4, 2, 64))
    >>> cache = jnp.zeros((4, 8, 4, 1, 128))
    >>> output, cache = ragged_paged_attention(
    ...     q, kv, kv, cache, batch.kv_lens, batch.page_indices, batch.cu_q_lens,
    ...     batch.distribution, sm_scale=64**-0.5, backend="reference")
    >>> output.shape
    (4, 4, 64)
    """
    given = dict(locals())  # all arguments by name
    batch = RaggedBatch(kv_lens, page_indices, cu_q_lens, distribution)
    tokens = (queries, keys, values, kv_cache)
    flags = ("donate", "debug_mode", "disable_bounds_checks", "disable_semaphore_checks")
    check_flags(**{name: given[name] for name in flags})
    options = check_call(*tokens, batch, validate=validate, **AttentionOptions.among(given))
    if _choose_backend(backend)[0] == "reference":
        return store_and_attend(*tokens, batch, options)
    plans = prepare(**given)
    if len(queries) == 0:  # nothing to store, and no DMA of nothing
        lse = [jnp.zeros(queries.shape[:2])] if options.return_lse else []
        return jnp.zeros(queries.shape, options.out_dtype), kv_cache, *lse
    arrays = forward_only("ragged_paged_attention", (*tokens, batch, options))
    call = partial(launch.compiled(donate), *arrays, plans=plans)
    return interpreter.run_alone(call) if plans[0].interpret else call()


_SIGNATURE = inspect.signature(ragged_paged_attention)  # once: every call asks for it


def prepare(*arrays, **options) -> tuple[Plan, ...]:
    """The kernels that a call runs, each as a resolved `Plan`; nothing is computed or compiled.

    Args:
        *arrays, **options: those of `ragged_paged_attention`; of the arrays only shapes and dtypes
            are used.

    Raises:
        ValueError: for dtypes that the kernel does not take, or blocks that do not fit in VMEM.

    >>> shape = jax.ShapeDtypeStruct
    >>> q, kv = shape((64, 32, 128), "bfloat16"), shape((64, 8, 128), "bfloat16")
    >>> cache = shape((4096, 128, 8, 2, 128), "bfloat16")
    >>> metadata = [shape((n,), "int32") for n in (64, 64 * 64, 65, 3)]
    >>> plans = prepare(q, kv, kv, cache, *metadata, chip="v6e")
    >>> [(plan.case.label, *plan.blocks) for plan in plans]
    [('decode', 1, 1024, 1, 512), ('mixed', 64, 2048, 64, 512)]
    """
    bound = _SIGNATURE.bind(*arrays, **options)
    bound.apply_defaults()
    given = bound.arguments
    options = AttentionOptions(**AttentionOptions.among(given))
    options = options.resolved(given["queries"].dtype)
    problem, how = _problem(options, **given), _how_to_run(**given)
    plans = []
    for case, max_q_len in cases_of(options.chunk_prefill_size):
        name = f"{case.label[0]}_block_sizes"
        if given[name] is None:
            sizes = blocks.default_block_sizes(problem, case, max_q_len)
            plan = blocks.shrink_to_fit(Plan(problem, case, sizes, max_q_len, **how))
        else:
            sizes = blocks.check_block_sizes(name, given[name], problem)
            plan = blocks.plan_ahead(Plan(problem, case, sizes, max_q_len, **how))
            blocks.check_fits(name, plan)
        plans.append(plan)
    return tuple(plans)


def _problem(
    options, *, queries, keys, kv_cache, kv_lens, page_indices, debug_mode, **_
) -> Problem:
    """What a call computes; refuses dtypes that the kernel does not take."""
    for name, dtype, allowed in [
        ("queries", queries.dtype, Q_DTYPES),
        ("kv_cache", kv_cache.dtype, KV_DTYPES),
        ("out_dtype", options.out_dtype, Q_DTYPES),
    ]:
        if np.dtype(dtype).name not in allowed:
            raise ValueError(
                f"{name} has dtype {np.dtype(dtype).name}, but must be one of "
                f"{', '.join(allowed)}: cast it, or use backend='reference'."
            )
    return Problem(
        num_tokens=queries.shape[0],
        num_q_heads=queries.shape[1],
        num_kv_heads=keys.shape[1],
        head_dim=queries.shape[2],
        num_pages=kv_cache.shape[0],
        page_size=kv_cache.shape[1],
        max_num_seqs=kv_lens.shape[0],
        pages_per_seq=page_indices.shape[0] // kv_lens.shape[0],
        q_dtype=np.dtype(queries.dtype),
        kv_dtype=np.dtype(kv_cache.dtype),
        out_dtype=options.out_dtype,
        causal=options.use_causal_mask,
        update_kv_cache=options.update_kv_cache,
        sliding_window=options.sliding_window,
        has_soft_cap=options.soft_cap is not None,
        has_q_scale=options.q_scale is not None,
        has_sinks=options.attention_sink is not None,
        return_lse=options.return_lse,
        shares_lanes=lanes_are_shared(kv_cache.shape, *keys.shape[1:]),
        debug_mode=debug_mode,
    )


def _how_to_run(
    *, backend, chip, vmem_limit_bytes, disable_bounds_checks, disable_semaphore_checks, **_
):
    """The fields of a `Plan` that do not depend on the problem, {name: value}."""
    _, interpret = _choose_backend(backend)
    how = {
        "interpret": interpret,
        "disable_bounds_checks": disable_bounds_checks,
        "disable_semaphore_checks": disable_semaphore_checks,
    }
    chip = chips.current() if chip is None else chips.chip(chip)
    if chip is not None:
        how["mxu_size"], how["vmem_limit_bytes"] = chip.mxu_size, chip.vmem_bytes
        how["native_float8"] = chip.peak("float8_e4m3fn") > chip.peak()
    if vmem_limit_bytes is not None:
        is_number = isinstance(vmem_limit_bytes, (int, float, np.number))
        if not (is_number and 0 < vmem_limit_bytes < float("inf")):  # False for NaN
            raise ValueError(
                f"vmem_limit_bytes is {vmem_limit_bytes!r}, but must be positive, a number "
                "of bytes; None is all of the chip's VMEM."
            )
        how["vmem_limit_bytes"] = int(vmem_limit_bytes)
    return how


def _choose_backend(backend):
    """The backend by name, and the interpreter's parameters, None where it does not interpret."""
    if isinstance(backend, pltpu.InterpretParams):
        return "interpret", backend
    if backend is None:
        backend = "tpu" if jax.default_backend() == "tpu" else "interpret"
    if not isinstance(backend, str) or backend not in BACKENDS:  # an array has no one truth
        raise ValueError(
            f"backend is {backend!r}, but must be one of {', '.join(map(repr, BACKENDS))}, the "
            "InterpretParams of the TPU interpreter, or None to choose by the device."
        )
    return backend, interpreter.params() if backend == "interpret" else None
