"""Bins: how many pairs of a pattern fall into each cell of a coarse grid, or to each query, without a mask.

Every rectangle of the pattern has a cumulative count, the pairs before a query place and before a key place. It is
read where the edges of the grid cut the rectangle, and differences between neighbouring edges are what a cell holds.
For single queries it is enough to write down where a rectangle begins and ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from longspan.derive.blocks import FULL, PARTIAL, TRIANGLE, Blocks
from longspan.derive.extent import extent
from longspan.derive.region import Region, regions
from longspan.derive.terms import terms
from longspan.derive.tiling import SIZE, Tile, cheapest
from longspan.errors import ShapeError, message
from longspan.pattern import Pattern

# Rectangles that are read at a time.
_ABREAST = 256


def edges(positions: range, cells: int) -> np.ndarray:
    """Return where `cells` nearly equal bins of a range begin and end, as indices, int64 `[cells + 1]`."""
    return np.arange(cells + 1, dtype=np.int64) * len(positions) // cells


def bins(
    pattern: Pattern,
    *,
    length: int | None = None,
    queries: range | None = None,
    keys: range | None = None,
    cells: tuple[int, int] = (64, 64),
) -> np.ndarray:
    """Return how many pairs of the pattern of one head lie in each cell of a grid, counted as often as read.

    Law: the cells are exact and add up to the pairs of the pattern.

    Args:
        pattern: an expression without heads or names, as `at_head` returns it.
        length: number of tokens, short for both ranges.
        queries, keys: absolute positions.
        cells: how many nearly equal bins the queries and the keys are cut into.

    Returns:
        int64 array `[query cells, key cells]`.

    Raises:
        ShapeError: a range that is missing or negative, a number of cells below 1.

    Example:
        >>> from longspan.pattern import Causal, Window
        >>> bins(Causal() & Window(1024), length=4096, cells=(4, 4)).tolist()[1]
        [523776, 524800, 0, 0]
    """
    queries, keys = extent(length, queries, keys)
    if min(cells) < 1:
        raise ShapeError(
            message(
                "A grid has at least one cell on each side.",
                {"asked": f"cells={cells}"},
                fix="cells=(64, 64)",
            )
        )
    sides = edges(queries, cells[0]), edges(keys, cells[1])
    return sum(
        (
            _binned(region, *sides)
            for term in terms(pattern)
            for region in regions(term, queries, keys, size=SIZE)
        ),
        start=np.zeros(cells, dtype=np.int64),
    )


def degrees(
    pattern: Pattern,
    *,
    length: int | None = None,
    queries: range | None = None,
    keys: range | None = None,
) -> np.ndarray:
    """Return how many pairs of the pattern of one head each query reads, counted as often as read.

    Law: exact, `degrees(...)[i]` is the sum of row `i` of the mask. What it takes grows with the queries and with the
    blocks of the pattern, not with the pairs.

    Args:
        pattern: an expression without heads or names, as `at_head` returns it.
        length: number of tokens, short for both ranges.
        queries, keys: absolute positions.

    Returns:
        int64 array `[queries]`.

    Raises:
        ShapeError: a range that is missing or negative.

    Example:
        >>> from longspan.pattern import Causal, Window
        >>> degrees(Causal() & Window(3), length=6).tolist()
        [1, 2, 3, 3, 3, 3]
    """
    queries, keys = extent(length, queries, keys)
    return sum(
        (
            _degrees(region, len(queries))
            for term in terms(pattern)
            for region in regions(term, queries, keys, size=SIZE)
        ),
        start=np.zeros(len(queries), dtype=np.int64),
    )


@dataclass(frozen=True)
class _Rectangles:
    """The rectangles of a region and of those that equal it: where each begins, as indices, its places and kind."""

    tile: Tile
    times: int
    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    kind: np.ndarray

    @classmethod
    def of(cls, region: Region) -> _Rectangles:
        found = cheapest(region.term, region.queries, region.keys)
        again = np.arange(region.times)[:, None]
        top, left = (
            (first + again * advance + start).ravel()
            for first, advance, start in zip(
                (region.query, region.key), region.advance, _starts(found, slice(None)), strict=True
            )
        )
        height, width, kind = (np.tile(fact, region.times) for fact in (*found.extents(), found.kind))
        return cls(Tile(region.term, found), region.times, top, left, height, width, kind)

    def partial(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield numbers of some partial rectangles, cumulative counts of blocks, and which are those of each."""
        once = np.flatnonzero(self.tile.blocks.kind == PARTIAL)
        looks, sample = _looks(self.tile, once)
        looks = np.tile(looks, self.times)
        numbers = np.flatnonzero(self.kind == PARTIAL)
        for some in _few(np.argsort(looks, kind="stable")):
            first = looks[some[0]]
            yield (
                numbers[some],
                _tables(self.tile, once[sample[first : looks[some[-1]] + 1]]),
                looks[some] - first,
            )


def _binned(region: Region, query_edges: np.ndarray, key_edges: np.ndarray) -> np.ndarray:
    """Return the pairs of a region, and of those that equal it, between neighbouring edges."""
    found = _Rectangles.of(region)
    rows = _before(found.top, found.tile.blocks.query_side.step, found.height, query_edges)
    columns = _before(found.left, found.tile.blocks.key_side.step, found.width, key_edges)
    # Products of whole numbers are exact in float64 here, and far faster than in int64.
    full = found.kind == FULL
    total = (rows[full].T.astype(np.float64) @ columns[full].astype(np.float64)).astype(np.int64)
    for some in _few(np.flatnonzero(found.kind == TRIANGLE)):
        a, b = rows[some, :, None], columns[some, None, :]
        across = np.minimum(a, b)
        total += (a * across - across * (across - 1) // 2).sum(axis=0)
    pairs = _differences(total)
    for some, tables, look in found.partial():
        row, a = _nearby(rows[some])
        column, b = _nearby(columns[some])
        inside = _differences(tables[look[:, None, None], a[:, :, None], b[:, None, :]])
        np.add.at(pairs, (row[:, :, None], column[:, None, :]), inside)
    return pairs


def _degrees(region: Region, queries: int) -> np.ndarray:
    """Return the pairs of a region, and of those that equal it, of each of so many queries."""
    found = _Rectangles.of(region)
    step = found.tile.blocks.query_side.step
    # A rectangle takes queries a step apart, so it ends within its residue class, which may be past the last query.
    end = found.top + step * found.height
    classes = np.zeros((2, -(-queries // step) + 1, step), dtype=np.int64)
    change, rise = classes.reshape(2, -1)
    full, triangle = found.kind == FULL, found.kind == TRIANGLE
    np.add.at(change, found.top[full], found.width[full])
    np.subtract.at(change, end[full], found.width[full])
    # The first query of a triangle reads one key, and each further one reads one more.
    np.add.at(rise, found.top[triangle], 1)
    np.subtract.at(rise, end[triangle], 1)
    np.subtract.at(change, end[triangle], found.height[triangle])
    for some, tables, look in found.partial():
        within = np.diff(np.take_along_axis(tables[look], found.width[some, None, None], axis=2)[:, :, 0])
        place = np.arange(within.shape[1])
        inside = place < found.height[some, None]
        query = found.top[some, None] + step * place
        np.add.at(change, query[inside], within[inside])
        np.subtract.at(change, (query + step)[inside], within[inside])
    classes[0] += classes[1].cumsum(axis=0)
    return classes[0].cumsum(axis=0).ravel()[:queries]


def _differences(cumulative: np.ndarray) -> np.ndarray:
    return np.diff(np.diff(cumulative, axis=-2), axis=-1)


def _nearby(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep of `places`, `[blocks, edges]`, the edges around each block: the bins between them, and the places."""
    # A block begins after the last edge that has no place before it and ends at the first that has them all.
    begin = (places == 0).sum(axis=1) - 1
    spanned = int(((places < places[:, -1:]).sum(axis=1) - begin).max())
    near = np.minimum(begin[:, None] + np.arange(spanned + 1), places.shape[1] - 1)
    # Bins past the last edge are empty, so it does not matter which bin they are counted to.
    return np.minimum(near[:, :-1], places.shape[1] - 2), np.take_along_axis(places, near, axis=1)


def _few(items: np.ndarray) -> list[np.ndarray]:
    return [items[start : start + _ABREAST] for start in range(0, len(items), _ABREAST)]


def _before(begin: np.ndarray, step: int, count: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return how many of `count` places, a step apart, lie before each index in `at`, `[rectangles, edges]`."""
    return np.clip(-((begin[:, None] - at) // step), 0, count[:, None])


def _starts(found: Blocks, chosen: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the first query and of the first key of some blocks."""
    q = found.query_class[chosen] + found.row[chosen] * found.size * found.query_side.step
    k = found.key_class[chosen] + found.column[chosen] * found.size * found.key_side.step
    return q, k


def _looks(tile: Tile, partial: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the partial blocks by what they hold: the number of each, and one block for every number."""
    period = tile.term.period
    if period is None or not len(partial):
        return np.arange(len(partial)), np.arange(len(partial))
    q, k = (
        side.positions.start + index * side.positions.step
        for side, index in zip(
            (tile.blocks.query_side, tile.blocks.key_side), _starts(tile.blocks, partial), strict=True
        )
    )
    # A shift by the period changes no pair, so distance and phase decide what a block holds.
    facts = np.stack([q - k, q % period])
    _, sample, looks = np.unique(facts, axis=1, return_index=True, return_inverse=True)
    return looks, sample


def _tables(tile: Tile, chosen: np.ndarray) -> np.ndarray:
    """Return the cumulative counts of some partial blocks, `[blocks, size + 1, size + 1]`."""
    size = tile.blocks.size
    tables = np.zeros((len(chosen), size + 1, size + 1), dtype=np.int64)
    query, key = _starts(tile.blocks, chosen)
    for table, q, k in zip(tables, query, key, strict=True):
        table[1:, 1:] = tile.mask(q, k, size, size).cumsum(axis=0).cumsum(axis=1)
    return tables
