"""`rpa.lab.schedule`: calibrated on kernels whose schedule is known beforehand."""

import json
import platform
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from rpa import chips, lab
from rpa.__main__ import main
from rpa.figures import schedule as pictures
from rpa.lab import peers, programs
from rpa.lab.predict import waits
from rpa.lab.schedule import (
    NoSchedule,
    cases,
    dumps,
    execution,
    loop_tree,
    machine,
    pallas_calls,
    schedule_for,
    worker,
)
from tests import schedule_programs

HAS_LIBTPU = lab.compile_versions()["libtpu"] is not None
needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason=f"libtpu is not installed ({platform.system()} {platform.machine()})"
)
COMPILED_CHIPS = ("v5e", "v6e", "tpu7x")
DATA = Path(__file__).parent / "data" / "schedule"
LENGTHS, TABLE = np.array([4, 7, 0, 10], np.int32), np.arange(32, dtype=np.int32).reshape(4, 8)
TILES = jax.ShapeDtypeStruct((40, 8, 128), np.float32)


@pytest.fixture(scope="module")
def listing():
    """The dump of `schedule_programs.sum_tiles` for a v5e, parsed."""
    return dumps.parse(
        (DATA / "sum_tiles_v5e_bundles.txt").read_text(),
        (DATA / "sum_tiles_v5e_utilization.txt").read_text(),
    )


def run(listing, lengths, **options):
    operands = {0: np.array(lengths), 1: np.append(TABLE.reshape(-1), np.zeros(5, int))}
    return execution.Program(listing).run(operands, **options)


def test_parsed_dump_has_its_bundles_and_slots(listing):
    assert len(listing.slots) == 76
    assert dict(zip(listing.units, listing.capacity, strict=True))["MATMUL"] == 4
    # The compiler's own notes go; what a DMA's arguments are called stays.
    text = " ".join(text for _, text in listing.scalar)
    assert "phi copy" not in text and "/*size_in_granules=*/" in text


def _calls(name):
    x = jax.ShapeDtypeStruct((8, 128), np.float32)
    copy = pl.pallas_call(lambda x_ref, o_ref: None, out_shape=x, name=name)
    return pallas_calls.pallas_calls(jax.make_jaxpr(lambda x: copy(copy(x)))(x))


@pytest.mark.parametrize("reverse", [False, True])
def test_the_body_of_a_scan_is_followed_as_often_as_it_runs(reverse):
    out = jax.ShapeDtypeStruct((8, 128), np.float32)
    copy = pl.pallas_call(lambda i_ref, x_ref, o_ref: None, out_shape=out, name="copy")

    def function(i, x):
        def layer(carry, k):
            i, x = carry
            x = copy(i + k, x)
            return (i + 1, x), i * 10

        (i, x), seen = jax.lax.scan(layer, (i, x), np.arange(3, dtype=np.int32), reverse=reverse)
        return copy(seen + jnp.searchsorted(np.array([1, 4, 9, 16]), i), x)

    i = np.int32(5)
    closed = jax.make_jaxpr(function)(i, np.zeros((8, 128), np.float32))
    found = [call.operands[0].tolist() for call in pallas_calls.pallas_calls(closed, {0: i})]
    if reverse:  # the last k first: 5 + 2, 6 + 1, 7 + 0
        assert found == [7, 7, 7, [72, 62, 52]]
    else:
        assert found == [5, 7, 9, [52, 62, 72]]
    assert len(pallas_calls.pallas_calls(closed)) == 4


def test_a_kernel_in_a_loop_of_unknown_length_is_refused_in_words():
    out = jax.ShapeDtypeStruct((8, 128), np.float32)
    copy = pl.pallas_call(lambda x_ref, o_ref: None, out_shape=out)
    loop = lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: copy(x), x)  # noqa: E731
    closed = jax.make_jaxpr(loop)(3, out)
    with pytest.raises(execution.CannotRun, match=r"kernel inside `while`.*call it outside"):
        pallas_calls.pallas_calls(closed)


def test_a_kernel_without_a_name_is_told_in_words():
    first, second = _calls(None)
    assert worker.choose([first], "") == 0
    with pytest.raises(ValueError, match="exactly one of the kernels .*: unnamed, unnamed"):
        worker.choose([first, second], "decode")
    assert [call.name for call in _calls("mine")] == ["mine", "mine"]


@needs_libtpu
def test_a_kernel_without_a_name_has_a_schedule():
    x = jax.ShapeDtypeStruct((8, 128), np.float32)
    schedule = schedule_for("v5e", schedule_programs.unnamed, x)
    assert schedule.kernel == "unnamed" and schedule.execute(x).bundles == schedule.num_bundles
    with pytest.raises(NoSchedule, match="unnamed, unnamed. Give each of them a name"):
        schedule_for("v5e", schedule_programs.unnamed, x, kwargs={"times": 2})


@pytest.mark.parametrize("is_taken, read", [(True, 5), (False, 7)])
def test_a_spill_of_a_value_of_the_delay_slots_is_read_on_both_ways(is_taken, read):
    """A branch over bundle 6, where the listing stores what bundle 2 computed."""
    texts = {
        1: "%9 = sbr.rel (%p1_p1) target bundleno = 8 (0x8), region = 1",
        2: "%s2_s2 = smov.u32 5",
        6: "%10 = sst [smem:[#allocation7_spill]] %s2_s2",
        7: "%11 = sst [smem:[#allocation7_spill]] %s3_s3",
        8: "%s4_s4 = sld [smem:[#allocation7_spill]]",
    }
    predicate = f"%p1_p1 = scmp.eq.s32.totalorder 1, {int(is_taken)}"
    scalar = [(0, "%s3_s3 = smov.u32 7"), (0, predicate), *texts.items()]
    listing = dumps.Listing(("SALU",), (2,), [[0]] * 9, scalar)
    program = execution.Program(listing)
    seen = []
    program._blocks[-1] = _spy(program._blocks[-1], seen)
    program.run({})
    assert seen == [read]


def _spy(block, seen):
    def run(machine):
        after = block(machine)
        seen.append(machine.registers["%s4_s4"])
        return after

    return run


def test_loops_are_nested(listing):
    kinds = [(depth, span.kind, span.start, span.end) for depth, span in _tree(listing)]
    assert kinds == [(0, "kernel", 0, 76), (1, "loop", 12, 64), (2, "loop", 25, 56)]
    assert [span.is_innermost_loop for _, span in _tree(listing)] == [False, False, True]


def _tree(listing):
    return list(loop_tree.tree(listing).walk())


def test_a_run_counts_each_turn_of_a_loop(listing):
    idle = run(listing, [0, 0, 0, 0])
    for lengths in ([1, 0, 0, 0], [0, 0, 3, 1], [2, 3, 0, 5]):
        busy = run(listing, lengths)
        # 31 bundles: the inner loop with the delay slots of its branch.
        assert (busy - idle).bundles == 31 * sum(lengths)
        assert busy.bytes_moved("hbm_to_vmem") == 4096 * sum(lengths)
        assert (busy - idle).hits[25:56].tolist() == [sum(lengths)] * 31


def test_events_are_the_timeline_of_the_copies(listing):
    events = run(listing, [2, 0, 0, 0], keep_events=True).events
    tiles = [event for event in events if event.action == "hbm_to_vmem"]
    assert [event.bytes for event in tiles] == [4096, 4096]
    assert tiles[1].cycle - tiles[0].cycle == 31
    waits = [e for e in events if e.action == "wait" and e.semaphore == tiles[0].semaphore]
    assert [wait.bytes for wait in waits] == [4096, 4096]
    assert tiles[0].cycle < waits[0].cycle < tiles[1].cycle < waits[1].cycle


def test_scalars_that_the_compiler_moves_out_are_told_from_an_operand():
    """512 bytes each, as on v5e: from operand 0, and from memory of the compiler's own."""
    copy = (
        "%9 = dma.hbm_to_smem /*hbm=*/{}, /*size_in_granules=*/16, /*smem=*/[#allocation3], "
        "/*dst_syncflagno=*/[#allocation4]"
    )
    operand = "%s1_s1 = inlined_call_operand.hbm [shape: s32[128], index: 0, kind: input]"
    scalar = [(0, operand), (1, copy.format("%s1_s1")), (2, copy.format("[#allocation5]"))]
    listing = dumps.Listing(("SALU",), (2,), [[0]] * 4, scalar)
    events = execution.Program(listing).run({0: np.zeros(128, int)}, keep_events=True).events
    assert [(event.bytes, event.is_spill) for event in events] == [(512, False), (512, True)]


def test_only_what_the_compiler_moves_out_takes_no_latency():
    for is_spill, waited in ((False, 100.0), (True, 0.0)):
        copy = machine.Event(10, "hbm_to_smem", 40, 1, is_spill)
        events = copy, machine.Event(20, "wait", 40, 1)
        run = execution.Execution(np.ones(50, int), events=events)
        took = waits.cycles_with_waits(run, bytes_per_cycle=4, latency_cycles=100)
        assert took == 50 + waited


def test_a_branch_on_what_is_not_known_is_refused(listing):
    with pytest.raises(execution.CannotRun, match="operand 0, whose values were not given"):
        execution.Program(listing).run({})


def test_a_branch_of_another_kind_is_refused(listing):
    strange = dumps.Listing(
        listing.units, listing.capacity, listing.slots, [(3, "%9 = sbr.abs 12")]
    )
    with pytest.raises(execution.CannotRun, match="bundle 0x3: branch of an unknown kind"):
        execution.Program(strange)


def test_files_that_do_not_belong_together_are_refused():
    usage = "== CAPACITY:\nMATMUL, SALU\n 4 2\n== UTILIZATION:\n0 1\n"
    with pytest.raises(ValueError, match="2 bundles, but 1 rows"):
        dumps.parse("0 : {}\n0x1 : {}\n", usage)


SCALAR_CODE = [
    ("%s2_s2 = sadd.s32 4294967295, %s1_s1", -1 + 7),
    ("%s2_s2 = ssub.s32 3, %s1_s1", -4),
    ("%s2_s2 = sshll.u32 %s1_s1, 30", -(2**30)),
    ("%s2_s2 = sshra.s32 4294967280, 2", -4),
    ("%s2_s2 = sshrl.u32 4294967295, 28", 15),
    ("%s2_s2 = smul.u32 2147483647, 2", -2),
    ("%s2_s2 = sand.u32 12, %s1_s1", 4),
    ("%s2_s2 = smov.u32 (%p1_p1, %s1_s1), 5", 5),
    ("%s2_s2 = smov.u32 (!%p1_p1, %s1_s1), 5", 7),
    ("%s2_s2 = scalar_select /*predicate=*/%p1_p1, /*on_true=*/1, /*on_false=*/%s9_s9", 1),
]


@pytest.mark.parametrize("text, expected", SCALAR_CODE)
def test_scalar_instructions(text, expected):
    """The result decides a branch: to the end, or through a loop that never ends."""
    scalar = [
        (0, "%s1_s1 = smov.u32 7"),
        (0, "%p1_p1 = scmp.lt.s32.totalorder %s1_s1, 8"),
        (1, text),
        (2, f"%p2_p2 = scmp.eq.s32.totalorder %s2_s2, {expected % 2**32}"),
        (3, "%5 = sbr.rel (!%p2_p2) target bundleno = 0 (0x0), region = 1"),
    ]
    listing = dumps.Listing(("SALU",), (2,), [[1]] * 9, scalar)
    assert execution.Program(listing).run({}).bundles == 9


@needs_libtpu
@pytest.mark.parametrize("chip", COMPILED_CHIPS)
def test_calibration_a_matmul_takes_its_flops(chip):
    """MATMUL slots an MXU = FLOP / peak FLOP per cycle, exactly: what all shares rest on."""
    n = 512
    schedule = schedule_for(chip, schedule_programs.matmul, *schedule_programs.matrices(n))
    executed = schedule.execute(*schedule_programs.matrices(n))
    assert executed.bundles == schedule.num_bundles  # no loop, no branch
    matmuls = schedule.slots(executed.hits)["MATMUL"]
    peak = chips.chip(chip).mxu_flops_per_cycle
    assert matmuls / schedule.capacity["MATMUL"] == 2 * n**3 / peak
    assert executed.bundles >= 2 * n**3 / peak


@needs_libtpu
@pytest.mark.parametrize("chip", COMPILED_CHIPS)
def test_a_run_follows_lengths_through_the_function(chip):
    schedule = schedule_for(chip, schedule_programs.sum_tiles, LENGTHS, TABLE, TILES)
    turns = [schedule.execute(np.array([n, 0, 1, 0], np.int32), TABLE, TILES) for n in (0, 2, 8)]
    assert [turn.bytes_moved("hbm_to_vmem") for turn in turns] == [0, 4096, 4 * 4096]
    one, four = (turns[1] - turns[0]).bundles, (turns[2] - turns[0]).bundles
    loop = next(s for _, s in schedule.loops.walk() if s.is_innermost_loop)
    # The first turn may also enter a region around the loop.
    assert four - one == 3 * loop.num_bundles and one >= loop.num_bundles
    again = schedule_for(chip, schedule_programs.sum_tiles, LENGTHS, TABLE, TILES)
    assert again.to_json() == schedule.to_json()


@needs_libtpu
def test_refusals_are_in_words():
    with pytest.raises(NoSchedule, match="exactly one of the kernels of this function: sum_tiles"):
        schedule_for("v5e", schedule_programs.sum_tiles, LENGTHS, TABLE, TILES, kernel="other")


@needs_libtpu
@pytest.mark.full
@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("kernel", cases.KERNELS)
def test_command_prints_one_json_object(capfd, kernel, case):
    if kernel in peers.PROGRAMS and peers.absence(kernel):
        pytest.skip(peers.absence(kernel))
    command = ["lab", "schedule", "--chip", "v6e", "--case", case, "--kernel", kernel, "--json"]
    assert main(command) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["bundles_per_chunk"] > 0.2 * told["floor"] > 0
    assert told["spills"] == told["slots"]["spill"]
    work = told["slots"]["MATMUL"] / told["capacity"]["MATMUL"]
    if case == "mixed":
        assert work == told["floor"]  # no product twice, none left out
    assert told["executed_per_chunk"] >= told["bundles_per_chunk"]
    assert all(0 <= share <= 1 for share in told["share"].values())


@needs_libtpu
@pytest.mark.full
def test_a_ragged_batch_moves_each_token_once():
    """The compiled rung 8, executed on lengths at and around page and block ends."""
    sizes = programs.Workload(page_size=128, num_seqs=16, kv_len=cases.LONG)
    schedule, program = cases.compile_kernel("rpa", "decode", "v6e", sizes)
    kv_lens = np.array([1, 127, 128, 129, 1024, 1025, 0, 5000, *[9] * 8], np.int32)
    q_lens = np.array([1, 1, 1, 1, 1, 1, 0, 1, *[0] * 8])
    cu_q_lens = np.append(0, np.cumsum(q_lens)).astype(np.int32)
    pages = np.arange(16 * sizes.pages_per_seq, dtype=np.int32)
    distribution = np.array([8, 8, 8], np.int32)
    run = schedule.execute(*program.args[:4], kv_lens, pages, cu_q_lens, distribution)
    token_bytes, row_bytes = 2 * 8 * 128 * 2, 32 * 128 * 2
    assert run.bytes_moved("hbm_to_vmem") == sum(kv_lens[:8]) * token_bytes + 7 * row_bytes
    assert run.bytes_moved("vmem_to_hbm") == 7 * row_bytes  # the mixed kernel zeroes the rest
    assert run.bytes_moved("hbm_to_hbm") == 7 * token_bytes  # the new tokens


@pytest.mark.parametrize(
    ("matmuls", "expected"),
    [
        ((8, 8), (20, 30)),
        ((8, 2, 8), (20, 30)),  # and one for less than a whole block
        ((8, 2, 4), (None, None)),  # one copy of the code: nothing is the masked twin of a block
    ],
)
def test_a_masked_region_does_the_same_products(matmuls, expected):
    """Regions that multiply, of which only the first was run; the last is half as long again."""
    lengths = [20 * n // 8 for n in matmuls[:-1]] + [30]
    starts = np.cumsum([0, *(length + cases.DELAY_SLOTS + 1 for length in lengths)])
    spans = [
        loop_tree.Span("region", start, start + length)
        for start, length in zip(starts, lengths, strict=False)
    ]
    products, hits = np.zeros((2, starts[-1]), int)
    products[starts[:-1]] = matmuls
    hits[: lengths[0]] = 1
    schedule = SimpleNamespace(
        loops=loop_tree.Span("kernel", 0, starts[-1], tuple(spans)),
        once=lambda span: (
            (np.arange(starts[-1]) >= span.start) & (np.arange(starts[-1]) < span.end)
        ),
        slots=lambda run: {"MATMUL": int((products * run).sum())},
    )
    branch = cases.DELAY_SLOTS + 1
    found = cases.regions(schedule, SimpleNamespace(hits=hits), num_chunks=1)
    assert found == tuple(size and size + branch for size in expected)


@needs_libtpu
def test_picture_of_a_loop():
    schedule = schedule_for("v5e", schedule_programs.matmul, *schedule_programs.matrices(512))
    picture = pictures.occupancy(schedule, schedule.loops)
    assert f"over the {schedule.num_bundles:,} bundles" in picture.text
    assert "Bound by MATMUL" in picture.text
