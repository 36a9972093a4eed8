"""Read a chapter's py:percent source, and say in words what a teacher got wrong."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jupytext

COURSE = Path(__file__).parent
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
INSTEAD, WRITE = "# instead of\n", "# write\n"
"""A wrong answer may be written as the solution with some of its lines replaced."""
TAGS = ("hint", "exercise", "check", "explanation", "wrong")
HINTS = ("the idea", "the API", "nearly the code")
FEWEST_WRONG_ANSWERS = 2
MOST_LESSON_LINES = 12
"""Lines of code in one cell of a lesson; more than one idea hides in a longer cell."""
PROMISES = ("**Time:**", "**You need:**", "**You will be able to:**")
HEADING = re.compile(r"^## Exercise (\d+\.\d+): (.+)$", re.MULTILINE)


class SourceError(ValueError):
    """A source does not follow the format; the text says where and what to do."""


@dataclass(frozen=True)
class Cell:
    """One cell of a source: its text, and the tag that says what the build does with it."""

    kind: str
    """ "markdown" or "code"."""
    text: str
    tag: str = ""
    refused: str = ""
    """Of a wrong answer: a part of the message with which the check must refuse it."""


@dataclass
class ExerciseSource:
    """One exercise as its source has it: everything between its heading and the next one."""

    number: str
    title: str
    cells: list[Cell] = field(default_factory=list)

    def tagged(self, tag: str) -> list[Cell]:
        """The cells with this tag, in order."""
        return [cell for cell in self.cells if cell.tag == tag]

    @property
    def answer(self) -> str:
        """The code of the exercise cell with the solution in it."""
        return self.tagged("exercise")[0].text

    @property
    def name(self) -> str:
        """Name of the function or class that the learner writes."""
        return defined_names(self.answer)[-1]

    @property
    def teaches(self) -> str:
        """What the exercise teaches, from its line "**Teaches:** ..."."""
        text = "\n\n".join(cell.text for cell in self.cells if cell.kind == "markdown")
        found = re.search(r"\*\*Teaches:\*\* (.+?)(?:\n\n|$)", text, re.DOTALL)
        return " ".join(found.group(1).split()) if found else ""


@dataclass(frozen=True)
class Source:
    """One chapter and kind: `ch01_dense_lesson.py` or `ch01_dense_exercises.py`."""

    path: Path
    chapter: int
    name: str
    kind: str
    """ "lesson" or "exercises"."""
    opening: list[Cell]
    """All cells of a lesson; of exercises, those before the first exercise."""
    exercises: list[ExerciseSource]

    @property
    def stem(self) -> str:
        """Name of the notebook without its ending, "01_dense"."""
        return f"{self.chapter:02d}_{self.name}"


def find_sources(chapters: Sequence[int] = ()) -> list[Source]:
    """The sources of these chapters (none means all), read and validated, in order."""
    paths = sorted(COURSE.glob("ch[0-9][0-9]_*.py"))
    chosen = [path for path in paths if not chapters or int(path.stem[2:4]) in chapters]
    return [read_source(path) for path in chosen]


def find_exercise(number: str) -> tuple[Source, ExerciseSource]:
    """The source of one exercise, and the exercise in it; other sources are not read."""
    (path,) = COURSE.glob(f"ch{int(number.split('.')[0]):02d}_*_exercises.py")
    source = read_source(path)
    (exercise,) = [e for e in source.exercises if e.number == number]
    return source, exercise


def read_source(path: Path) -> Source:
    """Read and validate one source.

    Raises:
        SourceError: what in the source does not follow the format, and what to do about it.
    """
    named = re.fullmatch(r"ch(\d\d)_(\w+?)_(lesson|exercises)", path.stem)
    if not named:
        raise SourceError(
            f"{path.name}: expected chNN_name_lesson.py or chNN_name_exercises.py, for example "
            "ch01_dense_lesson.py"
        )
    cells = [_read_cell(path, raw) for raw in _read_raw_cells(path)]
    opening, exercises = _split(path, cells)
    source = Source(path, int(named[1]), named[2], named[3], opening, exercises)
    problems = list(_problems(source))
    if problems:
        raise SourceError("\n".join(f"{path.name}: {problem}" for problem in problems))
    return source


def without_solution(exercise: ExerciseSource) -> str:
    """The exercise cell as a stub: each solution becomes a NotImplementedError with its length."""

    def stub(found: re.Match) -> str:
        indent, lines = found["indent"], count_lines(found["body"])
        count = "about 1 line" if lines == 1 else f"about {lines} lines"
        # A cell may hold several functions: the one that this solution stands in.
        name = (defined_names(exercise.answer[: found.start()]) or [exercise.name])[-1]
        message = f"Exercise {exercise.number}: write {name} ({count})"
        return f'{indent}raise NotImplementedError("{message}")'

    return _solution_pattern().sub(stub, exercise.answer)


def with_solution(exercise: ExerciseSource) -> str:
    """The exercise cell with its solution, without the lines that mark it."""
    return _solution_pattern().sub(lambda found: found["body"].rstrip("\n"), exercise.answer)


def wrong_answer(exercise: ExerciseSource, cell: Cell) -> str:
    """The code of a wrong answer: the cell itself, or the solution with some lines replaced.

    Raises:
        SourceError: lines that are to be replaced do not stand in the solution, or more than once.
    """
    if not cell.text.startswith(INSTEAD):
        return cell.text
    code = f"{with_solution(exercise)}\n"
    for change in f"{cell.text}\n".split(INSTEAD)[1:]:
        old, new = (_uncommented(part) for part in change.split(WRITE))
        if code.count(old) != 1:
            raise SourceError(
                f"a wrong answer replaces lines that the solution has {code.count(old)} times, "
                f"expected once:\n{old}"
            )
        code = code.replace(old, new)
    return code


def _uncommented(part: str) -> str:
    return "".join(f"{line[2:]}\n" for line in part.strip("\n").splitlines())


def count_lines(code: str) -> int:
    """Lines that do something: not blank, not a comment."""
    lines = (line.strip() for line in code.splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def defined_names(code: str) -> list[str]:
    """Names of the functions and classes that stand at the margin of a cell."""
    return re.findall(r"^(?:def|class) (\w+)", code, re.MULTILINE)


def _solution_pattern() -> re.Pattern:
    return re.compile(
        rf"^(?P<indent>[ \t]*){BEGIN}[ \t]*\n(?P<body>.*?)^[ \t]*{END}[ \t]*$",
        re.MULTILINE | re.DOTALL,
    )


def _read_raw_cells(path: Path) -> list:
    return jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent").cells


def _read_cell(path: Path, raw) -> Cell:
    tags = raw.metadata.get("tags", [])
    unknown = [tag for tag in tags if tag not in TAGS] + tags[1:]
    if unknown:
        raise SourceError(
            f"{path.name}: a cell has the tags {tags}, expected at most one of {', '.join(TAGS)}"
        )
    refused = raw.metadata.get("refused", "")
    return Cell(raw.cell_type, raw.source.strip("\n"), tags[0] if tags else "", refused)


def _split(path: Path, cells: list[Cell]) -> tuple[list[Cell], list[ExerciseSource]]:
    opening, exercises = [], []
    for cell in cells:
        headings = HEADING.findall(cell.text) if cell.kind == "markdown" else []
        if len(headings) > 1:
            raise SourceError(f"{path.name}: one cell holds several exercises: {headings}")
        if headings:
            exercises.append(ExerciseSource(*headings[0]))
        (exercises[-1].cells if exercises else opening).append(cell)
    return opening, exercises


def _problems(source: Source) -> Iterator[str]:
    first = source.opening[0] if source.opening else None
    if not first or not first.text.startswith(f"# Chapter {source.chapter}"):
        yield f'the first cell must be markdown that begins with "# Chapter {source.chapter}"'
    if source.kind == "lesson":
        yield from _problems_of_lesson(source)
        return
    if not source.exercises:
        yield 'no exercise found; each begins with a cell "## Exercise N.M: title"'
    for position, exercise in enumerate(source.exercises, start=1):
        expected = f"{source.chapter}.{position}"
        if exercise.number != expected:
            yield f'"Exercise {exercise.number}" stands where {expected} is expected'
        for problem in _problems_of_exercise(exercise):
            yield f"exercise {exercise.number}: {problem}"


def _problems_of_lesson(source: Source) -> Iterator[str]:
    if source.exercises or any(cell.tag for cell in source.opening):
        yield "a lesson has no exercises and no tags; move them to the exercises source"
    for promise in PROMISES:
        if not source.opening or promise not in source.opening[0].text:
            yield f"the first cell must say {promise}"
    if not any("**Takeaway" in cell.text for cell in source.opening):
        yield "no **Takeaway.** found: what should the reader keep of each section?"
    for cell in source.opening:
        if cell.kind == "code" and count_lines(cell.text) > MOST_LESSON_LINES:
            yield (
                f"a code cell has {count_lines(cell.text)} lines, expected at most "
                f"{MOST_LESSON_LINES}: one idea a cell; split it or move code into rpa. It begins "
                f"with {cell.text.splitlines()[0]!r}"
            )


def _problems_of_exercise(exercise: ExerciseSource) -> Iterator[str]:
    answers = exercise.tagged("exercise")
    if len(answers) != 1:
        yield f'found {len(answers)} cells tagged "exercise", expected 1'
        return
    solutions = _solution_pattern().findall(answers[0].text)
    if not solutions or answers[0].text.count(BEGIN) != len(solutions):
        yield f"the exercise cell needs {BEGIN} and {END} around the solution"
    if not defined_names(answers[0].text):
        yield "the exercise cell defines no function"
        return
    if not exercise.teaches:
        yield 'no paragraph "**Teaches:** ..." found; the table of exercises shows it'
    hints = len(exercise.tagged("hint"))
    if hints != len(HINTS):
        yield f'{hints} cells tagged "hint", expected {len(HINTS)}: {"; ".join(HINTS)}'
    if not exercise.tagged("explanation"):
        yield 'no cell tagged "explanation": why is the solution right?'
    call = f'rpa.check("{exercise.number}", {exercise.name})'
    if [cell.text for cell in exercise.tagged("check")] != [call]:
        yield f'expected one cell tagged "check" with exactly: {call}'
    yield from _problems_of_wrong_answers(exercise)


def _problems_of_wrong_answers(exercise: ExerciseSource) -> Iterator[str]:
    wrong = exercise.tagged("wrong")
    if len(wrong) < FEWEST_WRONG_ANSWERS:
        yield (
            f'{len(wrong)} cells tagged "wrong", expected at least {FEWEST_WRONG_ANSWERS}: '
            "answers that learners will give"
        )
    if len({cell.refused for cell in wrong}) < len(wrong):
        yield "two wrong answers expect the same message; each must be refused with its own"
    for cell in wrong:
        if not cell.refused:
            yield 'a wrong answer needs refused="...", a part of the message that refuses it'
        try:
            code = wrong_answer(exercise, cell)
        except (SourceError, ValueError) as error:
            yield str(error)
            continue
        if exercise.name not in defined_names(code):
            yield f"a wrong answer must define {exercise.name}, it has {defined_names(code)}"
