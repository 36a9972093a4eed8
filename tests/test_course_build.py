"""The build: a teacher's mistakes are refused in words, and notebooks come out the same."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("jupytext", reason="the course is built where the extra [dev] is installed")

import nbformat

from course import build, notebook
from course.notebook import OutputError, execute, not_fully_executed, notebooks_of, to_text
from course.proof import answers, mentions
from course.source import (
    SourceError,
    find_sources,
    read_source,
    with_solution,
    without_solution,
)
from rpa._repository import REPOSITORY
from rpa.check.engine import check_exercise
from rpa.check.errors import CheckFailed, NotStarted
from rpa.check.registry import collect

LESSON = """\
# %% [markdown]
# # Chapter 9: Counting
#
# **Time:** 5 minutes. **You need:** fingers. **You will be able to:** count.

# %%
import rpa

print(2 + 1)

# %% [markdown]
# **Takeaway.** Three.
"""

EXERCISES = '''\
# %% [markdown]
# # Chapter 9: Counting, exercises

# %%
import rpa

TWO = 2

# %% [markdown]
# ## Exercise 9.1: Add one
#
# **Teaches:** to add
# one.

# %% [markdown] tags=["hint"]
# idea

# %% [markdown] tags=["hint"]
# api

# %% [markdown] tags=["hint"]
# nearly

# %% tags=["exercise"]
def add_one(x):
    """x plus one."""
    ### BEGIN SOLUTION
    # a comment does not count

    y = x + 1
    return y
    ### END SOLUTION


# %% tags=["check"]
rpa.check("9.1", add_one)

# %% [markdown] tags=["explanation"]
# Because.

# %% tags=["wrong"] refused="two"
def add_one(x):
    return x + 2


# %% tags=["wrong"] refused="three"
def add_one(x):
    return x + 3
'''


def read(folder: Path, text: str, name: str = "ch09_count_exercises.py"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_source(path)


def cells(source, folder: str) -> list[str]:
    made = notebooks_of(source)[Path(folder) / f"{source.stem}.ipynb"]
    nbformat.validate(made)
    return [cell.source for cell in made.cells]


def test_stub_keeps_the_docstring_and_says_how_many_lines(tmp_path):
    exercise = read(tmp_path, EXERCISES).exercises[0]
    assert without_solution(exercise) == (
        'def add_one(x):\n    """x plus one."""\n'
        '    raise NotImplementedError("Exercise 9.1: write add_one (about 2 lines)")'
    )
    assert with_solution(exercise).endswith("    y = x + 1\n    return y")
    assert exercise.teaches == "to add one."


def test_exercises_have_the_stub_and_three_folded_hints_and_nothing_that_tells(tmp_path):
    made = "\n".join(cells(read(tmp_path, EXERCISES), "exercises"))
    assert made.count("<details>") == 3 and "<summary>Hint 3: nearly the code</summary>" in made
    assert "NotImplementedError" in made and 'rpa.check("9.1", add_one)' in made
    assert "y = x + 1" not in made and "Because." not in made and "x + 2" not in made


def test_solutions_have_solution_and_explanation_but_no_wrong_answer(tmp_path):
    made = "\n".join(cells(read(tmp_path, EXERCISES), "solutions"))
    assert "y = x + 1" in made and "Because." in made and "### BEGIN" not in made
    assert "x + 2" not in made and "<details>" not in made


def test_every_notebook_begins_with_its_title_and_the_setup_cell(tmp_path):
    sources = [read(tmp_path, EXERCISES), read(tmp_path, LESSON, "ch09_count_lesson.py")]
    for source in sources:
        for made in notebooks_of(source).values():
            assert made.cells[0].source.startswith("# Chapter 9")
            assert made.cells[1].source == notebook.SETUP.strip()
            assert made.cells[1].metadata["jupyter"] == {"source_hidden": True}


def test_every_notebook_leads_to_its_neighbours(monkeypatch):
    root = Path(__file__).parents[1]
    for folder in ("notebooks", "exercises", "solutions"):
        links = re.findall(r"\]\(\.\./([^)]+)\)", notebook.neighbours(folder, "01_dense"))
        assert len(links) == 4  # the other two of the chapter, the chapters before and after
        assert all((root / link).exists() for link in links)
    assert "chapter 13" not in notebook.neighbours("notebooks", "12_comparison")
    monkeypatch.setattr(notebook, "REPOSITORY", "https://github.com/OWNER/NAME")
    monkeypatch.setattr(notebook, "REVISION", "v1")
    published = notebook.neighbours("notebooks", "00_start").splitlines()[-1]
    assert "(https://github.com/OWNER/NAME/blob/v1/exercises/00_start.ipynb)" in published


def test_every_lesson_ends_with_two_readings():
    for source in find_sources():
        if source.kind == "lesson":
            end = source.opening[-1].text.partition("**Read more:**")[2]
            assert len(re.findall(r"^- \[[^]]+\]\(https://", end, re.M)) == 2, source.stem


def test_no_file_knows_an_address_but_the_one_that_publishing_writes():
    """Who registers an address that nobody owns would run code in every reader's notebook."""
    root = Path(__file__).parents[1]
    address = re.compile(r"github\.com/[\w-]+/(rpa|ragged-paged-attention)\b")
    files = [p for name in ("rpa", "course", "tools", "docs") for p in (root / name).rglob("*.*")]
    files += [
        p for name in ("notebooks", "exercises", "solutions") for p in (root / name).iterdir()
    ]
    files = [p for p in files if p.suffix in (".py", ".md", ".ipynb")] + [root / "README.md"]
    known = {p.name for p in files if address.search(p.read_text("utf-8"))}
    assert known <= ({"_repository.py"} if REPOSITORY is None else {p.name for p in files})


def test_building_twice_gives_the_same_bytes_and_ids_survive_a_new_cell(tmp_path):
    path = Path("notebooks/09_count.ipynb")
    one = notebooks_of(read(tmp_path, LESSON, "ch09_count_lesson.py"))[path]
    two = notebooks_of(read(tmp_path, LESSON, "ch09_count_lesson.py"))[path]
    assert to_text(one) == to_text(two)
    longer = LESSON.replace("# %%\nimport", "# %%\n1 + 1\n\n# %%\nimport")
    three = notebooks_of(read(tmp_path, longer, "ch09_count_lesson.py"))[path]
    assert {cell.id for cell in one.cells} < {cell.id for cell in three.cells}


TEACHERS_MISTAKES = {
    "no title": (("# # Chapter 9", "# # Chapter 8"), 'must be markdown that begins with "# Chap'),
    "a missing hint": (
        ('# %% [markdown] tags=["hint"]\n# api\n', ""),
        '2 cells tagged "hint", expected 3: the idea; the API; nearly the code',
    ),
    "no explanation": (('tags=["explanation"]', ""), 'no cell tagged "explanation"'),
    "no end of the solution": (("    ### END SOLUTION\n", ""), "### END SOLUTION around"),
    "no solution": (
        ("### BEGIN SOLUTION", "# begin"),
        "needs ### BEGIN SOLUTION and ### END SOLUTION",
    ),
    "no function": (('def add_one(x):\n    """x', 'if True:\n    """x'), "defines no function"),
    "no exercise cell": (('tags=["exercise"]', ""), '0 cells tagged "exercise", expected 1'),
    "one wrong answer": (
        ('# %% tags=["wrong"] refused="three"\ndef add_one(x):\n    return x + 3\n', ""),
        '1 cells tagged "wrong", expected at least 2',
    ),
    "no message": ((' refused="three"', ""), 'a wrong answer needs refused="..."'),
    "the same message twice": (('"three"', '"two"'), "each must be refused with its own"),
    "a wrong answer of another name": (
        ("def add_one(x):\n    return x + 3", "def add_two(x):\n    return x + 3"),
        "a wrong answer must define add_one, it has ['add_two']",
    ),
    "the check of another exercise": (
        ('rpa.check("9.1", add_one)', 'rpa.check("9.2", add_one)'),
        'exactly: rpa.check("9.1", add_one)',
    ),
    "a number out of order": (("Exercise 9.1:", "Exercise 9.3:"), "stands where 9.1 is expected"),
    "nothing taught": (("**Teaches:**", "Teaches"), 'no paragraph "**Teaches:** ..."'),
    "an unknown tag": (('tags=["wrong"]', 'tags=["wrogn"]'), "expected at most one of hint"),
    "two tags": (('tags=["check"]', 'tags=["check", "hint"]'), "expected at most one of"),
    "no exercise": (("## Exercise 9.1:", "## Exercice 9.1:"), "no exercise found"),
}


@pytest.mark.parametrize("kind", TEACHERS_MISTAKES)
def test_teachers_mistake_in_exercises_is_refused_in_words(tmp_path, kind):
    (old, new), words = TEACHERS_MISTAKES[kind]
    assert old in EXERCISES
    with pytest.raises(SourceError, match=re.escape(words)):
        read(tmp_path, EXERCISES.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("**Time:**", "Time:", "the first cell must say **Time:**"),
        ("**You need:**", "", "the first cell must say **You need:**"),
        ("**Takeaway.**", "Finally:", "no **Takeaway.** found"),
        ("print(2 + 1)", "print(2 + 1)\n" * 12, "a code cell has 13 lines, expected at most 12"),
        ("# **Takeaway", "# ## Exercise 9.1: x\n# **Takeaway", "a lesson has no exercises"),
        ("# %%\nimport", '# %% tags=["hint"]\nimport', "a lesson has no exercises and no tags"),
    ],
)
def test_teachers_mistake_in_a_lesson_is_refused_in_words(tmp_path, old, new, words):
    assert old in LESSON
    with pytest.raises(SourceError, match=re.escape(words)):
        read(tmp_path, LESSON.replace(old, new), "ch09_count_lesson.py")


def test_a_file_of_another_name_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"expected chNN_name_lesson.py"):
        read(tmp_path, LESSON, "ch9_lesson.py")


def test_notes_to_the_formatter_do_not_reach_a_notebook(tmp_path):
    noted = LESSON.replace("print(2 + 1)", "print(2+1)  # fmt: skip")
    made = "\n".join(cells(read(tmp_path, noted, "ch09_count_lesson.py"), "notebooks"))
    assert "print(2+1)" in made and "fmt: skip" not in made


def test_exercises_without_checks_are_refused(tmp_path):
    source = read(tmp_path, EXERCISES, "ch09_count_exercises.py")
    with pytest.raises(SourceError, match=r"has the exercises \['9.1'\], but"):
        build.tables([source])


@pytest.fixture
def executed(tmp_path):
    """A two-cell notebook, run in a kernel."""
    made = nbformat.v4.new_notebook(
        metadata=notebook._metadata(),
        cells=[
            nbformat.v4.new_code_cell(
                "import sys\nprint('one', flush=True)\nprint('noise', file=sys.stderr)\n"
                "sys.stderr.flush()\nprint('two')"
            ),
            nbformat.v4.new_code_cell("1 + 1"),
        ],
    )
    return execute(made, tmp_path)


def test_executed_notebook_has_outputs_without_noise_and_times(executed):
    assert not_fully_executed(executed) is None
    assert [output.output_type for output in executed.cells[0].outputs] == ["stream"]
    assert executed.cells[0].outputs[0].text == "one\ntwo\n"
    assert "execution" not in executed.cells[0].metadata
    assert executed.metadata == notebook._metadata()


def test_outputs_of_this_machine_are_refused(tmp_path):
    for code in ("print(object())", "import os; os.getcwd()"):
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        with pytest.raises(OutputError, match="memory address or a path of this machine"):
            execute(made, tmp_path)


def test_a_notebook_that_did_not_run_to_its_end_is_found(executed):
    executed.cells[1].execution_count = None
    assert "not executed" in not_fully_executed(executed)
    executed.cells[1].execution_count = 2
    executed.cells[1].outputs = [
        nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
    ]
    assert not_fully_executed(executed) == "a cell ended with an error"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one built lesson; returns its folder and its sources."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    sources = [read(tmp_path, LESSON, "ch09_count_lesson.py")]
    build.build(sources, run=False)
    for path, text in build.tables(sources).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path, sources


def test_check_lists_what_is_stale(repository):
    root, sources = repository
    path = root / "notebooks/09_count.ipynb"
    assert build.stale(sources) == [
        "notebooks/09_count.ipynb: not executed from its first cell to its last"
    ]
    made = json.loads(path.read_text())
    made["cells"][2]["source"] = "print(4)"
    path.write_text(json.dumps(made))
    assert build.stale(sources) == ["notebooks/09_count.ipynb: not what its source says"]
    path.rename(root / "notebooks/10_other.ipynb")
    (root / "exercises/README.md").write_text("edited by hand")
    assert build.stale(sources) == [
        "notebooks/09_count.ipynb: missing",
        "notebooks/10_other.ipynb: no source makes this notebook",
        "exercises/README.md: not what the build writes",
    ]


def test_check_says_up_to_date_and_exits_with_zero(repository, monkeypatch, capsys):
    root, sources = repository
    path = root / "notebooks/09_count.ipynb"
    made = nbformat.read(path, as_version=4)
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
    path.write_text(to_text(made))
    monkeypatch.setattr(build, "find_sources", lambda chapters=(): sources)
    assert build.main(["--check"]) == 0
    assert capsys.readouterr().out == "up to date\n"
    path.unlink()
    assert build.main(["--check"]) == 1
    assert "09_count.ipynb: missing" in capsys.readouterr().out


def test_the_example_of_the_teachers_guide_works(tmp_path):
    guide = (Path(__file__).parents[1] / "course/README.md").read_text("utf-8")
    blocks = re.findall(r"^```(?:python)?\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    source_text, check_text, message = blocks[-3:]
    head = "# %% [markdown]\n# # Chapter 9: Pages\n\n"
    exercise = read(tmp_path, head + source_text).exercises[0]
    declared = {}
    exec(check_text, declared)
    (pages,) = collect(9, [declared["pages"]]).values()
    for title, code, expected in answers(exercise):
        namespace = {}
        exec(code, namespace)
        said = judge(pages, namespace["pages_needed"])
        assert mentions(said, expected), said
        if title == "wrong answer 1":
            assert said == message.rstrip("\n")


def judge(exercise, function) -> str:
    """What the check says to a function."""
    try:
        check_exercise(exercise, function)
    except (CheckFailed, NotStarted) as refused:
        return str(refused)
    return "✓"


def test_a_text_build_keeps_outputs_of_unchanged_cells_and_says_which_are_lost(
    tmp_path, monkeypatch, capsys
):
    source = read(tmp_path, LESSON, "ch09_count_lesson.py")
    ((path, made),) = notebooks_of(source).items()
    for number, cell in enumerate((c for c in made.cells if c.cell_type == "code"), start=1):
        cell.execution_count = number
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(to_text(made), encoding="utf-8")
    build.build([source], run=False)
    assert (tmp_path / path).read_text(encoding="utf-8") == to_text(made)
    assert capsys.readouterr().out == ""
    changed = read(tmp_path, LESSON.replace("2 + 1", "1 + 2"), "ch09_count_lesson.py")
    build.build([changed], run=False)
    assert "1 + 2" in (tmp_path / path).read_text(encoding="utf-8")
    assert f"{path} has no outputs now" in capsys.readouterr().out
