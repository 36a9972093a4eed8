"""Write into README.md what the repository knows: the picture, the ladder, the numbers.

Run by `make readme`; everything comes from records that other commands wrote (`python -m rpa lab
compare --record`, `make bench`), so it takes seconds. `--check` writes nothing and exits 1 if a
part is stale.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

README = ROOT / "README.md"
PICTURES = ROOT / "docs" / "pictures"


def ladder_table() -> str:
    """One line per rung, and one for the learner's kernel: file, lines, bytes, time, lesson."""
    from rpa.lab.bench import comparison
    from rpa.ladder import LADDER

    found = comparison.recorded()
    rows = {row["name"]: row for row in found["rows"]}
    chips = ("v5e", "tpu7x")
    lines = [
        "| rung | file | code lines | what changes | bytes / least | v5e, us | TPU7x, us | lesson "
        "|",
        "|---:|---|---:|---|---:|---:|---:|---|",
    ]
    shown = [(rung.number, rung.name, rung.changes) for rung in LADDER]
    shown.append((YOURS[0], "yours", YOURS[1]))
    for number, name, changes in shown:
        row, where = rows[name], comparison.RACERS[name].code
        lesson_number = 7 if name == "yours" else number
        (lesson,) = (ROOT / "notebooks").glob(f"{lesson_number:02d}_*.ipynb")
        times = [f"{row['time_us'][c]:,.0f}" if c in row["time_us"] else "-" for c in chips]
        cells = (
            *(number, f"[rpa/{where}](rpa/{where})", f"{comparison.lines_of_code(where):,}"),
            *(changes, f"{row['num_bytes'] / found['least_bytes']:.2f}", *times),
            f"[{lesson_number}](notebooks/{lesson.name})",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


YOURS = ("yours", "what you write in chapters 4 to 7, in one file that grows: any mix")
"""What the ladder calls the learner's kernel; its file here is that of the reference solutions."""


def replace_part(text: str, name: str, part: str) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- end -->`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no part between <!-- {name} --> and <!-- end -->.")
    return pattern.sub(lambda match: match[1] + part + "\n" + match[2], text)


def picture() -> str:
    """The headline picture with its alternative text; `save_pictures` draws it."""
    return f"![{_ladder().text}](docs/pictures/ladder.png)"


def save_pictures() -> None:
    """Write the pictures of README.md and of docs/overview.md into docs/pictures."""
    from rpa.figures import overview

    _ladder().save(PICTURES / "ladder.png")
    overview.example().save(PICTURES / "overview.png")


def _ladder():
    from rpa.figures import comparison as pictures
    from rpa.lab.bench import comparison
    from rpa.ladder import LADDER

    found, rungs = comparison.recorded(), [*(rung.name for rung in LADDER), "yours"]
    # Without the peers: next to them belongs at which blocks they are, which `lab gain` says.
    return pictures.ladder(found | {"rows": [r for r in found["rows"] if r["name"] in rungs]})


def numbers() -> str:
    """Predicted time of a decode over the best peer's, and whether a chip would bear it out."""
    from rpa.lab.bench import gain

    found = gain.gains(gain.recorded())
    chips = list(dict.fromkeys(row["chip"] for row in found))
    lines = [f"| decode of | {' | '.join(chips)} |", "|---" + "|---:" * len(chips) + "|"]
    for case in dict.fromkeys(row["case"] for row in found):
        ratios = [f"{row['of best peer']:.2f}" for row in found if row["case"] == case]
        lines.append(f"| {case} | {' | '.join(ratios)} |")
    sure = [row for row in found if row["established"] != "no"]
    verdict = f"Established, because the ranges do not overlap: {len(sure)} of {len(found)}."
    return "\n".join([*lines, "", verdict])


PARTS = {"picture": picture, "ladder": ladder_table, "numbers": numbers}
"""What stands between `<!-- name -->` and `<!-- end -->` in README.md, and what writes it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"only these of {', '.join(PARTS)}")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {list(PARTS)}")
    text = README.read_text("utf-8")
    stale = []
    for name in args.parts or PARTS:
        part = PARTS[name]()
        if replace_part(text, name, part) != text:
            stale.append(name)
            text = replace_part(text, name, part)
    if args.check and stale:
        print(f"README.md is stale in {', '.join(stale)}: run `make readme`.")
    if not args.check:
        README.write_text(text, "utf-8")
        save_pictures()
    return int(bool(args.check and stale))


if __name__ == "__main__":
    sys.exit(main())
