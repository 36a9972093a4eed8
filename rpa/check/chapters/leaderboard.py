"""The challenge of chapter 12: score an entry, keep a table of all entries next to the notebook.

    from rpa.check import leaderboard

    leaderboard.enter(my_attention, "larger query blocks")
    leaderboard.enter(my_attention, "larger query blocks", chip="v5e")   # its schedule as well

An entry is a function of a notebook, `(queries, keys, values, kv_cache, batch, *, sm_scale,
backend) -> (output, kv_cache)`. Its score is the HBM bytes that its own transfers move for
`rpa.lab.bench.comparison.challenge_step()`, and where libtpu is installed the time of its schedule,
predicted. The file `leaderboard.json` is written where progress is kept (`rpa.check.progress`), and
nothing here can stop a notebook: what goes wrong is printed.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from rpa import chips
from rpa.check.engine import check_exercise
from rpa.check.errors import CannotShip, CheckFailed
from rpa.check.progress import VARIABLE, progress_path
from rpa.check.registry import find_exercise
from rpa.check.sandbox.pickling import Parcel, pack
from rpa.kernel import ragged_paged_attention
from rpa.lab.bench import comparison
from rpa.lab.copies import traffic
from rpa.lab.schedule.execution import CannotRun
from rpa.lab.schedule.schedule import NoSchedule

FILE_NAME = "leaderboard.json"
EXERCISE = "12.5"
OPTIONS = {"sm_scale": comparison.LAYER.head_dim**-0.5, "backend": "tpu"}


def enter(function: Callable, name: str, *, chip: str | None = None) -> None:
    """Check an entry, count its bytes, and print the table with it.

    Args:
        function: the entry.
        name: what the table calls it; the same name again replaces the entry.
        chip: also compile for this chip and read the schedule: a minute or two the first time, and
            only where libtpu is installed. Without it, bytes alone are counted.
    """
    try:
        check_exercise(find_exercise(EXERCISE), function)
    except (CheckFailed, NotImplementedError) as refusal:
        print(f"{name} is not entered: its answer is wrong.\n{refusal}")
        print(table(read()))
        return
    try:
        entry = {"name": name} | count(function)
    except (ValueError, TypeError, IndexError) as error:  # of JAX's tracers, too
        reason = str(error).splitlines()[0]
        print(f"{name} is not entered, its bytes cannot be counted: {reason}")
        return
    if entry["num_bytes"] < comparison.recorded()["challenge_least_bytes"]:
        print(
            f"{name} is not entered: {entry['num_bytes'] / 1e6:.1f} MB were counted, and the least "
            f"is {comparison.recorded()['challenge_least_bytes'] / 1e6:.1f} MB. It reads in a way "
            "that is not counted: let a kernel read the cache, or an index."
        )
        return
    entries = [other for other in read() if other["name"] not in (name, RUNG_8)]
    if chip is not None:
        entry |= schedule(function, chip)
        if "time_us" in entry:
            entries.append({"name": RUNG_8} | count(rung_8) | schedule(rung_8, chip))
    entries.append(entry)
    write(entries)
    print(table(entries))


RUNG_8 = "rung 8, its own blocks"


def rung_8(queries, keys, values, kv_cache, batch, *, sm_scale, backend):
    """Rung 8 as an entry: what fewer bytes, or other blocks, have to be compared with."""
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    options = {"sm_scale": sm_scale, "backend": backend, "donate": False}
    return ragged_paged_attention(queries, keys, values, kv_cache, *metadata, **options)


def count(function) -> dict:
    """HBM bytes of an entry for the step of the challenge, from its own transfers.

    Raises:
        ValueError: if its transfers depend on computed values, or its blocks do not fit.
    """

    def entry(*arrays, sm_scale):
        return function(*arrays, sm_scale=sm_scale, backend="tpu")

    moved = traffic.count(entry, comparison.challenge_step(), comparison.LAYER)
    in_jax = sum(size for operation, size in moved.outside.items() if "scatter" not in operation)
    whole = whole_reads(entry) * cache_bytes()
    return {
        "num_bytes": moved.num_bytes + whole,
        "num_copies": moved.num_copies,
        "in_jax_bytes": in_jax + whole,
    }


def cache_bytes() -> int:
    """Bytes of the cache of the challenge's step."""
    *_, cache, _ = _shapes()
    return int(np.prod(cache.shape)) * cache.dtype.itemsize


def whole_reads(entry) -> int:
    """How many operations of plain JAX read the whole cache: products, sums, converted copies.

    Reads by an index are counted by `rpa.lab.copies.traffic`, kernels by their copies; a reshape
    and the like move nothing, and their result is still the cache.
    """
    arrays, batch = _shapes()[:4], comparison.challenge_step()
    sm_scale = comparison.LAYER.head_dim**-0.5
    traced = jax.make_jaxpr(lambda *a: entry(*a, batch, sm_scale=sm_scale))(*arrays)
    return _whole_reads(traced.jaxpr, {traced.jaxpr.invars[3]})


def _shapes():
    layer, batch = comparison.LAYER, comparison.challenge_step()
    num_tokens = int(batch.cu_q_lens[int(batch.num_seqs)])
    new = jax.ShapeDtypeStruct((num_tokens, layer.num_kv_heads, layer.head_dim), layer.kv_dtype)
    queries = jax.ShapeDtypeStruct((num_tokens, layer.num_q_heads, layer.head_dim), layer.dtype)
    num_pages = int(np.asarray(batch.page_indices).max()) + 1
    cache = jax.ShapeDtypeStruct(layer.cache_shape(num_pages), np.dtype(layer.kv_dtype))
    return queries, new, new, cache, batch


VIEWS = (
    "reshape",
    "squeeze",
    "expand_dims",
    "with_memory_space_constraint",
    "bitcast_convert_type",
)
INDEXED = ("gather", "scatter", "dynamic_slice", "dynamic_update_slice", "pallas_call")


def _whole_reads(jaxpr, caches) -> int:
    found = 0
    for eqn in jaxpr.eqns:
        places = [i for i, x in enumerate(eqn.invars) if not hasattr(x, "val") and x in caches]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if not places or eqn.primitive.name in INDEXED:
            if places and eqn.primitive.name in ("scatter", "dynamic_update_slice"):
                caches |= set(eqn.outvars)
            continue
        if eqn.primitive.name in VIEWS:
            caches |= set(eqn.outvars)
        elif hasattr(inner, "jaxpr") and len(inner.jaxpr.invars) == len(eqn.invars):
            found += _whole_reads(inner.jaxpr, {inner.jaxpr.invars[i] for i in places})
        else:
            found += 1
    return found


def schedule(function, chip) -> dict:
    """Predicted time and bundles of an entry's kernels on a chip; empty, and said, where not."""
    batch = comparison.challenge_step()
    args = comparison.arguments(comparison.Racer("entry", ""), batch)
    try:
        known = chips.chip(chip).name
        with as_module(function) as importable:
            total_us, bundles = comparison.predict_step(importable, args, OPTIONS, known)
    except (NoSchedule, CannotRun, CannotShip, ValueError) as reason:
        print(f"(No schedule for {chip}: {reason})")
        return {}
    return {"chip": known, "time_us": total_us, "bundles": bundles}


@contextlib.contextmanager
def as_module(function) -> Iterator[str]:
    """ "module:function" of a notebook's function, in a file that another process can import."""
    text = source_of(pack(function))
    module = f"entry_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{module}.py").write_text(text, encoding="utf-8")
        sys.path.insert(0, folder)
        try:
            yield f"{module}:{function.__name__}"
        finally:
            sys.path.remove(folder)


def source_of(parcel: Parcel) -> str:
    """A parcel as the text of a module.

    >>> print(source_of(Parcel("f", modules={"np": "numpy"}, sources={"f": ("def f(): ...", 1)})))
    import pickle
    import numpy as np
    def f(): ...
    """
    lines = ["import pickle"]
    lines += [f"import {path} as {name}" for name, path in parcel.modules.items()]
    lines += [f"from {path} import {old} as {name}" for name, (path, old) in parcel.imports.items()]
    lines += [f"{name} = pickle.loads({data!r})" for name, data in parcel.values.items()]
    lines += [source for source, _ in parcel.sources.values()]
    return "\n".join(lines)


def path() -> Path | None:
    """The file that keeps the entries, or None where nothing is kept."""
    progress = progress_path()
    if progress is None and os.environ.get(VARIABLE) != "off":
        return Path.cwd() / FILE_NAME  # of a script
    return None if progress is None else progress.with_name(FILE_NAME)


@functools.cache
def _in_memory() -> list:
    """Entries of this process, for where no file is kept."""
    return []


def read() -> list[dict]:
    """The entries so far; none where the file is absent or cannot be read."""
    where = path()
    if where is None:
        return _in_memory()
    try:
        entries = json.loads(where.read_text(encoding="utf-8"))
        return [entry for entry in entries if {"name", "num_bytes", "num_copies"} <= set(entry)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        print(f"({where.name} cannot be read, the table begins empty: {error})")
        return []


def write(entries: list[dict]) -> None:
    """Keep the entries; where that is not possible it is said."""
    where = path()
    if where is None:
        _in_memory()[:] = entries
        return
    try:
        where.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"({where.name} cannot be written, so the table is not kept: {error.strerror})")


def table(entries: list[dict]) -> str:
    """All entries and the kernels of this repository: by predicted time once an entry has one.

    Times are those of one chip, that of the newest entry that was compiled; rows without one
    follow, fewest bytes first. As long as no entry has a time all rows stand by their bytes.
    """
    found = comparison.recorded()
    least = found["challenge_least_bytes"]
    chip = next((e["chip"] for e in reversed(entries) if "time_us" in e), None)
    rows = [
        _recorded_row(row, chip or "v5e")
        for row in found["rows"]
        if row["challenge_bytes"] is not None
    ]
    rows += entries
    lines = [f"{'':2} {'entry':34} {'MB moved':>9} {'of least':>9} {'copies':>7}  predicted"]
    in_order = sorted(rows, key=lambda row: (_time_us(row, chip), row["num_bytes"]))
    for place, row in enumerate(in_order, start=1):
        time = f"{row['time_us']:,.1f} us on {row['chip']}" if "time_us" in row else ""
        mark = "*" if row.get("in_jax_bytes") else " "
        copies = f"{row['num_copies']:,}" if "num_copies" in row else ""
        lines.append(
            f"{place:2} {row['name'][:34]:34} {row['num_bytes'] / 1e6:>9.1f}"
            f"{row['num_bytes'] / least:>9.2f}{mark} {copies:>7}  {time}".rstrip()
        )
    lines.append(f"   {'the least, every page once':34} {least / 1e6:>9.1f}{1:>9.2f}")
    if any(row.get("in_jax_bytes") for row in entries):
        lines.append("*: reads the cache in plain JAX; what else that moves is not counted")
    return "\n".join(lines)


def _recorded_row(row: dict, chip: str) -> dict:
    """A kernel of the comparison's record as a row of the table."""
    name = "yours, after 7.3" if row["name"] == "yours" else row["title"]
    found = {"name": f"{name} (recorded)", "num_bytes": row["challenge_bytes"]}
    if chip in row.get("challenge_us", {}):
        found |= {"time_us": row["challenge_us"][chip], "chip": chip}
    return found


def _time_us(row: dict, chip: str | None) -> float:
    """By what a row is ranked: infinite without a time, or with one of another chip."""
    return row["time_us"] if chip and row.get("chip") == chip and "time_us" in row else float("inf")
