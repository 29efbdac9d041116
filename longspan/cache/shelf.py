"""Shelf: the key heads that hold the same keys, with the positions of what they hold."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from longspan.cache.outlook import Outlook, outlook
from longspan.cache.storage import Storage
from longspan.derive.lifetime import alive
from longspan.errors import PatternError, message
from longspan.pattern import Pattern

# What share of itself a text that is kept whole grows by.
_SHARE = 16


class Shelf:
    """Keys and values of some key heads, and where in the text they lie.

    Attributes:
        key_heads: numbers of the key heads.
        heads: numbers of the query heads that they serve, in the order of the key heads.
        key_part, part: the same as parts of tensors, which need no copy where heads are evenly spaced.
        readers: the pattern of each of these query heads, one where they are all the same.
        outlook: what the next tokens read, None where nobody knows.
    """

    def __init__(self, key_heads: list[int], heads: list[int], readers: tuple[Pattern, ...]) -> None:
        self.key_heads, self.heads = key_heads, heads
        self.key_part, self.part = _part(key_heads), _part(heads)
        self.readers = readers[:1] if len(set(readers)) == 1 else readers
        self.storage: Storage | None = None
        self.outlook: Outlook | None = None
        # One column for every slot that is taken, and more: those after them tell nothing.
        self._where = torch.zeros((1, 0), dtype=torch.int64)

    @property
    def positions(self) -> Tensor:
        """Return int64 `[batch, used]`, or `[1, used]` where all rows are alike; -1 in slots that are nobody's."""
        return self._where[:, : self.storage.used if self.storage else 0]

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes if self.storage else 0

    @property
    def ready(self) -> bool:
        """Whether there is room for one more token, and known what it reads."""
        return self.outlook is not None and self.storage.free > 0 and self.outlook.covers(self.storage.used)

    def begin(self, storage: Storage, device: torch.device) -> None:
        """Start empty, in a storage."""
        self.storage = storage
        self._put(torch.zeros((1, 0), dtype=torch.int64, device=device))

    def alive(self, positions: Tensor, at: np.ndarray) -> Tensor:
        """Say which of `positions` a query from `at` `[rows]` on may read on any of the heads."""
        keys = positions.cpu().numpy()
        some = _alive(self.readers, keys.tobytes(), keys.shape, tuple(at[: len(keys)].tolist()))
        return torch.from_numpy(some).to(positions.device)

    def tidy(self, at: np.ndarray, room: int) -> None:
        """Forget what no query from `at` on reads, and make room for so many tokens."""
        positions = self.positions
        wanted = self.alive(positions, at)
        if bool((wanted == (positions >= 0)).all()):
            room = max(room, self._growth(positions, at))
        origin = self.storage.keep(wanted, room)
        rows = max(len(positions), len(origin))
        kept = positions.gather(1, origin.clamp(min=0).expand(rows, -1))
        self._put(kept.masked_fill(origin < 0, -1))

    def append(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Take in keys and values at ascending positions, for which there is room."""
        before = self.positions
        self.storage.append(key, value)
        rows = max(len(before), len(positions))
        self._put(torch.cat([side.expand(rows, -1) for side in (before, positions)], dim=1))

    def push(self, key: Tensor, value: Tensor, starts: np.ndarray, *, ahead: int, dtype: torch.dtype) -> None:
        """Take in one token of every row, which comes at `starts` `[rows]`, and know what it reads.

        Args:
            ahead: the most tokens to look ahead for.
            dtype: of the biases of the outlook.
        """
        used = self.storage.used
        if self.outlook is None or not self.outlook.covers(used):
            before = self.positions
            found = outlook(self.readers, before, starts, ahead, dtype)
            coming = torch.from_numpy(starts[:, None] + np.arange(found.tokens))
            self._put(torch.cat([before, coming.to(before.device)], dim=1))
            self.outlook = found
        self.storage.append(key, value)

    def truncate(self, used: int) -> None:
        """Forget the slots from `used` on."""
        self.storage.truncate(used)
        self.outlook = None

    def crop(self, lengths: np.ndarray, *, alike: bool) -> None:
        """Forget the keys at and after `lengths`, one for each row; `alike` says that no slot is nobody's."""
        positions = self.positions
        late = positions >= torch.from_numpy(lengths)[: len(positions), None].to(positions.device)
        if alike:
            self.truncate(int((~late).sum()))
        else:
            # Slots are those of all rows, so what one row alone forgets stays as nobody's.
            self._put(positions.masked_fill(late, -1))

    def set_apart(self, rows: int) -> None:
        """Give each of so many rows positions of its own."""
        self._put(self.positions.repeat(rows, 1))

    def select(self, rows: Tensor, *, alike: bool) -> Shelf:
        """Return a shelf with these rows of the batch; `alike` says that one row of positions tells of all."""
        chosen = Shelf(self.key_heads, self.heads, self.readers)
        chosen.storage = self.storage.select(rows) if self.storage else None
        chosen._put(self.positions.clone() if alike else self.positions[rows])
        return chosen

    def _put(self, positions: Tensor) -> None:
        self._where, self.outlook = positions, None

    def _growth(self, positions: Tensor, at: np.ndarray) -> int:
        """Return how many tokens to make room for where none is forgotten: copying a long text often would be slow."""
        more = positions.shape[1] // _SHARE
        until = at + more
        coming = torch.from_numpy(at)[:, None] + torch.arange(more)
        return (
            more
            if self.alive(positions, until).eq(positions >= 0).all() and self.alive(coming, until).all()
            else 0
        )


def shelves(pattern: Pattern, readers: tuple[Pattern, ...], key_heads: int, *, same: bool) -> list[Shelf]:
    """Put key heads whose query heads read alike on one shelf each.

    Args:
        pattern: that of all heads, to be named in an error.
        readers: the pattern of every query head.
        key_heads: number of key heads, which divides that of the query heads.
        same: whether query heads that share a key head must read the same.

    Raises:
        PatternError: they must, and do not.
    """
    shared = len(readers) // key_heads
    together: dict[frozenset[Pattern], list[int]] = {}
    for key_head in range(key_heads):
        own = frozenset(readers[key_head * shared : (key_head + 1) * shared])
        together.setdefault(own, []).append(key_head)
    found = []
    for kinds, members in together.items():
        if same and len(kinds) > 1:
            raise PatternError(
                message(
                    "Query heads that share a key head cannot count places in the cache differently.",
                    {"pattern": str(pattern), "key heads": str(key_heads)},
                    fix='places="text", or a pattern that is the same on all heads',
                )
            )
        heads = [head * shared + place for head in members for place in range(shared)]
        found.append(Shelf(members, heads, tuple(readers[head] for head in heads)))
    return found


def _part(heads: list[int]) -> slice | list[int]:
    """Return numbers of heads as a slice where they are evenly spaced."""
    spaced = slice(heads[0], heads[-1] + 1, heads[1] - heads[0] if len(heads) > 1 else 1)
    return spaced if list(range(heads[-1] + 1))[spaced] == heads else heads


@lru_cache(maxsize=8)
def _alive(
    readers: tuple[Pattern, ...], keys: bytes, shape: tuple[int, int], at: tuple[int, ...]
) -> np.ndarray:
    """Say of positions as bytes what `Shelf.alive` says; layers that read and hold alike ask for the same."""
    positions = np.frombuffer(keys, dtype=np.int64).reshape(shape)
    some = np.zeros(shape, dtype=bool)
    for reader in set(readers):
        some |= alive(reader, positions, at=np.array(at)[:, None])
    return some & (positions >= 0)
