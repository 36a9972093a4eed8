"""What happens to the sandbox's process is never the learner's mistake, and never the next one's.

Most functions here are called as they are: what they do to the process has nothing to do with a
kernel. `right` runs after each of them.
"""

import contextlib
import operator
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import rpa.check
from rpa.check import engine
from rpa.check.errors import CheckFailed, KernelFault, SandboxFailed
from rpa.check.exercise import Exercise
from rpa.check.sandbox import process, worker

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals are POSIX's")


def run(function, limit_s=60.0):
    return process.in_sandbox()(operator.call, function, (), limit_s)


def right():
    return 42


@pytest.fixture(autouse=True)
def known_to_nobody(monkeypatch):
    # As in a notebook: no module of this name can be imported in the other process.
    monkeypatch.delitem(sys.modules, __name__)


@pytest.fixture(autouse=True)
def the_next_one_is_right():
    yield
    assert run(right) == 42


# --- What a learner's function can do -------------------------------------------------------------


def exits():
    sys.exit(3)


def interrupts():
    raise KeyboardInterrupt


def raises_what_has_no_text():
    class Mute(Exception):
        def __str__(self):
            raise ValueError("no words")

    raise Mute


def asks():
    return input("your name? ")


def takes_too_much_memory():
    return len(bytearray(1 << 47))


def returns_a_function():
    return lambda: 1


def returns_what_only_it_knows():
    global Mine  # a class of the worker's module

    class Mine:
        pass

    return Mine()


def ends_the_process():
    os._exit(0)


def crashes():
    os.abort()


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


REFUSED = [
    (exits, KernelFault, "Your function raises SystemExit: 3"),
    (interrupts, KernelFault, "Your function raises KeyboardInterrupt"),
    (raises_what_has_no_text, KernelFault, r"Mute: \(str\(\) of it raises ValueError\)"),
    (asks, KernelFault, "Your function raises EOFError"),
    (takes_too_much_memory, KernelFault, "Your function raises MemoryError"),
    (returns_a_function, KernelFault, "cannot be sent"),
    (returns_what_only_it_knows, KernelFault, "cannot be sent"),
    (ends_the_process, KernelFault, "ended the process that it ran in"),
    (is_killed, SandboxFailed, "That is not a mistake of your function"),
    pytest.param(crashes, KernelFault, "ended the process", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("function", "error", "words"), REFUSED)
def test_what_a_function_does_to_its_process_is_said_in_words(function, error, words):
    with pytest.raises(error, match=words):
        run(function)


def closes_standard_input():
    sys.stdin.close()
    with contextlib.suppress(OSError):  # a function runs twice, in two modes
        os.close(0)
    return 1


def writes_past_sys_stdout():
    for descriptor in (1, 2):
        os.write(descriptor, b"*" * 100_000)
    return 1


def leaves_a_child():
    if os.fork() == 0:
        time.sleep(600)
    return 1


def leaves_a_thread():
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return 1


@pytest.mark.parametrize(
    "function", [closes_standard_input, writes_past_sys_stdout, leaves_a_child, leaves_a_thread]
)
def test_what_does_no_harm_is_let_through(function):
    assert run(function) == 1


def prints_without_end():
    for _ in range(50):
        print("*" * 1_000_000)
    return 1


def test_output_without_end_is_cut_and_that_is_said(capsys):
    assert run(prints_without_end) == 1
    printed = capsys.readouterr().out
    assert len(printed) < worker.LONGEST_OUTPUT + 100
    assert "... and 49,980,050 more characters, not shown here" in printed


def test_the_same_in_this_process_is_said_too():
    """Chapters 0 to 4 run functions here: what ends a process is refused like any exception."""
    exercise = Exercise("9.1", reference=right)
    exercise.case("no arguments")
    with pytest.raises(CheckFailed, match="Your function raises SystemExit: 3"):
        engine.check_exercise(exercise, exits)
    with pytest.raises(CheckFailed, match=r"Mute: \(str\(\) of it raises"):
        engine.check_exercise(exercise, raises_what_has_no_text)


# --- What others do to the worker -----------------------------------------------------------------


def never_ends():
    while True:
        pass


def slow():
    time.sleep(1.0)
    return 42


def pid():
    return os.getpid()


def stop_button(delay_s):
    """SIGINT for this process, as the Stop button sends it, after a while."""
    main = threading.main_thread().ident
    threading.Timer(delay_s, signal.pthread_kill, (main, signal.SIGINT)).start()


def rarely(*values):
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


@pytest.mark.parametrize("delay_s", [0.3, *rarely(0.02, 0.1, 1.0, 3.0)])
def test_an_interrupted_check_ends_its_job(delay_s):
    before = run(pid)
    with pytest.raises(KeyboardInterrupt):
        stop_button(delay_s)
        run(never_ends, limit_s=30.0)
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


def test_no_check_counts_an_attempt_where_the_learner_is_not_at_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("RPA_PROGRESS", str(tmp_path / "kept.json"))

    def no_worker(*_):
        raise SandboxFailed("no worker")

    def interrupted(*_):
        raise KeyboardInterrupt

    for runner, error in [(no_worker, SandboxFailed), (interrupted, KeyboardInterrupt)]:
        monkeypatch.setattr(engine.find_exercise("5.1"), "runner", runner)
        with pytest.raises(error):
            rpa.check("5.1", right)
    assert not (tmp_path / "kept.json").exists()


@pytest.mark.parametrize("delay_s", [0.5, *rarely(0.0, 0.1, 0.99, 1.0, 1.01)])
def test_a_worker_that_is_killed_at_any_moment_is_replaced(delay_s):
    timer = threading.Timer(delay_s, os.kill, (run(pid), signal.SIGKILL))
    timer.start()
    assert run(slow) == 42
    timer.join()


def test_a_worker_that_died_idle_is_replaced():
    os.kill(run(pid), signal.SIGTERM)
    time.sleep(0.2)
    assert run(right) == 42


def test_the_worker_has_a_session_of_its_own():
    """So the signal that a notebook sends to all of its processes does not reach it."""
    assert os.getsid(run(pid)) != os.getsid(0)


def test_an_answer_to_an_older_question_is_dropped():
    mine = process._worker()
    mine._number -= 1  # as if the last question had never been read
    assert run(right) == 42 and mine._number >= 1


def number(n):
    return n


def test_threads_that_ask_at_once_get_their_own_answers():
    got = {}

    def ask(n):
        got[n] = process.in_sandbox()(operator.call, number, (n,), 60.0)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {n: n for n in range(8)}


def test_the_worker_ends_with_the_process_that_started_it():
    """Also in the middle of a job: here the parent is killed while its worker is in a loop."""
    program = (
        "import operator, os, sys\n"
        "from rpa.check.sandbox import process\n"
        "def spin():\n"
        "    while True: pass\n"
        "import linecache\n"
        "source = 'def spin():\\n    while True: pass\\n'\n"
        "linecache.cache['cell'] = (len(source), None, source.splitlines(True), 'cell')\n"
        "exec(compile(source, 'cell', 'exec'))\n"
        "print(process._worker()._process.pid, flush=True)\n"
        "process.in_sandbox()(operator.call, spin, (), 600.0)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    time.sleep(6.0)
    parent.kill()
    parent.wait()
    for _ in range(100):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 0)
            time.sleep(0.1)
            continue
        return
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the worker outlives its parent")


def test_a_working_folder_that_is_gone_does_not_matter(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    process._worker()._restart()
    assert run(right) == 42


def test_a_worker_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(process, "_environment", lambda: os.environ | {"PYTHONPATH": "/nowhere"})
    monkeypatch.setattr(sys, "executable", sys._base_executable)  # no jax, no rpa there
    process._worker()._restart()
    with pytest.raises(SandboxFailed, match="does not start: ModuleNotFoundError"):
        run(right)
    monkeypatch.undo()
    process._worker()._restart()


# --- In a real notebook ---------------------------------------------------------------------------

CELLS = {
    "setup": """
import os, signal, sys
os.environ["RPA_PROGRESS"] = "kept.json"
import jax
from jax.experimental.pallas import tpu as pltpu
import rpa
from rpa.check import sandbox
from rpa.check.sandbox import process

def spins(x_ref, out_ref, buffer_ref, sem):
    while True: pass

def double_kernel(x_ref, out_ref, buffer_ref, sem):
    copy_in = pltpu.make_async_copy(x_ref, buffer_ref, sem)
    copy_in.start()
    copy_in.wait()
    buffer_ref[...] = 2 * buffer_ref[...]
    copy_out = pltpu.make_async_copy(buffer_ref, out_ref, sem)
    copy_out.start()
    copy_out.wait()

sandbox.start()
rpa.check("5.1", double_kernel)
os.remove("kept.json")
""",
    "hangs": 'rpa.check("5.1", spins)',
    "right": 'rpa.check("5.1", double_kernel)',
    "kept": 'print(open("kept.json").read())',
}


@pytest.mark.filterwarnings("ignore")
def test_the_stop_button_of_a_notebook(tmp_path):
    """Pressed while nothing runs, and while a check runs; the next check is right at once."""
    manager = pytest.importorskip("jupyter_client").KernelManager()
    # JAX_PLATFORMS and PYTHONPATH are inherited.
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def execute(cell, stop_after_s=None):
        printed = []

        def take(message):
            content = message["content"]
            printed.append(content.get("text") or "\n".join(content.get("traceback", [])))

        timer = threading.Timer(stop_after_s or 0.0, manager.interrupt_kernel)
        if stop_after_s is not None:
            timer.start()
        client.execute_interactive(CELLS[cell], output_hook=take, timeout=120)
        return "".join(printed)

    try:
        assert "double_kernel is right" in execute("setup")
        manager.interrupt_kernel()  # to the process group
        time.sleep(0.5)
        assert "KeyboardInterrupt" in execute("hangs", stop_after_s=2.0)
        assert "double_kernel is right" in execute("right")
        assert '"attempts": 1' in execute("kept")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
