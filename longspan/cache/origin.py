"""Origin: the pattern of a text as it is seen from a position inside it, where attention counts from 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longspan.pattern import Pattern
from longspan.pattern.base import Positions, Verdict


@dataclass(frozen=True, repr=False)
class _Moved(Pattern):
    """An atom read from another origin: position 0 is `distance` there."""

    part: Pattern
    distance: int

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return self.part.contains(q + self.distance, k + self.distance)

    def facts(self, q: Positions, k: Positions) -> tuple[np.ndarray, ...]:
        return self.part.signature(q + self.distance, k + self.distance)

    @property
    def period(self) -> int | None:
        return self.part.period

    @property
    def steps(self) -> tuple[int, int]:
        return self.part.steps

    @property
    def lead(self) -> int:
        return self.part.lead

    def __str__(self) -> str:
        return f"{self.part} from {self.distance} on"


def moved(pattern: Pattern, distance: int) -> Pattern:
    """Return the pattern of one head as it is seen from position `distance`, which becomes 0."""
    if pattern.operands:
        return pattern.rebuilt(tuple(moved(part, distance) for part in pattern.operands))
    # Whole periods change nothing, and an unmoved atom is planned once wherever it is read.
    rest = distance % pattern.period if pattern.period else distance
    return _Moved(pattern, rest) if rest else pattern
