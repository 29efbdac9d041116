"""A pattern and its algebra.

A pattern has one formula, `contains(q, k)`, in ordinary arithmetic on absolute integer positions. The formula
is read in several ways: on integer tensors it is the definition, on progressions (`progression.py`) it decides
whole rectangles at once. Operators build bigger formulas out of smaller ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add, and_, mul, or_
from typing import Any, ClassVar

import numpy as np

from longspan.errors import PatternError, message
from longspan.pattern.progression import Progression

# What a formula takes (integer tensors, arrays or progressions) and gives (bool tensors, arrays or brackets).
Positions = Any
Verdict = Any
Counts = Any


class Pattern:
    """Which keys each query reads, and how often.

    Law: a pattern is its counts, `count(q, k) >= 0` for every pair of positions; a pair counted c times weighs
    `c * exp(score)` in the softmax. Patterns are immutable, hashable values; equal expressions are equal.

    | expression | a pair counts                                   |
    |------------|-------------------------------------------------|
    | `P & Q`    | count in P times count in Q                     |
    | `P \\| Q`   | once, where it is in P or in Q                  |
    | `~P`       | once, where it is not in P                      |
    | `P - Q`    | as in P, where it is not in Q                   |
    | `P + Q`    | count in P plus count in Q (a multiset sum)     |
    | `P.T`      | as the pair with query and key exchanged        |
    """

    # How tightly the expression binds when printed; atoms and calls bind tightest.
    precedence: ClassVar[int] = 9

    def contains(self, q: Positions, k: Positions) -> Verdict:
        """Say for positions `q` and `k` (integer tensors that broadcast) whether `q` reads `k`."""
        raise NotImplementedError

    def count(self, q: Positions, k: Positions) -> Counts:
        """Return how often `q` reads `k`; 0 or 1 unless the pattern holds a multiset sum."""
        return self.contains(q, k) * 1

    def at_head(self, head: int, heads: int) -> Pattern:
        """Return what one of `heads` heads reads, as a tree of atoms and operators without heads or names."""
        return self.rebuilt(tuple(part.at_head(head, heads) for part in self.operands))

    @property
    def operands(self) -> tuple[Pattern, ...]:
        """The patterns that this one is made of."""
        return ()

    def rebuilt(self, operands: tuple[Pattern, ...]) -> Pattern:
        """Return the same operator over other operands."""
        return self

    @property
    def period(self) -> int | None:
        """A shift of query and key together that changes no pair, or None where there is none."""
        periods = [part.period for part in self.operands]
        return None if None in periods else math.lcm(*(p for p in periods if p))

    def signature(self, q: Progression, k: Progression) -> tuple[np.ndarray, ...]:
        """Return numbers that tell rectangles of pairs apart by what they hold.

        Law: two rectangles of equally many places and equal steps on both sides, read in one call, whose numbers are
        all equal hold the same pairs, each at the same place. The reverse need not hold.

        Args:
            q, k: the queries and keys of many rectangles.

        Returns:
            int64 arrays, one entry per rectangle.
        """
        verdict = self.contains(q, k)
        decided = verdict.empty | verdict.full
        # Proven empty or full says it all, wherever the rectangle lies.
        facts = (np.where(decided, 0, fact) for fact in self.facts(q, k))
        return (verdict.low + verdict.high, *facts)

    def facts(self, q: Progression, k: Progression) -> tuple[np.ndarray, ...]:
        """Return the numbers of `signature` for rectangles that are neither empty nor full."""
        return tuple(fact for part in self.operands for fact in part.signature(q, k))

    @property
    def steps(self) -> tuple[int, int]:
        """Steps of the query and key progressions in which the pattern may be dense."""
        return (1, 1)

    @property
    def lead(self) -> int:
        """How many first queries to set apart so that the classes of `steps` begin side by side."""
        return 0

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(_flat(Intersection, self, other))

    def __or__(self, other: Pattern) -> Pattern:
        return Union(_flat(Union, self, other))

    def __add__(self, other: Pattern) -> Pattern:
        return Sum(_flat(Sum, self, other))

    def __sub__(self, other: Pattern) -> Pattern:
        return self & ~other

    def __invert__(self) -> Pattern:
        return Complement(self)

    @property
    def T(self) -> Pattern:
        """The pattern with query and key exchanged."""
        return Transpose(self)

    def __str__(self) -> str:
        given = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value != field.default:
                given.append(f"{value!r}" if field.kw_only is False else f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"

    def __repr__(self) -> str:
        return str(self)


def _flat(operator: type, *parts: Pattern) -> tuple[Pattern, ...]:
    """Return operands with nested uses of the same operator opened: all of ours are associative."""
    operands: list[Pattern] = []
    for part in parts:
        if not isinstance(part, Pattern):
            raise PatternError(
                message(
                    "An operator joins two patterns.",
                    {"asked": f"{operator.__name__} with {part!r}", "got": type(part).__name__},
                    fix="a pattern on both sides, such as Causal() & Window(512)",
                )
            )
        operands.extend(part.operands if isinstance(part, operator) else (part,))
    return tuple(operands)


def _joined(parts: Sequence[Pattern], symbol: str, precedence: int) -> str:
    return f" {symbol} ".join(f"({part})" if part.precedence <= precedence else str(part) for part in parts)


@dataclass(frozen=True, repr=False)
class Intersection(Pattern):
    """`P & Q`: counts multiply."""

    parts: tuple[Pattern, ...]
    precedence: ClassVar[int] = 5

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return reduce(and_, (part.contains(q, k) for part in self.parts))

    def count(self, q: Positions, k: Positions) -> Counts:
        return reduce(mul, (part.count(q, k) for part in self.parts))

    @property
    def operands(self) -> tuple[Pattern, ...]:
        return self.parts

    def rebuilt(self, operands: tuple[Pattern, ...]) -> Pattern:
        return Intersection(_flat(Intersection, *operands))

    @property
    def steps(self) -> tuple[int, int]:
        steps = [part.steps for part in self.parts]
        return (math.lcm(*(q for q, _ in steps)), math.lcm(*(k for _, k in steps)))

    @property
    def lead(self) -> int:
        return max(part.lead for part in self.parts)

    def __str__(self) -> str:
        return _joined(self.parts, "&", self.precedence)


@dataclass(frozen=True, repr=False)
class Union(Pattern):
    """`P | Q`: a pair counts once, in however many parts it is."""

    parts: tuple[Pattern, ...]
    precedence: ClassVar[int] = 3

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return reduce(or_, (part.contains(q, k) for part in self.parts))

    @property
    def operands(self) -> tuple[Pattern, ...]:
        return self.parts

    def rebuilt(self, operands: tuple[Pattern, ...]) -> Pattern:
        return Union(_flat(Union, *operands))

    def __str__(self) -> str:
        return _joined(self.parts, "|", self.precedence)


@dataclass(frozen=True, repr=False)
class Sum(Pattern):
    """`P + Q`: counts add."""

    parts: tuple[Pattern, ...]
    precedence: ClassVar[int] = 7

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return reduce(or_, (part.contains(q, k) for part in self.parts))

    def count(self, q: Positions, k: Positions) -> Counts:
        return reduce(add, (part.count(q, k) for part in self.parts))

    @property
    def operands(self) -> tuple[Pattern, ...]:
        return self.parts

    def rebuilt(self, operands: tuple[Pattern, ...]) -> Pattern:
        return Sum(_flat(Sum, *operands))

    def __str__(self) -> str:
        return _joined(self.parts, "+", self.precedence)


@dataclass(frozen=True, repr=False)
class Complement(Pattern):
    """`~P`: the pairs that are not in P."""

    part: Pattern
    precedence: ClassVar[int] = 8

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return ~self.part.contains(q, k)

    @property
    def operands(self) -> tuple[Pattern, ...]:
        return (self.part,)

    def rebuilt(self, operands: tuple[Pattern, ...]) -> Pattern:
        return Complement(*operands)

    def __str__(self) -> str:
        return f"~({self.part})" if self.part.precedence < self.precedence else f"~{self.part}"


@dataclass(frozen=True, repr=False)
class Transpose(Pattern):
    """`P.T`: query and key exchanged."""

    part: Pattern

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return self.part.contains(k, q)

    def count(self, q: Positions, k: Positions) -> Counts:
        return self.part.count(k, q)

    def facts(self, q: Progression, k: Progression) -> tuple[np.ndarray, ...]:
        return self.part.facts(k, q)

    @property
    def operands(self) -> tuple[Pattern, ...]:
        return (self.part,)

    def rebuilt(self, operands: tuple[Pattern, ...]) -> Pattern:
        return Transpose(*operands)

    @property
    def steps(self) -> tuple[int, int]:
        return self.part.steps[::-1]

    def __str__(self) -> str:
        return f"({self.part}).T" if self.part.precedence < self.precedence else f"{self.part}.T"


@dataclass(frozen=True, repr=False, init=False)
class PerHead(Pattern):
    """Different heads read by different patterns.

    Law: the heads are divided into as many equal groups of neighbours as there are parts, and within its group
    a head counts from 0; `PerHead([P, Q])` with 8 heads gives heads 0 to 3 `P` and heads 4 to 7 `Q`.

    Args:
        parts: one pattern per group of heads.

    Raises:
        PatternError: no parts, or (when read) a number of heads that the parts do not divide.

    Example:
        >>> from longspan.pattern import Causal, Window
        >>> pattern = PerHead([Causal(), Causal() & Window(4)])
        >>> pattern.at_head(5, heads=8)
        Causal() & Window(4)
    """

    parts: tuple[Pattern, ...]

    def __init__(self, parts: Sequence[Pattern]) -> None:
        listed = isinstance(parts, (list, tuple)) and len(parts) > 0
        if not listed or not all(isinstance(part, Pattern) for part in parts):
            raise PatternError(
                message(
                    "PerHead takes a list of patterns, one per group of heads.",
                    {"got": repr(parts)},
                    fix="PerHead([Causal(), Causal() & Window(512)])",
                )
            )
        object.__setattr__(self, "parts", tuple(parts))

    def contains(self, q: Positions, k: Positions) -> Verdict:
        raise needs_head(self)

    def at_head(self, head: int, heads: int) -> Pattern:
        group, left_over = divmod(heads, len(self.parts))
        if left_over:
            raise PatternError(
                message(
                    "The heads cannot be divided equally among the parts of this pattern.",
                    {"pattern": str(self), "parts": str(len(self.parts)), "heads": str(heads)},
                    fix="a number of parts that divides the number of heads",
                )
            )
        return self.parts[head // group].at_head(head % group, group)

    @property
    def operands(self) -> tuple[Pattern, ...]:
        return self.parts

    def rebuilt(self, operands: tuple[Pattern, ...]) -> Pattern:
        return PerHead(operands)

    def __str__(self) -> str:
        return f"PerHead([{', '.join(map(str, self.parts))}])"


def needs_head(pattern: Pattern) -> PatternError:
    """Return the error of reading a pattern whose heads differ as if it had one relation."""
    return PatternError(
        message(
            "This pattern differs from head to head, so it has no single relation.",
            {"pattern": str(pattern)},
            fix="pattern.at_head(head, heads), or name the number of heads where one is asked for",
        )
    )
