"""Scattered squares: keys that lie wherever a table says, one square for each of some neighbouring blocks of queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from longspan.derive.listing import TRIANGLE, Listing, listed, listings
from longspan.pattern import Pattern

# Parts that a table may come to; one that comes to more has no rows that are alike.
_MOST = 1024


@dataclass(frozen=True)
class Squares:
    """Squares of equal looks whose queries lie side by side.

    Attributes:
        query: index of the first query of the first square; those of the next one begin `advance` later.
        key: index of the first key of every square, int64.
        advance, rows, columns: places.
        allowed: the pairs of every square, bool `[rows, columns]`, or None for all of them.
        causal: the pairs are those of the lower triangle.
    """

    query: int
    key: np.ndarray
    advance: int
    rows: int
    columns: int
    allowed: np.ndarray | None
    causal: bool


def scattered(term: Pattern, queries: range, keys: range) -> list[Squares] | None:
    """Return the squares of a relation that reads blocks from a table, or None where it is something else."""
    table = listed(term)
    if table is None or (queries.step, keys.step) != (1, 1):
        return None
    size = table[0].size
    if queries.start % size or keys.start % size:
        return None
    made: list[Squares] = []
    for listing in listings(term, queries, keys):
        for rows in _stretches(listing.row):
            if len(made) >= _MOST:
                return None
            made.extend(_squares(listing, rows, queries, keys))
    return made


def _stretches(numbers: np.ndarray) -> Iterator[slice]:
    """Yield where numbers follow one another without a gap."""
    ends = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
    for begin, end in zip([0, *ends], [*ends, len(numbers)], strict=True):
        if end > begin:
            yield slice(begin, end)


def _squares(listing: Listing, chosen: slice, queries: range, keys: range) -> Iterator[Squares]:
    """Yield whole squares, and by themselves those that the end of the text cuts off."""
    size = listing.size
    query = listing.row[chosen] * size - queries.start
    key = listing.column[chosen] * size - keys.start
    rows, columns = np.minimum(size, len(queries) - query), np.minimum(size, len(keys) - key)
    whole = (rows == size) & (columns == size)
    alone = [slice(int(one), int(one) + 1) for one in np.flatnonzero(~whole)]
    inside = np.flatnonzero(whole)
    for some in [*(slice(inside[part][0], inside[part][-1] + 1) for part in _stretches(inside)), *alone]:
        shape = (int(rows[some][0]), int(columns[some][0]))
        causal = listing.kind == TRIANGLE and shape[0] == shape[1]
        mask = np.tri(size, dtype=bool) if listing.kind == TRIANGLE and not causal else listing.mask
        allowed = None if mask is None else mask[: shape[0], : shape[1]]
        if allowed is None or allowed.any():
            yield Squares(int(query[some][0]), key[some], size, *shape, allowed, causal)
