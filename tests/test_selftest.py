"""The doctor's self-test: it passes, it names what is wrong, and its paths compile for chips."""

import json
import platform
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpa import __main__ as command_line
from rpa import lab, ragged_paged_attention, selftest
from rpa.kernel import layout
from rpa.lab.chip import dump
from tests import kernel_programs
from tests.kernel_harness import assert_compiles
from tests.mutants import replaced
from tests.test_doctor import LAPTOP, doctor

pytestmark = pytest.mark.core

needs_libtpu = pytest.mark.skipif(
    lab.compile_versions()["libtpu"] is None,
    reason=f"libtpu is not installed ({platform.system()} {platform.machine()})",
)

FLOAT32, *OTHERS = [path for path in selftest.PATHS if path.off_tpu]


def by_reference(*args, backend, **options):
    """Rung 3 in the place of rung 8: takes no time, and is as right."""
    return ragged_paged_attention(*args, backend="reference", **options)


def two_kernels(*args, chunk_prefill_size, **options):
    """Rung 8 without a kernel for chunks: they are computed by the mixed one."""
    return ragged_paged_attention(*args, **options)


def check(attention, path=FLOAT32):
    """(errors, what is wrong) of one path."""
    errors, _, wrong, fix = selftest.check_path(path, False, attention)
    assert bool(wrong) == bool(fix)
    return errors, wrong


def test_a_right_kernel_passes():
    errors, wrong = check(two_kernels)
    assert wrong == "" and list(errors) == ["decode", "chunk", "mixed"]


@pytest.mark.full
@pytest.mark.parametrize("path", OTHERS, ids=str)
def test_the_other_paths_pass(path):
    assert check(ragged_paged_attention, path)[1] == ""


@pytest.mark.full
def test_a_layout_that_swaps_k_and_v_is_named():
    load_kv = layout.load_kv
    with replaced(layout, "load_kv", lambda *args: load_kv(*args)[::-1]):
        assert check(two_kernels)[1] == "decode and chunk and mixed: K and V are swapped"


def changed(change):
    """Rung 3 with a wrong output: `change` gets it as a NumPy array and returns another."""

    def attention(*args, **options):
        output, kv_cache = by_reference(*args, **options)
        return change(np.array(output)), kv_cache

    return attention


def in_row(row, value):
    def change(output):
        output[row] = value
        return output

    return change


WRONG_OUTPUTS = {
    "zeros": (lambda x: 0 * x, "decode and chunk and mixed: all zeros: a copy moved nothing"),
    "heads": (lambda x: np.roll(x, 1, axis=1), "mixed: query heads stand 1 too far"),
    "nan": (in_row(40, np.nan), "mixed: NaN or infinity: something was read that was never"),
    "one row": (in_row((9, 1), 7.0), "chunk: 1% of all (token, head), first token 9, head 1"),
    "padding": (in_row(81, 1.0), "padding rows of the output are not zero"),
}


@pytest.mark.parametrize("name", WRONG_OUTPUTS)
def test_a_wrong_output_is_named(name):
    change, words = WRONG_OUTPUTS[name]
    assert words in check(changed(change))[1]


def test_swapped_keys_and_values_are_named():
    """What the full test makes of the kernel's own layout, made of the reference here."""
    case = selftest.make_case(FLOAT32)

    def swapped(*args, **options):
        return selftest._reference(FLOAT32, case, swap=True), by_reference(*args, **options)[1]

    assert check(swapped)[1] == "decode and chunk and mixed: K and V are swapped"


def test_a_wrong_cache_is_named():
    def store_nothing(*args, **options):
        return by_reference(*args, **options)[0], args[3]

    def overwrite(*args, **options):
        output, kv_cache = by_reference(*args, **options)
        return output, kv_cache.at[:, -1].set(0)

    assert check(store_nothing)[1] == "79 new tokens are not in the cache as they should be"
    assert "tokens of the cache were overwritten" in check(overwrite)[1]


@pytest.mark.full
@pytest.mark.parametrize("path", selftest.PATHS, ids=str)
def test_the_limits_leave_room_for_rounding_the_output(path):
    assert check(by_reference, path)[1] == ""


@pytest.mark.parametrize(
    "path", [path for path in selftest.PATHS if path.plain_too], ids=lambda path: path.kv_dtype
)
def test_rung_7_passes(path):
    assert check(selftest.by_rung_7, path)[1] == ""


def test_rung_7_is_among_the_results_and_has_a_remedy_of_its_own():
    def refuse(*args, **options):
        raise ValueError("Mosaic failed to compile")

    with mock.patch.object(selftest.plain, "attention", refuse):
        results = list(selftest.run(False, by_reference))
    seventh = [result for result in results if result.path.startswith("rung 7: ")]
    assert [result.wrong for result in results if result not in seventh] == [""] * 4
    assert len(seventh) == 2
    for result in seventh:
        assert "Mosaic failed to compile" in result.wrong
        assert result.fix.startswith("Do not use rung 7") and "rung 7: " in selftest.line(result)


def test_the_dma_check_passes_and_names_zeros():
    assert selftest.check_dma(False, selftest.copy_rows) == ({}, 0.0, "", "")
    _, _, wrong, fix = selftest.check_dma(False, lambda *_, **__: jnp.zeros((8, 256)))
    assert wrong == "a copy from HBM delivered zeros" and "0.0.43 to 0.0.45" in fix


def run_command(monkeypatch, attention, *options):
    """The command where the chip's executor knows other versions of libtpu only."""

    def run(on_tpu):
        for path in (FLOAT32, *OTHERS):
            yield selftest.timed(
                str(path), "", lambda p=path: selftest.check_path(p, on_tpu, attention)
            )

    monkeypatch.setattr(selftest, "run", run)
    monkeypatch.setattr(dump, "KNOWN_LIBTPU", ("0.0.1",))
    monkeypatch.setattr(doctor, "collect", lambda: LAPTOP)
    return command_line.main(["doctor", "--selftest", *options])


def test_the_command_prints_a_line_a_path_and_exits_with_0(monkeypatch, capsys):
    assert run_command(monkeypatch, by_reference) == 0
    printed = capsys.readouterr().out
    assert "neither bitcasts nor strided loads:\nonly a TPU can say" in printed
    assert re.search(r"executed as compiled\. They are not: .*(libtpu|jax)", printed)
    assert all(str(path) in printed for path in (FLOAT32, *OTHERS))
    assert printed.endswith("All 3 ok.\n")


def test_the_command_says_what_is_wrong_and_exits_with_1(monkeypatch, capsys):
    def refuse(*args, **options):
        raise ValueError("Mosaic failed to compile\nlong text")

    assert run_command(monkeypatch, refuse, "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["usable"] and len(answer["selftest"]) == 3
    for result in answer["selftest"]:
        assert result["wrong"] == "it did not run: ValueError: Mosaic failed to compile"
        assert "backend='reference'" in result["fix"]
    assert run_command(monkeypatch, refuse) == 1
    assert "What to do: Do not use rung 8" in capsys.readouterr().out


@needs_libtpu
def test_without_a_tpu_every_path_is_executed_as_compiled(monkeypatch, capsys):
    chips = []

    def run_as_compiled(chip):
        chips.append(chip)
        yield selftest.timed("a path", "", lambda: ({}, 0.0, "", ""))

    monkeypatch.setattr(selftest, "run_as_compiled", run_as_compiled)
    monkeypatch.setattr(doctor, "collect", lambda: LAPTOP)
    assert command_line.main(["doctor", "--selftest"]) == 0
    assert chips == [selftest.CHIP]
    printed = capsys.readouterr().out
    assert f"all {len(selftest.PATHS)} paths" in printed and printed.endswith("All 1 ok.\n")


@needs_libtpu
def test_what_runs_as_compiled_are_the_dma_all_paths_and_rung_7(monkeypatch):
    few = [path for path in selftest.PATHS if path.plain_too][1:]
    monkeypatch.setattr(selftest, "PATHS", few)
    results = list(selftest.run_as_compiled(selftest.CHIP))
    assert [result.path for result in results] == [
        selftest.DMA_CHECK,
        str(few[0]),
        f"rung 7: {few[0]}",
    ]
    assert [result.wrong for result in results] == [""] * 3


def test_every_packing_meets_every_width_of_a_load():
    """Lanes are 128 or 256; head_dim 64 and 128 differ in their padding."""
    met = {(path.kv_dtype, path.head_dim) for path in selftest.PATHS}
    packings = {("float32", 1), ("bfloat16", 2), ("float8_e4m3fn", 4)}
    assert {(dtype, 256) for dtype, _ in packings} <= met
    assert {head_dim for _, head_dim in met} == {64, 128, 256}
    assert {dtype for dtype, _ in met} == set(selftest.LIMITS)
    assert {path.q_dtype for path in selftest.PATHS} == {"float32", "bfloat16"}


@pytest.mark.full
@pytest.mark.parametrize("path", selftest.PATHS, ids=str)
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_paths_compile_for(chip, path):
    case = selftest.make_case(path)
    arrays = [case.queries, case.keys, case.values, case.kv_cache, *case.metadata]
    options = selftest.BLOCKS | path.options | {"chip": chip}
    result = assert_compiles(
        chip,
        kernel_programs.attend,
        *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays),
        kwargs=options | {"chunk_prefill_size": selftest.CHUNK_PREFILL_SIZE},
        donate_argnums=(3,),
    )
    assert len(result.kernels) == 3


@pytest.mark.parametrize(
    "chip", ["v5e", *(pytest.param(chip, marks=pytest.mark.full) for chip in ("v6e", "tpu7x"))]
)
def test_the_dma_check_compiles_for(chip):
    source = jax.ShapeDtypeStruct((16, 256), jnp.float32)
    assert_compiles(chip, selftest.copy_rows, source, kwargs={"interpret": False})
