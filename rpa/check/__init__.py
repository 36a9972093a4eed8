"""Checks of the course's exercises: `rpa.check("1.2", your_function)`.

| file | what it holds |
|---|---|
| `exercise.py` | what a teacher declares: cases, the truth, known mistakes |
| `registry.py` | finds an exercise by its number, refuses unfinished ones |
| `engine.py` | runs the cases in order, refuses at the first that is wrong |
| `matching.py` | finds the known mistake that an answer makes |
| `compare.py` | whether two outputs agree, and where they first do not |
| `messages.py` | what the learner reads |
| `source_text.py` | an argument as code, so that the call can be repeated |
| `index_words.py` | an index of a ragged batch in words: sequence, token, page |
| `runner.py` | where the learner's function runs, and its time limit |
| `progress.py` | keeps what is solved in a file, `rpa.check.progress()` prints it |
| `sandbox/` | runs kernels with DMAs in a process that can be killed, in both interpreter modes |
| `yours/` | the learner's own file, which grows from exercise to exercise |
| `chapters/` | the exercises, a file a chapter: the answer key |
"""

import sys
import types

from rpa.check.engine import check
from rpa.check.errors import CheckFailed, NotStarted, show_stubs_in_one_line
from rpa.check.exercise import Exercise
from rpa.check.progress import progress
from rpa.check.registry import exercises_of_chapter, find_exercise

__all__ = [
    "CheckFailed",
    "Exercise",
    "NotStarted",
    "check",
    "exercises_of_chapter",
    "find_exercise",
    "progress",
]


class _CallableModule(types.ModuleType):
    """Makes `rpa.check(...)` work although `rpa.check` also is the name of this package."""

    def __call__(self, number, function):
        return check(number, function)


sys.modules[__name__].__class__ = _CallableModule
show_stubs_in_one_line()
