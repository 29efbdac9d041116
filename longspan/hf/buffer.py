"""Buffer: keys and values of a window and of the first tokens, in slots that are written over and over."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from longspan.frequency import Frequency
from longspan.kernel.native.slots import Slots
from longspan.rope import shift

# Slots of a window that are there from the start.
_FEW = 64


class Buffer:
    """What one layer holds of a text: the last `window` tokens and `undo` more, and the first `sinks`.

    The key at position t lies turned to place `t - base`, the first keys in `first` to their places 0, 1, 2 ... too.
    Slots are `sinks` for first tokens, the last of them first, then a ring of `window + undo`, position t in slot `t %
    (window + undo)` of it. So sinks that are out of the window lie next to it, and what one query reads is one view
    without a copy, in which slots that the window has left are passed over.

    Args:
        key, value: `[batch, heads, tokens, width]`, whose shapes, dtype and device are taken over.
        window, sinks: of the pattern, in tokens.
        undo: how many tokens can always be taken back.
        frequency: which keys are turned with.

    Attributes:
        base: position that lies at place 0.
        length: tokens read; it may be set to less, as far as `floor`.
    """

    def __init__(
        self, key: Tensor, value: Tensor, *, window: int, sinks: int, undo: int, frequency: Frequency
    ) -> None:
        self.window, self.sinks, self.base, self._frequency = window, sinks, 0, frequency
        self.length, self._ring, self._slots = 0, window + undo, min(window + undo, _FEW)
        # Up to here the ring has been written over.
        self._gone = 0
        self._lie(*(_room(side, sinks + self._slots) for side in (key, value)))
        exact = torch.promote_types(key.dtype, torch.float32)
        # The first keys as they are and a quarter turn ahead, of which every other turn is a mixture.
        self._first, self._ahead = (_room(key, sinks).to(exact) for _ in range(2))

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self._keys)

    @property
    def heads(self) -> int:
        """Key heads."""
        return self._keys.shape[1]

    @property
    def floor(self) -> int:
        """Tokens that must remain, so that the next one finds all that it reads."""
        return self._gone + self.window - 1 if self._gone else 0

    @property
    def nbytes(self) -> int:
        sides = (self._keys, self._values, self._first, self._ahead)
        return sum(side.numel() * side.element_size() for side in sides)

    def rebase(self, base: int) -> None:
        """Turn the keys of the window so that another position lies at place 0, here and for what comes."""
        if base != self.base:
            if self.length:
                taken = self._keys[:, :, self.sinks :]
                taken.copy_(shift(taken, self.base - base, self._frequency))
            self.base = base

    def recent(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the window before the next token, in the order of the text."""
        slots = self._last(min(self.length, self.window - 1))
        key, value = (
            torch.cat([side[:, :, part] for part in slots], dim=2) for side in (self._keys, self._values)
        )
        return key, value

    def begun(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first tokens in their order, those among the next tokens too."""
        more = self.sinks - min(self.length, self.sinks)
        new = self._from_zero(key[:, :, :more]), value[:, :, :more]
        sides = []
        for side, side_new in zip((self._first, self._values[:, :, : self.sinks]), new, strict=True):
            before = side[:, :, more:].flip(2).to(value.dtype)
            sides.append(torch.cat([before, side_new.to(value.dtype)], dim=2))
        return sides[0], sides[1]

    def put(self, key: Tensor, value: Tensor) -> None:
        """Take in the next tokens, turned to their places from the base."""
        begin, tokens = self.length, key.shape[2]
        if begin < self.sinks:
            self._put_first(key[:, :, : self.sinks - begin], value[:, :, : self.sinks - begin])
        if begin + tokens > self._slots < self._ring:
            self._grow(min(self._ring, max(2 * self._slots, begin + tokens)))
        if tokens == 1:
            slot = self.sinks + begin % self._ring
            if not self._lying.put(key, value, slot):
                self._keys[:, :, slot : slot + 1], self._values[:, :, slot : slot + 1] = key, value
        else:
            late = min(tokens, self._ring)
            end = begin + tokens
            slots = self.sinks + torch.arange(end - late, end, device=key.device) % self._ring
            self._keys.index_copy_(2, slots, key[:, :, tokens - late :])
            self._values.index_copy_(2, slots, value[:, :, tokens - late :])
        self.length += tokens
        self._gone = max(self._gone, self.length - self._ring)

    def select(self, rows: Tensor) -> Buffer:
        """Return a copy with these rows of the batch, which may repeat."""
        chosen = copy.copy(self)
        at = rows.to(self._keys.device)
        chosen._lie(self._keys[at], self._values[at])
        chosen._first, chosen._ahead = self._first[at], self._ahead[at]
        return chosen

    def turn(self, cos: Tensor, sin: Tensor) -> None:
        """Turn the first keys to where the last token reads them, `[width]` from their places."""
        self._turned.copy_(torch.addcmul(self._first * cos, self._ahead, sin))

    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values that the last token reads, in no order."""
        begin, end = self._bounds
        if not self._left:
            return self._keys[:, :, begin:end], self._values[:, :, begin:end]
        slots = [slice(begin, self.sinks), *self._last(self.window)]
        key, value = (
            torch.cat([side[:, :, part] for part in slots], dim=2) for side in (self._keys, self._values)
        )
        return key, value

    def weigh(self, query: Tensor, scale: float) -> Tensor:
        """Return what the queries of the last token read, `[batch, heads, queries, width]`: all of it, in no order."""
        begin, end = self._bounds
        bias = None
        if self._left:
            exact = torch.promote_types(query.dtype, torch.float32)
            bias = torch.full((1, 1, 1, end - begin), -torch.inf, dtype=exact, device=query.device)
            bias[..., : self.sinks - begin] = 0
            for part in self._last(self.window):
                bias[..., part.start - begin : part.stop - begin] = 0
        return self._lying.weigh(query, bias, scale, begin, end)

    @property
    def _bounds(self) -> tuple[int, int]:
        """First slot that the last token reads, and the one after the last."""
        outside = min(self.sinks, max(0, self.length - self.window))
        return self.sinks - outside, self.sinks + (self._ring if self._gone else self.length)

    @property
    def _left(self) -> bool:
        """Whether there are slots in between that the last token does not read."""
        return self._ring > self.window and self.length > self.window

    def _last(self, tokens: int) -> tuple[slice, slice]:
        """Return the slots of the last tokens in their order: after the last slot, the text goes on in the first."""
        begin = (self.length - tokens) % self._ring
        end = min(begin + tokens, self._ring)
        rest = tokens - (end - begin)
        return slice(self.sinks + begin, self.sinks + end), slice(self.sinks, self.sinks + rest)

    def _from_zero(self, key: Tensor) -> Tensor:
        """Return keys of first tokens turned to their places in the text."""
        key = key.to(self._first.dtype)
        return shift(key, self.base, self._frequency) if self.base and key.shape[2] else key

    def _put_first(self, key: Tensor, value: Tensor) -> None:
        end = self.sinks - self.length
        slots = slice(end - key.shape[2], end)
        self._first[:, :, slots] = self._from_zero(key).flip(2)
        turned = 2 * self._frequency.angles_per_token(key.shape[3]).shape[-1]
        one, other = self._first[..., :turned].chunk(2, dim=-1)
        self._ahead[..., :turned] = torch.cat([-other, one], dim=-1)
        self._values[:, :, slots] = value.flip(2)

    def _grow(self, slots: int) -> None:
        sides = []
        for side in (self._keys, self._values):
            grown = _room(side, self.sinks + slots)
            grown[:, :, : side.shape[2]] = side
            sides.append(grown)
        self._lie(*sides)
        self._slots = slots

    def _lie(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values, self._lying = keys, values, Slots(keys, values)
        self._turned = keys[:, :, : self.sinks]


def _room(like: Tensor, slots: int) -> Tensor:
    return like.new_zeros((*like.shape[:2], slots, like.shape[3]))
