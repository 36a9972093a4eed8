"""What is promised about installing: one list of dependencies, and a wheel that carries it all."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

# One worker for all of this file: the wheel is built once for it.
pytestmark = pytest.mark.xdist_group("wheel")

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements_of_pyproject():
    """All dependencies with their ranges, the extras included, but for references to extras."""
    extras = PYPROJECT["optional-dependencies"]
    lines = [*PYPROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    return {line for line in lines if not line.startswith(f"{PYPROJECT['name']}[")}


def test_conda_users_get_the_same_dependencies():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    listed = {line.removeprefix("      - ") for line in lines if line.startswith("      - ")}
    assert listed == requirements_of_pyproject()
    python = next(line for line in lines if "- python " in line).split("python ")[1]
    assert python == PYPROJECT["requires-python"]


def test_every_dependency_has_a_tested_version():
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    for line in requirements_of_pyproject():
        name = re.match(r"[\w.-]+", line).group()
        assert re.sub(r"[-_.]+", "-", name).lower() in normal, f"{name} is not in constraints.txt"


def test_nothing_forces_another_jax_on_colab():
    """Colab's jax is the floor: a ceiling, a pin or libtpu as a dependency would replace it."""
    jax = [line for line in PYPROJECT["dependencies"] if line.startswith("jax")]
    assert jax == ["jax>=0.7.2"]
    assert not any(line.startswith("libtpu") for line in PYPROJECT["dependencies"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: setuptools leaves a build folder behind, and packs what an older one holds.
    source = folder / "source"
    shutil.copytree(ROOT / "rpa", source / "rpa", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return next(folder.glob("ragged_paged_attention-*.whl"))


def test_the_wheel_carries_all_that_the_notebooks_need(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "rpa"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    missing = set(tracked.stdout.split()) - inside
    assert not missing, f"files of rpa/ that are not in the wheel: {missing}"


def test_the_wheel_carries_nothing_else(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rpa"}
