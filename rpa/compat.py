"""What differs between the JAX versions that rpa supports, and nothing else.

The floor is jax 0.7.2, which Colab's TPU runtime ships; the newest JAX is tested too. Every other
file imports from here what has moved, so that a version is dropped by editing one file.
"""

import jax

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])
"""The running JAX as a comparable tuple, e.g. (0, 10, 2)."""

JAX_FLOOR = (0, 7, 2)
"""The oldest JAX that rpa is tested with (Colab's TPU runtime of 2026-08)."""
