"""The file `my_rpa.py`: imports on top, then a section for each solved exercise."""

import ast
import inspect
import linecache
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

from rpa.check.one_at_a_time import alone_with
from rpa.check.progress import in_notebook, write_aside
from rpa.check.sandbox.pickling import pack

FILE_NAME = "my_rpa.py"
VARIABLE = "RPA_YOURS"
MODULE = "my_rpa"

TITLE = '"""My own ragged paged attention. The checks of the course add to it: one section each."""'
MARK = re.compile(r"^# --- (\d+\.\d+): (\w+) -+$", re.MULTILINE)
DEFINED = re.compile(r"^(?:def|class) (\w+)|^((?:\w+, )*\w+) = ", re.MULTILINE)


def yours_path() -> Path | None:
    """The file that collects solved cells here, or None where nothing is collected."""
    given = os.environ.get(VARIABLE)
    if given == "off":
        return None
    if given:
        path = Path(given).expanduser()
        return path if path.name == FILE_NAME else path / FILE_NAME
    return Path.cwd() / FILE_NAME if in_notebook() else None


def collect(number: str, function: Callable, path: Path | None = None) -> Path | None:
    """Write the cell of a solved exercise into the file, in the place of an older answer.

    Args:
        number: "chapter.position" of the exercise.
        function: what its check was given; the whole cell that defines it is written, and what it
            uses of other cells.
        path: of the file; None takes `yours_path()`.

    Returns:
        The path, or None where nothing is collected: outside of a notebook, or because the
        function comes from the file itself.
    """
    path = yours_path() if path is None else path
    plain = inspect.unwrap(function)
    if path is None or getattr(plain, "__module__", "") == MODULE:
        return None
    parcel, cell = pack(function), _cell_of(plain)
    with alone_with(path):  # another notebook of the learner may be adding its own
        _add(path, number, plain.__name__, cell, parcel)
    return path


def _add(path, number, name, cell, parcel):
    """Read the file, add one section and what it needs, write the file."""
    sections = read(path)
    sections[number] = (name, cell)
    numbers = sorted(sections, key=lambda n: [int(part) for part in n.split(".")])
    sections = {n: sections[n] for n in numbers}
    imports = imports_of(path) | _imports(parcel)
    body = "\n".join(text for _, text in sections.values())
    extra = _from_other_cells(parcel, defined_in(body))
    if extra:
        sections[number] = (name, f"{extra}\n\n\n{cell}")
    write_aside(path, _render(imports, sections))


def read(path: Path) -> dict[str, tuple[str, str]]:
    """The sections of the file by number: (name of the function, text); {} if there is no file."""
    if not path.exists():
        return {}
    parts = MARK.split(path.read_text(encoding="utf-8"))[1:]
    return {
        number: (name, text.strip("\n"))
        for number, name, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def defined_in(text: str) -> set[str]:
    """Names that stand at the margin of a text.

    >>> sorted(defined_in("LIMIT = 3\\ndef double(x):\\n    y = 2\\n    return x * y"))
    ['LIMIT', 'double']
    """
    found = DEFINED.findall(text)
    return {name for define, assign in found for name in (define or assign).split(", ")}


def imports_of(path: Path) -> set[str]:
    """The lines of the file that import something."""
    if not path.exists():
        return set()
    head = MARK.split(path.read_text(encoding="utf-8"))[0]
    return {line for line in head.splitlines() if line.startswith(("import ", "from "))}


def _cell_of(plain) -> str:
    """The text of the notebook cell that defines a function, without the check in it."""
    lines = linecache.getlines(plain.__code__.co_filename)
    kept = [line for line in lines if not line.startswith(("rpa.check(", "%"))]
    text = "".join(kept).strip("\n")
    # A file, and not a cell: of that only the function is the answer.
    is_cell = f"def {plain.__name__}(" in text and not Path(plain.__code__.co_filename).is_file()
    return text if is_cell else inspect.getsource(plain).strip("\n")


def _from_other_cells(parcel, known) -> str:
    """Functions and values of other cells that the answer needs, and the file does not have."""
    lines = [
        f"{name} = {pickle.loads(data)!r}"
        for name, data in parcel.values.items()
        if name not in known
    ]
    sources = {name: text for name, (text, _) in parcel.sources.items() if name not in known}
    functions = [text.strip("\n") for text in sources.values()]
    return "\n\n\n".join([*(["\n".join(lines)] if lines else []), *functions])


def _imports(parcel) -> set[str]:
    lines = set()
    for name, module in parcel.modules.items():
        parent, _, last = module.rpartition(".")
        if name == module:
            lines.add(f"import {module}")
        elif name == last:
            lines.add(f"from {parent} import {name}")
        elif parent.startswith("jax.experimental"):
            lines.add(f"from {parent} import {last} as {name}")
        else:
            lines.add(f"import {module} as {name}")
    for name, (module, original) in parcel.imports.items():
        renamed = "" if name == original else f" as {name}"
        lines.add(f"from {module} import {original}{renamed}")
    return lines


def _render(imports: set[str], sections: dict) -> str:
    """The file's text: imports that no section has replaced, in groups, then the sections."""
    body = "\n".join(text for _, text in sections.values())
    own = defined_in(body)
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)} - own
    grouped: dict[str, set[str]] = {}
    plain = set()
    for line in imports:
        if not line.startswith("from "):
            if line.split()[-1].partition(".")[0] in used:
                plain.add(line)
            continue
        module, names = line.removeprefix("from ").split(" import ")
        kept = {n for n in names.split(", ") if n.split(" as ")[-1] in used}
        grouped.setdefault(module, set()).update(kept)
    lines = plain | {f"from {m} import {', '.join(sorted(n))}" for m, n in grouped.items() if n}
    groups = [[], [], []]  # of Python, of JAX, of rpa
    for line in sorted(lines, key=lambda line: (line.startswith("from "), line)):
        module = line.split()[1]
        third_party = module.startswith(("jax", "numpy"))
        groups[2 if module.startswith("rpa") else 1 if third_party else 0].append(line)
    head = "\n\n".join("\n".join(group) for group in groups if group)
    parts = []
    for number, (name, text) in sections.items():
        mark = f"# --- {number}: {name} "
        parts.append(f"{mark}{'-' * (99 - len(mark))}\n\n\n{text}\n")
    return f"{TITLE}\n\n{head}\n\n" + "\n\n".join(parts)
