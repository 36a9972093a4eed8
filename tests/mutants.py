"""Seeded faults for DMA kernels: every start, wait and semaphore, one at a time.

A kernel calls `pltpu.make_async_copy(src, dst, sem)` and, on what it returns, `.start()` and
`.wait()`. While `faulty(...)` is active these calls are watched as the kernel is traced, and the
calls of one site are removed or given another semaphore. A site is a place in the source, with the
calls that led there, because two callers of the same helper are two different mistakes to make.

    sites = list_sites(check)                      # check() runs a kernel and asserts its numbers
    verdict(check, Fault(sites[0], "drop"))        # "numbers", "race", "deadlock", ..., "survived"

Faults that are not about copies (a page index, a mask) replace a small named function of the
kernel: `replaced(module, name, wrong_function)`.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import rpa
from rpa import interpreter
from tests.kernel_harness import KernelFault

ACTIONS = ("drop", "other_semaphore")
PACKAGE = str(Path(rpa.__file__).parent)


@dataclass(frozen=True, order=True)
class Site:
    """A place where a kernel starts or waits for a copy; `where` goes from the inside out."""

    operation: str  # "start" or "wait"
    where: tuple[str, ...]  # ("streamed.py:120 fetch_block", "streamed.py:170 kernel", ...)
    has_other_semaphore: bool  # whether its semaphore is one of several in an array

    def __str__(self):
        return f"{self.operation} at {' < '.join(self.where)}"


@dataclass(frozen=True)
class Fault:
    """What is done to a site: "drop" the call, or make it use the "other_semaphore"."""

    site: Site
    action: str

    def __str__(self):
        return f"{self.action} {self.site}"


class _WatchedCopy:
    """Stands in for the descriptor that make_async_copy returns."""

    def __init__(self, watch, src, dst, sem):
        self.watch, self.src, self.dst, self.sem = watch, src, dst, sem

    def start(self, **kwargs):
        self._call("start", kwargs)

    def wait(self):
        self._call("wait", {})

    def _call(self, operation, kwargs):
        site = Site(operation, _where(), _other(self.sem) is not None)
        action = self.watch(site)
        if action == "drop":
            return
        sem = _other(self.sem) if action == "other_semaphore" else self.sem
        getattr(_make_async_copy(self.src, self.dst, sem), operation)(**kwargs)


_make_async_copy = pltpu.make_async_copy


@contextlib.contextmanager
def watched(watch: Callable[[Site], str | None]):
    """Trace kernels so that `watch` sees every start and wait and may return an action for it."""

    def make(src, dst, sem):
        return _WatchedCopy(watch, src, dst, sem)

    # A kernel that was traced before would be taken from the cache, without the fault.
    jax.clear_caches()
    try:
        with mock.patch.object(pltpu, "make_async_copy", make):
            yield
    finally:
        jax.clear_caches()


def list_sites(check) -> list[Site]:
    """Every start and wait that tracing `check()` comes by, in order of the source."""
    sites = set()
    with watched(lambda site: sites.add(site)):
        check()
    return sorted(sites)


def list_faults(check) -> list[Fault]:
    """Every fault of every site: all drops, and another semaphore where there is another."""
    return [
        Fault(site, action)
        for site in list_sites(check)
        for action in ACTIONS
        if action == "drop" or site.has_other_semaphore
    ]


@contextlib.contextmanager
def faulty(fault: Fault):
    """Kernels traced inside have the fault; an error if they never come by its site."""
    met = []

    def watch(site):
        if site == fault.site:
            met.append(site)
            return fault.action
        return None

    with watched(watch):
        yield
    assert met, f"no kernel came by the site of this fault: {fault}"


@contextlib.contextmanager
def replaced(module, name, function):
    """A kernel's small function `module.name` is replaced by a wrong one."""
    jax.clear_caches()
    try:
        with mock.patch.object(module, name, function):
            yield
    finally:
        jax.clear_caches()


def verdict(check, fault) -> str:
    """How `check()` finds the fault: "numbers", "race", "leftover", "deadlock", "crash", or
    "survived" if it does not. `fault` is a Fault, or a context manager such as `replaced(...)`.
    """
    context = faulty(fault) if isinstance(fault, Fault) else fault
    with context, interpreter.deadlocks_raise():
        try:
            check()
        except KernelFault as found:
            return "deadlock" if "deadlock" in str(found) else found.kind
        except AssertionError:
            return "numbers"
    return "survived"


def _where() -> tuple[str, ...]:
    """The lines of the package on the way to the copy, from the inside out."""
    frame, lines = sys._getframe(3), []
    while frame:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            name = Path(code.co_filename).name
            lines.append(f"{name}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return tuple(lines)


def _other(sem):
    """The next semaphore of the array that `sem` was taken from, or None if it stands alone."""
    transforms = getattr(sem, "transforms", ())
    if not transforms:
        return None
    first, *rest = transforms
    indices = list(first.indices)
    for axis, (index, size) in enumerate(zip(indices, first.shape, strict=True)):
        if size > 1 and not isinstance(index, pl.Slice):
            indices[axis] = (index + 1) % size
            other = sem.ref.at[tuple(indices)]
            return type(other)(other.ref, (*other.transforms, *rest))
    return None
