"""The other kernels, under one roof: what rung 8 is measured against, and a second oracle.

| peer | from | cache is | stores the new tokens |
|---|---|---|---|
| `v3` | tpu-inference, production kernel, version 3 | as ours | yes |
| `batched` | tpu-inference, experimental `batched_rpa` | as ours | yes |
| `jax` | jax itself, second generation | combined heads in one axis | no |

Each is a function with the positional arguments of `rpa.ragged_paged_attention`, which the lab
compiles by name. They are used as they are installed: none of their text is here.

The package `tpu-inference` is a plugin of vLLM and asks for it at import; its kernels do not. They
also ask the attached device which chip to compile for. Both questions are answered here.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import threading
import types
from collections.abc import Callable
from unittest import mock

import jax

from rpa import chips
from rpa.lab.programs import Program, Workload

PEER_VERSION = "0.32.0"
"""The tpu-inference that all numbers are measured against; `make peers` installs it."""

GENERATIONS = {"v5e": 5, "v5p": 5, "v6e": 6, "tpu7x": 7}
"""What the peers call the chips of `rpa.chips`."""

V3_BLOCKS_TPU7X = (256, 1024, 128, 512)
"""Blocks of v3's mixed kernel on TPU7x: its own default takes more VMEM than the chip has."""

COMPILER_FLAGS = "--xla_tpu_use_dynamic_smem_negotiation=true"
"""What tpu-inference adds to `LIBTPU_INIT_ARGS` at import, as a user of it gets. `batched` moves
scalars out of SMEM all the time without it and takes a quarter more bundles; v3 moves none."""

_V3 = "tpu_inference.kernels.ragged_paged_attention.v3.kernel"
_BATCHED = "tpu_inference.kernels.experimental.batched_rpa."
_JAX = "jax.experimental.pallas.ops.tpu.ragged_paged_attention."


_patching = threading.Lock()
"""Of two threads that patch the same module, one would put back what the other has put there."""


class PeerAbsent(ImportError):
    """A peer is not installed, or in another version; the message says what to do."""


def absence(peer: str) -> str | None:
    """Why a peer cannot be used here and how to get it, in words; None if it is there.

    Args:
        peer: a name in `PROGRAMS`.

    >>> absence("jax") is None
    True
    """
    if peer == "jax":
        return None
    try:
        version = importlib.metadata.version("tpu-inference")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version == PEER_VERSION:
        return None
    return (
        f"{peer} is a kernel of tpu-inference {PEER_VERSION}, of which {version} is installed: "
        f"make peers, or pip install --no-deps tpu-inference=={PEER_VERSION}."
    )


def v3(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, **options):
    """The production kernel, with rung 8's arguments.

    Args:
        queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution: as in
            `rpa.ragged_paged_attention`.
        **options: v3's keyword arguments, lists for tuples; and `chip`, the name of the chip to
            compile for, None for the attached one.

    Returns:
        output, kv_cache.

    Raises:
        PeerAbsent: if tpu-inference is not installed.
    """
    options = _from_json(options)
    generation = GENERATIONS[_chip(options.pop("chip", None)).name]
    if generation == 7 and options.get("m_block_sizes") is None:
        options["m_block_sizes"] = V3_BLOCKS_TPU7X
    kernel = _load("v3", _V3)
    # The function inside its jit: the caller's own jit says what is donated.
    attend = inspect.unwrap(kernel.ragged_paged_attention)
    with _patching, mock.patch.object(kernel, "get_tpu_version", lambda: generation):
        return attend(
            *(queries, keys, values, kv_cache),
            *(kv_lens, page_indices, cu_q_lens, distribution),
            **options,
        )


def v3_reference(*args, **options):
    """The pure-JAX reference of v3: same arguments, any device, outputs only the rows in use."""
    return _load("v3", _V3).ref_ragged_paged_attention(*args, **_from_json(options))


def hd64_reference(*args, **options):
    """The pure-JAX reference of v3's kernel for head_dim 64, whose cache has shared lanes."""
    module = _load("v3", _V3 + "_hd64")
    return module.ref_ragged_paged_attention_hd64(*args, **_from_json(options))


def batched(
    queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, **options
):
    """The experimental kernel that decodes several sequences at once, with rung 8's arguments.

    Args:
        queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution: as in
            `rpa.ragged_paged_attention`.
        **options: its keyword arguments; `decode_block_sizes` and `prefill_block_sizes` as five
            numbers (query tokens fetched, query tokens computed, KV tokens, sequences a batch,
            buffers); and `chip`, which it asks of `jax.set_mesh` itself and so does not need.

    Returns:
        output, kv_cache.

    Raises:
        PeerAbsent: if tpu-inference is not installed.
    """
    options = _from_json(options)
    options.pop("chip", None)
    block_sizes = _load("batched", _BATCHED + "configs").BlockSizes
    for name in ("decode_block_sizes", "prefill_block_sizes"):
        if options.get(name) is not None:
            options[name] = block_sizes(*options[name])
    attend = inspect.unwrap(_load("batched", _BATCHED + "wrapper").ragged_paged_attention)
    return attend(
        *(queries, keys, values, kv_cache),
        *(kv_lens, page_indices, cu_q_lens, distribution),
        **options,
    )


def jax_v2(
    queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, **options
):
    """The kernel that jax ships, with rung 8's arguments; it reads the cache and stores nothing.

    Args:
        queries, kv_lens, page_indices, cu_q_lens, distribution: as in
            `rpa.ragged_paged_attention`.
        keys, values: not used: another program has to store them before.
        kv_cache: [num_pages, page_size, 2 * num_kv_heads, head_dim].
        **options: its keyword arguments (`num_kv_pages_per_block`, `num_queries_per_block`, ...);
            and `chip`, the name of the chip to compile for, None for the attached one.

    Returns:
        output, and kv_cache as it was.
    """
    options = _from_json(options)
    known = _chip(options.pop("chip", None))
    tuned = importlib.import_module(_JAX + "tuned_block_sizes")
    kernel = importlib.import_module(_JAX + "kernel")
    device_name = " ".join(known.device_kinds[0].split()[:2])
    # Its default blocks do not fit in what the compiler gives a kernel that asks for nothing.
    options.setdefault("vmem_limit_bytes", known.vmem_bytes)
    attend = inspect.unwrap(kernel.ragged_paged_attention)
    with (
        mock.patch.object(tuned, "get_tpu_version", lambda: GENERATIONS[known.name]),
        mock.patch.object(tuned, "get_device_name", lambda: device_name),
    ):
        output = attend(
            *(queries, kv_cache, kv_lens),
            *(page_indices.reshape(len(kv_lens), -1), cu_q_lens, distribution[2:]),
            **options,
        )
    return output, kv_cache


def _chip(name) -> chips.Chip:
    """The named chip, or the attached one."""
    known = chips.chip(name) if name is not None else chips.current()
    if known is None:
        raise ValueError("chip is None and no TPU is attached: name the chip to compile for.")
    return known


def _from_json(options) -> dict:
    """JSON has no tuples, and a list is no static argument."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


@functools.cache
def _load(peer, module):
    """Import one of the peer's modules without vLLM, and without what the package does at import.

    Its `__init__` asks a metadata server about the TPU and rewrites XLA_FLAGS and
    LIBTPU_INIT_ARGS: what is measured here would no longer be compiled like our own kernel.
    """
    if (words := absence(peer)) is not None:
        raise PeerAbsent(words)
    with _stubs():
        return importlib.import_module(module)


@contextlib.contextmanager
def _stubs():
    """An empty package in place of tpu_inference's `__init__` and a logger in place of vLLM's.

    They are gone afterwards, so that who wants the real packages in this process gets them.
    """
    package = types.ModuleType("tpu_inference")
    spec = importlib.util.find_spec("tpu_inference")
    package.__path__ = list(spec.submodule_search_locations)
    logger = types.ModuleType("vllm.logger")
    logger.init_logger = logger._VllmLogger = lambda name: mock.Mock(name=name)
    # The kernel for head_dim 64 asks it for the device's name, and it asks for torch.
    utils = types.ModuleType("tpu_inference.utils")
    utils.get_device_name = lambda: ""
    stubs = {
        "tpu_inference": package,
        "tpu_inference.utils": utils,
        "vllm": types.ModuleType("vllm"),
        "vllm.logger": logger,
    }
    added = {name: stub for name, stub in stubs.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def _program(function, w: Workload, kv_cache, **options) -> Program:
    num_tokens = w.num_seqs * w.q_len
    new = w.kv(num_tokens)
    args = (w.queries(num_tokens), new, new, kv_cache, *w.metadata)
    return Program(f"rpa.lab.peers:{function}", args, options, donate_argnums=(3,))


def _jax_program(w: Workload) -> Program:
    num_pages, page_size, *_ = w.kv_cache.shape
    _, num_kv_heads, head_dim = w.heads
    shape = (num_pages, page_size, 2 * num_kv_heads, head_dim)
    return _program("jax_v2", w, jax.ShapeDtypeStruct(shape, w.kv_dtype))


PROGRAMS: dict[str, Callable[[Workload], Program]] = {
    "v3": lambda w: _program("v3", w, w.kv_cache),
    "batched": lambda w: _program("batched", w, w.kv_cache),
    "jax": _jax_program,
}
"""What the lab compiles, by the name of the peer; each takes the keyword argument `chip`."""
