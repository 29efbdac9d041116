"""Lists: the blocks of a pattern as FlexAttention wants them, row by row and column by column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longspan.derive.blocks import FULL, PARTIAL, TRIANGLE, Blocks
from longspan.derive.stretch import Stretch

# What a list of nothing is wide: sizes of 1 are compiled apart from all others.
_LEAST = 2


@dataclass(frozen=True, eq=False)
class Lists:
    """Numbers of blocks, int32 `[layouts, heads, rows or columns]`, and which ones they are, with one more axis.

    `keys` and `full_keys` list the partial and the full blocks of keys for each block of queries, in ascending order;
    `queries` and `full_queries` list the blocks of queries for each block of keys. What stands behind the number of
    blocks in a list is 0 and means nothing. Both lists along one axis are as wide as the wider one: the kernels of
    PyTorch 2.11 find the full blocks by the strides of the partial ones.
    """

    keys: tuple[Tensor, Tensor]
    full_keys: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    full_queries: tuple[Tensor, Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.keys, *self.full_keys, *self.queries, *self.full_queries)

    @property
    def heads(self) -> int:
        """How many heads are listed; one stands for all."""
        return self.keys[0].shape[1]

    @property
    def counts(self) -> tuple[int, int]:
        """How many blocks are full, and how many partial."""
        return int(self.full_keys[0].sum()), int(self.keys[0].sum())


def lists(
    heads: list[tuple[Blocks, Stretch]], classes: tuple[np.ndarray, np.ndarray], device: torch.device
) -> Lists:
    """Return the lists of some heads, which are cut alike.

    Args:
        heads: the blocks of each head, and how what they are of is drawn out.
        classes: the pairs of residue classes that hold any, of queries and of keys; each is one layout.
        device: where the lists are wanted; on "meta" only the numbers of blocks are found, and which they are is not
            written down.
    """
    grids = [_Grid.of(found, len(classes[0])) for found, _ in heads]

    def put(axis: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return the lists of blocks that are not full, and of those that are."""
        both = zip(
            *(_runs(found, classes, grid, axis) for (found, _), grid in zip(heads, grids, strict=True)),
            strict=True,
        )
        kinds = [
            [
                (*_lines(grid, run, axis), _again(grid, stretch, axis))
                for grid, run, (_, stretch) in zip(grids, kind, heads, strict=True)
            ]
            for kind in both
        ]
        wide = max(_LEAST, *(int(number.max(initial=0)) for kind in kinds for number, _, _ in kind))
        return tuple(_beside(kind, wide, device) for kind in kinds)

    (partial, full), (partly, fully) = put(1), put(2)
    return Lists(partial, full, partly, fully)


@dataclass(frozen=True)
class _Grid:
    """The blocks that there could be: of how many layouts, rows and columns, and how many places each has, queries and
    keys."""

    shape: tuple[int, int, int]
    places: tuple[int, int]

    @classmethod
    def of(cls, found: Blocks, layouts: int) -> _Grid:
        sides = found.query_side, found.key_side
        down, across = (-(-int(side.lengths.max(initial=0)) // found.size) for side in sides)
        return cls((layouts, down, across), (found.size * sides[0].step, found.size * sides[1].step))


def squares(found: Blocks, classes: tuple[np.ndarray, np.ndarray], full: bool) -> np.ndarray:
    """Return layout, row and column of every block that is full, or of every one that is not, int64 `[3, blocks]`."""
    grid = _Grid.of(found, len(classes[0]))
    line, first, number = _runs(found, classes, grid, 1)[full]
    start = np.cumsum(number) - number
    column = np.arange(int(number.sum())) + np.repeat(first - start, number)
    return np.stack([*np.divmod(np.repeat(line, number), max(1, grid.shape[1])), column])


# Which line, the first block in it, and how many blocks follow one another.
_Runs = tuple[np.ndarray, np.ndarray, np.ndarray]


def _runs(
    found: Blocks, classes: tuple[np.ndarray, np.ndarray], grid: _Grid, axis: int
) -> tuple[_Runs, _Runs]:
    """Return runs along rows (axis 1) or columns (axis 2) of the blocks that are not full, and of those that are."""
    sides = [
        (begin, -(-places // found.size))
        for begin, places in zip((found.row, found.column), found.extents(), strict=True)
    ]
    (above, lines), (before, wide) = sides if axis == 1 else sides[::-1]
    owner = np.repeat(np.arange(len(found)), lines)
    depth = np.arange(len(owner)) - np.repeat(np.cumsum(lines) - lines, lines)
    line, first, number = (above[owner] + depth, before[owner], wide[owner])
    triangle = found.kind[owner] == TRIANGLE
    corner = first + np.where(triangle, depth, 0)
    # The diagonal of a triangle is partial, unless one pair is all it is; what lies before it in a row or behind it in
    # a column is full.
    single = triangle & (np.minimum(found.size, found.extents()[0][owner] - depth * found.size) == 1)
    if axis == 1:
        inside = np.where(triangle, depth + single, number)
    else:
        first = first + np.where(triangle, depth + 1 - single, 0)
        inside = np.where(triangle, number - depth - 1 + single, number)
    inside[found.kind[owner] == PARTIAL] = 0
    broken = np.where((found.kind[owner] == FULL) | single, 0, 1)
    # Classes of one side differ in length by one place, and the shorter ones are padded, so that their last keys are
    # those of a partial block.
    lengths = found.key_side.lengths
    last = np.where(lengths < lengths.max(initial=0), lengths // found.size, grid.shape[2])
    last = last[found.key_class][owner]
    if axis == 1:
        cut = ((first + inside > last) & (inside > 0)).astype(np.int64)
        ends = last
    else:
        cut = np.where(line >= last, inside, 0)
        ends = first
    line = line + (_layouts(found, classes) * grid.shape[axis])[owner]
    partial = (np.concatenate(side) for side in ((line, line), (corner, ends), (broken, cut)))
    return tuple(partial), (line, first, inside - cut)


def _layouts(found: Blocks, classes: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return for each rectangle the number of its pair of classes."""
    number = np.zeros((found.query_side.step, found.key_side.step), dtype=np.int64)
    number[classes] = np.arange(len(classes[0]))
    return number[found.query_class, found.key_class]


def _lines(grid: _Grid, runs: _Runs, axis: int) -> tuple[np.ndarray, _Runs]:
    """Return how many blocks lie in each row (axis 1) or column (axis 2) of each layout, and the runs in order."""
    layouts, along = grid.shape[0], grid.shape[axis]
    some = np.flatnonzero(runs[2])
    some = some[np.lexsort((runs[1][some], runs[0][some]))]
    line, first, number = (side[some] for side in runs)
    total = np.bincount(line, weights=number, minlength=layouts * along)
    return total.astype(np.int32).reshape(layouts, along), (line, first, number)


def _placed(number: np.ndarray, runs: _Runs, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the blocks of runs where each line begins somewhere, and which blocks they are."""
    line, first, length = runs
    place = np.arange(int(length.sum()))
    # Runs lie in order, so what stands before a run is what it begins after, in its line and in all lines.
    begin = at - (np.cumsum(number, dtype=np.int64) - number.ravel())
    named = place + np.repeat(first - (np.cumsum(length) - length), length)
    return place + np.repeat(begin[line], length), named.astype(np.int32)


@dataclass(frozen=True)
class _Again:
    """Which lines of the short text come again, how often, and how much farther on they lie each time."""

    begin: int
    end: int
    times: int
    farther: int


def _again(grid: _Grid, stretch: Stretch, axis: int) -> _Again:
    begin, size, other = (stretch.query, stretch.key)[axis - 1], grid.places[axis - 1], grid.places[2 - axis]
    return _Again(begin // size, (begin + stretch.unit) // size, stretch.times, stretch.unit // other)


def _beside(
    heads: list[tuple[np.ndarray, _Runs, _Again]], wide: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the lists of heads for the long text, numbers `[layouts, heads, lines]` and what they are of, `wide`
    places for each."""
    number, _, again = heads[0]
    lines = number.shape[1] + again.times * (again.end - again.begin)
    shape = (len(number), len(heads), lines)
    numbers = np.zeros(shape, dtype=np.int32)
    for head, (number, _, again) in enumerate(heads):
        _draw_out(number, np.zeros_like(number), again, numbers[:, head])
    if device.type == "meta":
        return torch.from_numpy(numbers), torch.empty(*shape, wide, dtype=torch.int32, device=device)
    # Lists are long and mostly empty: only what is in them is touched here, and moved to where they are.
    listed = (
        torch.from_numpy(np.zeros((*shape, wide), dtype=np.int32))
        if device.type == "cpu"
        else torch.zeros(*shape, wide, dtype=torch.int32, device=device)
    )
    begins = np.arange(len(number) * len(heads) * lines).reshape(shape) * wide
    for head, (number, runs, again) in enumerate(heads):
        if again.times:
            drawn = torch.from_numpy(_drawn(number, runs, again, lines))
            listed[:, head, :, : drawn.shape[-1]] = drawn.to(device)
        else:
            place, named = (
                torch.from_numpy(side).to(device) for side in _placed(number, runs, begins[:, head].ravel())
            )
            listed.view(-1)[place] = named
    return torch.from_numpy(numbers).to(device), listed


def _drawn(number: np.ndarray, runs: _Runs, again: _Again, lines: int) -> np.ndarray:
    """Return the lists of one head for the long text, `[layouts, lines, the most blocks of a line]`."""
    own = int(number.max(initial=0))
    where = np.zeros(number.size * own, dtype=np.int32)
    place, named = _placed(number, runs, np.arange(number.size) * own)
    where[place] = named
    # What stands behind the number of blocks in a list stays 0.
    farther = (np.arange(own) < number[:, :, None]) * np.int32(again.farther)
    listed = np.empty((len(number), lines, own), dtype=np.int32)
    _draw_out(where.reshape(*number.shape, own), farther, again, listed)
    return listed


def _draw_out(short: np.ndarray, farther: np.ndarray, again: _Again, long: np.ndarray) -> None:
    """Write the lines `[layouts, lines, ...]` of a short text where they belong in the long one."""
    begin, end, times = again.begin, again.end, again.times
    stop = end + times * (end - begin)
    long[:, :begin] = short[:, :begin]
    strips = long[:, begin:stop].reshape(len(long), times + 1, end - begin, *long.shape[2:])
    turns = np.arange(times + 1, dtype=np.int32).reshape(-1, *[1] * (short.ndim - 1))
    np.multiply(farther[:, None, begin:end], turns, out=strips)
    strips += short[:, None, begin:end]
    long[:, stop:] = short[:, end:] + farther[:, end:] * np.int32(times)
