"""`rpa.lab.compile`: the compiler's answer, its refusals in words, and the cache of both."""

import functools
import importlib
import inspect
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rpa import lab
from rpa.__main__ import main
from rpa.lab import programs
from rpa.lab.compile import words, worker
from rpa.lab.compile.compiler import file_hash
from rpa.lab.compile.vmem_slices import eight_rows, sixteen_rows
from rpa.shapes import MODELS
from tests import lab_programs

HAS_LIBTPU = lab.compile_versions()["libtpu"] is not None
needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason=f"libtpu is not installed ({platform.system()} {platform.machine()})"
)
ROWS = jax.ShapeDtypeStruct((1024, 8, 128), jnp.float32)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@needs_libtpu
def test_a_kernel_compiles_and_its_vmem_is_read(empty_cache):
    compile_rows = functools.partial(
        lab.compile_for, "v5e", lab_programs.copy_rows, ROWS, kwargs={"num_rows": 64}
    )
    first, second = compile_rows(), compile_rows()
    assert first.ok and first.compile_time_s > 0 and not first.from_cache
    assert 64 * 4096 <= first.vmem_used_bytes < 80 * 4096
    assert second.from_cache and second.compile_time_s == first.compile_time_s


@needs_libtpu
def test_vmem_overflow_says_how_much(empty_cache):
    rows = jax.ShapeDtypeStruct((8192, 8, 128), jnp.float32)
    kwargs = {"num_rows": 6400, "vmem_limit_bytes": 20 << 20}
    result = lab.compile_for("v5e", lab_programs.copy_rows, rows, kwargs=kwargs)
    assert (result.ok, result.error_kind) == (False, "vmem overflow")
    assert "25.00M of 20.00M" in result.error


@needs_libtpu
def test_hbm_overflow_says_how_much(empty_cache):
    rows = jax.ShapeDtypeStruct((1 << 23, 8, 128), jnp.float32)
    result = lab.compile_for("v5e", lab_programs.copy_rows, rows, kwargs={"num_rows": 64})
    assert (result.ok, result.error_kind) == (False, "hbm overflow")
    assert "32.00G of 15.75G" in result.error


@needs_libtpu
def test_smem_overflow_says_how_much(empty_cache):
    """A page table of 64 x 8192 entries, prefetched as scalars: twice what SMEM holds."""
    workload = programs.Workload(model="llama-3-70b-on-8", kv_len=131072)
    program = programs.streamed(workload)
    result = lab.compile_for("v5e", program.function, *program.args, kwargs=program.kwargs)
    assert (result.ok, result.error_kind) == (False, "smem overflow")
    assert "2097152 of 1048576 bytes" in result.error


@needs_libtpu
@pytest.mark.parametrize("donate", [True, False])
def test_donation_shows_in_the_hlo(empty_cache, donate):
    cache, row = (
        jax.ShapeDtypeStruct((4096, 8, 128), jnp.float32),
        jax.ShapeDtypeStruct((), "int32"),
    )
    result = lab.compile_for(
        "v5e",
        lab_programs.add_one_row,
        cache,
        row,
        donate_argnums=(0,) if donate else (),
        keep_hlo=True,
    )
    assert result.ok, result.error
    assert result.alias_bytes == (4096 * 4096 if donate else 0)
    assert bool(result.copies_of(cache)) == (not donate)


@needs_libtpu
def test_a_mistake_in_the_function_names_its_place(empty_cache):
    result = lab.compile_for("v5e", lab_programs.broken, ROWS)
    assert not result.ok and "no_such_method" in result.error and "in broken" in result.error


def test_an_error_has_a_place_where_rpa_is_installed_too(tmp_path):
    """Every frame then lies in site-packages; the worker once died of that, on Colab."""
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "rpa").symlink_to(Path(lab.__file__).parents[1], target_is_directory=True)
    order = """if True:
        from functools import partial
        from rpa.lab.compile import worker
        worker.write_answer("a", partial(worker.compile_spec, {}, ()), {"function": "rpa:y"})
    """
    command = [sys.executable, "-c", order]
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    answer = json.loads((tmp_path / "a").read_text())
    assert answer["message"].startswith("KeyError") and "compile_spec" in answer["where"]
    # No path of a machine: such errors are kept in files of the repository.
    assert answer["where"].startswith("rpa/lab/compile/worker.py:")


@needs_libtpu
def test_a_changed_source_is_compiled_anew(empty_cache, monkeypatch):
    (empty_cache / "learner.py").write_text("def double(x):\n    return x * 2\n")
    monkeypatch.syspath_prepend(empty_cache)
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    assert not lab.compile_for("v5e", "learner:double", x).from_cache
    assert lab.compile_for("v5e", "learner:double", x).from_cache
    (empty_cache / "learner.py").write_text("def double(x):\n    return x + x\n")
    assert not lab.compile_for("v5e", "learner:double", x).from_cache


def test_an_edit_while_the_compiler_works_is_compiled_the_next_time(tmp_path, monkeypatch):
    source, answer = tmp_path / "edited_early.py", tmp_path / "answer"
    source.write_text("size = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    compiled = file_hash(source)

    def work():
        source.write_text("size = 2\n")
        return {}

    worker.write_answer(answer, work, {"function": "edited_early:f"})
    assert json.loads(answer.read_text())["files"][str(source)] == compiled != file_hash(source)


def test_without_libtpu_it_says_so(empty_cache, monkeypatch):
    versions = {"jax": "0", "jaxlib": "0", "libtpu": None, "python": "3"}
    monkeypatch.setattr("rpa.lab.compile.compiler.compile_versions", lambda: versions)
    result = lab.compile_for("v5e", lab_programs.copy_rows, ROWS, kwargs={"num_rows": 64})
    assert (result.ok, result.error_kind) == (False, "no libtpu")
    assert not list(empty_cache.rglob("*.json"))


def test_a_function_that_cannot_be_imported_is_refused():
    with pytest.raises(ValueError, match="another process compiles it"):
        lab.compile_for("v5e", lambda x: x, ROWS)


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match="v9"):
        lab.compile_for("v9", lab_programs.copy_rows, ROWS)


MESSAGES = {
    "no peer": "PeerAbsent: v3 is a kernel of tpu-inference",
    "libtpu busy": "Internal error when accessing libtpu multi-process lockfile",
    "unknown chip": "INVALID_ARGUMENT: Invalid TPU external name: TPU7x",
    "old libtpu": "Unsupported version: expected <= 7 but got 8",
    "smem overflow": "Allocation (size=2097152) would exceed memory (size=1048576) :: space=smem",
    "unsupported": "Mosaic failed to compile TPU kernel: unsupported unaligned shape\nat foo",
    "timeout": f"{words.TIMED_OUT} after 3 s",
    "crash": f"{words.DIED} (exit code -11): ",
    "error": "TypeError: no",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_errors_are_put_in_words(kind):
    found, text = words.explain(MESSAGES[kind], "tpu7x", {"libtpu": "0.0.23", "jax": "0.7.2"})
    assert found == kind and text


def test_a_result_without_hlo_cannot_be_asked_for_copies():
    result = lab.CompileResult(chip="v5e", function="m:f", ok=True)
    with pytest.raises(ValueError, match="keep_hlo"):
        result.copies_of(ROWS)


def test_a_missing_file_has_no_hash(tmp_path):
    assert file_hash(tmp_path / "none") is None


@needs_libtpu
def test_command_line(empty_cache, capsys):
    command = ["lab", "compile", "--chip", "v5e", "--kernel", "streamed", "--num-seqs", "2"]
    command += ["--kv-len", "64", "--model", "llama-3-70b-on-8"]
    assert main(command) == 0
    assert "v5e    compiled in" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["from_cache"] and result["function"] == "rpa.streamed:paged_decode"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_programs_name_functions_that_exist_and_take_these_arguments(name, model):
    program = programs.PROGRAMS[name](programs.Workload(model=model, num_seqs=2, kv_len=32))
    module, function = program.function.split(":")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    signature.bind(*program.args, **program.kwargs)


@pytest.mark.parametrize(("kernel", "rows"), [(eight_rows, 8), (sixteen_rows, 16)])
def test_rows_of_a_buffer_are_read_from_where_the_index_says(kernel, rows):
    first = kernel(jnp.array([3]))[:, 0]
    assert first.tolist() == [*range(3 * rows, 4 * rows)]


@needs_libtpu
@pytest.mark.parametrize(("chip", "compiles"), [("v6e", True), ("tpu7x", False)])
def test_half_a_tile_of_bfloat16_is_refused_on_one_chip_only(chip, compiles):
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    result = lab.compile_for(chip, eight_rows, index, kwargs={"interpret": False})
    assert result.ok == compiles and (compiles or "multiple of 16" in result.error)
