"""Simplify: the laws by which an expression becomes a shorter one that counts the same pairs."""

from __future__ import annotations

from collections.abc import Callable

from longspan.pattern.atoms import (
    Atom,
    Causal,
    Chunk,
    Dilated,
    Every,
    Everything,
    Nothing,
    Prefix,
    Sink,
    Window,
)
from longspan.pattern.base import Complement, Intersection, Pattern, Sum, Transpose, Union
from longspan.pattern.listing import Keys


def simplify(pattern: Pattern) -> Pattern:
    """Return a pattern that counts every pair as often, written with no more parts.

    Law: `simplify(P).count(q, k) == P.count(q, k)` for all positions, and simplifying again changes nothing. Names and
    heads are not looked into.

    Args:
        pattern: any pattern; most is gained on one head of it, as `at_head` returns it.

    Example:
        >>> simplify(Causal() & Window(8) & Every(1) & Window(4) & Causal())
        Causal() & Window(4)
        >>> simplify(~~(Sink(2) | Sink(4)).T)
        Sink(4).T
    """
    pattern = pattern.rebuilt(tuple(map(simplify, pattern.operands)))
    match pattern:
        case Intersection(parts):
            return _joined(Intersection, parts, _both)
        case Union(parts):
            return _joined(Union, parts, _either)
        case Sum(parts):
            return _joined(Sum, parts, _added)
        case Complement(part):
            return _complement(part)
        case Transpose(part):
            return _transpose(part)
    return _atom(pattern)


def once(pattern: Pattern) -> bool:
    """Say whether a pattern surely counts no pair twice; of names and heads nothing is known."""
    if isinstance(pattern, Intersection | Transpose):
        return all(map(once, pattern.operands))
    return isinstance(pattern, Atom | Union | Complement)


def _joined(
    operator: Callable[[tuple[Pattern, ...]], Pattern],
    parts: tuple[Pattern, ...],
    law: Callable[[Pattern, Pattern], Pattern | None],
) -> Pattern:
    """Join parts by an operator, any two of them first by a law where it makes one of them."""
    kept = list(parts)
    while True:
        pairs = ((first, second) for second in range(len(kept)) for first in range(second))
        made = (
            (pair, law(kept[pair[0]], kept[pair[1]]) or law(kept[pair[1]], kept[pair[0]])) for pair in pairs
        )
        (first, second), one = next((found for found in made if found[1] is not None), ((0, 0), None))
        if one is None:
            return kept[0] if len(kept) == 1 else operator(tuple(kept))
        kept[first] = one
        del kept[second]


# The laws, one per line. Those of two parts are tried in both orders.


def _both(one: Pattern, other: Pattern) -> Pattern | None:
    match one, other:
        case part, Everything():
            return part
        case _, Nothing():
            return Nothing()
        case part, same if part == same and once(part):
            return part
        case part, Complement(same) if part == same:
            return Nothing()
        case part, Union(parts) if part in parts:
            return part
        case Window(1), Causal():
            return Window(1)
        case Window(a), Window(b):
            return Window(min(a, b))
        case Sink(a), Sink(b):
            return Sink(min(a, b))
        case Prefix(a), Prefix(b):
            return Prefix(min(a, b))
        case Keys(a), Keys(b):
            return Keys(tuple({*a} & {*b}))
        case Transpose(Sink() | Keys() as a), Transpose(Sink() | Keys() as b):
            made = _both(a, b)
            return made and made.T
    return None


def _either(one: Pattern, other: Pattern) -> Pattern | None:
    match one, other:
        case _, Everything():
            return Everything()
        case part, Nothing() if once(part):
            return part
        case part, same if part == same and once(part):
            return part
        case part, Complement(same) if part == same:
            return Everything()
        case part, Intersection(parts) if part in parts and once(part):
            return part
        case Window(1), Causal():
            return Causal()
        case Window(a), Window(b):
            return Window(max(a, b))
        case Sink(a), Sink(b):
            return Sink(max(a, b))
        case Prefix(a), Prefix(b):
            return Prefix(max(a, b))
        case Keys(a), Keys(b):
            return Keys(a + b)
        case Transpose(Sink() | Keys() as a), Transpose(Sink() | Keys() as b):
            made = _either(a, b)
            return made and made.T
    return None


def _added(one: Pattern, other: Pattern) -> Pattern | None:
    match one, other:
        case part, Nothing():
            return part
    return None


def _complement(part: Pattern) -> Pattern:
    match part:
        case Everything():
            return Nothing()
        case Nothing():
            return Everything()
        case Complement(inner) if once(inner):
            return inner
    return ~part


def _transpose(part: Pattern) -> Pattern:
    match part:
        case Transpose(inner):
            return inner
        case Everything() | Nothing() | Window() | Prefix() | Chunk(shift=0):
            return part
        case Dilated(step, offset=offset):
            return Dilated(step, offset=-offset % step)
    return part.T


def _atom(atom: Pattern) -> Pattern:
    match atom:
        case Every(step, run=run) if run == step:
            return Everything()
        case Dilated(1):
            return Everything()
        case Chunk(1, shift=0):
            return Window(1)
    return atom
