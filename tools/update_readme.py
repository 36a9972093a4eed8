"""Write into README.md what commands produce: the chapters, the demo, the tables of the lab.

Run by `make readme`, which takes minutes the first time (the lab compiles for three chips, with the
peers installed); `--check` compares the chapter table only (its contents are known without running
anything) and exits 1 if it is stale.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rpa._repository import BRANCH, REPOSITORY  # noqa: E402

README = ROOT / "README.md"
PICTURES = ROOT / "docs" / "pictures"

TABLES = ("decode", "mixed", "whole batches")
"""Tables of the lab between `<!-- schedule -->` and its end; docs/bench.md has all of them."""


def chapter_table() -> str:
    """One line a chapter: lesson, exercises, solutions, and badges that open them."""
    lines = [
        "| chapter | lesson | exercises | solutions |",
        "|---|---|---|---|",
    ]
    for source in sorted((ROOT / "course").glob("ch*_lesson.py")):
        number, name = re.match(r"ch(\d\d)_(.+)_lesson", source.stem).groups()
        title = re.search(r"^# # Chapter \d+: (.+)$", source.read_text("utf-8"), re.M).group(1)
        notebook = f"{number}_{name}.ipynb"
        cells = [f"{int(number)} {title}"]
        for folder in ("notebooks", "exercises", "solutions"):
            exists = (ROOT / folder / notebook).exists()
            cells.append(links(f"{folder}/{notebook}") if exists else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def links(path: str) -> str:
    """A notebook on GitHub, in Colab and on Kaggle."""
    in_repository = REPOSITORY.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{in_repository}/blob/{BRANCH}/{path}"
    kaggle = f"https://kaggle.com/kernels/welcome?src={REPOSITORY}/blob/{BRANCH}/{path}"
    return (
        f"[read]({path}) "
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle})"
    )


def demo_output() -> str:
    """What the demo prints, and its pictures in docs/pictures."""
    command = [sys.executable, "-m", "rpa", "demo", "--out", str(PICTURES)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    kept = [line for line in printed.splitlines() if not line.startswith(("picture:", "took"))]
    return "```\n" + "\n".join(kept).strip() + "\n```"


def lab_tables(*names) -> str:
    """Tables of the lab as `python -m rpa lab all` prints them, with their titles.

    Raises:
        SystemExit: without the peers, whose columns would be empty.
    """
    # Not at the top: `--check` needs neither jax nor the lab.
    import jax

    from rpa.cli.all import as_text, measured, scope_of

    jax.config.update("jax_platforms", "cpu")  # everything runs on the host
    scope, absent = scope_of()
    if absent:
        raise SystemExit("\n".join(absent))
    texts = [as_text(name, rows) for name, rows, _ in measured(names, scope)]
    return "\n".join(texts).replace("\n## ", "\n#### ").strip()


def replace_part(text: str, name: str, part: str) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- end -->`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no part between <!-- {name} --> and <!-- end -->.")
    return pattern.sub(lambda match: match[1] + part + "\n" + match[2], text)


def ladder() -> str:
    """The recorded comparison of chapter 12: its picture, in docs/pictures, and its table."""
    from rpa.figures import comparison as pictures
    from rpa.lab.bench import comparison

    found = comparison.recorded()
    picture = pictures.ladder(found)
    path = picture.save(PICTURES / "ladder.png")
    return f"![{picture.text}]({path.relative_to(ROOT)})\n\n```\n{comparison.table(found)}\n```"


PARTS = {
    "chapters": chapter_table,
    "demo": demo_output,
    "ladder": ladder,
    "schedule": lambda: lab_tables(*TABLES),
    "published": lambda: lab_tables("published"),
}
"""What stands between `<!-- name -->` and `<!-- end -->` in README.md, and what writes it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"only these of {', '.join(PARTS)}")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {list(PARTS)}")
    text = README.read_text("utf-8")
    if args.check:
        stale = replace_part(text, "chapters", chapter_table()) != text
        if stale:
            print("The chapter table of README.md is stale: run `make readme`.")
        return int(stale)
    for name in args.parts or PARTS:
        text = replace_part(text, name, PARTS[name]())
        README.write_text(text, "utf-8")  # part by part: the lab's tables may take an hour
    return 0


if __name__ == "__main__":
    sys.exit(main())
