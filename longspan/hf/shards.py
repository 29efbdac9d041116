"""Shards: a batch whose tokens lie on several ranks, as every layer of each of them is handed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.hf.batch import Batch
from longspan.hf.segment import Segment, shortest, unpacked, unpadded, whole
from longspan.layout import Layout
from longspan.pattern import Pattern
from longspan.ring.attention import attend_agreed
from longspan.score import Score, collect


@dataclass(frozen=True)
class Share:
    """What one rank holds of one sequence.

    Attributes:
        rows: samples of the batch.
        columns: where its tokens lie in the tensors of this rank.
        layout: how the sequence, counted from its own beginning, lies on all ranks.
    """

    rows: slice | Tensor
    columns: slice | Tensor
    layout: Layout


@dataclass(frozen=True)
class Shared(Batch):
    """A batch of which each rank holds some columns.

    `shape` and `keys` count the columns of this rank; `segments` are those of the whole batch.

    Attributes:
        group: the ranks.
        strategy: how keys get from one to another, None for the cheapest way.
        shares: what this rank holds of each segment.
        length: columns of the whole batch.
    """

    group: dist.ProcessGroup
    strategy: str | None
    shares: tuple[Share, ...]
    length: int

    def positions(self) -> Tensor:
        """Return where the columns of this rank stand in their own sequences, int64 `shape`, -1 for padding."""
        found = torch.full(self.shape, -1)
        rank = dist.get_rank(self.group)
        for share in self.shares:
            rows, columns = (
                part.cpu() if isinstance(part, Tensor) else part for part in (share.rows, share.columns)
            )
            if isinstance(rows, Tensor) and isinstance(columns, Tensor):
                rows = rows[:, None]
            found[rows, columns] = torch.from_numpy(share.layout.positions(rank))
        return found

    def lengths(self) -> Tensor:
        """Return how many tokens the last sequence of each row has, int64 `[rows]`."""
        found = torch.zeros(self.shape[0], dtype=torch.int64)
        for share in self.shares:
            found[share.rows.cpu() if isinstance(share.rows, Tensor) else share.rows] = share.layout.length
        return found

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        *,
        scale: float | None,
        scores: Sequence[Score],
    ) -> Tensor:
        """Let each sequence attend by itself, across ranks; all of them take the sequences in the same order."""
        batch, heads, length, _ = query.shape
        alone = len(self.shares) == 1 and _all(self.shares[0].rows, batch)
        alone = alone and _all(self.shares[0].columns, length)
        changes = query.shape[-1] ** -0.5 if scale is None else scale, collect(scores, heads)
        output = query.new_zeros(batch, length, heads, value.shape[-1])
        for share in self.shares:
            rows, columns = share.rows, share.columns
            part = attend_agreed(
                *(side[rows][:, :, columns] for side in (query, key, value)),
                pattern,
                layout=share.layout,
                group=self.group,
                strategy=self.strategy,
                changes=changes,
            ).transpose(1, 2)
            if alone:
                return part.contiguous()
            if isinstance(rows, Tensor) and isinstance(columns, Tensor):
                rows = rows[:, None]
            output[rows, columns] = part
        return output


def shared(
    mask: Tensor | None,
    positions: Tensor | None,
    rows: int,
    layout: Layout,
    group: dist.ProcessGroup,
    strategy: str | None,
) -> Shared:
    """Return the batch of this rank, whose whole has a mask, positions or neither.

    Sequences are told apart as transformers does: by the mask, and without one where positions do not follow one
    another.

    Args:
        mask: bool `[rows, length]`, false on padding, or None.
        positions: int64 `[rows or 1, length]` as the caller gave them, or None.
        rows: samples of the batch.
        layout: where the columns lie.
        group: the ranks.
        strategy: as for `longspan.ring.attend`.
    """
    length, rank = layout.length, dist.get_rank(group)
    segments = whole(rows, length, length)
    if mask is not None and not mask.all():
        segments = unpadded(mask, queries=length, dropped=0)
    elif mask is None and positions is not None:
        segments = unpacked((positions.diff(dim=1) == 1).expand(rows, length - 1))
    own = layout.positions(rank)
    return Shared(
        segments=segments,
        shape=(rows, len(own)),
        keys=len(own),
        window=None,
        masked=True,
        group=group,
        strategy=strategy,
        shares=tuple(_share(segment, layout, own) for segment in segments),
        length=length,
    )


def _share(segment: Segment, layout: Layout, own: np.ndarray) -> Share:
    if isinstance(segment.queries, slice):
        tokens: range | np.ndarray = range(*segment.queries.indices(layout.length))
        held = np.flatnonzero((own >= tokens.start) & (own < tokens.stop))
    else:
        tokens = segment.queries.cpu().numpy()
        held = np.flatnonzero(np.isin(own, tokens))
    columns = shortest(torch.from_numpy(held)) if len(held) else slice(0, 0)
    return Share(segment.rows, columns, layout if len(tokens) == layout.length else layout.within(tokens))


def _all(part: slice | Tensor, size: int) -> bool:
    return isinstance(part, slice) and part == slice(0, size)
