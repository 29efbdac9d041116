"""Opaque: the kernels on CPU as one operation that torch.compile does not look into.

A compiled graph holds tensors and numbers but no patterns, so the graph holds the number of a pattern in a table.
Patterns enter it while a graph is traced, and stay as long as a graph may ask for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.errors import PlanError, message
from longspan.kernel import native, sdpa
from longspan.kernel.frame import Work
from longspan.kernel.plan import head_groups
from longspan.kernel.sides import one_sided_groups
from longspan.pattern import Pattern
from longspan.score import Scores

KERNELS = {"native": native, "sdpa": sdpa}
_numbers: dict[Pattern, int] = {}
_patterns: list[Pattern] = []


def work(
    pattern: Pattern, heads: int, queries: range, keys: int, scale: float, slopes: tuple[float, ...] | None
) -> Work:
    """Return what the kernel is asked, from the plans that are kept."""
    grouped = head_groups if slopes is None else one_sided_groups
    return Work(grouped(pattern, heads, queries, range(keys)), queries, scale, slopes)


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
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp as the kernel does, for queries at `start`, `start + step`, ..."""
    slopes = None if changes.slopes is None else list(changes.slopes)
    return _attend(query, key, value, changes.sinks, slopes, numbered(pattern), start, step, scale, kernel)


@torch.compiler.assume_constant_result
def numbered(pattern: Pattern) -> int:
    """Return the number of a pattern; runs while a graph is traced."""
    try:
        known = pattern in _numbers
    except AttributeError:
        # torch.compile hands over a pattern made inside the graph without its fields.
        raise PlanError(
            message(
                "A compiled function cannot make a pattern.",
                {"got": type(pattern).__name__},
                fix="make the pattern outside of the function, and use it inside",
            )
        ) from None
    if not known:
        _numbers[pattern] = len(_patterns)
        _patterns.append(pattern)
    return _numbers[pattern]


def _work(
    query: Tensor, key: Tensor, slopes: list[float] | None, number: int, start: int, step: int, scale: float
) -> Work:
    queries = range(start, start + step * query.shape[2], step)
    steep = None if slopes is None else tuple(slopes)
    return work(_patterns[number], query.shape[1], queries, key.shape[2], scale, steep)


def pattern_of(number: int) -> Pattern:
    """Return the pattern of a number."""
    return _patterns[number]


@torch.library.custom_op("longspan::attend", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    slopes: list[float] | None,
    number: int,
    start: int,
    step: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    asked = _work(query, key, slopes, number, start, step, scale)
    return KERNELS[kernel].forward(query, key, value, sinks, asked)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(*query.shape[:3], value.shape[3])
    return output, query.new_empty(query.shape[:3], dtype=exact)


@torch.library.custom_op("longspan::attend_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    slopes: list[float] | None,
    number: int,
    start: int,
    step: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    asked = _work(query, key, slopes, number, start, step, scale)
    grads = KERNELS[kernel].backward(grad_output, grad_lse, query, key, value, sinks, output, lse, asked)
    # An operation gives tensors of its own, and none of them is left out.
    sinks_grad = lse.new_zeros(0) if grads[3] is None else grads[3]
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous(), sinks_grad


@_attend_backward.register_fake
def _(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = [side.new_empty(side.shape) for side in (query, key, value)]
    return made[0], made[1], made[2], lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, sinks, *output)


def _differentiate(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    made = _attend_backward(grad_output, grad_lse, *ctx.saved_tensors, *ctx.rest)
    sinks = made[3] if ctx.saved_tensors[3] is not None else None
    return (*made[:3], sinks, *[None] * len(ctx.rest))


_attend.register_autograd(_differentiate, setup_context=_keep)
