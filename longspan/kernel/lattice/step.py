"""Steps: what one token reads of all keys up to its own, which decoding asks for token by token.

Parts of a whole text are not worth looking for when one query is all there is: it reads some runs of keys, and each of
them is a part. Runs are found for many tokens at a time, so that nearly every token finds its own already there.
"""

from __future__ import annotations

from functools import lru_cache
from math import lcm

import numpy as np

from longspan.derive.terms import terms
from longspan.kernel.lattice.parts import Lattice, Part
from longspan.pattern import Pattern
from longspan.pattern.progression import Progression

# Tokens that are looked at together.
AHEAD = 64
# Rectangles of keys that one of them is held against, about, and the fewest keys of one.
_CELLS, _LEAST = 256, 32
# Classes of residues, and runs of one token, up to which runs are worth a call each.
_CLASSES, _MOST = 256, 64
# Pairs that are looked at one by one, all of them and at a time.
_PAIRS, _AT_ONCE = 1 << 22, 1 << 18

# Runs of one token, int64 `[runs, 2]`: the first key and the number of keys.
_Runs = np.ndarray


def step_parts(pattern: Pattern, position: int) -> tuple[Part, ...] | None:
    """Return the parts of one query over `range(position + 1)`, or None where it reads too many runs.

    Law: they hold every pair as often as the pattern of one head counts it.

    Example:
        >>> from longspan.pattern import Causal, Dilated, Sink, Window
        >>> for part in step_parts(Causal() & (Window(4) | Sink(2)), 20):
        ...     print(part.key.start, part.key.places)
        0 2
        17 4
        >>> [part] = step_parts(Causal() & Dilated(3), 20)
        >>> part.key.start, part.key.step, part.key.places
        (2, 3, 7)
    """
    made: list[Part] = []
    for term in _terms(pattern):
        found = _found(term, position // AHEAD)
        if found is None:
            return None
        step, runs = found
        for start, most in runs[position % AHEAD].tolist():
            # Tokens that come later were looked at together with this one.
            places = min(most, (position - start) // step + 1)
            if places > 0:
                key = Lattice(start, step if places > 1 else 1, places, 0, 0)
                made.append(Part(_QUERY, key, (1, 1), None, causal=False, fresh=not made))
    return tuple(made)


_QUERY = Lattice(0, 1, 1, 0, 0)
_terms = lru_cache(maxsize=256)(terms)


@lru_cache(maxsize=256)
def _found(term: Pattern, block: int) -> tuple[int, tuple[_Runs, ...]] | None:
    """Return the distance of keys in a run and the runs of each token of a block, or None where they are too many."""
    step = lcm(*term.steps)
    for each in dict.fromkeys((step, 1) if step <= _CLASSES else (1,)):
        runs = _runs(term, range(block * AHEAD, (block + 1) * AHEAD), each)
        if runs is not None and max(map(len, runs)) <= _MOST:
            return each, runs
    return None


def _runs(term: Pattern, queries: range, step: int) -> tuple[_Runs, ...] | None:
    """Return the runs of each query over the keys up to the last one, or None where too many pairs are to be looked at."""
    low, places = _cells(queries.stop, step)
    verdict = term.contains(
        Progression(*(np.array(queries)[:, None],) * 2, np.zeros((1, 1), dtype=np.int64)),
        Progression(low, low + (places - 1) * step, (places > 1) * step),
    )
    shape = len(queries), len(low)
    query, cell = np.nonzero(np.broadcast_to(verdict.full, shape))
    whole = np.stack([query, low[cell], places[cell]])
    open_ = ~np.broadcast_to(verdict.full | verdict.empty, shape)
    query, cell = np.nonzero(open_)
    if len(query) * places.max() > _PAIRS:
        return None
    at_once = max(1, _AT_ONCE // int(places.max()))
    pieces = [
        _looked(term, queries.start, query[some], low[cell[some]], places[cell[some]], step)
        for some in (slice(begin, begin + at_once) for begin in range(0, len(query), at_once))
    ]
    return _joined(np.concatenate([whole, *pieces], axis=1), len(queries), step)


def _cells(keys: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut every residue class of `range(keys)` into cells: the first key of each, and the number of its keys."""
    size = max(_LEAST, -(-keys // _CELLS))
    classes = np.arange(min(step, keys))[:, None]
    members = -(-(keys - classes) // step)
    begins = np.arange(0, int(members.max()), size)[None, :]
    places = np.clip(members - begins, 0, size)
    return (classes + begins * step)[places > 0], places[places > 0]


def _looked(
    term: Pattern, first: int, query: np.ndarray, low: np.ndarray, places: np.ndarray, step: int
) -> np.ndarray:
    """Return the runs of queries in cells, pair by pair: query, first key and number of keys, `[3, runs]`."""
    column = np.arange(int(places.max()))
    read = term.contains(first + query[:, None], low[:, None] + column * step) & (column < places[:, None])
    edges = np.diff(np.pad(read.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (owner, begin), (_, end) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    return np.stack([query[owner], low[owner] + begin * step, end - begin])


def _joined(runs: np.ndarray, queries: int, step: int) -> tuple[_Runs, ...]:
    """Join runs that continue one another, and give each query its own."""
    query, start, places = runs[:, np.lexsort((runs[1], runs[1] % step, runs[0]))]
    follows = (query[1:] == query[:-1]) & (start[1:] == start[:-1] + places[:-1] * step)
    first = np.flatnonzero(np.append(True, ~follows)[: len(query)])
    total = np.add.reduceat(places, first) if len(first) else places
    ends = np.searchsorted(query[first], np.arange(1, queries))
    return tuple(np.split(np.stack([start[first], total], axis=1), ends))
