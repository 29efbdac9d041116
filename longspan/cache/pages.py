"""Pages: storage in blocks of a fixed size out of a pool that many caches share.

A row of a batch holds a table of pages. Rows and forks with the same beginning share its pages, counted by how many hold
them, and a page that several hold is copied when one of them writes.

The pages of a table lie side by side as far as that can be: a processor fetches memory ahead that lies in a row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from longspan.cache.storage import PIECE, kept_slots, weighed
from longspan.errors import ShapeError, message
from longspan.kernel.native.slots import Slots, readable

# The page of slots that are nobody's; it is never given away.
_NOBODY = 0
# Columns that a table has more, when it grows.
_SPARE = 4


class Pool:
    """A fixed number of pages for keys and values, each for some tokens of one key head.

    Args:
        pages: how many pages, at least 1.
        size: tokens in a page, at least 1.
        width: numbers in a head's key.
        value_width: numbers in a head's value; None for as many.
        dtype, device: of the tensors.

    Raises:
        ShapeError: a number below 1.

    Example:
        >>> from longspan import Causal
        >>> from longspan.cache import Cache
        >>> pool = Pool(100, size=16, width=8)
        >>> cache = Cache(Causal(), heads=2, storage=pool)
        >>> key = torch.randn(1, 2, 40, 8)
        >>> output = cache.attend(key, key, key)
        >>> pool.free
        94
        >>> branch = cache.fork()
        >>> pool.free
        94
    """

    def __init__(
        self,
        pages: int,
        *,
        size: int = 16,
        width: int,
        value_width: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        value_width = width if value_width is None else value_width
        if min(pages, size, width, value_width) < 1:
            raise ShapeError(
                message(
                    "A pool has at least one page, with at least one token of at least one number.",
                    {"asked": f"{pages} pages of {size} tokens, width {width}, value width {value_width}"},
                    fix="Pool(1024, size=16, width=64)",
                )
            )
        self.pages, self.size = pages, size
        self.key = torch.zeros((pages + 1, size, width), dtype=dtype, device=device)
        self.value = torch.zeros((pages + 1, size, value_width), dtype=dtype, device=device)
        self._holders = np.zeros(pages + 1, dtype=np.int64)
        # What is nobody's is never one's own, and never given away; nor is what lies behind the end.
        self._holders[_NOBODY] = 2
        self._vacant = np.ones(pages + 2, dtype=bool)
        self._vacant[[_NOBODY, pages + 1]] = False
        self.free = pages

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, key and value."""
        return (self.key[0].numel() + self.value[0].numel()) * self.key.element_size()

    def check(self, number: int) -> None:
        """Raise ShapeError where there are not so many pages left."""
        if number > self.free:
            raise ShapeError(
                message(
                    "The pool has no pages left for these tokens.",
                    {
                        "wanted": f"{number} pages of {self.size} tokens of one key head",
                        "left": f"{self.free} of {self.pages}",
                    },
                    fix="a larger Pool, shorter texts, or cache.reset() on those that are done",
                )
            )

    def take(self, after: np.ndarray, each: int) -> np.ndarray:
        """Return so many pages for each of some lists, held once, or raise ShapeError and change nothing.

        Args:
            after: the page that those of a list are to come after, int64 `[lists]`; 0 for a list without one.
            each: pages of a list.

        Returns:
            int64 `[lists, each]`, an array of NumPy, for tensors of inference mode may not be changed outside of it. A list
            goes on in the page behind its last one, and starts where most room is left to go on, in the middle of it, so
            that what was there may go on too.
        """
        self.check(len(after) * each)
        behind = after[:, None] + 1
        if (
            each == 1
            and after.all()
            and self._vacant[behind].all()
            and len(set(after.tolist())) == len(after)
        ):
            taken = behind
            self._vacant[taken] = False
        else:
            taken = self._stretches(after, each)
        self._holders[taken] = 1
        self.free -= taken.size
        return taken

    def _stretches(self, after: np.ndarray, each: int) -> np.ndarray:
        """Take pages list by list, in few stretches."""
        taken = np.empty((len(after), each), dtype=np.int64)
        for pages, last in zip(taken, after.tolist(), strict=True):
            page, done = last + 1 if last != _NOBODY else _NOBODY, 0
            while done < each:
                if not self._vacant[page]:
                    page = self._roomiest(each - done)
                stretch = self._vacant[page : page + each - done]
                found = len(stretch) if stretch.all() else int(stretch.argmin())
                pages[done : done + found] = np.arange(page, page + found)
                self._vacant[page : page + found] = False
                page, done = page + found, done + found
        return taken

    def _roomiest(self, wanted: int) -> int:
        """Return where to start with so many pages: so that the longest stretch of vacant ones is left on both sides."""
        edges = np.flatnonzero(self._vacant[1:] != self._vacant[:-1]) + 1
        begins, lengths = edges[::2], edges[1::2] - edges[::2]
        most = int(lengths.argmax())
        return int(begins[most]) + max(0, int(lengths[most]) - wanted) // 2

    def hold(self, pages: np.ndarray) -> None:
        """Count one more holder for each page, as often as it is listed."""
        np.add.at(self._holders, pages, 1)

    def give_back(self, pages: np.ndarray) -> None:
        """Count one holder less for each page, as often as it is listed; pages without any are free."""
        listed = pages[pages != _NOBODY]
        np.subtract.at(self._holders, listed, 1)
        left = np.unique(listed[self._holders[listed] == 0])
        self._vacant[left] = True
        self.free += len(left)

    def shared(self, pages: np.ndarray) -> np.ndarray:
        """Say which pages more than one holds."""
        return self._holders[pages] > 1


class Pages:
    """Keys and values of some key heads in pages of a pool.

    Args:
        pool: where pages come from.
        key, value: `[batch, heads, tokens, width]`, whose shapes the pool must fit.

    Raises:
        ShapeError: tensors of another width, dtype or device than the pool's.
    """

    def __init__(self, pool: Pool, key: Tensor, value: Tensor) -> None:
        fits = all(
            (side.shape[3], side.dtype, side.device) == (pages.shape[2], pages.dtype, pages.device)
            for side, pages in ((key, pool.key), (value, pool.value))
        )
        if not fits:
            raise ShapeError(
                message(
                    "The pool holds other keys and values than these.",
                    {
                        "pool": f"width {pool.key.shape[2]} and {pool.value.shape[2]}, {pool.key.dtype}, {pool.key.device}",
                        "tensors": f"width {key.shape[3]} and {value.shape[3]}, {key.dtype}, {key.device}",
                    },
                    fix="Pool(..., width=key.shape[3], dtype=key.dtype)",
                )
            )
        self.pool, self.used = pool, 0
        # Slots up to which pages are taken as they are needed, before room is made again.
        self._limit = 0
        self._list(np.zeros((*key.shape[:2], 0), dtype=np.int64))

    def __del__(self) -> None:
        # When Python ends, what this needs may be gone already.
        if hasattr(self, "_columns") and not sys.is_finalizing():
            self.release()

    @property
    def table(self) -> np.ndarray:
        """Pages of every row and head, int64 `[batch, heads, pages]`."""
        return self._columns.numpy()[:, :, : self._pages]

    @property
    def free(self) -> int:
        here = self._open
        if self._limit <= self.used + here:
            return here
        # A last page that may be shared needs another in its place. Where the pool runs short, room is made sooner.
        pages = self.pool.free // self._lists - (not self._own)
        return max(here, min(self._limit - self.used, here + pages * self.pool.size))

    @property
    def _open(self) -> int:
        """Slots that are free in the last page."""
        return -self.used % self.pool.size

    @property
    def nbytes(self) -> int:
        held = np.unique(self.table)
        return int((held != _NOBODY).sum()) * self.pool.page_bytes

    def append(self, key: Tensor, value: Tensor) -> None:
        size, end = self.pool.size, self.used + key.shape[2]
        if not self._own or end > self._pages * size:
            self._make_room(end)
        if not self._slots.put(key, value, self.used):
            slots = torch.arange(self.used, end)
            places = torch.from_numpy(self.table)[:, :, slots // size]
            self.pool.key[places, slots % size] = key
            self.pool.value[places, slots % size] = value
        self.used = end

    def _make_room(self, end: int) -> None:
        """Take pages for all slots up to an end, and copies of those that others hold too and that will be written to."""
        more = max(0, -(-end // self.pool.size) - self._pages)
        before = np.zeros(0, dtype=np.int64)
        if not self._own:
            # Only the last page is written to again, if it has slots left.
            tail = self.table[:, :, self._pages - bool(self._open) :]
            crowded = self.pool.shared(tail)
            before = tail[crowded]
        # Before anything is changed.
        self.pool.check(len(before) + more * self._lists)
        if len(before):
            copies = self.pool.take(np.full_like(before, _NOBODY), 1)[:, 0]
            to, of = torch.from_numpy(copies), torch.from_numpy(before)
            for pages in (self.pool.key, self.pool.value):
                pages[to] = pages[of]
            self.pool.give_back(before)
            tail[crowded] = copies
        if more:
            self._widen(more)
        self._own = True

    def _widen(self, more: int) -> None:
        """Take so many pages more for every list."""
        batch, heads, pages = self.table.shape
        last = self.table[:, :, -1].flatten() if pages else np.full(batch * heads, _NOBODY)
        fresh = self.pool.take(last, more)
        if pages + more > self._columns.shape[2]:
            self._list(self.table, spare=max(more, pages // 4, _SPARE))
        self._columns.numpy()[:, :, pages : pages + more] = fresh.reshape(batch, heads, more)
        self._count(pages + more)

    def read(self) -> tuple[Tensor, Tensor]:
        table = torch.from_numpy(self.table)
        key, value = (
            pages[table].flatten(2, 3)[:, :, : self.used] for pages in (self.pool.key, self.pool.value)
        )
        return key, value

    def weigh(self, query: Tensor, bias: Tensor | None, scale: float, begin: int = 0) -> Tensor:
        if readable(query, self.pool.key):
            return self._slots.weigh(query, bias, scale, begin, self.used)
        exact = torch.promote_types(query.dtype, torch.float32)
        keys, values = (self._pieces(side, exact, begin) for side in (self.pool.key, self.pool.value))
        scores = torch.cat([query.to(exact) @ piece.mT for piece in keys], dim=-1) * scale
        weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        return weighed(weights, values).to(query.dtype)

    def _pieces(self, side: Tensor, dtype: torch.dtype, begin: int) -> Iterator[Tensor]:
        """Yield what is held from a slot on, `[batch, heads, tokens, width]`, in pieces that a processor's cache holds."""
        (batch, heads, _), size = self.table.shape, self.pool.size
        at_once = max(1, PIECE // (batch * heads * side[0].numel()))
        first = begin // size
        skip, left = begin - first * size, self.used - first * size
        for table in torch.from_numpy(self.table)[:, :, first:].split(at_once, dim=2):
            piece = side.index_select(0, table.flatten().to(side.device)).view(
                batch, heads, -1, side.shape[2]
            )
            # What nobody wrote to the end of the last page may be anything, even no number.
            yield piece[:, :, skip:left].to(dtype)
            skip, left = 0, left - piece.shape[2]

    def keep(self, wanted: Tensor, room: int) -> Tensor:
        size, whole = self.pool.size, self.used // self.pool.size
        origin = kept_slots(wanted[:, : whole * size].reshape(len(wanted), whole, size).any(2))
        chosen = origin.cpu().numpy()
        index = np.broadcast_to(chosen.clip(0)[:, None], (*self.table.shape[:2], chosen.shape[1]))
        kept = np.take_along_axis(self.table, index, axis=2)
        kept[np.broadcast_to(chosen[:, None] < 0, kept.shape)] = _NOBODY
        before = self.table
        self._list(np.concatenate([kept, before[:, :, whole:]], axis=2), spare=room // size + 1)
        self.pool.hold(self.table)
        self.pool.give_back(before)
        slots = (
            (origin[:, :, None] * size + torch.arange(size))
            .masked_fill(origin[:, :, None] < 0, -1)
            .flatten(1)
        )
        last = torch.arange(whole * size, self.used).expand(len(slots), -1)
        self.used = kept.shape[2] * size + last.shape[1]
        self._limit = self.used + room
        return torch.cat([slots, last], dim=1).to(wanted.device)

    def truncate(self, used: int) -> None:
        pages = -(-used // self.pool.size)
        self.pool.give_back(self.table[:, :, pages:])
        self._list(self.table[:, :, :pages])
        self.used = used

    def select(self, rows: Tensor) -> Pages:
        chosen = object.__new__(type(self))
        chosen.pool, chosen.used, chosen._limit = self.pool, self.used, self._limit
        chosen._list(self.table[rows.cpu().numpy()])
        self.pool.hold(chosen.table)
        # From now on its pages are no longer its alone.
        self._own = False
        return chosen

    def release(self) -> None:
        self.pool.give_back(self.table)
        self._list(self.table[:, :, :0])
        self.used = self._limit = 0

    def _list(self, table: np.ndarray, *, spare: int = 0) -> None:
        """List these pages, with columns for more."""
        batch, heads, pages = table.shape
        columns = np.zeros((batch, heads, pages + spare), dtype=np.int64)
        columns[:, :, :pages] = table
        # A tensor, so that copies of this and of its slots share one too.
        self._columns = torch.from_numpy(columns)
        self._lists = batch * heads
        self._slots = Slots(self.pool.key, self.pool.value, table=self._columns)
        self._count(pages)
        # Whether it is known that nobody else holds the last pages.
        self._own = False

    def _count(self, pages: int) -> None:
        self._pages, self._slots.end = pages, pages * self.pool.size
