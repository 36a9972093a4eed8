"""One notebook at a time reads and writes a file that several open notebooks share."""

import contextlib
import os
import time
from pathlib import Path

WAIT_S = 5.0
"""After this long the file is written anyway: a check never hangs."""

STALE_S = 30.0
"""A lock that is older was left behind by a notebook whose process was ended."""


@contextlib.contextmanager
def alone_with(path: Path):
    """No other process is inside `alone_with(path)` meanwhile; the lock is a file next to it.

    Without it two checks that end at once both read the old file, and the second one writes over
    what the first one added.

    Raises:
        OSError: if the folder cannot be written.
    """
    lock = path.with_name(path.name + ".lock")
    ours, start = False, time.monotonic()
    while not ours and time.monotonic() - start < WAIT_S:
        try:
            # Exclusive creation is atomic on every system that Python runs on, unlike flock.
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            ours = True
        except FileExistsError:
            _drop_if_stale(lock)
            time.sleep(0.02)
    try:
        yield
    finally:
        if ours:
            lock.unlink(missing_ok=True)


def _drop_if_stale(lock):
    with contextlib.suppress(FileNotFoundError):
        if time.time() - lock.stat().st_mtime > STALE_S:
            lock.unlink()
