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
        old, new: what stands in the file, and what stands there without the optimisation.
        file: in rpa/kernel.
    """

    case: str
    old: str = ""
    new: str = ""
    file: str = "tricks.py"


MASKS = ("masks_always=widens_float8 or", "masks_always=True or")

WITHOUT = {
    "nothing, decode": Without("decode"),
    "nothing, mixed": Without("mixed"),
    "nothing, batch": Without("batch"),
    "odd stride": Without(
        "decode", "plan.blocks.bkv, words | 1", "plan.blocks.bkv, words", "refs.py"
    ),
    "order of products, decode": Without("decode", "_QK_AHEAD = 7, 2", "_QK_AHEAD = 0, 2"),
    "order of products, mixed": Without("mixed", "_QK_AHEAD = 7, 2", "_QK_AHEAD = 7, 1"),
    "head groups": Without("decode", "MAX_GROUP_LANES = 16, 512", "MAX_GROUP_LANES = 16, 128"),
    "two sequences per iteration": Without(
        "decode", "(4 if is_window_short or is_one_group else 2) if is_decode else 1", "1"
    ),
    "swapped operands": Without("decode", "MIN_LANES_TO_SWAP = 384", "MIN_LANES_TO_SWAP = 9999"),
    "masks only where needed, decode": Without("decode", *MASKS),
    "masks only where needed, mixed": Without("mixed", *MASKS),
    "idle half of the MXU": Without(
        "mixed", "uses_idle_mxu=2 * group_lanes <= plan.mxu_size", "uses_idle_mxu=False"
    ),
    "copies further ahead": Without(
        "batch",
        "ITERATIONS_AHEAD, ITERATIONS_AHEAD = 3, 2",
        "ITERATIONS_AHEAD, ITERATIONS_AHEAD = 1, 2",
    ),
}
"""What is taken away, one at a time."""


def measure(name, chip) -> float:
    """Bundles, or microseconds, of the kernel without one optimisation."""
    case, old, new, file = WITHOUT[name]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "rpa", Path(folder) / "rpa")
        if old:
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
