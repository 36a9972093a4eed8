"""Run a learner's DMA kernel where it can do no harm: in a process that can be killed.

A kernel that waits for a semaphore that is never signalled waits outside Python, and no exception
gets it out. So it runs in a worker (`rpa.check.sandbox.worker`) that stays warm between checks, on
the CPU also where this process has a TPU, and is killed and started again if it does not answer.

What happens to the worker itself is never the learner's mistake:

    the Stop button        reaches every process of a notebook's session: the worker has its own
    an exception in `ask`  ends the worker and starts another: what still runs cannot answer later
    a worker that is gone  is replaced, and the question asked once more
    an old answer          carries the number of its question, and is dropped
"""

import atexit
import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rpa.check.errors import CannotShip, KernelFault, SandboxFailed, WrongResult
from rpa.check.runner import TookTooLong
from rpa.check.sandbox import fast_compile, pipe
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
    except (KernelFault, CannotShip, SandboxFailed) as fault:
        print(fault)
    except TookTooLong as late:
        print(f"Your kernel was {late}.")


def _run(drive, function, arguments: Sequence, limit_s: float, judge=None):
    """A runner, see `rpa.check.runner`.

    Raises:
        KernelFault: a rule of DMAs is broken, or the function raises; the text says it all.
        TookTooLong: it did not end by itself.
        SandboxFailed: the process is not to be had, whatever the function is.
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


def _worker():
    return _worker_of(os.getpid())


@functools.cache
def _worker_of(pid):
    """The worker of this process: a process that is forked from it has pipes to the same one."""
    return Worker()


def _busy() -> float:
    """How much longer things take because the machine is shared; 1 where it is idle."""
    waiting = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1.0, waiting / (os.cpu_count() or 1))


class Worker:
    """The process, started again when it had to be killed, or was."""

    def __init__(self):
        self._lock = threading.Lock()  # cells may run in threads
        self._process = None
        self._number = 0
        self._start()
        atexit.register(self._end)

    def ask(self, job, limit_s: float):
        """The worker's answer to a job.

        Raises:
            TookTooLong: after limit_s, more on a busy machine.
            KernelFault: the job ends the process, twice.
            SandboxFailed: the process does not start, or is killed from outside, twice.
        """
        with self._lock:
            try:
                return self._ask(pickle.dumps(job), limit_s)
            except BaseException:  # the Stop button, too
                self._restart()
                raise

    def _ask(self, job, limit_s):
        for _ in range(2):  # what ends a worker may have happened before this job
            if self._process is None or self._process.poll() is not None:
                self._restart()
            if not self._ready and self._talk(START_LIMIT_S) is None:
                raise SandboxFailed(f"{NOT_STARTED} {_why_not()}. {NOT_YOURS}")
            self._ready = True
            self._number += 1
            limit_now_s = limit_s * _busy()
            answer = self._talk(limit_now_s, job)
            if answer is not None:
                return _opened(answer)
            code = self._exit_code()
            if code is None:
                raise TookTooLong(f"stopped after {limit_now_s:.0f} s")
        if code in _FROM_OUTSIDE:
            raise SandboxFailed(f"{KILLED} {NOT_YOURS}")
        raise KernelFault(
            "Your kernel ended the process that it ran in. Does it write or copy past the end of "
            "an array?"
        )

    def _talk(self, limit_s: float, job: bytes | None = None):
        """Send a job, if there is one; the answer to it, or None if none comes in time.

        In a thread, because neither reading nor writing a pipe has a time limit everywhere.
        """
        process, number, received = self._process, self._number, []

        def talk():
            # EOFError and OSError: the worker is gone.
            with contextlib.suppress(EOFError, OSError):
                if job is not None:
                    pipe.send(process.stdin, number, job)
                while not received:
                    answered, message = pipe.receive(process.stdout)
                    if answered == number:
                        received.append(message)

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        thread.join(limit_s)
        return received[0] if received else None

    def _exit_code(self):
        """How the worker ended, or None if it has not."""
        try:
            return self._process.wait(0.5)  # its pipe closes a moment before it is gone
        except subprocess.TimeoutExpired:
            return None

    def _start(self):
        self._ready, self._number = False, 0
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rpa.check.sandbox.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # nothing is left to flush into the pipe of a worker that is gone
                env=_environment(),
                cwd=_folder(),
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows
            )
        except OSError as error:
            raise SandboxFailed(f"{NOT_STARTED} {error}. {NOT_YOURS}") from None

    def _restart(self):
        self._end()
        self._start()

    def _end(self):
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):  # gone already
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)  # what a kernel has started, too
        process.kill()
        process.wait()


NOT_STARTED = "The process in which kernels are checked does not start:"
KILLED = (
    "The process in which your kernel ran was killed from outside, twice, as a system does when "
    "its memory runs out. Close what else takes memory."
)
NOT_YOURS = (
    "That is not a mistake of your function, and no attempt was counted. Try again; if it stays "
    "so, restart the notebook's kernel and look at `rpa.doctor()`."
)

_FROM_OUTSIDE = [
    -number
    for name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
    if (number := getattr(signal, name, None))
]


def _opened(data: bytes):
    """The answer in a message."""
    try:
        return pickle.loads(data)
    except Exception as error:  # a class of the learner's is known to the worker alone
        raise KernelFault(
            "Your function returns what cannot be sent back from the process that it runs in "
            f"({type(error).__name__}: {error}): return arrays."
        ) from None


def _why_not() -> str:
    """The last line that Python prints where the worker's modules cannot be imported."""
    command = [sys.executable, "-c", "import rpa.check.sandbox.worker"]
    try:
        tried = subprocess.run(
            command,
            env=_environment(),
            cwd=_folder(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=START_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = tried.stderr.strip().splitlines()
    return lines[-1] if tried.returncode and lines else "it ends without a word"


def _environment() -> dict[str, str]:
    here = _folder()
    path = [folder or here for folder in sys.path]  # "" is the working folder
    given = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path),
        "XLA_FLAGS": f"{given} {fast_compile.xla_flags()}".strip(),
    }


def _folder() -> str:
    """The working folder, or one that is there where it has been deleted."""
    try:
        return os.getcwd()
    except OSError:
        return os.path.dirname(os.path.abspath(__file__))
