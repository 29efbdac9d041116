"""The sdpa kernel: PyTorch's CPU flash attention, called on strided views of the parts of a pattern.

Forward, each part gives an output and a log-sum-exp, merged as they come. Backward, each part is handed the merged
output and log-sum-exp, which makes its gradients exact shares of the whole without recomputing the merge.

Rectangles hold pairs that are not read, and 0 times NaN is NaN. So where a result is not finite, the rows of the
tensors that are not are set to 0 and the work is done again; then NaN is written to all that read them, which a
pass of equal weights over the same parts finds out. Finite tensors pay for one sum over the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.kernel.bias import Bias, bias, shift, size
from longspan.kernel.calls import Call, HeadGroup, calls
from longspan.kernel.finite import cleared, spoiled
from longspan.kernel.merge import merge_into
from longspan.kernel.parts import Part
from longspan.score import Scores

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Temporary results of one call, in bytes, at most (or those of one rectangle of one head, where that is more).
WORKSPACE = 32 * 2**20
# Widths that the matrix products like are multiples of this.
LANES = 8


@dataclass(frozen=True, eq=False)
class Work:
    """What is asked of the kernel beside tensors.

    Attributes:
        groups: who reads what.
        queries: positions of the queries.
        scale: what scores are multiplied by, above 0.
        slopes: of ALiBi, one per head, or None; then every group is on one side of its queries, without triangles.
        keys: position of the first key, and how far apart keys are; only slopes ask for it.
    """

    groups: tuple[HeadGroup, ...]
    queries: range
    scale: float
    slopes: tuple[float, ...] | None = None
    keys: tuple[int, int] = (0, 1)


def refusal(query: Tensor, changes: Scores) -> str | None:
    """Say why this kernel cannot take these tensors and changes of scores, or None where it can."""
    if query.device.type != "cpu":
        return device_refusal(str(query.device))
    if query.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"takes float64, float32, bfloat16 or float16, got {str(query.dtype).removeprefix('torch.')}"
    if changes.limit is not None:
        return "cannot cap scores softly: the flash attention that it calls has no tanh"
    return None


def device_refusal(device: str) -> str:
    """Say why this kernel cannot run on a device that is no CPU."""
    return f"runs on cpu, got {device}"


def attend(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, work: Work
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over the parts of each group of heads, differentiable."""
    return _Attend.apply(query, key, value, sinks, work)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor]:
        output, lse = forward(query, key, value, sinks, work)
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.work = work
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(grad_output, grad_lse, *ctx.saved_tensors, ctx.work), None)


def forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, work: Work
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp."""
    output, lse = _contained(*_alike(query, key, value), work)
    output = output[..., : value.shape[-1]]
    if sinks is not None:
        # A sink is a key with value 0: it takes its share of the weight and adds nothing.
        sink = sinks.detach().to(lse.dtype)[:, None]
        output = output * torch.sigmoid(lse - sink).masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)
        lse = torch.logaddexp(lse, sink)
    return output.to(query.dtype).contiguous(), lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    work: Work,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients for query, key, value and sinks."""
    grad_output = grad_output.to(query.dtype)
    grad_lse = grad_lse.masked_fill(lse.isneginf(), 0.0)
    grad_sinks = None
    if sinks is not None:
        share = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill(lse.isneginf(), 0.0)
        along = (grad_output.to(lse.dtype) * output.to(lse.dtype)).sum(dim=-1)
        grad_sinks = (share * (grad_lse - along)).sum(dim=(0, 2)).to(sinks.dtype)
    # A row that read nothing has only masked scores, so any finite number serves it.
    lse = lse.masked_fill(lse.isneginf(), 0.0)
    sides = (query, key, value, grad_output, output)
    if grad_lse.count_nonzero():
        # The kernel takes `sum(grad_output * output)` off every row of the gradient of its scores, and the
        # gradient of the log-sum-exp is to be added to it. So it goes in as one more column of values 0, in which
        # the output is that gradient less than 0, and the gradient of the output is 1.
        column = max(query.shape[-1], value.shape[-1])
        width = -(-(column + 1) // LANES) * LANES
        sides = tuple(_wide(side, width) for side in sides)
        sides[3][..., column] = 1
        sides[4][..., column] = -grad_lse
    grads = _contained_gradients(*_alike(*sides), lse, work)
    widths = (query.shape[-1], key.shape[-1], value.shape[-1])
    made = [grad[..., :width].to(query.dtype) for grad, width in zip(grads, widths, strict=True)]
    return made[0], made[1], made[2], grad_sinks


def _alike(*sides: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one width, the widest, whose rows lie in one piece: the kernel takes no others."""
    width = max(side.shape[-1] for side in sides)
    wide = (side if side.shape[-1] == width else _wide(side, width) for side in sides)
    return tuple(side if side.stride(-1) == 1 else side.contiguous() for side in wide)


def _wide(side: Tensor, width: int) -> Tensor:
    """Return a copy with columns of 0 added, which change no score and no sum of values."""
    return F.pad(side, (0, width - side.shape[-1]))


def _contained(query: Tensor, key: Tensor, value: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, NaN in the rows that read or are what is not finite, and only there."""
    output, lse = _merged(query, key, value, work)
    if output.sum().isfinite():
        return output, lse
    rows, keys = spoiled(query), spoiled(key) | spoiled(value)
    if not (rows.any() or keys.any()):
        return output, lse
    output, lse = _merged(cleared(query, rows), cleared(key, keys), cleared(value, keys), work)
    struck = (rows | _readers(keys, query, work)) & ~lse.isneginf()
    return output.masked_fill_(struck.unsqueeze(-1), torch.nan), lse.masked_fill_(struck, torch.nan)


def _contained_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, output: Tensor, lse: Tensor, work: Work
) -> list[Tensor]:
    """Return the gradients, NaN for the rows that are not finite and for the keys that they read, and only there."""
    sides = (query, key, value, grad_output, output)
    grads = _accumulated(*sides, lse, work)
    if all(grad.sum().isfinite() for grad in grads):
        return grads
    keys = spoiled(key) | spoiled(value)
    rows = spoiled(query) | spoiled(grad_output) | spoiled(output) | ~lse.isfinite()
    if not (rows.any() or keys.any()):
        return grads
    rows |= _readers(keys, query, work)
    taken_out = (rows, keys, keys, rows, rows)
    finite = (cleared(side, where) for side, where in zip(sides, taken_out, strict=True))
    grads = _accumulated(*finite, lse.masked_fill(rows, 0.0), work)
    struck = _read(rows, key, work)
    rows &= _readers(torch.ones_like(keys), query, work)
    for grad, where in zip(grads, (rows, struck, struck), strict=True):
        grad.masked_fill_(where.unsqueeze(-1), torch.nan)
    return grads


def _readers(keys: Tensor, query: Tensor, work: Work) -> Tensor:
    """Return which queries read a key that is marked: the mean of the marks they read is above 0."""
    marks = keys.to(torch.float64).unsqueeze(-1)
    alike = torch.zeros(*query.shape[:-1], 1, dtype=torch.float64)
    return _merged(alike, torch.zeros_like(marks), marks, _plainly(work))[0].squeeze(-1) > 0


def _read(rows: Tensor, key: Tensor, work: Work) -> Tensor:
    """Return which keys are read by a query that is marked: their share of its marks is above 0."""
    marks = rows.to(torch.float64).unsqueeze(-1)
    sides = torch.zeros_like(marks), *torch.zeros(2, *key.shape[:-1], 1, dtype=torch.float64)
    lse = _merged(*sides, _plainly(work))[1]
    lse = lse.masked_fill(lse.isneginf(), 0.0)
    return _accumulated(*sides, marks, torch.zeros_like(marks), lse, _plainly(work))[2].squeeze(-1) > 0


def _plainly(work: Work) -> Work:
    """Return the same work over scores of 0."""
    return replace(work, scale=1.0, slopes=None)


def _merged(query: Tensor, key: Tensor, value: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over all parts."""
    exact = torch.promote_types(query.dtype, torch.float32)
    output = torch.zeros(query.shape, dtype=exact)
    lse = torch.full(query.shape[:-1], -torch.inf, dtype=exact)
    width = query.shape[-1]
    for call, added, moved in _calls(query, key, work, lambda part: part.query.places * width):
        q, (k, v) = call.read(query), (call.look_up(side) for side in (key, value))
        part_output, part_lse = _forward(
            q, k, v, 0.0, call.part.causal, attn_mask=added.added, scale=work.scale
        )
        if moved is not None:
            part_lse += moved
        if added.blind is not None:
            # For a row without a key the kernel answers 0 where minus infinity is meant.
            part_lse[..., added.blind] = -torch.inf
        if call.part.fresh:
            call.read(output).copy_(part_output)
            call.read(lse).copy_(part_lse)
        else:
            merge_into(call.read(output), call.read(lse), part_output, part_lse)
    return output, lse


def _accumulated(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, output: Tensor, lse: Tensor, work: Work
) -> list[Tensor]:
    """Return the gradients of query, key and value, summed over what every part contributes."""
    width = query.shape[-1]
    grads = [torch.zeros(side.shape, dtype=lse.dtype) for side in (query, key, value)]
    for call, added, moved in _calls(
        query, key, work, lambda part: (part.query.places + 2 * part.key.places) * width
    ):
        q, (k, v) = call.read(query), (call.look_up(side) for side in (key, value))
        grad, out, total = (call.read(side) for side in (grad_output, output, lse))
        if moved is not None:
            total = total - moved
        made = _backward(
            grad, q, k, v, out, total, 0.0, call.part.causal, attn_mask=added.added, scale=work.scale
        )
        call.read(grads[0]).add_(made[0])
        for whole, part in zip(grads[1:], made[1:], strict=True):
            call.give_back(whole, part)
    return grads


def _calls(
    query: Tensor, key: Tensor, work: Work, places: Callable[[Part], int]
) -> Iterator[tuple[Call, Bias, Tensor | None]]:
    """Yield the calls of the kernel, each with its bias and with what is to be added to its log-sum-exp."""

    def alone(part: Part) -> int:
        return size(part, work.slopes)

    exact = torch.promote_types(query.dtype, torch.float32)
    # Within a rectangle distances are counted in keys.
    slopes = work.slopes and tuple(slope * work.keys[1] for slope in work.slopes)
    for call in calls(query, key, work.groups, places=places, alone=alone, limit=WORKSPACE):
        added = bias(call, query.dtype, slopes)
        moved = None
        if work.slopes is not None and added.nearest is not None:
            moved = shift(call, added.nearest, work.slopes, (work.queries, work.keys), exact)
        yield call, added, moved
