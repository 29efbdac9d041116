"""Interpolation: positions pressed together, or theta raised, alike for every pair."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longspan.errors import ShapeError, message
from longspan.frequency.base import Frequency, Plain, powers


@dataclass(frozen=True)
class Linear(Frequency):
    """Every pair turns `factor` times slower: position interpolation (PI).

    Law: position `factor * p` is turned as `Plain` turns position `p`.

    Args:
        factor: the new length over the trained one, 1 or more.

    Example:
        >>> Linear(4, theta=100.0).angles_per_token(8)
        tensor([0.2500, 0.0791, 0.0250, 0.0079])

    References:
        Chen et al., Extending Context Window via Positional Interpolation (arXiv 2306.15595), section 2.3.
    """

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_factor()

    def angles_per_token(self, width: int, length: int | None = None) -> Tensor:
        return Plain.angles_per_token(self, width) / self.factor


@dataclass(frozen=True)
class NTK(Frequency):
    """Theta is raised so that the slowest pair turns `factor` times slower and the fastest as before.

    Law: `NTK(s)` is `Plain(theta=theta * s ** (D / (D - 2)))`, with `D` the turned numbers of a head. Stretching
    twice is stretching once: `s` and then `t` is `s * t`.

    Args:
        factor: the new length over the trained one, 1 or more. A model read without training uses more.

    Raises:
        ShapeError: when asked for heads with one pair, which is the fastest and the slowest.

    Example:
        >>> NTK(4, theta=100.0).angles_per_token(8)
        tensor([1.0000, 0.1992, 0.0397, 0.0079])

    References:
        bloc97, NTK-Aware Scaled RoPE (2023), described in Peng et al., YaRN (arXiv 2309.00071), section 3.1.
    """

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_factor()

    def base(self, width: int) -> float:
        """Return the theta with which `Plain` turns heads of this width alike."""
        return raised(self, width, self.factor)

    def angles_per_token(self, width: int, length: int | None = None) -> Tensor:
        return 1.0 / powers(self.base(width), self.rotated(width))


@dataclass(frozen=True)
class DynamicNTK(Frequency):
    """NTK by the current length: as trained up to the trained length, then slower with every token.

    Law: at length `n` over `original`, the stretch is `factor * n / original - (factor - 1)`, which is `n / original`
    for a factor of 1. At 8 times the length, a factor of 8 makes the stretch 57.

    Keys that were turned at another length are stale, so a cache must hold keys as they are before turning.
    Transformers and vLLM do not: they read such a checkpoint differently from each other and from this law.

    Args:
        original: trained length in tokens, 2 or more.
        factor: 1 for the definition; transformers' key of this name, 1 or more.

    Example:
        >>> frequency = DynamicNTK(2048)
        >>> frequency.angles_per_token(8, 2048).equal(Plain().angles_per_token(8))
        True
        >>> frequency.angles_per_token(8, 8192).equal(NTK(4).angles_per_token(8))
        True

    References:
        emozilla, Dynamically Scaled RoPE (2023), described in Peng et al., YaRN (arXiv 2309.00071), section 3.3.
    """

    original: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_original()
        self.check_factor()

    @property
    def varies(self) -> bool:
        return True

    def angles_per_token(self, width: int, length: int | None = None) -> Tensor:
        length = max(length or 0, self.original)
        stretch = (self.factor * length / self.original) - (self.factor - 1)
        return 1.0 / powers(raised(self, width, stretch), self.rotated(width))


def raised(frequency: Frequency, width: int, stretch: float) -> float:
    """Return the theta at which the slowest pair of a head turns `stretch` times slower."""
    rotated = frequency.rotated(width)
    if rotated <= 2:
        raise ShapeError(
            message(
                "NTK scaling needs heads with more than one pair of turned numbers.",
                {"head": f"{width} numbers wide, {rotated} of them turned"},
                fix="linear scaling, which presses positions together",
            )
        )
    return frequency.theta * stretch ** (rotated / (rotated - 2))
