"""What can go wrong when a compiled kernel is executed: every error of `rpa.lab.chip`."""


class ChipError(RuntimeError):
    """Something kept a kernel from being executed; the message says what, and what to do."""


class NotCompiled(ChipError):
    """The compiler refused the kernel, or there is no libtpu."""


class UnknownOperation(ChipError):
    """The kernel needs an instruction, a spelling of one or a libtpu that was never tested here.

    The machine never guesses: `docs/chip.md` says how to add an operation.
    """


class KernelFault(ChipError):
    """The kernel itself did something wrong.

    A load, store or copy beyond its buffer, a wait that never ends, a semaphore that is not back
    at zero, a result that stays in a queue.
    """
