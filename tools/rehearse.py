"""Rehearse the course as a reader would meet it on Colab, on Kaggle and on a laptop.

python tools/rehearse.py                             # everything: about an hour on two cores
python tools/rehearse.py --platform colab 05_streamed
python tools/rehearse.py --address https://github.com/OWNER/NAME --folder .rehearsal --reuse

For each platform a new environment with what is preinstalled there and nothing else. For each
lesson and solution an empty folder with the notebook alone, in an environment from which `rpa` has
been removed again: the notebook's own first cell has to bring it. That cell installs from the
address in `RPA_SOURCE`, which is set to `--address`, by default the commit at the head of this
checkout. So what is rehearsed is what is committed. None of this needs a TPU, and none is used.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import NoSuchKernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from rpa._repository import DISTRIBUTION

ROOT = Path(__file__).parents[1]
CELL_LIMIT_S = 300
KERNEL = "rehearsal"
KEPT = ("jax", "jaxlib", "libtpu", "numpy")
"""Packages whose version no notebook may change: on Colab that costs the reader a restart."""


@dataclass(frozen=True)
class Platform:
    """What a reader finds there before the first cell runs."""

    python: str
    packages: tuple[str, ...]


PLATFORMS = {
    # The TPU runtime of August 2026.
    "colab": Platform(
        "3.13",
        (
            *("jax==0.7.2", "jaxlib==0.7.2", "libtpu==0.0.21.1", "numpy==2.1.3"),
            *("matplotlib", "tqdm", "ipykernel"),
        ),
    ),
    # Kaggle does not say which jax its image has: one between the oldest and the newest.
    "kaggle": Platform("3.12", ("jax[tpu]==0.8.3", "matplotlib", "tqdm", "ipykernel")),
    "laptop": Platform("3.11", ("jupyterlab",)),
}


class Unavailable(RuntimeError):
    """A platform cannot be rehearsed on this machine; the text says why."""


def find_python(version: str, given: dict[str, str]) -> str:
    """A Python of this version: the one that was given, or one that is on the machine."""
    finder = ["sh", str(ROOT / "tools" / "find_python.sh"), version]
    found = given.get(version) or subprocess.check_output(finder, text=True).strip()
    if not found:
        raise Unavailable(f"no Python {version} here; name one: --python {version}=/path/to/python")
    return found


def make_environment(platform: Platform, folder: Path, given: dict[str, str]) -> Path:
    """A new environment with what the platform has; returns its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([find_python(platform.python, given), "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip(python, "install", *platform.packages)
    # A kernel of a name of its own: "python3" would be that of whoever rehearses.
    subprocess.run(
        [python, "-m", "ipykernel", "install", "--prefix", folder, "--name", KERNEL],
        check=True,
        capture_output=True,
    )
    return python


def pip(python: Path, *arguments: str) -> None:
    """Run pip of an environment; what it says is shown only if it fails."""
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise Unavailable(f"pip {' '.join(arguments)} failed: {ran.stderr.strip()[-300:]}")


def versions(environment: Path) -> dict[str, str]:
    """Version of each package in KEPT that an environment has."""
    places = [str(path) for path in environment.glob("lib/python3.*/site-packages")]
    found = importlib.metadata.distributions(path=places)
    return {d.metadata["Name"]: d.version for d in found if d.metadata["Name"] in KEPT}


def surroundings(environment: Path, address: str) -> dict[str, str]:
    """Environment variables of a rehearsal."""
    variables = {
        **os.environ,
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(environment / "cache"),  # a reader's first visit: nothing compiled
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "RPA_SOURCE": f"git+{address}",
    }
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "RPA_PROGRESS"):
        variables.pop(name, None)
    if not (any(Path("/dev").glob("accel*")) or any(Path("/dev").glob("vfio/*"))):
        variables["JAX_PLATFORMS"] = "cpu"  # otherwise libtpu complains that there is none
    return variables


def run(notebook: Path, folder: Path, variables: dict[str, str]) -> str:
    """Run a copy of a notebook alone in an empty folder; "ok", or the first error in a line."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(notebook, folder)
    client = NotebookClient(
        nbformat.read(folder / notebook.name, as_version=4),
        timeout=CELL_LIMIT_S,
        kernel_name=KERNEL,
        extra_arguments=["--log-level=40"],  # errors only
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute(env=variables)
    except CellExecutionError as error:
        return f"{error.ename}: {(error.evalue.strip().splitlines() or [''])[0]}"
    except (CellTimeoutError, DeadKernelError, NoSuchKernel) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    finally:
        nbformat.write(client.nb, folder / notebook.name)  # with its outputs, to look at
    return "ok"


def rehearse(name: str, notebooks: list[Path], options) -> list[tuple[str, str, float, str]]:
    """Rows (platform, notebook, seconds, result) of one platform, printed as they come."""
    folder = options.folder.resolve() / name
    environment, rows = folder / "environment", []

    def row(title, seconds, result):
        rows.append((name, title, seconds, result))
        print(f"{name:8} {title:24} {seconds:6.0f}  {result}", flush=True)

    start = time.monotonic()
    try:
        python = environment / "bin" / "python"
        if not (options.reuse and python.exists()):
            python = make_environment(PLATFORMS[name], environment, options.python)
    except Unavailable as error:
        row("(environment)", time.monotonic() - start, f"skipped: {error}")
        return rows
    before = versions(environment)
    row("(environment)", time.monotonic() - start, json.dumps(before))
    os.environ["JUPYTER_PATH"] = str(environment / "share" / "jupyter")
    variables = surroundings(environment, options.address)
    for notebook in notebooks:
        pip(python, "uninstall", "--yes", DISTRIBUTION)
        start = time.monotonic()
        title = f"{notebook.parent.name}/{notebook.stem}"
        result = run(notebook, folder / title, variables)
        changed = {k: v for k, v in before.items() if versions(environment).get(k) != v}
        if changed:
            result = f"its first cell replaced {changed} by {versions(environment)}; {result}"
        row(title, time.monotonic() - start, result)
    return rows


def chosen_notebooks(names: list[str]) -> list[Path]:
    """Lessons and solutions in the order in which a reader meets them."""
    found = [path for kind in ("notebooks", "solutions") for path in (ROOT / kind).glob("*.ipynb")]
    found = [path for path in found if not names or any(name in path.stem for name in names)]
    return sorted(found, key=lambda path: (path.stem, path.parent.name))


def main(arguments: list[str] | None = None) -> int:
    """Rehearse; the exit code is 1 where a notebook did not run to its end."""
    parser = argparse.ArgumentParser(prog="python tools/rehearse.py")
    parser.add_argument("notebooks", nargs="*", help="parts of names, 05_streamed; none means all")
    parser.add_argument("--platform", action="append", choices=PLATFORMS, help="default: each")
    parser.add_argument(
        "--address", default=ROOT.as_uri(), help="what git clones for the first cell"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".rehearsal", help="everything made")
    parser.add_argument("--reuse", action="store_true", help="keep environments of an earlier run")
    parser.add_argument(
        "--python", action="append", default=[], metavar="3.13=PATH", help="where a Python is"
    )
    options = parser.parse_args(arguments)
    options.python = dict(text.split("=", 1) for text in options.python)
    print(f"{'platform':8} {'notebook':24} {'s':>6}  result", flush=True)
    notebooks = chosen_notebooks(options.notebooks)
    rows = [
        row for name in options.platform or PLATFORMS for row in rehearse(name, notebooks, options)
    ]
    ran = [result for _, title, _, result in rows if title != "(environment)"]
    print(f"{ran.count('ok')} of {len(ran)} ran to the end, installed from {options.address}")
    return 0 if ran.count("ok") == len(ran) else 1


if __name__ == "__main__":
    sys.exit(main())
