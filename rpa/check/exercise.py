"""What a teacher writes down about an exercise: cases, the truth, and the likely mistakes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpa.check.runner import in_process


@dataclass(frozen=True)
class Case:
    """One set of arguments for the learner's function, with the title its message will show."""

    title: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Mistake:
    """A function that is wrong on purpose, and the words that finish "this is what you get if"."""

    function: Callable
    words: str


def call(function: Callable, *arguments):
    """Use the learner's function in the plainest way: call it once with the case's arguments."""
    return function(*arguments)


@dataclass
class Exercise:
    """One exercise: cases from cheap to hard, a reference, and references that are wrong.

    Args:
        number: "chapter.position", the number that the learner types: `rpa.check("1.2", function)`.
        reference: the truth, called like the learner's function. NumPy keeps it quick, and apart
            from what is taught.
        axes: a name for each axis of the output, for messages: ("token", "head", "lane").
        outputs: names of the outputs where the function returns a tuple.
        tolerance: largest |yours - expected| / max(1, largest |expected|) that still passes.
        place: (arguments by name, index of the first wrong number) to words, where names of axes
            do not say enough; `rpa.check.index_words.ragged` knows sequences and pages.
        convert: what each NumPy array of a case becomes before a call: `jnp.asarray` by default;
            `np.array` (a copy) where the exercise works on the host.
        drive: how a function is used, `drive(function, *arguments)`. The default calls it once;
            an exercise about a class has a function here that uses the class and returns arrays.
            It raises `rpa.check.errors.WrongResult` for a result that it cannot go on with.
        runner: where the learner's function runs, `runner(drive, function, arguments, limit_s)`.
            The default is this process; code that can hang for ever needs a process of its own.
        limit_s: seconds that one case may take.
        name: of the function, where this exercise is a piece of another one.
        pieces: exercises about functions that the learner's function uses: they are checked first,
            in this order, with what its notebook has under their names.
        epilogue: (function) -> a line that follows the praise; a `KernelFault` of it refuses.
        faults: words for what the runner itself finds wrong, besides wrong numbers; the tables of
            exercises list them. `rpa.check.sandbox.faults` has those of the sandbox.

    >>> double = Exercise("9.1", reference=lambda x: 2 * x, axes=("row",))
    >>> double.case("two numbers", x=np.array([1.0, 2.0], np.float32))
    >>> @double.mistake("x is squared")
    ... def squares(x):
    ...     return x * x
    >>> double.mistakes[0].words
    'x is squared'
    """

    number: str
    reference: Callable
    axes: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    tolerance: float = 1e-5
    place: Callable[[Mapping[str, Any], tuple[int, ...]], str] | None = None
    convert: Callable = jnp.asarray
    drive: Callable = call
    runner: Callable = in_process
    limit_s: float = 30.0
    name: str = ""
    pieces: tuple["Exercise", ...] = ()
    epilogue: Callable[[Callable], str] | None = None
    faults: tuple[str, ...] = ()
    cases: list[Case] = field(default_factory=list, init=False)
    mistakes: list[Mistake] = field(default_factory=list, init=False)

    def case(self, title: str, /, **arguments) -> None:
        """Add a case; write the cases in the order cheap to hard, the first one for human eyes."""
        self.cases.append(Case(title, arguments))

    def mistake(self, words: str) -> Callable[[Callable], Callable]:
        """Decorate a function that is wrong on purpose with what its author forgot.

        The words finish the sentence "This is what you get if ...".
        """

        def add(function: Callable) -> Callable:
            self.mistakes.append(Mistake(function, words))
            return function

        return add

    def fresh_arguments(self, case: Case) -> list:
        """The case's arguments as the function will see them; copies, so nothing leaks."""
        return [jax.tree.map(self._fresh, value) for value in case.arguments.values()]

    def _fresh(self, leaf):
        return self.convert(leaf) if isinstance(leaf, np.ndarray) else leaf

    @cached_property
    def expected(self) -> list:
        """What the reference returns, one entry a case."""
        return [self._use(self.reference, case) for case in self.cases]

    @cached_property
    def mistaken(self) -> list[list]:
        """What each mistake returns for each case; an exception where the mistake raises one."""
        return [[self._attempt(m.function, case) for case in self.cases] for m in self.mistakes]

    def _use(self, function: Callable, case: Case):
        # On a TPU a float32 matmul rounds its inputs to bfloat16 unless told otherwise; a right
        # answer would fail there.
        with jax.default_matmul_precision("highest"):
            return self.drive(function, *self.fresh_arguments(case))

    def _attempt(self, function: Callable, case: Case):
        try:
            return self._use(function, case)
        except Exception as error:
            return error
