"""Publishing: one command writes the address everywhere, and the first cell installs from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from course.notebook import SETUP
from rpa._repository import REPOSITORY

ROOT = Path(__file__).parents[1]
ADDRESS, TAG = "https://github.com/made-up-owner/made-up-name", "v9.9.9"

# One worker for all of this file: the copy is published once for it.
pytestmark = pytest.mark.xdist_group("publish")


def run(*command, cwd, **variables):
    """Run a command; its output as text, with what it said on stderr if it fails."""
    environment = os.environ | {"PYTHONPATH": str(cwd)} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A copy of this checkout, published at a made-up address, committed and tagged."""
    copy = tmp_path_factory.mktemp("published") / "repository"
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    order = ("--repository", f"{ADDRESS}.git", "--revision", TAG)
    run(sys.executable, "tools/publish.py", *order, cwd=copy)
    identity = ("-c", "user.name=publisher", "-c", "user.email=publisher@example.org")
    run("git", "init", "--quiet", cwd=copy)
    run("git", "add", "--all", cwd=copy)
    run("git", *identity, "commit", "--quiet", "--message", "published", cwd=copy)
    run("git", "tag", TAG, cwd=copy)
    return copy


def notebooks(root):
    return [
        path
        for kind in ("notebooks", "exercises", "solutions")
        for path in (root / kind).glob("*.ipynb")
    ]


def test_every_notebook_installs_the_tag_and_keeps_its_outputs(published):
    for path in notebooks(published):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        before = json.loads((ROOT / path.relative_to(published)).read_text("utf-8"))["cells"]
        page = f"{ADDRESS}/blob/{TAG}/{path.relative_to(published)}"
        assert page in "".join(cells[0]["source"])
        assert f"git+{ADDRESS}@{TAG}" in "".join(cells[1]["source"])
        outputs = [cell.get("outputs") for cell in before]
        assert [cell.get("outputs") for cell in cells] == outputs, path


def test_the_index_of_chapters_links_to_it(published):
    index = (published / "notebooks/README.md").read_text("utf-8")
    assert f"{ADDRESS}/blob/{TAG}/notebooks/" in index


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory):
    """A Python with this environment's packages, except rpa itself."""
    folder = tmp_path_factory.mktemp("python")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    (site,) = folder.glob("lib/python3.*/site-packages")
    # A path in a .pth file is searched, but the .pth files in it (an editable rpa) are not read.
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "this.pth").write_text("\n".join(here))
    return folder / "bin" / "python"


def first_cell(published, python, folder, **variables):
    """Run the first cell of a published lesson in an empty folder; the finished process."""
    book = json.loads(next((published / "notebooks").glob("01_*")).read_text("utf-8"))
    cell = "".join(book["cells"][1]["source"])
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RPA_SOURCE")}
    environment |= {"JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run(
        [str(python), "-c", cell], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_first_cell_installs_the_tag_from_the_address(published, empty_python, tmp_path):
    redirect = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{published.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
    }
    done = first_cell(published, empty_python, tmp_path, **redirect)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Ready:"), done.stdout


def test_without_a_network_it_says_so_in_a_sentence(published, empty_python, tmp_path):
    nowhere = {"RPA_SOURCE": f"git+file://{tmp_path}/nothing", "PYTHONNOUSERSITE": "1"}
    run(empty_python, "-m", "pip", "uninstall", "--yes", "ragged-paged-attention", cwd=tmp_path)
    done = first_cell(published, empty_python, tmp_path, **nowhere)
    assert done.returncode and "On Kaggle: Settings, Internet on." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(REPOSITORY is not None, reason="published: the first cell has an address")
def test_before_it_no_notebook_installs_from_an_address_that_the_reader_did_not_give(
    empty_python, tmp_path
):
    run(empty_python, "-m", "pip", "uninstall", "--yes", "ragged-paged-attention", cwd=tmp_path)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RPA_SOURCE")}
    command = [str(empty_python), "-c", SETUP]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode and "Set RPA_SOURCE first" in done.stderr
    assert "Traceback" not in done.stderr and "http" not in SETUP.replace("https://...", "")


def test_another_project_called_rpa_is_not_taken_for_this_one(empty_python, tmp_path):
    """pip's own `rpa` is a module, rpa.py; the cell asks for this one all the same."""
    (tmp_path / "rpa.py").write_text("raise RuntimeError('robotic process automation')")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RPA_SOURCE")}
    command = [str(empty_python), "-c", SETUP]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "Set RPA_SOURCE first" in done.stderr and "robotic" not in done.stderr
