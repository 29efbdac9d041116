"""The band: a rectangle whose rows read one stretch of columns each, between two lines along the diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longspan.derive.tiling import SIZE
from longspan.kernel.lattice.parts import Lattice


def distinct(side: Lattice, shape: tuple[int, int]) -> bool:
    """Say whether rectangles are seen to have no place in common: each level reaches over all that is within it."""
    levels = zip((side.step, side.inner, side.outer), (side.places, *shape[::-1]), strict=True)
    reach = 0
    for advance, number in sorted((abs(advance), number) for advance, number in levels if number > 1):
        if advance <= reach:
            return False
        reach += advance * (number - 1)
    return True


@dataclass(frozen=True)
class Band:
    """A lattice of equal rectangles of pairs, in each of which row r reads the columns r + low to r + high.

    ```
    low = -2, high = 0        # . . . .
                              # # . . .
                              # # # . .
                              . # # # .
    ```

    Attributes:
        query, key: where the rectangles lie; no two of them have a query in common, or all have the same.
        shape: how many rectangles, outer and inner.
        low, high: places; None where the rectangle is the only limit on that side.
    """

    query: Lattice
    key: Lattice
    shape: tuple[int, int]
    low: int | None = None
    high: int | None = None

    @property
    def rectangles(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def causal(self) -> bool:
        """Whether it is the lower triangle of a square."""
        return self.low is None and self.high == 0 and self.query.places == self.key.places

    @property
    def apart(self) -> bool:
        """Whether its rectangles are seen to have no key in common."""
        return distinct(self.key, self.shape)

    @property
    def backwards(self) -> bool:
        """Whether a later rectangle has earlier keys, which PyTorch has no views for."""
        advances = zip(self.shape, (self.key.outer, self.key.inner), strict=True)
        return any(number > 1 and advance < 0 for number, advance in advances)

    @property
    def window(self) -> tuple[int, int]:
        """How far back and ahead a row reads, as flash attention counts it: from the diagonal that ends in the last
        row and column; -1 for no limit."""
        ahead = self.key.places - self.query.places
        left = -1 if self.low is None else ahead - self.low
        return left, -1 if self.high is None else self.high - ahead

    def read(self, row: int) -> tuple[int, int]:
        """Return the first and the last column that a row reads; the last is less where there is none."""
        first = 0 if self.low is None else max(0, row + self.low)
        last = self.key.places - 1
        return first, last if self.high is None else min(last, row + self.high)

    def stretches(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the last column of many rows."""
        first, last = np.zeros_like(rows), np.full_like(rows, self.key.places - 1)
        if self.low is not None:
            first = np.maximum(first, rows + self.low)
        if self.high is not None:
            last = np.minimum(last, rows + self.high)
        return first, last

    @cached_property
    def pairs(self) -> int:
        """Pairs of the pattern in this band, exactly."""
        first, last = self.stretches(np.arange(self.query.places))
        return int(np.maximum(0, last - first + 1).sum()) * self.rectangles

    @cached_property
    def area(self) -> int:
        """Pairs that are computed in blocks of 128 by 128 places."""
        rows = np.arange(0, self.query.places, SIZE)
        first, _ = self.stretches(rows)
        _, last = self.stretches(np.minimum(rows + SIZE, self.query.places) - 1)
        return int((last // SIZE - first // SIZE + 1).sum()) * SIZE**2 * self.rectangles

    def __str__(self) -> str:
        kind = "causal" if self.causal else "plain" if self.low is None and self.high is None else "window"
        step = max(self.query.step, self.key.step)
        every = f", every {step}" if step > 1 else ""
        rows = f"{self.query.places:,} {'query' if self.query.places == 1 else 'queries'}"
        columns = f"{self.key.places:,} key{'s' * (self.key.places > 1)}"
        return f"{self.rectangles:,} x {kind:<6} {rows} by {columns}{every}"
