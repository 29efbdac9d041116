"""Finite: what is no number stays with the pairs that are read, for kernels that multiply what is not read by 0.

Such a kernel is run on tensors in which the rows that are not finite are 0, and NaN is written to all that read them.
Which those are is found by the same kernel over marks, laid out as the tensors are, so that it is compiled for nothing
but the tensors. Finite tensors pay for one sum forward and one backward, for which the device is waited for. While a
CUDA graph is captured nothing can wait and nothing be compiled: there the rows are looked through and cleared in any
case, and attention over marks is told by a number on the device whether there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Output and log-sum-exp of query, key and value. With a number `gate`, for marks: scores are not changed by how far
# apart a pair is, and nothing is read where the number is 0.
Attention = Callable[..., tuple[Tensor, Tensor]]


@dataclass(eq=False)
class _Record:
    """What forward leaves for backward, and what the end of backward leaves for its beginning.

    Attributes:
        act: the kernel.
        sides: query, key and value, without their numbers.
        quiet: no number on the device may be waited for.
        struck: queries whose output is NaN, or None for none.
        silent: queries that read nothing.
        rows: queries of which the gradient is NaN, or None for none.
    """

    act: Attention
    sides: tuple[Tensor, ...]
    quiet: bool
    struck: Tensor | None = None
    silent: Tensor | None = None
    rows: Tensor | None = None


def contained(query: Tensor, key: Tensor, value: Tensor, act: Attention) -> tuple[Tensor, Tensor]:
    """Return what `act` gives, with NaN in the rows that read or are what is not finite, and only there.

    Gradients that flow in are contained in the same way.

    Args:
        query, key, value: tensors.
        act: the kernel.
    """
    if not value.shape[-1]:
        # A row without a number could not be marked.
        output, lse = contained(query, key, F.pad(value, (0, 1)), act)
        return output[..., :0], lse
    # Numbers that stand for several rows could not be cleared for one of them.
    query, key, value = (side.contiguous() if 0 in side.stride() else side for side in (query, key, value))
    record = _Record(act, tuple(_alike(side, "meta") for side in (query, key, value)), capturing(query))
    sides = _Enter.apply(query, key, value, record)
    if not record.quiet:
        output, lse = act(*sides)
    # An infinite query whose scores are all minus infinity may leave no trace in the output.
    if record.quiet or not (output.sum() + query.sum()).isfinite():
        rows, keys = spoiled(query), spoiled(key) | spoiled(value)
        if record.quiet or rows.any() or keys.any():
            finite = (
                _alike(side, side.device).copy_(side).masked_fill_(where.unsqueeze(-1), 0.0)
                for side, where in zip(sides, (rows, keys, keys), strict=True)
            )
            output, lse = act(*finite)
            record.struck = (rows | _readers(keys, sides, act)) & ~lse.isneginf()
    record.silent = lse.isneginf()
    return _Leave.apply(output, lse, record)


class _Enter(torch.autograd.Function):
    """Tensors as they are; backward, NaN in the gradients of what took part in a row that is NaN."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, record: _Record
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.record = record
        return query.view_as(query), key.view_as(key), value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.record.rows
        if rows is None:
            return *grads, None
        read = _read(rows, ctx.record)
        struck = (rows, read, read)
        return *(
            grad.masked_fill(where.unsqueeze(-1), torch.nan)
            for grad, where in zip(grads, struck, strict=True)
        ), None


class _Leave(torch.autograd.Function):
    """Results with NaN where rows are struck; backward, gradients without rows that are not finite."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, lse: Tensor, record: _Record) -> tuple[Tensor, Tensor]:
        ctx.record = record
        if record.struck is None:
            return output.view_as(output), lse.view_as(lse)
        return output.masked_fill(record.struck.unsqueeze(-1), torch.nan), lse.masked_fill(
            record.struck, torch.nan
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, None]:
        record = ctx.record
        # Nothing flows into a row that read nothing, whatever flows into its log-sum-exp.
        grad_lse = grad_lse.masked_fill(record.silent, 0.0)
        record.rows = None
        if record.struck is None and not record.quiet and (grad_output.sum() + grad_lse.sum()).isfinite():
            return grad_output, grad_lse, None
        rows = (spoiled(grad_output) | ~grad_lse.isfinite()) & ~record.silent
        rows = rows if record.struck is None else rows | record.struck
        if record.quiet or rows.any():
            record.rows = rows
        # A row that read nothing may be sent anything.
        rows = rows | record.silent
        return cleared(grad_output, rows), grad_lse.masked_fill(rows, 0.0), None


def capturing(side: Tensor) -> bool:
    """Say whether a CUDA graph is being captured, in which nothing can be decided by numbers on the device."""
    return side.is_cuda and torch.cuda.is_current_stream_capturing()


def spoiled(side: Tensor) -> Tensor:
    """Say which rows of a tensor hold NaN or infinity."""
    return ~side.isfinite().all(dim=-1)


def cleared(side: Tensor, rows: Tensor) -> Tensor:
    """Return a tensor with some of its rows 0."""
    return side.masked_fill(rows.unsqueeze(-1), 0.0)


def _alike(side: Tensor, device: torch.device | str) -> Tensor:
    """Return memory for a tensor that lies as another does, gaps included; kernels are compiled for how tensors lie."""
    return torch.empty_strided(side.shape, side.stride(), dtype=side.dtype, device=device)


def _readers(keys: Tensor, sides: tuple[Tensor, ...], act: Attention) -> Tensor:
    """Return which queries read a key that is marked: the mean of the marks they read is above 0."""
    marks = [_alike(side, side.device).zero_() for side in sides]
    marks[2][..., 0] = keys
    # Gradients are not asked for, but kernels are compiled for whether they may be.
    given = (mark.requires_grad_(side.requires_grad) for mark, side in zip(marks, sides, strict=True))
    return act(*given, gate=keys.any())[0].detach()[..., 0] > 0


def _read(rows: Tensor, record: _Record) -> Tensor:
    """Return which keys are read by a query that is marked: their share of its marks is above 0."""
    marks = [_alike(side, rows.device).zero_().requires_grad_() for side in record.sides]
    with torch.enable_grad():
        output, _ = record.act(*marks, gate=rows.any())
    into = torch.zeros_like(output)
    into[..., 0] = rows
    return torch.autograd.grad(output, marks[2], into)[0][..., 0] > 0
