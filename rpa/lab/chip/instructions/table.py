"""The instructions that the machine knows: a table from their names to NumPy functions.

To add one, write what it does to its operands and name it:

    @instruction("vadd.f32", "vadd.s32")
    def add(x, y):
        return x + y

If more than the operands decides, take the `Operation` and return the function of the operands:

    @by_operation("slane.shuffle", form=r"%\\[\\[(.*)\\]\\]")
    def shuffle(operation, rows):                 # rows is what the form's group found
        order = [int(n) for n in rows.split(",")]
        return lambda x: x[order]

A spelling that was not declared, by `form` and `attributes`, is an unknown operation: what the
compiler says there could mean something else. `machine=True` hands the `Machine` in first.
"""

import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

from rpa.lab.chip.errors import UnknownOperation
from rpa.lab.chip.text import Operation


class Instruction(NamedTuple):
    """What is known of one instruction.

    Attributes:
        make: (operation, *groups of the form) -> the function of its operands.
        form: regular expression of `Operation.form`.
        attributes: names of the attributes that it may have.
        machine: whether that function takes the machine first.
    """

    make: Callable
    form: str
    attributes: frozenset
    machine: bool


INSTRUCTIONS: dict[str, Instruction] = {}
"""By name, without the dialect's "llo."."""


def instruction(*names, machine=False, attributes=()):
    """Decorator: a function of the operands alone. Attributes named here mean nothing to it."""

    def register(function):
        parameters = inspect.signature(function).parameters.values()
        operands = sum(x.default is x.empty for x in parameters) - machine
        form = ", ".join(["%"] * operands)
        make = lambda operation: function  # noqa: E731
        _add(names, Instruction(make, form, frozenset(attributes), machine))
        return function

    return register


def by_operation(*names, form, attributes=(), machine=False):
    """Decorator: a function of the operation, and of the form's groups, that returns one."""

    def register(make):
        _add(names, Instruction(make, form, frozenset(attributes), machine))
        return make

    return register


def _add(names, entry):
    for name in names:
        if name in INSTRUCTIONS:
            raise ValueError(f"{name} is in the table already.")
        INSTRUCTIONS[name] = entry


def function_of(operation: Operation) -> tuple[Callable, bool]:
    """The function of an operation's operands, and whether it takes the machine first.

    Raises:
        UnknownOperation: if the operation, or how it is spelled, is not in the table.
    """
    known = INSTRUCTIONS.get(operation.name)
    if known is None:
        raise UnknownOperation(
            f"the compiler made an instruction that the machine does not know: {operation.name} "
            f"in {operation.text[:200]!r}. docs/chip.md says how to add it."
        )
    match = re.fullmatch(known.form, operation.form)
    surplus = set(operation.attributes) - known.attributes
    if match is None or surplus:
        why = f"its attribute {', '.join(sorted(surplus))}" if surplus else "how it is spelled"
        raise UnknownOperation(
            f"{operation.name} is known, but not {why}: {operation.text[:200]!r}."
        )
    return known.make(operation, *match.groups()), known.machine
