"""The process in which learners' kernels run: `python -m rpa.check.sandbox.worker`.

It reads jobs from its standard input and writes answers to its standard output, both numbered
(`rpa.check.sandbox.pipe`), until the input ends. Each job runs twice, because no single mode of the
TPU interpreter finds everything:

    on_wait              a copy moves its bytes as late as it may, so what is read too early is NaN;
                         the run is recorded, and the record judged (`rpa.check.sandbox.faults`)
    eager, detect_races  a copy moves its bytes at once, and two clocks say what could have happened
                         in another order

A wait that can never end raises here. What still never ends (a loop) is killed from outside, and if
the process outside is gone, the worker ends too.
"""

import contextlib
import io
import linecache
import os
import pickle
import queue
import re
import threading

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from rpa import interpreter
from rpa.check.errors import KernelFault, WrongResult, is_stub, text_of
from rpa.check.messages import explain_exception
from rpa.check.sandbox import pipe
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


LONGEST_OUTPUT = 20_000
"""Characters of what a kernel prints that its check shows."""


class Printed(io.TextIOBase):
    """Keeps the first LONGEST_OUTPUT characters of what is printed, and counts the others.

    >>> printed = Printed()
    >>> print("*" * (LONGEST_OUTPUT + 1), end="", file=printed)
    >>> printed.text()[-42:]
    '... and 1 more characters, not shown here\\n'
    """

    def __init__(self):
        self._kept, self._room, self._left_out = [], LONGEST_OUTPUT, 0

    def write(self, text: str) -> int:
        kept = text[: self._room]
        self._kept.append(kept)
        self._room -= len(kept)
        self._left_out += len(text) - len(kept)
        return len(text)

    def text(self) -> str:
        """What is kept, and how much is not."""
        kept = "".join(self._kept)
        if not self._left_out:
            return kept
        return f"{kept}\n... and {self._left_out:,} more characters, not shown here\n"


def run(job: Job) -> Answer:
    """Run a job in both modes; nothing that the learner's code does gets out as an exception."""
    recorder, printed = Impatient(), Printed()
    function = None
    try:
        with contextlib.redirect_stdout(printed):
            function = unpack(job.parcel)
            result = _on_wait(job, function, recorder)
        with contextlib.redirect_stdout(Printed()):  # the same once more
            _eager(job, function)
    except KernelFault as fault:
        return Answer("fault", str(fault), printed.text(), recorder.timeline)
    except WrongResult as wrong:
        return Answer("wrong", str(wrong), printed.text(), recorder.timeline)
    except BaseException as error:  # `sys.exit()`, `raise KeyboardInterrupt`: this process goes on
        if is_stub(error):
            return Answer("stub", text_of(error), printed.text(), None)
        text = recorder.with_names(explain_exception(_short(error), function))
        return Answer("raised", text, printed.text(), recorder.timeline)
    return Answer("result", result, printed.text(), recorder.timeline)


def _on_wait(job, function, recorder):
    """The result of the recorded run, if nothing is wrong with its copies."""
    try:
        with interpreter.observe(recorder):
            result = _call(job, function, interpreter.params())
    except BaseException:
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


def _short(error: BaseException) -> BaseException:
    """An error of the interpreter without the hundred lines in which JAX wraps it."""
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return error
    lines = [line for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return type(error)((reasons or lines)[-1]).with_traceback(error.__traceback__)


def answer(data: bytes) -> bytes:
    """The pickled answer to a pickled job, whatever happens on the way."""
    try:
        return pickle.dumps(run(pickle.loads(data)))
    except BaseException as error:  # also MemoryError
        cannot = f"Its result cannot be sent to the notebook: {type(error).__name__}: "
        return pickle.dumps(Answer("raised", cannot + text_of(error), "", None))


def main() -> None:
    """Answer jobs until the input ends."""
    jobs, answers = _take_pipes()
    _be_the_first_to_go()
    pipe.send(answers, 0, "ready")
    inbox = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs, inbox), daemon=True).start()
    while True:
        number, job = inbox.get()
        pipe.send(answers, number, answer(job))
        linecache.clearcache()


def _take_pipes():
    """The two pipes under numbers that nothing else knows.

    What a kernel prints past `sys.stdout` must not get between the answers, and what reads or
    closes standard input must not touch the jobs.
    """
    jobs = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return jobs, answers


def _be_the_first_to_go():
    """Where memory runs out, Linux ends the process with the highest score: not the notebook."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")


def _listen(jobs, inbox):
    """Take in jobs in a thread, so that the end of the input ends this process at any time."""
    with contextlib.suppress(EOFError):
        while True:
            inbox.put(pipe.receive(jobs))
    os._exit(0)


if __name__ == "__main__":
    main()
