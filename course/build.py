"""Write the notebooks from the sources, or say which of them are stale.

python -m course.build --execute       # build and run all chapters
python -m course.build --execute 1 2   # build and run chapters 1 and 2
python -m course.build 1               # text only: quick; keeps the outputs of what did not change
python -m course.build --check         # exit 1 with a list of what is not up to date
"""

import argparse
import sys
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError

from course.assemble import REFERENCE, reference_text
from course.notebook import (
    EXECUTED,
    ROOT,
    OutputError,
    badges,
    execute,
    not_fully_executed,
    notebooks_of,
    to_text,
    with_outputs_of,
    without_outputs,
)
from course.source import Source, SourceError, count_lines, find_sources, with_solution
from rpa.check import Exercise, exercises_of_chapter
from rpa.check.errors import UnfinishedCheck


def build(sources: list[Source], run: bool) -> None:
    """Write the notebooks of these sources and the tables of all exercises."""
    for source in sources:
        for path, notebook in notebooks_of(source).items():
            if path.parts[0] in EXECUTED:
                if run:
                    print(f"executing {path}", flush=True)
                    notebook = execute(notebook, ROOT / path.parent)
                elif _compare(path, notebook) is None:
                    continue  # it has the outputs of just these cells
                elif kept := _with_committed_outputs(path, notebook):
                    notebook = kept
                else:
                    print(f"{path} has no outputs now: its source changed. Run it with --execute")
            (ROOT / path).parent.mkdir(exist_ok=True)
            (ROOT / path).write_text(to_text(notebook), encoding="utf-8")


def _with_committed_outputs(path: Path, notebook):
    file = ROOT / path
    if not file.exists():
        return None
    return with_outputs_of(notebook, nbformat.read(file, as_version=4))


def stale(sources: list[Source]) -> list[str]:
    """What a build would change, outputs aside, and which notebooks lack outputs."""
    found, expected_paths = [], set()
    for source in sources:
        for path, notebook in notebooks_of(source).items():
            expected_paths.add(path)
            if problem := _compare(path, notebook):
                found.append(f"{path}: {problem}")
    for folder in ("notebooks", "exercises", "solutions"):
        for file in sorted((ROOT / folder).glob("*.ipynb")):
            if file.relative_to(ROOT) not in expected_paths:
                found.append(f"{file.relative_to(ROOT)}: no source makes this notebook")
    for path, text in tables(sources).items():
        if not (ROOT / path).exists() or (ROOT / path).read_text(encoding="utf-8") != text:
            found.append(f"{path}: not what the build writes")
    if REFERENCE.read_text(encoding="utf-8") != reference_text():
        found.append(f"{REFERENCE.relative_to(ROOT)}: not what the solutions say")
    return found


def tables(sources: list[Source]) -> dict[Path, str]:
    """README of the three folders: the chapters; what each exercise teaches and its check knows."""
    exercises, solutions = [], []
    paths = {path for source in sources for path in notebooks_of(source)}
    for source in sources:
        checks = _checks_of(source)
        for exercise in source.exercises:
            link = f"[{exercise.number} {exercise.title}]({source.stem}.ipynb)"
            mistakes = _folded(checks[exercise.number])
            lines = count_lines(with_solution(exercise))
            exercises.append(f"| {link} | {exercise.teaches} | {mistakes} |")
            solutions.append(
                f"| {link} | `{exercise.name}` | {lines} | {exercise.teaches} | {mistakes} |"
            )
    return {
        Path("notebooks/README.md"): _page(
            "The course",
            "A lesson per chapter; exercises whose check names the mistake; solutions.\n"
            "`make lab` opens JupyterLab at chapter 0; `make notebooks` writes this page.",
            ("chapter", "lesson", "exercises", "solutions"),
            [_chapter_row(source, paths) for source in sources if source.kind == "lesson"],
        ),
        Path("exercises/README.md"): _page(
            "Exercises",
            "Each is a function to write; `rpa.check` says whether it is right, and if not, why.\n"
            "Three folded hints wait above each: the idea, the API, nearly the code.\n"
            "`make notebooks` writes this page and the notebooks from `course/`.",
            ("exercise", "what it teaches", "mistakes that its check recognises"),
            exercises,
        ),
        Path("solutions/README.md"): _page(
            "Solutions",
            "One way to solve each exercise, run, with a paragraph on why it is right.\n"
            "Try first: the checks tell you more than reading does.\n"
            "`make notebooks` writes this page and the notebooks from `course/`.",
            (
                *("exercise", "function", "lines", "what it teaches"),
                "mistakes that its check recognises",
            ),
            solutions,
        ),
    }


def _chapter_row(lesson: Source, paths: set[Path]) -> str:
    """A chapter's row; `paths` are all notebooks that there are."""
    stem, title = lesson.stem, lesson.opening[0].text.splitlines()[0].partition(": ")[2]
    links = [
        f"[read](../{folder}/{stem}.ipynb) {badges(folder, stem)}".strip()
        for folder in ("notebooks", "exercises", "solutions")
        if Path(folder) / f"{stem}.ipynb" in paths
    ]
    return f"| {lesson.chapter} {title} | {' | '.join(links)} |"


def _folded(check: Exercise) -> str:
    """A cell of the table that opens on a click: read before trying, mistakes give hints away."""
    listed = [f"if {mistake.words}" for mistake in check.mistakes]
    listed += [f"if the kernel {words}" for words in check.faults]
    return f"<details><summary>{len(listed)} mistakes</summary>{'<br>'.join(listed)}</details>"


def _checks_of(source: Source) -> dict[str, Exercise]:
    checks = exercises_of_chapter(source.chapter)
    numbers = {exercise.number for exercise in source.exercises}
    if source.kind == "exercises" and numbers != set(checks):
        raise SourceError(
            f"{source.path.name} has the exercises {sorted(numbers)}, but "
            f"rpa/check/chapters/chapter{source.chapter:02d}.py checks {sorted(checks)}: they "
            "must be equal"
        )
    return checks


def _compare(path: Path, expected: nbformat.NotebookNode) -> str | None:
    file = ROOT / path
    if not file.exists():
        return "missing"
    committed = nbformat.read(file, as_version=4)
    if to_text(without_outputs(committed)) != to_text(without_outputs(expected)):
        return "not what its source says"
    if path.parts[0] in EXECUTED:
        return not_fully_executed(committed)
    if to_text(committed) != to_text(expected):
        return "has outputs; exercises are committed without"
    return None


def _page(title: str, text: str, columns: tuple[str, ...], rows: list[str]) -> str:
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([f"# {title}", "", text, "", *head, *rows, ""])


def check(sources: list[Source]) -> int:
    """Print what is stale; the exit code is 1 if anything is."""
    found = stale(sources)
    print("\n".join([*found, "run: python -m course.build --execute"] if found else ["up to date"]))
    return 1 if found else 0


def main(arguments: list[str] | None = None) -> int:
    """Build or check; the exit code is 1 where something is stale or a source is wrong."""
    parser = argparse.ArgumentParser(prog="python -m course.build")
    parser.add_argument("chapters", nargs="*", type=int, help="numbers; none means all")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--execute", action="store_true", help="run lessons and solutions")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            return check(find_sources())
        build(find_sources(options.chapters), run=options.execute)
        REFERENCE.write_text(reference_text(), encoding="utf-8")
        # Last, because they need every chapter to be in order, and one may be half written.
        for path, text in tables(find_sources()).items():
            (ROOT / path).write_text(text, encoding="utf-8")
    except (SourceError, UnfinishedCheck, OutputError, CellExecutionError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
