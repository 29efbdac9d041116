"""Order: the calls of all heads one after another, and which of them are the first at their queries and keys.

What is written first need not be added to anything, and where all is written, nothing need be cleared before.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided

from longspan.kernel.flash.band import Band
from longspan.kernel.flash.bands import BandGroup
from longspan.kernel.flash.views import served, split
from longspan.kernel.lattice.calls import regular
from longspan.kernel.lattice.parts import Lattice


@dataclass(frozen=True)
class Step:
    """A band that some heads read alike.

    Attributes:
        band: what is read.
        heads, key_heads: in equal shares, in order.
        layer: how many steps before this one touch the same queries, at most.
        first: no step before this one touches its keys, and none of its own rectangles share one.
    """

    band: Band
    heads: range
    key_heads: range
    layer: int
    first: bool


@dataclass(frozen=True, eq=False)
class Order:
    """Steps in an order in which each layer is done before the next.

    Attributes:
        steps: what is called.
        layers: how many steps touch the same queries, at most.
        every_row: some step touches each query on each head.
        rows_written, keys_written: a step of the first layer, or a first one, touches each query or key on each head.
        masked: some step reads less than whole rectangles.
    """

    steps: tuple[Step, ...]
    layers: int
    every_row: bool
    rows_written: bool
    keys_written: bool
    masked: bool

    @property
    def keys_once(self) -> bool:
        """Whether no key is touched twice."""
        return all(step.first for step in self.steps)


@lru_cache(maxsize=256)
def order(groups: tuple[BandGroup, ...], heads: int, length: int, key_heads: int, keys: int) -> Order:
    """Return the steps of groups of heads.

    Args:
        groups: who reads what.
        heads, length: of the query.
        key_heads, keys: of key and value.
    """
    alike: dict[tuple[int, Band], list[int]] = {}
    rows, rows_written = 0, 0
    for group in groups:
        times = np.zeros(length, dtype=np.int16)
        begun = np.zeros(length, dtype=bool)
        for piece in itertools.chain.from_iterable(map(split, group.bands)):
            touched = _view(times, piece.query, piece.shape)
            layer = int(touched.max(initial=0))
            touched[...] = layer + 1
            if layer == 0:
                _view(begun, piece.query, piece.shape)[...] = True
            alike.setdefault((layer, piece), []).extend(group.heads)
        rows += len(group.heads) * int(np.count_nonzero(times))
        rows_written += len(group.heads) * int(np.count_nonzero(begun))
    steps = []
    read, written = np.zeros((2, key_heads, keys), dtype=bool)
    for (layer, band), members in sorted(alike.items(), key=lambda item: item[0][0]):
        for run in regular(sorted(members)):
            for some, some_keys in served(run, heads // key_heads):
                chosen = slice(some_keys[0], some_keys[-1] + 1, some_keys.step)
                touched = _view(read[chosen], band.key, band.shape)
                first = band.apart and not touched.any()
                touched[...] = True
                if first:
                    _view(written[chosen], band.key, band.shape)[...] = True
                steps.append(Step(band, some, some_keys, layer, first))
    return Order(
        tuple(steps),
        max((step.layer + 1 for step in steps), default=0),
        rows == heads * length,
        rows_written == heads * length,
        bool(written.all()),
        any((step.band.low, step.band.high) != (None, None) for step in steps),
    )


def _view(places: np.ndarray, side: Lattice, shape: tuple[int, int]) -> np.ndarray:
    """Return the places of rectangles, `[..., outer, inner, places]`, of an array `[..., places of a tensor]`."""
    *leading, one = places.strides
    along = (side.outer * one, side.inner * one, side.step * one)
    return as_strided(
        places[..., side.start :], (*places.shape[:-1], *shape, side.places), (*leading, *along)
    )
