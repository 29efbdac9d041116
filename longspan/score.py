"""Scores: what a model does to its attention scores beside the pattern. ALiBi, learned sinks, soft-capping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from longspan.errors import ShapeError, message


@dataclass(frozen=True)
class ALiBi:
    """A penalty on distance: `slope * |q - k|` is taken off every score, with one slope for each head.

    Slopes are fixed numbers and get no gradient. For keys after the query, which the paper does not have, the
    distance counts as it does before it.

    Args:
        slopes: one number per head, or None for those of the released checkpoints: `2^(-8 h / heads)` for head
            h = 1, 2, ... where the number of heads is a power of two; else those of the next smaller power,
            then every other one of the next larger.

    Example:
        >>> ALiBi().of(4)
        (0.25, 0.0625, 0.015625, 0.00390625)

    References:
        Press et al., Train Short, Test Long (arXiv 2108.12409), section 3, and its code for other head counts.
    """

    slopes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.slopes is None:
            return
        slopes = tuple(float(slope) for slope in self.slopes)
        if not all(math.isfinite(slope) for slope in slopes):
            raise ShapeError(
                message("The slopes of ALiBi are finite numbers.", {"asked": str(slopes)}, fix="ALiBi()")
            )
        object.__setattr__(self, "slopes", slopes)

    def of(self, heads: int) -> tuple[float, ...]:
        """Return one slope for each of `heads` heads."""
        if self.slopes is not None:
            return self.slopes
        power = 1 << (heads.bit_length() - 1)
        return (_geometric(power) + _geometric(2 * power)[::2])[:heads]


def _geometric(heads: int) -> tuple[float, ...]:
    return tuple(2.0 ** (-8 * head / heads) for head in range(1, heads + 1))


@dataclass(frozen=True, eq=False)
class Sinks:
    """Learned sinks: one extra logit per head in every softmax, which takes weight and gives nothing.

    The denominator gains `exp(logit)`, so a query may read next to nothing. Gradients flow into the logits. A
    query whose pattern gives it no key still gives 0, and its log-sum-exp is the logit.

    Args:
        logits: `[heads]`, float; gpt-oss calls it `sinks`, transformers hands it on as `s_aux`.

    References:
        OpenAI, gpt-oss model card (arXiv 2508.10925), section 2.2.
    """

    logits: Tensor


@dataclass(frozen=True)
class SoftCap:
    """Soft-capping: every score s becomes `limit * tanh(s / limit)`, before ALiBi.

    Args:
        limit: what no score exceeds, above 0; Gemma 2 has 50.

    References:
        Gemma 2 (arXiv 2408.00118), section 2.
    """

    limit: float

    def __post_init__(self) -> None:
        if not 0 < self.limit < math.inf:
            raise ShapeError(
                message("A limit of scores is above 0.", {"asked": str(self)}, fix="SoftCap(50.0)")
            )


Score = ALiBi | Sinks | SoftCap


@dataclass(frozen=True, eq=False)
class Scores:
    """All changes of one call: `limit` for soft-capping, then `slopes` of ALiBi per head, `sinks` [heads]."""

    limit: float | None = None
    slopes: tuple[float, ...] | None = None
    sinks: Tensor | None = None

    def of(self, heads: range) -> list[Score]:
        """Return the changes of some heads, as they are given."""
        made: list[Score] = [] if self.limit is None else [SoftCap(self.limit)]
        if self.slopes is not None:
            made.append(ALiBi(tuple(self.slopes[head] for head in heads)))
        if self.sinks is not None:
            made.append(Sinks(self.sinks[heads.start : heads.stop : heads.step]))
        return made


def collect(given: Score | Sequence[Score], heads: int) -> Scores:
    """Return the changes given, each kind at most once, fit for a number of heads, or raise ShapeError."""
    changes = (given,) if isinstance(given, ALiBi | Sinks | SoftCap) else given
    if not isinstance(changes, list | tuple):
        raise _refuse(f"`scores` takes ALiBi, Sinks or SoftCap, got {type(given).__name__}.", heads)
    limit, slopes, sinks = None, None, None
    for change in changes:
        if isinstance(change, SoftCap) and limit is None:
            limit = float(change.limit)
        elif isinstance(change, ALiBi) and slopes is None:
            slopes = change.of(heads)
        elif isinstance(change, Sinks) and sinks is None:
            sinks = change.logits
        elif isinstance(change, ALiBi | Sinks | SoftCap):
            raise _refuse(f"`scores` holds {type(change).__name__} twice.", heads)
        else:
            raise _refuse(f"`scores` takes ALiBi, Sinks or SoftCap, got {type(change).__name__}.", heads)
    if slopes is not None and len(slopes) != heads:
        raise _refuse(f"ALiBi has {len(slopes)} slopes for {heads} heads.", heads)
    if sinks is not None:
        if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
            raise _refuse("The logits of sinks are a tensor of floating-point numbers.", heads)
        if sinks.dim() != 1 or sinks.shape[0] != heads:
            raise _refuse(f"Sinks have logits {list(sinks.shape)} for {heads} heads.", heads)
    return Scores(limit, slopes, sinks)


def _refuse(problem: str, heads: int) -> ShapeError:
    return ShapeError(
        message(
            problem,
            {"heads": str(heads)},
            fix=f"scores=ALiBi(), or scores=[SoftCap(50.0), Sinks(torch.zeros({heads}))]",
        )
    )
