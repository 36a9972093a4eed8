"""Write the file of one who has solved the assembly line, from the reference solutions alone.

python -m course.assemble DIR          # writes DIR/my_rpa.py
python -m course.assemble --reference  # writes rpa/yours/reference.py, for who skips an exercise

It plays the learner: each solution is run in its notebook, after the cells before it, and what it
defines is collected as it is collected in a notebook.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

from course.proof import namespace_of, run_up_to_answer
from course.source import find_exercise, with_solution
from rpa.check.yours import LINE, collect
from rpa.check.yours.growing import FILE_NAME, VARIABLE

REFERENCE = Path(__file__).parents[1] / "rpa" / "yours" / "reference.py"

REFERENCE_TITLE = '''\
"""The assembly line, solved: what an exercise takes whose forerunners are not solved.

`python -m course.build` writes this file from the solutions in `course/`: change them there. Each
section is one exercise; the last function is a whole ragged paged attention kernel.
"""'''


def assemble(folder: Path, numbers=tuple(LINE)) -> Path:
    """Solve these exercises of the assembly line in order; returns the file that has grown."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.unlink(missing_ok=True)
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(path)
    try:
        for number in numbers:
            with contextlib.redirect_stdout(io.StringIO()):
                solve(number)
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
    return path


def solve(number: str, answer: str | None = None) -> dict:
    """Run an exercise's answer, default its solution, and collect it; returns its namespace."""
    source, exercise = find_exercise(number)
    namespace = namespace_of(source, exercise)
    run_up_to_answer(exercise, with_solution(exercise) if answer is None else answer, namespace)
    collect(number, namespace[exercise.name])
    return namespace


def reference_text() -> str:
    """What `rpa/yours/reference.py` has to hold."""
    with tempfile.TemporaryDirectory() as folder:
        text = assemble(Path(folder)).read_text(encoding="utf-8")
    return REFERENCE_TITLE + text[text.index('"""\n') + 3 :]


def main(arguments: list[str] | None = None) -> int:
    """Write one of the two files; the exit code is 2 without a folder."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    if arguments == ["--reference"]:
        REFERENCE.write_text(reference_text(), encoding="utf-8")
        print(REFERENCE)
    else:
        print(assemble(Path(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
