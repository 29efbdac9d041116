"""The one operation: attention over a pattern."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.errors import ShapeError, message
from longspan.kernel.choice import at_once, chosen, facts, run
from longspan.kernel.operation import compiled, opaque
from longspan.pattern import Pattern
from longspan.score import Score, collect


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    queries: range | None = None,
    scale: float | None = None,
    scores: Score | Sequence[Score] = (),
    kernel: str | None = None,
) -> Tensor:
    """Attend: each query takes the mean of the values its pattern lets it read, weighed by softmax.

    Law: with m the counts of the pattern and s the scores, `output_i = sum_j m_ij exp(s_ij) v_j / sum_j m_ij
    exp(s_ij)`, and `s_ij = scale q_i.k_j` where `scores` says nothing else. A query that reads nothing gives 0. All
    kernels give the same numbers, forward and backward.

    What a query does not read cannot reach it, NaN and infinity included. A row of query, key or value with NaN,
    or of query or value with infinity, makes NaN of the outputs of the queries that read it (or are it) and of no
    others, and of the gradients of what those queries read and of no others. An infinity in a key that is read does
    the same, except for outputs where all that comes of it are scores of minus infinity: those weigh 0, and on cpu a
    query with no other scores gives 0 as if it read nothing. Where anything else is not finite, kernels other than "reference" may
    make NaN of them too.

    Args:
        query: `[batch, heads, queries, width]`, float.
        key: `[batch, key heads, keys, width]`; key head `h // (heads // key heads)` serves query head `h`.
        value: `[batch, key heads, keys, value width]`; any value width.
        pattern: which keys each query reads, and how often.
        queries: absolute positions of the queries; keys are at `range(keys)`. None takes the last positions, so
            that one new token attends to everything cached before it.
        scale: what scores are multiplied by; None for `1 / sqrt(width)`.
        scores: what changes them beside the pattern: `ALiBi()`, `Sinks(logits)`, `SoftCap(limit)` from
            `longspan.score`, one or a list of them in any order.
        kernel: "native", "sdpa", "flash", "flex" or "reference" to insist on one; None takes the first that can run, on
            cpu native, sdpa or reference, on cuda flash, flex or reference. "triton" runs only where it is asked for.

    Returns:
        `[batch, heads, queries, value width]` in the dtype of `query`.

    Raises:
        PatternError: a pattern that cannot be shared out among the heads.
        PlanError: no kernel can run it; the message says why for each.
        ShapeError: tensors that do not fit together.

    Example:
        >>> from longspan import SlidingWindow
        >>> query = torch.randn(1, 8, 1000, 64)
        >>> key = value = torch.randn(1, 2, 1000, 64)
        >>> attend(query, key, value, SlidingWindow(128)).shape
        torch.Size([1, 8, 1000, 64])

    References:
        Vaswani et al., Attention Is All You Need (arXiv 1706.03762), section 3.2.1.
    """
    return attend_with_lse(
        query, key, value, pattern, queries=queries, scale=scale, scores=scores, kernel=kernel
    )[0]


def attend_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    queries: range | None = None,
    scale: float | None = None,
    scores: Score | Sequence[Score] = (),
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend as `attend` does, and return the logarithm of the softmax denominator too.

    Returns:
        The output, and its log-sum-exp `[batch, heads, queries]` in float32 (float64 for float64), minus infinity
        for a query that reads nothing. Gradients flow through both.

    Example:
        >>> from longspan import Causal
        >>> query = key = value = torch.zeros(1, 1, 4, 8)
        >>> attend_with_lse(query, key, value, Causal())[1].exp()
        tensor([[[1., 2., 3., 4.]]])
    """
    query, key, value = _alike(query, key, value)
    _check(query, key, value, pattern, queries)
    changes = collect(scores, query.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows, keys = query.shape[2], key.shape[2]
    start, step = (keys - rows, 1) if queries is None else (queries.start, queries.step)
    here = None
    if not (query.is_cuda and torch.compiler.is_compiling()):
        here = at_once(query, changes, asked=kernel)
        if here is None:
            where = range(start, start + step * rows, step)
            here = chosen(query, key, value, pattern, queries=where, changes=changes, asked=kernel)
    if scale <= 0:
        # PyTorch's kernel takes positive scales only.
        query, scale = query * scale, 1.0
    with torch.autocast(query.device.type, enabled=False):
        if here is None:
            return compiled.attend(
                query,
                key,
                value,
                pattern,
                start=start,
                step=step,
                scale=scale,
                changes=changes,
                kernel=kernel,
            )
        if here in opaque.KERNELS and torch.compiler.is_compiling():
            # A range would make the compiler take every length for a constant.
            return opaque.attend(
                query,
                key,
                value,
                pattern,
                start=start,
                step=step,
                scale=scale,
                changes=changes,
                kernel=here,
            )
        positions = range(start, start + step * rows, step)
        if here not in opaque.KERNELS:
            return run(here, query, key, value, pattern, queries=positions, scale=scale, changes=changes)
        work = opaque.work(pattern, query.shape[1], positions, keys, scale, changes.slopes)
        return opaque.KERNELS[here].attend(query, key, value, changes.sinks, work)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the dtype that autocast wants, as PyTorch's own attention does."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
        return tuple(
            tensor.to(wanted) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
            for tensor in tensors
        )
    return tensors


def _check(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, queries: range | None) -> None:
    """Raise ShapeError where anything does not fit."""

    def refuse(problem: str, fix: str) -> ShapeError:
        return ShapeError(message(problem, facts(query, key, value, pattern, queries), fix=fix))

    if not isinstance(pattern, Pattern):
        raise refuse(
            f"The fourth argument is a pattern, got {type(pattern).__name__}.", "Causal(), for example"
        )
    if any(side.dim() != 4 for side in (query, key, value)):
        raise refuse(
            "Query, key and value have four dimensions: batch, heads, length and width.",
            "tensor.unsqueeze(0) for a batch of one",
        )
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise refuse("Query, key and value share one floating-point dtype.", "tensor.to(query.dtype)")
    if not query.device == key.device == value.device:
        raise refuse("Query, key and value lie on one device.", "tensor.to(query.device)")
    if key.shape[:3] != value.shape[:3]:
        raise refuse("Key and value have one batch, number of heads and length.", "a value for every key")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise refuse("Query and key have one batch and one width.", "a key made for this query")
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        raise refuse(
            f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads equally.",
            "a number of key heads that divides the number of query heads",
        )
    if not query.shape[3]:
        raise refuse("A head is at least one number wide.", "a width of 64, for example")
    rows, columns = query.shape[2], key.shape[2]
    if queries is None:
        if rows > columns:
            raise refuse(
                f"{rows} queries are not the last of {columns} positions.",
                f"queries=range({rows}) says where they are",
            )
    elif len(queries) != rows or queries.step < 1 or queries.start < 0:
        raise refuse(
            f"`queries` names {len(queries)} positions for {rows} queries.",
            f"queries=range(start, start + {rows})",
        )
