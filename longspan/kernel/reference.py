"""The reference kernel: attention as written in the definition, dense, in plain PyTorch, for any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.derive.mask import counts
from longspan.pattern import Pattern


def scores_bytes(query: Tensor, key: Tensor) -> int:
    """Return the memory that the scores take."""
    batch, heads, rows, _ = query.shape
    return batch * heads * rows * key.shape[2] * max(4, query.element_size())


def attend(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, *, queries: range, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp: softmax over the scores plus the logarithm of each pair's count."""
    heads = query.shape[1]
    group = heads // key.shape[1]
    key, value = (side.repeat_interleave(group, dim=1) for side in (key, value))
    often = counts(pattern, queries=queries, keys=range(key.shape[2]), heads=heads).to(query.device)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(exact) @ key.to(exact).transpose(-1, -2)) * scale
    scores = (scores + often.to(exact).log()).masked_fill(often == 0, -torch.inf)
    # A query that reads nothing would give minus infinity less itself.
    silent = (often == 0).all(dim=-1)
    scores = scores.masked_fill(silent.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(silent.unsqueeze(-1), 0.0)
    return (weights @ value.to(exact)).to(query.dtype), lse.masked_fill(silent, -torch.inf)
