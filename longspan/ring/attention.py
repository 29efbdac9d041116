"""The operation: attention over a pattern, by ranks that each hold a shard of the text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.attention import attend as attend_alone
from longspan.errors import LongspanError, message
from longspan.layout import Layout
from longspan.pattern import Pattern
from longspan.ring import grid, rotation, ulysses
from longspan.ring.agreement import agree
from longspan.ring.plan import STRATEGIES, settled
from longspan.ring.transport import RankError
from longspan.score import Score, Scores, Sinks, collect


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    layout: Layout,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    strategy: str | None = None,
    scores: Score | Sequence[Score] = (),
) -> Tensor:
    """Attend across ranks: each holds a shard of queries, keys and values, and gets the output of its queries.

    Law: the outputs of all ranks, joined by the layout, are `longspan.attend` on the whole tensors, and so are the
    gradients. Every rank of the group calls it with the same arguments but its own shard. Scores are multiplied by
    `1 / sqrt(width)`; for another scale, multiply the query by `scale * sqrt(width)`.

    Args:
        query: `[batch, heads, places, width]`, the positions `layout.positions(rank)`.
        key: `[batch, key heads, places, width]`, the same positions.
        value: `[batch, key heads, places, value width]`.
        pattern: which keys each query reads, and how often, in absolute positions.
        layout: how positions lie on ranks: `contiguous`, `zigzag` or `striped` of `longspan.layout`.
        group: a process group or a one-dimensional DeviceMesh, gloo on CPU or NCCL on GPU; None for all ranks. On a
            two-dimensional mesh the ranks of each row swap tokens for heads, and keys move along the columns; its
            rank in row i and column j has number `i * columns + j` in the layout.
        strategy: "exchange", "ring", "ulysses" or "gather"; None takes the cheapest, see `longspan.ring.plan`. On a
            two-dimensional mesh, that of the columns.
        scores: what changes them beside the pattern, as for `longspan.attend`. The gradient of the logits of
            `Sinks` is that of this rank's queries: like those of other weights, it is to be summed over ranks.

    Returns:
        `[batch, heads, places, value width]` in the dtype of `query`.

    Raises:
        PatternError: a pattern that cannot be shared out among the heads.
        PlanError: no kernel that can run it.
        RankError: ranks that differ, a shard of the wrong size, a rank that does not answer within the timeout of
            the group; the message names rank and step.

    Example:
        A group of one rank; torchrun starts as many as there are.

        >>> import tempfile
        >>> from longspan import Causal
        >>> from longspan.layout import zigzag
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ...     query = key = value = torch.randn(1, 2, 16, 8)
        ...     attend(query, key, value, Causal(), layout=zigzag(16, ranks=1)).shape
        ...     dist.destroy_process_group()
        torch.Size([1, 2, 16, 8])

    References:
        Liu et al., Ring Attention (arXiv 2310.01889), section 3; Jacobs et al., DeepSpeed Ulysses
        (arXiv 2309.14509), section 3.
    """
    mesh = group if isinstance(group, DeviceMesh) and group.ndim == 2 else None
    members = group_of(group)
    number = dist.get_rank(members) if mesh is None else grid.number(mesh)
    sides = {"query": query, "key": key, "value": value}
    described = {name: f"{[*side.shape[:2], *side.shape[3:]]} {side.dtype}" for name, side in sides.items()}
    wants = torch.is_grad_enabled() and any(side.requires_grad for side in sides.values())
    facts = {
        "pattern": str(pattern),
        "layout": str(layout),
        **described,
        "strategy": str(strategy),
        "scores": _described(scores),
        "gradients": "wanted" if wants else "not wanted",
    }
    if mesh is not None:
        facts["mesh"] = " x ".join(map(str, mesh.shape))
    problem = _problem((query, key, value), pattern, layout, (number, members), strategy, scores)
    agree(members, facts, problem or (mesh and grid.problem(mesh, query.shape[1], strategy)))
    changes = query.shape[-1] ** -0.5, collect(scores, query.shape[1])
    if mesh is not None:
        return grid.attend(
            query,
            key,
            value,
            pattern,
            layout=layout,
            mesh=mesh,
            strategy=strategy,
            changes=changes,
        )
    return attend_agreed(
        query,
        key,
        value,
        pattern,
        layout=layout,
        group=members,
        strategy=strategy,
        changes=changes,
    )


def attend_agreed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    layout: Layout,
    group: dist.ProcessGroup,
    strategy: str | None,
    changes: tuple[float, Scores],
) -> Tensor:
    """Attend as `attend` does, by ranks that have agreed on everything before: nothing is checked.

    `changes` are the scale of scores and what else is done to them.
    """
    scale, given = changes
    if scale <= 0:
        # PyTorch's kernel takes positive scales only.
        query, scale = query * scale, 1.0
    row = query.shape[0] * query.element_size()
    heads, widths = (query.shape[1], key.shape[1]), (key.shape[3], value.shape[3])
    shared = settled(pattern, layout, heads, widths, row, strategy)
    run = ulysses if shared.strategy == "ulysses" else rotation
    with torch.autocast(query.device.type, enabled=False):
        return run.attend(query, key, value, shared, group, scale, given)


def group_of(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """Return the process group of a mesh, of all ranks for None."""
    if not dist.is_initialized():
        raise RankError(
            message(
                "There is no process group.",
                {"asked": "attention across ranks"},
                fix="torch.distributed.init_process_group() in a program that torchrun starts",
            )
        )
    if group is None or (isinstance(group, DeviceMesh) and group.size() == dist.get_world_size()):
        return dist.group.WORLD
    if isinstance(group, DeviceMesh) and group.ndim > 1:
        return group._flatten().get_group()
    return group.get_group() if isinstance(group, DeviceMesh) else group


def _described(scores: Score | Sequence[Score]) -> str:
    """Say what changes scores, without the numbers of tensors."""
    given = scores if isinstance(scores, list | tuple) else [scores]
    return (
        ", ".join(type(one).__name__ if isinstance(one, Sinks) else str(one) for one in given)
        or "as they are"
    )


def _problem(
    sides: tuple[Tensor, Tensor, Tensor],
    pattern: Pattern,
    layout: Layout,
    member: tuple[int, dist.ProcessGroup],
    strategy: str | None,
    scores: Score | Sequence[Score],
) -> str | None:
    """Say what is wrong with the arguments of this rank, or None where nothing is."""
    rank, ranks = member[0], dist.get_world_size(member[1])
    if layout.ranks != ranks:
        return f"the layout is for {layout.ranks} ranks, and there are {ranks}"
    if strategy is not None and strategy not in STRATEGIES:
        return f"there is no strategy called {strategy}, only {', '.join(STRATEGIES)}"
    try:
        # Attention of no tokens finds whatever is wrong with the tensors besides their length.
        nothing = (side[:, :, :0].detach() for side in sides)
        attend_alone(*nothing, pattern, queries=range(0), scores=scores)
    except (LongspanError, IndexError) as error:
        return str(error)
    places = layout.places(rank)
    if any(side.shape[2] != places for side in sides):
        named = zip(("query", "key", "value"), sides, strict=True)
        got = ", ".join(f"{side.shape[2]} in {name}" for name, side in named)
        return f"holds {places} of {layout.length} tokens by its layout, got {got}"
    return None
