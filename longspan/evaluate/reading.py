"""Readings: the patterns that models read by, or were trained with, to be drawn and planned in a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.hf.layers import one_per_layer, windows, within
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
    """Return what models read: the pattern they are measured with, and those they were trained with, each layer inside
    the window that the model itself has on it.

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
        occasions = [] if pattern is None else [("as measured", [pattern], length)]
        if trained:
            occasions.append(("while training", [parse(text) for text in trained], window))
        own = windows(config) if occasions else ()
        for occasion, parts, tokens in occasions:
            spread = one_per_layer(parts[0] if len(parts) == 1 else parts, len(own))
            layers = [within(part, frozenset({window})) for part, window in zip(spread, own, strict=True)]
            for read in dict.fromkeys(layers):
                alike = [str(layer) for layer, other in enumerate(layers) if other == read]
                named = f" (layers {', '.join(alike)})" if len(alike) < len(layers) else ""
                found.setdefault((occasion + named, read, tokens, heads, width), []).append(label)
    for _, read, tokens, heads, width in found:
        # Refused now rather than after the minutes of measuring.
        plan(read, length=tokens, heads=heads, width=width)
    return tuple(
        Reading(tuple(labels), occasion, read, tokens, heads, width)
        for (occasion, read, tokens, heads, width), labels in found.items()
    )
