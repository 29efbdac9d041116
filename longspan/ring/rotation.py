"""Attention while the keys go round: each rank keeps its queries, and keys come to it step by step.

Forward, the parts are merged as they come. Backward, each part is handed the merged output and log-sum-exp, which
makes its gradients exact shares of the whole, and those of foreign keys go straight to the owner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.kernel.merge import merge_into
from longspan.ring import part
from longspan.ring.plan import Plan
from longspan.ring.schedule import Step, schedule
from longspan.ring.transport import Held, Link


@dataclass(frozen=True)
class Round:
    """One attention of one rank: the plan, the group and the scale."""

    plan: Plan
    group: dist.ProcessGroup
    scale: float

    def steps(self) -> tuple[Step, ...]:
        """Return the steps of this rank."""
        return schedule(self.plan, self.rank)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def spans(self, source: int, held: Held) -> tuple[range, ...]:
        """Return the positions of what is held of a rank."""
        return tuple(self.plan.layout.span(source, run) for run in held.runs)


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, group: dist.ProcessGroup, scale: float
) -> Tensor:
    """Return the output of this rank's queries, differentiable; every rank of the group calls it alike."""
    return _Attend.apply(query, key, value, Round(plan, group, scale))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, turn: Round) -> Tensor:
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
            made = part.attend(query, held.key, held.value, *_where(turn, source, held))
            merge_into(output, lse, *made)
            if number >= 0 and turn.plan.strategy != "ring":
                kept.append((number, held))
        output = output.to(query.dtype)
        ctx.turn, ctx.kept = turn, [(number, held.runs) for number, held in kept]
        # Keys that came over a ring would add up to the whole text, so they come again instead.
        ctx.save_for_backward(
            query, key, value, output, lse, *(side for _, held in kept for side in (held.key, held.value))
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, *received = ctx.saved_tensors
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
                made = part.gradients(
                    query, held.key, held.value, *_where(turn, source, held), (output, lse), grad_output
                )
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
        return (*(grad.to(query.dtype) for grad in (grad_query, grad_key, grad_value)), None)


def _where(turn: Round, source: int, held: Held) -> tuple[Any, ...]:
    return turn.plan.pattern, turn.plan.layout.shards[turn.rank], turn.spans(source, held), turn.scale


def _add(gradient: Held, grad_key: Tensor, grad_value: Tensor) -> None:
    """Add what came back for some places to the gradients of this rank's keys and values."""
    first = 0
    for run in gradient.runs:
        taken = slice(first, first + len(run))
        for whole, came in ((grad_key, gradient.key), (grad_value, gradient.value)):
            whole[:, :, run.start : run.stop] += came[:, :, taken]
        first += len(run)
