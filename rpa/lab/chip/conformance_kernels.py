"""Tiny Pallas kernels, each of one operation, and what `jax.numpy` says that they give.

They share no code with the ladder. So an operation that the machine has wrong shows here as one
wrong number of a kernel of a few lines, and the proof of rung 8 does not rest on rung 8.

A kernel takes refs in VMEM and writes one ref in VMEM; those at the end of the file move data
themselves. To add one: write it, put `@kernel(...)` above it, return nothing.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
EVERY_CHIP = ("v5e", "v6e", "tpu7x")


@dataclasses.dataclass(frozen=True)
class TinyKernel:
    """One kernel, its arguments and its truth.

    Attributes:
        name: what is tested.
        call: the arguments to the output, by `pl.pallas_call`.
        inputs: its arguments.
        truth: the same arguments to the expected output, by `jax.numpy`.
        tolerance: allowed |output - truth| / max(1, |truth|); 0 asks for equal bits.
        chips: where the compiler takes it.
    """

    name: str
    call: Callable
    inputs: tuple
    truth: Callable
    tolerance: float
    chips: tuple[str, ...]

    def expected(self) -> np.ndarray:
        """The expected output."""
        return np.asarray(self.truth(*map(jnp.asarray, self.inputs)))


KERNELS: dict[str, TinyKernel] = {}
"""By name."""


def kernel(truth, *inputs, name=None, tolerance=0.0, chips=EVERY_CHIP, space=None, scratch=()):
    """Decorator: register a kernel body under its name.

    Args:
        truth: the expected output as a function of the inputs.
        *inputs: arrays.
        name: its name, if not that of the function.
        tolerance, chips: see `TinyKernel`.
        space: memory space of inputs and output; None is VMEM.
        scratch: scratch shapes.
    """

    def register(body):
        out = jax.eval_shape(truth, *inputs)
        specs = {}
        if space is not None:
            spec = pl.BlockSpec(memory_space=space)
            specs = {"in_specs": [spec] * len(inputs), "out_specs": spec}
        label = name or body.__name__
        call = pl.pallas_call(
            body,
            out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
            scratch_shapes=list(scratch),
            name=label,
            **specs,
        )
        KERNELS[label] = TinyKernel(label, call, inputs, truth, tolerance, tuple(chips))
        return body

    return register


def floats(*shape, dtype=F32, seed=0):
    """Normal random numbers in a dtype."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def integers(*shape, low=-(2**31), high=2**31, seed=0):
    """Random i32."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def codes(dtype):
    """All 256 codes of a float8, sixteen times: [32, 128]."""
    return np.tile(np.arange(256, dtype=np.uint8), 16).reshape(32, 128).view(dtype)


def unary(name, function, x, tolerance=0.0, **options):
    """A kernel out = function(x)."""

    @kernel(function, x, name=name, tolerance=tolerance, **options)
    def body(x_ref, out_ref):
        out_ref[...] = function(x_ref[...])


def binary(name, function, x, y, tolerance=0.0, **options):
    """A kernel out = function(x, y)."""

    @kernel(function, x, y, name=name, tolerance=tolerance, **options)
    def body(x_ref, y_ref, out_ref):
        out_ref[...] = function(x_ref[...], y_ref[...])


# --- Arithmetic

X, Y = floats(24, 200), floats(24, 200, seed=1)
INTEGERS, OTHERS = integers(16, 128), integers(16, 128, seed=1)

binary(
    "arithmetic_f32", lambda x, y: (x + y) * x - jnp.maximum(x, y) * jnp.minimum(y, x), X, Y, 2e-7
)
binary(
    "arithmetic_bf16", lambda x, y: jnp.maximum(x + y, x * y), X.astype(BF16), Y.astype(BF16), 8e-3
)
binary("divide_f32", lambda x, y: x / y, X, np.abs(Y) + 1, 4e-7)
binary("arithmetic_i32", lambda x, y: (x + y) * x - jnp.maximum(x, y), INTEGERS, OTHERS)
binary("bits_i32", lambda x, y: (x & y) | (x ^ ~y), INTEGERS, OTHERS)
binary(
    "shifts_i32",
    lambda x, n: (x << n) ^ (x >> n) ^ jax.lax.shift_right_logical(x, n),
    INTEGERS,
    OTHERS & 31,
)
binary("divide_i32", lambda x, y: x // y + x % y, INTEGERS >> 8, np.abs(OTHERS >> 20) + 1)
binary(
    "compare_f32", lambda x, y: jnp.where((x < y) | (x >= 1), x, jnp.where(x != y, y, 0.0)), X, Y
)
binary(
    "compare_i32",
    lambda x, y: jnp.where((x < y) & (x != 1), x, jnp.where(y <= 0, y, 7)),
    INTEGERS,
    OTHERS,
)
binary("minimum_i32", jnp.minimum, INTEGERS, OTHERS)
for _name, _compare in {
    "less": jnp.less,
    "less_equal": jnp.less_equal,
    "greater": jnp.greater,
    "greater_equal": jnp.greater_equal,
    "equal": jnp.equal,
    "not_equal": jnp.not_equal,
}.items():
    for _dtype in (F32, BF16):
        binary(
            f"{_name}_{_dtype.name}",
            lambda x, y, compare=_compare: jnp.where(compare(x, y), 2 * x, y),
            np.round(X).astype(_dtype),
            np.round(Y).astype(_dtype),
        )
binary("minimum_bf16", lambda x, y: jnp.minimum(x, y) - y, X.astype(BF16), Y.astype(BF16), 8e-3)
unary("exp", jnp.exp, X, 4e-7)
unary("exp2", jnp.exp2, X, 4e-7)
unary("log", jnp.log, np.abs(X) + 0.1, 1e-6)
unary("tanh", jnp.tanh, X, 1e-6)
unary("sqrt_rsqrt", lambda x: jnp.sqrt(x) + jax.lax.rsqrt(x), np.abs(X) + 0.1, 1e-6)
unary("reciprocal", lambda x: 1 / x, np.abs(X) + 0.5, 4e-7)
unary("absolute_sign", lambda x: jnp.abs(x) + jnp.sign(x) * 2, X)
unary("rounding", lambda x: jnp.floor(x * 8) + jnp.ceil(x) * 100 + jnp.round(x * 4), X)
unary("f32_to_i32", lambda x: (x * 1000).astype(jnp.int32), X)
unary("i32_to_f32", lambda x: x.astype(jnp.float32), INTEGERS)
unary("f32_to_bf16", lambda x: x.astype(jnp.bfloat16), X)
unary("bf16_to_f32", lambda x: x.astype(jnp.float32), X.astype(BF16))
unary("i8_to_f32", lambda x: x.astype(jnp.float32), codes(np.int8))
unary("bits_of_f32", lambda x: jax.lax.bitcast_convert_type(x, jnp.int32), X)


@kernel(lambda x: 1 / x, np.abs(X) + 0.5, tolerance=1e-2)
def reciprocal_approximate(x_ref, out_ref):
    out_ref[...] = pl.reciprocal(x_ref[...], approx=True)


# --- float8: every code, both ways


for _dtype in (E4M3, E5M2):
    unary(f"{_dtype.name}_to_f32", lambda x: x.astype(jnp.float32), codes(_dtype))
    unary(f"{_dtype.name}_to_bf16", lambda x: x.astype(jnp.bfloat16), codes(_dtype))
    unary(
        f"f32_to_{_dtype.name}",
        lambda x, _dtype=_dtype: x.astype(_dtype),
        np.clip(floats(64, 128) * np.exp2(integers(64, 128, low=-18, high=10)), -440, 440).astype(
            F32
        ),
    )
    unary(
        f"bf16_to_{_dtype.name}",
        lambda x, _dtype=_dtype: x.astype(_dtype),
        np.clip(floats(64, 128) * np.exp2(integers(64, 128, low=-18, high=10)), -440, 440).astype(
            BF16
        ),
    )


# --- Rows and lanes

SQUARE = floats(32, 256)

for _axis, _shift in ((0, 3), (1, 5), (1, 131)):
    unary(
        f"roll_axis{_axis}_by{_shift}",
        lambda x, s=_shift, a=_axis: jnp.roll(x, s, axis=a),
        SQUARE,
    )


@kernel(lambda x: jnp.roll(x, 7, axis=1), floats(16, 128))
def roll_lanes(x_ref, out_ref):
    out_ref[...] = pltpu.roll(x_ref[...], 7, axis=1)


@kernel(lambda x: jnp.roll(x, 5, axis=0), floats(16, 128))
def roll_sublanes(x_ref, out_ref):
    out_ref[...] = pltpu.roll(x_ref[...], 5, axis=0)


@kernel(lambda x, n: jnp.roll(x, n[0, 0], axis=1), floats(16, 128), np.full((8, 128), 9, np.int32))
def roll_lanes_dynamic(x_ref, n_ref, out_ref):
    out_ref[...] = pltpu.roll(x_ref[...], jnp.max(n_ref[...]), axis=1)


@kernel(
    lambda x: jnp.stack([jnp.roll(row, 2 * i) for i, row in enumerate(x)]),
    floats(8, 128),
)
def roll_strided(x_ref, out_ref):
    out_ref[...] = pltpu.roll(x_ref[...], 0, axis=1, stride=2, stride_axis=0)


for _shape in ((128, 128), (16, 128), (128, 8), (40, 72), (256, 200)):
    unary(f"transpose_{_shape[0]}x{_shape[1]}", jnp.transpose, floats(*_shape))
unary("transpose_bf16", jnp.transpose, floats(128, 256, dtype=BF16))
unary("transpose_i8", jnp.transpose, codes(np.int8).repeat(4, 0))

for _name, _reduce in {"max": jnp.max, "min": jnp.min, "sum": jnp.sum}.items():
    for _axis in (0, 1):
        unary(
            f"{_name}_axis{_axis}",
            lambda x, r=_reduce, a=_axis: r(x, axis=a, keepdims=True),
            floats(24, 200),
            1e-5,
        )
for _name, _reduce in {"max": jnp.max, "min": jnp.min, "sum": jnp.sum}.items():
    for _axis in (0, 1):
        unary(
            f"{_name}_axis{_axis}_i32",
            lambda x, r=_reduce, a=_axis: r(x, axis=a, keepdims=True),
            INTEGERS >> 8,
        )
unary(
    "argmax_axis1",
    lambda x: jnp.argmax(x, axis=1, keepdims=True).astype(jnp.int32),
    floats(16, 128),
)
unary(
    "cumulative_concat",
    lambda x: jnp.concatenate([x[3:11], x[:3], x[11:]], axis=0),
    floats(24, 128),
)
unary("concat_lanes", lambda x: jnp.concatenate([x[:, 64:], x[:, :64]], axis=1), floats(16, 128))
unary(
    "concat_bf16_rows",
    lambda x: jnp.concatenate([x[3:], x[:3]], axis=0),
    floats(16, 128, dtype=BF16),
)
unary("broadcast_row", lambda x: jnp.broadcast_to(x[2:3], x.shape), floats(16, 256))
unary("broadcast_lane", lambda x: jnp.broadcast_to(x[:, 5:6], x.shape), floats(16, 256))
unary("repeat_rows", lambda x: jnp.repeat(x, 4, axis=0), floats(8, 128))
unary("reshape_rows", lambda x: x.reshape(4, 8, 128)[:, ::1].sum(0), floats(32, 128), 1e-6)
unary("split_heads", lambda x: x.reshape(16, 2, 64).transpose(1, 0, 2), floats(16, 128))
unary(
    "masks",
    lambda x: jnp.where(
        (
            jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) * 3
            > jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        )
        ^ (x > 0),
        x,
        -1.0,
    ),
    floats(24, 200),
)
unary("masks_bf16", lambda x: jnp.where(x > 0.5, x, jnp.zeros_like(x)), floats(37, 200, dtype=BF16))
unary("odd_shape_f32", lambda x: x + 1, floats(5, 3))
unary("odd_shape_bf16", lambda x: x + 1, floats(13, 7, dtype=BF16))
unary("odd_shape_e5m2", lambda x: x, codes(E5M2)[:29, :77])
unary("odd_shape_3d", lambda x: x * 2, floats(3, 5, 130))


@kernel(
    lambda x, i: jnp.take_along_axis(x, i, axis=1),
    floats(8, 128),
    integers(8, 128, low=0, high=128),
)
def gather_lanes(x_ref, i_ref, out_ref):
    out_ref[...] = jnp.take_along_axis(x_ref[...], i_ref[...], axis=1, mode="promise_in_bounds")


# --- Packing


@kernel(
    lambda x: jax.lax.bitcast_convert_type(x.reshape(8, 2, 128).swapaxes(1, 2), jnp.int32),
    floats(16, 128, dtype=BF16),
)
def words_of_bf16(x_ref, out_ref):
    out_ref[...] = pltpu.bitcast(x_ref[...], jnp.int32)


@kernel(
    lambda x: jax.lax.bitcast_convert_type(x.reshape(8, 4, 128).swapaxes(1, 2), jnp.int32),
    codes(E4M3),
)
def words_of_float8(x_ref, out_ref):
    out_ref[...] = x_ref.bitcast(jnp.int32)[...]


@kernel(
    lambda x: jax.lax.bitcast_convert_type(x, jnp.bfloat16).swapaxes(1, 2).reshape(32, 128),
    integers(16, 128) & 0x3FFF3FFF,
)
def bf16_of_words(x_ref, out_ref):
    out_ref[...] = pltpu.bitcast(x_ref[...], jnp.bfloat16)


# --- Loads and stores


@kernel(lambda x: x[1::3][:10], floats(40, 128))
def load_strided(x_ref, out_ref):
    out_ref[...] = x_ref[pl.ds(1, 10, stride=3), :]


@kernel(lambda x: jnp.zeros((40, 128)).at[2:32:3].set(x), floats(10, 128))
def store_strided(x_ref, out_ref):
    out_ref[...] = jnp.zeros((40, 128), jnp.float32)
    out_ref[pl.ds(2, 10, stride=3), :] = x_ref[...]


@kernel(lambda x: x[5:18, 30:100], floats(40, 128))
def load_unaligned(x_ref, out_ref):
    out_ref[...] = x_ref[5:18, 30:100]


@kernel(lambda x: jnp.zeros((24, 256)).at[3:14, 60:160].set(x), floats(11, 100))
def store_unaligned(x_ref, out_ref):
    out_ref[...] = jnp.zeros((24, 256), jnp.float32)
    out_ref[3:14, 60:160] = x_ref[...]


@kernel(lambda x: jnp.zeros((24, 128), BF16).at[3:14].set(x), floats(11, 128, dtype=BF16))
def store_unaligned_bf16(x_ref, out_ref):
    out_ref[...] = jnp.zeros((24, 128), jnp.bfloat16)
    out_ref[3:14] = x_ref[...]


@kernel(
    lambda x, n: jax.lax.dynamic_slice(x, (n[0, 0], 0), (8, 128)),
    floats(40, 128),
    np.full((8, 128), 11, np.int32),
)
def load_dynamic(x_ref, n_ref, out_ref):
    out_ref[...] = x_ref[pl.ds(jnp.max(n_ref[...]), 8), :]


@kernel(
    lambda x: jnp.cumsum(x.reshape(5, 8, 128), axis=0).reshape(40, 128),
    floats(40, 128),
    tolerance=1e-6,
)
def loop_carried(x_ref, out_ref):
    def add(i, total):
        total = total + x_ref[pl.ds(8 * i, 8), :]
        out_ref[pl.ds(8 * i, 8), :] = total
        return total

    jax.lax.fori_loop(0, 5, add, jnp.zeros((8, 128), jnp.float32))


# --- Products

_NN, _NT, _TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def product(name, a, b, numbers, precision=None, tolerance=1e-5, **options):
    """A kernel of one matrix product with a float32 result."""

    def truth(a, b):
        return jax.lax.dot_general(
            *(a.astype(jnp.float32), b.astype(jnp.float32), numbers),
            precision=jax.lax.Precision.HIGHEST,
        )

    @kernel(truth, a, b, name=name, tolerance=tolerance, **options)
    def body(a_ref, b_ref, out_ref):
        out_ref[...] = jax.lax.dot_general(
            *(a_ref[...], b_ref[...], numbers),
            precision=precision,
            preferred_element_type=jnp.float32,
        )


product("matmul_bf16", floats(24, 256, dtype=BF16), floats(256, 384, dtype=BF16, seed=1), _NN)
product("matmul_bf16_odd", floats(9, 72, dtype=BF16), floats(72, 130, dtype=BF16, seed=1), _NN)
product("matmul_bf16_nt", floats(40, 128, dtype=BF16), floats(300, 128, dtype=BF16, seed=1), _NT)
product("matmul_bf16_nt_odd", floats(7, 80, dtype=BF16), floats(33, 80, dtype=BF16, seed=1), _NT)
product("matmul_bf16_tn", floats(64, 40, dtype=BF16), floats(64, 128, dtype=BF16, seed=1), _TN)
for _label, _precision, _tolerance in (
    ("highest", jax.lax.Precision.HIGHEST, 1e-5),
    ("default", None, 0.2),
):
    product(
        f"matmul_f32_{_label}",
        floats(24, 256),
        floats(256, 200, seed=1),
        _NN,
        _precision,
        _tolerance,
    )
    product(
        f"matmul_f32_nt_{_label}",
        floats(20, 72),
        floats(150, 72, seed=1),
        _NT,
        _precision,
        _tolerance,
    )
for _dtype in (E4M3, E5M2):
    product(
        f"matmul_{_dtype.name}",
        floats(32, 256).astype(_dtype),
        floats(256, 256, seed=1).astype(_dtype),
        _NN,
    )
    product(
        f"matmul_nt_{_dtype.name}",
        floats(32, 128).astype(_dtype),
        floats(160, 128, seed=1).astype(_dtype),
        _NT,
    )


# --- Copies

_HBM = pltpu.HBM
_SEMAPHORE = pltpu.SemaphoreType.DMA


@kernel(
    lambda x: x,
    floats(40, 256),
    space=_HBM,
    scratch=(pltpu.VMEM((40, 256), jnp.float32), _SEMAPHORE(())),
)
def copy_through_vmem(x_ref, out_ref, rows_ref, sem):
    pltpu.sync_copy(x_ref, rows_ref)
    copy = pltpu.make_async_copy(rows_ref, out_ref, sem)
    copy.start()
    copy.wait()


@kernel(lambda x: x, floats(12, 8, 128, dtype=BF16), space=_HBM, scratch=(_SEMAPHORE((2,)),))
def copy_overlapping(x_ref, out_ref, sems):
    """Twelve copies in flight, six on each semaphore, waited for in another order."""
    copies = [pltpu.make_async_copy(x_ref.at[i], out_ref.at[i], sems.at[i % 2]) for i in range(12)]
    for copy in copies:
        copy.start()
    for copy in [*copies[1::2], *copies[::2]]:
        copy.wait()


@kernel(
    lambda x: jnp.zeros((6, 16, 128)).at[:, :8].set(x[:, 8:]),
    floats(6, 16, 128),
    space=_HBM,
    scratch=(pltpu.VMEM((6, 16, 128), jnp.float32), _SEMAPHORE(())),
)
def copy_strided(x_ref, out_ref, rows_ref, sem):
    """A box: 8 of 16 rows of each of six matrices."""
    rows_ref[...] = jnp.zeros_like(rows_ref)
    copy = pltpu.make_async_copy(x_ref.at[:, pl.ds(8, 8)], rows_ref.at[:, pl.ds(0, 8)], sem)
    copy.start()
    copy.wait()
    pltpu.sync_copy(rows_ref, out_ref)


@kernel(
    lambda n, x: jnp.zeros_like(x).at[:5].set(x[3:8]),
    np.array([5, 3], np.int32),
    floats(16, 8, 128),
    space=_HBM,
    scratch=(
        pltpu.VMEM((16, 8, 128), jnp.float32),
        pltpu.SMEM((2,), jnp.int32),
        _SEMAPHORE(()),
    ),
)
def copy_dynamic(n_ref, x_ref, out_ref, rows_ref, numbers_ref, sem):
    """How many, and from where, stands in memory; first of all it is copied to SMEM."""
    pltpu.sync_copy(n_ref, numbers_ref)
    rows_ref[...] = jnp.zeros_like(rows_ref)
    count, first = numbers_ref[0], numbers_ref[1]
    copy = pltpu.make_async_copy(x_ref.at[pl.ds(first, count)], rows_ref.at[pl.ds(0, count)], sem)
    copy.start()
    copy.wait()
    pltpu.sync_copy(rows_ref, out_ref)


@kernel(
    lambda n: (
        jnp.zeros((8,), jnp.int32)
        .at[0]
        .set(jnp.sum(n))
        .at[1]
        .set(jnp.max(n) // 3)
        .at[2]
        .set(-7 % 5)
    ),
    integers(8, low=-1000, high=1000),
    space=pltpu.SMEM,
)
def scalars(n_ref, out_ref):
    for i in range(8):
        out_ref[i] = 0
    total = jax.lax.fori_loop(0, 8, lambda i, s: s + n_ref[i], 0)
    largest = jax.lax.fori_loop(0, 8, lambda i, s: jnp.maximum(s, n_ref[i]), n_ref[0])
    out_ref[0] = total
    out_ref[1] = largest // 3

    @pl.when(total != largest)
    def _():
        out_ref[2] = 3


# Places in a table whose rows are longer than 128: the remainder is that of Python.
_PLACES = np.array([299, 128, 127, 0, 255, 256, 1, 200], np.int32)
_TABLE = integers(3, 300, low=0, high=1000)
_TABLE[0, :8] = _PLACES


@kernel(
    lambda table: jnp.stack([table[i % 3, table[0, i]] for i in range(8)]),
    _TABLE,
    space=pltpu.SMEM,
)
def table_of_scalars(table_ref, out_ref):
    for i in range(8):
        out_ref[i] = table_ref[i % 3, table_ref[0, i]]


@kernel(lambda x: x[:, 4:].reshape(64, 128), floats(16, 8, 128, dtype=BF16))
def half_of_the_heads(x_ref, out_ref):
    """The second four of eight rows per token, all below each other: sublanes change places."""
    out_ref[...] = x_ref[:, 4:].reshape(64, 128)


# Two values per word, laid side by side: whole rows, the halves of their words, and back to rows.
unary(
    "halves_side_by_side",
    lambda x: x.astype(jnp.float32).reshape(16, 256),
    floats(16, 2, 128, dtype=BF16, seed=8),
)
unary(
    "rows_of_heads",
    lambda x: x.reshape(4, 4, 128).swapaxes(0, 1).reshape(16, 128),
    floats(16, 128, seed=9),
)


def _bits_and_conditions(n):
    """Eight numbers from eight numbers; the same for a ref of scalars and for an array."""
    a, b, c = n[0], n[1], n[2]
    return [
        (a & b) | (c ^ a),
        (a << 3) ^ (b >> 2),
        jnp.minimum(a, b) - jnp.maximum(b, c),
        jnp.where((a <= b) | (b >= c), a, c),
        jnp.where(~((a < b) & (b != c)) | (c == 7), a, b),
        jnp.where((a == b) | (c > b), 1, 2),
        a // 16,
        b % 7,
    ]


@kernel(
    lambda n: jnp.stack(_bits_and_conditions(n)),
    integers(8, low=-1000, high=1000, seed=3),
    space=pltpu.SMEM,
)
def scalar_bits_and_conditions(n_ref, out_ref):
    for i, number in enumerate(_bits_and_conditions(n_ref)):
        out_ref[i] = number


@kernel(
    lambda n, x: jnp.zeros((64, 128)).at[24:40].set(x * n[1]),
    np.array([24, 3], np.int32),
    floats(16, 128),
    space=_HBM,
    scratch=(
        pltpu.VMEM((16, 128), jnp.float32),
        pltpu.VMEM((64, 128), jnp.float32),
        pltpu.SMEM((2,), jnp.int32),
    ),
)
def store_at_a_multiple(n_ref, x_ref, out_ref, rows_ref, all_ref, numbers_ref):
    """A place from a scalar that is promised to be a multiple of 8; a scalar in all lanes."""
    pltpu.sync_copy(n_ref, numbers_ref)
    pltpu.sync_copy(x_ref, rows_ref)
    all_ref[...] = jnp.zeros_like(all_ref)
    place = pl.multiple_of(numbers_ref[0], 8)
    all_ref[pl.ds(place, 16), :] = rows_ref[...] * numbers_ref[1].astype(jnp.float32)
    pltpu.sync_copy(all_ref, out_ref)


@kernel(
    lambda x: jnp.zeros((3, 4, 16, 128)).at[:, 1:3, 8:].set(x[:, :2, :8]),
    floats(3, 4, 16, 128),
    space=_HBM,
)
def copy_box_of_boxes(x_ref, out_ref):
    """Two strides: a box in each of two matrices out of four, three times."""

    def copy(rows_ref):
        rows_ref[...] = jnp.zeros_like(rows_ref)
        box = rows_ref.at[:, pl.ds(1, 2), pl.ds(8, 8)]
        pltpu.sync_copy(x_ref.at[:, pl.ds(0, 2), pl.ds(0, 8)], box)
        pltpu.sync_copy(rows_ref, out_ref)

    pl.run_scoped(copy, pltpu.VMEM((3, 4, 16, 128), jnp.float32))


@kernel(lambda n: jnp.full((8, 128), n[299]), integers(300), space=_HBM)
def scoped_memory(n_ref, out_ref):
    """Numbers in SMEM and a semaphore that live for a moment, twice, and a signal to itself."""

    def copy(numbers_ref, rows_ref, sem, signal):
        pltpu.async_copy(n_ref, numbers_ref, sem).wait()
        pl.semaphore_signal(signal, 3)
        pl.semaphore_wait(signal, 3)
        rows_ref[...] = jnp.full((8, 128), numbers_ref[299])
        pltpu.sync_copy(rows_ref, out_ref)

    memory = (pltpu.SMEM((300,), jnp.int32), pltpu.VMEM((8, 128), jnp.int32))
    for _ in range(2):
        pl.run_scoped(copy, *memory, pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.REGULAR)


@kernel(
    lambda n: jnp.zeros((256,), jnp.int32).at[:128].set(n[256:384]),
    np.r_[5, 2, 7:517].astype(np.int32),
    space=_HBM,
    scratch=(pltpu.SMEM((512,), jnp.int32), pltpu.SMEM((256,), jnp.int32)),
)
def copy_of_numbers(n_ref, out_ref, numbers_ref, chosen_ref):
    """128 of 512 numbers; the second one says which."""
    pltpu.sync_copy(n_ref, numbers_ref)
    for i in range(256):
        chosen_ref[i] = 0
    place = pl.multiple_of(numbers_ref[1] * 128, 128)
    pltpu.sync_copy(n_ref.at[pl.ds(place, 128)], chosen_ref.at[pl.ds(0, 128)])
    pltpu.sync_copy(chosen_ref, out_ref)


@kernel(
    lambda n, x: jnp.where(jnp.arange(48)[:, None] < n[1], x, 0).astype(BF16),
    np.array([0, 29], np.int32),
    floats(48, 128, dtype=BF16),
    space=_HBM,
    scratch=(
        pltpu.VMEM((48, 128), jnp.bfloat16),
        pltpu.SMEM((2,), jnp.int32),
    ),
)
def first_rows_bf16(n_ref, x_ref, out_ref, rows_ref, numbers_ref):
    """Rows from a number on become zero: a mask of one lane, spread over rows that share words."""
    pltpu.sync_copy(n_ref, numbers_ref)
    pltpu.sync_copy(x_ref, rows_ref)
    row = jax.lax.broadcasted_iota(jnp.int32, (48, 1), 0)
    rows_ref[...] = jnp.where(row < numbers_ref[1], rows_ref[...], jnp.zeros((48, 128), BF16))
    pltpu.sync_copy(rows_ref, out_ref)


@kernel(
    lambda n, x: jnp.where(n[0] == n[1], x, -1.0) + jnp.where(n[0] < n[1], 2 * x, 0.0),
    np.array([3, 5], np.int32),
    floats(16, 128),
    space=_HBM,
    scratch=(pltpu.VMEM((16, 128), jnp.float32), pltpu.SMEM((2,), jnp.int32)),
)
def chosen_by_a_scalar(n_ref, x_ref, out_ref, rows_ref, numbers_ref):
    pltpu.sync_copy(n_ref, numbers_ref)
    pltpu.sync_copy(x_ref, rows_ref)
    a, b, x = numbers_ref[0], numbers_ref[1], rows_ref[...]
    rows_ref[...] = jnp.where(a == b, x, -1.0) + jnp.where(a < b, 2 * x, 0.0)
    pltpu.sync_copy(rows_ref, out_ref)


@kernel(
    lambda n, x: jnp.where(jnp.arange(32)[:, None, None] < n[1], x, 0)[:, 1].astype(BF16),
    np.array([0, 19], np.int32),
    floats(32, 2, 128, dtype=BF16),
    space=_HBM,
    scratch=(
        pltpu.VMEM((32, 2, 128), jnp.bfloat16),
        pltpu.VMEM((32, 128), jnp.bfloat16),
        pltpu.SMEM((2,), jnp.int32),
    ),
)
def first_pairs_bf16(n_ref, x_ref, out_ref, pairs_ref, rows_ref, numbers_ref):
    """Words of two rows each: zeros from a number on, then the second row of every word."""
    pltpu.sync_copy(n_ref, numbers_ref)
    pltpu.sync_copy(x_ref, pairs_ref)
    pairs = pairs_ref[...]
    row = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 0)
    kept = jnp.where(row < numbers_ref[1], pairs, jnp.zeros_like(pairs))
    rows_ref[...] = kept.reshape(32, 256)[:, 128:]
    pltpu.sync_copy(rows_ref, out_ref)


@kernel(
    lambda x: jnp.where((x.sum(1, keepdims=True) == 0) | (x.max(1, keepdims=True) == 3), 0, x),
    np.round(floats(16, 128)) * (np.arange(16) % 3 > 0)[:, None].astype(np.float32),
)
def rows_by_their_sum(x_ref, out_ref):
    x = x_ref[...]
    total = jnp.sum(x, axis=1, keepdims=True)
    largest = jnp.max(x, axis=1, keepdims=True)
    out_ref[...] = jnp.where((total == 0) | (largest == 3), 0.0, x)


@kernel(
    lambda x: jnp.stack([x[0] * x[1] + x[2], jnp.maximum(x[3], x[4]) - x[5]]),
    floats(8),
    space=pltpu.SMEM,
    tolerance=1e-6,
)
def scalars_f32(x_ref, out_ref):
    out_ref[0] = x_ref[0] * x_ref[1] + x_ref[2]
    out_ref[1] = jnp.maximum(x_ref[3], x_ref[4]) - x_ref[5]


# --- With a grid: windows


def with_grid(name, truth, inputs, grid, in_specs, out_spec, body, tolerance=0.0):
    """Register a kernel whose windows the machine itself has to copy."""
    out = jax.eval_shape(truth, *inputs)
    call = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_spec,
        name=name,
    )
    KERNELS[name] = TinyKernel(name, call, tuple(inputs), truth, tolerance, EVERY_CHIP)


def _double(x_ref, out_ref):
    out_ref[...] = x_ref[...] * 2


_block = pl.BlockSpec((16, 128), lambda i, j: (i, j))
with_grid("grid_blocks", lambda x: x * 2, [floats(32, 256)], (2, 2), [_block], _block, _double)
with_grid("grid_ragged", lambda x: x * 2, [floats(37, 200)], (3, 2), [_block], _block, _double)
with_grid(
    *("grid_ragged_bf16", lambda x: x * 2, [floats(37, 200, dtype=BF16)], (3, 2), [_block], _block),
    _double,
)
with_grid(
    "grid_heads",
    lambda x: x * 2,
    [floats(4, 24, 128)],
    (4,),
    [pl.BlockSpec((None, 24, 128), lambda h: (h, 0, 0))],
    pl.BlockSpec((None, 24, 128), lambda h: (3 - h, 0, 0)),
    _double,
)
KERNELS["grid_heads"] = dataclasses.replace(KERNELS["grid_heads"], truth=lambda x: x[::-1] * 2)


def _accumulate(a_ref, b_ref, out_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    out_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)


with_grid(
    "grid_matmul",
    partial(jnp.dot, preferred_element_type=jnp.float32),
    [floats(32, 256, dtype=BF16), floats(256, 256, dtype=BF16, seed=1)],
    (2, 2, 2),
    [
        pl.BlockSpec((16, 128), lambda i, j, k: (i, k)),
        pl.BlockSpec((128, 128), lambda i, j, k: (k, j)),
    ],
    pl.BlockSpec((16, 128), lambda i, j, k: (i, j)),
    _accumulate,
    tolerance=1e-5,
)
