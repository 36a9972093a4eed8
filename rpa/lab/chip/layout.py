"""How an array lies in memory: in tiles, as the compiler chose.

    memref<37x200xbf16, #xir.tiled<(8,128)(2,1),[2,1]>, #xir.memory_space<vmem, tc>>

is an array of 37 x 200 in tiles of 8 x 128, of which [2,1] are the strides in tiles; inside, tiles
of 2 x 1 lie next to each other: the two rows that share a word. Every tile shape cuts the last
dimensions of what the one before it left (https://openxla.org/xla/tiled_layout).
"""

import dataclasses
import re
from functools import cached_property

import numpy as np

from rpa.lab.chip.errors import UnknownOperation
from rpa.lab.chip.registers import dtype_of

POISON = np.uint32(0xFFFFFFFF)
"""What memory holds before it is written: NaN in every float dtype, -1 as an integer."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """An array's place in memory.

    Attributes:
        shape, dtype: of the array.
        tiles: the shapes of tiles, outermost first.
        space: "hbm", "vmem", "smem" or "semaphore_mem".
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    tiles: tuple[tuple[int, ...], ...]
    space: str

    @cached_property
    def num_words(self) -> int:
        """Words of 32 bits that it takes, padding included."""
        return len(self.to_words(np.zeros(self.shape, self.dtype)))

    @property
    def is_semaphore(self) -> bool:
        return self.space == "semaphore_mem"

    def to_words(self, array) -> np.ndarray:
        """The array as its words in memory, u32[num_words]; the padding of tiles is poison."""
        bits = np.ascontiguousarray(array).view(f"u{self.dtype.itemsize}").reshape(self.shape)
        for tile in self.tiles:
            bits = _cut(bits, tile)
        flat = bits.reshape(-1)
        missing = -flat.size * flat.itemsize % 4 // flat.itemsize
        flat = np.pad(flat, (0, missing), constant_values=_poison(flat.dtype))
        return flat.view(np.uint32)

    def to_array(self, words) -> np.ndarray:
        """Undo `to_words`."""
        shapes = [self.shape]
        for tile in self.tiles:
            shapes.append(_cut_shape(shapes[-1], tile))
        bits = words.view(f"u{self.dtype.itemsize}")[: int(np.prod(shapes[-1]))].reshape(shapes[-1])
        for shape, tile in zip(shapes[-2::-1], self.tiles[::-1], strict=True):
            bits = _join(bits, tile, shape)
        return np.ascontiguousarray(bits).view(self.dtype)


def parse_layout(text) -> Layout:
    """The layout that a `memref` type says.

    >>> layout = parse_layout(
    ...     "memref<3x2xbf16, #xir.tiled<(8,128)(2,1),[1,1]>, #xir.memory_space<vmem, tc>>")
    >>> words = layout.to_words(np.array([[1, 2], [3, 4], [5, 6]]).astype(layout.dtype))
    >>> words.shape, [hex(word) for word in words[:2]]
    ((512,), ['0x40403f80', '0x40804000'])
    """
    match = re.match(r"memref<((?:\d+x)*)([!\w.]+), #xir\.tiled<(.*?),\[([\d,]*)\]>", text)
    space = re.search(r"memory_space<(\w+)", text)
    if match is None or space is None:
        raise UnknownOperation(f"memory of type {text} is not known here.")
    shape = tuple(int(n) for n in match[1].split("x")[:-1])
    tiles = tuple(tuple(map(int, t.split(","))) for t in re.findall(r"\(([\d,]+)\)", match[3]))
    is_semaphore = "semaphore" in match[2]
    layout = Layout(
        shape, np.dtype(np.int32) if is_semaphore else dtype_of(match[2]), tiles, space[1]
    )
    strides = [int(n) for n in match[4].split(",") if n]
    if not is_semaphore and not _dense(layout, strides):
        raise UnknownOperation(f"memory of type {text} is not one tile after the other.")
    return layout


def _dense(layout, strides):
    rank = len(layout.tiles[0]) if layout.tiles else 0
    cut = len(layout.shape) - rank
    grid = [-(-n // t) for n, t in zip(layout.shape[cut:], layout.tiles[0], strict=True)]
    counts, step = [*layout.shape[:cut], *grid], 1
    for count, stride in zip(counts[::-1], strides[::-1], strict=True):
        if count > 1 and stride != step:
            return False
        step *= count
    return True


def _cut_shape(shape, tile):
    lead, cut = shape[: len(shape) - len(tile)], shape[len(shape) - len(tile) :]
    return (*lead, *(-(-n // t) for n, t in zip(cut, tile, strict=True)), *tile)


def _cut(array, tile):
    """[..., rows, lanes] to [..., tiles of rows, tiles of lanes, rows of a tile, lanes of it]."""
    rank, lead = len(tile), array.ndim - len(tile)
    grid = _cut_shape(array.shape, tile)[lead : lead + rank]
    missing = [g * t - n for g, t, n in zip(grid, tile, array.shape[lead:], strict=True)]
    if any(missing):
        pad = [(0, 0)] * lead + [(0, n) for n in missing]
        array = np.pad(array, pad, constant_values=_poison(array.dtype))
    split = [n for pair in zip(grid, tile, strict=True) for n in pair]
    array = array.reshape(*array.shape[:lead], *split)
    return array.transpose(
        *range(lead), *range(lead, lead + 2 * rank, 2), *range(lead + 1, lead + 2 * rank, 2)
    )


def _join(array, tile, shape):
    """Undo `_cut` of an array of a shape."""
    rank, lead = len(tile), len(shape) - len(tile)
    order = [lead + i + j * rank for i in range(rank) for j in range(2)]
    array = array.transpose(*range(lead), *order)
    whole = [a * b for a, b in zip(array.shape[lead::2], array.shape[lead + 1 :: 2], strict=True)]
    return array.reshape(*shape[:lead], *whole)[tuple(slice(n) for n in shape)]


def _poison(dtype):
    return np.iinfo(dtype).max
