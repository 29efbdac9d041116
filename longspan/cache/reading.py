"""Reading: attention of new queries over keys that lie at any positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attend import attend_with_lse
from longspan.kernel.merge import merge
from longspan.pattern import Pattern, PerHead
from longspan.pattern.base import Counts, Positions, Verdict

# Runs of neighbouring keys that are worth a call of their own each.
_RUNS = 4
# Pairs of one head group that are computed at a time where there is no plan.
_PAIRS = 1 << 22


@dataclass(frozen=True, repr=False)
class _Moved(Pattern):
    """An atom read from another origin: position 0 is `distance` there."""

    part: Pattern
    distance: int

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return self.part.contains(q + self.distance, k + self.distance)

    def count(self, q: Positions, k: Positions) -> Counts:
        return self.part.count(q + self.distance, k + self.distance)

    def facts(self, q: Positions, k: Positions) -> tuple[np.ndarray, ...]:
        return self.part.signature(q + self.distance, k + self.distance)

    @property
    def period(self) -> int | None:
        return self.part.period

    @property
    def steps(self) -> tuple[int, int]:
        return self.part.steps

    @property
    def lead(self) -> int:
        return self.part.lead

    def __str__(self) -> str:
        return f"{self.part} from {self.distance} on"


def moved(pattern: Pattern, distance: int) -> Pattern:
    """Return the pattern of one head as it is seen from position `distance`, which becomes 0."""
    if pattern.operands:
        return pattern.rebuilt(tuple(moved(part, distance) for part in pattern.operands))
    # Whole periods change nothing, and an unmoved atom is planned once wherever it is read.
    rest = distance % pattern.period if pattern.period else distance
    return _Moved(pattern, rest) if rest else pattern


def counts_at(readers: tuple[Pattern, ...], queries: Tensor, keys: Tensor) -> Tensor:
    """Return how often queries read keys: the formula, on positions instead of ranges.

    Args:
        readers: the pattern of each head, or a single one for all heads.
        queries: `[rows, queries]`, -1 where there is none.
        keys: `[rows, keys]`, -1 where there is none.

    Returns:
        int64 `[rows, len(readers), queries, keys]`.
    """
    q, k = queries[:, :, None], keys[:, None, :]
    real = (q >= 0) & (k >= 0)
    counted = {reader: reader.count(q, k) * real for reader in set(readers)}
    return torch.stack([counted[reader] for reader in readers], dim=1)


def read_masked(query: Tensor, key: Tensor, value: Tensor, often: Tensor, scale: float) -> Tensor:
    """Return attention over keys as often as `counts_at` says, all pairs being computed.

    Args:
        query: `[batch, heads, queries, width]`.
        key, value: `[batch, key heads, keys, width]`.
        often: `[batch or 1, heads or 1, queries, keys]`.
        scale: of the scores.
    """
    batch, heads, rows, width = query.shape
    shared = heads // key.shape[1]
    # The query heads of one key head become rows of one block, so that keys are read once.
    folded = query.reshape(batch, key.shape[1], shared * rows, width)
    exact = torch.promote_types(query.dtype, torch.float32)
    bias = often.to(exact).log().to(query.dtype)
    if bias.shape[1] == 1:
        bias = bias.repeat(1, 1, shared, 1)
    else:
        bias = bias.reshape(len(bias), key.shape[1], shared * rows, -1)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scale)
    silent = torch.isneginf(bias).all(dim=-1, keepdim=True)
    return output.masked_fill(silent, 0.0).reshape(batch, heads, rows, -1)


def read_slabs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    readers: tuple[Pattern, ...],
    positions: Tensor,
    held: Tensor,
    scale: float,
) -> Tensor:
    """Return attention over keys at positions `held`, so many queries at a time that memory stays bounded."""
    at_once = max(1, _PAIRS // (query.shape[1] * max(1, held.shape[1])))
    outputs = []
    for begin in range(0, query.shape[2], at_once):
        some = slice(begin, begin + at_once)
        often = counts_at(readers, positions[:, some], held)
        outputs.append(read_masked(query[:, :, some], key, value, often, scale))
    return torch.cat(outputs, dim=2)


def read_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    readers: tuple[Pattern, ...],
    start: int,
    positions: np.ndarray,
    scale: float,
) -> Tensor | None:
    """Return attention by a plan for every run of neighbouring keys, merged; None where there are many runs.

    Args:
        query: at the positions from `start` on.
        key, value: at ascending `positions`.
        readers: the pattern of each head.
    """
    begins = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    if len(begins) > _RUNS:
        return None
    parts = []
    for begin, end in zip(begins, [*begins[1:], len(positions)], strict=True):
        first = int(positions[begin])
        alike = readers[:1] if len(set(readers)) == 1 else readers
        seen = tuple(moved(reader, first) for reader in alike)
        parts.append(
            attend_with_lse(
                query,
                key[:, :, begin:end],
                value[:, :, begin:end],
                seen[0] if len(seen) == 1 else PerHead(seen),
                queries=range(start - first, start - first + query.shape[2]),
                scale=scale,
            )
        )
    return parts[0][0] if len(parts) == 1 else merge(parts)[0]
