"""What you have solved so far: a small file beside the notebooks, and a table of it.

The file is JSON, one entry an exercise:

    {"1.2": {"attempts": 3, "solved": true}}

It is written when `rpa.check` runs in a notebook, into the folder of that notebook, as
`.progress.json`. The environment variable `RPA_PROGRESS` names another file, and then plain Python
keeps progress too; `RPA_PROGRESS=off` keeps none. Nothing here can stop a check: a file that cannot
be read or written is said once, and left alone.
"""

import json
import os
import tempfile
from pathlib import Path

from rpa.check.one_at_a_time import alone_with
from rpa.check.registry import all_exercises

FILE_NAME = ".progress.json"
VARIABLE = "RPA_PROGRESS"
PACKAGE = Path(__file__).parents[1]

_said = set()  # paths whose trouble the reader knows of


def progress_path() -> Path | None:
    """The file that keeps progress here, or None where none is kept."""
    given = os.environ.get(VARIABLE)
    if given:
        return None if given == "off" else Path(given).expanduser()
    return Path.cwd() / FILE_NAME if in_notebook() else None


def note(number: str, solved: bool) -> None:
    """Count an attempt at an exercise.

    Attempts after the first right answer do not count: a notebook that is run again from the top
    changes nothing.

    Args:
        number: "chapter.position".
        solved: whether the check was passed.
    """
    path = progress_path()
    if _read(path) is None:
        return
    try:
        with alone_with(path):
            _count(path, number, solved)
    except OSError as error:
        _say_once(path, f"cannot be written ({error.strerror or error})")


def _count(path, number, solved):
    kept = _read(path) or {}
    before = kept.get(number, {"attempts": 0, "solved": False})
    if before["solved"]:
        return
    kept[number] = {"attempts": before["attempts"] + 1, "solved": solved}
    write_aside(path, json.dumps(kept, indent=1, sort_keys=True))


def progress() -> None:
    """Print which exercises are solved, a row a chapter, with the attempts that each one took.

    Exercises count from the day on which the file was begun; delete it to begin again.
    """
    path = progress_path()
    kept = _read(path)
    if kept is None:
        kept = {}
    print(as_table(kept))
    if path is None:
        print(f"No progress is kept outside a notebook; set {VARIABLE} to a file that keeps it.")


def as_table(kept: dict) -> str:
    """The table as text: one row per chapter, one column per exercise.

    Args:
        kept: {number: {"attempts": int, "solved": bool}}, as the file has it.

    >>> print(as_table({"0.1": {"attempts": 2, "solved": True}}).splitlines()[1])
    chapter 0   1 of 1     ✓ 2
    """
    chapters = {}
    for number in all_exercises():
        chapters.setdefault(int(number.split(".")[0]), []).append(number)
    widest = max(len(numbers) for numbers in chapters.values())
    head = "".join(f"{f'.{position}':>6}" for position in range(1, widest + 1))
    lines = [f"            solved  {head}"]
    for chapter, numbers in chapters.items():
        solved = sum(_solved(kept, number) for number in numbers)
        cells = "".join(f"{_cell(kept.get(number)):>6}" for number in numbers)
        lines.append(f"chapter {chapter:<3} {solved} of {len(numbers):<3}{cells}")
    numbers = [number for chapter in chapters.values() for number in chapter]
    solved = sum(_solved(kept, number) for number in numbers)
    lines.append(f"{solved} of {len(numbers)} solved. ✓ and ✗: the attempts so far; · not tried.")
    return "\n".join(lines)


def _solved(kept: dict, number: str) -> bool:
    return kept.get(number, {"solved": False})["solved"]


def _cell(entry: dict | None) -> str:
    return "·" if entry is None else f"{'✓' if entry['solved'] else '✗'} {entry['attempts']}"


def _read(path: Path | None) -> dict | None:
    """What the file keeps; empty where there is none yet, None where nothing can be kept."""
    if path is None:
        return None
    if PACKAGE in path.resolve().parents:
        _say_once(path, "lies inside the package")
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        for entry in kept.values():
            if not (type(entry["attempts"]) is int and type(entry["solved"]) is bool):
                raise ValueError(f"an entry is {entry}")
        return kept
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        _say_once(path, "cannot be read")
        return None


def write_aside(path: Path, text: str) -> None:
    """Write aside and rename: a notebook that is stopped in between leaves the old file whole."""
    file, aside = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(aside, path)
    except OSError:
        Path(aside).unlink(missing_ok=True)
        raise


def _say_once(path: Path, trouble: str) -> None:
    if path not in _said:
        _said.add(path)
        print(
            f"(Progress is not kept: {path} {trouble}. Checks work without it. Set {VARIABLE} to "
            "another file, or delete that one.)"
        )


def in_notebook() -> bool:
    """Whether an IPython kernel (a notebook) is running this code."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")
