"""Readings: the patterns that models read by, or were trained with, to be drawn and planned in a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.kernel.plan import plan
from longspan.pattern import Pattern
from longspan.pattern.expression import parse


@dataclass(frozen=True)
class Reading:
    """A pattern that models read by or were trained with.

    Attributes:
        labels: what to call the models.
        occasion: when they read so, such as "while training".
        pattern: what each query reads.
        length: tokens at which to draw it.
        heads: query heads of a layer.
        width: numbers in a head's query.
    """

    labels: tuple[str, ...]
    occasion: str
    pattern: Pattern
    length: int
    heads: int
    width: int


def readings(
    models: Iterable[tuple[str, Any, Sequence[str], int]], *, pattern: Pattern | None, length: int
) -> tuple[Reading, ...]:
    """Return what models read: the pattern they are measured with, and those they were trained with.

    Args:
        models: of each its label, its configuration, the expressions of the patterns that it was trained with
            (none, one, or one for each layer), and the tokens of a training window.
        pattern: what they are measured with, None for their own dense attention.
        length: tokens at which to draw that.

    Returns:
        Every pattern once, with all models that read so.

    Raises:
        PatternError: an expression is no pattern, or a pattern does not fit the heads of its model.
    """
    found: dict[tuple[str, Pattern, int, int, int], list[str]] = {}
    for label, config, trained, window in models:
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        occasions = [] if pattern is None else [("as measured", pattern, length)]
        for expression in dict.fromkeys(trained):
            layers = [str(layer) for layer, other in enumerate(trained) if other == expression]
            named = f" (layers {', '.join(layers)})" if len(set(trained)) > 1 else ""
            occasions.append((f"while training{named}", parse(expression), window))
        for occasion, read, tokens in occasions:
            found.setdefault((occasion, read, tokens, heads, width), []).append(label)
    for _, read, tokens, heads, width in found:
        # Refused now rather than after the minutes of measuring.
        plan(read, length=tokens, heads=heads, width=width)
    return tuple(
        Reading(tuple(labels), occasion, read, tokens, heads, width)
        for (occasion, read, tokens, heads, width), labels in found.items()
    )
