"""The frame: what kernels on CPU have in common around their sums: sinks, what is not finite, and derivatives.

Kernels multiply pairs that are not read by 0, and 0 times NaN is NaN. So where a result is not finite, the rows of the
tensors that are not are set to 0 and the work is done again; then NaN is written to all that read them, which a
pass of equal weights over the same parts finds out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longspan.kernel.lattice.calls import HeadGroup
from longspan.kernel.softmax.finite import cleared, spoiled
from longspan.kernel.softmax.rows import sinks_gradient, with_sinks, without_silent


@dataclass(frozen=True, eq=False)
class Work:
    """What is asked of a kernel beside tensors.

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


@dataclass(frozen=True)
class Frame:
    """A kernel made of its two sums.

    Attributes:
        sums: output and log-sum-exp of query, key and value, and whether all is finite, the query too; log-sum-exps are
            float32 at least, outputs in any dtype and wider where that helps. Learned sinks are given too where it
            takes them.
        slopes: the gradients of query, key and value, which may be wider, and whether all is finite, given these, the
            gradient of the output, the output, the log-sum-exp and its gradient or None. Nothing flows into the
            log-sum-exp of a row that read nothing, whatever its gradient.
        marks: the dtype in which the kernel counts who reads what.
        sinks: whether `sums` takes learned sinks that are numbers, or minus infinity for none.
    """

    sums: Callable[..., tuple[Tensor, Tensor, bool]]
    slopes: Callable[..., tuple[list[Tensor], bool]]
    marks: torch.dtype
    sinks: bool = False

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp over the parts of each group of heads, differentiable."""
        return _Attend.apply(query, key, value, sinks, work, self)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""
        own = sinks is not None and self.sinks and bool((sinks < torch.inf).all())
        output, lse = self._contained(query, key, value, work, *((sinks,) if own else ()))
        output = output[..., : value.shape[-1]]
        if sinks is not None and not own:
            output, lse = with_sinks(output, lse, sinks)
        return output.to(query.dtype).contiguous(), lse

    def backward(
        self,
        grad_output: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        output: Tensor,
        lse: Tensor,
        work: Work,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the gradients for query, key, value and sinks; no gradient of the log-sum-exp is one of 0."""
        grad_output = grad_output.to(query.dtype)
        grad_sinks = None
        if sinks is not None:
            _, into = without_silent(lse, grad_lse)
            grad_sinks = sinks_gradient(grad_output, into, output, lse, sinks)
        grads = self._contained_gradients(query, key, value, grad_output, output, lse, grad_lse, work)
        made = [
            grad[..., : side.shape[-1]].to(query.dtype)
            for grad, side in zip(grads, (query, key, value), strict=True)
        ]
        return made[0], made[1], made[2], grad_sinks

    def _contained(
        self, query: Tensor, key: Tensor, value: Tensor, work: Work, *sinks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp, NaN in the rows that read or are what is not finite, and only there."""
        output, lse, finite = self.sums(query, key, value, work, *sinks)
        if finite:
            return output, lse
        rows, keys = spoiled(query), spoiled(key) | spoiled(value)
        if not (rows.any() or keys.any()):
            return output, lse
        finite_sides = cleared(query, rows), cleared(key, keys), cleared(value, keys)
        output, lse, _ = self.sums(*finite_sides, work, *sinks)
        reading = self._readers(torch.ones_like(keys), query, work) if sinks else ~lse.isneginf()
        struck = (rows | self._readers(keys, query, work)) & reading
        return output.masked_fill_(struck.unsqueeze(-1), torch.nan), lse.masked_fill_(struck, torch.nan)

    def _contained_gradients(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grad_output: Tensor,
        output: Tensor,
        lse: Tensor,
        grad_lse: Tensor | None,
        work: Work,
    ) -> list[Tensor]:
        """Return the gradients, NaN for the rows that are not finite and for the keys that they read, and only
        there."""
        sides = (query, key, value, grad_output, output)
        grads, all_finite = self.slopes(*sides, lse, grad_lse, work)
        if all_finite:
            return grads
        lse, grad_lse = without_silent(lse, grad_lse)
        keys = spoiled(key) | spoiled(value)
        rows = spoiled(query) | spoiled(grad_output) | spoiled(output) | ~(lse + grad_lse).isfinite()
        if not (rows.any() or keys.any()):
            return grads
        rows |= self._readers(keys, query, work)
        taken_out = (rows, keys, keys, rows, rows)
        finite = (cleared(side, where) for side, where in zip(sides, taken_out, strict=True))
        grads, _ = self.slopes(*finite, lse.masked_fill(rows, 0.0), grad_lse.masked_fill(rows, 0.0), work)
        struck = self._read(rows, key, work)
        rows &= self._readers(torch.ones_like(keys), query, work)
        for grad, where in zip(grads, (rows, struck, struck), strict=True):
            grad.masked_fill_(where.unsqueeze(-1), torch.nan)
        return grads

    def _readers(self, keys: Tensor, query: Tensor, work: Work) -> Tensor:
        """Return which queries read a key that is marked: the mean of the marks they read is above 0."""
        marks = keys.to(self.marks).unsqueeze(-1)
        alike = torch.zeros(*query.shape[:-1], 1, dtype=self.marks, device=query.device)
        return self.sums(alike, torch.zeros_like(marks), marks, _plainly(work))[0][..., 0] > 0

    def _read(self, rows: Tensor, key: Tensor, work: Work) -> Tensor:
        """Return which keys are read by a query that is marked: their share of its marks is above 0."""
        marks = rows.to(self.marks).unsqueeze(-1)
        sides = (
            torch.zeros_like(marks),
            *torch.zeros(2, *key.shape[:-1], 1, dtype=self.marks, device=key.device),
        )
        _, lse, _ = self.sums(*sides, _plainly(work))
        grads, _ = self.slopes(*sides, marks, torch.zeros_like(lse).unsqueeze(-1), lse, None, _plainly(work))
        return grads[2][..., 0] > 0


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, work: Work, frame: Frame
    ) -> tuple[Tensor, Tensor]:
        output, lse = frame.forward(query, key, value, sinks, work)
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.work, ctx.frame = work, frame
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            grad_output = torch.zeros_like(ctx.saved_tensors[4])
        return (
            *ctx.frame.backward(grad_output, grad_lse, *ctx.saved_tensors, ctx.work),
            None,
            None,
        )


def _plainly(work: Work) -> Work:
    """Return the same work over scores of 0."""
    return replace(work, scale=1.0, slopes=None)
