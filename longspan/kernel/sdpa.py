"""The sdpa kernel: PyTorch's CPU flash attention, called on strided views of the parts of a pattern.

Forward, each part gives an output and a log-sum-exp, merged as they come. Backward, each part is handed the merged
output and log-sum-exp, which makes its gradients exact shares of the whole without recomputing the merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.kernel.merge import merge_into
from longspan.kernel.parts import Lattice, Part

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Temporary results of one call, in bytes, at most (or those of one rectangle of one head, where that is more).
WORKSPACE = 32 * 2**20


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads that read alike, at regular distances, and the parts that they read by."""

    heads: range
    parts: tuple[Part, ...]

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Bool masks of the parts as tensors."""
        return [None if part.allowed is None else torch.from_numpy(part.allowed) for part in self.parts]


def refusal(query: Tensor, value: Tensor) -> str | None:
    """Say why this kernel cannot take these tensors, or None where it can."""
    if query.device.type != "cpu":
        return f"runs on cpu, got {query.device}"
    if query.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"takes float64, float32, bfloat16 or float16, got {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] != value.shape[-1]:
        return f"takes one width for key and value, got {query.shape[-1]} and {value.shape[-1]}"
    return None


def attend(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[HeadGroup], scale: float
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over the parts of each group of heads, differentiable."""
    return _Attend.apply(_rows(query), _rows(key), _rows(value), groups, scale)


def _rows(tensor: Tensor) -> Tensor:
    # The flash kernel reads garbage where the entries of a row are not neighbours.
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Sequence[HeadGroup], scale: float
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(query.dtype, torch.float32)
        output = torch.zeros(query.shape, dtype=exact)
        lse = torch.full(query.shape[:-1], -torch.inf, dtype=exact)
        width = query.shape[-1]
        for call in _calls(query, key, groups, lambda part: part.query.places * width):
            q, (k, v) = call.read(query), (call.look_up(side) for side in (key, value))
            part_output, part_lse = _forward(
                q, k, v, 0.0, call.part.causal, attn_mask=call.bias(q), scale=scale
            )
            if call.blind is not None:
                # For a row without a key the kernel answers 0 where minus infinity is meant.
                part_lse[..., call.blind] = -torch.inf
            if call.part.fresh:
                call.read(output).copy_(part_output)
                call.read(lse).copy_(part_lse)
            else:
                merge_into(call.read(output), call.read(lse), part_output, part_lse)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.groups, ctx.scale = groups, scale
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        # A row that read nothing has only masked scores, so any finite number serves it.
        lse = lse.masked_fill(torch.isneginf(lse), 0.0)
        grads = [torch.zeros(side.shape, dtype=lse.dtype) for side in (query, key, value)]
        _accumulate(
            grads, query, key, value, _rows(grad_output.to(query.dtype)), output, lse, ctx.groups, ctx.scale
        )
        if grad_lse is not None and grad_lse.count_nonzero():
            # With values e = (1, 0, ...), output 0 and gradient g * e, what the kernel returns for query and key
            # is the gradient of g * lse.
            one = torch.zeros_like(value)
            one[..., 0] = 1
            seed = torch.zeros_like(output)
            seed[..., 0] = grad_lse
            rest = [grads[0], grads[1], torch.zeros_like(grads[2])]
            _accumulate(rest, query, key, one, seed, torch.zeros_like(output), lse, ctx.groups, ctx.scale)
        return (*(grad.to(query.dtype) for grad in grads), None, None)


def _accumulate(
    grads: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    groups: Sequence[HeadGroup],
    scale: float,
) -> None:
    """Add to the gradients of query, key and value what every part contributes."""
    width = query.shape[-1]
    for call in _calls(query, key, groups, lambda part: (part.query.places + 2 * part.key.places) * width):
        q, (k, v) = call.read(query), (call.look_up(side) for side in (key, value))
        grad, out, total = (call.read(side) for side in (grad_output, output, lse))
        made = _backward(
            grad, q, k, v, out, total, 0.0, call.part.causal, attn_mask=call.bias(q), scale=scale
        )
        call.read(grads[0]).add_(made[0])
        for whole, part in zip(grads[1:], made[1:], strict=True):
            call.give_back(whole, part)


@dataclass(frozen=True)
class _Call:
    """Some rectangles of one part, on some heads of one row of the batch: what one call of the kernel takes."""

    part: Part
    mask: Tensor | None
    row: int
    heads: range
    key_heads: range
    outer: int
    inner: range

    def read(self, tensor: Tensor) -> Tensor:
        """Return the view `[heads, rectangles, places, ...]` of a tensor on the query side."""
        return self._view(tensor, self.part.query, self.heads, self.inner)

    def look_up(self, tensor: Tensor) -> Tensor:
        """Return the view `[key heads, rectangles, places, width]` of a tensor on the key side."""
        return self._view(tensor, self.part.key, self.key_heads, self.inner)

    def bias(self, query: Tensor) -> Tensor | None:
        """Return the mask as the kernel takes it, 0 where a pair is read and minus infinity elsewhere."""
        if self.mask is None:
            return None
        return torch.zeros(self.mask.shape, dtype=query.dtype).masked_fill_(~self.mask, -torch.inf)

    @property
    def blind(self) -> Tensor | None:
        """Rows of the rectangle without a key, or None where there are none."""
        if self.mask is None:
            return None
        rows = ~self.mask.any(dim=1)
        return rows if rows.any() else None

    def give_back(self, whole: Tensor, part: Tensor) -> None:
        """Add a gradient of the view `look_up` gave to the whole, where rectangles may overlap."""
        lattice = self.part.key
        advance, step = lattice.inner, lattice.step
        if advance == 0:
            part, inner = part.sum(dim=1, keepdim=True), self.inner[:1]
            self._view(whole, lattice, self.key_heads, inner).add_(part)
            return
        # Rectangle n + apart starts on a place of rectangle n, `shift` places after its first one.
        apart = step // int(np.gcd(advance, step))
        shift = apart * advance // step
        for begin in range(min(apart, len(self.inner))):
            inner = self.inner[begin::apart]
            places = lattice.places if len(inner) == 1 else shift
            for first in range(0, lattice.places, places):
                piece = part[:, begin::apart, first : first + places]
                cut = Lattice(
                    lattice.start + first * step, step, piece.shape[2], lattice.outer, lattice.inner
                )
                self._view(whole, cut, self.key_heads, inner).add_(piece)

    def _view(self, tensor: Tensor, lattice: Lattice, heads: range, inner: range) -> Tensor:
        batch_stride, head_stride, stride, *rest = tensor.stride()
        start = lattice.start + self.outer * lattice.outer + inner.start * lattice.inner
        offset = (
            tensor.storage_offset() + self.row * batch_stride + heads.start * head_stride + start * stride
        )
        return tensor.as_strided(
            (len(heads), len(inner), lattice.places, *tensor.shape[3:]),
            (heads.step * head_stride, inner.step * lattice.inner * stride, lattice.step * stride, *rest),
            offset,
        )


def _calls(query: Tensor, key: Tensor, groups: Sequence[HeadGroup], places: Any) -> Iterator[_Call]:
    """Cut the work into calls whose temporary results, `places(part)` numbers a rectangle, stay small."""
    share = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        for group in groups:
            for heads, key_heads in _paired(group.heads, share):
                for part, mask in zip(group.parts, group.masks, strict=True):
                    budget = max(1, WORKSPACE // (query.element_size() * places(part)))
                    inner = max(1, min(budget // len(heads), part.shape[1]))
                    abreast = max(1, min(budget // inner, len(heads)))
                    for outer in range(part.shape[0]):
                        for first in range(0, part.shape[1], inner):
                            for head in range(0, len(heads), abreast):
                                yield _Call(
                                    part,
                                    mask,
                                    row,
                                    heads[head : head + abreast],
                                    key_heads[head : head + abreast],
                                    outer,
                                    range(part.shape[1])[first : first + inner],
                                )


def _paired(heads: range, share: int) -> Iterator[tuple[range, range]]:
    """Cut heads so that each key head stands opposite one query head, `share` query heads to a key head."""
    for place in range(share):
        opposite = [head for head in heads if head % share == place]
        if opposite:
            step = opposite[1] - opposite[0] if len(opposite) > 1 else share
            taken = range(opposite[0], opposite[-1] + 1, step)
            yield taken, range(taken[0] // share, taken[-1] // share + 1, step // share)
