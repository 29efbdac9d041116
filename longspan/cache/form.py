"""Form: what tensors must look like to go into a cache, and to continue what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.errors import PlanError, ShapeError, message


@dataclass(frozen=True)
class Form:
    """What does not change from the first token of a text to the last."""

    batch: int
    width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> Form:
        return cls(len(key), key.shape[3], value.shape[3], key.dtype, key.device)

    def fits(self, query: Tensor, key: Tensor, value: Tensor, heads: int, key_heads: int) -> bool:
        """Whether tensors continue what is held, as fast as can be told; where not, `check` says why."""
        tokens = query.shape[2] if query.dim() == 4 else -1
        return (
            query.shape == (self.batch, heads, tokens, self.width)
            and key.shape == (self.batch, key_heads, tokens, self.width)
            and value.shape == (self.batch, key_heads, tokens, self.value_width)
            and query.dtype == key.dtype == value.dtype == self.dtype
            and query.device == key.device == value.device == self.device
            and not (torch.is_grad_enabled() and any(side.requires_grad for side in (query, key, value)))
        )

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"batch {self.batch}, widths {self.width} and {self.value_width}, {kind}, {self.device}"


def check(
    sides: dict[str, Tensor],
    real: Tensor | None,
    start: int | Sequence[int] | None,
    *,
    heads: tuple[int, int],
    form: Form | None,
    lengths: list[int],
) -> None:
    """Raise ShapeError where tensors do not fit together, or do not continue what was read.

    Args:
        sides: query, key and value by name.
        real, start: see `Cache.attend`.
        heads: query heads and key heads of the cache.
        form: of what it holds, None before the first token.
        lengths: tokens read in each row, empty before the first.
    """
    query, key, value = sides.values()

    def refuse(problem: str, fix: str) -> ShapeError:
        described = {
            name: f"{list(side.shape)} {str(side.dtype).removeprefix('torch.')}, {side.device}"
            for name, side in sides.items()
        }
        return ShapeError(message(problem, {"cache": str(form or "empty"), **described}, fix=fix))

    if any(side.dim() != 4 for side in sides.values()):
        raise refuse(
            "Query, key and value have four dimensions: batch, heads, length and width.",
            "tensor.unsqueeze(0) for a batch of one",
        )
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise refuse("Query, key and value share one floating-point dtype.", "tensor.to(query.dtype)")
    if not query.device == key.device == value.device:
        raise refuse("Query, key and value lie on one device.", "tensor.to(query.device)")
    if (query.shape[1], key.shape[1]) != heads:
        raise refuse(
            f"The cache was made for {heads[0]} query heads and {heads[1]} key heads.",
            "the layer that it was made for",
        )
    if (
        key.shape[:3] != value.shape[:3]
        or query.shape[::2] != key.shape[::2]
        or query.shape[3] != key.shape[3]
    ):
        raise refuse(
            "Query, key and value have one batch and one length, query and key one width.",
            "a key and a value for every query",
        )
    if torch.is_grad_enabled() and any(side.requires_grad for side in sides.values()):
        raise refuse("A cache carries no gradient.", "with torch.no_grad(), or attention without a cache")
    if form is not None and Form.of(key, value) != form:
        raise refuse(
            "These tensors do not continue what the cache holds.",
            "cache.reset() for another text, cache.select(rows) for other rows of this one",
        )
    if real is not None and (real.dtype != torch.bool or real.shape != query.shape[::2]):
        raise refuse("`real` says of every token of the batch whether it is one.", "bool [batch, tokens]")
    expected = lengths or [0] * len(query)
    given = expected if start is None else [start] * len(query) if isinstance(start, int) else list(start)
    if given != expected:
        raise refuse(
            f"Tokens that begin at {start} do not continue a text of {expected} tokens.",
            "the tokens that come next, or cache.crop(length) first",
        )


def captured(cache: str) -> PlanError:
    """Return the error for a cache that is read into while a CUDA graph is captured."""
    return PlanError(
        message(
            "This cache cannot be read while a CUDA graph is captured.",
            {
                "cache": cache,
                "why": "it knows outside of the graph where the next token goes, so each run would write over one place",
            },
            fix="a cache that grows, past_key_values=DynamicCache(), for a graph of one step; or no graph",
        )
    )
