"""Compiled: attention on CUDA as one operation that torch.compile does not look into.

Which kernel runs is chosen when the operation runs, so that a graph for all lengths is one graph. The flash kernel has
a backward of its own; where another one ran forward, backward runs it again and asks autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.kernel.choice import chosen, run, work
from longspan.kernel.flash import flash
from longspan.kernel.operation.opaque import numbered, pattern_of
from longspan.kernel.operation.operation import heads_inside, operation
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


def forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *facts: Any
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, below autograd; for the facts see the schema at the end."""
    name, pattern, asked = _asked(query, key, value, sinks, *facts)
    return run(name, query, key, value, pattern, **asked)


def backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *facts: Any,
) -> tuple[Tensor | None, ...]:
    """Return the gradients for query, key, value and sinks, of those of what `forward` gave, None for zero."""
    name, pattern, asked = _asked(query, key, value, sinks, *facts)
    if name != "flash":
        return _again(name, (query, key, value, sinks), (grad_output, grad_lse), pattern, asked)
    done = work(pattern, query.shape[1], asked["queries"], key.shape[2], asked["scale"])
    return flash.backward(grad_output, grad_lse, query, key, value, sinks, output, lse, done)


def _again(
    name: str,
    given: tuple[Tensor | None, ...],
    into: tuple[Tensor | None, ...],
    pattern: Pattern,
    asked: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Return gradients by running forward once more."""
    # An operation runs below autograd, which is let in again.
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        leaves = [None if side is None else side.detach().requires_grad_() for side in given]
        changes = asked["changes"]
        asked = {**asked, "changes": Scores(changes.limit, changes.slopes, leaves[3])}
        found = run(name, *leaves[:3], pattern, **asked)
        results, flows = zip(
            *((result, flow) for result, flow in zip(found, into, strict=True) if flow is not None),
            strict=True,
        )
        made = torch.autograd.grad(results, [leaf for leaf in leaves if leaf is not None], flows)
    return (*made, None)[:4]


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
    scale: float,
    kernel: str,
) -> tuple[str, Pattern, dict[str, Any]]:
    """Return the kernel that runs, the pattern, and what else it is asked beside tensors."""
    pattern, queries = pattern_of(number), range(start, start + step * query.shape[2], step)
    changes = Scores(limit, None if slopes is None else tuple(slopes), sinks)
    name = chosen(query, key, value, pattern, queries=queries, changes=changes, asked=kernel or None)
    return name, pattern, {"queries": queries, "changes": changes, "scale": scale}


_attend = operation(
    "attend_cuda",
    forward,
    backward,
    facts="float[]? slopes, float? limit, SymInt number, SymInt start, SymInt step, float scale, str kernel",
    lay=heads_inside,
)
