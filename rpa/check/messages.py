"""What a check says: the case, the first wrong number, the mistake by name; or a line of praise."""

import linecache
import re
import textwrap
import traceback
from collections.abc import Callable

from rpa.check.compare import Wrong, show
from rpa.check.errors import text_of
from rpa.check.exercise import Case, Exercise
from rpa.check.source_text import literal, module_of


def headline(exercise: Exercise, function: Callable, case: Case) -> str:
    """Which exercise, which case, and the call as the learner could repeat it."""
    module = module_of(exercise.convert)
    parts = (f"{name}={literal(value, module)}" for name, value in case.arguments.items())
    name = getattr(function, "__name__", "your_function")
    call = f"{name}({', '.join(parts)})"
    return (
        f"✗ Exercise {exercise.number}: {name} is not right yet.\n"
        f"Case: {case.title}\n"
        # Hyphens are minus signs here: no line ends after one.
        + textwrap.fill(
            call, 100, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
        )
    )


def explain_difference(exercise: Exercise, position: int, wrong: Wrong, cause: str | None) -> str:
    """Where the output of a case first differs, and the cause if it is known."""
    lines = []
    if wrong.index:
        lines.append(f"First wrong: {_place(exercise, exercise.cases[position], wrong)}.")
    end = "" if wrong.sentence.endswith(("?", ".")) else "."
    lines.append(textwrap.fill(f"{wrong.sentence[:1].upper()}{wrong.sentence[1:]}{end}", 100))
    if wrong.expected is not None:
        for title, value in (("expected", wrong.expected), ("yours", wrong.actual)):
            if shown := show(value):
                lines.append(f"{title:>10}: " + shown.replace("\n", "\n" + " " * 12))
    if cause:
        lines += ["", textwrap.fill(cause, 100)]
    if position:
        titles = "; ".join(passed.title for passed in exercise.cases[:position])
        lines += ["", textwrap.fill(f"Right so far: {titles}.", 100)]
    return "\n".join(lines)


def _place(exercise: Exercise, case: Case, wrong: Wrong) -> str:
    """The index in the words of the exercise: names of its axes, or sequence, token, page."""
    if exercise.place and (not exercise.outputs or wrong.output == f"`{exercise.outputs[0]}`"):
        return exercise.place(case.arguments, wrong.index)
    if len(exercise.axes) == len(wrong.index):
        return ", ".join(f"{a} {i}" for a, i in zip(exercise.axes, wrong.index, strict=True))
    return f"index {list(wrong.index)}"


def explain_changed_argument(name: str) -> str:
    """The function wrote into its argument, or donated it."""
    return (
        f"Your function changes its argument `{name}`. The caller still needs it: make a new array "
        "instead, for example with `jnp.where` or `.at[].set`."
    )


def explain_exception(error: BaseException, function: Callable) -> str:
    """The exception, and the line of the learner's own code that it came from."""
    code = getattr(function, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code and frame.filename == code.co_filename]
    text = f"Your function raises {type(error).__name__}: {text_of(error)}"
    line = linecache.getline(own[-1].filename, own[-1].lineno).strip() if own else ""
    if meaning := meaning_of(error, line):
        text = f"{textwrap.fill(meaning, 100)}\n{text.splitlines()[0]}"
    if own:
        text += f"\n  line {own[-1].lineno}, in {own[-1].name}" + (f":  {line}" if line else "")
    return text


MEANINGS = (
    (
        # JAX asks a slice whether its ends are true, so the line tells more than the error.
        r"Slice entries must be static integers|slice indices must be integers|"
        r"array slice indices must have static start/stop/step|"
        r"Tracer(?s:.*)\n.*[\[,]\s*\w*\s*:\s*[A-Za-z_(]",
        "Your function cuts by a size that is known at run time only. In an index that is "
        "`pl.ds(start, size)`; `start:stop` needs Python numbers.",
    ),
    (
        r"__index__\(\) method was called on traced array|TracerIntegerConversionError",
        "Your function asks Python for a number that is known at run time only, as `range(n)` "
        "does. A loop of that many turns is `@pl.loop(0, n)` or `jax.lax.fori_loop`; a size in an "
        "index is `pl.ds(start, size)`.",
    ),
    (
        r"TracerBoolConversionError|truth value of a traced array|Attempted boolean conversion of",
        "Your function asks Python whether a traced value is true, as `if` and `and` do. In a "
        "kernel that is `@pl.when(condition)`, and for values `jnp.where`.",
    ),
    (
        r"Only interpret mode is supported on CPU backend",
        "Your pallas_call is to be compiled, and there is no TPU here. Give it "
        "`interpret=choose_interpret(None)`: it interprets where there is none.",
    ),
)
"""What JAX says of an error, as a pattern, and what it means for a learner."""


def meaning_of(error: Exception, line: str = "") -> str | None:
    """An error of JAX in the words of the course, or None where its own words do.

    Args:
        error: what was raised.
        line: the learner's own line that it came from.

    >>> meaning_of(ValueError("Only interpret mode is supported on CPU backend."))[:38]
    'Your pallas_call is to be compiled, an'
    """
    said = f"{type(error).__name__}: {text_of(error)}\n{line}"
    return next((words for pattern, words in MEANINGS if re.search(pattern, said)), None)


def praise(exercise: Exercise, function: Callable) -> str:
    """What was verified, for a right answer."""
    name = getattr(function, "__name__", "your function")
    titles = "; ".join(case.title for case in exercise.cases)
    count = len(exercise.cases)
    agree = "1 case agrees" if count == 1 else f"{count} cases agree"
    text = (
        f"✓ Exercise {exercise.number}: {name} is right. {agree} with the reference ({titles}), "
        f"and none of the {len(exercise.mistakes)} known mistakes."
    )
    return textwrap.fill(text, 100)
