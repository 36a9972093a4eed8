"""Turn a source into notebooks: lesson, exercises with stubs, solutions; execute and tidy them."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course.source import (
    COURSE,
    HINTS,
    Cell,
    ExerciseSource,
    Source,
    with_solution,
    without_solution,
)
from rpa._repository import REPOSITORY, REVISION

ROOT = Path(__file__).parents[1]
EXECUTED = ("notebooks", "solutions")
"""Folders whose notebooks are committed with their outputs."""
TIMEOUT_S = 300

PUBLISHED = f"git+{REPOSITORY}@{REVISION}" if REPOSITORY else ""

SETUP = f"""\
# @title Find or install rpa
# Finds rpa: the clone around this notebook, or where it is installed, or the address in RPA_SOURCE.
# Installs only what is missing: the jax and libtpu of Colab and Kaggle stay as they are.
import importlib.util, os, pathlib, subprocess, sys

SOURCE = os.environ.get("RPA_SOURCE", "{PUBLISHED}")

def is_ours(spec):  # pip's "rpa" is another project
    return spec and spec.origin and (pathlib.Path(spec.origin).parent / "check").is_dir()

absent = [name for name in ("jax", "matplotlib", "tqdm") if not importlib.util.find_spec(name)]
installs = [absent] if absent else []
if (pathlib.Path.cwd().parent / "rpa" / "check").is_dir():
    sys.path.insert(0, str(pathlib.Path.cwd().parent))
elif not is_ours(importlib.util.find_spec("rpa")):
    if not SOURCE:
        raise SystemExit(
            "rpa is not installed here, and this notebook installs from no address but yours. Set "
            "RPA_SOURCE first: import os; os.environ['RPA_SOURCE'] = 'git+https://...', your clone."
        )
    installs.append(["--no-deps", SOURCE])
for packages in installs:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *packages]
    if subprocess.run(command).returncode:
        raise SystemExit(
            f"pip could not install {{' '.join(packages)}}; its own words are above. Is there a "
            "network? On Kaggle: Settings, Internet on."
        )
importlib.invalidate_caches()
dev = pathlib.Path("/dev")
if not any([*dev.glob("accel*"), *dev.glob("vfio/[0-9]*"), *dev.glob("nvidia[0-9]*")]):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no TPU: libtpu need not complain about it

import rpa

rpa.doctor(brief=True)
"""

FOLDED = {
    "jupyter": {"source_hidden": True},
    "cellView": "form",
    "_kg_hide-input": True,
    "tags": ["hide-input"],
}
"""Metadata of a cell whose code is folded away: JupyterLab, Colab, Kaggle, and pages made of it."""

FORMATTER_NOTE = "  # fmt: skip"
"""A note to the formatter of the sources; no reader of a notebook needs it."""

MACHINE_TEXT = re.compile(r"\bat 0x[0-9a-f]{6,}|/home/|/tmp/|/root/|/Users/")
"""What must not be in a committed output: it changes from run to run or names a machine's paths."""


class OutputError(RuntimeError):
    """A notebook ran, but what it printed cannot be committed."""


def notebooks_of(source: Source) -> dict[Path, nbformat.NotebookNode]:
    """The notebooks that a source becomes, not executed, by path inside the repository."""
    if source.kind == "lesson":
        folders = {"notebooks": source.opening}
    else:
        folders = {
            "exercises": source.opening + _each(source.exercises, _exercise_cells),
            "solutions": source.opening + _each(source.exercises, _solution_cells),
        }
    return {
        Path(folder) / f"{source.stem}.ipynb": _notebook(folder, source.stem, cells)
        for folder, cells in folders.items()
    }


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in its folder, and tidy its outputs so that they can be committed.

    Raises:
        OutputError: an output holds a memory address or a path of this machine.
        nbclient.exceptions.CellExecutionError: a cell raises.
    """
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    nobody_learns = {"RPA_PROGRESS": "off", "RPA_YOURS": "off"}
    client.execute(env={**os.environ, **nobody_learns})
    notebook.metadata = _metadata()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _merge([output for output in cell.outputs if _keep(output)])
    return notebook


def to_text(notebook: nbformat.NotebookNode) -> str:
    """The notebook as it lies on disk, the same bytes for the same notebook."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def without_outputs(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy as it was before it ran: what the build compares."""
    copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return copy


def with_outputs_of(
    new: nbformat.NotebookNode, old: nbformat.NotebookNode
) -> nbformat.NotebookNode | None:
    """The new notebook with the old one's outputs, or None if more than its head changed.

    The head is the title with its badges and the cell that finds rpa: no later output depends on
    them, so publishing runs no notebook again.
    """
    bodies = [[(cell.cell_type, cell.source) for cell in book.cells[2:]] for book in (new, old)]
    if bodies[0] != bodies[1] or not_fully_executed(old):
        return None
    for cell, before in zip(new.cells, old.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = before.outputs, before.execution_count
    new.metadata = old.metadata
    return new


def not_fully_executed(notebook: nbformat.NotebookNode) -> str | None:
    """What is wrong with the outputs of a notebook that should have them, in words."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        return "not executed from its first cell to its last"
    if any(output.output_type == "error" for cell in cells for output in cell.outputs):
        return "a cell ended with an error"
    return None


def _each(exercises: list[ExerciseSource], cells_of) -> list[Cell]:
    return [cell for exercise in exercises for cell in cells_of(exercise)]


def _exercise_cells(exercise: ExerciseSource) -> list[Cell]:
    cells = []
    for cell in exercise.cells:
        if cell.tag == "exercise":
            cells.append(Cell("code", without_solution(exercise)))
        elif cell.tag == "hint":
            if cell is exercise.tagged("hint")[0]:
                cells.append(Cell("markdown", _fold(exercise.tagged("hint"))))
        elif cell.tag in ("", "check"):
            cells.append(cell)
    return cells


def _solution_cells(exercise: ExerciseSource) -> list[Cell]:
    cells = []
    for cell in exercise.cells:
        if cell.tag == "exercise":
            cells.append(Cell("code", with_solution(exercise)))
        elif cell.tag in ("", "check", "explanation"):
            cells.append(cell)
    return cells


def _fold(hints: list[Cell]) -> str:
    folded = (
        f"<details>\n<summary>Hint {number}: {title}</summary>\n\n{hint.text}\n\n</details>"
        for number, (title, hint) in enumerate(zip(HINTS, hints, strict=True), start=1)
    )
    return "\n\n".join(folded)


def _notebook(folder: str, stem: str, cells: list[Cell]) -> nbformat.NotebookNode:
    head = (cells[0].text, badges(folder, stem), neighbours(folder, stem))
    title = Cell("markdown", "\n\n".join(part for part in head if part))
    notebook = new_notebook(metadata=_metadata())
    taken = set()
    for cell in [title, Cell("code", SETUP), *cells[1:]]:
        new = new_markdown_cell if cell.kind == "markdown" else new_code_cell
        text = cell.text.strip("\n").replace(FORMATTER_NOTE, "")
        notebook.cells.append(new(text, id=_cell_id(cell, taken)))
    notebook.cells[1].metadata.update(FOLDED)
    return notebook


def neighbours(folder: str, stem: str) -> str:
    """Markdown that leads on: the other notebooks of this chapter, the chapters before and after.

    GitHub and JupyterLab follow relative links. Colab and Kaggle do not, so a published notebook
    has a second line for them.

    >>> print(neighbours("solutions", "01_dense"))
    Chapter 1: [lesson](../notebooks/01_dense.ipynb) · [exercises](../exercises/01_dense.ipynb) · \
solutions | [chapter 0](../solutions/00_start.ipynb) · [chapter 2](../solutions/02_paging.ipynb)
    """
    lines = [_links(folder, stem, "..")]
    if REPOSITORY is not None:
        page = f"{REPOSITORY}/blob/{REVISION}"
        lines.append(f"From Colab or Kaggle: {_links(folder, stem, page)}")
    return "\n\n".join(lines)


def _links(folder: str, stem: str, root: str) -> str:
    kinds = {"notebooks": "lesson", "exercises": "exercises", "solutions": "solutions"}
    here = [
        kind if other == folder else f"[{kind}]({root}/{other}/{stem}.ipynb)"
        for other, kind in kinds.items()
    ]
    stems = sorted(path.stem[2:].removesuffix("_lesson") for path in COURSE.glob("ch*_lesson.py"))
    before, after = [s for s in stems if s < stem][-1:], [s for s in stems if s > stem][:1]
    around = [f"[chapter {int(s[:2])}]({root}/{folder}/{s}.ipynb)" for s in before + after]
    return f"Chapter {int(stem[:2])}: {' · '.join(here)} | {' · '.join(around)}"


def badges(folder: str, stem: str) -> str:
    """Markdown that opens a notebook in Colab or Kaggle; empty before the project is published."""
    if REPOSITORY is None:
        return ""
    page = f"{REPOSITORY}/blob/{REVISION}/{folder}/{stem}.ipynb"
    colab = page.replace("https://github.com/", "https://colab.research.google.com/github/")
    kaggle = f"https://kaggle.com/kernels/welcome?src={page}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle})"
    )


def _metadata() -> dict:
    return {
        "accelerator": "TPU",
        "colab": {"gpuType": "V5E1", "provenance": [], "toc_visible": True},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def _cell_id(cell: Cell, taken: set[str]) -> str:
    """An id from the text, so that a cell keeps it when others come and go."""
    attempt = 0
    while True:
        identity = f"{cell.kind}:{cell.text}:{attempt}".encode()
        found = hashlib.sha256(identity).hexdigest()[:12]
        if found not in taken:
            taken.add(found)
            return found
        attempt += 1


def _merge(outputs: list) -> list:
    """Join what one cell printed: where a kernel cuts it in pieces differs from run to run."""
    merged = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and last.output_type == output.output_type == "stream":
            last.text += output.text
        else:
            merged.append(output)
    return merged


def _keep(output) -> bool:
    """Whether an output is committed; refuses what would differ on the next machine."""
    if output.output_type == "stream" and output.name == "stderr":
        sys.stderr.write(output.text)  # warnings are for whoever builds, not for readers
        return False
    text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
    if str(ROOT) in text or MACHINE_TEXT.search(text):
        raise OutputError(f"an output holds a memory address or a path of this machine: {text!r}")
    return True
