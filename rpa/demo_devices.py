"""`python -m rpa demo --devices N`: the prompts of the demo, served by a model on N devices.

The same server as in `rpa.demo`, twice: on one device, and with heads and matrices shared out over
N. Each writes its answers, and they have to be the same texts. Without a TPU the devices are N host
devices of the CPU. With `--distributed` they belong to several processes, which JAX's own runtime
connects: on a TPU pod slice it knows how, elsewhere three variables tell it (docs/parallel.md).
"""

import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rpa.demo_server import (
    ANSWER_TOKENS,
    MAX_NUM_SEQS,
    NUM_PAGES,
    PAGE_SIZE,
    copy_pages_of_all_layers,
    format_answers,
    new_scheduler,
    read_answer,
    read_requests,
)
from rpa.doctor import accelerator_is_visible
from rpa.ladder import ragged_rung
from rpa.models import forward, load_smollm2
from rpa.models.sharded import pad_heads, shard_params
from rpa.page_pool import PagePool
from rpa.paging import get_kv_cache_shape
from rpa.parallel import Heads, Parallel

AXIS = "model"
NUM_PROCESSES, PROCESS_ID = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Variables that say, besides JAX_COORDINATOR_ADDRESS, which of how many processes this is."""


def start_devices(num_devices, distributed):
    """Have JAX start with so many devices: on a CPU host devices, with threads enough for them.

    Raises:
        ValueError: if there are fewer, or JAX has started with others before.
    """
    if not accelerator_is_visible():
        num_processes = int(os.environ.get(NUM_PROCESSES, 1)) if distributed else 1
        os.environ.setdefault("NPROC", str(4 * num_devices))  # see rpa.doctor.too_few_threads
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_devices // num_processes)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if distributed:
        # On a pod slice JAX finds all three itself; it reads the first of these variables, too.
        numbers = (NUM_PROCESSES, PROCESS_ID)
        jax.distributed.initialize(None, *(_as_int(os.environ.get(name)) for name in numbers))
    if jax.device_count() < num_devices:
        raise ValueError(
            f"--devices is {num_devices}, but JAX has {jax.device_count()} devices: give a "
            "smaller number, or unset XLA_FLAGS=--xla_force_host_platform_device_count."
        )


def _as_int(text):
    return None if text is None else int(text)


def answers_of(model, step_on_devices, kv_cache):
    """Serve all prompts to the end: for each its name, the end of its prompt, and the answer."""
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    scheduler = new_scheduler(read_requests(model.tokenizer), pool)
    now = 0
    while any(len(r.token_ids) - r.prompt_len < ANSWER_TOKENS for r in scheduler.requests):
        if all(r.stage == "decoding" for r in scheduler.requests):
            scheduler.token_budget = MAX_NUM_SEQS  # the rest of the rows would be padding
        step = scheduler.plan(now)
        next_token_ids, kv_cache = step_on_devices(step, kv_cache)
        scheduler.finish(step, np.asarray(next_token_ids))
        now += 1
    return [(r.name, *read_answer(model.tokenizer, r)) for r in scheduler.requests]


def compile_step(params, config, attention, whole=None):
    """A function (step, kv_cache) -> (next token ids, kv_cache).

    Args:
        params, config: of the model.
        attention: a rung with the one signature.
        whole: the sharding of what every device, and every process, gets as a whole.
    """

    @partial(jax.jit, donate_argnames="kv_cache")
    def run(params, token_ids, positions, kv_cache, batch, logit_rows):
        logits, kv_cache = forward(
            params, config, token_ids, positions, kv_cache, batch, attention, logit_rows=logit_rows
        )
        next_token_ids = logits.argmax(axis=-1)
        if whole is not None:
            next_token_ids = jax.lax.with_sharding_constraint(next_token_ids, whole)
        return next_token_ids, kv_cache

    def one_step(step, kv_cache):
        kv_cache = copy_pages_of_all_layers(kv_cache, step.copies, config.num_layers)
        return run(params, step.token_ids, step.positions, kv_cache, step.batch, step.logit_rows)

    return one_step


def on_one_device(model):
    """The answers of the model as it is; on the first device of this process."""
    sizes = (model.config.num_layers * NUM_PAGES, PAGE_SIZE, model.config.num_kv_heads)
    shape = get_kv_cache_shape(*sizes, model.config.head_dim, jnp.float32)
    step = compile_step(model.params, model.config, ragged_rung)
    with jax.default_device(jax.local_devices()[0]):
        return answers_of(model, step, jnp.zeros(shape))


def on_devices(model, devices):
    """The answers of the model, shared out over the devices."""
    mesh = Mesh(np.array(devices), (AXIS,))
    params, config = pad_heads(model.params, model.config, len(devices))
    attention = Parallel(mesh, Heads(AXIS), attention=ragged_rung)
    shape = attention.cache_shape(
        *(config.num_layers * NUM_PAGES, PAGE_SIZE),
        *(config.num_kv_heads, config.head_dim, jnp.float32),
    )
    sharding = attention.sharding("kv_cache", config.num_kv_heads)
    kv_cache = jax.jit(partial(jnp.zeros, shape), out_shardings=sharding)()
    whole = NamedSharding(mesh, PartitionSpec())
    step = compile_step(shard_params(params, config, mesh, AXIS), config, attention, whole)
    return config, answers_of(model, step, kv_cache)


def main(args) -> int:
    """Serve on one device and on many; returns 1 if the texts differ."""
    start_devices(args.devices, args.distributed)
    model = load_smollm2()
    start = time.perf_counter()
    expected = on_one_device(model)
    one_device_s = time.perf_counter() - start
    config, answers = on_devices(model, jax.devices()[: args.devices])
    same = sum(a == b for a, b in zip(answers, expected, strict=True))
    if jax.process_index() == 0:
        heads = f"{model.config.num_q_heads} query and {model.config.num_kv_heads} KV heads"
        kind, num_processes = jax.devices()[0].device_kind, jax.process_count()
        print(f"SmolLM2-135M-Instruct, {heads}, padded to {config.num_q_heads} and")
        print(
            f"{config.num_kv_heads}; devices ({kind}): {args.devices}, processes: {num_processes}."
        )
        print("What it wrote:")
        print(format_answers(answers))
        print(f"{same} of {len(answers)} texts are those of one device.")
        for (name, _, text), (_, _, other) in zip(expected, answers, strict=True):
            if text != other:
                print(f"  {name}: one device wrote {text!r}")
        took_s = time.perf_counter() - start
        print(f"took {took_s:.0f} s, of them {one_device_s:.0f} s on one device")
    return int(same != len(answers))
