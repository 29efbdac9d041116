"""The schedule: the steps in which keys come to one rank, and in which the gradients on its own keys come back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from longspan.ring.plan import Plan

Runs = tuple[range, ...]


@dataclass(frozen=True)
class Step:
    """What one rank does while it works on the keys of one other rank.

    Runs are places of the rank that owns the keys, here called the source.

    Attributes:
        source: whose keys arrive; the rank itself where it only sends.
        sender: who sends them.
        arrives: what arrives; empty for nothing.
        reads: what of it this rank's queries read.
        sends: to whom what is sent, `(receiver, source, runs)`.
        returns: from whom gradients on this rank's own keys come back, `(rank, runs)`.
        broadcast: what is sent goes to all ranks at once.
    """

    source: int
    sender: int
    arrives: Runs
    reads: Runs
    sends: tuple[tuple[int, int, Runs], ...]
    returns: tuple[tuple[int, Runs], ...]
    broadcast: bool = False


@lru_cache(maxsize=256)
def schedule(plan: Plan, rank: int) -> tuple[Step, ...]:
    """Return the steps of a rank under "exchange", "ring" or "gather", in the order that all ranks keep.

    Law: what a rank sends to another in a step is what that one receives from it in the same step.
    """
    ranks, needed = plan.layout.ranks, plan.traffic.runs
    if plan.strategy == "gather":
        return tuple(step for source in range(ranks) if (step := _spread(plan, rank, source)) is not None)
    steps = []
    for step in range(1, ranks):
        source, later = (rank - step) % ranks, (rank + step) % ranks
        reads, read = needed(rank, source), needed(later, rank)
        if plan.strategy == "exchange":
            sender, arrives, sent = source, reads, (later, rank, read)
        else:
            sender, arrives = (rank - 1) % ranks, plan.traffic.passed(source, step)
            forwarded = (source + 1) % ranks
            sent = ((rank + 1) % ranks, forwarded, plan.traffic.passed(forwarded, step))
        steps.append(
            Step(
                source,
                sender,
                arrives,
                reads,
                (sent,) if sent[2] else (),
                ((later, read),) if read else (),
            )
        )
    return tuple(steps)


def _spread(plan: Plan, rank: int, source: int) -> Step | None:
    runs, needed = plan.traffic.passed(source, 1), plan.traffic.runs
    if not runs:
        return None
    if rank != source:
        return Step(source, source, runs, needed(rank, source), (), (), broadcast=True)
    others = [other for other in range(plan.layout.ranks) if other != rank]
    returns = tuple((other, needed(other, rank)) for other in others if needed(other, rank))
    return Step(
        source, source, (), (), tuple((other, rank, runs) for other in others), returns, broadcast=True
    )
