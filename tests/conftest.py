"""Settings of all tests; they have to stand before jax is imported."""

import os

# Tests compile hundreds of small programs and run each for a moment. Without LLVM's optimisations
# the same XLA program compiles up to ten times faster and gives the same numbers.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
).strip()
