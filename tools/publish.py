"""Set the address that this project is published at, everywhere: notebooks, badges, README.

make publish REPOSITORY=https://github.com/OWNER/NAME REVISION=v0.1.0

Until it has been run, no notebook installs from any address but the reader's own (`RPA_SOURCE`) and
no badge links anywhere. Afterwards the first cell of every notebook installs from the address, at
that tag or commit, and the badges open the same revision. Nothing is executed again.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")
REVISION = re.compile(r"[\w./-]+")


def write_address(repository: str, revision: str) -> None:
    """Write both into `rpa/_repository.py`."""
    file = ROOT / "rpa" / "_repository.py"
    text = file.read_text("utf-8")
    for name, value in {"REPOSITORY": repository, "REVISION": revision}.items():
        text, count = re.subn(rf"(?m)^{name} = .*$", f'{name} = "{value}"', text)
        assert count == 1, f"{file} has {count} lines that set {name}"
    file.write_text(text, "utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Publish; the exit code is 2 where the address or the revision cannot be one."""
    parser = argparse.ArgumentParser(prog="python tools/publish.py")
    parser.add_argument("--repository", required=True, help="https://github.com/OWNER/NAME")
    parser.add_argument("--revision", required=True, help="the tag or commit that readers get")
    options = parser.parse_args(arguments)
    repository = options.repository.removesuffix("/").removesuffix(".git")
    if not ADDRESS.fullmatch(repository):
        parser.error(
            f"--repository is {options.repository!r}; expected https://github.com/OWNER/NAME, "
            "because Colab and Kaggle open notebooks from GitHub only."
        )
    if not REVISION.fullmatch(options.revision):
        parser.error(f"--revision is {options.revision!r}; expected a tag or a commit, as v0.1.0.")
    write_address(repository, options.revision)
    subprocess.run([sys.executable, "-m", "course.build"], cwd=ROOT, check=True)
    print(
        f"Published as {repository} at {options.revision}. Now commit, `git tag {options.revision}`"
        " and push both: readers install the tag."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
