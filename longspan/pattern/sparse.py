"""Sparse Transformer: the patterns of two factors, near keys and far keys, joined in one of three ways."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from longspan.errors import PatternError, message
from longspan.pattern.atoms import Chunk, Dilated, Every, Window, check_size
from longspan.pattern.base import Pattern, PerHead
from longspan.pattern.named import Named, check_choice, direction

_FACTORS = ("both", "divided", "near", "far")


class Factored(Named):
    """A pattern of two factors, near keys and far keys; a subclass gives `factors(head)` and the fields."""

    factor: str
    causal: bool

    varies = True

    def factors(self, head: int) -> tuple[Pattern, Pattern]:
        """Return what a head reads near itself and what it reads far away, in both directions."""
        raise NotImplementedError

    @property
    def groups(self) -> int:
        return 2 if self.factor == "divided" else 1

    def expression(self, head: int, heads: int) -> Pattern:
        # The heads of each half count from 0.
        near, far = self.factors(head % (heads // 2) if self.factor == "divided" else head)
        joined = {"both": near | far, "divided": PerHead([near, far]), "near": near, "far": far}
        return direction(self.causal) & joined[self.factor]

    def by_layer(self, layers: int) -> tuple[Pattern, ...]:
        """Return one pattern for each of `layers` layers, with the factors interleaved: near, far, near, far ...

        Example:
            >>> Strided(4).by_layer(3)
            (Strided(4, factor='near'), Strided(4, factor='far'), Strided(4, factor='near'))
        """
        factors = ("near", "far") * layers
        return tuple(replace(self, factor=factor) for factor in factors[:layers])  # type: ignore[type-var]


@dataclass(frozen=True, repr=False)
class Strided(Factored):
    """Each query reads the keys just before it, and every `stride`-th key further back.

        # . . . . .        Strided(2)
        # # . . . .
        # # # . . .
        . # # # . .
        # . # # # .

    Every head reads "both" factors, or only the "near" or the "far" one, or they are "divided": the near keys on half
    of the heads, the far ones on the other half. `by_layer` interleaves them over layers.

    Args:
        stride: distance between far keys in tokens, the paper's `l`, about the square root of the length.
        window: near keys, the query's own included; 0 for the paper's `stride + 1`. The authors' code has `stride`.
        factor: "both", "divided", "near" or "far".
        causal: False reads as far to the right too.

    Raises:
        PatternError: a size that is no integer in its range, an unknown factor, or (when read) an odd number of
            heads to divide.

    Example:
        >>> Strided(128).at_head(0, heads=1)
        Causal() & (Window(129) | Dilated(128))

    References:
        Child et al., Sparse Transformers (arXiv 1904.10509), sections 4.2 and 4.3.
    """

    stride: int
    window: int = field(default=0, kw_only=True)
    factor: str = field(default="both", kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_size(self, "stride")
        check_size(self, "window", least=0)
        check_choice(self, "factor", _FACTORS)

    def factors(self, head: int) -> tuple[Pattern, Pattern]:
        return Window(self.window or self.stride + 1), Dilated(self.stride)


@dataclass(frozen=True, repr=False)
class Fixed(Factored):
    """Each query reads its own block of `stride` tokens, and the last tokens of all blocks.

        # . . . . . .        Fixed(3)
        # # . . . . .
        # # # . . . .
        . . # # . . .
        . . # # # . .
        . . # # # # .
        . . # . . # #

    With `variants=v` head `h` reads not the last `summary` tokens of a block but those that lie `h mod v` times
    `summary` tokens before them, so that heads read different summaries; the paper prefers that.

    Args:
        stride: length of a block in tokens, the paper's `l`.
        summary: tokens of each block that are read from everywhere, the paper's `c`.
        variants: how many places of the summary the heads cycle through, the authors' `num_verts`.
        factor: "both", "divided", "near" (the block) or "far" (the summaries), as in `Strided`.
        causal: False reads the whole block and all summaries.

    Raises:
        PatternError: a size that is no integer in its range, summaries that do not fit into a block, an unknown
            factor, or (when read) a number of heads that the variants do not divide.

    Example:
        >>> Fixed(128, summary=8).at_head(0, heads=1)
        Causal() & (Chunk(128) | Every(128, offset=120, run=8))

    References:
        Child et al., Sparse Transformers (arXiv 1904.10509), sections 4.2 and 4.3.
    """

    stride: int
    summary: int = field(default=1, kw_only=True)
    variants: int = field(default=1, kw_only=True)
    factor: str = field(default="both", kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("stride", "summary", "variants"):
            check_size(self, name)
        check_choice(self, "factor", _FACTORS)
        if self.summary * self.variants > self.stride:
            raise PatternError(
                message(
                    "The summaries of Fixed lie side by side in one block.",
                    {"got": f"{self.variants} summaries of {self.summary} tokens in blocks of {self.stride}"},
                    fix=f"a stride of at least {self.summary * self.variants}",
                )
            )

    @property
    def groups(self) -> int:
        return super().groups * (1 if self.factor == "near" else self.variants)

    def factors(self, head: int) -> tuple[Pattern, Pattern]:
        first = self.stride - self.summary * (head % self.variants + 1)
        return Chunk(self.stride), Every(self.stride, offset=first, run=self.summary)
