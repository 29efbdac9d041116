"""The reference kernel: attention as written in the definition, dense, in plain PyTorch, for any dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.derive.mask import counts
from longspan.kernel.softmax.finite import spoiled
from longspan.pattern import Pattern
from longspan.score import Scores


def scores_bytes(query: Tensor, key: Tensor) -> int:
    """Return the memory that the scores take."""
    batch, heads, rows, _ = query.shape
    return batch * heads * rows * key.shape[2] * max(4, query.element_size())


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    queries: range,
    scale: float,
    changes: Scores,
    keys: range | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp: softmax over the scores plus the logarithm of each pair's count.

    Keys are at positions `keys`, None for those from 0 on.
    """
    heads, dtype = query.shape[1], query.dtype
    group = heads // key.shape[1]
    key, value = (side.repeat_interleave(group, dim=1) for side in (key, value))
    keys = range(key.shape[2]) if keys is None else keys
    often = counts(pattern, queries=queries, keys=keys, heads=heads).to(query.device)
    exact = torch.promote_types(dtype, torch.float32)
    query, key, value = (side.to(exact) for side in (query, key, value))
    # What is no number is told to the pairs it belongs to, and is kept out of sums over other pairs.
    no_number = spoiled(query).unsqueeze(-1) | (spoiled(key) | spoiled(value)).unsqueeze(-2)
    weightless = often == 0
    if changes.limit is None and key.isinf().any():
        # Scores of minus infinity weigh nothing. Backward, 0 times infinity is no number.
        lost = (query.detach() @ key.detach().transpose(-1, -2) * scale).isneginf() & (often > 0)
        lost &= ~(spoiled(query).unsqueeze(-1) | spoiled(value).unsqueeze(-2))
        no_number, weightless = no_number & ~lost, weightless | lost
        query, key, value = _Lost.apply(query, key, value, lost.any(dim=-1), often > 0)
    query, key, value = (side.nan_to_num(0.0, 0.0, 0.0) for side in (query, key, value))
    scores = (query @ key.transpose(-1, -2)) * scale
    if changes.limit is not None:
        scores = changes.limit * torch.tanh(scores / changes.limit)
    if changes.slopes is not None:
        slopes = torch.tensor(changes.slopes, dtype=exact, device=query.device)
        scores = scores - slopes[:, None, None] * _distance(queries, keys).to(scores)
    scores = scores + torch.zeros_like(scores).masked_fill(no_number, torch.nan)
    scores = (scores + often.to(exact).log()).masked_fill(weightless, -torch.inf)
    if changes.sinks is not None:
        # A sink is a key that every query reads, with a score of its own and value 0.
        sinks = changes.sinks.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)
        scores, value = torch.cat([scores, sinks], dim=-1), F.pad(value, (0, 0, 0, 1))
    # A query that reads nothing would give minus infinity less itself.
    unread = torch.isneginf(scores)
    silent = unread.all(dim=-1)
    scores = scores.masked_fill(silent.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(unread, 0.0)
    output, lse = _Weighed.apply(weights, value, lse, unread)
    return output.to(dtype), lse.masked_fill(silent, -torch.inf)


class _Lost(torch.autograd.Function):
    """Tensors as they are; backward, NaN for some rows of the query, and for keys and values that they read."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, read: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rows, (rows.unsqueeze(-1) & read).any(dim=-2))
        return query.view_as(query), key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys = (struck.unsqueeze(-1) for struck in ctx.saved_tensors)
        struck = zip(grads, (rows, keys, keys), strict=True)
        return *(grad.masked_fill(where, torch.nan) for grad, where in struck), None, None


class _Weighed(torch.autograd.Function):
    """`weights @ value`, and the log-sum-exp as it is: rows of their gradients that are not finite become NaN for
    the pairs that the rows read, and for no others."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, value: Tensor, lse: Tensor, unread: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weights, value, unread)
        return weights @ value, lse.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        weights, value, unread = ctx.saved_tensors
        rows = spoiled(grad) | ~grad_lse.isfinite()
        struck = (rows.unsqueeze(-1) & ~unread).any(dim=-2)
        into_weights = grad.masked_fill(rows.unsqueeze(-1), torch.nan) @ value.transpose(-1, -2)
        into_value = weights.transpose(-1, -2) @ grad.masked_fill(rows.unsqueeze(-1), 0.0)
        into_lse = grad_lse.masked_fill(rows, torch.nan)
        return into_weights, into_value.masked_fill(struck.unsqueeze(-1), torch.nan), into_lse, None


def _distance(queries: range, keys: range) -> Tensor:
    return (torch.tensor(queries, dtype=torch.int64)[:, None] - torch.tensor(keys, dtype=torch.int64)).abs()
