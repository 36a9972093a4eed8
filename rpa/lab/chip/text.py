"""Parse the text of a compiled kernel: MLIR with one operation for each instruction of the chip.

libtpu writes it with `--xla_mosaic_dump_to` (`post-finalize-llo`). Control flow is structured,
values are in SSA form, a vector is one register of 8 sublanes x 128 lanes of 32 bits:

    %a = llo.vector_load %arg2 + %0 masked %1 : i32 -> vector<8x128x2xbf16>
    %b = llo.vunpack %a {format = #llo.vpack_format<compressed_bf16>, sublane_idx = 0 : i32} : ...
    "llo.vlatch"(%c) <{gain_latch_mode = #llo.gain_latch_mode<packed.bf16>, mxu_id = 0 : i32}> : ...
"""

import re
from dataclasses import dataclass, field

from rpa.lab.chip.errors import UnknownOperation


@dataclass
class Operation:
    """One operation.

    Attributes:
        name: "vector_load" of `llo.vector_load`; of other dialects in full, "scf.for".
        results, operands: names of values.
        form: what stands around the operands, "% + % masked %".
        attributes: {"sublane_idx": "0"}; of `#llo.vpack_format<compressed_bf16>` what is inside <>.
        types: the text behind the colon.
        regions: nested blocks.
        text: the whole line.
    """

    name: str
    results: list[str]
    operands: list[str]
    form: str
    attributes: dict[str, str]
    types: str
    text: str
    regions: list["Block"] = field(default_factory=list)

    @property
    def operand_type(self) -> str:
        """The type of the first operand."""
        return self.types.split("->")[0].split(" into ")[0].strip(" ()").split(", ")[0]

    @property
    def result_type(self) -> str:
        """The type of the result; where only one type stands there, it is that."""
        return self.types.split("->")[-1].strip(" ()")


@dataclass
class Block:
    """A list of operations and the values that are set when it begins."""

    arguments: list[str]
    operations: list[Operation]


@dataclass
class Function:
    """A function of the module: the kernel, or the index map of a window.

    Attributes:
        name: its name.
        arguments: names of its arguments.
        types: `llo.type` of each: "i32" of an index of the grid, "memref<...>" of a buffer.
        in_place: whether each argument is the array itself; otherwise it is a window of it.
        attributes: text of the attributes.
        body: the operations.
    """

    name: str
    arguments: list[str]
    types: list[str]
    in_place: list[bool]
    attributes: str
    body: Block


_RESULTS = re.compile(r"^(%[\w#:, %]+?) = ")
_NAME = re.compile(r'"?((?:llo|scf|func|arith|cf)\.[\w.]+|return)"?')
_VALUE = re.compile(r"%\w+(?:#\d+)?")
_BRACES = re.compile(r"<?\{([^{}]*)\}>?")
_ARGUMENT = re.compile(r"(%\w+): \S+ \{([^{}]*?)llo\.type = (memref<.*?>>|\w+)[^{}]*\}")


def parse(text) -> list[Function]:
    """The functions of a module; the first one is the kernel."""
    lines = iter(text.splitlines())
    functions = []
    for line in lines:
        if "func.func" in line:
            functions.append(_function(line, lines))
    if not functions:
        raise UnknownOperation(f"this is not the text of a compiled kernel: {text[:200]!r}.")
    return functions


def _function(head, lines):
    arguments = _ARGUMENT.findall(head)
    return Function(
        name=re.search(r"@([\w.$-]+)\(", head)[1],
        arguments=[name for name, _, _ in arguments],
        types=[kind for _, _, kind in arguments],
        in_place=["passthrough_operand" in before for _, before, _ in arguments],
        attributes=head.partition(") attributes ")[2] or head.rpartition("attributes ")[2],
        body=_block(lines)[0],
    )


def _block(lines):
    """Operations up to the closing brace, and the line of that brace."""
    block = Block([], [])
    for line in map(str.strip, lines):
        if not line or line.startswith("//"):
            continue
        if line.startswith("}"):
            return block, line
        if line.startswith("^"):
            block.arguments = re.findall(r"(%\w+):", line)
            continue
        operation = _operation(line)
        block.operations.append(operation)
        if line.endswith("{"):
            tail = "{"
            while tail.endswith("{"):  # } else {, } do {, }, {
                region, tail = _block(lines)
                operation.regions.append(region)
    return block, ""


def _operation(line):
    rest = line
    results = []
    if match := _RESULTS.match(line):
        results = [name for part in match[1].split(",") for name in _names(part.strip())]
        rest = line[match.end() :]
    found = _NAME.match(rest)
    if found is None:
        raise UnknownOperation(f"this line is not an operation that is known: {line[:200]!r}.")
    rest, attributes = rest[found.end() :], {}
    if not found[1].startswith("scf.") and (braces := _BRACES.search(rest)):
        attributes = _attributes(braces[1])
        rest = rest[: braces.start()].rstrip() + rest[braces.end() :]
    form, types = _split_types(rest)
    if form.startswith("(") and form.endswith(")"):  # the generic spelling
        form = form[1:-1]
    name = found[1].removeprefix("llo.")
    return Operation(
        *(name, results, _VALUE.findall(form), _VALUE.sub("%", form), attributes, types, line)
    )


def _names(text):
    """Names of "%4" or of "%4:2", which are two values.

    >>> _names("%4:2")
    ['%4#0', '%4#1']
    """
    name, _, count = text.partition(":")
    return [f"{name}#{i}" for i in range(int(count))] if count else [name]


def _attributes(text):
    """Attributes as {name: value}, without types and without the dialect's wrapping.

    >>> _attributes("format = #llo.vpack_format<b16>, n = 3 : i32, at = array<i32: 0, 4>")
    {'format': 'b16', 'n': '3', 'at': '0, 4'}
    """
    found = {}
    for part in re.split(r",\s*(?=[\w.]+ = )", text):
        name, _, value = part.partition(" = ")
        wrapped = re.fullmatch(r"#?[\w.]+<(?:i\d+: ?)?(.*)>", value.strip())
        if wrapped and "vector" not in value:
            value = wrapped[1]
        elif not value.startswith('"'):
            value = value.partition(" : ")[0]
        found[name.strip()] = value.strip()
    return found


def _split_types(rest):
    """What stands before the types, and the types: "%, % : i32 -> i32", also "[0 : 3] : ..."."""
    depth = 0
    for i, letter in enumerate(rest):
        depth += (letter in "[(") - (letter in "])")
        if letter == ":" and depth == 0:
            return rest[:i].strip(), rest[i + 1 :].strip()
    return rest.strip(), ""


def walk(block: Block):
    """All operations of a block, also the nested ones."""
    for operation in block.operations:
        yield operation
        for region in operation.regions:
            yield from walk(region)
