"""Parts: a pattern as a short list of batched calls on strided views.

Runs that look alike and lie at regular distances are one part: a lattice of equal rectangles whose queries and
keys are strided, possibly overlapping views of the tensors, so that no key is copied. Attention over the pattern
is the merge of attention over its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import gcd

import numpy as np

from longspan.derive.diagonal import staircases
from longspan.derive.region import Region, regions
from longspan.derive.terms import terms
from longspan.derive.tiling import SIZE, Tile, cheapest
from longspan.kernel.lattice.runs import CAUSAL, Runs, runs
from longspan.kernel.lattice.scatter import Squares, scattered
from longspan.kernel.lattice.staircase import triangles
from longspan.pattern import Pattern

# How far the next rectangle lies on, outer and inner, for queries and for keys.
Advances = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Lattice:
    """Where the rectangles of a part lie along one tensor axis.

    Place `r` of rectangle `(i, j)` is at index `start + i * outer + j * inner + r * step`, or, on the side of the keys,
    at `start + at[j] + r * step` where rectangles lie at no regular distances; then there is one of them for each `j`.
    """

    start: int
    step: int
    places: int
    outer: int
    inner: int
    at: np.ndarray | None = field(default=None, compare=False)

    def begins(self, shape: tuple[int, int]) -> np.ndarray:
        """Return where the rectangles of a part of some shape begin, int64 `[outer, inner]`."""
        inner = np.arange(shape[1]) * self.inner if self.at is None else self.at
        return self.start + np.arange(shape[0])[:, None] * self.outer + inner


# The queries of a part: where its rectangles lie, and how many there are, outer and inner.
_Side = tuple[Lattice, tuple[int, int]]


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
    return _marked([part for term in terms(pattern) for part in _of_term(term, queries, keys, size)])


@lru_cache(maxsize=64)
def _of_term(term: Pattern, queries: range, keys: range, size: int) -> tuple[Part, ...]:
    """Return the parts of a term, which heads that differ elsewhere may have in common."""
    found = regions(term, queries, keys, size=size)
    return tuple(part for region in found for part in _of_region(region, size))


@lru_cache(maxsize=256)
def _of_region(region: Region, size: int) -> tuple[Part, ...]:
    """Return the parts of a region; terms that differ in another one have it in common."""
    squares = scattered(region.term, region.queries, region.keys)
    if squares is not None:
        return tuple(_scattered_part(region, found) for found in squares)
    made = []
    joined = _laid_out(region.term, region.queries, region.keys, size)
    for look in range(len(joined.masks)):
        same = np.flatnonzero(joined.look == look)
        query, key = _everywhere(region, joined.query[same], joined.key[same])
        for chosen, shape, advances in _lattices(query, key):
            start = (int(query[chosen[0]]), int(key[chosen[0]]))
            made.append(_part(joined, same[0], start, shape, advances))
    return tuple(made)


@lru_cache(maxsize=64)
def _laid_out(term: Pattern, queries: range, keys: range, size: int) -> Runs:
    """Return the runs of a region; those that lie elsewhere may look the same."""
    found = staircases(term, queries, keys)
    # Where all of a text in order reads some keys, blocks join them with the triangle beside them.
    if found is not None and (found.step > 1 or len(queries) == 1 or (found.first >= 0).all()):
        return triangles(found, len(queries), len(keys))
    return runs(Tile(term, cheapest(term, queries, keys, size=size)))


def _everywhere(region: Region, query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the starting points of runs in a region and in all that equal it, as indices in the tensors."""
    again = np.arange(region.times)[:, None]
    return (
        (region.query + again * region.advance[0] + query).ravel(),
        (region.key + again * region.advance[1] + key).ravel(),
    )


def _part(
    joined: Runs, sample: int, start: tuple[int, int], shape: tuple[int, int], advances: Advances
) -> Part:
    places = (int(joined.rows[sample]), int(joined.columns[sample]))
    query, key = (
        Lattice(*side) for side in zip(start, joined.steps, places, *zip(*advances, strict=True), strict=True)
    )
    causal = bool(joined.kind[sample] == CAUSAL)
    return Part(query, key, shape, joined.masks[joined.look[sample]], causal, fresh=False)


def _scattered_part(region: Region, found: Squares) -> Part:
    query = Lattice(region.query + found.query, 1, found.rows, 0, found.advance)
    key = Lattice(region.key, 1, found.columns, 0, 0, at=found.key)
    return Part(query, key, (1, len(found.key)), found.allowed, found.causal, fresh=False)


def _marked(made: list[Part]) -> tuple[Part, ...]:
    """Return the parts with those marked whose queries surely no part before them touches."""
    fresh = _fresh(tuple((part.query, part.shape) for part in made))
    return tuple(replace(part, fresh=alone) for part, alone in zip(made, fresh, strict=True))


@lru_cache(maxsize=64)
def _fresh(sides: tuple[_Side, ...]) -> tuple[bool, ...]:
    """Say of the queries of each part whether surely no part before it touches them."""
    strides = np.array([_stride(*side) for side in sides])
    first = np.array([query.start for query, _ in sides])
    last = first + [_reach(*side) for side in sides]
    found = []
    for number, side in enumerate(sides):
        # What advances by multiples of a number never meets what begins between them.
        common = np.maximum(np.gcd(strides[:number], strides[number]), 1)
        meets = (first[:number] <= last[number]) & (first[number] <= last[:number])
        meets &= (first[:number] - first[number]) % common == 0
        found.append(not any(_meet(sides[other], side) for other in np.flatnonzero(meets)))
    return tuple(found)


def _stride(side: Lattice, shape: tuple[int, int]) -> int:
    """Return what all advances of a lattice are multiples of."""
    advances = zip((*shape, side.places), (side.outer, side.inner, side.step), strict=True)
    return gcd(*(advance for number, advance in advances if number > 1))


def _reach(side: Lattice, shape: tuple[int, int]) -> int:
    """Return how far the last place of a lattice lies behind its first one."""
    return side.outer * (shape[0] - 1) + side.inner * (shape[1] - 1) + side.step * (side.places - 1)


def _meet(one: _Side, other: _Side) -> bool:
    """Say whether the queries of two parts whose first and last ones overlap may have any in common."""
    if one[0].step != other[0].step or one[0].step == 1:
        return True
    return not _residues(*one).isdisjoint(_residues(*other))


def _residues(query: Lattice, shape: tuple[int, int]) -> set[int]:
    """Return the residues, modulo the step of its places, at which the queries of a part lie."""
    return set((query.begins(shape) % query.step).ravel().tolist())


def _lattices(query: np.ndarray, key: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, int], Advances]]:
    """Cut starting points into lattices: indices of its points, its shape, and the advances of both sides.

    Keys either move with the queries (a band) or stay (a sink), so points are first sorted into the lines of
    whichever of the two holds more of them.
    """
    down, right = np.diff(query), np.diff(key)
    if (down == down[:1]).all() and (right == right[:1]).all() and down[:1].all():
        advance = int(down[0]) if len(down) else 0, int(right[0]) if len(right) else 0
        yield np.arange(len(query)), (1, len(query)), ((0, advance[0]), (0, advance[1]))
        return
    distance, inverse, moving = np.unique(query - key, return_inverse=True, return_counts=True)
    _, resting_inverse, resting = np.unique(key, return_inverse=True, return_counts=True)
    moves = moving[inverse] >= resting[resting_inverse]
    line = np.where(moves, inverse, len(distance) + resting_inverse)
    for number in np.flatnonzero(np.bincount(line)):
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
