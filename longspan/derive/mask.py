"""The mask: the exact reading of a pattern as a dense tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.derive.extent import extent
from longspan.pattern import Pattern


def counts(
    pattern: Pattern,
    *,
    length: int | None = None,
    queries: range | None = None,
    keys: range | None = None,
    heads: int | None = None,
) -> Tensor:
    """Return how often each query reads each key: the definition, dense and exact.

    Args:
        pattern: what is read.
        length: number of tokens, short for both ranges.
        queries, keys: absolute positions of the rows and columns.
        heads: number of heads; None for a pattern that is the same on all heads.

    Returns:
        int64 tensor `[queries, keys]`, or `[heads, queries, keys]` where `heads` is given.

    Raises:
        PatternError: a pattern that differs from head to head, without `heads`.
        ShapeError: a range that is missing or negative.

    Example:
        >>> from longspan.pattern import LongNet
        >>> counts(LongNet((2, 4), (1, 2)), length=4, heads=2)[0].tolist()
        [[2, 0, 0, 0], [1, 1, 0, 0], [1, 0, 2, 0], [0, 0, 1, 1]]
    """
    queries, keys = extent(length, queries, keys)
    q = torch.tensor(queries, dtype=torch.int64)[:, None]
    k = torch.tensor(keys, dtype=torch.int64)[None, :]
    shape = (len(queries), len(keys))
    if heads is None:
        return pattern.count(q, k).expand(shape).contiguous()
    return torch.stack([pattern.at_head(head, heads).count(q, k).expand(shape) for head in range(heads)])


def mask(
    pattern: Pattern,
    *,
    length: int | None = None,
    queries: range | None = None,
    keys: range | None = None,
    heads: int | None = None,
) -> Tensor:
    """Return which keys each query reads: `counts(...) > 0`, a bool tensor of the same shape.

    Example:
        >>> from longspan.pattern import Causal
        >>> mask(Causal(), length=3).int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    return counts(pattern, length=length, queries=queries, keys=keys, heads=heads) > 0
