"""`python -m rpa lab timeline`: the copies of a kernel, event by event, from a terminal."""

import argparse
import json

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from rpa import interpreter
from rpa.cli.call import is_call, mistakes_in_words
from rpa.cli.options import add_options
from rpa.cli.spinner import waiting
from rpa.figures.player import player
from rpa.lab.batches import lengths_of, make_batch
from rpa.lab.compile.functions import load
from rpa.lab.copies.perfetto import chrome_trace
from rpa.lab.copies.timeline import record_dmas
from rpa.shapes import MODELS, AttentionShape

SMALL = "2x1/40,1x12/30"


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    help_text = "FILE.py:FUNCTION or MODULE:FUNCTION: the ladder's signature, or with --arg"
    parser.add_argument("--kernel", required=True, metavar="FILE.py:FUNCTION", help=help_text)
    add_options(parser, "arg", "option")
    small = {"batch": {"default": SMALL}, "page_size": {"default": 16}}
    small |= {"model": {"default": "smollm2-135m", "choices": list(MODELS)}}
    add_options(parser, "batch", "model", "page_size", "chip", **small, chip={"default": "v5e"})
    parser.add_argument("--html", metavar="FILE.html", help="write a player of the record")
    parser.add_argument("--perfetto", metavar="FILE.json", help="write a Chrome trace, predicted")


def main(args) -> int:
    """Run the kernel in the interpreter and tell what it did.

    Raises:
        ValueError: if the function cannot be found, or what it raised, in words.
    """
    jax.config.update("jax_platforms", "cpu")
    with mistakes_in_words(args.kernel), waiting("running the kernel in the interpreter"):
        timeline = _record(load(args.kernel), args)
    if args.html:
        player(timeline).save(args.html)
    print(timeline.table())
    if args.perfetto:
        with open(args.perfetto, "w", encoding="utf-8") as file:
            json.dump(chrome_trace(timeline, args.chip), file)
    return 0


def _record(function, args):
    arguments, options = _of_call(args) if is_call(args) else _of_batch(args)
    # A kernel that says nothing of an interpreter is interpreted, too; there is no TPU here.
    with pltpu.force_tpu_interpret_mode(interpreter.params()), record_dmas() as timeline:
        jax.block_until_ready(function(*arguments, **options))
    return timeline


def _of_call(args):
    return [argument.array() for argument in args.arg], dict(args.option)


def _of_batch(args):
    layer = AttentionShape(*MODELS[args.model], args.page_size, "float32", "float32")
    batch = make_batch(lengths_of(args.batch), args.page_size, "shuffled")
    rng, num_tokens = np.random.default_rng(0), int(batch.cu_q_lens[int(batch.num_seqs)])
    num_pages = int(np.asarray(batch.page_indices).max()) + 1
    heads = (layer.num_q_heads, layer.num_kv_heads, layer.num_kv_heads)
    shapes = [(num_tokens, n, layer.head_dim) for n in heads]
    arrays = [
        rng.standard_normal(shape).astype(np.float32)
        for shape in (*shapes, layer.cache_shape(num_pages))
    ]
    return [*arrays, batch], {"sm_scale": layer.head_dim**-0.5} | dict(args.option)
