"""Buffer: keys and values of a window and of the first tokens, in slots that are written over and over."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.frequency import Frequency
from longspan.kernel.slots import Slots
from longspan.rope import shift

# Slots of a window that are there from the start.
_FEW = 64


class Buffer:
    """What one layer holds of a text: the last `window` tokens, and the first `sinks`.

    The key at position t lies turned to place `t - base`, the first keys in `first` to their places 0, 1, 2 ... too.
    Slots are `sinks` for first tokens, the last of them first, then the window, position t in slot `t % window` of it.
    So sinks that are out of the window lie next to it, and what one query reads is one view without a copy.

    Args:
        key, value: `[batch, heads, tokens, width]`, whose shapes, dtype and device are taken over.
        window, sinks: of the pattern, in tokens.
        base: position that lies at place 0.
        turned: how many numbers of a head are turned.

    Attributes:
        length: tokens read.
    """

    def __init__(
        self, key: Tensor, value: Tensor, *, window: int, sinks: int, base: int, turned: int
    ) -> None:
        self.window, self.sinks, self.base, self.turned = window, sinks, base, turned
        self.length, self._slots = 0, min(window, _FEW)
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
    def lengths(self) -> list[int]:
        """Tokens read in each row."""
        return [self.length] * self.rows

    @property
    def nbytes(self) -> int:
        sides = (self._keys, self._values, self._first, self._ahead)
        return sum(side.numel() * side.element_size() for side in sides)

    def rebase(self, base: int, frequency: Frequency) -> None:
        """Turn the keys of the window so that another position lies at place 0."""
        if base != self.base:
            taken = self._keys[:, :, self.sinks :]
            taken.copy_(shift(taken, self.base - base, frequency))
            self.base = base

    def recent(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the window before the next token, in the order of the text."""
        held = min(self.length, self.window - 1)
        begin = (self.length - held) % self.window
        sides = []
        for side in (self._keys, self._values):
            slots = side[:, :, self.sinks :]
            end = slots[:, :, begin : begin + held]
            # After the last slot, the text goes on in the first.
            sides.append(torch.cat([end, slots[:, :, : held - end.shape[2]]], dim=2))
        return sides[0], sides[1]

    def begun(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first tokens in their order, those among the next tokens too."""
        held = self.sinks - min(self.length, self.sinks)
        sides = []
        for side, new in ((self._first, key), (self._values[:, :, : self.sinks], value)):
            before = side[:, :, held:].flip(2).to(new.dtype)
            sides.append(torch.cat([before, new[:, :, :held]], dim=2))
        return sides[0], sides[1]

    def put(self, key: Tensor, value: Tensor) -> None:
        """Take in the next tokens, turned to their places from the base."""
        begin, tokens = self.length, key.shape[2]
        if begin < self.sinks:
            self._put_first(key[:, :, : self.sinks - begin], value[:, :, : self.sinks - begin])
        if begin + tokens > self._slots < self.window:
            self._grow(min(self.window, max(2 * self._slots, begin + tokens)))
        if tokens == 1:
            slot = self.sinks + begin % self.window
            if not self._lying.put(key, value, slot):
                self._keys[:, :, slot : slot + 1], self._values[:, :, slot : slot + 1] = key, value
        else:
            late = min(tokens, self.window)
            end = begin + tokens
            slots = self.sinks + torch.arange(end - late, end, device=key.device) % self.window
            self._keys.index_copy_(2, slots, key[:, :, tokens - late :])
            self._values.index_copy_(2, slots, value[:, :, tokens - late :])
        self.length += tokens

    @property
    def bounds(self) -> tuple[int, int]:
        """First slot that the last token reads, and the one after the last."""
        outside = min(self.sinks, max(0, self.length - self.window))
        return self.sinks - outside, self.sinks + min(self.window, self.length)

    def turn(self, cos: Tensor, sin: Tensor) -> None:
        """Turn the first keys to where the last token reads them, `[width]` from their places."""
        self._turned.copy_(torch.addcmul(self._first * cos, self._ahead, sin))

    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values that the last token reads, in no order."""
        begin, end = self.bounds
        return self._keys[:, :, begin:end], self._values[:, :, begin:end]

    def weigh(self, query: Tensor, scale: float) -> Tensor:
        """Return what the queries of the last token read, `[batch, heads, queries, width]`: all of it, in no order."""
        return self._lying.weigh(query, None, scale, *self.bounds)

    def _put_first(self, key: Tensor, value: Tensor) -> None:
        end = self.sinks - self.length
        slots = slice(end - key.shape[2], end)
        self._first[:, :, slots] = key.flip(2).to(self._first.dtype)
        one, other = self._first[..., : self.turned].chunk(2, dim=-1)
        self._ahead[..., : self.turned] = torch.cat([-other, one], dim=-1)
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
