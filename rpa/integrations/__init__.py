"""Put rung 8 into a serving engine, and take it out again.

| module | engine | what it replaces |
|---|---|---|
| `tpu_inference.py` | vLLM on TPU | the two kernels that its attention layer calls |
| `sglang_jax.py` | SGLang on TPU | the kernel that its flash attention backend calls |
| `switch.py` | both | one function in place of another; back to the engine's where rung 8 refuses |

docs/engines.md says how to try it on a TPU, what to look at, and how to go back.
"""
