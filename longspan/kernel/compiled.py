"""Compiled: attention on CUDA as one operation that torch.compile does not look into.

Which kernel runs is chosen when the operation runs, so that a graph for all lengths is one graph. The flash kernel has
a backward of its own; where another one ran forward, backward runs it again and asks autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.kernel import flash
from longspan.kernel.choice import chosen, run, work
from longspan.kernel.opaque import numbered, pattern_of
from longspan.pattern import Pattern
from longspan.score import Scores


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    start: int,
    step: int,
    scale: float,
    changes: Scores,
    kernel: str | None,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp by the kernel asked for or by that which is chosen, for queries at `start`,
    `start + step`, ..."""
    slopes = None if changes.slopes is None else list(changes.slopes)
    facts = (slopes, changes.limit, numbered(pattern), start, step, scale, kernel or "")
    return _attend(query, key, value, changes.sinks, *facts)


@torch.library.custom_op("longspan::attend_cuda", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    slopes: list[float] | None,
    limit: float | None,
    number: int,
    start: int,
    step: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    name, asked = _asked(query, key, value, sinks, slopes, limit, number, start, step, kernel)
    output, lse = run(name, query, key, value, pattern_of(number), scale=scale, **asked)
    return _laid(output), lse.contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    output = query.new_empty(batch, rows, heads, value.shape[3]).transpose(1, 2)
    return output, query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("longspan::attend_cuda_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    slopes: list[float] | None,
    limit: float | None,
    number: int,
    start: int,
    step: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name, asked = _asked(query, key, value, sinks, slopes, limit, number, start, step, kernel)
    if name == "flash":
        done = work(pattern_of(number), query.shape[1], asked["queries"], key.shape[2], scale)
        grads = flash.backward(grad_output, grad_lse, query, key, value, sinks, output, lse, done)
    else:
        grads = _again(
            name, (query, key, value, sinks), (grad_output, grad_lse), pattern_of(number), scale, asked
        )
    # An operation gives tensors of its own, and none of them is left out.
    sinks_grad = lse.new_zeros(0) if grads[3] is None else grads[3].contiguous()
    return _laid(grads[0]), _laid(grads[1]), _laid(grads[2]), sinks_grad


def _again(
    name: str,
    given: tuple[Tensor | None, ...],
    into: tuple[Tensor | None, ...],
    pattern: Pattern,
    scale: float,
    asked: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Return gradients by running forward once more."""
    # An operation runs below autograd, which is let in again.
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        leaves = [None if side is None else side.detach().requires_grad_() for side in given]
        changes = asked["changes"]
        asked = {**asked, "changes": Scores(changes.limit, changes.slopes, leaves[3])}
        found = run(name, *leaves[:3], pattern, scale=scale, **asked)
        results, flows = zip(
            *((result, flow) for result, flow in zip(found, into, strict=True) if flow is not None),
            strict=True,
        )
        made = torch.autograd.grad(results, [leaf for leaf in leaves if leaf is not None], flows)
    return (*made, None)[:4]


@_attend_backward.register_fake
def _(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = [side.new_empty(side.transpose(1, 2).shape).transpose(1, 2) for side in (query, key, value)]
    return made[0], made[1], made[2], lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _asked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    slopes: list[float] | None,
    limit: float | None,
    number: int,
    start: int,
    step: int,
    kernel: str,
) -> tuple[str, dict[str, Any]]:
    """Return the kernel that runs, and what it is asked beside tensors, pattern and scale."""
    asked = {
        "queries": range(start, start + step * query.shape[2], step),
        "changes": Scores(limit, None if slopes is None else tuple(slopes), sinks),
    }
    return chosen(query, key, value, pattern_of(number), asked=kernel or None, **asked), asked


def _laid(side: Tensor) -> Tensor:
    """Return a tensor `[batch, heads, length, width]` with the heads inside the length, as a model wants it next."""
    return side.transpose(1, 2).contiguous().transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, sinks, *output)


def _differentiate(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    made = _attend_backward(grad_output, grad_lse, *ctx.saved_tensors, *ctx.rest)
    sinks = made[3] if ctx.saved_tensors[3] is not None else None
    return (*made[:3], sinks, *[None] * len(ctx.rest))


_attend.register_autograd(_differentiate, setup_context=_keep)
