"""`python -m rpa demo`: the whole ladder on a real model, one table, and the pictures beside it.

Ten real prompts are served by SmolLM2-135M with continuous batching until they stand at different
stages: some decode, some are in the middle of a chunked prefill, some have just arrived, and two
share a prefix. Then the same step is taken once with every rung, from the same cache, and each is
compared with the float64 oracle. At last the server goes on with rung 3, and the demo prints what
the model wrote. Without the model's package the arrays are random, and the demo says so.
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rpa import demo_devices
from rpa.cli.options import output_folder, whole
from rpa.demo_server import (
    ANSWER_TOKENS,
    MAX_NUM_SEQS,
    NUM_PAGES,
    PAGE_SIZE,
    TOKEN_BUDGET,
    copy_pages_of_all_layers,
    format_answers,
    new_scheduler,
    read_answer,
    read_requests,
)
from rpa.dense import Truth, relative_error, scaled_error
from rpa.doctor import accelerator_is_visible
from rpa.ladder import LADDER, decode_part, kv_tokens_needed, q_lens_of, ragged_rung
from rpa.models import ModelNotInstalled, forward, load_smollm2
from rpa.models.scheduler import Request, Step
from rpa.page_pool import PagePool
from rpa.paging import get_kv_cache_shape, kv_token_bytes
from rpa.ragged import RaggedBatch, oracle_ragged, store_new_tokens

NUM_SYNTHETIC_LAYERS = 4
MEASURED_STEP = 3
"""The step that every rung takes; by then the requests stand at different stages."""


@dataclass
class Layer:
    """What attention of one layer is given, and what it must return.

    `kv_cache` holds the pages of this batch only, before the new tokens are stored; `batch` counts
    the pages in it.
    """

    queries: np.ndarray  # [num_tokens, num_q_heads, head_dim]
    keys: np.ndarray  # [num_tokens, num_kv_heads, head_dim]
    values: np.ndarray  # [num_tokens, num_kv_heads, head_dim]
    kv_cache: np.ndarray  # [num_pages, page_size, rows, packing, lanes]
    batch: RaggedBatch
    truth: Truth


@dataclass
class Scene:
    """The step that every rung takes, the activations of its layers, and the model if there is one.

    `run_model` is None for synthetic activations; else it takes a rung's attention and returns the
    logits of the step, f32[max_num_seqs, vocab_size], from the same cache every time.
    """

    step: Step
    pool: PagePool
    kv_token_bytes: int
    layers: list[Layer]
    run_model: object = None
    next_token_ids: np.ndarray | None = None  # with attention in float64
    answers: list[tuple[str, str, str]] = field(default_factory=list)  # see `write_answers`


# --- The scene with the real model --------------------------------------------------------------


def real_scene(model, progress) -> Scene:
    """Serve the prompts with rung 3 up to the measured step, then take it with the oracle."""
    config = model.config
    shape = get_kv_cache_shape(
        config.num_layers * NUM_PAGES,
        PAGE_SIZE,
        config.num_kv_heads,
        config.head_dim,
        model.params["embedding"].dtype,
    )
    kv_cache = jnp.zeros(shape, model.params["embedding"].dtype)
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    requests = read_requests(model.tokenizer)
    scheduler = new_scheduler(requests, pool)
    serve = compile_model(model, ragged_rung)
    for now in range(MEASURED_STEP):
        progress(f"serving step {now}")
        step = scheduler.plan(now)
        kv_cache = copy_pages_of_all_layers(kv_cache, step.copies, config.num_layers)
        logits, kv_cache = serve(step, kv_cache)
        scheduler.finish(step, np.asarray(logits).argmax(axis=-1))
    step = scheduler.plan(MEASURED_STEP)
    kv_cache = copy_pages_of_all_layers(kv_cache, step.copies, config.num_layers)

    def run_model(attention):
        run = serve if attention is ragged_rung else compile_model(model, attention)
        logits, _ = run(step, jnp.copy(kv_cache))  # the first call compiles
        fresh = jnp.copy(kv_cache).block_until_ready()
        start = time.perf_counter()
        logits = np.asarray(run(step, fresh)[0])
        return logits, time.perf_counter() - start

    progress("the oracle")
    layers: list[Layer] = []
    oracle_attention = partial(oracle_rung, record=layers.append)
    logits, _ = compile_model(model, oracle_attention)(step, jnp.copy(kv_cache))
    next_token_ids = np.asarray(logits).argmax(axis=-1)
    token_bytes = kv_token_bytes(shape, kv_cache.dtype)
    progress("the answers")
    answers = write_answers(model, scheduler, step, next_token_ids, serve, jnp.copy(kv_cache))
    return Scene(step, pool, token_bytes, layers, run_model, next_token_ids, answers)


def write_answers(model, scheduler, step, next_token_ids, serve, kv_cache):
    """Serve on from a step until every request has ANSWER_TOKENS new tokens.

    Args:
        scheduler: a copy of it goes on; it stays as it was after it planned the step.
        step, next_token_ids: the step that is taken, and its result; `kv_cache` is from before it.
        serve: from `compile_model`; the cache is donated to it.

    Returns:
        For each request its name, the end of its prompt and what the model wrote, in one line each.
    """
    scheduler, step = copy.deepcopy((scheduler, step))
    _, kv_cache = serve(step, kv_cache)
    scheduler.finish(step, next_token_ids)
    now = MEASURED_STEP
    while any(len(r.token_ids) - r.prompt_len < ANSWER_TOKENS for r in scheduler.requests):
        now += 1
        if all(r.stage == "decoding" for r in scheduler.requests):
            scheduler.token_budget = MAX_NUM_SEQS  # the rest of the rows would be padding
        step = scheduler.plan(now)
        kv_cache = copy_pages_of_all_layers(kv_cache, step.copies, model.config.num_layers)
        logits, kv_cache = serve(step, kv_cache)
        scheduler.finish(step, np.asarray(logits).argmax(axis=-1))
    return [(r.name, *read_answer(model.tokenizer, r)) for r in scheduler.requests]


def compile_model(model, attention):
    """The model with some attention, as a function (step, kv_cache) -> (logits, kv_cache)."""

    @partial(jax.jit, donate_argnames="kv_cache")
    def run(params, token_ids, positions, kv_cache, batch, logit_rows):
        return forward(
            params,
            model.config,
            token_ids,
            positions,
            kv_cache,
            batch,
            attention,
            logit_rows=logit_rows,
        )

    return lambda step, kv_cache: run(
        model.params, step.token_ids, step.positions, kv_cache, step.batch, step.logit_rows
    )


def oracle_rung(queries, keys, values, kv_cache, batch, *, sm_scale, record):
    """Attention in NumPy float64 under the one signature; records what it was given, and its truth.

    The numbers leave JAX through a callback, with the live pages only: the cache of all layers
    would be copied 30 times.
    """
    pages = jnp.clip(batch.page_indices, 0, kv_cache.shape[0] - 1)
    own_pages = kv_cache[pages]  # [max_num_seqs * pages_per_seq, page_size, ...]
    own_batch = RaggedBatch(
        batch.kv_lens,
        jnp.arange(len(pages), dtype=jnp.int32),
        batch.cu_q_lens,
        batch.distribution,
    )

    def on_the_host(queries, keys, values, kv_cache, batch):
        arrays = [np.array(x) for x in (queries, keys, values, kv_cache)]
        batch = jax.tree.map(np.asarray, batch)
        after = store_on_host(arrays[3], arrays[1], arrays[2], batch)
        truth = oracle_ragged(arrays[0], after, batch, keys.shape[1], sm_scale=sm_scale)
        record(Layer(*arrays, batch, truth))
        return truth.output.astype(queries.dtype)

    output = jax.pure_callback(
        on_the_host,
        jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        queries,
        keys,
        values,
        own_pages,
        own_batch,
    )
    return output, store_new_tokens(kv_cache, keys, values, batch)


def store_on_host(kv_cache, keys, values, batch):
    """What `rpa.ragged.store_new_tokens` does, token by token in NumPy: an oracle uses no rung."""
    kv_cache = kv_cache.copy()
    table = batch.page_indices.reshape(batch.max_num_seqs, -1)
    num_kv_heads, head_dim = keys.shape[1:]
    combined = kv_cache.reshape(*kv_cache.shape[:2], -1, kv_cache.shape[-1])  # a view
    for s, q_len in enumerate(q_lens_of(batch)):
        for t in range(q_len):
            position = batch.kv_lens[s] - q_len + t
            token = combined[table[s, position // PAGE_SIZE], position % PAGE_SIZE]
            row = batch.cu_q_lens[s] + t
            token[0 : 2 * num_kv_heads : 2, :head_dim] = keys[row]
            token[1 : 2 * num_kv_heads : 2, :head_dim] = values[row]
    return kv_cache


# --- The scene without it -----------------------------------------------------------------------


def synthetic_scene(progress) -> Scene:
    """Random activations for requests of similar lengths: what is shown without the model."""
    rng = np.random.default_rng(0)
    lengths = {"a": (60, 0), "b": (90, 0), "c": (45, 0), "d": (330, 1), "e": (200, 2), "f": (30, 3)}
    requests = [
        Request(name, rng.integers(0, 100, prompt_len).tolist(), prompt_len, arrives)
        for name, (prompt_len, arrives) in lengths.items()
    ]
    requests.append(Request("g", requests[0].token_ids[:40] + [1] * 20, 60, 3, ("a", 40)))
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    scheduler = new_scheduler(requests, pool)
    for now in range(MEASURED_STEP):
        scheduler.finish(scheduler.plan(now), np.zeros(MAX_NUM_SEQS, int))
    step = scheduler.plan(MEASURED_STEP)
    num_q_heads, num_kv_heads, head_dim = 9, 3, 64  # as SmolLM2
    shape = get_kv_cache_shape(NUM_PAGES, PAGE_SIZE, num_kv_heads, head_dim, np.float32)
    layers = []
    for _ in range(NUM_SYNTHETIC_LAYERS):
        progress("the oracle")
        queries = rng.standard_normal((TOKEN_BUDGET, num_q_heads, head_dim), np.float32)
        keys, values = rng.standard_normal((2, TOKEN_BUDGET, num_kv_heads, head_dim), np.float32)
        kv_cache = rng.standard_normal(shape, np.float32)
        after = store_on_host(kv_cache, keys, values, step.batch)
        truth = oracle_ragged(queries, after, step.batch, num_kv_heads)
        layers.append(Layer(queries, keys, values, kv_cache, step.batch, truth))
    return Scene(step, pool, kv_token_bytes(shape, np.float32), layers)


# --- The table ------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table: what a rung returned, touched and took; None: does not apply."""

    rung: str
    relative_error: float
    scaled_error: float
    agreement: str | None
    kv_read_bytes: int | None
    query_rows: int | None
    layer_ms: float
    step_ms: float | None
    note: str


def measure(rung, scene: Scene) -> Row:
    """Run one rung on the scene: attention of its layers against their truth, then the whole model.

    A kernel is shown on one layer, because the interpreter is slow (the note says how long all of
    them would take), and a rung that only decodes on the decode sequences of the batch.
    """
    batch = scene.step.batch
    refused = rung.refuses(batch)
    layers = scene.layers if not rung.is_kernel else scene.layers[len(scene.layers) // 2 :][:1]
    relative, scaled, layer_ms = compare_layers(rung, layers, only_decode=refused is not None)
    agreement, step_ms, kv_read_bytes, query_rows = None, None, None, None
    if rung.kv_tokens_read is not None:
        kv_read_bytes = rung.kv_tokens_read(batch, PAGE_SIZE) * scene.kv_token_bytes
        query_rows = rung.query_rows(batch)
    if scene.run_model is not None and not rung.is_kernel:
        logits, step_s = scene.run_model(rung.attention_for(batch))
        num_seqs = int(batch.num_seqs)
        same = logits.argmax(axis=-1)[:num_seqs] == scene.next_token_ids[:num_seqs]
        agreement, step_ms = f"{same.sum()} of {num_seqs}", step_s * 1e3
    notes = []
    if rung.is_kernel:
        notes.append("one layer" + ("" if on_tpu() else ", interpreted"))
        if scene.run_model is not None and not on_tpu():
            all_layers_s = layer_ms / 1e3 * len(scene.layers)
            notes[-1] += (
                f": no next tokens, all {len(scene.layers)} take about {all_layers_s:.0f} s"
            )
    if refused:
        notes.append(f"decode part only: {refused}")
    return Row(
        f"{rung.number} {rung.name}",
        relative,
        scaled,
        agreement,
        kv_read_bytes,
        query_rows,
        layer_ms,
        step_ms,
        "; ".join(notes),
    )


def on_tpu() -> bool:
    """Whether kernels are compiled here, rather than interpreted."""
    return jax.default_backend() == "tpu"


def compare_layers(rung, layers, *, only_decode):
    """Attention of some layers: the two measures of difference, the largest, and the median time.

    Returns:
        relative error, scaled error, milliseconds per layer.
    """
    relative, scaled, times_s = [], [], []
    run = None
    for layer in layers:
        batch = decode_part(layer.batch) if only_decode else layer.batch
        if run is None:
            attention = rung.attention_for(batch)
            sm_scale = layer.queries.shape[-1] ** -0.5
            run = jax.jit(lambda *arrays: attention(*arrays, sm_scale=sm_scale))  # noqa: B023
        arrays = [jnp.asarray(x) for x in (layer.queries, layer.keys, layer.values, layer.kv_cache)]
        if not times_s:
            jax.block_until_ready(run(*arrays, batch))  # the first call compiles
        start = time.perf_counter()
        output = jax.block_until_ready(run(*arrays, batch))[0]
        times_s.append(time.perf_counter() - start)
        rows = slice(0, int(batch.cu_q_lens[int(batch.num_seqs)]))
        truth = Truth(layer.truth.output[rows], layer.truth.scale[rows])
        relative.append(relative_error(output[rows], truth))
        scaled.append(scaled_error(output[rows], truth))
    return max(relative), max(scaled), float(np.median(times_s)) * 1e3


COLUMNS = [
    # title, unit, width
    ("rung", "", 10),
    ("error", "rel. RMS", 9),
    ("worst head", "scaled", 11),
    ("next token", "agrees", 11),
    ("KV read", "MB/layer", 9),
    ("q rows", "", 7),
    ("padding", "waste", 8),
    ("attention", "ms/layer", 10),
    ("whole step", "ms", 11),
]


def format_table(rows: list[Row], scene: Scene) -> str:
    """The table as text, with what is needed in its first line and notes below."""
    batch = scene.step.batch
    needed_mb = kv_tokens_needed(batch) * scene.kv_token_bytes / 1e6
    needed_rows = int(q_lens_of(batch).sum())
    lines = [_line(title for title, _, _ in COLUMNS), _line(unit for _, unit, _ in COLUMNS)]
    lines.append("-" * sum(width for _, _, width in COLUMNS))
    lines.append(_line(["needed", "", "", "", f"{needed_mb:.2f}", needed_rows, "", "", ""]))
    for row in rows:
        interpreted = row.note.startswith("one layer, interpreted")
        cells = [
            row.rung,
            f"{row.relative_error:.1e}",
            f"{row.scaled_error:.1e}",
            row.agreement or "-",
            "-" if row.kv_read_bytes is None else f"{row.kv_read_bytes / 1e6:.2f}",
            row.query_rows or "-",
            "-" if row.query_rows is None else f"{1 - needed_rows / row.query_rows:.0%}",
            "-" if interpreted else f"{row.layer_ms:.1f}",
            "-" if row.step_ms is None else f"{row.step_ms:.0f}",
        ]
        lines.append(_line(cells))
    lines += [f"rung {row.rung}: {row.note}" for row in rows if row.note]
    return "\n".join(lines)


def _line(cells):
    first, *others = zip(cells, (width for _, _, width in COLUMNS), strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others)


def describe(scene: Scene) -> str:
    """Who is in the step, and at which stage."""
    batch = scene.step.batch
    lines = []
    for s, (request, stage) in enumerate(zip(scene.step.requests, scene.step.stages, strict=True)):
        q_len = int(batch.cu_q_lens[s + 1] - batch.cu_q_lens[s])
        shares = (
            f", shares {request.forks[1]} tokens of {request.forks[0]}" if request.forks else ""
        )
        lines.append(
            f"  {request.name:<10} {stage + shares:<46} q_len {q_len:>3}  "
            f"kv_len {int(batch.kv_lens[s]):>3}"
        )
    return "\n".join(lines)


def save_pictures(rows, scene: Scene, folder: Path) -> list[Path]:
    """The pictures beside the table: who owns which page, the batch, the waste."""
    from rpa.figures.pool import pool_map
    from rpa.figures.ragged import batch_figure, waste_figure

    names = [request.name for request in scene.step.requests]
    batch = scene.step.batch
    needed_bytes = kv_tokens_needed(batch) * scene.kv_token_bytes
    needed_rows = int(q_lens_of(batch).sum())
    counted = [row for row in rows if row.kv_read_bytes is not None]
    bars = [
        (
            "KV read by attention, kB in a layer",
            row.rung,
            round(needed_bytes / 1e3),
            round(row.kv_read_bytes / 1e3),
        )
        for row in counted
    ]
    bars += [
        (bars[0][0], name, round(needed_bytes / 1e3), round(num_bytes / 1e3))
        for name, num_bytes in kv_bytes_of_kernels(scene).items()
    ]
    bars += [("query rows computed", row.rung, needed_rows, row.query_rows) for row in counted]
    pictures = {
        "pages.png": pool_map(scene.pool, names),
        "batch.png": batch_figure(
            batch, names=names, num_tokens=TOKEN_BUDGET, title="One step: ten prompts, one batch"
        ),
        "waste.png": waste_figure(bars, title="What each rung touches"),
    }
    return [picture.save(folder / name) for name, picture in pictures.items()]


def kv_bytes_of_kernels(scene: Scene) -> dict[str, int]:
    """Bytes of K and V that each rung for any batch reads, counted from its own copies."""
    from functools import partial

    from rpa import plain
    from rpa.lab.copies import traffic
    from rpa.shapes import AttentionShape

    layer = scene.layers[0]
    heads = layer.queries.shape[1], layer.keys.shape[1], layer.queries.shape[2]
    dtype = str(layer.kv_cache.dtype)
    shape = AttentionShape(*heads, page_size=PAGE_SIZE, dtype=dtype, kv_dtype=dtype)
    counted = {}
    for name, rung in {
        "7 plain": partial(plain.attention, interpret=False),
        "8 kernel": "kernel",
    }.items():
        kinds = traffic.count(rung, layer.batch, shape).kinds
        counted[name] = sum(
            kinds[kind].num_bytes for kind in (traffic.KV_READ, traffic.NEW_KV) if kind in kinds
        )
    return counted


# --- The command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m rpa demo`."""
    parser.add_argument(
        "--out", type=output_folder, default="out", help="folder for the pictures and rows.json"
    )
    parser.add_argument(
        "--devices",
        type=whole(2, 1024),
        help="instead: serve the prompts with the model shared out over so many devices",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="with --devices: they belong to several processes, see docs/parallel.md",
    )


def main(args) -> int:
    """Run the demo; returns the exit code."""
    if args.devices is not None:
        return demo_devices.main(args)
    start = time.perf_counter()
    if jax.config.jax_platforms is None and not accelerator_is_visible():
        # A libtpu that looks for a TPU in vain prints pages of errors.
        jax.config.update("jax_platforms", "cpu")
    bar = tqdm(total=MEASURED_STEP + 3 + len(LADDER), bar_format="{desc:<28}{bar}{elapsed}")

    def progress(what):
        bar.set_description_str(what)
        bar.update()

    try:
        progress("loading SmolLM2-135M")
        scene = real_scene(load_smollm2(), progress)
        what = "SmolLM2-135M-Instruct, real prompts, float32"
    except ModelNotInstalled as missing:
        tqdm.write(f"{missing}\nSo the arrays below are RANDOM, and there is no whole model.")
        scene = synthetic_scene(lambda what: None)
        what = "synthetic activations (random), float32"
    rows = []
    for rung in LADDER:
        progress(f"rung {rung.number} {rung.name}")
        rows.append(measure(rung, scene))
    bar.close()
    pictures = save_pictures(rows, scene, args.out)
    (args.out / "rows.json").write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
    device = jax.devices()[0]
    print(f"\nOne step of a server: {what}, on {device.device_kind} ({device.platform}).")
    print(describe(scene))
    print(f"\n{format_table(rows, scene)}\n")
    print("error: ||output - float64|| / ||float64||, the largest of all layers; worst head: the")
    print("largest difference, as a fraction of max|score| max|v| there. KV is read from the cache")
    print(f"of one layer in pages of {PAGE_SIZE} tokens; padding waste counts query rows.")
    if scene.answers:
        print("\nWhat the model wrote, served on with rung 3 (greedy, cut off):")
        print(format_answers(scene.answers) + "\n")
    for picture in pictures:
        print(f"picture: {picture}")
    print(f"took {time.perf_counter() - start:.0f} s")
    return 0
