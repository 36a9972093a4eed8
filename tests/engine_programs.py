"""Rung 8 inside the attention layers of the engines, on host devices: a program, run by the tests.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 NPROC=32 JAX_PLATFORMS=cpu \\
        python -m tests.engine_programs tpu_inference      # or sgl_jax

prints one JSON object per case. It is a program of its own because the number of devices is fixed
when JAX starts, and because it puts empty modules in the place of vLLM and torch.
"""

import json
import logging
import sys
import types
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rpa.integrations import sglang_jax, tpu_inference
from rpa.integrations.switch import log
from rpa.paging import cdiv
from rpa.ragged import ref_ragged_paged_attention
from tests import engine_stand_ins
from tests.batches import Shape, bits, make_case

LENGTHS = [(1, 9), (1, 16), (0, 5), (3, 17), (11, 11)]
"""(q_len, kv_len): decodes, an idle slot, new tokens behind a full page, a prompt."""


DECODES = [(1, 9), (1, 16), (1, 30), (1, 1)]


@dataclass(frozen=True)
class Layer:
    """A case: sizes of the layer, axes of the mesh, and what the layer is asked for."""

    mesh: tuple[int, int]  # ranks with batches of their own, shards of the heads
    shape: Shape = Shape(16, 8, 128, 8)
    options: dict = field(default_factory=dict)  # of the layer
    has_sinks: bool = False


FLOAT8 = Shape(8, 4, 128, 8, dtype="float8_e4m3fn")
SHARED = Shape(8, 4, 64, 8, dtype="bfloat16", share_lanes=True)
TPU_INFERENCE = {
    **{f"mesh {d} x {m}": Layer((d, m)) for d, m in [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)]},
    "mesh 1 x 8": Layer((1, 8)),
    "window and cap": Layer((2, 2), options={"attention_chunk_size": 7, "attn_logits_soft_cap": 5}),
    "float8": Layer((1, 2), FLOAT8, {"k_scale": 0.5, "v_scale": 2.0}),
    "sinks, heads of 64": Layer((1, 2), SHARED, has_sinks=True),
    "shared cache": Layer((2, 2), options={"update_kv_cache": False}),
    "no causal mask": Layer((1, 2), options={"use_causal_mask": False}),
}
REFERENCE_NAMES = {
    "attention_chunk_size": "sliding_window",
    "attn_logits_soft_cap": "soft_cap",
}


def on_mesh(mesh, array, *axes):
    """The array, laid out over the mesh as the engine lays it out."""
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))


def run_tpu_inference(layer: Layer) -> dict:
    """What their attention layer returns with rung 8 in it, against our reference."""
    from tpu_inference.layers.common import attention_interface
    from tpu_inference.layers.common.attention_metadata import AttentionMetadata
    from tpu_inference.runner.kv_cache import get_kv_cache_shape_with_mesh

    (data, model), shape = layer.mesh, layer.shape
    mesh = Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))
    stored_before = not layer.options.get("update_kv_cache", True)
    cases = [
        make_case(shape, LENGTHS, seed=s, new_tokens_only=not stored_before) for s in range(data)
    ]
    if jnp.dtype(shape.dtype).itemsize == 1:
        for case in cases:
            case.queries = case.queries.astype(jnp.bfloat16)
    q, k, v, cache = (np.concatenate(part) for part in zip(*(c.arrays for c in cases), strict=True))
    num_kv_heads = shape.num_kv_heads
    sizes = (data * shape.num_pages, shape.page_size, num_kv_heads, shape.head_dim)
    theirs = get_kv_cache_shape_with_mesh(mesh, *sizes, jnp.dtype(shape.dtype))
    metadata = [np.concatenate(part) for part in zip(*(c.metadata for c in cases), strict=True)]
    kv_lens, page_indices, cu_q_lens, distribution = (on_mesh(mesh, m, "data") for m in metadata)
    tokens = [on_mesh(mesh, array, "data", "model", None) for array in (q, k, v)]
    sinks = None
    if layer.has_sinks:
        sinks = jnp.linspace(-1, 1, shape.num_q_heads)
    options = {"sm_scale": shape.head_dim**-0.5, **layer.options}

    def attend(kv_cache, q, k, v, sinks):
        return attention_interface.attention(
            *(kv_cache, q, k, v),
            AttentionMetadata(
                input_positions=None,
                block_tables=page_indices,
                seq_lens=kv_lens,
                query_start_loc=cu_q_lens,
                request_distribution=distribution,
            ),
            mesh,
            sinks=sinks,
            **options,
        )

    kv_cache = on_mesh(mesh, cache, "data", None, "model", None, None)
    kv_cache, output = jax.jit(attend)(kv_cache, *tokens, sinks)
    names = {REFERENCE_NAMES.get(name, name): value for name, value in options.items()}
    expected = [
        ref_ragged_paged_attention(*c.arrays, *c.metadata, attention_sink=sinks, **names)[0]
        for c in cases
    ]
    cache_after = np.concatenate(
        [c.kv_cache if stored_before else _as(c.expected_cache(), c.kv_cache) for c in cases]
    )
    return {
        "shapes_agree": tuple(theirs) == cache.shape,
        "error": relative_error(output, np.concatenate(expected)),
        "cache_exact": bool((bits(kv_cache) == bits(cache_after)).all()),
        "runs_ours": hasattr(attention_interface.ragged_paged_attention, "replaces"),
    }


SGLANG_JAX = {
    "decode, mesh 1 x 1": Layer((1, 1), options={"lengths": DECODES}),
    "decode, mesh 2 x 4": Layer((2, 4), options={"lengths": DECODES}),
    "extend, mesh 1 x 8": Layer((1, 8), options={"lengths": LENGTHS}),
    "extend, mesh 2 x 2": Layer((2, 2), options={"lengths": LENGTHS}),
    "extend, bfloat16, window and cap": Layer(
        (1, 2),
        Shape(8, 4, 128, 8, dtype="bfloat16"),
        {"lengths": LENGTHS, "sliding_window_size": 7, "logit_cap": 5.0},
    ),
}


def run_sgl_jax(layer: Layer) -> dict:
    """What their flash attention backend returns with rung 8 in it, against our reference."""
    from sgl_jax.srt.layers.attention import flashattention_backend
    from sgl_jax.srt.model_executor.forward_batch_info import ForwardMode

    (data, model), shape = layer.mesh, layer.shape
    options = dict(layer.options)
    lengths = [pair for pair in options.pop("lengths") if pair[0]]
    mesh = Mesh(
        np.array(jax.devices()[: data * model]).reshape(data, model),
        ("data", "tensor"),
        axis_types=(AxisType.Explicit,) * 2,
    )
    cases = [make_case(shape, lengths, seed=s) for s in range(data)]
    backend = flashattention_backend.FlashAttention(
        *(shape.num_q_heads, shape.num_kv_heads, shape.head_dim),
        page_size=shape.page_size,
        mesh=mesh,
    )
    decodes = all(q_len == 1 for q_len, _ in lengths)
    metadata = [_sgl_metadata(case, len(lengths)) for case in cases]
    forward = types.SimpleNamespace(
        forward_mode=ForwardMode.DECODE if decodes else ForwardMode.EXTEND, spec_info=None
    )
    batch = types.SimpleNamespace(
        dp_size=data,
        per_dp_bs_size=shape.max_num_seqs,
        forward_mode=forward.forward_mode,
        **{name: np.concatenate([m[name] for m in metadata]) for name in metadata[0]},
    )
    q, k, v, cache = (np.concatenate(part) for part in zip(*(c.arrays for c in cases), strict=True))
    kv_cache = on_mesh(mesh, cache, "data", None, "tensor", None, None)
    attention = types.SimpleNamespace(
        **{"layer_id": 0, "head_dim": shape.head_dim, "scaling": shape.head_dim**-0.5},
        **{"sliding_window_size": None, "logit_cap": None} | options,
        **{"xai_temperature_len": -1, "softmax_dtype": None},
    )
    with jax.set_mesh(mesh):
        backend.forward_metadata = backend.get_forward_metadata(batch)

        def attend(kv_cache, q, k, v):
            pool = types.SimpleNamespace(get_fused_kv_buffer=lambda layer_id: kv_cache)
            return backend(q, k, v, attention, forward, pool)

        tokens = [on_mesh(mesh, array, "data", "tensor", None) for array in (q, k, v)]
        output, kv_cache = jax.jit(attend)(kv_cache, *tokens)
    names = {"sliding_window_size": "sliding_window", "logit_cap": "soft_cap"}
    options = {names[name]: value for name, value in options.items()}
    expected = [
        ref_ragged_paged_attention(
            *c.arrays, *c.metadata, sm_scale=shape.head_dim**-0.5, **options
        )[0]
        for c in cases
    ]
    cache_after = np.concatenate([c.expected_cache() for c in cases])
    return {
        "error": relative_error(np.asarray(output).reshape(q.shape), np.concatenate(expected)),
        "cache_exact": bool((bits(kv_cache) == cache_after).all()),
        "runs_ours": hasattr(flashattention_backend.ragged_paged_attention_v3, "replaces"),
    }


def _sgl_metadata(case, num_seqs) -> dict:
    """What their scheduler hands over for one rank: lengths, and the slot of every token."""
    shape, batch = case.shape, case.batch
    kv_lens, q_lens = np.zeros((2, shape.max_num_seqs), np.int32)
    kv_lens[:num_seqs] = batch.kv_lens[:num_seqs]
    q_lens[:num_seqs] = np.diff(batch.cu_q_lens[: num_seqs + 1])
    table = batch.page_indices.reshape(shape.max_num_seqs, -1)
    pages = np.concatenate([table[s, : cdiv(kv_lens[s], shape.page_size)] for s in range(num_seqs)])
    slots = (pages[:, None] * shape.page_size + np.arange(shape.page_size)).reshape(-1)
    cache_loc = np.zeros(shape.num_pages * shape.page_size, np.int32)
    cache_loc[: len(slots)] = slots
    return {"seq_lens": kv_lens, "extend_seq_lens": q_lens, "cache_loc": cache_loc}


def _as(words, like):
    return words.view(like.dtype)


def relative_error(output, expected) -> float:
    """||output - expected|| / ||expected||."""
    output, expected = (np.asarray(each, np.float64) for each in (output, expected))
    return float(np.linalg.norm(output - expected) / np.linalg.norm(expected))


class Heard(logging.Handler):
    """What the integrations logged."""

    def __init__(self):
        super().__init__()
        self.words = []

    def emit(self, record):
        self.words.append(record.getMessage())


ENGINES = {
    "tpu_inference": (tpu_inference, TPU_INFERENCE, run_tpu_inference),
    "sgl_jax": (sglang_jax, SGLANG_JAX, run_sgl_jax),
}


def main(engine, *names):
    """Run the cases of an engine, or those that are named."""
    heard = Heard()
    log.addHandler(heard)
    engine_stand_ins.install(engine)
    integration, layers, run = ENGINES[engine]
    integration.use_rpa()
    for name in names or layers:
        heard.words.clear()
        result = {"case": name, **run(layers[name]), "heard": heard.words}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
