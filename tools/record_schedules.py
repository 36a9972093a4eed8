"""Record the schedules that chapter 8 reads, for machines whose compiler does not show any.

python tools/record_schedules.py               # needs libtpu and an hour if nothing is cached
python tools/record_schedules.py inner_loop    # only one section of rpa/data/schedules.json
"""

import argparse

import jax
import numpy as np
from tqdm import tqdm

from rpa import chips
from rpa.lab import compile_versions, inner_loop, programs
from rpa.lab.batches import make_batch
from rpa.lab.commands.predict import to_json as prediction_json
from rpa.lab.commands.schedule import to_json as measured_json
from rpa.lab.predict import predict_batch, workload_of
from rpa.lab.recorded import compile_step, occupancy_of, recorded_step, write
from rpa.lab.schedule import schedule_for
from rpa.lab.schedule_cases import measure
from rpa.lab.schedule_clock import cycles_with_waits
from rpa.lab.traffic import Layer, count
from rpa.ladder import kv_lens_of, q_lens_of
from rpa.tiled import block_map

CHIPS = ("v5e", "v6e", "tpu7x")
PICTURED = ("odd stride", "two sequences a turn")
STRIDES = (1, 2, 4, 6, 7, 8, 9, 10, 12, 16, 17, 24, 32)
MOST_AHEAD = 8
PAGE_SIZE = 128
DECODE_LENGTHS = (4096, 1024, 700, 300, 1500, 2100, 180, 900)
CHUNK = (512, 4096)
TILES = {"block_q": 128, "block_kv": 512}
PREDICTED = {
    "128 of 4,096": [(1, 4096)] * 128,
    "256 of 512": [(1, 512)] * 256,
    "a chunk of 2,048 of 4,096": [(2048, 4096)],
}


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


def even_stride_at_the_end():
    """Bundles of the last step of the inner loop, if a token takes an even number of rows."""
    step, found = "two sequences a turn", {}
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
    """What a chunk costs in rung 7 on every chip, and the units of a mixed tile beside rung 4's."""
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


def predictions():
    """Whole batches on every chip: predicted, with every copy at peak bandwidth."""
    return {
        chip: {
            name: prediction_json(
                predict_batch("rpa", chip, make_batch(lengths, PAGE_SIZE), page_size=PAGE_SIZE)
            )
            for name, lengths in tqdm(PREDICTED.items(), desc=f"{chip} batches")
        }
        for chip in CHIPS
    }


def rungs():
    """Every rung that can take a batch of decodes, and one chunk, on a TPU7x."""
    return {"chip": "tpu7x", "decode": _decode_rungs("tpu7x"), "chunk": _chunk_rungs("tpu7x")}


def _decode_rungs(chip):
    batch = make_batch([(1, kv_len) for kv_len in DECODE_LENGTHS], PAGE_SIZE)
    points = _plain_rungs(chip, batch)
    sizes = workload_of(batch, page_size=PAGE_SIZE)
    metadata = jax.tree.map(np.asarray, batch)
    for name, values in {
        "streamed": (metadata.kv_lens, metadata.page_indices),
        "fused": (metadata,),
    }.items():
        program = programs.PROGRAMS[name](sizes)
        schedule = schedule_for(chip, program.function, *program.args, kwargs=program.kwargs)
        arguments = (*program.args[: len(program.args) - len(values)], *values)
        run = schedule.execute(*arguments, keep_events=True)
        points[name] = _point(
            chip, batch, count(name, batch, _layer()).num_bytes, _clocked(chip, run)
        )
    return points | {"kernel": _predicted(chip, batch)}


def _chunk_rungs(chip):
    batch = make_batch([CHUNK], PAGE_SIZE)
    return _plain_rungs(chip, batch) | {
        "tiled": _tiled(chip, batch),
        "kernel": _predicted(chip, batch),
    }


def _plain_rungs(chip, batch):
    """Rungs 1 to 3 are plain JAX, without a schedule to read: as if XLA moved bytes at the peak."""
    points = {}
    for name in ("dense", "paging", "ragged"):
        num_bytes = count(name, batch, _layer()).num_bytes
        cycles = num_bytes / _bytes_per_cycle(chip)
        points[name] = _point(chip, batch, num_bytes, cycles)
    return points


def _tiled(chip, batch):
    """Rung 4 gathers the pages, then computes block by block; at best both overlap."""
    q_len, kv_len = CHUNK
    # Its scalar instructions depend on values of the automatic pipeline: count blocks instead.
    _, innermost = _tiled_block(chip, q_len, kv_len)
    num_blocks = (block_map(q_len, kv_len, **TILES) != ".").sum() * _layer().num_kv_heads
    num_bytes = count("tiled", batch, _layer()).num_bytes
    cycles = max(innermost.num_bundles * num_blocks, num_bytes / _bytes_per_cycle(chip))
    return _point(chip, batch, num_bytes, cycles)


def _tiled_block(chip, q_len, kv_len):
    """The schedule of rung 4 and the span of it that computes a block of keys."""
    sizes = programs.Workload(page_size=PAGE_SIZE, num_seqs=1, q_len=q_len, kv_len=kv_len)
    program = programs.PROGRAMS["tiled"](sizes)
    kwargs = program.kwargs | TILES
    schedule = schedule_for(chip, program.function, *program.args, kwargs=kwargs)
    *_, innermost = (s for _, s in schedule.loops.walk() if schedule.describe(s)["slots"]["MATMUL"])
    return schedule, innermost


def _predicted(chip, batch):
    found = predict_batch("rpa", chip, batch, page_size=PAGE_SIZE)
    return {"flops": found.flops, "hbm_bytes": found.hbm_bytes, "time_us": found.time_us}


def _point(chip, batch, num_bytes, cycles):
    cost = chips.attention_cost(q_lens_of(batch), kv_lens_of(batch), *programs.MODELS["llama-3-8b"])
    time_us = cycles / chips.chip(chip).clock_hz * 1e6
    return {"flops": cost.flops, "hbm_bytes": int(num_bytes), "time_us": time_us}


def _clocked(chip, run):
    return cycles_with_waits(run, _bytes_per_cycle(chip))


def _bytes_per_cycle(chip):
    known = chips.chip(chip)
    return known.hbm_bytes_per_s / known.clock_hz


def _layer():
    return Layer.of("llama-3-8b", page_size=PAGE_SIZE)


def versions():
    """What wrote the schedules."""
    return {name: compile_versions()[name] for name in ("jax", "libtpu")}


SECTIONS = {
    "inner_loop": inner_loops,
    "orders": orders,
    "strides": strides,
    "even_stride_at_the_end": even_stride_at_the_end,
    "kernels": kernels,
    "tiled": tiled,
    "predictions": predictions,
    "rungs": rungs,
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
