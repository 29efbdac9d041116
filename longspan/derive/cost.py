"""The cost: how many pairs a pattern reads, exactly, and the arithmetic they take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from longspan.derive.blocks import PARTIAL
from longspan.derive.extent import extent
from longspan.derive.tiling import Tile, tiling
from longspan.pattern import Pattern

# Pairs that are evaluated at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Cost:
    """What attention over a pattern takes.

    Attributes:
        pairs: pairs read by all heads, counted as often as they are read.
        share: `pairs` over those of dense attention, every query reading every key.
        forward_flops, backward_flops: floating-point operations for these pairs, a multiply-add being two; two
            matrix products forward, five backward. Softmax is not counted.
    """

    pairs: int
    share: float
    forward_flops: int
    backward_flops: int


def cost(
    pattern: Pattern,
    *,
    length: int | None = None,
    queries: range | None = None,
    keys: range | None = None,
    heads: int = 1,
    width: int = 64,
) -> Cost:
    """Return the cost of a pattern: exact, and found without looking at every pair.

    Args:
        pattern: what is read.
        length: number of tokens, short for both ranges.
        queries, keys: absolute positions.
        heads: number of query heads.
        width: numbers in a head's query, key and value.

    Raises:
        PatternError: a pattern that cannot be shared out among `heads`.
        ShapeError: a range that is missing or negative.

    Example:
        >>> from longspan.pattern import SlidingWindow
        >>> cost(SlidingWindow(512), length=1_048_576).pairs
        536740096
    """
    queries, keys = extent(length, queries, keys)
    alike = Counter(pattern.at_head(head, heads) for head in range(heads))
    pairs = sum(
        times * sum(_pairs(tile) for tile in tiling(single, queries, keys)) for single, times in alike.items()
    )
    dense = heads * len(queries) * len(keys)
    return Cost(pairs, pairs / dense if dense else 0.0, 4 * width * pairs, 10 * width * pairs)


def _pairs(tile: Tile) -> int:
    found = tile.blocks
    partial = np.flatnonzero(found.kind == PARTIAL)
    rows, columns = found.extents()
    covered = found.area - int((rows[partial] * columns[partial]).sum())
    if not len(partial):
        return covered
    starts = []
    for side, residue, block in (
        (found.query_side, found.query_class, found.row),
        (found.key_side, found.key_class, found.column),
    ):
        index = residue[partial] + block[partial] * found.size * side.step
        starts.append(side.positions.start + index * side.positions.step)
    q, k = starts
    period = tile.term.period
    # Blocks a period apart hold equally many pairs, so one of each look is counted.
    look = [q, k] if period is None else [q - k, q % period]
    facts = np.stack([*look, rows[partial], columns[partial]])
    _, first, times = np.unique(facts, axis=1, return_index=True, return_counts=True)
    return covered + int(
        (_exact_pairs(tile, q[first], k[first], rows[partial][first], columns[partial][first]) * times).sum()
    )


def _exact_pairs(
    tile: Tile, q: np.ndarray, k: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Return how many pairs each of some rectangles holds, by the exact reading."""
    place = np.arange(tile.blocks.size)
    strides = [side.step * side.positions.step for side in (tile.blocks.query_side, tile.blocks.key_side)]
    held = []
    for some in np.array_split(np.arange(len(q)), -(-len(q) * len(place) ** 2 // _CHUNK)):
        inside = (place[:, None] < rows[some, None, None]) & (place[None, :] < columns[some, None, None])
        contained = tile.term.contains(
            q[some, None, None] + place[:, None] * strides[0],
            k[some, None, None] + place[None, :] * strides[1],
        )
        held.append((contained & inside).sum(axis=(1, 2)))
    return np.concatenate(held)
