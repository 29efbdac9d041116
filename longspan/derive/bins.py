"""Bins: how many pairs of a pattern fall into each cell of a coarse grid, exactly and without a mask.

Every rectangle of the pattern has a cumulative count, the pairs before a query place and before a key place. It is
read where the edges of the grid cut the rectangle, and differences between neighbouring edges are what a cell holds.
"""

from __future__ import annotations

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


def _binned(region: Region, query_edges: np.ndarray, key_edges: np.ndarray) -> np.ndarray:
    """Return the pairs of a region, and of those that equal it, between neighbouring edges."""
    found = cheapest(region.term, region.queries, region.keys)
    tile = Tile(region.term, found)
    heights, widths = (np.tile(extent, region.times) for extent in found.extents())
    again = np.arange(region.times)[:, None]
    tops, lefts = (
        (first + again * advance + start).ravel()
        for first, advance, start in zip(
            (region.query, region.key), region.advance, _starts(found, slice(None)), strict=True
        )
    )
    rows = _before(tops, found.query_side.step, heights, query_edges)
    columns = _before(lefts, found.key_side.step, widths, key_edges)
    kind = np.tile(found.kind, region.times)
    # Products of whole numbers are exact in float64 here, and far faster than in int64.
    full = kind == FULL
    total = (rows[full].T.astype(np.float64) @ columns[full].astype(np.float64)).astype(np.int64)
    for some in _few(np.flatnonzero(kind == TRIANGLE)):
        a, b = rows[some, :, None], columns[some, None, :]
        across = np.minimum(a, b)
        total += (a * across - across * (across - 1) // 2).sum(axis=0)
    pairs = _differences(total)
    partial = np.flatnonzero(found.kind == PARTIAL)
    looks, sample = _looks(tile, partial)
    looks = np.tile(looks, region.times)
    partials = np.flatnonzero(kind == PARTIAL)
    order = np.argsort(looks, kind="stable")
    for some in _few(order):
        first = looks[some[0]]
        tables = _tables(tile, partial[sample[first : looks[some[-1]] + 1]])
        row, a = _nearby(rows[partials[some]])
        column, b = _nearby(columns[partials[some]])
        inside = _differences(tables[(looks[some] - first)[:, None, None], a[:, :, None], b[:, None, :]])
        np.add.at(pairs, (row[:, :, None], column[:, None, :]), inside)
    return pairs


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
