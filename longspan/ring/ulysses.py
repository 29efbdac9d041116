"""Ulysses: tokens are swapped for heads, so that each rank sees the whole text with a few heads, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention import attend as attend_alone
from longspan.layout import Layout
from longspan.pattern import PerHead
from longspan.ring.plan import Plan
from longspan.ring.transport import exchange
from longspan.score import Scores

# For each rank the heads that it works on, for each of the tensors that are swapped together.
Shares = list[tuple[range, ...]]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    group: dist.ProcessGroup,
    scale: float,
    changes: Scores,
) -> Tensor:
    """Return the output of this rank's queries, differentiable; every rank of the group calls it alike."""
    layout, rank = plan.layout, dist.get_rank(group)
    both = [plan.share(other) for other in range(layout.ranks)]
    query, key, value = Swap.apply(
        layout, group, [(mine, read, read) for mine, read in both], query, key, value
    )
    order = torch.from_numpy(layout.order()).to(query.device)
    heads, key_heads = both[rank]
    if heads:
        own = repeated(heads, key_heads, plan.heads // plan.key_heads)
        if own is not None:
            key, value = (side[:, torch.tensor(own, device=side.device)] for side in (key, value))
        pattern = PerHead([plan.pattern.at_head(head, plan.heads) for head in heads])
        output = attend_alone(
            *(side[:, :, order] for side in (query, key, value)),
            pattern,
            queries=range(layout.length),
            scale=scale,
            scores=changes.of(heads),
        )
        output = output[:, :, torch.argsort(order)]
    else:
        # Without a head there is no output, but the gradients of this rank's tokens still come from the others.
        nothing = query.sum() + key.sum() + value.sum()
        if changes.sinks is not None:
            nothing = nothing + 0 * changes.sinks.sum()
        output = nothing + query.new_zeros((*query.shape[:3], value.shape[3]))
    return Return.apply(layout, group, [(mine,) for mine, _ in both], output)[0]


def repeated(heads: range, key_heads: range, group: int) -> list[int] | None:
    """Return which key head each of some neighbouring query heads reads, where they do not share them equally."""
    own = [head // group - key_heads[0] for head in heads]
    each, rest = divmod(len(heads), len(key_heads))
    return None if not rest and own == [number // each for number in range(len(heads))] else own


class Swap(torch.autograd.Function):
    """All heads of this rank's tokens, for all tokens of this rank's heads."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, group: dist.ProcessGroup, shares: Shares, *sides: Tensor) -> Any:
        ctx.given = layout, group, shares, [side.shape[1] for side in sides]
        return _to_heads(layout, group, shares, sides, "forward")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        layout, group, shares, heads = ctx.given
        return (None, None, None, *_to_tokens(layout, group, shares, grads, heads, "backward"))


class Return(torch.autograd.Function):
    """All tokens of this rank's heads, for all heads of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, group: dist.ProcessGroup, shares: Shares, *sides: Tensor) -> Any:
        ctx.given = layout, group, shares
        heads = [sum(len(share[place]) for share in shares) for place in range(len(sides))]
        return _to_tokens(layout, group, shares, sides, heads, "forward")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, None, None, *_to_heads(*ctx.given, grads, "backward"))


def _to_heads(
    layout: Layout, group: dist.ProcessGroup, shares: Shares, sides: tuple[Tensor, ...], label: str
) -> tuple[Tensor, ...]:
    rank, places = dist.get_rank(group), [layout.places(other) for other in range(layout.ranks)]
    leaving = [[side[:, share[n].start : share[n].stop] for n, side in enumerate(sides)] for share in shares]
    shapes = [
        [(side.shape[0], len(shares[rank][n]), count, side.shape[3]) for n, side in enumerate(sides)]
        for count in places
    ]
    came = _all_to_all(leaving, shapes, group, label)
    return tuple(torch.cat(side, dim=2) for side in zip(*came, strict=True))


def _to_tokens(
    layout: Layout,
    group: dist.ProcessGroup,
    shares: Shares,
    sides: tuple[Tensor, ...],
    heads: list[int],
    label: str,
) -> tuple[Tensor, ...]:
    rank, places = dist.get_rank(group), [layout.places(other) for other in range(layout.ranks)]
    leaving = list(zip(*(side.split(places, dim=2) for side in sides), strict=True))
    shapes = [
        [(side.shape[0], len(share[n]), places[rank], side.shape[3]) for n, side in enumerate(sides)]
        for share in shares
    ]
    came = _all_to_all(leaving, shapes, group, label)
    whole = []
    for n, (side, number) in enumerate(zip(sides, heads, strict=True)):
        # A key head that several ranks read has come from all of them: gradients add up.
        joined = side.new_zeros((side.shape[0], number, places[rank], side.shape[3]))
        for share, pieces in zip(shares, came, strict=True):
            joined[:, share[n].start : share[n].stop] += pieces[n]
        whole.append(joined)
    return tuple(whole)


def _all_to_all(
    leaving: Any, shapes: list[list[tuple[int, ...]]], group: dist.ProcessGroup, label: str
) -> list[list[Tensor]]:
    """Send each rank its tensors, and return those that each rank sent, of the shapes known beforehand."""
    rank = dist.get_rank(group)
    rows = [torch.cat([side.reshape(-1) for side in sides]) for sides in leaving]
    sizes = [[int(np.prod(shape)) for shape in given] for given in shapes]
    came = [
        rows[rank].new_empty(sum(size)) if other != rank else rows[rank] for other, size in enumerate(sizes)
    ]
    exchange(
        group,
        [(other, row) for other, row in enumerate(rows) if other != rank and len(row)],
        [(other, row) for other, row in enumerate(came) if other != rank and len(row)],
        f"swapping tokens for heads, {label}",
    )()
    return [
        [flat.view(shape) for flat, shape in zip(row.split(size), given, strict=True)]
        for row, size, given in zip(came, sizes, shapes, strict=True)
    ]
