"""From arrays to a `pallas_call` and back: operands, aliases, compiler options."""

import contextlib
import contextvars
import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rpa import compat
from rpa.kernel import layout, loop, page_table, refs, softmax
from rpa.kernel.refs import HBM, Refs
from rpa.paging import pack_kv


@contextlib.contextmanager
def compiler_options(**options):
    """Compile the calls in the body with these options of `jax.jit`.

    Args:
        **options: `compiler_options` of `jax.jit`, {name: value}; none for the defaults.

    >>> with compiler_options(xla_backend_optimization_level=0):
    ...     _compiler_options.get()
    (('xla_backend_optimization_level', 0),)
    """
    token = _compiler_options.set(tuple(options.items()))
    try:
        yield
    finally:
        _compiler_options.reset(token)


_compiler_options = contextvars.ContextVar("compiler_options", default=())


def compiled(donate):
    """`call_plans` in `jax.jit`, with or without the cache donated."""
    return _compiled(donate, _compiler_options.get())


@functools.cache  # a `jax.jit` remembers what it has compiled
def _compiled(donate, options):
    return jax.jit(
        call_plans,
        static_argnames="plans",
        donate_argnames="kv_cache" if donate else (),
        compiler_options=dict(options) or None,
    )


def call_plans(queries, keys, values, kv_cache, batch, options, *, plans):
    """Run the kernels of one call, one after the other, on the same output and cache.

    Args:
        queries, keys, values, kv_cache, batch: as in the public function.
        options: `rpa.ragged.AttentionOptions`, of which the scales and the sinks count.
        plans: the `Plan`s, first to last.

    Returns:
        output [num_tokens, num_q_heads, head_dim] and kv_cache; with return_lse also the lse.
    """
    problem, sinks = plans[0].problem, options.attention_sink
    arrays = Refs(
        kv_lens=batch.kv_lens,
        cu_q_lens=batch.cu_q_lens,
        distribution=batch.distribution,
        scalars=softmax.make_scalars(options),
        queries=layout.view_heads(problem, queries),
        # Token by token: pages that are neighbours are one copy.
        kv_cache=kv_cache.reshape(-1, *kv_cache.shape[2:]),
    )
    if problem.update_kv_cache:
        new_kv = pack_kv(keys, values, share_lanes=problem.shares_lanes)
        arrays = arrays._replace(new_kv=new_kv)
    for plan in plans:
        table = page_table.prepare(plan, batch.page_indices, batch.kv_lens)
        tiles = None if sinks is None else layout.sink_tiles(plan.tiles, sinks)
        results = _call(plan, arrays._replace(page_table=table, sinks=tiles))
        arrays = arrays._replace(output_before=results.output)
        if problem.update_kv_cache:
            arrays = arrays._replace(kv_cache=results.kv_cache_out)
    output, lse = layout.unview_output(problem, arrays.output_before)
    results = output, arrays.kv_cache.reshape(kv_cache.shape)
    if lse is None:
        return results
    _, _, owned = batch.token_positions(problem.num_tokens)
    return *results, jnp.where(owned[:, None], lse, -jnp.inf)


def _call(plan, arrays) -> Refs:
    """One `pallas_call`: from the inputs among the `Refs` to the outputs."""
    shapes = refs.outputs(plan)
    inputs, outputs = _names(arrays), _names(shapes)
    hbm = compat.hbm_memory_space(plan.interpret)
    spaces = {name: hbm if space is HBM else space for name, space in Refs.__annotations__.items()}
    in_hbm = [name for name in inputs if spaces[name] is hbm]
    placed = {name: compat.keep_in_hbm(getattr(arrays, name), plan.interpret) for name in in_hbm}

    def specs(names):
        return Refs(**{name: pl.BlockSpec(memory_space=spaces[name]) for name in names})

    (results,) = pl.pallas_call(
        partial(loop.kernel, plan),
        in_specs=(specs(inputs),),
        out_specs=(specs(outputs),),
        out_shape=(shapes,),
        scratch_shapes=(refs.scratch(plan),),
        input_output_aliases={
            inputs.index(before): outputs.index(after)
            for before, after in refs.ALIASES.items()
            if before in inputs and after in outputs
        },
        interpret=plan.interpret or False,
        compiler_params=compat.compiler_params(
            vmem_limit_bytes=plan.vmem_limit_bytes,
            disable_bounds_checks=plan.disable_bounds_checks,
            disable_semaphore_checks=plan.disable_semaphore_checks,
        ),
        name=f"rpa_{plan.case.label}",
    )(arrays._replace(**placed))
    return results


def _names(some):
    """Names of the fields that some `Refs` have, in order: JAX numbers them so."""
    return [name for name, value in some._asdict().items() if value is not None]
