"""Factors: a stretch of its own for every pair, which can say what any other method does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longspan.errors import ShapeError, message
from longspan.frequency.base import Frequency, Plain, powers


@dataclass(frozen=True)
class LongRoPE(Frequency):
    """Every pair has its own stretch, one for texts up to the trained length and one for longer ones.

    Law: pair `d` turns `short[d]` times slower than `Plain` while the text is at most `original` tokens long, and
    `long[d]` times slower beyond. Queries and keys are multiplied by `scale()`,
    `sqrt(1 + ln(factor) / ln(original))`, at every length.

    Where the two differ, keys turned before the switch are stale after it, so a cache must hold keys as they are
    before turning. Transformers does not; give it the same factors twice.

    The paper leaves the first tokens of a text as they were trained, which no checkpoint can say; nor does this.

    Args:
        short: stretch of each pair up to the trained length, as many numbers as pairs, over 0.
        long: stretch of each pair beyond.
        original: trained length in tokens.
        factor: the new length over the trained one, 1 or more.
        attention_factor: the scale itself, in place of the formula; over 0.

    Raises:
        InputError: a field out of its range.
        ShapeError: when asked for heads with another number of pairs.

    Example:
        >>> frequency = LongRoPE([1, 1], [2, 8], original=4096, factor=8)
        >>> frequency.angles_per_token(4), frequency.angles_per_token(4, 4097)
        (tensor([1.0000, 0.0100]), tensor([0.5000, 0.0012]))
        >>> round(frequency.scale(), 5)
        1.11803

    References:
        Ding et al., LongRoPE (arXiv 2402.13753), section 3.
    """

    short: Sequence[float]
    long: Sequence[float]
    original: int = field(kw_only=True)
    factor: float = field(kw_only=True)
    attention_factor: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_original()
        self.check_factor()
        for name in ("short", "long"):
            stretches = getattr(self, name)
            numbers = isinstance(stretches, list | tuple) and len(stretches)
            if not numbers or not all(
                isinstance(each, int | float) and 0 < each < math.inf for each in stretches
            ):
                raise self.refusal(name, "a list of numbers over 0, one for each pair")
            # A tuple, so that equal values have equal hashes.
            object.__setattr__(self, name, tuple(stretches))
        if self.attention_factor is not None:
            self.check("attention_factor", "a number over 0, or None", lambda factor: factor > 0)

    @property
    def varies(self) -> bool:
        return self.short != self.long

    def angles_per_token(self, width: int, length: int | None = None) -> Tensor:
        name = "long" if length is not None and length > self.original else "short"
        stretches = torch.tensor(getattr(self, name), dtype=torch.float32, device="cpu")
        slowness = powers(self.theta, self.rotated(width))
        if len(stretches) != len(slowness):
            raise ShapeError(
                message(
                    "LongRoPE needs as many factors as a head has pairs.",
                    {
                        "head": f"{width} numbers wide, {len(slowness)} pairs",
                        name: f"{len(stretches)} factors",
                    },
                    fix=f"{len(slowness)} factors",
                )
            )
        return 1.0 / (stretches * slowness)

    def scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original))


def factors(frequency: Frequency, width: int, length: int | None = None) -> list[float]:
    """Return how many times slower than `Plain` each pair turns.

    Law: `LongRoPE(f, f, ...)` with these factors `f` has the angles of `frequency`, up to rounding. This writes a
    method that no configuration has a name for, such as the YaRN paper's own ramp, into a checkpoint.

    Args:
        frequency: any frequency.
        width: numbers in a head.
        length: tokens of the text so far, for frequencies that vary.

    Returns:
        One number for each pair.

    Example:
        >>> from longspan.frequency import NTK
        >>> [round(factor, 3) for factor in factors(NTK(8), 8)]
        [1.0, 2.0, 4.0, 8.0]
    """
    plain = Plain(theta=frequency.theta, share=frequency.share).angles_per_token(width)
    return (plain.double() / frequency.angles_per_token(width, length).double()).tolist()
