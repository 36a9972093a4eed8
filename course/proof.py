"""Try an exercise without a notebook: its solution, its stub, and the wrong answers it ships with.

    python -m course.proof 1.2       # prints what the check says to each of them

The tests run the same functions over all exercises.
"""

import contextlib
import io
import linecache
import sys

import rpa.check
from course.source import (
    ExerciseSource,
    Source,
    find_exercise,
    find_sources,
    with_solution,
    without_solution,
    wrong_answer,
)


def says(source: Source, exercise: ExerciseSource, answer: str) -> str:
    """What the check says to an answer: its line of praise, or the text of what it raises.

    All other exercises of the chapter stay stubs, so an exercise that needs another one's answer
    is found.
    """
    namespace = namespace_of(source, exercise)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            run_up_to_answer(exercise, answer, namespace)
            _execute(exercise.tagged("check")[0].text, "check", namespace)
    except (AssertionError, NotImplementedError) as refused:
        return str(refused)
    return printed.getvalue()


def mentions(said: str, fragment: str) -> bool:
    """Whether a message has this fragment, wherever its lines are broken.

    >>> mentions("the causal mask ignores\\nthe prefix", "ignores the prefix")
    True
    """
    return " ".join(fragment.split()) in " ".join(said.split())


def namespace_of(source: Source, exercise: ExerciseSource) -> dict:
    namespace = {"__name__": source.path.stem, "rpa": rpa}
    for cell in source.opening:
        if cell.kind == "code":
            _execute(cell.text, "opening", namespace)
    for other in source.exercises:
        if other is not exercise:
            _execute(without_solution(other), f"stub of {other.number}", namespace)
    return namespace


def run_up_to_answer(exercise: ExerciseSource, answer: str, namespace: dict) -> None:
    """The exercise's own cells up to the one that the answer takes the place of."""
    for cell in exercise.cells:
        if cell.tag == "exercise":
            _execute(answer, f"answer to {exercise.number}", namespace)
            return  # cells behind the answer play with it: the solutions notebook runs them
        if cell.kind == "code" and not cell.tag:
            _execute(cell.text, f"cell of {exercise.number}", namespace)


def _execute(code: str, title: str, namespace: dict) -> None:
    name = f"<{title}, {abs(hash(code)):x}>"
    # As IPython does for its cells: a check that runs a kernel elsewhere sends its source.
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), namespace)


def answers(exercise: ExerciseSource) -> list[tuple[str, str, str]]:
    """All answers that an exercise ships with: title, code, and what the check must say to it."""
    wrong = [
        (f"wrong answer {position}", wrong_answer(exercise, cell), cell.refused)
        for position, cell in enumerate(exercise.tagged("wrong"), start=1)
    ]
    stub = f"Exercise {exercise.number}: write "  # of several functions, the first one checked
    return [
        ("solution", with_solution(exercise), "✓"),
        ("stub", without_solution(exercise), stub),
        *wrong,
    ]


def main(numbers: list[str]) -> int:
    """Print what the checks say; the exit code is 1 where a check says something unexpected."""
    surprises = 0
    chosen = [find_exercise(number) for number in numbers]
    for source, exercise in chosen or [(s, e) for s in find_sources() for e in s.exercises]:
        for title, code, expected in answers(exercise):
            said = says(source, exercise, code)
            surprise = not mentions(said, expected)
            surprises += surprise
            note = f"  <-- expected {expected!r}" if surprise else ""
            print(f"--- {exercise.number} {title}{note}\n{said}\n")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
