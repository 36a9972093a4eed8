"""From a function of the compiled text to a Python function: one line for each instruction.

    v_get3A = load_3(machine, v_arg2)
    v_mul3A = multiply_7(v_get3A, v_two)

The source is kept (`Translated.source`): that is what the chip executes, in words of Python.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from rpa.lab.chip.errors import UnknownOperation
from rpa.lab.chip.instructions import function_of
from rpa.lab.chip.instructions.scalar import constant_value
from rpa.lab.chip.text import Block, Function, Operation

_TERMINATORS = ("scf.yield", "scf.condition", "return", "yield")


class Translated(NamedTuple):
    """A function of the compiled text as Python.

    Attributes:
        run: called with the machine and the function's arguments.
        source: its source.
    """

    run: Callable
    source: str


def translate(function: Function, watch: Callable | None = None) -> Translated:
    """Translate a function.

    Args:
        function: what to translate.
        watch: called after every instruction with its `Operation` and what it gave, None of a
            store; it makes the source twice as long.

    Raises:
        UnknownOperation: if an instruction is not in the table; its name is in the message.
    """
    translation = _Translation(watch)
    arguments = "".join(f", {_name(argument)}" for argument in function.arguments)
    translation.emit(0, f"def run(machine{arguments}):")
    results = translation.block(function.body, 1)
    translation.emit(1, f"return ({''.join(f'{result}, ' for result in results)})")
    source = "\n".join(translation.lines)
    names = dict(translation.names)
    exec(compile(source, f"<{function.name}, compiled>", "exec"), names)
    return Translated(names["run"], source)


def _name(value) -> str:
    """A value's name in Python.

    >>> _name("%while3A_4#1")
    'v_while3A_4__1'
    """
    return "v_" + value[1:].replace("#", "__")


class _Translation:
    def __init__(self, watch):
        self.lines, self.names, self.watch = [], {}, watch

    def emit(self, depth, text):
        self.lines.append(" " * depth + text)

    def assign(self, depth, targets, values):
        if targets:
            self.emit(depth, f"{', '.join(targets)} = {', '.join(values)}")

    def keep(self, label, value) -> str:
        """A global name for a function or a constant."""
        name = f"{label}_{len(self.names)}"
        self.names[name] = value
        return name

    def block(self, block: Block, depth) -> list[str]:
        """Translate operations up to the last one, and return what that one hands on."""
        for operation in block.operations:
            if operation.name in _TERMINATORS:
                return [_name(value) for value in operation.operands]
            try:
                self.operation(operation, depth)
            except ValueError as error:
                raise UnknownOperation(
                    f"{operation.text[:200]!r} cannot be read ({error})."
                ) from error
        return []

    def operation(self, operation: Operation, depth):
        structure = {
            "scf.if": self.if_else,
            "scf.for": self.counted_loop,
            "scf.while": self.loop,
            "region": self.region,
        }.get(operation.name)
        results = [_name(result) for result in operation.results]
        operands = [_name(operand) for operand in operation.operands]
        if structure is not None:
            structure(operation, results, operands, depth)
        elif operation.name == "constant":
            function_of(operation)
            self.assign(depth, results, [self.keep("constant", constant_value(operation))])
        elif operation.regions:
            raise UnknownOperation(f"{operation.name} with a block of its own is not known here.")
        else:
            function, takes_machine = function_of(operation)
            called = self.keep(re.sub(r"\W", "", operation.name.replace(".", "_")), function)
            call = f"{called}({', '.join(['machine'] * takes_machine + operands)})"
            self.emit(depth, f"{results[0]} = {call}" if results else call)
            if self.watch is not None:
                watch = self.keep("watch", partial(self.watch, operation))
                self.emit(depth, f"{watch}({results[0] if results else None})")

    def region(self, operation, results, operands, depth):
        self.assign(depth, results, self.block(operation.regions[0], depth))

    def if_else(self, operation, results, operands, depth):
        for start, region in zip((f"if {operands[0]}:", "else:"), operation.regions, strict=False):
            self.emit(depth, start)
            self.emit(depth + 1, "pass")
            self.assign(depth + 1, results, self.block(region, depth + 1))

    def counted_loop(self, operation, results, operands, depth):
        index, first, last, step, *pairs = operands
        carried, initial = pairs[::2], pairs[1::2]
        self.assign(depth, carried, initial)
        self.emit(depth, f"for {index} in range({first}, {last}, {step}):")
        self.emit(depth + 1, "pass")
        self.assign(depth + 1, carried, self.block(operation.regions[0], depth + 1))
        self.assign(depth, results, carried)

    def loop(self, operation, results, operands, depth):
        carried, initial = operands[::2], operands[1::2]
        before, after = operation.regions
        self.assign(depth, carried, initial)
        self.emit(depth, "while True:")
        condition, *values = self.block(before, depth + 1)
        self.emit(depth + 1, f"if not {condition}:")
        self.assign(depth + 2, results, values)
        self.emit(depth + 2, "break")
        self.assign(depth + 1, [_name(argument) for argument in after.arguments], values)
        self.assign(depth + 1, carried, self.block(after, depth + 1))
