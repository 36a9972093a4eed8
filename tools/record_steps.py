"""Record what each optimisation of rung 8 is worth: take one away, compile, execute, compare.

python tools/record_steps.py               # needs libtpu, and about half an hour
python tools/record_steps.py "odd stride"  # only these, into the section "without" of
                                           # rpa/data/schedules.json

Each optimisation is one line of `rpa/kernel/`. The line is changed in a copy of the package, whose
kernel the lab then compiles and executes like any other.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rpa.lab.predict.calibration import FITTED  # noqa: E402
from rpa.lab.schedule.recorded import recorded, write  # noqa: E402

CHIPS = ("v5e", "v6e", "tpu7x")
SHORT_DECODES = ["--batch", "256x1/512", "--page-size", "128", "--model", "llama-3-8b"]


class Without(NamedTuple):
    """One optimisation, and how the kernel is built without it.

    Attributes:
        case: what is measured, "decode" (bundles of a sequence of 1,024 tokens), "mixed" (bundles
            of 128 query tokens x 512 keys x 8 heads) or "batch" (microseconds of a batch).
        file: in rpa/kernel; "" changes nothing.
        old, new: what stands there, and what stands there without the optimisation.
    """

    case: str
    file: str = ""
    old: str = ""
    new: str = ""


MASKS = ("plan.py", "return self.widens_float8 or has_one_dot", "return True or has_one_dot")

WITHOUT = {
    "nothing, decode": Without("decode"),
    "nothing, mixed": Without("mixed"),
    "nothing, batch": Without("batch"),
    "odd stride": Without("decode", "plan.py", "problem.kv_words | 1", "problem.kv_words"),
    "order of products, decode": Without(
        "decode", "plan.py", "CHAINS_AHEAD = 7", "CHAINS_AHEAD = 0"
    ),
    "order of products, mixed": Without("mixed", "loop.py", "DOTS_AHEAD = 2", "DOTS_AHEAD = 1"),
    "head groups": Without(
        "decode", "plan.py", "LANES_PER_DOT = 16, 512", "LANES_PER_DOT = 16, 128"
    ),
    "two sequences per iteration": Without(
        "decode", "plan.py", "return 4 if is_short or self.num_dots == 1 else 2", "return 1"
    ),
    "swapped operands": Without("decode", "plan.py", "_TO_TURN = 384", "_TO_TURN = 9999"),
    "masks only where needed, decode": Without("decode", *MASKS),
    "masks only where needed, mixed": Without("mixed", *MASKS),
    "idle half of the MXU": Without(
        "mixed", "plan.py", "idle = 2 * self.tile_lanes <= self.mxu_size", "idle = False"
    ),
    "copies further ahead": Without(
        "batch", "blocks.py", "_TURNS_AHEAD, TURNS_AHEAD = 3, 2", "_TURNS_AHEAD, TURNS_AHEAD = 1, 2"
    ),
}
"""What is taken away, one at a time."""


def measure(name, chip) -> float:
    """Bundles, or microseconds, of the kernel without one optimisation."""
    case, file, old, new = WITHOUT[name]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "rpa", Path(folder) / "rpa")
        if file:
            path = Path(folder) / "rpa" / "kernel" / file
            text = path.read_text("utf-8")
            if text.count(old) != 1:
                raise SystemExit(f"{name}: {file} has {old!r} {text.count(old)} times, not once")
            path.write_text(text.replace(old, new), "utf-8")
        if case == "batch":
            options = ["predict", *SHORT_DECODES]
            options += ["--hbm-efficiency", str(FITTED.hbm_efficiency)]
            options += ["--latency-us", str(FITTED.latency_us)]
        else:
            options = ["schedule", "--case", case]
        command = [sys.executable, "-m", "rpa", "lab", *options, "--chip", chip, "--json"]
        # The lab keeps what it compiled: this kernel exists once only.
        environment = os.environ | {"PYTHONPATH": folder, "XDG_CACHE_HOME": folder}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} on {chip}: {done.stderr}")
    found = json.loads(done.stdout)
    return found[{"decode": "step_1024", "mixed": "executed_per_chunk", "batch": "time_us"}[case]]


def main() -> None:
    """Measure what was asked for, and write each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*WITHOUT, []], metavar="name")
    for name in tqdm(parser.parse_args().names or WITHOUT):
        try:
            kept = recorded("without")
        except KeyError:  # the first
            kept = {}
        write("without", kept | {name: {chip: measure(name, chip) for chip in CHIPS}})


if __name__ == "__main__":
    main()
