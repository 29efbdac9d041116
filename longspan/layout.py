"""Layout: how the positions of a text lie on ranks, in pure arithmetic.

A shard is what one rank holds: a few pieces, each an arithmetic progression of absolute positions, one after the
other in the tensors of the rank. Its *places* count along those tensors from 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from longspan.errors import ShapeError, message


@dataclass(frozen=True)
class Layout:
    """Which positions each rank holds, and in which order.

    Law: every position from 0 to `length - 1` lies on exactly one rank. The same layout must order the tokens, their
    position ids and their labels.

    Attributes:
        name: "contiguous", "zigzag" or "striped".
        length: tokens of the whole text.
        shards: for each rank its pieces, ranges of positions none of which is empty; a rank may hold none.

    Example:
        >>> layout = zigzag(10, ranks=2)
        >>> layout.shards
        ((range(0, 2), range(7, 10)), (range(2, 5), range(5, 7)))
        >>> layout.positions(0).tolist()
        [0, 1, 7, 8, 9]
    """

    name: str
    length: int
    shards: tuple[tuple[range, ...], ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.shards)

    def places(self, rank: int) -> int:
        """Return how many tokens a rank holds."""
        return sum(map(len, self.shards[rank]))

    def positions(self, rank: int) -> np.ndarray:
        """Return the positions that a rank holds, in its order, int64: what cuts a shard from a whole tensor."""
        return _positions(self.shards[rank])

    def order(self) -> np.ndarray:
        """Return where each position is found in the shards set side by side, int64: what joins them again."""
        return np.argsort(_positions(piece for shard in self.shards for piece in shard))

    def pieces(self, rank: int) -> tuple[range, ...]:
        """Return the places that each piece of a rank takes in its tensors."""
        taken, first = [], 0
        for piece in self.shards[rank]:
            taken.append(range(first, first + len(piece)))
            first += len(piece)
        return tuple(taken)

    def span(self, rank: int, places: range) -> range:
        """Return the positions of some neighbouring places of a rank, which must lie in one piece of it."""
        for piece, taken in zip(self.shards[rank], self.pieces(rank), strict=True):
            if taken.start <= places.start and places.stop <= taken.stop:
                return piece[places.start - taken.start : places.stop - taken.start]
        raise ShapeError(
            message(
                "These places do not lie in one piece of the shard.",
                {
                    "asked": f"places {places.start} to {places.stop} of rank {rank}",
                    "pieces": f"{self.shards[rank]}",
                },
                fix="places inside one of layout.pieces(rank)",
            )
        )

    def within(self, tokens: range | np.ndarray) -> Layout:
        """Return where some tokens of the text lie, which are counted from 0 on: a document, or all but padding.

        Law: `layout.within(tokens).positions(rank)` are the places in `tokens` of those that the rank holds, in the
        order of the rank.

        Args:
            tokens: positions of the text, ascending.

        Example:
            >>> zigzag(10, ranks=2).within(range(1, 9)).shards
            ((range(0, 1), range(6, 8)), (range(1, 4), range(4, 6)))
        """
        if isinstance(tokens, range):
            met = ((_met(piece, tokens) for piece in shard) for shard in self.shards)
            shards = tuple(_held(*(_counted(some, tokens) for some in shard)) for shard in met)
        else:
            shards = tuple(
                tuple(even for piece in shard for even in _even(_found(piece, np.asarray(tokens))))
                for shard in self.shards
            )
        return Layout(f"part of {self.name}", len(tokens), shards)

    def places_of(self, rank: int, tokens: range) -> tuple[range, ...]:
        """Return where the tokens that a rank holds of some lie in its tensors, in the order of `within(tokens)`.

        Example:
            >>> zigzag(10, ranks=2).places_of(0, range(1, 10, 3))
            (range(1, 2, 3), range(2, 3, 3))
        """
        found = []
        for piece, taken in zip(self.shards[rank], self.pieces(rank), strict=True):
            met = _met(piece, tokens)
            if met:
                places = _counted(met, piece)
                found.append(range(taken.start + places.start, taken.start + places.stop, places.step))
        return tuple(found)

    def rows(self, size: int) -> Layout:
        """Return the layout whose ranks each hold what `size` neighbouring ranks of this one hold.

        Example:
            >>> contiguous(8, ranks=4).rows(2).shards
            ((range(0, 4),), (range(4, 8),))
        """
        shards = (self.shards[first : first + size] for first in range(0, self.ranks, size))
        joined = tuple(_joined([piece for shard in row for piece in shard]) for row in shards)
        return Layout(f"{self.name} by {size}", self.length, joined)

    def __str__(self) -> str:
        return f"{self.name}, {self.length:,} tokens on {self.ranks:,} ranks"


def _positions(pieces: Iterable[range]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(piece) for piece in pieces)])


def _met(one: range, other: range) -> range:
    """Return what two progressions have in common."""
    common = math.gcd(one.step, other.step)
    if (other.start - one.start) % common or not (one and other):
        return range(0)
    step = one.step // common * other.step
    # Chinese remainders: the first number from `one.start` on that lies in both.
    turns = (other.start - one.start) // common * pow(one.step // common, -1, other.step // common)
    first = one.start + one.step * (turns % (other.step // common))
    # Both must have begun.
    first += max(0, -((first - other.start) // step)) * step
    return range(first, max(first, min(one.stop, other.stop)), step)


def _counted(some: range, tokens: range) -> range:
    """Return the places that some of the tokens have among them."""
    if not some:
        return range(0)
    first, last = ((position - tokens.start) // tokens.step for position in (some[0], some[-1]))
    return range(first, last + 1, some.step // tokens.step)


def _joined(pieces: list[range]) -> tuple[range, ...]:
    """Return pieces in the order of the text, neighbours as one."""
    made: list[range] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if made and made[-1].step == piece.step == 1 and made[-1].stop == piece.start:
            made[-1] = range(made[-1].start, piece.stop)
        else:
            made.append(piece)
    return tuple(made)


def _found(piece: range, tokens: np.ndarray) -> np.ndarray:
    """Return the places in `tokens` of those that lie in a piece."""
    near = np.flatnonzero((tokens >= piece.start) & (tokens < piece.stop))
    return near[(tokens[near] - piece.start) % piece.step == 0]


def _even(numbers: np.ndarray) -> Iterator[range]:
    """Cut ascending numbers into progressions."""
    apart = np.diff(numbers)
    first = 0
    while first < len(numbers):
        step = int(apart[first]) if first < len(apart) else 1
        uneven = np.flatnonzero(apart[first:] != step)
        last = first + int(uneven[0]) if len(uneven) else len(numbers) - 1
        yield range(int(numbers[first]), int(numbers[last]) + 1, step)
        first = last + 1


def contiguous(length: int, ranks: int) -> Layout:
    """Give each rank neighbouring positions: rank r holds `length * r // ranks` up to `length * (r + 1) // ranks`.

    Args:
        length: tokens of the whole text, 0 or more; `ranks` need not divide it.
        ranks: number of ranks, 1 or more.

    Raises:
        ShapeError: a negative length, no ranks.

    Example:
        >>> contiguous(10, ranks=3).shards
        ((range(0, 3),), (range(3, 6),), (range(6, 10),))
    """
    _check(length, ranks)
    return Layout("contiguous", length, tuple(_held(chunk) for chunk in _chunks(length, ranks)))


def zigzag(length: int, ranks: int) -> Layout:
    """Give each rank one chunk from the front and the one as far from the end: causal work is the same on all.

    The text is cut into `2 * ranks` chunks, and rank r holds chunks r and `2 * ranks - 1 - r`. Arguments and errors
    as for `contiguous`.

    References:
        Zhu, ring-flash-attention (github.com/zhuzilin/ring-flash-attention), zigzag.
    """
    _check(length, ranks)
    chunks = _chunks(length, 2 * ranks)
    return Layout("zigzag", length, tuple(_held(chunks[r], chunks[-1 - r]) for r in range(ranks)))


def striped(length: int, ranks: int) -> Layout:
    """Give rank r the positions r, `r + ranks`, `r + 2 * ranks`, ...: causal work is the same on all to a token.

    A dilated pattern whose step is a multiple of `ranks` then needs nothing from other ranks. Arguments and errors as
    for `contiguous`.

    Example:
        >>> striped(10, ranks=4).shards[1]
        (range(1, 10, 4),)

    References:
        Brandon et al., Striped Attention (arXiv 2311.09431), section 3.
    """
    _check(length, ranks)
    return Layout("striped", length, tuple(_held(range(r, length, ranks)) for r in range(ranks)))


def _chunks(length: int, number: int) -> list[range]:
    return [range(length * n // number, length * (n + 1) // number) for n in range(number)]


def _held(*pieces: range) -> tuple[range, ...]:
    return tuple(piece for piece in pieces if piece)


def _check(length: int, ranks: int) -> None:
    if length < 0 or ranks < 1:
        raise ShapeError(
            message(
                "A layout lays 0 or more tokens on 1 or more ranks.",
                {"asked": f"length={length}, ranks={ranks}"},
                fix="zigzag(32768, ranks=8)",
            )
        )
