"""Operations: attention as one operation that torch.compile does not look into and autograd goes through.

Shapes before anything runs, what is kept for the way back, sinks that are not there: that is the same whichever kernels
run inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

_SIDES = "Tensor query, Tensor key, Tensor value, Tensor? sinks"


def heads_inside(side: Tensor) -> Tensor:
    """Return a tensor `[batch, heads, length, width]` that lies with the heads inside the length, as models want it."""
    return side.transpose(1, 2).contiguous().transpose(1, 2)


def operation(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    facts: str,
    lay: Callable[[Tensor], Tensor],
    tags: tuple[torch.Tag, ...] = (),
) -> CustomOpDef:
    """Return the operation `longspan::name` of query, key, value, sinks or None, and facts: output and log-sum-exp.

    Args:
        name: what it is called in graphs.
        forward: gives output and log-sum-exp, of what the operation is given.
        backward: gives the gradients for query, key, value and sinks (None for no sinks), of those of output and
            log-sum-exp (None where there is none), the four tensors, output, log-sum-exp, and the facts.
        facts: types and names of what comes after the tensors, as a schema of torch has them.
        lay: puts tensors `[batch, heads, length, width]`, outputs and gradients, as they shall lie in memory.
        tags: what a compiler is told of the operation and of its derivative.
    """

    def run(*given: Any) -> tuple[Tensor, Tensor]:
        output, lse = forward(*given)
        return lay(output), lse.contiguous()

    def announced(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(query.dtype, torch.float32)
        output = query.new_empty(*query.shape[:3], value.shape[3])
        return lay(output), query.new_empty(query.shape[:3], dtype=exact)

    def run_backward(*given: Any) -> tuple[Tensor, ...]:
        *grads, sinks = backward(*given)
        # An operation gives tensors of its own, and none of them is left out.
        return *map(lay, grads), given[7].new_zeros(0) if sinks is None else sinks.contiguous()

    def announced_backward(grad_output: Any, grad_lse: Any, *given: Any) -> tuple[Tensor, ...]:
        query, key, value, sinks, _, lse, *_ = given
        made = (lay(side.new_empty(side.shape)) for side in (query, key, value))
        return *made, lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)

    there = torch.library.custom_op(
        f"longspan::{name}",
        run,
        mutates_args=(),
        schema=f"({_SIDES}, {facts}) -> (Tensor, Tensor)",
        tags=tags,
    )
    back = torch.library.custom_op(
        f"longspan::{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor? grad_output, Tensor? grad_lse, {_SIDES}, Tensor output, Tensor lse, {facts}) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        tags=tags,
    )

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, sinks, *ctx.facts = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, sinks, *output)

    def differentiate(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *grads, sinks = back(grad_output, grad_lse, *ctx.saved_tensors, *ctx.facts)
        return *grads, None if ctx.saved_tensors[3] is None else sinks, *[None] * len(ctx.facts)

    there.register_fake(announced)
    back.register_fake(announced_backward)
    there.register_autograd(differentiate, setup_context=keep)
    return there
