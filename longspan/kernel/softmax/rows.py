"""Rows: what is done to the rows of tensors before and after a kernel that knows pairs and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of an output that are looked at in one.
ABREAST = 2**21


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
    """Return output and log-sum-exp with learned sinks: keys of value 0, which take weight and add nothing.

    The output is written over where its numbers are as wide as those of the log-sum-exp.
    """
    sink = sinks.detach().to(lse.dtype)[:, None]
    share = torch.sigmoid(lse - sink).masked_fill_(lse.isneginf(), 0.0).unsqueeze(-1)
    output = output.mul_(share) if output.dtype == share.dtype else output * share
    return output, torch.logaddexp(lse, sink)


def without_silent(lse: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return log-sum-exps and their gradients with 0 for rows that read nothing, into which nothing flows.

    Such a row has only masked scores, so any finite number serves it.
    """
    silent = lse.isneginf()
    into = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(silent, 0.0)
    return lse.masked_fill(silent, 0.0), into


def sinks_gradient(
    grad_output: Tensor, grad_lse: Tensor, output: Tensor, lse: Tensor, sinks: Tensor
) -> Tensor:
    """Return the gradient of the logits of sinks; `output` and `lse` are those with sinks."""
    sink = sinks.to(lse.dtype)[:, None]
    total = torch.zeros_like(sink[:, 0])
    number = max(1, ABREAST * output.shape[2] // max(1, output.numel()))
    sides = (side.split(number, dim=2) for side in (grad_output, grad_lse, output, lse))
    for grad, into, out, own in zip(*sides, strict=True):
        share = torch.exp(sink - own).masked_fill(own.isneginf(), 0.0)
        along = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)
        total += (share * (into - along)).sum(dim=(0, 2))
    return total.to(sinks.dtype)
