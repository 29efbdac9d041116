"""Neighborhood attention: windows of a fixed number of keys, which slide back inside at the edges of the text."""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.errors import PatternError, message
from longspan.pattern.atoms import Causal, Dilated, Sink, Window, check_size
from longspan.pattern.base import Pattern
from longspan.pattern.named import Named


@dataclass(frozen=True, repr=False)
class Neighborhood(Named):
    """Each query reads the `kernel` keys nearest to it, `dilation` apart.

        # # # . . .        Neighborhood(3, length=6, causal=False)
        # # # . . .
        . # # # . .
        . . # # # .
        . . . # # #
        . . . # # #

    In both directions every query reads exactly `kernel` keys: at an edge of the text the window is moved inside,
    not cut off. A kernel of an even number reads one key more on the left. Causally the window ends at the query and
    is cut off by the beginning of the text.

    Args:
        kernel: keys read, the query's own included.
        dilation: distance between two of them in tokens.
        length: tokens in the text, at least `kernel * dilation`, for `causal=False`; 0 otherwise.
        causal: False reads as far to the right too.

    Raises:
        PatternError: a size that is no integer in its range, both directions without a length or a length without
            them, a text shorter than the window.

    Example:
        >>> Neighborhood(7, dilation=2).at_head(0, heads=1)
        Causal() & Window(13) & Dilated(2)

    References:
        Hassani et al., Neighborhood Attention (arXiv 2204.07143), section 3.1; Hassani and Shi, Dilated Neighborhood
        Attention (arXiv 2209.15001), section 3.
    """

    kernel: int
    dilation: int = field(default=1, kw_only=True)
    length: int = field(default=0, kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_size(self, "kernel")
        check_size(self, "dilation")
        check_size(self, "length", least=0)
        whole = self.kernel * self.dilation
        if bool(self.length) == self.causal or (self.length and self.length < whole):
            raise PatternError(
                message(
                    "A neighborhood in both directions needs the length of the text, at least kernel times dilation; "
                    "a causal one needs none.",
                    {
                        "got": f"length={self.length}, causal={self.causal}",
                        "window": f"{self.kernel} keys, {self.dilation} apart",
                    },
                    fix=f"Neighborhood({self.kernel}), or length={max(whole, 4096)} with causal=False",
                )
            )

    def expression(self, head: int, heads: int) -> Pattern:
        left = self.kernel - 1 if self.causal else self.kernel // 2
        reads: Pattern = Causal() & Window(left * self.dilation + 1)
        if not self.causal:
            reads = self._inside(reads | Causal().T & Window((self.kernel - 1) // 2 * self.dilation + 1))
        return reads & Dilated(self.dilation) if self.dilation > 1 else reads

    def _inside(self, band: Pattern) -> Pattern:
        """Return a window with the first and last queries reading the first and last keys instead."""
        whole, text = self.kernel * self.dilation, Sink(self.length)
        reads = band & text & text.T
        if left := self.kernel // 2 * self.dilation:
            reads = reads | Sink(whole) & Sink(left).T
        if right := (self.kernel - 1) // 2 * self.dilation:
            reads = reads | self._last(whole) & self._last(right).T
        return reads

    def _last(self, count: int) -> Pattern:
        text = Sink(self.length)
        return text - Sink(self.length - count) if count < self.length else text
