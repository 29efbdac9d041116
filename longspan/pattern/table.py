"""Tables: numbers by position and sets of blocks, read at single positions and over ranges.

What a formula cannot say is given as data. A table answers in the same ways as a formula does: at positions it looks
up, over ranges it searches, so that blocks of a text of a million tokens are found without looking at each token.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from longspan.pattern.progression import Bracket, Progression

# Positions in a table are below this, so that a row of it fits into memory.
MOST = 1 << 31


class Lookup:
    """A number for every position, given one by one; the last of them stands for all later positions.

    Example:
        >>> Lookup(np.array([5, 7, 0]))[np.array([1, 2, 99])].tolist()
        [7, 0, 0]
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self._by_device: dict[torch.device, torch.Tensor] = {}

    def __getitem__(self, positions: Any) -> Any:
        last = len(self.values) - 1
        if isinstance(positions, torch.Tensor):
            return self.on(positions.device)[positions.clamp(max=last)]
        return self.values[np.minimum(positions, last)]

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the table as a tensor on a device, the same one every time."""
        if device not in self._by_device:
            self._by_device[device] = torch.as_tensor(self.values, device=device)
        return self._by_device[device]


class Stretches:
    """A number for every position, the same over stretches of neighbours; the last stretch never ends.

    Args:
        lengths: positions in each stretch but the last, int64, each at least 1.
        values: the number on each stretch, int64, one more than there are lengths.

    Example:
        >>> ids = Stretches(np.array([3, 2]), np.array([0, 1, -1]))
        >>> ids[np.array([0, 2, 3, 5])].tolist()
        [0, 0, 1, -1]
        >>> over = ids[Progression.of(range(1, 4))]
        >>> over.low.item(), over.high.item()
        (0, 1)
    """

    def __init__(self, lengths: np.ndarray, values: np.ndarray) -> None:
        self.ends = np.cumsum(lengths)
        self.values = values
        self._by_position = Lookup(np.append(np.repeat(values[:-1], lengths), values[-1]))

    def __getitem__(self, positions: Any) -> Any:
        if isinstance(positions, Progression):
            low, high = self._extremes(self.index(positions.low), self.index(positions.high))
            return Progression(low, high, np.where(low == high, 0, 1))
        return self._by_position[positions]

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Return which stretch each position lies on."""
        return np.searchsorted(self.ends, positions, side="right")

    @cached_property
    def _pyramid(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The least and largest values of 1, 2, 4, ... stretches from each on."""
        levels = [(self.values, self.values)]
        while len(levels[-1][0]) > 1 << (len(levels) - 1):
            low, high = levels[-1]
            half = 1 << (len(levels) - 1)
            levels.append((np.minimum(low[:-half], low[half:]), np.maximum(high[:-half], high[half:])))
        return levels

    def _extremes(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest value from one stretch to another, both included."""
        first, last = np.broadcast_arrays(first, last)
        low, high = np.empty(first.shape, dtype=np.int64), np.empty(first.shape, dtype=np.int64)
        level = bits(last - first + 1) - 1
        for number in np.unique(level):
            chosen = level == number
            least, largest = self._pyramid[number]
            # Two overlapping runs of a power of two cover the stretches between.
            sides = first[chosen], last[chosen] + 1 - (1 << int(number))
            low[chosen] = np.minimum(*(least[side] for side in sides))
            high[chosen] = np.maximum(*(largest[side] for side in sides))
        return low, high


class Cells:
    """A set of pairs of blocks, read over rectangles of blocks.

    The pairs are kept at every scale: which squares of 1, 2, 4, ... blocks hold any, and how many. A rectangle is read
    at the scale at which at most two by two squares cover it, so the answer costs the same whatever its size, and it
    is exact for one pair of blocks and for squares of the scale.

    Args:
        rows, columns: the pairs, int64 arrays without repetition.

    Example:
        >>> cells = Cells(np.array([0, 5]), np.array([1, 1]))
        >>> edges = [np.array(edge) for edge in ([0, 2, 5], [1, 3, 5], [0, 0, 1], [1, 1, 1])]
        >>> found = cells.over(*edges)
        >>> found.high.tolist(), found.low.tolist()
        ([1, 0, 1], [0, 0, 1])
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray) -> None:
        largest = max(int(rows.max(initial=0)), int(columns.max(initial=0)))
        self._levels = []
        for level in range(int(largest).bit_length() + 1):
            codes = _code(rows >> level, columns >> level)
            self._levels.append(np.unique(codes, return_counts=True))

    def over(self, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray) -> Bracket:
        """Bracket the rectangles from row `top` to `bottom` and column `left` to `right`, all included."""
        top, bottom, left, right = np.broadcast_arrays(top, bottom, left, right)
        low, high = np.zeros(top.shape, dtype=np.int64), np.zeros(top.shape, dtype=np.int64)
        level = np.minimum(bits(np.maximum(bottom - top, right - left)), len(self._levels) - 1)
        for number in np.unique(level):
            chosen = level == number
            corners = [
                self._held(int(number), row[chosen], column[chosen])
                for row in (top, bottom)
                for column in (left, right)
            ]
            high[chosen] = np.max(corners, axis=0) > 0
            low[chosen] = np.min(corners, axis=0) == 1 << (2 * int(number))
        return Bracket(low, high)

    def _held(self, level: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Return how many pairs lie in the squares of a scale that hold these blocks."""
        codes, counts = self._levels[level]
        if not len(codes):
            return np.zeros(row.shape, dtype=np.int64)
        wanted = _code(row >> level, column >> level)
        place = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
        return np.where(codes[place] == wanted, counts[place], 0)


def _code(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return (np.asarray(row, dtype=np.int64) << 32) | column


def bits(numbers: np.ndarray) -> np.ndarray:
    """Return how many binary digits each number has, as `int.bit_length` does, for numbers below 2 ** 53."""
    return np.frexp(np.asarray(numbers, dtype=np.float64))[1]
