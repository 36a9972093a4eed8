"""Judge a learner's kernel by its schedule: the real compiler's, or what was recorded of its order.

The kernel travels to the compiler's process as source (`rpa.check.sandbox.pickling`) and is
compiled there for a chip that is not here. Where the compiler shows no schedule (no libtpu, or that
of Colab's jax 0.7.2) the order of its products is read from its trace, and the bundles of the
kernel of `rpa.lab.schedule.inner_loop` with the same order are taken, as they were recorded.
"""

import base64
import functools
import pickle

import jax

from rpa.check.errors import CannotShip, KernelFault
from rpa.check.runner import in_process
from rpa.check.sandbox.pickling import pack, unpack
from rpa.lab.schedule import inner_loop
from rpa.lab.schedule.cases import check_products
from rpa.lab.schedule.recorded import recorded
from rpa.lab.schedule.schedule import NoSchedule, schedule_for
from rpa.lab.schedule.values import CannotRun

SHAPES = inner_loop.shapes("odd stride")
"""Of q and kv for which a kernel is compiled."""

FLOPS = 4 * inner_loop.GROUP * inner_loop.NUM_KV_HEADS * inner_loop.HEAD_DIM * inner_loop.NUM_TOKENS
"""Of both products on SHAPES."""

REFUSALS = ("unsupported", "vmem overflow", "smem overflow")
"""Kinds of `rpa.lab.compile.words.KINDS` that the kernel is to blame for, not the machine."""


def with_schedule(judge):
    """A runner: the numbers in this process, then the schedule on the chip that the case names.

    Args:
        judge: (bundles, chip) -> words about what is wrong, or None. The last argument of a case is
            the chip; "" for a case that is about numbers only.
    """
    return functools.partial(_run, judge=judge)


def _run(drive, function, arguments, limit_s, judge):
    result = in_process(drive, function, arguments, limit_s)
    chip = arguments[-1]
    if chip and not is_model(function):
        bundles, how = bundles_of(function, chip)
        print(f"{chip}: {bundles:,} bundles, {how}.")
        if text := judge(bundles, chip):
            raise KernelFault(text)
    return result


def is_model(function) -> bool:
    """Whether this is a check's own NumPy function, of which there is nothing to compile."""
    return function.__module__.startswith("rpa.check.")


def bundles_of(kernel, chip) -> tuple[int, str]:
    """Bundles that a kernel executes on SHAPES, and where the number comes from, in words.

    A loop in the kernel counts as often as it runs. A run with fewer products than the work needs
    is no schedule of this kernel, and is refused.
    """
    try:
        parcel = base64.b64encode(pickle.dumps(pack(kernel))).decode()
        schedule = schedule_for(chip, shipped, *SHAPES, kwargs={"parcel": parcel})
    except NoSchedule as reason:
        if reason.kind in REFUSALS:
            raise KernelFault(f"The TPU compiler refuses your kernel: {reason}") from None
        ahead = heads_ahead(products(kernel))
        print(f"Not compiled: {reason}")
        words = f"as recorded for a kernel with Q K^T {ahead} ahead of P V (libtpu "
        return recorded("orders")[ahead], f"{words}{recorded('versions')['libtpu']})"
    except CannotShip as reason:
        raise KernelFault(str(reason)) from None
    return executed(schedule, chip), "compiled just now by the real TPU compiler"


def executed(schedule, chip) -> int:
    """Bundles of one run of a schedule on SHAPES.

    Raises:
        KernelFault: if it cannot be executed, or multiplies less than the products of SHAPES need.
    """
    try:
        run = schedule.execute(*SHAPES)
        check_products(schedule, run, chip, FLOPS, inner_loop.HEAD_DIM)
    except CannotRun as reason:
        raise KernelFault(
            f"The schedule of your kernel says nothing about its time: {reason}"
        ) from None
    return run.bundles


def shipped(q, kv, *, parcel):
    """A learner's kernel in its call; the compiler's process finds this by its name."""
    return inner_loop.call(unpack(pickle.loads(base64.b64decode(parcel))), q, kv)


def products(kernel) -> list[str]:
    """The products of a kernel in the order in which it is written: "QK" and "PV".

    >>> products(inner_loop.in_turn)[:4]
    ['QK', 'PV', 'QK', 'PV']
    """
    closed = jax.make_jaxpr(functools.partial(inner_loop.call, kernel))(*SHAPES)
    found = []
    _collect(closed.jaxpr, found)
    return found


def _collect(jaxpr, found):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (_, contracted), _ = eqn.params["dimension_numbers"]
            found.append("QK" if contracted == (1,) else "PV")
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                _collect(getattr(inner, "jaxpr", inner), found)


def _is_jaxpr(value):
    return hasattr(value, "eqns")


def heads_ahead(order) -> int:
    """How many products Q K^T are ahead when a P V comes, at the least; the last ones do not count.

    >>> heads_ahead(["QK", "PV", "QK", "PV"]), heads_ahead(["QK", "QK", "PV", "QK", "PV", "PV"])
    (0, 1)
    """
    total, least, seen, done = order.count("QK"), order.count("QK"), 0, 0
    for product in order:
        if product == "QK":
            seen += 1
            continue
        if seen < total or done == 0:
            least = min(least, seen - done - 1)
        done += 1
    return max(least, 0)
