"""What the compiler's output means: its errors in words, and facts read from the HLO text."""

import re

TIMED_OUT = "the compiler was ended"
DIED = "the compiler's process died"

KINDS = {
    "no libtpu": None,
    "no peer": r"^PeerAbsent: ",
    "libtpu busy": r"multi-process lockfile|already in use by process",
    "unknown chip": r"Invalid TPU external name|unknown topology|Unsupported TPU (type|topology)",
    "old libtpu": r"Unsupported version: expected",
    "vmem overflow": r"scoped vmem limit|memory space vmem|space=vmem|CompileTimeScopedVmemOom",
    "smem overflow": r"memory space smem|space=smem|CompileTimeSmemOom|scoped smem",
    "hbm overflow": r"CompileTimeHbmOom|memory space hbm|exceeds available HBM",
    "unsupported": r"Mosaic failed|NotImplementedError|LoweringException|not implemented|"
    r"(?i:unsupported|not supported|unimplemented)|multiple of the word size",
    "timeout": TIMED_OUT,
    "crash": re.escape(DIED),
    "error": "",
}
"""Kinds of error, each with the pattern by which it is known; the first that fits is taken."""

PASSING = ("no libtpu", "no peer", "libtpu busy", "timeout", "crash")
"""Kinds that may be gone the next time, so that they are not kept."""


def kind_of(message) -> str:
    """The kind of a compiler's error.

    >>> kind_of("Ran out of memory in memory space vmem while allocating")
    'vmem overflow'
    """
    patterns = {kind: pattern for kind, pattern in KINDS.items() if pattern is not None}
    return next(kind for kind, pattern in patterns.items() if re.search(pattern, message))


def explain(message, chip, versions) -> tuple[str, str]:
    """The kind of an error, and what it means and what to do, with the compiler's own numbers."""
    kind = kind_of(message)
    tpu = f"libtpu {versions['libtpu']}, jax {versions['jax']}"
    text = {
        "no peer": message.removeprefix("PeerAbsent: "),
        "libtpu busy": "Another process holds libtpu, and this version lets one in at a time.",
        "unknown chip": f"{tpu}: this libtpu does not know {chip}; install a newer one, or choose "
        "another chip.",
        "old libtpu": f"{tpu}: this libtpu is too old for modules that this jax lowers without a "
        "TPU; install the libtpu that jax[tpu] asks for.",
        "vmem overflow": f"The kernel needs more VMEM than {chip} gives it: {_vmem(message)}. "
        "Make a block smaller, or raise vmem_limit_bytes if the chip has more.",
        "smem overflow": f"The kernel needs more SMEM than {chip} has: {_smem(message)}. Make "
        "what is prefetched as scalars smaller, or stream it from HBM as rung 8 does.",
        "hbm overflow": f"The program needs more HBM than {chip} has: {_hbm(message)}. Make the "
        "arrays smaller, or donate what is updated in place.",
        "unsupported": f"The compiler for {chip} does not support something here: {_core(message)}",
        "timeout": f"{message}; raise timeout_s.",
        "crash": message,
        "error": message[:3000],
    }
    return kind, text[kind]


def no_libtpu(system, machine) -> tuple[str, str]:
    """Kind and text for a machine without libtpu; `system`, `machine` as `platform` gives them.

    >>> print(no_libtpu("Darwin", "arm64")[1].split(";")[0])
    libtpu exists for Linux on x86-64 only
    """
    if (system, machine) == ("Linux", "x86_64"):
        return "no libtpu", "libtpu is not installed: pip install libtpu."
    return "no libtpu", (
        f"libtpu exists for Linux on x86-64 only; this is {system} on {machine}. "
        "Compile on a Linux machine or in Colab."
    )


def _vmem(message) -> str:
    numbers = re.search(r"allocation with size ([\d.]+\w) and limit ([\d.]+\w)", message)
    return f"{numbers[1]} of {numbers[2]}" if numbers else _core(message)


def _smem(message) -> str:
    numbers = re.search(r"size=(\d+)\) would exceed memory \(size=(\d+)\)", message)
    return f"{numbers[1]} of {numbers[2]} bytes" if numbers else _core(message)


def _hbm(message) -> str:
    wanted = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message)
    wanted = wanted or re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    return f"{wanted[1]} of {wanted[2]}" if wanted else _core(message)


def _core(message) -> str:
    """The part of a long message that says what is wrong, without the program that it quotes."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"(?i)error|not|unsupported|must|failed", line)]
    return " | ".join((telling or lines)[:4])[:1500]


def kernels_in_hlo(hlo) -> list[tuple[str, int, int | None]]:
    """Name, VMEM used and VMEM asked for (bytes) of every Pallas kernel in the HLO text."""
    found = []
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name = re.search(r"%?([\w.-]+) = ", line)[1]
        found.append((name, _memory(line, "used_scoped_memory_configs") or 0, _memory(line, None)))
    return found


def _memory(line, key) -> int | None:
    """Bytes of memory space 1 (VMEM) in one of the two lists of a kernel's backend_config."""
    key = key or r'"scoped_memory_configs'
    entry = re.search(key + r'":\[[^]]*"memory_space":"1"[^]}]*"size":"(\d+)"', line)
    return int(entry[1]) if entry else None


def without_bodies(hlo) -> str:
    """The HLO text without the kernels' serialized bodies, which are most of it.

    >>> without_bodies('custom_call_config":{"body":"TUzvUg==","needs":true}')
    'custom_call_config":{"body":"","needs":true}'
    """
    return re.sub(r'"body":"[^"]*"', '"body":""', hlo)


HLO_TYPES = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float8_e4m3fn": "f8e4m3fn",
    "float8_e5m2": "f8e5m2",
    "int32": "s32",
}


def copies_in_hlo(hlo, shape, dtype) -> list[str]:
    """Lines that copy an array of this shape and dtype.

    >>> copies_in_hlo("  %c = f32[2,3]{1,0} copy(%x)", (2, 3), "float32")
    ['%c = f32[2,3]{1,0} copy(%x)']
    """
    wanted = f"{HLO_TYPES[str(dtype)]}[{','.join(str(n) for n in shape)}]"
    pattern = re.escape(wanted) + r"\S*(, .*)? (copy|copy-start|copy-done)\("
    return [line.strip() for line in hlo.splitlines() if re.search(pattern, line)]
