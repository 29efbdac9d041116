"""Finite: what is no number stays with the pairs that are read, for kernels that multiply what is not read by 0.

Such a kernel is run on tensors in which the rows that are not finite are 0, and NaN is written to all that read them.
Which those are is found by attention over marks. Finite tensors pay for one sum forward and one backward, for which the
device is waited for. While a CUDA graph is captured nothing can wait: there the rows are looked through and cleared in any
case, and attention over marks is told by a number on the device whether there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Output and log-sum-exp of query, key and value; over marks, which are nothing but 0 where a number `gate` is 0.
Attention = Callable[..., tuple[Tensor, Tensor]]


@dataclass(eq=False)
class _Record:
    """What forward leaves for backward, and what the end of backward leaves for its beginning.

    Attributes:
        turned: attention with queries and keys exchanged.
        quiet: no number on the device may be waited for.
        struck: queries whose output is NaN, or None for none.
        silent: queries that read nothing.
        rows: queries of which the gradient is NaN, or None for none.
    """

    turned: Attention
    quiet: bool
    struck: Tensor | None = None
    silent: Tensor | None = None
    rows: Tensor | None = None


def contained(
    query: Tensor, key: Tensor, value: Tensor, act: Attention, plain: Attention, turned: Attention
) -> tuple[Tensor, Tensor]:
    """Return what `act` gives, with NaN in the rows that read or are what is not finite, and only there.

    Gradients that flow in are contained in the same way.

    Args:
        query, key, value: tensors.
        act: the kernel.
        plain: the same pairs without changes of scores, for marks; it gets one key head for every head of its value.
        turned: `plain` with queries and keys exchanged, with as many key heads as query heads.
    """
    record = _Record(turned, capturing(query))
    sides = _Enter.apply(query, key, value, record)
    if not record.quiet:
        output, lse = act(*sides)
    # An infinite query whose scores are all minus infinity may leave no trace in the output.
    if record.quiet or not (output.sum() + query.sum()).isfinite():
        rows, keys = spoiled(query), spoiled(key) | spoiled(value)
        if record.quiet or rows.any() or keys.any():
            finite = (cleared(side, where) for side, where in zip(sides, (rows, keys, keys), strict=True))
            output, lse = act(*finite)
            record.struck = (rows | _readers(keys, query, plain)) & ~lse.isneginf()
    record.silent = lse.isneginf()
    return _Leave.apply(output, lse, record)


class _Enter(torch.autograd.Function):
    """Tensors as they are; backward, NaN in the gradients of what took part in a row that is NaN."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, record: _Record
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.record, ctx.share = record, query.shape[1] // key.shape[1]
        return query.view_as(query), key.view_as(key), value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.record.rows
        if rows is None:
            return *grads, None
        read = _read(rows, grads[1].shape[2], ctx.record.turned).unflatten(1, (-1, ctx.share)).any(2)
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


@torch.no_grad()
def _readers(keys: Tensor, query: Tensor, plain: Attention) -> Tensor:
    """Return which queries read a key that is marked: the mean of the marks they read is above 0."""
    marks = keys.to(torch.float32).unsqueeze(-1)
    alike = torch.zeros(*query.shape[:-1], 1, device=query.device)
    return plain(alike, torch.zeros_like(marks), marks, gate=keys.any())[0].squeeze(-1) > 0


@torch.no_grad()
def _read(rows: Tensor, keys: int, turned: Attention) -> Tensor:
    """Return which keys are read by a query that is marked, on each query head."""
    marks = rows.to(torch.float32).unsqueeze(-1)
    alike = torch.zeros(*rows.shape[:2], keys, 1, device=rows.device)
    return turned(alike, torch.zeros_like(marks), marks, gate=rows.any())[0].squeeze(-1) > 0
