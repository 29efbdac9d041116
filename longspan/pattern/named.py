"""Named patterns: the methods of the literature, each a composition of a few lines."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from longspan.errors import PatternError, message
from longspan.pattern.atoms import Causal, Dilated, Everything, Sink, Window, check_size, check_sizes
from longspan.pattern.base import Counts, Pattern, PerHead, Positions, Verdict, needs_head
from longspan.pattern.listing import Keys
from longspan.pattern.progression import Progression


class Named(Pattern):
    """A pattern that is written as an expression of others.

    A subclass gives `expression(head, heads)`; `varies` says whether the expression depends on the head.
    """

    @property
    def varies(self) -> bool:
        return False

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

    def facts(self, q: Progression, k: Progression) -> tuple[np.ndarray, ...]:
        return self._same_on_all_heads().facts(q, k)

    def _same_on_all_heads(self) -> Pattern:
        if self.varies:
            raise needs_head(self)
        return self.expression(0, 1)


def check_choice(pattern: Pattern, name: str, choices: tuple[str, ...]) -> None:
    """Raise PatternError unless a field of a pattern is one of some words."""
    value = getattr(pattern, name)
    if value not in choices:
        listed = " or ".join(f'"{choice}"' for choice in choices)
        verb = "are" if name.endswith("s") else "is"
        raise PatternError(
            message(
                f"The {name} of {type(pattern).__name__} {verb} {listed}.",
                {"got": f"{name}={value!r}"},
                fix=f'{name}="{choices[0]}"',
            )
        )


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
        dilation: distance between two keys of the window, the paper's `d`, in tokens; a list gives one to each of as
            many equal groups of heads, such as `(1, 1, 1, 2)` for dilation on a quarter of them.
        global_tokens: tokens that read all tokens and are read by all: how many at the beginning, or a list of
            their positions anywhere.
        causal: False for the paper's encoder; True keeps the keys up to the query, for global tokens too.

    Raises:
        PatternError: a size that is no integer in its range, or (when read) heads that the dilations do not divide.

    Example:
        >>> Longformer(64, global_tokens=0).at_head(0, heads=1)
        Causal() & Window(64)
        >>> Longformer(64, global_tokens=(0, 40)).at_head(0, heads=1)
        Causal() & (Window(64) | Keys((0, 40)) | Keys((0, 40)).T)
        >>> layers = [Longformer(window) for window in (32, 64, 128)]

    References:
        Beltagy et al., Longformer (arXiv 2004.05150), section 3.1. Windows that grow with depth are a list of
        patterns, one per layer. The separate projections of global tokens belong to the model, not to the pattern.
    """

    window: int
    dilation: int | tuple[int, ...] = field(default=1, kw_only=True)
    global_tokens: int | tuple[int, ...] = field(default=1, kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_size(self, "window")
        if isinstance(self.dilation, (list, tuple)):
            object.__setattr__(self, "dilation", check_sizes(self, "dilation"))
        else:
            check_size(self, "dilation")
        if isinstance(self.global_tokens, (list, tuple)):
            object.__setattr__(self, "global_tokens", Keys(self.global_tokens).positions)
        else:
            check_size(self, "global_tokens", least=0)

    @property
    def varies(self) -> bool:
        return not isinstance(self.dilation, int)

    def expression(self, head: int, heads: int) -> Pattern:
        parts = [self._reads(step) for step in self._dilations]
        return direction(self.causal) & (PerHead(parts) if len(parts) > 1 else parts[0])

    @property
    def _dilations(self) -> tuple[int, ...]:
        return (self.dilation,) if isinstance(self.dilation, int) else self.dilation

    def _reads(self, step: int) -> Pattern:
        near: Pattern = Window((self.window - 1) * step + 1)
        if step > 1:
            near = near & Dilated(step)
        if self.global_tokens:
            given = self.global_tokens
            anchors = Sink(given) if isinstance(given, int) else Keys(given)
            near = near | anchors | anchors.T
        return near


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
