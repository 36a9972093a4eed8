"""One function in place of another inside an engine, in a way that is seen and can be undone."""

import functools
import logging
from collections.abc import Callable

log = logging.getLogger("rpa.integrations")
"""Says which kernel runs, at level WARNING: that is shown where nobody has set up logging."""


class CannotDo(Exception):
    """A call that rung 8 does not take; the message says why."""


def put_in(module, name: str, ours: Callable) -> None:
    """Let `module.name` call `ours`, and the engine's own function where ours refuses a call.

    Ours refuses while it is traced, before anything runs on a device: by `CannotDo`, or by the
    ValueError and NotImplementedError with which `rpa.ragged_paged_attention` rejects arguments.
    Each reason is logged once. A function that is put in twice is replaced once.

    Args:
        module: of the engine.
        name: of a function in it.
        ours: takes the same arguments.

    >>> import types
    >>> engine = types.SimpleNamespace(__name__="engine", twice=lambda x: x + x)
    >>> put_in(engine, "twice", lambda x: 2 * x)
    >>> engine.twice(3), take_out(engine, "twice"), take_out(engine, "twice")
    (6, True, False)
    """
    theirs = getattr(module, name)
    if hasattr(theirs, "replaces"):
        return
    where = f"{module.__name__}.{name}"
    reasons = set()

    @functools.wraps(theirs)
    def ours_or_theirs(*args, **options):
        try:
            return ours(*args, **options)
        except (CannotDo, ValueError, NotImplementedError) as refusal:
            reason = str(refusal)
            if reason not in reasons:
                reasons.add(reason)
                log.warning("%s: this call runs the engine's own kernel. %s", where, reason)
        return theirs(*args, **options)

    ours_or_theirs.replaces = theirs
    setattr(module, name, ours_or_theirs)
    log.warning("%s is replaced: attention runs rung 8 of rpa.", where)


def take_out(module, name: str) -> bool:
    """Put the engine's own function back; whether there was one to put back."""
    theirs = getattr(getattr(module, name), "replaces", None)
    if theirs is None:
        return False
    setattr(module, name, theirs)
    log.warning("%s.%s is the engine's own again.", module.__name__, name)
    return True
