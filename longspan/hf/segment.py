"""Segments: which rows and columns of a padded, packed or cached batch are sequences of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention import attend
from longspan.pattern import Pattern
from longspan.score import Score


@dataclass(frozen=True)
class Segment:
    """Some rows of a batch, and the columns in which each of them holds one sequence without gaps.

    Attributes:
        rows: samples of the batch.
        queries: columns of the query tensor, the last tokens of the sequence.
        keys: columns of the key tensor.
        dropped: first tokens of the sequence whose keys a cache has let go.
    """

    rows: slice | Tensor
    queries: slice | Tensor
    keys: slice | Tensor
    dropped: int = 0

    def covers(self, batch: int, length: int) -> bool:
        """Say whether the segment is all queries of the batch."""
        return _is(self.rows, batch) and _is(self.queries, length)

    def before(self, queries: int, keys: int) -> int:
        """Return the tokens of the sequence that came before its queries, of so many columns each."""
        return self.dropped + _count(self.keys, keys) - _count(self.queries, queries)


def whole(batch: int, queries: int, keys: int, dropped: int = 0) -> tuple[Segment, ...]:
    """Return the one segment of a batch whose rows are full."""
    return (Segment(slice(0, batch), slice(0, queries), slice(0, keys), dropped),)


def unpadded(
    real: Tensor, *, queries: int, dropped: int, device: torch.device | None = None
) -> tuple[Segment, ...]:
    """Return the sequences of a padded batch: the real tokens of each row, in their order.

    Args:
        real: bool `[batch, columns]`, false on padding; the last columns are the queries.
        queries: number of query columns.
        dropped: number of first columns that the key tensor does not hold any more.
        device: where rows and columns that are tensors go; None for that of `real`.

    Returns:
        One segment per different row of `real` that has a real query.
    """
    columns, device = real.shape[1], real.device if device is None else device
    # One wait for the device in place of several for every row.
    real = real.cpu()
    kinds, kind_of_row = real.unique(dim=0, return_inverse=True)
    segments = []
    for number, kind in enumerate(kinds):
        tokens = kind.nonzero().flatten()
        query_columns = tokens[tokens >= columns - queries] - (columns - queries)
        key_columns = tokens[tokens >= dropped] - dropped
        if len(query_columns):
            segments.append(
                Segment(
                    rows=_moved(shortest((kind_of_row == number).nonzero().flatten()), device),
                    queries=_moved(shortest(query_columns), device),
                    keys=_moved(shortest(key_columns), device),
                    dropped=len(tokens) - len(key_columns),
                )
            )
    return tuple(segments)


def unpacked(continues: Tensor) -> tuple[Segment, ...]:
    """Return the documents of a packed batch.

    Args:
        continues: bool `[batch, length - 1]`, true where a token and the one before are in one document.

    Returns:
        One segment per row and document; one for the whole batch where nothing is packed.
    """
    batch, length = continues.shape[0], continues.shape[1] + 1
    continues = continues.cpu()
    if continues.all():
        return whole(batch, length, length)
    segments = []
    for row in range(batch):
        starts = (~continues[row]).nonzero().flatten() + 1
        bounds = [0, *starts.tolist(), length]
        for begin, end in pairwise(bounds):
            document = slice(begin, end)
            segments.append(Segment(slice(row, row + 1), document, document))
    return tuple(segments)


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    segments: tuple[Segment, ...],
    *,
    scale: float | None,
    scores: Sequence[Score] = (),
) -> Tensor:
    """Let each segment attend by itself, at positions that count its own tokens from 0.

    Args:
        query, key, value: `[batch, heads, length, width]`.
        pattern: what is read; no query may read a key that was dropped.
        segments: as made above.
        scale: of the scores.
        scores: what changes them beside the pattern.

    Returns:
        `[batch, length, heads, width]`, as transformers wants it, zero where a row is padding.
    """
    batch, heads, length, _ = query.shape
    if len(segments) == 1 and segments[0].covers(batch, length):
        return _attend(query, key, value, pattern, segments[0], scale, scores).transpose(1, 2).contiguous()
    output = query.new_zeros(batch, length, heads, value.shape[-1])
    for segment in segments:
        part = _attend(query, key, value, pattern, segment, scale, scores)
        rows = segment.rows
        if isinstance(rows, Tensor) and isinstance(segment.queries, Tensor):
            rows = rows[:, None]
        output[rows, segment.queries] = part.transpose(1, 2)
    return output


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    segment: Segment,
    scale: float | None,
    scores: Sequence[Score],
) -> Tensor:
    query = query[segment.rows][:, :, segment.queries]
    key, value = (side[segment.rows][:, :, segment.keys] for side in (key, value))
    if segment.dropped:
        # Positions may be counted from any multiple of the period; the keys after it are gone, and never read.
        period = _period(pattern, query.shape[1])
        gap = segment.dropped % period if period else segment.dropped
        key, value = (F.pad(side, (0, 0, gap, 0)) for side in (key, value))
    return attend(query, key, value, pattern, scale=scale, scores=scores)


def _period(pattern: Pattern, heads: int) -> int | None:
    """Return a shift that changes nothing on any head, or None where there is none."""
    periods = {pattern.at_head(head, heads).period for head in range(heads)}
    return None if None in periods else math.lcm(*(period for period in periods if period))


def _is(part: slice | Tensor, size: int) -> bool:
    return isinstance(part, slice) and part == slice(0, size)


def _moved(part: slice | Tensor, device: torch.device) -> slice | Tensor:
    return part if isinstance(part, slice) else part.to(device)


def _count(part: slice | Tensor, size: int) -> int:
    return len(range(*part.indices(size))) if isinstance(part, slice) else len(part)


def shortest(columns: Tensor) -> slice | Tensor:
    """Return columns as a slice where they are neighbours: it needs no copy."""
    first, last = int(columns[0]), int(columns[-1])
    return slice(first, last + 1) if last - first + 1 == len(columns) else columns
