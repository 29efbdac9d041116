"""Layer: the cache of one attention layer, which holds exactly the keys that can still be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from longspan.cache.form import Form, captured, check
from longspan.cache.pages import Pages, Pool
from longspan.cache.reading import Reading, Rotate
from longspan.cache.shelf import Shelf, shelves
from longspan.cache.storage import Plain, Rounded, Storage
from longspan.errors import ShapeError, message
from longspan.kernel.softmax.finite import capturing
from longspan.pattern import Causal, Pattern
from longspan.score import Score, collect


class Cache:
    """Keys and values of one attention layer: those that a later query may read, whatever the pattern, and no others.

    Law: a text read through `attend` in pieces of any size gives what `longspan.attend` gives on the whole text with
    `pattern & Causal()`. On every key head there lie the keys of `live(pattern, at=n - undo)` of its query heads, where
    `n` was the length when room was last made, and at most `block` tokens beside them.

    Rows of a batch may have different lengths. Keys carry no gradient.

    Args:
        pattern: what is read. A cache knows no future, so it is intersected with `Causal()`.
        heads: number of query heads.
        key_heads: number of key heads; None for as many as query heads.
        block: tokens that are taken in before room is made again, at least 1.
        undo: how many tokens `crop` can always take back, at least 0: their keys are held longer.
        storage: None for tensors as they are; "int8" for eight bits, each number within 1 / 254 of the largest in its
            token and head; or a `Pool` of pages that caches share.
        rotate: a function of keys or queries `[batch, heads, tokens, width]`, their positions `[tokens]` and the length
            of the text, that returns them turned. With it keys are held unturned, and are turned at every reading
            with the length at that time: what frequencies that vary with the length need.
        places: positions that `rotate` is told. "text" counts from the beginning of the text; "cache" counts the keys
            that a query reads, which is how StreamingLLM stays inside the trained length.

    Raises:
        PatternError: a pattern that cannot be shared out among the heads.
        ShapeError: numbers of heads that do not fit, or an option outside its range.

    Example:
        >>> from longspan import Streaming
        >>> cache = Cache(Streaming(8, sinks=2), heads=4, key_heads=2, block=1)
        >>> for _ in range(100):
        ...     query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16)
        ...     output = cache.attend(query, key, key)
        >>> cache.held(head=0)
        [0, 1, 92, 93, 94, 95, 96, 97, 98, 99]
        >>> print(cache)
        Cache of Streaming(8, sinks=2): 100 tokens read, 10 held, 2,560 bytes

    References:
        Jiang et al., Mistral 7B (arXiv 2310.06825), section 2, the rolling buffer; Xiao et al., StreamingLLM (arXiv
        2309.17453), section 3.2; Kwon et al., PagedAttention (arXiv 2309.06180), section 4.
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        heads: int,
        key_heads: int | None = None,
        block: int = 64,
        undo: int = 0,
        storage: str | Pool | None = None,
        rotate: Rotate | None = None,
        places: str = "text",
    ) -> None:
        key_heads = heads if key_heads is None else key_heads
        if storage not in (None, "int8") and not isinstance(storage, Pool):
            raise _refuse(f"There is no storage {storage!r}.", fix='None, "int8" or a Pool')
        if places not in ("text", "cache"):
            raise _refuse(f"Places are counted in the text or in the cache, got {places!r}.", fix='"text"')
        if places == "cache" and rotate is None:
            raise _refuse("Places in the cache are told to `rotate`, and there is none.", fix="rotate=...")
        if block < 1 or undo < 0:
            raise _refuse(
                f"A block holds a token or more, and nothing less than 0 is undone, got {block=}, {undo=}.",
                fix="block=64, undo=0",
            )
        if key_heads < 1 or heads < 1 or heads % key_heads:
            raise _refuse(
                f"{heads} query heads cannot share {key_heads} key heads equally.",
                fix="a number of key heads that divides the number of query heads",
            )
        self.pattern, self.heads, self.key_heads = pattern, heads, key_heads
        self.block, self.undo, self.storage = block, undo, storage
        self.rotate, self.places = rotate, places
        self._readers = tuple((pattern & Causal()).at_head(head, heads) for head in range(heads))
        self._shelves = shelves(pattern, self._readers, key_heads, same=places == "cache")
        self._lengths: np.ndarray | None = None
        # No row can be cropped to below this length: some keys that it would read are gone.
        self._floor = np.zeros(0, dtype=np.int64)
        self._form: Form | None = None
        self._usual: Reading | None = None
        # Whether all rows lie alike, so that one row of positions tells of all.
        self._alike = True

    @property
    def lengths(self) -> list[int]:
        """Tokens read in each row of the batch, empty before the first."""
        return [] if self._lengths is None else self._lengths.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take, free slots and scales included; pages that rows share count once."""
        return sum(shelf.nbytes for shelf in self._shelves)

    def held(self, *, head: int, row: int = 0) -> list[int]:
        """Return the positions of the keys held for a query head, dead ones that wait for room included."""
        shelf = next(shelf for shelf in self._shelves if head in shelf.heads)
        positions = shelf.positions[min(row, len(shelf.positions) - 1)]
        return sorted(positions[positions >= 0].tolist())

    def __str__(self) -> str:
        lengths = self.lengths
        read = (
            str(lengths[0] if lengths else 0)
            if len(set(lengths)) < 2
            else f"{min(lengths)} to {max(lengths)}"
        )
        most = max(int((shelf.positions >= 0).sum(1).max()) for shelf in self._shelves)
        return f"Cache of {self.pattern}: {read} tokens read, {most} held, {self.nbytes:,} bytes"

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        real: Tensor | None = None,
        start: int | Sequence[int] | None = None,
        scale: float | None = None,
        scores: Score | Sequence[Score] = (),
    ) -> Tensor:
        """Read the next tokens: their queries attend to what is held and to one another, and their keys are taken in.

        Where anything is refused, the cache stays as it was.

        Args:
            query: `[batch, heads, tokens, width]`, float.
            key: `[batch, key heads, tokens, width]`, unturned where the cache turns.
            value: `[batch, key heads, tokens, value width]`.
            real: bool `[batch, tokens]`, false on padding, which is passed over and gives 0; None for no padding.
            start: where the caller takes the tokens to begin, one number or one for each row; checked if given.
            scale: what scores are multiplied by; None for `1 / sqrt(width)`.
            scores: what else changes them, as in `longspan.attend`.

        Returns:
            `[batch, heads, tokens, value width]` in the dtype of `query`.

        Raises:
            ShapeError: tensors that do not fit together or not what was read before, keys that want a gradient, a
                start that is not where the text ends, more tokens than a pool has pages for.
            PlanError: while a CUDA graph is captured, which would not see the cache move on.
        """
        if capturing(query):
            raise captured(str(self))
        lengths, heads = self.lengths, (self.heads, self.key_heads)
        continues = self._form is not None and self._form.fits(query, key, value, *heads)
        continues = continues and real is None and (start is None or start == lengths)
        alone = continues and query.shape[2] == 1 and not scores and len(self._shelves) == 1
        if alone and self._shelves[0].ready:
            return self._next(query, key, value, scale)
        if not continues:
            sides = {"query": query, "key": key, "value": value}
            check(sides, real, start, heads=heads, form=self._form, lengths=lengths)
        changes = collect(scores, self.heads)
        if not query.shape[2]:
            return query.new_zeros((*query.shape[:3], value.shape[3]))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        real = None if real is None or bool(real.all()) else real.to(query.device)
        if real is not None and len(real) == 1:
            # Of a single row, padding is simply left out.
            output = query.new_zeros((*query.shape[:3], value.shape[3]))
            output[:, :, real[0]] = self.attend(
                *(side[:, :, real[0]] for side in (query, key, value)), scale=scale, scores=scores
            )
            return output
        if self.places == "cache" and query.shape[2] > 1:
            return self._one_by_one(query, key, value, real, scale, scores)
        fresh = self._lengths is None
        if fresh:
            self._begin(key, value)
        try:
            if real is not None:
                self._set_apart()
            reading = Reading(scale, changes, self._alike, self.rotate, self.places)
            return self._attend(query, key, value, real, reading)
        except BaseException:
            if fresh:
                self.reset()
            raise

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Take back the last tokens of every row, as if they had never been read.

        Args:
            lengths: tokens that remain, one number or one for each row.

        Raises:
            ShapeError: more tokens than were read, or fewer than keys are held for.
        """
        self.check_crop(lengths)
        if self._lengths is None:
            return
        wanted = self._as_rows(lengths)
        if len(set(wanted.tolist())) > 1:
            self._set_apart()
        for shelf in self._shelves:
            shelf.crop(wanted, alike=self._alike)
        self._lengths = wanted

    def check_crop(self, lengths: int | Sequence[int]) -> None:
        """Raise ShapeError where `crop(lengths)` would, and change nothing."""
        if self._lengths is None:
            return
        wanted = self._as_rows(lengths)
        if (wanted > self._lengths).any() or (wanted < 0).any():
            raise self._refuse(
                f"A crop to {wanted.tolist()} tokens is not a part of what was read.",
                "a length up to the present one",
            )
        if ((wanted < self._floor) & (wanted < self._lengths)).any():
            raise self._refuse(
                f"A crop to {wanted.tolist()} tokens would read keys that are gone; {self._floor.tolist()} is possible.",
                "Cache(..., undo=tokens), which holds keys that much longer",
            )

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, which may repeat, in this order: beams, branches, finished rows."""
        if self._lengths is None:
            return
        old = self._shelves
        self._shelves = [shelf.select(rows, alike=self._alike) for shelf in old]
        for shelf in old:
            shelf.storage.release()
        chosen = rows.cpu().numpy()
        self._lengths, self._floor = self._lengths[chosen], self._floor[chosen]
        self._form = replace(self._form, batch=len(rows))

    def fork(self) -> Cache:
        """Return a cache that has read the same text and goes its own way; pages are shared until they differ."""
        other = Cache(
            self.pattern,
            heads=self.heads,
            key_heads=self.key_heads,
            block=self.block,
            undo=self.undo,
            storage=self.storage,
            rotate=self.rotate,
            places=self.places,
        )
        if self._lengths is not None:
            rows = torch.arange(len(self._lengths), device=self._shelves[0].positions.device)
            other._shelves = [shelf.select(rows, alike=self._alike) for shelf in self._shelves]
            other._lengths, other._floor = self._lengths, self._floor
            other._form, other._alike = self._form, self._alike
        return other

    def reset(self) -> None:
        """Forget everything, as if nothing had been read."""
        for shelf in self._shelves:
            if shelf.storage is not None:
                shelf.storage.release()
        self._shelves = [Shelf(old.key_heads, old.heads, old.readers) for old in self._shelves]
        self._lengths, self._floor, self._form, self._alike = None, self._floor[:0], None, True

    def _next(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Read one more token where all is known already: what nearly every token of a long decoding comes to."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self._usual is None or self._usual.scale != scale:
            self._usual = Reading(scale, collect((), self.heads), self._alike, self.rotate, self.places)
        shelf = self._shelves[0]
        used = shelf.storage.used
        try:
            shelf.storage.append(key, value)
            output = self._usual.read_last(shelf, query)
        except BaseException:
            shelf.truncate(used)
            raise
        self._lengths = self._lengths + 1
        return output

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, reading: Reading
    ) -> Tensor:
        tokens = query.shape[2]
        ends = self._lengths + (tokens if real is None else real.sum(1).cpu().numpy())
        starts = self._lengths[:1] if self._alike else self._lengths
        alone = tokens == 1 and real is None
        positions = None if alone else _positions(starts, tokens, real, query.device)
        marks = []
        try:
            for shelf in self._shelves:
                if tokens > shelf.storage.free:
                    held_from = np.maximum(self._lengths - self.undo, 0)
                    shelf.tidy(held_from, max(tokens, self.block))
                    self._floor = np.maximum(self._floor, held_from)
                marks.append((shelf, shelf.storage.used))
                sides = key[:, shelf.key_part], value[:, shelf.key_part]
                if positions is None:
                    shelf.push(*sides, starts, ahead=self.block, dtype=reading.exact(query.dtype))
                else:
                    shelf.append(*sides, positions)
            outputs = []
            for shelf in self._shelves:
                own = query[:, shelf.part]
                if positions is None:
                    outputs.append(reading.read_last(shelf, own))
                else:
                    outputs.append(reading.read(shelf, own, positions, ends))
        except BaseException:
            for shelf, used in marks:
                shelf.truncate(used)
            raise
        self._lengths = ends
        if tokens > self.block:
            self._floor = np.maximum(ends - self.undo, 0)
            for shelf in self._shelves:
                shelf.tidy(self._floor, self.block)
        if len(outputs) == 1:
            return outputs[0]
        whole = query.new_empty((*query.shape[:3], value.shape[3]))
        for shelf, output in zip(self._shelves, outputs, strict=True):
            whole[:, shelf.part] = output
        return whole

    def _one_by_one(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        scale: float,
        scores: Score | Sequence[Score],
    ) -> Tensor:
        """Read token by token: each turns the keys that it reads to places of their own."""
        before = self.fork()
        outputs = []
        try:
            for token in range(query.shape[2]):
                now = slice(token, token + 1)
                sides = (side[:, :, now] for side in (query, key, value))
                here = None if real is None else real[:, now]
                outputs.append(self.attend(*sides, real=here, scale=scale, scores=scores))
        except BaseException:
            self.reset()
            self.__dict__.update(before.__dict__)
            raise
        return torch.cat(outputs, dim=2)

    def _set_apart(self) -> None:
        """Give every row positions of its own."""
        if self._alike:
            self._alike = False
            for shelf in self._shelves:
                shelf.set_apart(len(self._lengths))

    def _begin(self, key: Tensor, value: Tensor) -> None:
        self._form = Form.of(key, value)
        self._lengths = np.zeros(len(key), dtype=np.int64)
        self._floor = self._lengths
        for shelf in self._shelves:
            sides = key[:, shelf.key_part], value[:, shelf.key_part]
            shelf.begin(self._new_storage(*sides), key.device)

    def _new_storage(self, key: Tensor, value: Tensor) -> Storage:
        if isinstance(self.storage, Pool):
            return Pages(self.storage, key, value)
        return Rounded(key, value) if self.storage == "int8" else Plain(key, value)

    def _as_rows(self, lengths: int | Sequence[int]) -> np.ndarray:
        return np.broadcast_to(np.asarray(lengths, dtype=np.int64), self._lengths.shape).copy()

    def _refuse(self, problem: str, fix: str) -> ShapeError:
        return ShapeError(message(problem, {"cache": str(self)}, fix=fix))


def _positions(starts: np.ndarray, tokens: int, real: Tensor | None, device: torch.device) -> Tensor:
    """Return the positions of new tokens, `[batch or 1, tokens]`, -1 for padding."""
    begins = torch.from_numpy(starts).to(device)[:, None]
    if real is None:
        return begins + torch.arange(tokens, device=device)
    return (begins + real.cumsum(1) - 1).masked_fill(~real, -1)


def _refuse(problem: str, *, fix: str) -> ShapeError:
    return ShapeError(message("A cache cannot be made so.", {"why": problem}, fix=fix))
