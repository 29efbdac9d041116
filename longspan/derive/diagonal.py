"""Diagonals: a relation that a shift leaves as it is depends on a distance alone, so one line of pairs tells it all.

Inside its residue classes a strided pattern, or what is left of one beyond a window, is a staircase: each class of
queries reads a class of keys from some distance on. Where that is so, a text of any length is planned by looking at
a few ranges along one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import numpy as np

from longspan.derive.region import undecided
from longspan.pattern import Pattern, Progression

# The largest step of residue classes, and the most pairs of them that are looked at one by one.
_LARGEST, _PAIRS = 1 << 16, 1 << 16
# Into how many ranges a line is cut where a range of it is neither read nor left out.
_CUT = 32


@dataclass(frozen=True)
class Staircases:
    """Pairs of residue classes, each of which is read from some distance on.

    Law: place `i` of class `query_class` (the query of index `query_class + i * step`) reads place `j` of class
    `key_class` exactly where `i - j >= first`, and no other pair is read.

    Attributes:
        step: of the classes, of queries and of keys.
        query_class, key_class, first: int64 arrays, one entry for each pair of classes.
    """

    step: int
    query_class: np.ndarray
    key_class: np.ndarray
    first: np.ndarray


def staircases(term: Pattern, queries: range, keys: range) -> Staircases | None:
    """Return a relation as staircases, or None where it is something else.

    Args:
        term: a relation without sinks, as a region has it.
        queries, keys: positions, not empty.

    Example:
        >>> from longspan.pattern import Causal, Every, Window
        >>> far = Causal() & Every(128) - Window(128)
        >>> found = staircases(far, range(1_048_576), range(1_048_576))
        >>> found.step, len(found.first), set(found.key_class.tolist()), set(found.first.tolist())
        (128, 128, {0}, {1})
    """
    period, (query_step, key_step) = term.period, term.steps
    if period is None or (queries.step, keys.step) != (1, 1):
        return None
    step = lcm(query_step, key_step, period)
    if query_step == 1 < key_step and step <= _LARGEST:
        return _by_key(term, queries, keys, step)
    # Classes beyond those of the residues are no better than the text in order.
    if step == lcm(query_step, key_step):
        return _by_pair(term, queries, keys, step, period)
    return None


def _by_key(term: Pattern, queries: range, keys: range, step: int) -> Staircases | None:
    """Return the staircases of a relation whose neighbouring queries read alike: each key has one first query."""
    residue = _read(term, Progression.of(queries), _classes(keys, step, step), step)
    if len(residue) * step > _PAIRS:
        return None
    # A key far behind, so that the line of its queries holds every distance there is.
    ahead = -(-len(keys) // step)
    start = np.full(len(residue), queries.start)
    found = _first(term, start, 1, len(queries) + ahead * step, keys.start + residue + ahead * step)
    if found is None:
        return None
    classes, first = np.arange(step), found - ahead * step
    query_class, key_class = np.tile(classes, len(residue)), np.repeat(residue, step)
    return Staircases(step, query_class, key_class, -((query_class - np.repeat(first, step)) // step))


def _by_pair(term: Pattern, queries: range, keys: range, step: int, period: int) -> Staircases | None:
    """Return the staircases of a relation of two residues."""
    # A shift by the period turns one pair of classes into another, so some stand for all, at the distances of all.
    rows, columns = (range(side.start, side.stop + 2 * step) for side in (queries, keys))
    a = _read(term, _classes(rows, step, period), Progression.of(columns), period)
    b = _read(term, Progression.of(rows), _classes(columns, step, step), step)
    if len(a) * len(b) > _PAIRS:
        return None
    a, b = np.repeat(a, len(b)), np.tile(b, len(a))
    ahead, places = (-(-len(side) // step) for side in (columns, rows))
    start, key, wide = queries.start + a, keys.start + b + ahead * step, (places + ahead - 1) * step
    line = Progression(start, start + wide, np.full_like(start, step))
    live = _read(term, line, Progression(key, key, np.zeros_like(key)), len(a))
    a, b, start, key = (side[live] for side in (a, b, start, key))
    if len(a) * (step // period) > _PAIRS:
        return None
    if len(a):
        line = Progression(start, start + wide, np.full_like(start, step))
        term = undecided(term, line, Progression(key, key, np.zeros_like(key)))
    found = _first(term, start, step, places + ahead, key)
    if found is None:
        return None
    again = np.arange(step // period)[:, None] * period
    query_class, key_class, first = (
        np.broadcast_to(side, (len(again), len(a))).ravel() for side in (a + again, b + again, found - ahead)
    )
    # A class of keys that begins a step later is the same class with one more key before it.
    later = key_class >= step
    return Staircases(step, query_class, key_class - later * step, first - later)


def _classes(positions: range, step: int, number: int) -> Progression:
    """Return the first residue classes of a range, as progressions."""
    residue = np.arange(min(number, len(positions)))
    places = -(-(len(positions) - residue) // step)
    low = positions.start + residue
    return Progression(low, low + (places - 1) * step, np.where(places > 1, step, 0))


def _read(term: Pattern, q: Progression, k: Progression, number: int) -> np.ndarray:
    """Return which of the rectangles of some queries and keys may hold a pair."""
    empty = term.count(q, k).empty
    longest = max(np.size(q.low), np.size(k.low))
    return np.flatnonzero(~np.broadcast_to(empty, min(number, longest)))


def _first(term: Pattern, start: np.ndarray, step: int, places: int, key: np.ndarray) -> np.ndarray | None:
    """Return for each key the place on its line of queries from which on all of them read it, and none before.

    Where the queries of a line that read its key are not all those from some place on, there is no answer.
    """
    first, last = np.full(len(key), places), np.full(len(key), -1)
    line, begin, end = np.arange(len(key)), np.zeros_like(first), np.full(len(key), places - 1)
    while len(line):
        low, high = start[line] + begin * step, start[line] + end * step
        count = term.count(
            Progression(low, high, np.where(high > low, step, 0)),
            Progression(key[line], key[line], np.zeros_like(line)),
        )
        empty, full = (np.broadcast_to(fact, line.shape) for fact in (count.empty, count.full))
        np.minimum.at(first, line[full], begin[full])
        np.maximum.at(last, line[empty], end[empty])
        open_ = ~(empty | full)
        if (first <= last).any() or (open_ & (begin == end)).any():
            return None
        line, begin, end = line[open_], begin[open_], end[open_]
        size = -(-(end - begin + 1) // _CUT)
        cut = begin[:, None] + np.arange(_CUT) * size[:, None]
        inside = cut <= end[:, None]
        line = np.broadcast_to(line[:, None], cut.shape)[inside]
        end = np.minimum(cut + size[:, None] - 1, end[:, None])[inside]
        begin = cut[inside]
    return first
