"""The small real model that feeds the ladder: SmolLM2-135M, in JAX, attention is a parameter."""

from rpa.models.gguf_file import ModelNotInstalled
from rpa.models.llama import LlamaConfig, capture_layer, forward, layer_cache
from rpa.models.smollm2 import SmolLM2, load_smollm2
from rpa.models.tokenizer import Tokenizer

__all__ = [
    "LlamaConfig",
    "ModelNotInstalled",
    "SmolLM2",
    "Tokenizer",
    "capture_layer",
    "forward",
    "layer_cache",
    "load_smollm2",
]
