"""The extent of a derivation: which positions the queries and the keys take."""

from __future__ import annotations

from longspan.errors import ShapeError, message


def extent(
    length: int | None = None, queries: range | None = None, keys: range | None = None
) -> tuple[range, range]:
    """Return the ranges of query and key positions.

    Args:
        length: short for `range(length)` on the sides that are not given.
        queries, keys: absolute positions with a positive step.

    Raises:
        ShapeError: a side that is neither given nor follows from `length`; a negative length, position or step.
    """
    if length is not None and length < 0:
        raise ShapeError(
            message("A length is 0 tokens or more.", {"asked": f"length={length}"}, fix="length=1024")
        )
    if length is not None:
        queries = range(length) if queries is None else queries
        keys = range(length) if keys is None else keys
    asked = {"length": str(length), "queries": str(queries), "keys": str(keys)}
    if queries is None or keys is None:
        raise ShapeError(
            message(
                "A pattern is read over a range of queries and a range of keys; one is missing.",
                asked,
                fix="length=1024, or queries=range(512, 1024) and keys=range(1024)",
            )
        )
    if any(side.step < 1 or (len(side) and side[0] < 0) for side in (queries, keys)):
        raise ShapeError(
            message("Positions are 0 or more and grow.", asked, fix="range(start, stop) with start >= 0")
        )
    return queries, keys
