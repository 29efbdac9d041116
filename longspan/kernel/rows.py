"""Rows: what is done to the rows of tensors before and after a kernel that knows pairs and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def alike(*sides: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one width, the widest, whose rows lie in one piece: flash attention takes no others."""
    width = max(side.shape[-1] for side in sides)
    wide = (side if side.shape[-1] == width else widened(side, width) for side in sides)
    return tuple(side if side.stride(-1) == 1 else side.contiguous() for side in wide)


def widened(side: Tensor, width: int) -> Tensor:
    """Return a copy with columns of 0 added, which change no score and no sum of values."""
    return F.pad(side, (0, width - side.shape[-1]))


def with_lse_gradient(sides: tuple[Tensor, ...], grad_lse: Tensor, lanes: int) -> tuple[Tensor, ...]:
    """Return query, key, value, gradient of the output and output so that a kernel gives the gradients of both.

    Flash attention takes `sum(grad_output * output)` off every row of the gradient of its scores, and the gradient of
    the log-sum-exp is to be added to it. So it goes in as one more column of values 0, in which the output is that
    gradient less than 0, and the gradient of the output is 1.

    Args:
        sides: the five tensors.
        grad_lse: gradient of the log-sum-exp, `[batch, heads, queries]`.
        lanes: widths are multiples of this.
    """
    column = max(side.shape[-1] for side in sides)
    width = -(-(column + 1) // lanes) * lanes
    query, key, value, grad_output, output = (widened(side, width) for side in sides)
    grad_output[..., column] = 1
    output[..., column] = -grad_lse
    return query, key, value, grad_output, output


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp with learned sinks: keys of value 0, which take weight and add nothing."""
    sink = sinks.detach().to(lse.dtype)[:, None]
    output = output * torch.sigmoid(lse - sink).masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)
    return output, torch.logaddexp(lse, sink)


def sinks_gradient(
    grad_output: Tensor, grad_lse: Tensor, output: Tensor, lse: Tensor, sinks: Tensor
) -> Tensor:
    """Return the gradient of the logits of sinks; `output` and `lse` are those with sinks."""
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill(lse.isneginf(), 0.0)
    along = (grad_output.to(lse.dtype) * output.to(lse.dtype)).sum(dim=-1)
    return (share * (grad_lse - along)).sum(dim=(0, 2)).to(sinks.dtype)
