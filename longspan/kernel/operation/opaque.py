"""Opaque: the kernels on CPU as one operation that torch.compile does not look into.

A compiled graph holds tensors and numbers but no patterns, so the graph holds the number of a pattern in a table.
Patterns enter it while a graph is traced, and stay as long as a graph may ask for them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longspan.errors import PlanError, message
from longspan.kernel.heads import head_groups
from longspan.kernel.native import native
from longspan.kernel.operation.operation import operation
from longspan.kernel.sdpa import sdpa
from longspan.kernel.sides import one_sided_groups
from longspan.kernel.softmax.frame import Work
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


def pattern_of(number: int) -> Pattern:
    """Return the pattern of a number."""
    return _patterns[number]


def forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *facts: Any
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, below autograd; for the facts see the schema at the end."""
    kernel, asked = _asked(query, key, *facts)
    return kernel.forward(query, key, value, sinks, asked)


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
    kernel, asked = _asked(query, key, *facts)
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    return kernel.backward(grad_output, grad_lse, query, key, value, sinks, output, lse, asked)


def _asked(
    query: Tensor,
    key: Tensor,
    slopes: list[float] | None,
    number: int,
    start: int,
    step: int,
    scale: float,
    kernel: str,
) -> tuple[ModuleType, Work]:
    """Return the kernel that runs, and what it is asked."""
    queries = range(start, start + step * query.shape[2], step)
    steep = None if slopes is None else tuple(slopes)
    return KERNELS[kernel], work(_patterns[number], query.shape[1], queries, key.shape[2], scale, steep)


_attend = operation(
    "attend",
    forward,
    backward,
    facts="float[]? slopes, SymInt number, SymInt start, SymInt step, float scale, str kernel",
    lay=Tensor.contiguous,
)
