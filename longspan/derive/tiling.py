"""Tiling: a relation in the layout in which it covers the fewest pairs.

A pattern of residues, such as a dilated one, is partial in every contiguous block. Inside its residue classes it is
dense again, and a residue class of a tensor is a strided view, without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import numpy as np

from longspan.derive.blocks import Blocks, Side, blocks
from longspan.pattern import Pattern

SIZE = 128
# Squares of blocks that may be looked at merely to compare the contiguous layout with a strided one.
COMPARABLE = 1 << 16
_CLASS_PAIRS = 1 << 20


@dataclass(frozen=True)
class Tile:
    """One relation and its blocks.

    Attributes:
        term: a relation, the pattern of one head or a term of it.
        blocks: the rectangles that the relation fills.
    """

    term: Pattern
    blocks: Blocks

    def positions(self, side: Side, first: int, places: int) -> np.ndarray:
        """Return the positions of `places` places from index `first` on, one step of the side apart."""
        indices = first + np.arange(places) * side.step
        return side.positions.start + indices * side.positions.step

    def mask(self, query: int, key: int, rows: int, columns: int) -> np.ndarray:
        """Return the exact mask of a rectangle that begins at a query and a key index, bool `[rows, columns]`."""
        q = self.positions(self.blocks.query_side, query, rows)
        k = self.positions(self.blocks.key_side, key, columns)
        return np.broadcast_to(self.term.contains(q[:, None], k[None, :]), (rows, columns))


def cheapest(term: Pattern, queries: range, keys: range, *, size: int = SIZE) -> Blocks:
    """Return the blocks of a relation in the layout in which they cover the fewest pairs.

    The layouts are the contiguous one, the one by the residues of the term, and the one in which both sides have
    the same residues, where a diagonal stays one.
    """
    found = [
        blocks(term, queries=queries, keys=keys, size=size, steps=steps)
        for steps in layouts(term, queries, keys, size=size)
    ]
    return min(found, key=lambda layout: (layout.area, len(layout)))


def layouts(term: Pattern, queries: range, keys: range, *, size: int) -> list[tuple[int, int]]:
    """Return the steps of queries and keys in which a relation is worth a try."""
    tried = dict.fromkeys([(lcm(*term.steps),) * 2, term.steps])
    strided = [steps for steps in tried if steps != (1, 1) and steps[0] * steps[1] <= _CLASS_PAIRS]
    if not strided or comparable(queries, keys, size):
        strided.append((1, 1))
    return strided


def comparable(queries: range, keys: range, size: int) -> bool:
    """Say whether a text is so short that its contiguous layout is looked at merely to compare it."""
    return -(-len(queries) // size) * -(-len(keys) // size) <= COMPARABLE
