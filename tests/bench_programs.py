"""What `python -m rpa bench` times on a TPU, as a function that the lab compiles without one."""

from unittest import mock

import jax

from rpa import chips
from rpa.lab.bench import on_device, stopwatch
from rpa.lab.programs import Workload

WORKLOAD = Workload("llama-3-70b-on-8", page_size=128, num_seqs=4, kv_len=512)


def arguments(name, case):
    """Shapes of the loop's state, the new tokens, and the number of calls."""
    batch = on_device.batch_of(case, WORKLOAD)
    contender = dict(on_device.contenders(WORKLOAD, batch, on_device.PEERS))[name]
    arrays = jax.eval_shape(lambda: on_device.make_arrays(WORKLOAD, batch, contender.cache_shape))
    queries, keys, values, kv_cache = arrays
    return (queries, kv_cache), keys, values, jax.ShapeDtypeStruct((), "int32")


def repeat(state, keys, values, calls, *, name, case, chip):
    """The loop around one contender, as it is built where a TPU is attached."""
    with (
        mock.patch.object(jax, "default_backend", lambda: "tpu"),
        mock.patch.object(chips, "current", lambda: chips.chip(chip)),
    ):
        batch = on_device.batch_of(case, WORKLOAD)
        contender = dict(on_device.contenders(WORKLOAD, batch, on_device.PEERS))[name]
        return stopwatch.repeat(contender.attend, state, keys, values, calls)
