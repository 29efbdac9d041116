"""A panel: the grid of one picture, what its cells hold, and the colours that say so."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longspan.derive.bins import edges

# Colours that stand out on a light and on a dark page. The first three also say once, twice, and more often.
HUES = ("#2f81f7", "#f78166", "#d2388b", "#2da44e", "#bf8700", "#8957e5")
_OFTEN = ("once", "twice", "more often")
# The palest cell that holds a pair at all.
_PALEST = 0.22


@dataclass(frozen=True, eq=False)
class Layer:
    """Heads that read alike, and how many pairs each cell holds on one of them, int64 `[rows, columns]`."""

    heads: tuple[int, ...]
    pairs: np.ndarray


@dataclass(frozen=True, eq=False)
class Panel:
    """One grid of a picture.

    Attributes:
        title, caption: what stands above it and below it.
        queries, keys: absolute positions along its sides.
        layers: what each group of heads reads.
    """

    title: str
    caption: str
    queries: range
    keys: range
    layers: tuple[Layer, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Cells down and across."""
        rows, columns = self.layers[0].pairs.shape
        return rows, columns

    @cached_property
    def areas(self) -> np.ndarray:
        """Pairs of positions in each cell."""
        rows, columns = (
            np.diff(edges(side, cells))
            for side, cells in zip((self.queries, self.keys), self.shape, strict=True)
        )
        return np.outer(rows, columns)

    @property
    def binned(self) -> bool:
        """Whether cells stand for more than one pair."""
        return bool(self.areas.max() > 1)

    @cached_property
    def often(self) -> np.ndarray:
        """How often a pair of each cell is read, on average over its pairs and over all heads."""
        heads = sum(len(layer.heads) for layer in self.layers)
        total = sum(len(layer.heads) * layer.pairs for layer in self.layers)
        return np.asarray(total / (heads * self.areas))

    @property
    def coloured(self) -> bool:
        """Whether heads are told apart by colour; more than there are colours are not."""
        return 1 < len(self.layers) <= len(HUES)

    @cached_property
    def inks(self) -> tuple[np.ndarray, np.ndarray]:
        """Colour of each cell, uint8 `[rows, columns, 3]`, and its opacity, `[rows, columns]`."""
        if not self.coloured:
            level = np.clip(np.rint(self.often), 1, len(_OFTEN)).astype(int) - 1
            return rgb(*HUES)[level], _opacity(self.often)
        often = np.stack([layer.pairs / self.areas for layer in self.layers])
        weight = np.minimum(often, 1.0)
        mixed = np.tensordot(weight, rgb(*HUES[: len(often)]), axes=(0, 0))
        mixed /= np.maximum(weight.sum(axis=0), 1e-9)[:, :, None]
        return np.rint(mixed).astype(np.uint8), _opacity(often.max(axis=0))

    @property
    def legend(self) -> tuple[tuple[str, str], ...]:
        """Colours and what they say; empty where there is but one."""
        if self.coloured:
            return tuple(zip(HUES, (heads(layer.heads) for layer in self.layers), strict=False))
        levels = int(np.clip(np.rint(self.often.max()), 1, len(_OFTEN)))
        return tuple(zip(HUES, _OFTEN[:levels], strict=False)) if levels > 1 else ()

    @property
    def note(self) -> str:
        """What a cell stands for, where that is more than one pair of one head."""
        parts = []
        if self.binned:
            rows, columns = (
                -(-len(side) // cells)
                for side, cells in zip((self.queries, self.keys), self.shape, strict=True)
            )
            parts.append(f"a cell is {rows:,} × {columns:,} pairs")
        total = sum(len(layer.heads) for layer in self.layers)
        if total > 1 and not self.coloured and len(self.layers) > 1:
            parts.append(f"{total} heads")
        if parts:
            parts.append("paler where fewer are read")
        return ", ".join(parts)


def heads(numbers: tuple[int, ...]) -> str:
    """Name some heads, at regular distances by the first two and the last.

    Example:
        >>> heads((3,)), heads((0, 1, 2, 3)), heads((1, 5, 9, 13)), heads((0, 3, 4))
        ('head 3', 'heads 0–3', 'heads 1, 5 … 13', 'heads 0, 3, 4')
    """
    first, *rest = numbers
    if not rest:
        return f"head {first}"
    if len(rest) > 1 and numbers == tuple(range(first, rest[-1] + 1, rest[0] - first)):
        return (
            f"heads {first}–{rest[-1]}" if rest[0] == first + 1 else f"heads {first}, {rest[0]} … {rest[-1]}"
        )
    return f"heads {', '.join(map(str, numbers))}"


def rgb(*hues: str) -> np.ndarray:
    """Return colours written `#rrggbb` as numbers, uint8 `[colours, 3]`."""
    return np.array([list(bytes.fromhex(hue[1:])) for hue in hues], dtype=np.uint8)


def _opacity(often: np.ndarray) -> np.ndarray:
    return np.where(often > 0, _PALEST + (1 - _PALEST) * np.minimum(often, 1.0), 0.0)
