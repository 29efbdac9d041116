"""Strands: terms of a pattern whose queries and keys are every so many-th token of a text, read as texts of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from longspan.derive.terms import terms
from longspan.pattern import Causal, Chunk, Every, Everything, Nothing, Pattern, Progression, Window, simplify
from longspan.pattern.base import Positions, Verdict


@dataclass(frozen=True)
class Strand:
    """A term that is read among some tokens only.

    Attributes:
        term: what is read, in positions of the text.
        tokens: the positions of the text that read or are read.
        pattern: what is read, in places among those tokens.
    """

    term: Pattern
    tokens: range
    pattern: Pattern


@lru_cache(maxsize=1024)
def strands(pattern: Pattern, *, length: int) -> tuple[tuple[Pattern, ...], tuple[Strand, ...]]:
    """Cut the pattern of one head into terms over the whole text, and terms over every so many-th token of it.

    Law: counts of the terms and of the strands add up to those of the pattern. A strand holds all pairs of its term:
    no other token of the text reads or is read.

    Args:
        pattern: an expression without heads or names, as `at_head` returns it.
        length: tokens of the text.

    Example:
        >>> from longspan.pattern import LongNet
        >>> rest, thin = strands(LongNet((4, 8), (1, 2)).at_head(1, heads=2), length=100)
        >>> rest, thin[0].tokens, thin[0].pattern
        ((Causal() & Chunk(4),), range(1, 100, 2), Causal() & Chunk(4))
    """
    whole, thin = [], []
    for term in terms(pattern):
        first, step = _lattice(term, length)
        tokens = range(first, length, step)
        if step > 1 and tokens:
            thin.append(Strand(term, tokens, simplify(_thinned(term, first, step))))
        else:
            whole.append(term)
    return tuple(whole), tuple(thin)


def _lattice(term: Pattern, length: int) -> tuple[int, int]:
    """Return the first token and the step of the one residue class that all pairs of a term lie in, (0, 1) for none.

    Classes are cut by one prime after the other; those that are proven empty are dropped.
    """
    step = math.gcd(*term.steps)
    everything = Progression.of(range(max(1, length)))
    first, known = 0, 1
    for prime in _primes(step):
        apart = known * prime
        residues = np.arange(first, min(length, first + apart), known)
        last = residues + (length - 1 - residues) // apart * apart
        some = Progression(residues, last, np.where(last > residues, apart, 0))
        reads, read = term.count(some, everything), term.count(everything, some)
        left = residues[~np.broadcast_to(reads.empty & read.empty, residues.shape)].tolist()
        if len(left) != 1:
            break
        [first], known = left, known * prime
    return first, known


def _primes(number: int) -> Iterator[int]:
    """Yield the prime factors of a number, each as often as it is one."""
    factor = 2
    while factor * factor <= number:
        while number % factor == 0:
            yield factor
            number //= factor
        factor += 1
    if number > 1:
        yield number


def _thinned(pattern: Pattern, first: int, step: int) -> Pattern:
    """Return a pattern of one head in places among the tokens `first`, `first + step`, ..."""
    if pattern.operands:
        return pattern.rebuilt(tuple(_thinned(part, first, step) for part in pattern.operands))
    match pattern:
        case Causal() | Everything() | Nothing():
            return pattern
        case Chunk(size=size, offset=0, shift=shift) if size % step == 0 and shift % step == 0:
            return Chunk(size // step, shift=shift // step)
        case Every(step=every, offset=offset, within=within, run=1) if (
            (within or every) % every == 0 == step % every
        ):
            return Everything() if first % every == offset else Nothing()
        case Window(size=size):
            return Window(-(-size // step))
    return _Thinned(pattern, first, step)


@dataclass(frozen=True, repr=False)
class _Thinned(Pattern):
    """An atom read at every so many-th position: place n is position `first + n * step`."""

    part: Pattern
    first: int
    step: int

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return self.part.contains(self._position(q), self._position(k))

    def facts(self, q: Positions, k: Positions) -> tuple[np.ndarray, ...]:
        return self.part.signature(self._position(q), self._position(k))

    def _position(self, place: Positions) -> Positions:
        if isinstance(place, Progression):
            return Progression(
                place.low * self.step + self.first,
                place.high * self.step + self.first,
                place.step * self.step,
            )
        return place * self.step + self.first

    @property
    def period(self) -> int | None:
        return self.part.period and self.part.period // math.gcd(self.part.period, self.step)

    def __str__(self) -> str:
        return f"{self.part} at {self.first} and every {self.step} from there"
