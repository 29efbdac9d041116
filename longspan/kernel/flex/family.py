"""Families: a pattern as few calls of FlexAttention, and what is compiled once for all of one family.

Heads that read by one formula are one call, whatever their sizes. A pattern of residues is read inside its residue
classes, where it is dense: each pair of classes is a layout of its own, in the batch. Terms of a multiset sum are
calls of their own, to be merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.derive.blocks import Blocks, Side, blocks
from longspan.derive.stretch import Stretch, shortest
from longspan.derive.terms import terms
from longspan.derive.tiling import SIZE, comparable, layouts
from longspan.kernel.flex.formula import Formula, Operation, formula
from longspan.kernel.flex.lists import Lists, lists
from longspan.pattern import Pattern, Sum, simplify

# Places on a side of a block.
BLOCK = SIZE


@dataclass(frozen=True)
class Family:
    """What is compiled once.

    Attributes:
        size: places on a side of a block.
        operations: of the formula.
        small: integers are of 32 bits.
        classes: the layouts are residue classes, the shorter ones padded.
        limit: of soft-capping, or None.
        sloped: whether ALiBi is taken off.
    """

    size: int
    operations: tuple[Operation, ...]
    small: bool
    classes: bool
    limit: float | None = None
    sloped: bool = False

    @property
    def constants(self) -> int:
        """How many numbers a head has: those of the formula; how far apart queries and keys lie; the position of the
        last key; those of the first query and the first key."""
        return 5 + sum(kind == "number" for _, places in self.operations for kind, _ in places)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of FlexAttention, on some heads.

    Attributes:
        family: its operations, without changes of scores.
        lead, rows: which queries it reads, by index.
        steps: how many residue classes each side is cut into.
        classes: the pairs of them that are read, int64 tensors `[layouts]` for queries and for keys; no two are of
            the same queries.
        places: how many queries and keys a class has at most.
        lists: which blocks are read.
        numbers: the constants of the formula and of the layout, `[heads * constants]`.
        origins: positions of the first query and of the first key of each layout, `[layouts]`.
        tables: those of the formula, with room behind.
    """

    family: Family
    lead: int
    rows: int
    steps: tuple[int, int]
    classes: tuple[Tensor, Tensor]
    places: tuple[int, int]
    lists: Lists
    numbers: Tensor
    origins: tuple[Tensor, Tensor]
    tables: tuple[Tensor, ...]

    def __str__(self) -> str:
        full, partial = self.lists.counts
        every = f"every {max(self.steps)}, " if self.family.classes else ""
        return f"1 call, {every}{full:,} full and {partial:,} partial blocks of {self.family.size} by {self.family.size}"


@dataclass(frozen=True, eq=False)
class Group:
    """Heads that are done together, and the calls that do them."""

    heads: tuple[int, ...]
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        first, last = self.heads[0], self.heads[-1]
        run = len(self.heads) > 2 and self.heads == tuple(range(first, last + 1))
        named = f"{first} to {last}" if run else ", ".join(map(str, self.heads))
        named = f"head{'s' * (len(self.heads) > 1)} {named}"
        return "\n".join([f"  {named}", *(f"    {call}" for call in self.calls)])

    @property
    def blocks(self) -> tuple[int, int]:
        """Full and partial blocks of all calls, over all heads."""
        counted = [(len(self.heads) // call.lists.heads, *call.lists.counts) for call in self.calls]
        return sum(times * full for times, full, _ in counted), sum(
            times * some for times, _, some in counted
        )


@lru_cache(maxsize=32)
def groups(
    pattern: Pattern, heads: int, queries: range, keys: range, device: torch.device
) -> tuple[Group, ...]:
    """Return the calls that do a pattern, with heads together that are done by the same ones."""
    known: dict[Pattern, tuple[_Piece, ...]] = {}
    alike: dict[tuple[Any, ...], list[tuple[int, tuple[_Piece, ...]]]] = {}
    for head in range(heads):
        single = pattern.at_head(head, heads)
        if single not in known:
            known[single] = tuple(_pieces(single, queries, keys, device))
        pieces = known[single]
        alike.setdefault(tuple(piece.kind for piece in pieces), []).append((head, pieces))
    return tuple(
        Group(
            tuple(head for head, _ in members),
            tuple(_call(same, device) for same in zip(*(pieces for _, pieces in members), strict=True)),
        )
        for members in alike.values()
    )


@dataclass(frozen=True, eq=False)
class _Piece:
    """What one head reads in one call.

    Attributes:
        lead: index of the first query.
        positions: of the queries and of the keys.
        blocks: what is read of a short text.
        stretch: how that text is drawn out.
        formula: of the relation.
        classes: the pairs of residue classes that hold any block.
    """

    lead: int
    positions: tuple[range, range]
    blocks: Blocks
    stretch: Stretch
    formula: Formula
    classes: tuple[np.ndarray, np.ndarray]

    @property
    def steps(self) -> tuple[int, int]:
        return self.blocks.query_side.step, self.blocks.key_side.step

    @property
    def family(self) -> Family:
        small = self.formula.small and max(side[-1] for side in self.positions) < 1 << 30
        return Family(self.blocks.size, self.formula.operations, small, self.steps != (1, 1))

    @property
    def kind(self) -> tuple[Any, ...]:
        """What heads have in common that are done in one call."""
        classes = tuple(side.tobytes() for side in self.classes)
        return (self.family, self.lead, self.positions[0], self.steps, classes, *map(id, self.formula.tables))


def _pieces(single: Pattern, queries: range, keys: range, device: torch.device) -> Iterator[_Piece]:
    """Yield what one head reads, cut into relations that each have one good layout."""
    if not queries or not keys:
        return
    whole = simplify(single)
    for part in whole.parts if isinstance(whole, Sum) else (whole,):
        for term in (part,) if plain(part) else terms(part):
            # Queries set apart so that the residue classes of both sides begin side by side.
            lead = (term.lead - (queries.start - keys.start)) % term.steps[0]
            for first, rows in ((0, queries[:lead]), (lead, queries[lead:])):
                piece = _piece(term, first, rows, keys, device) if rows else None
                if piece is not None:
                    yield piece


@lru_cache(maxsize=64)
def _piece(term: Pattern, lead: int, queries: range, keys: range, device: torch.device) -> _Piece | None:
    """Return how one relation is read, the same object for all heads, or None where it holds no pair."""
    found, stretch = _cheaper(term, queries, keys)
    if not len(found):
        return None
    return _Piece(lead, (queries, keys), found, stretch, formula(term, device), _classes(found))


def plain(pattern: Pattern) -> bool:
    """Say whether a pattern is a relation that has nothing to do with residues, so that one call does all of it."""
    if isinstance(pattern, Sum) or pattern.steps != (1, 1):
        return False
    return all(map(plain, pattern.operands))


def _cheaper(term: Pattern, queries: range, keys: range) -> tuple[Blocks, Stretch]:
    """Return the blocks in residue classes, or the contiguous ones where they are not more, of a short text."""
    tried = layouts(term, queries, keys, size=BLOCK)
    stretch = shortest(term, queries, keys, grid=BLOCK * lcm(*(step for steps in tried for step in steps)))

    def laid_out(steps: tuple[int, int]) -> Blocks:
        return blocks(term, queries=stretch.queries, keys=stretch.keys, size=BLOCK, steps=steps)

    found = min(map(laid_out, tried), key=lambda made: (made.area, len(made)))
    if found.query_side.step == found.key_side.step == 1:
        return found, stretch
    pairs = _classes(found)[0]
    # Two classes of keys for one of queries would be two parts of one row.
    twice = len(np.unique(pairs)) < len(pairs)
    if twice or comparable(queries, keys, BLOCK):
        contiguous = laid_out((1, 1))
        if twice or _squares(contiguous) <= _squares(found):
            return contiguous, stretch
    return found, stretch


def _squares(found: Blocks) -> int:
    """Return how many blocks there are, small ones at the ends included."""
    rows, columns = (-(-places // found.size) for places in found.extents())
    return int((rows * columns).sum())


def _classes(found: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of residue classes that hold any block, in the order of the queries."""
    held = np.zeros((found.query_side.step, found.key_side.step), dtype=bool)
    held[found.query_class, found.key_class] = True
    query_class, key_class = np.nonzero(held)
    return query_class, key_class


def _call(pieces: Sequence[_Piece], device: torch.device) -> Call:
    """Return the call for pieces of one kind, one for each head."""
    first = pieces[0]
    queries, keys = first.positions
    dtype = torch.int32 if first.family.small else torch.int64
    strides = tuple(side.step * step for side, step in zip((queries, keys), first.steps, strict=True))
    own = (*strides, keys[-1], queries[0], keys[0])
    numbers = [number for piece in pieces for number in (*piece.formula.numbers, *own)]
    origins = tuple(
        torch.as_tensor(side.start + side.step * classes, dtype=dtype, device=device)
        for side, classes in zip((queries, keys), first.classes, strict=True)
    )
    same = all(piece is first for piece in pieces)
    return Call(
        first.family,
        first.lead,
        len(queries),
        first.steps,
        tuple(torch.as_tensor(side, device=device) for side in first.classes),
        tuple(int(Side(*side).lengths.max()) for side in zip(first.positions, first.steps, strict=True)),
        lists(
            [(piece.blocks, piece.stretch) for piece in pieces[: 1 if same else None]], first.classes, device
        ),
        torch.tensor(numbers, dtype=dtype, device=device),
        origins,
        tuple(map(rounded, first.formula.tables)),
    )


def rounded(table: Tensor) -> Tensor:
    """Return a table with room behind it: few sizes are few compilations, and no formula looks past its end."""
    room = max(1024, 1 << (len(table) - 1).bit_length())
    return F.pad(table, (0, room - len(table)))
