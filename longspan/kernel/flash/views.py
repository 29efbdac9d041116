"""Views: the tensors of a band as flash attention takes them, `[rectangles, places, heads, width]`, without a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from longspan.kernel.flash.band import Band
from longspan.kernel.lattice.calls import disjoint, paired, regular
from longspan.kernel.lattice.parts import Lattice

# A few queries that read many keys keep only few processors of a device busy. So their keys are cut into stretches of
# this many at least, but not into more stretches than there are processors.
FEW, STRETCH, MOST = 8, 1_024, 128


@dataclass(frozen=True)
class View:
    """What one call reads: some heads, and rectangles along one axis, which are its batch.

    Attributes:
        band: what is read.
        heads, key_heads: in equal shares, in order.
        rows, outer, inner: rows of the batch, and rectangles of the band; at most one of them is more than one.
    """

    band: Band
    heads: range
    key_heads: range
    rows: range
    outer: range
    inner: range

    @property
    def again(self) -> bool:
        """Whether all rectangles have the same queries."""
        return len(self.inner) > 1 and self.band.query.inner == 0

    @property
    def once(self) -> View:
        """The same with every query once."""
        return replace(self, inner=self.inner[:1]) if self.again else self

    def queries(self, tensor: Tensor) -> Tensor:
        """Return the view `[rectangles, places, heads, ...]` of a tensor `[batch, heads, queries, ...]`."""
        return self._view(tensor, self.band.query, self.heads, self.inner)

    def keys(self, tensor: Tensor) -> Tensor:
        """Return the view `[rectangles, places, key heads, ...]` of a tensor `[batch, key heads, keys, ...]`."""
        return self._view(tensor, self.band.key, self.key_heads, self.inner)

    def all_queries(self, tensor: Tensor) -> bool:
        """Say whether one call reads the whole of a tensor on the side of queries, as it lies."""
        return self._whole(tensor, self.band.query, self.heads)

    def all_keys(self, tensor: Tensor) -> bool:
        """Say whether one call reads the whole of a tensor on the side of keys, as it lies."""
        return self._whole(tensor, self.band.key, self.key_heads)

    def _whole(self, tensor: Tensor, side: Lattice, heads: range) -> bool:
        shape = (len(self.rows), len(heads), side.places)
        return self.band.rectangles == 1 and side.step == 1 and shape == tuple(tensor.shape[:3])

    def add_queries(self, whole: Tensor, part: Tensor, add: Callable[[Tensor, Tensor], Any]) -> None:
        """Add what a call gave for its queries to the whole, or do whatever `add` does."""
        for piece in part.split(1) if self.again else [part]:
            add(self.once.queries(whole), piece)

    def add_keys(self, whole: Tensor, part: Tensor, add: Callable[[Tensor, Tensor], Any]) -> None:
        """Add what a call gave for its keys to the whole, where rectangles may overlap."""
        lattice = self.band.key
        name = "inner" if len(self.inner) > 1 else "outer" if len(self.outer) > 1 else None
        if name is None or self.band.apart:
            add(self.keys(whole), part)
            return
        run, advance = getattr(self, name), getattr(lattice, name)
        if advance == 0:
            once = replace(self, **{name: run[:1]})
            for piece in part.split(1):
                add(once.keys(whole), piece)
            return
        for rectangles, places in disjoint(lattice, advance, len(run)):
            piece = part[rectangles, places]
            start = lattice.start + places.start * lattice.step
            cut = replace(lattice, start=start, places=piece.shape[1])
            some = replace(self, **{name: run[rectangles]})
            add(some._view(whole, cut, self.key_heads, some.inner), piece)

    def _view(self, tensor: Tensor, lattice: Lattice, heads: range, inner: range) -> Tensor:
        batch_stride, head_stride, stride, *rest = tensor.stride()
        axes = (
            (self.rows, batch_stride),
            (self.outer, lattice.outer * stride),
            (inner, lattice.inner * stride),
        )
        offset = tensor.storage_offset() + lattice.start * stride + heads.start * head_stride
        offset += sum(run.start * step for run, step in axes)
        run, step = next(((run, step) for run, step in axes if len(run) > 1), axes[0])
        return tensor.as_strided(
            (len(run), lattice.places, len(heads), *tensor.shape[3:]),
            (run.step * step, lattice.step * stride, heads.step * head_stride, *rest),
            offset,
        )


def views(band: Band, batch: int, heads: range, key_heads: range) -> Iterator[View]:
    """Yield the calls of a band: the longest of batch, outer and inner rectangles goes into one call."""
    runs = {"rows": range(batch), "outer": range(band.shape[0]), "inner": range(band.shape[1])}
    together = (
        "inner"
        if band.query.inner == 0 and band.shape[1] > 1
        else max(runs, key=lambda name: len(runs[name]))
    )
    loops = {
        name: [run] if name == together else [run[at : at + 1] for at in range(len(run))]
        for name, run in runs.items()
    }
    for rows in loops["rows"]:
        for outer in loops["outer"]:
            for inner in loops["inner"]:
                yield View(band, heads, key_heads, rows, outer, inner)


def split(band: Band) -> Iterator[Band]:
    """Cut the keys of a few queries into stretches, rectangles of the same queries, to be merged."""
    keys = band.key
    size = max(STRETCH, -(-keys.places // MOST))
    number = keys.places // size
    if band.query.places > FEW or band.rectangles > 1 or number < 2 or (band.low, band.high) != (None, None):
        yield band
        return
    yield replace(
        band,
        query=replace(band.query, inner=0),
        key=replace(keys, places=size, inner=size * keys.step),
        shape=(1, number),
    )
    rest = keys.places - number * size
    if rest:
        start = keys.start + number * size * keys.step
        yield replace(band, key=replace(keys, start=start, places=rest))


def served(heads: range, share: int) -> Iterator[tuple[range, range]]:
    """Cut heads so that key heads serve them in equal shares, in order: all at once where they lie so."""
    serving = [head // share for head in heads]
    each = serving.count(serving[0])
    key_heads = regular(serving[::each])
    if len(key_heads) == 1 and serving == [head for head in key_heads[0] for _ in range(each)]:
        yield heads, key_heads[0]
    else:
        yield from paired(heads, share)
