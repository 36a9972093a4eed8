"""Arguments of any function as a command line writes them: dtype, shape, values.

| written | is |
|---|---|
| `f32[64,128]` | an array of floats; where values are needed, they are random |
| `i32[4]=16,16,8,1` | an array of integers and its values |
| `i32[1024]=7` | one number fills the array |
| `bf16[8,128]=ones` | a word from FILLS fills it |
| `f32[]=0.5` | a scalar |

The lab compiles for shapes alone. What a kernel executes, and what it copies, follows from its
integers: lengths, page tables, counters. So integers need values wherever something is executed.
"""

import json
import re
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = {
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "f8_e4m3fn": "float8_e4m3fn",
    "f8_e5m2": "float8_e5m2",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u32": "uint32",
    "u16": "uint16",
    "u8": "uint8",
    "bool": "bool",
}
"""Short names of dtypes; the long ones are accepted, too."""

FILLS = ("zeros", "ones", "iota", "random")
"""What fills an array; `iota` counts from 0 in the order of memory."""

WRITTEN = re.compile(r"(?P<dtype>\w+)\[(?P<sizes>[\d,\s]*)\](=(?P<values>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Argument:
    """One array argument.

    Attributes:
        dtype: NumPy's name.
        shape: sizes.
        values: a word from FILLS, the numbers of all elements or one for all, or None.
    """

    dtype: str
    shape: tuple[int, ...]
    values: str | tuple[float, ...] | None = None

    @property
    def shape_dtype(self) -> jax.ShapeDtypeStruct:
        """What a compiler needs to know of it."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def is_integer(self) -> bool:
        """Whether its values may decide what a kernel does: integers and bools."""
        return self.dtype == "bool" or jnp.issubdtype(self.dtype, jnp.integer)

    def array(self) -> np.ndarray:
        """Its values.

        Raises:
            ValueError: for integers that were given none.

        >>> Argument("int32", (3,), "iota").array().tolist()
        [0, 1, 2]
        """
        if self.values is None and self.is_integer:
            raise ValueError(
                f"{self} has no values, and integers decide what a kernel executes and copies: "
                f"write them behind it, {self}=0 or {self}=iota."
            )
        dtype = jnp.dtype(self.dtype)
        if self.values in (None, "random"):
            return np.random.default_rng(0).standard_normal(self.shape, np.float32).astype(dtype)
        if self.values in ("zeros", "ones"):
            return np.full(self.shape, self.values == "ones", dtype)
        if self.values == "iota":
            return np.arange(prod(self.shape)).reshape(self.shape).astype(dtype)
        if len(self.values) == 1:
            return np.full(self.shape, self.values[0], dtype)
        return np.array(self.values).reshape(self.shape).astype(dtype)

    def known(self) -> Any:
        """Its values where they are integers or were given, else its shape: what a dry run needs.

        >>> Argument("float32", (2, 128)).known()
        ShapeDtypeStruct(shape=(2, 128), dtype=float32)
        """
        return self.shape_dtype if self.values is None and not self.is_integer else self.array()

    def __str__(self):
        short = {long: name for name, long in DTYPES.items()}
        return f"{short.get(self.dtype, self.dtype)}[{','.join(map(str, self.shape))}]"


def parse_argument(text: str) -> Argument:
    """The argument that a text says.

    Raises:
        ValueError: naming the part that is wrong.

    >>> parse_argument("i32[2]=5,7")
    Argument(dtype='int32', shape=(2,), values=(5, 7))
    >>> parse_argument("i32[2]=5,7,9")
    Traceback (most recent call last):
        ...
    ValueError: 'i32[2]=5,7,9' has 3 values, but the shape has 2 elements: give 2, or one for all.
    """
    match = WRITTEN.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not an array: expected DTYPE[SIZES] or DTYPE[SIZES]=VALUES, like "
            "f32[64,128], i32[1]=4096 or bf16[8,128]=ones."
        )
    dtype, shape = _dtype(match["dtype"], text), _shape(match["sizes"], text)
    argument = Argument(dtype, shape)
    if match["values"] is None:
        return argument
    return Argument(dtype, shape, _values(match["values"].strip(), argument, text))


def _dtype(name, text):
    long = DTYPES.get(name, name)
    if long not in DTYPES.values():
        raise ValueError(
            f"{text!r} has dtype {name!r}; expected one of {', '.join(DTYPES)}, or a long name."
        )
    return long


def _shape(sizes, text):
    try:
        shape = tuple(int(size) for size in sizes.split(",")) if sizes.strip() else ()
    except ValueError:
        shape = (-1,)
    if not all(0 <= size < 2**31 for size in shape):
        raise ValueError(f"{text!r} has sizes [{sizes}]; expected whole numbers with commas.")
    return shape


def _values(words, argument, text):
    if words in FILLS:
        if words == "random" and argument.is_integer:
            raise ValueError(f"{text!r}: there are no random integers; give their values.")
        return words
    number = int if argument.is_integer else float
    try:
        values = tuple(number(word) for word in words.split(","))
        if argument.is_integer:  # NumPy says which integers the dtype does not hold
            np.array(values, jnp.dtype(argument.dtype))
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} has values {words!r}; expected {argument.dtype} numbers with commas, or one "
            f"of {', '.join(FILLS)}."
        ) from None
    elements = prod(argument.shape)
    if len(values) not in (1, elements):
        raise ValueError(
            f"{text!r} has {len(values)} values, but the shape has {elements} elements: give "
            f"{elements}, or one for all."
        )
    return values


def parse_option(text: str) -> tuple[str, Any]:
    """(name, value) of a keyword argument: an array as above, JSON, or a word.

    Raises:
        ValueError: if it is not NAME=VALUE.

    >>> parse_option("sliding_window=1024"), parse_option("d_block_sizes=[1,512,1,512]")
    (('sliding_window', 1024), ('d_block_sizes', [1, 512, 1, 512]))
    >>> parse_option("out_dtype=float32"), parse_option("update_kv_cache=false")
    (('out_dtype', 'float32'), ('update_kv_cache', False))
    >>> parse_option("attention_sink=f32[3]=ones")
    ('attention_sink', array([1., 1., 1.], dtype=float32))
    """
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier() and value):
        raise ValueError(
            f"{text!r} is not an option: expected NAME=VALUE, like sliding_window=1024, "
            "update_kv_cache=false or attention_sink=f32[32]=ones."
        )
    if WRITTEN.fullmatch(value):
        return name, parse_argument(value).array()
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, _PYTHON.get(value, value)


_PYTHON = {"True": True, "False": False, "None": None}
"""What Python writes differently from JSON."""


def static_and_arrays(kwargs) -> tuple[dict, dict]:
    """Keyword arguments in two: what is compiled in, and arrays, which are operands.

    >>> static_and_arrays({"sliding_window": 8, "attention_sink": np.ones(2, "float32")})
    ({'sliding_window': 8}, {'attention_sink': array([1., 1.], dtype=float32)})
    """
    kwargs = kwargs or {}
    arrays = {name: x for name, x in kwargs.items() if hasattr(x, "shape")}
    return {name: x for name, x in kwargs.items() if name not in arrays}, arrays
