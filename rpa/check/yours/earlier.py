"""Your functions of earlier exercises, or, where one is not solved, those of the reference."""

import functools
import importlib
import inspect
import linecache
import sys
import types
from pathlib import Path

from rpa.check.sandbox.pickling import is_imported, names_in
from rpa.check.yours.growing import MODULE, defined_in, read, yours_path
from rpa.lab.compile.functions import load

LINE = {
    "4.3": "online_step",
    "4.7": "flash_attention",
    "5.6": "paged_decode",
    "5.7": "prefetched_decode",
    "6.6": "fused_attention",
    "7.3": "ragged_attention",
}
"""The assembly line: exercises whose cells go into the file, and the function that each ends in."""

REFERENCE = "rpa.yours.reference"


def earlier(*names: str):
    """Functions of earlier exercises: yours where they are solved, else the reference's.

    Prints a line for each exercise that they come from, which says whose they are.

    Args:
        *names: of the functions, as the exercise that defines them calls them.

    Returns:
        The function, or a tuple of them for several names.

    Raises:
        ValueError: if no exercise of the assembly line defines such a function.

    >>> step = earlier("online_step")
    online_step: rpa.yours.reference.online_step, because 4.3 is not solved here
    """
    reference = importlib.import_module(REFERENCE)
    homes = {name: number_of(name) for name in names}
    own = your_functions()
    for number in dict.fromkeys(homes.values()):
        here = [name for name in names if homes[name] == number]
        mine = [name for name in here if name in own]
        theirs = [name for name in here if name not in own]
        if mine:
            print(f"{', '.join(mine)}: yours, of {number}")
        if theirs:
            where = f"{REFERENCE}.{theirs[0]}" if len(theirs) == 1 else REFERENCE
            print(f"{', '.join(theirs)}: {where}, because {number} is not solved here")
    found = tuple(own.get(name) or getattr(reference, name) for name in names)
    return found if len(found) > 1 else found[0]


def number_of(name: str) -> str:
    """The exercise that defines a function of the assembly line.

    >>> number_of("online_step")
    '4.3'
    """
    reference = Path(importlib.import_module(REFERENCE).__file__)
    for number, (_, text) in read(reference).items():
        if name in defined_in(text):
            return number
    raise ValueError(f"name is {name!r}, but no exercise of {', '.join(LINE)} defines it.")


def your_functions() -> dict:
    """What your file defines, by name; {} where there is none, or where it cannot be imported."""
    path = yours_path()
    if path is None or not path.is_file():
        return {}
    sys.modules.pop(MODULE, None)  # it may have grown since it was imported
    linecache.checkcache(str(path))
    sections = read(path)
    if not sections:
        return {}
    try:
        load(f"{path}:{list(sections.values())[-1][0]}")
    except Exception as error:
        print(f"({path.name} cannot be imported: {type(error).__name__}: {error})")
        return {}
    defined = defined_in("\n".join(text for _, text in sections.values()))
    return {name: getattr(sys.modules[MODULE], name) for name in defined}


def functions_used(function) -> dict:
    """Functions of the learner's own file that a function uses, or that those use, by name."""
    found, waiting = {}, [inspect.unwrap(function)]
    while waiting:
        plain = waiting.pop()
        while isinstance(plain, functools.partial):
            plain = plain.func
        namespace = getattr(plain, "__globals__", {})
        for name in names_in(plain):
            value = namespace.get(name)
            is_own = isinstance(inspect.unwrap(value), types.FunctionType)
            if name not in found and is_own and not is_imported(value):
                found[name] = value
                waiting.append(inspect.unwrap(value))
    return {name: value for name, value in found.items() if value.__module__ == MODULE}
