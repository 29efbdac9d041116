"""Shelf: the key heads that hold the same keys, with the positions of what they hold."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longspan.cache.storage import Storage
from longspan.derive.lifetime import alive
from longspan.pattern import Pattern


class Shelf:
    """Keys and values of some key heads, and where in the text they lie.

    Attributes:
        key_heads: numbers of the key heads.
        heads: numbers of the query heads that they serve, in the order of the key heads.
        readers: the pattern of each of these query heads.
        positions: int64 `[batch, used]`, or `[1, used]` where all rows are alike; -1 in slots that are nobody's.
    """

    def __init__(self, key_heads: list[int], heads: list[int], readers: tuple[Pattern, ...]) -> None:
        self.key_heads, self.heads, self.readers = key_heads, heads, readers
        self.storage: Storage | None = None
        self.positions = torch.zeros((1, 0), dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes if self.storage else 0

    def begin(self, storage: Storage, device: torch.device) -> None:
        """Start empty, in a storage."""
        self.storage = storage
        self.positions = torch.zeros((1, 0), dtype=torch.int64, device=device)

    def alive(self, positions: Tensor, at: np.ndarray) -> Tensor:
        """Say which of `positions` a query from `at` `[rows]` on may read on any of the heads."""
        keys = positions.cpu().numpy()
        some = np.zeros(keys.shape, dtype=bool)
        for reader in set(self.readers):
            some |= alive(reader, keys, at=at[: len(keys), None])
        return torch.from_numpy(some & (keys >= 0)).to(positions.device)

    def make_room(self, tokens: int, at: np.ndarray, room: int) -> bool:
        """Forget what no query from `at` on reads, if `tokens` would not fit; say whether that was so."""
        if tokens <= self.storage.free:
            return False
        self.tidy(at, room)
        return True

    def tidy(self, at: np.ndarray, room: int) -> None:
        """Forget what no query from `at` on reads, and make room for so many tokens."""
        origin = self.storage.keep(self.alive(self.positions, at), room)
        rows = max(len(self.positions), len(origin))
        kept = self.positions.gather(1, origin.clamp(min=0).expand(rows, -1))
        self.positions = kept.masked_fill(origin < 0, -1)

    def append(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Take in keys and values at ascending positions, for which there is room."""
        self.storage.append(key, value)
        rows = max(len(self.positions), len(positions))
        sides = (side.expand(rows, -1) for side in (self.positions, positions))
        self.positions = torch.cat(list(sides), dim=1)

    def truncate(self, used: int) -> None:
        """Forget the slots from `used` on."""
        self.storage.truncate(used)
        self.positions = self.positions[:, :used]

    def crop(self, lengths: Tensor, *, alike: bool) -> None:
        """Forget the keys at and after `lengths`, one for each row; `alike` says that no slot is nobody's."""
        late = self.positions >= lengths[: len(self.positions), None]
        if alike:
            self.truncate(int((~late).sum()))
        else:
            # Slots are those of all rows, so what one row alone forgets stays as nobody's.
            self.positions = self.positions.masked_fill(late, -1)

    def select(self, rows: Tensor, *, alike: bool) -> Shelf:
        """Return a shelf with these rows of the batch; `alike` says that one row of positions tells of all."""
        chosen = Shelf(self.key_heads, self.heads, self.readers)
        chosen.storage = self.storage.select(rows) if self.storage else None
        chosen.positions = self.positions if alike else self.positions[rows]
        return chosen
