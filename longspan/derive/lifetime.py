"""Lifetime: which keys later queries may still read, so what a cache must keep, and how much that ever is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from longspan.derive.extent import extent
from longspan.errors import ShapeError, message
from longspan.pattern import Bracket, Pattern, Progression, Random
from longspan.pattern.base import Positions, Verdict

# Beyond any text, and small enough that sums of positions stay far inside int64.
_FAR = 1 << 40
# Keys that are looked at together before they are looked at one by one.
_ABREAST = 1024


def alive(
    pattern: Pattern, keys: np.ndarray, *, at: int | np.ndarray, until: int | None = None
) -> np.ndarray:
    """Say for each of some keys whether a query from position `at` on may read it.

    Law: safe on the side of keeping. A key called dead is read by no query from `at` to `until - 1`; a key called
    alive may be read by none where several conditions on the query meet only in queries that do not exist.

    Args:
        pattern: the pattern of one head, as `at_head` returns it.
        keys: positions, int64 of any shape.
        at: first query, at least 0; an array that broadcasts against `keys` where it differs from key to key.
        until: end of the text; None for a text without end.

    Returns:
        Bool array of the shape of `keys`.

    Example:
        >>> from longspan.pattern import Causal, Window
        >>> alive(Causal() & Window(3), np.arange(5), at=5).tolist()
        [False, False, False, True, True]
    """
    return _may_read(pattern, Progression(keys, keys, np.asarray(0)), at, until)


def live(
    pattern: Pattern, *, at: int, until: int | None = None, heads: int | None = None
) -> tuple[range, ...] | tuple[tuple[range, ...], ...]:
    """Return the keys before `at` that a query from `at` on may still read: what a cache has to keep.

    Law: as for `alive`, exact or safe on the side of keeping. A causal window keeps the last `size - 1` keys, sinks
    their first ones, residues what lies on them, and dense patterns everything; so do random blocks in a text without
    end, whose later draws may choose any key.

    Args:
        pattern: what is read.
        at: position of the next query, in tokens, at least 0.
        until: end of the text; None for a text without end.
        heads: number of query heads; None for a pattern that is the same on all heads.

    Returns:
        Disjoint progressions in ascending order, or a tuple of them for every head where `heads` is given.

    Raises:
        PatternError: a pattern that differs from head to head, without `heads`.
        ShapeError: a position that is no integer of at least 0.

    Example:
        >>> from longspan.pattern import SDA, SlidingWindow, Streaming
        >>> live(SlidingWindow(512), at=1_000_000)
        (range(999489, 1000000),)
        >>> live(Streaming(512), at=1_000_000)
        (range(0, 4), range(999489, 1000000))
        >>> live(SDA(rows="selected"), at=12, heads=4)[1]
        (range(1, 10, 4),)
    """
    for name, position in (("at", at), ("until", until)):
        if position is not None and (
            isinstance(position, bool) or not isinstance(position, int) or position < 0
        ):
            raise ShapeError(
                message(
                    "A position is an integer of at least 0.",
                    {"asked": f"{name}={position!r}"},
                    fix="at=1024, the number of tokens read so far",
                )
            )
    if heads is None:
        return _ranges(_live_positions(pattern, at, until))
    singles = [pattern.at_head(head, heads) for head in range(heads)]
    found = {single: _ranges(_live_positions(single, at, until)) for single in set(singles)}
    return tuple(found[single] for single in singles)


def most_live(pattern: Pattern, *, length: int) -> int:
    """Return the most keys that are ever live while a text is read token by token: whether memory is bounded.

    Law: `sum(map(len, live(pattern, at=t, until=length))) <= most_live(pattern, length=length)` for every `t`, and
    for some `t` it is equal, unless several conditions on the query meet only in queries that do not exist.

    Args:
        pattern: the pattern of one head, or one that is the same on all heads.
        length: tokens of the text, at least 0.

    Raises:
        PatternError: a pattern that differs from head to head.
        ShapeError: a negative length.

    Example:
        >>> from longspan.pattern import Causal, Chunk, SlidingWindow
        >>> most_live(SlidingWindow(512), length=65536), most_live(Causal() & Chunk(512), length=65536)
        (511, 511)
        >>> most_live(Causal(), length=65536)
        65535
    """
    extent(length)
    keys = np.arange(length)
    # The last query that may read a key lies in [low, high), and low is -1 where none does.
    low, high = np.full(length, -1), np.full(length, length)
    for _ in range(length.bit_length()):
        middle = (low + high) // 2
        readers = Progression(middle, np.full(length, length - 1), np.asarray(1))
        read = ~np.broadcast_to(
            pattern.count(readers, Progression(keys, keys, np.asarray(0))).empty, keys.shape
        )
        undecided = high - low > 1
        low = np.where(undecided & read, middle, low)
        high = np.where(undecided & ~read, middle, high)
    kept = keys[low > keys]
    born = np.bincount(kept + 1, minlength=length + 1)
    died = np.bincount(low[kept] + 1, minlength=length + 1)
    return int(np.cumsum(born - died).max(initial=0))


@dataclass(frozen=True, repr=False)
class _Undecided(Pattern):
    """Some queries may read some keys, and nobody says which."""

    def contains(self, q: Positions, k: Positions) -> Verdict:
        pairs = np.broadcast_shapes(q.low.shape, k.low.shape)
        return Bracket(np.zeros(pairs, dtype=np.int64), np.ones(pairs, dtype=np.int64))


@lru_cache(maxsize=256)
def _endless(pattern: Pattern) -> Pattern:
    """Return the pattern for a text without end, where later draws may choose any key."""
    if isinstance(pattern, Random):
        return _Undecided()
    return pattern.rebuilt(tuple(map(_endless, pattern.operands))) if pattern.operands else pattern


def _may_read(pattern: Pattern, keys: Progression, at: int | np.ndarray, until: int | None) -> np.ndarray:
    first = np.asarray(at)
    last = first + _FAR if until is None else np.maximum(first, until - 1)
    if until is None:
        pattern = _endless(pattern)
    bracket = pattern.count(Progression(first, last, (last > first) * 1), keys)
    read = ~np.broadcast_to(bracket.empty, keys.low.shape)
    return read if until is None else read & (first < until)


def _live_positions(pattern: Pattern, at: int, until: int | None) -> np.ndarray:
    """Return the live keys one by one; those far from any that is read are never looked at one by one."""
    first = np.arange(0, at, _ABREAST)
    last = np.minimum(first + _ABREAST, at) - 1
    some = _may_read(pattern, Progression(first, last, (last > first) * 1), at, until)
    places = first[some][:, None] + np.arange(_ABREAST)
    keys = places[places < at]
    return keys[alive(pattern, keys, at=at, until=until)]


def _ranges(positions: np.ndarray) -> tuple[range, ...]:
    """Write ascending positions as progressions, greedily from the first on."""
    found = []
    steps = np.diff(positions)
    changes = np.flatnonzero(np.diff(steps)) + 1
    begin = 0
    while begin < len(positions):
        after = np.searchsorted(changes, begin, side="right")
        end = int(changes[after]) if after < len(changes) else len(positions) - 1
        # Two positions that are no neighbours are better told apart where others follow.
        if end == begin + 1 < len(positions) - 1 and steps[begin] > 1:
            end = begin
        step = int(steps[begin]) if end > begin else 1
        found.append(range(int(positions[begin]), int(positions[end]) + 1, step))
        begin = end + 1
    return tuple(found)
