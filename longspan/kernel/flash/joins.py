"""Joins: neighbouring bands as one, where the rows of each read in the whole what they read alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from longspan.kernel.flash.band import Band
from longspan.kernel.lattice.parts import Lattice


def chained(piece: Band) -> Band:
    """Join the rectangles of a lattice that continue one another, down the outer or the inner level."""
    for level in ("inner", "outer"):
        number = piece.shape[level == "inner"]
        query, key = piece.query, piece.key
        if (
            number == 1
            or getattr(query, level) != query.places * query.step
            or getattr(key, level) % key.step
        ):
            continue
        moved = getattr(key, level) // key.step
        if moved < 0:
            continue
        other = piece.shape[level == "outer"]
        whole = Band(
            Lattice(query.start, query.step, number * query.places, 0, _other(query, level)),
            Lattice(key.start, key.step, (number - 1) * moved + key.places, 0, _other(key, level)),
            (1, other),
            piece.low,
            piece.high,
        )
        # Rectangles in between are like those at the ends, but for the edge that an end has more.
        ends = sorted({0, 1, number // 2, number - 2, number - 1} & set(range(number)))
        if all(_holds(whole, piece, at * query.places, at * moved) for at in ends):
            piece = whole
            if other == 1:
                break
    return piece


def _other(side: Lattice, level: str) -> int:
    return side.outer if level == "inner" else side.inner


def _holds(whole: Band, piece: Band, down: int, right: int) -> bool:
    """Say whether the rows of a piece, so far down and right in a larger one, read there what they read alone."""
    turns = {0, piece.query.places - 1}
    for band, above, before in ((piece, 0, 0), (whole, down, right)):
        for line in (band.low, band.high):
            if line is not None:
                # Where the line meets the sides of either rectangle.
                for side in (0, band.key.places, before, before + piece.key.places):
                    turns |= {side - line - above + step for step in (-2, -1, 0, 1)}
    for row in turns:
        if 0 <= row < piece.query.places:
            alone, within = piece.read(row), whole.read(row + down)
            if alone[0] > alone[1]:
                if within[0] <= within[1]:
                    return False
            elif (alone[0] + right, alone[1] + right) != within:
                return False
    return True


def beside(pieces: Iterable[Band]) -> Iterator[Band]:
    """Join pieces of equal rows whose keys continue one another."""
    rows: dict[tuple[object, ...], list[Band]] = {}
    for piece in pieces:
        key = piece.key
        rows.setdefault((piece.query, piece.shape, key.step, key.outer, key.inner), []).append(piece)
    for neighbours in rows.values():
        neighbours.sort(key=lambda piece: piece.key.start)
        held = neighbours[0]
        for piece in neighbours[1:]:
            joined = _pair(held, piece)
            if joined is None:
                yield held
            held = joined or piece
        yield held


def _pair(left: Band, right: Band) -> Band | None:
    """Return two pieces of equal rows as one, or None."""
    if right.key.start != left.key.start + left.key.places * left.key.step:
        return None
    lows = {left.low, None if right.low is None else right.low + left.key.places}
    highs = {left.high, None if right.high is None else right.high + left.key.places}
    key = replace(left.key, places=left.key.places + right.key.places)
    for low in sorted(lows, key=str):
        for high in sorted(highs, key=str):
            whole = replace(left, key=key, low=low, high=high)
            # Each piece is what the whole leaves of its own columns, and stretches of both touch.
            if all(_part_of(whole, piece, at) for piece, at in ((left, 0), (right, left.key.places))):
                return whole
    return None


def _part_of(whole: Band, piece: Band, right: int) -> bool:
    """Say whether a piece is some columns of a whole with the same rows."""

    def moved(line: int | None) -> int | None:
        return None if line is None else line - right

    cut = replace(piece, low=moved(whole.low), high=moved(whole.high))
    return _holds(cut, piece, 0, 0)


def below(pieces: Iterable[Band]) -> list[Band]:
    """Join pieces whose queries continue one another."""
    done: list[Band] = []
    waiting: dict[tuple[object, ...], list[Band]] = {}

    def place(piece: Band, start: int) -> tuple[object, ...]:
        query, key = piece.query, piece.key
        return (start, query.step, query.outer, query.inner, key.step, key.outer, key.inner, piece.shape)

    for piece in sorted(pieces, key=lambda piece: (piece.query.start, piece.key.start)):
        above = waiting.get(place(piece, piece.query.start), [])
        pairs = ((held, _stacked(held, piece)) for held in above)
        held, joined = next(((held, joined) for held, joined in pairs if joined), (None, piece))
        if held is not None:
            above.remove(held)
            done.remove(held)
        done.append(joined)
        end = joined.query.start + joined.query.places * joined.query.step
        waiting.setdefault(place(joined, end), []).append(joined)
    return done


def _stacked(upper: Band, lower: Band) -> Band | None:
    """Return two pieces, one below the other, as one, or None."""
    step = upper.key.step
    if (upper.key.start - lower.key.start) % step:
        return None
    start = min(upper.key.start, lower.key.start)
    stop = max(side.start + side.places * step for side in (upper.key, lower.key))
    down = (0, upper.query.places)
    right = [(piece.key.start - start) // step for piece in (upper, lower)]
    shifts = [column - row for row, column in zip(down, right, strict=True)]
    lows, highs = (
        {None if line is None else line + shift for line, shift in zip(lines, shifts, strict=True)}
        for lines in ((upper.low, lower.low), (upper.high, lower.high))
    )
    query = replace(upper.query, places=upper.query.places + lower.query.places)
    key = replace(upper.key, start=start, places=(stop - start) // step)
    for low in sorted(lows, key=str):
        for high in sorted(highs, key=str):
            whole = replace(upper, query=query, key=key, low=low, high=high)
            if all(
                _holds(whole, piece, *where)
                for piece, where in zip((upper, lower), zip(down, right, strict=True), strict=True)
            ):
                return whole
    return None


def trimmed(piece: Band) -> Band | None:
    """Return a band without rows and columns that read nothing or are not read, or None where nothing is left.

    Then no line cuts the last row and the last column apart, and windows are 0 or more.
    """
    rows = np.arange(piece.query.places)
    first, last = piece.stretches(rows)
    full = np.flatnonzero(first <= last)
    if not len(full):
        return None
    start, stop = int(full[0]), int(full[-1]) + 1
    begin, end = int(first[start]), int(last[stop - 1]) + 1
    shift = start - begin
    low, high = (None if line is None else line + shift for line in (piece.low, piece.high))
    rows, columns = stop - start, end - begin
    return Band(
        replace(piece.query, start=piece.query.start + start * piece.query.step, places=rows),
        replace(piece.key, start=piece.key.start + begin * piece.key.step, places=columns),
        piece.shape,
        # A line outside of the rectangle limits nothing.
        None if low is None or rows - 1 + low <= 0 else low,
        None if high is None or high >= columns - 1 else high,
    )
