"""Named patterns: the methods of the literature, each a composition of a few lines."""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.errors import PatternError, message
from longspan.pattern.atoms import Causal, Dilated, Everything, Sink, Window, check_size
from longspan.pattern.base import Counts, Pattern, Positions, Verdict, needs_head


class Named(Pattern):
    """A pattern that is written as an expression of others.

    A subclass gives `expression(head, heads)`; `varies` says whether the expression depends on the head.
    """

    varies = False

    def expression(self, head: int, heads: int) -> Pattern:
        """Return what one of `heads` heads reads, in simpler patterns."""
        raise NotImplementedError

    @property
    def groups(self) -> int:
        """How many equal groups the heads are divided into."""
        return 1

    def at_head(self, head: int, heads: int) -> Pattern:
        if heads % self.groups:
            raise PatternError(
                message(
                    "The heads cannot be divided equally among the parts of this pattern.",
                    {"pattern": str(self), "parts": str(self.groups), "heads": str(heads)},
                    fix="a number of heads that the parts divide, or another pattern",
                )
            )
        return self.expression(head, heads).at_head(head, heads)

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return self._same_on_all_heads().contains(q, k)

    def count(self, q: Positions, k: Positions) -> Counts:
        return self._same_on_all_heads().count(q, k)

    @property
    def period(self) -> int | None:
        return self._same_on_all_heads().period

    def _same_on_all_heads(self) -> Pattern:
        if self.varies:
            raise needs_head(self)
        return self.expression(0, 1)


def direction(causal: bool) -> Pattern:
    """Return the pattern that keeps the keys up to the query, or all of them."""
    return Causal() if causal else Everything()


@dataclass(frozen=True, repr=False)
class SlidingWindow(Named):
    """Each query reads the last `window` keys, its own included.

        # . . . .        SlidingWindow(2)
        # # . . .
        . # # . .
        . . # # .

    Args:
        window: keys read, the query's own included, in tokens. Transformers' and Mistral's `sliding_window`.
        causal: False reads as far to the right too: `2 * window - 1` keys.

    Raises:
        PatternError: a window that is no positive integer.

    Example:
        >>> SlidingWindow(512).at_head(0, heads=1)
        Causal() & Window(512)

    References:
        Jiang et al., Mistral 7B (arXiv 2310.06825), section 2.
    """

    window: int
    causal: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_size(self, "window")

    def expression(self, head: int, heads: int) -> Pattern:
        return direction(self.causal) & Window(self.window)


@dataclass(frozen=True, repr=False)
class Longformer(Named):
    """Each query reads a window, dilated if asked, and the first tokens, which read everything.

        # . . . . .        Longformer(2)
        # # . . . .
        # # # . . .
        # . # # . .

    Args:
        window: keys on one side, the query's own included: the paper's two-sided even `w` is `w / 2 + 1` here.
        dilation: distance between two keys of the window, the paper's `d`, in tokens.
        global_tokens: how many tokens at the beginning read all tokens and are read by all.
        causal: False for the paper's encoder; True keeps the keys up to the query, for global tokens too.

    Raises:
        PatternError: a size that is no integer in its range.

    Example:
        >>> Longformer(64, global_tokens=0).at_head(0, heads=1)
        Causal() & Window(64)

    References:
        Beltagy et al., Longformer (arXiv 2004.05150), section 3.1. Dilation on some heads only is
        `PerHead([Longformer(w), Longformer(w, dilation=2)])`. The separate projections of global tokens
        belong to the model, not to the pattern.
    """

    window: int
    dilation: int = field(default=1, kw_only=True)
    global_tokens: int = field(default=1, kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_size(self, "window")
        check_size(self, "dilation")
        check_size(self, "global_tokens", least=0)

    def expression(self, head: int, heads: int) -> Pattern:
        near: Pattern = Window((self.window - 1) * self.dilation + 1)
        if self.dilation > 1:
            near = near & Dilated(self.dilation)
        if self.global_tokens:
            near = near | Sink(self.global_tokens) | Sink(self.global_tokens).T
        return direction(self.causal) & near


@dataclass(frozen=True, repr=False)
class Streaming(Named):
    """Each query reads the last `window` keys and the first `sinks` keys of the text.

        # . . . . .        Streaming(2, sinks=1)
        # # . . . .
        # # # . . .
        # . # # . .

    Args:
        window: recent keys, the query's own included, in tokens.
        sinks: first keys of the text that stay readable, in tokens.

    Raises:
        PatternError: a size that is no positive integer.

    Example:
        >>> Streaming(1020).at_head(0, heads=1)
        Causal() & (Sink(4) | Window(1020))

    References:
        Xiao et al., Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453), section 3.2.
    """

    window: int
    sinks: int = field(default=4, kw_only=True)

    def __post_init__(self) -> None:
        check_size(self, "window")
        check_size(self, "sinks")

    def expression(self, head: int, heads: int) -> Pattern:
        return Causal() & (Sink(self.sinks) | Window(self.window))
