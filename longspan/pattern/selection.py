"""Selection: which blocks of keys are worth reading, found from the content of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import ShapeError, message
from longspan.pattern.atoms import Causal
from longspan.pattern.base import Pattern, PerHead
from longspan.pattern.choice import Chosen


def top_blocks(query: Tensor, key: Tensor, *, size: int, count: int) -> Pattern:
    """Return the pattern in which each block of queries reads its own block and the `count` best earlier ones.

    Law: a block is as good as the product of its mean key with the first query of the block that reads. What is chosen
    for a query depends on that query and earlier positions only, so neither the keys that are read nor the choice of
    them lets the future in; a mean over all queries of a block would.

    Args:
        query: `[heads, length, width]`, of one text.
        key: `[key heads, length, width]`; key head `h // (heads // key heads)` serves query head `h`.
        size: tokens in a block.
        count: earlier blocks that a block of queries reads, at least 1; fewer where there are fewer.

    Returns:
        `Causal()` and a `Chosen` for each head.

    Raises:
        ShapeError: tensors that do not fit together, a size or count below 1.

    Example:
        >>> query = key = torch.eye(6)[None]
        >>> top_blocks(query, key, size=2, count=1)
        Causal() & PerHead([Chosen(((0,), (0, 1), (0, 2)), size=2)])

    References:
        Lu et al., MoBA (arXiv 2502.13189), section 2.2, with the gate of a query shared by its block.
    """
    heads_fit = query.dim() == key.dim() == 3 and key.shape[0] > 0 and query.shape[0] % key.shape[0] == 0
    if not heads_fit or query.shape[1:] != key.shape[1:] or size < 1 or count < 1:
        raise ShapeError(
            message(
                "Blocks are chosen for the queries and keys of one text.",
                {
                    "query": f"{list(query.shape)}, wanted [heads, length, width]",
                    "key": f"{list(key.shape)}, wanted [key heads, length, width]",
                    "size": f"{size}, wanted at least 1",
                    "count": f"{count}, wanted at least 1",
                },
                fix="top_blocks(query[0], key[0], size=128, count=8) for the first text of a batch",
            )
        )
    with torch.no_grad():
        first = query[:, ::size].float()
        # The last block may be shorter, but no other block reads it.
        number = key.shape[1] // size
        whole = key[:, : number * size].float().reshape(len(key), number, size, key.shape[2]).mean(2)
        whole = whole.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        scores = first @ whole.transpose(1, 2)
        earlier = torch.ones(scores.shape[1:], dtype=torch.bool).tril(-1).to(scores.device)
        best = scores.masked_fill(~earlier, -torch.inf).topk(min(count, scores.shape[2]), dim=2).indices
    tables = [
        tuple((*(block for block in blocks if block < row), row) for row, blocks in enumerate(head))
        for head in best.tolist()
    ]
    return Causal() & PerHead([Chosen(table, size=size) for table in tables])
