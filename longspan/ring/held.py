"""Held keys: a few queries that every rank has, over keys of which each rank holds some."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.kernel.softmax.merge import merge
from longspan.pattern import Pattern
from longspan.ring.transport import reaching
from longspan.score import Scores

# Scores that are computed at a time, numbers.
_SCORES = 1 << 24


def attend_held(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    at: Tensor,
    positions: Tensor,
    group: dist.ProcessGroup,
    scale: float,
    changes: Scores,
) -> Tensor:
    """Return attention of the queries over the keys of all ranks, on every rank, without gradients.

    Law: it is attention over the keys of all ranks put together. Each rank attends to its own, and outputs are merged
    by their log-sum-exps, so what moves is as large as the outputs, however long the text is: each rank sends every
    other its output and one number for each query and head.

    Args:
        query: `[batch, heads, queries, width]`, the same on every rank.
        key, value: `[batch, key heads, keys, width]`, those that this rank holds, as many as it likes.
        pattern: which keys each query reads.
        at: positions of the queries, int64 `[batch, queries]`.
        positions: of the keys, int64 `[batch, keys]`; -1 where there is none.
        group: the ranks.
        scale: what scores are multiplied by.
        changes: what else is done to them.

    Returns:
        `[batch, heads, queries, value width]` in the dtype of the query.

    References:
        Milakov and Gimelshein (arXiv 1805.02867) for the merge; Liu et al., Ring Attention (arXiv 2310.01889).
    """
    size = max(1, _SCORES // max(1, query.shape[0] * query.shape[1] * query.shape[2]))
    parts = [
        _part(query, key[:, :, some], value[:, :, some], pattern, at, positions[:, some], scale, changes)
        for some in (slice(first, first + size) for first in range(0, max(1, key.shape[2]), size))
    ]
    output, lse = merge(parts)
    mine = torch.cat([output, lse.unsqueeze(-1)], dim=-1).contiguous()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with reaching(dist.get_rank(group), "the other ranks", "joining what each rank read of the cache"):
        dist.all_gather(everyone, mine, group=group)
    found = [(part[..., :-1], part[..., -1]) for part in everyone]
    if changes.sinks is not None:
        sink = changes.sinks.to(lse.dtype)[:, None].expand_as(lse)
        found.append((torch.zeros_like(output), sink))
    return merge(found)[0].to(query.dtype)


def _part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    at: Tensor,
    positions: Tensor,
    scale: float,
    changes: Scores,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of some keys of this rank."""
    batch, heads, queries, width = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    # Query heads that share a key head read it as rows of one product.
    folded = query.to(exact).reshape(batch, key.shape[1], -1, width)
    scores = (folded @ key.to(exact).transpose(-1, -2)).view(batch, heads, queries, -1) * scale
    if changes.limit is not None:
        scores = changes.limit * torch.tanh(scores / changes.limit)
    q, k = at[:, :, None].cpu(), positions[:, None, :].cpu()
    if changes.slopes is not None:
        slopes = torch.tensor(changes.slopes, dtype=exact, device=query.device)
        scores = scores - slopes[:, None, None] * (q - k).abs().unsqueeze(1).to(scores)
    singles = [pattern.at_head(head, heads) for head in range(heads)]
    shape = (batch, queries, positions.shape[1])
    counted = {
        single: (single.count(q, k.clamp(min=0)).expand(shape) * (k >= 0)).to(query.device)
        for single in set(singles)
    }
    often = torch.stack([counted[single] for single in singles], dim=1)
    scores = (scores + often.to(exact).log()).masked_fill(often == 0, -torch.inf)
    if not scores.shape[-1]:
        silent = scores.new_full(scores.shape[:-1], -torch.inf)
        return scores.new_zeros((*query.shape[:3], value.shape[3])), silent
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1))
    output = weights.view(batch, key.shape[1], -1, scores.shape[-1]) @ value.to(exact)
    return output.view(*query.shape[:3], value.shape[3]), lse
