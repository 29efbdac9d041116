"""BigBird: neighbouring blocks, blocks that everyone reads, and blocks drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.errors import PatternError, message
from longspan.pattern.atoms import Causal, Chunk, Sink, check_size
from longspan.pattern.base import Pattern
from longspan.pattern.choice import Random
from longspan.pattern.named import Named


@dataclass(frozen=True, repr=False)
class BigBird(Named):
    """Each block of queries reads its own and the neighbouring blocks, the outermost blocks, and some at random.

    The encoder of the paper (`causal=False`, ITC): a block reads itself and the two beside it, the first and the last
    block, and `random` others, drawn for each head and row; the first and the last block read everything. The decoder
    (`causal=True`, which the paper has not): the same of what lies before, where the first block is the outermost one
    and the text has no end.

    What is drawn follows from `seed` and the number of the head, is the same in training and evaluation, and is read
    once by one softmax, unlike in transformers (see `longspan.pattern.convention.bigbird_evaluated`). Layers differ by
    their seeds: `[BigBird(seed=layer) for layer in range(12)]`.

    Args:
        block: tokens in a block.
        random: blocks drawn at random for each row, the paper's `r`; 0 for none.
        seed: which draw of all.
        length: tokens in the text, for `causal=False`; 0 otherwise.
        causal: False for the encoder of the paper.

    Raises:
        PatternError: a size that is no integer in its range, an encoder without a length or a decoder with one.

    Example:
        >>> BigBird(16).at_head(3, heads=8)
        Causal() & (Chunk(16) | Chunk(16, shift=16) | Sink(16) | Random(3, size=16, stream=3))

    References:
        Zaheer et al., Big Bird (arXiv 2007.14062), section 2 and appendix D.
    """

    block: int = 64
    random: int = field(default=3, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    length: int = field(default=0, kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    @property
    def varies(self) -> bool:
        return self.random > 0

    def __post_init__(self) -> None:
        check_size(self, "block")
        for name in ("random", "seed", "length"):
            check_size(self, name, least=0)
        if bool(self.length) == self.causal:
            raise PatternError(
                message(
                    "The last block of an encoder is known from the length of its text; a decoder's text has no end.",
                    {"got": f"length={self.length}, causal={self.causal}"},
                    fix=f"BigBird({self.block}), or BigBird({self.block}, length=4096, causal=False)",
                )
            )

    def expression(self, head: int, heads: int) -> Pattern:
        count = -(-self.length // self.block)
        near = outermost(self.block, self.length)
        if self.random:
            near = near | Random(self.random, size=self.block, of=count, seed=self.seed, stream=head)
        return Causal() & near if self.causal else near


def outermost(block: int, length: int) -> Pattern:
    """Return BigBird without what is drawn at random; of a text without end, where `length` is 0, what lies before."""
    before, first = Chunk(block) | Chunk(block, shift=block), Sink(block)
    if not length:
        return before | first
    # Positions after the text belong to its last block.
    others = (-(-length // block) - 1) * block
    both = before | Chunk(block, shift=block).T | first | first.T
    return both | ~Sink(others) | (~Sink(others)).T if others else both
