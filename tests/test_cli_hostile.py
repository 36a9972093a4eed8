"""The command line under users: wrong values, Ctrl-C, closed pipes, full disks, odd homes."""

import argparse
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rpa.__main__ import COMMANDS, main
from rpa.cli import lab, outcome
from rpa.lab.bench.tables.table import Table, rows_of
from rpa.lab.compile import compiler

ROOT = Path(__file__).parents[1]

# --- Wrong values -----------------------------------------------------------------------------

BAD = ("", "x", "-1", "0", "1.5", "nan", "inf", "1e400", "9" * 30, "1,2", "/nowhere/x.png", "\x00")
BAD += ("0x1/5", "1x0/0", "1x6/5", "99999999x1/9", "1x1", "float64", "é\u2028")

PLACES = {
    (name,): module for name, (module, _) in COMMANDS.items() if name != "lab"
} | {("lab", name): f"rpa.cli.{name}" for name in lab.EXPERIMENTS}  # fmt: skip


def options_of(module):
    parser = argparse.ArgumentParser()
    importlib.import_module(module).add_arguments(parser)
    return [o for o in parser._actions if o.option_strings and o.nargs != 0]


def required(module, but):
    """Good values of what must be given."""
    good = {"chip": "v5e", "case": "decode", "kernel": "kernel", "against": "v3"}
    return [
        text
        for option in options_of(module)
        if option.required and option is not but and option.dest != but.dest
        for text in (option.option_strings[0], good[option.dest])
    ]


WALK = [
    pytest.param(place, option.option_strings[0], id=" ".join([*place, option.option_strings[0]]))
    for place, module in PLACES.items()
    for option in options_of(module)
]


@pytest.mark.parametrize(("place", "option"), WALK)
def test_every_option_takes_or_refuses_every_value_in_words(
    place, option, monkeypatch, capsys, tmp_path
):
    """What is taken would run; here it only says so."""
    monkeypatch.chdir(tmp_path)  # a folder may have any name
    module = PLACES[place]
    monkeypatch.setattr(importlib.import_module(module), "main", lambda args: 0)
    action = next(o for o in options_of(module) if option in o.option_strings)
    group = ["--kernel", "kernel"] if place == ("lab", "compile") and action.dest not in (
        "kernel", "against") else []  # fmt: skip
    if place == ("lab", "chip") and action.dest in ("chip", "first"):
        group = ["--selftest"]
    for value in BAD:
        try:
            code = main([*place, *required(module, action), *group, f"{option}={value}"])
        except SystemExit as ended:
            code = ended.code
            words = capsys.readouterr().err
            assert f"error: argument {option}" in words and "Traceback" not in words
        assert code in (0, 2)
        if (action.choices or action.type) and option != "--out":
            assert code == 2 or value in ("0", "1.5"), f"{option}={value!r} is taken"


def good_or_in_words(command, capsys):
    try:
        code = main(command)
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert code in (0, 1, 2) and "Traceback" not in err
    found = json.loads(out)
    assert isinstance(found, dict) and (code != 2 or set(found) == {"error"})
    return code, found


EDGES = {
    "--batch": ("1x0/1", "1x1/1", "1x7/7,3x0/9", "300x1/1", "1x1/99999999"),
    "--page-size": ("1", "3", "7", "65536", "65537"),
    "--kv-dtype": ("float8_e5m2", "float32", "int8"),
    "--dtype": ("float32", "float8_e4m3fn"),
    "--model": ("head-dim-256", "llama"),
}


@pytest.mark.parametrize("experiment", ["roofline", "traffic"])
def test_what_is_taken_runs_or_is_refused_in_words(experiment, capsys):
    known = {o.option_strings[0] for o in options_of(f"rpa.cli.{experiment}")}
    for option in EDGES.keys() & known:
        for value in EDGES[option]:
            batch = [] if option == "--batch" else ["--batch", "2x1/40"]
            good_or_in_words(["lab", experiment, *batch, option, value, "--json"], capsys)


@pytest.mark.parametrize("words", [["lab"], ["lab", "nothing"], ["nothing"], [], ["doctor", "--x"]])
def test_wrong_commands_are_one_object_too(words, capsys):
    code, found = good_or_in_words([*words, "--json"], capsys)
    assert code == 2 and found["error"]


# --- How a command ends -----------------------------------------------------------------------


@pytest.mark.parametrize("error", [*outcome.EXPECTED, FileNotFoundError, UnicodeDecodeError])
def test_what_is_to_be_expected_is_a_sentence(error, capsys, monkeypatch):
    decoding = ("utf-8", b"", 0, 1) if error is UnicodeDecodeError else ()
    arguments = (*decoding, "no such thing")

    @outcome.in_words
    def command(argv):
        raise error(*arguments)

    assert command([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rpa: ") and err.count("\n") == 1 and "no such thing" in err
    assert command(["--json"]) == 2
    assert "no such thing" in json.loads(capsys.readouterr().out)["error"]
    monkeypatch.setenv(outcome.TRACEBACK, "1")
    with pytest.raises(error):
        command([])


def test_a_mistake_of_ours_keeps_its_traceback():
    @outcome.in_words
    def command(argv):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        command([])


def test_ctrl_c_is_one_line(capsys):
    @outcome.in_words
    def command(argv):
        raise KeyboardInterrupt

    assert command([]) == 130
    assert capsys.readouterr().err == "Stopped.\n"


SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def interrupt_soon():
    main_thread = threading.main_thread().ident
    threading.Timer(1.0, signal.pthread_kill, (main_thread, signal.SIGINT)).start()


def seen_while_running():
    """Collects the compilers' processes as they come."""
    seen = set()

    def look():
        for _ in range(80):
            seen.update(list(compiler._running))
            time.sleep(0.01)

    threading.Thread(target=look).start()
    return seen


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals are POSIX's")
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_the_compilers(workers):
    """Waited for by this thread, or by those of a table."""

    def cell(n):
        compiler._wait_for(SLEEP, os.environ, 600.0)
        return {}

    seen, start = seen_while_running(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupt_soon()
        if workers:
            list(rows_of(Table("t", "", {}, None, cell), [{"n": n} for n in range(9)], workers))
        else:
            cell(0)
    assert time.monotonic() - start < 60
    assert len(seen) == max(1, workers) and all(p.poll() is not None for p in seen)
    assert not compiler._running


def run(*words, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, "-m", "rpa", *words],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def test_a_version_is_one_line():
    done = run("--version")
    assert done.returncode == 0 and done.stdout.startswith("rpa ") and not done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = run("lab", "roofline", stdout=full)
    assert done.returncode == 2
    assert done.stderr == f"rpa: [Errno {errno.ENOSPC}] No space left on device\n"


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    done = run("lab", "roofline", stdout=writer)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


def test_an_ascii_terminal_is_good_enough():
    done = run("doctor", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0 and "Traceback" not in done.stderr and done.stdout


# --- Results that cannot be kept --------------------------------------------------------------

ANSWER = {"trace_time_s": 1.0, "compile_time_s": 2.0, "trace_cpu_s": 1.0, "compile_cpu_s": 2.0}
ANSWER |= {"argument_bytes": 1, "output_bytes": 2, "alias_bytes": 3, "temp_bytes": 4, "hlo": ""}


@pytest.fixture
def asked(monkeypatch):
    """How often the compiler was asked; it answers at once."""
    asked = []

    def answer(*_):
        asked.append(1)
        return ANSWER | {"files": {}}

    monkeypatch.setattr(compiler, "ask_worker", answer)
    monkeypatch.setattr(compiler, "compile_versions", lambda: dict.fromkeys(("jax", "libtpu"), "1"))
    for cached in (compiler._cache_in, compiler._temporary_folder, compiler._say_once):
        cached.cache_clear()
    return asked


def compile_it():
    result = compiler.compile_for("v5e", "rpa.dense:attention")
    assert result.ok and result.temp_bytes == 4
    return result


def a_file_in_its_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def a_folder_that_takes_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1")


def no_home_and_no_entry_in_passwd(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)


def a_nul_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/tmp/\x00"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


HOMES = (a_file_in_its_place, no_home_and_no_entry_in_passwd, a_nul_in_its_name)
HOMES += (a_folder_that_takes_no_files,)


@pytest.mark.parametrize("home", HOMES, ids=lambda home: home.__name__)
def test_a_result_that_cannot_be_kept_is_still_a_result(home, tmp_path, monkeypatch, asked, capsys):
    home(tmp_path, monkeypatch)
    compile_it()
    assert compile_it().from_cache and len(asked) == 1, "kept as long as this process"
    assert capsys.readouterr().err.count("is not kept for the next time") == 1


def test_a_disk_that_is_full_keeps_nothing(tmp_path, monkeypatch, asked, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "write_text", full)
    compile_it(), compile_it()
    assert len(asked) == 2
    assert capsys.readouterr().err.count("No space left on device") == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"format": 2}',
     b'{"format": 2, "files": 3}', b'{"format": 2, "files": {}, "result": {}}',
     b'{"format": 2, "files": {}, "result": {"kernels": 3}}',
     b'{"format": 2, "files": {}, "result": {"kernels": [], "new": 1}}',
     b'{"files": {}, "result": {"kernels": []}}', b'{"format": 1, "files": {}, "result": {}}'],
)  # fmt: skip
def test_what_another_program_left_in_the_cache_is_ignored(content, tmp_path, monkeypatch, asked):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_it()
    (entry,) = compiler.cache_dir().glob("*.json")
    assert compile_it().from_cache
    entry.write_bytes(content)
    assert not compile_it().from_cache and len(asked) == 2
    assert compile_it().from_cache


def test_a_folder_in_place_of_an_entry_is_ignored(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_it()
    (entry,) = compiler.cache_dir().glob("*.json")
    entry.unlink()
    entry.mkdir()
    assert not compile_it().from_cache and not compile_it().from_cache


def test_the_key_of_an_entry_holds_the_format(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_it()
    monkeypatch.setattr(compiler, "FORMAT", compiler.FORMAT + 1)
    assert not compile_it().from_cache
    assert len(list(compiler.cache_dir().glob("*.json"))) == 2


def test_an_entry_of_another_format_is_ignored(tmp_path):
    entry = tmp_path / "entry.json"
    compiler.write_kept(entry, {"files": {}})
    assert compiler.read_kept(entry) is not None
    kept = json.loads(entry.read_text(encoding="utf-8"))
    entry.write_text(json.dumps(kept | {"format": compiler.FORMAT - 1}), encoding="utf-8")
    assert compiler.read_kept(entry) is None
