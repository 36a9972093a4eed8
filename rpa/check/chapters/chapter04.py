"""Checks of chapter 4: tiles, a first kernel, the online softmax, flash attention, what it skips.

References and mistakes are NumPy. The learner's kernels run in this process, in the TPU interpreter
or on the TPU: the automatic pipeline has no waits, so nothing here can hang.
"""

import logging
import re

import jax
import numpy as np

from rpa.check.chapters import assembly
from rpa.check.chapters.launchers import run_flash
from rpa.check.errors import WrongResult
from rpa.check.exercise import Exercise
from rpa.paging import cdiv
from rpa.tiled import MASK_VALUE

RNG = np.random.default_rng(4)


def normal(*shape):
    """f32[shape] of standard normal numbers, the same at every run."""
    return RNG.standard_normal(shape).astype(np.float32)


# 4.1 what a block takes in VMEM -------------------------------------------------------------------


def _padded_bytes(shape, item_bytes, sublanes=None, lanes=128):
    sublanes = 8 * (4 // item_bytes) if sublanes is None else sublanes
    *untiled, rows, columns = shape
    numbers = cdiv(rows, sublanes) * sublanes * cdiv(columns, lanes) * lanes
    return int(np.prod(untiled, dtype=int)) * numbers * item_bytes


vmem_bytes = Exercise("4.1", _padded_bytes, tolerance=0.0)
vmem_bytes.case("one tile of float32, full", shape=(8, 128), item_bytes=4)
vmem_bytes.case("head_dim 64: half of the lanes are padding", shape=(8, 64), item_bytes=4)
vmem_bytes.case("five rows", shape=(5, 128), item_bytes=4)
vmem_bytes.case("five rows of bfloat16", shape=(5, 128), item_bytes=2)
vmem_bytes.case("a page of 16 tokens, 3 KV heads of 64, float8", shape=(16, 6, 64), item_bytes=1)
vmem_bytes.case("512 tokens of one head, bfloat16", shape=(512, 128), item_bytes=2)
vmem_bytes.case("two buffers of 20 rows and 200 columns", shape=(2, 20, 200), item_bytes=2)


@vmem_bytes.mistake("nothing is padded: these are the bytes of the numbers alone")
def _unpadded(shape, item_bytes):
    return int(np.prod(shape)) * item_bytes


@vmem_bytes.mistake(
    "a tile has 8 rows for every dtype: it has 8 rows of 32 bits, which is 16 rows of bfloat16 and "
    "32 of float8"
)
def _eight_rows(shape, item_bytes):
    return _padded_bytes(shape, item_bytes, sublanes=8)


@vmem_bytes.mistake("the number of rows of a tile shrinks with the dtype: narrow types have more")
def _fewer_rows(shape, item_bytes):
    return _padded_bytes(shape, item_bytes, sublanes=2 * item_bytes)


@vmem_bytes.mistake("only the lanes are padded, and not the rows")
def _lanes_only(shape, item_bytes):
    return _padded_bytes(shape, item_bytes, sublanes=1)


@vmem_bytes.mistake("only the rows are padded, and not the lanes")
def _rows_only(shape, item_bytes):
    return _padded_bytes(shape, item_bytes, lanes=1)


@vmem_bytes.mistake("the first two dimensions are tiled; it is the last two")
def _first_dimensions(shape, item_bytes):
    return _padded_bytes((*shape[2:], *shape[:2]), item_bytes)


@vmem_bytes.mistake("the array counts as one long row: each dimension is padded by itself")
def _padded_in_total(shape, item_bytes):
    return cdiv(_unpadded(shape, item_bytes), 4096) * 4096


@vmem_bytes.mistake("tiles are counted in numbers and not in bytes: item_bytes is left out")
def _numbers(shape, item_bytes):
    return _padded_bytes(shape, item_bytes) // item_bytes


@vmem_bytes.mistake("rounding goes down: a tile that is begun is a tile")
def _rounded_down(shape, item_bytes):
    *untiled, rows, columns = shape
    sublanes = 8 * (4 // item_bytes)
    whole = (rows // sublanes * sublanes, columns // 128 * 128)
    return int(np.prod((*untiled, *whole))) * item_bytes


@vmem_bytes.mistake("dimensions before the last two are left out: each of their entries has tiles")
def _untiled_left_out(shape, item_bytes):
    return _padded_bytes(shape[-2:], item_bytes)


@vmem_bytes.mistake(
    "all dimensions but the last are joined before they are filled up: each entry of the "
    "dimensions in front has tiles of its own"
)
def _joined(shape, item_bytes):
    return _padded_bytes((int(np.prod(shape[:-1])), shape[-1]), item_bytes)


@vmem_bytes.mistake("rows are filled up to 128 and lanes to 8: it is the other way round")
def _sides_swapped(shape, item_bytes):
    *untiled, rows, columns = shape
    return _padded_bytes((*untiled, columns, rows), item_bytes)


@vmem_bytes.mistake("there is one tile too many: what is a whole number of tiles already stays")
def _one_tile_more(shape, item_bytes):
    *untiled, rows, columns = shape
    sublanes = 8 * (4 // item_bytes)
    return _padded_bytes((*untiled, rows // sublanes * sublanes + 1, columns), item_bytes)


@vmem_bytes.mistake(
    "the lanes of a tile grow with a narrow dtype, too: it has more rows, and always 128 lanes"
)
def _more_lanes(shape, item_bytes):
    return _padded_bytes(shape, item_bytes, lanes=128 * (4 // item_bytes))


@vmem_bytes.mistake(
    "rows are filled up to one tile, and what is more than one not to a whole number"
)
def _one_tile_at_least(shape, item_bytes):
    *untiled, rows, columns = shape
    rows = max(rows, 8 * (4 // item_bytes))
    return _padded_bytes((*untiled, rows, columns), item_bytes, sublanes=1)


# 4.2 a first kernel -------------------------------------------------------------------------------


def _row_sums(x, block_rows, block_columns):
    return np.asarray(x).sum(axis=1, keepdims=True)


def _blocks(x, block_rows, block_columns):
    """The sums of each block: f32[rows, number of column blocks]."""
    x = np.asarray(x)
    return x.reshape(len(x), -1, block_columns).sum(axis=2)


OUT_OF_BOUNDS = re.compile(r'Out-of-bounds block index (.*?) for .*?"(\w+)" in iteration (.*?) on')
"""What the interpreter says, among the lines of its own files, about a block that is not there."""

REVISITED = re.compile(r"Revisited block .*? of output")
"""The same about an output block that is left and visited again; the oldest JAX does not say it."""


def run_blocks(function, x, block_rows, block_columns):
    """The learner's sums; they have to come from a kernel, and from blocks that x has."""
    if function.__module__ == __name__:
        return function(x, block_rows, block_columns)
    program = jax.make_jaxpr(lambda x: function(x, block_rows, block_columns))(x)
    if "pallas_call" not in str(program):
        raise WrongResult(
            "your function has no kernel: the sums have to come from pl.pallas_call, which sees "
            "one block of x at a time"
        )
    log = logging.getLogger("jax._src.callback")  # prints what is raised, with all of JAX's lines
    log.disabled = True
    try:
        return jax.block_until_ready(function(x, block_rows, block_columns))
    except jax.errors.JaxRuntimeError as error:
        if REVISITED.search(str(error)):
            raise WrongResult(
                "your grid comes back to an output block that it had left: a block stays in VMEM "
                "only from one step to the next. The last axis of the grid runs fastest, and has "
                "to be the columns of blocks: (rows of blocks, columns of blocks)"
            ) from None
        found = OUT_OF_BOUNDS.search(str(error))
        if not found:
            raise
        raise WrongResult(
            f"step {found[3]} of your grid asks for block {found[1]} of {found[2]}, which has no "
            "such block. An index map counts blocks, not elements; the grid is (rows of blocks, "
            "columns of blocks), and its steps are (i, j)"
        ) from None
    finally:
        log.disabled = False


row_sums = Exercise("4.2", _row_sums, axes=("row", "column"), drive=run_blocks)
row_sums.case(
    "one block",
    x=np.arange(8 * 128, dtype=np.float32).reshape(8, 128) % 5,
    block_rows=8,
    block_columns=128,
)
row_sums.case(
    "two blocks side by side",
    x=np.repeat(np.float32([[1] * 8, [10] * 8]).T, 128, axis=1),
    block_rows=8,
    block_columns=128,
)
row_sums.case(
    "two rows of blocks, three columns of blocks",
    x=RNG.integers(0, 9, (16, 384)).astype(np.float32),
    block_rows=8,
    block_columns=128,
)
row_sums.case("blocks that are no square", x=normal(32, 512), block_rows=16, block_columns=256)


@row_sums.mistake(
    "each column block replaces the sum of those before it: `=` where `+=` should be, or zeros at "
    "every step"
)
def _last_block(x, block_rows, block_columns):
    return _blocks(x, block_rows, block_columns)[:, -1:]


@row_sums.mistake("only the first column block is summed")
def _first_block(x, block_rows, block_columns):
    return _blocks(x, block_rows, block_columns)[:, :1]


@row_sums.mistake(
    "the output block is never set to zero: before the first store VMEM holds anything, and here "
    "it holds NaN"
)
def _never_zeroed(x, block_rows, block_columns):
    return np.full((len(x), 1), np.nan, np.float32)


@row_sums.mistake(
    "the zeros are written where program_id(0) is 0: axis 0 counts the rows of blocks, and every "
    "one of these begins at program_id(1) == 0"
)
def _zeroed_by_rows(x, block_rows, block_columns):
    last = _last_block(x, block_rows, block_columns)
    sums = _row_sums(x, block_rows, block_columns)
    sums[:block_rows] = last[:block_rows]
    return _running(sums, block_rows)


@row_sums.mistake(
    "the zeros are written in the very first step only: each further row of blocks begins with "
    "what the one before it left in VMEM"
)
def _zeroed_once(x, block_rows, block_columns):
    return _running(_row_sums(x, block_rows, block_columns), block_rows)


def _running(sums, block_rows):
    """Each block of rows on top of those before it: the output block in VMEM is one buffer."""
    return sums.reshape(-1, block_rows, 1).cumsum(axis=0).reshape(-1, 1)


@row_sums.mistake("columns are summed (axis 0) and not rows, block by block")
def _columns(x, block_rows, block_columns):
    x = np.asarray(x)
    return x.reshape(-1, block_rows, x.shape[1]).sum(axis=1)


@row_sums.mistake("each row gets the sum of its whole block: sum over axis 1, and keep the rows")
def _whole_block(x, block_rows, block_columns):
    sums = _row_sums(x, block_rows, block_columns)
    whole = sums.reshape(-1, block_rows).sum(axis=1)
    return np.repeat(whole, block_rows)[:, None]


# 4.3 online softmax -------------------------------------------------------------------------------


def _online_step(
    row_max, row_sum, acc, scores, values, *, largest=None, old=None, new=None
):  # fmt: skip
    """The step in float64, with a screw for the maximum and each factor, of old and new weights."""
    row_max, row_sum, acc, scores, values = (
        np.asarray(x, np.float64) for x in (row_max, row_sum, acc, scores, values)
    )
    top = np.maximum(row_max, scores.max(1, keepdims=True))
    top = top if largest is None else largest(row_max, scores)
    with np.errstate(over="ignore", invalid="ignore"):
        rescale = np.exp(row_max - top) if old is None else old(row_max, top)
        weights = np.exp(scores - top) if new is None else new(scores, row_max, top)
        outputs = (
            top,
            rescale * row_sum + weights.sum(1, keepdims=True),
            rescale * acc + weights @ values,
        )
        return tuple(x.astype(np.float32) for x in outputs)


def _state(rows, head_dim, seen=0):
    """The arguments that a step gets after `seen` random keys, by name."""
    state = (np.full((rows, 1), MASK_VALUE), np.zeros((rows, 1)), np.zeros((rows, head_dim)))
    if seen:
        state = _online_step(*state, 3 * normal(rows, seen), normal(seen, head_dim))
    names = ("row_max", "row_sum", "acc")
    return {name: np.float32(part) for name, part in zip(names, state, strict=True)}


online_step = Exercise(
    "4.3", _online_step, outputs=("row_max", "row_sum", "acc"), axes=("row", "lane"), tolerance=1e-5
)
online_step.case(
    "the first block of keys",
    **_state(1, 2),
    scores=np.float32([[0, 0]]),
    values=np.float32([[2, 0], [4, 8]]),
)
online_step.case(
    "the second block has the largest score",
    row_max=np.float32([[0]]),
    row_sum=np.float32([[2]]),
    acc=np.float32([[6, 8]]),
    scores=np.float32([[1, 2]]),
    values=np.float32([[1, 0], [0, 1]]),
)
online_step.case(
    "the second block has no new maximum",
    row_max=np.float32([[3]]),
    row_sum=np.float32([[1.5]]),
    acc=np.float32([[6, 8]]),
    scores=np.float32([[1, 2]]),
    values=np.float32([[1, 0], [0, 1]]),
)
online_step.case(
    "scores far from zero, rows of all kinds",
    **_state(4, 8, seen=6),
    scores=np.float32([[200], [-200], [0], [2]]) + normal(4, 5),
    values=normal(5, 8),
)
online_step.case(
    "a block of which one row sees nothing",
    **_state(2, 4, seen=3),
    scores=np.float32([[MASK_VALUE] * 4, [1, 2, 3, 4]]),
    values=normal(4, 4),
)


@online_step.mistake("what was kept is not rescaled: the new weights are added to the old sums")
def _not_rescaled(row_max, row_sum, acc, scores, values):
    return _online_step(row_max, row_sum, acc, scores, values, old=lambda old, new: 1.0)


@online_step.mistake("the sum is rescaled and the output (acc) is not")
def _acc_not_rescaled(row_max, row_sum, acc, scores, values):
    right = _online_step(row_max, row_sum, acc, scores, values)
    return *right[:2], _not_rescaled(row_max, row_sum, acc, scores, values)[2]


@online_step.mistake("the output (acc) is rescaled and the sum is not")
def _sum_not_rescaled(row_max, row_sum, acc, scores, values):
    right = _online_step(row_max, row_sum, acc, scores, values)
    return right[0], _not_rescaled(row_max, row_sum, acc, scores, values)[1], right[2]


@online_step.mistake(
    "the factor is the wrong way round: exp(new - old) grows, and exp(old - new) is at most 1"
)
def _inverse_factor(row_max, row_sum, acc, scores, values):
    return _online_step(
        row_max, row_sum, acc, scores, values, old=lambda old, new: np.exp(new - old)
    )


@online_step.mistake("row_max is the maximum of this block only, and forgets the blocks before it")
def _block_maximum(row_max, row_sum, acc, scores, values):
    def of_block(row_max, scores):
        return scores.max(1, keepdims=True)

    return _online_step(row_max, row_sum, acc, scores, values, largest=of_block)


@online_step.mistake("the new weights are taken against the old maximum, exp(scores - row_max)")
def _old_maximum(row_max, row_sum, acc, scores, values):
    def against_old(scores, old, new):
        return np.exp(scores - old)

    return _online_step(row_max, row_sum, acc, scores, values, new=against_old)


@online_step.mistake("each step divides by its own sum: only `finish` divides, once, at the end")
def _divided(row_max, row_sum, acc, scores, values):
    largest, total, acc = _online_step(row_max, row_sum, acc, scores, values)
    return largest, total, acc / total


@online_step.mistake("what was kept is thrown away: this is the state of the new block alone")
def _forgets(row_max, row_sum, acc, scores, values):
    right = _online_step(row_max, row_sum, acc, scores, values)
    alone = _online_step(row_max, row_sum, acc, scores, values, old=lambda old, new: 0.0)
    return right[0], *alone[1:]


@online_step.mistake("one maximum is taken for all rows: each row has its own (axis=1)")
def _one_maximum(row_max, row_sum, acc, scores, values):
    def of_all(row_max, scores):
        return np.maximum(row_max, scores.max())

    return _online_step(row_max, row_sum, acc, scores, values, largest=of_all)


@online_step.mistake(
    "the new weights are taken against the maximum of their own block: where the old one is larger "
    "they are too large"
)
def _against_block(row_max, row_sum, acc, scores, values):
    def against_block(scores, old, new):
        return np.exp(scores - scores.max(1, keepdims=True))

    return _online_step(row_max, row_sum, acc, scores, values, new=against_block)


@online_step.mistake("the new weights are rescaled, too: they have the new maximum already")
def _all_rescaled(row_max, row_sum, acc, scores, values):
    def rescaled(scores, old, new):
        return np.exp(scores - new) * np.exp(old - new)

    return _online_step(row_max, row_sum, acc, scores, values, new=rescaled)


@online_step.mistake("weights are powers of 2 (exp2), and here they are powers of e")
def _powers_of_two(row_max, row_sum, acc, scores, values):
    return _online_step(
        row_max, row_sum, acc, scores, values,
        old=lambda old, new: np.exp2(old - new), new=lambda scores, old, new: np.exp2(scores - new),
    )  # fmt: skip


# 4.4 a flash attention kernel ---------------------------------------------------------------------


def _attend(q, k, v, block_q=0, block_kv=0, *, scale=None, keys=slice(None), divide=True):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = q @ k[keys].T * (q.shape[1] ** -0.5 if scale is None else scale)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights = weights / weights.sum(1, keepdims=True) if divide else weights
    return (weights @ v[keys]).astype(np.float32)


def _launch(kernel, q, k, v, block_q, block_kv):
    """A kernel goes into its `pallas_call`; references and mistakes are plain functions."""
    if kernel.__module__ == __name__:
        return kernel(q, k, v, block_q, block_kv)
    return run_flash(kernel, q, k, v, block_q=block_q, block_kv=block_kv)


def _lengths(q_len, kv_len, block_q, block_kv):
    q = 2 * normal(q_len, 128)
    k, v = normal(2, kv_len, 128)
    return {"q": q, "k": k, "v": v, "block_q": block_q, "block_kv": block_kv}


flash = Exercise("4.4", _attend, axes=("query", "lane"), drive=_launch, tolerance=1e-4)
flash.case("one block of queries, one of keys", **_lengths(8, 16, 8, 16))
flash.case("three blocks of keys", **_lengths(8, 48, 8, 16))
flash.case("two blocks of queries", **_lengths(16, 32, 8, 16))
flash.case("a last block that is not full: 37 keys in blocks of 16", **_lengths(8, 37, 8, 16))


def _last_keys(k, block_kv):
    """The slice of the last block of keys."""
    return slice((len(k) - 1) // block_kv * block_kv, None)


@flash.mistake("scores are not divided by the root of head_dim")
def _unscaled(q, k, v, block_q, block_kv):
    return _attend(q, k, v, scale=1.0)


@flash.mistake("the output is not divided by the sum of the weights: `finish` does that")
def _undivided(q, k, v, block_q, block_kv):
    return _attend(q, k, v, divide=False)


def _by_blocks(q, k, v, block_kv, *, rescale_sum=True, rescale_acc=True, running_max=True):
    """The online softmax with a step of 4.3 that has one mistake."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = q @ k.T * q.shape[1] ** -0.5
    row_max, row_sum, acc = np.full((len(q), 1), MASK_VALUE), np.zeros((len(q), 1)), 0.0
    for begin in range(0, len(k), block_kv):
        block = scores[:, begin : begin + block_kv]
        new_max = block.max(1, keepdims=True)
        new_max = np.maximum(row_max, new_max) if running_max else new_max
        rescale, weights = np.exp(row_max - new_max), np.exp(block - new_max)
        row_sum = row_sum * (rescale if rescale_sum else 1) + weights.sum(1, keepdims=True)
        acc = acc * (rescale if rescale_acc else 1) + weights @ v[begin : begin + block_kv]
        row_max = new_max
    return (acc / row_sum).astype(np.float32)


@flash.mistake("what was kept is not rescaled when a larger score comes (4.3): neither sum nor acc")
def _nothing_rescaled(q, k, v, block_q, block_kv):
    return _by_blocks(q, k, v, block_kv, rescale_sum=False, rescale_acc=False)


@flash.mistake("`acc` is not rescaled when a larger score comes, only the sum (4.3)")
def _acc_not_rescaled(q, k, v, block_q, block_kv):
    return _by_blocks(q, k, v, block_kv, rescale_acc=False)


@flash.mistake("the sum is not rescaled when a larger score comes, only `acc` (4.3)")
def _sum_not_rescaled(q, k, v, block_q, block_kv):
    return _by_blocks(q, k, v, block_kv, rescale_sum=False)


@flash.mistake("the values are taken for keys: `k_ref` is mixed where `v_ref` should be")
def _mixes_keys(q, k, v, block_q, block_kv):
    return _attend(q, k, k)


@flash.mistake(
    "the state is emptied at every step: only the last block of keys is left. Empty it at the "
    "first one"
)
def _emptied_every_step(q, k, v, block_q, block_kv):
    return _attend(q, k, v, keys=_last_keys(k, block_kv))


@flash.mistake(
    "the output is written after the first block of keys, and the blocks after it are lost"
)
def _written_first(q, k, v, block_q, block_kv):
    return _attend(q, k, v, keys=slice(block_kv))


@flash.mistake(
    "the state is never emptied or the output never written: VMEM begins as anything, and here as "
    "NaN. Empty the state at block 0 of the keys, write at block pl.num_programs(1) - 1"
)
def _never_emptied(q, k, v, block_q, block_kv):
    return np.full(q.shape, np.nan, np.float32)


@flash.mistake(
    "the state is emptied for the first block of queries only, and the second one goes on with "
    "what the first one saw: axis 1 of the grid counts the blocks of keys"
)
def _emptied_once(q, k, v, block_q, block_kv):
    output = _attend(q, k, v)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = (q @ k.T).reshape(-1, block_q, len(k)) * q.shape[1] ** -0.5
    scores = np.concatenate(scores[:2], axis=1) if len(scores) > 1 else scores[0]
    weights = np.exp(scores - scores.max(1, keepdims=True))
    repeated = np.concatenate([v] * (weights.shape[1] // len(v)))
    output[-block_q:] = weights @ repeated / weights.sum(1, keepdims=True)
    return output.astype(np.float32)


@flash.mistake(
    "what lies behind the last key is not kept out, and here it is NaN. Its scores have to become "
    "MASK_VALUE, counted from the start of the sequence and not of the block, and its values zero: "
    "0 * NaN is NaN"
)
def _tail_kept(q, k, v, block_q, block_kv):
    output = _attend(q, k, v)
    return output if len(k) % block_kv == 0 else np.full_like(output, np.nan)


@flash.mistake("scores are divided by head_dim and not by its root")
def _scaled_too_much(q, k, v, block_q, block_kv):
    return _attend(q, k, v, scale=1 / q.shape[1])


@flash.mistake("the state that softmax_step returns is not kept: write_state puts it back")
def _state_not_kept(q, k, v, block_q, block_kv):
    return np.zeros(q.shape, np.float32)


@flash.mistake(
    "program_id(0) is taken for the block of keys: axis 0 of the grid counts the blocks of queries"
)
def _wrong_axis(q, k, v, block_q, block_kv):
    if len(q) == block_q and len(k) == block_kv:
        return _attend(q, k, v)
    return np.full(q.shape, np.nan, np.float32)


@flash.mistake("hidden scores are set to 0, which still has the weight exp(0): MASK_VALUE has none")
def _hidden_are_zero(q, k, v, block_q, block_kv):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    hidden = -len(k) % block_kv
    scores = np.pad(q @ k.T * q.shape[1] ** -0.5, ((0, 0), (0, hidden)))
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return (weights[:, : len(k)] @ v).astype(np.float32)


@flash.mistake(
    "the scale is the root of the number of queries in a block: q_ref is [block_q, head_dim], and "
    "head_dim is its last dimension"
)
def _scaled_by_rows(q, k, v, block_q, block_kv):
    return _attend(q, k, v, scale=block_q**-0.5)


# 4.5 which blocks to skip -------------------------------------------------------------------------


def _key_blocks(q_block, q_len, kv_len, block_q, block_kv):
    """By looking at every pair, so that no formula can be wrong here."""
    queries = range(q_block * block_q, min((q_block + 1) * block_q, q_len))
    positions = [kv_len - q_len + t for t in queries]
    blocks = [range(b, min(b + block_kv, kv_len)) for b in range(0, kv_len, block_kv)]
    whole = [
        len(keys) == block_kv and all(j <= i for i in positions for j in keys) for keys in blocks
    ]
    needed = [any(j <= i for i in positions for j in keys) for keys in blocks]
    return sum(whole), sum(needed)


def _formula(q_block, q_len, kv_len, block_q, block_kv, *, prefix=True, clamp=True):
    start = (kv_len - q_len if prefix else 0) + q_block * block_q
    end = start + block_q
    if clamp:
        end = min(end, kv_len)
    return min(start + 1, kv_len) // block_kv, cdiv(end, block_kv)


def _shape(q_block, q_len, kv_len, block_q, block_kv):
    names = ("q_block", "q_len", "kv_len", "block_q", "block_kv")
    return dict(zip(names, (q_block, q_len, kv_len, block_q, block_kv), strict=True))


key_blocks = Exercise("4.5", _key_blocks, outputs=("whole", "end"), tolerance=0.0)
key_blocks.case("eighteen queries, nothing cached: the first nine", **_shape(0, 18, 18, 9, 4))
key_blocks.case("eight queries, nothing cached: the first four", **_shape(0, 8, 8, 4, 4))
key_blocks.case("the same, the last four", **_shape(1, 8, 8, 4, 4))
key_blocks.case("five cached tokens in front", **_shape(0, 8, 13, 4, 4))
key_blocks.case("the last block of queries is not full", **_shape(1, 6, 12, 4, 4))
key_blocks.case("decode: one query, a last block that is not full", **_shape(0, 1, 21, 1, 8))
key_blocks.case("the diagonal meets the corner of a block", **_shape(0, 4, 11, 4, 8))
key_blocks.case("wide blocks of keys, narrow ones of queries", **_shape(3, 64, 100, 16, 32))
key_blocks.case("narrow blocks of keys, wide ones of queries", **_shape(1, 64, 100, 32, 8))


@key_blocks.mistake("the cached prefix is forgotten: query t has position kv_len - q_len + t")
def _no_prefix(q_block, q_len, kv_len, block_q, block_kv):
    return _formula(q_block, q_len, kv_len, block_q, block_kv, prefix=False)


@key_blocks.mistake(
    "`end` is rounded down: the block that the diagonal goes through is left out, and its keys "
    "with it"
)
def _end_rounded_down(q_block, q_len, kv_len, block_q, block_kv):
    whole, _ = _key_blocks(q_block, q_len, kv_len, block_q, block_kv)
    start = kv_len - q_len + q_block * block_q
    return whole, min(start + block_q, kv_len) // block_kv


@key_blocks.mistake("`end` follows the first query of the block, and the last one sees most")
def _end_of_first(q_block, q_len, kv_len, block_q, block_kv):
    whole, _ = _key_blocks(q_block, q_len, kv_len, block_q, block_kv)
    return whole, cdiv(kv_len - q_len + q_block * block_q + 1, block_kv)


@key_blocks.mistake("`whole` follows the last query of the block, and the first one sees least")
def _whole_of_last(q_block, q_len, kv_len, block_q, block_kv):
    start = kv_len - q_len + q_block * block_q
    _, end = _key_blocks(q_block, q_len, kv_len, block_q, block_kv)
    return min(start + block_q, kv_len) // block_kv, end


@key_blocks.mistake(
    "`end` goes past the last key: the last block of queries may be filled up with rows that do "
    "not exist"
)
def _end_too_far(q_block, q_len, kv_len, block_q, block_kv):
    return _formula(q_block, q_len, kv_len, block_q, block_kv, clamp=False)


@key_blocks.mistake("a token does not see itself: a query at position p sees p + 1 keys")
def _not_itself(q_block, q_len, kv_len, block_q, block_kv):
    start = kv_len - q_len + q_block * block_q
    _, end = _key_blocks(q_block, q_len, kv_len, block_q, block_kv)
    return start // block_kv, end


@key_blocks.mistake("nothing is skipped: `end` is the number of all blocks of keys")
def _skips_nothing(q_block, q_len, kv_len, block_q, block_kv):
    whole, _ = _key_blocks(q_block, q_len, kv_len, block_q, block_kv)
    return whole, cdiv(kv_len, block_kv)


@key_blocks.mistake(
    "`end` is one key too far: the last query of the block sees its own key, not one more"
)
def _one_key_too_far(q_block, q_len, kv_len, block_q, block_kv):
    whole, _ = _key_blocks(q_block, q_len, kv_len, block_q, block_kv)
    start = kv_len - q_len + q_block * block_q
    return whole, cdiv(min(start + block_q + 1, kv_len), block_kv)


@key_blocks.mistake("`end` is one key short: a query at position p sees p + 1 keys")
def _one_key_short(q_block, q_len, kv_len, block_q, block_kv):
    whole, _ = _key_blocks(q_block, q_len, kv_len, block_q, block_kv)
    start = kv_len - q_len + q_block * block_q
    return whole, cdiv(min(start + block_q, kv_len) - 1, block_kv)


@key_blocks.mistake("`whole` is rounded up: a block that the first query sees in part needs a mask")
def _whole_rounded_up(q_block, q_len, kv_len, block_q, block_kv):
    start = kv_len - q_len + q_block * block_q
    _, end = _key_blocks(q_block, q_len, kv_len, block_q, block_kv)
    return cdiv(start + 1, block_kv), end


@key_blocks.mistake("`end` counts the blocks that are partly visible; it counts whole ones, too")
def _partly_only(q_block, q_len, kv_len, block_q, block_kv):
    whole, end = _key_blocks(q_block, q_len, kv_len, block_q, block_kv)
    return whole, end - whole


@key_blocks.mistake("keys are counted in blocks of block_q: their blocks have block_kv keys")
def _blocks_of_queries(q_block, q_len, kv_len, block_q, block_kv):
    return _formula(q_block, q_len, kv_len, block_q, block_q)


@key_blocks.mistake("`whole` and `end` are counted in keys and not in blocks")
def _in_keys(q_block, q_len, kv_len, block_q, block_kv):
    start = kv_len - q_len + q_block * block_q
    return start + 1, min(start + block_q, kv_len)


@key_blocks.mistake("`end` is cut at q_len: the keys go on to kv_len")
def _cut_at_q_len(q_block, q_len, kv_len, block_q, block_kv):
    whole, _ = _key_blocks(q_block, q_len, kv_len, block_q, block_kv)
    start = kv_len - q_len + q_block * block_q
    return whole, cdiv(min(start + block_q, q_len), block_kv)


@key_blocks.mistake(
    "every block of queries is taken for the first: block i begins i * block_q later"
)
def _first_block_only(q_block, q_len, kv_len, block_q, block_kv):
    return _formula(0, q_len, kv_len, block_q, block_kv)


# 4.6 GQA rows -------------------------------------------------------------------------------------


def _grouped_rows(q, num_kv_heads, kv_len):
    q = np.asarray(q)
    q_len, num_q_heads, head_dim = q.shape
    group = num_q_heads // num_kv_heads
    rows = np.zeros((num_kv_heads, q_len * group, head_dim), np.float32)
    positions = np.zeros(q_len * group, np.int32)
    for h in range(num_kv_heads):
        for t in range(q_len):
            for g in range(group):
                rows[h, t * group + g] = q[t, h * group + g]
                positions[t * group + g] = kv_len - q_len + t
    return rows, positions


grouped_rows = Exercise(
    "4.6", _grouped_rows, outputs=("rows", "positions"), axes=("KV head", "row", "lane")
)
grouped_rows.case(
    "two tokens, one KV head of two query heads; the number says token and head",
    q=np.float32([[[0.0], [0.1]], [[1.0], [1.1]]]),
    num_kv_heads=1,
    kv_len=2,
)
grouped_rows.case(
    "one token, two KV heads of two query heads",
    q=np.float32([[[0.0], [0.1], [0.2], [0.3]]]),
    num_kv_heads=2,
    kv_len=1,
)
grouped_rows.case("three new tokens after four cached", q=normal(3, 4, 2), num_kv_heads=2, kv_len=7)
grouped_rows.case("SmolLM2: nine heads on three", q=normal(5, 9, 4), num_kv_heads=3, kv_len=50)
grouped_rows.case("no sharing: a group of one", q=normal(2, 3, 4), num_kv_heads=3, kv_len=9)


@grouped_rows.mistake(
    "the rows stand head by head, all tokens of a query head together: row g * q_len + t, and not "
    "row t * group + g"
)
def _head_by_head(q, num_kv_heads, kv_len):
    q = np.asarray(q)
    q_len, num_q_heads, head_dim = q.shape
    rows = q.transpose(1, 0, 2).reshape(num_kv_heads, -1, head_dim)
    return rows, np.tile(np.arange(kv_len - q_len, kv_len), num_q_heads // num_kv_heads)


@grouped_rows.mistake(
    "the rows of a KV head go through all tokens of one query head, then through those of the "
    "next; the positions are those of row t * group + g"
)
def _rows_by_head(q, num_kv_heads, kv_len):
    return _head_by_head(q, num_kv_heads, kv_len)[0], _grouped_rows(q, num_kv_heads, kv_len)[1]


@grouped_rows.mistake("positions begin at kv_len; the new tokens are the last of them")
def _positions_behind(q, num_kv_heads, kv_len):
    rows, positions = _grouped_rows(q, num_kv_heads, kv_len)
    return rows, positions + np.int32(len(q))


@grouped_rows.mistake(
    "the rows are reshaped without a transpose: rows of different KV heads get mixed"
)
def _no_transpose(q, num_kv_heads, kv_len):
    _, positions = _grouped_rows(q, num_kv_heads, kv_len)
    return np.asarray(q).reshape(num_kv_heads, -1, q.shape[2]), positions


@grouped_rows.mistake(
    "neighbouring query heads go to different KV heads: h % num_kv_heads, and not h // group"
)
def _tiled_heads(q, num_kv_heads, kv_len):
    order = np.arange(q.shape[1]).reshape(-1, num_kv_heads).T.reshape(-1)
    return _grouped_rows(np.asarray(q)[:, order], num_kv_heads, kv_len)


@grouped_rows.mistake(
    "every row counts as a token of its own: the `group` rows of a token share its position"
)
def _row_is_position(q, num_kv_heads, kv_len):
    rows, positions = _grouped_rows(q, num_kv_heads, kv_len)
    return rows, np.int32(kv_len - len(q)) + np.arange(len(positions), dtype=np.int32)


@grouped_rows.mistake("positions repeat as row % q_len; the rows of a token stand side by side")
def _modulo(q, num_kv_heads, kv_len):
    rows, positions = _grouped_rows(q, num_kv_heads, kv_len)
    return rows, np.int32(kv_len - len(q)) + np.arange(len(positions), dtype=np.int32) % len(q)


@grouped_rows.mistake("the cached prefix is forgotten: positions begin at kv_len - q_len")
def _positions_from_zero(q, num_kv_heads, kv_len):
    rows, positions = _grouped_rows(q, num_kv_heads, kv_len)
    return rows, positions - np.int32(kv_len - len(q))


@grouped_rows.mistake("positions are counted in steps of q_len: row r belongs to token r // group")
def _divided_by_q_len(q, num_kv_heads, kv_len):
    rows, positions = _grouped_rows(q, num_kv_heads, kv_len)
    return rows, np.int32(kv_len - len(q)) + np.arange(len(positions), dtype=np.int32) // len(q)


# 4.7 flash attention, whole -----------------------------------------------------------------------


def _causal_mask(shape, group, q_position, kv_position, kv_len, *, row=None, sees=None):
    rows, keys = np.arange(shape[0])[:, None], kv_position + np.arange(shape[1])[None]
    position = q_position + (rows // group if row is None else row(rows, group))
    sees = sees or (lambda key, position: key <= position)
    return sees(keys, position) & (keys < kv_len)


causal_mask = Exercise("4.7", _causal_mask, name="causal_mask", axes=("row", "key"), tolerance=0.0)
causal_mask.case(
    "two tokens, one head, nothing cached",
    **{"shape": (2, 4), "group": 1, "q_position": 0, "kv_position": 0, "kv_len": 2},
)
causal_mask.case(
    "two tokens of two heads behind a prefix, the second block of keys",
    **{"shape": (4, 4), "group": 2, "q_position": 5, "kv_position": 4, "kv_len": 7},
)
causal_mask.case(
    "four rows, of which the last two are past the end",
    **{"shape": (4, 4), "group": 1, "q_position": 5, "kv_position": 4, "kv_len": 7},
)


@causal_mask.mistake("the causal mask ignores the cached prefix: token 0 stands at q_position")
def _mask_without_prefix(shape, group, q_position, kv_position, kv_len):
    return _causal_mask(shape, group, 0, kv_position, kv_len)


@causal_mask.mistake("every row counts as a token of its own: `group` rows are one token")
def _mask_by_row(shape, group, q_position, kv_position, kv_len):
    return _causal_mask(shape, group, q_position, kv_position, kv_len, row=lambda rows, group: rows)


@causal_mask.mistake("rows go head by head (row % tokens): row // group is the token")
def _mask_head_by_head(shape, group, q_position, kv_position, kv_len):
    tokens = shape[0] // group
    row = lambda rows, group: rows % tokens  # noqa: E731
    return _causal_mask(shape, group, q_position, kv_position, kv_len, row=row)


@causal_mask.mistake("a token does not see itself: <= and not <")
def _mask_without_itself(shape, group, q_position, kv_position, kv_len):
    args = (shape, group, q_position, kv_position, kv_len)
    return _causal_mask(*args, sees=lambda key, position: key < position)


@causal_mask.mistake("keys behind the last one count as visible: kv_len is not asked")
def _mask_without_end(shape, group, q_position, kv_position, kv_len):
    return _causal_mask(shape, group, q_position, kv_position, 10**6)


@causal_mask.mistake("keys count from 0 in every block: the first one stands at kv_position")
def _mask_in_block(shape, group, q_position, kv_position, kv_len):
    return _causal_mask(shape, group, q_position, 0, kv_len)


def _take_block(
    state, q, k, v, visible, num_keys, sm_scale, *, scaled=True, hidden=True, values=None
):
    row_max, row_sum, acc = (np.asarray(x, np.float64) for x in state)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    with np.errstate(invalid="ignore"):
        scores = q @ k.T * (sm_scale if scaled else 1)
        scores = np.where(visible, scores, MASK_VALUE) if hidden else scores
        new_max = np.maximum(row_max, scores.max(axis=1, keepdims=True))
        rescale, weights = np.exp(row_max - new_max), np.exp(scores - new_max)
        exists = np.arange(len(v))[:, None] < num_keys
        v = np.where(exists, v, 0) if values is None else values(v, exists)
        parts = (new_max, row_sum * rescale + weights.sum(axis=1, keepdims=True))
        return tuple(x.astype(np.float32) for x in (*parts, acc * rescale + weights @ v))


def _block_of_keys(rows, keys, num_keys):
    k, v = normal(keys, 128), normal(keys, 128)
    k[num_keys:] = v[num_keys:] = np.nan
    state = (normal(rows, 1), 1 + np.abs(normal(rows, 1)), normal(rows, 128))
    visible = np.arange(keys)[None] <= np.arange(rows)[:, None] + 1
    visible &= np.arange(keys) < num_keys
    names = {"state": state, "q": normal(rows, 128), "k": k, "v": v, "visible": visible}
    return names | {"num_keys": num_keys, "sm_scale": 0.1}


attend = Exercise(
    "4.7", _take_block, name="attend", outputs=("row_max", "row_sum", "acc"), axes=("row", "lane")
)
attend.case("a full block of eight keys", **_block_of_keys(8, 8, 8))
attend.case("a block of which five keys exist, NaN behind them", **_block_of_keys(8, 8, 5))


@attend.mistake("the scores are not scaled by sm_scale")
def _take_block_unscaled(*arguments):
    return _take_block(*arguments, scaled=False)


@attend.mistake("`visible` is not asked: hidden scores become MASK_VALUE")
def _take_block_unmasked(*arguments):
    return _take_block(*arguments, hidden=False)


@attend.mistake(
    "what lies behind the last key is not kept out of the values: a weight of 0 times NaN is NaN"
)
def _take_block_tail(*arguments):
    return _take_block(*arguments, values=lambda v, exists: v)


def _whole(function_options):
    return lambda q, k, v, **options: assembly.flash(q, k, v, **options, **function_options)


def _whole_case(q_len, kv_len, block_q, block_kv, heads=(4, 2)):
    return {
        "q": normal(q_len, heads[0], 128),
        "k": normal(kv_len, heads[1], 128) / 4,
        "v": normal(kv_len, heads[1], 128),
        "block_q": block_q,
        "block_kv": block_kv,
    }


flash_attention = Exercise(
    "4.7",
    assembly.flash,
    axes=("token", "head", "lane"),
    tolerance=1e-4,
    drive=assembly.run_flash_attention,
    pieces=(causal_mask, attend),
    epilogue=assembly.compiled("4.7"),
)
flash_attention.case("one block of four tokens", **_whole_case(4, 4, 4, 4))
flash_attention.case("8 queries behind a prefix, 13 keys", **_whole_case(8, 13, 4, 4))
flash_attention.case("no length a multiple of a block", **_whole_case(11, 21, 4, 8, (3, 1)))


def _whole_mistake(words, **options):
    wrong = _whole(options)
    wrong.__module__ = __name__
    flash_attention.mistake(words)(wrong)


_whole_mistake(
    "the causal mask ignores the cached prefix: the queries are the last q_len of kv_len tokens",
    sees=lambda position, key, row: key <= position - position[0],
)
_whole_mistake("there is no causal mask", sees=lambda position, key, row: key == key)
_whole_mistake("the state is emptied for the first block of queries only", keep_state=True)
_whole_mistake(
    "only the last block of keys is left: the state is emptied for every one",
    last_block_only=True,
)
_whole_mistake("the output is not divided by the sum of the weights", divide=False)
_whole_mistake(
    "each query head reads the KV head of another group: head h reads KV head h // group",
    kv_head=lambda h, num_q_heads, num_kv_heads: h % num_kv_heads,
)
_whole_mistake("all query heads read KV head 0", kv_head=lambda h, *_: 0)
_whole_mistake(
    "what lies behind the last key is not kept out of the values: 0 times NaN is NaN", tail=np.nan
)


@flash_attention.mistake(
    "the walk over the keys ends too early: the last query of a block sees keys up to its own "
    "position, so blocks are needed up to q_position + block_q"
)
def _whole_ends_early(q, k, v, *, block_q, block_kv, **options):
    def sees(position, key, row):
        first = position[0] + (position - position[0]) // block_q * block_q
        return (key <= position) & (key // block_kv * block_kv < first)

    return assembly.flash(q, k, v, sees=sees, block_q=block_q, block_kv=block_kv, **options)


@flash_attention.mistake("sm_scale is left out, or another scale is taken")
def _whole_other_scale(q, k, v, *, sm_scale, **options):
    return assembly.flash(q, k, v, sm_scale=1.0, **options)
