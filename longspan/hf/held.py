"""Held keys: behind transformers' `past_key_values`, a cache of which every rank keeps a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.cache_utils import Cache

from longspan.derive.lifetime import alive
from longspan.hf.batch import Batch
from longspan.hf.cache import PatternLayer, layers_of
from longspan.hf.shards import Shared
from longspan.pattern import Pattern
from longspan.ring.held import attend_held
from longspan.score import Score, collect

# Tokens that are taken in before dead keys are let go.
BLOCK = 64


class HeldCache(Cache):
    """What a model that reads texts split among ranks keeps of them: on each rank a part of the live keys.

    The keys of a text stay with the ranks that read them, and those of new tokens go to each rank in turn. Which keys
    may still be read follows from the patterns of the layers, as for `PatternCache`.

    Args:
        model: a decoder with patterns.
        group: the ranks.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__(layers=layers_of(model, HeldLayer, {"group": group}))

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take on this rank, on all layers."""
        return sum(side.nbytes for layer in self.layers for side in layer.sides or ())


class HeldLayer(PatternLayer):
    """One layer of a `HeldCache`.

    Attributes:
        sides: keys and values `[batch, key heads, keys, width]`, None before the first token.
        positions: of the keys in their own sequence, int64 `[batch, keys]`, -1 for padding.
        lengths: tokens of each row so far.
    """

    def check(self, module: nn.Module, pattern: Pattern, batch: Batch, tokens: int) -> None:
        """Refuse what does not continue this cache."""
        if self.turned_anew is not None and self.columns + tokens > self.turned_anew[1]:
            raise self._refuse(
                f"beyond {self.turned_anew[1]} tokens its rotary positions turn all keys anew",
                "positions that do not change with the length: yarn, linear, llama3",
            )
        super().check(module, pattern, batch, tokens)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        batch: Batch,
        scale: float | None,
        scores: Sequence[Score],
    ) -> Tensor:
        """Return attention `[batch, length, heads, width]` of the new tokens, and take this rank's share of them in."""
        if isinstance(batch, Shared):
            output = batch.attend(query, key, value, pattern, scale=scale, scores=scores)
            self.sides, self.positions = (key, value), batch.positions().to(key.device)
            self.lengths = batch.lengths().to(key.device)
            self.columns = batch.length
            self.heads = query.shape[1]
        else:
            at = self._take_in(key, value, batch)
            output = attend_held(
                query,
                *self.sides,
                pattern,
                at=at,
                positions=self.positions,
                group=self.options["group"],
                scale=query.shape[-1] ** -0.5 if scale is None else scale,
                changes=collect(scores, query.shape[1]),
            ).transpose(1, 2)
        self.pattern = pattern
        self._let_go(pattern)
        return output.contiguous()

    def reset(self) -> None:
        super().reset()
        self.sides: tuple[Tensor, ...] | None = None
        self.positions = self.lengths = torch.zeros(0, dtype=torch.int64)
        self._freed = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.sides is not None:
            self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.sides is not None:
            rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            rows = rows.to(self.positions.device)
            self.sides = tuple(side[rows] for side in self.sides)
            self.positions, self.lengths = self.positions[rows], self.lengths[rows]

    def check_crop(self, tokens_to_remove: int) -> None:
        raise self._refuse(
            "tokens are taken back, whose neighbours lie on other ranks", "decoding without assistance"
        )

    def _take_in(self, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
        """Keep the new keys whose turn it is on this rank, and return the positions of all of them."""
        if batch.real is not None and not batch.real.all():
            raise self._refuse("new tokens come with padding among them", "rows padded on the left")
        group, new = self.options["group"], key.shape[2]
        at = self.lengths[:, None] + torch.arange(new, device=key.device)
        turn = torch.arange(self.columns, self.columns + new) % dist.get_world_size(group)
        mine = (turn == dist.get_rank(group)).nonzero().flatten().to(key.device)
        self.sides = tuple(
            torch.cat([held, side[:, :, mine]], dim=2)
            for held, side in zip(self.sides, (key, value), strict=True)
        )
        self.positions = torch.cat([self.positions, at[:, mine]], dim=1)
        self.lengths = self.lengths + new
        self.columns += new
        return at

    def _let_go(self, pattern: Pattern) -> None:
        """Let keys go that no later query of any row and head may read."""
        if self.columns < self._freed + BLOCK:
            return
        self._freed = self.columns
        held, at = self.positions.cpu().numpy(), self.lengths.cpu().numpy()[:, None]
        singles = {pattern.at_head(head, self.heads) for head in range(self.heads)}
        kept = sum(alive(single, held.clip(0), at=at) for single in singles).astype(bool) & (held >= 0)
        columns = torch.from_numpy(kept.any(axis=0).nonzero()[0]).to(self.positions.device)
        if len(columns) < held.shape[1]:
            self.sides = tuple(side[:, :, columns] for side in self.sides)
            self.positions = self.positions[:, columns]


def held_cache(given: Any) -> HeldCache | None:
    """Return what was given as a cache where it is one of these and has been read into, else None."""
    return given if isinstance(given, HeldCache) and given.get_seq_length() else None
