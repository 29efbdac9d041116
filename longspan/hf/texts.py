"""Texts: the rows of a batch, of which those that were read alike lie in one buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.cache.form import Form
from longspan.errors import ShapeError, message
from longspan.hf.buffer import Buffer
from longspan.hf.segment import shortest


@dataclass(frozen=True)
class _Part:
    """Rows that have had a token in the same columns.

    Attributes:
        rows: their numbers, ascending.
        where: the same as a slice where they are neighbours.
    """

    rows: Tensor
    buffer: Buffer

    @property
    def where(self) -> slice | Tensor:
        return shortest(self.rows)


class Texts:
    """What one layer holds of every row of a batch.

    Args:
        form: of keys and values.
        buffer: an empty one, for all rows.

    Attributes:
        window, sinks: of the pattern, in tokens.
    """

    def __init__(self, form: Form, buffer: Buffer) -> None:
        self.form, self.window, self.sinks = form, buffer.window, buffer.sinks
        self._parts = [_Part(torch.arange(form.batch), buffer)]

    @property
    def lengths(self) -> list[int]:
        """Tokens read in each row."""
        return self._of_rows(lambda buffer: buffer.length)

    @property
    def nbytes(self) -> int:
        return sum(part.buffer.nbytes for part in self._parts)

    @property
    def alike(self) -> Buffer | None:
        """The buffer of all rows, None where there are several."""
        return self._parts[0].buffer if len(self._parts) == 1 else None

    def turns(self, real: Tensor | None, tokens: int) -> Iterator[tuple[slice | Tensor, slice, Buffer]]:
        """Yield which rows have tokens in which neighbouring columns, and where they lie; the order is to be kept.

        Args:
            real: bool `[rows, tokens]`, false on padding; None for none.
            tokens: columns.
        """
        if real is not None:
            self._parts = [piece for part in self._parts for piece in _split(part, real)]
        for part in self._parts:
            if real is None:
                yield part.where, slice(0, tokens), part.buffer
                continue
            begin = 0
            kinds, lengths = real[part.rows[0]].unique_consecutive(return_counts=True)
            for there, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
                if there:
                    yield part.where, slice(begin, begin + length), part.buffer
                begin += length

    def check_crop(self, lengths: Sequence[int]) -> None:
        """Raise ShapeError where `crop(lengths)` would, and change nothing."""
        least = self._of_rows(lambda buffer: buffer.floor)
        gone = any(
            wanted < low and wanted < now
            for wanted, low, now in zip(lengths, least, self.lengths, strict=True)
        )
        if gone:
            raise ShapeError(
                message(
                    f"A crop to {list(lengths)} tokens would read keys that are gone; {least} is possible.",
                    {"cache": f"{self.lengths} tokens read, a window of {self.window}"},
                    fix="StreamCache(model, undo=tokens), which holds keys that much longer",
                )
            )

    def crop(self, lengths: Sequence[int]) -> None:
        """Take back the last tokens of every row, as many of all rows in a part."""
        self.check_crop(lengths)
        for part in self._parts:
            part.buffer.length = lengths[int(part.rows[0])]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, which may repeat, in this order."""
        rows = rows.cpu()
        if rows.equal(torch.arange(self.form.batch)):
            return
        place, parts = torch.zeros(self.form.batch, dtype=torch.int64), []
        for part in self._parts:
            chosen = torch.isin(rows, part.rows).nonzero().flatten()
            if len(chosen):
                place[part.rows] = torch.arange(len(part.rows))
                parts.append(_Part(chosen, part.buffer.select(place[rows[chosen]])))
        self._parts, self.form = parts, replace(self.form, batch=len(rows))

    def fork(self) -> Texts:
        """Return texts that were read as far, and go their own way."""
        other = object.__new__(type(self))
        other.form, other.window, other.sinks = self.form, self.window, self.sinks
        other._parts = [
            replace(part, buffer=part.buffer.select(torch.arange(part.buffer.rows))) for part in self._parts
        ]
        return other

    def _of_rows(self, number: Callable[[Buffer], int]) -> list[int]:
        if len(self._parts) == 1:
            return [number(self._parts[0].buffer)] * self.form.batch
        found = torch.zeros(self.form.batch, dtype=torch.int64)
        for part in self._parts:
            found[part.rows] = number(part.buffer)
        return found.tolist()


def _split(part: _Part, real: Tensor) -> list[_Part]:
    """Return the rows of a part by the columns in which they have tokens."""
    kinds, kind_of_row = real[part.rows].unique(dim=0, return_inverse=True)
    if len(kinds) == 1:
        return [part]
    members = [(kind_of_row == number).nonzero().flatten() for number in range(len(kinds))]
    return [_Part(part.rows[rows], part.buffer.select(rows)) for rows in members]
