"""The DMA and compute timeline of any Pallas kernel that runs in the TPU interpreter, unchanged.

    from rpa.lab.copies.timeline import record_dmas

    with record_dmas() as timeline:
        my_kernel(...)                    # interpreted: interpret=interpreter.params()

    print(timeline.table())               # every start, wait, compute and block copy, in order
    timeline.copies[0].num_bytes          # also .source, .target, .semaphore, .start, .wait
    timeline.never_awaited                # copies that nobody waited for
    timeline.unfinished_wait              # the wait in which a kernel hangs, or None
    rpa.figures.timeline.gantt(timeline)  # the picture; see there for before and after
    predict_cycles(timeline, "v5e").total_cycles

`record_dmas` sees what the interpreter does, in the kernel's own order, also if the interpreter
executes a copy only when it is waited for. So it works for a learner's kernel as for rungs 5 to 7,
and a kernel that hangs or fails leaves the record of what it did until then.

Compute has no time in an interpreter. `predict_cycles` lays the record on a clock: copies take what
the chip's HBM takes, computing takes a multiple of it that the caller chooses. It is a prediction.
"""

import contextlib
from collections import deque

import numpy as np

from rpa import interpreter
from rpa.lab.copies.clock import Prediction, predict_cycles
from rpa.lab.copies.events import (
    HBM,
    Buffer,
    Compute,
    Copy,
    Event,
    Slice,
    Timeline,
    Writer,
    input_names,
    semaphore_name,
    short_name,
)

__all__ = [
    "Compute",
    "Copy",
    "Event",
    "Prediction",
    "Timeline",
    "page_labels",
    "predict_cycles",
    "record_dmas",
]


@contextlib.contextmanager
def record_dmas(names: dict[str, str] | None = None):
    """Record what kernels do in the TPU interpreter while the context is open.

    The first use in a process drops JAX's compiled functions, see `interpreter.observe`.

    Args:
        names: other names for arguments of the kernel, {"args[0]": "kv"}.

    Yields:
        A `Timeline`, empty for a kernel that was compiled, or interpreted with `interpret=True`.

    Raises:
        RuntimeError: if this JAX's interpreter cannot be observed.

    >>> import jax, jax.numpy as jnp
    >>> from jax.experimental import pallas as pl
    >>> from jax.experimental.pallas import tpu as pltpu
    >>> def kernel(x_ref, out_ref, buffer_ref, sem):
    ...     copy = pltpu.make_async_copy(x_ref.at[pl.ds(8, 8)], buffer_ref, sem)
    ...     copy.start()
    ...     copy.wait()
    ...     out_ref[...] = buffer_ref[...] + 1
    >>> call = pl.pallas_call(
    ...     kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    ...     in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
    ...     scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    ...     interpret=interpreter.params())
    >>> with record_dmas() as timeline:
    ...     _ = call(jnp.ones((16, 128)))
    >>> [(event.kind, event.num_bytes) for event in timeline.events]  # doctest: +ELLIPSIS
    [('start', 4096), ('wait', 4096), ('load', 4096), ('store', 4096), ('flush', 4096), ('step', 0)]
    >>> timeline.copies[0].source.label, timeline.copies[0].target.row
    ('x[8:16]', 'buffer')
    """
    recorder = Recorder(names)
    with interpreter.observe(recorder):
        yield recorder.timeline


class Recorder(Writer):
    """Makes a Timeline of `interpreter.InterpreterCall`s."""

    def __init__(self, names=None):
        super().__init__()
        self._names = names or {}
        self._begin([])

    def __call__(self, call):
        getattr(self, f"_on_{call.name}")(**call.arguments, result=call.result, where=call.where)

    def _begin(self, arguments):
        self._buffers, self._semaphores = {}, {}  # by the interpreter's ids
        self._block = None  # the half of a block copy that has been seen
        self._expected = deque(allocation_order(arguments))

    def _on_kernel(self, arguments, **_):
        self.begin_kernel()
        self._begin(arguments)

    def _name(self, space, shape=None):
        """The name of what is allocated now: arguments come first, in a known order."""
        if self._expected:
            return self._expected.popleft()
        number = len(self._buffers) + len(self._semaphores)
        return (f"{space} scratch {number}", shape)

    def _on_allocate(self, memory_space, val, result, **_):
        val = np.asarray(val)
        name, shape = self._name(memory_space.upper(), val.shape)
        # A block is smaller than its array, an array may be padded to whole blocks.
        shape = tuple(min(a, b) for a, b in zip(shape, val.shape, strict=True))
        space, name = memory_space.upper(), short_name(name, self._names)
        self._buffers[int(result)] = Buffer(name, space, shape, val.dtype.name)

    def _on_allocate_semaphores(self, result, **_):
        name = short_name(self._name("semaphore")[0], self._names)
        for index in np.ndindex(result.shape):
            self._semaphores[int(result[index])] = semaphore_name(name, index)

    def _slice(self, buffer_id, transforms):
        buffer = self._buffers[buffer_id]
        index = list(transforms) + [slice(None)] * (len(buffer.shape) - len(transforms))
        return Slice(
            buffer,
            tuple(
                range(*i.indices(size)) if isinstance(i, slice) else int(i)
                for i, size in zip(index, buffer.shape, strict=True)
            ),
        )

    def _on_dma_start(self, src_id, src_transforms, dst_id, dst_transforms, dst_sem_id, where, **_):
        source, target = self._slice(src_id, src_transforms), self._slice(dst_id, dst_transforms)
        self.start(source, target, self._semaphores.get(dst_sem_id, "semaphore"), where)

    def _on_dma_wait(self, sem_id, size, where, **_):
        self.wait(self._semaphores.get(sem_id, "semaphore"), int(size), where)

    def _on_get(self, memory_space, buffer_id, transforms, where, input_name=None, **_):
        part = self._slice(buffer_id, transforms)
        if input_name is None and where:
            self.note("load", source=part, num_bytes=part.num_bytes, where=where)
        elif input_name is not None or memory_space != "hbm":
            self._block = part  # the next store completes the pipeline's copy
        # What is left is the array's result, read by the host.

    def _on_store(self, memory_space, buffer_id, transforms, **_):
        kind = "flush" if memory_space == "hbm" else "fetch"
        self.block(kind, self._block, self._slice(buffer_id, transforms))

    def _on_swap(self, buffer_id, transforms, where, **_):
        part = self._slice(buffer_id, transforms)
        self.note("store", target=part, num_bytes=part.num_bytes, where=where)

    def _on_semaphore_signal(self, sem_id, where, **_):
        self.note("signal", semaphore=self._semaphores.get(sem_id, "barrier"), where=where)

    def _on_semaphore_wait(self, sem_id, where, **_):
        self.note("semaphore_wait", semaphore=self._semaphores.get(sem_id, "barrier"), where=where)

    def _on_step(self, **_):
        self.end_step()


def allocation_order(arguments):
    """(name, shape) in the order in which the interpreter allocates a kernel's arguments.

    Arrays of inputs, arrays of outputs that are no input's, then all arguments that are not in
    HBM, among them a block for each blocked input and output.
    """
    inputs = [a for a in arguments if a.role == "input"]
    outputs = [a for a in arguments if a.role == "output"]
    yield from zip(input_names(arguments), (a.shape for a in inputs), strict=True)
    yield from ((a.name, a.shape) for a in outputs if a.alias is None)
    blocks = [a for a in arguments if a.space != "hbm"]
    yield from ((a.name, a.block_shape) for a in blocks)


def page_labels(page_indices, pages_per_seq, *, page_size=None, block_tokens=None, cache=None):
    """A labeller for pictures: which sequence and page (or block) a copy of pages belongs to.

    Args:
        page_indices: i32[num_seqs * pages_per_seq], live entries only count; a page that two
            sequences share is labelled with the first.
        pages_per_seq: pages of a row of the table.
        page_size, block_tokens: if both are given, blocks are named instead of pages.
        cache: name of the cache's buffer, which may be indexed by tokens if page_size is given;
            None takes any HBM array indexed by a page first.

    Returns:
        A function from a Copy to its label, or None where it does not know.

    >>> from rpa.lab.copies.events import Buffer
    >>> cache = Buffer("kv_cache", "HBM", (9, 16, 4, 1, 128), "float32")
    >>> part = Slice(cache, (7, range(16), range(4), range(1), range(128)))
    >>> to = Slice(Buffer("kv", "VMEM", (16, 4, 1, 128), "float32"), part.index[1:])
    >>> copy = Copy(0, part, to, part.num_bytes, "sem", 0, None, 0, 0, "")
    >>> page_labels([3, 5, 7, 1], 2)(copy)
    'seq 1 page 0'
    """
    owners = {}
    for entry, page in enumerate(np.asarray(page_indices).tolist()):
        owners.setdefault(page, divmod(entry, pages_per_seq))
    pages_per_block = block_tokens // page_size if page_size and block_tokens else None

    def label(copy):
        end = copy.source if copy.source.buffer.space == HBM else copy.target
        place = end.index[0]
        if cache is not None and page_size and isinstance(place, range):
            place = place.start // page_size
        known = cache is None or end.buffer.name == cache
        if not (known and isinstance(place, int) and place in owners):
            return None
        seq, page = owners[place]
        if pages_per_block:
            return f"seq {seq} block {page // pages_per_block}"
        return f"seq {seq} page {page}"

    return label
