"""Lists: the blocks of a pattern as FlexAttention wants them, row by row and column by column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longspan.derive.blocks import FULL, TRIANGLE, Blocks

# What a list of nothing is wide: sizes of 1 are compiled apart from all others.
_LEAST = 2


@dataclass(frozen=True, eq=False)
class Lists:
    """Numbers of blocks, int32 `[layouts, heads, rows or columns]`, and which ones they are, with one more axis.

    `keys` and `full_keys` list the partial and the full blocks of keys for each block of queries, in ascending order;
    `queries` and `full_queries` list the blocks of queries for each block of keys. What stands behind the number of
    blocks in a list is 0 and means nothing.
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


def lists(heads: list[Blocks], classes: tuple[np.ndarray, np.ndarray], device: torch.device) -> Lists:
    """Return the lists of the blocks of some heads, which are cut alike.

    Args:
        heads: the blocks of each head.
        classes: the pairs of residue classes that hold any, of queries and of keys; each is one layout.
        device: where the lists are wanted.
    """
    query_side, key_side, size = heads[0].query_side, heads[0].key_side, heads[0].size
    grid = tuple(-(-int(side.lengths.max(initial=0)) // size) for side in (query_side, key_side))
    partial, full = ([squares(found, classes, wanted) for found in heads] for wanted in (False, True))
    shape = (len(classes[0]), *grid)

    def put(squares: list[np.ndarray], axis: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.as_tensor(part, device=device) for part in _listed(squares, shape, axis))

    return Lists(put(partial, 1), put(full, 1), put(partial, 2), put(full, 2))


def squares(found: Blocks, classes: tuple[np.ndarray, np.ndarray], full: bool) -> np.ndarray:
    """Return layout, row and column of every block that is full, or of every one that is not, int64 `[3, blocks]`."""
    size = found.size
    rows, columns = (-(-places // size) for places in found.extents())
    owner = np.repeat(np.arange(len(found)), rows * columns)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(rows * columns) - rows * columns, rows * columns)
    down, right = place // columns[owner], place % columns[owner]
    row, column = found.row[owner] + down, found.column[owner] + right
    triangle = found.kind[owner] == TRIANGLE
    is_full = (found.kind[owner] == FULL) | (triangle & (right < down))
    layout = _layouts(found, classes)[owner]
    # Classes of one side differ in length by one place, and the shorter ones are padded.
    key_lengths = found.key_side.lengths
    short = key_lengths[found.key_class[owner]] < key_lengths.max(initial=0)
    is_full &= ~(short & ((column + 1) * size > key_lengths[found.key_class[owner]]))
    kept = (is_full == full) & ~(triangle & (right > down))
    return np.stack([layout[kept], row[kept], column[kept]])


def _layouts(found: Blocks, classes: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return for each rectangle the number of its pair of classes."""
    number = np.zeros((found.query_side.step, found.key_side.step), dtype=np.int64)
    number[classes] = np.arange(len(classes[0]))
    return number[found.query_class, found.key_class]


def _listed(heads: list[np.ndarray], shape: tuple[int, int, int], axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many squares lie in each row (axis 1) or column (axis 2) of each layout, and where in it."""
    along, across = shape[axis], 3 - axis
    lines = shape[0] * along
    counts, wheres = [], []
    for head, squares in enumerate(heads):
        line = squares[0] * along + squares[axis] + head * lines
        order = np.lexsort((squares[across], line))
        counts.append(line[order])
        wheres.append(squares[across][order])
    line, where = np.concatenate(counts), np.concatenate(wheres)
    number = np.bincount(line, minlength=len(heads) * lines)
    listed = np.zeros((len(number), max(_LEAST, int(number.max(initial=0)))), dtype=np.int32)
    listed[line, np.arange(len(line)) - (np.cumsum(number) - number)[line]] = where
    by_head = number.astype(np.int32).reshape(len(heads), shape[0], along)
    listed = listed.reshape(*by_head.shape, -1)
    return np.ascontiguousarray(by_head.swapaxes(0, 1)), np.ascontiguousarray(listed.swapaxes(0, 1))
