"""What one layer of attention takes on eight devices: an estimate, from what the compiler made.

Collectives and their bytes are counted in the compiled program. Times are estimates, and floors:
attention at the roofline of one device (`rpa.lab.predict.roofline`), and each byte that a device
sends over one link, in one direction, at the bandwidth that is published (`rpa.chips`). Latency of
a collective, a microsecond or so for each hop, is not in it.
"""

import hashlib
import json
import platform
from collections import Counter
from dataclasses import asdict, dataclass

from rpa import chips
from rpa.lab.compile import compiler, words
from rpa.lab.parallel import wire
from rpa.lab.parallel.cases import CASES
from rpa.lab.predict.roofline import floors


@dataclass(frozen=True)
class Estimate:
    """One case on one topology, one layer.

    Attributes:
        case, topology: names.
        error: why it was not compiled, or None.
        collectives: {kind: how often a layer runs it}.
        sent_bytes: that one device sends in a layer.
        cache_operations: lines of the program that go over the whole cache; there should be none.
        on_chip_us: attention of one device, at least.
        wire_us: what is sent, at least.
        one_chip_us: all of the attention on one device, at least.
        overlaps: whether wire and attention run at the same time.
    """

    case: str
    topology: str
    error: str | None = None
    collectives: dict | None = None
    sent_bytes: float = 0.0
    cache_operations: tuple = ()
    on_chip_us: float = 0.0
    wire_us: float = 0.0
    one_chip_us: float = 0.0
    overlaps: bool = False

    @property
    def time_us(self) -> float:
        """Attention and wire, one after the other or at the same time."""
        together = max if self.overlaps else lambda a, b: a + b
        return together(self.on_chip_us, self.wire_us)


def estimate_for(case, topology, *, timeout_s=600.0) -> Estimate:
    """Compile a case for a topology, and estimate what a layer of it takes.

    Args:
        case: a name in `CASES`.
        topology: eight devices or more, one of `TOPOLOGIES`.
        timeout_s: end the compiler after this many seconds.

    Returns:
        An Estimate; what the compiler refuses is one with an `error`.
    """
    answer = _compile(case, topology, timeout_s)
    if "message" in answer:
        _, text = words.explain(answer["message"], topology, compiler.compile_versions())
        return Estimate(case, topology, error=text)
    return read(case, topology, answer)


def read(case, topology, answer) -> Estimate:
    """The estimate, from what the worker answered: the program, and the shape of its cache."""
    given = CASES[case]
    # Around the ring: the program sends once before its loop, and num_devices - 2 times in it.
    trips = {1: 1, 2: given.num_devices - 2}
    found = [(c, trips[c.depth]) for c in wire.collectives(answer["hlo"])]
    counts = Counter()
    for collective, times in found:
        counts[collective.kind] += times
    sent_bytes = sum(collective.sent_bytes * times for collective, times in found)
    on_chip_lengths, on_chip_heads = given.on_chip
    return Estimate(
        case,
        topology,
        collectives=dict(counts),
        sent_bytes=sent_bytes,
        cache_operations=tuple(wire.whole_cache_operations(answer["hlo"], answer["cache_shape"])),
        on_chip_us=floors(on_chip_lengths, topology, model=on_chip_heads)[-1].time_us,
        wire_us=sent_bytes / chips.chip(topology).ici_bytes_per_s * 1e6,
        one_chip_us=floors(given.lengths, topology, model=given.heads)[-1].time_us,
        overlaps=given.overlaps,
    )


def _compile(case, topology, timeout_s):
    spec = {
        "function": "rpa.lab.parallel.cases:program",
        "case": case,
        "topology": topology,
        "given": str(asdict(CASES[case])),
        "versions": compiler.compile_versions(),
        "home": str(compiler.__file__),
    }
    if spec["versions"]["libtpu"] is None:
        _, text = words.no_libtpu(platform.system(), platform.machine())
        return {"message": text}
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    entry = compiler.cache_dir() / f"parallel-{key}.json"
    kept = compiler.read_kept(entry)
    if kept is not None:
        return kept["result"]
    answer = compiler.ask_worker(spec, None, timeout_s, worker="rpa.lab.parallel.worker")
    if "message" not in answer:
        files = answer.pop("files")
        compiler.write_kept(entry, {"result": answer, "files": files})
    return answer
