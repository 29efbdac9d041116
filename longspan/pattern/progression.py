"""The range reading: a formula evaluated on arithmetic progressions of positions instead of positions.

A `Progression` stands for every value `low, low + step, ..., high` at once, and a comparison of two of them
answers with a `Bracket`: the least and the most that any pair drawn from them can give. Arithmetic may widen
a progression, never narrow it, so a bracket is always sound: `high == 0` proves a rectangle of pairs empty
and `low >= 1` proves it full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Integers = np.ndarray


@dataclass(frozen=True)
class Bracket:
    """Bounds `low <= count <= high` on a count that is taken over a whole rectangle of pairs.

    Truth values are counts of 0 or 1, so `&`, `|` and `~` on brackets are three-valued logic. Both bounds are
    int64 arrays, one entry per rectangle.
    """

    low: Integers
    high: Integers

    def __and__(self, other: Bracket) -> Bracket:
        return Bracket(np.minimum(self.low, other.low), np.minimum(self.high, other.high))

    def __or__(self, other: Bracket) -> Bracket:
        return Bracket(np.maximum(self.low, other.low), np.maximum(self.high, other.high))

    def __invert__(self) -> Bracket:
        return Bracket((self.high == 0) * 1, (self.low == 0) * 1)

    def __add__(self, other: Bracket) -> Bracket:
        return Bracket(self.low + other.low, self.high + other.high)

    def __mul__(self, other: Bracket | int) -> Bracket:
        if isinstance(other, int):
            return Bracket(self.low * other, self.high * other)
        return Bracket(self.low * other.low, self.high * other.high)

    @property
    def empty(self) -> np.ndarray:
        """Bool array: rectangles proven to hold no pair."""
        return self.high == 0

    @property
    def full(self) -> np.ndarray:
        """Bool array: rectangles proven to hold every pair."""
        return self.low >= 1


@dataclass(frozen=True, eq=False)
class Progression:
    """All of `low, low + step, ..., high`, for many progressions at once.

    Attributes:
        low, high: int64 arrays that broadcast against each other; `high - low` is a multiple of `step`.
        step: int64 array; 0 stands for a single value.

    Example:
        >>> queries = Progression.of(range(0, 128))
        >>> keys = Progression.of(range(512, 640))
        >>> (keys <= queries).empty.item(), (queries - keys < 0).full.item()
        (True, True)
        >>> (Progression.of(range(1, 90, 3)) % 3 == 1).full.item()
        True
    """

    low: Integers
    high: Integers
    step: Integers

    @classmethod
    def of(cls, positions: range) -> Progression:
        """Return one range of positions, read as a progression."""
        low, high = np.asarray(positions[0]), np.asarray(positions[-1])
        return cls(low, high, np.asarray(positions.step if len(positions) > 1 else 0))

    def __add__(self, other: Progression | int) -> Progression:
        if isinstance(other, int):
            return Progression(self.low + other, self.high + other, self.step)
        return Progression(self.low + other.low, self.high + other.high, np.gcd(self.step, other.step))

    def __neg__(self) -> Progression:
        return Progression(-self.high, -self.low, self.step)

    def __sub__(self, other: Progression | int) -> Progression:
        return self + (-other)

    def __floordiv__(self, divisor: int) -> Progression:
        low, high = self.low // divisor, self.high // divisor
        step = np.where(self.step % divisor == 0, self.step // divisor, 1)
        return Progression(low, high, np.where(low == high, 0, step))

    def __mod__(self, divisor: int) -> Progression:
        constant = self.step % divisor == 0
        period = self.low // divisor
        same_period = period == self.high // divisor
        # Across periods only the residue modulo gcd(step, divisor) is known.
        known = np.gcd(self.step, divisor)
        first = self.low % known
        low = np.where(
            constant, self.low % divisor, np.where(same_period, self.low - period * divisor, first)
        )
        high = np.where(same_period, self.high - period * divisor, divisor - known + first)
        step = np.where(same_period, self.step, known)
        return Progression(low, np.where(constant, low, high), np.where(constant, 0, step))

    def __abs__(self) -> Progression:
        across = (self.low < 0) & (self.high > 0)
        farthest = np.maximum(abs(self.low), abs(self.high))
        nearest = np.where(across, 0, np.minimum(abs(self.low), abs(self.high)))
        return Progression(nearest, farthest, np.where(across & (self.step > 0), 1, self.step))

    def __lt__(self, other: Progression | int) -> Bracket:
        apart = self - other
        return Bracket((apart.high < 0) * 1, (apart.low < 0) * 1)

    def __le__(self, other: Progression | int) -> Bracket:
        return self - 1 < other

    def __gt__(self, other: Progression | int) -> Bracket:
        return ~(self <= other)

    def __ge__(self, other: Progression | int) -> Bracket:
        return ~(self < other)

    def __eq__(self, other: Any) -> Bracket:  # type: ignore[override]
        apart = self - other
        inside = (apart.low <= 0) & (apart.high >= 0)
        aligned = apart.low % np.maximum(apart.step, 1) == 0
        return Bracket(((apart.low == 0) & (apart.high == 0)) * 1, (inside & aligned) * 1)

    def __ne__(self, other: Any) -> Bracket:  # type: ignore[override]
        return ~(self == other)

    # Comparing gives a bracket, so there is no equality that a hash could agree with.
    __hash__ = None  # type: ignore[assignment]
