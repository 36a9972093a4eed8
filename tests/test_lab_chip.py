"""`rpa.lab.chip`: compiled kernels executed in NumPy.

The machine alone is tested on a few lines of compiled text and needs no compiler; the rest compiles
for a chip that is not here. All tiny kernels, all paths of rung 8 and the seeded faults of its
layout are in `tests/test_lab_chip_full.py`.
"""

import platform
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from rpa import fused, lab, ragged_paged_attention, ref_ragged_paged_attention, selftest
from rpa.lab import chip
from rpa.lab.chip import conformance, dump, hunt
from rpa.lab.chip.conformance_kernels import KERNELS
from rpa.lab.chip.kernel import Kernel
from rpa.lab.chip.machine import MODELS
from rpa.lab.chip.text import parse

needs_libtpu = pytest.mark.skipif(
    lab.compile_versions()["libtpu"] is None,
    reason=f"libtpu is not installed ({platform.system()} {platform.machine()})",
)

# --- The machine, on compiled text of a few lines -------------------------------------------------

VMEM = "memref<8x128xf32, #xir.tiled<(8,128),[1,1]>, #xir.memory_space<vmem, tc>>"
HBM = "memref<8x128xf32, #xir.tiled<(8,128),[1,1]>, #xir.memory_space<hbm>>"
SEMAPHORE = "memref<1x!xir.dma_semaphore, #xir.tiled<,[1]>, #xir.memory_space<semaphore_mem, tc>>"
ROWS = np.arange(1024, dtype=np.float32).reshape(8, 128)
DMA = (
    '"llo.enqueue_dma"(%arg0, {size}, %arg1, %arg2, {size}) <{{done_count = false, '
    "operandSegmentSizes = array<i32: 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0>, priority = 0 : i32, "
    "sequencer_type = #llo.sequencer_type<tensor_core_sequencer>}}> : "
    "(i32, i32, i32, i32, i32) -> ()"
)
WAIT = '"llo.dma_done"({size}, %arg2) <{{emit_sfence = false}}> : (i32, i32) -> ()'
SIZE = "%size = llo.constant {value = 128 : i32} : i32"  # granules of 32 bytes: v6e


def kernel_of(*lines, types=(VMEM, VMEM), in_place=False):
    """A kernel of one input and one output, from the lines of its body."""
    mark = "llo.passthrough_operand, " if in_place else ""
    arguments = ", ".join(f"%arg{i}: i32 {{{mark}llo.type = {t}}}" for i, t in enumerate(types))
    head = f"func.func @tiny({arguments}) attributes {{scalar_prefetch = 0 : i64, xir.main}} {{"
    text = "\n".join(["module {", head, *lines, "return", "}", "}"])
    result = jax.ShapeDtypeStruct((8, 128), np.float32)
    return Kernel(text, MODELS["v6e"], 1, (result,), {})


def copy_of(*lines):
    """A kernel from HBM to HBM with a semaphore, from lines that may say {size}."""
    lines = [
        line.replace("{size}", "%size").replace("{{", "{").replace("}}", "}") for line in lines
    ]
    return kernel_of(SIZE, *lines, types=(HBM, HBM, SEMAPHORE), in_place=True)


def run(kernel, late=True):
    return kernel.run([ROWS], late)[0]


def test_instructions_of_a_listing_are_executed_in_order():
    kernel = kernel_of(
        "%x = llo.vector_load %arg0 : i32 -> vector<8x128xf32>",
        "%n = llo.constant {value = 2 : i32} : i32",
        "%r = llo.vrot.slane %x, %n : vector<8x128xf32>, i32 -> vector<8x128xf32>",
        "%y = llo.vadd.f32 %x, %r : vector<8x128xf32>",
        "llo.vector_store %y into %arg1 : vector<8x128xf32> into i32",
    )
    assert (run(kernel) == ROWS + np.roll(ROWS, -2, axis=0)).all()
    assert "v_y = vadd_f32" in kernel.body.source


def test_memory_that_was_not_written_is_nan():
    assert np.isnan(run(kernel_of())).all()


def test_an_unknown_operation_is_named():
    with pytest.raises(chip.UnknownOperation, match="vwarp.f32.*docs/chip.md"):
        kernel_of("%x = llo.vwarp.f32 %arg0 : i32 -> vector<8x128xf32>")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("%x = llo.vadd.f32 %a, %b, <twice> : vector<8x128xf32>", "vadd.f32 is known, but not how"),
        ("%x = llo.vadd.f32 %a, %b {rounding = 3 : i32} : vector<8x128xf32>", "attribute rounding"),
        ("%x = llo.vector_load %arg0 : i32 -> vector<8x128x8xi4>", "i4"),
        ('"llo.block"() ({', "block"),
    ],
)
def test_an_unknown_spelling_is_not_guessed(line, said):
    with pytest.raises(chip.UnknownOperation, match=said):
        kernel_of(line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("llo.vector_load %arg0 + %n : i32 -> vector<8x128xf32>", "a load of words 128 to 1151"),
        ("llo.vector_store %x into %arg1 + %n : vector<8x128xf32> into i32", "a store of words"),
        ("llo.vector_load %n : i32 -> vector<8x128xf32>", "inside a row"),
        ("llo.sld %arg0 : i32", "lies in vmem"),
    ],
)
def test_an_access_beyond_its_buffer_is_a_sentence(line, said):
    kernel = kernel_of(
        "%n = llo.constant {value = 1 : i32} : i32",
        "%x = llo.vector_load %arg0 : i32 -> vector<8x128xf32>",
        line if line.startswith("llo.vector_store") else f"%y = {line}",
    )
    with pytest.raises(chip.KernelFault, match=said):
        run(kernel)


def test_a_copy_is_there_when_it_was_waited_for():
    kernel = copy_of(DMA, WAIT)
    for late in (True, False):
        assert (run(kernel, late) == ROWS).all()


def test_a_missing_wait_a_missing_copy_and_a_wait_for_less_are_found():
    with pytest.raises(chip.KernelFault, match="1 copies in flight"):
        run(copy_of(DMA))
    with pytest.raises(chip.KernelFault, match="must be back at zero"):
        run(copy_of(DMA), late=False)
    with pytest.raises(chip.KernelFault, match="deadlock"):
        run(copy_of(WAIT))
    half = "%half = llo.constant {value = 64 : i32} : i32"
    with pytest.raises(chip.KernelFault, match="must be back at zero"):
        run(copy_of(DMA, half, WAIT.replace("{size}", "%half")))


def test_a_copy_beyond_its_buffer_is_found():
    with pytest.raises(chip.KernelFault, match="the source of a copy of words 0 to 2047 leaves"):
        run(copy_of("%far = llo.constant {value = 256 : i32} : i32", DMA.replace("{size}", "%far")))


def test_products_that_nobody_takes_are_found():
    push = (
        '"llo.vlatchi"(%x) <{gain_latch_mode = #llo.gain_latch_mode<f32>, latch_variant = 0 : i32, '
        "mxu_id = 0 : i32}> : (vector<8x128xf32>) -> ()"
    )
    multiply = (
        '"llo.vmatmul.mubr"(%x) <{data_format = #llo.matmul_data_format<f32>, dwg = false, '
        "lmr_hint = false, mode = #llo.matmul_mode<round>, mxu_id = 0 : i32}> : "
        "(vector<8x128xf32>) -> ()"
    )
    load = "%x = llo.vector_load %arg0 : i32 -> vector<8x128xf32>"
    with pytest.raises(chip.KernelFault, match="2 results of products"):
        run(kernel_of(load, push, multiply))


def test_loops_and_conditions_carry_their_values():
    kernel = kernel_of(
        "%zero = llo.constant {value = 0 : i32} : i32",
        "%one = llo.constant {value = 1 : i32} : i32",
        "%five = llo.constant {value = 5 : i32} : i32",
        "%s:2 = scf.for %i = %zero to %five step %one iter_args(%a = %zero, %b = %one) "
        "-> (i32, i32)  : i32 {",
        "%c = llo.sadd.s32 %a, %i",
        "%d = scf.while (%w = %b) : (i32) -> i32 {",
        "%p = llo.slt.s32 %w, %c",
        "scf.condition(%p) %w : i32",
        "} do {",
        "^bb0(%v: i32):",
        "%v1 = llo.sadd.s32 %v, %one",
        "scf.yield %v1 : i32",
        "}",
        "scf.yield %c, %d : i32, i32",
        "}",
        "%odd = llo.seq.s32 %s#1, %five",
        "%chosen = scf.if %odd -> (i32) {",
        "scf.yield %s#0 : i32",
        "} else {",
        "scf.yield %s#1 : i32",
        "}",
        '%x = "llo.stov"(%chosen) : (i32) -> vector<8x128xi32>',
        "%y = llo.vcvt.s32.f32 %x : vector<8x128xi32> -> vector<8x128xf32>",
        "llo.vector_store %y into %arg1 : vector<8x128xf32> into i32",
    )
    assert (run(kernel) == 10).all()


def test_text_that_is_no_kernel_is_refused():
    with pytest.raises(chip.UnknownOperation, match="not the text of a compiled kernel"):
        parse("module {}")


# --- Step by step ---------------------------------------------------------------------------------


def test_a_listing_is_stepped_through_and_shows_what_each_instruction_gave():
    rows = np.arange(40, dtype=np.float32).repeat(128).reshape(40, 128)
    out, steps = chip.step_listing(chip.strided_load(), rows, num_out=10)
    np.testing.assert_array_equal(out, rows[1::3][:10])
    assert [step.is_register for step in steps] == [False, False, True, False, True, False, False]
    assert steps[2].value[:, 0].tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    assert "sublane_stride = 3}" in str(steps[2]) and steps[-1].value is None
    assert "\n" not in str(steps[-1])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("%a = llo.vadd.f32 %b, %c : vector<8x128xf32>", "v_b"),
        ("%a = llo.constant {value = x : i32} : i32", "cannot be read"),
        ("scf.for", "cannot be read"),
        ("llo.vector_store %x into %out : vector<8x128xf32> into i32", "was not made for"),
        ("%a = llo.vector_load %x", "vector_load|not known"),
    ],
)
def test_a_listing_that_makes_no_sense_is_a_sentence(line, said):
    with pytest.raises(chip.UnknownOperation, match=said):
        chip.step_listing([line], ROWS)


@pytest.mark.parametrize("rows", [None, [1, 2], np.ones(128), np.ones((8, 127)), np.ones((0, 128))])
def test_rows_that_are_no_array_of_rows_are_refused(rows):
    with pytest.raises(ValueError, match="rows has shape"):
        chip.step_listing([], rows)


def test_loops_show_each_turn():
    lines = [
        "%zero = llo.constant {value = 0 : i32} : i32",
        "%one = llo.constant {value = 1 : i32} : i32",
        "%two = llo.constant {value = 2 : i32} : i32",
        "%s = scf.for %i = %zero to %two step %one iter_args(%a = %zero) -> (i32)  : i32 {",
        "%b = llo.sadd.s32 %a, %one",
        "scf.yield %b : i32",
        "}",
    ]
    _, steps = chip.step_listing(lines, ROWS)
    assert [step.value for step in steps] == [1, 2]


@needs_libtpu
def test_a_function_is_stepped_through_as_compiled():
    kernel = KERNELS["load_strided"]
    steps = chip.step_through(kernel.call, *kernel.inputs, chip="v5e")
    assert [step.text for step in steps] == [
        line.replace("%x", "%arg0").replace("%out", "%arg1")
        for line in chip.strided_load()
        if "llo.constant" not in line
    ]


# --- What the compiler makes ----------------------------------------------------------------------

SAMPLE = (
    *("arithmetic_bf16", "masks_bf16", "compare_i32", "f32_to_float8_e4m3fn", "odd_shape_e5m2"),
    *("float8_e4m3fn_to_f32", "roll_strided", "transpose_40x72", "sum_axis1", "load_strided"),
    *("store_unaligned_bf16", "matmul_bf16_nt_odd", "matmul_f32_highest", "matmul_float8_e4m3fn"),
    *("copy_overlapping", "copy_box_of_boxes", "grid_ragged_bf16", "grid_matmul"),
    *("table_of_scalars", "half_of_the_heads"),
)


@needs_libtpu
def test_tiny_kernels_give_what_jax_numpy_gives():
    wrong = {o.kernel: o.wrong for o in conformance.all_outcomes("v5e", SAMPLE) if o.wrong}
    assert wrong == {}


@needs_libtpu
def test_the_table_shows_what_is_tested_by_what(capsys):
    outcomes = [conformance.check(KERNELS[name], "v5e") for name in ("sum_axis1", "compare_i32")]
    lines = conformance.table(outcomes, {"v5e": {"vadd.xlane.f32", "vlatch"}})
    by_name = {line.split()[0]: line for line in lines}
    assert by_name["vadd.xlane.f32"].split() == ["vadd.xlane.f32", "tested,", "ladder", "sum_axis1"]
    assert by_name["vlatch"].split() == ["vlatch", "ladder"]
    assert conformance.untested(outcomes, {"v5e": {"vadd.xlane.f32", "vlatch"}}) == {
        "v5e": {"vlatch"}
    }


@needs_libtpu
def test_rung_8_is_right_as_compiled():
    path = selftest.PATHS[7]  # float8 cache, queries rounded: the packing of four

    def attention(*args, **options):
        function = partial(ragged_paged_attention, **options | dict(backend="tpu", chip="v5e"))
        return chip.run(function, *args, chip="v5e")

    errors, limit, wrong, _ = selftest.check_path(path, True, attention)
    assert not wrong
    assert max(errors.values()) < limit


@needs_libtpu
def test_the_learners_kernel_is_right_as_compiled():
    """Its cache is float8: four values per word."""
    assert_right_as_compiled(conformance.LEARNER, selftest.PATHS[7], "v5e")


def assert_right_as_compiled(attention, path, name, dma="late"):
    """Hold what a function of the ladder's signature gives on a chip against rung 3."""
    case = selftest.make_case(path)
    arrays = (case.queries, case.keys, case.values, case.kv_cache, case.batch)
    output, kv_cache = chip.run(attention, *arrays, chip=name, dma=dma)
    truth, _ = ref_ragged_paged_attention(
        *(case.queries.astype(np.float32), *arrays[1:4], *case.metadata),
        sm_scale=attention.keywords["sm_scale"],
    )
    rows = int(case.batch.cu_q_lens[-1])
    output, truth = np.asarray(output).astype(np.float32), np.asarray(truth)
    errors = selftest.row_errors(output[:rows], truth[:rows])
    assert errors.max() <= selftest.LIMITS[path.kv_dtype]
    assert not output[rows:].any()
    assert selftest.wrong_places(np.asarray(kv_cache), case) == []


@needs_libtpu
def test_a_rung_with_a_grid_is_right_as_compiled():
    problem = hunt.draw_problem(11)
    problem = hunt.dataclasses.replace(
        *[problem],
        **dict(heads=(8, 2), head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16"),
        **dict(page_size=16, share_lanes=False, pages_per_seq=8, has_sinks=False),
        options={"sm_scale": 0.1, "chunk_prefill_size": 8},
    )
    case = hunt.draw_case(problem, 0)
    q_lens = np.diff(case.batch.cu_q_lens)
    assert q_lens.max() > 8
    live = hunt.dataclasses.replace(case.batch, distribution=np.full(3, (q_lens > 8).argmax()))
    batch = live if live.num_seqs else case.batch
    args = (case.queries, case.keys, case.values, case.kv_cache, batch)
    function = partial(fused.attention, sm_scale=0.1)
    late, eager = (chip.run(function, *args, chip="v6e", dma=dma) for dma in chip.DMA_ORDERS)
    for x, y in zip(late, eager, strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def _double(x):
    def body(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


@needs_libtpu
def test_kernels_inside_loops_and_branches_are_executed():
    def function(arrays):
        x = jax.lax.fori_loop(0, 3, lambda i, x: _double(x), arrays["x"])
        x = jax.lax.while_loop(lambda x: x[0, 0] < 100, _double, x)
        carried, rows = jax.lax.scan(lambda c, y: (_double(c), _double(c) + y), x, arrays["y"])
        return {
            "out": jax.lax.cond(carried[0, 0] > 0, jax.jit(_double), lambda x: x, carried)
        }, rows

    x = np.full((8, 128), 3, np.float32)
    y = np.arange(2 * 1024, dtype=np.float32).reshape(2, 8, 128)
    found, rows = chip.run(function, {"x": x, "y": y}, chip="v6e")
    # 3 becomes 24, then 192, is doubled twice by the scan and once behind it.
    assert (found["out"] == 8 * 192).all()
    np.testing.assert_array_equal(rows, y + np.array([2, 4])[:, None, None] * 192)


@needs_libtpu
def test_arrays_of_float64_are_what_jax_takes_them_for():
    out = chip.run(_double, np.full((8, 128), 1.5))
    assert out.dtype == np.float32 and (out == 3).all()
    prepared = chip.prepare(_double, np.ones((8, 128)))
    with pytest.raises(ValueError, match=r"\(16, 128\), but .* prepared for \(8, 128\)"):
        prepared(np.ones((16, 128)))


@needs_libtpu
def test_another_libtpu_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dump, "KNOWN_LIBTPU", ("0.0.1",))
    version = lab.compile_versions()["libtpu"]
    with pytest.raises(chip.UnknownOperation, match=rf"libtpu is {version}.*0\.0\.1"):
        chip.run(_double, np.zeros((8, 128), np.float32))


@needs_libtpu
def test_a_text_that_cannot_be_kept_is_executed_all_the_same(monkeypatch, tmp_path, capsys):
    (tmp_path / "rpa").mkdir()
    (tmp_path / "rpa" / "chip").touch()  # a file where the folder should be
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = np.ones((8, 128), np.float32)
    assert (chip.run(_double, x) == 2).all()


@needs_libtpu
def test_what_the_compiler_refuses_is_said_in_words(monkeypatch):
    answer = {"message": "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"}
    monkeypatch.setattr(dump, "ask_worker", lambda *args, **options: answer)
    with pytest.raises(chip.NotCompiled, match="(?i)vmem"):
        chip.run(lambda x: _double(_double(x)), np.zeros((8, 1024), np.float32))


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="dma is 'soon'"):
        chip.run(_double, np.zeros((8, 128), np.float32), dma="soon")
    with pytest.raises(ValueError, match="dma is array"):
        chip.run(_double, np.zeros((8, 128), np.float32), dma=np.arange(3))
    with pytest.raises(ValueError, match="v5p"):
        chip.run(_double, np.zeros((8, 128), np.float32), chip="v5p")


@pytest.mark.parametrize("number", range(3))
def test_generated_problems_are_valid(number):
    problem = hunt.draw_problem(number)
    case = hunt.draw_case(problem, 1)
    case.batch.validate(
        num_tokens=len(case.queries),
        num_pages=len(case.kv_cache),
        page_size=problem.page_size,
        chunk_prefill_size=problem.options.get("chunk_prefill_size"),
        update_kv_cache=problem.options.get("update_kv_cache", True),
    )
    assert str(number) in str(problem)


def test_every_default_of_the_sweep_has_room_for_two_blocks():
    for name in MODELS:
        for problem in hunt.default_block_problems(name):
            room = problem.pages_per_seq * problem.page_size
            for kernel in "dm":
                _, kv_tokens, _, _ = problem.options[f"{kernel}_block_sizes"]
                assert room > 2 * kv_tokens
