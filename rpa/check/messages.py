"""What a check says: the case, the first wrong number, the mistake by name; or a line of praise."""

import linecache
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
    if own:
        line = linecache.getline(own[-1].filename, own[-1].lineno).strip()
        text += f"\n  line {own[-1].lineno}, in {own[-1].name}" + (f":  {line}" if line else "")
    return text


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
