"""One call over many chips: what each form of parallelism shares, and how forms are put together.

A *form* (`Heads`, `Sequences`, `DecodeContext`, `PrefillContext`) answers two questions:

    cuts      which dimension of which array it cuts into a part for each chip of its axis; arrays
              that are not named are whole on each of them
    on_chip   what one chip does around attention over its own parts

`Parallel` puts forms together: each cuts along an axis of the mesh of its own, and each wraps the
attention of the next. Inside is a rung of the ladder, which knows nothing of other chips.
"""

import functools
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rpa import plain
from rpa.doctor import num_threads, too_few_threads
from rpa.ladder import ragged_rung
from rpa.paging import get_kv_cache_shape
from rpa.ragged import should_validate

ARRAYS = ("queries", "keys", "values", "kv_cache", "batch")
RESULTS = ("output", "kv_cache", "lse")


@dataclass(frozen=True)
class Parallel:
    """Attention over the chips of a mesh, with the one signature: a rung like the others.

    The arrays are those of one chip, whole; JAX holds of each what its sharding says. Where they
    are not sharded as `sharding` says, JAX moves them there first, and that costs.

    Attributes:
        mesh: the chips, with named axes.
        forms: one for each axis that is used; the first is the outermost.
        attention: what runs on each chip: a rung with the one signature, and with `return_lse`
            inside of `DecodeContext` and `PrefillContext`. A function at the top of a module: a
            new `partial` at each call would be compiled each time.
    """

    mesh: Mesh
    forms: tuple
    attention: object = plain.attention

    def __init__(self, mesh, *forms, attention=plain.attention):
        missing = [form.axis for form in forms if form.axis not in mesh.shape]
        if missing or len({form.axis for form in forms}) < len(forms):
            raise ValueError(
                f"the forms cut along {[form.axis for form in forms]}, but the mesh has the axes "
                f"{list(mesh.shape)}: give each form an axis of the mesh, and no two the same."
            )
        for name, value in (("mesh", mesh), ("forms", forms), ("attention", attention)):
            object.__setattr__(self, name, value)

    def __call__(
        self, queries, keys, values, kv_cache, batch, *, donate=False, validate=None, **options
    ):
        """Attend, as `rpa.plain.attention` does; see there for arguments and options.

        Args:
            queries, keys, values, kv_cache, batch: whole, see the forms for what they expect.
            donate: whether the cache may be updated in place, which deletes the caller's array.
                Inside of a caller's jit it is the caller who donates.
            validate: see `rpa.ragged.should_validate`; forms check what they expect, too.
            **options: of `attention`. Arrays may be traced; numbers are compiled in.

        Returns:
            What `attention` returns for the whole batch, sharded.

        Raises:
            ValueError: for a batch that a form cannot share out, in words.
        """
        check_host_devices(self.mesh, self.attention)
        if should_validate(batch, validate):
            self._validate(queries.shape[0], kv_cache.shape, batch, options)
        traced = {n: v for n, v in options.items() if isinstance(v, (jax.Array, np.ndarray))}
        fixed = tuple((n, v) for n, v in options.items() if n not in traced)
        call = _call_and_donate if donate else _call
        return call(queries, keys, values, kv_cache, batch, traced, plan=self, fixed=fixed)

    def specs(self, num_kv_heads) -> dict[str, PartitionSpec]:
        """How each array of a call is cut, and each result: {its name: PartitionSpec}.

        >>> from rpa.parallel import Heads
        >>> specs = Parallel(jax.make_mesh((1,), ("model",)), Heads("model")).specs(8)
        >>> tuple(specs["kv_cache"])
        (None, None, 'model')
        """
        axes = {}  # {array: {dimension: the axes that cut it}}
        for form in self.forms:
            for name, dimension in form.cuts(self.mesh.shape[form.axis], num_kv_heads).items():
                axes.setdefault(name, {}).setdefault(dimension, []).append(form.axis)
        names = {*ARRAYS, *RESULTS, "attention_sink"}
        return {name: _partition_spec(axes.get(name, {})) for name in names}

    def sharding(self, name, num_kv_heads) -> NamedSharding:
        """Where an array of a call belongs: for `jax.device_put`, and for a caller's jit."""
        return NamedSharding(self.mesh, self.specs(num_kv_heads)[name])

    def cache_shape(
        self, total_num_pages, page_size, num_kv_heads, head_dim, kv_dtype, *, share_lanes=False
    ):
        """Shape of the whole cache: the caches of all chips, side by side.

        Each chip has the cache that one chip would have for its own heads, so where heads share
        32 bits, or are padded, the whole is not the cache of one chip: four float8 heads on four
        chips take two rows there, and four here.

        Args:
            total_num_pages: of all chips together.
            others: see `rpa.paging.get_kv_cache_shape`; num_kv_heads of the model.

        >>> from rpa.parallel import Heads
        >>> Parallel(jax.make_mesh((1,), ("x",)), Heads("x")).cache_shape(9, 16, 8, 128, "bfloat16")
        (9, 16, 8, 2, 128)
        """
        on_chip = num_kv_heads
        for form in self.forms:
            on_chip = form.kv_heads_on_chip(self.mesh.shape[form.axis], on_chip)
        shape = get_kv_cache_shape(
            total_num_pages, page_size, on_chip, head_dim, kv_dtype, share_lanes=share_lanes
        )
        cut_rows = self.specs(num_kv_heads)["kv_cache"][2:]
        num_chips = int(np.prod([self.mesh.shape[axis] for axis in cut_rows]))
        return (*shape[:2], shape[2] * num_chips, *shape[3:])

    def _validate(self, num_tokens, cache_shape, batch, options):
        batches = [(batch, num_tokens, cache_shape[0])]
        for form in self.forms:
            num_chips = self.mesh.shape[form.axis]
            batches = [part for whole in batches for part in form.batches(*whole, num_chips)]
        for part, tokens, pages in batches:
            part.validate(
                num_tokens=tokens,
                num_pages=pages,
                page_size=cache_shape[1],
                chunk_prefill_size=options.get("chunk_prefill_size"),
                update_kv_cache=options.get("update_kv_cache", True),
            )


@dataclass(frozen=True)
class Form:
    """What the forms have in common: an axis, and answers that fit most of them.

    Attributes:
        axis: the axis of the mesh along which it cuts.
    """

    axis: str

    def kv_heads_on_chip(self, num_chips, num_kv_heads) -> int:
        """How many KV heads a chip has, of those that are given."""
        return num_kv_heads

    def batches(self, batch, num_tokens, num_pages, num_chips):
        """What is to be checked on the host: (batch, its tokens, its pages) of independent parts.

        Raises:
            ValueError: if the form cannot share this batch out.
        """
        return [(batch, num_tokens, num_pages)]


def refuse_window(form, options):
    """Refuse a sliding window where keys are apart from their positions.

    >>> refuse_window(Form("x"), {"sliding_window": None})
    """
    if options.get("sliding_window") is not None:
        raise ValueError(
            f"sliding_window is {options['sliding_window']}, but {type(form).__name__} shares the "
            "keys of a sequence out, and a window needs their positions. A window also bounds "
            "what is read: share such layers out by Heads or Sequences."
        )


def check_host_devices(mesh, attention):
    """Refuse host devices on which kernels in the TPU interpreter would hang for ever.

    For want of threads (see `rpa.doctor.too_few_threads`), or because they belong to several
    processes: the interpreter has one memory per process, and waits there for devices of others.
    """
    devices = list(mesh.devices.flat)
    if any(device.platform != "cpu" for device in devices):
        return
    if few := too_few_threads(num_threads(), mesh.size):
        raise ValueError(f"{few}: set NPROC=32 in the environment before JAX starts.")
    if len({device.process_index for device in devices}) > 1 and attention is not ragged_rung:
        raise ValueError(
            "the mesh has host devices of several processes, and kernels in the TPU interpreter "
            "would hang for ever there: pass attention=rpa.ladder.ragged_rung, which is no kernel."
        )


def _partition_spec(axes_of):
    dimensions = range(max(axes_of, default=-1) + 1)
    axes = [tuple(axes_of.get(dimension, ())) for dimension in dimensions]
    return PartitionSpec(*(a[0] if len(a) == 1 else a or None for a in axes))


def _on_all_chips(queries, keys, values, kv_cache, batch, traced, *, plan, fixed):
    num_kv_heads = keys.shape[1]
    specs = plan.specs(num_kv_heads)
    attention = plan.attention
    for form in reversed(plan.forms):
        attention = form.on_chip(attention, plan.mesh.shape[form.axis], num_kv_heads)

    def one_chip(traced, *arrays):
        return tuple(attention(*arrays, validate=False, **dict(fixed), **traced))

    has_lse = dict(fixed).get("return_lse", False)
    return jax.shard_map(
        one_chip,
        mesh=plan.mesh,
        in_specs=(
            {
                name: specs["attention_sink"] if name == "attention_sink" else PartitionSpec()
                for name in traced
            },
            *(specs[name] for name in ARRAYS),
        ),
        out_specs=tuple(specs[name] for name in RESULTS[: 3 if has_lse else 2]),
        # A Pallas kernel does not say along which axes its results vary, so nothing can check it.
        check_vma=False,
    )(traced, queries, keys, values, kv_cache, batch)


_call = functools.partial(jax.jit, static_argnames=["plan", "fixed"])(_on_all_chips)
_call_and_donate = functools.partial(
    jax.jit, static_argnames=["plan", "fixed"], donate_argnames=["kv_cache"]
)(_on_all_chips)
