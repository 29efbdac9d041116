"""Attention by its definition over whole matrices: the truth in float64, and in a low precision what its budget is taken from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXACT = 1e-10


def dense(query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp in the precision of the tensors, step by step, with gradients.

    Args:
        query, key, value: `[batch, heads, length, width]`, of fewer key heads where they are shared.
        counts: how often each query reads each key, `[heads, queries, keys]`, on any device.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (side.repeat_interleave(group, dim=1) for side in (key, value))
    counts = counts.to(query.device)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(counts == 0, -math.inf)
    silent = (counts == 0).all(-1, keepdim=True)
    largest = scores.detach().amax(-1, keepdim=True).masked_fill(silent, 0)
    weights = counts.to(query.dtype) * (scores - largest).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(silent, 1)
    lse = (largest + total.log()).masked_fill(silent, -math.inf)
    return (weights / total) @ value, lse.squeeze(-1)


def apart(one: Tensor, other: Tensor) -> float:
    """Return the largest distance of two tensors, infinite where one holds what is no number and the other does not."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    unlike = (one != other) & ~(one.isnan() & other.isnan())
    return float((one - other)[unlike].abs().nan_to_num(nan=math.inf).max()) if unlike.any() else 0.0


def budget(plain: Tensor, truth: Tensor, lse: Tensor | None = None) -> float:
    """Return the largest error that a kernel may make: twice that of the plain computation in the same precision.

    A rounding of the largest number comes on top, and where weights come from a stored log-sum-exp (`lse`) its own.
    """
    if plain.dtype == torch.float64:
        return EXACT
    truth = truth.detach()
    finite = truth[truth.isfinite()]
    largest = float(finite.abs().max()) if len(finite) else 0.0
    roundings = 1.0
    if lse is not None and lse.isfinite().any():
        roundings += float(lse.detach()[lse.isfinite()].abs().max())
    band = roundings * torch.finfo(torch.float32).eps * largest
    if plain.dtype != torch.float32:
        band += torch.finfo(plain.dtype).eps * largest
    return 2 * apart(plain, truth) + band
