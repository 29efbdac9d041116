"""Attention while the keys go round: each rank keeps its queries, and keys come to it step by step.

Forward, the parts are merged as they come. Backward, each part is handed the merged output and log-sum-exp, which
makes its gradients exact shares of the whole, and those of foreign keys go straight to the owner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.kernel.merge import merge_into
from longspan.ring import part
from longspan.ring.part import Reading
from longspan.ring.plan import Plan
from longspan.ring.schedule import Step, schedule
from longspan.ring.transport import Held, Link
from longspan.score import Scores


@dataclass(frozen=True)
class Round:
    """One attention of one rank: the plan, the group, the scale, and what changes scores pair by pair."""

    plan: Plan
    group: dist.ProcessGroup
    scale: float
    changes: Scores

    def steps(self) -> tuple[Step, ...]:
        """Return the steps of this rank."""
        return schedule(self.plan, self.rank)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def reading(self, source: int, held: Held) -> Reading:
        """Return how this rank reads what is held of a rank."""
        layout = self.plan.layout
        spans = tuple(layout.span(source, run) for run in held.runs)
        return Reading(self.plan.pattern, layout.shards[self.rank], spans, self.scale, self.changes)


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
    turn = Round(plan, group, scale, replace(changes, sinks=None))
    return _Attend.apply(query, key, value, changes.sinks, turn)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, turn: Round
    ) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        output = query.new_zeros((*query.shape[:3], value.shape[3]), dtype=exact)
        lse = torch.full(query.shape[:3], -torch.inf, dtype=exact, device=query.device)
        steps = turn.steps()
        own = Held(turn.plan.layout.pieces(turn.rank), key, value)
        kept: list[tuple[int, Held]] = []
        for number, held in Link(turn.group, own, steps, "forward").arrivals():
            if held is None:
                continue
            source = steps[number].source if number >= 0 else turn.rank
            merge_into(output, lse, *part.attend(query, held.key, held.value, turn.reading(source, held)))
            if number >= 0 and turn.plan.strategy != "ring":
                kept.append((number, held))
        if sinks is not None:
            # A key that every query reads, with a score of its own and value 0; one that reads nothing else gives 0.
            sink = sinks.detach().to(exact)[:, None].expand_as(lse)
            merge_into(output, lse, torch.zeros_like(output), sink)
        output = output.to(query.dtype)
        ctx.turn, ctx.kept = turn, [(number, held.runs) for number, held in kept]
        # Keys that came over a ring would add up to the whole text, so they come again instead.
        received = (side for _, held in kept for side in (held.key, held.value))
        ctx.save_for_backward(query, key, value, sinks, output, lse, *received)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, lse, *received = ctx.saved_tensors
        turn: Round = ctx.turn
        steps = turn.steps()
        grad_output = grad_output.contiguous()
        grad_query, grad_key, grad_value = (
            torch.zeros(side.shape, dtype=lse.dtype, device=side.device) for side in (query, key, value)
        )
        own = Held(turn.plan.layout.pieces(turn.rank), key, value)
        link = Link(turn.group, own, steps, "backward")
        kept = {
            number: Held(runs, received[2 * place], received[2 * place + 1])
            for place, (number, runs) in enumerate(ctx.kept)
        }
        if turn.plan.strategy == "ring":
            arrivals = link.arrivals()
        else:
            arrivals = iter([(number, kept.get(number)) for number in range(len(steps))] + [(-1, own)])
        returns: list[Callable[[], list[Held]]] = []
        for number, held in arrivals:
            given = None
            if held is not None:
                source = steps[number].source if number >= 0 else turn.rank
                reading = turn.reading(source, held)
                made = part.gradients(query, held.key, held.value, reading, (output, lse), grad_output)
                grad_query += made[0]
                if number < 0:
                    grad_key += made[1]
                    grad_value += made[2]
                else:
                    given = Held(held.runs, made[1].to(key.dtype), made[2].to(key.dtype))
            if number >= 0:
                returns.append(link.give_back(number, given))
        for returned in returns:
            for gradient in returned():
                _add(gradient, grad_key, grad_value)
        grads = (grad.to(query.dtype) for grad in (grad_query, grad_key, grad_value))
        return (*grads, _grad_sinks(sinks, output, lse, grad_output), None)


def _grad_sinks(sinks: Tensor | None, output: Tensor, lse: Tensor, grad_output: Tensor) -> Tensor | None:
    """Return the gradient of the logits of sinks, from this rank's queries: its share of theirs."""
    if sinks is None:
        return None
    along = (grad_output.to(lse.dtype) * output.to(lse.dtype)).sum(dim=-1)
    return -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * along).sum(dim=(0, 2)).to(sinks.dtype)


def _add(gradient: Held, grad_key: Tensor, grad_value: Tensor) -> None:
    """Add what came back for some places to the gradients of this rank's keys and values."""
    first = 0
    for run in gradient.runs:
        taken = slice(first, first + len(run))
        for whole, came in ((grad_key, gradient.key), (grad_value, gradient.value)):
            whole[:, :, run.start : run.stop] += came[:, :, taken]
        first += len(run)
