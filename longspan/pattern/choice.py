"""Choices: patterns of whole blocks of keys, listed in a table or drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, reduce
from operator import or_
from typing import Any

import numpy as np

from longspan.errors import PatternError, message
from longspan.pattern.atoms import check_size
from longspan.pattern.base import Positions, Verdict
from longspan.pattern.listing import Listed, integers
from longspan.pattern.progression import Progression
from longspan.pattern.table import Cells, Lookup

# Stands for no block in a table of blocks, before and after all of them.
_NONE, _PAST = -1, 1 << 30


class Blockwise(Listed):
    """An atom in which each block of queries reads some whole blocks of keys."""

    size: int

    def columns(self, row: Any) -> list[Any]:
        """Return the blocks of keys that blocks of queries read, one at a time; what is no block stands for none."""
        raise NotImplementedError

    def rows(self, last: int) -> int:
        """Return how many rows of blocks there are to know, where `last` is the last that is asked for."""
        raise NotImplementedError

    def contains(self, q: Positions, k: Positions) -> Verdict:
        row, column = q // self.size, k // self.size
        if isinstance(row, Progression):
            cells = _cells(self, self.rows(int(row.high.max(initial=0))))
            return cells.over(row.low, row.high, column.low, column.high)
        return reduce(or_, (column == chosen for chosen in self.columns(row)))

    def seen(self, q_low: int, q_high: int, k_low: int, k_high: int) -> bytes:
        row = np.arange(q_low // self.size, q_high // self.size + 1)
        column = np.arange(k_low // self.size, k_high // self.size + 1)
        held = reduce(or_, (column[None] == chosen[:, None] for chosen in self.columns(row)))
        phase = np.array([q_low % self.size, k_low % self.size, *held.shape])
        return phase.tobytes() + held.tobytes()


@lru_cache(maxsize=64)
def _cells(pattern: Blockwise, rows: int) -> Cells:
    """Return the pairs of blocks of the first rows."""
    row = np.arange(rows)
    columns = np.stack(pattern.columns(row))
    held = (columns > _NONE) & (columns < _PAST)
    return Cells(np.broadcast_to(row, columns.shape)[held], columns[held])


@dataclass(frozen=True, repr=False)
class Chosen(Blockwise):
    """Each block of queries reads the blocks of keys that a table lists for it.

        # # . . . .        Chosen(((0,), (0, 2), ()), size=2)
        # # . . . .
        # # . . # #
        # # . . # #
        . . . . . .

    The table is data, made from content where need be: `top_blocks` makes one from queries and keys. Queries past the
    last row of the table read nothing.

    Args:
        blocks: for each block of queries the numbers of the key blocks it reads, in any order.
        size: tokens in a block, of queries and of keys.

    Raises:
        PatternError: blocks that are no integers or negative, a size that is no positive integer.

    Example:
        >>> import torch
        >>> Chosen([[0], [2, 0]], size=2).contains(torch.tensor(3), torch.arange(6)).tolist()
        [True, True, False, False, True, True]
    """

    blocks: tuple[tuple[int, ...], ...] = ()
    size: int = field(default=128, kw_only=True)

    __hash__ = Listed.__hash__

    def __post_init__(self) -> None:
        check_size(self, "size")
        if isinstance(self.blocks, str) or not isinstance(self.blocks, Sequence):
            raise PatternError(
                message(
                    "Chosen takes a list of blocks for each block of queries.",
                    {"got": f"blocks={self.blocks!r}"},
                    fix="Chosen(((0,), (0, 1)), size=128)",
                )
            )
        table = (np.unique(integers(self, "blocks", row)).tolist() for row in self.blocks)
        object.__setattr__(self, "blocks", tuple(tuple(row) for row in table))

    @cached_property
    def _columns(self) -> list[Lookup]:
        widest = max(map(len, self.blocks), default=0)
        table = np.full((max(1, widest), len(self.blocks) + 1), _NONE, dtype=np.int64)
        for row, listed in enumerate(self.blocks):
            table[: len(listed), row] = listed
        return [Lookup(column) for column in table]

    def columns(self, row: Any) -> list[Any]:
        return [column[row] for column in self._columns]

    def rows(self, last: int) -> int:
        return len(self.blocks)


@dataclass(frozen=True, repr=False)
class Random(Blockwise):
    """Each block of queries reads some blocks of keys, drawn at random once and for all.

    Law: the blocks of a row differ from one another and are equally likely. In a text of `of` blocks row `a` draws
    among those strictly between the first and the last that are not `a - 1`, `a` or `a + 1` (row 1 leaves out
    `of - 2`, and row `of - 2` leaves out 1, so that all rows draw among `of - 5`); the first and the last row draw
    none. With `of=0` a row draws among blocks 1 to `a - 2`, so that nothing later is read and the text has no end.
    Rows that cannot draw so many draw what there is.

    Numbers come from an integer hash of `(seed, stream, row, draw)`: the same on every device, in training and
    evaluation.

    Args:
        blocks: how many are drawn for each row, at least 1.
        size: tokens in a block.
        of: how many blocks a text has that is read in both directions; 0 draws among earlier blocks only.
        seed: which draw of all.
        stream: an independent draw of the same seed, such as the number of a head.

    Raises:
        PatternError: an argument that is no integer in its range.

    Example:
        >>> import torch
        >>> read = Random(2, size=1).contains(torch.tensor(9), torch.arange(10)).nonzero()
        >>> len(read), bool((read >= 1).all() and (read <= 7).all())
        (2, True)

    References:
        Zaheer et al., Big Bird (arXiv 2007.14062), section 2 and appendix D.
    """

    blocks: int
    size: int = field(default=64, kw_only=True)
    of: int = field(default=0, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    stream: int = field(default=0, kw_only=True)

    __hash__ = Listed.__hash__

    def __post_init__(self) -> None:
        for name, least in (("blocks", 1), ("size", 1), ("of", 0), ("seed", 0), ("stream", 0)):
            check_size(self, name, least=least)

    def columns(self, row: Any) -> list[Any]:
        free, (before, first, left_out) = self._free(row), self._left_out(row)
        ahead: list[Any] = []
        chosen = []
        for draw in range(self.blocks):
            left = free - draw
            # A number from 0 to `left - 1`, then moved past the numbers that were drawn before it.
            number = (hashed(self.seed, self.stream, draw, row) * (left * (left > 0))) >> 32
            for drawn in ahead:
                number = number + (number >= drawn)
            number = number + _PAST * (left <= 0)
            if draw + 1 < self.blocks:
                ahead = _inserted(ahead, number)
            number = number + before
            chosen.append(number + (number >= first) * left_out if self.of else number)
        return chosen

    def rows(self, last: int) -> int:
        return self.of or 1 << (last + 1).bit_length()

    def _free(self, row: Any) -> Any:
        """Return among how many blocks a row draws."""
        if not self.of:
            return row - 2
        return (self.of - 5) * ((row > 0) & (row < self.of - 1))

    def _left_out(self, row: Any) -> tuple[Any, Any, Any]:
        """Return the first block that a row draws among, where it leaves some out, and how many."""
        if not self.of:
            return 1, 0, 0
        # Rows in the middle leave out three blocks; the first and the last of them begin behind two.
        first = (row - 1) * (row > 1) + (row <= 1)
        return 1 + (row == self.of - 2), first, 3 - (row == 1) * 1


def _inserted(ascending: list[Any], number: Any) -> list[Any]:
    """Return ascending numbers with one more among them, place by place."""
    placed = []
    for before in ascending:
        smaller = (number < before) * 1
        placed.append(before + (number - before) * smaller)
        number = number + (before - number) * smaller
    return [*placed, number]


def hashed(*numbers: Any) -> Any:
    """Return a number from 0 to 2**32 - 1 for some integers or arrays of integers, alike on every device.

    Example:
        >>> hashed(0, 1), hashed(1, 0)
        (1402979721, 3594249154)
    """
    state: Any = 0x9E3779B9
    for number in numbers:
        # Products stay below 2 ** 63, so that signed integers of 64 bits never overflow.
        state = (state ^ (number & 0xFFFFFFFF)) & 0xFFFFFFFF
        for _ in range(2):
            state = ((state ^ (state >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        state = state ^ (state >> 16)
    return state
