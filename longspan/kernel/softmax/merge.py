"""Merging: attention over a sum of patterns from attention over each (law 2).

Every part comes with its log-sum-exp, the logarithm of its softmax denominator. The denominators add, and outputs
are weighed by their share of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attention over several patterns into attention over their multiset sum.

    Law: `merge([attend_with_lse(..., P), attend_with_lse(..., Q)]) == attend_with_lse(..., P + Q)`, gradients
    included: they flow through the log-sum-exps too.

    Args:
        parts: pairs of an output `[batch, heads, length, width]` and its log-sum-exp `[batch, heads, length]`;
            a query that read nothing has log-sum-exp minus infinity.

    Returns:
        The output and log-sum-exp of the sum, of the same shapes.

    Example:
        >>> output, lse = torch.randn(1, 2, 3, 4), torch.zeros(1, 2, 3)
        >>> merged, total = merge([(output, lse), (output, lse)])
        >>> torch.allclose(merged, output), torch.allclose(total, torch.tensor(2.0).log())
        (True, True)

    References:
        Liu et al., Ring Attention (arXiv 2310.01889), section 3; Ding et al., LongNet (arXiv 2307.02486),
        equation 9.
    """
    outputs = torch.stack([output for output, _ in parts])
    lses = torch.stack([lse for _, lse in parts])
    # A row that no part has read would give minus infinity less itself.
    silent = torch.isneginf(lses).all(dim=0)
    total = torch.logsumexp(lses.masked_fill(silent, 0.0), dim=0).masked_fill(silent, -torch.inf)
    # Shares that sum to 1 however large the numbers are.
    share = torch.softmax(lses.masked_fill(silent, 0.0), dim=0)
    return (share.unsqueeze(-1).to(outputs.dtype) * outputs).sum(dim=0), total


def merge_into(output: Tensor, lse: Tensor, part_output: Tensor, part_lse: Tensor) -> None:
    """Merge one part into running totals, in place; tensors may be strided views."""
    # Where both are silent, the part's share of minus infinity less itself is none.
    share = torch.sigmoid(part_lse - lse).masked_fill(torch.isneginf(part_lse), 0.0)
    output.add_((part_output - output).mul_(share.unsqueeze(-1)))
    lse.copy_(torch.logaddexp(lse, part_lse))
