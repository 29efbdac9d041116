"""Steps: what one token reads of all keys up to its own, which decoding asks for token by token.

Parts of a whole text are not worth looking for when one query is all there is: it reads some runs of keys, and each of
them is a part. Runs are found for many tokens at a time, so that nearly every token finds its own already there.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from longspan.derive.terms import terms
from longspan.kernel.lattice.parts import Lattice, Part
from longspan.pattern import Pattern
from longspan.pattern.progression import Progression

# Tokens that are looked at together.
AHEAD = 64
# Cells of keys that each of them is first held against, about, keys of a cell that are looked at one by one, and into
# how many a larger one is split.
_CELLS, _LEAST, _SPLIT = 256, 32, 8
# Classes of residues, cells of all tokens and pairs that are looked at, up to which it is worth the time.
_CLASSES, _RECTANGLES, _PAIRS = 1024, 1 << 18, 1 << 21
# Runs of one token up to which each is worth a call.
_MOST = 16

# Where the one query lies.
_QUERY = Lattice(0, 1, 1, 0, 0)
# Runs of one token, int64 `[runs, 2]`: the first key and the number of keys.
_Runs = np.ndarray


def step_parts(pattern: Pattern, position: int) -> tuple[Part, ...] | None:
    """Return the parts of one query over `range(position + 1)`, or None where it reads too many runs.

    Law: they hold every pair as often as the pattern of one head counts it.

    Example:
        >>> from longspan.pattern import Causal, Dilated, Sink, Window
        >>> for part in step_parts(Causal() & (Window(4) | Sink(2)), 20):
        ...     print(part.key.start, part.key.places)
        17 4
        0 2
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


_terms = lru_cache(maxsize=256)(terms)


@lru_cache(maxsize=1024)
def _found(term: Pattern, block: int) -> tuple[int, tuple[_Runs, ...]] | None:
    """Return the distance of keys in a run and the runs of each token of a block, or None where they are too many."""
    queries, (apart, step) = range(block * AHEAD, (block + 1) * AHEAD), term.steps
    for each in dict.fromkeys((step, 1) if step <= _CLASSES else (1,)):
        runs = _runs(term, queries, min(apart, AHEAD), each)
        if runs is not None and max(map(len, runs)) <= _MOST:
            return each, runs
    return None


def _runs(term: Pattern, queries: range, apart: int, step: int) -> tuple[_Runs, ...] | None:
    """Return the runs of each query over the keys up to the last one, or None where too much is to be looked at.

    Args:
        term: a relation.
        queries: the tokens.
        apart, step: queries of one residue by the first read cells of keys of one residue by the second together.
    """
    # Row c of a table holds the queries c, c + apart, ..., and has -1 where there are no more.
    members = np.arange(-(-len(queries) // apart) * apart).reshape(-1, apart).T
    members = np.where(members < len(queries), members, -1)
    low, places = _cells(queries.stop, step)
    rows = np.repeat(np.arange(apart), len(low))
    low, places = np.tile(low, apart), np.tile(places, apart)
    found = []
    while len(rows):
        first, last = queries.start + rows, queries.start + members[rows].max(axis=1)
        verdict = term.contains(
            Progression(first, last, (last > first) * apart),
            Progression(low, low + (places - 1) * step, (places > 1) * step),
        )
        full = np.broadcast_to(verdict.full, rows.shape)
        query = members[rows[full]]
        owner = np.nonzero(query >= 0)
        found.append(np.stack([query[owner], low[full][owner[0]], places[full][owner[0]]]))
        open_ = ~(full | np.broadcast_to(verdict.empty, rows.shape))
        rows, low, places = rows[open_], low[open_], places[open_]
        if len(rows) * _SPLIT > _RECTANGLES:
            return None
        if places.max(initial=0) <= _LEAST:
            if len(rows) * members.shape[1] * _LEAST > _PAIRS:
                return None
            found.append(_looked(term, queries.start, members[rows], low, places, step))
            break
        size = -(-int(places.max()) // _SPLIT)
        begins = np.arange(_SPLIT) * size
        some = begins < places[:, None]
        rows = np.broadcast_to(rows[:, None], some.shape)[some]
        low, places = (low[:, None] + begins * step)[some], np.minimum(places[:, None] - begins, size)[some]
    return _joined(np.concatenate(found, axis=1), len(queries), step)


def _cells(keys: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut every residue class of `range(keys)` into cells: the first key of each, and the number of its keys."""
    size = max(_LEAST, -(-keys // _CELLS))
    classes = np.arange(min(step, keys))[:, None]
    members = -(-(keys - classes) // step)
    begins = np.arange(0, int(members.max()), size)[None, :]
    places = np.clip(members - begins, 0, size)
    return (classes + begins * step)[places > 0], places[places > 0]


def _looked(
    term: Pattern, first: int, members: np.ndarray, low: np.ndarray, places: np.ndarray, step: int
) -> np.ndarray:
    """Return the runs of queries in cells, pair by pair: query, first key and number of keys, `[3, runs]`.

    Args:
        term: a relation.
        first: position of query 0.
        members: queries that are asked about each cell, `[cells, queries]`, -1 for none.
        low, places, step: keys of the cells.
    """
    cell, place = np.nonzero(members >= 0)
    query, column = members[cell, place], np.arange(int(places.max(initial=0)))
    read = term.contains(first + query[:, None], low[cell][:, None] + column * step)
    read = read & (column < places[cell][:, None])
    edges = np.diff(np.pad(read.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (owner, begin), (_, end) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    return np.stack([query[owner], low[cell[owner]] + begin * step, end - begin])


def _joined(runs: np.ndarray, queries: int, step: int) -> tuple[_Runs, ...]:
    """Join runs that continue one another, and give each query its own."""
    query, start, places = runs[:, np.lexsort((runs[1], runs[1] % step, runs[0]))]
    follows = (query[1:] == query[:-1]) & (start[1:] == start[:-1] + places[:-1] * step)
    first = np.flatnonzero(np.append(True, ~follows)[: len(query)])
    total = np.add.reduceat(places, first) if len(first) else places
    ends = np.searchsorted(query[first], np.arange(1, queries))
    return tuple(np.split(np.stack([start[first], total], axis=1), ends))
