"""Staircases: what is read from some distance on, as triangles and rectangles of whole residue classes."""

from __future__ import annotations

import numpy as np

from longspan.derive.diagonal import Staircases
from longspan.kernel.lattice.runs import CAUSAL, PLAIN, Runs, alike

# Places on a side of a rectangle at most, so that what a call gives stays small.
LARGEST = 8_192

# Where rectangles begin and how large they are: queries, keys, rows, columns.
_Shapes = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def triangles(found: Staircases, queries: int, keys: int) -> Runs:
    """Return staircases as one triangle for each pair of classes, and what lies beside and below it.

    Args:
        found: the staircases.
        queries, keys: how many there are.
    """
    step = found.step
    # Queries that read nothing are left out, and keys that all queries read are no part of the triangle.
    without = np.maximum(found.first, 0)
    rows = np.maximum(0, -(-(queries - found.query_class) // step) - without)
    columns = np.maximum(0, -(-(keys - found.key_class) // step))
    # The triangle of a single query is one more key, and that of a single key is one more query.
    single = rows == 1
    shared = np.minimum(np.maximum(-found.first, 0) + single, columns)
    query, key = found.query_class + without * step, found.key_class + shared * step
    read = np.where(single, 0, np.minimum(rows, columns - shared))
    stairs = np.where(columns - shared == 1, 0, read)
    corners = _together((query, key, stairs, stairs))
    below = query + stairs * step, key, rows - stairs, read
    plain = _cut(_together((query, found.key_class, rows, shared), below), step)
    kind = np.repeat([PLAIN, CAUSAL], [len(plain[0]), len(corners[0])])
    query, key, rows, columns = _together(plain, corners)
    look = alike(kind, rows, columns)
    return Runs(
        query, key, rows, columns, kind, look, (step, step), (None,) * (int(look.max(initial=-1)) + 1)
    )


def _together(*shapes: _Shapes) -> _Shapes:
    """Return the shapes that are not empty."""
    query, key, rows, columns = (np.concatenate(side) for side in zip(*shapes, strict=True))
    some = (rows > 0) & (columns > 0)
    return query[some], key[some], rows[some], columns[some]


def _cut(shapes: _Shapes, step: int) -> _Shapes:
    """Cut rectangles that are large."""
    query, key, rows, columns = shapes
    owner, begin, rows = _pieces(rows)
    query, key, columns = query[owner] + begin * step, key[owner], columns[owner]
    owner, begin, columns = _pieces(columns)
    return query[owner], key[owner] + begin * step, rows[owner], columns


def _pieces(places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut stretches of places: which one each piece is of, where in it a piece begins, and its places."""
    number = -(-places // LARGEST)
    owner = np.repeat(np.arange(len(places)), number)
    begin = (np.arange(len(owner)) - np.repeat(np.cumsum(number) - number, number)) * LARGEST
    return owner, begin, np.minimum(LARGEST, places[owner] - begin)
