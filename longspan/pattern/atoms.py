"""Atoms: the patterns with a formula of their own."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from longspan.errors import PatternError, message
from longspan.pattern.base import Pattern, Positions, Verdict
from longspan.pattern.progression import Progression


def check_size(pattern: Pattern, name: str, *, least: int = 1) -> None:
    """Raise PatternError unless a field of a pattern is an integer of at least `least`."""
    value = getattr(pattern, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PatternError(
            message(
                f"{type(pattern).__name__} takes an integer of at least {least} for `{name}`.",
                {"got": f"{name}={value!r}"},
                fix=f"{type(pattern).__name__}({name}={max(least, 4)}); sizes count tokens",
            )
        )


def check_sizes(pattern: Pattern, name: str) -> tuple[int, ...]:
    """Return a field of a pattern as a tuple; raise PatternError unless it lists positive integers."""
    given = getattr(pattern, name)
    sizes = tuple(given) if isinstance(given, (list, tuple)) else ()
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise PatternError(
            message(
                f"{type(pattern).__name__} takes a list of positive integers for `{name}`.",
                {"got": f"{name}={given!r}"},
                fix=f"{name}=(2048, 4096)",
            )
        )
    return sizes


class Atom(Pattern):
    """A pattern with a formula of its own and no operands."""

    @property
    def period(self) -> int | None:
        return 1

    def facts(self, q: Progression, k: Progression) -> tuple[np.ndarray, ...]:
        if self.period is None:
            return (q.low, k.low)
        # A shift by the period changes no pair, so distance and phase decide what a rectangle holds.
        return (q.low - k.low, q.low % self.period)


@dataclass(frozen=True, repr=False)
class Everything(Atom):
    """Every query reads every key."""

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return k >= 0


@dataclass(frozen=True, repr=False)
class Nothing(Atom):
    """No query reads any key."""

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return k < 0


@dataclass(frozen=True, repr=False)
class Causal(Atom):
    """Each query reads the keys at its own position and before: `k <= q`.

        # . . .
        # # . .
        # # # .
        # # # #

    Example:
        >>> import torch
        >>> Causal().contains(torch.tensor(3), torch.arange(5)).tolist()
        [True, True, True, True, False]
    """

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return k <= q


@dataclass(frozen=True, repr=False)
class Window(Atom):
    """Each query reads the keys less than `size` positions away, on both sides: `|q - k| < size`.

        # # . .        Window(2)
        # # # .
        . # # #
        . . # #

    With `Causal()` the query reads `size` keys, its own included: transformers' `sliding_window=size`,
    flash-attention's `window_size=(size - 1, 0)`.

    Args:
        size: keys on one side, the query's own included, in tokens, at least 1.

    Raises:
        PatternError: a size that is no positive integer.

    Example:
        >>> import torch
        >>> Window(2).contains(torch.tensor(3), torch.arange(6)).tolist()
        [False, False, True, True, True, False]
    """

    size: int

    def __post_init__(self) -> None:
        check_size(self, "size")

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return abs(q - k) < self.size


@dataclass(frozen=True, repr=False)
class Dilated(Atom):
    """Each query reads every `step`-th key, counted from itself: `(q - k) mod step == offset`.

        # . # .        Dilated(2)
        . # . #
        # . # .
        . # . #

    Args:
        step: distance between two keys that are read, in tokens, at least 1.
        offset: distance from the query back to the first of them, 0 (itself) to `step - 1`.

    Raises:
        PatternError: a step that is no positive integer, an offset outside its range.

    Example:
        >>> import torch
        >>> Dilated(3).contains(torch.tensor(4), torch.arange(8)).tolist()
        [False, True, False, False, True, False, False, True]
    """

    step: int
    offset: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_size(self, "step")
        _check_residue(self, self.offset, self.step)

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return (q - k) % self.step == self.offset

    @property
    def steps(self) -> tuple[int, int]:
        return (self.step, self.step)

    @property
    def lead(self) -> int:
        return self.offset


@dataclass(frozen=True, repr=False)
class Chunk(Atom):
    """Each query reads the keys of one chunk: its own, or one that lies `shift` tokens before it.

        # # . .        Chunk(2)        . . . .        Chunk(2, shift=2)
        # # . .                        . . . .
        . . # #                        # # . .
        . . # #                        # # . .

    The formula is `(q - offset) div size == (k - offset + shift) div size`: chunks begin at `offset` and every
    `size` tokens from there, before it too.

    Args:
        size: length of a chunk, in tokens, at least 1.
        offset: where a chunk begins, in tokens, 0 to `size - 1`.
        shift: how far before the query's chunk the keys lie, in tokens, at least 0.

    Raises:
        PatternError: a size that is no positive integer, an offset or shift outside its range.

    Example:
        >>> import torch
        >>> Chunk(3).contains(torch.tensor(4), torch.arange(7)).tolist()
        [False, False, False, True, True, True, False]
    """

    size: int
    offset: int = field(default=0, kw_only=True)
    shift: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_size(self, "size")
        check_size(self, "shift", least=0)
        _check_residue(self, self.offset, self.size)

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return (q - self.offset) // self.size == (k + (self.shift - self.offset)) // self.size

    @property
    def period(self) -> int | None:
        return self.size


@dataclass(frozen=True, repr=False)
class Every(Atom):
    """Each query reads every `step`-th key, or a run of keys at every `step`-th: `(k - offset) mod step < run`.

        # . # .        Every(2)        . # # . # #        Every(3, offset=1, run=2)
        # . # .                        . # # . # #
        # . # .                        . # # . # #

    `Every(step).T` is the same for queries: only every `step`-th query reads, and it reads everything.

    Args:
        step: distance between two keys that are read, in tokens, at least 1.
        offset: the first of them, 0 to `step - 1`.
        within: count positions anew in every chunk of this many tokens; 0 counts from the beginning of the text.
        run: how many neighbouring keys are read at each place, in tokens, 1 to `step - offset`.

    Raises:
        PatternError: a step that is no positive integer, an offset, `within` or `run` outside its range.

    Example:
        >>> import torch
        >>> Every(2, offset=1).contains(torch.tensor(0), torch.arange(5)).tolist()
        [False, True, False, True, False]
    """

    step: int
    offset: int = field(default=0, kw_only=True)
    within: int = field(default=0, kw_only=True)
    run: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_size(self, "step")
        check_size(self, "within", least=0)
        check_size(self, "run")
        _check_residue(self, self.offset, self.step)
        if self.offset + self.run > self.step:
            raise PatternError(
                message(
                    "A run of Every ends before the next one may begin.",
                    {"got": f"offset={self.offset}, run={self.run} with step {self.step}"},
                    fix=f"run={self.step - self.offset}, or a larger step",
                )
            )

    def contains(self, q: Positions, k: Positions) -> Verdict:
        place = (k % self.within if self.within else k) % self.step
        if self.run == 1:
            return place == self.offset
        return (place >= self.offset) & (place < self.offset + self.run)

    def facts(self, q: Progression, k: Progression) -> tuple[np.ndarray, ...]:
        return (k.low % self.period,)

    @property
    def period(self) -> int:
        return self.within or self.step

    @property
    def steps(self) -> tuple[int, int]:
        aligned = self.within % self.step == 0
        return (1, self.step if aligned else 1)


@dataclass(frozen=True, repr=False)
class Sink(Atom):
    """Every query reads the first `size` keys: `k < size`.

        # . . .        Sink(1)
        # . . .
        # . . .
        # . . .

    Args:
        size: how many keys, in tokens, at least 1.

    Raises:
        PatternError: a size that is no positive integer.

    Example:
        >>> import torch
        >>> Sink(2).contains(torch.tensor(9), torch.arange(4)).tolist()
        [True, True, False, False]

    References:
        Xiao et al., Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453), section 3.
    """

    size: int

    def __post_init__(self) -> None:
        check_size(self, "size")

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return k < self.size

    @property
    def period(self) -> int | None:
        return None

    def facts(self, q: Progression, k: Progression) -> tuple[np.ndarray, ...]:
        return (k.low,)


@dataclass(frozen=True, repr=False)
class Prefix(Atom):
    """The first `size` queries read the first `size` keys, in both directions: `q < size and k < size`.

        # # . .        Prefix(2)
        # # . .
        . . . .
        . . . .

    `Causal() | Prefix(size)` is a prefix language model.

    Args:
        size: length of the prefix, in tokens, at least 1.

    Raises:
        PatternError: a size that is no positive integer.

    Example:
        >>> import torch
        >>> (Causal() | Prefix(3)).contains(torch.tensor(0), torch.arange(5)).tolist()
        [True, True, True, False, False]

    References:
        Raffel et al., T5 (arXiv 1910.10683), section 3.2.1.
    """

    size: int

    def __post_init__(self) -> None:
        check_size(self, "size")

    def contains(self, q: Positions, k: Positions) -> Verdict:
        return (q < self.size) & (k < self.size)

    @property
    def period(self) -> int | None:
        return None


def _check_residue(pattern: Pattern, offset: int, step: int) -> None:
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < step:
        raise PatternError(
            message(
                f"The offset of {type(pattern).__name__} is a place from 0 to {step - 1}.",
                {"got": f"offset={offset!r} with {step}"},
                fix="offset=0, the default",
            )
        )
