"""Where the learner's function runs, and what stops it when it does not stop by itself.

A runner is `runner(drive, function, arguments, limit_s)` and returns `drive(function,
*arguments)`. Plain JAX runs in this process: nothing to start, so a check takes a second. An
exercise whose code can wait for ever outside Python (a DMA kernel that waits for a semaphore nobody
signals) passes another runner to its `Exercise`; nothing else changes.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import jax


class TookTooLong(Exception):
    """The function was stopped at its time limit."""


def in_process(drive: Callable, function: Callable, arguments: Sequence, limit_s: float):
    """Run in this process, with a time limit for loops that never end.

    Raises:
        TookTooLong: after `limit_s` seconds, if the function is in Python code. Inside a compiled
        loop (`lax.while_loop`) Python is not asked: there only a kernel restart helps.
    """
    # Without "highest", float32 matmuls on a TPU round to bfloat16 and right answers fail.
    with jax.default_matmul_precision("highest"), time_limit(limit_s):
        return jax.block_until_ready(drive(function, *arguments))


@contextlib.contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Raise TookTooLong in the body after `limit_s` seconds, where the system can do that.

    That is the main thread of Linux and macOS, where notebooks run their cells; elsewhere (Windows)
    the body runs without a limit and the learner interrupts it by hand.

    >>> with time_limit(10.0):
    ...     1 + 1
    2
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not (hasattr(signal, "SIGALRM") and on_main_thread):
        yield
        return

    def stop(signum, frame):
        raise TookTooLong(f"stopped after {limit_s:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
