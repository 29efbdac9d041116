"""Headwise patterns: named patterns whose heads divide the sequence among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from operator import add

from longspan.errors import PatternError, message
from longspan.pattern.atoms import Chunk, Every, Sink, check_size, check_sizes
from longspan.pattern.base import Pattern, PerHead
from longspan.pattern.named import Named, check_choice, direction


@dataclass(frozen=True, repr=False)
class LongNet(Named):
    """Each query reads its segment, thinned the more the longer the segment, as a mixture of branches.

    Law: branch (w, r) keeps the tokens of each segment of `w` whose place in it is `s` modulo `r`, and lets them read
    each other. Head `h` of `H` has `s = h mod r` in the paper, and `s = h div ceil(H / r)` in torchscale, where
    neighbouring heads keep the same tokens. Branches add: a pair in two branches counts twice, which is the paper's
    weighing of branches by their softmax denominators.

    Args:
        segments: length of the segments of each branch in tokens, the paper's `w`.
        dilations: distance between kept tokens of each branch, the paper's `r`; the first is 1 in the paper,
            so that every token reads something.
        offset: "paper" or "torchscale", which tokens a head keeps; weights trained by torchscale need the second.
        causal: True keeps the keys up to the query.

    Raises:
        PatternError: lists of different lengths, sizes that are no positive integers, an unknown offset.

    Example:
        >>> LongNet((4, 8), (1, 2)).at_head(1, heads=4)  # doctest: +NORMALIZE_WHITESPACE
        Causal() & (Chunk(4) & Every(1, within=4) & Every(1, within=4).T)
            + (Chunk(8) & Every(2, offset=1, within=8) & Every(2, offset=1, within=8).T)

    References:
        Ding et al., LongNet (arXiv 2307.02486), sections 3.1 to 3.3.
    """

    segments: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilations: tuple[int, ...] = (1, 2, 4, 6, 12)
    offset: str = field(default="paper", kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    varies = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", check_sizes(self, "segments"))
        object.__setattr__(self, "dilations", check_sizes(self, "dilations"))
        check_choice(self, "offset", ("paper", "torchscale"))
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
            first = head % dilation if self.offset == "paper" else head // -(-heads // dilation)
            kept = Every(dilation, offset=first, within=segment)
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

    The groups of the second half begin at half a group, rounded up; the first and last of them are shorter. Nothing
    wraps around, so nothing leaks.

    With `wrap="roll"` the last half group and the first are one group in which the first comes last, as in the
    pseudo-code of the paper: its first tokens read the end of the text. It is here to reproduce that leak, not to use.

    Args:
        group: length of a group in tokens, the paper's `G`, a quarter of the length there.
        wrap: "none", or "roll" to reproduce the pseudo-code.
        length: tokens in the text, a multiple of an even group, for `wrap="roll"`; 0 where nothing wraps.
        causal: False reads the whole group.

    Raises:
        PatternError: a group below 2, an unknown wrap, a length that does not fit it, or (when read) an odd number of
            heads.

    Example:
        >>> S2(8).at_head(3, heads=4)
        Causal() & Chunk(8, offset=4)

    References:
        Chen et al., LongLoRA (arXiv 2309.12307), section 3.2.
    """

    group: int
    wrap: str = field(default="none", kw_only=True)
    length: int = field(default=0, kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    varies = True

    def __post_init__(self) -> None:
        check_size(self, "group", least=2)
        check_size(self, "length", least=0)
        check_choice(self, "wrap", ("none", "roll"))
        rolls = self.wrap == "roll"
        if bool(self.length) != rolls or (rolls and (self.group % 2 or self.length % self.group)):
            raise PatternError(
                message(
                    "Groups that roll need the length of the text, a multiple of an even group; others need none.",
                    {"got": f"group={self.group}, wrap={self.wrap!r}, length={self.length}"},
                    fix=f"S2({self.group}), which leaks nothing",
                )
            )

    @property
    def groups(self) -> int:
        return 2

    def expression(self, head: int, heads: int) -> Pattern:
        own = direction(self.causal) & Chunk(self.group)
        shifted = direction(self.causal) & Chunk(self.group, offset=self.group - self.group // 2)
        if self.wrap == "roll":
            half = self.group // 2
            first, last = Sink(half), Sink(self.length) - Sink(self.length - half)
            shifted = shifted | first.T & last
            if not self.causal:
                shifted = shifted | last.T & first
        return PerHead([own, shifted])
