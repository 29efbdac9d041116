"""Storage: where the keys and values that a cache holds lie, as they are or in eight bits.

A storage is a table of slots, the same number for every row of the batch. It knows nothing of positions: whoever
owns it remembers which token lies in which slot, and asks for slots to be kept or forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from longspan.kernel.native.slots import Slots, readable

# Numbers of a piece of what is not held as it is read.
PIECE = 1 << 17


class Storage(Protocol):
    """What a cache asks of the place that it holds keys and values in."""

    used: int

    @property
    def free(self) -> int:
        """Slots that can be written without making room."""

    @property
    def nbytes(self) -> int:
        """Bytes taken, unused slots included."""

    def append(self, key: Tensor, value: Tensor) -> None:
        """Write `[batch, heads, tokens, width]` into the next slots, as many as are free at most."""

    def read(self) -> tuple[Tensor, Tensor]:
        """Return key and value `[batch, heads, used, width]`; they are valid until the next change."""

    def weigh(self, query: Tensor, bias: Tensor | None, scale: float, begin: int = 0) -> Tensor:
        """Return the attention of a few queries over the slots used, `[batch, heads, queries, value width]`.

        Args:
            query: `[batch, heads, queries, width]`.
            bias: what is added to scores, as it broadcasts against them, in float32 at least; None for nothing.
            scale: what scores are multiplied by before.
            begin: slot from which on they are read.
        """

    def keep(self, wanted: Tensor, room: int) -> Tensor:
        """Forget slots and make room for more.

        Args:
            wanted: bool `[batch, used]`, or `[1, used]` for all rows alike.
            room: slots that are free afterwards, at least.

        Returns:
            For every slot now used the slot that it was before, `[batch or 1, used]`, -1 where it is nobody's. More
            may be kept than was wanted, in whole pages.
        """

    def truncate(self, used: int) -> None:
        """Forget the slots from `used` on."""

    def select(self, rows: Tensor) -> Storage:
        """Return a storage with these rows of the batch, which may repeat; it shares nothing that is written to."""

    def release(self) -> None:
        """Give back what it holds; it is not used any more."""


class Plain:
    """Keys and values as they are, one buffer for each.

    Args:
        key, value: `[batch, heads, tokens, width]`, whose shapes, dtype and device are taken over.

    Attributes:
        buffers: of key and value, `[batch, heads, slots, width]`, free slots included.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.used = 0
        self._lie([_buffer(side, 0) for side in (key, value)])

    @property
    def free(self) -> int:
        return self.buffers[0].shape[2] - self.used

    @property
    def nbytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

    def append(self, key: Tensor, value: Tensor) -> None:
        if not self._slots.put(key, value, self.used):
            for buffer, side in zip(self.buffers, (key, value), strict=True):
                buffer.narrow(2, self.used, side.shape[2]).copy_(side)
        self.used += key.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        key, value = self.buffers
        return key.narrow(2, 0, self.used), value.narrow(2, 0, self.used)

    def weigh(self, query: Tensor, bias: Tensor | None, scale: float, begin: int = 0) -> Tensor:
        return self._slots.weigh(query, bias, scale, begin, self.used)

    def keep(self, wanted: Tensor, room: int) -> Tensor:
        origin = kept_slots(wanted)
        used = origin.shape[1]
        fresh = []
        for buffer in self.buffers:
            moved = _buffer(buffer, used + room)
            if len(origin) == 1:
                moved[:, :, :used] = buffer.index_select(2, origin[0])
            else:
                slots = origin.clamp(min=0)[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
                moved[:, :, :used] = buffer.gather(2, slots)
            fresh.append(moved)
        self._lie(fresh)
        self.used = used
        return origin

    def truncate(self, used: int) -> None:
        self.used = used

    def select(self, rows: Tensor) -> Plain:
        chosen = object.__new__(type(self))
        chosen.used = self.used
        chosen._lie([buffer.index_select(0, rows) for buffer in self.buffers])
        return chosen

    def release(self) -> None:
        self._lie([_buffer(buffer, 0) for buffer in self.buffers])

    def _lie(self, buffers: list[Tensor]) -> None:
        self.buffers, self._slots = (buffers[0], buffers[1]), Slots(*buffers)


class Rounded:
    """Keys and values in eight bits each, with one scale for every token and head.

    Law: a number comes back within `1 / 254` of the largest magnitude in its token and head, and one rounding of
    the dtype.

    Args:
        key, value: `[batch, heads, tokens, width]`, whose shapes, dtype and device are taken over.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self._dtype = key.dtype
        self._whole = Plain(*(side.new_zeros(side.shape, dtype=torch.int8) for side in (key, value)))
        self._scale = Plain(
            *(side.new_zeros((*side.shape[:3], 1), dtype=torch.float32) for side in (key, value))
        )
        self._lie()

    @property
    def used(self) -> int:
        return self._whole.used

    @property
    def free(self) -> int:
        return self._whole.free

    @property
    def nbytes(self) -> int:
        return self._whole.nbytes + self._scale.nbytes

    def append(self, key: Tensor, value: Tensor) -> None:
        if self._slots.put(key, value, self.used):
            self._whole.used, self._scale.used = self.used + 1, self._scale.used + 1
            return
        whole, scales = zip(*(_rounded(side) for side in (key, value)), strict=True)
        self._whole.append(*whole)
        self._scale.append(*scales)

    def read(self) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(self._dtype, torch.float32)
        key, value = (
            (whole.to(exact) * scale).to(self._dtype)
            for whole, scale in zip(self._whole.read(), self._scale.read(), strict=True)
        )
        return key, value

    def weigh(self, query: Tensor, bias: Tensor | None, scale: float, begin: int = 0) -> Tensor:
        if readable(query, self._whole.buffers[0]):
            return self._slots.weigh(query, bias, scale, begin, self.used)
        keys, values, key_scale, value_scale = (
            side[:, :, begin:] for storage in (self._whole, self._scale) for side in storage.read()
        )
        exact = torch.promote_types(query.dtype, torch.float32)
        pieces = list(_slices(keys))
        scores = torch.cat([query.to(exact) @ keys[:, :, piece].to(exact).mT for piece in pieces], dim=-1)
        # Scales are of tokens, so they go to the scores and weights, which are fewer than the numbers they scale.
        scores = scores * key_scale.mT * scale
        weights = torch.softmax(scores if bias is None else scores + bias, dim=-1) * value_scale.mT
        return weighed(weights, (values[:, :, piece].to(exact) for piece in pieces)).to(query.dtype)

    def keep(self, wanted: Tensor, room: int) -> Tensor:
        self._scale.keep(wanted, room)
        origin = self._whole.keep(wanted, room)
        self._lie()
        return origin

    def truncate(self, used: int) -> None:
        self._whole.truncate(used)
        self._scale.truncate(used)

    def select(self, rows: Tensor) -> Rounded:
        chosen = object.__new__(type(self))
        chosen._dtype = self._dtype
        chosen._whole, chosen._scale = self._whole.select(rows), self._scale.select(rows)
        chosen._lie()
        return chosen

    def release(self) -> None:
        self._whole.release()
        self._scale.release()
        self._lie()

    def _lie(self) -> None:
        self._slots = Slots(*self._whole.buffers, scales=self._scale.buffers)


def _rounded(side: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers in eight bits, and the scale of every token, `[..., 1]` in float32."""
    scale = side.abs().amax(-1, keepdim=True).float() / 127
    # A token of zeros has scale zero, and any divisor leaves it zero.
    return (side / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale


def _slices(slots: Tensor) -> Iterator[slice]:
    """Cut slots `[batch, heads, slots, width]` into pieces that fit into a processor's cache as float32."""
    tokens = max(1, PIECE * slots.shape[2] // max(1, slots.numel()))
    return (slice(begin, begin + tokens) for begin in range(0, slots.shape[2], tokens))


def weighed(weights: Tensor, values: Iterable[Tensor]) -> Tensor:
    """Return the sum of values, which come in pieces, by weights `[batch, heads, queries, slots]`."""
    begin, total = 0, None
    for value in values:
        part = weights[..., begin : begin + value.shape[2]] @ value
        total, begin = part if total is None else total + part, begin + value.shape[2]
    return total


def kept_slots(wanted: Tensor) -> Tensor:
    """Return the numbers of the wanted slots of each row in their order, filled up with -1, `[rows, most]`."""
    counts = wanted.sum(1)
    # Stable sorting puts the wanted slots first without mixing them.
    order = torch.sort((~wanted).int(), dim=1, stable=True).indices[:, : int(counts.max())]
    return order.masked_fill(torch.arange(order.shape[1], device=order.device) >= counts[:, None], -1)


def _buffer(like: Tensor, slots: int) -> Tensor:
    # Zeros, because a weight of zero times an unwritten number may be no number.
    return like.new_zeros((*like.shape[:2], slots, like.shape[3]))
