"""Reading: attention of new queries over the keys that a shelf holds, at whatever positions they lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention import attend_with_lse
from longspan.cache.origin import moved
from longspan.cache.outlook import bias_of
from longspan.cache.shelf import Shelf
from longspan.kernel.softmax.merge import merge
from longspan.pattern import Pattern, PerHead
from longspan.score import Scores

Rotate = Callable[[Tensor, Tensor, int], Tensor]

# Runs of neighbouring keys that are worth a call of their own each.
_RUNS = 4
# Pairs of a head up to which computing all of them costs less than a plan of those that are read.
_UNPLANNED = 1 << 18
# Pairs of all heads that are computed at a time where there is no plan.
_PAIRS = 1 << 22


@dataclass(frozen=True)
class Reading:
    """How scores are made, the same for all shelves of a layer.

    Attributes:
        scale: what they are multiplied by.
        changes: what changes them beside the pattern, for all query heads.
        alike: whether all rows lie alike, so that no slot is nobody's.
        rotate, places: how keys and queries are turned, see `Cache`.
    """

    scale: float
    changes: Scores
    alike: bool
    rotate: Rotate | None
    places: str

    def read(self, shelf: Shelf, query: Tensor, positions: Tensor, ends: np.ndarray) -> Tensor:
        """Return what queries read on one shelf, zero for those that are padding.

        Args:
            query: `[batch, heads of the shelf, queries, width]`.
            positions: of the queries, `[batch or 1, queries]`, -1 for padding.
            ends: length of the text in each row, these queries included.
        """
        here = self._of(shelf)
        key, value = shelf.storage.read()
        if self.rotate is None and query.shape[2] * key.shape[2] <= _UNPLANNED:
            return here._masked(
                query, key, value, shelf.readers, positions, shelf.positions, gaps=not self.alike
            )
        if self.alike:
            return here._alike(query, key, value, shelf.readers, positions, shelf.positions, int(ends[0]))
        output = query.new_zeros((*query.shape[:3], value.shape[3]))
        for number, row_positions in enumerate(positions):
            row = slice(number, number + 1)
            asked, held = row_positions >= 0, shelf.positions[number] >= 0
            if asked.any():
                output[row, :, asked] = here._alike(
                    query[row, :, asked],
                    key[row, :, held],
                    value[row, :, held],
                    shelf.readers,
                    positions[row, asked],
                    shelf.positions[row, held],
                    int(ends[number]),
                )
        return output

    def read_last(self, shelf: Shelf, query: Tensor) -> Tensor:
        """Return what one token of every row reads, whose key `shelf.push` has just put in the last slot.

        Args:
            query: `[batch, heads of the shelf, 1, width]`.
        """
        storage, outlook = shelf.storage, shelf.outlook
        batch, heads, _, width = query.shape
        shared = heads // len(shelf.key_heads)
        # The query heads of one key head become rows of one block, so that keys are read once.
        folded = query if shared == 1 else query.reshape(batch, -1, shared, width)
        begin, bias = outlook.at(storage.used)
        if self.rotate is not None:
            output = self._of(shelf)._last_turned(query, shelf, bias, begin)
        elif not self.plain:
            output = self._of(shelf)._last_changed(folded, shelf, bias, begin)
        elif bias is None or bias.shape[1] == 1:
            output = storage.weigh(folded, bias, self.scale, begin)
        else:
            output = storage.weigh(folded, bias.reshape(len(bias), -1, shared, bias.shape[3]), self.scale)
        output = output if shared == 1 else output.reshape(batch, heads, 1, -1)
        if outlook.silent and bias is not None:
            output = output.masked_fill(torch.isneginf(bias).all(dim=-1, keepdim=True), 0.0)
        return output

    def _last_turned(self, query: Tensor, shelf: Shelf, bias: Tensor | None, begin: int) -> Tensor:
        """Return what `[batch, heads, 1, width]` queries at the last position read of keys that are turned for them."""
        positions = shelf.positions[:, begin:]
        key, value = (side[:, :, begin:] for side in shelf.storage.read())
        if bias is None:
            bias = query.new_zeros((1, 1, 1, positions.shape[1]), dtype=self.exact(query.dtype))
        places, lengths = positions, positions[:, -1] + 1
        if self.places == "cache":
            read = torch.isfinite(bias[:, 0, 0])
            places, lengths = read.cumsum(1) - 1, read.sum(1)
        turned = []
        # What is nobody's, and queries that read nothing, may be turned anywhere.
        for row, length in enumerate(lengths.clamp(min=1).tolist()):
            rows = slice(row, row + 1) if len(places) > 1 else slice(None)
            own = torch.full((1,), length - 1, device=query.device)
            held = places[row].clamp(min=0)
            turned.append((self.rotate(query[rows], own, length), self.rotate(key[rows], held, length)))
        query, key = (torch.cat(side) for side in zip(*turned, strict=True))
        bias = self._pushed_off(bias, positions[:, -1:], positions)
        return self._weighed(query, key, value, bias)

    def _last_changed(self, query: Tensor, shelf: Shelf, bias: Tensor | None, begin: int) -> Tensor:
        """Return what `[batch, key heads, shared, width]` queries at the last position read where scores are changed."""
        positions = shelf.positions[:, begin:]
        if bias is None:
            exact = self.exact(query.dtype)
            bias = torch.zeros((1, 1, 1, positions.shape[1]), dtype=exact, device=query.device)
        bias = self._pushed_off(bias, positions[:, -1:], positions)
        if bias.shape[1] > 1:
            bias = bias.reshape(len(bias), *query.shape[1:3], -1)
        if self.changes.limit is None and self.changes.sinks is None:
            return shelf.storage.weigh(query, bias, self.scale, begin)
        return self._changed(query, *(side[:, :, begin:] for side in shelf.storage.read()), bias)

    def exact(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of biases: that of the scores, or one that they can be changed in."""
        return dtype if self.plain else torch.promote_types(dtype, torch.float32)

    @cached_property
    def plain(self) -> bool:
        """Whether nothing but the pattern changes scores."""
        return self.changes.limit is None and self.changes.slopes is None and self.changes.sinks is None

    def _alike(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        readers: tuple[Pattern, ...],
        positions: Tensor,
        held: Tensor,
        length: int,
    ) -> Tensor:
        """Read rows that lie alike: one row of positions on each side, without padding."""
        if self.rotate is not None:
            places, keys = positions[0], held[0]
            if self.places == "cache":
                read = readers[0].count(positions[0], held[0]) > 0
                length = int(read.sum())
                places, keys = torch.full_like(places, length - 1), (read.cumsum(0) - 1).clamp(min=0)
            query, key = self.rotate(query, places, length), self.rotate(key, keys, length)
        if query.shape[2] * held.shape[1] > _UNPLANNED:
            first, where = int(positions[0, 0]), held[0].cpu().numpy()
            begins = np.flatnonzero(np.diff(where, prepend=-2) != 1)
            if len(begins) <= _RUNS:
                return self._runs(query, key, value, readers, first, where, begins)
        at_once = max(1, _PAIRS // (query.shape[1] * held.shape[1]))
        pieces = [slice(begin, begin + at_once) for begin in range(0, query.shape[2], at_once)]
        outputs = [
            self._masked(query[:, :, piece], key, value, readers, positions[:, piece], held)
            for piece in pieces
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _runs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        readers: tuple[Pattern, ...],
        start: int,
        held: np.ndarray,
        begins: np.ndarray,
    ) -> Tensor:
        """Read every run of neighbouring keys by a plan of its own, and merge."""
        changes = self.changes
        parts = []
        for begin, end in zip(begins, [*begins[1:], len(held)], strict=True):
            first = int(held[begin])
            seen = tuple(moved(reader, first) for reader in readers)
            parts.append(
                attend_with_lse(
                    query,
                    key[:, :, begin:end],
                    value[:, :, begin:end],
                    seen[0] if len(seen) == 1 else PerHead(seen),
                    queries=range(start - first, start - first + query.shape[2]),
                    scale=self.scale,
                    scores=changes.of(range(query.shape[1])),
                )
            )
            # A learned sink is in the softmax once.
            changes = replace(changes, sinks=None)
        return parts[0][0] if len(parts) == 1 else merge(parts)[0]

    def _masked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        readers: tuple[Pattern, ...],
        positions: Tensor,
        held: Tensor,
        *,
        gaps: bool = False,
    ) -> Tensor:
        """Read by computing all pairs; positions are `[batch or 1, tokens]`, -1 in `gaps` without a token."""
        exact = torch.promote_types(query.dtype, torch.float32)
        bias = bias_of(readers, positions, held, exact, gaps=gaps)
        silent = torch.isneginf(bias).all(dim=-1, keepdim=True)
        bias = self._pushed_off(bias, positions, held)
        return self._weighed(query, key, value, bias).masked_fill(silent, 0.0)

    def _weighed(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Attend by a bias of all pairs, `[rows or 1, heads or 1, queries, keys]`."""
        batch, heads, rows, width = query.shape
        key_heads = key.shape[1]
        # The query heads of one key head become rows of one block, so that keys are read once.
        folded = query.reshape(batch, key_heads, -1, width)
        if bias.shape[1] == 1:
            bias = bias.repeat(1, 1, heads // key_heads, 1)
        else:
            bias = bias.reshape(len(bias), key_heads, folded.shape[2], -1)
        if self.changes.limit is None and self.changes.sinks is None:
            output = F.scaled_dot_product_attention(
                folded, key, value, attn_mask=bias.to(query.dtype), scale=self.scale
            )
        else:
            output = self._changed(folded, key, value, bias)
        return output.reshape(batch, heads, rows, -1)

    def _pushed_off(self, bias: Tensor, positions: Tensor, held: Tensor) -> Tensor:
        """Return the bias with ALiBi in it."""
        if self.changes.slopes is None:
            return bias
        slopes = torch.tensor(self.changes.slopes, dtype=bias.dtype, device=bias.device)
        distance = (positions[:, None, :, None] - held[:, None, None, :]).abs()
        return bias - slopes[:, None, None] * distance

    def _of(self, shelf: Shelf) -> Reading:
        """Return how the heads of a shelf are read."""
        return self if self.plain else replace(self, changes=_of_heads(self.changes, shelf.heads))

    def _changed(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Attend with capped scores and learned sinks, which PyTorch's attention does not know."""
        scores = (query.to(bias.dtype) @ key.to(bias.dtype).mT) * self.scale
        if self.changes.limit is not None:
            scores = self.changes.limit * torch.tanh(scores / self.changes.limit)
        scores = scores + bias
        if self.changes.sinks is not None:
            sinks = self.changes.sinks.to(scores).reshape(key.shape[1], -1, 1)
            sinks = sinks.expand(-1, -1, query.shape[2] // sinks.shape[1]).reshape(key.shape[1], -1, 1)
            scores = torch.cat([scores, sinks.expand(len(scores), -1, -1, -1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
        return (weights @ value.to(bias.dtype)).to(query.dtype)


def _of_heads(changes: Scores, heads: list[int]) -> Scores:
    """Return the changes of some heads."""
    slopes = changes.slopes and tuple(changes.slopes[head] for head in heads)
    sinks = None if changes.sinks is None else changes.sinks[heads]
    return Scores(changes.limit, slopes, sinks)
