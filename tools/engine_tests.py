"""Run an engine's own test file for its kernel with rung 8 in place, in the interpreter.

    python tools/engine_tests.py tests/kernels/ragged_paged_attention_kernel_v3_test.py

The file is one of a checkout of tpu-inference or sglang-jax; the package is the one that is
installed. What follows the file goes to pytest (`-k decode`). Tests that ask for a TPU get one:
the interpreter stands in for it. A call that rung 8 refuses fails here, with the reason.
"""

import sys
from pathlib import Path

import pytest
from jax._src import test_util as jtu
from jax.experimental.pallas import tpu as pltpu

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rpa.integrations import sglang_jax, tpu_inference  # noqa: E402
from tests import engine_stand_ins  # noqa: E402

V3 = "tpu_inference.kernels.ragged_paged_attention.v3."
SGLANG = "sgl_jax.srt.kernels.ragged_paged_attention.ragged_paged_attention_v3"
PLACES = {
    V3 + "kernel": ("ragged_paged_attention", tpu_inference.attention),
    V3 + "kernel_hd64": ("ragged_paged_attention_hd64", tpu_inference.attention_hd64),
    SGLANG: ("ragged_paged_attention", sglang_jax.attention),
}
"""Modules that the test files import the kernel from."""


def put_in(text: str) -> None:
    """Rung 8 into the modules that a test file names, without the way back to their kernel."""
    engine = "sgl_jax" if "sgl_jax" in text else "tpu_inference"
    engine_stand_ins.install(engine)
    for name, (function, ours) in PLACES.items():
        if name.startswith(engine):
            setattr(__import__(name, fromlist=[function]), function, ours)


def main(file, *options):
    """Run the tests; the exit code is that of pytest."""
    put_in(Path(file).read_text())
    jtu.is_device_tpu_at_least = lambda version: True
    with pltpu.force_tpu_interpret_mode():  # sglang-jax fills its cache with a kernel, too
        return pytest.main([file, "-q", "-p", "no:cacheprovider", *options])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
