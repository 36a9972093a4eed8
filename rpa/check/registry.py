"""Find exercises by number, and refuse those whose check could never refuse an answer."""

import importlib
import importlib.util
from pathlib import Path

from rpa.check.errors import UnfinishedCheck
from rpa.check.exercise import Exercise

FEWEST_MISTAKES = 2
"""A check that knows fewer likely mistakes than this is refused as unfinished."""


def find_exercise(number: str) -> Exercise:
    """The exercise with this number; ValueError names those that exist."""
    if not isinstance(number, str):
        raise ValueError(
            f"number is {number!r} of type {type(number).__name__}, expected text: write it in "
            f'quotes, rpa.check("{number}", function)'
        )
    chapter, _, position = number.partition(".")
    if not (chapter.isdigit() and position.isdigit()):
        raise ValueError(f'number is {number!r}, expected "chapter.exercise", for example "1.2"')
    exercises = exercises_of_chapter(int(chapter))
    if number not in exercises:
        known = ", ".join(exercises) or "none"
        raise ValueError(f"there is no exercise {number}; chapter {chapter} has: {known}")
    return exercises[number]


def exercises_of_chapter(chapter: int) -> dict[str, Exercise]:
    """The exercises that `rpa/check/chapters/chapterNN.py` defines, by number, in order.

    Raises:
        UnfinishedCheck: one of them could never refuse an answer, or belongs to another chapter.
    """
    name = f"rpa.check.chapters.chapter{chapter:02d}"
    if importlib.util.find_spec(name) is None:
        return {}
    module = importlib.import_module(name)
    return collect(
        chapter, [v for v in vars(module).values() if isinstance(v, Exercise) and not v.name]
    )


def all_exercises() -> dict[str, Exercise]:
    """Every exercise of the course by number, chapter after chapter.

    >>> list(all_exercises())[:2]
    ['0.1', '1.1']
    """
    files = sorted(Path(__file__).parent.joinpath("chapters").glob("chapter[0-9][0-9].py"))
    chapters = (exercises_of_chapter(int(file.stem[-2:])) for file in files)
    return {number: exercise for found in chapters for number, exercise in found.items()}


def collect(chapter: int, found: list[Exercise]) -> dict[str, Exercise]:
    """Order exercises by number and refuse those that are not finished."""
    exercises = {}
    for exercise in sorted(found, key=lambda e: [int(part) for part in e.number.split(".")]):
        number = exercise.number
        if number in exercises or int(number.split(".")[0]) != chapter:
            raise UnfinishedCheck(
                f"exercise {number}: number is taken, or is not of chapter {chapter}"
            )
        if not exercise.cases:
            raise UnfinishedCheck(
                f"exercise {number} has no case, so its check cannot fail; add one"
            )
        if len(exercise.mistakes) < FEWEST_MISTAKES:
            raise UnfinishedCheck(
                f"exercise {number} knows {len(exercise.mistakes)} mistakes, expected at least "
                f"{FEWEST_MISTAKES}: which wrong answers will learners give?"
            )
        exercises[number] = exercise
    return exercises
