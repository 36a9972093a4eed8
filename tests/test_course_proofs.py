"""Every exercise of every chapter: its answers are judged as its source says, notebooks current."""

import pytest

pytest.importorskip("jupytext", reason="the course is built where the extra [dev] is installed")

from course.build import stale
from course.proof import answers, mentions, says
from course.source import find_sources
from rpa.check import find_exercise
from rpa.check.compare import equal, first_wrong
from rpa.check.engine import check
from rpa.check.errors import CheckFailed
from rpa.check.runner import in_process

SOURCES = find_sources()


def marks(exercise, title):
    """Kernels in the sandbox take seconds each: all but one of their wrong answers are `full`."""
    quick = find_exercise(exercise.number).runner is in_process
    return () if quick or title in ("solution", "stub", "wrong answer 1") else pytest.mark.full


EXERCISES = [
    pytest.param(source, exercise, id=exercise.number)
    for source in SOURCES
    for exercise in source.exercises
]
ANSWERS = [
    pytest.param(
        source,
        exercise,
        code,
        expected,
        id=f"{exercise.number}-{title}",
        marks=marks(exercise, title),
    )
    for source in SOURCES
    for exercise in source.exercises
    for title, code, expected in answers(exercise)
]


@pytest.mark.parametrize(("source", "exercise", "code", "expected"), ANSWERS)
def test_answer_is_judged_as_its_source_says(source, exercise, code, expected):
    # The solution passes with all other exercises as stubs; the stub fails with its own error;
    # each wrong answer is refused with its own message.
    said = says(source, exercise, code)
    assert mentions(said, expected), said


@pytest.mark.parametrize(("source", "exercise"), EXERCISES)
def test_every_known_mistake_is_wrong_and_recognised(source, exercise):
    declared = find_exercise(exercise.number)
    for mistake in declared.mistakes:
        with pytest.raises(CheckFailed) as refused:
            check(declared.number, mistake.function)
        assert mentions(str(refused.value), mistake.words), refused.value


@pytest.mark.parametrize(("source", "exercise"), EXERCISES)
def test_every_two_known_mistakes_can_be_told_apart(source, exercise):
    declared = find_exercise(exercise.number)
    for position, one in enumerate(declared.mistaken):
        for other in declared.mistaken[position + 1 :]:
            pairs = zip(one, other, strict=True)
            assert not all(equal(a, b, declared.tolerance) for a, b in pairs)


@pytest.mark.parametrize(("source", "exercise"), EXERCISES)
def test_reference_agrees_with_itself(source, exercise):
    # A reference that is NaN somewhere, or random, would refuse every answer.
    declared = find_exercise(exercise.number)
    for case, expected in zip(declared.cases, declared.expected, strict=True):
        again = declared.drive(declared.reference, *declared.fresh_arguments(case))
        assert first_wrong(expected, again, declared.tolerance, declared.outputs) is None


@pytest.mark.parametrize(("source", "exercise"), EXERCISES)
def test_every_fault_of_a_kernel_that_is_listed_refuses_one_of_the_wrong_answers(source, exercise):
    refused = [cell.refused for cell in exercise.tagged("wrong")]
    for words in find_exercise(exercise.number).faults:
        assert any(mentions(words, fragment) for fragment in refused), words


def test_notebooks_are_up_to_date():
    assert stale(SOURCES) == []


def test_every_chapter_from_one_on_has_four_exercises_and_a_lesson():
    lessons = {source.chapter for source in SOURCES if source.kind == "lesson"}
    halves = (7, 8, 9, 10)  # two and two, of what is one subject: four together
    for source in SOURCES:
        if source.kind == "exercises" and source.chapter >= 1:
            assert len(source.exercises) >= (2 if source.chapter in halves else 4)
            assert source.chapter in lessons
