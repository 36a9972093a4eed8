"""What crosses the wire: the collectives of a compiled program, read from its HLO."""

import re
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "f8e4m3fn": 1, "f8e5m2": 1}


@dataclass(frozen=True)
class Collective:
    """One collective operation in the text of a program.

    Attributes:
        kind: one of KINDS.
        result_bytes: of its result on one device.
        group_size: devices that take part together.
        depth: loops around it.
    """

    kind: str
    result_bytes: int
    group_size: int
    depth: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends: those of a ring, which no algorithm can undercut."""
        n = self.group_size
        return (
            self.result_bytes
            * {
                "all-gather": (n - 1) / n,
                "all-reduce": 2 * (n - 1) / n,
                "reduce-scatter": n - 1,
                "collective-permute": 1,
                "all-to-all": (n - 1) / n,
            }[self.kind]
        )


def collectives(hlo) -> list[Collective]:
    """Every collective in the HLO, in the order of the text.

    >>> hlo = '''
    ... ENTRY %main (x: f32[8]) -> f32[64] {
    ...   %g = f32[64]{0} all-gather(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
    ... }'''
    >>> collectives(hlo)
    [Collective(kind='all-gather', result_bytes=256, group_size=8, depth=0)]
    """
    depths = _depths(hlo)
    found = []
    for computation, line in _lines(hlo):
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match:
            sizes = [_array_bytes(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", match[1])]
            # The asynchronous form has operand and result in a tuple, and the result is no smaller.
            result_bytes = max(sizes) if match[3] else sum(sizes)
            group = _group_size(line, match[2])
            found.append(Collective(match[2], result_bytes, group, depths[computation]))
    return found


def whole_cache_operations(hlo, shape, dtype="bf16") -> list[str]:
    """Lines that go over all of the cache: copies, slices, fusions; kernels take references.

    Args:
        hlo: the text of a program.
        shape: of the cache on one device.
        dtype: as HLO writes it.

    >>> whole_cache_operations("%c = bf16[2,3]{1,0} copy(%x)", (2, 3))
    ['%c = bf16[2,3]{1,0} copy(%x)']
    """
    cache = re.escape(f"{dtype}[{','.join(map(str, shape))}]")
    moves = r"(copy|copy-start|slice-start|fusion|scatter|convert|transpose|dynamic-update-slice)\("
    return [line for _, line in _lines(hlo) if re.search(rf"= .*{cache}.* {moves}", line)]


def _lines(hlo):
    """(name of its computation, line) of each operation."""
    computation = ""
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%([\w.-]+) \(", line)
        computation = header[1] if header else computation
        if "=" in line and not header:
            yield computation, line.strip()


def _depths(hlo):
    """Loops around each computation."""
    caller, depths = {}, {}
    for computation, line in _lines(hlo):
        depths[computation] = 0
        for role, called in re.findall(r"(body|calls|to_apply|condition)=%([\w.-]+)", line):
            caller[called] = (computation, role == "body")

    def depth(computation):
        if computation not in caller:
            return 0
        outer, is_loop = caller[computation]
        return depth(outer) + is_loop

    return {computation: depth(computation) for computation in depths}


def _array_bytes(dtype, dimensions):
    count = np.prod([int(n) for n in dimensions.split(",") if n], dtype=np.int64)
    return int(count) * ITEM_BYTES.get(dtype, 0)


def _group_size(line, kind):
    if kind == "collective-permute":
        return len(re.findall(r"\{\d+,\d+\}", line.partition("source_target_pairs=")[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    return int(re.search(r"replica_groups=\[\d+,(\d+)\]", line)[1])
