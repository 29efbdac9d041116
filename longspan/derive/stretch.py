"""Stretches: a long text whose blocks are those of a short one, with one strip of it over and over."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from longspan.derive.region import Region, strips
from longspan.pattern import Pattern


@dataclass(frozen=True)
class Stretch:
    """How a short text is drawn out to a long one.

    Law: the long text holds the pairs of the short one, but for a strip of `unit` queries and of `unit` keys that comes
    `times` more often; what lies behind the strip lies so much farther on, on both sides.

    Attributes:
        queries, keys: positions of the short text.
        query, key: indices at which the strip begins.
        unit: positions of a strip.
        times: how often the strip comes again; 0 where the short text is the long one.
    """

    queries: range
    keys: range
    query: int = 0
    key: int = 0
    unit: int = 1
    times: int = 0


def shortest(term: Pattern, queries: range, keys: range, *, grid: int) -> Stretch:
    """Return the short text that a text is drawn out from, as far as a relation goes.

    Args:
        term: a relation.
        queries, keys: positions.
        grid: what the indices and the length of a strip are multiples of.

    Example:
        >>> from longspan.pattern import Causal, Window
        >>> found = shortest(Causal() & Window(512), range(1_048_576), range(1_048_576), grid=128)
        >>> found.queries, found.query, found.key, found.unit, found.times
        (range(0, 1664), 1024, 1024, 128, 8179)
    """
    alone = Stretch(queries, keys)
    if term.period is None or (queries.step, keys.step) != (1, 1) or not queries or not keys:
        return alone
    unit = lcm(term.period, grid)
    found = strips(Region(term, 0, 0, queries, keys), unit, queries.start)
    if found is None:
        return alone
    # Whoever reads a key of the strip is in a strip like it; the grid may begin before a strip of keys does.
    reach = max(found.before, found.after) + (found.column % grid > 0)
    times = found.last - found.first - 2 * reach - 1
    if times < 1:
        return alone
    middle = found.first + reach
    return Stretch(
        queries[: len(queries) - times * unit],
        keys[: len(keys) - times * unit],
        middle * unit,
        (found.column + middle * unit) // grid * grid,
        unit,
        times,
    )
