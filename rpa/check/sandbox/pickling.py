"""Send a learner's function to another process: its source, and what it needs of its notebook.

`pickle` sends a function as its name, and the name of a notebook cell's function means nothing in
another process. So the source travels, with every function and value of the notebook that it
refers to; what comes from a module that can be imported travels as a name.
"""

import ast
import dataclasses
import importlib
import inspect
import linecache
import pickle
import sys
import textwrap
import types
from collections.abc import Callable, Iterator

from rpa.check.errors import CannotShip

FILE_NAME = "your_code.py"
"""Under this name the shipped source is compiled; lines keep the numbers of their cell."""


@dataclasses.dataclass
class Parcel:
    """A function and all that it refers to, as bytes and text."""

    name: str
    modules: dict[str, str] = dataclasses.field(default_factory=dict)  # name here: module
    imports: dict[str, tuple] = dataclasses.field(default_factory=dict)  # name: (module, its name)
    values: dict[str, bytes] = dataclasses.field(default_factory=dict)  # name: pickled
    sources: dict[str, tuple] = dataclasses.field(default_factory=dict)  # name: (source, line)


def pack(function: Callable) -> Parcel:
    """Collect a function and what it refers to.

    Raises:
        CannotShip: its source is not to be had, or it stands inside another function.

    >>> pack(cdiv_of_a_notebook := importlib.import_module("rpa.page_pool").cdiv).imports
    {'cdiv': ('rpa.page_pool', 'cdiv')}
    """
    name = getattr(function, "__name__", "")
    plain = inspect.unwrap(function)
    if not isinstance(plain, types.FunctionType | type):
        raise CannotShip(
            f"function is a {type(function).__name__}, expected a function that a cell defines: "
            "write `def` in front of its name"
        )
    if getattr(plain, "__closure__", None):
        raise CannotShip(
            f"{name} stands inside another function, and its check runs in a process of its own. "
            "Define it at the left margin of a cell."
        )
    parcel = Parcel(name)
    _add(parcel, name, function)
    return parcel


def unpack(parcel: Parcel) -> Callable:
    """The function, defined anew in this process."""
    module = types.ModuleType("your_code")
    sys.modules[module.__name__] = module  # where `inspect` and error messages look it up
    names = vars(module)
    for name, path in parcel.modules.items():
        names[name] = importlib.import_module(path)
    for name, (path, original) in parcel.imports.items():
        names[name] = getattr(importlib.import_module(path), original)
    for name, data in parcel.values.items():
        names[name] = pickle.loads(data)
    lines = {}
    for source, first in parcel.sources.values():
        # Blank lines in front keep the line numbers that the learner sees in the cell.
        exec(compile("\n" * (first - 1) + source, FILE_NAME, "exec"), names)
        lines |= dict(enumerate(source.splitlines(keepends=True), start=first))
    text = [lines.get(number, "\n") for number in range(1, max(lines, default=0) + 1)]
    linecache.cache[FILE_NAME] = (sum(map(len, text)), None, text, FILE_NAME)
    return names[parcel.name]


def _add(parcel: Parcel, name: str, value) -> None:
    if name in parcel.modules | parcel.imports | parcel.values | parcel.sources:
        return
    if isinstance(value, types.ModuleType):
        parcel.modules[name] = value.__name__
    elif is_imported(value):
        parcel.imports[name] = (value.__module__, value.__name__)
    elif isinstance(inspect.unwrap(value), types.FunctionType | type):
        _add_source(parcel, name, value)
    else:
        try:
            parcel.values[name] = pickle.dumps(value)
        except Exception as error:
            raise CannotShip(
                f"{name} is a {type(value).__name__} of your notebook that cannot be sent to the "
                f"process which runs the check ({error}): make it inside your function"
            ) from None


def _add_source(parcel: Parcel, name: str, value) -> None:
    plain = inspect.unwrap(value)
    try:
        lines, first = inspect.getsourcelines(plain)
    except (OSError, TypeError):
        raise CannotShip(
            f"the source of {name} cannot be read: define it in a cell of the notebook"
        ) from None
    parcel.sources[name] = (textwrap.dedent("".join(lines)), max(first, 1))
    for other in (*names_in(plain), *_names_of_decorators(parcel.sources[name][0])):
        namespace = _globals_of(plain)
        if other != name and other in namespace:
            _add(parcel, other, namespace[other])
    # A function may be called before it is shipped again: definitions come before their users.
    parcel.sources[name] = parcel.sources.pop(name)


def is_imported(value) -> bool:
    """Whether another process finds it under its name in a module."""
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    # What the learner's own file has travels by its source as well: it changes between checks.
    if module is None or module.__name__ in ("__main__", "your_code", "my_rpa"):
        return False
    return getattr(module, getattr(value, "__name__", ""), None) is value


def _globals_of(plain) -> dict:
    if isinstance(plain, types.FunctionType):
        return plain.__globals__
    methods = (m for m in vars(plain).values() if isinstance(m, types.FunctionType))
    return next((method.__globals__ for method in methods), {})


def _names_of_decorators(source) -> Iterator[str]:
    """The names that stand behind an @: they are looked up before the function is there."""
    for decorator in ast.parse(source).body[0].decorator_list:
        yield from (node.id for node in ast.walk(decorator) if isinstance(node, ast.Name))


def names_in(plain) -> Iterator[str]:
    """The names that a function or class may look up outside, also from functions inside it."""
    if isinstance(plain, type):
        for member in vars(plain).values():
            if isinstance(member, types.FunctionType):
                yield from names_in(member)
        return
    # A function that is not written in Python, like `len` or `jnp.exp`, looks nothing up.
    codes = [plain.__code__] if isinstance(plain, types.FunctionType) else []
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
