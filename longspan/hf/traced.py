"""Traced: attention in models that torch.compile makes into one graph.

What a batch holds (its padding, its documents) decides which calls are made, and a graph cannot look into its tensors. So a
graph holds one operation a layer, which looks when it runs, in the same way as everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longspan.hf.captured import RESTARTING, capturing, padded, required
from longspan.hf.layers import within
from longspan.hf.segment import Segment, unpacked, unpadded, whole
from longspan.kernel.choice import at_once
from longspan.kernel.operation import compiled, opaque
from longspan.kernel.operation.opaque import numbered, pattern_of
from longspan.kernel.operation.operation import heads_inside, operation
from longspan.pattern import Pattern
from longspan.score import Scores


@dataclass(frozen=True)
class Outline:
    """What a graph knows of a batch.

    Attributes:
        real: bool `[rows, columns of keys]`, false on padding, or None.
        joined: bool `[rows, columns of queries - 1]`, whether a token continues the one before it, or None.
        keys: columns of the key tensor.
        window: the window that the model itself asks for, in tokens, or None.
    """

    real: Tensor | None
    joined: Tensor | None
    keys: int
    window: int | None

    def segments(self, rows: int, length: int) -> tuple[Segment, ...]:
        """Return the sequences of the batch, of so many rows and columns of queries.

        While a CUDA graph is captured, a mask is refused, and documents stop the graph when it runs.
        """
        known = self.joined if self.real is None else self.real
        if known is not None and capturing(known.device):
            if self.real is not None:
                raise padded(self.real)
            required(known, RESTARTING)
            return whole(rows, length, self.keys)
        if self.real is not None and not self.real.all():
            return unpadded(self.real, queries=length, dropped=0)
        return whole(rows, length, self.keys) if self.joined is None else unpacked(self.joined)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    outline: Outline,
    windows: list[int],
    scale: float | None,
    changes: Scores,
) -> Tensor:
    """Return what `attend_segments` does for the sequences of a batch, `[batch, length, heads, width]`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        # The kernels take positive scales only.
        query, scale = query * scale, 1.0
    facts = (outline.real, outline.joined, windows, changes.limit, numbered(pattern), scale)
    return _attend(query, key, value, changes.sinks, *facts)[0].transpose(1, 2)


def _pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    joined: Tensor | None,
    windows: list[int],
    limit: float | None,
    number: int,
    scale: float,
) -> Iterator[tuple[Segment, list[Tensor], ModuleType, tuple[Any, ...]]]:
    """Yield each sequence, its query, key and value, and what runs it with which facts."""
    pattern = within(pattern_of(number), frozenset(windows))
    for segment in Outline(real, joined, key.shape[2], None).segments(query.shape[0], query.shape[2]):
        sides = [query[segment.rows][:, :, segment.queries]]
        sides += [side[segment.rows][:, :, segment.keys] for side in (key, value)]
        start = sides[1].shape[2] - sides[0].shape[2]
        kernel = at_once(sides[0], Scores(limit, None, None), asked=None)
        if kernel is None:
            yield segment, sides, compiled, (None, limit, numbered(pattern), start, 1, scale, "")
        else:
            yield segment, sides, opaque, (None, numbered(pattern), start, 1, scale, kernel)


def _place(tensor: Tensor, rows: Any, columns: Any) -> tuple[Any, Any]:
    """Return how to index `[rows, columns, ...]` of a tensor."""
    both = isinstance(rows, Tensor) and isinstance(columns, Tensor)
    return (rows[:, None] if both else rows), columns


def _forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *facts: Any
) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = query.shape
    output = query.new_zeros(rows, length, heads, value.shape[3])
    lse = query.new_full(
        (rows, length, heads), -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    for segment, sides, runs, told in _pieces(query, key, value, *facts):
        part, part_lse = runs.forward(*sides, sinks, *told)
        at = _place(output, segment.rows, segment.queries)
        output[at], lse[at] = part.transpose(1, 2), part_lse.transpose(1, 2)
    return output.transpose(1, 2), lse.transpose(1, 2)


def _backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *facts: Any,
) -> tuple[Tensor | None, ...]:
    made = [torch.zeros_like(side).transpose(1, 2) for side in (query, key, value)]
    sinks_grad = None if sinks is None else torch.zeros_like(sinks)
    for segment, sides, runs, told in _pieces(query, key, value, *facts):
        at = _place(output, segment.rows, segment.queries)
        grad, grad_total, out, total = (
            None if side is None else side.transpose(1, 2)[at].transpose(1, 2).contiguous()
            for side in (grad_output, grad_lse, output, lse)
        )
        *grads, own = runs.backward(grad, grad_total, *sides, sinks, out, total, *told)
        places = (segment.queries, segment.keys, segment.keys)
        for whole_, part, columns in zip(made, grads, places, strict=True):
            whole_[_place(whole_, segment.rows, columns)] = part.transpose(1, 2)
        if sinks_grad is not None:
            sinks_grad += own
    return *(side.transpose(1, 2) for side in made), sinks_grad


_attend = operation(
    "attend_batch",
    _forward,
    _backward,
    facts="Tensor? real, Tensor? joined, SymInt[] windows, float? limit, SymInt number, float scale",
    lay=heads_inside,
    # It looks into the batch, which inductor's own CUDA graphs, mode="reduce-overhead", leave out of them.
    tags=(torch.Tag.cudagraph_unsafe,),
)
