"""Blocks: which rectangles of pairs a pattern fills, found by descent from the whole square.

Every rectangle is read over ranges: proven empty it is dropped, proven full it is kept whole, otherwise it is cut
in four, down to blocks of a given size. The cost follows the blocks that are not empty, never the square.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longspan.derive.extent import extent
from longspan.errors import ShapeError, message
from longspan.pattern import Causal, Everything, Nothing, Pattern, Progression, Transpose

PARTIAL, FULL, TRIANGLE = 1, 2, 3


@dataclass(frozen=True)
class Side:
    """The positions of one side, cut into residue classes of a step, each cut into blocks.

    Class `c` holds the positions `start + (c + step * i) * stride` for `i` from 0 to `lengths[c] - 1`, where
    `start` and `stride` are those of the range.
    """

    positions: range
    step: int

    @property
    def lengths(self) -> np.ndarray:
        """Positions in each class, int64 `[step]`."""
        classes = np.arange(self.step)
        return np.maximum(0, -(-(len(self.positions) - classes) // self.step))

    def span(self, residue: np.ndarray, first: np.ndarray, count: np.ndarray) -> Progression:
        """Return the positions of `count` places of a class from place `first` on, as progressions."""
        stride = self.positions.step * self.step
        low = self.positions.start + residue * self.positions.step + first * stride
        return Progression(low, low + (count - 1) * stride, np.where(count > 1, stride, 0))


@dataclass(frozen=True)
class Blocks:
    """The rectangles of a pattern that are not empty, disjoint and complete.

    A rectangle covers `span` by `span` blocks of `size` by `size` places, cut off at the end of the text; only
    full ones and triangles span more than one block. A triangle is square and holds exactly the pairs with
    `k <= q`, which are those whose place on the key side is not after their place on the query side.

    Attributes:
        query_side, key_side: the positions and their residue classes.
        size: places in a block.
        query_class, key_class, row, column, span: int64 arrays, one entry per rectangle, in blocks.
        kind: int8 array of `PARTIAL`, `FULL` or `TRIANGLE`.
        visited: how many rectangles the descent looked at.
    """

    query_side: Side
    key_side: Side
    size: int
    query_class: np.ndarray
    key_class: np.ndarray
    row: np.ndarray
    column: np.ndarray
    span: np.ndarray
    kind: np.ndarray
    visited: int

    def __len__(self) -> int:
        return len(self.kind)

    def extents(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the places each rectangle covers on the query side and on the key side."""
        rows = _covered(self.query_side, self.query_class, self.row, self.span, self.size)
        columns = _covered(self.key_side, self.key_class, self.column, self.span, self.size)
        return rows, np.where(self.kind == TRIANGLE, rows, columns)

    @property
    def area(self) -> int:
        """Pairs covered by the rectangles, empty corners of partial blocks included."""
        rows, columns = self.extents()
        return int((np.where(self.kind == TRIANGLE, rows + 1, 2 * rows) * columns).sum()) // 2


def _covered(side: Side, residue: np.ndarray, block: np.ndarray, span: np.ndarray, size: int) -> np.ndarray:
    return np.minimum(span * size, side.lengths[residue] - block * size)


def blocks(
    pattern: Pattern,
    *,
    length: int | None = None,
    queries: range | None = None,
    keys: range | None = None,
    size: int = 128,
    steps: tuple[int, int] = (1, 1),
) -> Blocks:
    """Return the rectangles of pairs that a pattern reads.

    Law: no pair outside the rectangles is read; every pair of a full one is. The answer is safe: a block may be
    called partial that is full or empty, never the other way round.

    Args:
        pattern: the pattern of one head.
        length: number of tokens, short for both ranges.
        queries, keys: absolute positions.
        size: places on a side of the smallest block.
        steps: cut the positions into residue classes of these steps first, queries and keys; a dilated pattern
            that is partial everywhere is full again inside its classes.

    Returns:
        Blocks, in no particular order.

    Raises:
        ShapeError: a range that is missing or negative, a size or step below 1.

    Example:
        >>> from longspan.pattern import Window
        >>> found = blocks(Causal() & Window(256), length=1_048_576)
        >>> len(found), found.visited < 20 * len(found)
        (16381, True)
    """
    queries, keys = extent(length, queries, keys)
    if size < 1 or min(steps) < 1:
        raise ShapeError(
            message(
                "A block and a step hold at least one position.",
                {"asked": f"size={size}, steps={steps}"},
                fix="size=128, steps=(1, 1)",
            )
        )
    descent = _Descent(pattern, Side(queries, steps[0]), Side(keys, steps[1]), size)
    return descent.run()


class _Descent:
    """One level of squares after the other, from the largest to the smallest."""

    def __init__(self, pattern: Pattern, query_side: Side, key_side: Side, size: int) -> None:
        self.pattern = pattern
        self.query_side, self.key_side, self.size = query_side, key_side, size
        # Where the formula with `k <= q` taken for true is full, and taken for false is empty, the square is
        # exactly the triangle `k <= q`.
        self.with_causal = _causal_as(Everything(), pattern)
        self.without_causal = _causal_as(Nothing(), pattern)
        self.found: list[tuple[np.ndarray, ...]] = []

    def run(self) -> Blocks:
        visited = 0
        level = self._top()
        while level:
            kind = self._classify(*level)
            visited += len(kind)
            leaf = level[-1] == 1
            keep = (kind == FULL) | (kind == TRIANGLE) | ((kind == PARTIAL) & leaf)
            if keep.any():
                self.found.append((*(part[keep] for part in level), kind[keep]))
            level = self._quarters(tuple(part[(kind == PARTIAL) & ~leaf] for part in level))
        if self.found:
            *places, kind = (np.concatenate(parts) for parts in zip(*self.found, strict=True))
        else:
            *places, kind = (np.zeros(0, dtype=np.int64) for _ in range(6))
        query_class, key_class, row, column, span = places
        return Blocks(
            self.query_side,
            self.key_side,
            self.size,
            query_class,
            key_class,
            row,
            column,
            span,
            kind,
            visited,
        )

    def _top(self) -> tuple[np.ndarray, ...] | None:
        """Return one square over everything for each pair of residue classes that is not empty."""
        classes = np.meshgrid(np.arange(self.query_side.step), np.arange(self.key_side.step), indexing="ij")
        query_class, key_class = (axis.ravel().astype(np.int64) for axis in classes)
        rows, columns = self.query_side.lengths[query_class], self.key_side.lengths[key_class]
        present = (rows > 0) & (columns > 0)
        query_class, key_class = query_class[present], key_class[present]
        if not len(query_class):
            return None
        longest = -(-int(max(rows.max(), columns.max())) // self.size)
        span = np.full(len(query_class), 1 << (longest - 1).bit_length(), dtype=np.int64)
        zeros = np.zeros(len(query_class), dtype=np.int64)
        return (query_class, key_class, zeros, zeros, span)

    def _classify(
        self,
        query_class: np.ndarray,
        key_class: np.ndarray,
        row: np.ndarray,
        column: np.ndarray,
        span: np.ndarray,
    ) -> np.ndarray:
        rows = _covered(self.query_side, query_class, row, span, self.size)
        columns = _covered(self.key_side, key_class, column, span, self.size)
        q = self.query_side.span(query_class, row * self.size, rows)
        k = self.key_side.span(key_class, column * self.size, columns)
        bracket = self.pattern.count(q, k)
        empty = np.broadcast_to(bracket.empty, row.shape)
        full = np.broadcast_to(bracket.full, row.shape)
        kind = np.where(empty, 0, np.where(full, FULL, PARTIAL)).astype(np.int8)
        # Places count alike on both sides while the classes begin less than a step apart.
        apart = q.low - k.low
        # Keys past the last query are in no triangle and are left out of it.
        on_diagonal = (kind == PARTIAL) & (q.step == k.step) & (rows <= columns)
        on_diagonal &= (apart >= 0) & (apart < np.maximum(q.step, 1))
        if on_diagonal.any() and self.with_causal != self.pattern:
            q, k = (
                Progression(side.low[on_diagonal], side.high[on_diagonal], side.step[on_diagonal])
                for side in (q, k)
            )
            exact = self.with_causal.count(q, k).full & self.without_causal.count(q, k).empty
            kind[on_diagonal] = np.where(exact, TRIANGLE, PARTIAL)
        return kind

    def _quarters(self, level: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...] | None:
        query_class, key_class, row, column, span = (np.repeat(part, 4) for part in level)
        if not len(row):
            return None
        half = span // 2
        quarter = np.tile(np.arange(4), len(row) // 4)
        row, column = row + half * (quarter // 2), column + half * (quarter % 2)
        inside = (row * self.size < self.query_side.lengths[query_class]) & (
            column * self.size < self.key_side.lengths[key_class]
        )
        return tuple(part[inside] for part in (query_class, key_class, row, column, half))


def _causal_as(fact: Pattern, pattern: Pattern) -> Pattern:
    """Return the expression with `Causal()` replaced wherever it says `k <= q`, so not under a transposition."""
    if isinstance(pattern, Causal):
        return fact
    if isinstance(pattern, Transpose):
        return pattern
    return pattern.rebuilt(tuple(_causal_as(fact, part) for part in pattern.operands))
