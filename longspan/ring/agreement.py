"""Agreement: before the first exchange of a new configuration, all ranks say what they are about to do."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.errors import message
from longspan.ring.transport import RankError, reaching
from longspan.version import version

_agreed: WeakKeyDictionary[dist.ProcessGroup, set[tuple[tuple[str, str], ...]]] = WeakKeyDictionary()


def agree(group: dist.ProcessGroup, facts: dict[str, str], problem: str | None) -> None:
    """Raise RankError on every rank unless all of them hold the same facts and none has a problem.

    Ranks talk to one another once per configuration. A rank with a problem must come here too, for the others wait.

    Args:
        group: the process group.
        facts: what must be equal, label to text.
        problem: what is wrong with the tensors of this rank, or None.
    """
    config = tuple(facts.items())
    known = _agreed.setdefault(group, set())
    if problem is None and config in known:
        return
    rank = dist.get_rank(group)
    said: list[tuple[dict[str, str], str | None]] = [({}, None)] * dist.get_world_size(group)
    mine = {**facts, "longspan": version("longspan") or "not installed", "torch": torch.__version__}
    with reaching(rank, "the other ranks", "comparing what each rank is about to do"):
        dist.all_gather_object(said, (mine, problem), group=group)
    troubled = [f"rank {n}  {line}" for n, (_, why) in enumerate(said) if why for line in why.splitlines()]
    if troubled:
        raise RankError(
            message(
                "Some ranks cannot attend to what they were given.",
                {"found": troubled},
                fix="on every rank, the shard that layout.positions(rank) cuts from the whole tensors",
            )
        )
    different = [label for label in mine if len({facts.get(label) for facts, _ in said}) > 1]
    if different:
        raise RankError(
            message(
                "The ranks are about to do different things.",
                {
                    label: [f"rank {n}  {facts.get(label)}" for n, (facts, _) in enumerate(said)]
                    for label in different
                },
                fix="the same pattern, layout, shapes, options and versions on every rank",
            )
        )
    known.add(config)


def same(group: dist.ProcessGroup, numbers: Tensor, what: str) -> None:
    """Raise RankError on every rank unless all of them hold the same numbers, int64, as many on each."""
    rank = dist.get_rank(group)
    both = torch.stack([numbers, -numbers])
    with reaching(rank, "the other ranks", f"comparing {what}"):
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    if (both[0] != -both[1]).any():
        raise RankError(
            message(
                "The ranks have been given different things.",
                {"different": what},
                fix="the same on all ranks that share a text; longspan.hf.share_batches(loader, ranks) sees to it",
            )
        )
