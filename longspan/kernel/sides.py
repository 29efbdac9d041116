"""Sides: a pattern as the sum of the keys before and after its queries, for scores that count distance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from longspan.kernel.heads import head_groups
from longspan.kernel.lattice.calls import HeadGroup
from longspan.kernel.lattice.parts import Lattice, Part
from longspan.pattern import Causal, Pattern

# Rows of a triangle whose distances are written out; what is left of a larger triangle is rectangles.
TRIANGLE = 256


@lru_cache(maxsize=64)
def one_sided_groups(pattern: Pattern, heads: int, queries: range, keys: range) -> tuple[HeadGroup, ...]:
    """Return who reads what, each group with keys on one side of its queries only, and without large triangles.

    On either side the distance of a pair is linear in the position of its key.
    """
    sides = (pattern & Causal(), False), (pattern & ~Causal(), True)
    made = []
    for half, ahead in sides:
        for group in head_groups(half, heads, queries, keys):
            pieces = tuple(piece for part in group.parts for piece in _without_triangles(part))
            if ahead:
                # The other side may have touched any query before.
                pieces = tuple(replace(piece, fresh=False) for piece in pieces)
            made.append(HeadGroup(group.heads, pieces, ahead))
    return tuple(made)


def _without_triangles(part: Part) -> Iterator[Part]:
    """Cut triangles into small ones with a mask, and rows of the rectangles beside them."""
    if not part.causal:
        yield part
        return
    whole, rest = divmod(part.query.places, TRIANGLE)
    for outer in range(part.shape[0]):
        query, key = (replace(side, start=side.start + outer * side.outer) for side in (part.query, part.key))
        if whole:
            yield _small(part, query, key, whole, TRIANGLE)
        if rest:
            done = whole * TRIANGLE
            yield _small(part, _from(query, done), _from(key, done), 1, rest)
        for first in range(TRIANGLE, part.query.places, TRIANGLE):
            rows = replace(_from(query, first), places=min(TRIANGLE, part.query.places - first))
            before = replace(key, places=first)
            yield Part(rows, before, (1, part.shape[1]), None, causal=False, fresh=False)


def _small(part: Part, query: Lattice, key: Lattice, number: int, rows: int) -> Part:
    """Return the triangles on the diagonal of a large one, `number` of them with `rows` rows each."""
    lower, inner = np.tri(rows, dtype=bool), part.shape[1]
    if inner == 1 and part.key.at is None:
        # One call takes the rectangles of the inner level.
        query, key = (replace(side, places=rows, inner=rows * side.step) for side in (query, key))
        return Part(query, key, (1, number), lower, causal=False, fresh=part.fresh)
    query, key = (replace(side, places=rows, outer=rows * side.step) for side in (query, key))
    return Part(query, key, (number, inner), lower, causal=False, fresh=part.fresh)


def _from(side: Lattice, place: int) -> Lattice:
    return replace(side, start=side.start + place * side.step)
