"""Run a learner's DMA kernel where it can do no harm: in a process that can be killed.

A kernel that waits for a semaphore nobody signals waits outside Python, and no exception gets it
out. So it runs in a worker (`rpa.check.sandbox.worker`) that stays warm between checks, on the CPU
also where this process has a TPU, and is killed and started again if it does not answer.
"""

import atexit
import contextlib
import functools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rpa.check.errors import CannotShip, KernelFault, WrongResult
from rpa.check.runner import TookTooLong
from rpa.check.sandbox import fast_compile
from rpa.check.sandbox.pickling import Parcel, pack
from rpa.lab.copies.events import Timeline

START_LIMIT_S = 120.0
"""To import JAX takes seconds on an idle laptop and a minute on a busy one."""


class Job(NamedTuple):
    """`drive(function, *arguments)`; `judge(timeline, *arguments)` says what else is wrong."""

    parcel: Parcel
    drive: Callable
    arguments: list
    judge: Callable[..., str | None] | None


class Answer(NamedTuple):
    """What became of a job."""

    kind: str
    """ "result", "fault", "wrong", "stub" or "raised"."""
    value: object
    """The result, or the text."""
    printed: str
    timeline: Timeline | None


def in_sandbox(judge: Callable | None = None) -> Callable:
    """A runner for `Exercise(runner=...)`: both interpreter modes, in a process of its own.

    Args:
        judge: (Timeline, *arguments) -> words about what else is wrong with the copies, or None.
            It and `drive` have to stand at the top of a module, for they travel by their names.
    """
    return functools.partial(_run, judge=judge)


def start() -> None:
    """Start the worker in the background, so that the first check does not wait for it."""
    _worker()


def try_kernel(drive: Callable, kernel: Callable, *arguments, limit_s: float = 10.0):
    """Run a kernel of your own in the sandbox and print what is wrong with it, if anything is.

    Args:
        drive: `drive(kernel, *arguments)`, a function of a module that calls it.
        kernel: your function.
        limit_s: seconds after which it is stopped.

    Returns:
        The result, or None where there is none.
    """
    try:
        return _run(drive, kernel, arguments, limit_s)
    except (KernelFault, CannotShip) as fault:
        print(fault)
    except TookTooLong as late:
        print(f"Your kernel was {late}.")


def _run(drive, function, arguments: Sequence, limit_s: float, judge=None):
    """A runner, see `rpa.check.runner`.

    Raises:
        KernelFault: a rule of DMAs is broken, or the function raises; the text says it all.
        TookTooLong: it did not end by itself.
    """
    answer = _worker().ask(Job(pack(function), drive, list(arguments), judge), limit_s)
    print(answer.printed, end="")
    if answer.kind == "result":
        return answer.value
    if answer.kind == "wrong":
        raise WrongResult(answer.value)
    if answer.kind == "stub":
        raise NotImplementedError(answer.value)
    raise KernelFault(answer.value)


@functools.cache
def _worker():
    return Worker()


def _busy() -> float:
    """How much longer things take because others use this machine too; 1 where nobody does."""
    waiting = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1.0, waiting / (os.cpu_count() or 1))


class Worker:
    """The process, started again when it had to be killed."""

    def __init__(self):
        self._start()
        atexit.register(self._kill)

    def _start(self):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
        given = os.environ.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{given} {fast_compile.xla_flags()}".strip()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rpa.check.sandbox.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._ready = False

    def ask(self, job, limit_s: float):
        """The worker's answer to a job.

        Raises:
            TookTooLong: after limit_s, more on a busy machine; the worker is killed then, and a
                new one starts.
        """
        if not self._ready:
            if self._receive(START_LIMIT_S) != "ready":
                self._restart()
                raise KernelFault("The process that runs your kernel did not start. Try again.")
            self._ready = True
        pickle.dump(job, self._process.stdin)
        self._process.stdin.flush()
        limit_s *= _busy()
        answer = self._receive(limit_s)
        if answer is None:
            ended = self._has_ended()
            self._restart()
            if ended:
                raise KernelFault(
                    "Your kernel ended the process that it ran in. Does it write or copy past "
                    "the end of an array?"
                )
            raise TookTooLong(f"stopped after {limit_s:.0f} s")
        return answer

    def _receive(self, limit_s: float):
        """What the worker sends, or None if nothing comes in time or it has ended."""
        received = []

        def read():
            with contextlib.suppress(EOFError):  # it has ended
                received.append(pickle.load(self._process.stdout))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(limit_s)
        return received[0] if received else None

    def _has_ended(self):
        try:
            self._process.wait(0.5)  # its pipe closes a moment before it is gone
        except subprocess.TimeoutExpired:
            return False
        return True

    def _restart(self):
        self._kill()
        self._start()

    def _kill(self):
        self._process.kill()
        self._process.wait()
