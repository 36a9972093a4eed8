"""What a failed check raises: short in a notebook, an ordinary exception everywhere else."""

import sys


class CheckFailed(AssertionError):
    """The check refuses the answer; the text says where it is wrong and, if it can, why."""

    def _render_traceback_(self) -> list[str]:
        # IPython asks for this instead of printing the stack of the engine, in which a learner has
        # nothing to look for.
        return str(self).splitlines()


class NotStarted(NotImplementedError):
    """The exercise still is the stub; the text is the stub's own."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


def show_stubs_in_one_line() -> None:
    """In a notebook, let a cell that calls an unsolved exercise say so in one line.

    Such a cell may be far below the exercise, and the stack that JAX puts around a stub fills a
    page. Every other exception, and everything outside of notebooks, is shown as ever.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        shell.set_custom_exc((NotImplementedError,), _show)


def _show(shell, kind, error, stack, tb_offset=None):
    if isinstance(error, NotStarted):
        print(error, file=sys.stderr)
    elif str(error).startswith("Exercise "):
        print(f"not started yet: {error}", file=sys.stderr)
    else:
        shell.showtraceback((kind, error, stack), tb_offset=tb_offset)


class UnfinishedCheck(ValueError):
    """A teacher's mistake: an exercise whose check could never refuse an answer."""


class WrongResult(ValueError):
    """What an exercise's `drive` raises to refuse a result; the text says what it expected.

    The learner reads that text as a wrong result, not as an exception of their own function. A
    known mistake that is refused with the same words is named.
    """


class KernelFault(Exception):
    """A kernel in the sandbox breaks a rule of DMAs, or raises; a learner reads the text."""


class CannotShip(ValueError):
    """A function that cannot be sent to the sandbox; the text says what to do."""


class SandboxFailed(RuntimeError):
    """The process in which kernels are checked is not to be had; never the learner's mistake."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


def text_of(error: BaseException) -> str:
    """What an exception says, also where it cannot even say that.

    >>> text_of(ValueError("no"))
    'no'
    """
    try:
        return str(error)
    except Exception as second:
        return f"(str() of it raises {type(second).__name__})"


def is_stub(error: BaseException) -> bool:
    """Whether an exercise raises this because it was not begun.

    JAX raises NotImplementedError, too, for what it cannot do.

    >>> is_stub(NotImplementedError("Exercise 1.2: ...")), is_stub(NotImplementedError("no"))
    (True, False)
    """
    return isinstance(error, NotImplementedError) and text_of(error).startswith("Exercise ")
