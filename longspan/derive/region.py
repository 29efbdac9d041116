"""Regions: a term cut where its sinks end and where it repeats, so that each piece is short and simple.

A text of a million tokens holds few different pieces. Beyond its sinks a pattern repeats with its period, and one
that reads no further than some distance repeats whole strips of queries with their keys. One strip is worked out,
and where the others lie is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import lcm

import numpy as np

from longspan.derive.listing import listed
from longspan.pattern import (
    Chunk,
    Complement,
    Every,
    Everything,
    Intersection,
    Nothing,
    Pattern,
    Prefix,
    Progression,
    Sink,
    Transpose,
    Union,
)
from longspan.pattern.choice import Blockwise


@dataclass(frozen=True)
class Region:
    """A rectangle of queries and keys, and equal ones at a regular distance.

    Attributes:
        term: what the term is inside, in simpler words.
        query, key: index of the first query and of the first key among all of them.
        queries, keys: positions.
        times: how many equal rectangles there are.
        advance: indices from one to the next, queries and keys.
    """

    term: Pattern
    query: int
    key: int
    queries: range
    keys: range
    times: int = 1
    advance: tuple[int, int] = (0, 0)


def regions(term: Pattern, queries: range, keys: range, *, size: int) -> Iterator[Region]:
    """Yield the regions of a relation.

    Law: regions and their repetitions are disjoint and hold every pair of the term.

    Args:
        term: a relation, as `terms` returns it.
        queries, keys: positions.
        size: places on a side of the blocks that regions are going to be cut into.
    """
    tables: dict[Blockwise, _Table] = {}
    for region, tabled in _cut(_set_aside(term, tables), queries, keys, size):
        found = replace(region, term=_put_back(region.term, tuple(tables))) if tabled else region
        if not tabled or _holds_pairs(found):
            yield found


@dataclass(frozen=True, repr=False)
class _Table(Blockwise):
    """Stands for one of the tables of a term, which say nothing of where it is cut: heads differ by theirs alone."""

    number: int
    size: int


def _set_aside(term: Pattern, tables: dict[Blockwise, _Table]) -> Pattern:
    """Return the term with its tables replaced, and write down by what."""
    if isinstance(term, Blockwise):
        return tables.setdefault(term, _Table(len(tables), term.size))
    return term.rebuilt(tuple(_set_aside(part, tables) for part in term.operands))


def _put_back(term: Pattern, tables: tuple[Blockwise, ...]) -> Pattern:
    """Return the term with its own tables."""
    if isinstance(term, _Table):
        return tables[term.number]
    return term.rebuilt(tuple(_put_back(part, tables) for part in term.operands))


@lru_cache(maxsize=64)
def _cut(term: Pattern, queries: range, keys: range, size: int) -> tuple[tuple[Region, bool], ...]:
    """Return the regions of a relation, and whether they read from a table; then they may hold no pair."""
    found = ((region, _tabled(region.term)) for region in _simplified(term, queries, keys, size))
    return tuple((region, tabled) for region, tabled in found if tabled or _holds_pairs(region))


def _tabled(term: Pattern) -> bool:
    return isinstance(term, _Table) or any(map(_tabled, term.operands))


def _simplified(term: Pattern, queries: range, keys: range, size: int) -> Iterator[Region]:
    query_edges, key_edges = edges(term)
    for first, last in _cuts(queries, query_edges):
        for begin, end in _cuts(keys, key_edges):
            rows, columns = queries[first:last], keys[begin:end]
            simple = beyond_sinks(term, rows, columns)
            # Queries set apart so that the residue classes of both sides begin side by side.
            lead = (term.lead - (rows.start - columns.start)) % simple.steps[0]
            for part in (slice(0, lead), slice(lead, None)):
                if rows[part]:
                    whole = Region(simple, first + (part.start or 0), begin, rows[part], columns)
                    found = map(_settled, _repeated(whole, size))
                    yield from (region for region in found if region.term != Nothing())


def edges(term: Pattern, *, turned: bool = False) -> tuple[set[int], set[int]]:
    """Return the positions of queries and of keys from which on a sink or prefix says nothing new."""
    if isinstance(term, Prefix):
        return {term.size}, {term.size}
    if isinstance(term, Sink):
        return ({term.size}, set()) if turned else (set(), {term.size})
    turned ^= isinstance(term, Transpose)
    both = [edges(part, turned=turned) for part in term.operands]
    return set().union(*(q for q, _ in both)), set().union(*(k for _, k in both))


def _cuts(positions: range, edges: set[int]) -> Iterator[tuple[int, int]]:
    """Yield the indices between which a range is cut at some positions."""
    at = {-(-(edge - positions.start) // positions.step) for edge in edges}
    inside = sorted(index for index in at if 0 < index < len(positions))
    if positions:
        yield from pairwise([0, *inside, len(positions)])


def beyond_sinks(term: Pattern, queries: range, keys: range) -> Pattern:
    """Return the term with every sink and prefix replaced by what it says of all these pairs."""
    if isinstance(term, Sink | Prefix):
        count = term.count(Progression.of(queries), Progression.of(keys))
        return Everything() if count.full.all() else Nothing()
    if isinstance(term, Transpose):
        return beyond_sinks(term.part, keys, queries).T
    return term.rebuilt(tuple(beyond_sinks(part, queries, keys) for part in term.operands))


def _settled(region: Region) -> Region:
    """Return the region with a term that says nothing which all of its pairs have in common."""
    q, k = Progression.of(region.queries), Progression.of(region.keys)
    return replace(region, term=undecided(region.term, q, k))


def undecided(term: Pattern, q: Progression, k: Progression) -> Pattern:
    """Return the term without what is all or none of the pairs of some rectangles."""
    if isinstance(term, Transpose):
        part = undecided(term.part, k, q)
        return part if isinstance(part, Everything | Nothing) else part.T
    if isinstance(term, Complement):
        part = undecided(term.part, q, k)
        return Nothing() if part == Everything() else Everything() if part == Nothing() else ~part
    if isinstance(term, Intersection | Union):
        # Of an intersection nothing is left where a part holds nothing, of a union where a part holds everything.
        neutral, final = (Everything, Nothing) if isinstance(term, Intersection) else (Nothing, Everything)
        parts = []
        for part in term.parts:
            left = undecided(part, q, k)
            if isinstance(left, final):
                return left
            if not isinstance(left, neutral):
                parts.append(left)
        return term.rebuilt(tuple(parts)) if len(parts) > 1 else parts[0] if parts else neutral()
    if term.operands:
        return term.rebuilt(tuple(undecided(part, q, k) for part in term.operands))
    if isinstance(term, Blockwise):
        # A table is large, and says little of large rectangles.
        return term
    count = term.contains(q, k)
    if count.full.all() or count.empty.all():
        return Everything() if count.full.all() else Nothing()
    if isinstance(term, Every) and term.within:
        chunk = int(k.low.min()) // term.within
        offset = (chunk * term.within + term.offset) % term.step
        # A run that would reach into the next step cannot be counted from the beginning of the text.
        if chunk == int(k.high.max()) // term.within and offset + term.run <= term.step:
            return Every(term.step, offset=offset, run=term.run)
    return term


def _holds_pairs(region: Region) -> bool:
    if listed(region.term) is not None:
        return True
    count = region.term.count(Progression.of(region.queries), Progression.of(region.keys))
    return not count.empty.all()


def _repeated(whole: Region, size: int) -> Iterator[Region]:
    """Cut a region into what comes before its strips, one strip for all, and what comes after."""
    period = whole.term.period
    if period is None:
        yield whole
        return
    unit = lcm(period, whole.queries.step, whole.keys.step)
    # Strips that are whole chunks need nothing but themselves, or another chunk.
    found = [strips(whole, unit, phase) for phase in _phases(whole.term)] if unit >= size else []
    chunks = min((some for some in found if some), key=lambda some: some.around, default=None)
    if chunks is not None and chunks.around <= 1:
        yield from chunks.cut(cells=True)
        return
    grid = (
        size * step * side.step
        for step, side in zip(whole.term.steps, (whole.queries, whole.keys), strict=True)
    )
    cut = strips(whole, lcm(unit, *grid), whole.queries.start)
    if cut is None or cut.last - cut.first < 2:
        yield whole
    else:
        yield from cut.cut(cells=False)


def _phases(term: Pattern) -> set[int]:
    """Return where chunks may begin."""
    own = {term.offset} if isinstance(term, Chunk) else {0}
    return own.union(*map(_phases, term.operands))


@dataclass(frozen=True)
class Strips:
    """How a region is cut: strip `i` has `rows` queries from `row + i * rows` on and reads a window of keys.

    The window of strip `i` begins `before` cells of `columns` keys before the key `column + i * columns`, and ends
    `after` cells after the cell that begins there.
    """

    whole: Region
    row: int
    rows: int
    column: int
    columns: int
    before: int
    after: int
    first: int
    last: int

    @property
    def around(self) -> int:
        return self.before + self.after

    def cut(self, *, cells: bool) -> Iterator[Region]:
        """Yield the regions: before the strips, the strip (cell by cell, or in one), and after the strips."""
        start, stop = self.row + self.first * self.rows, self.row + self.last * self.rows
        begin = self.column + (self.first - self.before) * self.columns
        wide = self.around + 1
        yield from self._region(0, start, 0, self.column + (self.first + self.after) * self.columns)
        for cell in (range(wide) if cells else [0]) if self.last > self.first else []:
            left = begin + cell * self.columns
            right = left + self.columns * (1 if cells else wide)
            yield from self._region(start, start + self.rows, left, right, self.last - self.first)
        yield from self._region(
            stop,
            len(self.whole.queries),
            self.column + (self.last - self.before) * self.columns,
            len(self.whole.keys),
        )

    def _region(self, first: int, last: int, begin: int, end: int, times: int = 1) -> Iterator[Region]:
        rows, columns = self.whole.queries[first:last], self.whole.keys[max(0, begin) : end]
        if rows and columns:
            yield Region(
                self.whole.term,
                self.whole.query + first,
                self.whole.key + max(0, begin),
                rows,
                columns,
                times,
                (self.rows, self.columns) if times > 1 else (0, 0),
            )


def strips(whole: Region, unit: int, phase: int) -> Strips | None:
    """Return strips of `unit` positions that begin at `phase`, or None where a strip may read anything."""
    queries, keys = whole.queries, whole.keys
    rows, columns = unit // queries.step, unit // keys.step
    row = -(-((phase - queries.start) % unit) // queries.step)
    number = max(0, (len(queries) - row) // rows)
    start = queries.start + row * queries.step
    column = min(len(keys), max(0, -(-(start - whole.term.lead - keys.start) // keys.step)))
    # What holds for the strip after the last one, and for the first one up to a strip past the end, holds for all.
    ending = Progression.of(range(start + number * unit, start + (number + 1) * unit, queries.step))
    ends = column + np.arange(number + 1) * columns
    left = _reads_nothing(whole.term, ending, keys, np.zeros_like(ends), ends)
    beginning = Progression.of(range(start, start + unit, queries.step))
    right = _reads_nothing(
        whole.term, beginning, keys, ends + columns, np.full_like(ends, len(keys) + columns)
    )
    if not left.any() or not right.any():
        return None
    before, after = int(left[::-1].argmax()), int(right.argmax())
    first = max(0, -(-(before * columns - column) // columns))
    last = max(first, min(number, (len(keys) - column) // columns - after))
    return Strips(whole, row, rows, column, columns, before, after, first, last)


def _reads_nothing(
    term: Pattern, rows: Progression, keys: range, begins: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Say for ranges of key indices whether it is proven that rows read none of them."""
    some = ends > begins
    low = keys.start + begins * keys.step
    high = np.where(some, keys.start + (ends - 1) * keys.step, low)
    columns = Progression(low, high, np.where(high > low, keys.step, 0))
    return np.broadcast_to(term.count(rows, columns).empty, some.shape) | ~some
