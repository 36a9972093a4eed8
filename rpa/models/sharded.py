"""The model over several devices: heads and matrices shared out, Megatron's way.

Shoeybi et al. 2019 (arXiv 1909.08053): of two matrices in a row the first is cut by columns and the
second by rows, so that what is between them stays on its device, and one sum over devices per pair
is all that crosses the wire. In a layer these are q, k, v and o with attention between them, and
gate, up and down. The code of the model stays as it is: XLA finds the sums from how the parameters
are cut. Only attention is told (`rpa.parallel.Heads`), because a kernel is not XLA's to cut.

Heads that do not go into the number of devices are padded with heads of zeros: their rows of o_proj
are zero, so they change nothing.
"""

from dataclasses import replace

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rpa.page_pool import cdiv
from rpa.parallel import Heads


def padded_heads(num_q_heads, num_kv_heads, num_devices) -> tuple[int, int]:
    """The least numbers of query and KV heads, no less than given, that the devices can share.

    SmolLM2 on eight devices: a fourth KV head, each KV head on two devices with two query heads.

    >>> padded_heads(9, 3, 8), padded_heads(32, 8, 8)
    ((16, 4), (32, 8))
    """
    group, num_padded = num_q_heads // num_kv_heads, num_kv_heads
    while num_padded % num_devices and num_devices % num_padded:
        num_padded += 1
    devices_per_head = max(1, num_devices // num_padded)
    return num_padded * cdiv(group, devices_per_head) * devices_per_head, num_padded


def pad_heads(params, config, num_devices):
    """Parameters and config of the same model, with heads that `num_devices` can share out.

    Returns:
        params as NumPy arrays, and a LlamaConfig.
    """
    num_q_heads, num_kv_heads = padded_heads(config.num_q_heads, config.num_kv_heads, num_devices)
    groups = (config.num_q_heads // config.num_kv_heads, num_q_heads // num_kv_heads)
    more = (0, num_kv_heads - config.num_kv_heads), (0, groups[1] - groups[0]), (0, 0)

    def pad(matrix, axis, group, padding):
        """Add heads of zeros along the axis that holds [num_kv_heads, group, head_dim]."""
        matrix = np.asarray(matrix)
        before, after = matrix.shape[:axis], matrix.shape[axis + 1 :]
        heads = (config.num_kv_heads, group, config.head_dim)
        padding = [(0, 0)] * len(before) + list(padding) + [(0, 0)] * len(after)
        return np.pad(matrix.reshape(*before, *heads, *after), padding).reshape(*before, -1, *after)

    one_per_group = (more[0], (0, 0), (0, 0))
    layers = dict(params["layers"])
    layers["q_proj"] = pad(layers["q_proj"], 2, groups[0], more)
    layers["o_proj"] = pad(layers["o_proj"], 1, groups[0], more)
    for name in ("k_proj", "v_proj"):
        layers[name] = pad(layers[name], 2, 1, one_per_group)
    padded = replace(config, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
    return params | {"layers": layers}, padded


def param_specs(config, mesh, axis):
    """How each parameter is cut: a pytree like that of `rpa.models.llama.param_shapes`.

    Raises:
        ValueError: if the devices cannot share heads, feed-forward or vocabulary.

    >>> from rpa.models import LlamaConfig
    >>> tiny = LlamaConfig(num_layers=2, hidden_size=12, num_q_heads=3, num_kv_heads=1, head_dim=4,
    ...                    ffn_size=16, vocab_size=10, context_len=8)
    >>> specs = param_specs(tiny, jax.make_mesh((1,), ("model",)), "model")
    >>> tuple(specs["layers"]["down_proj"])
    (None, 'model', None)
    """
    num_devices = mesh.shape[axis]
    sizes = {"num_q_heads": config.num_q_heads, "ffn_size": config.ffn_size}
    for name, size in (sizes | {"vocab_size": config.vocab_size}).items():
        if size % num_devices:
            raise ValueError(
                f"{name} is {size}, which {num_devices} devices cannot share out: take a number "
                "of devices that divides it, and for heads call pad_heads before."
            )
    whole = PartitionSpec()
    columns, rows = PartitionSpec(None, None, axis), PartitionSpec(None, axis, None)
    # Where a KV head is on several devices, each computes its keys and values itself.
    kv_is_cut = "keys" in Heads(axis).cuts(num_devices, config.num_kv_heads)
    return {
        "embedding": PartitionSpec(axis, None),
        "final_norm": whole,
        "layers": {
            "attention_norm": whole,
            "q_proj": columns,
            "k_proj": columns if kv_is_cut else whole,
            "v_proj": columns if kv_is_cut else whole,
            "o_proj": rows,
            "ffn_norm": whole,
            "gate_proj": columns,
            "up_proj": columns,
            "down_proj": rows,
        },
    }


def shard_params(params, config, mesh, axis):
    """The parameters on the devices of a mesh, each device with its part; also of other processes.

    Args:
        params, config: of `pad_heads`, if heads need it.
        mesh, axis: the devices, and the axis along which they share the model out.
    """

    def put(spec, array):
        array = np.asarray(array)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(put, param_specs(config, mesh, axis), params, is_leaf=is_spec)
