"""Bands: the parts of a pattern joined into what flash attention takes, a window over a strided view.

A band is a rectangle whose rows read a stretch of keys that begins at a fixed place or moves on by one place a row,
and ends likewise. Dense attention, causal attention and a sliding window are bands, in any layout. Where the parts
cut a long band into rows of blocks, as a CPU likes them, they are joined again, so that one call does all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from longspan.kernel.flash.band import Band, distinct
from longspan.kernel.flash.joins import below, beside, chained, trimmed
from longspan.kernel.lattice.calls import HeadGroup
from longspan.kernel.lattice.numbers import named
from longspan.kernel.lattice.parts import Lattice, Part

# Parts and bands of one group of heads that are looked at, at most: each is a call.
MOST = 256
_TOO_MANY = f"takes bands, and this is more than {MOST} of them"
# Rectangles of a lattice that are looked at one by one, at most.
FEW = 64


@dataclass(frozen=True, eq=False)
class BandGroup:
    """Heads that read alike, at regular distances, and the bands that they read by."""

    heads: range
    bands: tuple[Band, ...]

    def __str__(self) -> str:
        lines = map(str, self.bands) if self.bands else [f"read{'s' * (len(self.heads) < 2)} nothing"]
        return "\n".join([f"  {named(self.heads)}", *(f"    {line}" for line in lines)])


@lru_cache(maxsize=256)
def band_groups(groups: tuple[HeadGroup, ...]) -> tuple[BandGroup, ...] | str:
    """Return the bands of groups of heads, or say what is no band.

    Law: the bands of a group hold every pair as often as its parts do.

    Example:
        >>> from longspan.kernel.lattice.parts import parts
        >>> from longspan.pattern import Causal, Window
        >>> alone = HeadGroup(range(1), parts(Causal() & Window(512), range(8192), range(8192)))
        >>> [group] = band_groups((alone,))
        >>> print(*group.bands)
        1 x window 8,192 queries by 8,192 keys
        >>> group.bands[0].window
        (511, 0)
    """
    known: dict[tuple[Part, ...], tuple[Band, ...] | str] = {}
    made = []
    for group in groups:
        if group.parts not in known:
            known[group.parts] = bands(group.parts)
        found = known[group.parts]
        if isinstance(found, str):
            return found
        made.append(BandGroup(group.heads, found))
    return tuple(made)


def bands(parts: Sequence[Part]) -> tuple[Band, ...] | str:
    """Return the bands of one head, or say what is no band."""
    pieces: list[Band] = []
    for part in parts:
        cut = list(_pieces(part))
        if len(pieces) + len(cut) > MOST:
            return _TOO_MANY
        pieces += cut
    whole, single = [], []
    for piece in map(chained, beside(map(chained, pieces))):
        # Rows of blocks that were put together for looking alike, where their neighbours look different, and what no
        # view reads in one.
        apart = 1 < piece.rectangles <= FEW or piece.backwards
        (single if piece.rectangles == 1 or apart else whole).extend(_apart(piece) if apart else [piece])
    joined = map(trimmed, below(beside(single)))
    made = [*map(trimmed, whole), *_together(piece for piece in joined if piece)]
    found = tuple(piece for piece in made if piece)
    return found if len(found) <= MOST else _TOO_MANY


def _apart(piece: Band) -> Iterator[Band]:
    """Yield the rectangles of a lattice, each for itself."""
    for outer in range(piece.shape[0]):
        for inner in range(piece.shape[1]):
            query, key = (
                Lattice(side.start + outer * side.outer + inner * side.inner, side.step, side.places, 0, 0)
                for side in (piece.query, piece.key)
            )
            yield replace(piece, query=query, key=key, shape=(1, 1))


def _together(pieces: Iterable[Band]) -> Iterator[Band]:
    """Put equal bands at regular distances into one lattice."""
    alike: dict[tuple[object, ...], list[Band]] = {}
    for piece in pieces:
        query, key = piece.query, piece.key
        looks = (query.places, query.step, key.places, key.step, piece.low, piece.high)
        alike.setdefault(looks, []).append(piece)
    for equal in alike.values():
        equal.sort(key=lambda piece: (piece.query.start, piece.key.start))
        while equal:
            starts = np.array([(piece.query.start, piece.key.start) for piece in equal])
            jumps = np.diff(starts, axis=0)
            regular = (jumps == jumps[:1]).all(axis=1)
            number = 1 + int(np.append(regular, False).argmin())
            query, key = equal[0].query, equal[0].key
            if number > 1:
                moved = replace(query, inner=int(jumps[0, 0]))
                if distinct(moved, (1, number)) and jumps[0, 1] >= 0:
                    query, key = moved, replace(key, inner=int(jumps[0, 1]))
                else:
                    number = 1
            yield replace(equal[0], query=query, key=key, shape=(1, number))
            equal[:number] = []


def _pieces(part: Part) -> Iterator[Band]:
    """Cut a part into bands."""
    if part.key.at is not None:
        # Keys at no regular distances are no view, so each rectangle stands for itself.
        for number, begin in enumerate(part.key.at.tolist()):
            query = replace(part.query, start=part.query.start + number * part.query.inner, inner=0)
            key = replace(part.key, start=part.key.start + begin, at=None)
            yield from _pieces(replace(part, query=query, key=key, shape=(1, 1)))
        return
    whole = Band(part.query, part.key, part.shape, high=0 if part.causal else None)
    if part.allowed is None:
        yield whole
        return
    for rows, first, last in _stretches(part.allowed):
        yield _piece(whole, rows, first, last)


def _stretches(allowed: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut a mask into pieces whose rows read one stretch of columns each, between lines.

    Yields rows, and the first and last column of each.
    """
    holes = np.diff(np.pad(allowed.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    begins, ends = np.nonzero(holes == 1), np.nonzero(holes == -1)
    # A row of several stretches is in as many pieces: its n-th stretch goes with the n-th ones around it.
    rows, first, last = begins[0], begins[1], ends[1] - 1
    number = np.arange(len(rows)) - np.searchsorted(rows, rows)
    for chosen in range(int(number.max(initial=-1)) + 1):
        at = np.flatnonzero(number == chosen)
        yield from _lines(rows[at], first[at], last[at])


def _lines(
    rows: np.ndarray, first: np.ndarray, last: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut rows of one stretch each where the edges of the stretches bend the wrong way."""
    down, left, right = np.diff(rows), np.diff(first), np.diff(last)
    breaks = (down != 1) | (left < 0) | (left > 1) | (right < 0) | (right > 1)
    # The first columns stay and then move on; the last ones move on and then stay.
    bends = (left[:-1] > left[1:]) | (right[:-1] < right[1:])
    breaks[1:] |= bends & ~breaks[:-1]
    for piece in np.split(np.arange(len(rows)), np.flatnonzero(breaks) + 1):
        yield rows[piece], first[piece], last[piece]


def _piece(whole: Band, rows: np.ndarray, first: np.ndarray, last: np.ndarray) -> Band:
    """Return some rows of a part, with rows around them that lines leave empty, so that neighbours fit."""
    query, key = whole.query, whole.key
    low = int(first[-1] - rows[-1]) if first[-1] > first[0] else None
    high = int(last[0] - rows[0]) if last[-1] > last[0] else None
    start, stop = int(rows[0]), int(rows[-1]) + 1
    begin, end = int(first[0]), int(last[-1]) + 1
    if stop < query.places and low is not None and stop + low >= end:
        stop = query.places
    if start > 0 and high is not None and start - 1 + high < begin:
        start = 0
    return Band(
        replace(query, start=query.start + start * query.step, places=stop - start),
        replace(key, start=key.start + begin * key.step, places=end - begin),
        whole.shape,
        None if low is None else low + start - begin,
        None if high is None else high + start - begin,
    )
