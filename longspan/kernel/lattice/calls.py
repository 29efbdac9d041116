"""Calls: the parts of a pattern on tensors, as strided views in pieces of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from longspan.kernel.lattice.parts import Lattice, Part


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads that read alike, at regular distances, and the parts that they read by.

    Attributes:
        heads: the heads.
        parts: what they read.
        ahead: the parts hold only keys after their queries; asked for only where distance counts.
    """

    heads: range
    parts: tuple[Part, ...]
    ahead: bool = False


@dataclass(frozen=True)
class Slice:
    """What one call takes of every rectangle of a part: all of it, or some queries and keys of one without a mask.

    Attributes:
        query, key: where the rectangles lie.
        causal: the rectangle is the lower triangle of a square.
        fresh: nothing before this one touches its queries.
    """

    query: Lattice
    key: Lattice
    causal: bool
    fresh: bool


@dataclass(frozen=True)
class Call:
    """Some rectangles of one part, on some heads of one row of the batch: what one call of the kernel takes."""

    part: Part
    slice: Slice
    ahead: bool
    row: int
    heads: range
    key_heads: range
    outer: int
    inner: range

    @property
    def columns(self) -> slice:
        """Which keys of a rectangle of the part are looked up."""
        first = (self.slice.key.start - self.part.key.start) // self.part.key.step
        return slice(first, first + self.slice.key.places)

    def read(self, tensor: Tensor) -> Tensor:
        """Return the view `[heads, rectangles, places, ...]` of a tensor on the query side."""
        return self._view(tensor, self.slice.query, self.heads, self.inner)

    def look_up(self, tensor: Tensor) -> Tensor:
        """Return the view `[key heads, rectangles, places, width]` of a tensor on the key side, or what is gathered."""
        if self.part.key.at is not None:
            return self._rows(tensor)[:, self._gathered()].unflatten(1, (len(self.inner), -1))
        return self._view(tensor, self.slice.key, self.key_heads, self.inner)

    def give_back(self, whole: Tensor, part: Tensor) -> None:
        """Add a gradient of the view `look_up` gave to the whole, where rectangles may overlap."""
        lattice = self.slice.key
        if lattice.at is not None:
            self._rows(whole).index_add_(1, self._gathered(), part.flatten(1, 2).to(whole.dtype))
            return
        if lattice.inner == 0:
            part, inner = part.sum(dim=1, keepdim=True), self.inner[:1]
            self._view(whole, lattice, self.key_heads, inner).add_(part)
            return
        for rectangles, places in disjoint(lattice, lattice.inner, len(self.inner)):
            piece = part[:, rectangles, places]
            start = lattice.start + places.start * lattice.step
            cut = Lattice(start, lattice.step, piece.shape[2], lattice.outer, lattice.inner)
            self._view(whole, cut, self.key_heads, self.inner[rectangles]).add_(piece)

    def _rows(self, tensor: Tensor) -> Tensor:
        """Return the key heads of a tensor, `[key heads, keys, width]`."""
        heads = self.key_heads
        return tensor[self.row, heads.start : heads.stop : heads.step]

    def _gathered(self) -> Tensor:
        """Return the index of every key of every rectangle, one rectangle after the other."""
        lattice = self.slice.key
        begins = lattice.begins(self.part.shape)[self.outer, self.inner.start : self.inner.stop]
        return torch.from_numpy((begins[:, None] + np.arange(lattice.places) * lattice.step).ravel())

    def _view(self, tensor: Tensor, lattice: Lattice, heads: range, inner: range) -> Tensor:
        batch_stride, head_stride, stride, *rest = tensor.stride()
        start = lattice.start + self.outer * lattice.outer + inner.start * lattice.inner
        offset = (
            tensor.storage_offset() + self.row * batch_stride + heads.start * head_stride + start * stride
        )
        return tensor.as_strided(
            (len(heads), len(inner), lattice.places, *tensor.shape[3:]),
            (heads.step * head_stride, inner.step * lattice.inner * stride, lattice.step * stride, *rest),
            offset,
        )


def disjoint(lattice: Lattice, advance: int, count: int) -> Iterator[tuple[slice, slice]]:
    """Cut rectangles that may overlap, and their places, so that in no piece two share a place.

    Args:
        lattice: of one side.
        advance: how far the next rectangle lies on, not 0.
        count: how many rectangles there are.
    """
    # Rectangle n + apart starts on a place of rectangle n, `shift` places after its first one.
    apart = lattice.step // int(np.gcd(advance, lattice.step))
    shift = apart * advance // lattice.step
    for begin in range(min(apart, count)):
        places = lattice.places if begin + apart >= count else shift
        for first in range(0, lattice.places, places):
            yield slice(begin, None, apart), slice(first, first + places)


def calls(
    query: Tensor,
    key: Tensor,
    groups: Sequence[HeadGroup],
    *,
    needed: Callable[[Lattice, Lattice], int],
    alone: Callable[[Part], int],
    limit: int,
) -> Iterator[Call]:
    """Cut the work into calls whose temporary results take at most `limit` bytes, or are of one rectangle with a mask.

    Args:
        query, key: tensors `[batch, heads, length, width]`.
        groups: who reads what.
        needed: numbers that the queries and keys of one rectangle on one head need for their results.
        alone: numbers that one head needs however many rectangles there are.
        limit: bytes.
    """
    share = query.shape[1] // key.shape[1]
    numbers = limit // query.element_size()
    for row in range(query.shape[0]):
        for group in groups:
            for heads, key_heads in paired(group.heads, share):
                for part in group.parts:
                    for some in slices(part, needed, numbers):
                        budget = max(1, numbers // needed(some.query, some.key))
                        most = max(1, min(len(heads), numbers // max(1, alone(part))))
                        inner = max(1, min(budget // most, part.shape[1]))
                        abreast = max(1, min(budget // inner, most))
                        for outer in range(part.shape[0]):
                            for first in range(0, part.shape[1], inner):
                                for head in range(0, len(heads), abreast):
                                    yield Call(
                                        part,
                                        some,
                                        group.ahead,
                                        row,
                                        heads[head : head + abreast],
                                        key_heads[head : head + abreast],
                                        outer,
                                        range(part.shape[1])[first : first + inner],
                                    )


def slices(part: Part, needed: Callable[[Lattice, Lattice], int], numbers: int) -> Iterator[Slice]:
    """Cut the rectangles of a part so that each needs no more than some numbers; those with a mask are left whole.

    Example:
        >>> from longspan.kernel.lattice.parts import parts
        >>> from longspan.pattern import Causal
        >>> [whole] = parts(Causal(), range(1000), range(1000))
        >>> for some in slices(whole, lambda query, key: query.places * key.places, 260_000):
        ...     print(some.query.start, some.query.places, some.key.start, some.key.places, some.causal)
        0 500 0 500 True
        500 500 0 500 False
        500 500 500 500 True
    """
    query, key = part.query, part.key
    while part.allowed is None and needed(query, key) > numbers and max(query.places, key.places) > 1:
        fewer, less = (replace(side, places=-(-side.places // 2)) for side in (query, key))
        if part.causal:
            query, key = fewer, less
        elif needed(fewer, key) <= needed(query, less):
            query = fewer
        else:
            key = less
    for top in range(0, part.query.places, query.places):
        for left in range(0, part.key.places, key.places):
            if left > top and part.causal:
                break
            yield Slice(
                _cut(part.query, top, query.places),
                _cut(part.key, left, key.places),
                part.causal and left == top,
                part.fresh and left == 0,
            )


def _cut(side: Lattice, first: int, places: int) -> Lattice:
    """Return some places of every rectangle."""
    return replace(side, start=side.start + first * side.step, places=min(places, side.places - first))


def paired(heads: range, share: int) -> Iterator[tuple[range, range]]:
    """Cut heads so that each key head stands opposite one query head, `share` query heads to a key head."""
    for place in range(share):
        opposite = [head for head in heads if head % share == place]
        if opposite:
            step = opposite[1] - opposite[0] if len(opposite) > 1 else share
            taken = range(opposite[0], opposite[-1] + 1, step)
            yield taken, range(taken[0] // share, taken[-1] // share + 1, step // share)


def regular(members: list[int]) -> list[range]:
    """Cut ascending numbers into ranges."""
    ranges = []
    while members:
        step = members[1] - members[0] if len(members) > 1 else 1
        size = next((n for n in range(2, len(members)) if members[n] - members[n - 1] != step), len(members))
        ranges.append(range(members[0], members[size - 1] + 1, step))
        members = members[size:]
    return ranges
