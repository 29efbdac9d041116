"""Headwise patterns: named patterns whose heads divide the sequence among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from longspan.errors import PatternError, message
from longspan.pattern.atoms import Chunk, Dilated, Every, Sink, check_size
from longspan.pattern.base import Pattern, PerHead
from longspan.pattern.named import Named, direction


@dataclass(frozen=True, repr=False)
class LongNet(Named):
    """Each query reads its segment, thinned the more the longer the segment, as a mixture of branches.

    Law: branch (w, r) keeps the tokens of each segment of `w` whose place in it is `h mod r` modulo `r` on head
    `h`, and lets them read each other. Branches add: a pair in two branches counts twice, which is the paper's
    weighing of branches by their softmax denominators.

    Args:
        segments: length of the segments of each branch in tokens, the paper's `w`.
        dilations: distance between kept tokens of each branch, the paper's `r`; the first is 1 in the paper,
            so that every token reads something.
        causal: True keeps the keys up to the query.

    Raises:
        PatternError: lists of different lengths, or sizes that are no positive integers.

    Example:
        >>> LongNet((4, 8), (1, 2)).at_head(1, heads=4)  # doctest: +NORMALIZE_WHITESPACE
        Causal() & (Chunk(4) & Every(1, within=4) & Every(1, within=4).T)
            + (Chunk(8) & Every(2, offset=1, within=8) & Every(2, offset=1, within=8).T)

    References:
        Ding et al., LongNet (arXiv 2307.02486), sections 3.1 to 3.3.
    """

    segments: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilations: tuple[int, ...] = (1, 2, 4, 6, 12)
    causal: bool = field(default=True, kw_only=True)

    varies = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", _sizes(self, "segments", self.segments))
        object.__setattr__(self, "dilations", _sizes(self, "dilations", self.dilations))
        if len(self.segments) != len(self.dilations):
            raise PatternError(
                message(
                    "LongNet takes one dilation for each segment length.",
                    {
                        "segments": f"{self.segments}, {len(self.segments)} of them",
                        "dilations": f"{self.dilations}, {len(self.dilations)} of them",
                    },
                    fix="LongNet((2048, 4096), (1, 2))",
                )
            )

    def expression(self, head: int, heads: int) -> Pattern:
        branches = []
        for segment, dilation in zip(self.segments, self.dilations, strict=True):
            kept = Every(dilation, offset=head % dilation, within=segment)
            branches.append(Chunk(segment) & kept & kept.T)
        return direction(self.causal) & reduce(add, branches)


@dataclass(frozen=True, repr=False)
class S2(Named):
    """Half of the heads read within groups, the other half within groups moved by half a group.

        # . . . . .        # . . . . .        S2(4)
        # # . . . .        # # . . . .
        # # # . . .        . . # . . .
        # # # # . .        . . # # . .
        . . . . # .        . . # # # .

    The groups of the second half begin at half a group, rounded up; the first and last of them are shorter. Nothing wraps
    around, so nothing leaks.

    Args:
        group: length of a group in tokens, the paper's `G`, a quarter of the length there.
        causal: False reads the whole group.

    Raises:
        PatternError: a group below 2, or (when read) an odd number of heads.

    Example:
        >>> S2(8).at_head(3, heads=4)
        Causal() & Chunk(8, offset=4)

    References:
        Chen et al., LongLoRA (arXiv 2309.12307), section 3.2.
    """

    group: int
    causal: bool = field(default=True, kw_only=True)

    varies = True

    def __post_init__(self) -> None:
        check_size(self, "group", least=2)

    @property
    def groups(self) -> int:
        return 2

    def expression(self, head: int, heads: int) -> Pattern:
        halves = PerHead([Chunk(self.group), Chunk(self.group, offset=self.group - self.group // 2)])
        return direction(self.causal) & halves


@dataclass(frozen=True, repr=False)
class SCCA(Named):
    """Each query reads a window of keys that is moved by whole windows, differently on different heads.

        # . . . . .        . . . . . .        SCCA(2): the heads of the second half, before the fallback
        # # . . . .        . . . . . .
        . . # . . .        # # . . . .
        . . # # . .        # # . . . .

    SCCA fixed (`flow=0`): half of the heads read their own window, the other half the window before it.
    SCCA flow (`flow=m`): head `h` reads the window that lies `h mod m` windows before. Queries whose window
    would lie before the text read their own window instead.

    The paper has no public code; its shift distances, head allocation and mask convention are read here as
    causal on absolute positions, with wrapped keys dropped.

    Args:
        window: length of a window in tokens.
        flow: how many distances the heads cycle through, the paper's number of windows; 0 is SCCA fixed.
        causal: False reads whole windows.

    Raises:
        PatternError: a size that is no integer in its range, or (when read) an odd number of heads with `flow=0`.

    Example:
        >>> SCCA(4, flow=4).at_head(1, heads=4)
        Causal() & (Chunk(4, shift=4) | Chunk(4) & Sink(4).T)

    References:
        Guo, Shifted Cross Chunk Attention (arXiv 2312.07305), section 3.
    """

    window: int
    flow: int = field(default=0, kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    varies = True

    def __post_init__(self) -> None:
        check_size(self, "window")
        check_size(self, "flow", least=0)

    @property
    def groups(self) -> int:
        return 1 if self.flow else 2

    def expression(self, head: int, heads: int) -> Pattern:
        fixed = PerHead([self._moved(0), self._moved(1)])
        return direction(self.causal) & (self._moved(head % self.flow) if self.flow else fixed)

    def _moved(self, windows: int) -> Pattern:
        own = Chunk(self.window)
        if not windows:
            return own
        distance = windows * self.window
        return Chunk(self.window, shift=distance) | own & Sink(distance).T


@dataclass(frozen=True, repr=False)
class SDA(Named):
    """Each query reads every `dilation`-th key of the whole sequence, each head from another offset.

        # . . . .        . . . . .        SDA(2), heads 0 and 1
        . # . . .        # . . . .
        # . # . .        . # . . .
        . # . # .        # . # . .

    Law: with `rows="all"` head `h` reads `k` where `(q - k) mod dilation == h mod dilation`, so the heads together
    read everything. With `rows="selected"` only the tokens at `h mod dilation` read each other, as in LongNet.

    Args:
        dilation: distance between two keys in tokens; None takes the number of heads.
        rows: "all" or "selected", the queries that read something.
        causal: False reads later keys too.

    Raises:
        PatternError: a dilation that is no positive integer, an unknown choice of rows.

    Example:
        >>> SDA(4).at_head(1, heads=4)
        Causal() & Dilated(4, offset=1)

    References:
        Guo, Shifted Cross Chunk Attention (arXiv 2312.07305), section 3.
    """

    dilation: int | None = None
    rows: str = field(default="all", kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    varies = True

    def __post_init__(self) -> None:
        if self.dilation is not None:
            check_size(self, "dilation")
        if self.rows not in ("all", "selected"):
            raise PatternError(
                message(
                    'The rows of SDA are "all" or "selected".',
                    {"got": f"rows={self.rows!r}"},
                    fix='rows="all"',
                )
            )

    def expression(self, head: int, heads: int) -> Pattern:
        step = self.dilation or heads
        if self.rows == "all":
            return direction(self.causal) & Dilated(step, offset=head % step)
        kept = Every(step, offset=head % step)
        return direction(self.causal) & kept & kept.T


@dataclass(frozen=True, repr=False)
class LongMixed(Named):
    """Half of the heads read by SCCA fixed, the other half by SDA.

    The first quarter of the heads reads its own window, the second quarter the window before it, and the second
    half every `dilation`-th key from all offsets, so that the heads together read everything.

    Args:
        window: length of an SCCA window in tokens.
        dilation: distance between two keys of an SDA head; None takes the number of SDA heads.
        causal: False reads later keys too.

    Raises:
        PatternError: a size that is no positive integer, or (when read) heads that are no multiple of 4.

    Example:
        >>> LongMixed(1024).at_head(3, heads=4)
        Causal() & Dilated(2, offset=1)

    References:
        Guo, Shifted Cross Chunk Attention (arXiv 2312.07305), section 3.
    """

    window: int
    dilation: int | None = field(default=None, kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    varies = True

    def __post_init__(self) -> None:
        check_size(self, "window")
        if self.dilation is not None:
            check_size(self, "dilation")

    @property
    def groups(self) -> int:
        return 4

    def expression(self, head: int, heads: int) -> Pattern:
        return PerHead([SCCA(self.window, causal=self.causal), SDA(self.dilation, causal=self.causal)])


def _sizes(pattern: Pattern, name: str, given: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(given) if isinstance(given, (list, tuple)) else ()
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise PatternError(
            message(
                f"{type(pattern).__name__} takes a list of positive integers for `{name}`.",
                {"got": f"{name}={given!r}"},
                fix=f"{name}=(2048, 4096)",
            )
        )
    return sizes
