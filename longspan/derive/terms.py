"""Terms: a pattern as a sum of relations, each simple enough to have one good layout.

Attention over a sum is a merge of attentions (law 2), so a pattern may be cut into terms freely as long as their
counts add up to its own. Multiset sums are cut because only then is every term a plain relation; unions are cut
where their parts want different layouts, such as a window beside a dilated pattern.
"""

from __future__ import annotations

from functools import reduce
from itertools import product
from operator import and_, or_

from longspan.pattern import Intersection, Nothing, Pattern, Sum, Transpose, Union, simplify


def terms(pattern: Pattern) -> tuple[Pattern, ...]:
    """Cut the pattern of one head into relations whose counts add up to its own.

    Law: `pattern.count(q, k) == sum(term.contains(q, k) for term in terms(pattern))` for every pair.

    Args:
        pattern: an expression without heads or names, as `at_head` returns it.

    Example:
        >>> from longspan.pattern import Causal, Dilated, Window
        >>> terms(Causal() & (Window(4) | Dilated(8)))
        (Causal() & Window(4), Causal() & Dilated(8) & ~Window(4))
    """
    cut = (simplify(term) for term in _cut(simplify(pattern)))
    return tuple(term for term in cut if term != Nothing()) or (Nothing(),)


def _cut(pattern: Pattern) -> tuple[Pattern, ...]:
    if isinstance(pattern, Sum):
        return tuple(term for part in pattern.parts for term in _cut(part))
    if isinstance(pattern, Transpose):
        return tuple(term.T for term in _cut(pattern.part))
    if isinstance(pattern, Intersection):
        return tuple(reduce(and_, choice) for choice in product(*map(_cut, pattern.parts)))
    if isinstance(pattern, Union) and _worth_cutting(pattern):
        # Parts that repeat come first: what they leave over of the others is small.
        ordered = sorted(_alike(pattern.parts), key=lambda part: part.period is None)
        cut = [term for part in ordered for term in _cut(part)]
        return tuple(reduce(lambda kept, before: kept - before, cut[:n], term) for n, term in enumerate(cut))
    return (pattern,)


def _worth_cutting(union: Union) -> bool:
    wants = {(part.steps, part.period is None) for part in union.parts}
    return len(wants) > 1 and not any(_counts_twice(part) for part in union.parts)


def _alike(parts: tuple[Pattern, ...]) -> list[Pattern]:
    """Return parts of a union, those in one that want the layout of the text."""
    kinds: dict[object, list[Pattern]] = {}
    for number, part in enumerate(parts):
        kinds.setdefault(number if part.steps != (1, 1) else str(part.period is None), []).append(part)
    return [reduce(or_, kind) for kind in kinds.values()]


def _counts_twice(pattern: Pattern) -> bool:
    """Say whether a pattern holds a multiset sum, so that it cannot be cut as a plain relation."""
    return isinstance(pattern, Sum) or any(_counts_twice(part) for part in pattern.operands)
