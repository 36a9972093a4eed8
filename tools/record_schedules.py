"""Record the schedules that chapters 9 and 10 read, for machines whose compiler does not show any.

python tools/record_schedules.py               # needs libtpu and an hour if nothing is cached
python tools/record_schedules.py inner_loop    # only one section of rpa/data/schedules.json
"""

import argparse

import jax
from tqdm import tqdm

from rpa.check.chapters import assembly
from rpa.check.yours import LINE
from rpa.cli.schedule import to_json as measured_json
from rpa.lab import compile_versions, programs
from rpa.lab.schedule import inner_loop
from rpa.lab.schedule.cases import measure
from rpa.lab.schedule.recorded import compile_step, occupancy_of, recorded_step, write
from rpa.lab.schedule.schedule import schedule_for

CHIPS = ("v5e", "v6e", "tpu7x")
PICTURED = ("odd stride", "two sequences together", "a quarter of the keys swapped")
STRIDES = (1, 2, 4, 6, 7, 8, 9, 10, 12, 16, 17, 24, 32)
MOST_AHEAD = 7
PAGE_SIZE = 128
CHUNK = (512, 4096)
TILES = {"block_q": 128, "block_kv": 512}


def inner_loops():
    """Every step of the inner loop on every chip, and the units of two of them."""
    return {
        chip: {
            step: compile_step(chip, step, with_busy=chip == "v5e" and step in PICTURED)
            for step in tqdm(inner_loop.STEPS, desc=chip)
        }
        for chip in CHIPS
    }


def orders():
    """Bundles of the inner loop on a v5e, by how far Q K^T runs ahead of P V."""
    shapes = inner_loop.shapes("odd stride")
    bundles = [recorded_step("v5e", "odd stride").bundles]
    for num_ahead in tqdm(range(1, MOST_AHEAD + 1), desc="orders"):
        kwargs = {"num_ahead": num_ahead}
        schedule = schedule_for("v5e", inner_loop.attend_ahead, *shapes, kwargs=kwargs)
        bundles.append(schedule.num_bundles)
    return bundles


def assembled():
    """Bundles a tile of the assembly exercises' solutions, and of the rungs next to them."""
    return {number: assembly.record(number) for number in tqdm(list(LINE)[1:], desc="assembly")}


def turned():
    """Bundles of the last step of the inner loop, by the quarters of the keys that are turned."""
    shapes, found = inner_loop.shapes("a quarter of the keys swapped"), {}
    for chip in tqdm(CHIPS, desc="turned"):
        for quarters in range(4):
            kwargs = {"quarters": quarters}
            schedule = schedule_for(chip, inner_loop.attend_swapped, *shapes, kwargs=kwargs)
            found.setdefault(chip, []).append(schedule.num_bundles)
    return found


def even_stride_at_the_end():
    """Bundles of the last step of the inner loop, if a token takes an even number of rows."""
    step, found = "two sequences together", {}
    for chip in tqdm(CHIPS, desc="even"):
        q, kv = inner_loop.shapes(step)
        kv = jax.ShapeDtypeStruct((*kv.shape[:2], inner_loop.NUM_KV_HEADS, *kv.shape[3:]), kv.dtype)
        schedule = schedule_for(chip, inner_loop.attend, q, kv, kwargs={"step": step})
        found[chip] = schedule.num_bundles
    return found


def strides():
    """Loads that fill a register with every n-th row, and bundles of 512 rows."""
    found = {}
    for chip in CHIPS:
        for stride in tqdm(STRIDES, desc=f"{chip} strides"):
            matrix = jax.ShapeDtypeStruct((512 * stride, 128), "float32")
            schedule = schedule_for(chip, inner_loop.every_row, matrix, kwargs={"stride": stride})
            loads = schedule.slots(schedule.once(schedule.loops))["load"]
            found.setdefault(chip, {})[str(stride)] = [loads // 64, schedule.num_bundles]
    return found


def kernels():
    """What a chunk costs in rung 8 on every chip, and the units of a mixed tile beside rung 4's."""
    found = {}
    for chip in CHIPS:
        for case in ("decode", "mixed"):
            measured = measure("rpa", case, chip)
            numbers = measured_json(measured)
            span = occupancy_of(measured.schedule, measured.busiest_span, with_busy=chip == "v5e")
            found.setdefault(chip, {})[case] = numbers | {"units": span}
    return found


def tiled():
    """The units of rung 4 in one block of keys, one KV head, on a v5e."""
    schedule, span = _tiled_block("v5e", *CHUNK)
    return occupancy_of(schedule, span)


def _tiled_block(chip, q_len, kv_len):
    """The schedule of rung 4 and the span of it that computes a block of keys."""
    sizes = programs.Workload(page_size=PAGE_SIZE, num_seqs=1, q_len=q_len, kv_len=kv_len)
    program = programs.PROGRAMS["tiled"](sizes)
    kwargs = program.kwargs | TILES
    schedule = schedule_for(chip, program.function, *program.args, kwargs=kwargs)
    *_, innermost = (s for _, s in schedule.loops.walk() if schedule.describe(s)["slots"]["MATMUL"])
    return schedule, innermost


def versions():
    """What wrote the schedules."""
    return {name: compile_versions()[name] for name in ("jax", "libtpu")}


SECTIONS = {
    "inner_loop": inner_loops,
    "orders": orders,
    "turned": turned,
    "strides": strides,
    "even_stride_at_the_end": even_stride_at_the_end,
    "kernels": kernels,
    "tiled": tiled,
    "assembly": assembled,
    "versions": versions,
}


def main() -> None:
    """Make the sections that were asked for, and write each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="section")
    jax.config.update("jax_platforms", "cpu")
    for section in parser.parse_args().sections or SECTIONS:
        write(section, SECTIONS[section]())
        print(f"{section}: written")


if __name__ == "__main__":
    main()
