"""Base: what every frequency answers, and the plain one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.errors import InputError, ShapeError, message


@dataclass(frozen=True, kw_only=True)
class Frequency:
    """How fast the pairs of numbers in a head turn.

    A rotary model turns pair `d` of a query or key at position `p` by the angle `p * angles_per_token(width)[d]`, and
    multiplies the result by `scale()`. A subclass says both. Values are equal where all their fields are.

    Args:
        theta: base of the powers, the papers' `b`, more than 1: pair `d` of `D` turned numbers turns by
            `theta ** (-2 * d / D)`.
        share: the part of each head that is turned, over 0 and at most 1; the numbers after it stay as they are.

    Raises:
        InputError: a field out of its range.
    """

    theta: float = 10000.0
    share: float = 1.0

    def __post_init__(self) -> None:
        self.check("theta", "a number over 1", lambda theta: theta > 1)
        self.check("share", "a number over 0 and at most 1", lambda share: 0 < share <= 1)

    @property
    def varies(self) -> bool:
        """Whether angles depend on the current length, so that keys turned at another length are stale."""
        return False

    def rotated(self, width: int) -> int:
        """Return how many numbers of a head of `width` take part: the papers' `D`, at least 2.

        Raises:
            ShapeError: a head that is all turned and of odd width, or of which less than a pair is turned.
        """
        found = int(width * self.share)
        if found < 2 or (found == width and width % 2):
            raise ShapeError(
                message(
                    "A head cannot be turned in pairs.",
                    {"head": f"{width} numbers wide", "turned": str(found)},
                    fix="an even width of 2 or more, or another share of it",
                )
            )
        return found

    def angles_per_token(self, width: int, length: int | None = None) -> Tensor:
        """Return the angle by which each pair turns from one token to the next.

        Args:
            width: numbers in a head, turned or not.
            length: tokens of the text so far, for frequencies that vary; None stands for the trained length.

        Returns:
            Radians, float32 `[pairs]` on the CPU, bit by bit what transformers computes where it has the method.
            The same on every device: move it, do not compute it there.
        """
        raise NotImplementedError

    def scale(self) -> float:
        """Return what turned queries and keys are multiplied by; scores grow with its square."""
        return 1.0

    def check(self, name: str, wanted: str, valid: Callable[[float], bool]) -> None:
        """Raise InputError unless a field holds a finite number in its range."""
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not valid(value):
            raise self.refusal(name, wanted)

    def check_factor(self) -> None:
        """Raise InputError unless the stretch is a number of 1 or more."""
        self.check("factor", "a number of 1 or more", lambda factor: factor >= 1)

    def check_original(self) -> None:
        """Raise InputError unless the trained length is a number of tokens with a logarithm to divide by."""
        if not isinstance(self.original, int) or isinstance(self.original, bool) or self.original < 2:
            raise self.refusal("original", "an integer of 2 or more, in tokens")

    def refusal(self, name: str, wanted: str) -> InputError:
        """Return the error that a field is out of its range."""
        return InputError(
            message(
                f"{type(self).__name__} cannot have this `{name}`.",
                {"got": f"{name}={getattr(self, name)!r}"},
                fix=wanted,
            )
        )


@dataclass(frozen=True)
class Plain(Frequency):
    """Frequencies as a model is trained with them: pair `d` of `D` numbers turns by `theta ** (-2 * d / D)`.

    Example:
        >>> Plain(theta=100.0).angles_per_token(8)
        tensor([1.0000, 0.3162, 0.1000, 0.0316])

    References:
        Su et al., RoFormer (arXiv 2104.09864), section 3.2.2.
    """

    def angles_per_token(self, width: int, length: int | None = None) -> Tensor:
        return 1.0 / powers(self.theta, self.rotated(width))


def powers(theta: float, rotated: int) -> Tensor:
    """Return `theta ** (2 * d / rotated)` for each pair `d`, float32 on the CPU.

    Every step in float32 and in this order, which is what transformers does: other orders differ in the last bit.
    """
    exponents = torch.arange(0, rotated, 2, dtype=torch.int64, device="cpu").to(torch.float32) / rotated
    return theta**exponents
