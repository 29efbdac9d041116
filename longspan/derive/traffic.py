"""Traffic: which keys of one rank the queries of another read, in blocks, and the pairs that each rank computes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from longspan.derive.bins import bins, degrees
from longspan.derive.strand import strands
from longspan.errors import ShapeError, message
from longspan.layout import Layout
from longspan.pattern import Causal, Pattern, Progression, simplify

# Rectangles that are read at a time.
_ABREAST = 1 << 18
# Pairs that are asked about, besides, to see whether one is read.
_ASKED = 1 << 20
# Tokens of a chunk whose pairs are counted query by query.
_PERIOD = 1 << 14
# Queries whose pairs are held at a time.
_QUERIES = 1 << 22


@dataclass(frozen=True, eq=False)
class Traffic:
    """The keys that ranks need from one another, as runs of places of the rank that holds them.

    Runs are sorted by destination, source and place; a run lies in one piece of the source and is made of whole
    blocks, each `size` places counted from the beginning of the piece (fewer at its end).

    Attributes:
        layout: who holds what.
        size: places in a block.
        destination, source, start, stop: int64 arrays, one entry per run.
    """

    layout: Layout
    size: int
    destination: np.ndarray
    source: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @property
    def blocks(self) -> int:
        """Key blocks that move, each counted once for every rank that it goes to."""
        return int((-(-(self.stop - self.start) // self.size)).sum())

    @cached_property
    def tokens(self) -> np.ndarray:
        """Keys that go from one rank to another, int64 `[destination, source]`."""
        moved = np.zeros((self.layout.ranks, self.layout.ranks), dtype=np.int64)
        np.add.at(moved, (self.destination, self.source), self.stop - self.start)
        return moved

    def runs(self, destination: int, source: int) -> tuple[range, ...]:
        """Return the places of `source` that `destination` needs, ascending."""
        low, high = np.searchsorted(self._pair, self._number(destination, source) + np.array([0, 1]))
        return tuple(map(range, self.start[low:high].tolist(), self.stop[low:high].tolist()))

    def passed(self, source: int, step: int) -> tuple[range, ...]:
        """Return the places of `source` that the rank `step` after it, or any after that, needs; `step` from 1."""
        table, far = self._far
        chosen = table[(table["rank"] == source) & (far >= step)]
        _, _, start, stop = _joined(chosen["rank"], chosen)
        return tuple(map(range, start.tolist(), stop.tolist()))

    @cached_property
    def passing(self) -> np.ndarray:
        """Keys of a source that go on to the rank so many steps after it, int64 `[source, step]`; step 0 is unused."""
        table, far = self._far
        ending = np.zeros((self.layout.ranks, self.layout.ranks), dtype=np.int64)
        np.add.at(ending, (table["rank"], far), table["stop"] - table["start"])
        return np.cumsum(ending[:, ::-1], axis=1)[:, ::-1]

    @cached_property
    def _far(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all key blocks, and how many steps after its owner the last rank stands that needs each; 0: none."""
        table = _table(self.layout, self.size)
        far = np.zeros(len(table), dtype=np.int64)
        apart = self.layout.length + 1
        begins = table["rank"] * apart + table["start"]
        first, last = (
            np.searchsorted(begins, self.source * apart + edge) for edge in (self.start, self.stop)
        )
        blocks = last - first
        block = np.repeat(first - np.cumsum(blocks) + blocks, blocks) + np.arange(blocks.sum())
        steps = (self.destination - self.source) % self.layout.ranks
        np.maximum.at(far, block, np.repeat(steps, blocks))
        return table, far

    @cached_property
    def _pair(self) -> np.ndarray:
        return self._number(self.destination, self.source)

    def _number(self, destination: np.ndarray | int, source: np.ndarray | int) -> np.ndarray:
        return np.asarray(destination) * self.layout.ranks + source


def traffic(pattern: Pattern, layout: Layout, *, heads: int = 1, size: int = 128) -> Traffic:
    """Return the key blocks that each rank needs from each other rank.

    Law: a key outside the runs is read by no query of the destination, in no head. The answer is safe: a block may be
    named that nobody reads (where a formula is undecided over a whole block of queries and keys), never left out.

    Args:
        pattern: what is read.
        layout: how positions lie on ranks.
        heads: number of query heads; a block that one head reads is needed.
        size: places in a block.

    Raises:
        PatternError: a pattern that cannot be shared out among `heads`.
        ShapeError: a size below 1.

    Example:
        >>> from longspan.layout import contiguous
        >>> from longspan.pattern import Causal, Sink, Window
        >>> window = Causal() & (Window(4096) | Sink(4))
        >>> traffic(window, contiguous(32768, ranks=8)).blocks
        230
        >>> traffic(Causal(), contiguous(32768, ranks=8)).blocks
        896
    """
    if size < 1:
        raise ShapeError(
            message("A block holds at least one place.", {"asked": f"size={size}"}, fix="size=128")
        )
    table = _table(layout, size)
    # Whole pieces are looked at before their blocks.
    pieces = _table(layout, max(1, layout.length))
    first = np.searchsorted(_order(table), _order(pieces))
    number = np.diff(np.append(first, len(table)))
    singles = dict.fromkeys(pattern.at_head(head, heads) for head in range(heads))
    needed = np.zeros(0, dtype=np.int64)
    abreast = max(1, _ABREAST // max(1, len(pieces)))
    for single in singles:
        found = [needed]
        for begin in range(0, len(pieces), abreast):
            asking = pieces[begin : begin + abreast]
            bracket = single.count(_progression(asking[:, None]), _progression(pieces))
            shape = (len(asking), len(pieces))
            empty, full = (np.broadcast_to(some, shape) for some in (bracket.empty, bracket.full))
            query, key = np.nonzero(~empty & (asking["rank"][:, None] != pieces["rank"]))
            # Every block of the key piece, beside every query piece that may read of it.
            times = number[key]
            block = np.repeat(first[key] - np.cumsum(times) + times, times) + np.arange(times.sum())
            settled, query = np.repeat(full[query, key], times), np.repeat(query, times)
            pair = asking["rank"][query] * len(table) + block
            unknown = np.flatnonzero(~settled)
            if len(needed):
                unknown = unknown[~np.isin(pair[unknown], needed)]
            settled[unknown] = _read(single, asking[query[unknown]], table[block[unknown]], size)
            found.append(pair[settled])
        # Sorting is several times as fast as what `np.unique` does.
        needed = np.sort(np.concatenate(found))
        needed = needed[np.diff(needed, prepend=-1) > 0]
    destination, block = np.divmod(needed, max(1, len(table)))
    return Traffic(layout, size, *_joined(destination, table[block]))


_BLOCK = np.dtype([(name, np.int64) for name in ("rank", "piece", "start", "stop", "low", "high", "step")])


def _table(layout: Layout, size: int) -> np.ndarray:
    """Return all key blocks: who holds them, at which places, and their positions."""
    rows = [np.zeros(0, dtype=_BLOCK)]
    for rank, shard in enumerate(layout.shards):
        for number, (piece, taken) in enumerate(zip(shard, layout.pieces(rank), strict=True)):
            made = np.zeros(-(-len(piece) // size), dtype=_BLOCK)
            first = np.arange(len(made), dtype=np.int64) * size
            last = np.minimum(first + size, len(piece))
            made["rank"], made["piece"] = rank, number
            made["start"], made["stop"] = taken.start + first, taken.start + last
            made["low"], made["high"] = (piece.start + place * piece.step for place in (first, last - 1))
            made["step"] = np.where(last - first > 1, piece.step, 0)
            rows.append(made)
    return np.concatenate(rows)


def _order(blocks: np.ndarray) -> np.ndarray:
    """Return a number for each block that grows with its rank and piece."""
    return blocks["rank"] * (1 + blocks["piece"].max(initial=0)) + blocks["piece"]


def _progression(blocks: np.ndarray) -> Progression:
    return Progression(blocks["low"], blocks["high"], blocks["step"])


def _read(pattern: Pattern, pieces: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """Say for each piece of queries and block of keys, side by side, whether a query of it may read one of them.

    Queries are taken all at once, then in halves, down to blocks: what is proven empty is dropped, what is proven
    full, or seen to hold a pair, is settled.
    """
    needed = np.zeros(len(keys), dtype=bool)
    entry = np.arange(len(keys))
    first, last = np.zeros(len(keys), dtype=np.int64), pieces["stop"] - pieces["start"] - 1
    while len(entry):
        verdicts = [
            _look(pattern, pieces[entry[some]], keys[entry[some]], first[some], last[some])
            for some in (slice(begin, begin + _ABREAST) for begin in range(0, len(entry), _ABREAST))
        ]
        empty, settled = (np.concatenate(parts) for parts in zip(*verdicts, strict=True))
        needed[entry[settled | (~empty & (last - first < size))]] = True
        rest = ~empty & ~needed[entry]
        entry, first, last = entry[rest], first[rest], last[rest]
        # Halves of whole blocks, so that all end on the same ones.
        middle = first + (last - first + size) // (2 * size) * size
        entry = np.concatenate([entry, entry])
        first, last = np.concatenate([first, middle]), np.concatenate([middle - 1, last])
    return needed


def _look(
    pattern: Pattern, pieces: np.ndarray, keys: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Say which rectangles of queries and keys hold no pair for certain, and which hold one for certain."""
    low, high = (pieces["low"] + place * pieces["step"] for place in (first, last))
    q = Progression(low, high, np.where(last > first, pieces["step"], 0))
    bracket = pattern.count(q, _progression(keys))
    empty = np.broadcast_to(bracket.empty, first.shape)
    settled = np.broadcast_to(bracket.full, first.shape).copy()
    # One pair that is read settles a rectangle: of some of its keys, and first the query at the key or the next one,
    # for most patterns read what is near, then the queries at both ends.
    for nearest in (True, False):
        asked = np.flatnonzero(~empty & ~settled)
        if len(asked):
            places = int((keys["stop"] - keys["start"]).max())
            some = np.arange(0, places, max(1, places * len(asked) // _ASKED))
            at = np.minimum(some, (keys["stop"] - keys["start"])[asked, None] - 1)
            key = keys["low"][asked, None] + at * keys["step"][asked, None]
            begin, end = low[asked, None], high[asked, None]
            if nearest:
                step = np.maximum(1, pieces["step"][asked, None])
                queries = [np.clip(begin - (begin - key) // step * step, begin, end)]
            else:
                queries = [begin, end]
            for query in queries:
                settled[asked] |= (np.broadcast_to(pattern.count(query, key), key.shape) > 0).any(axis=1)
    return empty, settled


def _joined(
    destination: np.ndarray, blocks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Join neighbouring blocks of one piece for one destination: destination, source, start and stop of each run."""
    starts = np.ones(len(blocks), dtype=bool)
    starts[1:] = (
        (destination[1:] != destination[:-1])
        | (blocks["rank"][1:] != blocks["rank"][:-1])
        | (blocks["piece"][1:] != blocks["piece"][:-1])
        | (blocks["start"][1:] != blocks["stop"][:-1])
    )
    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(blocks))[: len(first)] - 1
    return destination[first], blocks["rank"][first], blocks["start"][first], blocks["stop"][last]


def load(pattern: Pattern, layout: Layout, *, heads: int = 1) -> np.ndarray:
    """Return the pairs that the queries of each rank read, over all heads: exact, int64 `[ranks]`.

    Example:
        >>> from longspan.layout import contiguous, zigzag
        >>> from longspan.pattern import Causal
        >>> load(Causal(), contiguous(8, ranks=2)).tolist(), load(Causal(), zigzag(8, ranks=2)).tolist()
        ([10, 26], [18, 18])
    """
    alike = Counter(pattern.at_head(head, heads) for head in range(heads))
    pairs = np.zeros(layout.ranks, dtype=np.int64)
    for single, times in alike.items():
        whole, thin = strands(single, length=layout.length)
        parts = [(single, layout)]
        if thin:
            parts = [(term, layout) for term in whole]
            parts += [(strand.pattern, layout.within(strand.tokens)) for strand in thin]
        for part, held in parts:
            pairs += times * _load(part, held)
    return pairs


def _load(pattern: Pattern, layout: Layout) -> np.ndarray:
    straight = all(piece.step == 1 for shard in layout.shards for piece in shard)
    period = _closed(pattern, layout.length) if straight else 0
    if period:
        before = _before(pattern, period)

        def up_to(position: int) -> int:
            return int(position // period * before[-1] + before[position % period])

        return np.array([sum(up_to(p.stop) - up_to(p.start) for p in shard) for shard in layout.shards])
    if layout.name not in ("contiguous", "zigzag"):
        return _by_query(pattern, layout)
    # Neighbouring positions are bins of one count over the whole text.
    chunks = layout.ranks * (2 if layout.name == "zigzag" else 1)
    binned = bins(pattern, length=layout.length, cells=(chunks, 1))[:, 0]
    return binned[: layout.ranks] + (binned[: layout.ranks - 1 : -1] if layout.name == "zigzag" else 0)


@lru_cache(maxsize=256)
def _closed(pattern: Pattern, length: int) -> int:
    """Return the tokens of chunks that all read alike, and nothing but themselves; 0 where there are none."""
    period = pattern.period
    if length <= _PERIOD:
        return length
    if not period or period > _PERIOD:
        return 0
    chunk, others = Progression.of(range(period)), Progression.of(range(period, length))
    apart = pattern.count(chunk, others).empty.all() and pattern.count(others, chunk).empty.all()
    # The last chunk may be cut short: then nothing of it may be missed.
    whole = length % period == 0 or simplify(pattern & Causal()) == pattern
    return period if apart and whole else 0


@lru_cache(maxsize=256)
def _before(pattern: Pattern, period: int) -> np.ndarray:
    """Return the pairs of all queries before each position of a chunk, int64 `[period + 1]`."""
    counted = bins(pattern, length=period, cells=(period, 1))[:, 0]
    return np.concatenate([[0], np.cumsum(counted)])


def _by_query(pattern: Pattern, layout: Layout) -> np.ndarray:
    """Return the pairs of each rank from those of every query, of some queries after the other."""
    pairs = np.zeros(layout.ranks, dtype=np.int64)
    for first in range(0, layout.length, _QUERIES):
        some = range(first, min(layout.length, first + _QUERIES))
        read = degrees(pattern, queries=some, keys=range(layout.length))
        for rank, shard in enumerate(layout.shards):
            for piece in shard:
                begin, end = (_places_before(piece, edge) for edge in (some.start, some.stop))
                met = piece[begin:end]
                pairs[rank] += read[met.start - first : met.stop - first : met.step].sum()
    return pairs


def _places_before(piece: range, position: int) -> int:
    """Return how many positions of a piece lie before one of the text."""
    return min(len(piece), max(0, -((piece.start - position) // piece.step)))
