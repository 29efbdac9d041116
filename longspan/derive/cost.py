"""The cost: how many pairs a pattern reads, exactly, and the arithmetic they take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from longspan.derive.bins import bins
from longspan.derive.extent import extent
from longspan.pattern import Pattern


@dataclass(frozen=True)
class Cost:
    """What attention over a pattern takes.

    Attributes:
        pairs: pairs read by all heads, counted as often as they are read.
        share: `pairs` over those of dense attention, every query reading every key.
        forward_flops, backward_flops: floating-point operations for these pairs, a multiply-add being two; two
            matrix products forward, five backward. Softmax is not counted.
    """

    pairs: int
    share: float
    forward_flops: int
    backward_flops: int


def cost(
    pattern: Pattern,
    *,
    length: int | None = None,
    queries: range | None = None,
    keys: range | None = None,
    heads: int = 1,
    width: int = 64,
) -> Cost:
    """Return the cost of a pattern: exact, and found without looking at every pair.

    Args:
        pattern: what is read.
        length: number of tokens, short for both ranges.
        queries, keys: absolute positions.
        heads: number of query heads.
        width: numbers in a head's query, key and value.

    Raises:
        PatternError: a pattern that cannot be shared out among `heads`.
        ShapeError: a range that is missing or negative.

    Example:
        >>> from longspan.pattern import SlidingWindow
        >>> cost(SlidingWindow(512), length=1_048_576).pairs
        536740096
    """
    queries, keys = extent(length, queries, keys)
    alike = Counter(pattern.at_head(head, heads) for head in range(heads))
    pairs = sum(
        times * int(bins(single, queries=queries, keys=keys, cells=(1, 1)).item())
        for single, times in alike.items()
    )
    dense = heads * len(queries) * len(keys)
    return Cost(pairs, pairs / dense if dense else 0.0, 4 * width * pairs, 10 * width * pairs)
