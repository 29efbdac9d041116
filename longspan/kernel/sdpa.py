"""The sdpa kernel: PyTorch's CPU flash attention, called on strided views of the parts of a pattern.

Forward, each part gives an output and a log-sum-exp, merged as they come. Backward, each part is handed the merged
output and log-sum-exp, which makes its gradients exact shares of the whole without recomputing the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longspan.kernel.bias import Bias, bias, shift, size
from longspan.kernel.calls import Call, calls
from longspan.kernel.frame import Frame, Work
from longspan.kernel.merge import merge_into
from longspan.kernel.parts import Part
from longspan.kernel.rows import alike, with_lse_gradient
from longspan.score import Scores

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Temporary results of one call, in bytes, at most (or those of one rectangle of one head, where that is more).
WORKSPACE = 32 * 2**20
# Widths that the matrix products like are multiples of this.
LANES = 8


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


def _merged(query: Tensor, key: Tensor, value: Tensor, work: Work) -> tuple[Tensor, Tensor, bool]:
    """Return output and log-sum-exp over all parts, and whether the sums of outputs and queries are finite."""
    query, key, value = alike(query, key, value)
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
    # An infinite query whose scores are all minus infinity leaves no trace in the output.
    return output, lse, bool((output.sum() + query.sum()).isfinite())


def _accumulated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    work: Work,
) -> tuple[list[Tensor], bool]:
    """Return the gradients of query, key and value over all parts, and whether their sums are finite."""
    sides = (query, key, value, grad_output, output)
    if grad_lse.count_nonzero():
        sides = with_lse_gradient(sides, grad_lse, LANES)
    query, key, value, grad_output, output = alike(*sides)
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
    return grads, all(bool(grad.sum().isfinite()) for grad in grads)


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


_frame = Frame(_merged, _accumulated, torch.float64)
attend, forward, backward = _frame.attend, _frame.forward, _frame.backward
