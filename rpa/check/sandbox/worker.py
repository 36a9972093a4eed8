"""The process in which learners' kernels run: `python -m rpa.check.sandbox.worker`.

It reads jobs from its standard input and writes answers to its standard output, both pickled, until
the input ends. Each job runs twice, because no single mode of the TPU interpreter finds everything:

    on_wait                  a copy moves its bytes as late as it may, so what is read too early is
                             NaN; the run is recorded, and the record judged
    (`rpa.check.sandbox.faults`) eager, detect_races      a copy moves its bytes at once, and two
                             clocks say what could have happened in another order

A wait that can never end raises here. What still never ends (a loop) is killed from outside.
"""

import contextlib
import io
import linecache
import os
import pickle
import re
import sys

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from rpa import interpreter
from rpa.check.errors import KernelFault, WrongResult
from rpa.check.messages import explain_exception
from rpa.check.sandbox.faults import RACE, fault_of, outside
from rpa.check.sandbox.pickling import unpack
from rpa.check.sandbox.process import Answer, Job
from rpa.lab.copies.timeline import Recorder


class Impatient(Recorder):
    """A recorder that refuses a wait which can never end, where the interpreter would hang."""

    def _on_dma_wait(self, **arguments):
        super()._on_dma_wait(**arguments)
        if self.timeline.unfinished_wait:
            raise KernelFault("the kernel hangs")

    def with_names(self, text: str) -> str:
        """The interpreter's words with names: for a kernel's argument it says (0 0 smem 102)."""

        def name(found):
            buffer = self._buffers.get(int(found[1]))
            return buffer.name if buffer else found[0]

        return re.sub(r"\(\d+ \d+ \w+ (\d+)\)", name, text)


def run(job: Job) -> Answer:
    """Run a job in both modes; nothing that the learner's code does gets out as an exception."""
    recorder, printed = Impatient(), io.StringIO()
    function = None
    try:
        with contextlib.redirect_stdout(printed):
            function = unpack(job.parcel)
            result = _on_wait(job, function, recorder)
            _eager(job, function)
    except KernelFault as fault:
        return Answer("fault", str(fault), printed.getvalue(), recorder.timeline)
    except WrongResult as wrong:
        return Answer("wrong", str(wrong), printed.getvalue(), recorder.timeline)
    except Exception as error:
        if isinstance(error, NotImplementedError) and str(error).startswith("Exercise "):
            return Answer("stub", str(error), printed.getvalue(), None)
        text = recorder.with_names(explain_exception(_short(error), function))
        return Answer("raised", text, printed.getvalue(), recorder.timeline)
    return Answer("result", result, printed.getvalue(), recorder.timeline)


def _on_wait(job, function, recorder):
    """The result of the recorded run, if nothing is wrong with its copies."""
    try:
        with interpreter.observe(recorder):
            result = _call(job, function, interpreter.params())
    except Exception:
        interpreter.reset()
        # Whatever was raised, a broken rule of DMAs is the better explanation.
        hangs = recorder.timeline.unfinished_wait and fault_of(recorder.timeline)
        if fault := hangs or outside(recorder.timeline):
            raise KernelFault(fault) from None
        raise
    if fault := fault_of(recorder.timeline):
        raise KernelFault(fault)
    if job.judge and (text := job.judge(recorder.timeline, *job.arguments)):
        raise KernelFault(text)
    return result


def _eager(job, function):
    try:
        params = interpreter.params(dma_execution_mode="eager", detect_races=True)
        _call(job, function, params)
        raced = interpreter.races_found()
    finally:
        interpreter.reset()
    if raced:
        raise KernelFault(f"Your kernel {RACE}.")


def _call(job, function, params):
    # Many JAX versions have no argument to set this from outside but the context.
    with pltpu.force_tpu_interpret_mode(params), jax.default_matmul_precision("highest"):
        result = job.drive(function, *job.arguments)
        result = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, result)
        jax.effects_barrier()
    return result


def _short(error: Exception) -> Exception:
    """An error of the interpreter without the hundred lines in which JAX wraps it."""
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return error
    lines = [line for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return type(error)((reasons or lines)[-1]).with_traceback(error.__traceback__)


def main() -> None:
    """Answer jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not get between the answers
    pickle.dump("ready", answers)
    answers.flush()
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(run(job), answers)
        answers.flush()
        linecache.clearcache()


if __name__ == "__main__":
    main()
