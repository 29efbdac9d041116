"""Parts: a pattern as a short list of batched calls on strided views.

Runs that look alike and lie at regular distances are one part: a lattice of equal rectangles whose queries and
keys are strided, possibly overlapping views of the tensors, so that no key is copied. Attention over the pattern
is the merge of attention over its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided

from longspan.derive.region import Region, regions
from longspan.derive.terms import terms
from longspan.derive.tiling import SIZE, Tile, cheapest
from longspan.kernel.runs import CAUSAL, MASKED, Runs, runs
from longspan.pattern import Pattern

# How far the next rectangle lies on, outer and inner, for queries and for keys.
Advances = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Lattice:
    """Where the rectangles of a part lie along one tensor axis.

    Place `r` of rectangle `(i, j)` is at index `start + i * outer + j * inner + r * step`.
    """

    start: int
    step: int
    places: int
    outer: int
    inner: int


@dataclass(frozen=True, eq=False)
class Part:
    """A lattice of equal rectangles of pairs, done in one batched call.

    Attributes:
        query, key: where the rectangles lie.
        shape: how many rectangles, outer and inner.
        allowed: the exact mask of every rectangle, bool `[query places, key places]`, or None for no mask.
        causal: the rectangle is the lower triangle of a square.
        fresh: no part before this one touches its queries.
    """

    query: Lattice
    key: Lattice
    shape: tuple[int, int]
    allowed: np.ndarray | None
    causal: bool
    fresh: bool

    @property
    def rectangles(self) -> int:
        return self.shape[0] * self.shape[1]

    @cached_property
    def pairs(self) -> int:
        """Pairs of the pattern in this part, exactly."""
        rows, columns = self.query.places, self.key.places
        if self.allowed is not None:
            each = int(self.allowed.sum())
        else:
            each = rows * (rows + 1) // 2 if self.causal else rows * columns
        return each * self.rectangles

    @property
    def area(self) -> int:
        """Pairs that are computed, masked ones included."""
        rows, columns = self.query.places, self.key.places
        return (rows * (rows + 1) // 2 if self.causal else rows * columns) * self.rectangles

    @property
    def kind(self) -> str:
        return "causal" if self.causal else "plain" if self.allowed is None else "masked"


def parts(pattern: Pattern, queries: range, keys: range, *, size: int = SIZE) -> tuple[Part, ...]:
    """Return the parts of a pattern of one head over a range of queries and a range of keys, in blocks of a size.

    Law: the rectangles of all parts together hold every pair as often as the pattern counts it.
    """
    made: list[Part] = []
    for term in terms(pattern):
        for region in regions(term, queries, keys, size=size):
            tile, joined = _laid_out(region.term, region.queries, region.keys, size)
            for look in range(int(joined.look.max(initial=-1)) + 1):
                alike = np.flatnonzero(joined.look == look)
                query, key = _everywhere(region, joined.query[alike], joined.key[alike])
                for chosen, shape, advances in _lattices(query, key):
                    start = (int(query[chosen[0]]), int(key[chosen[0]]))
                    made.append(_part(tile, joined, alike[0], start, shape, advances))
    return _marked(made, len(queries))


@lru_cache(maxsize=64)
def _laid_out(term: Pattern, queries: range, keys: range, size: int) -> tuple[Tile, Runs]:
    """Return the runs of a region, which heads that differ elsewhere may have in common."""
    tile = Tile(term, cheapest(term, queries, keys, size=size))
    return tile, runs(tile)


def _everywhere(region: Region, query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the starting points of runs in a region and in all that equal it, as indices in the tensors."""
    again = np.arange(region.times)[:, None]
    return (
        (region.query + again * region.advance[0] + query).ravel(),
        (region.key + again * region.advance[1] + key).ravel(),
    )


def _part(
    tile: Tile,
    joined: Runs,
    sample: int,
    start: tuple[int, int],
    shape: tuple[int, int],
    advances: Advances,
) -> Part:
    places = (int(joined.rows[sample]), int(joined.columns[sample]))
    query = Lattice(start[0], tile.blocks.query_side.step, places[0], *advances[0])
    key = Lattice(start[1], tile.blocks.key_side.step, places[1], *advances[1])
    masked = joined.kind[sample] == MASKED
    allowed = np.array(tile.mask(joined.query[sample], joined.key[sample], *places)) if masked else None
    return Part(query, key, shape, allowed, bool(joined.kind[sample] == CAUSAL), fresh=False)


def _marked(made: list[Part], length: int) -> tuple[Part, ...]:
    """Return the parts with those marked whose queries no part before them touches."""
    touched = np.zeros(length, dtype=bool)
    marked = []
    for part in made:
        query = part.query
        rows = as_strided(
            touched[query.start :], (*part.shape, query.places), (query.outer, query.inner, query.step)
        )
        marked.append(replace(part, fresh=not marked or not rows.any()))
        if len(marked) < len(made):
            rows[...] = True
    return tuple(marked)


def _lattices(query: np.ndarray, key: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, int], Advances]]:
    """Cut starting points into lattices: indices of its points, its shape, and the advances of both sides.

    Keys either move with the queries (a band) or stay (a sink), so points are first sorted into the lines of
    whichever of the two holds more of them.
    """
    distance, inverse, moving = np.unique(query - key, return_inverse=True, return_counts=True)
    _, resting_inverse, resting = np.unique(key, return_inverse=True, return_counts=True)
    moves = moving[inverse] >= resting[resting_inverse]
    line = np.where(moves, inverse, len(distance) + resting_inverse)
    for number in np.unique(line):
        points = np.flatnonzero(line == number)
        points = points[np.lexsort((key[points], query[points]))]
        yield from _regular(points, query, key)


def _regular(
    points: np.ndarray, query: np.ndarray, key: np.ndarray
) -> Iterator[tuple[np.ndarray, tuple[int, int], Advances]]:
    """Cut points in order into two-level lattices, one level where that is all there is."""
    while len(points):
        jumps = np.stack([np.diff(query[points]), np.diff(key[points])])
        change = (jumps != jumps[:, :1]).any(axis=0)
        inner = int(change.argmax()) + 1 if change.any() else len(points)
        outer = len(points) // inner
        grid = points[: outer * inner].reshape(outer, inner)
        regular = _regular_rows(query[grid], key[grid])
        grid = grid[:regular]
        advance = [
            (
                int(side[grid[1, 0]] - side[grid[0, 0]]) if regular > 1 else 0,
                int(side[grid[0, 1]] - side[grid[0, 0]]) if inner > 1 else 0,
            )
            for side in (query, key)
        ]
        shape = (regular, inner)
        if regular > inner:
            # The inner level is one call and the outer one is a loop.
            grid, shape = grid.T, (inner, regular)
            advance = [pair[::-1] for pair in advance]
        yield grid.ravel(), shape, (advance[0], advance[1])
        points = points[regular * inner :]


def _regular_rows(query: np.ndarray, key: np.ndarray) -> int:
    """Return how many rows of a table of starting points continue its first row and first step."""
    fits = np.ones(len(query), dtype=bool)
    for side in (query, key):
        fits &= (side - side[:, :1] == side[:1] - side[:1, :1]).all(axis=1)
        if len(side) > 1:
            step = side[1, 0] - side[0, 0]
            fits &= side[:, 0] == side[0, 0] + np.arange(len(side)) * step
    return len(fits) if fits.all() else int(fits.argmin())
