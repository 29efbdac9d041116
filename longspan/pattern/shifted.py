"""Shifted patterns: methods whose heads read windows or residues that are moved from head to head.

The paper (arXiv 2312.07305) has no public code. Shift distances, which heads take which, the mask of moved keys and what
becomes of queries left without any are not settled by it, so each is a parameter here, and the defaults are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from longspan.errors import PatternError, message
from longspan.pattern.atoms import Causal, Chunk, Dilated, Every, Sink, Window, check_size
from longspan.pattern.base import Pattern, PerHead
from longspan.pattern.named import Named, check_choice, direction


@dataclass(frozen=True, repr=False)
class SCCA(Named):
    """Each query reads a window of keys that is moved, differently on different heads.

        # . . . . .        . . . . . .        SCCA(2): the heads of the second half, before the fallback
        # # . . . .        . . . . . .
        . . # . . .        # # . . . .
        . . # # . .        # # . . . .

    SCCA fixed (`flow=0`): the heads are divided into as many equal groups as there are `shifts`, and each reads the
    keys that lie so far before its window: half of the heads its own window, the other half the one before it, unless
    told otherwise. `shifts=(0, window // 2)` is the reading that resembles S2.
    SCCA flow (`flow=m`): head `h` reads the window that lies `h mod m` windows before.

    Args:
        window: length of a window in tokens.
        flow: how many distances the heads cycle through, the paper's number of windows; 0 is SCCA fixed.
        shifts: distances of SCCA fixed in tokens, one per group of heads; None for `(0, window)`.
        mask: "absolute" keeps the keys up to the query and drops those that wrapped around. "rolled" is what a causal
            kernel sees that knows nothing of the roll: it leaks, and is here to reproduce that, not to use.
        empty: queries whose window would lie before the text read their "own" window, or "nothing".
        length: tokens in the text, a multiple of the window, for `mask="rolled"`; 0 otherwise.
        causal: False reads whole windows.

    Raises:
        PatternError: a size that is no integer in its range, shifts for a flow, an unknown word, a length that does
            not fit, or (when read) heads that the groups do not divide.

    Example:
        >>> SCCA(4, flow=4).at_head(1, heads=4)
        Causal() & (Chunk(4, shift=4) | Chunk(4) & Sink(4).T)

    References:
        Guo, Shifted Cross Chunk Attention (arXiv 2312.07305), section 3.
    """

    window: int
    flow: int = field(default=0, kw_only=True)
    shifts: tuple[int, ...] | None = field(default=None, kw_only=True)
    mask: str = field(default="absolute", kw_only=True)
    empty: str = field(default="own", kw_only=True)
    length: int = field(default=0, kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    varies = True

    def __post_init__(self) -> None:
        check_size(self, "window")
        check_size(self, "flow", least=0)
        check_size(self, "length", least=0)
        check_choice(self, "mask", ("absolute", "rolled"))
        check_choice(self, "empty", ("own", "nothing"))
        object.__setattr__(self, "shifts", _shifts(self, self.shifts))
        rolls = self.mask == "rolled"
        if bool(self.length) != rolls or self.length % self.window:
            raise PatternError(
                message(
                    "A rolled mask needs the length of the text, a multiple of the window; others need none.",
                    {"got": f"window={self.window}, mask={self.mask!r}, length={self.length}"},
                    fix=f"SCCA({self.window}), which leaks nothing",
                )
            )

    @property
    def groups(self) -> int:
        return 1 if self.flow else len(self._distances)

    @property
    def _distances(self) -> tuple[int, ...]:
        return (0, self.window) if self.shifts is None else self.shifts

    def expression(self, head: int, heads: int) -> Pattern:
        moved = self._rolled if self.mask == "rolled" else self._absolute
        if self.flow:
            return moved(head % self.flow * self.window)
        return PerHead([moved(distance) for distance in self._distances])

    def _absolute(self, distance: int) -> Pattern:
        own, keys = Chunk(self.window), Chunk(self.window, shift=distance)
        left_empty = distance // self.window * self.window
        if left_empty and self.empty == "own":
            return direction(self.causal) & (keys | own & Sink(left_empty).T)
        return direction(self.causal) & keys

    def _rolled(self, distance: int) -> Pattern:
        text = Sink(self.length) & Sink(self.length).T
        distance = distance % self.length
        if not distance:
            return text & direction(self.causal) & Chunk(self.window)
        ahead = self.length - distance
        keys: Pattern = Chunk(self.window, shift=distance)
        wrapped: Pattern = Chunk(self.window, offset=-distance % self.window, shift=ahead).T
        if self.causal:
            # In rolled places: key `k` stands at `k + distance`, a wrapped one at `k - ahead`.
            keys = keys & (Causal() - Window(distance))
            wrapped = wrapped & (Causal() | Window(ahead + 1))
        return text & (keys | wrapped)


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
        check_choice(self, "rows", ("all", "selected"))

    def expression(self, head: int, heads: int) -> Pattern:
        step = self.dilation or heads
        if self.rows == "all":
            return direction(self.causal) & Dilated(step, offset=head % step)
        kept = Every(step, offset=head % step)
        return direction(self.causal) & kept & kept.T


@dataclass(frozen=True, repr=False)
class LongMixed(Named):
    """Half of the heads read by SCCA, the other half by SDA.

    The first quarter of the heads reads its own window, the second quarter the window before it, and the second
    half every `dilation`-th key from all offsets, so that the heads together read everything.

    Args:
        window: length of an SCCA window in tokens.
        dilation: distance between two keys of an SDA head; None takes the number of SDA heads.
        flow: distances that the SCCA heads cycle through; 0 is SCCA fixed.
        shifts: distances of SCCA fixed in tokens, one per group of its heads; None for `(0, window)`.
        empty: what SCCA does where a window would lie before the text, "own" or "nothing".
        rows: which queries of an SDA head read something, "all" or "selected".
        causal: False reads later keys too.

    Other shares of the heads are written out: `PerHead([SCCA(1024), SCCA(1024), SCCA(1024), SDA(4)])` gives SDA a quarter.

    Raises:
        PatternError: as `SCCA` and `SDA` do, or (when read) heads that the groups do not divide.

    Example:
        >>> LongMixed(1024).at_head(3, heads=4)
        Causal() & Dilated(2, offset=1)

    References:
        Guo, Shifted Cross Chunk Attention (arXiv 2312.07305), section 3.
    """

    window: int
    dilation: int | None = field(default=None, kw_only=True)
    flow: int = field(default=0, kw_only=True)
    shifts: tuple[int, ...] | None = field(default=None, kw_only=True)
    empty: str = field(default="own", kw_only=True)
    rows: str = field(default="all", kw_only=True)
    causal: bool = field(default=True, kw_only=True)

    varies = True

    def __post_init__(self) -> None:
        check_size(self, "window")
        check_size(self, "flow", least=0)
        if self.dilation is not None:
            check_size(self, "dilation")
        check_choice(self, "empty", ("own", "nothing"))
        check_choice(self, "rows", ("all", "selected"))
        object.__setattr__(self, "shifts", _shifts(self, self.shifts))

    @property
    def groups(self) -> int:
        return 2 * self._moved.groups

    @property
    def _moved(self) -> SCCA:
        return SCCA(self.window, flow=self.flow, shifts=self.shifts, empty=self.empty, causal=self.causal)

    def expression(self, head: int, heads: int) -> Pattern:
        return PerHead([self._moved, SDA(self.dilation, rows=self.rows, causal=self.causal)])


def _shifts(pattern: SCCA | LongMixed, given: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return distances as a tuple, or raise PatternError where they are none or stand beside a flow."""
    if given is None:
        return None
    shifts = tuple(given) if isinstance(given, (list, tuple)) else ()
    if pattern.flow or not shifts or not all(type(shift) is int and shift >= 0 for shift in shifts):
        raise PatternError(
            message(
                f"The shifts of {type(pattern).__name__} are distances in tokens, where there is no flow.",
                {"got": f"shifts={given!r}, flow={pattern.flow}"},
                fix=f"shifts=(0, {pattern.window})",
            )
        )
    return shifts
