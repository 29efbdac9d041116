"""The reach: how far a token can see after several layers, when each layer reads by a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np
from numpy.lib.stride_tricks import as_strided

from longspan.derive.blocks import PARTIAL, TRIANGLE
from longspan.derive.region import Region, beyond_sinks, edges, regions
from longspan.derive.terms import terms
from longspan.derive.tiling import SIZE, Tile, cheapest
from longspan.errors import ShapeError, message
from longspan.pattern import Pattern

# Rows this far apart and farther are not read over one range, but for all except so many gaps.
_GAP, _CUTS = 1024, 64
# Layers beyond those asked for that are followed in search of the first token.
_PATIENCE = 64


@dataclass(frozen=True)
class Reach:
    """What one token sees, layer after layer. Print it to read it.

    A token sees itself, what it reads, and what that has seen a layer below.

    Attributes:
        query: position of the token.
        length: number of tokens.
        seen: how many tokens it sees after 1, 2, ... layers.
        farthest: the first position it sees after 1, 2, ... layers.
        first: after how many layers it sees the first token, or None where that is never or not known.
        settled: no further layer shows it another token.
    """

    query: int
    length: int
    seen: tuple[int, ...]
    farthest: tuple[int, ...]
    first: int | None
    settled: bool

    @property
    def layers(self) -> int:
        return len(self.seen)

    @property
    def share(self) -> float:
        """Share of all tokens that is seen after the last layer."""
        return self.seen[-1] / self.length

    def __str__(self) -> str:
        table = [
            (f"{layer:,}", f"{seen:,}", f"{seen / self.length:.2%}", f"{self.query - farthest:,}")
            for layer, seen, farthest in self._rows()
        ]
        table.insert(0, ("layers", "tokens seen", "of all", "farthest back"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = ["  " + "  ".join(map(str.rjust, row, widths)) for row in table]
        return "\n".join([f"Reach of token {self.query:,} of {self.length:,}", *rows, f"  {self._verdict()}"])

    def _rows(self) -> list[tuple[int, int, int]]:
        """Return layers worth a line: powers of two, the last, and none after which nothing changes."""
        numbered = list(zip(range(1, self.layers + 1), self.seen, self.farthest, strict=True))
        changing = [row for row in numbered if row[0] == 1 or row[1:] != numbered[row[0] - 2][1:]]
        return [row for row in changing if row[0].bit_count() == 1 or row is changing[-1]]

    def _verdict(self) -> str:
        if self.first is not None:
            return f"the first token is seen after {self.first:,} layer{'s' if self.first > 1 else ''}"
        if self.settled:
            return "the first token is never seen, however many layers"
        return f"the first token is not seen within {self.layers:,} layer{'s' if self.layers > 1 else ''}"


def reach(
    pattern: Pattern | Sequence[Pattern],
    *,
    length: int,
    layers: int | None = None,
    heads: int = 1,
    query: int | None = None,
) -> Reach:
    """Return how far a token sees after some layers, every head of a layer counted in.

    Law: what a token sees after a layer is itself, what it reads, and what those tokens had seen before.

    The answer is exact, and found without looking at every pair.

    Args:
        pattern: what every layer reads, or a list with a pattern for each, the lowest layer first.
        length: number of tokens.
        layers: number of layers; None for those of the list, or 1.
        heads: number of query heads.
        query: position of the token that looks; None for the last one.

    Raises:
        PatternError: a pattern that cannot be shared out among `heads`.
        ShapeError: no layers or tokens, a list of another length, a position outside the text.

    Example:
        >>> from longspan.pattern import SlidingWindow
        >>> print(reach(SlidingWindow(4096), layers=32, length=1_048_576))
        Reach of token 1,048,575 of 1,048,576
          layers  tokens seen  of all  farthest back
               1        4,096   0.39%          4,095
               2        8,191   0.78%          8,190
               4       16,381   1.56%         16,380
               8       32,761   3.12%         32,760
              16       65,521   6.25%         65,520
              32      131,041  12.50%        131,040
          the first token is seen after 257 layers
    """
    stack, query = _checked(pattern, length, layers, query)
    look = _Look(length, heads)
    if len(set(stack)) == 1:
        return look.through(stack[0], len(stack), query)
    return look.through_all(stack, query)


def sight(
    pattern: Pattern | Sequence[Pattern],
    *,
    length: int,
    layers: int | None = None,
    heads: int = 1,
    query: int | None = None,
) -> np.ndarray:
    """Return which tokens one token sees after all layers, bool `[length]`: those that `reach` counts.

    Args and errors are those of `reach`.

    Example:
        >>> from longspan.pattern import Causal, Window
        >>> sight(Causal() & Window(2), layers=2, length=5).tolist()
        [False, False, True, True, True]
    """
    stack, query = _checked(pattern, length, layers, query)
    return _Look(length, heads).down(stack, query)


def _checked(
    pattern: Pattern | Sequence[Pattern], length: int, layers: int | None, query: int | None
) -> tuple[list[Pattern], int]:
    """Return the pattern of every layer and the position of the token that looks."""
    stack: list[Pattern] = (
        [pattern] * (1 if layers is None else layers) if isinstance(pattern, Pattern) else list(pattern)
    )
    query = length - 1 if query is None else query
    if not stack or len(stack) != (layers or len(stack)) or length < 1 or not 0 <= query < length:
        raise ShapeError(
            message(
                "A reach is that of a token of the text, over at least one layer, each with its pattern.",
                {
                    "asked": f"layers={layers}, length={length}, query={query}",
                    "patterns": str(len(stack)),
                },
                fix="layers=32, length=4096",
            )
        )
    return stack, query


class _Look:
    """Follows what a token sees downward, layer by layer."""

    def __init__(self, length: int, heads: int) -> None:
        self.length, self.heads = length, heads

    def through(self, pattern: Pattern, layers: int, query: int) -> Reach:
        """Return the reach where all layers read alike: only tokens that are new have anything new to show."""
        view, fresh = self._itself(query), self._itself(query)
        seen: list[int] = []
        farthest: list[int] = []
        while len(seen) < layers and fresh.any() and not view.all():
            fresh = self._read_by(pattern, fresh) & ~view
            view |= fresh
            seen.append(int(view.sum()))
            farthest.append(int(view.argmax()))
        if not seen:
            # A text of one token has nothing else to see.
            seen, farthest = [1], [query]
        first = farthest.index(0) + 1 if 0 in farthest else None
        settled = bool(view.all()) or not fresh.any()
        more = layers - len(seen)
        if first is None and not settled:
            first, settled = self._onward(pattern, view, fresh, layers)
        seen, farthest = seen + seen[-1:] * more, farthest + farthest[-1:] * more
        return Reach(query, self.length, tuple(seen), tuple(farthest), first, settled)

    def through_all(self, stack: Sequence[Pattern], query: int) -> Reach:
        """Return the reach where layers differ: every number of layers has a top of its own to look down from."""
        seen, farthest = [], []
        for top in range(1, len(stack) + 1):
            view = self.down(stack[:top], query)
            seen.append(int(view.sum()))
            farthest.append(int(view.argmax()))
        first = farthest.index(0) + 1 if 0 in farthest else None
        everything = seen[-1] == self.length
        return Reach(query, self.length, tuple(seen), tuple(farthest), first, everything)

    def down(self, stack: Sequence[Pattern], query: int) -> np.ndarray:
        """Return what a token sees from the top of some layers, bool `[length]`."""
        view = self._itself(query)
        for pattern in reversed(stack):
            if not view.all():
                view |= self._read_by(pattern, view)
        return view

    def _onward(
        self, pattern: Pattern, view: np.ndarray, fresh: np.ndarray, layer: int
    ) -> tuple[int | None, bool]:
        """Return after how many layers the first token is seen, and whether nothing more can be seen."""
        alike = self._alike(pattern)
        edge = max((max(found, default=0) for single in alike for found in edges(single)), default=0)
        beyond = range(edge, max(self.length, edge + 1))
        periods = [beyond_sinks(single, beyond, beyond).period for single in alike]
        met: dict[tuple[int, int], tuple[int, int]] = {}
        for _ in range(_PATIENCE):
            low, high = (int(at) for at in np.flatnonzero(view)[[0, -1]])
            new = int(fresh.sum())
            if None not in periods and view[low:].sum() == high - low + 1 and fresh[low : low + new].all():
                # All that is seen is one stretch, so its new beginning decides what comes next. Where it has begun
                # alike before, whole cycles are skipped, but for the last, in which a sink might be met.
                state = (low % lcm(*(period for period in periods if period)), new)
                before, since = met.setdefault(state, (low, layer))
                skipped = (low - edge) // (before - low) - 1 if before > low else 0
                if skipped > 0:
                    layer += skipped * (layer - since)
                    low -= skipped * (before - low)
                    view[low:high] = True
                    fresh[:] = False
                    fresh[low : low + new] = True
                    met.clear()
            layer += 1
            fresh = self._read_by(pattern, fresh) & ~view
            view |= fresh
            if view[0] or not fresh.any():
                return (layer if view[0] else None), not fresh.any()
        return None, False

    def _itself(self, query: int) -> np.ndarray:
        view = np.zeros(self.length, dtype=bool)
        view[query] = True
        return view

    def _alike(self, pattern: Pattern) -> list[Pattern]:
        """Return what the heads read, each way once."""
        return list(dict.fromkeys(pattern.at_head(head, self.heads) for head in range(self.heads)))

    def _read_by(self, pattern: Pattern, rows: np.ndarray) -> np.ndarray:
        """Return which keys are read by any of some rows on any head, bool `[length]`."""
        read = np.zeros(self.length, dtype=bool)
        for single in self._alike(pattern):
            for term in terms(single):
                for stretch in _stretches(rows):
                    for region in regions(term, stretch, range(self.length), size=SIZE):
                        _mark(region, rows[stretch.start :], read)
        return read


def _stretches(rows: np.ndarray) -> list[range]:
    """Return ranges that hold all rows that are set, and leave out the widest gaps between them."""
    positions = np.flatnonzero(rows)
    gaps = np.diff(positions)
    cuts = np.flatnonzero(gaps >= _GAP)
    cuts = np.sort(cuts[np.argsort(-gaps[cuts], kind="stable")[:_CUTS]])
    begins, ends = np.append(0, cuts + 1), np.append(cuts, len(positions) - 1)
    return [range(int(positions[a]), int(positions[b]) + 1) for a, b in zip(begins, ends, strict=True)]


def _mark(region: Region, rows: np.ndarray, read: np.ndarray) -> None:
    """Mark the keys that the rows set in a region, and in those that equal it, read."""
    found = cheapest(region.term, region.queries, region.keys)
    tile = Tile(region.term, found)
    heights, widths = found.extents()
    tops, lefts = (
        residue + block * found.size * side.step
        for residue, block, side in (
            (found.query_class, found.row, found.query_side),
            (found.key_class, found.column, found.key_side),
        )
    )
    step = found.key_side.step
    for top, left, height, width, kind in zip(tops, lefts, heights, widths, found.kind, strict=True):
        asked = as_strided(
            rows[region.query + top :], (region.times, height), (region.advance[0], found.query_side.step)
        )
        times = np.flatnonzero(asked.any(axis=1))
        begins = region.key + left + times * region.advance[1]
        if kind == PARTIAL and len(times):
            mask = tile.mask(top, left, height, width).astype(np.float32)
            for begin, keys in zip(begins, asked[times].astype(np.float32) @ mask > 0, strict=True):
                read[begin : begin + width * step : step] |= keys
            continue
        # A row of a triangle reads what the rows above it read, and one key more.
        last = height - asked[times, ::-1].argmax(axis=1) if kind == TRIANGLE else np.full(len(times), width)
        for begin, reads in zip(begins, last, strict=True):
            read[begin : begin + reads * step : step] = True
