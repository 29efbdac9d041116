"""Traced: attention in models that torch.compile makes into one graph, on CPU.

What a batch holds (its padding, its documents) decides which calls are made, and a graph cannot look into its tensors. So a
graph holds one operation a layer, which looks when it runs, in the same way as everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.hf.segment import Segment, unpacked, unpadded, whole
from longspan.kernel.operation.opaque import KERNELS, numbered, pattern_of, work
from longspan.pattern import Pattern, Window
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
        """Return the sequences of the batch, of so many rows and columns of queries."""
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
    sinks: Tensor | None,
) -> Tensor:
    """Return what `attend_segments` does for the sequences of a batch, `[batch, length, heads, width]`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        # The kernels take positive scales only.
        query, scale = query * scale, 1.0
    given = (query, key, value, outline.real, outline.joined, sinks, windows, numbered(pattern), scale)
    return _attend(*given)[0]


def _pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    joined: Tensor | None,
    windows: list[int],
    number: int,
    scale: float,
) -> Iterator[tuple[Any, Any, Any, list[Tensor]]]:
    """Yield for each sequence its kernel, what is asked of it, where it lies, and its query, key and value."""
    pattern = pattern_of(number)
    for window in windows:
        pattern = pattern & Window(window)
    for segment in Outline(real, joined, key.shape[2], None).segments(query.shape[0], query.shape[2]):
        sides = [query[segment.rows][:, :, segment.queries]]
        sides += [side[segment.rows][:, :, segment.keys] for side in (key, value)]
        rows, columns = sides[0].shape[2], sides[1].shape[2]
        asked = work(pattern, query.shape[1], range(columns - rows, columns), columns, scale, None)
        refused = KERNELS["native"].refusal(sides[0], Scores(), asked=False)
        yield KERNELS["sdpa" if refused else "native"], asked, segment, sides


def _place(tensor: Tensor, rows: Any, columns: Any) -> tuple[Any, Any]:
    """Return how to index `[rows, columns, ...]` of a tensor."""
    both = isinstance(rows, Tensor) and isinstance(columns, Tensor)
    return (rows[:, None] if both else rows), columns


@torch.library.custom_op("longspan::attend_batch", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    joined: Tensor | None,
    sinks: Tensor | None,
    windows: list[int],
    number: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = query.shape
    output = query.new_zeros(rows, length, heads, value.shape[3])
    lse = query.new_full(
        (rows, length, heads), -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    for kernel, asked, segment, sides in _pieces(query, key, value, real, joined, windows, number, scale):
        part, part_lse = kernel.forward(*sides, sinks, asked)
        at = _place(output, segment.rows, segment.queries)
        output[at], lse[at] = part.transpose(1, 2), part_lse.transpose(1, 2)
    return output, lse


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(rows, length, heads, value.shape[3]), query.new_empty(
        rows, length, heads, dtype=exact
    )


@torch.library.custom_op("longspan::attend_batch_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    joined: Tensor | None,
    sinks: Tensor | None,
    windows: list[int],
    number: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = [torch.zeros_like(side).transpose(1, 2) for side in (query, key, value)]
    sinks_grad = lse.new_zeros(0) if sinks is None else torch.zeros_like(sinks)
    for kernel, asked, segment, sides in _pieces(query, key, value, real, joined, windows, number, scale):
        at = _place(output, segment.rows, segment.queries)
        grad, out, total = (side[at].transpose(1, 2).contiguous() for side in (grad_output, output, lse))
        *grads, own = kernel.backward(grad, torch.zeros_like(total), *sides, sinks, out, total, asked)
        for whole_, part, columns in zip(
            made, grads, (segment.queries, segment.keys, segment.keys), strict=True
        ):
            whole_[_place(whole_, segment.rows, columns)] = part.transpose(1, 2)
        if own is not None:
            sinks_grad += own
    return *(side.transpose(1, 2).contiguous() for side in made), sinks_grad


@_attend_backward.register_fake
def _(
    grad_output: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = [side.new_empty(side.shape) for side in (query, key, value)]
    sinks = rest[2]
    return made[0], made[1], made[2], lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.windows, ctx.number, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    made = _attend_backward(grad_output, *ctx.saved_tensors, ctx.windows, ctx.number, ctx.scale)
    sinks = made[3] if ctx.saved_tensors[7] is not None else None
    return (*made[:3], None, None, sinks, None, None, None)


_attend.register_autograd(_differentiate, setup_context=_keep)
