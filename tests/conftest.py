"""Settings of all tests; they have to stand before jax is imported."""

import os
import subprocess
import sys
from pathlib import Path

# Tests compile hundreds of programs and run each for a moment. With optimisation off the same
# program compiles up to ten times faster, and gives the same numbers except for the last bits.
# Which flags this XLA knows is found out once, in a process of its own; the workers of pytest-xdist
# inherit the variable.
IS_SET = "RPA_TESTS_IN_HASTE"
if IS_SET not in os.environ:
    root = Path(__file__).parents[1]
    flags_command = [sys.executable, "-m", "rpa.check.sandbox.fast_compile"]
    flags = subprocess.run(
        flags_command, cwd=root, capture_output=True, text=True, check=True
    ).stdout
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ[IS_SET] = "1"
