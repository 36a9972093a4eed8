"""Run a kernel's scalar instructions, to count which bundles a batch executes, and how often.

What a kernel executes depends on its loops, and those on lengths and page tables: integers that
the scalar core reads from its memory, SMEM. So the scalar instructions of the listing are
executed here, in Python, with the real metadata of a batch, and nothing else: vector instructions
never decide where the program goes. Every bundle passed is one cycle. Not in it is whatever the
schedule does not hold: waits for DMAs, instruction fetch.

Two things of the machine matter. A branch takes effect after `DELAY_SLOTS` more bundles, which are
executed either way. And a DMA into SMEM is done at its start, as if the wait for it had come.
"""

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

DELAY_SLOTS = 4
"""Bundles behind a branch that are executed before it takes effect."""

GRANULE_BYTES = 32
"""Unit of the sizes of DMAs and of addresses in HBM."""

LONGEST_RUN = 50_000_000
"""Basic blocks after which a run is given up: a kernel that never ends."""

_POINTER_SHIFT = 40
"""Pointers are made up: thing n lies at (16 n + 1) << 40, further apart than any memory is large.

Some chips scale pointers before a DMA (words to bytes, tiles to granules). 16 n + 1 is odd, so its
lowest set bit says by how much.
"""


class CannotRun(ValueError):
    """The scalar program does something that is not understood here; the message says what."""


class Event(NamedTuple):
    """A DMA that starts, or a wait for DMAs.

    Attributes:
        cycle: bundles executed before it.
        action: "hbm_to_vmem", "vmem_to_hbm", ... for a start, or "wait".
        bytes: size of the copy, or what is waited for.
        semaphore: what a copy signals at its end, and what a wait waits for.
    """

    cycle: int
    action: str
    bytes: int
    semaphore: int


@dataclass(frozen=True)
class Execution:
    """What one run executed.

    Attributes:
        hits: how often each bundle was executed, int64[num_bundles].
        copies: {(kind, bundle, bytes): count} of the DMAs started; kind is "hbm_to_vmem", ...
        events: starts and waits of DMAs in order, if they were asked for.
        outputs: {operand: {word: value}} of what the scalar core wrote into operands.
    """

    hits: np.ndarray
    copies: Counter = field(default_factory=Counter)
    events: tuple[Event, ...] = ()
    outputs: dict[int, dict[int, int]] = field(default_factory=dict)

    @property
    def bundles(self) -> int:
        """All bundles executed: cycles without waits."""
        return int(self.hits.sum())

    def bytes_moved(self, kind="") -> int:
        """Bytes of all DMAs, or of those of a kind."""
        return sum(
            size * count for (of, _, size), count in self.copies.items() if of.startswith(kind)
        )

    def __sub__(self, other):
        """What this run executed more than another one of the same kernel."""
        copies = Counter(self.copies)
        copies.subtract(other.copies)
        return Execution(self.hits - other.hits, Counter({k: n for k, n in copies.items() if n}))


class Program:
    """The scalar instructions of a listing, compiled to one Python function a basic block.

    Args:
        listing: a `rpa.lab.schedule_dump.Listing`.

    Raises:
        CannotRun: if a branch is of a kind that is not known.
    """

    def __init__(self, listing):
        self.num_bundles = len(listing.slots)
        self.branches = branches(listing)
        self.leaders = _leaders(self.num_bundles, self.branches)
        texts = [[] for _ in self.leaders]
        for bundle, text in listing.scalar:
            texts[bisect_right(self.leaders, bundle) - 1].append((bundle, text))
        coder = _Coder(listing.scalar)
        self._blocks = [
            coder.function(block, self._successors(start)) for start, block in self._zip(texts)
        ]

    def _zip(self, texts):
        return zip(self.leaders, texts, strict=True)

    def _successors(self, start):
        """Index of the next block, and of the one that a branch goes to; one behind: the end."""
        after = bisect_right(self.leaders, start)
        end = self.leaders[after] if after < len(self.leaders) else self.num_bundles
        branch = self.branches.get(end - DELAY_SLOTS - 1)
        target = None if branch is None else self.leaders.index(branch.target)
        return after, target

    def run(self, operands, keep_events=False) -> Execution:
        """Execute the kernel with these integer operands.

        Args:
            operands: {index: int32 array} of the kernel's operands that hold integers.
            keep_events: note every start of a DMA and every wait, with its cycle.

        Raises:
            CannotRun: if a branch depends on what only the vector units know.
        """
        machine = _Machine(operands, keep_events)
        ends = [*self.leaders[1:], self.num_bundles]
        lengths = [end - start for start, end in zip(self.leaders, ends, strict=True)]
        counts = [0] * len(self._blocks)
        blocks, current, steps = self._blocks, 0, 0
        while current < len(blocks):
            counts[current] += 1
            steps += 1
            if steps > LONGEST_RUN:
                raise CannotRun(f"the kernel did not end within {LONGEST_RUN} basic blocks.")
            machine.cycle += lengths[current]
            # A cycle in this block is the one at its end, less what is left of the block.
            machine.end = ends[current]
            current = blocks[current](machine)
        hits = np.repeat(np.array(counts, np.int64), lengths)
        return Execution(hits, machine.copies, tuple(machine.events or ()), machine.outputs())


@dataclass(frozen=True)
class Branch:
    """A branch: where it goes, and the predicate (with "!" in front, negated) or None."""

    target: int
    predicate: str | None


_BRANCH = re.compile(r"%\w+ = sbr\.rel (?:\((!?%p\w+)\) )?target bundleno = (\d+)")


def branches(listing) -> dict[int, Branch]:
    """{bundle: Branch} of a listing.

    Raises:
        CannotRun: if there is a branch of another kind.
    """
    found = {}
    for bundle, text in listing.scalar:
        if re.match(r"(%\w+ = )?(sbr|s?call|halt)", text) is None:
            continue
        match = _BRANCH.match(text)
        if match is None:
            raise CannotRun(f"bundle {bundle:#x}: branch of an unknown kind: {text[:100]}")
        found[bundle] = Branch(int(match[2]), match[1])
    return found


def _leaders(num_bundles, found):
    """First bundles of the basic blocks, in order."""
    starts = {0} | {branch.target for branch in found.values()}
    starts |= {bundle + DELAY_SLOTS + 1 for bundle in found}
    for bundle in found:
        inside = [s for s in starts if bundle < s <= bundle + DELAY_SLOTS]
        if inside:
            raise CannotRun(f"bundle {inside[0]:#x} is entered between a branch and its effect.")
    return sorted(s for s in starts if s < num_bundles)


class _Unknown:
    """A value that only the vector units know; harmless until something is decided by it."""

    def __init__(self, origin):
        self.origin = origin

    def _same(self, *_):
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = _same
    __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rlshift__ = _same
    __rshift__ = __rrshift__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _same
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __hash__ = _same

    def __bool__(self):
        raise CannotRun(f"a branch or a copy depends on a value from `{self.origin[:120]}`.")


class _Registers(dict):
    def __missing__(self, name):
        return _Unknown(f"{name}, which nothing wrote")


class _Machine:
    """Registers and SMEM of the scalar core, and a log of DMAs."""

    def __init__(self, operands, keep_events):
        self.cycle = self.end = 0
        self.events = [] if keep_events else None
        self.operands = {i: np.asarray(x).reshape(-1) for i, x in operands.items()}
        self.registers = _Registers()
        self.smem = {}
        self.hbm = {}
        self.copies = Counter()

    def copy(self, kind, bundle, granules, semaphore):
        """Note a DMA."""
        if isinstance(granules, _Unknown):
            bool(granules)
        self.copies[kind, bundle, granules * GRANULE_BYTES] += 1
        self.note(kind, bundle, granules, semaphore)

    def note(self, action, bundle, granules, semaphore):
        """Keep an event, if they are kept."""
        if self.events is not None:
            cycle = self.cycle - self.end + bundle
            self.events.append(Event(cycle, action, granules * GRANULE_BYTES, semaphore))

    def load(self, place, target):
        """Read SMEM; what was never written is not known, which matters if it decides anything."""
        value = self.smem.get(place)
        return _Unknown(f"{target} = sld, of SMEM that nothing wrote") if value is None else value

    def copy_words(self, source_space, source, granules, target_space, target):
        """Copy words between SMEM and HBM (or VMEM, for operands that wait there)."""
        from_thing, first, from_scale = _resolve(source)
        to_thing, start, to_scale = _resolve(target)
        words = GRANULE_BYTES // 4
        first = first // from_scale if source_space == "smem" else first * words
        start = start // to_scale if target_space == "smem" else start * words
        for word in range(granules * words):
            value = self._read(source_space, from_thing, first + word)
            if value is None:
                continue
            if target_space == "smem":
                self.smem[_pointer(to_thing) + start + word] = value
            else:
                self.hbm[to_thing, start + word] = value

    def _read(self, space, thing, word):
        """A word of a thing; None if nothing wrote it."""
        if space == "smem":
            return self.smem.get(_pointer(thing) + word)
        if (thing, word) in self.hbm or thing >= _FIRST_SYMBOL:
            return self.hbm.get((thing, word))
        array = self.operands.get(thing)
        if array is None:
            return _Unknown(f"operand {thing}, whose values were not given")
        # What lies behind an operand's end is its padding.
        return int(array[word]) if word < len(array) else 0

    def operand(self, index):
        """An operand that is passed by its value."""
        return self._read("hbm", index, 0)

    def outputs(self):
        """{operand: {word: value}} of what scalar code wrote into operands."""
        found = {}
        for (thing, word), value in self.hbm.items():
            if thing < _FIRST_SYMBOL:
                found.setdefault(thing, {})[word] = value
        return found


_FIRST_SYMBOL = 1000
"""Things below are operands, from here on the kernel's own allocations."""


def _pointer(n):
    return (16 * n + 1) << _POINTER_SHIFT


def _resolve(pointer):
    """Number of the thing, offset in it, and the factor that both were scaled by.

    Raises:
        CannotRun: if it is no pointer.
    """
    if isinstance(pointer, _Unknown):
        raise CannotRun(f"a copy's address depends on a value from `{pointer.origin[:120]}`.")
    if pointer < 1 << _POINTER_SHIFT:
        raise CannotRun(f"a copy's address is {pointer}, which is no pointer.")
    top = pointer >> _POINTER_SHIFT
    scale = top & -top
    return top // scale // 16, pointer & ((1 << _POINTER_SHIFT) - 1), scale


def _wrap(x):
    """To 32 bits, signed; pointers stay as they are."""
    if isinstance(x, _Unknown) or x >= 1 << _POINTER_SHIFT:
        return x
    return (x + 0x80000000 & 0xFFFFFFFF) - 0x80000000


# The compiler computes ahead: a value may be unknown, or a predicate, on a path that is not taken.


def _no(x):
    return x if isinstance(x, _Unknown) else not x


def _both(x, y):
    if isinstance(x, _Unknown):
        return y if y is False else x
    return y if x else False


def _choose(condition, yes, no):
    if isinstance(condition, _Unknown):
        return condition
    return yes if condition else no


def _divide(x, y):
    if isinstance(y, _Unknown):
        return y
    return x // y if y else 0


_BINARY = {
    "sadd.s32": "wrap({} + {})",
    "ssub.s32": "wrap({} - {})",
    "smul.u32": "wrap({} * {})",
    "smul.s32": "wrap({} * {})",
    "sshll.u32": "wrap({} << {})",
    "sshra.s32": "({} >> {})",
    "sshrl.u32": "wrap(unsigned({}) >> {})",
    "sand.u32": "({} & {})",
    "sor.u32": "({} | {})",
    "sxor.u32": "({} ^ {})",
    "smin.s32": "least({}, {})",
    "smax.s32": "most({}, {})",
    "smin.u32": "wrap(least(unsigned({}), unsigned({})))",
    "smax.u32": "wrap(most(unsigned({}), unsigned({})))",
    "smulhi.u32": "wrap(unsigned({}) * unsigned({}) >> 32)",
    "sdiv.u32": "wrap(divide(unsigned({}), unsigned({})))",
    "pand": "both({}, {})",
    "por": "no(both(no({}), no({})))",
    "pnand": "no(both({}, {}))",
    "pnor": "both(no({}), no({}))",
    "pxor": "({} != {})",
}
_ARGUMENT_NAME = re.compile(r"/\*\w+=\*/")

_UNARY = {"smov.u32": "{}", "pmov": "{}", "pneg": "no({})", "snot.u32": "wrap(~{})"}
_UNARY |= dict.fromkeys(
    ["int_to_ptr.hbm", "int_to_ptr.vmem", "int_to_ptr.smem", "int_to_ptr.sflag"], "{}"
)
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


class _Coder:
    """Writes the instructions of a basic block as a Python function."""

    HELPERS = {
        "wrap": _wrap,
        "unsigned": lambda x: x if isinstance(x, _Unknown) else x & 0xFFFFFFFF,
        "least": lambda x, y: _choose(x <= y, x, y),
        "most": lambda x, y: _choose(x >= y, x, y),
        "no": _no,
        "both": _both,
        "choose": _choose,
        "divide": _divide,
        "is_unknown": lambda x: isinstance(x, _Unknown),
        "Unknown": _Unknown,
    }

    def __init__(self, scalar):
        self.symbols = {}
        # A phi takes what was written last into its physical register by one of its sources.
        self.phi_sources = set()
        for _, text in scalar:
            if " sphi " in text or " pphi " in text:
                self.phi_sources |= set(re.findall(r"%[sp]\d+_[sp]\d+", text.split("=", 1)[1]))

    def function(self, block, successors):
        """A function of the machine that executes a block and returns the next one's index."""
        after, target = successors
        lines = ["def run(m):", " r, s, taken = m.registers, m.smem, False"]
        for bundle, texts in _by_bundle(block):
            for text in texts:
                lines += [f" {line}" for line in self._statement(bundle, text)]
        lines.append(
            f" return {after}" if target is None else f" return {target} if taken else {after}"
        )
        scope = dict(self.HELPERS)
        exec("\n".join(lines), scope)
        return scope["run"]

    def _statement(self, bundle, text):
        match = re.match(r"(?:(%\w+) = )?([\w.]+)\s*(.*)", text, re.S)
        target, op, rest = match.groups()
        if op == "sbr.rel":
            predicate = _BRANCH.match(text)[1]
            return [f"taken = bool({self._predicate(predicate) if predicate else True})"]
        if op == "dma.done.wait":
            return self._wait(bundle, rest)
        if op.startswith("dma."):
            return self._copy(bundle, op, rest)
        rest = _ARGUMENT_NAME.sub("", rest)
        if op == "sst":
            return self._store(rest)
        if op == "sld":
            return self._load(target, rest)
        guard, otherwise, operands = self._split(rest)
        value = self._value(op, operands, text)
        if otherwise is not None:
            value = f"choose({guard}, {value}, {otherwise})"
            guard = None
        return self._assign(target, value, guard)

    def _assign(self, target, value, guard):
        names = [f"r[{target!r}]"]
        if target in self.phi_sources:
            names.append(f"r[{_physical(target)!r}]")
        names = " = ".join(names)
        if guard is None:
            return [f"{names} = {value}"]
        # Nothing is written where the guard fails: the register keeps what it has.
        return [f"g = {guard}", f"if is_unknown(g): {names} = g", f"elif g: {names} = {value}"]

    def _value(self, op, operands, text):
        if op in ("sphi", "pphi"):
            return f"r[{_physical(text)!r}]"
        if op.startswith("inlined_call_operand"):
            index = int(re.search(r"index: (\d+)", text)[1])
            by_value = "<no memory space>" in text
            return f"m.operand({index})" if by_value else str(_pointer(index))
        if op == "scalar_select":
            condition, yes, no = operands
            return f"choose({condition}, {yes}, {no})"
        if op.startswith("scalar_lea."):
            return f"({' + '.join(operands)})"
        compare = re.fullmatch(r"scmp\.(\w\w)\.([su])32(?:\.\w+)?", op)
        if compare is not None:
            form = "{}" if compare[2] == "s" else "unsigned({})"
            left, right = (form.format(operand) for operand in operands)
            return f"({left} {_COMPARE[compare[1]]} {right})"
        form = _UNARY.get(op) if len(operands) == 1 else _BINARY.get(op)
        if form is None:
            return f"Unknown({text!r})"
        return form.format(*operands)

    def _split(self, rest):
        """Guard, value where the guard fails, operands: of "(!%p1, %s2), %s3, 4"."""
        rest = _ARGUMENT_NAME.sub("", rest).replace("[resolvable:$true]", "").strip()
        guard = otherwise = None
        match = re.match(r"\((!?%p\w+)(?:, ([^)]*))?\),?\s*", rest)
        if match:
            guard, rest = self._predicate(match[1]), rest[match.end() :]
            otherwise = None if match[2] is None else self._operand(match[2])
        # "scalar_lea.vmem %s1, 1152 [#allocation3]": what it points into is a note, no operand.
        rest = re.sub(r"(?<=[\w\]]) \[#\w+\]", "", rest)
        return guard, otherwise, [self._operand(x) for x in rest.split(",") if x.strip()]

    def _operand(self, text):
        """A register, a number or a symbol as Python."""
        text = text.strip()
        if re.fullmatch(r"%[sp]\d+_[sp]\d+", text):
            return f"r[{text!r}]"
        if re.fullmatch(r"0x[0-9a-f]+|-?\d+", text):
            return str(_wrap(int(text, 0)))
        if text.startswith("[#"):
            return self._address(text)
        return f"Unknown({text!r})"

    def _predicate(self, text):
        name = f"r[{text.lstrip('!')!r}]"
        return f"no({name})" if text.startswith("!") else name

    def _address(self, text):
        """The parts of "[smem:[#allocation11 + $0x2]]" or "[#allocation3]", added."""
        inside = re.sub(r"^\[(smem:\[)?|\]+$", "", text.strip())
        parts = []
        for part in inside.split("+"):
            part = part.strip()
            if part.startswith("#"):
                number = self.symbols.setdefault(part, _FIRST_SYMBOL + len(self.symbols))
                parts.append(str(_pointer(number)))
            elif part.startswith("$"):
                parts.append(str(int(part[1:], 0)))
            else:
                parts.append(self._operand(part))
        return f"({' + '.join(parts)})"

    def _load(self, target, rest):
        place, guard = re.fullmatch(r"(\[smem:\[.*?\]\])\s*(?:\((.*)\))?", rest).groups()
        place = self._address(place)
        value = f"m.load({place}, {target!r})"
        return self._assign(target, value, self._predicate(guard) if guard else None)

    def _store(self, rest):
        match = re.fullmatch(r"(\[smem:\[.*?\]\])\s*(?:\((.*?)\),\s*)?(.*)", rest)
        place, guard, value = match.groups()
        line = f"s[{self._address(place)}] = {self._operand(value)}"
        return [f"if {self._predicate(guard)}: {line}"] if guard else [line]

    def _copy(self, bundle, op, rest):
        kind = {"dma.general": "hbm_to_hbm"}.get(op, op.removeprefix("dma."))
        granules = self._argument(rest, "size_in_granules")
        semaphore = self._argument(rest, "dst_syncflagno")
        lines = [f"m.copy({kind!r}, {bundle}, {granules}, {semaphore})"]
        source, _, target = kind.partition("_to_")
        if "smem" in (source, target):
            first, second = (self._argument(rest, space) for space in (source, target))
            lines.append(f"m.copy_words({source!r}, {first}, {granules}, {target!r}, {second})")
        guard = re.match(r"(?:\[thread:\S*\]\s*)?\((!?%p\w+)\)", rest)
        return [f"if {self._predicate(guard[1])}: {line}" for line in lines] if guard else lines

    def _wait(self, bundle, rest):
        guard, _, (semaphore, granules) = self._split(rest)
        line = f"m.note('wait', {bundle}, {granules}, {semaphore})"
        return [f"if {guard}: {line}"] if guard else [line]

    def _argument(self, rest, name):
        return self._operand(re.search(rf"/\*{name}=\*/([^,]+)", rest)[1])


def _by_bundle(block):
    """(bundle, texts) with phis first: all else of their bundle sees what they choose."""
    bundles = {}
    for bundle, text in block:
        bundles.setdefault(bundle, []).append(text)
    for bundle, texts in bundles.items():
        yield bundle, sorted(texts, key=lambda text: "phi " not in text)


def _physical(text):
    """The register of "%s24750_s24 ...", s24."""
    return re.match(r"%[sp]\d+_([sp]\d+)", text)[1]
