"""Values of the scalar core: 32-bit integers, made-up pointers, and what is not known.

The compiler computes ahead: on a path that is not taken, a value or a predicate may come from
memory that nothing wrote. That does no harm until something is decided by it.
"""


class CannotRun(ValueError):
    """The scalar program does something that is not understood here; the message says what."""


class Unknown:
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


POINTER_SHIFT = 40
"""Pointers are made up: thing n lies at (16 n + 1) << 40, further apart than any memory is large.

Some chips scale pointers before a DMA (words to bytes, tiles to granules). 16 n + 1 is odd, so its
lowest set bit says by how much.
"""

FIRST_SYMBOL = 1000
"""Things below are operands, from here on the kernel's own allocations."""


def pointer(n):
    """Where thing n lies."""
    return (16 * n + 1) << POINTER_SHIFT


def resolve(pointer):
    """Number of the thing, offset in it, and the factor that both were scaled by.

    Raises:
        CannotRun: if it is no pointer.
    """
    if isinstance(pointer, Unknown):
        raise CannotRun(f"a copy's address depends on a value from `{pointer.origin[:120]}`.")
    if pointer < 1 << POINTER_SHIFT:
        raise CannotRun(f"a copy's address is {pointer}, which is no pointer.")
    top = pointer >> POINTER_SHIFT
    scale = top & -top
    return top // scale // 16, pointer & ((1 << POINTER_SHIFT) - 1), scale


def wrap(x):
    """To 32 bits, signed; pointers stay as they are."""
    if isinstance(x, Unknown) or x >= 1 << POINTER_SHIFT:
        return x
    return (x + 0x80000000 & 0xFFFFFFFF) - 0x80000000


def no(x):
    """Not, if it is known."""
    return x if isinstance(x, Unknown) else not x


def both(x, y):
    """And: false if one is known to be false."""
    if isinstance(x, Unknown):
        return y if y is False else x
    return y if x else False


def choose(condition, yes, no):
    """One of two, if it is known which."""
    if isinstance(condition, Unknown):
        return condition
    return yes if condition else no


def divide(x, y):
    """Rounded down; by zero, which nobody reads: zero."""
    if isinstance(y, Unknown):
        return y
    return x // y if y else 0


def unsigned(x):
    """From signed to unsigned 32 bits."""
    return x if isinstance(x, Unknown) else x & 0xFFFFFFFF


HELPERS = {
    "wrap": wrap,
    "unsigned": unsigned,
    "least": lambda x, y: choose(x <= y, x, y),
    "most": lambda x, y: choose(x >= y, x, y),
    "no": no,
    "both": both,
    "choose": choose,
    "divide": divide,
    "is_unknown": lambda x: isinstance(x, Unknown),
    "Unknown": Unknown,
}
"""Names that the generated code uses."""
