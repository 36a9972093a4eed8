"""The layout code of the chip, which no interpreter runs, on a NumPy model of the chip's memory."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from rpa.kernel import layout
from rpa.kernel.cases import Case
from rpa.kernel.layout import WordRows
from rpa.kernel.plan import BlockSizes, Plan
from rpa.paging import get_kv_cache_shape, lanes_are_shared, pack_kv, packing_of
from tests.kernel_plans import make_problem

pytestmark = pytest.mark.core

DECODE, PREFILL = BlockSizes(1, 16, 1, 8), BlockSizes(12, 16, 6, 8)
HEADS = {"4/2": (4, 2), "5/1": (5, 1), "3/3": (3, 3), "9/3": (9, 3), "12/2": (12, 2)}
DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
SOME = ("9/3", "bfloat16")
"""What `make test` takes of each list; `make test-full` takes all combinations."""


def some(names):
    return [name if name in SOME else pytest.param(name, marks=pytest.mark.full) for name in names]


def emulate_packing(array):
    """[..., packing, lanes] narrow values as u32[..., 1, lanes]: how the chip shares 32 bits."""
    bits = 8 * array.dtype.itemsize
    places = array.view(f"u{array.dtype.itemsize}").astype(np.uint32)
    words = np.zeros((*places.shape[:-2], 1, places.shape[-1]), np.uint32)
    for index in range(places.shape[-2]):
        words[..., 0, :] |= places[..., index, :] << np.uint32(index * bits)
    return words


def undo_packing(words, dtype, packing):
    """What `emulate_packing` was made from."""
    bits = 32 // packing
    places = [(words >> np.uint32(index * bits)) for index in range(packing)]
    narrow = np.concatenate(places, axis=-2).astype(f"u{bits // 8}")
    return narrow.view(np.dtype(dtype))


def as_index(index):
    """Pallas slices as NumPy slices; past the end is an error, as it is on a chip."""

    def one(i, size):
        if not isinstance(i, pl.Slice):
            return i
        stop = i.start + (i.size - 1) * i.stride + 1
        assert i.start >= 0 and stop <= size, f"{i} reads past {size}"
        return slice(i.start, stop, i.stride)

    return lambda shape: tuple(one(i, n) for i, n in zip(index, shape, strict=False))


class ValueRef:
    """A ref as the interpreter knows it: values, no bitcast, no reshape."""

    def __init__(self, array):
        self.array = array

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        return jnp.asarray(self.array[as_index(index)(self.shape)])

    def __setitem__(self, index, value):
        index = index if isinstance(index, tuple) else (index,)
        self.array[as_index(index)(self.shape)] = np.asarray(value)


class ChipRef(ValueRef):
    """A ref as the chip knows it: bytes that can be seen as 32-bit words in any shape."""

    def __init__(self, array):
        super().__init__(array)
        self.words = emulate_packing(array)

    def bitcast(self, dtype):
        assert dtype == jnp.uint32
        return _Words(self.words)

    def values(self):
        return undo_packing(self.words, self.dtype, self.shape[-2])

    def __getitem__(self, index):
        raise AssertionError("the chip's path reads words")


class _Words(ValueRef):
    def reshape(self, *shape):
        return _Words(self.array.reshape(shape))  # a view: stores reach the buffer


def make_plan(heads=(4, 2), head_dim=128, blocks=PREFILL, **options):
    problem = make_problem(heads, head_dim, **options)
    return Plan(problem, Case.MIXED, blocks, interpret=True)


def random_values(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def query_buffer(plan):
    """A q buffer with random queries in slot 1, and the queries [tokens, kv, group, lanes]."""
    p, tokens = plan.problem, plan.tiles.buffer_tokens
    heads = random_values((tokens, p.num_kv_heads, p.padded_q_per_kv, p.head_lanes), p.q_dtype)
    shape = (tokens, *p.q_shape)
    buffer = np.zeros((2, *shape), p.q_dtype)
    buffer[1] = heads.reshape(shape)
    return buffer, heads.astype(np.float32)


def row_owners(plan, q_sub, group):
    """(token, kv head, head of the group) of each row of a tile, from the rule in `layout`."""
    p, rows = plan.problem, []
    words = p.padded_q_per_kv // p.row_packing
    for index in range(p.row_packing):
        for h in range(plan.tiles.heads_per_group):
            for word in range(words):
                for t in range(plan.tiles.q_sub_rows):
                    head = group * plan.tiles.heads_per_group + h
                    group_head = word * p.row_packing + index
                    rows.append((q_sub * plan.blocks.bq_c + t, head, group_head))
    return rows


@pytest.mark.parametrize("blocks", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("q, out", [("bfloat16", "bfloat16"), ("bfloat16", "float32"),
                                    ("float32", "float32"), ("float32", "bfloat16")])  # fmt: skip
@pytest.mark.parametrize("name", some(HEADS))
def test_query_tiles_and_output_tiles(name, q, out, blocks):
    plan = make_plan(HEADS[name], head_dim=240, q=q, out=out, blocks=blocks)
    p = plan.problem
    buffer, heads = query_buffer(plan)
    o_shape = (2, plan.tiles.buffer_tokens, *p.o_shape)
    o_value, o_chip = (cls(np.zeros(o_shape, p.out_dtype)) for cls in (ValueRef, ChipRef))
    for q_sub in range(plan.tiles.num_q_subs):
        for group in range(plan.tiles.num_groups):
            tile = layout.load_q_tile(plan.tiles, WordRows(ValueRef(buffer), True), 1, q_sub, group)
            expected = np.stack([heads[owner] for owner in row_owners(plan, q_sub, group)])
            np.testing.assert_array_equal(tile, expected)
            by_words = WordRows(ChipRef(buffer), False)
            tile_by_words = layout.load_q_tile(plan.tiles, by_words, 1, q_sub, group)
            np.testing.assert_array_equal(tile_by_words, expected)
            layout.store_o_tile(plan.tiles, WordRows(o_value, True), 1, q_sub, group, tile)
            layout.store_o_tile(plan.tiles, WordRows(o_chip, False), 1, q_sub, group, tile)
    for stored in (o_value.array, o_chip.values()):
        assert not stored[0].any(), "the other slot was written"
        stored_heads = stored[1].reshape(heads.shape).astype(np.float32)
        np.testing.assert_array_equal(stored_heads, heads.astype(p.out_dtype).astype(np.float32))


def kv_buffer(plan, k, v):
    """A KV buffer with keys and values in slot 1, and NaN wherever no token is copied."""
    p = plan.problem
    nan = jnp.dtype(p.kv_dtype).type(np.nan)
    shape = (2, len(k), p.kv_shape[0] | 1, packing_of(p.kv_dtype), p.head_lanes)
    buffer = np.full(shape, nan, p.kv_dtype)
    packed = pack_kv(jnp.asarray(k), jnp.asarray(v), share_lanes=p.shares_lanes)
    buffer[1, :, : p.kv_shape[0]] = np.asarray(packed)
    return buffer


@pytest.mark.parametrize("blocks", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", some(DTYPES))
@pytest.mark.parametrize("name", some(HEADS))
def test_keys_and_values(name, dtype, blocks):
    plan = make_plan(HEADS[name], kv=dtype, head_dim=80, blocks=blocks)
    p, tokens = plan.problem, blocks.bkv
    k, v = (random_values((tokens, p.num_kv_heads, p.head_dim), dtype, seed) for seed in (1, 2))
    buffer = kv_buffer(plan, k, v)
    count = plan.tiles.heads_per_group
    for num_valid in (None, 5):
        kept = slice(8, 16 if num_valid is None else 8 + num_valid)
        for group in range(plan.tiles.num_groups):
            args = (1, 8, group, num_valid)
            by_value = layout.load_kv(plan.tiles, WordRows(ValueRef(buffer), True), *args)
            by_words = layout.load_kv(plan.tiles, WordRows(ChipRef(buffer), False), *args)
            for loaded, from_words, given in zip(by_value, by_words, (k, v), strict=True):
                np.testing.assert_array_equal(loaded, from_words)
                expected = np.zeros((8, count, p.head_lanes), np.float32)
                heads = slice(group * count, (group + 1) * count)
                expected[: kept.stop - 8, :, : p.head_dim] = given[kept, heads]
                got = np.asarray(loaded).astype(np.float32)
                np.testing.assert_array_equal(got, expected.reshape(8, -1))


def sharing_pairs():
    """Heads and dtypes with which a cache of shared lanes is the smaller one."""
    for name, heads in HEADS.items():
        for dtype in DTYPES:
            shape = get_kv_cache_shape(1, 1, heads[1], 64, dtype, share_lanes=True)
            if lanes_are_shared(shape, heads[1], 64):
                marks = () if (name, dtype) == SOME else pytest.mark.full
                yield pytest.param(name, dtype, marks=marks)


@pytest.mark.parametrize("blocks", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("name, dtype", list(sharing_pairs()))
def test_keys_and_values_that_share_lanes(name, dtype, blocks):
    """One matrix is both: keys in the first half of the lanes of a head, values in the second."""
    plan = make_plan(HEADS[name], kv=dtype, head_dim=64, blocks=blocks, shares_lanes=True)
    p, tokens = plan.problem, blocks.bkv
    k, v = (random_values((tokens, p.num_kv_heads, 64), dtype, seed) for seed in (1, 2))
    buffer = kv_buffer(plan, k, v)
    count = plan.tiles.heads_per_group
    for num_valid in (None, 5):
        kept = 8 if num_valid is None else num_valid
        for group in range(plan.tiles.num_groups):
            args = (1, 8, group, num_valid)
            by_value = layout.load_kv(plan.tiles, WordRows(ValueRef(buffer), True), *args)
            by_words = layout.load_kv(plan.tiles, WordRows(ChipRef(buffer), False), *args)
            heads = slice(group * count, (group + 1) * count)
            expected = np.zeros((8, count, 128), np.float32)
            both = np.concatenate([k, v], axis=2)[8 : 8 + kept, heads]
            expected[:kept] = both.astype(np.float32)
            for loaded in (*by_value, *by_words):
                got = np.asarray(loaded).astype(np.float32)
                np.testing.assert_array_equal(got, expected.reshape(8, -1))


@pytest.mark.parametrize("name", some(HEADS))
def test_block_diagonal_heads(name):
    """Each row meets only its own KV head, and only its own columns come out."""
    plan = make_plan(HEADS[name], blocks=DECODE)
    owners = row_owners(plan, 0, 0)
    tile = random_values((plan.tiles.rows, plan.problem.head_lanes), "float32")
    spread = np.asarray(layout.spread_heads(plan.tiles, jnp.asarray(tile)))
    blocks = spread.reshape(plan.tiles.rows, plan.tiles.heads_per_group, -1)
    for row, (_, head, _) in enumerate(owners):
        for h in range(plan.tiles.heads_per_group):
            np.testing.assert_array_equal(blocks[row, h], tile[row] if h == head else 0)
    noise = np.where(spread == 0, 7.0, spread)
    np.testing.assert_array_equal(layout.gather_heads(plan.tiles, jnp.asarray(noise)), tile)


@pytest.mark.parametrize("blocks", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_sinks_stand_in_the_order_of_rows(blocks):
    plan = make_plan((9, 3), blocks=blocks)
    sinks = np.arange(1.0, 10.0, dtype=np.float32)
    tiles = np.asarray(layout.sink_tiles(plan.tiles, jnp.asarray(sinks)))
    for group in range(plan.tiles.num_groups):
        rows = np.repeat(tiles[group, :, 0], plan.tiles.q_sub_rows)
        for value, (_, head, group_head) in zip(rows, row_owners(plan, 0, group), strict=True):
            padding = group_head >= 3
            assert value == (0 if padding else sinks[3 * head + group_head])


def test_the_view_of_queries_is_undone():
    plan = make_plan((9, 3), head_dim=80)
    queries = random_values((512, 9, 80), "bfloat16")
    seen = layout.view_heads(plan.problem, jnp.asarray(queries))
    assert seen.shape == (512, 6, 2, 128)
    output, lse = layout.unview_output(plan.problem, seen)
    np.testing.assert_array_equal(output, queries)
    assert lse is None


def test_the_output_of_shared_lanes_is_in_their_second_half():
    problem = make_plan((4, 2), head_dim=64, shares_lanes=True).problem
    halves = jnp.where(jnp.arange(128) < 64, jnp.nan, 7.0)
    output, _ = layout.unview_output(problem, jnp.broadcast_to(halves, (512, 4, 1, 128)))
    assert output.shape == (512, 4, 64) and (output == 7).all()


def test_the_emulation_is_that_of_the_cache():
    """A packed cache seen as words has K of head 0 in the low bits of its first word."""
    k = jnp.full((1, 1, 128), 1.0, jnp.bfloat16)
    packed = np.asarray(pack_kv(k, 2 * k))
    assert packed.shape[1:] == get_kv_cache_shape(1, 1, 1, 128, jnp.bfloat16)[2:]
    assert (emulate_packing(packed) == 0x4000_3F80).all()
    np.testing.assert_array_equal(undo_packing(emulate_packing(packed), packed.dtype, 2), packed)
