"""Attention while the keys go round: each rank keeps its queries, and keys come to it step by step.

Forward, the parts are merged as they come. Backward, each part is handed the merged output and log-sum-exp, which
makes its gradients exact shares of the whole, and those of foreign keys go straight to the owner.

What only every so many-th token reads is a turn of its own, over those tokens alone, and merges like any other part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.kernel.softmax.merge import merge_into
from longspan.ring import part
from longspan.ring.part import Reading
from longspan.ring.plan import Plan, Thread
from longspan.ring.schedule import Step, schedule
from longspan.ring.transport import Held, Link
from longspan.score import Scores


@dataclass(frozen=True)
class Turn:
    """One attention of one rank: the plan, the group, the scale, and what changes scores pair by pair."""

    plan: Plan
    group: dist.ProcessGroup
    scale: float
    changes: Scores
    name: str = ""

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
        return Reading(self.plan.rest, layout.shards[self.rank], spans, self.scale, self.changes)

    def threads(self) -> Iterator[tuple[Turn, _Places]]:
        """Return the turns of the threads, and where their tokens and heads lie in the tensors of this rank."""
        for thread in self.plan.threads:
            rows = self.plan.layout.places_of(self.rank, thread.tokens)
            slopes = self.changes.slopes and tuple(self.changes.slopes[head] for head in thread.heads)
            # Distances are counted in tokens of the text.
            slopes = slopes and tuple(slope * thread.tokens.step for slope in slopes)
            changes = replace(self.changes, slopes=slopes)
            name = f", every {thread.tokens.step} tokens"
            yield Turn(thread.plan, self.group, self.scale, changes, name), _Places(thread, rows)


class _Places:
    """Where the heads and tokens of a thread lie in the tensors of a rank."""

    def __init__(self, thread: Thread, rows: tuple[range, ...]) -> None:
        self.heads, self.key_heads = _shortest(thread.heads), _shortest(thread.key_heads)
        self.rows = _shortest(tuple(place for run in rows for place in run) if len(rows) != 1 else rows[0])

    def of_queries(self, side: Tensor) -> Tensor:
        return side[:, self.heads][:, :, self.rows]

    def of_keys(self, side: Tensor) -> Tensor:
        return side[:, self.key_heads][:, :, self.rows]

    def put(self, whole: Tensor, part: Tensor, *, keys: bool = False) -> None:
        """Put a part where it was taken from."""
        heads = self.key_heads if keys else self.heads
        if isinstance(heads, slice):
            whole[:, heads][:, :, self.rows] = part
            return
        for number, head in enumerate(heads):
            whole[:, head][:, self.rows] = part[:, number]


def _shortest(places: tuple[int, ...] | range) -> slice | list[int]:
    """Return places as a slice where they lie at regular distances: it needs no copy."""
    if not len(places):
        return slice(0, 0)
    step = places[1] - places[0] if len(places) > 1 else 1
    regular = range(places[0], places[-1] + 1, step) if step > 0 else range(0)
    if isinstance(places, range) or tuple(regular) == places:
        return slice(regular.start, regular.stop, regular.step)
    return list(places)


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
    turn = Turn(plan, group, scale, replace(changes, sinks=None))
    return _Attend.apply(query, key, value, changes.sinks, turn)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, turn: Turn
    ) -> Tensor:
        output, lse, kept = _forward(query, key, value, turn)
        found = [kept]
        for thread, places in turn.threads():
            part_output, part_lse, kept = _forward(
                places.of_queries(query), places.of_keys(key), places.of_keys(value), thread
            )
            found.append(kept)
            some_output, some_lse = places.of_queries(output), places.of_queries(lse)
            merge_into(some_output, some_lse, part_output, part_lse)
            places.put(output, some_output)
            places.put(lse, some_lse)
        if sinks is not None:
            # A key that every query reads, with a score of its own and value 0; one that reads nothing else gives 0.
            sink = sinks.detach().to(lse.dtype)[:, None].expand_as(lse)
            merge_into(output, lse, torch.zeros_like(output), sink)
        output = output.to(query.dtype)
        ctx.turn, ctx.kept = turn, [[(number, held.runs) for number, held in kept] for kept in found]
        received = (side for kept in found for _, held in kept for side in (held.key, held.value))
        ctx.save_for_backward(query, key, value, sinks, output, lse, *received)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, lse, *received = ctx.saved_tensors
        turn: Turn = ctx.turn
        grad_output = grad_output.contiguous()
        sides = iter(received)
        first, *others = [
            {number: Held(runs, next(sides), next(sides)) for number, runs in kept} for kept in ctx.kept
        ]
        grads = _backward(query, key, value, (output, lse), grad_output, turn, first)
        for (thread, places), kept in zip(turn.threads(), others, strict=True):
            made = _backward(
                places.of_queries(query),
                places.of_keys(key),
                places.of_keys(value),
                (places.of_queries(output), places.of_queries(lse)),
                places.of_queries(grad_output),
                thread,
                kept,
            )
            places.put(grads[0], places.of_queries(grads[0]) + made[0])
            for whole, share in zip(grads[1:], made[1:], strict=True):
                places.put(whole, places.of_keys(whole) + share, keys=True)
        grad_sinks = _grad_sinks(sinks, output, lse, grad_output)
        return (*(grad.to(query.dtype) for grad in grads), grad_sinks, None)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, turn: Turn
) -> tuple[Tensor, Tensor, list[tuple[int, Held]]]:
    """Return output and log-sum-exp of one turn, and the keys that came and are kept for the way back."""
    exact = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros((*query.shape[:3], value.shape[3]), dtype=exact)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=exact, device=query.device)
    steps = turn.steps()
    own = Held(turn.plan.layout.pieces(turn.rank), key, value)
    kept: list[tuple[int, Held]] = []
    for number, held in Link(turn.group, own, steps, f"forward{turn.name}").arrivals():
        if held is None:
            continue
        source = steps[number].source if number >= 0 else turn.rank
        merge_into(output, lse, *part.attend(query, held.key, held.value, turn.reading(source, held)))
        # Keys that came over a ring would add up to the whole text, so they come again instead.
        if number >= 0 and turn.plan.strategy != "ring":
            kept.append((number, held))
    return output, lse, kept


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merged: tuple[Tensor, Tensor],
    grad_output: Tensor,
    turn: Turn,
    kept: dict[int, Held],
) -> list[Tensor]:
    """Return the gradients of one turn, given the output and log-sum-exp of all of them."""
    steps, exact = turn.steps(), merged[1].dtype
    grads = [torch.zeros(side.shape, dtype=exact, device=side.device) for side in (query, key, value)]
    own = Held(turn.plan.layout.pieces(turn.rank), key, value)
    link = Link(turn.group, own, steps, f"backward{turn.name}")
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
            made = part.gradients(query, held.key, held.value, reading, merged, grad_output)
            grads[0] += made[0]
            if number < 0:
                grads[1] += made[1]
                grads[2] += made[2]
            else:
                given = Held(held.runs, made[1].to(key.dtype), made[2].to(key.dtype))
        if number >= 0:
            returns.append(link.give_back(number, given))
    for returned in returns:
        for gradient in returned():
            _add(gradient, grads[1], grads[2])
    return grads


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
