"""Parts: fast pairs are kept, slow pairs pressed together, and those between blended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longspan.frequency.base import Frequency, Plain, powers

RAMPS = ("rounded", "unrounded", "turns")


@dataclass(frozen=True)
class NTKByParts(Frequency):
    """Pairs that turn often within the trained length are kept, those that hardly turn are `factor` times slower.

    Law: a pair turns by `(1 - kept) * plain / factor + kept * plain`; `kept` is 1 for a pair with more than `fast`
    full turns in `original` tokens, 0 for one with fewer than `slow`, and a ramp between.

    Args:
        factor: the new length over the trained one, the papers' `s`, 1 or more.
        original: trained length in tokens, the papers' `L`.
        fast: full turns, the papers' `beta`, more than `slow`.
        slow: full turns, the papers' `alpha`, over 0.
        ramp: what `kept` is linear in between. "turns" is the paper's: in the number of turns. "rounded" is the
            authors' code and every checkpoint: in the number of the pair, from and to whole pairs. "unrounded" is
            that without rounding, transformers' `truncate: false`. They differ by up to 0.37.

    Raises:
        InputError: a field out of its range.

    Example:
        >>> NTKByParts(8, original=512, theta=100.0).angles_per_token(8)
        tensor([1.0000, 0.2606, 0.0327, 0.0054])

    References:
        Peng et al., YaRN (arXiv 2309.00071), section 3.2, definition 1.
    """

    factor: float
    original: int = field(kw_only=True)
    fast: float = field(default=32.0, kw_only=True)
    slow: float = field(default=1.0, kw_only=True)
    ramp: str = field(default="turns", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_factor()
        self.check_original()
        self.check("slow", "a number over 0", lambda slow: slow > 0)
        self.check("fast", f"a number over `slow`, which is {self.slow}", lambda fast: fast > self.slow)
        if self.ramp not in RAMPS:
            raise self.refusal("ramp", " or ".join(f'"{ramp}"' for ramp in RAMPS))

    def angles_per_token(self, width: int, length: int | None = None) -> Tensor:
        rotated = self.rotated(width)
        slowness = powers(self.theta, rotated)
        plain, pressed = 1.0 / slowness, 1.0 / (self.factor * slowness)
        kept = self._by_turns(plain) if self.ramp == "turns" else self._by_pairs(width)
        return pressed * (1 - kept) + plain * kept

    def bounds(self, width: int) -> tuple[float, float]:
        """Return the numbers of the pairs between which "rounded" and "unrounded" ramps lie.

        Example:
            >>> YaRN(8, original=4096).bounds(128)
            (20, 46)
        """
        rotated = self.rotated(width)

        def pair(turns: float) -> float:
            return (rotated * math.log(self.original / (turns * 2 * math.pi))) / (2 * math.log(self.theta))

        low, high = pair(self.fast), pair(self.slow)
        if self.ramp == "rounded":
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, rotated - 1)

    def _by_turns(self, plain: Tensor) -> Tensor:
        turns = self.original * plain / (2 * math.pi)
        return torch.clamp((turns - self.slow) / (self.fast - self.slow), 0, 1)

    def _by_pairs(self, width: int) -> Tensor:
        low, high = self.bounds(width)
        if low == high:
            # A step, where dividing by the width of the ramp would divide by zero.
            high += 0.001
        pairs = torch.arange((self.rotated(width) + 1) // 2, dtype=torch.float32, device="cpu")
        return 1 - torch.clamp((pairs - low) / (high - low), 0, 1)


@dataclass(frozen=True)
class YaRN(NTKByParts):
    """NTK by parts, and scores sharpened by a temperature that grows with the logarithm of the stretch.

    Law: angles are `NTKByParts`, with the ramp of the authors' code unless told otherwise; queries and keys are both
    multiplied by `scale()`, `0.1 * ln(factor) + 1`, so scores by its square.

    Args:
        factor, original, fast, slow, ramp: see `NTKByParts`.
        attention_factor: the scale itself, in place of the formula; over 0.
        mscale, mscale_all_dim: both together make the scale the quotient of two such formulas, each with its own
            number in place of the 1 before `0.1`. DeepSeek's checkpoints carry them. One alone does nothing.

    Example:
        >>> round(YaRN(8, original=512).scale(), 5)
        1.20794
        >>> YaRN(8, original=512, theta=100.0).angles_per_token(8)
        tensor([1.0000, 0.2471, 0.0563, 0.0109])

    References:
        Peng et al., YaRN (arXiv 2309.00071), sections 3.2 to 3.4; their code differs in the ramp.
    """

    ramp: str = field(default="rounded", kw_only=True)
    attention_factor: float | None = field(default=None, kw_only=True)
    mscale: float | None = field(default=None, kw_only=True)
    mscale_all_dim: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_factor is not None:
            self.check("attention_factor", "a number over 0, or None", lambda factor: factor > 0)
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                self.check(name, "a number of 0 or more, or None", lambda number: number >= 0)

    def scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1)

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class Llama3(Frequency):
    """Pairs of short wavelengths are kept, those of long ones turn `factor` times slower, as in Llama 3.1.

    Law: kept where a full turn takes fewer than `original / high` tokens, slower where it takes more than
    `original / low`, and blended between, linearly in the number of turns.

    Args:
        factor: how many times slower, 1 or more. Llama 3.1 reads 16 times its `original` with a factor of 8.
        original: trained length in tokens.
        low: full turns within the trained length, over 0: transformers' `low_freq_factor`.
        high: full turns, more than `low`: transformers' `high_freq_factor`.

    Example:
        >>> Llama3(8, original=128, theta=100.0).angles_per_token(8)
        tensor([1.0000, 0.3162, 0.0428, 0.0040])

    References:
        Grattafiori et al., The Llama 3 Herd of Models (arXiv 2407.21783), section 3.4.2, and Meta's code of 3.1.
    """

    factor: float = 8.0
    original: int = field(default=8192, kw_only=True)
    low: float = field(default=1.0, kw_only=True)
    high: float = field(default=4.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_factor()
        self.check_original()
        self.check("low", "a number over 0", lambda low: low > 0)
        self.check("high", f"a number over `low`, which is {self.low}", lambda high: high > self.low)

    def angles_per_token(self, width: int, length: int | None = None) -> Tensor:
        plain = Plain.angles_per_token(self, width)
        wavelength = 2 * math.pi / plain
        slow = wavelength > self.original / self.low
        between = ~(wavelength < self.original / self.high) & ~slow
        kept = (self.original / wavelength - self.low) / (self.high - self.low)
        blended = (1 - kept) * plain / self.factor + kept * plain
        return torch.where(between, blended, torch.where(slow, plain / self.factor, plain))
