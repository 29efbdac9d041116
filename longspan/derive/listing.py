"""Listings: blocks of keys that a table names for each block of queries, taken from the table and not searched for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from longspan.pattern import Everything, Intersection, Pattern, Progression, simplify
from longspan.pattern.choice import Blockwise

FULL, TRIANGLE, PARTIAL = 1, 2, 3
# Neighbouring distances that are looked at in one.
_ABREAST = 256


@dataclass(frozen=True)
class Listing:
    """Squares of pairs that look alike, at most one for each block of queries.

    Attributes:
        size: places on a side of a square; the last one of a side may be cut off by the end of the text.
        row, column: which blocks, int64 arrays, counted from position 0.
        kind: `FULL`, `TRIANGLE` (the pairs with `k <= q`) or `PARTIAL`.
        mask: the pairs of a partial square, bool `[size, size]`.
    """

    size: int
    row: np.ndarray
    column: np.ndarray
    kind: int
    mask: np.ndarray | None


def listed(term: Pattern) -> tuple[Blockwise, Pattern] | None:
    """Return a table that a relation reads blocks from, and what else it asks of them; None where there is no such."""
    parts = term.parts if isinstance(term, Intersection) else (term,)
    tables = [part for part in parts if isinstance(part, Blockwise)]
    if len(tables) != 1:
        return None
    rest = _beside(tuple(part for part in parts if part is not tables[0]), tables[0].size)
    return None if rest is None else (tables[0], rest)


@lru_cache(maxsize=32)
def _beside(parts: tuple[Pattern, ...], size: int) -> Pattern | None:
    """Return what is asked of blocks beside a table, or None where not all blocks of a diagonal are asked the same."""
    if not parts:
        return Everything()
    period = Intersection(parts).period
    return None if period is None or size % period else simplify(Intersection(parts))


def listings(term: Pattern, queries: range, keys: range) -> Iterator[Listing]:
    """Yield the squares of a relation that reads blocks from a table.

    Law: squares are disjoint and hold every pair of the relation.

    Args:
        term: a relation with a table, for which `listed` gives one.
        queries, keys: positions; they begin where blocks do.
    """
    found = listed(term)
    assert found is not None
    table, rest = found
    size = table.size
    rows = np.arange(queries.start // size, -(-queries.stop // size))
    begin, end = keys.start // size, -(-keys.stop // size)
    # Distances in blocks decide what the rest of the relation leaves of a square.
    lowest, highest = int(rows[0]) - end + 1, int(rows[-1]) - begin
    kinds = _kinds(rest, size, lowest, highest)
    for columns in table.columns(rows):
        row, column = _chosen((columns >= begin) & (columns < end), rows, columns)
        kind = kinds[row - column - lowest]
        yield from _of_kind(size, row, column, kind == FULL, FULL, None)
        for distance in np.unique((row - column)[kind > FULL], return_counts=True)[0].tolist():
            same = row - column == distance
            yield from _of_kind(size, row, column, same, *_square(rest, size, distance))


def _of_kind(
    size: int, row: np.ndarray, column: np.ndarray, chosen: np.ndarray, kind: int, mask: np.ndarray | None
) -> Iterator[Listing]:
    if chosen.any():
        row, column = _chosen(chosen, row, column)
        yield Listing(size, row, column, kind, mask)


def _chosen(chosen: np.ndarray, *sides: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return what is chosen of arrays, themselves where it is all."""
    return sides if chosen.all() else tuple(side[chosen] for side in sides)


@lru_cache(maxsize=32)
def _kinds(rest: Pattern, size: int, lowest: int, highest: int) -> np.ndarray:
    """Return what squares hold whose rows lie from `lowest` to `highest` blocks after their columns."""
    begin = np.arange(lowest, highest + 1, _ABREAST)
    found = np.repeat(_over(rest, size, begin, begin + _ABREAST - 1), _ABREAST)[: highest - lowest + 1]
    # Few distances lie where not all of their neighbours are alike.
    partial = np.flatnonzero(found == PARTIAL)
    found[partial] = _over(rest, size, partial + lowest, partial + lowest)
    return found


def _over(rest: Pattern, size: int, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return what squares hold, all of those in some ranges of distances."""
    column = np.maximum(0, -first)
    count = rest.count(_blocks(column + first, column + last, size), _blocks(column, column, size))
    full, empty = (np.broadcast_to(fact, first.shape) for fact in (count.full, count.empty))
    return np.where(full, FULL, np.where(empty, 0, PARTIAL))


def _blocks(first: np.ndarray, last: np.ndarray, size: int) -> Progression:
    low, high = first * size, (last + 1) * size - 1
    return Progression(low, high, np.where(high > low, 1, 0))


@lru_cache(maxsize=32)
def _square(rest: Pattern, size: int, distance: int) -> tuple[int, np.ndarray | None]:
    """Return what a square holds that lies some blocks from the diagonal."""
    q = (max(distance, 0) * size + np.arange(size))[:, None]
    k = (max(-distance, 0) * size + np.arange(size))[None]
    mask = np.array(np.broadcast_to(rest.contains(q, k), (size, size)))
    if mask.all():
        return FULL, None
    return (TRIANGLE, None) if (mask == np.tri(size, dtype=bool)).all() else (PARTIAL, mask)
