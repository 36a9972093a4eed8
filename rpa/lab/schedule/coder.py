"""From the compiler's scalar instructions to Python: one function a basic block."""

import re

from rpa.lab.schedule.values import FIRST_SYMBOL, HELPERS, pointer, wrap

BRANCH = re.compile(r"%\w+ = sbr\.rel (?:\((!?%p\w+)\) )?target bundleno = (\d+)")
"""The one kind of branch: its predicate, if it has one, and the bundle it goes to."""

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


class Coder:
    """Writes the instructions of a basic block as a Python function."""

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
        scope = dict(HELPERS)
        exec("\n".join(lines), scope)
        return scope["run"]

    def _statement(self, bundle, text):
        match = re.match(r"(?:(%\w+) = )?([\w.]+)\s*(.*)", text, re.S)
        target, op, rest = match.groups()
        if op == "sbr.rel":
            predicate = BRANCH.match(text)[1]
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
            return f"m.operand({index})" if by_value else str(pointer(index))
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
            return str(wrap(int(text, 0)))
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
                number = self.symbols.setdefault(part, FIRST_SYMBOL + len(self.symbols))
                parts.append(str(pointer(number)))
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
        source, _, target = kind.partition("_to_")
        if "smem" in (source, target):
            first, second = (self._argument(rest, space) for space in (source, target))
            beyond = second if source == "smem" else first
            lines = [
                f"m.copy({kind!r}, {bundle}, {granules}, {semaphore}, {beyond})",
                f"m.copy_words({source!r}, {first}, {granules}, {target!r}, {second})",
            ]
        else:
            lines = [f"m.copy({kind!r}, {bundle}, {granules}, {semaphore})"]
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
