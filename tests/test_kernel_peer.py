"""A second oracle: the pure-JAX reference of tpu-inference 0.32.0, on the shapes of its own tests.

Where the two disagree on purpose: padding rows (the peer returns fewer rows), `use_causal_mask=
False` with a window (the peer's reference drops the window), sequences without new tokens (the
peer refuses them), attention sinks (the peer has none).
"""

import importlib.util
import logging
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from rpa import dense
from tests.batches import Shape, make_case
from tests.kernel_harness import ON_WAIT
from tests.kernel_runs import attend

installed = importlib.util.find_spec("tpu_inference") is not None
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not installed, reason="no peer here: make peers installs tpu-inference"),
]

SHAPES = {
    "32/8, 128": Shape(32, 8, 128, page_size=16, dtype="bfloat16"),
    "5/1, 128": Shape(5, 1, 128, page_size=16, dtype="bfloat16"),
    "3/3, 64, float32": Shape(3, 3, 64, page_size=16, dtype="float32"),
    "12/2, 256": Shape(12, 2, 256, page_size=16, dtype="bfloat16"),
}
OPTIONS = {
    "plain": {},
    "window and cap": {"sliding_window": 5, "soft_cap": 50.0},
    "scales": {"k_scale": 0.5, "v_scale": 0.25},
}
LENGTHS = [(1, 17), (1, 64), (5, 20), (20, 31), (13, 60)]


def peer_reference():
    """The peer's function; its package asks for vllm's logger, which nothing here needs."""
    logger = types.ModuleType("vllm.logger")
    logger.init_logger = logger._VllmLogger = logging.getLogger
    sys.modules.setdefault("vllm", types.ModuleType("vllm"))
    sys.modules.setdefault("vllm.logger", logger)
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel

    return kernel.ref_ragged_paged_attention


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_the_peers_reference(name, options):
    shape = SHAPES[name]
    case = make_case(shape, LENGTHS)
    args = [np.nan_to_num(x.astype(np.float32)).astype(x.dtype) for x in case.arrays]
    ours, cache = attend(case, ON_WAIT, **OPTIONS[options])
    theirs, their_cache = peer_reference()(
        *map(jnp.asarray, args),
        *map(jnp.asarray, case.metadata),
        sm_scale=shape.head_dim**-0.5,
        **OPTIONS[options],
    )
    rows = len(theirs)
    assert rows == sum(q_len for q_len, _ in LENGTHS)
    truth = dense.Truth(np.asarray(theirs).astype(np.float64), np.ones(theirs.shape[:2]))
    # The peer's reference rounds scores and weights to bfloat16, so it is no better than 1 %.
    limit = 5e-6 if shape.dtype == "float32" else 1e-2
    assert dense.relative_error(ours[:rows], truth) < limit
    for page, slot in case.new_slots:
        np.testing.assert_array_equal(cache[page, slot], np.asarray(their_cache)[page, slot])
