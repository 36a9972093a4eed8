"""The race: one step of a server, every rung of the ladder, and the peers beside it.

    from rpa.lab.bench import comparison

    for row in comparison.recorded()["rows"]: ...      # what the repository ships
    comparison.run_row("streamed", chips=("v5e",))     # the same, computed now

The step is 16 decodes of real lengths (`rpa.traces`), one layer of Llama 3 8B in bfloat16, pages of
128. For each kernel: the lines of code that somebody has to read, the HBM bytes that it moves
(`rpa.lab.copies.traffic`, its own transfers), and the time that its schedule takes with its waits
(`rpa.lab.predict`: predicted, not measured). Where there is no schedule (plain JAX, and the kernel
that jax ships), its bytes at HBM's peak are a time that it cannot beat.
"""

import ast
import functools
import importlib.util
import io
import json
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax

from rpa import chips, interpreter, ladder, traces
from rpa.lab import peers
from rpa.lab.batches import make_batch, metadata_of
from rpa.lab.compile.compiler import compile_versions
from rpa.lab.compile.functions import load
from rpa.lab.copies import traffic
from rpa.lab.predict.calibration import AT_PEAK, FITTED, range_us
from rpa.lab.schedule.cases import measure
from rpa.lab.schedule.execution import CHIPS
from rpa.lab.schedule.pallas_calls import pallas_calls
from rpa.lab.schedule.schedule import schedule_for
from rpa.lab.schedule.values import CannotRun
from rpa.ragged import RaggedBatch
from rpa.shapes import AttentionShape

LAYER = AttentionShape.of("llama-3-8b", page_size=128)
PACKAGE = Path(__file__).parents[2]
RECORD = PACKAGE / "data" / "comparison.json"
PAGES_PER_SEQ = 128
"""Room for 16,384 tokens per sequence, as a server has it; few sequences use it."""


def decode_step() -> RaggedBatch:
    """The step of the race: 16 decodes whose lengths are those of real conversations.

    >>> decode_step().kv_lens[:4].tolist()
    [4104, 441, 1524, 464]
    """
    context, generated = traces.sample_requests(16, seed=10)
    kv_lens = context + generated // 2  # in the middle of their answers
    room = PAGES_PER_SEQ * LAYER.page_size
    lengths = [(1, int(min(kv_len, room))) for kv_len in kv_lens]
    return make_batch(lengths, LAYER.page_size, pages_per_seq=PAGES_PER_SEQ)


@dataclass(frozen=True)
class Racer:
    """A kernel in the race.

    Attributes:
        title: what the table calls it.
        code: its file or folder, or "module:..." of a peer.
        schedule: "module:function" to compile, with the arrays of the step and a `RaggedBatch`
            ("batch") or its four arrays ("metadata") behind them; None if plain JAX does the work.
        takes: "batch" or "metadata".
        kwargs: further arguments, what JSON can hold; `chip` is added for peers.
        kernel: pattern of the name of the kernel that runs a decode.
        flags: further flags of the compiler.
    """

    title: str
    code: str
    schedule: str | None = None
    takes: str = "batch"
    kwargs: tuple = ()
    kernel: str = ""
    flags: str = ""


COMPILED = (("interpret", False),)
RACERS = {
    "dense": Racer("1 dense", "dense.py"),
    "paging": Racer("2 paging", "paging.py"),
    "ragged": Racer("3 ragged", "ragged.py"),
    "tiled": Racer("4 tiled", "tiled.py"),
    "streamed": Racer("5 streamed", "streamed.py", "rpa.streamed:attention", kwargs=COMPILED),
    "fused": Racer("6 fused", "fused.py", "rpa.fused:attention", kwargs=COMPILED),
    "plain": Racer("7 plain", "plain.py", "rpa.plain:attention", kwargs=COMPILED),
    "kernel": Racer(
        *("8 kernel", "kernel", "rpa.kernel.api:ragged_paged_attention", "metadata"),
        *((("backend", "tpu"),), "^rpa_decode$"),
    ),
    "yours": Racer("yours", "yours/reference.py", "rpa.yours.reference:ragged_attention"),
    "v3": Racer("v3", peers._V3, "rpa.lab.peers:v3", "metadata", kernel="^RPAd"),
    "batched": Racer(
        *("batched", "tpu_inference.kernels.experimental.batched_rpa", "rpa.lab.peers:batched"),
        *("metadata",),
        kernel="^RPAd",
        flags=peers.COMPILER_FLAGS,
    ),
    "jax": Racer("jax v2", peers._JAX + "kernel"),
}
"""By name: the rungs from the bottom, what the course's learner writes, then the peers.

*yours* is the kernel that grows in chapters 4 to 7, as its reference solutions have it."""

DECODE_ONLY = ("streamed", "fused")
"""Rungs that refuse the challenge, which has a chunk of a prompt in it."""
CHALLENGERS = ("plain", "kernel", "yours", "v3")
"""Kernels whose time for the challenge is predicted: one that is faster has to beat these."""


def challenge_step() -> RaggedBatch:
    """The step of the open challenge: what the production kernels read more often than they must.

    Eight decodes whose first 1,024 tokens are the same pages (a system prompt), seven decodes of
    their own, and a chunk of 512 tokens behind 1,536 cached ones.

    >>> batch = challenge_step()
    >>> batch.distribution.tolist(), int(batch.num_seqs)
    ([15, 15, 16], 16)
    """
    lengths = [(1, 1100 + 100 * s) for s in range(8)]
    lengths += [(1, 300 + 90 * s) for s in range(7)] + [(512, 2048)]
    batch = make_batch(lengths, LAYER.page_size, pages_per_seq=16)
    table = batch.page_indices.reshape(16, -1)
    table[1:8, : 1024 // LAYER.page_size] = table[0, : 1024 // LAYER.page_size]
    return batch


def challenge_least_bytes() -> int:
    """HBM bytes that the challenge takes at least: every page once, whoever shares it."""
    batch, shared = challenge_step(), 7 * 1024
    return sum(traffic.least(batch, LAYER).values()) - shared * LAYER.token_bytes


def run_row(name, chips_=CHIPS) -> dict:
    """Everything about one racer, computed now; a row of the record.

    Args:
        name: of RACERS.
        chips_: for which to predict.

    Raises:
        rpa.lab.peers.PeerAbsent: if it is a peer that is not installed.
        rpa.lab.schedule.NoSchedule: if it does not compile.
    """
    racer, batch = RACERS[name], decode_step()
    row = {"name": name, "title": racer.title, "lines": lines_of_code(racer.code)}
    row |= {"num_bytes": None, "challenge_bytes": None}
    row |= {"time_us": {}, "bundles": {}, "challenge_us": {}}
    for chip in chips_ if racer.schedule else ():
        predicted = predict(racer, chip, batch)
        row["num_bytes"] = predicted.hbm_bytes  # of its schedule; the traffic below is finer
        row["time_us"][chip], row["bundles"][chip] = predicted.time_us, predicted.bundles
        if name in CHALLENGERS:
            row["challenge_us"][chip] = challenge_us(racer, chip)
    function = {"jax": _jax_v2, "yours": racer.schedule}.get(name, name)
    if name in (*traffic.RUNGS, "jax", "yours"):
        row["num_bytes"] = traffic.count(function, batch, LAYER).num_bytes
        if name not in DECODE_ONLY:
            row["challenge_bytes"] = traffic.count(function, challenge_step(), LAYER).num_bytes
    return row


def _jax_v2(queries, keys, values, kv_cache, batch, **options):
    """The kernel that jax ships: its cache has combined heads in one axis, the same bytes."""
    combined = kv_cache.reshape(*kv_cache.shape[:2], -1, kv_cache.shape[-1])
    arrays = (queries, keys, values, combined)
    return peers.jax_v2(*arrays, *metadata_of(batch), chip="v6e", **options)


def arguments(racer: Racer, batch) -> tuple:
    """Shapes of the step's arrays, and its metadata, as a racer takes them."""
    num_tokens = int(batch.cu_q_lens[-1])
    num_pages = len(batch.page_indices)
    cache_shape = LAYER.cache_shape(num_pages)
    heads = (LAYER.num_q_heads, LAYER.num_kv_heads, LAYER.num_kv_heads)
    arrays = [jax.ShapeDtypeStruct((num_tokens, h, LAYER.head_dim), LAYER.dtype) for h in heads]
    cache = jax.ShapeDtypeStruct(cache_shape, LAYER.kv_dtype)
    metadata = (batch,) if racer.takes == "batch" else metadata_of(batch)
    return *arrays, cache, *metadata


def predict(racer: Racer, chip, batch, timeout_s=1200.0) -> "Predicted":
    """A racer's decode kernel on a chip: predicted; timeout_s as in `predict_kernel`."""
    args = arguments(racer, batch)
    kwargs = dict(racer.kwargs) | {"sm_scale": LAYER.head_dim**-0.5}
    if racer.takes == "metadata":
        kwargs["chip"] = chip
    return predict_kernel(
        *(racer.schedule, args, kwargs, racer.kernel, chip, timeout_s), flags=racer.flags
    )


def challenge_us(racer: Racer, chip) -> float:
    """Microseconds of all of a racer's kernels for the challenge's step, predicted at peak."""
    args = arguments(racer, challenge_step())
    kwargs = dict(racer.kwargs) | {"sm_scale": LAYER.head_dim**-0.5}
    if racer.takes == "metadata":
        kwargs["chip"] = chip
    if racer.schedule == "rpa.lab.peers:v3":  # or it asks the attached device while it is traced
        kwargs["vmem_limit_bytes"] = chips.chip(chip).vmem_bytes
    return predict_step(racer.schedule, args, kwargs, chip, flags=racer.flags)[0]


def predict_step(function, args, kwargs, chip, *, flags="") -> tuple[float, int]:
    """Microseconds at peak, and bundles, of all kernels of a function together.

    Args:
        function, args, kwargs, chip, flags: as `predict_kernel` takes them.

    Raises:
        CannotRun: if it calls no Pallas kernel, or as `predict_kernel`.
        NoSchedule: as `predict_kernel`.
    """
    with interpreter.compiled():
        names = kernel_names(load(function), *args, **kwargs)
    if not names:
        raise CannotRun("it is plain JAX, and schedules are read of Pallas kernels alone")
    patterns = [f"^{re.escape(name)}$" for name in names] if len(names) > 1 else [""]
    found = [predict_kernel(function, args, kwargs, p, chip, flags=flags) for p in patterns]
    return sum(one.time_us for one in found), sum(one.bundles for one in found)


class Predicted(NamedTuple):
    """One kernel on one chip: microseconds at peak, bundles, HBM bytes of its own copies; and the
    calibrated time with its range (`rpa.lab.predict.calibration`)."""

    time_us: float
    bundles: int
    hbm_bytes: int
    calibrated_us: float
    low_us: float
    high_us: float


def predict_kernel(
    function, args, kwargs, kernel, chip, timeout_s=1200.0, *, flags=""
) -> Predicted:
    """How long one kernel of a function takes: predicted from its schedule.

    Args:
        function: "module:function".
        args: its arguments: shapes, and integer arrays with values.
        kwargs: static keyword arguments, what JSON can hold.
        kernel: pattern that finds exactly one of its kernels.
        chip: anything that `rpa.chips.chip` knows.
        timeout_s: end the compiler after this many seconds; some of the older ones need minutes.
        flags: further flags of the compiler.

    Raises:
        rpa.lab.schedule.NoSchedule: if it does not compile, or not in time.
        rpa.lab.schedule.execution.CannotRun: if its schedule cannot be executed.
    """
    known = chips.chip(chip)
    schedule = schedule_for(
        *(known.name, function, *args),
        kwargs=kwargs,
        kernel=kernel,
        timeout_s=timeout_s,
        flags=flags,
    )
    run = schedule.execute(*args, keep_events=True)
    at_peak_us, calibrated_us = (float(c.time_us([run], known)) for c in (AT_PEAK, FITTED))
    ends_us = range_us([run], known)
    return Predicted(at_peak_us, run.bundles, run.hbm_bytes, calibrated_us, *ends_us)


def kernel_names(function, *args, **kwargs) -> list[str]:
    """Names of the Pallas kernels that a function calls, in order."""
    closed = jax.make_jaxpr(functools.partial(function, **kwargs))(*args)
    return [call.name for call in pallas_calls(closed)]


def hbm_us(num_bytes, chip) -> float:
    """Microseconds that bytes take at a chip's peak bandwidth.

    >>> round(hbm_us(819_000, "v5e"), 2)
    1.0
    """
    return num_bytes / chips.chip(chip).hbm_bytes_per_s * 1e6


def least_us(chip) -> float:
    """Microseconds that no kernel can beat in the race: every byte once, at peak bandwidth."""
    return hbm_us(sum(traffic.least(decode_step(), LAYER).values()), chip)


def prefill_chunks() -> list[dict]:
    """Bundles of 128 query x 512 KV tokens in a prefill, rung 8 and v3, beside the MATMUL floor."""
    rows = []
    for chip in CHIPS:
        for name, kernel in (("8 kernel", "rpa"), ("v3", "v3")):
            found = measure(kernel, "mixed", chip)
            bundles = round(found.bundles_per_chunk)
            rows.append({"title": name, "chip": chip, "bundles": bundles, "floor": found.floor})
    return rows


def lines_of_code(where) -> int | None:
    """Lines that do something: no blank ones, no comments, no docstrings; None if it is absent.

    Args:
        where: a file or folder of `rpa`, or a module or package by its dotted name.

    >>> lines_of_code("fused.py") < lines_of_code("kernel")
    True
    """
    path = PACKAGE / where
    if not path.exists():
        path = _file_of(where)
    if path is None:
        return None
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return sum(count_code(file.read_text(encoding="utf-8")) for file in files)


def _file_of(module) -> Path | None:
    """File or folder of a module that is installed; nothing of it is imported."""
    root, *rest = module.split(".")
    spec = importlib.util.find_spec(root)
    if spec is None:
        return None
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    return path if path.is_dir() else path.with_suffix(".py")


def count_code(text) -> int:
    """Lines of code of a Python source.

    >>> count_code("'A docstring.'\\n\\n# a comment\\nx = 1\\n")
    1
    """
    idle = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    idle |= {tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in idle:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def recorded() -> dict:
    """What `python -m rpa lab compare --record` wrote: rows, prefill, least, versions.

    >>> recorded()["rows"][0]["title"]
    '1 dense'
    """
    return json.loads(RECORD.read_text(encoding="utf-8"))


def record(rows, prefill) -> dict:
    """The record of these rows, of `prefill_chunks()`, and of what they were made with."""
    batch = decode_step()
    return {
        "versions": compile_versions() | {"tpu-inference": peers.PEER_VERSION},
        "kv_lens": ladder.kv_lens_of(batch).tolist(),
        "least_bytes": sum(traffic.least(batch, LAYER).values()),
        "challenge_least_bytes": challenge_least_bytes(),
        "least_us": {chip: least_us(chip) for chip in CHIPS},
        "rows": rows,
        "prefill": prefill,
    }


def table(found) -> str:
    """The race as text.

    Args:
        found: `recorded()`, or a record made now.
    """
    heads = "".join(f"{chip:>9}" for chip in CHIPS)
    lines = [f"{'':12}{'lines':>7}{'MB moved':>10}{'of least':>9}  predicted us:{heads}"]
    for row in found["rows"]:
        times = "".join(f"{_time(row, chip):>9}" for chip in CHIPS)
        code = "-" if row["lines"] is None else f"{row['lines']:,}"
        ratio = f"{row['num_bytes'] / found['least_bytes']:.2f}"
        lines.append(
            f"{row['title']:12}{code:>7}{row['num_bytes'] / 1e6:>10,.1f}{ratio:>9}  {'':13}{times}"
        )
    times = "".join(f"{found['least_us'][chip]:>9.1f}" for chip in CHIPS)
    least = f"{found['least_bytes'] / 1e6:>10,.1f}{1:>9.2f}"
    lines.append(f"{'the least':12}{'':7}{least}  {'':13}{times}")
    lines.append(">: not faster than its bytes at HBM's peak. Plain JAX has no schedule; that of")
    lines.append("jax v2, which fetches whole blocks and stores nothing, was not read.")
    lines.append("All times are predicted, none was measured on a TPU.")
    return "\n".join(lines)


def _time(row, chip) -> str:
    if chip in row["time_us"]:
        return f"{row['time_us'][chip]:,.1f}"
    return f">{hbm_us(row['num_bytes'], chip):,.1f}"
