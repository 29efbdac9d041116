"""Listings: patterns given as data, the keys that are read or the documents that a row is packed from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from longspan.errors import PatternError, message
from longspan.pattern.atoms import Atom
from longspan.pattern.base import Pattern, Positions, Verdict
from longspan.pattern.progression import Bracket, Progression
from longspan.pattern.table import MOST, Lookup, Stretches


class Listed(Atom):
    """An atom that holds a table: hashed once, and what is worked out from the table is neither copied nor saved."""

    @property
    def period(self) -> int | None:
        return None

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(self.__getstate__().values()))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def facts(self, q: Progression, k: Progression) -> tuple[np.ndarray, ...]:
        verdict = self.contains(q, k)
        corners = np.broadcast_arrays(q.low, q.high, k.low, k.high, verdict.low == verdict.high)
        numbers = np.zeros(corners[0].shape, dtype=np.int64)
        seen: dict[bytes, int] = {}
        # Only what is partial is looked at: everything else is told apart by its verdict.
        for place in zip(*np.nonzero(~corners[4]), strict=True):
            content = self.seen(*(int(corner[place]) for corner in corners[:4]))
            numbers[place] = seen.setdefault(content, len(seen))
        return (numbers,)

    def seen(self, q_low: int, q_high: int, k_low: int, k_high: int) -> bytes:
        """Return what the table holds for a rectangle between two queries and two keys, as seen from its corner."""
        raise NotImplementedError


def integers(pattern: Pattern, name: str, given: Any, *, least: int = 0) -> np.ndarray:
    """Return a listing as an int64 array of one dimension, or raise PatternError where it is none."""
    try:
        numbers = np.asarray(given if hasattr(given, "__array__") else list(given))
    except (TypeError, ValueError):
        numbers = np.array(["no listing"])
    if not numbers.size:
        return np.zeros(0, dtype=np.int64)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or numbers.min() < least or numbers.max() >= MOST:
        shown = repr(given)
        raise PatternError(
            message(
                f"{type(pattern).__name__} takes a list of integers of at least {least} for `{name}`.",
                {"got": f"{name}={shown if len(shown) <= 60 else shown[:60] + '...'}"},
                fix=f"{type(pattern).__name__}(({max(least, 0)}, {max(least, 0) + 4}))",
            )
        )
    return numbers.astype(np.int64)


@dataclass(frozen=True, repr=False)
class Keys(Listed):
    """Every query reads the keys at the positions listed.

        . # . . #        Keys((1, 4))
        . # . . #
        . # . . #

    `Keys(...).T` is the same for queries: those at the positions listed read everything, the others nothing.

    Args:
        positions: where the keys are, in any order, each 0 or more; a list, an array or a tensor.

    Raises:
        PatternError: positions that are no integers, or negative.

    Example:
        >>> import torch
        >>> Keys([4, 1]).contains(torch.tensor(0), torch.arange(5)).tolist()
        [False, True, False, False, True]
        >>> Keys([4, 1])
        Keys((1, 4))
    """

    positions: tuple[int, ...] = ()

    __hash__ = Listed.__hash__

    def __post_init__(self) -> None:
        listed = np.unique(integers(self, "positions", self.positions))
        object.__setattr__(self, "positions", tuple(listed.tolist()))

    @cached_property
    def _sorted(self) -> np.ndarray:
        return np.array(self.positions, dtype=np.int64)

    @cached_property
    def _listed(self) -> Lookup:
        held = np.zeros(self._sorted.max(initial=-1) + 2, dtype=bool)
        held[self._sorted] = True
        return Lookup(held)

    def contains(self, q: Positions, k: Positions) -> Verdict:
        if not isinstance(k, Progression):
            return self._listed[k]
        first = np.searchsorted(self._sorted, k.low)
        past = np.searchsorted(self._sorted, k.high, side="right")
        return Bracket((past - first == k.high - k.low + 1) * 1, (past > first) * 1)

    def seen(self, q_low: int, q_high: int, k_low: int, k_high: int) -> bytes:
        first, past = np.searchsorted(self._sorted, (k_low, k_high + 1))
        return (self._sorted[first:past] - k_low).tobytes()


@dataclass(frozen=True, repr=False)
class Documents(Listed):
    """Each query reads the keys of its own document, in a row that is packed from several.

        # # # . . .        Documents((3, 2)), in a row of 6 positions
        # # # . . .
        # # # . . .
        . . . # # .
        . . . # # .
        . . . . . .

    Law: stretches of equal id are one document, wherever they lie. Positions with a negative id, and those after the
    last stretch, are padding: they read nothing and nothing reads them. `Documents((3, 9), ids=(-1, 0))` is a text
    of 9 tokens padded by 3 on the left.

    Args:
        lengths: tokens in each stretch, each at least 1.
        ids: which document each stretch belongs to; None for a document of its own each.

    Raises:
        PatternError: lengths that are no positive integers, ids that are no integers or not as many.

    Example:
        >>> import torch
        >>> Documents((3, 2)).contains(torch.tensor(4), torch.arange(6)).tolist()
        [False, False, False, True, True, False]
    """

    lengths: tuple[int, ...] = ()
    ids: tuple[int, ...] | None = field(default=None, kw_only=True)

    __hash__ = Listed.__hash__

    def __post_init__(self) -> None:
        lengths = integers(self, "lengths", self.lengths, least=1)
        object.__setattr__(self, "lengths", tuple(lengths.tolist()))
        if lengths.sum() >= MOST:
            raise PatternError(
                message(
                    "The documents of a row are longer than any row.",
                    {"got": f"{lengths.sum():,} tokens", "most": f"{MOST - 1:,}"},
                    fix="lengths in tokens, such as Documents((4096, 1024))",
                )
            )
        if self.ids is not None:
            ids = integers(self, "ids", self.ids, least=-MOST)
            object.__setattr__(self, "ids", tuple(ids.tolist()))
            if len(ids) != len(lengths):
                raise PatternError(
                    message(
                        "Documents takes one id for each stretch.",
                        {"lengths": f"{len(lengths)} of them", "ids": f"{len(ids)} of them"},
                        fix="Documents((3, 9), ids=(-1, 0))",
                    )
                )

    @classmethod
    def of(cls, ids: Iterable[int]) -> Documents:
        """Return the documents of a row from the id of each position, negative for padding.

        Example:
            >>> Documents.of([0, 0, 0, 1, 1, -1, -1])
            Documents((3, 2, 2), ids=(0, 1, -1))
        """
        each = integers(cls(), "ids", ids, least=-MOST)
        edges = np.flatnonzero(np.diff(each, prepend=each[:1] - 1, append=each[-1:] - 1))
        return cls(tuple(np.diff(edges).tolist()), ids=tuple(each[edges[:-1]].tolist()))

    @cached_property
    def _ids(self) -> Stretches:
        ids = range(len(self.lengths)) if self.ids is None else self.ids
        return Stretches(np.array(self.lengths, dtype=np.int64), np.array([*ids, -1], dtype=np.int64))

    def contains(self, q: Positions, k: Positions) -> Verdict:
        own = self._ids[q]
        return (own == self._ids[k]) & (own >= 0)

    def seen(self, q_low: int, q_high: int, k_low: int, k_high: int) -> bytes:
        parts = []
        for low, high in ((q_low, q_high), (k_low, k_high)):
            first, last = self._ids.index(np.array([low, high]))
            parts.append((self._ids.ends[first:last] - low, self._ids.values[first : last + 1]))
        (q_ends, own), (k_ends, others) = parts
        same = (own[:, None] == others[None]) & (own[:, None] >= 0)
        # The shape comes first: without it the end of one part could be read as the beginning of the next.
        return np.array(same.shape).tobytes() + q_ends.tobytes() + k_ends.tobytes() + same.tobytes()
