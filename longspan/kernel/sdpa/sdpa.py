"""The sdpa kernel: PyTorch's CPU flash attention, called on strided views of the parts of a pattern.

Forward, each part gives an output and a log-sum-exp, merged as they come. Backward, each part is handed the merged
output and log-sum-exp, which makes its gradients exact shares of the whole without recomputing the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from longspan.kernel.lattice import summary
from longspan.kernel.lattice.calls import Call, HeadGroup, calls
from longspan.kernel.lattice.parts import Lattice, Part
from longspan.kernel.sdpa.bias import KEPT, Bias, bias, shift, size
from longspan.kernel.softmax.frame import Frame, Work
from longspan.kernel.softmax.merge import merge_into
from longspan.kernel.softmax.rows import alike, with_lse_gradient, without_silent
from longspan.score import Scores

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Temporary results of one call, in bytes, at most (or those of one rectangle with a mask, where that is more).
WORKSPACE = 8 * 2**20
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


def workspace(
    groups: Sequence[HeadGroup], heads: int, queries: int, keys: int, width: int, dtype: str
) -> tuple[int, int]:
    """Return the bytes that are taken at most beside inputs, outputs and gradients, forward and backward, for one row
    of a batch; key heads are counted as query heads.

    Law: what grows with the length is a few numbers for each query, and sums that are wider than what they are sums of.
    A gradient that flows into log-sum-exps takes copies of what a call reads, six times `WORKSPACE`, besides.
    """
    given = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    size = max(4, given)
    needed = (partial(forward_numbers, width=width), partial(backward_numbers, width=width))
    each = [
        summary.workspace(
            group.parts, heads=len(group.heads), size=size, limit=WORKSPACE, kept=KEPT, needed=needed
        )
        for group in groups
    ]
    # Log-sum-exps and their gradients, in a few steps.
    rows = heads * queries * size
    wide = heads * width * size * (given < size)
    return (
        2 * rows + wide * queries + max(forward for forward, _ in each),
        4 * rows + wide * (queries + 2 * keys) + max(backward for _, backward in each),
    )


def _merged(query: Tensor, key: Tensor, value: Tensor, work: Work) -> tuple[Tensor, Tensor, bool]:
    """Return output and log-sum-exp over all parts, and whether the sums of outputs and queries are finite."""
    exact = torch.promote_types(query.dtype, torch.float32)
    width = value.shape[-1]
    output = torch.zeros(*query.shape[:-1], width, dtype=exact)
    lse = torch.full(query.shape[:-1], -torch.inf, dtype=exact)
    for call, added, moved in _calls(query, key, work, partial(forward_numbers, width=_widest(query, value))):
        q, k, v = alike(call.read(query), call.look_up(key), call.look_up(value))
        part_output, part_lse = _forward(
            q, k, v, 0.0, call.slice.causal, attn_mask=added.added, scale=work.scale
        )
        if not part_lse.all():
            _tell_silent(q, k, part_lse, call.slice.causal, added.added, work.scale)
        if moved is not None:
            part_lse += moved
        if added.blind is not None:
            # For a row without a key the kernel answers 0 where minus infinity is meant.
            part_lse[..., added.blind] = -torch.inf
        part_output = part_output[..., :width]
        if call.slice.fresh:
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
    grad_lse: Tensor | None,
    work: Work,
) -> tuple[list[Tensor], bool]:
    """Return the gradients of query, key and value over all parts, and whether their sums are finite."""
    lse, grad_lse = without_silent(lse, grad_lse)
    flows = bool(grad_lse.count_nonzero())
    width = _widest(query, value) + LANES * flows
    grads = [torch.zeros(side.shape, dtype=lse.dtype) for side in (query, key, value)]
    for call, added, moved in _calls(query, key, work, partial(backward_numbers, width=width)):
        sides = (*map(call.read, (query, grad_output, output)), *map(call.look_up, (key, value)))
        q, grad, out, k, v = sides
        total = call.read(lse)
        if flows:
            q, k, v, grad, out = with_lse_gradient((q, k, v, grad, out), call.read(grad_lse), LANES)
        q, k, v, grad, out = alike(q, k, v, grad, out)
        if moved is not None:
            total = total - moved
        made = _backward(
            grad, q, k, v, out, total, 0.0, call.slice.causal, attn_mask=added.added, scale=work.scale
        )
        into, *onto = (part[..., : whole.shape[-1]] for whole, part in zip(grads, made, strict=True))
        call.read(grads[0]).add_(into)
        for whole, part in zip(grads[1:], onto, strict=True):
            call.give_back(whole, part)
    return grads, all(bool(grad.sum().isfinite()) for grad in grads)


def _tell_silent(
    query: Tensor, key: Tensor, lse: Tensor, causal: bool, added: Tensor | None, scale: float
) -> None:
    """Write minus infinity where scores are minus infinity alone: for such rows the kernel answers 0.

    A row whose log-sum-exp is 0 indeed has weights that add up to 1.
    """
    total, _ = _forward(query, key, torch.ones_like(key), 0.0, causal, attn_mask=added, scale=scale)
    lse.masked_fill_(total[..., 0] == 0, -torch.inf)


def _widest(*sides: Tensor) -> int:
    return max(side.shape[-1] for side in sides)


def forward_numbers(query: Lattice, key: Lattice, *, width: int) -> int:
    """Return how many numbers one rectangle on one head gives, and takes where its keys are gathered."""
    return (query.places + _gathered(key)) * width


def backward_numbers(query: Lattice, key: Lattice, *, width: int) -> int:
    """Return how many numbers the gradients of one rectangle on one head are, and of gathered keys."""
    return (query.places + 2 * key.places + _gathered(key)) * width


def _gathered(key: Lattice) -> int:
    return 0 if key.at is None else 2 * key.places


def _calls(
    query: Tensor, key: Tensor, work: Work, needed: Callable[[Lattice, Lattice], int]
) -> Iterator[tuple[Call, Bias, Tensor | None]]:
    """Yield the calls of the kernel, each with its bias and with what is to be added to its log-sum-exp."""

    def alone(part: Part) -> int:
        return size(part, work.slopes)

    exact = torch.promote_types(query.dtype, torch.float32)
    # Within a rectangle distances are counted in keys.
    slopes = work.slopes and tuple(slope * work.keys[1] for slope in work.slopes)
    for call in calls(query, key, work.groups, needed=needed, alone=alone, limit=WORKSPACE):
        added = bias(call, query.dtype, slopes)
        moved = None
        if work.slopes is not None and added.nearest is not None:
            moved = shift(call, added.nearest, work.slopes, (work.queries, work.keys), exact)
        yield call, added, moved


_frame = Frame(_merged, _accumulated, torch.float64)
attend, forward, backward = _frame.attend, _frame.forward, _frame.backward
