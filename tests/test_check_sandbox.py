"""The sandbox for learners' kernels: what hangs is stopped, what is wrong has a name and a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa.check.chapters.launchers import run_chunks, run_copy
from rpa.check.errors import CannotShip, KernelFault
from rpa.check.runner import TookTooLong
from rpa.check.sandbox import process
from rpa.check.sandbox.pickling import pack

ROWS = 8
X = np.ones((ROWS, 128), np.float32)


def run(kernel, launcher=run_copy, arguments=(X,), limit_s=60.0):
    return process.in_sandbox()(launcher, kernel, arguments, limit_s)


def helper(ref):
    return ref[...] * FACTOR


FACTOR = 3.0


def kernel_with_helpers(x_ref, out_ref, buffer_ref, sem):
    def move(source, target):
        copy = pltpu.make_async_copy(source, target, sem)
        copy.start()
        copy.wait()

    move(x_ref, buffer_ref)
    buffer_ref[...] = helper(buffer_ref) + jnp.zeros((ROWS, 1))
    move(buffer_ref, out_ref)


def never_ends(x_ref, out_ref, buffer_ref, sem):
    end = jax.lax.while_loop(lambda i: i != 0, lambda i: -i, 1)
    buffer_ref[...] = jnp.full(buffer_ref.shape, end, jnp.float32)


def waits_for_nothing(x_ref, out_ref, buffer_ref, sem):
    pltpu.make_async_copy(x_ref, buffer_ref, sem).wait()


def raises(x_ref, out_ref, buffer_ref, sem):
    buffer_ref[...] = x_ref.no_such_thing


def prefetches_too_far(x_ref, out_ref, buffers_ref, sems, *, num_chunks):
    """Chunk n + 2 flies into the buffer from which chunk n is still to be read."""

    def copy(n):
        source = x_ref.at[pl.ds(n * ROWS, ROWS)]
        return pltpu.make_async_copy(source, buffers_ref.at[n % 2], sems.at[n % 2])

    copy(0).start()
    copy(0).wait()
    copy(2).start()
    out_ref[...] = buffers_ref[0]
    copy(2).wait()


def copies_what_is_not_there(x_ref, out_ref, buffer_ref, sem):
    @pl.loop(0, 2)
    def _(n):
        copy = pltpu.make_async_copy(x_ref.at[pl.ds(n * ROWS, ROWS)], buffer_ref, sem)
        copy.start()
        copy.wait()


@pytest.fixture(autouse=True)
def known_to_nobody(monkeypatch):
    # As in a notebook: no module of this name can be imported in the other process.
    monkeypatch.delitem(__import__("sys").modules, __name__)


def test_a_kernel_is_sent_with_the_functions_and_values_that_it_uses():
    assert sorted(pack(kernel_with_helpers).sources) == ["helper", "kernel_with_helpers"]
    np.testing.assert_array_equal(run(kernel_with_helpers), 3 * X)


def test_what_never_ends_is_stopped_and_the_next_kernel_runs():
    run(kernel_with_helpers)  # the worker is warm: its start is not part of the limit
    with pytest.raises(TookTooLong, match="stopped after"):
        run(never_ends, limit_s=3.0)
    np.testing.assert_array_equal(run(kernel_with_helpers), 3 * X)


def test_a_deadlock_is_named_with_its_line():
    with pytest.raises(KernelFault, match="that no copy signals") as fault:
        run(waits_for_nothing)
    line = waits_for_nothing.__code__.co_firstlineno + 1
    assert f"Line {line}, `pltpu.make_async_copy(x_ref, buffer_ref, sem).wait()`" in str(
        fault.value
    )


def test_a_buffer_that_is_overwritten_is_named():
    with pytest.raises(KernelFault, match="into a buffer that is still to be read"):
        run(prefetches_too_far, run_chunks, (np.ones((24, 128), np.float32), ROWS))


def test_an_exception_names_the_line():
    with pytest.raises(KernelFault, match="AttributeError") as fault:
        run(raises)
    assert f"line {raises.__code__.co_firstlineno + 1}, in raises" in str(fault.value)


def test_what_cannot_be_sent_is_said_in_words(capsys):
    outside = 3.0
    with pytest.raises(CannotShip, match="at the left margin of a cell"):
        pack(lambda x_ref: outside)
    with pytest.raises(CannotShip, match="write `def`"):
        pack(3)
    process.try_kernel(run_copy, lambda x_ref: outside, X)
    assert "stands inside another function" in capsys.readouterr().out


def test_a_copy_from_outside_of_an_array_is_named_with_its_line():
    with pytest.raises(KernelFault, match="outside of an array") as fault:
        run(copies_what_is_not_there)
    assert "`copy.start()`" in str(fault.value) and "x has the shape (8, 128)" in str(fault.value)
