"""Blocks: which rectangles of pairs a pattern fills, found by descent from the whole square.

Every rectangle is read over ranges: proven empty it is dropped, proven full it is kept whole, otherwise it is cut
in four, down to blocks of a given size. The cost follows the blocks that are not empty, never the square.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
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


def _covered(
    side: Side, residue: np.ndarray, block: np.ndarray, span: np.ndarray | int, size: int
) -> np.ndarray:
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
    """One level of squares after the other, from the largest to the smallest.

    A level is the span of its squares and, one column for each of them, an int64 array of query class, key class, row
    and column.
    """

    def __init__(self, pattern: Pattern, query_side: Side, key_side: Side, size: int) -> None:
        self.pattern = pattern
        self.query_side, self.key_side, self.size = query_side, key_side, size
        # Where the formula with `k <= q` taken for true is full, and taken for false is empty, the square is
        # exactly the triangle `k <= q`.
        self.with_causal = _causal_as(Everything(), pattern)
        self.without_causal = _causal_as(Nothing(), pattern)
        self.causal = self.with_causal != pattern

    def run(self) -> Blocks:
        visited = 0
        found, spans, kinds = [np.zeros((4, 0), dtype=np.int64)], [0], [np.zeros(0, dtype=np.int8)]
        span, places = self._top()
        while places.shape[1]:
            kind = self._classify(places, span)
            visited += len(kind)
            kept = kind > PARTIAL if span > 1 else kind > 0
            if kept.any():
                found.append(places[:, kept])
                spans.append(span)
                kinds.append(kind[kept])
            if span == 1:
                break
            span //= 2
            places = self._quarters(places[:, kind == PARTIAL], span)
        query_class, key_class, row, column = np.concatenate(found, axis=1)
        return Blocks(
            self.query_side,
            self.key_side,
            self.size,
            query_class,
            key_class,
            row,
            column,
            np.repeat(np.array(spans), list(map(len, kinds))),
            np.concatenate(kinds),
            visited,
        )

    def _top(self) -> tuple[int, np.ndarray]:
        """Return one square over everything for each pair of residue classes that is not empty."""
        shape = (self.query_side.step, self.key_side.step)
        query_class, key_class = np.indices(shape, dtype=np.int64).reshape(2, -1)
        rows, columns = self.query_side.lengths[query_class], self.key_side.lengths[key_class]
        present = (rows > 0) & (columns > 0)
        longest = -(-int(np.maximum(rows, columns)[present].max(initial=1)) // self.size)
        nowhere = np.zeros_like(query_class)
        return 1 << (longest - 1).bit_length(), np.stack([query_class, key_class, nowhere, nowhere])[
            :, present
        ]

    def _classify(self, places: np.ndarray, span: int) -> np.ndarray:
        query_class, key_class, row, column = places
        rows = _covered(self.query_side, query_class, row, span, self.size)
        columns = _covered(self.key_side, key_class, column, span, self.size)
        q = self.query_side.span(query_class, row * self.size, rows)
        k = self.key_side.span(key_class, column * self.size, columns)
        bracket = self.pattern.count(q, k)
        kind = np.empty(len(row), dtype=np.int8)
        kind[:] = np.where(bracket.empty, 0, np.where(bracket.full, FULL, PARTIAL))
        if not self.causal:
            return kind
        # Places count alike on both sides while the classes begin less than a step apart.
        apart = q.low - k.low
        # Keys past the last query are in no triangle and are left out of it.
        on_diagonal = (kind == PARTIAL) & (q.step == k.step) & (rows <= columns)
        on_diagonal &= (apart >= 0) & (apart < np.maximum(q.step, 1))
        if on_diagonal.any():
            q, k = (
                Progression(side.low[on_diagonal], side.high[on_diagonal], side.step[on_diagonal])
                for side in (q, k)
            )
            exact = self.with_causal.count(q, k).full & self.without_causal.count(q, k).empty
            kind[on_diagonal] = np.where(exact, TRIANGLE, PARTIAL)
        return kind

    def _quarters(self, places: np.ndarray, half: int) -> np.ndarray:
        number = places.shape[1]
        places = np.repeat(places, 4, axis=1)
        places[2] += np.tile([0, 0, half, half], number)
        places[3] += np.tile([0, half, 0, half], number)
        query_class, key_class, row, column = places
        inside = (row * self.size < self.query_side.lengths[query_class]) & (
            column * self.size < self.key_side.lengths[key_class]
        )
        return places[:, inside]


def _causal_as(fact: Pattern, pattern: Pattern) -> Pattern:
    """Return the expression with `Causal()` replaced wherever it says `k <= q`, so not under a transposition."""
    if isinstance(pattern, Causal):
        return fact
    if isinstance(pattern, Transpose):
        return pattern
    return pattern.rebuilt(tuple(_causal_as(fact, part) for part in pattern.operands))
