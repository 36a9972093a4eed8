"""Show on standard error that something slow is under way."""

import contextlib
import sys
import threading

from tqdm import tqdm

PATIENCE_S = 2.0
"""What takes less needs no announcement."""


@contextlib.contextmanager
def waiting(what):
    """Show `what` and the seconds that passed, once a body takes longer than `PATIENCE_S`.

    For work whose length nobody knows, in another process. Nothing is shown where standard error
    is no terminal.

    >>> with waiting("adding"):
    ...     print(1 + 1)
    2
    """
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(what, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show(what, done):
    if done.wait(PATIENCE_S) or not sys.stderr.isatty():
        return
    with tqdm(bar_format="{desc} {elapsed}", desc=what, leave=False, initial=0) as bar:
        while not done.wait(1.0):
            bar.refresh()
