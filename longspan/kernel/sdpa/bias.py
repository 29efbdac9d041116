"""Biases: what a part adds to its scores, as the sdpa kernel takes it, kept for the next call.

A mask is 0 where a pair is read and minus infinity elsewhere. ALiBi would add `-slope * |q - k|`, which differs
from rectangle to rectangle. Here the bias counts distances from the nearest key that a row of the rectangle
reads, which is the same in all rectangles of a part and rounds nothing of weight. The rest, the distance of that
nearest key, is one number a row: it moves the row's log-sum-exp in the part, and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor

from longspan.kernel.lattice.calls import Call
from longspan.kernel.lattice.parts import Part

# Bytes of biases that are kept, at most.
KEPT = 64 * 2**20

Slopes = tuple[float, ...] | None


@dataclass(frozen=True, eq=False)
class Bias:
    """What a part adds to its scores.

    Attributes:
        added: `[rows, columns]`, with slopes `[heads, 1, rows or 1, columns]`, or None for nothing.
        blind: rows of a rectangle without a key, bool `[rows]`, or None where there are none.
        nearest: place of the nearest key that each row reads, int64 `[rows or 1]`; None without slopes.
    """

    added: Tensor | None
    blind: Tensor | None = None
    nearest: Tensor | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.added is None else self.added.numel() * self.added.element_size()


class _Shelf:
    """Biases by part, dtype and slopes; those that were not asked for longest are dropped first."""

    def __init__(self) -> None:
        self.held: OrderedDict[tuple[Part, torch.dtype, Slopes, bool], Bias] = OrderedDict()
        self.bytes = 0
        self.lock = Lock()

    def take(self, part: Part, dtype: torch.dtype, slopes: Slopes, ahead: bool) -> Bias:
        place = (part, dtype, slopes, ahead)
        with self.lock:
            if place in self.held:
                self.held.move_to_end(place)
                return self.held[place]
        made = _masked(part, dtype) if slopes is None else _slanted(part, dtype, slopes, ahead)
        with self.lock:
            if place not in self.held and made.bytes <= KEPT:
                self.held[place] = made
                self.bytes += made.bytes
            while self.bytes > KEPT:
                self.bytes -= self.held.popitem(last=False)[1].bytes
        return made


_shelf = _Shelf()
_NOTHING = Bias(None)


def bias(call: Call, dtype: torch.dtype, slopes: Slopes) -> Bias:
    """Return what a call adds to its scores.

    Args:
        call: the call.
        dtype: of the query; distances are not rounded below float32.
        slopes: of all heads, or None.
    """
    if slopes is not None:
        own = tuple(slopes[head] for head in call.heads)
        whole = _shelf.take(call.part, torch.promote_types(dtype, torch.float32), own, call.ahead)
        return whole if whole.added is None else replace(whole, added=whole.added[..., call.columns])
    return _NOTHING if call.part.allowed is None else _shelf.take(call.part, dtype, None, False)


def size(part: Part, slopes: Slopes) -> int:
    """Return how many numbers of bias each head needs for itself."""
    if slopes is None:
        return 0
    return part.key.places * (1 if part.allowed is None else part.query.places)


def shift(
    call: Call,
    nearest: Tensor,
    slopes: tuple[float, ...],
    positions: tuple[range, tuple[int, int]],
    dtype: torch.dtype,
) -> Tensor:
    """Return `-slope * distance` of the nearest key of each row, `[heads, rectangles, rows]`.

    Positions are those of the queries, and of the first key and how far apart keys are.
    """
    queries, (first, apart) = positions
    query, key = call.slice.query, call.part.key
    rectangle = torch.arange(call.inner.start, call.inner.stop)[:, None]
    place = query.start + call.outer * query.outer + rectangle * query.inner
    q = queries.start + queries.step * (place + query.step * torch.arange(query.places))
    begins = torch.from_numpy(key.begins(call.part.shape)[call.outer])[rectangle]
    k = first + apart * (begins + key.step * nearest)
    own = torch.tensor([slopes[head] for head in call.heads], dtype=torch.float64)
    return (-own[:, None, None] * (q - k).abs()).to(dtype)


def _masked(part: Part, dtype: torch.dtype) -> Bias:
    assert part.allowed is not None
    allowed = torch.from_numpy(part.allowed)
    return Bias(torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf), _blind(allowed))


def _slanted(part: Part, dtype: torch.dtype, slopes: tuple[float, ...], ahead: bool) -> Bias:
    columns = torch.arange(part.key.places)
    steep = torch.tensor(slopes, dtype=torch.float64)[:, None, None, None] * part.key.step
    if part.allowed is None:
        nearest = columns[:1] if ahead else columns[-1:]
        apart = (nearest[:, None] - columns).abs()
        return Bias((-steep * apart).to(dtype), None, nearest)
    allowed = torch.from_numpy(part.allowed)
    far = columns.flip(0) if ahead else columns
    nearest = (allowed * (far + 1)).argmax(dim=1)
    apart = (nearest[:, None] - columns).abs()
    added = (-steep * apart).to(dtype).masked_fill_(~allowed, -torch.inf)
    return Bias(added, _blind(allowed), nearest)


def _blind(allowed: Tensor) -> Tensor | None:
    rows = ~allowed.any(dim=1)
    return rows if rows.any() else None
